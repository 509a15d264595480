"""Jobs onto a disk that is really full: they stop, or fail, and nothing is lost; with space again they go on."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import byre
from byre.errors import NoSpace
from byre.graph import chain
from byre.image import Image
from byre.jobs.active_commit import ActiveCommitJob
from byre.jobs.backup import BackupJob, BackupOptions
from byre.jobs.job import Job
from byre.jobs.live_commit import LiveCommitJob
from byre.jobs.mirror import MirrorJob
from byre.jobs.states import State
from byre.jobs.stream import StreamJob
from support.small_disk import small_disk
from support.walk import walk

K = 1024
MIB = K * K
SIZE = 12 * MIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder with 16 MiB of space."""
    with small_disk(tmp_path / "small", 16) as folder:
        yield folder


def fill_up(folder: Path) -> None:
    """Not a byte is left."""
    with open(folder / "ballast", "ab", 0) as ballast:
        try:
            while ballast.write(bytes(4 * K)) == 4 * K:
                pass
        except OSError:
            pass


def take(folder: Path, left: int) -> None:
    """All but ``left`` bytes."""
    status = os.statvfs(folder)
    with open(folder / "ballast", "wb") as ballast:
        ballast.write(bytes(status.f_bavail * status.f_frsize - left))


def digest(image: Image) -> str:
    return hashlib.sha256(image.read(0, image.size)).hexdigest()


def digest_of(path: Path, format: str = "qcow2") -> str:
    with byre.open(str(path), format=format) as image:
        return digest(image)


def make_chain(below: Path, above: Path, base_size: int = SIZE) -> tuple[Path, str]:
    """base <- middle (both in ``below``) <- top; the path of that and the digest of the disk."""
    rng = random.Random(5)
    byre.create(str(below / "base"), "qcow2", base_size)
    rows = (("base", below, "", 0), ("middle", below, "base", 1), ("top", above, "middle", 4))
    for name, folder, backing, start in rows:
        path = folder / name
        if backing:
            options = {"backing_file": str(below / backing), "backing_fmt": "qcow2", "size": SIZE}
            byre.create(str(path), "qcow2", options=options)
        with byre.open(str(path), read_only=False) as image:
            image.write(start * MIB, rng.randbytes(4 * MIB))
    return above / "top", digest_of(above / "top")


def await_stop(job: Job) -> None:
    deadline = time.monotonic() + 20
    while job.state not in (State.PAUSED, State.STANDBY, State.CONCLUDED):
        assert time.monotonic() < deadline
        time.sleep(0.005)


Made = tuple[Job, Image, Path, str]
"""The job, the image on the full disk, the file that ends with the content of the source, the digest of that."""


def mirror(graph: byre.Graph, small: Path, other: Path, policy: str, format: str = "qcow2") -> Made:
    path, want = make_chain(other, other)
    source = byre.open(str(path), read_only=False, graph=graph)
    byre.create(str(small / "target"), format, SIZE)
    take(small, 5 * MIB)
    target = byre.open(str(small / "target"), format=format, read_only=False, graph=graph)
    job = MirrorJob(source, target, on_target_error=policy, auto_dismiss=False)
    return job, target, small / "target", want


def mirror_raw(graph: byre.Graph, small: Path, other: Path, policy: str) -> Made:
    return mirror(graph, small, other, policy, "raw")


def backup(graph: byre.Graph, small: Path, other: Path, policy: str, compress: bool = False) -> Made:
    path, want = make_chain(other, other)
    source = byre.open(str(path), read_only=False, graph=graph)
    byre.create(str(small / "target"), "qcow2", SIZE)
    take(small, 5 * MIB)
    target = byre.open(str(small / "target"), read_only=False, graph=graph)
    options = BackupOptions(compress=compress)
    job = BackupJob(source, target, options, on_target_error=policy, auto_dismiss=False)
    return job, target, small / "target", want


def backup_compressed(graph: byre.Graph, small: Path, other: Path, policy: str) -> Made:
    return backup(graph, small, other, policy, True)


def stream(graph: byre.Graph, small: Path, other: Path, policy: str) -> Made:
    path, want = make_chain(other, small)
    take(small, 2 * MIB)
    image = byre.open(str(path), read_only=False, graph=graph)
    return StreamJob(graph, image.node, on_error=policy, auto_dismiss=False), image, path, want


def commit(graph: byre.Graph, small: Path, other: Path, policy: str) -> Made:
    path, want = make_chain(small, other, 4 * MIB)
    take(small, MIB // 2)
    image = byre.open(str(path), read_only=False, graph=graph)
    _, middle, base = chain.layers(image.node)
    return LiveCommitJob(graph, middle, base, on_error=policy, auto_dismiss=False), image, path, want


def active_commit(graph: byre.Graph, small: Path, other: Path, policy: str) -> Made:
    path, want = make_chain(small, other, 4 * MIB)
    take(small, 2 * MIB)
    image = byre.open(str(path), read_only=False, graph=graph)
    job = ActiveCommitJob(image, chain.layers(image.node)[-1], on_error=policy, auto_dismiss=False)
    return job, image, small / "base", want


JOBS = (mirror, mirror_raw, backup, backup_compressed, stream, commit, active_commit)
Make = Callable[[byre.Graph, Path, Path, str], Made]


def run(job: Job) -> list[tuple[str, str]]:
    """To where it stops or ends; what was told of errors."""
    events: list[tuple[str, str]] = []
    job.on_error_event = lambda _job, operation, action, _error: events.append((operation, action))
    ready = job.complete if isinstance(job, ActiveCommitJob) else job.cancel
    job.on_change = lambda _job, state: ready() if state is State.READY else None
    job.start()
    await_stop(job)
    return events


@pytest.mark.parametrize(("make", "policy"), [*((make, "enospc") for make in JOBS), (backup, "stop"), (backup, "auto")])
def test_it_stops_and_goes_on(small: Path, tmp_path: Path, make: Make, policy: str) -> None:
    graph = byre.Graph()
    job, image, path, want = make(graph, small, tmp_path, policy)
    events = run(job)
    assert (job.state, job.io_status, {action for _, action in events}) == (State.PAUSED, "nospace", {"stop"})
    fill_up(small)
    image.flush()  # the disk is as full as can be: what is changed so far has its place all the same
    (small / "ballast").unlink()
    job.resume()
    assert job.io_status == "ok"
    assert job.join(20)
    assert job.error is None
    for handle in list(graph.images):
        handle.close()
    format = "raw" if make is mirror_raw else "qcow2"
    assert digest_of(path, format) == want
    if format == "qcow2":
        assert walk(path.read_bytes()) == ([], [], [])


@pytest.mark.parametrize("make", JOBS)
def test_it_fails_and_nothing_is_lost(small: Path, tmp_path: Path, make: Make) -> None:
    graph = byre.Graph()
    job, _, _, want = make(graph, small, tmp_path, "report")
    events = run(job)
    assert job.join(20)
    assert isinstance(job.error, NoSpace)
    assert "No space left on device" in str(job.error)
    assert "\n" not in str(job.error)
    assert job.io_status == "ok"
    assert [action for _, action in events] == ["report"]
    for handle in list(graph.images):
        handle.close()
    assert digest_of(tmp_path / "top" if (tmp_path / "top").exists() else small / "top") == want
    for folder in (tmp_path, small):
        for name in ("base", "middle", "top"):
            if (folder / name).exists():
                assert walk((folder / name).read_bytes())[0] == []
