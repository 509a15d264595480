"""NBD, byre as the client: disks copied from and to a server, and single requests. Both programs ask the same server.

The server is the peer's qemu-nbd with its export in the page cache, on a Unix socket.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import Bench, Goal, Sample, parse_arguments

READ, WRITE = ("-c", "40000", "-s", "4096", "-S", "1171456"), ("-w", "-c", "20000", "-s", "4096", "-S", "1171456")


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=5, size="1G")
    if shutil.which("qemu-nbd") is None:
        sys.exit("qemu-nbd is needed as the server")
    with Bench("nbd-client", given) as bench:
        raw = bench.make_image("mixed", "disk.raw", given.size)
        bench.warm(raw)
        from_server(bench, raw)
        to_server(bench, raw)


def from_server(bench: Bench, raw: str) -> None:
    target = bench.path("target")
    with serving(bench, raw, "-r") as name:
        for output, goal in (("raw", Goal(1.0)), ("qcow2", Goal(1.0))):
            bench.row(
                f"convert nbd to {output}",
                ["convert", "-f", "raw", "-O", output, name, target],
                goal=goal,
                outputs=[target],
                finish=lambda output=output: verify(bench, raw, target, output),
            )
        Path(target).unlink(missing_ok=True)
        for depth in (1, 16, 64):
            bench.row(
                f"read 4k random, depth {depth}",
                ["bench", "-f", "raw", "-d", str(depth), *READ, name],
                value=per_second(40000),
                unit="requests/s",
            )
        for depth in (4, 16):
            bench.row(
                f"read 256k, depth {depth}",
                ["bench", "-f", "raw", "-d", str(depth), "-c", "4000", "-s", "256k", name],
                value=per_second(4000),
                unit="requests/s",
            )


def to_server(bench: Bench, raw: str) -> None:
    target = bench.path("served.raw")

    def empty() -> None:
        """A fresh disk under the running server: what the run before wrote is given back."""
        size = os.stat(raw).st_size
        os.truncate(target, 0)
        os.truncate(target, size)

    Path(target).touch()
    empty()
    with serving(bench, target) as name:
        bench.row(
            "convert raw to nbd",
            ["convert", "-n", "-f", "raw", "-O", "raw", raw, name],
            prepare=empty,
            finish=lambda: verify(bench, raw, name, "raw"),
        )
        for depth in (1, 16, 64):
            bench.row(
                f"write 4k random, depth {depth}",
                ["bench", "-f", "raw", "-d", str(depth), *WRITE, name],
                value=per_second(20000),
                unit="requests/s",
            )
    Path(target).unlink()


def per_second(count: int):  # type: ignore[no-untyped-def]
    def value(sample: Sample) -> float:
        found = re.search(r"Run completed in ([\d.]+) seconds", sample.output)
        assert found, sample.output
        return count / float(found[1])

    return value


def verify(bench: Bench, raw: str, made: str, format: str) -> dict[str, object]:
    if bench.verify and bench.peer:
        bench.run_peer("compare", "-U", "-f", "raw", "-F", format, raw, made)
        return {"verified": True}
    return {}


@contextmanager
def serving(bench: Bench, image: str, *options: str) -> Iterator[str]:
    """The name of ``image`` as an export of qemu-nbd."""
    path = bench.path("nbd.sock")
    command = ["qemu-nbd", "-f", "raw", "-t", "-e", "16", "-k", path, *options, image]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not Path(path).exists():
            if server.poll() is not None:
                sys.exit("qemu-nbd did not start")
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={path}"
    finally:
        server.terminate()
        server.wait()
        Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
