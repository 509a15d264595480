"""Jobs on chains that have taken effect already when another one of their transaction fails: all is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import byre
from byre.errors import Cancelled, IOFailure
from byre.graph import chain
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.job import Control, Job
from byre.jobs.live_commit import LiveCommitJob
from byre.jobs.stream import StreamJob
from byre.jobs.transaction import start_all
from support.chains import Layer, content
from support.failing import Failing
from support.load import load
from support.writers import until

M = 1 << 20


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Spoiler(Job):
    """Fails when the others are as good as done."""

    def __init__(self, others_ready: Callable[[], bool]) -> None:
        super().__init__(id="spoiler")
        self._others_ready = others_ready

    def run(self, control: Control) -> None:
        pass

    def prepare(self) -> None:
        until(self._others_ready)
        raise IOFailure("no luck")


def four() -> None:
    for level in range(4):
        below = {"backing_file": f"l{level - 1}", "backing_fmt": "qcow2"} if level else {}
        byre.create(f"l{level}", "qcow2", M, options=below)
        with byre.open(f"l{level}", format="qcow2", read_only=False) as image:
            image.write(level * 65536, bytes([level + 1]) * 200000)


def names(image: Image) -> list[str]:
    return [layer.filename for layer in chain.layers(image.node)]


JOBS: dict[str, Callable[[Image], Job]] = {
    "stream": lambda image: StreamJob(image.graph, image.node, id="job"),
    "stream to a base": lambda image: StreamJob(image.graph, image.node, chain.layers(image.node)[3], id="job"),
    "stream further down": lambda image: StreamJob(image.graph, chain.layers(image.node)[1], id="job"),
    "commit": lambda image: LiveCommitJob(image.graph, *chain.layers(image.node)[1:4:2], id="job"),
}


@pytest.mark.parametrize("kind", list(JOBS))
def test_a_chain_is_as_it_was(kind: str) -> None:
    four()
    graph = Graph()
    with byre.open("l3", format="qcow2", read_only=False, graph=graph) as image, load(image) as busy:
        before = chain.layers(image.node)
        job = JOBS[kind](image)
        spoiler = Spoiler(lambda: names(image) != ["l3", "l2", "l1", "l0"])
        start_all([job, spoiler], grouped=True)
        assert job.join(20)
        assert spoiler.join(20)
        assert isinstance(job.error, Cancelled)
        assert isinstance(spoiler.error, IOFailure)
        assert chain.layers(image.node) == before
        assert not any(node.closed for node in before)
        assert [node.read_only for node in before] == [False, True, True, True]
        assert not any(node.blockers for node in graph.nodes.values())
        assert graph.warnings == []
        again = JOBS[kind](image)  # nothing holds the chain
        again.execute()
        assert len(names(image)) < 4
        written = busy.end()
        assert image.read(0, M) == written
    assert content(Layer("l3", "qcow2")) == written


def test_headers_say_so_as_well() -> None:
    four()
    with byre.open("l3", format="qcow2", read_only=False) as image:
        job = StreamJob(image.graph, image.node, id="job")
        start_all([job, Spoiler(lambda: names(image) == ["l3"])], grouped=True)
        assert job.join(20)
        assert job.error is not None
        held = image.read(0, M)
    with byre.open("l3", format="qcow2") as image:
        assert names(image) == ["l3", "l2", "l1", "l0"]
        assert image.read(0, M) == held


def test_where_that_fails_the_chain_stays_short_and_whole() -> None:
    four()
    graph = Graph()
    with byre.open("l3", format="qcow2", read_only=False, graph=graph) as image:
        held = image.read(0, M)
        failing: list[Failing] = []

        def spoil() -> bool:
            if names(image) != ["l3"]:
                return False
            failing.append(Failing(image.node, "change_backing", 1, IOFailure("no")))
            return True

        job = StreamJob(graph, image.node, id="job")
        start_all([job, Spoiler(spoil)], grouped=True)
        assert job.join(20)
        assert job.error is not None
        failing[0].mend()
        assert names(image) == ["l3"]
        assert "stays short" in graph.warnings[0]
        assert image.read(0, M) == held
        assert set(graph.nodes.values()) == set(graph.below(image.node))
    with byre.open("l3", format="qcow2") as image:
        assert names(image) == ["l3"]
        assert image.read(0, M) == held
