"""How fast jobs are, and say they are: rates of a mirror under a steady writer; short pieces where the speed is low."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest

import byre
from byre.bitmaps.bitmap import Bitmap
from byre.graph import chain
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.active_commit import ActiveCommitJob
from byre.jobs.backup import BackupJob
from byre.jobs.blockcopy import CopySettings
from byre.jobs.commit import CommitJob
from byre.jobs.control import Control
from byre.jobs.convert import ConvertJob
from byre.jobs.job import Job
from byre.jobs.live_commit import LiveCommitJob
from byre.jobs.mirror import MirrorJob
from byre.jobs.pace import Pace
from byre.jobs.states import State
from byre.jobs.stream import StreamJob
from support.images import new_image, open_image
from support.writers import until

K, M = 1 << 10, 1 << 20


class Steady:
    """Writes a unit every few milliseconds, each time another one."""

    def __init__(self, image: Image, unit: int) -> None:
        self.written = 0
        self._image, self._unit = image, unit
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        data = bytes([7]) * self._unit
        while not self._ended.wait(0.005):
            self._image.write(self.written % self._image.size, data)
            self.written += self._unit

    def __enter__(self) -> Steady:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_rates_of_a_mirror_whose_source_is_written_to() -> None:
    """What is written is counted between sweeps and during pauses too; what is copied, not while paused."""
    graph = Graph()
    source, target = (open_image(new_image("qcow2", 32 * M), "qcow2", graph=graph) for _ in range(2))
    source.write(0, random.Random(1).randbytes(32 * M))
    job = MirrorJob(source, target)
    job.start()
    until(lambda: job.state is State.READY)
    copying = job.status().rate_out
    with Steady(source, 64 * K) as writer:

        def check(seconds: float) -> None:
            before, began = writer.written, monotonic()
            sleep(seconds)
            written = (writer.written - before) / (monotonic() - began)
            status = job.status()
            assert 0.6 * written < status.rate_in < 1.6 * written
            assert status.rate_out > copying / 20

        check(0.7)
        job.pause()
        until(lambda: job.state is State.STANDBY)
        check(1.1)
        job.resume()
        check(0.5)
        assert job.status().converging
    until(lambda: not job.status().dirty)
    sleep(1.0)
    assert job.status().rate_in < 10 * M
    job.cancel()
    assert job.join(10)
    assert job.error is None


def test_a_sweep_that_takes_long_is_looked_into() -> None:
    dirty, control = Bitmap(8 * M, 64 * K), Control()
    pace = Pace(dirty, control)
    dirty.set(0, 8 * M)
    pace.start()
    pace.begin_sweep()
    dirty.clear(0, M)
    pace.begin(M)
    assert pace.left == 8 * M
    sleep(0.05)
    pace.end(M, copied=True)
    assert pace.left == 7 * M
    came, went = pace.rates()
    assert came == 0
    assert 0 < went <= 20 * M
    dirty.clear(M, M)
    pace.begin(M)
    dirty.set(M, M)
    pace.end(M, copied=False)
    assert pace.left == 7 * M
    pace.end_sweep()
    assert pace.rates()[0] == 0
    assert 0 < pace.rates()[1] <= 20 * M


# -- short pieces ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speed", "most", "unit", "piece"),
    [
        (0, 2 * M, 64 * K, 2 * M),
        (8 * M, 2 * M, 64 * K, 2 * M),
        (7 * M, 2 * M, 64 * K, M),
        (M, 2 * M, 64 * K, 256 * K),
        (1, 2 * M, 64 * K, 64 * K),
        (M, 2 * M, 2 * M, 2 * M),
        (M, 3 * 64 * K, 64 * K, 3 * 64 * K),
        (M // 2, 3 * 64 * K, 64 * K, 2 * 64 * K),
    ],
)
def test_pieces(speed: int, most: int, unit: int, piece: int) -> None:
    assert Control(speed=speed).at_once(most, unit) == piece


def made_chain(folder: Path) -> Image:
    names = [str(folder / name) for name in ("base", "middle", "top")]
    for number, name in enumerate(names):
        below = {"backing_file": names[number - 1], "backing_fmt": "qcow2"} if number else {}
        byre.create(name, "qcow2", 8 * M, options=below)
        with byre.open(name, read_only=False) as image:
            image.write(number * M, random.Random(number).randbytes(4 * M))
    return byre.open(names[-1], read_only=False, graph=Graph())


def mirror(image: Image, speed: int) -> Job:
    return MirrorJob(image, open_image(new_image("qcow2", 8 * M), "qcow2", graph=image.graph), speed=speed)


def backup(image: Image, speed: int) -> Job:
    return BackupJob(image, open_image(new_image("qcow2", 8 * M), "qcow2", graph=image.graph), speed=speed)


def stream(image: Image, speed: int) -> Job:
    return StreamJob(image.graph, image.node, speed=speed)


def active_commit(image: Image, speed: int) -> Job:
    return ActiveCommitJob(image, chain.layers(image.node)[-1], speed=speed)


def live_commit(image: Image, speed: int) -> Job:
    _, middle, base = chain.layers(image.node)
    return LiveCommitJob(image.graph, middle, base, speed=speed)


def commit(image: Image, speed: int) -> Job:
    return CommitJob(image, chain.layers(image.node)[-1], empty=False, speed=speed)


def convert(image: Image, speed: int) -> Job:
    target = open_image(new_image("qcow2", 8 * M), "qcow2", graph=image.graph)
    return ConvertJob([image], target, CopySettings(), speed=speed)


@pytest.mark.parametrize("make", [mirror, backup, stream, active_commit, live_commit, commit, convert])
def test_a_slow_job_moves_in_short_steps(tmp_path: Path, make: Callable[[Image, int], Job]) -> None:
    """512 KiB a second: steps of 128 KiB, and a limit that is lifted holds for what comes next."""
    image = made_chain(tmp_path)
    steps: list[int] = []
    job = make(image, M // 2)
    count = job.control.count

    def watched(done: int, moved: int | None = None) -> None:
        if job.control.speed:
            steps.append(done if moved is None else moved)
        count(done, moved)

    job.control.count = watched  # type: ignore[method-assign]
    job.on_change = lambda _job, state: job.cancel() if state is State.READY else None
    job.start()
    until(lambda: sum(steps) >= 256 * K)
    job.set_speed(0)
    assert job.join(10)
    assert job.error is None
    moved = [step for step in steps if step]
    assert len(moved) >= 2
    assert max(moved) <= 128 * K
