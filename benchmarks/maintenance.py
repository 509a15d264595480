"""Maintenance: repairing, shrinking and amending a large disk, growing and making one with its space in advance."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from harness import Bench, Goal, parse_arguments, parse_size

CLUSTER = 1 << 16
BLOCK_ENTRIES = CLUSTER // 2  # reference counts of 16 bits in one block
TABLE_ENTRIES = CLUSTER // 8
LEAKS = 4096
COPIED = 0x80
TABLES = 8


def main() -> None:
    given = parse_arguments(__doc__ or "", pairs=3, size="1T")
    with Bench("maintenance", given) as bench:
        words = "1 TiB" if given.size == parse_size("1T") else f"{given.size >> 30} GiB"
        good, image = bench.make_image("full", "good.qcow2", given.size), bench.path("image.qcow2")
        bench.warm(good)

        def fresh(spoil: Callable[[str], None] | None = None) -> Callable[[], None]:
            def prepare() -> None:
                subprocess.run(["cp", "--sparse=always", good, image], check=True)
                if spoil is not None:
                    spoil(image)
                bench.warm(image)

            return prepare

        repairs(bench, image, words, fresh)
        bench.row(f"resize --shrink to 1 GiB, {words} full metadata", ["resize", "--shrink", image, "1G"], goal=Goal(1),
                  prepare=fresh())  # fmt: skip
        bench.row(f"amend -o refcount_bits=64, {words} full metadata", ["amend", "-o", "refcount_bits=64", image],
                  goal=Goal(1), prepare=fresh())  # fmt: skip
        for name in (good, image):
            Path(name).unlink(missing_ok=True)
        preallocation(bench, words, given.size)


def repairs(bench: Bench, image: str, words: str, fresh: Callable[..., Callable[[], None]]) -> None:
    for name, mode, spoil, goal in (
        (f"{LEAKS} leaks", "leaks", leak, Goal(1)),
        ("a lost refcount block", "all", lose_a_block, Goal(1)),
        (f"{TABLES * TABLE_ENTRIES} wrong flags", "all", clear_flags, Goal(1)),
    ):
        bench.row(f"check -r {mode}, {name}, {words} full metadata", ["check", "-r", mode, image], goal=goal,
                  prepare=fresh(spoil))  # fmt: skip


def preallocation(bench: Bench, words: str, size: int) -> None:
    """A disk of 1 GiB grows by 2 GiB; "metadata" alone is measured on a large one as well."""
    image = bench.path("small.qcow2")

    def small() -> None:
        Path(image).unlink(missing_ok=True)
        bench.run_byre("create", "-q", "-f", "qcow2", image, "1G")

    for mode in ("off", "metadata", "falloc", "full"):
        bench.row(f"resize +2G --preallocation={mode}", ["resize", f"--preallocation={mode}", image, "+2G"],
                  goal=Goal(1) if mode == "full" else None, prepare=small)  # fmt: skip
    bench.row(f"resize to {words} --preallocation=metadata", ["resize", "--preallocation=metadata", image, str(size)],
              goal=Goal(1), prepare=small)  # fmt: skip
    bench.row(f"create {words} -o preallocation=metadata",
              ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, str(size)], goal=Goal(1),
              outputs=[image])  # fmt: skip
    Path(image).unlink(missing_ok=True)


# -- damage ---------------------------------------------------------------------------------------


def number(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return int.from_bytes(os.pread(file.fileno(), 8, offset), "big")


def put(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), data, offset)


def block_of(path: str, cluster: int) -> int:
    """Where the refcount block that counts a cluster lies."""
    return number(path, number(path, 48) + cluster // BLOCK_ENTRIES * 8)


def leak(path: str) -> None:
    """Clusters behind the last one are counted as well."""
    last = os.stat(path).st_size // CLUSTER
    room = BLOCK_ENTRIES - last % BLOCK_ENTRIES
    put(path, block_of(path, last) + last % BLOCK_ENTRIES * 2, b"\0\1" * min(LEAKS, room))


def lose_a_block(path: str) -> None:
    """The counts of 2 GiB of clusters in the middle are 0."""
    cluster = os.stat(path).st_size // CLUSTER // 2
    put(path, block_of(path, cluster), bytes(CLUSTER))


def clear_flags(path: str) -> None:
    """The tables deny that their clusters have no other owner."""
    for table in range(TABLES):
        host = number(path, number(path, 40) + 8 * table) & 0x00FFFFFFFFFFFE00
        with open(path, "r+b") as file:
            words = bytearray(os.pread(file.fileno(), CLUSTER, host))
            words[::8] = bytes(byte & ~COPIED & 0xFF for byte in words[::8])
            os.pwrite(file.fileno(), words, host)


if __name__ == "__main__":
    main()
