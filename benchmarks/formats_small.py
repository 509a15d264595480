"""VDI, QED and Parallels: convert to them and from them; a disk of data, zeroes and holes in the page cache."""

from __future__ import annotations

from pathlib import Path

from harness import Bench, Goal, parse_arguments

DRIVERS = ("vdi", "qed", "parallels")


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=5, size="1G")
    with Bench("formats_small", given) as bench:
        raw = bench.make_image("mixed", "disk.raw", given.size)
        for driver in DRIVERS:
            copies(bench, raw, driver)


def copies(bench: Bench, raw: str, driver: str) -> None:
    """raw to the format, and back what the peer (byre without one) made of it."""
    image, target = bench.path("image"), bench.path("target")
    bench.warm(raw)
    bench.row(
        f"convert raw to {driver}",
        ["convert", "-f", "raw", "-O", driver, raw, image],
        goal=Goal(0.9),
        outputs=[image],
        finish=lambda: verified(bench, raw, image, driver),
    )
    if bench.wants(f"convert {driver} to raw"):
        make = bench.run_peer if bench.peer else bench.run_byre
        make("convert", "-f", "raw", "-O", driver, raw, image)
        bench.warm(image)
        bench.row(
            f"convert {driver} to raw",
            ["convert", "-f", driver, "-O", "raw", image, target],
            goal=Goal(0.9),
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
