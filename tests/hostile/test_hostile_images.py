"""Images that nobody should vouch for: every command answers soon, in little memory, with a sentence.

What must hold is in docs/reliability.md. "Internal error" (70) is a failure here, and so is a traceback, a control
character on the terminal, JSON that is none, a source that changed, and a file opened because the image named it.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile import forge

MIB = 1 << 20
DEADLINE = 40.0

LOOK = (
    ["info", "image"],
    ["info", "--output", "json", "image"],
    ["snapshot", "-l", "image"],
)
"""These never open what the image names."""

CONVERT = ["convert", "-O", "qcow2", "image", "out"]
READ = (
    ["info", "--backing-chain", "--output", "json", "image"],
    ["measure", "-O", "qcow2", "image"],
    ["map", "--max-length", "1G", "image"],
    ["map", "--max-length", "1G", "--output", "json", "image"],
    ["check", "image"],
    ["check", "--output", "json", "image"],
    ["compare", "image", "empty"],
    CONVERT,
    ["convert", "-l", "1", "-O", "raw", "image", "out"],
    ["create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", "overlay"],
    ["io", "-r", "-c", "read 0 64k", "-c", "map", "-c", "info", "image"],
)
WRITE = (
    ["io", "-c", "write 0 64k", "-c", "discard 64k 64k", "-c", "write -z 300k 70k", "-c", "flush", "image"],
    ["snapshot", "-c", "new", "image"],
    ["resize", "image", "+1M"],
    ["check", "-r", "all", "image"],
)
"""On the image itself, so last."""

SECONDS = {"info": 2, "check": 12, "snapshot": 2, "create": 4}
BASE = 32
TAKEN = {"info": 256, "check": 256, "snapshot": 256}
"""MiB: the limits, of which ``BASE`` is there before a command begins."""

CODES = {"check": (0, 1, 2, 3, 63), "compare": (0, 1, 2, 3, 4)}

LONG = {
    "one L2 table 16384 times": (*READ[1:2], *READ[5:], *WRITE),
    "four TiB of nothing": (READ[4], READ[6], READ[7]),
    "refcount table of one block": (READ[4], *WRITE),
    "L1 past the end": (READ[4], *WRITE[:3]),
}
"""Left out: eight TiB of data take as long as they take, and some are looked at once rather than twice."""

NEVER = {"fifo", "socket", "/dev/tty", "/dev/zero", "/proc/self/mem", "/dev/fd/0", "/proc/self/environ"}


class Attempts:
    """The program that attempts it, started again after one that did not answer."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, folder: Path, words: list[str]) -> dict[str, Any]:
        process = self._process
        if process is None:
            process = self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("attempt.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(folder), words]) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            answered = waiting.select(DEADLINE)
        text = process.stdout.readline() if answered else ""
        if not text:
            self.close()
            pytest.fail(f"{' '.join(words)} {'died' if answered else 'hangs'}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the disk is no bottleneck, if there is such a place."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def attempts() -> Iterator[Attempts]:
    made = Attempts()
    yield made
    made.close()


def judge(words: list[str], got: dict[str, Any], named: set[str]) -> list[str]:
    """What is wrong with the answer to a command."""
    verb = words[0]
    wrong = []
    if got["code"] not in CODES.get(verb, (0, 1)):
        wrong.append(f"exit code {got['code']}")
    if got["seconds"] > SECONDS.get(verb, 20):
        wrong.append(f"took {got['seconds']:.1f} s")
    if got["taken"] > (TAKEN.get(verb, 384) - BASE) * MIB:
        wrong.append(f"took {got['taken'] // MIB} MiB")
    text = got["out"] + got["err"]
    if any(unicodedata.category(c) == "Cc" and c not in "\n\t\r" for c in text):
        wrong.append("prints control characters")
    if "Traceback" in text or "please report" in text:
        wrong.append("prints a traceback")
    messages = [line for line in got["err"].splitlines() if not line.startswith("byre: warning: ")]
    if verb != "check" and len(messages) > 1 and verb != "io":
        wrong.append(f"{len(messages)} lines of errors")
    if got["code"] in (1, 2) and verb not in ("check", "compare", "io") and not messages:
        wrong.append("fails without a word")
    if "json" in words and (got["out"] or got["code"] == 0):
        try:
            json.loads(got["out"])
        except ValueError:
            wrong.append("prints JSON that is none")
    found = {os.path.relpath(name) if os.path.isabs(name) and not name.startswith("/") else name
             for name in got["opened"]}  # fmt: skip
    if found & named:
        wrong.append(f"opened {', '.join(sorted(found & named))}")
    return [f"{' '.join(words)}: {what}: {(got['err'] or got['out'])[-300:]}" for what in wrong]


ATTEMPTS = [
    pytest.param(case, untrusted, id=case.name.replace(" ", "-") + ("-untrusted" if untrusted else ""))
    for case in forge.CASES
    for untrusted in ((False, True) if case.named or case.name == "good" else (False,))
]


@pytest.mark.parametrize(("case", "untrusted"), ATTEMPTS)
def test_every_command_survives(case: forge.Case, untrusted: bool, folder: Path, attempts: Attempts) -> None:
    case.make(folder / "image")
    (folder / "empty").write_bytes(b"")
    before = (folder / "image").stat()
    extra = ["--untrusted"] if untrusted else []
    everything = set(case.named)
    wrong: list[str] = []
    codes = {}
    written = False
    for words in (*LOOK, *READ, *WRITE):
        if words in LONG.get(case.name, ()):
            continue
        if words in WRITE and not written:
            written = True
            after = (folder / "image").stat()
            assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size), "the source was changed"
        got = attempts(folder, [words[0], *extra, *words[1:]])
        forbidden = everything if untrusted or words in LOOK else everything & NEVER
        wrong += judge(words, got, forbidden)
        codes[tuple(words)] = got["code"]
        for name in ("out", "overlay"):
            (folder / name).unlink(missing_ok=True)
    assert not wrong, "\n".join(wrong)
    if not case.good:
        assert codes[tuple(CONVERT)] == 1, "a broken image was converted"


def test_the_measurements(folder: Path, attempts: Attempts) -> None:
    """The tool of these tests works: it sees memory, files and time."""
    forge.write(folder / "image", forge.Head(size=1 << 40, l1_size=1 << 22), length=64 * MIB)
    got = attempts(folder, ["check", "image"])
    assert "image" in got["opened"]
    assert 10 * MIB < got["taken"] < 256 * MIB
    assert 0 < got["seconds"] < 5


def test_untrusted_by_environment(tmp_path: Path) -> None:
    forge.write(tmp_path / "image", backing=b"plain")
    (tmp_path / "plain").write_bytes(bytes(MIB))
    command = [sys.executable, "-m", "byre", "map", "image"]
    for value, code in (("1", 1), ("", 0), ("0", 0)):
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "BYRE_UNTRUSTED": value},
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        assert done.returncode == code
    done = subprocess.run([*command, "--untrusted"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "not opened for an untrusted image" in done.stderr


def test_largest_size(tmp_path: Path, attempts: Attempts) -> None:
    forge.write(tmp_path / "image", forge.Head(size=17 * forge.TIB, l1_size=34816), parts={3 << 16: bytes(34816 * 8)},
                length=1 << 20)  # fmt: skip
    assert attempts(tmp_path, ["info", "image"])["code"] == 0
    for words in (
        ["info", "--untrusted"],
        ["info", "--max-size", "1T"],
        ["convert", "--max-size", "1T", "-O", "qcow2"],
    ):
        got = attempts(tmp_path, [*words, "image", *(["out"] if words[0] == "convert" else [])])
        assert got["code"] == 1
        assert "18691697672192" in got["err"]
    assert attempts(tmp_path, ["info", "--untrusted", "--max-size", "20T", "image"])["code"] == 0


def test_references_need_a_word(tmp_path: Path, attempts: Attempts) -> None:
    (tmp_path / "plain").write_bytes(bytes(MIB))
    name = b'json:{"driver":"raw","file":{"driver":"file","filename":"plain"}}'
    forge.write(tmp_path / "image", backing=name, extensions=forge.extension(0xE2792ACA, b"raw"))
    refused = attempts(tmp_path, ["map", "image"])
    assert (refused["code"], "--allow-ref" in refused["err"]) == (1, True)
    assert "plain" not in refused["opened"]
    assert attempts(tmp_path, ["map", "--allow-ref", "image"])["code"] == 0
    assert attempts(tmp_path, ["map", "--allow-ref", "--untrusted", "image"])["code"] == 1


def test_a_name_from_an_image_is_escaped_once(tmp_path: Path, attempts: Attempts) -> None:
    forge.write(tmp_path / "image", backing=b"\x1b[31m", extensions=forge.extension(0xE2792ACA, b"raw"))
    assert r"'\x1b[31m'" in attempts(tmp_path, ["map", "image"])["err"]
    assert r"'\x1b[31m'" in attempts(tmp_path, ["map", "--untrusted", "image"])["err"]
    assert r"'\x1b[31m'" in attempts(tmp_path, ["info", "--backing-chain", "image"])["err"]


def test_hostile_sources_of_other_kinds(tmp_path: Path, attempts: Attempts) -> None:
    """What the user names himself may be something else than a file, too: refused, not waited for."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, words in (("fifo", "a FIFO"), ("/dev/null", "a character device"), ("folder", "a directory"),
                        ("/proc/self/status", "running kernel")):  # fmt: skip
        for command in (
            ["info", name],
            ["check", name],
            ["convert", "-O", "raw", name, "out"],
            ["compare", name, name],
        ):
            started = time.monotonic()
            got = attempts(tmp_path, command)
            assert got["code"] in (1, 2)
            assert words in got["err"], got["err"]
            assert time.monotonic() - started < 5
            assert not (tmp_path / "out").exists()


def test_what_a_backing_file_given_by_the_user_names(folder: Path, attempts: Attempts) -> None:
    """``-B`` vouches for that file, not for the files it names."""
    (folder / "plain").write_bytes(bytes(MIB))
    (folder / "source").write_bytes(b"x" * MIB)
    forge.write(folder / "image", backing=b"plain", extensions=forge.extension(0xE2792ACA, b"raw"))
    forge.write(folder / "refers", backing=b"json:{}", extensions=forge.extension(0xE2792ACA, b"raw"))
    forge.write(folder / "alone")
    onto = ["-F", "qcow2", "-O", "qcow2", "source", "out"]
    got = attempts(folder, ["convert", "--untrusted", "-B", "image", *onto])
    assert (got["code"], "plain" in got["opened"]) == (1, False)
    assert not (folder / "out").exists()
    got = attempts(folder, ["convert", "-B", "refers", *onto])
    assert (got["code"], "--allow-ref" in got["err"]) == (1, True)
    for words in (
        ["--untrusted", "-B", "alone"],
        ["-B", "image"],
        ["--untrusted", "-o", "data_file=data", "-B", "alone"],
    ):
        got = attempts(folder, ["convert", *words, *onto])
        assert got["code"] == 0, got["err"]
        (folder / "out").unlink()
