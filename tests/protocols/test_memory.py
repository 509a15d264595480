"""Bytes in memory and the null device."""

from __future__ import annotations

import random
import threading
import time

import pytest

from byre.errors import ByreError, InvalidArgument, NoSpace, NotSupported, ReadOnly
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.graph.opening import Opener, OpenFlags, Policy
from byre.io.extent import DATA, MAY_UNMAP, NO_HOST, ZERO, Extent
from byre.protocols.memory import MemoryNode
from byre.protocols.null import NullNode

PAGE = 65536


def read(node: Node, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    node.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def open_node(spec: object, **flags: object) -> Node:
    own = OpenFlags(read_only=False)._replace(**flags)  # type: ignore[arg-type]
    return Opener(Graph(), Policy()).open(spec, own, protocol=True)


def test_initial_content() -> None:
    assert MemoryNode(b"abc").to_bytes() == b"abc"
    assert MemoryNode(bytearray(b"abc"), size=5).to_bytes() == b"abc\0\0"
    assert MemoryNode(b"abc", size=2).to_bytes() == b"ab"
    assert MemoryNode(size=1 << 40).size == 1 << 40
    assert open_node({"driver": "memory", "size": "1M"}).size == 1 << 20


def test_requests_agree_with_a_bytearray() -> None:
    source = random.Random(3)
    node, model = MemoryNode(size=300_000), bytearray(300_000)
    for _ in range(400):
        offset, length = source.randrange(500_000), source.choice([0, 1, 100, 5000, PAGE, 200_000])
        kind = source.randrange(5)
        if kind == 0:
            data = source.randbytes(length)
            node.write_from(offset, memoryview(data))
        elif kind == 1:
            data = bytes(length)
            node.write_zeroes(offset, length, source.choice([0, MAY_UNMAP]))
        elif kind == 2:
            node.discard(offset, length)
            model[offset : offset + length] = bytes(len(model[offset : offset + length]))
        elif kind == 3:
            node.resize(offset)
            model = model[:offset].ljust(offset, b"\0")
        else:
            assert read(node, offset, length) == bytes(model[offset : offset + length]).ljust(length, b"\0")
        if kind < 2 and length:
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
        assert node.size == len(model)
    assert node.to_bytes() == model


def test_pages_never_written_are_holes() -> None:
    node = MemoryNode(size=1 << 40)
    node.write_from(1 << 30, memoryview(b"x" * (2 * PAGE)))
    assert node.allocated_size() == 2 * PAGE
    assert list(node.extents(0, 2 << 40)) == [
        Extent(0, 1 << 30, ZERO, 0),
        Extent(1 << 30, 2 * PAGE, DATA, 1 << 30),
        Extent((1 << 30) + 2 * PAGE, (1 << 40) - (1 << 30) - 2 * PAGE, ZERO, (1 << 30) + 2 * PAGE),
        Extent(1 << 40, 1 << 40, ZERO, NO_HOST),
    ]
    node.write_zeroes(1 << 30, PAGE)
    assert node.block_status(1 << 30, PAGE).kind == DATA
    node.write_zeroes(1 << 30, PAGE, MAY_UNMAP)
    assert node.block_status(1 << 30, PAGE).kind == ZERO
    node.write_zeroes(0, 1 << 40, MAY_UNMAP)
    assert node.allocated_size() == 0


def test_limits_and_read_only() -> None:
    node = MemoryNode(b"abc", read_only=True)
    for change in (lambda: node.write_from(0, memoryview(b"x")), lambda: node.resize(1), lambda: node.discard(0, 1)):
        with pytest.raises(ReadOnly):
            change()
    node = MemoryNode()
    with pytest.raises(NoSpace):
        node.write_from(1 << 63, memoryview(b"x"))
    with pytest.raises(InvalidArgument):
        node.resize(1 << 63)
    with pytest.raises(NotSupported):
        node.resize(10, preallocation="metadata")


def test_threads_write_side_by_side() -> None:
    node = MemoryNode()

    def write(worker: int) -> None:
        for index in range(worker, 2000, 4):
            node.write_from(index * 100, memoryview(bytes([index % 251]) * 100))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert node.to_bytes() == b"".join(bytes([index % 251]) * 100 for index in range(2000))


def test_null_takes_everything() -> None:
    node = NullNode()
    assert node.size == 1 << 30
    node.write_from(0, memoryview(b"x"))
    node.write_zeroes(0, 100)
    node.discard(0, 100)
    node.flush()
    assert read(node, 0, 3) == b"\xee" * 3
    assert node.block_status(0, 2 << 30) == Extent(0, 1 << 30, DATA, 0)
    assert node.allocated_size() == 0
    with pytest.raises(ByreError):
        node.resize(5)
    with pytest.raises(ReadOnly):
        NullNode(read_only=True).write_from(0, memoryview(b"x"))


def test_null_options() -> None:
    node = open_node({"driver": "null-aio", "size": "1M", "read-zeroes": "on", "latency-ns": "20000000"})
    assert node.driver == "null-aio"
    assert node.size == 1 << 20
    assert node.block_status(5, 10) == Extent(5, 10, ZERO, 5)
    started = time.perf_counter()
    assert read(node, (1 << 20) - 2, 4) == bytes(4)
    assert time.perf_counter() - started >= 0.02
    assert open_node("null-co://").size == 1 << 30
    assert open_node({"driver": "null-co"}).driver == "null-co"
    with pytest.raises(InvalidArgument, match="null-co://"):
        open_node("null-co:x")
