"""VHDX and VHD: convert to them, from them and to a fixed one; a disk of data, zeroes and holes in the page cache."""

from __future__ import annotations

from pathlib import Path

from harness import Bench, Goal, parse_arguments

TARGETS = {
    "vhdx": ("vhdx", ()),
    "vhdx fixed": ("vhdx", ("-o", "subformat=fixed")),
    "vpc": ("vpc", ("-o", "force_size=on")),
    "vpc fixed": ("vpc", ("-o", "subformat=fixed,force_size=on")),
}


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=5, size="1G")
    with Bench("formats_vhd", given) as bench:
        raw = bench.make_image("mixed", "disk.raw", given.size)
        for name, (driver, options) in TARGETS.items():
            copies(bench, raw, name, driver, options)


def copies(bench: Bench, raw: str, name: str, driver: str, options: tuple[str, ...]) -> None:
    """raw to the format, and what byre made of it back."""
    image, target = bench.path("image"), bench.path("target")
    bench.warm(raw)
    bench.row(
        f"convert raw to {name}",
        ["convert", "-f", "raw", "-O", driver, *options, raw, image],
        goal=Goal(0.9),
        outputs=[image],
        finish=lambda: verified(bench, raw, image, driver),
    )
    if bench.wants(f"convert {name} to raw"):
        bench.run_byre("convert", "-f", "raw", "-O", driver, *options, raw, image)
        bench.warm(image)
        bench.row(
            f"convert {name} to raw",
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
