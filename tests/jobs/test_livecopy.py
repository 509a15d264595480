"""Copying one range as it is now: data, zeroes and what is left alone; and sweeps over ranges of which some fail."""

from __future__ import annotations

import random
import threading

import pytest

from byre.errors import InvalidArgument, IOFailure, NoSpace
from byre.graph import chain
from byre.graph.graph import Graph
from byre.image import Image
from byre.io.extent import COMPRESSED, DATA, UNALLOCATED, ZERO
from byre.jobs.blockcopy import CopySettings
from byre.jobs.job import Control
from byre.jobs.livecopy import LiveCopy, Policies, RangeFailed, sweep
from support.faulty import faulty
from support.images import layer, new_image, open_image

K, M = 1 << 10, 1 << 20
SETTINGS = CopySettings(sparse=0, unmap=True, whole_total=False)


def chain_of_two() -> tuple[Image, Image]:
    graph = Graph()
    base = new_image("qcow2", 2 * M)
    with open_image(base) as image:
        image.write(0, b"b" * M)
    top = new_image("qcow2", 4 * M, backing_file="base", backing_fmt="qcow2", cluster_size=4 * K)
    source = open_image(top, graph=graph, backing=layer(graph, base, "qcow2", None) | {"backing": None})
    source.write(100, b"top")
    source.write_zeroes(512 * K, 64 * K)
    return source, open_image(new_image("qcow2", 4 * M), graph=graph)


def test_a_range_is_copied_as_it_is() -> None:
    source, target = chain_of_two()
    copy = LiveCopy(source, target, SETTINGS)
    for offset in range(0, 4 * M, M):
        with copy.request():
            copy.copy(offset, M)
    assert target.read(0, 4 * M) == source.read(0, 4 * M)
    kinds = [(extent.offset, extent.length, extent.kind) for extent in target.node.extents(0, 4 * M)]
    assert [kind for kind in kinds if kind[2] == DATA] == [(0, 512 * K, DATA), (576 * K, 448 * K, DATA)]


def test_what_only_the_base_holds_is_left_alone() -> None:
    source, target = chain_of_two()
    copy = LiveCopy(source, target, SETTINGS, base=chain.layers(source.node)[1])
    with copy.request():
        assert copy.copy(0, M) == 4 * K
    found = {(extent.offset, extent.kind) for extent in target.node.extents(0, M) if extent.kind != UNALLOCATED}
    assert found == {(0, DATA), (512 * K, ZERO)}
    assert target.read(100, 3) == b"top"


@pytest.mark.parametrize("seed", range(8))
def test_compressed_clusters_are_whole(seed: int) -> None:
    chooser = random.Random(seed)
    graph = Graph()
    source = open_image(new_image("qcow2", 2 * M + 512 * 7, cluster_size=4 * K), graph=graph)
    target = open_image(new_image("qcow2", 2 * M + 512 * 7), graph=graph)
    for _ in range(10):
        offset = chooser.randrange(source.size // 512) * 512
        source.write(offset, (b"abcd" * chooser.randrange(1, 3000))[: source.size - offset])
    copy = LiveCopy(source, target, SETTINGS._replace(compress=True))
    for offset in range(0, source.size, 512 * K):
        with copy.request():
            copy.copy(offset, min(512 * K, source.size - offset))
    assert target.read(0, target.size) == source.read(0, source.size)
    assert {extent.kind for extent in target.extents()} <= {COMPRESSED, ZERO, UNALLOCATED}


def test_who_failed() -> None:
    source, target = chain_of_two()
    copy = LiveCopy(source, target, SETTINGS)
    for node, method, is_source in ((source.node, "read_into", True), (target.node, "write_from", False)):
        broken = faulty(node, method, 1)
        with pytest.raises(RangeFailed) as caught, copy.request():
            copy.copy(0, 64 * K)
        assert caught.value.source == is_source
        broken.undo()


def test_a_request_holds_both_gates() -> None:
    source, target = chain_of_two()
    copy = LiveCopy(source, target, SETTINGS)
    for image in (source, target):
        paused = threading.Event()

        def pause(image: Image = image, paused: threading.Event = paused) -> None:
            image.pause()
            paused.set()

        with copy.request():
            thread = threading.Thread(target=pause)
            thread.start()
            assert not paused.wait(0.02)
            copy.copy(0, 64 * K)  # goes on although others are held back already
        thread.join(5)
        assert paused.is_set()
        image.resume()


# -- sweeps ---------------------------------------------------------------------------------------


def test_a_sweep_does_everything_once() -> None:
    done: list[tuple[int, int]] = []
    lock = threading.Lock()

    def work(offset: int, length: int) -> tuple[int, int]:
        with lock:
            done.append((offset, length))
        return length, length

    ranges = [(offset, 10) for offset in range(0, 5000, 10)]
    control = Control()
    assert sweep(ranges, work, control, Policies(), chunk=100)
    assert sorted(done) == ranges
    assert control.done == 5000


@pytest.mark.parametrize("policy", ["report", "ignore", "enospc", "auto"])
@pytest.mark.parametrize("error", [IOFailure("broken"), NoSpace("full")])
def test_errors_by_policy(policy: str, error: IOFailure) -> None:
    """Without anybody who could resume, what would stop is reported."""
    done: list[int] = []

    def work(offset: int, length: int) -> tuple[int, int]:
        if offset == 50:
            raise RangeFailed(error, source=False)
        done.append(offset)
        return length, length

    ranges = [(offset, 10) for offset in range(0, 1000, 10)]
    policies = Policies("report", policy)
    if policy == "ignore":
        assert not sweep(ranges, work, Control(), policies, chunk=10)
        assert sorted(done) == [offset for offset, _ in ranges if offset != 50]
        return
    with pytest.raises(IOFailure):
        sweep(ranges, work, Control(), policies, chunk=10)
    assert len(done) < 20


def test_an_unforeseen_error_ends_the_sweep() -> None:
    def work(offset: int, length: int) -> tuple[int, int]:
        raise InvalidArgument("not one of those")

    with pytest.raises(InvalidArgument):
        sweep([(0, 1)], work, Control(), Policies(), chunk=10)
