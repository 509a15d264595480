"""dd as a user types it; with skip and count it copies what dd(1) copies."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import byre
from byre.cli.main import main

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(os.urandom(200_000))
    return tmp_path


@pytest.mark.parametrize("block", [1, 512, 700, 4096, 65536, 300_000])
@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("count", [None, 0, 1, 2, 1000])
def test_the_range_is_that_of_dd(here: Path, block: int, skip: int, count: int | None) -> None:
    data = (here / "a").read_bytes()
    data = data.ljust(-(-len(data) // 512) * 512, b"\0")
    words = [f"bs={block}", f"skip={skip}", "if=a", "of=b", *([f"count={count}"] if count is not None else [])]
    assert main(["dd", "-f", "raw", *words]) == 0
    start = skip * block
    expected = data[start:] if count is None else data[start : start + count * block]
    assert (here / "b").read_bytes() == expected.ljust(-(-len(expected) // 512) * 512, b"\0")


@pytest.mark.oracle
@pytest.mark.parametrize("words", [[], ["bs=64k"], ["bs=1000", "count=7"], ["bs=4k", "skip=5"], ["bs=1M", "skip=9"]])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_as_the_peer_where_the_peer_is_right(
    here: Path, qemu_img: Run, words: list[str], format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = qemu_img("dd", "-f", "raw", "-O", format, *words, "if=a", "of=theirs", check=False)
    assert main(["dd", "-f", "raw", "-O", format, *words, "if=a", "of=ours"]) == expected.returncode
    assert ("cannot skip to specified offset" in expected.stderr) == (
        "cannot skip to specified offset" in capsys.readouterr().err
    )
    qemu_img("compare", "-f", format, "-F", format, "ours", "theirs")


def test_zeroes_are_written_too(here: Path) -> None:
    with (here / "a").open("wb") as file:
        file.truncate(1 << 20)
    assert main(["dd", "-f", "raw", "-O", "qcow2", "bs=1M", "if=a", "of=b"]) == 0
    with byre.open("b") as image:
        assert [extent.kind for extent in image.extents()] == [0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["if=a"], "must specify both input and output files"),
        (["if=a", "of=b", "conv=sync"], "unrecognized operand conv=sync"),
        (["if=a", "of=b", "skip"], "unrecognized operand skip"),
        (["if=a", "of=b", "bs=0"], "bs"),
        (["if=a", "of=b", "count=-1"], "count"),
        (["if=a", "of=b", "skip=x"], "skip"),
        (["-O", "nope", "if=a", "of=b"], "nope"),
        (["if=missing", "of=b"], "missing"),
        (["if=a", "of=a"], "output file is a file of the input image"),
    ],
)
def test_refusals_leave_nothing(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    before = (here / "a").read_bytes()
    assert main(["dd", *words]) == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in here.iterdir()] == ["a"]
    assert (here / "a").read_bytes() == before
