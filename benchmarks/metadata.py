"""Metadata: check, map and snapshots of a disk with every cluster mapped, and of one in a million pieces."""

from __future__ import annotations

from pathlib import Path

from harness import Bench, Goal, parse_arguments, parse_size

PIECES = 1 << 20


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=3, size="1T")
    with Bench("metadata", given) as bench:
        full(bench, given.size)
        scattered(bench)
        extents(bench)
        snapshots(bench, given.size)


def full(bench: Bench, size: int) -> None:
    """Guest clusters in order: long extents, the cost is in reading 128 MiB of tables for each TiB."""
    words = "1 TiB" if size == parse_size("1T") else f"{size >> 30} GiB"
    image = bench.make_image("full", "full.qcow2", size)
    bench.warm(image)
    bench.row(f"check, {words} full metadata", ["check", image], goal=Goal(0.6))
    bench.row(f"map json, {words} full metadata", ["map", "--output=json", image], goal=Goal(0.5))
    bench.row(f"map human, {words} full metadata", ["map", image], goal=Goal(0.5))
    # Each read meets another table; together the tables are larger than the cache.
    far = ["bench", "-f", "qcow2", "-d", "1", "-c", "20000", "-s", "4096", "-S", str((1 << 29) + 4096), image]
    bench.row(f"bench, 4 KiB reads all over {words}", far, goal=Goal(1))
    Path(image).unlink()


def scattered(bench: Bench) -> None:
    """Neighbours on the guest's side lie far apart in the file, which is sparse: 64 GiB long."""
    image = bench.make_image("scattered", "scattered.qcow2", PIECES)
    bench.warm(image)
    bench.row("check, a million scattered clusters", ["check", image], goal=Goal(0.05))
    bench.row("map json, a million extents, sparse file", ["map", "--output=json", image], goal=Goal(0.7))
    Path(image).unlink()


def extents(bench: Bench) -> None:
    """Smaller clusters, so that the file can really be allocated (4 GiB) and every extent is data."""
    image = bench.make_image("scattered", "extents.qcow2", PIECES, "--cluster-bits", "12", "--allocate")
    bench.warm(image)
    bench.row("map json, a million extents", ["map", "--output=json", image], goal=Goal(0.7))
    bench.row("map human, a million extents", ["map", image], goal=Goal(0.7))
    Path(image).unlink()


def snapshots(bench: Bench, size: int) -> None:
    """The counts and flags of every cluster change. Each run of the first row leaves a snapshot for the last."""
    words = "1 TiB" if size == parse_size("1T") else f"{size >> 30} GiB"
    image = bench.make_image("full", "snapshots.qcow2", size)
    bench.warm(image)
    bench.row(f"snapshot -c, {words} full metadata", ["snapshot", "-c", "s", image], goal=Goal(1))
    bench.row(f"snapshot -a, {words} full metadata", ["snapshot", "-a", "s", image], goal=Goal(1))
    bench.row(f"snapshot -d, {words} full metadata", ["snapshot", "-d", "s", image], goal=Goal(1))
    Path(image).unlink()


if __name__ == "__main__":
    main()
