"""Machine state behind the disk: kept apart from the disk, and with the snapshot that records it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import byre
from byre.errors import InvalidArgument, NotSupported, ReadOnly
from byre.formats.qcow2 import vmstate
from byre.formats.qcow2.image import Qcow2Node
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from conftest import Run
from support.images import detached, layer, new_image, open_image
from support.walk import walk

KIB = 1024


def node_of(image: Image) -> Qcow2Node:
    assert isinstance(image.node, Qcow2Node)
    return image.node


def save(image: Image, offset: int, data: bytes) -> None:
    node_of(image).save_vmstate(offset, memoryview(data))


def load(image: Image, offset: int, length: int) -> bytes:
    data = bytearray(length)
    node_of(image).load_vmstate(offset, memoryview(data))
    return bytes(data)


GRID = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": "on"},
    {"cluster_size": 65536},
]


@pytest.mark.parametrize("options", GRID, ids=str)
def test_what_is_saved_is_loaded(options: dict[str, object]) -> None:
    chooser = random.Random(1)
    state = bytearray(600 * KIB)
    file = new_image("qcow2", 100 * KIB, **options)
    with open_image(file) as image:
        image.write(0, b"disk" * 25 * KIB)
        for _ in range(40):
            offset, length = chooser.randrange(500 * KIB), chooser.randrange(1, 60 * KIB)
            data = chooser.randbytes(length)
            save(image, offset, data)
            state[offset : offset + length] = data
            offset, length = chooser.randrange(500 * KIB), chooser.randrange(1, 100 * KIB)
            assert load(image, offset, length) == state[offset : offset + length]
        assert image.size == 100 * KIB
        assert image.read(0, image.size) == b"disk" * 25 * KIB
    assert walk(file.to_bytes()) == ([], [], [])
    with open_image(detached(file), read_only=True) as image:
        assert load(image, 0, len(state)) == state


def test_a_snapshot_takes_its_state_along() -> None:
    file = new_image("qcow2", 100 * KIB, cluster_size=4096)
    with open_image(file) as image:
        first, second = b"one" * 30000, b"two" * 40000
        save(image, 0, first)
        shot = node_of(image).create_snapshot("one", vm_state_size=len(first), vm_clock_nsec=5, icount=7)
        assert (shot.vm_state_size, shot.vm_clock_nsec, shot.icount) == (len(first), 5, 7)
        assert load(image, 0, len(first)) == bytes(len(first)), "state belongs to the snapshot now"
        save(image, 0, second)
        node_of(image).create_snapshot("two", vm_state_size=len(second))
        image.apply_snapshot("one")
        assert load(image, 0, len(second)) == first.ljust(len(second), b"\0")
        save(image, 7, b"part of a shared cluster")
        assert load(image, 0, len(first)) == first[:7] + b"part of a shared cluster" + first[31:]
    assert walk(file.to_bytes()) == ([], [], [])
    for name, state in (("one", first), ("two", second)):
        with open_image(detached(file), read_only=True) as image:
            node_of(image).load_snapshot(name)
            assert load(image, 0, len(state)) == state


def test_zeroes_are_saved_too() -> None:
    file = new_image("qcow2", 64 * KIB, cluster_size=4096)
    with open_image(file, detect_zeroes="unmap") as image:
        save(image, 0, b"x" * 20000)
        save(image, 4096, bytes(8192))
        assert load(image, 0, 20000) == b"x" * 4096 + bytes(8192) + b"x" * 7712


def test_dirty_bitmaps_do_not_follow() -> None:
    file = new_image("qcow2", 64 * KIB, cluster_size=512)
    with open_image(file) as image:
        bitmap = node_of(image).bitmap_store().add("b", 512)
        save(image, 0, b"state" * 1000)
        assert bitmap.dirty_bytes == 0
        image.write(0, b"x")
        assert bitmap.dirty_bytes == 512


@pytest.mark.parametrize("size", [10 * KIB, 3 << 20])
def test_state_never_becomes_part_of_the_disk(size: int) -> None:
    file = new_image("qcow2", 100 * KIB, cluster_size=512)
    with open_image(file) as image:
        save(image, 0, b"secret" * 5000)
        image.resize(size, shrink=True)
        image.resize(4 << 20)
        assert image.read(size, image.size - size) == bytes(image.size - size)
    assert walk(file.to_bytes()) == ([], [], [])


def test_a_backing_file_does_not_show_through() -> None:
    file = new_image("qcow2", 64 * KIB, cluster_size=512, backing_file="base", backing_fmt="raw")
    graph = Graph()
    with open_image(file, graph=graph, backing=layer(graph, MemoryNode(b"b" * (1 << 20)), "raw")) as image:
        save(image, 100, b"state")
        assert load(image, 0, 1000) == bytes(100) + b"state" + bytes(895)


def test_where_there_is_no_room() -> None:
    file = new_image("qcow2", 64 * KIB, cluster_size=512)
    with open_image(file) as image:
        for action in (save, lambda image, offset, data: load(image, offset, len(data))):
            with pytest.raises(InvalidArgument, match="behind what the image can hold"):
                action(image, 1 << 60, b"x")
        assert vmstate.area(node_of(image)) == 64 * KIB
        save(image, 0, b"")
    with open_image(detached(file), read_only=True) as image:
        assert load(image, 0, 4) == bytes(4)
        with pytest.raises(ReadOnly):
            save(image, 0, b"x")
    data = MemoryNode()
    outside = new_image("qcow2", 64 * KIB, data, cluster_size=4096, data_file="data")
    with open_image(outside, data_file=data) as image, pytest.raises(NotSupported, match="external data file"):
        save(image, 0, b"x")


@pytest.mark.oracle
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "compat=0.10", "extended_l2=on"])
def test_both_ways_with_the_peer(tmp_path: Path, qemu_img: Run, qemu_io: Run, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    qemu_io("-c", "write -b -P 0x11 0 64k", "-c", "write -P 0x22 0 64k", path)
    with byre.open(str(path), read_only=False) as image:
        assert load(image, 0, 64 * KIB + 512) == b"\x11" * 64 * KIB + bytes(512)
        save(image, 32 * KIB, b"\x33" * 96 * KIB)
        node_of(image).create_snapshot("kept", vm_state_size=128 * KIB)
    assert "No errors were found" in qemu_img("check", path).stdout
    assert "128 KiB" in qemu_img("snapshot", "-l", path).stdout
    qemu_img("snapshot", "-a", "kept", path)
    done = qemu_io("-c", "read -b -P 0x11 0 32k", "-c", "read -b -P 0x33 32k 96k", "-c", "read -P 0x22 0 64k", path)
    assert "verification failed" not in done.stdout
