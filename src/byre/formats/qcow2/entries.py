"""qcow2 table entries, one at a time: L1, L2, compressed, extended L2 and reference counts.

Entries are host-order integers; refcount blocks are bytes as on disk. Knows no table and does no I/O. Whole tables
at once are in :mod:`.entries_bulk`, which loads numpy; this module does not.
"""

from __future__ import annotations

from ...errors import Corrupt
from ...io.extent import COMPRESSED as KIND_COMPRESSED
from ...io.extent import DATA, NO_HOST, UNALLOCATED
from ...io.extent import ZERO as KIND_ZERO
from ...typing import Final

__all__ = [
    "ALL_ALLOCATED",
    "ALL_ZERO",
    "COMPRESSED",
    "COPIED",
    "L1_RESERVED",
    "L2_RESERVED",
    "MAX_HOST_OFFSET",
    "OFFSET_MASK",
    "REFCOUNT_OFFSET_MASK",
    "REFCOUNT_RESERVED",
    "SUBCLUSTERS",
    "ZERO",
    "alloc_bits",
    "check_subclusters",
    "classify",
    "classify_subcluster",
    "compressed_entry",
    "compressed_fits",
    "compressed_host",
    "get_refcount",
    "l2_table_offset",
    "set_refcount",
    "subcluster_run",
    "zero_bits",
]

OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9 to 55 of an L1 or standard L2 entry: a host offset."""
REFCOUNT_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
"""Bits 9 to 63 of a refcount table entry: a host offset."""
REFCOUNT_RESERVED: Final = 0x1FF
COPIED: Final = 1 << 63
"""The refcount is exactly 1."""
COMPRESSED: Final = 1 << 62
ZERO: Final = 1
"""The cluster reads as zeroes (version 3, without extended L2 entries)."""
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
"""Reserved bits of a standard L2 entry."""
MAX_HOST_OFFSET: Final = (1 << 56) - 1

SUBCLUSTERS: Final = 32
ALL_ALLOCATED: Final = 0x0000_0000_FFFF_FFFF
ALL_ZERO: Final = 0xFFFF_FFFF_0000_0000


# -- standard entries -----------------------------------------------------------------------------


def l2_table_offset(entry: int, cluster_bits: int) -> int:
    """The host offset of the L2 table an L1 entry points to, 0 if there is none.

    :raises Corrupt: it is not aligned to a cluster
    """
    host = entry & OFFSET_MASK
    if host & ((1 << cluster_bits) - 1):
        raise Corrupt(f"L1 entry {entry:#018x} points to {host:#x}, which is not aligned to a cluster")
    return host


def classify(entry: int, cluster_bits: int, version: int = 3, *, data_file: bool = False) -> tuple[int, int]:
    """(kind, host) of a standard or compressed entry without subclusters.

    The kinds are those of :mod:`byre.io.extent`. The host of a compressed entry is its descriptor, for
    :func:`compressed_host`; the host of a zero or unallocated one is ``NO_HOST`` unless space is allocated.

    :param data_file: guest data lies in an external data file, where offset 0 is a valid host
    :raises Corrupt: the entry breaks the specification
    """
    if entry & COMPRESSED:
        if data_file:
            raise Corrupt(f"L2 entry {entry:#018x} is compressed, which an image with an external data file cannot be")
        return KIND_COMPRESSED, entry & (COMPRESSED - 1)
    host = entry & OFFSET_MASK
    if host & ((1 << cluster_bits) - 1):
        raise Corrupt(f"L2 entry {entry:#018x} points to {host:#x}, which is not aligned to a cluster")
    if entry & ZERO:
        if version < 3:
            raise Corrupt(f"L2 entry {entry:#018x} has the zero bit, which version 2 does not know")
        return KIND_ZERO, host if host or (data_file and entry & COPIED) else NO_HOST
    if host or (data_file and entry & COPIED):
        return DATA, host
    return UNALLOCATED, NO_HOST


# -- extended L2 entries --------------------------------------------------------------------------


def alloc_bits(first: int, end: int) -> int:
    """Allocation bits of subclusters ``[first, end)``."""
    return (1 << end) - (1 << first)


def zero_bits(first: int, end: int) -> int:
    """Reads-as-zeroes bits of subclusters ``[first, end)``."""
    return alloc_bits(first, end) << 32


def check_subclusters(entry: int, bitmap: int, cluster_bits: int, *, data_file: bool = False) -> None:
    """Check an extended entry that is not compressed.

    :raises Corrupt: a subcluster is both allocated and zero, or allocated without a host cluster; or the host
        offset is not aligned
    """
    host = entry & OFFSET_MASK
    if host & ((1 << cluster_bits) - 1):
        raise Corrupt(f"L2 entry {entry:#018x} points to {host:#x}, which is not aligned to a cluster")
    if bitmap & (bitmap >> 32) & ALL_ALLOCATED:
        raise Corrupt(f"L2 entry {entry:#018x} has subclusters both allocated and zero (bitmap {bitmap:#018x})")
    if bitmap & ALL_ALLOCATED and not host and not (data_file and entry & COPIED):
        raise Corrupt(f"L2 entry {entry:#018x} has allocated subclusters but no host cluster (bitmap {bitmap:#018x})")


def classify_subcluster(
    entry: int, bitmap: int, index: int, cluster_bits: int, *, data_file: bool = False
) -> tuple[int, int]:
    """(kind, host of the subcluster) of subcluster ``index``; compressed as in :func:`classify`.

    :raises Corrupt: as :func:`check_subclusters`
    """
    if entry & COMPRESSED:
        return classify(entry, cluster_bits, data_file=data_file)
    check_subclusters(entry, bitmap, cluster_bits, data_file=data_file)
    host = entry & OFFSET_MASK
    known = bool(host) or (data_file and bool(entry & COPIED))
    here = host + (index << (cluster_bits - 5)) if known else NO_HOST
    if bitmap >> index & 1:
        return DATA, here
    if bitmap >> (index + 32) & 1:
        return KIND_ZERO, here
    return UNALLOCATED, NO_HOST


def subcluster_run(bitmap: int, index: int) -> int:
    """How many subclusters from ``index`` on share its state (allocated, zero or neither)."""
    allocated, zero = bitmap >> index & 1, bitmap >> (index + 32) & 1
    # A set bit marks a subcluster that differs from the first one.
    differs = (bitmap & ALL_ALLOCATED if not allocated else ~bitmap & ALL_ALLOCATED) | (
        bitmap >> 32 if not zero else ~(bitmap >> 32) & ALL_ALLOCATED
    )
    differs = (differs >> index) | 1 << (SUBCLUSTERS - index)
    return (differs & -differs).bit_length() - 1


# -- compressed entries ---------------------------------------------------------------------------


def compressed_host(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, stored length) of a compressed entry or its descriptor.

    The length is an upper bound: it reaches to the end of the last 512-byte sector used. With small clusters the
    offset may exceed ``MAX_HOST_OFFSET``; such an entry points past the end of any file.
    """
    shift = 62 - (cluster_bits - 8)
    host = entry & ((1 << shift) - 1)
    sectors = (entry >> shift & ((1 << (cluster_bits - 8)) - 1)) + 1
    return host, sectors * 512 - (host & 511)


def compressed_fits(host: int, length: int, cluster_bits: int) -> bool:
    """Whether a compressed entry can describe ``length`` bytes at ``host``."""
    end = host + length
    limit = min(1 << (62 - (cluster_bits - 8)), 1 << 56)
    return end <= limit and (end - 1 >> 9) - (host >> 9) < 1 << (cluster_bits - 8)


def compressed_entry(host: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of ``length`` compressed bytes at host offset ``host``; :func:`compressed_fits` must hold."""
    if length <= 0 or not compressed_fits(host, length, cluster_bits):
        raise ValueError(f"no compressed entry for {length} bytes at {host:#x}, clusters of {1 << cluster_bits}")
    additional = (host + length - 1 >> 9) - (host >> 9)
    return COMPRESSED | additional << (62 - (cluster_bits - 8)) | host


# -- reference counts -----------------------------------------------------------------------------


def get_refcount(block: bytes | bytearray | memoryview, index: int, order: int) -> int:
    """Entry ``index`` of a refcount block whose entries are ``1 << order`` bits wide."""
    if order >= 3:
        width = 1 << (order - 3)
        return int.from_bytes(block[index * width : (index + 1) * width], "big")
    per_byte_bits = 3 - order
    shift = (index & ((1 << per_byte_bits) - 1)) << order
    return block[index >> per_byte_bits] >> shift & ((1 << (1 << order)) - 1)


def set_refcount(block: bytearray | memoryview, index: int, order: int, value: int) -> None:
    """Change entry ``index``; ``value`` must fit in ``1 << order`` bits (``OverflowError`` otherwise)."""
    if value < 0 or value >> (1 << order):
        raise OverflowError(f"refcount {value} does not fit in {1 << order} bits")
    if order >= 3:
        width = 1 << (order - 3)
        block[index * width : (index + 1) * width] = value.to_bytes(width, "big")
        return
    per_byte_bits = 3 - order
    shift = (index & ((1 << per_byte_bits) - 1)) << order
    mask = ((1 << (1 << order)) - 1) << shift
    at = index >> per_byte_bits
    block[at] = block[at] & ~mask & 0xFF | value << shift
