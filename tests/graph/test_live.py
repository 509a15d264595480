"""Changing the graph under load: filters, replaced nodes, backing files; what is refused leaves all as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, sleep

import pytest

import byre
from byre.errors import Busy, InvalidArgument, NotSupported, ReadOnly
from byre.filters.base import FilterNode
from byre.formats.base import FormatNode
from byre.graph import blockers, live
from byre.graph.child import Child
from byre.graph.graph import Graph
from byre.graph.node import PERM_ALL, PERM_READ, PERM_WRITE, Node
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from support.images import layer, new_image, open_image

K = 1024
SIZE = 256 * K


class Passing(FilterNode):
    """Counts what goes through; can hold reads up.

    :ivar gate: reads wait for it
    """

    driver = "passing"

    def __init__(self, name: str = "") -> None:
        super().__init__(name=name)
        self.seen = 0
        self.wrote = 0
        self.counting = threading.Lock()
        self.waiting = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.seen += 1
        self.waiting.set()
        assert self.gate.wait(10)
        super().read_into(offset, buffer)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.seen += 1
        super().write_from(offset, buffer, flags)
        with self.counting:
            self.wrote += 1

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        self.seen += 1
        super().writev_from(offset, buffers, flags)
        with self.counting:
            self.wrote += 1


class Holding(FormatNode):
    """Holds on to what is below."""

    def child_moved(self, child: Child, before: Node) -> None:
        raise NotSupported("cannot go on with another node")


def memory(graph: Graph, name: str, content: bytes = bytes(SIZE)) -> MemoryNode:
    node = MemoryNode(content, name=name)
    graph.add(node)
    return node


def added(graph: Graph, name: str = "") -> Passing:
    node = Passing(name)
    graph.add(node)
    return node


def shape(graph: Graph) -> dict[str, object]:
    """All edges and permissions, to compare."""
    with graph.lock:
        return {
            name: (
                sorted((key, edge.node.name, edge.used, edge.shared) for key, edge in node.children.items()),
                sorted((edge.describe(), edge.used, edge.shared) for edge in node.parents),
            )
            for name, node in graph.nodes.items()
        }


@contextmanager
def load(image: Image, threads: int = 3) -> Iterator[Callable[[], bytes]]:
    """Threads that each keep writing counters into slots of their own and reading them back; yields what they wrote."""
    model = bytearray(image.read(0, image.size))
    stop = threading.Event()
    errors: list[BaseException] = []
    unit = 512

    def work(number: int) -> None:
        try:
            turn = 0
            while not stop.is_set():
                turn += 1
                offset = ((turn * 37 + number) % 64 * threads + number) * unit % image.size
                data = (turn * threads + number).to_bytes(8, "big") * (unit // 8)
                image.write(offset, data)
                model[offset : offset + unit] = data
                assert image.read(offset, unit) == data
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield lambda: bytes(model)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert errors == []


# -- quiesce --------------------------------------------------------------------------------------


def test_quiesce_waits_for_requests_in_flight_and_holds_others_back() -> None:
    graph = Graph()
    node, slow = memory(graph, "disk"), added(graph, "slow")
    live.insert_filter(graph, slow, node)
    other = Image(memory(graph, "other"), graph)
    image = Image(slow, graph)
    slow.gate.clear()
    reader = threading.Thread(target=image.read, args=(0, 1))
    reader.start()
    assert slow.waiting.wait(10)
    inside = threading.Event()
    leave = threading.Event()

    def change() -> None:
        with live.quiesce(graph, [node]):
            inside.set()
            assert leave.wait(10)

    changer = threading.Thread(target=change)
    changer.start()
    assert not inside.wait(0.05)
    assert other.read(0, 1) == b"\0"  # not affected
    slow.gate.set()
    assert inside.wait(10)
    reader.join()
    assert other.read(0, 1) == b"\0"
    second = threading.Thread(target=image.read, args=(0, 1))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    leave.set()
    second.join(10)
    changer.join(10)
    assert not second.is_alive()
    image.close()
    other.close()


def test_quiesce_nests_and_lets_the_images_of_a_job_run() -> None:
    graph = Graph()
    node = memory(graph, "disk")
    guest, own = Image(node, graph, read_only=False), Image(node, graph, read_only=False)
    with live.quiesce(graph, [node], running=[own]), live.quiesce(graph, [node], running=[own]):
        own.write(0, b"job")
        started = threading.Thread(target=guest.write, args=(10, b"guest"))
        started.start()
        started.join(0.05)
        assert started.is_alive()
        assert own.read(10, 5) == bytes(5)
    started.join(10)
    assert own.read(0, 15) == b"job" + bytes(7) + b"guest"
    guest.close()
    own.close()


def test_an_error_in_the_body_lets_requests_go_on() -> None:
    graph = Graph()
    node = memory(graph, "disk")
    with Image(node, graph) as image:
        with pytest.raises(ZeroDivisionError), live.quiesce(graph, [node]):
            raise ZeroDivisionError
        assert image.read(0, 1) == b"\0"


# -- filters --------------------------------------------------------------------------------------


def test_filters_come_and_go_under_load() -> None:
    graph = Graph()
    with open_image(new_image("qcow2", SIZE, cluster_size=4096), graph=graph) as image:
        disk = image.node
        with load(image) as written:
            end = monotonic() + 1
            while monotonic() < end:
                outer, inner = added(graph), added(graph)
                live.insert_filter(graph, outer, disk)
                live.insert_filter(graph, inner, disk)
                assert image.node is outer
                assert outer.below is inner
                before = outer.seen
                while outer.seen < before + 5:
                    sleep(0.0005)
                    assert monotonic() < end + 10
                live.remove_filter(graph, inner)
                live.remove_filter(graph, outer)
                assert image.node is disk
                assert inner.closed
                assert outer.name not in graph.nodes
        assert image.read(0, SIZE) == written()
    assert graph.nodes == {}


def test_a_filter_goes_between_an_overlay_and_its_backing_file() -> None:
    graph = Graph()
    base = new_image("qcow2", SIZE)
    with open_image(base) as image:
        image.write(0, b"base")
    below = layer(graph, base, "qcow2")
    with open_image(new_image("qcow2", SIZE), graph=graph, backing=below) as image:
        backing = image.node.children["backing"].node
        node = added(graph)
        live.insert_filter(graph, node, backing)
        assert image.node.children["backing"].node is node
        assert image.read(0, 4) == b"base"
        assert node.seen
        with pytest.raises(Busy, match="needs permission 'write'"):
            graph.attach_image(backing, "another", PERM_READ | PERM_WRITE, PERM_ALL)
        live.remove_filter(graph, node)
        assert image.read(0, 4) == b"base"


def test_a_filter_goes_below_raw_but_not_below_what_would_not_follow() -> None:
    graph = Graph()
    with byre.open({"driver": "raw", "file": memory(graph, "bytes").name}, graph=graph, read_only=False) as image:
        node = added(graph)
        live.insert_filter(graph, node, graph.find("bytes"))
        image.write(0, b"x")
        assert node.seen
    below = Image(memory(graph := Graph(), "file"), graph)
    holding = Holding()
    graph.add(holding)
    graph.attach(holding, "file", below.node, "data")
    before = shape(graph)
    with pytest.raises(NotSupported, match="cannot go on with another node"):
        live.insert_filter(graph, added(graph, "new"), below.node, stay=[below])
    assert {name: row for name, row in shape(graph).items() if name != "new"} == before


def test_filters_below_a_format_under_load() -> None:
    """Data and metadata both go through them."""
    graph = Graph()
    memory_node = new_image("qcow2", SIZE, cluster_size=512)
    with open_image(memory_node, graph=graph) as image:
        file = image.node.children["file"].node
        with load(image) as written:
            for _ in range(20):
                node = added(graph)
                live.insert_filter(graph, node, file)
                writes = file.stats.operation_count[1]
                while node.seen < 20:
                    sleep(0.0005)
                image.flush()
                with live.quiesce(graph, [file]):
                    assert node.wrote == file.stats.operation_count[1] - writes
                live.remove_filter(graph, node)
        assert image.read(0, SIZE) == written()
        assert image.node.check(Control()).corruptions == 0  # type: ignore[attr-defined]
    with open_image(memory_node) as image:
        assert image.read(0, SIZE) == written()


def test_images_that_stay() -> None:
    graph = Graph()
    node = memory(graph, "disk")
    with Image(node, graph) as job, Image(node, graph) as guest:
        mine = added(graph)
        live.insert_filter(graph, mine, node, stay=[job])
        assert (job.node, guest.node) == (node, mine)


def test_what_is_no_filter_of_the_node_is_refused() -> None:
    graph = Graph()
    one, two = memory(graph, "one"), memory(graph, "two")
    mine = added(graph)
    live.insert_filter(graph, mine, one)
    with pytest.raises(InvalidArgument, match="no filter of 'two'"):
        live.insert_filter(graph, mine, two)
    with pytest.raises(InvalidArgument, match="no filter"):
        live.remove_filter(graph, two)


# -- replacing ------------------------------------------------------------------------------------


def test_replace_under_load() -> None:
    graph = Graph()
    first = memory(graph, "first")
    with Image(first, graph, read_only=False) as image:
        for turn in range(8):
            with load(image) as written:
                pass
            second = memory(graph, f"copy{turn}", written())
            live.replace_node(graph, image.node, second)
            assert image.node is second
            assert image.read(0, SIZE) == written()


def test_a_refused_replacement_changes_nothing() -> None:
    graph = Graph()
    old, new = memory(graph, "old"), memory(graph, "new")
    root = graph.attach_image(new, "a careful reader", PERM_READ, PERM_ALL & ~PERM_WRITE)
    with Image(old, graph, read_only=False, name="the guest") as guest, Image(old, graph) as reader:
        before = shape(graph)
        with pytest.raises(Busy, match="the guest needs permission 'write', which a careful reader does not share"):
            live.replace_node(graph, old, new)
        assert shape(graph) == before
        assert guest.node is reader.node is old
        guest.write(0, b"still here")
        graph.detach(root)
        new.read_only = True
        with pytest.raises(ReadOnly):
            live.replace_node(graph, old, new)
        assert shape(graph)["old"] == before["old"]
        new.read_only = False
        live.replace_node(graph, old, new)
        assert guest.node is reader.node is new


# -- backing files --------------------------------------------------------------------------------


def qcow2_over(graph: Graph, below: Node | None, name: str, content: bytes = b"") -> Node:
    file = new_image("qcow2", SIZE)
    if content:
        with open_image(file) as image:
            image.write(0, content)
    spec = layer(graph, file, "qcow2") | {"node-name": name, "backing": below.name if below else None}
    with byre.open(spec, graph=graph) as image:
        node = image.node
        graph.attach_image(node, "the test", 0, PERM_ALL)
    return node


def test_set_backing() -> None:
    graph = Graph()
    one, two = qcow2_over(graph, None, "one", b"one"), qcow2_over(graph, None, "two", b"two")
    with Image(qcow2_over(graph, one, "top"), graph) as image:
        assert image.read(0, 3) == b"one"
        live.set_backing(graph, image.node, two)
        assert image.read(0, 3) == b"two"
        live.set_backing(graph, image.node, None)
        assert image.read(0, 3) == bytes(3)
        live.set_backing(graph, image.node, one)
        assert image.read(0, 3) == b"one"
        before = shape(graph)
        with pytest.raises(InvalidArgument, match="ring"):
            live.set_backing(graph, one, image.node)
        with pytest.raises(NotSupported, match="does not support backing"):
            live.set_backing(graph, graph.nodes[one.children["file"].node.name], two)
        frozen = live.Frozen(graph, [image.node.children["backing"]], "block device is in use by block job: stream")
        for below in (two, None):
            with pytest.raises(Busy, match=r"cannot change 'backing' link from 'top' to 'one': .*stream"):
                live.set_backing(graph, image.node, below)
        assert shape(graph) == before
        frozen.release()
        frozen.release()
        live.set_backing(graph, image.node, None)


def test_a_backing_file_in_use_is_kept_from_writers() -> None:
    graph = Graph()
    raw = byre.open({"driver": "raw", "file": memory(graph, "bytes").name, "node-name": "base"}, graph=graph,
                    read_only=False)  # fmt: skip
    top = qcow2_over(graph, None, "top")
    image = Image(top, graph)
    with pytest.raises(Busy, match=r"needs permission 'write', which qcow2 node 'top' .as 'backing'. does not share"):
        live.set_backing(graph, top, raw.node)
    assert top.children.keys() == {"file"}
    raw.reopen(read_only=True)
    live.set_backing(graph, top, raw.node)
    with pytest.raises(Busy):
        raw.reopen(read_only=False)
    assert raw.read_only
    # Nobody reads through the overlay any more.
    image.close()
    raw.reopen(read_only=False)
    with pytest.raises(Busy):
        Image(top, graph)
    raw.close()


# -- blockers -------------------------------------------------------------------------------------


def test_blockers_say_why() -> None:
    graph = Graph()
    node = memory(graph, "disk")
    blockers.check(graph, node, "stream")
    with blockers.Blocking(graph, [node], "block device is in use by block job: mirror"):
        with pytest.raises(Busy, match="node 'disk' is busy: block device is in use by block job: mirror"):
            blockers.check(graph, node, "stream")
        with blockers.Blocking(graph, [node], "second", ["stream"]):
            pass
        with Image(node, graph, read_only=False) as image:
            with pytest.raises(Busy, match="mirror"):
                image.resize(2 * SIZE)
            with pytest.raises(Busy, match="mirror"):
                live.replace_node(graph, node, memory(graph, "other"))
    blockers.check(graph, node, "stream")
    assert node.blockers == {}
    with pytest.raises(InvalidArgument, match="unknown operation 'steam'"):
        blockers.check(graph, node, "steam")


def test_a_backing_file_is_not_resized_or_replaced() -> None:
    graph = Graph()
    base = qcow2_over(graph, None, "base")
    qcow2_over(graph, base, "top")
    for operation in ("resize", "replace", "external-snapshot", "mirror-target"):
        with pytest.raises(Busy, match="node is used as backing hd of 'top'"):
            blockers.check(graph, base, operation)
    for operation in ("commit-target", "backup-source", "stream"):
        blockers.check(graph, base, operation)
