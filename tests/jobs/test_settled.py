"""Jobs and changes of the graph that begin while another thread changes it: they work on what is there then."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import sleep

import pytest

import byre
from byre.errors import Busy, ByreError, InvalidArgument
from byre.filters.base import FilterNode
from byre.graph import chain
from byre.graph.external import NewOverlay, append, snapshot
from byre.graph.graph import Graph
from byre.graph.live import insert_filter, quiesce, remove_filter, replace_node, settled
from byre.graph.node import Node
from byre.graph.relinking import cut_short, drop_intermediate
from byre.image import Image
from byre.jobs.active_commit import ActiveCommitJob
from byre.jobs.backup import BackupJob, BackupOptions
from byre.jobs.job import Job
from byre.jobs.live_commit import LiveCommitJob
from byre.jobs.mirror import MirrorJob, MirrorOptions
from byre.jobs.states import State
from byre.jobs.stream import StreamJob
from support.writers import Writers

K, M = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Passing(FilterNode):
    driver = "passing"


def disk(graph: Graph, name: str, *, layers: int = 1) -> Image:
    """A disk of ``layers`` layers: NAME0 at the bottom."""
    byre.create(f"{name}0", "qcow2", M)
    image = byre.open(f"{name}0", read_only=False, graph=graph)
    image.write(0, random.Random(name).randbytes(256 * K))
    for number in range(1, layers):
        snapshot(graph, [NewOverlay(image, f"{name}{number}")])
        image.write(number * 64 * K, bytes([number]) * 4 * K)
    return image


def digest(image: Image) -> str:
    return hashlib.sha256(image.read(0, image.size)).hexdigest()


def names(image: Image) -> list[str]:
    return [layer.filename for layer in chain.layers(image.node)]


def during(image: Image, change: Callable[[], object], begin: Callable[[], object]) -> BaseException | None:
    """``begin`` in a thread that is held back while this one makes ``change``; how it failed."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            begin()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    with quiesce(image.graph, [image.node]):
        thread.start()
        sleep(0.03)
        change()
    thread.join(10)
    assert not thread.is_alive()
    return failed[0] if failed else None


def covered(image: Image, name: str) -> Callable[[], object]:
    """A change: an overlay is put on top."""
    byre.create(name, "qcow2", M, options={"backing_file": image.filename, "backing_fmt": "qcow2"},
                check_backing=False)  # fmt: skip
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": name}, "backing": None}
    handle = byre.open(spec, graph=image.graph, read_only=False)
    graph, node = image.graph, handle.node

    def change() -> None:
        edge = graph.attach_image(node, "the test", 0, 15)
        handle.close()
        graph._unlink(edge)
        append(graph, [(image, node)])

    return change


def free(graph: Graph, images: int) -> None:
    """No job has left anything behind."""
    assert len(graph.images) == images
    for node in graph.nodes.values():
        assert not node.blockers
        assert not any(edge.frozen or edge.tolerant for edge in node.children.values())
        assert node.kind != "filter"


# -- jobs that begin while an overlay is put on top -----------------------------------------------


@pytest.mark.parametrize("sync", ["full", "top"])
def test_mirror_of_the_layer_that_is_on_top_by_then(sync: str) -> None:
    graph = Graph()
    with disk(graph, "a") as source, disk(graph, "b") as target:
        jobs: list[MirrorJob] = []
        if sync == "top":
            target.write_zeroes(0, M)
        node = source.node
        job_options = MirrorOptions(sync=sync)
        begin = lambda: jobs.append(MirrorJob(source, target, job_options))  # noqa: E731
        assert during(source, covered(source, "over"), begin) is None
        if sync == "top":
            target.write(0, node_content(node))  # what lies below is said to be there
        source.write(10 * K, b"in the overlay")
        jobs[0].on_change = lambda job, state: job.complete() if state is State.READY else None
        before = digest(source)
        jobs[0].execute()
        assert jobs[0].error is None
        assert source.node is target.node
        assert digest(source) == before
        assert node.closed  # nobody needs the old chain any more, filter or not
        free(graph, 2)


def node_content(node: Node) -> bytes:
    data = bytearray(node.size)
    node.read_into(0, memoryview(data))
    return bytes(data)


def test_backup_of_the_layer_that_is_on_top_by_then() -> None:
    graph = Graph()
    with disk(graph, "a") as source, disk(graph, "b") as target:
        jobs: list[BackupJob] = []
        before = digest(source)
        assert during(source, covered(source, "over"), lambda: jobs.append(BackupJob(source, target))) is None
        source.write(10 * K, b"in the overlay, after the moment")
        jobs[0].execute()
        assert jobs[0].error is None
        assert digest(target) == before
        assert names(source) == ["over", "a0"]
        free(graph, 2)


def test_backup_with_a_bitmap_of_a_layer_that_is_covered_meanwhile() -> None:
    """The bitmap stays with the layer it belongs to, which is not the one to be copied any more."""
    graph = Graph()
    with disk(graph, "a") as source, disk(graph, "b") as target:
        source.node.bitmap_store().add("b")  # type: ignore[attr-defined]
        options = BackupOptions(sync="incremental", bitmap="b")
        error = during(source, covered(source, "over"), lambda: BackupJob(source, target, options))
        assert isinstance(error, ByreError)
        assert "'b'" in str(error)
        free(graph, 2)


def test_active_commit_takes_the_overlay_along() -> None:
    graph = Graph()
    with disk(graph, "a", layers=2) as image:
        base, jobs = chain.layers(image.node)[1], list[ActiveCommitJob]()
        assert during(image, covered(image, "over"), lambda: jobs.append(ActiveCommitJob(image, base))) is None
        image.write(10 * K, b"in the overlay")
        before = digest(image)
        jobs[0].on_change = lambda job, state: job.complete() if state is State.READY else None
        jobs[0].execute()
        assert jobs[0].error is None
        assert names(image) == ["a0"]
        assert digest(image) == before
        free(graph, 1)


# -- jobs whose chain is cut meanwhile ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["active commit", "commit", "stream", "base of a stream"])
def test_a_layer_that_goes_meanwhile_is_refused(kind: str) -> None:
    graph = Graph()
    with disk(graph, "a", layers=4) as image:
        top, over, middle, base = chain.layers(image.node)
        begin: dict[str, Callable[[], Job]] = {
            "active commit": lambda: ActiveCommitJob(image, middle),
            "commit": lambda: LiveCommitJob(graph, over, middle),
            "stream": lambda: StreamJob(graph, middle),
            "base of a stream": lambda: StreamJob(graph, top, middle),
        }
        image.write(0, bytes(M))  # what is below does not matter
        error = during(image, lambda: drop_intermediate(graph, over, base), begin[kind])
        assert isinstance(error, InvalidArgument), error
        assert middle.closed
        assert names(image) == ["a3", "a0"]
        assert base.read_only
        free(graph, 1)


def test_a_chain_is_made_shorter_as_it_is_by_then() -> None:
    graph = Graph()
    with disk(graph, "a", layers=4) as image:
        top, _, middle, base = chain.layers(image.node)
        image.write(0, bytes(M))  # what is below does not matter
        before = digest(image)
        # What is to be skipped is gone, and so is what was to be led elsewhere.
        error = during(image, lambda: cut_short(graph, top, base), lambda: drop_intermediate(graph, middle, base))
        assert isinstance(error, InvalidArgument)
        assert names(image) == ["a3", "a0"]
        assert digest(image) == before


# -- one wins -------------------------------------------------------------------------------------


def race(count: int, work: Callable[[int], object]) -> list[object]:
    """What ``work`` returns or raises in each of ``count`` threads that begin together."""
    found: list[object] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait(10)
        try:
            found[number] = work(number)
        except ByreError as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a thread hangs"
    return found


@pytest.mark.parametrize("kind", ["mirror", "backup", "active commit", "stream", "commit"])
def test_of_several_jobs_one_begins(kind: str) -> None:
    graph = Graph()
    with disk(graph, "a", layers=3) as image:
        targets = [disk(graph, f"t{number}") for number in range(4)]
        top, middle, base = chain.layers(image.node)
        make: dict[str, Callable[[int], Job]] = {
            "mirror": lambda number: MirrorJob(image, targets[number]),
            "backup": lambda number: BackupJob(image, targets[number]),
            "active commit": lambda number: ActiveCommitJob(image, base),
            "stream": lambda number: StreamJob(graph, top),
            "commit": lambda number: LiveCommitJob(graph, middle, base),
        }
        for _ in range(5):
            found = race(4, make[kind])
            jobs = [one for one in found if isinstance(one, Job)]
            assert len(jobs) == 1, found
            assert all(isinstance(one, (Job, Busy)) for one in found), found
            jobs[0].cancel()
            jobs[0].join(10)
            assert chain.layers(image.node) == [top, middle, base]
            free(graph, 5)
        for target in targets:
            target.close()


def test_a_filter_is_removed_once() -> None:
    graph = Graph()
    with disk(graph, "a") as image:
        node = image.node
        for _ in range(10):
            above = Passing()
            graph.add(above)
            insert_filter(graph, above, image)
            found = race(3, partial(_remove, graph, above))
            assert found.count(None) == 1, found
            assert all(one is None or isinstance(one, InvalidArgument) for one in found), found
            assert image.node is node
        free(graph, 1)


def _remove(graph: Graph, above: Passing, _: int) -> None:
    remove_filter(graph, above)


def test_snapshots_of_one_disk_by_several_threads_stand_on_each_other() -> None:
    graph = Graph()
    with disk(graph, "a") as image, Writers(image) as writers:
        found = race(4, lambda number: [snapshot(graph, [NewOverlay(image, f"s{number}{turn}")]) for turn in range(3)])
        assert all(isinstance(one, list) for one in found), found
        with writers.held():
            image.flush()
            before, order = hashlib.sha256(writers.model).hexdigest(), names(image)
            assert len(order) == 13
            assert digest(image) == before
            # The headers say what the graph is.
            with byre.open(order[0], graph=Graph(), force_share=True) as again:
                assert [Path(name).name for name in names(again)] == order
                assert digest(again) == before


def test_a_node_is_replaced_where_it_is() -> None:
    graph = Graph()
    with disk(graph, "a") as image, disk(graph, "b") as other, disk(graph, "c") as third:
        old, new = image.node, other.node
        assert during(image, lambda: replace_node(graph, image, third), lambda: replace_node(graph, image, new)) is None
        assert image.node is new
        assert third.node is new
        assert old not in (image.node, other.node)
        graph.release(old)
        with pytest.raises(InvalidArgument, match="is closed"):
            replace_node(graph, other, old)
        assert other.node is new


def test_a_closed_image_is_no_place() -> None:
    graph = Graph()
    image, target = disk(graph, "a"), disk(graph, "b")
    with byre.open(image.node.name, graph=graph):  # the node stays
        image.close()
        with pytest.raises(InvalidArgument, match="closed"):
            MirrorJob(image, target)
        with pytest.raises(InvalidArgument, match="closed"), settled(graph, [image]):
            pass
    target.close()
    with pytest.raises(InvalidArgument, match="closed"):
        Image(target.node, graph)
    assert not graph.nodes


# -- everything at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_everything_at_once(seed: int) -> None:
    """Snapshots, filters, jobs and new options by several threads under a load: the disk holds what was written."""
    graph = Graph()
    with disk(graph, "a", layers=2) as image:
        targets = [disk(graph, f"t{number}") for number in range(4)]
        with Writers(image, seed=seed, pause=0.001) as writers:
            assert race(4, lambda number: _turns(image, targets[number], seed, number)) == [0, 1, 2, 3]
            writers.more(20)
        assert image.read(0, M) == writers.model or pytest.fail("the disk holds something else")
        free(graph, 5)
        for target in targets:
            target.close()
        image.flush()
        top, held = image.filename, digest(image)
    with byre.open(top) as image:
        assert digest(image) == held


def _turns(image: Image, target: Image, seed: int, number: int) -> int:
    for turn in range(8):
        _turn(image, target, random.Random(f"{seed} {number} {turn}"), f"s{number}-{turn}")
    return number


def _turn(image: Image, target: Image, chooser: random.Random, name: str) -> None:
    """One thing at random; that something is in the way is no failure."""
    graph = image.graph
    what = chooser.choice(("snapshot", "filter", "mirror", "backup", "commit", "stream", "reopen"))
    try:
        if what == "snapshot":
            snapshot(graph, [NewOverlay(image, name)])
        elif what == "filter":
            above = Passing()
            graph.add(above)
            insert_filter(graph, above, image)
            sleep(0.002)
            remove_filter(graph, above)
        elif what == "reopen":
            image.reopen(options={"lazy-refcounts": chooser.random() < 0.5})
        else:
            job = _job(what, image, target)
            job.on_change = lambda job, state: job.cancel() if state is State.READY else None
            job.execute()
    except (Busy, InvalidArgument):
        pass


def _job(what: str, image: Image, target: Image) -> Job:
    if what == "mirror":
        return MirrorJob(image, target)
    if what == "backup":
        return BackupJob(image, target)
    layers = chain.layers(image.node)
    if what == "commit" and len(layers) > 2:
        return LiveCommitJob(image.graph, layers[1], layers[2])
    return StreamJob(image.graph, layers[0], layers[-1])
