"""The same live operations through the peer's storage daemon and here: equal content, allocation and headers."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import byre
from byre.graph import chain
from byre.graph.external import NewOverlay, snapshot
from byre.jobs.live_commit import LiveCommitJob
from byre.jobs.stream import StreamJob
from conftest import peer_program
from support.chains import K, Layer, content, make_chain, make_layer
from support.daemon import CommandFailed, Daemon

Run = Callable[..., "CompletedProcess[str]"]
pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(peer_program("qemu-storage-daemon"), tmp_path_factory.mktemp("daemon")) as peer:
        yield peer


def open_chain(daemon: Daemon, layers: list[Layer]) -> list[str]:
    """The copies in ``peer``, base first, opened as nodes; their names."""
    below: str | None = None
    nodes: list[str] = []
    for layer in layers:
        node = f"node-{layer.name}"
        last = layer is layers[-1]
        backing = {} if layer.format == "raw" else {"backing": below}
        file = {"driver": "file", "filename": f"{os.getcwd()}/peer/{layer.name}"}
        daemon("blockdev-add", driver=layer.format, node_name=node, file=file, read_only=not last,
               **({"auto_read_only": True} if not last else {}), **backing)  # fmt: skip
        nodes.append(node)
        below = node
    return nodes


def close(daemon: Daemon) -> None:
    """All nodes, top first: one after the other, as far as nobody stands on them."""
    while nodes := [node["node-name"] for node in daemon("query-named-block-nodes") if node["node-name"][0] != "#"]:
        before = len(nodes)
        for node in nodes:
            try:
                daemon("blockdev-del", node_name=node)
            except Exception:
                continue
            before = 0
        assert not before, nodes


def held(qemu_img: Run, layer: Layer, unit: int) -> dict[int, str]:
    """What the pieces of ``unit`` bytes are that the layer itself holds."""
    found: dict[int, str] = {}
    for row in json.loads(qemu_img("map", "--output=json", "-f", layer.format, layer.name).stdout):
        if row["depth"] == 0 and row["present"]:
            for number in range(row["start"] // unit, -(-(row["start"] + row["length"]) // unit)):
                found[number] = "data" if row["data"] else found.get(number, "zero")
    return found


def unit_of(layer: Layer) -> int:
    with byre.open(layer.name, format=layer.format, backing=False) as image:
        return int(getattr(image.node, "cluster_size", 512))


def backing(name: str) -> str:
    with byre.open(name, backing=False) as image:
        return os.path.basename(image.node.backing_name)  # type: ignore[attr-defined]


def same(qemu_img: Run, layers: list[Layer], *, end: int = 1 << 62) -> None:
    """:param end: where the allocation is looked at no further"""
    for layer in layers:
        other = Layer(f"peer/{layer.name}", layer.format)
        assert content(layer) == content(other), layer.name
        unit = unit_of(layer)
        mine, theirs = ({at for at in held(qemu_img, one, unit) if at < end // unit} for one in (layer, other))
        assert mine == theirs, layer.name
        if layer.format == "qcow2":
            qemu_img("check", "-f", "qcow2", layer.name)
            assert backing(layer.name) == backing(other.name)


def chain_of(chooser: random.Random, least: int) -> list[Layer]:
    """Base first; copies of all are in ``peer``."""
    layers = make_chain(chooser, "old", chooser.randint(least, 3))
    layers.append(make_layer(chooser, "top", layers[-1]))
    os.mkdir("peer")
    for layer in layers:
        shutil.copy2(layer.name, "peer")
    return layers


@pytest.mark.parametrize("seed", range(30))
def test_stream(seed: int, qemu_img: Run, daemon: Daemon) -> None:
    chooser = random.Random(seed)
    layers = chain_of(chooser, 1)
    before = content(layers[-1])
    at = chooser.randrange(-1, len(layers) - 1)  # -1: no base
    level = chooser.choice([len(layers) - 1, chooser.randint(at + 1, len(layers) - 1)])
    level = max(level, 1)
    with byre.open("top") as image:
        sizes = [layer.size for layer in chain.layers(image.node)][::-1]
    nodes = open_chain(daemon, layers)
    try:
        base = {"base_node": nodes[at], "backing_file": layers[at].name} if at >= 0 else {}
        daemon("block-stream", job_id="job", device=nodes[level], auto_dismiss=False, **base)
        daemon.concluded("job")
        close(daemon)
    except CommandFailed:
        if max(sizes[:level]) > sizes[level]:
            pytest.skip("the peer ended on an assertion, as it may where a layer below is longer")
        raise
    with byre.open("top", read_only=False) as image:
        mine = chain.layers(image.node)[::-1]
        StreamJob(image.graph, mine[level], mine[at] if at >= 0 else None).execute()
        assert image.read(0, image.size) == before
    assert content(layers[-1]) == before
    # Behind the end of a layer below, the peer zeroes more than it must.
    same(qemu_img, [*layers[: at + 1], *layers[level:]], end=min(sizes[:level]))


@pytest.mark.parametrize("seed", range(16))
def test_commit(seed: int, qemu_img: Run, daemon: Daemon) -> None:
    chooser = random.Random(seed + 100)
    layers = chain_of(chooser, 2)
    with byre.open("top") as image:
        sizes = [layer.size for layer in chain.layers(image.node)][::-1]
    before = content(layers[-1])
    at = chooser.randrange(len(layers) - 2)
    level = chooser.randint(at + 1, len(layers) - 2)
    nodes = open_chain(daemon, layers)
    try:
        daemon("block-commit", job_id="job", device=nodes[-1], top_node=nodes[level], base_node=nodes[at],
               backing_file=layers[at].name, auto_dismiss=False)  # fmt: skip
        daemon.concluded("job")
        close(daemon)
    except CommandFailed as error:
        if "not supported" in str(error):
            pytest.skip("the peer cannot grow a base of version 2 over a longer one, for want of zero clusters")
        raise
    with byre.open("top", read_only=False) as image:
        mine = chain.layers(image.node)[::-1]
        LiveCommitJob(image.graph, mine[level], mine[at]).execute()
    assert content(layers[-1]) == before
    if sizes[at] > sizes[level] < sizes[level + 1]:
        return  # the peer shows what lay behind the end of the layer that is gone
    same(qemu_img, [*layers[: at + 1], *layers[level + 1 :]])


def test_snapshot(qemu_img: Run, daemon: Daemon) -> None:
    chooser = random.Random(5)
    layers = chain_of(chooser, 1)
    with byre.open("top") as image:
        size = image.size
    qemu_img("create", "-f", "qcow2", "peer/over", size)
    nodes = open_chain(daemon, layers)
    file = {"driver": "file", "filename": f"{os.getcwd()}/peer/over"}
    try:
        daemon("blockdev-add", driver="qcow2", node_name="over", file=file, backing=None)
        daemon("blockdev-snapshot", node=nodes[-1], overlay="over")
        daemon("block-stream", job_id="job", device="over", auto_dismiss=False)
        daemon.concluded("job")
    finally:
        close(daemon)
    with byre.open("top", read_only=False) as image:
        snapshot(image.graph, [NewOverlay(image, "over")])
        StreamJob(image.graph, image.node).execute()
    same(qemu_img, [*layers, Layer("over", "qcow2")])


def test_the_peer_reads_what_snapshots_leave(qemu_img: Run) -> None:
    byre.create("disk", "qcow2", K * K)
    with byre.open("disk", read_only=False) as image:
        for turn in range(3):
            image.write(turn * 1000, bytes((turn + 1,)) * 1000)
            snapshot(image.graph, [NewOverlay(image, f"over{turn}")])
        before = image.read(0, image.size)
    rows = json.loads(qemu_img("info", "--backing-chain", "--output=json", "over2").stdout)
    assert [os.path.basename(row["filename"]) for row in rows] == ["over2", "over1", "over0", "disk"]
    qemu_img("convert", "-O", "raw", "over2", "flat")
    assert Path("flat").read_bytes() == before
