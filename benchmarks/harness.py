"""What the benchmarks share: run whole commands in interleaved pairs, take medians, print JSON lines and a table.

A *pair* is one run of byre and one of the peer, right after each other and in alternating order, so that whatever
else the machine does meets both. Times are wall-clock seconds of whole processes; peak memory is the resident set
that the system reports for the process when it ends (never less than this harness's own, which stays small).

JSON lines go to standard output, the table to standard error: ``python benchmarks/streaming.py > run.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple, Self

__all__ = ["Bench", "Failure", "Goal", "Sample", "parse_arguments", "parse_size", "render", "run"]

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
MEMORY_GOAL = 150  # MiB, for every command measured
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Failure(Exception):
    """A command that was to be measured failed."""


class Sample(NamedTuple):
    """One run of a command: wall-clock and processor seconds, peak resident memory in bytes, what it printed."""

    seconds: float
    processor: float
    peak: int
    output: str


class Goal(NamedTuple):
    """What the project holds a row to: the ratio byre / peer is at most, or at least, this."""

    value: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"

    def met(self, ratio: float) -> bool:
        return ratio >= self.value if self.at_least else ratio <= self.value


def parse_size(text: str) -> int:
    """Bytes for "4G", "512M", "1T" or plain digits."""
    if text[-1:].upper() in SUFFIXES:
        return int(float(text[:-1]) * SUFFIXES[text[-1].upper()])
    return int(text)


def parse_arguments(description: str, *, pairs: int, size: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=pairs, help=f"runs of each program per row (default {pairs})")
    if size:
        parser.add_argument("--size", type=parse_size, default=parse_size(size), help=f"of the disk (default {size})")
    parser.add_argument("--scratch", help="folder on a real disk for the images (default: the system's temporary one)")
    parser.add_argument("--byre", default="", help="the byre program (default: the one beside this interpreter)")
    parser.add_argument("--peer", default="qemu-img", help='the program to compare with; "" for none')
    parser.add_argument("--only", default="", help="run only rows whose name contains this")
    parser.add_argument("--no-verify", action="store_true", help="do not compare what byre wrote with its source")
    return parser.parse_args()


class Bench:
    """A group of rows. A context manager: the scratch folder is removed and the table printed at the end."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.name = name
        self.pairs = max(1, int(given.pairs))
        self.only = str(given.only)
        self.verify = not given.no_verify
        self.byre = _find_byre(given.byre)
        self.peer = _find_peer(given.peer)
        self.rows: list[dict[str, object]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="byre-bench-", dir=given.scratch)
        self.scratch = Path(self._folder.name)

    def __enter__(self) -> Self:
        self._emit(
            {
                "bench": self.name,
                "environment": {
                    "python": platform.python_version(),
                    "kernel": platform.release(),
                    "processors": os.cpu_count(),
                    "byre": self._version([*self.byre, "--version"]),
                    "peer": self._version([self.peer, "--version"]) if self.peer else "",
                    "pairs": self.pairs,
                },
            }
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()
        if self.rows:
            print(render(self.rows), file=sys.stderr)

    # -- images -----------------------------------------------------------------------------------

    def path(self, name: str) -> str:
        return str(self.scratch / name)

    def make_image(self, kind: str, name: str, size: int, *options: str) -> str:
        """An image made by images.py, in a process of its own."""
        path = self.path(name)
        self.log(f"making {name}")
        subprocess.run([sys.executable, str(HERE / "images.py"), kind, path, str(size), *options], check=True)
        return path

    def wants(self, row: str) -> bool:
        return self.only in row

    def warm(self, path: str) -> None:
        """Bring a file's data into the page cache, and settle what is still to be written."""
        os.sync()
        with open(path, "rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            buffer = bytearray(4 * MIB)
            offset = 0
            while offset < end:
                try:
                    offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
                except OSError:
                    return
                hole = os.lseek(file.fileno(), offset, os.SEEK_HOLE)
                os.lseek(file.fileno(), offset, os.SEEK_SET)
                while offset < hole:
                    offset += file.readinto(buffer) or end

    # -- measuring --------------------------------------------------------------------------------

    def run_byre(self, *arguments: str) -> Sample:
        return run([*self.byre, *arguments])

    def run_peer(self, *arguments: str) -> Sample:
        return run([self.peer, *arguments])

    def row(
        self,
        name: str,
        byre: Sequence[str],
        peer: Sequence[str] | None = None,
        *,
        goal: Goal | None = None,
        size_goal: float = 0,
        outputs: Sequence[str] = (),
        value: Callable[[Sample], float] | None = None,
        unit: str = "s",
        finish: Callable[[], dict[str, object]] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Measure one row.

        :param byre: arguments for byre
        :param peer: arguments for the peer, if they differ
        :param size_goal: the outputs of byre are at most this many times as large as the peer's; 0 for no goal
        :param outputs: files the commands write; removed before every run
        :param value: what to take from a run instead of its wall-clock time, e.g. requests per second
        :param prepare: called before every run, to make the files that the command changes
        :param finish: called after the last pair, when the outputs of byre are there; more for the record
        """
        if not self.wants(name):
            return
        self.log(f"{self.name}: {name}")
        commands = {"byre": [*self.byre, *byre]}
        if self.peer:
            commands["peer"] = [self.peer, *(byre if peer is None else peer)]
        samples: dict[str, list[Sample]] = {who: [] for who in commands}
        sizes: dict[str, int] = {}
        try:
            for number in range(self.pairs):
                # byre comes last in the last pair: its outputs are looked at afterwards.
                first_byre = (self.pairs - number) % 2 == 0
                for who in sorted(commands, reverse=not first_byre):
                    for output in outputs:
                        Path(output).unlink(missing_ok=True)
                    if prepare:
                        prepare()
                    if outputs or prepare:
                        os.sync()
                    samples[who].append(run(commands[who]))
                    sizes[who] = sum(os.stat(output).st_size for output in outputs)
            more = finish() if finish else {}
        except Failure as failure:
            self.rows.append({"bench": self.name, "row": name, "failed": str(failure)})
            self._emit(self.rows[-1])
            return
        record = _measured(samples, goal, value, unit)
        if len(sizes) == 2 and sizes["peer"]:
            record["size_ratio"] = round(sizes["byre"] / sizes["peer"], 4)
            if size_goal:
                record["goal"] = f"{goal}, size {Goal(size_goal)}"
                record["met"] = bool(record["met"]) and sizes["byre"] <= size_goal * sizes["peer"]
        self.add({"bench": self.name, "row": name, "pairs": self.pairs, **record, **more})

    def add(self, record: dict[str, object]) -> None:
        """Record a row that was measured elsewhere."""
        self.rows.append(record)
        self._emit(record)

    # -- output -----------------------------------------------------------------------------------

    def log(self, words: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{words}", end="", file=sys.stderr, flush=True)

    def _emit(self, record: dict[str, object]) -> None:
        if sys.stdout.isatty():
            self.log("")
        print(json.dumps(record), flush=True)

    @staticmethod
    def _version(command: Sequence[str]) -> str:
        try:
            return run(command).output.partition("\n")[0]
        except Failure:
            return "unknown"


def _measured(
    samples: dict[str, list[Sample]], goal: Goal | None, value: Callable[[Sample], float] | None, unit: str
) -> dict[str, object]:
    """The medians, all values, peaks and the ratio of one row."""
    record: dict[str, object] = {"unit": unit}
    medians = {}
    for who, runs in samples.items():
        values = [value(sample) if value else sample.seconds for sample in runs]
        medians[who] = median(values)
        record[who] = round(medians[who], 5)
        record[f"{who}_all"] = [round(one, 5) for one in values]
        record[f"{who}_processor_s"] = round(median(sample.processor for sample in runs), 4)
        record[f"{who}_peak_mib"] = round(max(sample.peak for sample in runs) / MIB, 1)
    if goal:
        record["goal"] = str(goal)
    if "peer" in medians:
        ratio = medians["byre"] / medians["peer"]
        record["ratio"] = round(ratio, 4)
        processor = [median(sample.processor for sample in samples[who]) for who in ("byre", "peer")]
        record["processor_ratio"] = round(processor[0] / max(processor[1], 1e-4), 4)
        if goal:
            record["met"] = goal.met(ratio)
    return record


def run(command: Sequence[str]) -> Sample:
    """Run a command to its end.

    :raises Failure: its exit status is not 0
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, out.fileno(), 1),
            (os.POSIX_SPAWN_DUP2, err.fileno(), 2),
        ]
        started = perf_counter()
        process = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
        _, status, usage = os.wait4(process, 0)
        seconds = perf_counter() - started
        if status:
            err.seek(0)
            words = err.read(2000).decode(errors="replace").strip()
            raise Failure(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}: {words}")
        out.seek(0)
        # Only the head is kept: some commands print a hundred megabytes.
        return Sample(
            seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out.read(4096).decode(errors="replace")
        )


def render(rows: Sequence[dict[str, object]]) -> str:
    """The rows as a table for people."""
    head = ("row", "byre", "peer", "ratio", "goal", "", "cpu ratio", "peak MiB", "peer's", "size ratio")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        if "failed" in row:
            lines.append((str(row["row"]), f"failed: {row['failed']}"))
            continue
        unit = str(row["unit"])
        peak = float(str(row.get("byre_peak_mib", 0)))
        lines.append(
            (
                str(row["row"]),
                _quantity(row.get("byre"), unit),
                _quantity(row.get("peer"), unit),
                f"{row['ratio']:.3f}" if "ratio" in row else "",
                str(row.get("goal", "")),
                {True: "met", False: "MISSED"}.get(row.get("met"), ""),  # type: ignore[call-overload]
                f"{row['processor_ratio']:.3f}" if "processor_ratio" in row else "",
                f"{peak:.0f}{'!' if peak > MEMORY_GOAL else ''}" if peak else "",
                f"{row['peer_peak_mib']:.0f}" if "peer_peak_mib" in row else "",
                f"{row['size_ratio']:.3f}" if "size_ratio" in row else "",
            )
        )
    widths = [max(len(line[i]) for line in lines if len(line) == len(head)) for i in range(len(head))]
    widths[0] = max(len(line[0]) for line in lines)
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        if len(line) == len(head):
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        else:
            cells += list(line[1:])
        text.append("  ".join(cells).rstrip())
    text.insert(1, "-" * max(len(line) for line in text[:1]))
    if any("byre_peak_mib" in row for row in rows):
        worst = max(float(str(row.get("byre_peak_mib", 0))) for row in rows)
        text.append(f"highest peak memory of byre: {worst:.0f} MiB, goal <= {MEMORY_GOAL} MiB")
    return "\n".join(text)


def _quantity(value: object, unit: str) -> str:
    if not isinstance(value, (int, float)):
        return ""
    if unit == "s":
        return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:,.0f} {unit}"


def _find_byre(given: str) -> list[str]:
    if given:
        return [given]
    beside = Path(sys.executable).with_name("byre")
    if beside.exists():
        return [str(beside)]
    found = shutil.which("byre")
    if not found:
        raise SystemExit("byre is not installed: make bench installs it, or name it with --byre")
    return [found]


def _find_peer(given: str) -> str:
    found = shutil.which(given) if given else None
    if given and not found:
        print(f"{given} is not installed: byre runs alone, without ratios", file=sys.stderr)
    return found or ""
