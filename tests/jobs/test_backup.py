"""backup: the target holds the disk as it was when the job was made, whatever is written, paused or fails meanwhile."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import monotonic, sleep

import pytest

import byre
from byre.bitmaps.bitmap import Bitmap
from byre.errors import Busy, ByreError, Cancelled, InvalidArgument, IOFailure, NotFound, NotSupported
from byre.filters.copy_before_write import CopyBeforeWriteNode
from byre.filters.faults import FaultNode
from byre.formats.qcow2.image import Qcow2Node
from byre.graph.graph import Graph
from byre.graph.live import insert_filter, quiesce, remove_filter
from byre.image import Image
from byre.io.extent import COMPRESSED, DATA, UNALLOCATED
from byre.jobs.backup import BackupJob, BackupOptions
from byre.jobs.job import Control
from byre.jobs.states import State
from byre.jobs.transaction import start_all
from support.images import new_image, open_image
from support.writers import Writers, until

K, M = 1 << 10, 1 << 20
SIZE = 4 * M


def disk(graph: Graph, format: str = "qcow2", *, fill: int = 0, size: int = SIZE, faults: bool = False,
         **options: object) -> Image:  # fmt: skip
    """An image in memory, with data, zeroes and holes by the seed ``fill``."""
    filters = [FaultNode()] if faults else []
    image = open_image(new_image(format, size, **options), format, graph=graph, filters=filters)
    chooser = random.Random(fill)
    for _ in range(12 if fill else 0):
        offset = chooser.randrange(size // 512) * 512
        length = min(chooser.choice((512, 4 * K, 64 * K, 300 * K)), size - offset)
        image.write(offset, chooser.randbytes(length))
        image.write_zeroes(size - offset - length, length // 2)
    return image


def pair(format: str = "qcow2", *, faults: bool = False, **options: object) -> tuple[Image, Image]:
    graph = Graph()
    return disk(graph, fill=1, faults=faults, **options), disk(graph, format, faults=faults)


def overlay(below: Image) -> Image:
    """A new image over ``below``, which is only read from now on."""
    if not below.read_only:
        below.reopen(read_only=True)
    made = new_image("qcow2", below.size, backing_file="below", backing_fmt=below.format)
    graph = below.graph
    graph.add(made)
    spec = {"driver": "qcow2", "file": made.name, "backing": below.node.name}
    return byre.open(spec, read_only=False, graph=graph)


def attempt(verb: Callable[..., None], *given: object) -> None:
    """A verb on a job that may have ended."""
    with suppress(Busy):
        verb(*given)


def content(image: Image) -> bytes:
    return image.read(0, image.size)


def fault(image: Image) -> FaultNode:
    node = image.node.children["file"].node
    assert isinstance(node, FaultNode)
    return node


def bitmap_of(image: Image, name: str = "b", granularity: int = 64 * K) -> Bitmap:
    assert isinstance(image.node, Qcow2Node)
    return image.node.bitmap_store().add(name, granularity)


def dirty(bitmap: Bitmap) -> set[int]:
    """Numbers of the parts that are dirty."""
    return {offset // bitmap.granularity for offset in range(0, bitmap.size, bitmap.granularity) if bitmap.get(offset)}


def settled(*images: Image) -> None:
    graph = images[0].graph
    assert not any(isinstance(node, CopyBeforeWriteNode) for node in graph.nodes.values())
    for node in graph.nodes.values():
        assert not node.blockers
        if isinstance(node, Qcow2Node) and node.failure is None:
            assert node.inflight.claim_count == 0
            assert node.check(Control()).corruptions == 0
    assert {image.name for image in graph.images} <= {""}


def run(job: BackupJob) -> None:
    job.start()
    assert job.join(30)
    if job.error is not None:
        raise job.error


# -- the point in time ----------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [4 * K, 64 * K, 256 * K])
@pytest.mark.parametrize(("format", "compress"), [("qcow2", False), ("qcow2", True), ("raw", False)])
def test_full_under_writers(format: str, compress: bool, cluster: int) -> None:
    chooser = random.Random(cluster)
    source, target = pair(format, cluster_size=cluster)
    with Writers(source, seed=cluster) as writers:
        writers.more(20)
        with writers.held():
            before = bytes(writers.model)
            job = BackupJob(source, target, BackupOptions(compress=compress), speed=64 * M)
        writers.more(20)
        job.start()
        for _ in range(3):
            sleep(chooser.random() * 0.01)
            attempt(job.pause)
            writers.more(10)
            attempt(job.resume)
            attempt(job.set_speed, chooser.choice((0, 100 * M)))
        assert job.join(30)
        assert job.error is None
        writers.more(10)
    assert content(target) == before
    assert content(source) == writers.model
    kinds = {extent.kind for extent in target.extents()}
    assert (COMPRESSED in kinds) == compress
    settled(source, target)


@pytest.mark.parametrize("seed", range(8))
def test_a_chain_of_incremental_backups(seed: int) -> None:
    chooser = random.Random(seed)
    graph = Graph()
    source = disk(graph, fill=seed + 1, cluster_size=chooser.choice((4 * K, 64 * K)))
    target = disk(graph)
    bitmap = bitmap_of(source, granularity=chooser.choice((512, 64 * K, M)))
    moments: list[tuple[Image, bytes]] = []
    with Writers(source, unit=chooser.choice((4 * K, 64 * K)), seed=seed, pause=0.001) as writers:
        for number in range(4):
            writers.more(15)
            with writers.held():
                moment = bytes(writers.model)
                options = BackupOptions("incremental" if number else "full", "b", "on-success")
                job = BackupJob(source, target, options, speed=chooser.choice((0, 50 * M)))
            run(job)
            with writers.held():
                # What was written since is dirty, and the rest is not: the next backup needs no more.
                for offset in range(0, SIZE, 512):
                    if moment[offset : offset + 512] != writers.model[offset : offset + 512]:
                        assert bitmap.get(offset), hex(offset)
            moments.append((target, moment))
            target = overlay(target)
    for image, moment in moments:
        assert content(image) == moment
    settled(source)


def test_an_incremental_backup_holds_what_was_dirty() -> None:
    source, target = pair()
    bitmap = bitmap_of(source)
    source.write(M, b"x" * 100 * K)
    source.write_zeroes(2 * M, 64 * K)
    assert dirty(bitmap) == {16, 17, 32}
    run(BackupJob(source, target, BackupOptions("incremental", "b")))
    held = [(extent.offset, extent.length) for extent in target.extents() if extent.kind != UNALLOCATED]
    assert held == [(M, 128 * K), (2 * M, 64 * K)]
    assert target.read(M, 100 * K) == b"x" * 100 * K
    assert not dirty(bitmap)
    source.write(3 * M, b"y")
    assert dirty(bitmap) == {48}


def test_only_the_top_layer() -> None:
    graph = Graph()
    base = disk(graph, fill=3)
    source = overlay(base)
    source.write(M, b"t" * 100 * K)
    source.write_zeroes(2 * M, 64 * K)
    before = content(source)
    target = overlay(base)
    job = BackupJob(source, target, BackupOptions("top"))
    source.write(3 * M + 5, b"later")
    run(job)
    assert content(target) == before
    held = [(extent.offset, extent.length) for extent in target.node.extents(0, SIZE) if extent.kind != UNALLOCATED]
    assert held == [(M, 128 * K), (2 * M, 64 * K), (3 * M, 64 * K)]


def test_only_what_writes_replace() -> None:
    source, target = pair()
    before = content(source)
    job = BackupJob(source, target, BackupOptions("none"))
    job.start()
    source.write(M + 1000, b"new" * 30000)
    source.write_zeroes(2 * M, 64 * K)
    source.discard(3 * M, 64 * K)
    job.cancel()
    assert job.join(10)
    assert isinstance(job.error, Cancelled)
    for start, length in ((M, 128 * K), (2 * M, 64 * K), (3 * M, 64 * K)):
        assert target.read(start, length) == before[start : start + length]
    assert target.extents().bytes_of(DATA) <= 256 * K
    settled(source, target)


def test_several_disks_as_of_one_moment() -> None:
    graph = Graph()
    sources = [disk(graph, fill=seed) for seed in (1, 2, 3)]
    targets = [disk(graph) for _ in sources]
    with quiesce(graph, [source.node for source in sources]):
        jobs = [BackupJob(*both, id=f"b{number}") for number, both in enumerate(zip(sources, targets, strict=True))]
    before = [content(source) for source in sources]
    for source in sources:
        source.write(0, b"later" * 100000)
    start_all(jobs, grouped=True)
    for job, target, wanted in zip(jobs, targets, before, strict=True):
        assert job.join(20)
        assert job.error is None
        assert content(target) == wanted


def test_holes_stay_holes() -> None:
    graph = Graph()
    source, target = disk(graph, size=64 * M), disk(graph, "raw", size=64 * M)
    source.write(5 * M, b"d" * M)
    source.write_zeroes(20 * M, 10 * M)
    run(BackupJob(source, target))
    assert content(target) == content(source)
    assert target.node.allocated_size() == M


def test_what_the_target_held_before_goes() -> None:
    source, target = pair()
    target.write(0, b"old!" * M)
    before = content(source)
    run(BackupJob(source, target))
    assert content(target) == before


def test_the_source_is_given_up() -> None:
    source, target = pair()
    before = content(source)
    run(BackupJob(source, target, BackupOptions(discard_source=True)))
    assert content(target) == before
    assert source.extents().bytes_of(DATA) == 0


# -- bitmaps --------------------------------------------------------------------------------------

MODES = [
    # sync, mode, what is dirty afterwards when it worked, and when it failed half-way
    ("bitmap", "on-success", {2}, {0, 1, 2, 40}),
    ("bitmap", "never", {0, 1, 2, 40}, {0, 1, 2, 40}),
    ("bitmap", "always", {2}, {2, 40}),
    ("incremental", "", {2}, {0, 1, 2, 40}),
    ("full", "on-success", {2}, {0, 1, 2, 40}),
    ("top", "on-success", {2}, {0, 1, 2, 40}),
]


@pytest.mark.parametrize(("sync", "mode", "worked", "failed"), MODES)
@pytest.mark.parametrize("fails", [False, True])
def test_what_becomes_of_the_bitmap(sync: str, mode: str, worked: set[int], failed: set[int], fails: bool) -> None:
    graph = Graph()
    source, target = disk(graph), disk(graph, "raw", faults=True)
    bitmap = bitmap_of(source)
    source.write(0, b"a" * 128 * K)
    source.write(40 * 64 * K, b"a" * 64 * K)
    job = BackupJob(source, target, BackupOptions(sync, "b", mode, max_workers=1, max_chunk=128 * K))
    assert bitmap.busy
    if fails:
        fault(target).fail("write", 2)
    source.write_zeroes(2 * 64 * K, 64 * K)  # zeroes before as well: no write to the target
    job.start()
    assert job.join(10)
    assert (job.error is not None) == fails
    assert dirty(bitmap) == (failed if fails else worked)
    assert not bitmap.busy
    settled(source, target)


def test_always_and_everything_else() -> None:
    """A full backup that failed leaves dirty what it did not copy."""
    graph = Graph()
    source, target = disk(graph), disk(graph, "raw", faults=True)
    bitmap = bitmap_of(source, granularity=256 * K)
    source.write(0, b"a" * SIZE)
    bitmap.clear_all()
    source.write(0, b"b")
    fault(target).fail("write", 3)
    job = BackupJob(source, target, BackupOptions("full", "b", "always", max_workers=1, max_chunk=M))
    job.start()
    assert job.join(10)
    assert isinstance(job.error, IOFailure)
    assert dirty(bitmap) == set(range(8, 16))


@pytest.mark.parametrize("mode", ["on-success", "always"])
def test_the_bitmap_stays_until_the_target_is_durable(mode: str) -> None:
    graph = Graph()
    source, target = disk(graph), disk(graph, faults=True)
    bitmap = bitmap_of(source)
    source.write(0, b"a" * 100)
    fault(target).fail("flush", sticky=True)
    job = BackupJob(source, target, BackupOptions("bitmap", "b", mode))
    job.start()
    assert job.join(10)
    assert isinstance(job.error, IOFailure)
    assert dirty(bitmap) == {0}


@pytest.mark.parametrize("moment", range(6))
def test_cancelled_at_any_moment(moment: int) -> None:
    source, target = pair()
    bitmap = bitmap_of(source)
    source.write(0, b"a" * 3 * M)
    was = dirty(bitmap)
    with Writers(source, seed=moment) as writers:
        job = BackupJob(source, target, BackupOptions("incremental", "b"), speed=50 * M)
        job.start()
        sleep(moment * 0.004)
        if moment % 2:
            attempt(job.pause)
        attempt(job.cancel)
        assert job.join(10)
        if job.error is None:
            return
        assert isinstance(job.error, Cancelled)
        writers.more(5)
    assert content(source) == writers.model
    assert was <= dirty(bitmap)
    settled(source, target)


def test_a_persistent_bitmap_outlives_the_job() -> None:
    graph = Graph()
    file = new_image("qcow2", SIZE)
    source, target = open_image(file, graph=graph), disk(graph)
    bitmap_of(source)
    source.write(0, b"a" * 100)
    run(BackupJob(source, target, BackupOptions("incremental", "b")))
    source.write(M, b"b")
    source.close()
    with open_image(file, read_only=True) as again:
        assert isinstance(again.node, Qcow2Node)
        assert dirty(again.node.bitmap_store().find("b")) == {16}


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("policy", ["report", "ignore", "stop"])
def test_every_request_fails_once(policy: str, side: str) -> None:
    for nth in range(1, 60):
        graph = Graph()
        source, target = disk(graph, fill=1, size=M, faults=True), disk(graph, "raw", size=M, faults=True)
        bitmap = bitmap_of(source)
        source.write(0, b"w" * M)
        before = content(source)
        broken = fault(source if side == "source" else target)
        options = BackupOptions("incremental", "b", max_chunk=128 * K)
        job = BackupJob(source, target, options, on_source_error=policy, on_target_error=policy)
        broken.fail("read" if side == "source" else "change", nth)
        job.start()
        until(lambda job=job: job.state in (State.PAUSED, State.CONCLUDED, State.NULL) or job.error)
        if job.state is State.PAUSED:
            assert policy == "stop"
            job.resume()
        assert job.join(10)
        hit = broken.pending_failures == 0
        broken.heal()
        if policy == "report" and hit and not graph.warnings:  # closing may fail, for all is durable then
            assert isinstance(job.error, IOFailure)
            assert len(dirty(bitmap)) == 16
        else:
            assert job.error is None
            assert content(target) == before
            assert not dirty(bitmap)
        assert content(source) == before
        settled(source, target)
        if not hit:
            assert nth > 3
            return
    raise AssertionError("never ran through")


@pytest.mark.parametrize("seed", range(6))
def test_errors_while_others_write(seed: int) -> None:
    """A write whose old content cannot be copied is refused; then nothing has changed, and the backup is right."""
    source, target = pair("raw", faults=True)
    with Writers(source, seed=seed, refused=True) as writers:
        with writers.held():
            before = bytes(writers.model)
            job = BackupJob(source, target, speed=40 * M, on_target_error="ignore")
        fault(target).fail("write", seed + 1)
        fault(target).fail("change", 7 + seed)
        job.start()
        writers.more(20)
        attempt(job.set_speed, 0)
        assert job.join(20)
        assert job.error is None
        writers.more(5)
    assert content(target) == before
    assert content(source) == writers.model
    settled(source, target)


def test_break_the_snapshot_instead() -> None:
    source, target = pair("raw", faults=True)
    source.write(0, b"first" * 20000)
    job = BackupJob(source, target, BackupOptions(on_cbw_error="break-snapshot"))
    fault(target).fail("write")
    source.write(0, b"second" * 20000)
    assert source.read(0, 6) == b"second"
    job.start()
    assert job.join(10)
    with pytest.raises(IOFailure, match=r"the snapshot is lost: .*injected"):
        raise job.error  # type: ignore[misc]
    source.write(0, b"third")
    settled(source, target)


def test_a_write_does_not_wait_for_ever() -> None:
    source, target = pair(faults=True)
    source.write(0, b"first")
    job = BackupJob(source, target, BackupOptions(cbw_timeout=0.05))
    fault(target).set_breakpoint("write_aio", "held")
    started = monotonic()
    with pytest.raises(IOFailure, match="took longer than") as caught:
        source.write(0, b"second")
    assert caught.value.errno == errno.ETIMEDOUT
    assert 0.04 < monotonic() - started < 5
    assert source.read(0, 5) == b"first"
    fault(target).resume("held")
    source.write(M, b"elsewhere")
    run(job)
    assert target.read(0, 5) == b"first"
    settled(source, target)


def test_enospc_stops() -> None:
    source, target = pair(faults=True)
    before = content(source)
    fault(target).fail("write", 2, errno=errno.ENOSPC)
    job = BackupJob(source, target, on_target_error="enospc")
    job.start()
    until(lambda: job.state is State.PAUSED)
    assert job.io_status == "nospace"
    source.write(0, b"goes on meanwhile")
    job.resume()
    assert job.join(10)
    assert job.error is None
    assert content(target) == before


# -- the graph, figures, refusals -----------------------------------------------------------------


def test_changes_of_the_graph_meanwhile() -> None:
    source, target = pair()
    graph = source.graph
    with Writers(source) as writers:
        with writers.held():
            before = bytes(writers.model)
            job = BackupJob(source, target, speed=M)  # still at work after all the changes
        top = source.node
        job.start()
        for _ in range(6):
            for node in (top, target.node):
                filter_node = FaultNode()
                graph.add(filter_node)
                insert_filter(graph, filter_node, node)
                writers.more(3)
                remove_filter(graph, filter_node)
        assert job.state is State.RUNNING
        attempt(job.set_speed, 0)
        assert job.join(20)
        assert job.error is None
    assert content(target) == before
    assert content(source) == writers.model
    settled(source, target)


def test_progress() -> None:
    graph = Graph()
    source, target = disk(graph, size=16 * M), disk(graph, size=16 * M)
    source.write(0, random.Random(1).randbytes(8 * M))
    job = BackupJob(source, target, speed=8 * M)
    job.start()
    until(lambda: job.progress().offset > 0)
    found = job.progress()
    assert found.total == 8 * M
    source.write(7 * M, b"x" * M)  # copied by the writer
    assert job.progress().total == 7 * M
    attempt(job.set_speed, 0)
    assert job.join(10)
    assert job.progress().offset == 7 * M


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"sync": "half"}, "unknown sync mode 'half'"),
    ({"sync": "incremental"}, "needs a bitmap"),
    ({"sync": "bitmap", "bitmap": "b"}, "mode must be given"),
    ({"sync": "incremental", "bitmap": "b", "bitmap_mode": "always"}, "must be 'on-success'"),
    ({"sync": "none", "bitmap": "b", "bitmap_mode": "always"}, "does not go with a bitmap"),
    ({"sync": "full", "bitmap": "b", "bitmap_mode": "never"}, "has no effect"),
    ({"bitmap_mode": "always"}, "without a bitmap"),
    ({"sync": "bitmap", "bitmap": "b", "bitmap_mode": "sometimes"}, "unknown bitmap mode"),
    ({"max_workers": 65}, "max-workers is 65"),
    ({"max_chunk": 4096}, "max-chunk is 4096 bytes, less than"),
    ({"min_cluster_size": 3}, "power of two"),
    ({"on_cbw_error": "panic"}, "unknown on-cbw-error"),
    ({"cbw_timeout": -1}, "must not be negative"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_are_none(options: dict[str, object], message: str) -> None:
    source, target = pair()
    bitmap = bitmap_of(source)
    with pytest.raises(InvalidArgument, match=message):
        BackupJob(source, target, BackupOptions(**options))  # type: ignore[arg-type]
    assert not bitmap.busy
    settled(source, target)


def test_refusals() -> None:
    source, target = pair()
    small = disk(source.graph, size=M)
    raw = disk(source.graph, "raw")
    bitmap = bitmap_of(source)
    with pytest.raises(InvalidArgument, match="different sizes"):
        BackupJob(source, small)
    with pytest.raises(InvalidArgument, match="cannot be the same"):
        BackupJob(source, source)
    with pytest.raises(InvalidArgument, match="same graph"):
        BackupJob(source, disk(Graph()))
    with pytest.raises(NotFound):
        BackupJob(source, target, BackupOptions("incremental", "nobody"))
    with pytest.raises(NotSupported, match="compression"):
        BackupJob(source, raw, BackupOptions(compress=True))
    bitmap.occupy()
    with pytest.raises(Busy):
        BackupJob(source, target, BackupOptions("incremental", "b"))
    bitmap.vacate()
    job = BackupJob(source, target, BackupOptions("incremental", "b"))
    with pytest.raises(ByreError):
        BackupJob(source, raw)
    with pytest.raises(Busy):
        source.resize(2 * SIZE)
    job.cancel()
    assert not bitmap.busy
    settled(source, target)


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest) -> Iterator[None]:
    started = monotonic()
    yield
    assert monotonic() - started < 30, request.node.name


def test_internal_snapshots_wait() -> None:
    """Going back to one would change the disk behind the job's back."""
    source, target = pair()
    source.create_snapshot("before")
    job = BackupJob(source, target)
    for request in (source.apply_snapshot, source.delete_snapshot, source.create_snapshot, target.create_snapshot):
        with pytest.raises((Busy, NotSupported)):
            request("before")
    job.cancel()
    source.apply_snapshot("before")
