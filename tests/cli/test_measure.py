"""``measure``: the same figures as the peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byre.cli.main import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_figures(capsys: Output) -> None:
    assert main(["measure", "-O", "qcow2", "--size", "1G"]) == 0
    assert capsys.readouterr().out == "required size: 393216\nfully allocated size: 1074135040\n"
    assert main(["measure", "--output=json", "--size", "1000"]) == 0
    assert capsys.readouterr().out == '{\n    "required": 1024,\n    "fully-allocated": 1024\n}\n'


@pytest.mark.oracle
@pytest.mark.parametrize(
    "arguments",
    ["--size 1G", "-O qcow2 --size 1T", "-O qcow2 -o cluster_size=512 --size 1G", "-O qcow2 -o compat=0.10 x",
     "-O qcow2 -o cluster_size=2M x", "-O qcow2 -o preallocation=full x", "-O qcow2 x", "x", "-O qcow2 base", "base",
     "-O qcow2 -o extended_l2=on,cluster_size=128k x", "-O qcow2 -o refcount_bits=1,cluster_size=4k --size 3G",
     "-O qcow2 -o backing_file=base,backing_fmt=raw x", "-O qcow2 -o backing_file=base --size 1M",
     "-O qcow2 --size 0", "--output json -O qcow2 bitmaps", "-O qcow2 -o cluster_size=512 bitmaps"],
)  # fmt: skip
def test_the_peer_says_the_same(capsys: Output, qemu_img: Any, arguments: str) -> None:
    Path("base").write_bytes(b"x" * 100000 + bytes(948576))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "x", "10M")
    qemu_img("create", "-q", "-f", "qcow2", "bitmaps", "10G")
    qemu_img("bitmap", "--add", "-g", "512", "bitmaps", "one")
    qemu_img("bitmap", "--add", "bitmaps", "another-name")
    assert main(["io", "-c", "write -q 3000001 700000", "-c", "write -q -z 0 64k", "x"]) == 0
    capsys.readouterr()
    assert main(["measure", *arguments.split()]) == 0
    assert capsys.readouterr().out == qemu_img("measure", *arguments.split()).stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("", "either --size or a file name"),
        ("a b", "at most one"),
        ("--size 1M a", "cannot be used together"),
        ("-f raw --size 1M", "need a file name"),
        ("-l snap", "need a file name"),
        ("--size many", "invalid image size"),
        ("-O nonsense --size 1M", "nonsense"),
        ("-O file --size 1M", "cannot create images"),
        ("-O qcow2 -o cluster_size=7 --size 1M", "7"),
        ("-O qcow2 -o nonsense=7 --size 1M", "nonsense"),
        ("-O qcow2 -o preallocation=some --size 1M", "some"),
        ("missing", "missing"),
    ],
)
def test_refusals(capsys: Output, arguments: str, part: str) -> None:
    assert main(["measure", *arguments.split()]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert part in captured.err
    assert captured.err.count("\n") == 1


def test_option_help(capsys: Output) -> None:
    assert main(["measure", "-O", "qcow2", "-o", "help", "--size", "1M"]) == 0
    assert capsys.readouterr().out.startswith("Supported qcow2 options:\n")
