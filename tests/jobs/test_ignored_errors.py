"""Errors that are ignored: while the cause lasts jobs try again, not too often; once it is gone, nothing is missing."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest

import byre
from byre.errors import ByreError, IOFailure, NoSpace, OutOfService
from byre.filters.faults import FaultNode
from byre.graph import chain
from byre.graph.graph import Graph
from byre.graph.live import insert_filter
from byre.image import Image
from byre.jobs.active_commit import ActiveCommitJob
from byre.jobs.backup import BackupJob
from byre.jobs.errors_policy import IGNORE, REPORT, STOP, decide
from byre.jobs.job import Job
from byre.jobs.live_commit import LiveCommitJob
from byre.jobs.mirror import MirrorJob, MirrorOptions
from byre.jobs.states import State
from byre.jobs.stream import StreamJob
from support.images import new_image, open_image
from support.writers import Writers, until

K, M = 1 << 10, 1 << 20
SIZE = 4 * M
WHILE = 0.4


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def content(image: Image) -> str:
    return digest(image.read(0, image.size))


def disks(target_format: str = "raw") -> tuple[Image, Image, FaultNode]:
    """A source with data, an empty target, and what fails below the target."""
    graph, faults = Graph(), FaultNode()
    source = open_image(new_image("qcow2", SIZE), "qcow2", graph=graph)
    target = open_image(new_image(target_format, SIZE), target_format, graph=graph, filters=[faults])
    source.write(0, random.Random(3).randbytes(SIZE))
    return source, target, faults


def made_chain(folder: Path, faulty: int) -> tuple[Image, FaultNode]:
    """base <- middle <- top with data in each; layer ``faulty`` (0 is the top) has a fault filter below."""
    names = [str(folder / name) for name in ("base", "middle", "top")]
    for number, name in enumerate(names):
        below = {"backing_file": names[number - 1], "backing_fmt": "qcow2"} if number else {}
        byre.create(name, "qcow2", SIZE, options=below)
        with byre.open(name, read_only=False) as image:
            image.write(number * M, random.Random(number).randbytes(2 * M - 64 * K))
    image = byre.open(names[-1], read_only=False, graph=Graph())
    faults = FaultNode(name="faults")
    image.graph.add(faults)
    insert_filter(image.graph, faults, chain.layers(image.node)[faulty].children["file"].node)
    return image, faults


def heard(job: Job) -> list[str]:
    """Filled with what is told of errors."""
    events: list[str] = []
    job.on_error_event = lambda _job, _operation, action, _error: events.append(action)
    return events


def failing_for_a_while(job: Job, faults: FaultNode) -> None:
    """Every change fails for :data:`WHILE` seconds; nobody tries more than the few times that fit in."""
    events = heard(job)
    faults.fail("change", sticky=True, errno=errno.ENOSPC)
    job.start()
    until(lambda: events)
    sleep(WHILE)
    assert job.error is None
    assert job.state is State.RUNNING
    assert set(events) == {IGNORE}
    assert len(events) <= SIZE // (64 * K) * (WHILE / 0.2 + 2)
    faults.heal()


@pytest.mark.parametrize("end", ["cancel", "complete"])
@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_mirror(format: str, mode: str, end: str) -> None:
    source, target, faults = disks(format)
    with Writers(source, unit=16 * K) as writers:
        job = MirrorJob(source, target, MirrorOptions(copy_mode=mode), on_target_error="ignore")
        failing_for_a_while(job, faults)
        until(lambda: job.state is State.READY or job.error)
        writers.more(10)
        with writers.held():
            getattr(job, end)()
            assert job.join(8)
            assert job.error is None
            assert content(target) == digest(writers.model)


@pytest.mark.parametrize("end", ["cancel", "complete"])
def test_mirror_that_is_to_end_while_its_target_fails(end: str) -> None:
    """It ends when it can: with nothing missing, and without trying all the time."""
    source, target, faults = disks()
    job = MirrorJob(source, target, on_target_error="ignore")
    job.start()
    until(lambda: job.state is State.READY)
    faults.fail("change", sticky=True, errno=errno.ENOSPC)
    events = heard(job)
    source.write(M, b"late" * 16 * K)
    getattr(job, end)()
    sleep(WHILE)
    assert job.error is None
    assert 1 <= len(events) <= WHILE / 0.2 + 3
    faults.heal()
    assert job.join(8)
    assert job.error is None
    assert content(target) == content(source)


def test_mirror_that_is_to_end_stops_and_goes_on() -> None:
    source, target, faults = disks()
    job = MirrorJob(source, target, on_target_error="stop")
    job.start()
    until(lambda: job.state is State.READY)
    faults.fail("change", sticky=True, errno=errno.ENOSPC)
    source.write(M, b"late" * 16 * K)
    job.complete()
    until(lambda: job.state is State.STANDBY)
    assert job.io_status == "nospace"
    faults.heal()
    job.resume()
    assert job.join(8)
    assert job.error is None
    assert source.node is target.node
    assert source.read(M, 64 * K) == b"late" * 16 * K


def test_backup() -> None:
    source, target, faults = disks()
    want = content(source)
    job = BackupJob(source, target, on_target_error="ignore")
    failing_for_a_while(job, faults)
    assert job.join(8)
    assert job.error is None
    assert content(target) == want


def test_backup_under_writers() -> None:
    """The writers wait for the copy: while that fails their writes do, and the backup is of the moment it began."""
    source, target, faults = disks("qcow2")
    want = content(source)
    job = BackupJob(source, target, on_target_error="ignore")
    with Writers(source, unit=16 * K, refused=True) as writers:
        failing_for_a_while(job, faults)
        assert job.join(8)
        assert job.error is None
    assert content(target) == want
    assert content(source) == digest(writers.model)


def test_active_commit(tmp_path: Path) -> None:
    image, faults = made_chain(tmp_path, 2)
    with Writers(image, unit=16 * K) as writers:
        job = ActiveCommitJob(image, chain.layers(image.node)[-1], on_error="ignore")
        failing_for_a_while(job, faults)
        until(lambda: job.state is State.READY or job.error)
        job.complete()
        assert job.join(8)
        assert job.error is None
        writers.more(10)
    assert len(chain.layers(image.node)) == 1
    assert content(image) == digest(writers.model)


def test_commit_of_layers_between(tmp_path: Path) -> None:
    image, faults = made_chain(tmp_path, 2)
    _, middle, base = chain.layers(image.node)
    with Writers(image, unit=16 * K) as writers:
        job = LiveCommitJob(image.graph, middle, base, on_error="ignore")
        failing_for_a_while(job, faults)
        assert job.join(8)
        assert job.error is None
    assert len(chain.layers(image.node)) == 2
    assert content(image) == digest(writers.model)
    assert job.progress().rate >= 0


def test_stream_fails_in_the_end_and_begins_anew(tmp_path: Path) -> None:
    """As the peer: the error is passed over once and reported once the rest is there; the chain stays as it was."""
    image, faults = made_chain(tmp_path, 0)
    before = content(image)
    faults.fail("change", 2, errno=errno.ENOSPC)
    job = StreamJob(image.graph, image.node, on_error="ignore")
    events = heard(job)
    job.start()
    assert job.join(8)
    assert isinstance(job.error, NoSpace)
    assert set(events) == {IGNORE}
    assert len(chain.layers(image.node)) == 3
    assert content(image) == before
    again = StreamJob(image.graph, image.node)
    again.execute()
    assert len(chain.layers(image.node)) == 1
    assert content(image) == before


Make = Callable[[Image, Image], Job]


@pytest.mark.parametrize(
    "make",
    [
        lambda source, target: MirrorJob(source, target, on_target_error="ignore"),
        lambda source, target: BackupJob(source, target, on_target_error="ignore"),
    ],
)
def test_what_can_never_succeed_is_not_tried_for_ever(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that could not be flushed is never trusted again: no job may go on as if it would."""
    path = str(tmp_path / "target")
    byre.create(path, "raw", SIZE)
    source, _, _ = disks()
    target = byre.open(path, format="raw", read_only=False, graph=source.graph)
    job = make(source, target)

    def refused(_fd: int) -> None:
        raise OSError(errno.EIO, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refused)
        began = monotonic()
        job.start()
        assert job.join(8)
    assert monotonic() - began < 4
    assert isinstance(job.error, OutOfService)
    source.write(0, b"goes on")


@pytest.mark.parametrize(
    ("error", "policy", "action"),
    [
        (OutOfService("x"), "ignore", REPORT),
        (OutOfService("x"), "stop", STOP),
        (IOFailure("x"), "ignore", IGNORE),
        (NoSpace("x"), "auto", STOP),
    ],
)
def test_decisions(error: ByreError, policy: str, action: str) -> None:
    assert decide(error, policy) == action
