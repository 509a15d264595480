"""compare as a user types it: lines and exit codes are those of qemu-img."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import byre
from byre.cli.main import main

Run = Callable[..., "subprocess.CompletedProcess[str]"]
K = 1024


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_pairs(here: Path) -> None:
    data = os.urandom(256 * K)
    (here / "a").write_bytes(data)
    (here / "same").write_bytes(data)
    (here / "longer").write_bytes(data + bytes(64 * K))
    (here / "longer2").write_bytes(data + bytes(5000) + b"x" * 12 + bytes(120))
    (here / "other").write_bytes(data[: 100 * K + 300] + b"\0" * 300 + data[100 * K + 600 :])
    (here / "zeroes").write_bytes(bytes(256 * K))
    with (here / "hole").open("wb") as file:
        file.truncate(256 * K)


PAIRS = [(a, b) for a in ("a", "other", "zeroes", "hole") for b in ("same", "longer", "longer2", "zeroes", "hole")]


@pytest.mark.oracle
@pytest.mark.parametrize("strict", [[], ["-s"]])
def test_raw_pairs_as_the_peer(
    here: Path, qemu_img: Run, capsys: pytest.CaptureFixture[str], strict: list[str]
) -> None:
    make_pairs(here)
    for one, two in PAIRS:
        for first, second in ((one, two), (two, one)):
            words = ["compare", *strict, "-f", "raw", "-F", "raw", first, second]
            expected = qemu_img(*words, check=False)
            assert (main(words), capsys.readouterr().out) == (expected.returncode, expected.stdout), words


@pytest.mark.oracle
def test_qcow2_kinds_as_the_peer(here: Path, qemu_img: Run, qemu_io: Run, capsys: pytest.CaptureFixture[str]) -> None:
    make = {
        "none": [],
        "zero": ["write -z 0 1M"],
        "written zeroes": ["write -P 0 0 1M"],
        "kept zeroes": ["write 0 1M", "write -z 0 1M"],
        "data": ["write -P 3 0 1M"],
        "half": ["write -P 3 0 512k"],
        "compressed": [f"write -c -P 3 {64 * i}k 64k" for i in range(16)],
    }
    for name, commands in make.items():
        qemu_img("create", "-q", "-f", "qcow2", name, "1M")
        if commands:
            qemu_io(*(word for command in commands for word in ("-c", command)), name)
    for one in make:
        for two in make:
            for strict in ([], ["-s"]):
                words = ["compare", *strict, one, two]
                expected = qemu_img(*words, check=False)
                code, out = main(words), capsys.readouterr().out
                assert code == expected.returncode, words
                # In strict mode the peer also takes extents of unlike length for a mismatch, if one ends the image.
                assert out == expected.stdout or (strict and "half" in words), words


def test_exit_codes_of_errors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pairs(here)
    assert main(["compare", "a", "missing"]) == 2
    assert "missing" in capsys.readouterr().err
    assert main(["compare", "-T", "odd", "a", "same"]) == 2
    assert main(["compare", "a"]) == 1
    assert "expecting two image file names" in capsys.readouterr().err
    bad = (
        "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=a,"
        "file.inject-error.0.event=read_aio,file.inject-error.0.errno=5,file.inject-error.0.sector=9"
    )
    assert main(["compare", "--image-opts", bad, "driver=raw,file.driver=file,file.filename=same"]) == 4
    assert "error while reading offset 0" in capsys.readouterr().err


def test_quiet_and_progress(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pairs(here)
    assert main(["compare", "-q", "-p", "a", "other"]) == 1
    assert capsys.readouterr().out == ""
    assert main(["compare", "-p", "a", "same"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("    (0.00/100%)\r")
    assert "Images are identical.\n" in out


def test_a_chain_equals_its_flat_copy(here: Path) -> None:
    byre.create("base", "qcow2", 2 << 20)
    with byre.open("base", read_only=False) as image:
        image.write(0, os.urandom(1 << 20))
    byre.create("top", "qcow2", options={"backing_file": "base", "backing_fmt": "qcow2"})
    with byre.open("top", read_only=False) as image:
        image.write(500_000, os.urandom(300_000))
        image.write_zeroes(100_000, 200_000)
    assert main(["convert", "-O", "raw", "top", "flat"]) == 0
    assert main(["compare", "top", "flat"]) == 0
    assert main(["compare", "base", "flat"]) == 1
