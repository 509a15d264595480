"""Runs byre commands in this process, as the command line would, and says what became of each.

A program of its own, so that its memory, its time and the files it opens are those of byre alone. It reads a line of
JSON, ``[folder, [word, ...]]``, and answers with one: exit code, seconds, memory taken, files opened, output.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import time

ADDRESS_SPACE = 4 << 30
FILES = 512


def memory(kind: str) -> int:
    """Bytes: "VmRSS", what this process has now, or "VmHWM", the most it had since :func:`forget_peak`."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(kind))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    opened: list[str] = []

    def watch(event: str, given: tuple[object, ...]) -> None:
        if event == "open" and isinstance(given[0], (str, bytes)):
            opened.append(os.fsdecode(given[0]))

    sys.addaudithook(watch)
    from byre.cli.main import main as byre

    streams = sys.stdout, sys.stderr
    for text in sys.stdin:
        folder, words = json.loads(text)
        os.chdir(folder)
        forget_peak()
        before = memory("VmRSS")
        opened.clear()
        out, err = io.StringIO(), io.StringIO()
        sys.stdout, sys.stderr = out, err
        started = time.monotonic()
        try:
            code = byre(words)
        finally:
            sys.stdout, sys.stderr = streams
        names = list(opened)
        done = {"code": code, "seconds": time.monotonic() - started, "taken": memory("VmHWM") - before, "opened": names,
                "out": out.getvalue(), "err": err.getvalue()}  # fmt: skip
        os.chdir("/")
        print(json.dumps(done), file=streams[0], flush=True)


if __name__ == "__main__":
    main()
