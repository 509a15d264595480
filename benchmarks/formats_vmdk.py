"""VMDK: convert to sparse and stream-optimized disks and from them; data, zeroes and holes in the page cache."""

from __future__ import annotations

from pathlib import Path

from harness import Bench, Goal, parse_arguments

SPARSE = ("-o", "subformat=monolithicSparse")
STREAM = ("-o", "subformat=streamOptimized")
COMPRESSED_SIZE = 1.12
"""A stream may be so much larger than the peer's: ISA-L compresses many times as fast, and not quite as densely."""


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=5, size="1G")
    with Bench("formats_vmdk", given) as bench:
        raw = bench.make_image("mixed", "disk.raw", given.size)
        copies(bench, raw, "vmdk sparse", SPARSE, Goal(0.9), Goal(0.9))
        copies(bench, raw, "vmdk stream", STREAM, Goal(0.15), Goal(0.45), COMPRESSED_SIZE)


def copies(bench: Bench, raw: str, name: str, options: tuple[str, ...], to: Goal, back: Goal,
           size_goal: float = 0) -> None:  # fmt: skip
    """raw to the disk, and what the peer made of it back."""
    image, target = bench.path("image"), bench.path("target")
    bench.warm(raw)
    make = ("convert", "-f", "raw", "-O", "vmdk", *options, raw, image)
    bench.row(
        f"convert raw to {name}",
        make,
        goal=to,
        size_goal=size_goal,
        outputs=[image],
        finish=lambda: verified(bench, raw, image, "vmdk"),
    )
    if bench.wants(f"convert {name} to raw"):
        (bench.run_peer if bench.peer else bench.run_byre)(*make)
        bench.warm(image)
        bench.row(
            f"convert {name} to raw",
            ["convert", "-f", "vmdk", "-O", "raw", image, target],
            goal=back,
            outputs=[target],
            finish=lambda: verified(bench, raw, target, "raw"),
        )
    for path in (image, target):
        Path(path).unlink(missing_ok=True)


def verified(bench: Bench, raw: str, target: str, driver: str) -> dict[str, object]:
    """The peer, or byre without one, finds the same bytes."""
    if not bench.verify:
        return {}
    compare = bench.run_peer if bench.peer else bench.run_byre
    compare("compare", "-f", "raw", "-F", driver, raw, target)
    return {"verified": True}


if __name__ == "__main__":
    main()
