"""The filter contract on every filter; quorum, which has many children, keeps that of a writable node."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from byre.errors import ReadOnly
from byre.filters.base import FilterNode, NotifyingFilter
from byre.filters.compress import CompressNode
from byre.filters.copy_on_read import cover
from byre.filters.faults import Device, FaultNode
from byre.filters.preallocate import PreallocateNode
from byre.filters.quorum import QuorumNode, Settings
from byre.filters.throttle import ThrottleNode
from byre.filters.throttle_group import ThrottleGroup
from byre.filters.verify import VerifyNode
from byre.filters.writelog import LogNode
from byre.graph.graph import Graph
from byre.graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE, Node
from byre.protocols.memory import MemoryNode
from contracts.node import FilterContract, WritableContract, read
from support.images import layer, new_image, open_image, stack
from support.walk import walk


class TestFaults(FilterContract):
    device = Device()

    @pytest.fixture
    def node(self) -> Node:
        graph = Graph()
        filter_node, memory = FaultNode(), MemoryNode(self.content)
        graph.add(filter_node)
        graph.add(memory)
        filter_node.filename = memory.filename
        graph.attach(filter_node, "file", memory, "filtered")
        filter_node.set_device(self.device)
        return filter_node

    def test_read_only_refuses(self, node: Node) -> None:
        node.children["file"].node.read_only = True
        super().test_read_only_refuses(node)


class TestAlignedFaults(TestFaults):
    device = Device(
        align=4096, max_transfer=20480, zero_align=8192, max_zero=65536, discard_align=16384, max_discard=1 << 17
    )

    def test_read_only_refuses(self, node: Node) -> None:
        pass


class TestVerify(FilterContract):
    @pytest.fixture
    def node(self) -> Node:
        graph = Graph()
        filter_node, raw, test = VerifyNode(), MemoryNode(self.content), MemoryNode(self.content)
        for one in (filter_node, raw, test):
            graph.add(one)
        filter_node.filename = test.filename
        graph.attach(filter_node, "raw", raw, "filtered")
        graph.attach(filter_node, "file", test, "filtered")
        return filter_node

    def test_read_only_refuses(self, node: Node) -> None:
        for edge in node.children.values():
            edge.node.read_only = True
        super().test_read_only_refuses(node)


class TestLog(FilterContract):
    @pytest.fixture
    def node(self) -> Iterator[Node]:
        graph = Graph()
        filter_node, memory = LogNode(disk="d"), MemoryNode(self.content)
        graph.add(filter_node)
        graph.add(memory)
        filter_node.filename = memory.filename
        graph.attach(filter_node, "file", memory, "filtered")
        filter_node.start()
        yield filter_node
        # Whatever was asked, the record of it leads to the same disk.
        assert filter_node.log.final("d").to_bytes() == memory.to_bytes()

    def test_read_only_refuses(self, node: Node) -> None:
        pass


class OverMemory(FilterContract):
    """A filter over bytes in memory."""

    def make(self) -> FilterNode:
        raise NotImplementedError

    @pytest.fixture
    def node(self) -> Node:
        filter_node, memory = self.make(), MemoryNode(self.content)
        stack(Graph(), memory, [filter_node])
        filter_node.filename = memory.filename
        return filter_node

    def test_read_only_refuses(self, node: Node) -> None:
        node.children["file"].node.read_only = True
        super().test_read_only_refuses(node)


class TestThrottle(OverMemory):
    def make(self) -> FilterNode:
        return ThrottleNode(ThrottleGroup("g", {"bps-total": 10**12, "iops-read": 10**9}))


class TestPreallocate(OverMemory):
    def make(self) -> FilterNode:
        return PreallocateNode(512, 100_000)

    def test_a_write_past_the_end_grows_it(self, node: Node) -> None:
        size = len(self.content)
        node.write_from(size + 1000, memoryview(b"far"))
        assert node.size == size + 1003
        assert read(node, size - 1, 1004) == self.content[-1:] + bytes(1000) + b"far"
        node.inactivate()
        assert node.children["file"].node.size == size + 1003


class TestNotifying(OverMemory):
    """What is announced before it happens covers all that differs afterwards."""

    def make(self) -> FilterNode:
        class Announcing(NotifyingFilter):
            driver = "announcing"

            def __init__(self) -> None:
                super().__init__()
                self.announced = bytearray()

            def before_write(self, offset: int, length: int) -> None:
                missing = offset + length - len(self.announced)
                self.announced += bytes(max(missing, 0))
                self.announced[offset : offset + length] = b"x" * length

        return Announcing()

    @pytest.fixture(autouse=True)
    def nothing_goes_unannounced(self, node: Node) -> Iterator[None]:
        yield
        size = len(self.content)
        announced = np.frombuffer(node.announced.ljust(size, b"\0"), np.uint8)[:size]  # type: ignore[attr-defined]
        before, after = (np.frombuffer(data, np.uint8) for data in (self.content, read(node, 0, size)))
        assert announced[before != after].all()

    def test_growth_reads_as_zeroes_and_what_was_cut_off_does_not_come_back(self, node: Node) -> None:
        pass  # resizing is not announced


class OverImage(FilterContract):
    """A filter over a qcow2 image whose content lies half in its backing file."""

    def cover(self, graph: Graph, below: Node) -> FilterNode:
        raise NotImplementedError

    @pytest.fixture
    def node(self) -> Iterator[Node]:
        half = len(self.content) // 2
        top = new_image("qcow2", len(self.content), backing_file="base", backing_fmt="raw")
        graph = Graph()
        base = MemoryNode(self.content[:half] + b"?" * 1000)
        with open_image(top, graph=graph, backing=layer(graph, base, "raw")) as image:
            image.write(half, self.content[half:])
            filter_node = self.cover(graph, image.node)
            root = graph.attach_image(filter_node, "test", PERM_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL)
            yield filter_node
            graph.detach(root)
            graph.release(filter_node)
        findings = walk(top.to_bytes())
        assert findings == ([], [], []), findings

    def test_read_only_refuses(self, node: Node) -> None:
        node.children["file"].node.read_only = True
        node.flush()
        for change in (lambda: node.write_from(0, memoryview(b"x")), lambda: node.write_zeroes(0, 4096)):
            with pytest.raises(ReadOnly):
                change()
        node.children["file"].node.read_only = False


class TestCopyOnRead(OverImage):
    def cover(self, graph: Graph, below: Node) -> FilterNode:
        return cover(graph, below)

    def test_read_only_refuses(self, node: Node) -> None:
        pass  # it cannot be opened so


class TestCompress(OverImage):
    def cover(self, graph: Graph, below: Node) -> FilterNode:
        node = CompressNode()
        graph.add(node)
        node.filename = below.filename
        graph.attach(node, "file", below, "filtered")
        return node


class TestQuorum(WritableContract):
    settings = Settings(2)
    count = 3

    @pytest.fixture
    def node(self) -> Node:
        graph = Graph()
        node = QuorumNode(self.settings)
        graph.add(node)
        for index in range(self.count):
            memory = MemoryNode(self.content)
            graph.add(memory)
            graph.attach(node, f"children.{index}", memory, "data")
        node.members_changed()
        return node

    def test_read_only_refuses(self, node: Node) -> None:
        for edge in node.children.values():
            edge.node.read_only = True
        super().test_read_only_refuses(node)


class TestQuorumOfOne(TestQuorum):
    settings = Settings(1)
    count = 1


class TestQuorumInOrder(TestQuorum):
    settings = Settings(1, fifo=True)


class TestQuorumVerifying(TestQuorum):
    settings = Settings(2, blkverify=True)
    count = 2
