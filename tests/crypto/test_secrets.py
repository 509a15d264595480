"""Where secrets come from, and where they never go."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from byre.crypto.secrets import Secret, find_secret, find_text_secret
from byre.errors import AccessDenied, ByreError, InvalidArgument, NotFound


def load(text: str, **others: str) -> bytes:
    provider = {name: Secret.parse(f"secret,id={name},{rest}") for name, rest in others.items()}
    return Secret.parse(text).load(provider)


def test_data() -> None:
    assert load("secret,id=a,data=hunter2") == b"hunter2"
    assert load("secret,id=a,data=aHVudGVyMg==,format=base64") == b"hunter2"
    assert load("secret,id=a,data=a,,b") == b"a,b"


def test_file(tmp_path: Path) -> None:
    (tmp_path / "pw").write_bytes(b"with newline\n")
    assert load(f"secret,id=a,file={tmp_path}/pw") == b"with newline\n"
    (tmp_path / "pw64").write_bytes(b"aHVu\ndGVyMg==\n")
    assert load(f"secret,id=a,file={tmp_path}/pw64,format=base64") == b"hunter2"
    with pytest.raises(NotFound, match="cannot read secret 'a'"):
        load(f"secret,id=a,file={tmp_path}/missing")


def test_environment_and_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYRE_TEST_SECRET", "hunter2")
    assert load("secret,id=a,file=env:BYRE_TEST_SECRET") == b"hunter2"
    with pytest.raises(NotFound, match="no variable"):
        load("secret,id=a,file=env:BYRE_NO_SUCH_VARIABLE")
    (tmp_path / "pw").write_bytes(b"hunter2")
    with open(tmp_path / "pw", "rb") as file:
        assert load(f"secret,id=a,file=fd:{file.fileno()}") == b"hunter2"


def encrypted(plain: bytes, key: bytes, vector: bytes) -> bytes:
    padding = 16 - len(plain) % 16
    context = Cipher(algorithms.AES(key), modes.CBC(vector)).encryptor()
    return context.update(plain + bytes([padding]) * padding)


@pytest.mark.parametrize("format", ["base64", "raw"])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 100])
def test_encrypted_with_another_secret(format: str, length: int, tmp_path: Path) -> None:
    key, vector, plain = os.urandom(32), os.urandom(16), os.urandom(length)
    stored = encrypted(plain, key, vector)
    (tmp_path / "s").write_bytes(base64.b64encode(stored) if format == "base64" else stored)
    text = f"secret,id=a,file={tmp_path}/s,format={format},keyid=k,iv={base64.b64encode(vector).decode()}"
    assert load(text, k=f"format=base64,data={base64.b64encode(key).decode()}") == plain


def test_what_is_wrong_with_encrypted_secrets() -> None:
    key, vector = bytes(32), base64.b64encode(bytes(16)).decode()
    good = base64.b64encode(encrypted(b"hunter2", key, bytes(16))).decode()
    master = f"format=base64,data={base64.b64encode(key).decode()}"
    text = f"secret,id=a,format=base64,keyid=k,iv={vector},data="
    assert load(text + good, k=master) == b"hunter2"
    for wrong, others in (
        (text + good, {}),
        (text + good, {"k": "data=short"}),
        (text + good[:8], {"k": master}),
        (text + "!!!", {"k": master}),
        (text.replace(vector, "AAAA") + good, {"k": master}),
        (text + good, {"k": f"format=base64,data={base64.b64encode(b'x' * 32).decode()}"}),
    ):
        with pytest.raises(ByreError) as caught:
            load(wrong, **others)
        assert good not in str(caught.value)


def test_a_secret_that_is_its_own_key() -> None:
    one = Secret.parse("secret,id=a,data=x,keyid=a,iv=AAAA")
    with pytest.raises(InvalidArgument, match="own key"):
        one.load({"a": one})


@pytest.mark.parametrize(
    "text", ["secret,id=a,data=b,keyid=c", "secret,id=a,data=b,iv=c", "secret,id=a,data=%%%,format=base64"]
)
def test_malformed(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Secret.parse(text).load({})


def test_providers() -> None:
    assert find_secret({"a": b"x"}, "a") == b"x"
    assert find_secret({"a": "ä"}, "a") == "ä".encode()
    assert find_secret(lambda identity: identity * 2, "ab") == b"abab"
    for provider in (None, {}, {"b": "x"}):
        with pytest.raises(NotFound, match="no secret with id 'a'"):
            find_secret(provider, "a")
    with pytest.raises(InvalidArgument, match="not valid UTF-8"):
        find_text_secret({"a": b":<;\xff"}, "a")


def test_it_does_not_show_itself() -> None:
    one = Secret.parse("secret,id=a,data=hunter2")
    assert "hunter2" not in f"{one!r} {one}"
    with pytest.raises(TypeError):
        pickle.dumps(one)


HOLD = """
import sys, time
from byre.cli import common
common.parse((common.OBJECT,), sys.argv[1:])
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_command_line_does_not_show_it_for_long() -> None:
    words = ["--object", "secret,id=a,data=hunter2", "--object=secret,id=b,data=hunter3"]
    child = subprocess.Popen([sys.executable, "-c", HOLD, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        shown = Path(f"/proc/{child.pid}/cmdline").read_bytes()
        assert b"hunter" not in shown
        assert b"--object" in shown
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        assert next(line for line in limits.splitlines() if "core" in line).split()[4] == "0"
    finally:
        child.kill()
        child.communicate()
        time.sleep(0)


def test_a_wrong_key_of_a_secret_is_a_refusal() -> None:
    vector = base64.b64encode(bytes(16)).decode()
    stored = base64.b64encode(os.urandom(15) + b"\0" * 17).decode()
    text = f"secret,id=a,format=base64,keyid=k,iv={vector},data={stored}"
    with pytest.raises((AccessDenied, InvalidArgument)):
        load(text, k="format=base64,data=" + base64.b64encode(bytes(32)).decode())
