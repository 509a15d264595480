"""Filters beside the peer's: the same requests through the same options leave the same disk, allocated alike."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from byre.cli.main import main

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chooser = random.Random(7)
    with open("base.raw", "wb") as file:
        file.truncate(4 << 20)
        for offset in (0, 700_000, 1 << 20, 3_000_000):
            file.seek(offset)
            file.write(chooser.randbytes(200_000))


def both(qemu_io: Run, arguments: list[str], name: str, copy: str) -> None:
    """Run the arguments through both programs, the peer's on ``copy``."""
    qemu_io(*[word.replace(name, copy) for word in arguments])
    assert main(arguments, "qemu-io") == 0


def map_of(qemu_img: Run, name: str, *keys: str) -> str:
    """What is held by which layer, and more as ``keys`` say; where in the file does not matter."""
    import json

    rows = json.loads(qemu_img("map", "--output", "json", name).stdout)
    shown: list[list[object]] = []
    for row in rows:
        kind = [row["depth"], *(row.get(key, False) for key in keys)]
        if shown and shown[-1][2:] == kind:
            shown[-1][1] += row["length"]
        else:
            shown.append([row["start"], row["length"], *kind])
    return "\n".join(map(str, shown))


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k", "compat=0.10"])
def test_copy_on_read(qemu_img: Run, qemu_io: Run, options: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o", options, "mine.qcow2")
    qemu_io("-c", "write -P 7 128k 10k", "-c", "write -z 512k 64k", "mine.qcow2")
    shutil.copy("mine.qcow2", "theirs.qcow2")
    commands = [word for offset, length in ((0, 512), (100_000, 70_000), (600 << 10, 200_000), (1 << 20, 1 << 20),
                                            (3_100_000, 5000), (4_194_000, 304))
                for word in ("-c", f"read -q {offset} {length}")]  # fmt: skip
    both(qemu_io, ["-C", *commands, "mine.qcow2"], "mine", "theirs")
    # Which of the clusters are zero clusters may differ: the peer looks for zeroes in longer pieces.
    assert map_of(qemu_img, "mine.qcow2") == map_of(qemu_img, "theirs.qcow2")
    qemu_img("compare", "mine.qcow2", "theirs.qcow2")
    assert "No errors" in qemu_img("check", "mine.qcow2").stdout


def test_compress(qemu_img: Run, qemu_io: Run) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mine.qcow2")
    shutil.copy("mine.qcow2", "theirs.qcow2")
    commands = ["-c", "write -q -P 1 0 64k", "-c", "write -q -P 2 100k 300k", "-c", "write -q -P 3 1000001 7",
                "-c", "write -q -z 128k 64k", "-c", "write -q -P 4 130k 2k"]  # fmt: skip
    target = "driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename=mine.qcow2"
    both(qemu_io, [*commands, "--image-opts", target], "mine", "theirs")
    keys = ("zero", "data", "compressed")
    assert map_of(qemu_img, "mine.qcow2", *keys) == map_of(qemu_img, "theirs.qcow2", *keys)
    qemu_img("compare", "mine.qcow2", "theirs.qcow2")
    assert "No errors" in qemu_img("check", "mine.qcow2").stdout


def test_quorum(qemu_img: Run, qemu_io: Run) -> None:
    """A copy that is wrong is outvoted, and mended with rewrite-corrupted, by both programs."""
    for folder in ("mine", "theirs"):
        Path(folder).mkdir()
        for name in "abc":
            shutil.copy("base.raw", f"{folder}/{name}")
        with open(f"{folder}/b", "r+b") as file:
            file.seek(5000)
            file.write(b"wrong")
    target = "driver=quorum,vote-threshold=2,rewrite-corrupted=on," + ",".join(
        f"children.{index}.driver=raw,children.{index}.file.driver=file,children.{index}.file.filename=mine/{name}"
        for index, name in enumerate("abc")
    )
    both(qemu_io, ["-c", "read -q 4k 4k", "-c", "write -q -P 9 1M 1000k", "--image-opts", target], "mine", "theirs")
    contents = {Path(folder, name).read_bytes() for folder in ("mine", "theirs") for name in "abc"}
    assert len(contents) == 1


def test_preallocate(qemu_img: Run, qemu_io: Run) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "mine.qcow2", "64M")
    shutil.copy("mine.qcow2", "theirs.qcow2")
    target = "driver=qcow2,file.driver=preallocate,file.file.driver=file,file.file.filename=mine.qcow2"
    both(qemu_io, ["-c", "write -q -P 9 1M 3M", "--image-opts", target], "mine", "theirs")
    assert Path("mine.qcow2").stat().st_size == Path("theirs.qcow2").stat().st_size
    qemu_img("compare", "mine.qcow2", "theirs.qcow2")
    assert "No errors" in qemu_img("check", "mine.qcow2").stdout


def test_throttle_keeps_the_same_pace(qemu_io: Run) -> None:
    import time

    commands = [word for offset in range(12) for word in ("-c", f"read -q {offset * 4096} 4k")]
    target = "driver=throttle,throttle-group=g,file.driver=raw,file.file.driver=file,file.file.filename=base.raw"
    arguments = ["--object", "throttle-group,id=g,x-iops-total=20", *commands, "--image-opts", target]
    started = time.monotonic()
    qemu_io(*arguments)
    theirs = time.monotonic() - started
    started = time.monotonic()
    assert main(arguments, "qemu-io") == 0
    mine = time.monotonic() - started
    # Two of them go at once and the third takes the bucket over its rim; a loaded machine only adds to that.
    assert min(mine, theirs) >= 9 / 20 - 0.01
    assert mine < theirs + 1
