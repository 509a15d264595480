"""The engine, with a format so small that every hook can be watched."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import pytest

from byre.errors import IOFailure, NotSupported, ReadOnly
from byre.formats.base import FormatNode, Placement
from byre.graph.child import Child
from byre.graph.graph import Graph
from byre.io import engine
from byre.io.extent import DATA, FUA, MAY_UNMAP, NO_FALLBACK, NO_HOST, UNALLOCATED, ZERO, Extent
from byre.protocols.memory import MemoryNode

UNIT = 1024
HOLE = -2


class Toy(FormatNode):
    """A table of clusters: guest index -> host offset, or ``HOLE`` for zeroes."""

    driver = "toy"

    def __init__(self, file: MemoryNode, size: int, *, step: int = 3) -> None:
        super().__init__(filename="toy")
        self.cluster_size = self.zero_unit = UNIT
        self._size = size
        self.table: dict[int, int] = {}
        self.free: list[int] = []
        self.next = 0
        self.step = step
        self.calls: list[str] = []
        self.cannot_zero = False
        self.broken = False

    def lookup(self, offset: int, length: int) -> list[Extent]:
        rows = []
        end = min(offset + length, offset - offset % UNIT + self.step * UNIT)
        while offset < end:
            stop = min(end, offset - offset % UNIT + UNIT)
            host = self.table.get(offset // UNIT)
            if host is None:
                rows.append(Extent(offset, stop - offset, UNALLOCATED))
            elif host == HOLE:
                rows.append(Extent(offset, stop - offset, ZERO))
            else:
                rows.append(Extent(offset, stop - offset, DATA, host + offset % UNIT))
            offset = stop
        return rows

    def reserve(self, offset: int, length: int) -> list[Placement]:
        index = offset // UNIT
        host = self.table.get(index, NO_HOST)
        if host >= 0:
            return [Placement(offset, min(length, UNIT - offset % UNIT), host + offset % UNIT)]
        host = self.free.pop() if self.free else self.next
        self.next = max(self.next, host + UNIT)
        self.calls.append(f"reserve {index}")
        blank = self.table.get(index) == HOLE or (index not in self.table and self.backing is None)
        return [Placement(index * UNIT, UNIT, host, fresh=True, blank=blank)]

    def publish(self, placements: Sequence[Placement]) -> None:
        for placement in placements:
            self.calls.append(f"publish {placement.offset // UNIT}")
            self.table[placement.offset // UNIT] = placement.host

    def cancel(self, placements: Sequence[Placement]) -> None:
        for placement in placements:
            self.calls.append(f"cancel {placement.offset // UNIT}")
            self.free.append(placement.host)

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        if self.cannot_zero:
            return 0
        assert offset % UNIT == 0
        index = offset // UNIT
        self.calls.append(f"unmap {index} {'zero' if kind == ZERO else 'discard'}{' keep' if keep else ''}")
        host = self.table.get(index, NO_HOST)
        if host >= 0:
            self.inflight.when_clear(lambda: self.free.append(host))
        self.table[index] = HOLE
        return min(length, UNIT)

    def write_back(self) -> None:
        self.calls.append("write back")
        if self.broken:
            raise IOFailure("metadata cannot be written")


class Disk(MemoryNode):
    """Memory whose writes and reads can be held up, failed and counted."""

    def __init__(self, size: int = 0) -> None:
        super().__init__(size=size)
        self.vectors: list[tuple[int, list[int]]] = []
        self.before_read: Callable[[], None] = lambda: None
        self.before_write: Callable[[], None] = lambda: None
        self.flushes = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.before_read()
        super().read_into(offset, buffer)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.before_write()
        super().write_from(offset, buffer, flags)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        self.vectors.append((offset, [len(buffer) for buffer in buffers]))
        super().writev_from(offset, buffers, flags)

    def flush(self) -> None:
        self.flushes += 1


def toy(size: int = 16 * UNIT, below: FormatNode | MemoryNode | None = None, **more: int) -> tuple[Disk, Toy]:
    graph = Graph()
    disk = Disk()
    node = Toy(disk, size, **more)
    for each in (disk, node):
        graph.add(each)
    node.sources = (graph.attach(node, "file", disk, "data"),)
    if below is not None:
        if below.name not in graph.nodes:
            below.name = ""
            graph.add(below)
        graph.attach(node, "backing", below, "backing")
    return disk, node


def read(node: FormatNode, offset: int, length: int) -> bytes:
    data = bytearray(b"\xee" * length)
    engine.read(node, offset, memoryview(data))
    return bytes(data)


def write(node: FormatNode, offset: int, data: bytes, flags: int = 0) -> None:
    engine.write(node, offset, memoryview(data), flags)


def idle(node: FormatNode) -> bool:
    return node.inflight.claim_count == node.inflight.ticket_count == 0


# -- reading and writing ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_against_a_model(seed: int) -> None:
    chance = random.Random(seed)
    size = 16 * UNIT - 300
    base = chance.randbytes(9 * UNIT + 77)
    _, node = toy(size, MemoryNode(base) if seed % 2 else None, step=1 + seed)
    model = bytearray(base if seed % 2 else b"").ljust(size, b"\0")[:size]
    for _ in range(200):
        at = chance.randrange(size)
        length = chance.randrange(1, min(4 * UNIT, size - at) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            engine.write_zeroes(node, at, length, chance.choice([0, MAY_UNMAP]))
            model[at : at + length] = bytes(length)
        elif kind == 1:
            engine.discard(node, at, length)
            first, last = -(-at // UNIT) * UNIT, (at + length) // UNIT * UNIT if at + length < size else size
            if first < last:
                model[first:last] = bytes(last - first)
        else:
            data = chance.randbytes(length)
            write(node, at, data, chance.choice([0, FUA]))
            model[at : at + length] = data
        assert read(node, 0, size) == model
    assert idle(node)


def test_behind_the_end_there_is_nothing() -> None:
    _, node = toy(UNIT + 100, MemoryNode(b"\xff" * 4 * UNIT))
    assert read(node, UNIT, 500) == b"\xff" * 100 + bytes(400)
    assert read(node, 5 * UNIT, 10) == bytes(10)


def test_a_deep_chain_costs_no_stack() -> None:
    below: FormatNode | MemoryNode = MemoryNode(b"bottom".ljust(UNIT, b"\0"))
    graph = Graph()
    graph.add(below)
    for _ in range(3000):
        node = Toy(Disk(), UNIT)
        node.name = ""
        graph.add(node)
        node.children["backing"] = Child(below, "backing", "backing", node)
        below = node
    assert isinstance(below, FormatNode)
    assert read(below, 0, 6) == b"bottom"


def test_a_fresh_cluster_is_written_in_one_call() -> None:
    disk, node = toy(16 * UNIT, MemoryNode(bytes(range(256)) * 64))
    write(node, UNIT + 100, b"x" * 50)
    assert disk.vectors == [(0, [100, 50, UNIT - 150])]
    assert disk.to_bytes()[:UNIT] == (bytes(range(256)) * 4)[:100] + b"x" * 50 + (bytes(range(256)) * 4)[150:]
    disk.vectors.clear()
    write(node, UNIT + 10, b"y")  # in place: nothing around it is touched
    assert disk.vectors == []
    assert node.calls == ["reserve 1", "publish 1"]


def test_a_durable_write_ends_with_a_flush() -> None:
    disk, node = toy()
    write(node, 0, b"x")
    assert disk.flushes == 0
    write(node, 0, b"x", FUA)
    assert disk.flushes == 1
    engine.write_zeroes(node, 0, UNIT, FUA)
    assert disk.flushes == 2
    assert node.calls[-1] == "write back"


def test_a_read_only_node() -> None:
    _, node = toy()
    node.read_only = True
    for request in (
        lambda: write(node, 0, b"x"),
        lambda: engine.write_zeroes(node, 0, 1),
        lambda: engine.discard(node, 0, UNIT),
        lambda: engine.write_compressed(node, 0, [b"x"]),
    ):
        with pytest.raises(ReadOnly):
            request()
    engine.flush(node)
    assert node.calls == []


# -- zeroes and discards --------------------------------------------------------------------------------


def test_whole_clusters_are_zeroed_by_the_tables() -> None:
    _, node = toy()
    write(node, 0, b"x" * 4 * UNIT)
    node.calls.clear()
    engine.write_zeroes(node, 100, 3 * UNIT, MAY_UNMAP)
    assert node.calls == ["unmap 1 zero", "unmap 2 zero"]
    assert read(node, 0, 4 * UNIT) == b"x" * 100 + bytes(3 * UNIT) + b"x" * (UNIT - 100)
    node.calls.clear()
    engine.write_zeroes(node, 3 * UNIT + 100, UNIT - 100)  # 100 bytes before it are not zero
    engine.write_zeroes(node, 5 * UNIT + 1, 5)  # the rest reads as zeroes anyway
    assert node.calls == ["unmap 5 zero keep"]


def test_the_last_cluster_counts_as_whole() -> None:
    _, node = toy(2 * UNIT + 100)
    write(node, 2 * UNIT, b"x" * 100)
    node.calls.clear()
    engine.write_zeroes(node, 2 * UNIT, 100)
    assert node.calls == ["unmap 2 zero keep"]
    write(node, 2 * UNIT, b"x" * 100)
    node.calls.clear()
    engine.discard(node, 2 * UNIT, 100)
    assert node.calls == ["unmap 2 discard"]


def test_zeroes_as_data_where_the_format_cannot() -> None:
    _, node = toy()
    node.cannot_zero = True
    write(node, 0, b"x" * 3 * UNIT)
    with pytest.raises(NotSupported):
        engine.write_zeroes(node, UNIT, UNIT, NO_FALLBACK)
    assert read(node, 0, 3 * UNIT) == b"x" * 3 * UNIT
    engine.write_zeroes(node, 10, 2 * UNIT)
    assert read(node, 0, 3 * UNIT) == b"x" * 10 + bytes(2 * UNIT) + b"x" * (UNIT - 10)
    assert idle(node)


@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
def test_detecting_zeroes(mode: str) -> None:
    _, node = toy()
    node.detect_zeroes = mode
    write(node, 0, bytes(UNIT))
    write(node, UNIT, bytes(UNIT - 1) + b"x")
    assert node.calls[0] == {"off": "reserve 0", "on": "unmap 0 zero keep", "unmap": "unmap 0 zero"}[mode]
    assert read(node, 0, 2 * UNIT) == bytes(2 * UNIT - 1) + b"x"


def test_what_reads_as_zero() -> None:
    _, base = toy(4 * UNIT)
    base.table[1] = HOLE
    _, node = toy(8 * UNIT, base)
    assert engine.reads_zero(node, 0, 8 * UNIT)
    node.table[2] = HOLE
    base.table[2] = 0
    base.table[3] = 0
    assert engine.reads_zero(node, 0, 3 * UNIT)
    assert not engine.reads_zero(node, 2 * UNIT, UNIT + 1)


# -- failures -----------------------------------------------------------------------------------------------


def fail() -> None:
    raise IOFailure("the disk is broken")


def test_a_failed_data_write_gives_the_space_back() -> None:
    disk, node = toy()
    disk.before_write = fail
    with pytest.raises(IOFailure, match="disk is broken"):
        write(node, 10, b"x")
    assert node.calls == ["reserve 0", "cancel 0"]
    assert idle(node)
    assert node.stats.as_dict()["write"]["failed"] == 1
    disk.before_write = lambda: None
    assert read(node, 0, UNIT) == bytes(UNIT)
    write(node, 10, b"x")
    assert node.failure is None


def test_a_failed_read_gives_its_ticket_back() -> None:
    disk, node = toy()
    write(node, 0, b"x" * 4 * UNIT)
    disk.before_read = fail
    with pytest.raises(IOFailure):
        read(node, 0, 4 * UNIT)
    assert idle(node)
    assert node.stats.as_dict()["read"]["failed"] == 1
    disk.before_read = lambda: None
    assert read(node, 0, 4 * UNIT) == b"x" * 4 * UNIT


def test_a_failed_copy_on_write_read_gives_everything_back() -> None:
    base = Disk()
    base.resize(8 * UNIT)
    _, node = toy(8 * UNIT, base)
    base.before_read = fail
    with pytest.raises(IOFailure):
        write(node, 10, b"x")
    assert node.calls == ["reserve 0", "cancel 0"]
    assert idle(node)


@pytest.mark.parametrize("where", ["metadata", "file"])
def test_a_failed_flush_takes_the_node_out_of_service(where: str) -> None:
    disk, node = toy()
    write(node, 0, b"x")
    if where == "metadata":
        node.broken = True
    else:
        disk.flush = fail  # type: ignore[method-assign]
    with pytest.raises(IOFailure):
        engine.flush(node)
    for request in (
        lambda: read(node, 0, 1),
        lambda: write(node, 0, b"x"),
        lambda: engine.flush(node),
        lambda: node.extents(0, 1),
        lambda: engine.write_zeroes(node, 0, UNIT),
        lambda: engine.discard(node, 0, UNIT),
        lambda: node.block_status(0, 1),
    ):
        with pytest.raises(IOFailure, match="out of service"):
            request()
    assert idle(node)


# -- several at once ----------------------------------------------------------------------------------------


def started(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


class Barrier:
    """Holds the first request that comes; the others pass."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self._first = threading.Lock()

    def __call__(self) -> None:
        if self._first.acquire(blocking=False):
            self.reached.set()
            assert self.go.wait(10)


def test_a_second_writer_of_a_new_cluster_waits_and_both_are_there() -> None:
    disk, node = toy()
    disk.before_write = hold = Barrier()
    one = started(lambda: write(node, 0, b"1" * 100))
    assert hold.reached.wait(5)
    two = started(lambda: write(node, 500, b"2" * 100))
    other = started(lambda: write(node, 3 * UNIT, b"3"))  # another cluster waits for nobody
    other.join(5)
    assert not other.is_alive()
    two.join(0.05)
    assert two.is_alive()
    assert node.calls.count("reserve 0") == 1
    hold.go.set()
    one.join(5)
    two.join(5)
    assert read(node, 0, UNIT) == (b"1" * 100).ljust(500, b"\0") + b"2" * 100 + bytes(UNIT - 600)
    assert idle(node)


def test_a_waiting_writer_goes_on_when_the_first_one_fails() -> None:
    disk, node = toy()
    hold = Barrier()
    errors: list[BaseException] = []

    def break_first() -> None:
        first = not hold.reached.is_set()
        hold()
        if first:
            fail()

    def first_writer() -> None:
        try:
            write(node, 0, b"1" * 100)
        except IOFailure as error:
            errors.append(error)

    disk.before_write = break_first
    one = started(first_writer)
    assert hold.reached.wait(5)
    two = started(lambda: write(node, 500, b"2"))
    hold.go.set()
    one.join(5)
    two.join(5)
    assert len(errors) == 1
    assert read(node, 0, 502) == bytes(500) + b"2\0"
    assert idle(node)


def test_space_that_a_reader_was_sent_to_is_not_used_again_before_it_is_done() -> None:
    disk, node = toy()
    write(node, 0, b"old" * 100)
    disk.before_read = hold = Barrier()
    found: list[bytes] = []
    reader = started(lambda: found.append(read(node, 0, 300)))
    assert hold.reached.wait(5)
    engine.discard(node, 0, UNIT)
    assert node.free == []
    write(node, 5 * UNIT, b"new" * 100)  # finds no free space but new one
    hold.go.set()
    reader.join(5)
    assert found == [b"old" * 100]
    assert node.free == [0]
    assert idle(node)


def test_zeroing_waits_for_a_writer_of_the_same_cluster() -> None:
    disk, node = toy()
    disk.before_write = hold = Barrier()
    one = started(lambda: write(node, 0, b"1" * 100))
    assert hold.reached.wait(5)
    zeroing = started(lambda: engine.write_zeroes(node, 0, UNIT))
    partly = started(lambda: engine.write_zeroes(node, 10, 20))
    discarding = started(lambda: engine.discard(node, 0, UNIT))
    zeroing.join(0.05)
    assert zeroing.is_alive()
    assert partly.is_alive()
    assert discarding.is_alive()
    hold.go.set()
    for thread in (one, zeroing, partly, discarding):
        thread.join(5)
        assert not thread.is_alive()
    assert read(node, 0, UNIT) == bytes(UNIT)
    assert idle(node)


# -- ciphers --------------------------------------------------------------------------------------------------


class Xor:
    """Each byte with its position: wrong positions and unencrypted bytes show."""

    def __init__(self, by_host: bool) -> None:
        self.by_host = by_host

    def encrypt(self, position: int, buffer: bytearray | memoryview) -> None:
        for index in range(len(buffer)):
            buffer[index] ^= (position + index) * 7 + 3 & 0xFF

    decrypt = encrypt


@pytest.mark.parametrize("by_host", [True, False])
def test_a_cipher(by_host: bool) -> None:
    chance = random.Random(1)
    _, node = toy(16 * UNIT, MemoryNode(b"base" * 1024))
    node.cipher = Xor(by_host)
    node.next = 7 * UNIT  # guest and host positions differ
    model = bytearray(b"base" * 1024).ljust(16 * UNIT, b"\0")
    for _ in range(100):
        at = chance.randrange(16 * UNIT)
        length = chance.randrange(1, min(3 * UNIT, 16 * UNIT - at) + 1)
        if chance.random() < 0.3:
            engine.write_zeroes(node, at, length)
            model[at : at + length] = bytes(length)
        else:
            data = chance.randbytes(length)
            write(node, at, data)
            model[at : at + length] = data
        assert read(node, 0, 16 * UNIT) == model
    caller = bytes(10)
    write(node, 0, caller)
    assert caller == bytes(10)  # the caller's buffer is not encrypted in place
