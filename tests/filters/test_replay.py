"""The write log and the crash states it allows, against a disk model small enough to enumerate by hand."""

from __future__ import annotations

import random

import pytest

import byre
from byre.errors import InvalidArgument
from byre.filters.replay import CrashState, SparseDisk, WriteLog, crash_states, cut_points
from byre.filters.writelog import LogNode
from byre.graph.graph import Graph
from byre.io.extent import FUA, MAY_UNMAP
from byre.protocols.memory import MemoryNode


def disk(size: int = 4096, log: WriteLog | None = None, name: str = "disk", data: bytes = b"") -> LogNode:
    graph = Graph()
    node = LogNode(log, disk=name)
    memory = MemoryNode(data, size=size)
    graph.add(memory)
    graph.add(node)
    graph.attach(node, "file", memory, "filtered")
    node.start()
    return node


def write(node: LogNode, offset: int, data: bytes, flags: int = 0) -> None:
    node.write_from(offset, memoryview(data), flags)


def contents(node: LogNode, length: int, **options: object) -> set[bytes]:
    return {state.disks[node.disk].read(0, length) for state in crash_states(node.log, **options)}  # type: ignore[arg-type]


# -- SparseDisk -----------------------------------------------------------------------------------


def test_sparse_disk_behaves_like_a_bytearray() -> None:
    chooser = random.Random(1)
    sparse, plain = SparseDisk(30000), bytearray(30000)
    for _ in range(500):
        at, length = chooser.randrange(20000), chooser.randrange(10000)
        if chooser.random() < 0.5:
            data = chooser.randbytes(length)
            sparse.write(at, data)
            plain[at : at + length] = data
        else:
            sparse.zero(at, length)
            plain[at : at + length] = bytes(length)
        assert sparse.read(at, length) == plain[at : at + length]
    assert sparse.to_bytes() == plain
    assert sparse.digest == SparseDisk(30000, bytes(plain)).digest
    twin = sparse.copy()
    twin.write(0, b"other")
    assert twin.digest != sparse.digest
    assert sparse.to_bytes() == plain
    sparse.resize(100)
    sparse.resize(30000)
    assert sparse.to_bytes() == plain[:100] + bytes(29900)
    assert sparse.digest == SparseDisk(30000, bytes(plain[:100])).digest
    assert sparse.read(29990, 20) == bytes(20)


# -- the log --------------------------------------------------------------------------------------


def test_everything_that_changes_is_passed_on_and_recorded() -> None:
    node = disk(data=b"base" * 1024)
    write(node, 10, b"abc", FUA)
    node.writev_from(20, [memoryview(b"de"), memoryview(b"f")])
    node.write_zeroes(0, 4, MAY_UNMAP)
    node.discard(512, 512)
    node.flush()
    node.log.mark("flushed")
    node.resize(8192)
    entries = node.log.entries
    assert [(e.kind, e.offset, e.length, e.fua) for e in entries] == [
        ("write", 10, 3, True),
        ("write", 20, 3, False),
        ("zeroes", 0, 4, False),
        ("discard", 512, 512, False),
        ("flush", 0, 0, False),
        ("mark", 0, 0, False),
        ("resize", 8192, 0, False),
    ]
    assert entries[1].data == b"def"
    times = [time for entry in entries for time in (entry.issued, entry.completed)]
    assert times == sorted(set(times))
    assert node.log.bases["disk"].read(0, 4) == b"base"
    assert node.log.final("disk").to_bytes() == node.below.to_bytes()  # type: ignore[attr-defined]


def test_a_request_that_fails_is_never_completed() -> None:
    node = disk()
    node.below.read_only = True
    with pytest.raises(byre.errors.ReadOnly):
        write(node, 0, b"x")
    assert node.log.entries[0].completed == -1
    node.below.read_only = False
    node.flush()
    assert contents(node, 1) == {b"x", b"\0"}


def test_as_a_driver_with_a_shared_log() -> None:
    one = {"driver": "blklog", "node-name": "one", "file": {"driver": "memory", "size": 4096}}
    graph = Graph()
    with byre.open({"driver": "raw", "file": one}, read_only=False, graph=graph) as first:
        two = {"driver": "blklog", "share-log": "one", "file": {"driver": "memory", "size": 4096}}
        with byre.open({"driver": "raw", "file": two}, read_only=False, graph=graph) as second:
            first.write(0, b"1")
            second.write(0, b"2")
            first.flush()
            log = graph.find("one").log  # type: ignore[attr-defined]
        assert [entry.kind for entry in log.entries[:3]] == ["write", "write", "flush"]
        assert len({entry.disk for entry in log.entries}) == 2
        with pytest.raises(InvalidArgument, match="not a blklog node"):
            byre.open({**two, "share-log": first.node.name}, graph=graph)
    with pytest.raises(InvalidArgument, match="needs a child 'file'"):
        byre.open({"driver": "blklog"})


# -- crash states ---------------------------------------------------------------------------------


def test_unflushed_writes_are_any_subset() -> None:
    node = disk()
    for index in range(3):
        write(node, 512 * index, b"x" * 512)
    found = {bytes(c[512 * i] for i in range(3)) for c in contents(node, 1536)}
    assert len(found) == 8


def test_a_flush_makes_what_completed_before_it_durable() -> None:
    node = disk()
    write(node, 0, b"a")
    node.flush()
    node.log.mark("flushed")
    write(node, 512, b"b")
    states = list(crash_states(node.log))
    late = [state for state in states if state.marks]
    assert all(state.disks["disk"].read(0, 1) == b"a" for state in late)
    assert {state.disks["disk"].read(512, 1) for state in late} == {b"\0", b"b"}
    assert any(state.disks["disk"].read(0, 1) == b"\0" for state in states if not state.marks)


def test_a_flush_does_not_cover_what_was_in_flight() -> None:
    log = WriteLog()
    log.add_disk("d", SparseDisk(4096))
    slow = log.issue("d", "write", 0, 1, b"s")
    flush = log.issue("d", "flush")
    log.complete(slow)
    log.complete(flush)
    log.mark("after")
    assert {s.disks["d"].read(0, 1) for s in crash_states(log) if s.marks} == {b"\0", b"s"}


def test_the_later_of_two_overlapping_writes_is_not_undone_by_the_earlier() -> None:
    log = WriteLog()
    log.add_disk("d", SparseDisk(4096))
    early = log.issue("d", "write", 0, 1024, b"e" * 1024)
    late = log.issue("d", "write", 512, 512, b"l" * 512)
    log.complete(late)
    flush = log.issue("d", "flush")
    log.complete(early)
    log.complete(flush)
    log.mark("after")
    found = {s.disks["d"].read(0, 1024)[::512] for s in crash_states(log) if s.marks}
    assert found == {b"\0l", b"el"}


def test_what_shares_a_sector_with_an_earlier_write_carries_it_along() -> None:
    node = disk(data=b"d" * 4096)
    write(node, 10, b"first")
    write(node, 100, b"second")
    seen = {(s.disks["disk"].read(10, 5), s.disks["disk"].read(100, 6)) for s in crash_states(node.log)}
    assert seen == {(b"ddddd", b"dddddd"), (b"first", b"dddddd"), (b"first", b"second")}


def test_fua_covers_its_own_write_only() -> None:
    node = disk()
    write(node, 0, b"a")
    write(node, 512, b"b", FUA)
    node.log.mark("done")
    found = {(s.disks["disk"].read(0, 1), s.disks["disk"].read(512, 1)) for s in crash_states(node.log) if s.marks}
    assert found == {(b"\0", b"b"), (b"a", b"b")}


def test_writes_are_torn_at_sectors_from_both_sides() -> None:
    node = disk()
    write(node, 256, b"x" * 1024)
    found = contents(node, 1536)
    whole = bytes(256) + b"x" * 1024 + bytes(256)
    for cut in (512, 1024):
        assert whole[:cut] + bytes(1536 - cut) in found
        assert bytes(cut) + whole[cut:] in found
    assert len(found) == 6


def test_cut_points_are_sector_ends_and_at_most_16() -> None:
    assert list(cut_points(0, 512)) == []
    assert list(cut_points(100, 1000)) == [412, 924]
    many = list(cut_points(0, 1 << 20))
    assert len(many) == 16
    assert many[0] == 512
    assert many[-1] == (1 << 20) - 512
    assert all(cut % 512 == 0 for cut in many)


def test_a_durable_discard_may_not_have_happened() -> None:
    node = disk(data=b"d" * 4096)
    node.discard(0, 1024)
    node.flush()
    node.log.mark("flushed")
    write(node, 512, b"w" * 512)
    node.flush()
    node.log.mark("again")
    last = {s.disks["disk"].read(0, 1024) for s in crash_states(node.log) if len(s.marks) == 2}
    assert last == {bytes(512) + b"w" * 512, b"d" * 512 + b"w" * 512}
    only = {s.disks["disk"].read(0, 1024) for s in crash_states(node.log, ignore_discards=False) if len(s.marks) == 2}
    assert only == {bytes(512) + b"w" * 512}


def test_growth_and_zero_writes_may_be_lost() -> None:
    node = disk(1024, data=b"d" * 1024)
    node.resize(2048)
    node.write_zeroes(0, 512)
    sizes = {(s.disks["disk"].size, s.disks["disk"].read(0, 1)) for s in crash_states(node.log)}
    assert sizes == {(1024, b"d"), (1024, b"\0"), (2048, b"d"), (2048, b"\0")}


def test_many_pending_writes_are_sampled_and_states_do_not_repeat() -> None:
    node = disk(1 << 16)
    for index in range(20):
        write(node, 512 * index, bytes([index + 1]) * 512)
    states = list(crash_states(node.log))
    assert len({state.digest for state in states}) == len(states)
    shown = {bytes(s.disks["disk"].read(512 * i, 1)[0] for i in range(20)) for s in states}
    everything = bytes(range(1, 21))
    assert everything in shown
    assert bytes(20) in shown
    for i in range(20):
        assert bytes(i) + everything[i : i + 1] + bytes(19 - i) in shown
        assert everything[:i] + b"\0" + everything[i + 1 :] in shown
    assert {s.digest for s in crash_states(node.log)} == {s.digest for s in states}
    assert {s.digest for s in crash_states(node.log, seed=7)} != {s.digest for s in states}


def test_shared_seen_skips_what_another_log_has_shown() -> None:
    seen: set[object] = set()
    counts = []
    for _ in range(2):
        node = disk()
        write(node, 0, b"a")
        counts.append(len(list(crash_states(node.log, seen=seen))))
    assert counts == [2, 0]


def test_two_disks_crash_at_one_moment() -> None:
    """The second disk is written only after the first was flushed: it never runs ahead."""
    log = WriteLog()
    one, two = disk(log=log, name="one"), disk(log=log, name="two")
    write(one, 0, b"1")
    one.flush()
    write(two, 0, b"2")
    found = {(s.disks["one"].read(0, 1), s.disks["two"].read(0, 1)) for s in crash_states(log)}
    assert found == {(b"\0", b"\0"), (b"1", b"\0"), (b"1", b"2")}


def test_a_state_tells_its_story() -> None:
    node = disk()
    write(node, 0, b"a" * 1024)
    write(node, 2048, b"b")
    stories = [state.story for state in crash_states(node.log)]
    assert any("lost #0 write disk+0x0/1024" in story and "torn" not in story for story in stories)
    assert any("#0 write disk+0x0/1024 torn to [512, 1024)" in story for story in stories)
    state = next(crash_states(node.log))
    assert isinstance(state, CrashState)
    with pytest.raises(InvalidArgument, match="a disk 'disk' already"):
        disk(log=node.log)
