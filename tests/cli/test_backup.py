"""backup as a user types it: full, top, and chains of incremental ones."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import byre
from byre.cli.main import main
from byre.io.extent import COMPRESSED, DATA

Output = pytest.CaptureFixture[str]
K, M = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def disk() -> str:
    assert main(["create", "-q", "-f", "qcow2", "disk", "4M"]) == 0
    change(M, random.Random(1).randbytes(300 * K))
    return "disk"


def change(offset: int, data: bytes) -> None:
    with byre.open("disk", read_only=False) as image:
        image.write(offset, data)


def content(name: str, format: str = "") -> bytes:
    with byre.open(name, format=format) as image:
        return image.read(0, image.size)


def dirty(name: str = "weekly") -> int:
    with byre.open("disk") as image:
        bitmap = image.node.bitmap_store().find(name)  # type: ignore[attr-defined]
        assert not bitmap.inconsistent
        return int(bitmap.dirty_bytes)


def test_a_chain(disk: str, capsys: Output) -> None:
    """As in the examples of the help."""
    assert main(["bitmap", "--add", disk, "weekly"]) == 0
    moments = {}
    assert main(["backup", "-c", disk, "full", "--bitmap", "weekly"]) == 0
    moments["full"] = content(disk)
    before = "full"
    for number, name in enumerate(("monday", "tuesday", "wednesday")):
        change(number * M, b"%d" % number * 100 * K)
        assert dirty() == 128 * K
        options = ["-s", "incremental", "--bitmap", "weekly", "-B", before, "-F", "qcow2"]
        assert main(["backup", *options, disk, name]) == 0
        moments[name] = content(disk)
        assert dirty() == 0
        before = name
    for name, wanted in moments.items():
        assert content(name) == wanted
    with byre.open("full") as image:
        assert {extent.kind for extent in image.extents()} >= {COMPRESSED}
    with byre.open("tuesday", backing=False) as image:
        assert image.extents().bytes_of(DATA) == 128 * K
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", ["on-success", "never", "always"])
def test_bitmap_modes(disk: str, mode: str) -> None:
    assert main(["bitmap", "--add", disk, "weekly"]) == 0
    change(0, b"x")
    assert main(["backup", "-s", "bitmap", "--bitmap", "weekly", "--bitmap-mode", mode, disk, "copy"]) == 0
    assert dirty() == (64 * K if mode == "never" else 0)
    assert content("copy")[: 64 * K] == content(disk)[: 64 * K]
    assert content("copy")[64 * K :] == bytes(4 * M - 64 * K)


@pytest.mark.parametrize("options", [[], ["-O", "raw"], ["-c", "-o", "compression_type=zstd"], ["-m", "1"],
                                     ["--max-chunk", "128k", "-r", "1G"]])  # fmt: skip
def test_full(disk: str, options: list[str]) -> None:
    assert main(["backup", *options, disk, "copy"]) == 0
    assert content("copy", "raw" if "raw" in options else "qcow2") == content(disk)


def test_top() -> None:
    assert main(["create", "-q", "-f", "qcow2", "base", "4M"]) == 0
    assert main(["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "disk"]) == 0
    change(M, b"t" * 1000)
    assert main(["backup", "-s", "top", "disk", "copy"]) == 0
    assert content("copy") == content("disk")
    with byre.open("copy", backing=False) as image:
        assert image.extents().bytes_of(DATA) == 64 * K


def test_an_interruption_leaves_the_bitmap_and_no_target(disk: str) -> None:
    assert main(["bitmap", "--add", disk, "weekly"]) == 0
    change(0, random.Random(2).randbytes(4 * M))
    command = [
        sys.executable,
        "-m",
        "byre",
        "backup",
        "-s",
        "incremental",
        "--bitmap",
        "weekly",
        "-r",
        "1M",
        disk,
        "copy",
    ]
    with subprocess.Popen(command) as running:
        deadline = time.monotonic() + 20
        while not Path("copy").exists() or Path("copy").stat().st_size < M:
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 130
    assert not Path("copy").exists()
    assert dirty() == 4 * M


def test_a_full_disk_of_the_target(disk: str, capsys: Output) -> None:
    assert main(["bitmap", "--add", disk, "weekly"]) == 0
    change(0, b"x" * M)
    assert main(["create", "-q", "-f", "qcow2", "copy", "4M"]) == 0
    name = "copy"
    spec = 'json:{"driver":"qcow2","file":{"driver":"blkdebug","image":{"driver":"file","filename":"copy"},' \
           '"inject-error":[{"event":"write_aio","errno":28}]}}'  # fmt: skip
    assert main(["backup", "-n", "-s", "incremental", "--bitmap", "weekly", disk, spec]) == 1
    assert "No space left" in capsys.readouterr().err
    assert Path(name).exists()
    assert dirty() == M


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["disk"], "expecting the names of a source and a target"),
        (["disk", "disk"], "the output file is a file of the input image"),
        (["-s", "half", "disk", "copy"], "unknown sync mode 'half'"),
        (["-s", "none", "disk", "copy"], "for disks that are in use"),
        (["-s", "incremental", "disk", "copy"], "--sync incremental needs --bitmap"),
        (["--bitmap-mode", "always", "disk", "copy"], "--bitmap-mode needs --bitmap"),
        (["--bitmap", "nobody", "disk", "copy"], "'nobody'"),
        (["-B", "disk", "disk", "copy"], "requires an explicit backing format"),
        (["-F", "qcow2", "disk", "copy"], "-F needs -B"),
        (["-c", "-O", "raw", "disk", "copy"], "compression not supported"),
        (["-m", "99", "disk", "copy"], "allowed are 1 to 64"),
        (["--max-chunk", "4k", "disk", "copy"], "max-chunk is 4096 bytes"),
        (["--on-target-error", "panic", "disk", "copy"], "unknown error policy"),
        (["-B", "nothing", "-F", "qcow2", "disk", "copy"], "No such file"),
        (
            ["-O", "raw", "-B", "disk", "-F", "qcow2", "disk", "copy"],
            "backing file not supported for file format 'raw'",
        ),
    ],
)
def test_refusals(disk: str, words: list[str], message: str, capsys: Output) -> None:
    before = Path(disk).read_bytes()
    assert main(["backup", *words]) == 1
    assert message in capsys.readouterr().err
    assert not Path("copy").exists()
    assert Path(disk).read_bytes() == before


def test_help(capsys: Output) -> None:
    assert main(["backup", "--help"]) == 0
    assert "byre backup -s incremental --bitmap weekly -B full.qcow2" in capsys.readouterr().out
