"""The NBD server beside qemu-nbd, nbdkit's file plugin and qemu-nbd --aio=io_uring: requests, streams, copies, memory.

Clients are fio's nbd engine and nbdcopy, which are quicker than any server here; they and the servers share the
machine's processors. Each server is started for one run and serves the same image, in the page cache unless the row
says otherwise, over a unix socket.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from harness import Bench, Failure, Goal, parse_arguments, run

SECONDS = 2.0
READY = 20.0
FORMATS = ("raw", "qcow2")

# (row, fio's options, goals for raw and qcow2)
REQUESTS = (
    ("4k random read, depth 1", ("randread", "4k", 1), (1.4, 1.3)),
    ("4k random read, depth 16", ("randread", "4k", 16), (1.8, 1.5)),
    ("4k random read, depth 64", ("randread", "4k", 64), (2.5, 1.8)),
    ("4k random write, depth 1", ("randwrite", "4k", 1), (1.3, 1.1)),
    ("4k random write, depth 16", ("randwrite", "4k", 16), (1.5, 1.3)),
    ("4k random write, depth 64", ("randwrite", "4k", 64), (2.0, 1.8)),
    *(
        (f"{size} sequential {verb}, depth {depth}", (verb, size, depth), (2.5, 2.0))
        for size in ("256k", "2m")
        for verb in ("read", "write")
        for depth in (4, 16)
    ),
    *((f"4k random read, depth {depth}, cache=none", ("randread", "4k", depth), (0.9, 0.9)) for depth in (1, 16, 64)),
)
Serve = Callable[[str, str, str, bool], list[str]]


class Servers:
    """The programs that are compared, by column."""

    def __init__(self, bench: Bench) -> None:
        self._byre = bench.byre
        self.columns: dict[str, Serve] = {"byre": self._own}
        if shutil.which("qemu-nbd"):
            self.columns["peer"] = self._peer
        if shutil.which("nbdkit"):
            self.columns["nbdkit"] = self._nbdkit
        if shutil.which("qemu-nbd"):
            self.columns["io_uring"] = self._io_uring

    def _own(self, path: str, format: str, sock: str, direct: bool) -> list[str]:
        return [*self._byre, "serve", *_options(path, format, sock, direct)]

    def _peer(self, path: str, format: str, sock: str, direct: bool) -> list[str]:
        return ["qemu-nbd", *_options(path, format, sock, direct)]

    def _io_uring(self, path: str, format: str, sock: str, direct: bool) -> list[str]:
        return ["qemu-nbd", "--aio=io_uring", *_options(path, format, sock, direct)]

    def _nbdkit(self, path: str, format: str, sock: str, direct: bool) -> list[str]:
        return ["nbdkit", "-f", "-U", sock, "file", path] if format == "raw" and not direct else []


def _options(path: str, format: str, sock: str, direct: bool) -> list[str]:
    return ["-t", "-e", "64", "-f", format, "-k", sock, *(["--cache=none"] if direct else []), path]


@contextmanager
def served(command: Sequence[str], sock: str) -> Iterator[subprocess.Popen[bytes]]:
    """The server runs, and accepts."""
    Path(sock).unlink(missing_ok=True)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + READY
        while not _accepts(sock):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                words = process.stderr.read().decode(errors="replace") if process.stderr else ""
                raise Failure(f"{' '.join(command)}: {words.strip() or 'does not listen'}")
            time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr:
            process.stderr.close()


def _accepts(sock: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(sock)
        except OSError:
            return False
    return True


def fio(sock: str, size: int, work: tuple[str, str, int]) -> tuple[float, float]:
    """(requests, bytes) per second."""
    verb, block, depth = work
    done = run([
        "fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={sock}", f"--rw={verb}", f"--bs={block}",
        f"--iodepth={depth}", f"--runtime={SECONDS}", "--time_based", f"--size={size}", "--output-format=terse",
        "--terse-version=3",
    ])  # fmt: skip
    fields = next(line for line in done.output.splitlines() if line.count(";") > 50).split(";")
    # Terse output, version 3: for reads kilobytes per second and requests per second are fields 7 and 8, for writes
    # 48 and 49 (counted from 1); see fio's HOWTO.
    at = 6 if "read" in verb else 47
    return float(fields[at + 1]), float(fields[at]) * 1024


def requests(bench: Bench, images: dict[str, str], size: int) -> None:
    servers = Servers(bench)
    sock = bench.path("nbd.sock")
    for name, work, goals in REQUESTS:
        for format, goal in zip(FORMATS, goals, strict=True):
            row = f"{name}, {format}"
            if not bench.wants(row):
                continue
            bench.log(row)
            direct = "cache=none" in name
            unit = "requests/s" if work[1] == "4k" else "MB/s"

            def measure(command: list[str], work: tuple[str, str, int] = work) -> float:
                with served(command, sock):
                    rate, speed = fio(sock, size, work)
                    return rate if work[1] == "4k" else speed / 1e6

            if not direct:
                bench.warm(images[format])
            commands = {who: make(images[format], format, sock, direct) for who, make in servers.columns.items()}
            compare(bench, row, commands, measure, Goal(goal, at_least=True), unit)


def compare(
    bench: Bench, row: str, commands: dict[str, list[str]], measure: Callable[[list[str]], float], goal: Goal, unit: str
) -> None:
    """One row: the columns in turn, as often as asked for."""
    found: dict[str, list[float]] = {who: [] for who, command in commands.items() if command}
    try:
        for number in range(bench.pairs):
            for who in sorted(found, reverse=bool(number % 2)):
                try:
                    found[who].append(measure(commands[who]))
                except Failure:
                    if who in ("byre", "peer"):
                        raise
    except Failure as failure:
        bench.add({"bench": bench.name, "row": row, "failed": str(failure)})
        return
    record: dict[str, object] = {"bench": bench.name, "row": row, "pairs": bench.pairs, "unit": unit, "goal": str(goal)}
    for who, values in found.items():
        if values:
            record[who] = round(median(values), 1)
            record[f"{who}_all"] = [round(value, 1) for value in values]
    if "peer" in found:
        ratio = median(found["byre"]) / median(found["peer"])
        record["ratio"] = round(ratio, 3)
        record["met"] = goal.met(ratio)
    bench.add(record)


def copies(bench: Bench, images: dict[str, str], size: int) -> None:
    """nbdcopy out of, into, and between servers, in MB per second."""
    if not shutil.which("nbdcopy"):
        return
    servers = Servers(bench)
    sock, other = bench.path("nbd.sock"), bench.path("other.sock")
    uri, other_uri = f"nbd+unix:///?socket={sock}", f"nbd+unix:///?socket={other}"
    for format, goal in zip(FORMATS, (1.2, 1.0), strict=True):
        source = images["raw"]
        target = bench.path(f"target.{format}")

        def fresh(target: str = target, format: str = format) -> None:
            Path(target).unlink(missing_ok=True)
            bench.run_byre("create", "-q", "-f", format, target, str(size))

        def out(command: list[str]) -> float:
            with served(command, sock):
                return size / run(["nbdcopy", uri, "null:"]).seconds / 1e6

        def into(command: list[str], fresh: Callable[[], None] = fresh, source: str = source) -> float:
            fresh()
            with served(command, sock):
                return size / run(["nbdcopy", source, uri]).seconds / 1e6

        columns = {who: make for who, make in servers.columns.items() if who != "io_uring"}
        for name, path, measure in ((f"nbdcopy to null, {format}", images[format], out),
                                    (f"nbdcopy into it, {format}", target, into)):  # fmt: skip
            if bench.wants(name):
                bench.log(name)
                commands = {who: make(path, format, sock, False) for who, make in columns.items()}
                compare(bench, name, commands, measure, Goal(goal, at_least=True), "MB/s")
        name = f"nbdcopy from one to another, {format}"
        if bench.wants(name):
            bench.log(name)
            second = {who: make(target, format, other, False) for who, make in columns.items()}

            def between(
                command: list[str], fresh: Callable[[], None] = fresh, second: dict[str, list[str]] = second
            ) -> float:
                fresh()
                who = next(who for who in second if second[who][:1] == command[:1])
                with served(command, sock), served(second[who], other):
                    return size / run(["nbdcopy", uri, other_uri]).seconds / 1e6

            commands = {who: make(images[format], format, sock, False) for who, make in columns.items()}
            compare(bench, name, commands, between, Goal(goal, at_least=True), "MB/s")


def memory(bench: Bench, images: dict[str, str]) -> None:
    """Resident memory that one connection costs once it has been busy and idles again."""
    count = 40
    sock = bench.path("nbd.sock")
    for format in FORMATS:
        row = f"memory per idle connection, {format}"
        if not bench.wants(row):
            continue
        values = {}
        for who, make in Servers(bench).columns.items():
            command = make(images[format], format, sock, False)
            if who in ("byre", "peer") and command:
                with served(command, sock) as process:
                    _client(sock).close()
                    before = _resident(process.pid)
                    clients = [_client(sock) for _ in range(count)]
                    time.sleep(11)
                    values[who] = (_resident(process.pid) - before) / count / 1024
                    for client in clients:
                        client.close()
        goal = Goal(1024)
        bench.add({
            "bench": bench.name, "row": row, "unit": "KiB", "goal": f"{goal} KiB", "met": goal.met(values["byre"]),
            **{who: round(value, 1) for who, value in values.items()},
        })  # fmt: skip


def _client(sock: str) -> socket.socket:
    """A client that has read 64 times 64 KiB."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(sock)
    client.recv(18, socket.MSG_WAITALL)
    client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
    client.recv(10, socket.MSG_WAITALL)
    for number in range(64):
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, number, number * 65536, 65536))
        left = 65536 + 16
        while left:
            left -= len(client.recv(left))
    return client


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> int:
    given = _arguments()
    if not shutil.which("fio"):
        print("fio is not installed", file=sys.stderr)
        return 1
    with Bench("nbd", given) as bench:
        size = given.size
        images = {format: bench.path(f"disk.{format}") for format in FORMATS}
        with open(images["raw"], "wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        bench.run_byre("convert", "-f", "raw", "-O", "qcow2", images["raw"], images["qcow2"])
        requests(bench, images, size)
        copies(bench, images, size)
        memory(bench, images)
    return 0


def _arguments() -> argparse.Namespace:
    return parse_arguments(__doc__ or "", pairs=3, size="256M")


if __name__ == "__main__":
    sys.exit(main())
