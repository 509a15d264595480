"""mirror: the target holds what the source holds, whoever writes meanwhile, whatever is paused, cancelled or fails."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from time import sleep

import pytest

import byre
from byre.errors import Busy, Cancelled, InvalidArgument, IOFailure, NoSpace, NotFound, ReadOnly
from byre.filters.faults import FaultNode
from byre.filters.mirror_top import MirrorTopNode
from byre.formats.qcow2.image import Qcow2Node
from byre.graph import chain
from byre.graph.graph import Graph
from byre.graph.live import insert_filter, quiesce, remove_filter
from byre.graph.node import Node
from byre.image import Image
from byre.io.extent import DATA, UNALLOCATED
from byre.jobs.job import Control
from byre.jobs.mirror import MirrorJob, MirrorOptions
from byre.jobs.states import State
from byre.jobs.transaction import start_all
from byre.protocols.memory import MemoryNode
from support.images import new_image, open_image
from support.writers import Writers, until

K, M = 1 << 10, 1 << 20


def disks(size: int = 4 * M, *, format: str = "qcow2", target_format: str = "qcow2", cluster: int = 65536,
          seed: int = 1, faults: bool = False) -> tuple[Image, Image]:  # fmt: skip
    """A source with data, zeroes and holes, and an empty target, in one graph."""
    graph = Graph()
    made = []
    for driver in (format, target_format):
        options = {"cluster_size": cluster} if driver == "qcow2" else {}
        filters = [FaultNode()] if faults else []
        made.append(open_image(new_image(driver, size, **options), driver, graph=graph, filters=filters))
    chooser = random.Random(seed)
    source = made[0]
    for _ in range(12):
        offset = chooser.randrange(size // 512) * 512
        length = min(chooser.choice((512, 4 * K, 64 * K, 300 * K)), size - offset)
        source.write(offset, chooser.randbytes(length))
        source.write_zeroes(size - offset - length, length // 2)
    return source, made[1]


def fault(image: Image) -> FaultNode:
    node = image.node.children["file"].node
    assert isinstance(node, FaultNode)
    return node


def content(image: Image) -> bytes:
    return image.read(0, image.size)


def reach(job: MirrorJob, state: State) -> None:
    until(lambda: job.state is state or job.error is not None)
    assert job.error is None, job.error


def settled(*images: Image) -> None:
    """No job has left anything behind."""
    graph = images[0].graph
    assert not any(isinstance(node, MirrorTopNode) for node in graph.nodes.values())
    for node in graph.nodes.values():
        assert not node.blockers
        if isinstance(node, Qcow2Node):
            assert node.inflight.claim_count == 0
            assert node.check(Control()).corruptions == 0
    assert {image.name for image in graph.images} <= {""}


def copy(source: Image, target: Image, **options: object) -> None:
    """Mirror with nobody writing, and leave the source where it is."""
    job = MirrorJob(source, target, MirrorOptions(**options))  # type: ignore[arg-type]
    job.on_change = lambda job, state: job.cancel() if state is State.READY else None
    job.execute()


# -- content --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [4 * K, 64 * K])
@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize(("format", "target_format"), [("qcow2", "qcow2"), ("raw", "qcow2"), ("qcow2", "raw")])
def test_complete_under_writers(format: str, target_format: str, mode: str, cluster: int) -> None:
    source, target = disks(format=format, target_format=target_format, cluster=cluster)
    with Writers(source, unit=4 * K, seed=cluster) as writers:
        writers.more(20)
        job = MirrorJob(source, target, MirrorOptions(copy_mode=mode))
        writers.more(20)
        job.start()
        reach(job, State.READY)
        writers.more(50)
        job.complete()
        assert job.join(20)
        assert job.error is None
        assert source.node is target.node
        writers.more(50)
    assert content(source) == writers.model
    settled(source, target)
    source.close()
    assert content(target) == writers.model
    target.close()


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize("seed", range(6))
def test_cancel_when_ready_leaves_a_copy_of_that_moment(seed: int, mode: str) -> None:
    """Pauses and changes of speed come in between."""
    chooser = random.Random(seed)
    source, target = disks(cluster=chooser.choice((4 * K, 64 * K)), seed=seed)
    node = source.node
    with Writers(source, seed=seed) as writers:
        options = MirrorOptions(copy_mode=mode, granularity=chooser.choice((0, 512, 4 * K, M)), buffer_size=M)
        job = MirrorJob(source, target, options, speed=chooser.choice((0, 64 * M)))
        job.start()
        for _ in range(3):
            sleep(chooser.random() * 0.01)
            job.pause()
            until(lambda: job.state in (State.PAUSED, State.STANDBY))
            writers.more(5)
            job.resume()
            job.set_speed(chooser.choice((0, 100 * M)))
        job.set_speed(0)
        reach(job, State.READY)
        writers.more(20)
        with writers.held():
            job.cancel()
            assert job.join(20)
            assert job.error is None
            assert source.node is node
            at_the_end = bytes(writers.model)
            assert content(source) == at_the_end
        writers.more(20)
    assert content(target) == at_the_end
    assert content(source) == writers.model
    settled(source, target)


def test_holes_and_zeroes_stay_what_they_are() -> None:
    source, target = disks(16 * M)
    source.write(5 * M, b"data")
    copy(source, target)
    assert content(target) == content(source)
    for offset in range(0, 16 * M, 64 * K):
        kinds = [next(iter(image.extents(offset, 64 * K))).kind for image in (source, target)]
        assert (kinds[0] == DATA) == (kinds[1] == DATA), hex(offset)
    assert target.node.stats.byte_count[1] <= source.extents().bytes_of(DATA)


def test_what_the_target_held_before_goes() -> None:
    source, target = disks()
    target.write(0, b"old" * (target.size // 3))
    copy(source, target)
    assert content(target) == content(source)


def test_only_the_top_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    byre.create("base", "qcow2", 4 * M)
    with byre.open("base", read_only=False) as image:
        image.write(0, b"b" * 2 * M)
    for name in ("top", "target"):
        byre.create(name, "qcow2", options={"backing_file": "base", "backing_fmt": "qcow2"})
    graph = Graph()
    with (
        byre.open("top", read_only=False, graph=graph) as source,
        byre.open("target", read_only=False, graph=graph) as target,
    ):
        source.write(M, b"t" * 100 * K)
        source.write_zeroes(0, 64 * K)
        copy(source, target, sync="top")
        assert content(target) == content(source)
    for name in ("top", "target"):
        with byre.open(name, backing=False) as image:
            held = [(extent.offset, extent.length) for extent in image.extents() if extent.kind != UNALLOCATED]
            assert held == [(0, 64 * K), (M, 128 * K)]


def test_only_what_is_written_from_now_on() -> None:
    source, target = disks()
    before = content(source)
    job = MirrorJob(source, target, MirrorOptions(sync="none", granularity=4 * K))
    source.write(8 * K, b"n" * 4 * K)
    job.start()
    reach(job, State.READY)
    source.write(M, b"m" * 100)
    until(lambda: not job.status().dirty)
    job.cancel()
    assert job.join(10)
    expected = bytearray(target.size)
    expected[8 * K : 12 * K] = b"n" * 4 * K
    expected[M : M + 4 * K] = (b"m" * 100 + before[M + 100 :])[: 4 * K]
    assert content(target) == expected


def test_a_target_said_to_be_zero_is_not_looked_at() -> None:
    source, target = disks()
    source.write_zeroes(0, M)
    target.write(0, b"not zero")
    copy(source, target, target_is_zero=True)
    assert target.read(0, 8) == b"not zero"
    assert target.read(M, 3 * M) == source.read(M, 3 * M)


@pytest.mark.parametrize("unmap", [True, False])
def test_unmap(unmap: bool) -> None:
    source, target = disks(target_format="raw")
    source.write_zeroes(0, 4 * M, unmap=True)
    target.write(0, b"x" * 4 * M)
    before = target.node.allocated_size()
    copy(source, target, unmap=unmap)
    assert content(target) == bytes(4 * M)
    assert (target.node.allocated_size() < before) == unmap


# -- write-blocking -------------------------------------------------------------------------------


def test_actively_synced() -> None:
    source, target = disks()
    job = MirrorJob(source, target, MirrorOptions(copy_mode="write-blocking"))
    assert not job.status().actively_synced
    job.start()
    reach(job, State.READY)
    until(lambda: job.status().actively_synced)
    job.pause()
    until(lambda: job.state is State.STANDBY)
    source.write(100, b"at once")
    source.write_zeroes(M, 5000)
    assert target.read(100, 7) == b"at once"
    assert job.status().actively_synced
    assert content(target) == content(source)
    job.resume()
    job.cancel(force=True)
    assert job.join(10)
    assert isinstance(job.error, Cancelled)


def test_from_background_to_write_blocking() -> None:
    source, target = disks()
    with Writers(source) as writers:
        job = MirrorJob(source, target)
        job.start()
        reach(job, State.READY)
        assert job.status().copy_mode == "background"
        job.change("write-blocking")
        job.change("write-blocking")
        assert job.status().copy_mode == "write-blocking"
        writers.more(30)
        with pytest.raises(InvalidArgument, match="cannot go back"):
            job.change("background")
        with pytest.raises(InvalidArgument, match="unknown copy mode"):
            job.change("sideways")
        with writers.held():
            job.cancel()
            assert job.join(10)
            assert content(target) == writers.model


def test_a_target_that_fails_does_not_fail_the_writer() -> None:
    source, target = disks(faults=True)
    job = MirrorJob(source, target, MirrorOptions(copy_mode="write-blocking"), on_target_error="stop")
    job.start()
    reach(job, State.READY)
    until(lambda: job.status().actively_synced)
    fault(target).fail("write", sticky=True, errno=errno.ENOSPC)
    source.write(0, b"w" * 65536)
    until(lambda: job.state is State.STANDBY)
    assert job.io_status == "nospace"
    assert not job.status().actively_synced
    fault(target).heal()
    job.resume()
    until(lambda: job.status().actively_synced)
    assert job.io_status == "ok"
    job.complete()
    assert job.join(10)
    assert job.error is None
    assert content(target)[:65536] == b"w" * 65536


# -- figures --------------------------------------------------------------------------------------


def test_convergence_is_reported() -> None:
    source, target = disks(16 * M)
    source.write(0, random.Random(0).randbytes(16 * M))
    job = MirrorJob(source, target, speed=20 * M)
    job.start()
    until(lambda: job.progress().offset > 0)
    found = job.progress()
    assert found.total >= 14 * M
    status = job.status()
    assert status.dirty <= 16 * M
    assert status.rate_out > 0  # already during the first sweep
    assert status.converging
    job.set_speed(0)
    reach(job, State.READY)
    until(lambda: not job.status().dirty)
    status = job.status()
    assert status.converging
    assert status.rate_out > 0
    assert job.progress().offset == job.progress().total == 16 * M
    source.write(0, b"again" * 1000)
    until(lambda: job.progress().offset > 16 * M)
    job.cancel(force=True)
    assert job.join(10)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("policy", ["report", "ignore", "stop"])
def test_every_request_fails_once(policy: str, side: str) -> None:
    """For every n: reported errors fail the job and hurt nobody; with the other policies the target is right."""
    for nth in range(1, 60):
        source, target = disks(512 * K, target_format="raw", faults=True)
        broken = fault(source if side == "source" else target)
        before = content(source)
        job = MirrorJob(source, target, on_source_error=policy, on_target_error=policy)
        broken.fail("read" if side == "source" else "change", nth)
        job.start()
        until(lambda job=job: job.state in (State.READY, State.PAUSED, State.STANDBY) or job.error)
        if job.state is State.PAUSED:
            assert policy == "stop"
            assert job.io_status == "failed"
            job.resume()
            reach(job, State.READY)
        hit = broken.pending_failures == 0
        broken.heal()
        if job.error is None:
            job.cancel()
        assert job.join(10)
        if policy == "report" and hit and not source.graph.warnings:  # closing may fail, for all is durable then
            assert isinstance(job.error, IOFailure)
        else:
            assert job.error is None
            assert content(target) == before
        assert content(source) == before
        settled(source, target)
        source.write(0, b"on it goes")
        if not hit:
            assert nth > 3
            return
    raise AssertionError("never ran through")


@pytest.mark.parametrize("nth", range(1, 12))
def test_errors_while_others_write(nth: int) -> None:
    source, target = disks(faults=True, cluster=4 * K, target_format="raw")
    with Writers(source, seed=nth) as writers:
        job = MirrorJob(source, target, on_target_error="ignore", on_source_error="ignore")
        fault(target).fail("write", nth)
        fault(target).fail("change", nth * 2)
        job.start()
        reach(job, State.READY)
        fault(target).fail("write", nth % 3 + 1)
        writers.more(30)
        with writers.held():
            fault(target).heal()
            job.complete()
            assert job.join(20)
            assert job.error is None
        writers.more(10)
    assert content(target) == writers.model
    settled(target)


def test_enospc_stops_and_others_report() -> None:
    source, target = disks(faults=True)
    fault(target).fail("write", 2, errno=errno.ENOSPC)
    job = MirrorJob(source, target, on_target_error="enospc")
    events = []
    job.on_error_event = lambda job, operation, action, error: events.append((operation, action, type(error)))
    job.start()
    reach(job, State.PAUSED)
    assert events == [("write", "stop", NoSpace)]
    assert job.io_status == "nospace"
    job.resume()
    reach(job, State.READY)
    job.cancel()
    assert job.join(10)
    assert job.error is None
    assert content(target) == content(source)


def test_the_last_flush_fails() -> None:
    source, target = disks(faults=True)
    node = source.node
    job = MirrorJob(source, target)
    job.start()
    reach(job, State.READY)
    source.write(0, b"the last")
    job.pause()
    until(lambda: job.state is State.STANDBY)
    fault(target).fail("flush", sticky=True)
    job.resume()
    reach(job, State.READY)
    job.complete()
    assert job.join(10)
    assert isinstance(job.error, IOFailure)
    assert source.node is node
    source.write(0, b"goes on")
    assert source.read(0, 7) == b"goes on"


def test_forced_cancel_at_any_moment() -> None:
    for step in range(12):
        source, target = disks(seed=step)
        with Writers(source, seed=step) as writers:
            job = MirrorJob(source, target, speed=50 * M)
            job.start()
            sleep(step * 0.004)
            if job.error is None and job.state not in (State.CONCLUDED, State.NULL):
                job.cancel(force=True)
            assert job.join(10)
            assert isinstance(job.error, Cancelled)
            writers.more(5)
        assert content(source) == writers.model
        settled(source, target)


def test_cancel_before_the_start() -> None:
    source, target = disks()
    job = MirrorJob(source, target)
    assert isinstance(source.node, MirrorTopNode)
    job.cancel()
    settled(source, target)


# -- the graph ------------------------------------------------------------------------------------


def test_changes_of_the_graph_meanwhile() -> None:
    """Filters come and go above the source and above the target, in both copy modes, while it is copied."""
    for mode in ("background", "write-blocking"):
        source, target = disks(8 * M)
        graph = source.graph
        with Writers(source) as writers:
            job = MirrorJob(source, target, MirrorOptions(copy_mode=mode), speed=100 * M)
            top = source.node
            job.start()
            for _ in range(6):
                for node in (top, target.node):
                    filter_node = FaultNode()
                    graph.add(filter_node)
                    insert_filter(graph, filter_node, node)
                    writers.more(3)
                    remove_filter(graph, filter_node)
            job.set_speed(0)
            reach(job, State.READY)
            job.complete()
            assert job.join(20)
            assert job.error is None
            writers.more(10)
        assert content(source) == writers.model
        settled(source, target)


def test_the_target_takes_the_place_of_another_node() -> None:
    source, target = disks()
    graph = source.graph
    upper = FaultNode(name="upper")
    graph.add(upper)
    insert_filter(graph, upper, source.node)
    below = upper.below
    with Image(below, graph) as lower:
        job = MirrorJob(lower, target, MirrorOptions(replaces="upper"))
        job.start()
        reach(job, State.READY)
        source.write(0, b"before")
        job.complete()
        assert job.join(10)
        assert job.error is None
        assert source.node is target.node
        assert lower.node is below
    assert source.read(0, 6) == b"before"


def test_several_disks_take_effect_together() -> None:
    pairs = [disks(seed=seed) for seed in range(3)]
    jobs = [MirrorJob(*pair, id=f"m{index}") for index, pair in enumerate(pairs)]
    start_all(jobs, grouped=True)
    for job in jobs:
        reach(job, State.READY)
        job.complete()
    for job, (source, target) in zip(jobs, pairs, strict=True):
        assert job.join(10)
        assert job.error is None
        assert source.node is target.node


def test_if_one_fails_none_is_replaced() -> None:
    (source, target), (other, bad) = disks(), disks(faults=True)
    nodes = source.node, other.node
    with Writers(source) as writers:
        jobs = [MirrorJob(source, target, id="good"), MirrorJob(other, bad, id="bad")]
        start_all(jobs, grouped=True)
        for job in jobs:
            reach(job, State.READY)
        fault(bad).fail("flush", sticky=True)
        for job in jobs:
            job.complete()
        for job in jobs:
            assert job.join(20)
        assert isinstance(jobs[1].error, IOFailure)
        assert isinstance(jobs[0].error, Cancelled)
        writers.more(10)
    assert (source.node, other.node) == nodes
    assert content(source) == writers.model
    settled(source, target)


def test_finalized_later() -> None:
    source, target = disks()
    with Writers(source) as writers:
        job = MirrorJob(source, target, auto_finalize=False)
        job.start()
        reach(job, State.READY)
        job.complete()
        reach(job, State.PENDING)
        writers.more(30)
        assert source.node is not target.node
        job.finalize()
        assert job.join(10)
        assert source.node is target.node
        writers.more(10)
    assert content(target) == writers.model


def test_others_are_kept_off() -> None:
    source, target = disks()
    node = source.node
    job = MirrorJob(source, target)
    with pytest.raises(Busy):
        MirrorJob(source, target)
    with pytest.raises(Busy):
        MirrorJob(target, source)
    with pytest.raises(Busy, match=r"size cannot change|in use by block job"):
        source.resize(8 * M)
    with pytest.raises(Busy):
        Image(node, source.graph, read_only=False)
    job.cancel()
    with Image(node, source.graph, read_only=False):
        pass


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync": "incremental"}, "sync mode 'incremental' not supported"),
        ({"copy_mode": "slow"}, "unknown copy mode"),
        ({"granularity": 1000}, "power of 2"),
        ({"granularity": 256}, "power of 2"),
        ({"granularity": 128 * M}, "power of 2"),
        ({"buffer_size": -1}, "buffer size"),
    ],
)
def test_options_that_are_none(options: dict[str, object], message: str) -> None:
    source, target = disks()
    with pytest.raises(InvalidArgument, match=message):
        MirrorJob(source, target, MirrorOptions(**options))  # type: ignore[arg-type]
    settled(source, target)


def test_refusals() -> None:
    source, target = disks()
    small = open_image(new_image("qcow2", M), graph=source.graph)
    far = open_image(new_image("qcow2", 4 * M))
    with pytest.raises(InvalidArgument, match="different sizes: 4194304 and 1048576 bytes"):
        MirrorJob(source, small)
    with pytest.raises(InvalidArgument, match="same graph"):
        MirrorJob(source, far)
    with pytest.raises(InvalidArgument, match="into itself"):
        MirrorJob(source, source)
    with pytest.raises(NotFound, match="'nobody'"):
        MirrorJob(source, target, MirrorOptions(replaces="nobody"))
    with pytest.raises(InvalidArgument, match="the source is not below it"):
        MirrorJob(source, target, MirrorOptions(replaces=target.node.name))
    with pytest.raises(InvalidArgument, match="error policy"):
        MirrorJob(source, target, on_target_error="panic")
    memory = MemoryNode(size=4 * M)
    read_only = open_image(memory, "raw", graph=source.graph, read_only=True)
    with pytest.raises(ReadOnly):
        MirrorJob(source, read_only)
    settled(source, target)


def test_quiesce_of_all_nodes_does_not_hang() -> None:
    """Whoever changes the graph waits for requests under way, and these for nobody."""
    source, target = disks(8 * M)
    with Writers(source, unit=64 * K, pause=0) as writers:
        job = MirrorJob(source, target, MirrorOptions(copy_mode="write-blocking"), speed=60 * M)
        job.start()
        for _ in range(60):
            nodes: list[Node] = list(source.graph.nodes.values())
            with quiesce(source.graph, nodes):
                assert chain.skip_filters(source.node).stats is not None
        job.set_speed(0)
        reach(job, State.READY)
        job.cancel()
        assert job.join(20)
        assert job.error is None
        writers.more(5)


def test_internal_snapshots_wait() -> None:
    """Going back to one would change the disk behind the job's back."""
    source, target = disks()
    source.create_snapshot("before")
    job = MirrorJob(source, target)
    for request in (source.apply_snapshot, source.delete_snapshot, source.create_snapshot, target.create_snapshot):
        with pytest.raises(Busy, match="in use by block job: mirror"):
            request("before")
    job.cancel()
    source.apply_snapshot("before")
