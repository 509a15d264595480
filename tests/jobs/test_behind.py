"""Writing much: files are as they were afterwards, and who writes does not wait for the system."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import byre
from byre.graph import chain
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.active_commit import ActiveCommitJob
from byre.jobs.backup import BackupJob
from byre.jobs.behind import WriteBehind
from byre.jobs.job import Job
from byre.jobs.live_commit import LiveCommitJob
from byre.jobs.mirror import MirrorJob
from byre.jobs.states import State
from byre.jobs.stream import StreamJob
from byre.protocols.file import FileNode

M = 1 << 20
SIZE = 4 * M


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def disk(graph: Graph) -> Image:
    """a <- b <- c, the middle one full, and an empty image beside them."""
    for name, below in (("a", ""), ("b", "a"), ("c", "b"), ("target", "")):
        byre.create(name, "qcow2", SIZE, options={"backing_file": below, "backing_fmt": "qcow2"} if below else {})
        if name == "b":
            with byre.open(name, format="qcow2", read_only=False) as image:
                image.write(0, bytes(range(1, 251)) * (SIZE // 250))
    return byre.open("c", format="qcow2", read_only=False, graph=graph)


JOBS: dict[str, Callable[[Image, Image], Job]] = {
    "stream": lambda image, _: StreamJob(image.graph, image.node),
    "commit": lambda image, _: LiveCommitJob(image.graph, *chain.layers(image.node)[1:]),
    "active commit": lambda image, _: ActiveCommitJob(image, chain.layers(image.node)[2]),
    "mirror": MirrorJob,
    "backup": BackupJob,
}


@pytest.mark.parametrize("kind", list(JOBS))
def test_a_job_leaves_no_trace_in_the_files_it_wrote_to(kind: str) -> None:
    graph = Graph()
    with (
        disk(graph) as image,
        byre.open("target", format="qcow2", read_only=False, graph=graph) as target,
        Image(chain.layers(image.node)[2], graph) as base,
    ):
        files = [layer.sources[0].node for layer in (image.node, target.node, base.node)]  # type: ignore[attr-defined]
        before = [file.bulk_size for file in files]
        seen: set[int] = set()
        job = JOBS[kind](image, target)

        def changed(job: Job, state: State) -> None:
            if state is State.READY:
                job.complete()

        def advanced() -> None:
            seen.update(index for index, file in enumerate(files) if file.bulk_size != before[index])

        job.on_change = changed
        count = job.control.count
        job.control.count = lambda *given: (advanced(), count(*given))[1]  # type: ignore[func-returns-value, method-assign]
        job.execute()
        assert len(seen) == 1
        assert [file.bulk_size for file in files] == before


def test_who_writes_does_not_wait_for_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def start_write_back(_self: FileNode) -> None:
        begun.set()
        assert go_on.wait(20)

    monkeypatch.setattr(FileNode, "start_write_back", start_write_back)
    byre.create("disk", "raw", SIZE)
    with byre.open("disk", format="raw", read_only=False) as image, WriteBehind(image.node) as behind:
        behind.wrote(31 * M)
        assert not begun.wait(0.05)
        behind.wrote(M)
        assert begun.wait(20)
        behind.wrote(100 * M)
        go_on.set()


def test_the_file_of_a_disk_in_use_is_written_when_it_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileNode, "start_write_back", lambda _self: pytest.fail("too early"))
    byre.create("disk", "raw", SIZE)
    with byre.open("disk", format="raw", read_only=False) as image, WriteBehind(image.node, early=False) as behind:
        behind.wrote(1 << 30)
