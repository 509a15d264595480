"""Images to measure with, made in seconds: run as a program, so that the process that measures stays small.

    python benchmarks/images.py mixed PATH SIZE         raw: half data, a quarter zeroes, a quarter holes
    python benchmarks/images.py full PATH SIZE          qcow2: every cluster mapped, none written
    python benchmarks/images.py scattered PATH COUNT    qcow2: COUNT clusters, each apart from its neighbours

The qcow2 files are written from the specification (docs/interop/qcow2 of QEMU), not by the programs under test.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import parse_size

MIB = 1 << 20
COPIED = 1 << 63


# -- raw ------------------------------------------------------------------------------------------


def real_bytes(limit: int) -> bytes:
    """Up to ``limit`` bytes of real files: Python sources, shared libraries, documents found on this machine.

    A disk holds such things, so compression ratios and speeds come out as they do for users.
    """
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/lib", "/usr/share", "/usr/bin"]
    parts: list[bytes] = []
    total = 0
    # Some of each folder: sources alone would compress too well, libraries alone too badly.
    share = limit // len(folders)
    for folder in folders:
        taken = 0
        for path in _files(folder):
            try:
                data = path.read_bytes()[: 4 * MIB]
            except OSError:
                continue
            parts.append(data)
            taken += len(data)
            if taken >= share:
                break
        total += taken
    if not total:
        raise SystemExit("no real files found to fill the image with")
    return b"".join(parts)[:limit]


def _files(folder: str) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                yield path


def make_mixed(path: str, size: int) -> None:
    """A raw disk in runs of 64 KiB to 4 MiB: data that compresses like files do, random data, zeroes, holes.

    Three eighths real files, one eighth random bytes, a quarter written zeroes, a quarter holes.
    """
    chance = random.Random(7)
    pool = real_bytes(min(256 * MIB, max(16 * MIB, size // 4)))
    view = memoryview(pool)
    zeroes = bytes(4 * MIB)
    with open(path, "wb") as file:
        file.truncate(size)
        offset = 0
        while offset < size:
            length = min(chance.randrange(1, 65) << 16, size - offset)
            what = chance.randrange(8)
            file.seek(offset)
            if what < 3:
                at = chance.randrange(max(1, len(pool) - length) >> 9) << 9
                file.write(view[at : at + length])
            elif what == 3:
                file.write(chance.randbytes(length))
            elif what < 6:
                file.write(zeroes[:length])
            offset += length


# -- qcow2 ----------------------------------------------------------------------------------------


class Layout:
    """Where the parts of a version 3 image with ``data_count`` data clusters lie; all values in clusters."""

    def __init__(self, data_count: int, cluster_bits: int) -> None:
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        self.data_count = data_count
        self.l2_entries = self.cluster_size // 8
        self.l2_count = -(-data_count // self.l2_entries)
        self.l1_clusters = -(-self.l2_count * 8 // self.cluster_size)
        block_entries = self.cluster_size // 2
        without_refcounts = 1 + self.l1_clusters + self.l2_count + data_count
        self.block_count = self.table_clusters = 0
        while True:  # refcount blocks count themselves
            total = without_refcounts + self.block_count + self.table_clusters
            blocks = -(-total // block_entries)
            table = -(-blocks * 8 // self.cluster_size)
            if (blocks, table) == (self.block_count, self.table_clusters):
                break
            self.block_count, self.table_clusters = blocks, table
        self.total = total
        self.l1_at = 1
        self.table_at = self.l1_at + self.l1_clusters
        self.block_at = self.table_at + self.table_clusters
        self.rest_at = self.block_at + self.block_count

    def write(self, path: str, l2_hosts: np.ndarray, data_hosts: np.ndarray, *, allocate: bool = False) -> None:
        """Write the image.

        :param l2_hosts: host cluster of each L2 table
        :param data_hosts: host cluster of each guest cluster
        :param allocate: reserve the space on disk, so that the clusters are not holes of a sparse file
        """
        size = self.cluster_size
        with open(path, "wb") as file:
            file.truncate(self.total * size)
            if allocate:
                os.posix_fallocate(file.fileno(), 0, self.total * size)
            file.write(
                struct.pack(
                    ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, self.cluster_bits, self.data_count * size, 0,
                    self.l2_count, self.l1_at * size, self.table_at * size, self.table_clusters, 0, 0, 0, 0, 0, 4, 104,
                )
            )  # fmt: skip
            file.seek(self.l1_at * size)
            file.write(self._entries(l2_hosts, COPIED))
            file.seek(self.table_at * size)
            file.write(self._entries(self.block_at + np.arange(self.block_count), 0))
            refcounts = np.zeros(self.block_count * (size // 2), ">u2")
            refcounts[: self.total] = 1
            file.seek(self.block_at * size)
            file.write(refcounts.tobytes())
            for index, host in enumerate(l2_hosts.tolist()):
                part = data_hosts[index * self.l2_entries : (index + 1) * self.l2_entries]
                file.seek(host * size)
                file.write(self._entries(part, COPIED))

    def _entries(self, hosts: np.ndarray, flags: int) -> bytes:
        values = hosts.astype(np.uint64) * np.uint64(self.cluster_size) | np.uint64(flags)
        return values.astype(">u8").tobytes()


def make_full(path: str, size: int, cluster_bits: int = 16) -> None:
    """Every guest cluster mapped and none written, as ``preallocation=metadata`` makes it."""
    layout = Layout(size >> cluster_bits, cluster_bits)
    # Each L2 table stands in front of the clusters it maps.
    step = layout.l2_entries + 1
    l2_hosts = layout.rest_at + np.arange(layout.l2_count) * step
    guest = np.arange(layout.data_count)
    layout.write(path, l2_hosts, layout.rest_at + guest + guest // layout.l2_entries + 1)


def make_scattered(path: str, count: int, cluster_bits: int = 16, *, allocate: bool = False) -> None:
    """Consecutive guest clusters at shuffled host offsets: as many extents as clusters."""
    layout = Layout(count, cluster_bits)
    l2_hosts = layout.rest_at + np.arange(layout.l2_count)
    shuffled = np.random.default_rng(7).permutation(count)
    layout.write(path, l2_hosts, layout.rest_at + layout.l2_count + shuffled, allocate=allocate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("mixed", "full", "scattered"))
    parser.add_argument("path")
    parser.add_argument("size", help="size, or count of clusters, suffixes allowed")
    parser.add_argument("--cluster-bits", type=int, default=16)
    parser.add_argument("--allocate", action="store_true", help="scattered: reserve the space on disk")
    given = parser.parse_args()
    size = parse_size(given.size)
    if given.kind == "mixed":
        make_mixed(given.path, size)
    elif given.kind == "full":
        make_full(given.path, size, given.cluster_bits)
    else:
        make_scattered(given.path, size, given.cluster_bits, allocate=given.allocate)


if __name__ == "__main__":
    sys.exit(main())
