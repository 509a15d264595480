"""stream as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import byre
from byre.cli.main import main
from support.chains import K, Layer, content

Output = pytest.CaptureFixture[str]
M = K * K


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def four() -> bytes:
    """``l3`` over ``l2`` over ``l1`` over ``l0``, each with something of its own."""
    for level in range(4):
        options = ["-b", f"l{level - 1}", "-F", "qcow2"] if level else []
        assert main(["create", "-q", "-f", "qcow2", *options, f"l{level}", "4M"]) == 0
        with byre.open(f"l{level}", read_only=False) as image:
            image.write(level * M, bytes((65 + level,)) * M)
    return content(Layer("l3", "qcow2"))


def backing(name: str) -> str:
    with byre.open(name, backing=False) as image:
        return str(image.node.backing_name)  # type: ignore[attr-defined]


def test_alone(capsys: Output) -> None:
    before = four()
    assert main(["stream", "l3"]) == 0
    assert capsys.readouterr().out == "Image streamed.\n"
    assert backing("l3") == ""
    for name in ("l0", "l1", "l2"):
        os.unlink(name)
    assert content(Layer("l3", "qcow2")) == before
    assert main(["stream", "-q", "l3"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("words", "expected"), [
    (["-b", "l0"], "l0"),
    (["--base=l1"], "l1"),
    (["--bottom", "l1"], "l0"),
    (["--bottom", "l2"], "l1"),
    (["--bottom", "l0"], ""),
    (["-b", "l1", "--backing-file", "./l1"], "./l1"),
    (["-b", "l2"], "l2"),
])  # fmt: skip
def test_onto_a_base(words: list[str], expected: str) -> None:
    before = four()
    assert main(["stream", "-q", *words, "l3"]) == 0
    assert backing("l3") == expected
    assert content(Layer("l3", "qcow2")) == before


def test_a_layer_further_down() -> None:
    before = four()
    keep = Path("l3").read_bytes()
    assert main(["stream", "-q", "-l", "l2", "-b", "l0", "l3"]) == 0
    assert Path("l3").read_bytes() == keep
    assert backing("l2") == "l0"
    os.unlink("l1")
    assert content(Layer("l3", "qcow2")) == before


@pytest.mark.parametrize(("words", "code", "message"), [
    ([], 1, "expecting one image file name"),
    (["-b", "l0", "--bottom", "l1", "l3"], 1, "exclude each other"),
    (["-b", "nothing", "l3"], 1, "did not find 'nothing' in the backing chain"),
    (["-b", "l3", "l3"], 1, "did not find 'l3'"),
    (["--backing-file", "x", "l3"], 1, "no base is to remain"),
    (["--on-error", "never", "l3"], 1, "unknown error policy 'never'"),
    (["--progress", "dots", "l3"], 1, "--progress must be"),
    (["-b", "l0", "--backing-file", "x" * 1024, "l3"], 1, "1023 bytes"),
    (["raw"], 1, "cannot change its backing file"),
    (["missing"], 1, "missing"),
])  # fmt: skip
def test_refusals(words: list[str], code: int, message: str, capsys: Output) -> None:
    four()
    Path("raw").write_bytes(bytes(65536))
    keep = {name: Path(name).read_bytes() for name in ("l0", "l1", "l2", "l3")}
    if words == ["raw"]:
        words = ["-f", "raw", "raw"]
    assert main(["stream", *words]) == code
    found = capsys.readouterr()
    assert message in found.err
    assert "Traceback" not in found.err
    assert {name: Path(name).read_bytes() for name in keep} == keep


def test_progress(capsys: Output) -> None:
    four()
    assert main(["stream", "--progress=json", "l3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["job"] == "stream"
    assert lines[-1]["offset"] == lines[-1]["total"] == 4 * M


def test_interrupted_and_taken_up_again() -> None:
    before = four()
    command = [sys.executable, "-m", "byre", "stream", "-q", "-r", "1M", "l3"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        time.sleep(1.2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert backing("l3") == "l2"
    assert content(Layer("l3", "qcow2")) == before
    assert main(["stream", "-q", "l3"]) == 0
    assert content(Layer("l3", "qcow2")) == before
