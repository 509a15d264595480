"""Filters that are made in Python and put into a graph in use: they take part in what happens to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest

import byre
from byre.filters.base import FilterNode
from byre.filters.compress import CompressNode
from byre.filters.copy_on_read import CopyOnReadNode
from byre.filters.preallocate import PreallocateNode
from byre.filters.quorum import QuorumNode, Settings
from byre.filters.throttle import ThrottleNode
from byre.filters.throttle_group import ThrottleGroup
from byre.graph import chain
from byre.graph.external import NewOverlay, snapshot
from byre.graph.graph import Graph
from byre.graph.live import insert_filter, remove_filter
from byre.graph.node import Node
from byre.graph.opening import Opener, OpenFlags, Policy
from byre.image import Image
from byre.jobs.job import Control
from support.load import load

M = 1 << 20


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    byre.create("disk", "qcow2", M, options={"cluster_size": 4096})
    return "disk"


FILTERS: dict[str, Callable[[], FilterNode]] = {
    "throttle": lambda: ThrottleNode(ThrottleGroup("g", {"iops-total": 100000})),
    "preallocate": lambda: PreallocateNode(4096, 65536),
    "compress": CompressNode,
}


@pytest.mark.parametrize(
    ("kind", "below"), [("throttle", "image"), ("throttle", "file"), ("preallocate", "file"), ("compress", "image")]
)
def test_reopened_for_a_snapshot(disk: str, kind: str, below: str) -> None:
    with byre.open(disk, read_only=False) as image:
        node = FILTERS[kind]()
        image.graph.add(node)
        insert_filter(image.graph, node, image.node if below == "image" else image.node.children["file"].node)
        image.write(0, b"old" * 1000)
        snapshot(image.graph, [NewOverlay(image, "over")])
        image.write(3, b"new")
        assert image.read(0, 9) == b"oldnewold"
        assert image.graph.warnings == []
        assert all(layer.read_only for layer in chain.layers(image.node)[1:])
        assert node.read_only
    with byre.open("over") as image:
        assert image.read(0, 9) == b"oldnewold"


def test_a_quorum_is_reopened_for_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph = Graph()
    quorum = QuorumNode(Settings(2))
    graph.add(quorum)
    nodes: list[Node] = []
    for index, name in enumerate("abc"):
        byre.create(name, "qcow2", M)
        nodes.append(Opener(graph, Policy()).open_chain(name, OpenFlags(read_only=False)))
        graph.attach(quorum, f"children.{index}", nodes[-1], "data")
    quorum.members_changed()
    with Image(quorum, graph, read_only=False) as disk:
        disk.write(0, b"old")
        snapshot(graph, [NewOverlay(disk, "over")])
        disk.write(3, b"new")
        assert disk.read(0, 6) == b"oldnew"
        assert graph.warnings == []
        assert all(node.read_only for node in nodes)


def test_space_ahead_comes_and_goes_under_load(disk: str) -> None:
    with byre.open(disk, read_only=False) as image, load(image) as busy:
        graph, file = image.graph, image.node.children["file"].node
        for _ in range(12):
            node = PreallocateNode(4096, 256 << 10)
            graph.add(node)
            insert_filter(graph, node, file)
            goal = busy.count + 25
            while busy.count < goal and not busy.errors:
                sleep(0.001)
            remove_filter(graph, node)
            goal = busy.count + 10
            while busy.count < goal and not busy.errors:
                sleep(0.001)
        content = busy.end()
        assert image.read(0, M) == content
        image.flush()
        assert image.node.check(Control()).corruptions == 0  # type: ignore[attr-defined]
    with byre.open(disk) as image:
        assert image.read(0, M) == content


@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
@pytest.mark.parametrize("chained", [False, True])
def test_what_a_backing_file_holds_is_seen_through_a_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_format: str, chained: bool
) -> None:
    """Part of a cluster becomes zeroes: whether all of it may is asked of the layers below, not of their files."""
    monkeypatch.chdir(tmp_path)
    byre.create("base", base_format, M)
    with byre.open("base", format=base_format, read_only=False) as image:
        image.write(0, b"U" * M)
    below, format = "base", base_format
    if chained:
        byre.create("mid", "qcow2", options={"backing_file": below, "backing_fmt": format})
        below, format = "mid", "qcow2"
    byre.create("over", "qcow2", options={"backing_file": below, "backing_fmt": format})
    with byre.open("over", read_only=False) as image:
        node = ThrottleNode(ThrottleGroup("g"))
        image.graph.add(node)
        insert_filter(image.graph, node, chain.layers(image.node)[1])
        for cluster in range(0, M, 65536):
            image.write_zeroes(cluster + 512, 512, unmap=True)
        assert image.read(0, M) == (b"U" * 512 + bytes(512) + b"U" * (65536 - 1024)) * (M // 65536)


def test_copy_on_read_comes_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    byre.create("base", "qcow2", M)
    with byre.open("base", read_only=False) as image:
        image.write(0, bytes(range(1, 251)) * (M // 250))
    byre.create("over", "qcow2", options={"backing_file": "base", "backing_fmt": "qcow2"})
    with byre.open("over", read_only=False) as image, load(image) as busy:
        node = CopyOnReadNode(graph=image.graph)
        image.graph.add(node)
        insert_filter(image.graph, node, image.node)
        image.read(0, M)
        remove_filter(image.graph, node)
        below = chain.layers(image.node)[1]
        content = busy.end()
        reads = below.stats.operation_count[0]
        assert image.read(0, M) == content
        assert below.stats.operation_count[0] == reads
