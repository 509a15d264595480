"""Many threads on one image: each owns interleaved slots and verifies them while others write, zero and discard.

Slots are smaller than a cluster, so that neighbours share clusters, tables and reference counts all the time.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from byre.errors import ByreError
from byre.filters.base import FilterNode
from byre.filters.faults import FaultNode
from byre.filters.replay import crash_states
from byre.filters.writelog import LogNode
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from contracts.node import run_threads
from support.images import layer, new_image, open_image
from support.walk import walk

THREADS = 4

CASES: dict[str, dict[str, Any]] = {
    "4k": {"cluster_size": 4096},
    "512": {"cluster_size": 512},
    "64k": {},
    "v2": {"cluster_size": 4096, "compat": "0.10"},
    "extended": {"cluster_size": 16384, "extended_l2": True},
    "backed": {"cluster_size": 4096, "backing_file": "base", "backing_fmt": "raw"},
    "extended-backed": {"cluster_size": 16384, "extended_l2": True, "backing_file": "base", "backing_fmt": "raw"},
    "data-file": {"cluster_size": 4096, "data_file": "data"},
}


class Slow(FilterNode):
    """Lets other threads in at every request, so that windows between lock and data I/O are wide."""

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        time.sleep(0)
        super().write_from(offset, buffer, flags)
        time.sleep(0)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        time.sleep(0)


class Slots:
    """One thread's slots: what they hold, and random operations on them."""

    def __init__(self, image: Image, index: int, slot: int, base: bytes, seed: int) -> None:
        self.image = image
        self.slot = slot
        self.offsets = range(index * slot, image.size - slot + 1, THREADS * slot)
        self.random = random.Random(f"{seed} {index}")
        self.expected = {offset: base[offset : offset + slot].ljust(slot, b"\0") for offset in self.offsets}

    def step(self) -> None:
        offset = self.random.choice(self.offsets)
        kind = self.random.random()
        held = self.expected[offset]
        if kind < 0.45:
            start = self.random.randrange(self.slot)
            data = self.random.randbytes(self.random.randrange(1, self.slot - start + 1))
            self.image.write(offset + start, data)
            self.expected[offset] = held[:start] + data + held[start + len(data) :]
        elif kind < 0.6:
            self.image.write_zeroes(offset, self.slot, unmap=self.random.random() < 0.5)
            self.expected[offset] = bytes(self.slot)
        elif kind < 0.65:
            self.image.write(offset, bytes(self.slot))
            self.expected[offset] = bytes(self.slot)
        elif kind < 0.7:
            self.image.flush()
        else:
            assert self.image.read(offset, self.slot) == held, f"slot at {offset:#x}"

    def verify(self) -> None:
        for offset, held in self.expected.items():
            assert self.image.read(offset, self.slot) == held, f"slot at {offset:#x}"


def opened(options: dict[str, Any], size: int, filters: list[FilterNode]) -> tuple[Image, MemoryNode, bytes]:
    data = MemoryNode() if "data_file" in options else None
    base = random.Random(3).randbytes(size - 5000) if "backing_file" in options else b""
    memory = new_image("qcow2", size, data, **options)
    graph = Graph()
    below = layer(graph, MemoryNode(base), "raw") if base else None
    data_filters = [Slow()] if data is not None else []
    image = open_image(memory, graph=graph, filters=filters, backing=below, data_file=data, data_filters=data_filters)
    return image, memory, base


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_slots_inside_shared_clusters(name: str, seed: int) -> None:
    image, memory, base = opened(CASES[name], 1 << 18, [Slow()])
    owners = [Slots(image, index, 1000, base, seed) for index in range(THREADS)]

    def work(index: int) -> None:
        for _ in range(600):
            owners[index].step()
        owners[index].verify()

    run_threads(work, THREADS)
    for owner in owners:
        owner.verify()
    node = image.node
    assert node.inflight.claim_count == node.inflight.ticket_count == 0  # type: ignore[attr-defined]
    image.close()
    findings = walk(memory.to_bytes())
    assert findings == ([], [], []), findings


@pytest.mark.parametrize("name", ["4k", "512", "backed", "extended"])
def test_discards_and_compressed_writes_next_door(name: str) -> None:
    """Threads own whole clusters, every fourth, and do everything there is to them."""
    options = CASES[name]
    cluster = int(options["cluster_size"])
    size = cluster * 64
    image, memory, _ = opened(options, size, [Slow()])

    def work(index: int) -> None:
        chooser = random.Random(index)
        mine = range(index, 64, THREADS)
        expected = {number: image.read(number * cluster, cluster) for number in mine}
        for _ in range(400):
            number = chooser.choice(mine)
            offset, kind = number * cluster, chooser.random()
            if kind < 0.25:
                expected[number] = (chooser.randbytes(cluster // 4) + bytes(cluster))[:cluster]
                image.write_compressed(offset, expected[number])
            elif kind < 0.45:
                image.discard(offset, cluster)
                expected[number] = bytes(cluster)
            elif kind < 0.75:
                at = chooser.randrange(cluster // 2)
                image.write(offset + at, b"w" * (cluster // 2))
                held = expected[number]
                expected[number] = held[:at] + b"w" * (cluster // 2) + held[at + cluster // 2 :]
            elif kind < 0.8:
                image.flush()
            assert image.read(offset, cluster) == expected[number], (number, kind)
        for number, held in expected.items():
            assert image.read(number * cluster, cluster) == held

    run_threads(work, THREADS)
    image.close()
    findings = walk(memory.to_bytes())
    assert findings == ([], [], []), findings


def test_half_a_zeroed_cluster_keeps_the_other_half_that_is_being_written() -> None:
    """A write to an allocated cluster whose file range is still a hole, and a zero write to its other half."""
    memory = new_image("qcow2", 1 << 20, preallocation="metadata")
    fault = FaultNode()
    with open_image(memory, filters=[fault]) as image:
        fault.set_breakpoint("pwritev", "A")
        writer = threading.Thread(target=image.write, args=(0, b"w" * 32768))
        writer.start()
        assert fault.wait_suspended("A", 10)
        zeroer = threading.Thread(target=image.write_zeroes, args=(32768, 32768), kwargs={"unmap": True})
        zeroer.start()
        zeroer.join(0.3)
        fault.resume("A")
        writer.join(10)
        zeroer.join(10)
        assert image.read(0, 65536) == b"w" * 32768 + bytes(32768)


def test_a_reader_never_sees_a_reused_cluster() -> None:
    """A reader is held between looking up and reading; meanwhile its cluster is freed and space is written again."""
    memory = new_image("qcow2", 1 << 20, cluster_size=4096)
    with open_image(memory) as setup_image:
        setup_image.write(0, b"old" * 1365 + b"!")
    fault = FaultNode()
    with open_image(memory, filters=[fault]) as image:
        image.read(8192, 1)
        held = threading.Event()
        go = threading.Event()
        below = fault.below
        original = below.read_into

        def slow_read(offset: int, buffer: memoryview) -> None:
            if threading.current_thread() is reader and not held.is_set():
                held.set()
                assert go.wait(10)
            original(offset, buffer)

        below.read_into = slow_read  # type: ignore[method-assign]
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(image.read(0, 4096)))
        reader.start()
        assert held.wait(10)
        image.discard(0, 4096)
        image.flush()
        for index in range(1, 30):
            image.write(index * 4096, b"N" * 4096)
        image.flush()
        go.set()
        reader.join(10)
        below.read_into = original  # type: ignore[method-assign]
        assert found[0] in (b"old" * 1365 + b"!", bytes(4096))


def test_crash_while_many_write() -> None:
    """The log of four writers, crashed: what each had flushed is there, and the metadata is whole."""
    memory = new_image("qcow2", 1 << 18, cluster_size=4096)
    log = LogNode(disk="image")
    image = open_image(memory, filters=[log, Slow()])

    def work(index: int) -> None:
        for turn in range(6):
            offset = (turn * THREADS + index) * 5000
            image.write(offset, bytes([index + 1]) * 5000)
            image.flush()
            log.log.mark((offset, index + 1))

    run_threads(work, THREADS)
    image.close()
    states = list(crash_states(log.log))
    for state in random.Random(1).sample(states, min(300, len(states))):
        data = state.disks["image"].to_bytes()
        findings = walk(data)
        assert not findings.damage, (state.story, findings.damage)
        assert not findings.copied, (state.story, findings.copied)
        with open_image(MemoryNode(data), read_only=True) as crashed:
            for offset, value in state.marks:  # type: ignore[misc]
                assert crashed.read(offset, 5000) == bytes([value]) * 5000, state.story


def test_failures_in_the_middle_of_a_crowd() -> None:
    """Data writes fail now and then: those requests fail, the others are not touched, and nothing hangs."""
    memory = new_image("qcow2", 1 << 18, cluster_size=4096)
    fault = FaultNode()
    image = open_image(memory, filters=[fault])
    for index in range(64):
        image.write(index * 4096, b"-" * 100)
    image.flush()

    def work(index: int) -> None:
        chooser = random.Random(index)
        expected = dict.fromkeys(range(index * 1000, 200000, THREADS * 1000), b"")
        for turn in range(250):
            offset = chooser.choice(list(expected))
            if turn % 10 == 0:
                fault.fail("write", chooser.randrange(1, 4))
            data = bytes([index, turn]) * 500
            try:
                image.write(offset, data)
                expected[offset] = data
            except ByreError:
                expected[offset] = b""
            if expected[offset]:
                assert image.read(offset, 1000) == data

    run_threads(work, THREADS)
    fault.heal()
    assert image.node.failure is None  # type: ignore[attr-defined]
    image.close()
    findings = walk(memory.to_bytes())
    assert findings == ([], [], []), findings


class Disk(FilterNode):
    """Has flushes that find much to do wait until they may go on."""

    def __init__(self, much: int) -> None:
        super().__init__()
        self.much = much
        self.written = 0
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        super().write_from(offset, buffer, flags)
        self.stats.done(1, len(buffer), 0)
        self.written += len(buffer)

    def flush(self) -> None:
        much, self.written = self.written >= self.much, 0
        if much:
            self.begun.set()
            assert self.go_on.wait(20)
        super().flush()


def test_writers_go_on_while_much_data_is_on_its_way_to_the_disk() -> None:
    disk = Disk(16 << 20)
    with open_image(new_image("qcow2", 64 << 20), filters=[disk]) as image:
        image.write(0, bytes(range(256)) * 4096 * 20)
        done = threading.Event()

        def write() -> None:
            image.write(4096, b"x" * 4096)
            image.write(63 << 20, b"y")
            done.set()

        flusher, writer = threading.Thread(target=image.flush), threading.Thread(target=write)
        flusher.start()
        try:
            assert disk.begun.wait(20)
            writer.start()
            assert done.wait(20)
        finally:
            disk.go_on.set()
        writer.join()
        flusher.join()
