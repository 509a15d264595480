"""Live chains and power cuts: stream, commit of layers between, and snapshots, with a guest that writes meanwhile.

At every moment the disk, over the chain that its header names, holds in each sector what the guest wrote last and
flushed, or something written since; never anything else. When the job says that it is done, the layers between can go.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

import byre
from byre.filters.replay import CrashState, WriteLog, crash_states
from byre.filters.writelog import LogNode
from byre.graph import chain
from byre.graph.external import append
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.job import Job
from byre.jobs.live_commit import LiveCommitJob
from byre.jobs.stream import StreamJob
from byre.protocols.memory import MemoryNode
from crash.test_chains import DONE, Disk, after, filled, opened, sound, usable  # type: ignore[import-not-found]
from support.images import detached, new_image, stack

SECTOR = 512
FLUSHED = "flushed"


class Guest:
    """Writes during a job, and knows what each sector may hold after a crash.

    :ivar history: (clock before the write, offset, bytes), in order
    """

    def __init__(self, image: Image, log: WriteLog, seed: int) -> None:
        self.image, self._log = image, log
        self.before = image.read(0, image.size)
        self._chooser = random.Random(seed)
        self.history: list[tuple[int, int, bytes]] = []
        self._cluster = image.node.cluster_size  # type: ignore[attr-defined]

    def act(self) -> None:
        chooser, image = self._chooser, self.image
        offset = chooser.randrange(image.size // SECTOR) * SECTOR
        length = min(chooser.choice((SECTOR, self._cluster)), image.size - offset)
        begun = self._log.clock
        if chooser.random() < 0.25:
            data = bytes(length)
            image.write_zeroes(offset, length)
        else:
            data = chooser.randbytes(length)
            image.write(offset, data)
        self.history.append((begun, offset, data))
        if chooser.random() < 0.3:
            image.flush()
            self._log.mark((FLUSHED, len(self.history)))

    def check(self, found: bytes, state: CrashState, story: str) -> None:
        durable = max((mark[1] for mark in state.marks if isinstance(mark, tuple)), default=0)
        least = bytearray(self.before)
        for _, offset, data in self.history[:durable]:
            least[offset : offset + len(data)] = data
        wrong = {at for at in range(0, len(least), SECTOR) if found[at : at + SECTOR] != least[at : at + SECTOR]}
        for begun, offset, data in self.history[durable:]:
            if begun >= state.time:
                break
            for at in range(0, len(data), SECTOR):
                if found[offset + at : offset + at + SECTOR] == data[at : at + SECTOR]:
                    wrong.discard(offset + at)
        assert not wrong, f"{story}: sectors {sorted(at // SECTOR for at in wrong)[:8]}"


def run(job: Job, guest: Guest, log: WriteLog) -> None:
    """In one thread, so that the log is the same each time: the guest acts after each step of the job."""
    job.control.on_advance = None
    original = job.control.count

    def count(done: int, moved: int | None = None) -> None:
        guest.act()
        original(done, moved)

    job.control.count = count  # type: ignore[method-assign]
    guest.act()
    job.execute()
    log.mark(DONE)
    guest.act()
    guest.act()


OPTIONS = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "lazy_refcounts": True},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": True},
]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few clusters at once and one thread, so that a small disk takes several steps."""
    monkeypatch.setattr("byre.jobs.stream._CHUNK", 16384)
    monkeypatch.setattr("byre.io.workers.default_threads", lambda: 1)
    monkeypatch.setattr("byre.jobs.above._ZERO_STEP", 16384)
    monkeypatch.setattr("byre.jobs.blockcopy.CHUNK", 16384)


def four(options: dict[str, object], *, shorter: bool) -> list[Disk]:
    cluster = int(str(options["cluster_size"]))
    size = cluster * (96 if cluster == 512 else 12) + 1536
    lowest = filled("lowest", size - cluster, 1, cluster_size=1024)
    low = filled("low", size - 3 * cluster if shorter else size, 2, below=[lowest], cluster_size=512)
    mid = filled("mid", size - 1024, 3, below=[low, lowest], cluster_size=1024)
    top = filled("top", size, 4, below=[mid, low, lowest], **options)
    return [top, mid, low, lowest]


def judge(disks: Sequence[Disk], log: WriteLog, guest: Guest, *, least: int = 40) -> set[tuple[str, ...]]:
    """Each state a crash could leave; the chains that were found."""
    count, chains = 0, set()
    for state in crash_states(log):
        count += 1
        found = {disk.name: disk for disk in after(state, disks)}
        for disk in found.values():
            sound(disk, state.story)
        using = linked(found)
        chains.add(tuple(disk.name for disk in using))
        with opened(using) as image:
            guest.check(image.read(0, image.size), state, state.story)
        if count % 40 == 0:
            usable(using, state.story)
    assert count > least
    return chains


def linked(disks: dict[str, Disk]) -> list[Disk]:
    """From ``top`` down, as the headers say."""
    using = [disks["top"]]
    while name := backing_of(using[-1]):
        using.append(disks[name])
    return using


def backing_of(disk: Disk) -> str:
    if disk.format != "qcow2":
        return ""
    start, length = int.from_bytes(disk.data[8:16], "big"), int.from_bytes(disk.data[16:20], "big")
    return disk.data[start : start + length].decode() if start else ""


def load(disks: Sequence[Disk], job: Callable[[Image], Job], seed: int) -> tuple[WriteLog, Guest]:
    log = WriteLog()
    with opened(disks, read_only=False, log=log) as image:
        guest = Guest(image, log, seed)
        run(job(image), guest, log)
    return log, guest


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("onto", ["", "lowest"])
def test_stream(options: dict[str, object], onto: str) -> None:
    disks = four(options, shorter=False)

    def job(image: Image) -> Job:
        base = chain.layers(image.node)[3] if onto else None
        return StreamJob(image.graph, image.node, base, backing_file=onto or None)

    log, guest = load(disks, job, 7)
    assert {entry.disk for entry in log.entries if entry.kind == "write"} == {"top"}
    short = ("top", "lowest") if onto else ("top",)
    assert judge(disks, log, guest) == {("top", "mid", "low", "lowest"), short}


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_stream_of_a_layer_between(options: dict[str, object]) -> None:
    disks = four(options, shorter=False)
    log, guest = load(disks, lambda image: StreamJob(image.graph, chain.layers(image.node)[1]), 8)
    assert judge(disks, log, guest) == {("top", "mid", "low", "lowest"), ("top", "mid")}


@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize("shorter", [False, True])
def test_commit(options: dict[str, object], shorter: bool) -> None:
    disks = four(options, shorter=shorter)

    def job(image: Image) -> Job:
        _, mid, low, _ = chain.layers(image.node)
        return LiveCommitJob(image.graph, mid, low, backing_file="low")

    log, guest = load(disks, job, 9)
    assert judge(disks, log, guest) == {("top", "mid", "low", "lowest"), ("top", "low", "lowest")}


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_snapshot(options: dict[str, object]) -> None:
    """What was flushed before the overlay came is in the old layer; what is flushed after is found through it."""
    cluster = int(str(options["cluster_size"]))
    size = cluster * 12 + 1536
    old = filled("old", size, 1, **options)
    empty = detached(new_image("qcow2", size, backing_file="old", backing_fmt="qcow2", **options)).to_bytes()
    top = Disk("top", empty, "old")
    log, graph = WriteLog(), Graph()
    with opened([old], read_only=False, log=log, graph=graph) as image:
        guest = Guest(image, log, 11)
        for _ in range(12):
            guest.act()
        node = stack(graph, MemoryNode(top.data), [LogNode(log, disk="top")])
        spec = {"driver": "qcow2", "file": node.name, "backing": None}
        with byre.open(spec, graph=graph, read_only=False) as over:
            overlay = over.node
            edge = graph.attach_image(overlay, "the test", 0, 15)
        graph._unlink(edge)
        append(graph, [(image, overlay)])
        log.mark((FLUSHED, len(guest.history)))
        log.mark(DONE)
        for _ in range(12):
            guest.act()
    chains = judge([top, old], log, guest)
    assert chains == {("top", "old")}
    # Before anything was written to the overlay, the old layer alone is the disk.
    for state in crash_states(log):
        if DONE not in state.marks:
            found = after(state, [old])
            with opened(found) as image:
                guest.check(image.read(0, size), state, state.story)
