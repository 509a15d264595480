"""How large the disk is and where its parts lie, so that the number of clusters makes the wanted kind of FAT."""

from __future__ import annotations

import struct

from ...errors import InvalidArgument
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ...units import SECTOR

if TYPE_CHECKING:
    from .tree import Entry

__all__ = ["Shape"]

HEADS: Final = 16
SECTORS_PER_TRACK: Final = 63
FIRST_SECTOR: Final = 63
"""Where the partition of a hard disk begins."""
MAX_CLUSTERS: Final = 1 << 24
"""The table is in memory, at most 64 MiB."""
FAT12_LIMIT: Final = 4085
FAT16_LIMIT: Final = 65525


class Shape(NamedTuple):
    """Sizes in sectors of 512 bytes, unless said otherwise.

    :ivar bits: 12, 16 or 32
    :ivar start: where the file system begins on the disk
    :ivar total: of the file system
    :ivar reserved: in front of the first table
    :ivar fat_sectors: of one of the two tables
    :ivar root_entries: of the root folder, where it has a place of its own; else 0
    :ivar per_cluster: in a cluster
    :ivar cluster_count: of the file system; the first one has number 2
    """

    bits: int
    floppy: bool
    start: int
    total: int
    reserved: int
    fat_sectors: int
    root_entries: int
    per_cluster: int
    cluster_count: int

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.per_cluster * SECTOR

    @property
    def root_at(self) -> int:
        """Sector on the disk where the root folder's own place begins."""
        return self.start + self.reserved + 2 * self.fat_sectors

    @property
    def data_at(self) -> int:
        """Sector on the disk where cluster 2 begins."""
        return self.root_at + self.root_entries * 32 // SECTOR

    @property
    def disk_size(self) -> int:
        """Bytes."""
        return (self.start + self.total) * SECTOR

    @classmethod
    def fit(cls, root: Entry, bits: int, *, floppy: bool, where: str) -> Shape:
        """The smallest of the usual sizes that ``root`` fits into.

        :raises InvalidArgument: it fits into none
        """
        for shape in _floppies() if floppy else _hard_disks(bits, root):
            needed = _clusters_needed(root, shape)
            if needed <= shape.cluster_count and (
                not shape.root_entries or root.bytes_of_folder(root=True) <= shape.root_entries * 32
            ):
                return shape
        kind = "a floppy disk" if floppy else f"a disk with FAT{bits}"
        raise InvalidArgument(f"the folder does not fit onto {kind}", where=where,
                              hint="" if bits == 32 else "use fat-type=32 without floppy")  # fmt: skip


def _clusters_needed(root: Entry, shape: Shape) -> int:
    size = shape.cluster_size
    total = 0
    for entry in root.walk():
        if entry is root and shape.root_entries:
            continue
        length = entry.bytes_of_folder(root=entry is root) if entry.is_folder else entry.size
        total += max(-(-length // size), 1 if entry.is_folder else 0)
    return total


def _shape(bits: int, start: int, total: int, per_cluster: int, root_entries: int, *, floppy: bool = False) -> Shape:
    """With tables as large as the clusters need that they leave."""
    reserved = 32 if bits == 32 else 1
    root_sectors = root_entries * 32 // SECTOR
    fat, clusters = 1, 0
    while True:
        clusters = (total - reserved - 2 * fat - root_sectors) // per_cluster
        needed = -(-(clusters + 2) * bits // 8 // SECTOR) if bits != 12 else -(-((clusters + 2) * 3 + 1) // 2 // SECTOR)
        if needed <= fat:
            break
        fat = needed
    return Shape(bits, floppy, start, total, reserved, fat, root_entries, per_cluster, clusters)


def _floppies() -> list[Shape]:
    return [_shape(12, 0, 2880, 1, 224, floppy=True), _shape(12, 0, 5760, 2, 240, floppy=True)]


def _hard_disks(bits: int, root: Entry) -> list[Shape]:
    track = HEADS * SECTORS_PER_TRACK
    if bits == 12:
        shapes = [
            _shape(12, FIRST_SECTOR, 64 * track * factor - FIRST_SECTOR, 16 * factor, 512) for factor in (1, 2, 4)
        ]
    elif bits == 16:
        shapes = [
            _shape(16, FIRST_SECTOR, 1024 * track * factor - FIRST_SECTOR, 16 * factor, 512) for factor in (1, 2, 4)
        ]
    else:
        shapes = []
        for per_cluster in (8, 16, 32, 64):
            # Small clusters first, as far as their number is not too large.
            probe = _shape(32, FIRST_SECTOR, 1024 * track, per_cluster, 0)
            clusters = max(_clusters_needed(root, probe) * 9 // 8, 1024 * track // per_cluster, FAT16_LIMIT + 1000)
            total = -(-clusters * (per_cluster * SECTOR + 8) // SECTOR // track) * track + track - FIRST_SECTOR
            if total + FIRST_SECTOR < 1 << 32:
                shapes.append(_shape(32, FIRST_SECTOR, total, per_cluster, 0))
    allowed = {12: FAT12_LIMIT, 16: FAT16_LIMIT, 32: MAX_CLUSTERS}[bits]
    return [shape for shape in shapes if shape.cluster_count < allowed]


# -- sectors --------------------------------------------------------------------------------------


def partition_table(shape: Shape) -> bytes:
    """The first sector of a hard disk."""
    kind = {12: 0x01, 16: 0x06, 32: 0x0C}[shape.bits]
    last = shape.start + shape.total - 1
    entry = struct.pack("<B3sB3sII", 0x80, _chs(shape.start), kind, _chs(last), shape.start, shape.total)
    return bytes(440) + b"\xbe\xef\xca\xfe" + bytes(2) + entry + bytes(48) + b"\x55\xaa"


def _chs(sector: int) -> bytes:
    cylinder, rest = divmod(sector, HEADS * SECTORS_PER_TRACK)
    if cylinder > 1023:
        return b"\xfe\xff\xff"
    head, number = divmod(rest, SECTORS_PER_TRACK)
    return bytes((head, number + 1 | cylinder >> 8 << 6, cylinder & 0xFF))


def boot_sector(shape: Shape, label: bytes, root_cluster: int) -> bytes:
    """The first sector of the file system.

    :param label: 11 bytes
    """
    small = shape.total < 1 << 16
    media = 0xF0 if shape.floppy else 0xF8
    track, heads = (18 if shape.total == 2880 else 36, 2) if shape.floppy else (SECTORS_PER_TRACK, HEADS)
    data = struct.pack(
        "<3s8sHBHBHHBHHHII", b"\xeb\x3e\x90", b"MSWIN4.1", SECTOR, shape.per_cluster, shape.reserved, 2,
        shape.root_entries, shape.total if small else 0, media, shape.fat_sectors if shape.bits != 32 else 0, track,
        heads, shape.start, 0 if small else shape.total,
    )  # fmt: skip
    drive = 0 if shape.floppy else 0x80
    kind = f"FAT{shape.bits}".ljust(8).encode()
    if shape.bits == 32:
        data += struct.pack("<IHHIHH12x", shape.fat_sectors, 0, 0, root_cluster, 1, 6)
    data += struct.pack("<BBBI11s8s", drive, 0, 0x29, 0xFABE1AFD, label, kind)
    return data.ljust(510, b"\0") + b"\x55\xaa"


def information_sector(shape: Shape, used: int) -> bytes:
    """FAT32's count of free clusters."""
    free = shape.cluster_count - used
    data = struct.pack("<I480xIII", 0x41615252, 0x61417272, free, used + 2)
    return data.ljust(508, b"\0") + b"\0\0\x55\xaa"
