"""Active commit: the base becomes what the image is, under writers, and takes its place or does not."""

from __future__ import annotations

import random
from pathlib import Path
from time import sleep

import pytest

import byre
from byre.errors import AccessDenied, Busy, Cancelled, InvalidArgument, IOFailure, ReadOnly
from byre.filters.faults import FaultNode
from byre.graph import chain
from byre.graph.live import insert_filter
from byre.image import Image
from byre.jobs.active_commit import ActiveCommitJob
from byre.jobs.job import Control
from byre.jobs.states import State
from support.chains import K, Layer, content, make_chain, make_layer, scribble
from support.faulty import faulty
from support.writers import Writers, until

M = K * K


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def three(base_size: int = 4 * M) -> None:
    byre.create("base", "qcow2", base_size)
    for name, below in (("mid", "base"), ("top", "mid")):
        byre.create(name, "qcow2", 4 * M, options={"backing_file": below, "backing_fmt": "qcow2"})
    for seed, name in enumerate(("base", "mid", "top")):
        scribble(random.Random(seed), name, "qcow2", 10)


def reach(job: ActiveCommitJob, state: State) -> None:
    until(lambda: job.state is state or job.error is not None)
    assert job.error is None, job.error


def settled(image: Image) -> None:
    for node in image.graph.nodes.values():
        assert node.driver in ("qcow2", "raw", "file")
        assert not node.blockers
        assert not any(edge.frozen or edge.tolerant for edge in node.children.values())


def sound(*names: str) -> None:
    for name in names:
        with byre.open(name, format="qcow2") as image:
            assert image.node.check(Control()).corruptions == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("base_size", [4 * M, 2 * M, 2 * M + 512, 6 * M])
def test_completed_under_writers(level: int, base_size: int) -> None:
    three(base_size)
    with byre.open("top", read_only=False) as image:
        base = chain.layers(image.node)[level]
        size = max(base.size, image.size)
        with Writers(image, seed=level) as writers:
            job = ActiveCommitJob(image, base)
            job.start()
            reach(job, State.READY)
            writers.more(50)
            job.complete()
            assert job.join(20)
            assert job.error is None
            writers.more(50)
        assert image.node is base
        assert image.size == size
        assert image.read(0, len(writers.model)) == writers.model
        settled(image)
        # The layers above are closed: nothing but the base and what is below it is left.
        assert len(chain.layers(image.node)) == len(image.graph.nodes) / 2 == 3 - level
    assert content(Layer(("top", "mid", "base")[level], "qcow2"))[: 4 * M] == writers.model
    sound("base", "mid", "top")


@pytest.mark.parametrize("level", [1, 2])
def test_cancelled_when_ready(level: int) -> None:
    three()
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        with Writers(image, seed=level) as writers:
            job = ActiveCommitJob(image, layers[level], speed=200 * M)
            job.start()
            reach(job, State.READY)
            writers.more(30)
            with writers.held():
                job.cancel()
                assert job.join(20)
                assert job.error is None
                moment = bytes(writers.model)
            assert layers[level].read_only
            writers.more(30)
        assert chain.layers(image.node) == layers
        assert image.read(0, image.size) == writers.model
        settled(image)
    assert content(Layer(("top", "mid", "base")[level], "qcow2")) == moment
    sound("base", "mid", "top")


@pytest.mark.parametrize("seed", range(20))
def test_random_chains(seed: int) -> None:
    chooser = random.Random(seed)
    old = make_chain(chooser, "old", chooser.randint(1, 3))
    make_layer(chooser, "top", old[-1])
    before = content(Layer("top", "qcow2"))
    level = chooser.randint(1, len(old))
    base = old[-level]
    behind = content(base)[len(before) :]
    with byre.open("top", format="qcow2", read_only=False) as image:
        node = chain.layers(image.node)[level]
        job = ActiveCommitJob(image, node)
        finish = job.complete if seed % 2 else job.cancel
        job.on_change = lambda job, state: finish() if state is State.READY else None
        job.execute()
        assert image.read(0, len(before)) == before
        assert image.size == max(len(before), node.size if seed % 2 else 0)
        settled(image)
    # Behind the end of a shorter top the base keeps what it had.
    assert content(base) == before + behind
    sound(*(layer.name for layer in old if layer.format == "qcow2"))


def test_only_what_is_above_the_base_moves() -> None:
    three()
    with byre.open("top", read_only=False) as image:
        base = chain.layers(image.node)[1]
        held = chain.extents(image.node, 0, image.size, base=base)
        job = ActiveCommitJob(image, base)
        job.on_change = lambda job, state: job.cancel() if state is State.READY else None
        job.execute()
        assert base.stats.byte_count[1] + base.stats.byte_count[2] <= int(held.length[held.allocated()].sum())


def test_forced_cancel() -> None:
    three()
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        for step in range(6):
            with Writers(image, seed=step) as writers:
                job = ActiveCommitJob(image, layers[2], speed=20 * M)
                job.start()
                sleep(step * 0.01)
                job.cancel(force=True)
                assert job.join(10)
                assert isinstance(job.error, Cancelled)
            assert image.read(0, image.size) == writers.model
            assert layers[2].read_only
            settled(image)
    assert content(Layer("top", "qcow2")) == writers.model


def test_failing_writes_leave_the_image_as_it_was() -> None:
    three()
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        before = image.read(0, image.size)
        for nth in range(1, 8):
            job = ActiveCommitJob(image, layers[1])
            broken = faulty(layers[1].children["file"].node, "write_from", nth)
            job.on_change = lambda job, state: job.cancel() if state is State.READY else None
            try:
                job.execute()
            except IOFailure:
                pass
            broken.undo()
            assert image.read(0, image.size) == before
            settled(image)
            if layers[1].failure is not None:  # type: ignore[attr-defined]
                break
    assert content(Layer("top", "qcow2")) == before


def test_refusals() -> None:
    three()
    with byre.open("top") as image, pytest.raises(ReadOnly):
        ActiveCommitJob(image, chain.layers(image.node)[1])
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        with pytest.raises(InvalidArgument, match="not below"):
            ActiveCommitJob(image, layers[0])
        job = ActiveCommitJob(image, layers[1])
        with pytest.raises(Busy):
            ActiveCommitJob(image, layers[2])
        job.cancel()
        settled(image)
    with byre.open("top", read_only=False) as image:
        node = chain.layers(image.node)[0]
        node.backing_format = ""  # type: ignore[attr-defined]
        with pytest.raises(AccessDenied, match="format of this backing file is not recorded"):
            ActiveCommitJob(image, chain.layers(image.node)[1])


def test_with_a_filter_on_top() -> None:
    three()
    with byre.open("top", read_only=False) as image:
        filter_node = FaultNode()
        image.graph.add(filter_node)
        insert_filter(image.graph, filter_node, image.node)
        with Writers(image) as writers:
            job = ActiveCommitJob(image, chain.layers(image.node)[2])
            job.start()
            reach(job, State.READY)
            writers.more(10)
            job.complete()
            assert job.join(10)
            assert job.error is None
        assert image.read(0, image.size) == writers.model
