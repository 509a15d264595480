"""Journals of jobs on disks in use: the process is killed while others write, and the job goes on from there."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import byre
from byre.filters.base import FilterNode
from byre.graph import chain
from byre.graph.graph import Graph
from byre.graph.live import insert_filter, quiesce, remove_filter
from byre.jobs import journal as journals
from byre.jobs.active_commit import ActiveCommitJob, active_commit_journal
from byre.jobs.backup import BackupJob, BackupOptions, backup_journal
from byre.jobs.journal import Journal
from byre.jobs.live_commit import LiveCommitJob, live_commit_journal
from byre.jobs.mirror import MirrorJob, MirrorOptions, mirror_journal
from support.writers import until

MIB = 1 << 20
SIZE = 32 * MIB

# Two threads write at random while the job runs slowly; the parent kills all of it.
CHILD = """
import random, sys, threading, time
import byre
from byre.graph import chain
from byre.graph.graph import Graph
from byre.jobs.active_commit import ActiveCommitJob, active_commit_journal
from byre.jobs.backup import BackupJob, BackupOptions, backup_journal
from byre.jobs.live_commit import LiveCommitJob, live_commit_journal
from byre.jobs.mirror import MirrorJob, MirrorOptions, mirror_journal
kind, seed = sys.argv[1], int(sys.argv[2])
graph = Graph()
source = byre.open("source.qcow2", read_only=False, graph=graph)
target = byre.open("target.qcow2", read_only=False, graph=graph)
if kind == "commit":
    _, middle, base = chain.layers(source.node)
    journal = live_commit_journal("journal", middle, base, resume=True)
    job = LiveCommitJob(graph, middle, base, journal=journal, speed=8 << 20)
elif kind == "active commit":
    base = chain.layers(source.node)[2]
    journal = active_commit_journal("journal", source, base, resume=True, vouched=True)
    job = ActiveCommitJob(source, base, journal=journal, speed=8 << 20)
else:
    options = MirrorOptions() if kind == "mirror" else BackupOptions()
    make = mirror_journal if kind == "mirror" else backup_journal
    journal = make("journal", source, target, options, resume=True, vouched=True)
    job = (MirrorJob if kind == "mirror" else BackupJob)(source, target, options, journal=journal, speed=8 << 20)

def write(seed):
    chooser = random.Random(seed)
    while True:
        at = chooser.randrange(source.size - 70000)
        source.write(at, chooser.randbytes(chooser.randrange(1, 70000)))
        time.sleep(0.005)

for number in range(2):
    threading.Thread(target=write, args=(seed + number,), daemon=True).start()
job.start()
job.join()
"""


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_disks() -> bytes:
    from byre.cli.main import main

    content = random.Random(3).randbytes(SIZE)
    for name in ("source", "target"):
        assert main(["create", "-q", "-f", "qcow2", f"{name}.qcow2", str(SIZE)]) == 0
    with byre.open("source.qcow2", read_only=False) as image:
        image.write(0, content)
    return content


def done_bytes() -> int:
    try:
        journal = Journal.open("journal")
    except byre.errors.ByreError:
        return 0
    try:
        return sum(length for _, length in journal.done())
    finally:
        journal.close()


def run_and_kill(kind: str, seed: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", CHILD, kind, str(seed)])
    before, deadline = done_bytes(), time.monotonic() + 60
    while done_bytes() <= before and time.monotonic() < deadline:
        assert process.poll() is None, "it ended"
        time.sleep(0.02)
    time.sleep(random.Random(seed).random() * 0.3)
    process.kill()
    assert process.wait() == -9


def read(name: str) -> bytes:
    with byre.open(name) as image:
        return image.read(0, image.size)


def test_a_mirror_ends_with_the_bytes_of_its_source() -> None:
    make_disks()
    for seed in (10, 20):
        run_and_kill("mirror", seed)
    graph = Graph()
    with (
        byre.open("source.qcow2", read_only=False, graph=graph) as source,
        byre.open("target.qcow2", read_only=False, graph=graph) as target,
    ):
        journal = mirror_journal("journal", source, target, MirrorOptions(), resume=True, vouched=True)
        job = MirrorJob(source, target, journal=journal)
        job.on_change = lambda one, state: one.cancel() if state.name == "READY" else None
        job.execute()
        assert target.read(0, SIZE) == source.read(0, SIZE)
    assert read("target.qcow2") == read("source.qcow2")
    assert not Path("journal").exists()


def test_a_backup_ends_with_the_bytes_of_the_moment_it_began() -> None:
    content = make_disks()
    for seed in (30, 40):
        run_and_kill("backup", seed)
    graph = Graph()
    with (
        byre.open("source.qcow2", read_only=False, graph=graph) as source,
        byre.open("target.qcow2", read_only=False, graph=graph) as target,
    ):
        journal = backup_journal("journal", source, target, BackupOptions(), resume=True, vouched=True)
        BackupJob(source, target, journal=journal).execute()
    assert read("target.qcow2") == content
    assert read("source.qcow2") != content


def make_chain() -> None:
    """base <- middle <- source, and an image beside them."""
    from byre.cli.main import main

    make_disks()
    Path("source.qcow2").rename("middle.qcow2")
    assert main(["create", "-q", "-f", "qcow2", "base.qcow2", str(SIZE)]) == 0
    assert main(["rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", "middle.qcow2"]) == 0
    assert main(["create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "source.qcow2"]) == 0


def test_a_commit_of_a_layer_below_goes_on() -> None:
    make_chain()
    middle = read("middle.qcow2")
    for seed in (50, 60):
        run_and_kill("commit", seed)
    held, left = read("source.qcow2"), SIZE - done_bytes()
    graph = Graph()
    with byre.open("source.qcow2", read_only=False, graph=graph) as source:
        top, layer, base = chain.layers(source.node)
        journal = live_commit_journal("journal", layer, base, resume=True)
        before = base.stats.byte_count[1]
        LiveCommitJob(graph, layer, base, journal=journal).execute()
        assert base.stats.byte_count[1] - before <= left < SIZE
        assert chain.layers(source.node) == [top, base]
    assert read("source.qcow2") == held
    assert read("base.qcow2") == middle
    assert not Path("journal").exists()


def test_a_commit_of_the_active_layer_goes_on() -> None:
    make_chain()
    for seed in (70, 80):
        run_and_kill("active commit", seed)
    held, left = read("source.qcow2"), SIZE - done_bytes()
    graph = Graph()
    with byre.open("source.qcow2", read_only=False, graph=graph) as source:
        base = chain.layers(source.node)[2]
        journal = active_commit_journal("journal", source, base, resume=True, vouched=True)
        job = ActiveCommitJob(source, base, journal=journal)
        job.on_change = lambda one, state: one.complete() if state.name == "READY" else None
        job.execute()
        assert job.progress().offset <= left  # the writers may have undone all of it
        assert source.filename == "base.qcow2"
    assert read("base.qcow2") == held, "other bytes"
    assert not Path("journal").exists()


class SlowFlush(FilterNode):
    """The first flush takes its time, and is right only if the graph stays as it is meanwhile."""

    driver = "slow-flush"

    def __init__(self) -> None:
        super().__init__(name="slow")
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.removed_meanwhile = False

    def flush(self) -> None:
        if threading.current_thread().name == "journal" and not self.begun.is_set():
            self.begun.set()
            self.go_on.wait(10)
            self.removed_meanwhile = "file" not in self.children
        if "file" in self.children:
            self.below.flush()


@pytest.mark.parametrize("kind", ["mirror", "backup"])
def test_the_graph_does_not_change_below_a_journal_that_flushes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter below the target is removed at that moment: the target would be taken out of service."""
    monkeypatch.setattr(journals, "_INTERVAL", 0.02)
    make_disks()
    graph = Graph()
    source = byre.open("source.qcow2", read_only=False, graph=graph)
    target = byre.open("target.qcow2", read_only=False, graph=graph)
    slow = SlowFlush()
    graph.add(slow)
    insert_filter(graph, slow, target.node.children["file"].node)
    options = MirrorOptions() if kind == "mirror" else BackupOptions()
    journal = (mirror_journal if kind == "mirror" else backup_journal)("j", source, target, options, resume=False)  # type: ignore[operator]
    job = (MirrorJob if kind == "mirror" else BackupJob)(source, target, options, journal=journal, speed=8 * MIB)  # type: ignore[operator]
    job.start()
    assert slow.begun.wait(10)

    def remove() -> None:
        with quiesce(graph, [slow]):
            remove_filter(graph, slow)

    remover = threading.Thread(target=remove)
    remover.start()
    time.sleep(0.05)
    slow.go_on.set()
    remover.join(10)
    assert not remover.is_alive()
    assert not slow.removed_meanwhile
    job.set_speed(0)
    until(lambda: job.state.name in ("READY", "CONCLUDED", "NULL"))
    if kind == "mirror":
        job.complete()
    assert job.join(10)
    assert job.error is None
