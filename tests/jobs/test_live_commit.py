"""Commit of layers between, under a disk in use: it reads the same, and the chain is shorter at the end."""

from __future__ import annotations

import random
from pathlib import Path
from time import sleep

import pytest

import byre
from byre.errors import AccessDenied, Busy, Cancelled, InvalidArgument, IOFailure, NoSpace
from byre.graph import chain
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.image import Image
from byre.jobs.job import Control
from byre.jobs.live_commit import LiveCommitJob
from byre.jobs.states import State
from byre.jobs.stream import StreamJob
from support.chains import K, Layer, content, make_chain, make_layer, scribble
from support.failing import Failing
from support.load import load

M = K * K


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, size: int = M, below: str = "", **options: object) -> None:
    if below:
        options |= {"backing_file": below, "backing_fmt": "qcow2"}
    byre.create(name, "qcow2", size, options=options)


def write(name: str, offset: int, data: bytes) -> None:
    with byre.open(name, format="qcow2", read_only=False) as image:
        image.write(offset, data)


def sound(name: str) -> None:
    with byre.open(name, format="qcow2") as image:
        result = image.node.check(Control())  # type: ignore[attr-defined]
        assert (result.corruptions, result.leaks) == (0, 0), result.messages


def names(image: Image) -> list[str]:
    return [layer.filename for layer in chain.layers(image.node)]


def free(graph: Graph) -> bool:
    return not any(
        node.blockers or any(edge.frozen or edge.tolerant for edge in node.children.values())
        for node in graph.nodes.values()
    )


def file_of(node: Node) -> Node:
    return node.children["file"].node


@pytest.mark.parametrize("seed", range(40))
def test_random_chains(seed: int) -> None:
    chooser = random.Random(seed)
    old = make_chain(chooser, "old", chooser.randint(2, 4))
    make_layer(chooser, "top", old[-1])
    before = content(Layer("top", "qcow2"))
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        level = chooser.randint(1, len(layers) - 2)
        at = chooser.randint(level + 1, len(layers) - 1)
        committed = content(Layer(layers[level].filename, "qcow2"))
        behind = content(Layer(layers[at].filename, layers[at].driver))[len(committed) :]
        seen = max(layers[level - 1].size - len(committed), 0)
        behind = bytes(min(seen, len(behind))) + behind[seen:]
        job = LiveCommitJob(image.graph, layers[level], layers[at])
        job.execute()
        assert image.read(0, image.size) == before
        assert chain.layers(image.node) == layers[:level] + layers[at:]
        assert all(layer.read_only for layer in chain.layers(image.node)[1:])
        assert all(layer.closed for layer in layers[level:at])
        assert free(image.graph)
        base = Layer(layers[at].filename, layers[at].driver)
    assert content(Layer("top", "qcow2")) == before
    assert content(base) == committed + behind
    for layer in (Layer("top", "qcow2"), *old):
        if layer.format == "qcow2":
            sound(layer.name)


@pytest.mark.parametrize("seed", range(8))
def test_under_load(seed: int) -> None:
    chooser = random.Random(seed)
    size = 4 * M
    make("base", size - 70000)
    scribble(chooser, "base", "qcow2", 12)
    for name, below in (("low", "base"), ("mid", "low")):
        make(name, size, below, cluster_size=chooser.choice((512, 4096, 65536)))
        scribble(chooser, name, "qcow2", 12)
    make("top", size, "mid")
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        with load(image, seed=seed) as busy:
            while busy.count < 30:
                sleep(0.001)
            job = LiveCommitJob(image.graph, layers[1], layers[3], speed=chooser.choice((0, 8 * M)))
            job.start()
            assert job.join(60)
            assert job.error is None
        written = busy.end()
        assert image.read(0, size) == written
        assert names(image) == ["top", "base"]
        assert free(image.graph)
    Path("mid").unlink()
    Path("low").unlink()
    assert content(Layer("top", "qcow2")) == written
    sound("top")
    sound("base")


def test_every_overlay_of_the_top_follows() -> None:
    make("base")
    make("mid", below="base")
    write("mid", 0, b"mid")
    make("one", below="mid")
    make("two", below="mid")
    graph = Graph()
    with byre.open("one", read_only=False, graph=graph) as one:
        mid = chain.layers(one.node)[1]
        spec = {"driver": "qcow2", "file": {"driver": "file", "filename": "two"}, "backing": mid.name}
        with byre.open(spec, read_only=False, graph=graph) as two:
            LiveCommitJob(graph, mid, chain.layers(one.node)[2], backing_file="./base").execute()
            assert names(one) == ["one", "base"]
            assert names(two) == ["two", "base"]
            assert one.read(0, 3) == two.read(0, 3) == b"mid"
    for name in ("one", "two"):
        with byre.open(name) as image:
            assert image.node.backing_name == "./base"  # type: ignore[attr-defined]
            assert image.read(0, 3) == b"mid"


def three(size: int = M) -> bytes:
    make("base", size // 2)
    write("base", 0, random.Random(1).randbytes(size // 2))
    make("mid", size, "base")
    write("mid", size // 4, random.Random(2).randbytes(size // 2))
    make("top", size, "mid")
    write("top", size // 2, b"top")
    return content(Layer("top", "qcow2"))


def test_refusals() -> None:
    three()
    make("other", below="base")
    graph = Graph()
    with byre.open("top", read_only=False, graph=graph) as image:
        top, mid, base = chain.layers(image.node)
        with pytest.raises(InvalidArgument, match="active layer"):
            LiveCommitJob(graph, top, base)
        with pytest.raises(InvalidArgument, match="not below"):
            LiveCommitJob(graph, base, mid)
        mid.backing_format = ""  # type: ignore[attr-defined]
        with pytest.raises(AccessDenied, match="not recorded"):
            LiveCommitJob(graph, mid, base)
        mid.backing_format = "qcow2"  # type: ignore[attr-defined]
        job = StreamJob(graph, top, base)
        with pytest.raises(Busy, match="block job: stream"):
            LiveCommitJob(graph, mid, base)
        job.cancel()
        # Another overlay of the base would read something else.
        spec = {"driver": "qcow2", "file": {"driver": "file", "filename": "other"}, "backing": base.name}
        with byre.open(spec, graph=graph), pytest.raises(Busy, match="needs permission 'write, resize'"):
            LiveCommitJob(graph, mid, base).execute()
        assert free(graph)
        assert base.read_only
        LiveCommitJob(graph, mid, base).execute()


def test_cancelled_it_leaves_the_chain() -> None:
    before = three(32 * M)
    with byre.open("top", read_only=False) as image:
        _, mid, base = chain.layers(image.node)
        job = LiveCommitJob(image.graph, mid, base, speed=8 * M)
        job.start()
        while job.progress().offset == 0:
            sleep(0.01)
        job.cancel()
        assert job.join(20)
        assert isinstance(job.error, Cancelled)
        assert names(image) == ["top", "mid", "base"]
        assert base.read_only
        assert free(image.graph)
        assert image.read(0, image.size) == before
    assert content(Layer("top", "qcow2")) == before


@pytest.mark.parametrize("policy", ["stop", "ignore"])
def test_what_failed_is_tried_again(policy: str) -> None:
    before = three(8 * M)
    with byre.open("top", read_only=False) as image:
        _, mid, base = chain.layers(image.node)
        failing = Failing(file_of(base), "write_from", 2, NoSpace("no space left"), least=128 * K)
        job = LiveCommitJob(image.graph, mid, base, on_error=policy, auto_dismiss=False)
        events: list[str] = []
        job.on_error_event = lambda _job, operation, action, _error: events.append(f"{operation} {action}")
        job.start()
        for _ in range(500):
            if events and (policy == "ignore" or job.state is State.PAUSED):
                break
            sleep(0.01)
        assert set(events) == {f"write {policy}"}
        assert job.io_status == ("nospace" if policy == "stop" else "ok")
        failing.mend()
        if policy == "stop":
            job.resume()
        assert job.join(30)
        assert job.error is None
        assert image.read(0, image.size) == before
    assert content(Layer("top", "qcow2")) == before


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("method", ["read_into", "write_from", "writev_from", "flush", "resize"])
def test_the_nth_request_fails(which: int, method: str) -> None:
    before = three()
    keep = {name: Path(name).read_bytes() for name in ("top", "mid", "base")}
    for at in range(1, 200):
        for name, data in keep.items():
            Path(name).write_bytes(data)
        image = byre.open("top", read_only=False)
        layers = chain.layers(image.node)
        failing = Failing(file_of(layers[which]), method, at, IOFailure("injected"), once=True)
        error = None
        try:
            LiveCommitJob(image.graph, layers[1], layers[2]).execute()
        except IOFailure as failed:
            error = failed
        assert free(image.graph)
        calls = failing.calls
        failing.mend()
        try:
            assert error is not None or names(image) == ["top", "base"]
            image.close()
        except IOFailure:
            assert error is not None
        assert content(Layer("top", "qcow2")) == before
        if calls < at:
            break
    else:
        pytest.fail("it never came to an end")
