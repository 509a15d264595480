"""The filter of a mirror passes everything on, and leaves a mark wherever the two disks may differ."""

from __future__ import annotations

import pytest

from byre.bitmaps.bitmap import Bitmap
from byre.errors import Busy, IOFailure
from byre.filters.mirror_top import MirrorTopNode
from byre.graph.graph import Graph
from byre.graph.node import PERM_ALL, PERM_WRITE, Node
from byre.protocols.memory import MemoryNode
from contracts.node import FilterContract, write
from support.faulty import faulty

K = 1 << 10
SIZE = 1 << 20


def over(content: bytes, *, blocking: bool = False) -> MirrorTopNode:
    graph = Graph()
    node = MirrorTopNode(Bitmap(len(content), 4 * K))
    disk, target = MemoryNode(content), MemoryNode(content)
    for one in (node, disk, target):
        graph.add(one)
    node.filename = disk.filename
    graph.attach(node, "file", disk, "filtered")
    if blocking:
        graph.attach(node, "target", target, "data")
        node.blocking = True
    return node


class TestBackground(FilterContract):
    blocking = False

    @pytest.fixture
    def node(self) -> Node:
        return over(self.content, blocking=self.blocking)

    def test_read_only_refuses(self, node: Node) -> None:
        node.children["file"].node.read_only = True
        super().test_read_only_refuses(node)

    def test_growth_reads_as_zeroes_and_what_was_cut_off_does_not_come_back(self, node: Node) -> None:
        with pytest.raises(Busy, match="size cannot change"):
            node.resize(node.size * 2)


class TestWriteBlocking(TestBackground):
    blocking = True


def dirty(node: MirrorTopNode) -> set[int]:
    return {offset // (4 * K) for offset in range(0, SIZE, 4 * K) if node.dirty.get(offset)}


def test_what_changes_is_marked() -> None:
    node = over(bytes(SIZE))
    write(node, 100, b"x")
    node.writev_from(5 * 4 * K - 1, [memoryview(b"ab"), memoryview(b"c")])
    node.write_zeroes(10 * 4 * K, 4 * K)
    node.discard(20 * 4 * K, 8 * K)
    assert dirty(node) == {0, 4, 5, 10, 20, 21}


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("method", ["write_from", "write_zeroes", "discard"])
def test_what_may_have_changed_is_marked(method: str, blocking: bool) -> None:
    node = over(bytes(SIZE), blocking=blocking)
    faulty(node.below, method, 1)
    with pytest.raises(IOFailure):
        getattr(node, method)(0, memoryview(b"x") if method == "write_from" else 100)
    assert dirty(node) == {0}


def test_in_step_nothing_is_marked_and_what_was_clean_stays_so() -> None:
    node = over(bytes(SIZE), blocking=True)
    node.dirty.set(2 * 4 * K, 2 * 4 * K)
    write(node, 100, b"part of a clean one")
    write(node, 2 * 4 * K, b"w" * 4 * K)
    write(node, 3 * 4 * K, b"part of a dirty one")
    assert dirty(node) == {3}
    target = node.children["target"].node
    assert isinstance(target, MemoryNode)
    assert target.to_bytes()[100:119] == b"part of a clean one"


def test_a_target_that_fails_is_marked_and_the_writer_not_told() -> None:
    node = over(bytes(SIZE), blocking=True)
    faulty(node.children["target"].node, "write_from", 1)
    write(node, 0, b"x" * 4 * K)
    assert dirty(node) == {0}
    write(node, 0, b"y" * 4 * K)
    assert dirty(node) == set()


def test_permissions() -> None:
    node = over(bytes(SIZE), blocking=True)
    edge = node.children["file"]
    assert node.child_permissions(edge, PERM_WRITE, PERM_ALL) == (PERM_WRITE, PERM_ALL)
    graph = Graph()
    graph.attach_image(node, "the guest", PERM_WRITE, PERM_ALL)
    assert not node.child_permissions(edge, PERM_WRITE, PERM_ALL)[1] & PERM_WRITE
    node.alone = False
    assert node.child_permissions(edge, PERM_WRITE, PERM_ALL)[1] & PERM_WRITE
    assert node.child_permissions(node.children["target"], 0, PERM_ALL)[0] == PERM_WRITE
