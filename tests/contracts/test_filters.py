"""The filter contract on the filters that break, compare and record."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from byre.filters.faults import Device, FaultNode
from byre.filters.verify import VerifyNode
from byre.filters.writelog import LogNode
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.protocols.memory import MemoryNode
from contracts.node import FilterContract


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
