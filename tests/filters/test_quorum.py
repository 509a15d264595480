"""Quorum: what most children say is read, all are written, and whoever is outvoted is named."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import byre
from byre.errors import Busy, ByreError, Corrupt, InvalidArgument, IOFailure, NoSpace, NotFound, ReadOnly
from byre.filters.faults import FaultNode
from byre.filters.quorum import QuorumNode, Settings, add_child, remove_child
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from contracts.node import patchwork, run_threads
from support.images import new_image, stack

SIZE = 1 << 20
DATA = patchwork(SIZE, 4)
Events = list[tuple[str, dict[str, object]]]


class Copies:
    """A quorum over memory, with a fault filter over each child."""

    def __init__(self, settings: Settings, contents: Sequence[bytes] = (DATA, DATA, DATA)) -> None:
        self.graph = Graph()
        self.node = QuorumNode(settings)
        self.graph.add(self.node)
        self.memory = [MemoryNode(content) for content in contents]
        self.faults = [FaultNode(name=f"child{index}") for index in range(len(contents))]
        for index, (memory, fault) in enumerate(zip(self.memory, self.faults, strict=True)):
            stack(self.graph, memory, [fault])
            self.graph.attach(self.node, f"children.{index}", fault, "data")
        self.node.members_changed()
        self.events: Events = []
        self.node.on_event = lambda name, data: self.events.append((name, data))
        self.image = Image(self.node, self.graph, read_only=False)

    @property
    def bad(self) -> list[object]:
        return [data["node-name"] for name, data in self.events if name == "QUORUM_REPORT_BAD"]


def changed(offset: int, byte: int = 0xEE) -> bytes:
    return DATA[:offset] + bytes((byte,)) + DATA[offset + 1 :]


# -- reading --------------------------------------------------------------------------------------


def test_all_agree() -> None:
    copies = Copies(Settings(2))
    assert copies.image.read(0, SIZE) == DATA
    assert copies.events == []


def test_one_is_outvoted_and_named() -> None:
    copies = Copies(Settings(2), (DATA, changed(70_000), DATA))
    assert copies.image.read(69_632, 1024) == DATA[69_632:70_656]
    event = {"type": "read", "node-name": "child1", "sector-num": 136, "sectors-count": 2}
    assert copies.events == [("QUORUM_REPORT_BAD", event)]
    assert copies.memory[1].to_bytes() == changed(70_000)


def test_the_first_child_has_no_privilege() -> None:
    copies = Copies(Settings(2), (changed(5), DATA, DATA))
    assert copies.image.read(0, 512) == DATA[:512]
    assert copies.bad == ["child0"]


def test_rewriting() -> None:
    copies = Copies(Settings(2, rewrite=True), (DATA, changed(70_000), DATA))
    assert copies.image.read(69_632, 1024) == DATA[69_632:70_656]
    assert copies.memory[1].to_bytes() == DATA
    assert copies.image.read(69_632, 1024) == DATA[69_632:70_656]
    assert len(copies.events) == 1


def test_a_rewrite_that_fails_is_no_matter() -> None:
    copies = Copies(Settings(2, rewrite=True), (DATA, changed(1), DATA))
    copies.faults[1].fail("write")
    assert copies.image.read(0, 512) == DATA[:512]


def test_nobody_agrees() -> None:
    copies = Copies(Settings(2), (changed(1, 1), changed(1, 2), changed(1, 3)))
    with pytest.raises(IOFailure, match="fewer than 2 of 3 children agree"):
        copies.image.read(0, 1024)
    event = {"reference": copies.node.name, "sector-num": 0, "sectors-count": 2}
    assert copies.events == [("QUORUM_FAILURE", event)]


def test_a_vote_is_about_a_part_of_a_long_read() -> None:
    """Two children that are wrong in different places do not make a long read fail."""
    long = DATA * 3
    wrong = (bytes((long[0] ^ 1,)) + long[1:], long[:-1] + bytes((long[-1] ^ 1,)), long)
    copies = Copies(Settings(2), wrong)
    assert copies.image.read(0, len(long)) == long
    assert copies.bad == ["child0", "child1"]
    assert {data["sectors-count"] for _, data in copies.events} == {len(long) // 512}


def test_a_bad_child_is_named_once_per_request() -> None:
    copies = Copies(Settings(2), (bytes(3 * SIZE), DATA * 3, DATA * 3))
    assert copies.image.read(0, 3 * SIZE) == DATA * 3
    assert len(copies.events) == 1


def test_a_child_that_fails() -> None:
    copies = Copies(Settings(2))
    copies.faults[0].fail("read")
    assert copies.image.read(0, 512) == DATA[:512]
    assert copies.bad == ["child0"]
    assert "injected" in str(copies.events[0][1]["error"])


def test_too_many_fail_with_the_error_of_most() -> None:
    copies = Copies(Settings(2))
    for fault, number in zip(copies.faults, (errno.EIO, errno.ENOSPC, errno.ENOSPC), strict=True):
        fault.fail("read", errno=number)
    with pytest.raises(NoSpace):
        copies.image.read(0, 512)
    assert [name for name, _ in copies.events] == ["QUORUM_REPORT_BAD"] * 3 + ["QUORUM_FAILURE"]


def test_fifo() -> None:
    copies = Copies(Settings(1, fifo=True), (changed(0), DATA, DATA))
    assert copies.image.read(0, 10) == changed(0)[:10]
    assert copies.events == []
    copies.faults[0].fail("read")
    assert copies.image.read(0, 10) == DATA[:10]
    assert copies.bad == ["child0"]
    for fault in copies.faults:
        fault.fail("read", sticky=True)
    with pytest.raises(IOFailure):
        copies.image.read(0, 10)


def test_blkverify_names_the_byte() -> None:
    copies = Copies(Settings(2, blkverify=True), (DATA, changed(70_001)))
    assert copies.image.read(0, 70_001) == DATA[:70_001]
    with pytest.raises(Corrupt, match="offset=69632 bytes=1024 contents mismatch at offset 70001"):
        copies.image.read(69_632, 1024)


# -- writing --------------------------------------------------------------------------------------


def test_all_are_written() -> None:
    copies = Copies(Settings(2))
    copies.image.write(1000, b"new" * 1000)
    copies.image.write_zeroes(100_000, 50_000)
    copies.image.writev(200_000, [memoryview(b"a" * 10), memoryview(b"b" * 600)])
    copies.image.flush()
    one, *others = (memory.to_bytes() for memory in copies.memory)
    assert all(other == one for other in others)
    assert one[1000:4000] == b"new" * 1000


def test_enough_writes_succeed() -> None:
    copies = Copies(Settings(2))
    copies.faults[2].fail("write")
    copies.image.write(0, b"new")
    assert copies.bad == ["child2"]
    assert copies.events[0][1]["type"] == "write"
    assert copies.image.read(0, 3) == b"new"
    for fault in copies.faults[1:]:
        fault.fail("write")
    with pytest.raises(IOFailure):
        copies.image.write(0, b"newer")
    assert copies.events[-1][0] == "QUORUM_FAILURE"


def test_flushes_vote() -> None:
    copies = Copies(Settings(2))
    copies.faults[0].fail("flush")
    copies.image.flush()
    event = {"type": "flush", "node-name": "child0", "sector-num": 0, "sectors-count": 0}
    assert [(name, {**data, "error": ""}) for name, data in copies.events] == [
        ("QUORUM_REPORT_BAD", {**event, "error": ""})
    ]
    for fault in copies.faults[:2]:
        fault.fail("flush", errno=errno.ENOSPC)
    with pytest.raises(NoSpace):
        copies.image.flush()


def test_no_child_is_left_with_other_bytes_by_zeroes_it_cannot_make_quickly() -> None:
    from byre.filters.faults import Device

    copies = Copies(Settings(1))
    copies.faults[1].set_device(Device(zero_align=65536))
    copies.image.write_zeroes(1000, 1000, fallback=False)
    assert copies.memory[0].to_bytes() == copies.memory[1].to_bytes()
    assert not any(copies.memory[0].to_bytes()[1000:2000])


def test_writers_of_the_same_range_leave_all_children_alike() -> None:
    copies = Copies(Settings(2))

    def work(index: int) -> None:
        chooser = random.Random(index)
        for _ in range(40):
            copies.image.write(chooser.randrange(5000), bytes((index,)) * chooser.randrange(5000))
            copies.image.read(0, 10_000)

    run_threads(work, 4)
    one, *others = (memory.to_bytes() for memory in copies.memory)
    assert all(other == one for other in others)
    assert copies.events == []


def test_a_child_of_another_length_is_outvoted() -> None:
    copies = Copies(Settings(2))
    copies.memory[0].resize(100)
    assert copies.image.size == SIZE
    assert copies.image.read(0, SIZE) == DATA
    copies.memory[1].resize(200)
    with pytest.raises(IOFailure, match="different sizes"):
        _ = copies.image.size


# -- children come and go -------------------------------------------------------------------------


def test_children_come_and_go_under_load() -> None:
    copies = Copies(Settings(2))
    graph, node = copies.graph, copies.node
    done = threading.Event()

    def exchange() -> None:
        for _ in range(15):
            remove_child(graph, node, node.members[0].name)
            fresh = MemoryNode(bytes(SIZE))
            graph.add(fresh)
            copies.image.pause()  # what a mirror would bring over, the test brings while nobody writes
            whole = memoryview(bytearray(SIZE))
            node.read_into(0, whole)
            fresh.write_from(0, whole)
            add_child(graph, node, fresh)
            copies.image.resume()
        done.set()

    def write(index: int) -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            copies.image.write(index * 1000, bytes((turn % 250,)) * 1000)
            assert copies.image.read(index * 1000, 1000) == bytes((turn % 250,)) * 1000

    run_threads(lambda index: write(index) if index else exchange(), 4)
    assert [edge.name for edge in node.members] == ["children.15", "children.16", "children.17"]
    expected = copies.image.read(0, SIZE)
    for edge in node.members:
        assert isinstance(edge.node, MemoryNode)
        assert edge.node.to_bytes() == expected
    assert copies.events == []


def test_what_may_not_come_or_go() -> None:
    copies = Copies(Settings(2))
    short = MemoryNode(bytes(10))
    copies.graph.add(short)
    with pytest.raises(InvalidArgument, match="10 bytes"):
        add_child(copies.graph, copies.node, short)
    with pytest.raises(NotFound, match="no child"):
        remove_child(copies.graph, copies.node, "children.7")
    remove_child(copies.graph, copies.node, "child1")
    assert copies.faults[1].closed
    assert [edge.name for edge in copies.node.members] == ["children.0", "children.2"]
    with pytest.raises(Busy, match="vote threshold 2"):
        remove_child(copies.graph, copies.node, "child0")
    other = MemoryNode(DATA)
    copies.graph.add(other)
    assert add_child(copies.graph, copies.node, other).name == "children.3"
    pair = Copies(Settings(2, blkverify=True), (DATA, DATA))
    with pytest.raises(InvalidArgument, match="blkverify"):
        add_child(pair.graph, pair.node, MemoryNode(DATA))


# -- opening --------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        (tmp_path / name).write_bytes(DATA)
    return list("abc")


def test_options(files: list[str]) -> None:
    spec: dict[str, object] = {"driver": "quorum", "vote-threshold": 2, "rewrite-corrupted": True}
    dotted = {f"children.{index}.{key}": value for index, name in enumerate(files)
              for key, value in (("driver", "file"), ("filename", name))}  # fmt: skip
    with byre.open({**spec, **dotted}, read_only=False) as image:
        image.write(0, b"dotted")
    children = [{"driver": "file", "filename": name} for name in files]
    with byre.open({**spec, "children": children}, read_only=False) as image:
        assert image.read(0, 6) == b"dotted"
        image.reopen(options={"vote-threshold": 3})
        assert image.node.settings.threshold == 3  # type: ignore[attr-defined]
        with pytest.raises(InvalidArgument, match="expected 1 to 3"):
            image.reopen(options={"vote-threshold": 4})
    assert all(Path(name).read_bytes()[:6] == b"dotted" for name in files)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "vote-threshold"),
        ({"vote-threshold": 0}, "expected 1 to 3"),
        ({"vote-threshold": 4}, "expected 1 to 3"),
        ({"vote-threshold": 2, "blkverify": True}, "exactly two children"),
        ({"vote-threshold": 2, "read-pattern": "lifo"}, "read-pattern"),
        ({"vote-threshold": 2, "rewrite-corrupted": True}, "open for writing"),
        ({"vote-threshold": 2, "children": []}, "one or more"),
        ({"vote-threshold": 2, "children": {"1": "a"}}, "without gaps"),
        ({"vote-threshold": 2, "children": "a"}, "children"),
    ],
)
def test_refusals(files: list[str], options: dict[str, object], words: str) -> None:
    children = [{"driver": "file", "filename": name} for name in files]
    with pytest.raises(ByreError, match=words):
        byre.open({"driver": "quorum", "children": children, **options})


def test_children_of_different_length_are_refused(files: list[str]) -> None:
    Path("b").write_bytes(DATA + DATA)
    children = [{"driver": "file", "filename": name} for name in files]
    with pytest.raises(IOFailure, match="different sizes: 1048576, 2097152"):
        byre.open({"driver": "quorum", "children": children, "vote-threshold": 1})


def test_an_image_on_a_quorum_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image_bytes = new_image("qcow2", SIZE).to_bytes()
    for name in "ab":
        Path(name).write_bytes(image_bytes)
    children = [{"driver": "file", "filename": name} for name in "ab"]
    spec = {"driver": "qcow2", "file": {"driver": "quorum", "children": children, "vote-threshold": 2}}
    with byre.open(spec, read_only=False) as image:
        image.write(0, DATA)
    assert Path("a").read_bytes() == Path("b").read_bytes()
    with byre.open("b") as image:
        assert image.read(0, SIZE) == DATA


def test_map_says_zero_where_all_children_do(files: list[str]) -> None:
    for name in files:
        with Path(name).open("wb") as file:
            file.truncate(SIZE)
            file.seek(131_072)
            file.write(b"x" * 65_536)
    with Path("b").open("r+b") as file:
        file.seek(524_288)
        file.write(b"y" * 65_536)
    children = [{"driver": "file", "filename": name} for name in files]
    with byre.open({"driver": "quorum", "children": children, "vote-threshold": 2}) as image:
        rows = [(row.offset, row.kind) for row in image.extents()]
    assert rows == [(0, 1), (131_072, 0), (196_608, 1), (524_288, 0), (589_824, 1)]


def test_an_image_opened_for_writing_is_handed_over(tmp_path: Path) -> None:
    copies = Copies(Settings(2))
    path = tmp_path / "fourth"
    path.write_bytes(DATA)
    reading = byre.open(path, format="raw", graph=copies.graph)
    with reading, pytest.raises(ReadOnly, match="the quorum would write to it"):
        add_child(copies.graph, copies.node, reading)
    with byre.open(path, format="raw", graph=copies.graph, read_only=False) as handle:
        child = add_child(copies.graph, copies.node, handle)
        with pytest.raises(ReadOnly):
            handle.write(0, b"x")
        copies.image.write(10, b"to all")
        assert handle.read(10, 6) == b"to all"
    copies.image.flush()
    assert path.read_bytes()[10:16] == b"to all"
    remove_child(copies.graph, copies.node, child.name)
    assert copies.bad == []


def test_an_image_that_cannot_be_handed_over_stays_writable(tmp_path: Path) -> None:
    copies = Copies(Settings(2))
    path = tmp_path / "fourth"
    path.write_bytes(DATA)
    with byre.open(path, format="raw", graph=copies.graph, read_only=False) as handle:
        with Image(handle.node, copies.graph, read_only=False), pytest.raises(Busy):
            add_child(copies.graph, copies.node, handle)
        assert len(copies.node.members) == 3
        handle.write(0, b"x")
