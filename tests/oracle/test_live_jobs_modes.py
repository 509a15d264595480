"""Modes of jobs through qemu-storage-daemon and byre: writes meanwhile, bitmaps, granularity, part of a chain."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest

import byre
from byre.graph import chain
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.backup import BackupJob, BackupOptions
from byre.jobs.mirror import MirrorJob, MirrorOptions
from byre.jobs.states import State
from byre.jobs.stream import StreamJob
from conftest import Run
from oracle.test_live_jobs import SIZE, K, daemon, execute, make, opened, same, twice
from support.daemon import Daemon

__all__ = ["daemon"]

pytestmark = pytest.mark.oracle

Writes = list[tuple[int, int, int]]


def writes(seed: int) -> Writes:
    """(offset, length, what to write)."""
    chooser = random.Random(seed)
    return [
        (chooser.randrange(SIZE // (4 * K) - 100) * 4 * K, chooser.choice((4 * K, 64 * K, 200 * K)), value)
        for value in range(1, 8)
    ]


class Export:
    """A client's way into node ``disk`` of the peer; there before the job is, which does not let anyone in later."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        daemon("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        daemon("block-export-add", type="nbd", id="x", node_name="disk", name="disk", writable=True)

    def write(self, rows: Writes) -> None:
        with byre.open("nbd+unix:///disk?socket=nbd.sock", format="raw", read_only=False) as image:
            write_all(image, rows)

    def close(self) -> None:
        self._daemon("block-export-del", id="x")
        self._daemon.wait("BLOCK_EXPORT_DELETED")


def write_all(image: Image, rows: Writes) -> None:
    for offset, length, value in rows:
        image.write(offset, bytes([value]) * length)


def let_go(daemon: Daemon) -> None:
    for name in ("disk", "copy"):
        daemon("blockdev-del", node_name=name)


@pytest.mark.parametrize("seed", range(3))
def test_mirror_of_what_is_written_meanwhile(daemon: Daemon, qemu_img: Run, seed: int) -> None:
    make("disk", fill=30 + seed)
    make("copy")
    twice("disk", "copy")
    daemon.open("disk", "peer-disk")
    daemon.open("copy", "peer-copy")
    export = Export(daemon)
    daemon("blockdev-mirror", job_id="j", device="disk", target="copy", sync="none", auto_dismiss=False)
    daemon.wait("BLOCK_JOB_READY")
    export.write(writes(seed))
    export.close()
    daemon("block-job-cancel", device="j")
    daemon.concluded("j")
    let_go(daemon)
    graph = Graph()
    disk, copy = opened(graph, "disk", "copy")
    with disk, copy:
        job = MirrorJob(disk, copy, MirrorOptions(sync="none"))

        def ready() -> None:
            write_all(disk, writes(seed))
            job.cancel()

        execute(job, ready)
    for name in ("disk", "copy"):
        same(qemu_img, name)


@pytest.mark.parametrize("seed", range(3))
def test_backup_of_what_writes_replace(daemon: Daemon, qemu_img: Run, seed: int) -> None:
    make("base", fill=40 + seed)
    make("disk", below="base", fill=50 + seed)
    make("copy")
    twice("disk", "copy")
    daemon.open("disk", "peer-disk")
    daemon.open("copy", "peer-copy")
    export = Export(daemon)
    daemon("blockdev-backup", job_id="j", device="disk", target="copy", sync="none", auto_dismiss=False)
    export.write(writes(seed))
    export.close()
    daemon("block-job-cancel", device="j")
    daemon.wait("BLOCK_JOB_CANCELLED")
    daemon("job-dismiss", id="j")
    let_go(daemon)
    graph = Graph()
    disk, copy = opened(graph, "disk", "copy")
    with disk, copy:
        job = BackupJob(disk, copy, BackupOptions("none"), auto_dismiss=False)
        job.start()
        write_all(disk, writes(seed))
        job.cancel()
        job.join()
        assert job.state is State.CONCLUDED
    for name in ("disk", "copy"):
        same(qemu_img, name)


def dirty(name: str) -> list[tuple[int, int]]:
    """Ranges of the bitmap of an image."""
    with byre.open(name) as image:
        bitmap = image.node.bitmap_store().find("b")  # type: ignore[attr-defined]
        found: list[tuple[int, int]] = []
        for offsets, lengths in bitmap.runs():
            found += zip(offsets.tolist(), lengths.tolist(), strict=True)
        return found


@pytest.mark.parametrize(("sync", "mode"), [("bitmap", "on-success"), ("bitmap", "never"), ("bitmap", "always"),
                                            ("full", "on-success"), ("full", "always")])  # fmt: skip
def test_what_becomes_of_a_bitmap(daemon: Daemon, qemu_img: Run, sync: str, mode: str) -> None:
    """Content and allocation of the copy, and what is dirty afterwards, with writes while the job runs."""
    make("disk", fill=60)
    with byre.open("disk", read_only=False) as disk:
        disk.node.bitmap_store().add("b", 64 * K)  # type: ignore[attr-defined]
    with byre.open("disk", read_only=False) as disk:
        write_all(disk, writes(9))
    make("copy")
    twice("disk", "copy")
    daemon.open("disk", "peer-disk")
    daemon.open("copy", "peer-copy")
    export = Export(daemon)
    daemon("blockdev-backup", job_id="j", device="disk", target="copy", sync=sync, bitmap="b", bitmap_mode=mode,
           auto_finalize=False, auto_dismiss=False)  # fmt: skip
    daemon.wait("JOB_STATUS_CHANGE", lambda data: data["status"] == "pending")
    export.write(writes(10))
    export.close()
    daemon("job-finalize", id="j")
    daemon.concluded("j")
    let_go(daemon)
    graph = Graph()
    disk, copy = opened(graph, "disk", "copy")
    with disk, copy:
        job = BackupJob(disk, copy, BackupOptions(sync, "b", mode), auto_finalize=False, auto_dismiss=False)

        def change(_job: object, state: State) -> None:
            if state is State.PENDING:
                write_all(disk, writes(10))
                job.finalize()

        job.on_change = change
        job.execute()
    for name in ("disk", "copy"):
        same(qemu_img, name)
    assert dirty("disk") == dirty("peer-disk") != []


@pytest.mark.parametrize("granularity", [4 * K, 64 * K])
def test_mirror_granularity(daemon: Daemon, qemu_img: Run, granularity: int) -> None:
    make("disk", fill=70)
    make("copy", fill=71)
    twice("disk", "copy")
    daemon.open("disk", "peer-disk")
    daemon.open("copy", "peer-copy")
    daemon("blockdev-mirror", job_id="j", device="disk", target="copy", sync="full", granularity=granularity,
           auto_dismiss=False)  # fmt: skip
    daemon.wait("BLOCK_JOB_READY")
    daemon("block-job-cancel", device="j")
    daemon.concluded("j")
    let_go(daemon)
    graph = Graph()
    disk, copy = opened(graph, "disk", "copy")
    with disk, copy:
        job = MirrorJob(disk, copy, MirrorOptions(granularity=granularity))
        execute(job, job.cancel)
    same(qemu_img, "copy")


@pytest.mark.parametrize("seed", range(4))
def test_stream_down_to_a_bottom(daemon: Daemon, qemu_img: Run, seed: int) -> None:
    layers = ("base", "mid", "disk")
    for prefix in ("", "peer-"):
        for number, name in enumerate(layers):
            make(prefix + name, below=prefix + layers[number - 1] if number else "", fill=80 + 10 * seed + number)
    with ExitStack() as stack:
        daemon.open("disk", "peer-disk")
        stack.callback(daemon, "blockdev-del", node_name="disk")
        bottom = ("peer-mid", "peer-base")[seed % 2]
        (node,) = (each["node-name"] for each in daemon("query-named-block-nodes")
                   if each["file"] == bottom and each["drv"] == "qcow2")  # fmt: skip
        daemon("block-stream", job_id="j", device="disk", bottom=node, auto_dismiss=False)
        daemon.concluded("j")
    with opened(Graph(), "disk")[0] as disk:
        StreamJob(disk.graph, disk.node, bottom=chain.layers(disk.node)[1 + seed % 2]).execute()
        assert len(chain.layers(disk.node)) == 2 - seed % 2
    same(qemu_img, "disk")
