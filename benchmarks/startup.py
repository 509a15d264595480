"""Start-up: what the smallest commands cost, against a bare Python start and against qemu-img."""

from __future__ import annotations

import sys
from statistics import median

from harness import Bench, Failure, Goal, parse_arguments, run

LIMIT = 0.060  # seconds


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=21)
    with Bench("startup", given) as bench:
        image = bench.path("disk.qcow2")
        bench.run_byre("create", "-q", "-f", "qcow2", image, "10G")
        new = bench.path("new.qcow2")
        commands = {
            "info": ["info", image],
            "create": ["create", "-q", "-f", "qcow2", new, "10G"],
            "--help": ["--help"],
        }
        for name, command in commands.items():
            against_python(bench, name, command)
        for name, command in commands.items():
            bench.row(f"{name}, against the peer", command)


def against_python(bench: Bench, name: str, command: list[str]) -> None:
    """A row whose peer is an interpreter that does nothing."""
    row = f"{name}, against a bare Python"
    if not bench.wants(row):
        return
    bench.log(row)
    bare, ours = [], []
    try:
        for _ in range(bench.pairs):
            bare.append(run([sys.executable, "-c", "pass"]))
            ours.append(bench.run_byre(*command))
    except Failure as failure:
        bench.add({"bench": "startup", "row": row, "failed": str(failure)})
        return
    python = median(sample.seconds for sample in bare)
    byre = median(sample.seconds for sample in ours)
    bench.add(
        {
            "bench": "startup", "row": row, "unit": "s", "pairs": bench.pairs,
            "byre": round(byre, 5), "peer": round(python, 5), "ratio": round(byre / python, 3),
            "goal": f"{Goal(3.0)}, {LIMIT * 1000:.0f} ms", "met": byre <= LIMIT and byre <= 3 * python,
            "byre_peak_mib": round(max(sample.peak for sample in ours) / (1 << 20), 1),
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()
