"""One live job in a process of its own, for jobs.py: python live.py byre|peer KIND SOURCE TARGET SIZE

Prints one JSON object: the seconds from the order to the result (READY for mirror: both disks are the same and
the target is durable), the processor seconds that the program took for it, and with --load the latencies of 4 KiB
writes to the source, before the job and while it runs. The peer's writer comes in over NBD on a unix socket, byre's
is a thread of the same process.

stream takes what is below SOURCE into it, commit brings the layer below SOURCE into the one below that; neither has a
TARGET.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter, process_time, sleep

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.daemon import Daemon

BLOCK = 4096
PAUSE = 0.0005
BEFORE = 1.0


class Writer:
    """Writes 4 KiB at random places that hold data already, a little pause between two."""

    def __init__(self, write: Callable[[int, bytes], None], size: int) -> None:
        self._write = write
        self._places = size // BLOCK
        self._stop = threading.Event()
        self.taken: list[float] = []
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        chooser, data = random.Random(7), random.Random(8).randbytes(BLOCK)
        while not self._stop.is_set():
            offset = chooser.randrange(self._places) * BLOCK
            started = perf_counter()
            self._write(offset, data)
            self.taken.append(perf_counter() - started)
            sleep(PAUSE)

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


class Nbd:
    """As much of an NBD client as writing needs."""

    def __init__(self, path: str, export: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self._receive(18)
        name = export.encode()
        self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
        self._receive(10)

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise ConnectionError("the daemon closed the connection")
            data += part
        return data

    def write(self, offset: int, data: bytes) -> None:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, offset, len(data)) + data)
        _, error, _ = struct.unpack(">IIQ", self._receive(16))
        if error:
            raise OSError(error, "NBD write failed")


def percentile(taken: list[float], share: float) -> float:
    return sorted(taken)[min(int(len(taken) * share), len(taken) - 1)] if taken else 0.0


def result(seconds: float, processor: float, writer: Writer | None, marks: tuple[int, int]) -> None:
    found: dict[str, object] = {"seconds": seconds, "processor": processor}
    if writer is not None:
        before, during = writer.taken[: marks[0]], writer.taken[marks[0] : marks[1]]
        # A write that was held back for the whole job counts as well.
        during = during or writer.taken[marks[0] : marks[0] + 1]
        found |= {"writes": len(during), "p50": percentile(during, 0.5), "p99": percentile(during, 0.99),
                  "p99_before": percentile(before, 0.99)}  # fmt: skip
    print(json.dumps(found))


def by_peer(program: str, kind: str, source: str, target: str, size: int, load: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, Daemon(program, Path(folder)) as daemon:
        daemon.open("source", source)
        if kind not in CHAIN_KINDS:
            daemon.open("target", target)
        writer = None
        if load:
            path = str(Path(folder) / "nbd.sock")
            daemon("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
            daemon("block-export-add", type="nbd", id="e", node_name="source", writable=True, name="source")
            client = Nbd(path, "source")
            writer = Writer(client.write, size)
            sleep(BEFORE)
        first = len(writer.taken) if writer else 0
        used, started = daemon.processor(), perf_counter()
        ORDERS[kind](daemon)
        seconds, used = perf_counter() - started, daemon.processor() - used
        last = len(writer.taken) if writer else 0
        if writer is not None:
            writer.end()
            client.socket.close()
        if kind == "mirror":
            daemon("job-complete", id="j")
            daemon.concluded("j")
    result(seconds, used, writer, (first, last))


def _mirror(daemon: Daemon) -> None:
    daemon("blockdev-mirror", job_id="j", device="source", target="target", sync="full", auto_dismiss=False)
    daemon.wait("BLOCK_JOB_READY")


def _backup(daemon: Daemon, **more: str) -> None:
    daemon("blockdev-backup", job_id="j", device="source", target="target", auto_dismiss=False,
           **{"sync": "full", **more})  # fmt: skip
    daemon.concluded("j")


def _stream(daemon: Daemon) -> None:
    daemon("block-stream", job_id="j", device="source", auto_dismiss=False)
    daemon.concluded("j")


def _commit(daemon: Daemon) -> None:
    rows = {row["node-name"]: row for row in daemon("query-named-block-nodes", flat=True)}
    by_file = {row["file"]: name for name, row in rows.items() if row["drv"] == "qcow2"}
    middle = by_file[rows["source"]["backing_file"]]
    daemon("block-commit", job_id="j", device="source", top_node=middle, auto_dismiss=False)
    daemon.concluded("j")


ORDERS: dict[str, Callable[[Daemon], None]] = {
    "mirror": _mirror,
    "backup": _backup,
    "incremental": lambda daemon: _backup(daemon, sync="incremental", bitmap="b"),
    "stream": _stream,
    "commit": _commit,
}
CHAIN_KINDS = ("stream", "commit")


def by_byre(kind: str, source_name: str, target_name: str, size: int, load: bool) -> None:
    import numpy  # noqa: F401 - a running program has it already

    import byre
    from byre.graph import chain
    from byre.graph.graph import Graph
    from byre.jobs.backup import BackupJob, BackupOptions
    from byre.jobs.job import Job
    from byre.jobs.live_commit import LiveCommitJob
    from byre.jobs.mirror import MirrorJob
    from byre.jobs.states import State
    from byre.jobs.stream import StreamJob

    graph = Graph()
    with ExitStack() as stack:
        source = stack.enter_context(byre.open(source_name, format="qcow2", read_only=False, graph=graph))
        if kind not in CHAIN_KINDS:
            target = stack.enter_context(byre.open(target_name, format="qcow2", read_only=False, graph=graph))
        writer = Writer(source.write, size) if load else None
        if load:
            sleep(BEFORE)
        first = len(writer.taken) if writer else 0
        used, started = process_time(), perf_counter()
        job: Job
        if kind == "mirror":
            job = MirrorJob(source, target)
        elif kind == "stream":
            job = StreamJob(graph, source.node)
        elif kind == "commit":
            _, middle, base = chain.layers(source.node)
            job = LiveCommitJob(graph, middle, base)
        else:
            job = BackupJob(source, target, BackupOptions("incremental", "b") if kind == "incremental" else None)
        there = threading.Event()
        job.on_change = lambda _job, state: there.set() if state in (State.READY, State.CONCLUDED) else None
        job.start()
        there.wait()
        seconds, used = perf_counter() - started, process_time() - used
        last = len(writer.taken) if writer else 0
        if writer is not None:
            writer.end()
        if kind == "mirror" and job.error is None:
            job.complete()
        job.join()
        if job.error is not None:
            raise job.error
    result(seconds, used, writer, (first, last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", help="byre, or the peer's program")
    parser.add_argument("kind", choices=tuple(ORDERS))
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("size", type=int, help="bytes of the disk that are written to")
    parser.add_argument("--load", action="store_true")
    given = parser.parse_args()
    if given.who == "byre":
        by_byre(given.kind, given.source, given.target, given.size, given.load)
    else:
        by_peer(given.who, given.kind, given.source, given.target, given.size, given.load)


if __name__ == "__main__":
    main()
