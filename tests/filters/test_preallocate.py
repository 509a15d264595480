"""The preallocate filter: the file grows in steps, shows the length that was written, and ends up with it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import byre
from byre.errors import Busy, InvalidArgument, IOFailure
from byre.filters.faults import FaultNode
from byre.filters.preallocate import PreallocateNode
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from contracts.node import run_threads
from support.images import stack

K = 1024
MIB = 1 << 20


def preallocated(memory: MemoryNode, align: int = 64 * K, ahead: int = 256 * K) -> tuple[PreallocateNode, FaultNode]:
    graph = Graph()
    node, fault = PreallocateNode(align, ahead), FaultNode()
    stack(graph, memory, [fault, node])
    return node, fault


def write(node: PreallocateNode, offset: int, data: bytes) -> None:
    node.write_from(offset, memoryview(data))


def test_it_grows_ahead_and_shows_what_was_written() -> None:
    memory = MemoryNode()
    node, _ = preallocated(memory)
    assert node.size == 0
    write(node, 0, b"x" * 1000)
    assert (node.size, memory.size) == (1000, 320 * K)
    write(node, 1000, b"x" * 1000)
    assert (node.size, memory.size) == (2000, 320 * K)
    node.write_zeroes(319 * K, K)
    assert (node.size, memory.size) == (320 * K, 320 * K)
    write(node, 320 * K, b"x")
    assert (node.size, memory.size) == (320 * K + 1, 640 * K)
    node.inactivate()
    assert (node.size, memory.size) == (320 * K + 1, 320 * K + 1)


def test_nothing_is_cut_off_that_was_there_before() -> None:
    memory = MemoryNode(b"z" * 100_000)
    node, _ = preallocated(memory)
    write(node, 0, b"x")
    assert (node.size, memory.size) == (100_000, 100_000)
    node.inactivate()
    assert memory.size == 100_000


def test_resizing() -> None:
    memory = MemoryNode()
    node, _ = preallocated(memory)
    write(node, 0, b"x" * 1000)
    node.resize(100 * K)
    assert (node.size, memory.size) == (100 * K, 320 * K)
    node.resize(500)
    assert (node.size, memory.size) == (500, 500)
    write(node, 600, b"y")
    data = bytearray(601)
    node.read_into(0, memoryview(data))
    assert data == b"x" * 500 + bytes(100) + b"y"
    node.resize(2 * MIB, preallocation="full")
    assert (node.size, memory.size) == (2 * MIB, 2 * MIB)


def test_a_failure_to_allocate_ahead_is_none_of_the_write() -> None:
    memory = MemoryNode()
    node, fault = preallocated(memory)
    fault.fail("resize", errno=28, sticky=True)
    write(node, 0, b"x" * 1000)
    write(node, 5000, b"y" * 1000)
    assert (node.size, memory.size) == (6000, 6000)
    fault.heal()
    write(node, 6000, b"z")
    assert (node.size, memory.size) == (6001, 320 * K)
    node.inactivate()
    assert memory.size == 6001


def test_a_failure_to_cut_off_is_told() -> None:
    node, fault = preallocated(MemoryNode())
    write(node, 0, b"x")
    fault.fail("resize")
    with pytest.raises(IOFailure):
        node.inactivate()
    node.inactivate()
    assert node.below.size == 1


def test_writers_side_by_side() -> None:
    memory = MemoryNode()
    node, _ = preallocated(memory, 4096, 8192)
    run_threads(
        lambda index: [write(node, slot * 1000, bytes((slot % 251,)) * 1000) for slot in range(index, 400, 4)], 4
    )
    assert node.size == 400_000
    node.inactivate()
    assert memory.to_bytes() == b"".join(bytes((slot % 251,)) * 1000 for slot in range(400))


def spec(name: str, **more: object) -> dict[str, object]:
    return {"driver": "preallocate", "file": {"driver": "file", "filename": name}, **more}


class TestFiles:
    @pytest.fixture
    def name(self, tmp_path: Path) -> str:
        return str(tmp_path / "disk")

    def test_an_image(self, name: str) -> None:
        byre.create(name, "qcow2", 16 * MIB)
        target = {"driver": "qcow2", "file": spec(name, **{"prealloc-size": "4M"})}
        data = random.Random(3).randbytes(MIB)
        with byre.open(target, read_only=False) as image:
            image.write(0, data)
            assert 5 * MIB <= os.stat(name).st_size <= 7 * MIB
            assert os.stat(name).st_blocks * 512 >= 5 * MIB
        assert os.stat(name).st_size < 2 * MIB
        with byre.open(name) as image:
            assert image.read(0, MIB) == data

    def test_read_only_again(self, name: str) -> None:
        byre.create(name, "qcow2", 16 * MIB)
        with byre.open({"driver": "qcow2", "file": spec(name)}, read_only=False) as image:
            image.write(0, b"x")
            assert os.stat(name).st_size > 128 * MIB
            image.reopen(read_only=True)
            assert os.stat(name).st_size < MIB
            image.reopen(read_only=False)
            image.write(MIB, b"x")
        assert os.stat(name).st_size < MIB
        with byre.open(name) as image:
            assert image.read(MIB, 1) == b"x"

    def test_nobody_else_writes_meanwhile(self, name: str) -> None:
        byre.create(name, "raw", MIB)
        graph = Graph()
        with byre.open({**spec(name), "file": {"driver": "file", "filename": name, "node-name": "f"}}, read_only=False,
                       graph=graph), pytest.raises(Busy):  # fmt: skip
            Image(graph.nodes["f"], graph, read_only=False)

    @pytest.mark.parametrize("align", [0, 100, 1000])
    def test_alignments_that_make_no_sense(self, name: str, align: int) -> None:
        byre.create(name, "raw", MIB)
        with pytest.raises(InvalidArgument, match="prealloc-align"):
            byre.open(spec(name, **{"prealloc-align": align}))
