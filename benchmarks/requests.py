"""Requests: 4 KiB reads and writes on a qcow2 image, in the page cache, at depth 1, 16 and 64."""

from __future__ import annotations

import re

from harness import Bench, Failure, Goal, Sample, parse_arguments

BLOCK = 4096
# bench adds the step to the offset of the request before; a large prime number of blocks jumps all over the image.
SCATTER = 104_729 * BLOCK
COUNT = {1: 100_000, 16: 200_000, 64: 200_000}
GOALS = {("read", "random", 1): Goal(2.0, at_least=True), ("read", "random", 64): Goal(1.0, at_least=True)}


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=5, size="1G")
    with Bench("requests", given) as bench:
        raw = bench.make_image("mixed", "disk.raw", given.size)
        image = bench.path("disk.qcow2")
        # -S 0 maps every cluster: no read is answered without touching the file.
        prepare = ("convert", "-S", "0", "-f", "raw", "-O", "qcow2", raw, image)
        bench.run_peer(*prepare) if bench.peer else bench.run_byre(*prepare)
        bench.warm(image)
        for verb in ("read", "write"):
            for order in ("random", "sequential"):
                for depth, count in COUNT.items():
                    measure(bench, image, verb, order, depth, count)


def measure(bench: Bench, image: str, verb: str, order: str, depth: int, count: int) -> None:
    arguments = ["bench", "-f", "qcow2", "-t", "writeback", "-c", str(count), "-d", str(depth), "-s", str(BLOCK)]
    arguments += ["-S", str(SCATTER)] if order == "random" else []
    arguments += ["-w"] if verb == "write" else []
    bench.row(
        f"bench 4 KiB {order} {verb}, depth {depth}",
        [*arguments, image],
        [*arguments, "-i", "threads", image],
        goal=GOALS.get((verb, order, depth)),
        value=lambda sample: count / seconds_taken(sample),
        unit="/s",
    )


def seconds_taken(sample: Sample) -> float:
    """What the command itself says the requests took, without its start."""
    found = re.search(r"Run completed in ([0-9.]+) seconds", sample.output)
    if not found:
        raise Failure(f"no time found in {sample.output!r}")
    return float(found[1])


if __name__ == "__main__":
    main()
