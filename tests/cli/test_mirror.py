"""mirror as a user types it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

import byre
from byre.cli.main import main
from byre.io.extent import DATA, UNALLOCATED

Output = pytest.CaptureFixture[str]
K, M = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, size: str = "4M", *options: str, data: bool = True) -> None:
    assert main(["create", "-q", "-f", "qcow2", *options, name, size]) == 0
    if data:
        with byre.open(name, read_only=False) as image:
            image.write(M, random.Random(1).randbytes(300 * K))
            image.write_zeroes(2 * M, M)


def content(name: str, format: str = "") -> bytes:
    with byre.open(name, format=format) as image:
        return image.read(0, image.size)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-O", "raw"],
        ["-g", "4k", "--buf-size", "1M"],
        ["-r", "1G", "--unmap", "off"],
        ["--copy-mode", "write-blocking"],
        ["-O", "qcow2", "-o", "cluster_size=4k"],
    ],
)
def test_a_copy(options: list[str]) -> None:
    make("disk")
    assert main(["mirror", *options, "disk", "copy"]) == 0
    assert content("copy", "raw" if "raw" in options else "qcow2") == content("disk")
    with byre.open("disk") as disk:
        assert disk.graph.warnings == []


def test_onto_an_existing_image(capsys: Output) -> None:
    make("disk")
    Path("copy").write_bytes(b"old" * (4 * M // 3) + b"o")
    assert main(["mirror", "-n", "-O", "raw", "disk", "copy"]) == 0
    assert content("copy", "raw") == content("disk")
    make("small", "1M", data=False)
    assert main(["mirror", "-n", "disk", "small"]) == 1
    assert "different sizes: 4194304 and 1048576 bytes" in capsys.readouterr().err


def test_the_top_layer() -> None:
    make("base")
    make("disk", "4M", "-b", "base", "-F", "qcow2", data=False)
    with byre.open("disk", read_only=False) as image:
        image.write(0, b"t" * 64 * K)
    os.mkdir("elsewhere")
    assert main(["mirror", "-s", "top", "disk", "elsewhere/copy"]) == 0
    assert content("elsewhere/copy") == content("disk")
    with byre.open("elsewhere/copy", backing=False) as copy:
        assert [extent.length for extent in copy.extents() if extent.kind == DATA] == [64 * K]
        assert copy.node.backing_name == os.path.abspath("base")  # type: ignore[attr-defined]
    assert main(["mirror", "-s", "none", "disk", "empty"]) == 0
    with byre.open("empty", backing=False) as empty:
        assert {extent.kind for extent in empty.extents()} == {UNALLOCATED}


def test_progress(capsys: Output) -> None:
    make("disk")
    assert main(["mirror", "-p", "disk", "copy"]) == 0
    assert "(100.00/100%)" in capsys.readouterr().out
    assert main(["mirror", "--progress", "json", "disk", "again"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["job"] == "mirror"
    assert lines[-1]["offset"] == lines[-1]["total"] > 0


@pytest.mark.parametrize("policy", ["ignore", "stop"])
def test_errors_that_pass(policy: str, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byre.cli.targets._PAUSE", 0.05)
    make("disk")
    spec = {
        "driver": "qcow2",
        "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": "disk"},
                 "inject-error": [{"event": "read_aio", "errno": 5, "once": True}]},
    }  # fmt: skip
    assert main(["mirror", "--on-error", policy, "-O", "qcow2", f"json:{json.dumps(spec)}", "copy"]) == 0
    error = capsys.readouterr().err
    assert ("going on" if policy == "ignore" else "trying again") in error
    assert content("copy") == content("disk")


def test_a_failure_leaves_nothing_behind(capsys: Output) -> None:
    make("disk")
    spec = {
        "driver": "qcow2",
        "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": "disk"},
                 "inject-error": [{"event": "read_aio", "errno": 5}]},
    }  # fmt: skip
    assert main(["mirror", "-O", "qcow2", f"json:{json.dumps(spec)}", "copy"]) == 1
    error = capsys.readouterr().err
    assert "error while reading at byte" in error
    assert error.count("\n") == 1
    assert not Path("copy").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["disk"], "expecting the names of a source and a target"),
        (["disk", "disk"], "the output file is a file of the input image"),
        (["-s", "half", "disk", "copy"], "sync mode 'half' not supported"),
        (["-g", "1000", "disk", "copy"], "power of 2"),
        (["--unmap", "perhaps", "disk", "copy"], "expected on or off"),
        (["--on-error", "panic", "disk", "copy"], "unknown error policy 'panic'"),
        (["--target-is-zero", "disk", "copy"], "requires use of -n"),
        (["-n", "-o", "cluster_size=4k", "disk", "copy"], "-o has no effect"),
        (["-n", "disk", "copy"], "No such file"),
        (["nothing", "copy"], "No such file"),
        (["-O", "bochs", "disk", "copy"], "cannot create"),
        (["-O", "raw", "-o", "backing_file=x", "disk", "copy"], "backing"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: Output) -> None:
    make("disk")
    before = Path("disk").read_bytes()
    assert main(["mirror", *words]) == 1
    assert message in capsys.readouterr().err
    assert not Path("copy").exists()
    assert Path("disk").read_bytes() == before


def test_help_and_option_lists(capsys: Output) -> None:
    assert main(["mirror", "--help"]) == 0
    assert "Examples:" in capsys.readouterr().out
    assert main(["mirror", "-O", "qcow2", "-o", "help"]) == 0
    assert "cluster_size" in capsys.readouterr().out
