"""The same scenario through qemu-storage-daemon and through byre: equal content, equal allocation."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.graph import chain
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.active_commit import ActiveCommitJob
from byre.jobs.backup import BackupJob, BackupOptions
from byre.jobs.job import Job
from byre.jobs.mirror import MirrorJob, MirrorOptions
from byre.jobs.states import State
from conftest import Run, peer_program
from support.daemon import Daemon

pytestmark = pytest.mark.oracle

K, M = 1 << 10, 1 << 20
SIZE = 16 * M


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.chdir(tmp_path)
    with Daemon(peer_program("qemu-storage-daemon"), tmp_path) as running:
        yield running


def make(
    name: str, format: str = "qcow2", *, below: str = "", fill: int = 0, size: int = SIZE, **options: object
) -> None:
    if below:
        options |= {"backing_file": below, "backing_fmt": "qcow2"}
    byre.create(name, format, size, options=options)
    chooser = random.Random(fill)
    with byre.open(name, format=format, read_only=False) as image:
        for _ in range(15 if fill else 0):
            offset = chooser.randrange(size // 512) * 512
            length = min(chooser.choice((512, 4 * K, 64 * K, 300 * K)), size - offset)
            if chooser.random() < 0.75:
                image.write(offset, chooser.randbytes(length))
            else:
                image.write_zeroes(offset, length)
    # No holes in the file: byre would look for zeroes there at a finer grain than the peer.
    if fill:
        Path(name).write_bytes(Path(name).read_bytes())


def twice(*names: str) -> None:
    """Files for byre, and the same for the peer: ``peer-NAME``."""
    for name in names:
        shutil.copy(name, f"peer-{name}")


def data(qemu_img: Run, name: str, format: str = "qcow2") -> list[tuple[int, int, int]]:
    """(offset, length, depth) of what holds data, neighbours joined."""
    found: list[tuple[int, int, int]] = []
    rows: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", "-f", format, name).stdout)
    for row in rows:
        if not row["data"]:
            continue
        if found and found[-1][0] + found[-1][1] == row["start"] and found[-1][2] == row["depth"]:
            found[-1] = found[-1][0], found[-1][1] + row["length"], row["depth"]
        else:
            found.append((row["start"], row["length"], row["depth"]))
    return found


def same(qemu_img: Run, name: str, format: str = "qcow2") -> None:
    """Content, allocation and health."""
    qemu_img("compare", "-f", format, "-F", format, name, f"peer-{name}")
    assert data(qemu_img, name, format) == data(qemu_img, f"peer-{name}", format)
    if format == "qcow2":
        counts = [json.loads(qemu_img("check", "-f", format, "--output=json", each).stdout)["allocated-clusters"]
                  for each in (name, f"peer-{name}")]  # fmt: skip
        assert counts[0] == counts[1]


def execute(job: Job, when_ready: Callable[[], None] | None = None) -> None:
    if when_ready is not None:
        job.on_change = lambda job, state: when_ready() if state is State.READY else None
    job.execute()


def opened(graph: Graph, *names: str, format: str = "qcow2") -> list[Image]:
    return [byre.open(name, format=format, read_only=False, graph=graph) for name in names]


@pytest.mark.parametrize("target_format", ["qcow2", "raw"])
@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_mirror_full(daemon: Daemon, qemu_img: Run, target_format: str, mode: str) -> None:
    make("base", fill=1)
    make("disk", below="base", fill=2)
    make("copy", target_format)
    twice("disk", "copy")
    daemon.open("disk", "peer-disk")
    daemon.open("copy", "peer-copy", target_format)
    daemon("blockdev-mirror", job_id="j", device="disk", target="copy", sync="full", copy_mode=mode, auto_dismiss=False)
    daemon.wait("BLOCK_JOB_READY")
    daemon("job-complete", id="j")
    daemon.concluded("j")
    graph = Graph()
    with opened(graph, "disk")[0] as disk, opened(graph, "copy", format=target_format)[0] as copy:
        job = MirrorJob(disk, copy, MirrorOptions(copy_mode=mode))
        execute(job, job.complete)
        assert disk.node is copy.node
    for name in ("disk", "copy"):
        daemon("blockdev-del", node_name=name)
    same(qemu_img, "copy", target_format)


@pytest.mark.parametrize("seed", range(3))
def test_mirror_top(daemon: Daemon, qemu_img: Run, seed: int) -> None:
    make("base", fill=10 + seed)
    make("disk", below="base", fill=20 + seed)
    make("copy", below="base")
    twice("disk", "copy")
    daemon.open("disk", "peer-disk")
    daemon.open("copy", "peer-copy")
    daemon("blockdev-mirror", job_id="j", device="disk", target="copy", sync="top", auto_dismiss=False)
    daemon.wait("BLOCK_JOB_READY")
    daemon("block-job-cancel", device="j")
    daemon.concluded("j")
    graph = Graph()
    disk, copy = opened(graph, "disk", "copy")
    with disk, copy:
        job = MirrorJob(disk, copy, MirrorOptions(sync="top"))
        execute(job, job.cancel)
    for name in ("disk", "copy"):
        daemon("blockdev-del", node_name=name)
    same(qemu_img, "copy")


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("finish", ["complete", "cancel"])
def test_active_commit(daemon: Daemon, qemu_img: Run, level: int, finish: str) -> None:
    for prefix in ("", "peer-"):
        make(f"{prefix}base", fill=1, size=SIZE - 3 * M)
        make(f"{prefix}mid", below=f"{prefix}base", fill=2)
        make(f"{prefix}top", below=f"{prefix}mid", fill=3)
    daemon.open("top", "peer-top")
    base = ("peer-top", "peer-mid", "peer-base")[level]
    (node,) = (each["node-name"] for each in daemon("query-named-block-nodes")
               if each["file"] == base and each["drv"] == "qcow2")  # fmt: skip
    daemon("block-commit", job_id="j", device="top", base_node=node, auto_dismiss=False)
    daemon.wait("BLOCK_JOB_READY")
    daemon("job-complete", id="j") if finish == "complete" else daemon("block-job-cancel", device="j")
    daemon.concluded("j")
    with opened(Graph(), "top")[0] as top:
        job = ActiveCommitJob(top, chain.layers(top.node)[level])
        execute(job, getattr(job, finish))
    daemon("blockdev-del", node_name="top")
    for name in ("base", "mid", "top"):
        same(qemu_img, name)


@pytest.mark.parametrize("sync", ["full", "top"])
@pytest.mark.parametrize("compress", [False, True])
def test_backup(daemon: Daemon, qemu_img: Run, sync: str, compress: bool) -> None:
    make("base", fill=4)
    make("disk", below="base", fill=5)
    make("copy", below="base" if sync == "top" else "")
    twice("disk", "copy")
    daemon.open("disk", "peer-disk")
    daemon.open("copy", "peer-copy")
    daemon("blockdev-backup", job_id="j", device="disk", target="copy", sync=sync, compress=compress,
           auto_dismiss=False)  # fmt: skip
    daemon.concluded("j")
    graph = Graph()
    disk, copy = opened(graph, "disk", "copy")
    with disk, copy:
        execute(BackupJob(disk, copy, BackupOptions(sync, compress=compress)))
    for name in ("disk", "copy"):
        daemon("blockdev-del", node_name=name)
    same(qemu_img, "copy")


@pytest.mark.parametrize("granularity", [4 * K, 64 * K, M])
def test_incremental_backups(daemon: Daemon, qemu_img: Run, granularity: int) -> None:
    """A full backup and two on top of it; the bitmap goes back and forth between the programs."""
    make("disk", fill=6)
    with byre.open("disk", read_only=False) as disk:
        disk.node.bitmap_store().add("b", granularity)  # type: ignore[attr-defined]
    make("full")
    twice("disk", "full")
    for number, (name, below) in enumerate((("full", ""), ("one", "full"), ("two", "one"))):
        if below:
            make(name, below=below)
            make(f"peer-{name}", below=f"peer-{below}")
            for prefix in ("", "peer-"):
                with byre.open(f"{prefix}disk", read_only=False) as disk:
                    disk.write(number * M + 1000, random.Random(number).randbytes(200 * K))
                    disk.write_zeroes(number * 3 * M, 100 * K)
        sync, mode = ("incremental", "on-success") if below else ("full", "on-success")
        daemon.open("disk", "peer-disk")
        daemon.open("copy", f"peer-{name}")
        daemon("blockdev-backup", job_id="j", device="disk", target="copy", sync=sync, bitmap="b", bitmap_mode=mode,
               auto_dismiss=False)  # fmt: skip
        daemon.concluded("j")
        for node in ("copy", "disk"):
            daemon("blockdev-del", node_name=node)
        graph = Graph()
        disk, copy = opened(graph, "disk", name)
        with disk, copy:
            execute(BackupJob(disk, copy, BackupOptions(sync, "b", mode)))
        same(qemu_img, name)
        qemu_img("compare", "disk", name)
    for name in ("disk", "peer-disk"):
        with byre.open(name) as disk:
            bitmap = disk.node.bitmap_store().find("b")  # type: ignore[attr-defined]
            assert not bitmap.inconsistent
            assert not bitmap.dirty_bits
