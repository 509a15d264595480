"""VHDX and VHD both ways with the peer: what one writes the other reads, checks and maps alike."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.graph.creating import create
from byre.io.extent import DATA
from byre.jobs.job import Control
from conftest import Run

pytestmark = pytest.mark.oracle

MIB = 1 << 20
SIZE = 9 * MIB + 512 * 7

GRID: dict[str, tuple[str, dict[str, str]]] = {
    "vhdx": ("vhdx", {}),
    "vhdx-1M": ("vhdx", {"block_size": "1M"}),
    "vhdx-2M-not-present": ("vhdx", {"block_size": "2M", "block_state_zero": "off"}),
    "vhdx-log": ("vhdx", {"log_size": "3M", "block_size": "1M"}),
    "vhdx-fixed": ("vhdx", {"subformat": "fixed", "block_size": "1M"}),
    "vpc": ("vpc", {}),
    "vpc-forced": ("vpc", {"force_size": "on"}),
    "vpc-fixed": ("vpc", {"subformat": "fixed"}),
    "vpc-fixed-forced": ("vpc", {"subformat": "fixed", "force_size": "on"}),
}


@pytest.fixture(params=list(GRID))
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    return GRID[request.param]


def fragments(size: int, seed: int) -> list[tuple[int, bytes]]:
    """Writes in random order, some over others, with holes in between."""
    chooser = random.Random(seed)
    return [
        (chooser.randrange(size // 512 - 300) * 512, chooser.randbytes(512 * chooser.randrange(1, 300)))
        for _ in range(25)
    ]


def applied(size: int, writes: list[tuple[int, bytes]]) -> bytes:
    content = bytearray(size)
    for offset, data in writes:
        content[offset : offset + len(data)] = data
    return bytes(content)


def raw_of(qemu_img: Run, path: Path, format: str) -> bytes:
    target = path.with_suffix(".peer-raw")
    qemu_img("convert", "-f", format, "-O", "raw", path, target)
    return target.read_bytes()


def written_by_the_peer(qemu_io: Run, path: Path, format: str, writes: list[tuple[int, bytes]]) -> None:
    for number, (offset, data) in enumerate(writes):
        source = path.with_name("part")
        source.write_bytes(data)
        qemu_io("-f", format, "-c", f"write -s {source} {offset} {len(data)}", path)
        if number == 12:
            return


def test_the_peer_reads_what_byre_writes(case: tuple[str, dict[str, str]], qemu_img: Run, tmp_path: Path) -> None:
    format, options = case
    path = tmp_path / "disk"
    create(str(path), format, SIZE, options=options)
    with byre.open(str(path), format=format) as image:
        size = image.size
    writes = fragments(size, 1)
    for part in (writes[:10], writes[10:]):
        with byre.open(str(path), format=format, read_only=False) as image:
            for offset, data in part:
                image.write(offset, data)
    with byre.open(str(path), format=format, read_only=False) as image:
        image.write_zeroes(MIB // 2, 2 * MIB)
        image.discard(4 * MIB, 3 * MIB)
        content = image.read(0, size)
    assert raw_of(qemu_img, path, format) == content
    if format == "vhdx":
        assert "No errors" in qemu_img("check", "-f", "vhdx", path).stdout
    info = json.loads(qemu_img("info", "-f", format, "--output=json", path).stdout)
    assert info["virtual-size"] == size


def test_byre_reads_what_the_peer_writes(
    case: tuple[str, dict[str, str]], qemu_img: Run, qemu_io: Run, tmp_path: Path
) -> None:
    format, options = case
    path = tmp_path / "disk"
    joined = ",".join(f"{key}={value}" for key, value in options.items())
    qemu_img("create", "-q", "-f", format, *(("-o", joined) if joined else ()), path, SIZE)
    size = json.loads(qemu_img("info", "-f", format, "--output=json", path).stdout)["virtual-size"]
    writes = fragments(size, 2)[:13]
    written_by_the_peer(qemu_io, path, format, writes)
    before = path.read_bytes()
    with byre.open(str(path)) as image:
        assert (image.format, image.size) == (format, size)
        assert image.read(0, size) == applied(size, writes)
        result = image.node.check(Control())  # type: ignore[attr-defined]
        assert not result.corruptions, result.messages
    assert path.read_bytes() == before
    # And then in turns.
    more = fragments(size, 3)[:6]
    with byre.open(str(path), format=format, read_only=False) as image:
        for offset, data in more:
            image.write(offset, data)
    written_by_the_peer(qemu_io, path, format, fragments(size, 4)[:3])
    expected = applied(size, [*writes, *more, *fragments(size, 4)[:3]])
    with byre.open(str(path), format=format) as image:
        assert image.read(0, size) == expected
    assert raw_of(qemu_img, path, format) == expected


def test_both_convert_to_the_same(case: tuple[str, dict[str, str]], qemu_img: Run, tmp_path: Path) -> None:
    """And each reads the other's, block for block as long."""
    from byre.cli.main import main

    format, options = case
    content = applied(SIZE, fragments(SIZE, 5))
    (tmp_path / "raw").write_bytes(content)
    joined = ",".join(f"{key}={value}" for key, value in options.items())
    given = ["-f", "raw", "-O", format, *(("-o", joined) if joined else ()), str(tmp_path / "raw")]
    assert main(["convert", *given, str(tmp_path / "ours")]) == 0
    qemu_img("convert", *given, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert raw_of(qemu_img, tmp_path / name, format)[:SIZE] == content
        assert main(["convert", "-f", format, "-O", "raw", str(tmp_path / name), str(tmp_path / "back")]) == 0
        assert (tmp_path / "back").read_bytes()[:SIZE] == content
    ours, theirs = (os.stat(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.st_blocks <= theirs.st_blocks * 1.1 + 1024
    same = qemu_img("compare", "-f", format, "-F", format, tmp_path / "ours", tmp_path / "theirs", check=False)
    assert same.returncode == 0, same.stdout


def test_maps_name_the_places(qemu_img: Run, tmp_path: Path) -> None:
    """Of a dynamic VHD the peer says where blocks lie; byre says the same."""
    path = tmp_path / "disk.vhd"
    qemu_img("create", "-q", "-f", "vpc", "-o", "force_size=on", path, "16M")
    with byre.open(str(path), read_only=False) as image:
        for block in (5, 1, 2, 7):
            image.write(block * 2 * MIB, b"\x01" * 2 * MIB)
    rows: list[dict[str, Any]] = json.loads(qemu_img("map", "-f", "vpc", "--output=json", path).stdout)
    theirs = {(row["start"], row["length"], row["offset"]) for row in rows if row["data"]}
    with byre.open(str(path)) as image:
        ours = {(each.offset, each.length, each.host) for each in image.extents(0, image.size) if each.kind == DATA}
    assert ours == theirs


@pytest.mark.parametrize("size", [1, 512, 10 * MIB, 100 * MIB + 512, 127 << 30, (127 << 30) + (1 << 29), 1 << 40])
def test_the_size_of_a_vhd_is_what_the_peer_makes_of_it(size: int, qemu_img: Run, tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "vpc", tmp_path / "theirs", size)
    create(str(tmp_path / "ours"), "vpc", size)
    expected = json.loads(qemu_img("info", "-f", "vpc", "--output=json", tmp_path / "theirs").stdout)["virtual-size"]
    for name in ("ours", "theirs"):
        with byre.open(str(tmp_path / name)) as image:
            assert image.size == expected, name


@pytest.mark.parametrize("name", list(GRID))
def test_the_peer_sees_the_new_size(name: str, qemu_img: Run, tmp_path: Path) -> None:
    format, options = GRID[name]
    path = tmp_path / "disk"
    create(str(path), format, SIZE, options=options)
    with byre.open(str(path), format=format, read_only=False) as image:
        image.write(0, b"\x05" * MIB)
        for size in (30 * MIB, 12345 * 512):
            image.resize(size, shrink=True)
            image.flush()
        content = image.read(0, size)
    assert raw_of(qemu_img, path, format) == content
    if format == "vhdx":
        assert "No errors" in qemu_img("check", "-f", "vhdx", path).stdout


@pytest.mark.parametrize("name", ["vhdx-1M", "vhdx-fixed", "vpc-forced", "vpc-fixed-forced"])
def test_a_third_reader_agrees(name: str, tmp_path: Path) -> None:
    from dissect.hypervisor.disk.vhd import VHD
    from dissect.hypervisor.disk.vhdx import VHDX

    format, options = GRID[name]
    path = tmp_path / "disk"
    create(str(path), format, SIZE, options=options)
    writes = fragments(SIZE, 6)
    with byre.open(str(path), format=format, read_only=False) as image:
        for offset, data in writes:
            image.write(offset, data)
    with path.open("rb") as file:
        disk = VHDX(file) if format == "vhdx" else VHD(file)
        assert disk.read(SIZE) == applied(SIZE, writes)
