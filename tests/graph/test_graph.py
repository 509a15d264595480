"""The graph: names, edges and permissions, and what is said when they conflict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import byre
from byre.errors import AlreadyExists, Busy, InvalidArgument, NotFound
from byre.filters.base import FilterNode
from byre.graph.graph import Graph
from byre.graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE
from byre.protocols.memory import MemoryNode


def memory(graph: Graph, name: str = "", size: int = 65536) -> MemoryNode:
    node = MemoryNode(size=size, name=name)
    graph.add(node)
    return node


def filtered(graph: Graph, below: MemoryNode | FilterNode, name: str = "") -> FilterNode:
    node = FilterNode(name=name)
    graph.add(node)
    graph.attach(node, "file", below, "filtered")
    return node


def test_names() -> None:
    graph = Graph()
    first, second = memory(graph), memory(graph)
    assert first.name.startswith("#block")
    assert first.name != second.name
    named = memory(graph, "disk")
    assert graph.find("disk") is named
    with pytest.raises(AlreadyExists, match="'disk'"):
        memory(graph, "disk")
    assert graph.find("disk") is named
    with pytest.raises(NotFound, match="no node named 'disc'"):
        graph.find("disc")


def test_rings_and_second_children_are_refused() -> None:
    graph = Graph()
    bottom = memory(graph)
    one = filtered(graph, bottom)
    two = filtered(graph, one)
    with pytest.raises(InvalidArgument, match="ring"):
        graph.attach(one, "other", two, "filtered")
    with pytest.raises(InvalidArgument, match="ring"):
        graph.attach(one, "other", one, "filtered")
    with pytest.raises(InvalidArgument, match="child 'file' already"):
        graph.attach(two, "file", bottom, "filtered")
    assert list(one.children) == ["file"]
    assert len(two.parents) == 0


def test_a_conflict_names_both_and_the_permission() -> None:
    graph = Graph()
    node = memory(graph, "disk")
    graph.attach_image(node, "the backup job", PERM_READ, PERM_ALL & ~PERM_WRITE)
    with pytest.raises(Busy) as caught:
        graph.attach_image(node, "the guest", PERM_READ | PERM_WRITE, PERM_ALL)
    assert "the guest needs permission 'write', which the backup job does not share" in str(caught.value)
    assert len(node.parents) == 1
    graph.attach_image(node, "a reader", PERM_READ, PERM_ALL)


def test_permissions_go_through_filters() -> None:
    graph = Graph()
    bottom = memory(graph, "bottom")
    top = filtered(graph, filtered(graph, bottom, "one"), "two")
    root = graph.attach_image(top, "a writer", PERM_READ | PERM_WRITE, PERM_ALL & ~(PERM_WRITE | PERM_RESIZE))
    used, shared = Graph.cumulative(bottom)
    assert used == PERM_READ | PERM_WRITE
    assert not shared & PERM_WRITE
    with pytest.raises(Busy, match="node"):
        graph.attach_image(bottom, "another", PERM_WRITE, PERM_ALL)
    graph.set_image_permissions(root, PERM_READ, PERM_ALL)
    assert Graph.cumulative(bottom) == (PERM_READ, PERM_ALL)
    graph.attach_image(bottom, "another", PERM_WRITE, PERM_ALL)


def test_a_refused_change_leaves_the_permissions_as_they_were() -> None:
    graph = Graph()
    bottom = memory(graph)
    top = filtered(graph, bottom)
    writer = graph.attach_image(top, "writer", PERM_READ | PERM_WRITE, PERM_ALL)
    other = graph.attach_image(bottom, "other", PERM_WRITE, PERM_ALL)
    with pytest.raises(Busy):
        graph.set_image_permissions(writer, PERM_READ, PERM_READ)
    assert (writer.used, writer.shared) == (PERM_READ | PERM_WRITE, PERM_ALL)
    assert Graph.cumulative(bottom) == (PERM_READ | PERM_WRITE, PERM_ALL)
    graph.detach(other)
    graph.set_image_permissions(writer, PERM_READ, PERM_READ)
    assert Graph.cumulative(bottom)[1] == PERM_READ


def test_releasing_closes_what_nobody_else_uses() -> None:
    graph = Graph()
    bottom = memory(graph)
    one, two = filtered(graph, bottom), filtered(graph, bottom)
    graph.release(one)
    assert one.closed
    assert not bottom.closed
    graph.release(one)  # twice is fine
    graph.release(two)
    assert bottom.closed
    assert graph.nodes == {}


def test_an_error_while_closing_is_told_and_everything_is_closed() -> None:
    class Failing(MemoryNode):
        def inactivate(self) -> None:
            raise Busy("cannot write back")

    graph = Graph()
    bottom = Failing(size=1)
    graph.add(bottom)
    top = filtered(graph, bottom)
    with pytest.raises(Busy, match="cannot write back"):
        graph.release(top)
    assert top.closed
    assert bottom.closed
    assert graph.nodes == {}


# -- locks of images ------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> str:
    from byre.graph.creating import create

    create(str(tmp_path / "a.qcow2"), "qcow2", 1 << 20)
    return str(tmp_path / "a.qcow2")


def test_one_writer_in_one_process(disk: str) -> None:
    with byre.open(disk, read_only=False) as writer:
        for read_only in (True, False):
            with pytest.raises(Busy, match=r"lock.*Is another process using the image"):
                byre.open(disk, read_only=read_only)
        with byre.open(disk, force_share=True) as reader:
            assert reader.read(0, 1) == b"\0"
        writer.write(0, b"x")
    with byre.open(disk) as one, byre.open(disk) as two:
        assert one.read(0, 1) == two.read(0, 1) == b"x"
        with pytest.raises(Busy):
            byre.open(disk, read_only=False)
    with byre.open(disk, read_only=False):
        pass


def test_one_writer_between_processes(disk: str) -> None:
    code = f"import byre; byre.open({disk!r}, read_only=False)"

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr

    with byre.open(disk, read_only=False):
        assert "Is another process using the image" in other()
    with byre.open(disk):
        assert "Busy" in other()
    assert other() == ""


def test_a_backing_file_is_kept_from_writers(tmp_path: Path, disk: str) -> None:
    from byre.graph.creating import create

    top = str(tmp_path / "top")
    create(top, "qcow2", options={"backing_file": disk, "backing_fmt": "qcow2"})
    with byre.open(top, read_only=False):
        with pytest.raises(Busy):
            byre.open(disk, read_only=False)
        with byre.open(disk):
            pass
    with byre.open(disk, read_only=False), pytest.raises(Busy):
        byre.open(top)


def test_exclusive_use(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(65536))
    with byre.open(str(path), format="raw", read_only=False):
        with byre.open(str(path), format="raw", read_only=False) as second:  # raw images may be shared
            second.write(0, b"x")
        with pytest.raises(Busy):
            byre.open(str(path), format="raw", exclusive=True)
    with byre.open(str(path), format="raw", read_only=False, exclusive=True), pytest.raises(Busy):
        byre.open(str(path), format="raw", read_only=False)
