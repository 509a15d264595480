"""Resizing: new space is zero whatever lies below or lay there before, and the peer agrees."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, InvalidArgument, NotSupported
from byre.formats.qcow2.image import Qcow2Node
from byre.graph.creating import create
from conftest import Run
from support.walk import walk

CLUSTER = 4096

LAYOUTS: dict[str, dict[str, object]] = {
    "plain": {"cluster_size": CLUSTER},
    "tiny": {"cluster_size": 512},
    "version 2": {"cluster_size": CLUSTER, "compat": "0.10"},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
    "external": {"cluster_size": CLUSTER, "data_file": "data"},
    "external raw": {"cluster_size": CLUSTER, "data_file": "data", "data_file_raw": True},
}


def make(folder: Path, size: int, **options: object) -> str:
    path = str(folder / "disk.qcow2")
    if options.get("data_file") == "data":
        options["data_file"] = str(folder / "data")
    create(path, "qcow2", size, options=options)
    return path


def read(path: str) -> bytes:
    with byre.open(path) as image:
        return image.read(0, image.size)


@pytest.mark.oracle
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_growing_and_shrinking_at_random(tmp_path: Path, qemu_img: Run, name: str) -> None:
    """Cut-off bytes never come back, at any size, and nothing leaks."""
    chance = random.Random(name)
    size = 40 * CLUSTER
    path = make(tmp_path, size, **LAYOUTS[name])
    model = bytearray(size)
    image = byre.open(path, read_only=False)
    for step in range(40):
        action = chance.choice(["write", "write", "zero", "resize", "resize", "reopen", "discard"])
        at = chance.randrange(0, len(model) - 512)
        length = chance.randrange(1, min(5 * CLUSTER, len(model) - at))
        if action == "write":
            data = chance.randbytes(length)
            image.write(at, data)
            model[at : at + length] = data
        elif action == "zero":
            image.write_zeroes(at, length, unmap=chance.random() < 0.5)
            model[at : at + length] = bytes(length)
        elif action == "discard":
            image.discard(at, length)
            model[at : at + length] = image.read(at, length)
        elif action == "resize":
            new = chance.randrange(1, 80 * CLUSTER // 512) * 512 + 1024
            image.resize(new, shrink=True)
            model = model[:new].ljust(new, b"\0") if new > len(model) else model[:new]
            assert image.size == new
        else:
            image.close()
            image = byre.open(path, read_only=False)
        assert image.read(0, len(model)) == model, (step, action)
    image.close()
    (tmp_path / "expected").write_bytes(model)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "expected")
    qemu_img("check", path)
    if name == "external raw":
        data = (tmp_path / "data").read_bytes()
        assert data[: len(model)].ljust(len(model), b"\0") == model
        assert len(data) == len(model)


@pytest.mark.parametrize("cut", [512, CLUSTER - 512, CLUSTER, CLUSTER + 512])
def test_cut_off_bytes_never_come_back(tmp_path: Path, cut: int) -> None:
    size = 8 * CLUSTER
    path = make(tmp_path, size, cluster_size=CLUSTER)
    with byre.open(path, read_only=False) as image:
        image.write(0, b"\xaa" * size)
    with byre.open(path, read_only=False) as image:
        image.resize(size - cut, shrink=True)
    with byre.open(path, read_only=False) as image:
        image.resize(size)
    assert read(path) == (b"\xaa" * (size - cut)).ljust(size, b"\0")


@pytest.mark.oracle
def test_cut_off_bytes_do_not_come_back_in_the_peer(tmp_path: Path, qemu_img: Run) -> None:
    """The peer does not zero the tail of the last cluster when it grows an image: shrinking must have done it."""
    size = 8 * CLUSTER
    path = make(tmp_path, size, cluster_size=CLUSTER)
    with byre.open(path, read_only=False) as image:
        image.write(0, b"\xaa" * size)
        image.resize(size - CLUSTER // 2, shrink=True)
    qemu_img("resize", path, size)
    assert read(path) == (b"\xaa" * (size - CLUSTER // 2)).ljust(size, b"\0")


@pytest.mark.parametrize("size", [6 * CLUSTER, 6 * CLUSTER + 512, 7 * CLUSTER - 512])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_a_longer_backing_file_does_not_show_through(tmp_path: Path, size: int, written: bool, compat: str) -> None:
    base = b"\xbb" * (20 * CLUSTER)
    (tmp_path / "base").write_bytes(base)
    path = make(tmp_path, size, backing_file="base", backing_fmt="raw", cluster_size=CLUSTER, compat=compat)
    with byre.open(path, read_only=False) as image:
        if written:
            image.write(size - 10, b"\xcc" * 10)
        image.resize(30 * CLUSTER)
    start = base[: size - 10] + b"\xcc" * 10 if written else base[:size]
    assert read(path) == start.ljust(30 * CLUSTER, b"\0")


@pytest.mark.oracle
def test_the_first_level_grows(tmp_path: Path, qemu_img: Run) -> None:
    path = make(tmp_path, 1 << 20, cluster_size=512)
    with byre.open(path, read_only=False) as image:
        assert isinstance(image.node, Qcow2Node)
        image.write(1000, b"old")
        for size in (3 << 20, 64 << 20, 1 << 30):
            before = image.node.header.l1_table_offset
            image.resize(size)
            assert image.node.header.l1_table_offset != before
            image.write(size - 4, b"last")
            assert image.read(size - 6, 6) == b"\0\0last"
        assert image.read(1000, 3) == b"old"
    qemu_img("check", path)
    with byre.open(path) as image:
        assert image.read(1000, 3) == b"old"
        assert image.read((3 << 20) - 4, 4) == b"last"


@pytest.mark.oracle
def test_shrinking_gives_space_back(tmp_path: Path, qemu_img: Run) -> None:
    path = make(tmp_path, 32 << 20)
    with byre.open(path, read_only=False) as image:
        image.write(0, b"\1" * (32 << 20))
        image.resize(1 << 20, shrink=True)
    assert Path(path).stat().st_size < 3 << 20
    qemu_img("check", path)
    assert read(path) == b"\1" * (1 << 20)


@pytest.mark.parametrize("bits", [1, 16, 64])
@pytest.mark.parametrize("cluster", [512, 4096])
def test_a_shrunk_image_has_a_short_file(tmp_path: Path, cluster: int, bits: int) -> None:
    """Refcount blocks that count nothing any more do not hold its end."""
    blocks = cluster * 8 // bits * cluster
    size = 4 * blocks if blocks < 16 << 20 else blocks + (8 << 20)
    path = make(tmp_path, size, cluster_size=cluster, refcount_bits=bits)
    with byre.open(path, read_only=False) as image:
        image.write(0, b"x" * size)
        image.flush()
        image.resize(20 * cluster, shrink=True)
        assert image.read(0, 20 * cluster) == b"x" * (20 * cluster)
        image.resize(size)
        image.write(size // 2, b"y" * (4 * cluster))
        image.resize(20 * cluster, shrink=True)
    assert Path(path).stat().st_size <= max(size // 3, 100 * cluster)
    assert not any(walk(Path(path).read_bytes()))
    assert read(path) == b"x" * (20 * cluster)


def test_refusals(tmp_path: Path) -> None:
    path = make(tmp_path, 1 << 20, cluster_size=512)
    with byre.open(path, read_only=False) as image:
        with pytest.raises(InvalidArgument, match="would lose data"):
            image.resize(512)
        with pytest.raises(InvalidArgument, match="multiples of 512"):
            image.resize(3 << 20 | 5)
        with pytest.raises(InvalidArgument):
            image.resize(-512, shrink=True)
        with pytest.raises(InvalidArgument, match="L1 table"):
            image.resize(1 << 50)
        with pytest.raises(InvalidArgument):
            image.resize(1 << 64)
        with pytest.raises(InvalidArgument, match="preallocation"):
            image.resize(512, shrink=True, preallocation="full")
        with pytest.raises(ByreError):
            image.resize(2 << 20, preallocation="some")
        assert image.size == 1 << 20
        image.write(0, b"still alive")
    with byre.open(path) as image, pytest.raises(ByreError, match="read-only"):
        image.resize(2 << 20)


@pytest.mark.oracle
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_with_internal_snapshots(tmp_path: Path, qemu_img: Run, compat: str) -> None:
    path = make(tmp_path, 1 << 20, compat=compat, cluster_size=4096)
    with byre.open(path, read_only=False) as image:
        image.write(0, b"kept" * 1000)
    qemu_img("snapshot", "-c", "one", path)
    with byre.open(path, read_only=False) as image:
        if compat == "0.10":
            for size in (512 << 10, 2 << 20):
                with pytest.raises(NotSupported, match="snapshots"):
                    image.resize(size, shrink=True)
            return
        image.write(1 << 19, b"cut off")
        image.resize(512 << 10, shrink=True)
        image.resize(200 << 20)
        assert image.read(1 << 19, 1 << 19) == bytes(1 << 19)
        image.write(0, b"gone" * 1000)
    qemu_img("check", path)
    qemu_img("convert", "-l", "one", "-O", "raw", path, tmp_path / "old")
    assert (tmp_path / "old").read_bytes()[: 1 << 20] == (b"kept" * 1000).ljust(1 << 20, b"\0")


def test_autoclear_bits_are_dropped_by_resizing_too(tmp_path: Path) -> None:
    """What an unknown feature says about the disk is about its old size."""
    path = make(tmp_path, 1 << 20)
    with open(path, "r+b") as file:
        file.seek(88)
        file.write(struct.pack(">Q", 1 << 40))
    with byre.open(path, read_only=False) as image:
        image.resize(2 << 20)
    assert struct.unpack_from(">Q", Path(path).read_bytes(), 88) == (0,)
