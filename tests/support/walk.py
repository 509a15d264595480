"""A second opinion on qcow2 metadata: walks an image's bytes from the specification alone.

Shares no code with byre, so that a misreading there shows up here. Small images only: it counts every cluster.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import NamedTuple

OFFSET = 0x00FFFFFFFFFFFE00
COMPRESSED = 1 << 62
COPIED = 1 << 63


class Findings(NamedTuple):
    """:ivar damage: what breaks the image: references without a count, offsets that point nowhere
    :ivar copied: COPIED flags that disagree with the reference count
    :ivar leaks: clusters counted more often than they are referred to
    """

    damage: list[str]
    copied: list[str]
    leaks: list[str]


class _Image:
    def __init__(self, data: bytes) -> None:
        self.data = data
        fields = struct.unpack_from(">4sIQIIQIIQQIIQ", data)
        magic, self.version, _, _, self.bits, self.size, _, self.l1_size, self.l1_offset = fields[:9]
        self.table_offset, self.table_clusters, self.snapshot_count, self.snapshot_offset = fields[9:]
        assert magic == b"QFI\xfb"
        self.cluster = 1 << self.bits
        self.incompatible, self.order = 0, 4
        if self.version >= 3:
            self.incompatible = struct.unpack_from(">Q", data, 72)[0]
            self.order = struct.unpack_from(">I", data, 96)[0]
        self.has_data_file = bool(self.incompatible & 4)
        self.extended = bool(self.incompatible & 16)

    def words(self, offset: int, count: int) -> tuple[int, ...]:
        part = self.data[offset : offset + count * 8]
        return struct.unpack(f">{count}Q", part + bytes(count * 8 - len(part)))


class _Walk:
    def __init__(self, image: _Image) -> None:
        self.image = image
        self.references: Counter[int] = Counter()
        self.damage: list[str] = []
        #: (what, cluster, COPIED flag) of entries that carry one
        self.flagged: list[tuple[str, int, bool]] = []

    def refer(self, what: str, offset: int, length: int) -> None:
        image = self.image
        if not length:
            return
        if offset + length - len(image.data) >= image.cluster:
            self.damage.append(f"{what} at {offset:#x} lies behind the end of the file ({len(image.data):#x})")
        for cluster in range(offset >> image.bits, ((offset + length - 1) >> image.bits) + 1):
            self.references[cluster] += 1

    def aligned(self, what: str, offset: int) -> bool:
        if offset % self.image.cluster:
            self.damage.append(f"{what} at {offset:#x} is not aligned to a cluster")
            return False
        return True

    def refcounts(self) -> dict[int, int]:
        image = self.image
        per_block = image.cluster * 8 >> image.order
        counts: dict[int, int] = {}
        self.refer("refcount table", image.table_offset, image.table_clusters * image.cluster)
        table = image.words(image.table_offset, image.table_clusters * image.cluster // 8)
        for index, entry in enumerate(table):
            if not entry:
                continue
            if entry & 0x1FF or not self.aligned(f"refcount block {index}", entry):
                self.damage.append(f"refcount table entry {index} is {entry:#x}")
                continue
            self.refer(f"refcount block {index}", entry, image.cluster)
            block = image.data[entry : entry + image.cluster]
            for at, count in _counts(block, image.order):
                counts[index * per_block + at] = count
        return counts

    def tables(self) -> None:
        image = self.image
        self.refer("header", 0, image.cluster)
        self.l1("", image.l1_offset, image.l1_size, active=True)
        position = image.snapshot_offset
        for number in range(image.snapshot_count):
            position += -position % 8
            offset, size, id_size, name_size = struct.unpack_from(">QIHH", image.data, position)
            extra_size = struct.unpack_from(">I", image.data, position + 36)[0]
            position += 40 + extra_size + id_size + name_size
            self.l1(f"snapshot {number}: ", offset, size, active=False)
        if image.snapshot_count:
            self.refer("snapshot table", image.snapshot_offset, position - image.snapshot_offset)
        if struct.unpack_from(">I", image.data, 32)[0] == 2:
            self.encryption_header()

    def encryption_header(self) -> None:
        """Its place is in a header extension of type 0x0537be77: offset and length."""
        image = self.image
        position = struct.unpack_from(">I", image.data, 100)[0] if image.version >= 3 else 72
        while position < image.cluster:
            kind, length = struct.unpack_from(">II", image.data, position)
            if kind == 0x0537BE77:
                self.refer("encryption header", *struct.unpack_from(">QQ", image.data, position + 8))
            if not kind:
                break
            position += 8 + length + -length % 8

    def l1(self, owner: str, offset: int, size: int, *, active: bool) -> None:
        """An L1 table and what it refers to; COPIED flags mean something in the active one only."""
        image = self.image
        if not self.aligned(f"{owner}L1 table", offset):
            return
        self.refer(f"{owner}L1 table", offset, size * 8)
        for index, entry in enumerate(image.words(offset, size)):
            host = entry & OFFSET
            if not host:
                continue
            if not self.aligned(f"{owner}L2 table {index}", host):
                continue
            self.refer(f"{owner}L2 table {index}", host, image.cluster)
            if active:
                self.flagged.append((f"L1 entry {index}", host >> image.bits, bool(entry & COPIED)))
            self.table(f"{owner}{index}", host, active)

    def table(self, l1_index: str, host: int, active: bool) -> None:
        image = self.image
        step = 2 if image.extended else 1
        words = image.words(host, image.cluster // 8)
        for index in range(0, len(words), step):
            entry = words[index]
            if not entry and not (image.extended and words[index + 1]):
                continue
            name = f"L2 entry {l1_index}/{index // step}"
            if entry & COMPRESSED:
                shift = 62 - (image.bits - 8)
                start = entry & ((1 << shift) - 1)
                sectors = (entry >> shift & ((1 << (image.bits - 8)) - 1)) + 1
                self.refer(name, start, sectors * 512 - (start & 511))
                if entry & COPIED:
                    self.damage.append(f"{name} is compressed and says COPIED")
            elif entry & OFFSET and not image.has_data_file and self.aligned(name, entry & OFFSET):
                self.refer(name, entry & OFFSET, image.cluster)
                if active:
                    self.flagged.append((name, (entry & OFFSET) >> image.bits, bool(entry & COPIED)))
            if image.extended and not entry & COMPRESSED and words[index + 1] & words[index + 1] >> 32 & 0xFFFFFFFF:
                self.damage.append(f"{name} has subclusters both allocated and zero")


def _counts(block: bytes, order: int) -> list[tuple[int, int]]:
    """(index, count) of the counts in ``block`` that are not 0."""
    used = len(block.rstrip(b"\0"))
    if order >= 3:
        width = 1 << (order - 3)
        code = {1: "B", 2: "H", 4: "I", 8: "Q"}[width]
        count = -(-used // width)
        return [(at, value) for at, value in enumerate(struct.unpack_from(f">{count}{code}", block)) if value]
    width = 1 << order
    found = []
    for at, byte in enumerate(block[:used]):
        for shift in range(0, 8, width):
            count = byte >> shift & ((1 << width) - 1)
            if count:
                found.append(((at * 8 + shift) // width, count))
    return found


def walk(data: bytes) -> Findings:
    """What is wrong with the qcow2 image in ``data``; bitmaps are left out."""
    image = _Image(data)
    work = _Walk(image)
    counts = work.refcounts()
    work.tables()
    leaks = []
    for cluster in sorted(set(counts) | set(work.references)):
        count, wanted = counts.get(cluster, 0), work.references[cluster]
        if count < wanted:
            work.damage.append(f"cluster {cluster} is counted {count} times and referred to {wanted} times")
        elif count > wanted:
            leaks.append(f"cluster {cluster} is counted {count} times and referred to {wanted} times")
    copied = [
        f"{what} says COPIED={flag}, cluster {cluster} is counted {counts.get(cluster, 0)} times"
        for what, cluster, flag in work.flagged
        if flag != (counts.get(cluster, 0) == 1)
    ]
    return Findings(work.damage, copied, leaks)
