"""``resize``: grow, shrink, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from byre.cli.main import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(format: str) -> None:
    assert main(["create", "-q", "-f", format, "x", "1M"]) == 0


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("arguments", "size"),
    [(["x", "2M"], 2 << 20), (["x", "+512"], (1 << 20) + 512), (["--shrink", "x", "-64k"], (1 << 20) - 65536),
     (["--shrink", "x", "512k"], 1 << 19), (["x", "1M"], 1 << 20), (["--preallocation=falloc", "x", "+1M"], 2 << 20)],
)  # fmt: skip
def test_sizes(capsys: Output, qemu_img: Any, format: str, arguments: list[str], size: int) -> None:
    make(format)
    assert main(["resize", "-f", format, *arguments]) == 0
    assert capsys.readouterr().out == "Image resized.\n"
    assert f'"virtual-size": {size},' in qemu_img("info", "-f", format, "--output=json", "x").stdout
    if format == "qcow2":
        qemu_img("check", "x")


test_sizes = pytest.mark.oracle(test_sizes)


def test_quiet(capsys: Output) -> None:
    make("raw")
    assert main(["resize", "-q", "-f", "raw", "x", "2M"]) == 0
    assert capsys.readouterr().out == ""
    assert os.path.getsize("x") == 2 << 20


def test_shrinking_must_be_asked_for(capsys: Output) -> None:
    make("raw")
    assert main(["resize", "-f", "raw", "x", "-1k"], "qemu-img") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("qemu-img: ")
    assert "--shrink" in lines[0]
    assert lines[1].startswith("qemu-img: warning: ")
    assert os.path.getsize("x") == 1 << 20


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["x"], "expecting image file name and size"),
        (["x", "y", "1M"], "expecting image file name and size"),
        (["x", "big"], "invalid size"),
        (["x", "+-1"], "invalid size"),
        (["x", ""], "invalid size"),
        (["x", "0"], "between 1 and"),
        (["--shrink", "x", "-1M"], "between 1 and"),
        (["--shrink", "x", "-2M"], "between 1 and"),
        (["x", "9E"], "between"),
        (["--preallocation=lots", "x", "2M"], "preallocation mode 'lots'"),
        (["--preallocation=full", "--shrink", "x", "512k"], "growing"),
        (["missing", "1M"], "missing"),
    ],
)
def test_refusals_change_nothing(capsys: Output, arguments: list[str], part: str) -> None:
    make("qcow2")
    before = Path("x").read_bytes()
    assert main(["resize", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert Path("x").read_bytes() == before


def test_what_was_cut_off_does_not_come_back(capsys: Output) -> None:
    make("qcow2")
    assert main(["io", "-c", "write -q -P 7 0 1M", "x"]) == 0
    assert main(["resize", "--shrink", "x", "100k"]) == 0
    assert main(["resize", "x", "1M"]) == 0
    capsys.readouterr()
    assert main(["io", "-c", "read -q -P 7 0 100k", "-c", "read -q -P 0 100k 924k", "x"]) == 0
    assert capsys.readouterr().out == ""
