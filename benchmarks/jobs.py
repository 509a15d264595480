"""Live jobs on a qcow2 disk, alone and beside a writer: mirror, full and incremental backup, stream, commit.

Against qemu-storage-daemon. Both are running programs that are told to start a job; live.py says what is measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from statistics import median

from harness import Bench, Failure, Goal, parse_arguments, run

HERE = Path(__file__).resolve().parent
PIECE = 1 << 20
KINDS = {"mirror": "mirror full", "backup": "backup full", "incremental": "backup incremental", "stream": "stream",
         "commit": "commit of a layer below"}  # fmt: skip
TIME_GOAL, LATENCY_GOAL = Goal(1.0), Goal(2.0)


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=5, size="1G")
    with Bench("jobs", given) as bench:
        daemon = shutil.which("qemu-storage-daemon") if bench.peer else None
        for kind, name in KINDS.items():
            words = f"{name} of {given.size >> 20} MiB"
            if bench.wants(words):
                Disks(bench, kind, given.size).measure(words, daemon)


class Disks:
    """The images of one kind of job; made anew for each run."""

    def __init__(self, bench: Bench, kind: str, size: int) -> None:
        self.bench, self.kind, self.size = bench, kind, size
        self.kept, self.source, self.target, self.base = map(bench.path, ("kept", "source", "target", "base"))
        raw = bench.make_image("mixed", "disk.raw", size)
        # -S 0 maps every cluster, so that a writer meets only clusters that are there.
        bench.run_byre("convert", "-S", "0", "-f", "raw", "-O", "qcow2", raw, self.kept)
        Path(raw).unlink()
        if kind == "incremental":
            shutil.copy(self.kept, self.base)
            bench.run_byre("bitmap", "--add", "-f", "qcow2", self.kept, "b")
            # A quarter of the disk changes, a MiB at a time.
            writes = [f"write -q -P {1 + at % 251} {at * PIECE} {PIECE}" for at in range(0, size // PIECE, 4)]
            for start in range(0, len(writes), 200):
                bench.run_byre("io", "-f", "qcow2", *(w for each in writes[start : start + 200] for w in ("-c", each)),
                               self.kept)  # fmt: skip

    def fresh(self) -> None:
        if self.kind in ("stream", "commit"):
            self._fresh_chain()
        else:
            shutil.copy(self.kept, self.source)
            over = ("-b", self.base, "-F", "qcow2") if self.kind == "incremental" else ()
            self.bench.run_byre("create", "-q", "-f", "qcow2", *over, self.target, str(self.size))
        run(["sync"])
        self.bench.warm(self.source)

    def _fresh_chain(self) -> None:
        """source over all the data; for commit with an empty layer below that."""
        create, over = ("create", "-q", "-f", "qcow2"), lambda name: ("-b", name, "-F", "qcow2")
        shutil.copy(self.kept, self.base)
        below = self.base
        if self.kind == "commit":
            self.bench.run_byre(*create, self.target, str(self.size))
            self.bench.run_byre("rebase", "-u", "-f", "qcow2", *over(self.target), self.base)
        self.bench.run_byre(*create, *over(below), self.source)
        self.bench.warm(self.base)

    def measure(self, words: str, daemon: str | None) -> None:
        programs = ["byre", *([daemon] if daemon else [])]
        for load in (False, True):
            found: dict[str, list[dict[str, float]]] = {who: [] for who in programs}
            self.bench.log(f"jobs: {words}{' with a writer' if load else ''}")
            try:
                for number in range(self.bench.pairs):
                    for who in programs if (self.bench.pairs - number) % 2 else reversed(programs):
                        found[who].append(self._run(who, load))
            except Failure as failure:
                self.bench.add({"bench": "jobs", "row": words, "failed": str(failure)})
                continue
            if load:
                self._row(f"4 KiB write meanwhile, 99th percentile: {words}", found, "p99", LATENCY_GOAL)
                self._row(f"{words}, with a writer", found, "seconds", None)
            else:
                self._row(words, found, "seconds", TIME_GOAL)
        for path in (self.kept, self.source, self.target, self.base):
            Path(path).unlink(missing_ok=True)

    def _run(self, who: str, load: bool) -> dict[str, float]:
        self.fresh()
        more = ["--load"] if load else []
        command = [sys.executable, str(HERE / "live.py"), who, self.kind, self.source, self.target, str(self.size)]
        found: dict[str, float] = json.loads(run([*command, *more]).output)
        if who == "byre" and self.bench.verify and self.bench.peer and not load:
            other = self.kept if self.kind in ("stream", "commit") else self.target
            self.bench.run_peer("compare", "-f", "qcow2", "-F", "qcow2", self.source, other)
        return found

    def _row(self, words: str, found: dict[str, list[dict[str, float]]], key: str, goal: Goal | None) -> None:
        record: dict[str, object] = {"bench": "jobs", "row": words, "pairs": self.bench.pairs, "unit": "s"}
        medians = []
        for who, runs in found.items():
            name = "byre" if who == "byre" else "peer"
            medians.append(median(one[key] for one in runs))
            record[name] = round(medians[-1], 6)
            record[f"{name}_all"] = [round(one[key], 6) for one in runs]
        if goal:
            record["goal"] = str(goal)
        used = [median(one["processor"] for one in runs) for runs in found.values()]
        if len(used) == 2:
            record["processor_ratio"] = round(used[0] / max(used[1], 0.01), 4)
        if len(medians) == 2:
            record["ratio"] = round(medians[0] / max(medians[1], 1e-9), 4)
            if goal:
                record["met"] = goal.met(medians[0] / max(medians[1], 1e-9))
        self.bench.add(record)


if __name__ == "__main__":
    main()
