"""The format extension of Parallels images: dirty bitmaps (specification, "Format Extension"). Read only.

One cluster with a checksum holds the features; the bits of a bitmap lie in clusters of their own.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ...bitmaps.bitmap import Bitmap, check_granularity
from ...bitmaps.tracking import attach, detach
from ...errors import AlreadyExists, ImageError, InvalidArgument, NotFound, NotSupported
from ...units import SECTOR, align_up
from ..opening import read_exactly

if TYPE_CHECKING:
    from .image import ParallelsNode

__all__ = ["StoredBitmap", "StoredBitmaps", "decode_extension", "read_extension"]

MAGIC: Final = 0xAB234CEF23DCEA87
END: Final = 0
DIRTY_BITMAP: Final = 0x20385FAE252CB34A
NECESSARY: Final = 1
MAX_EXTENSION: Final = 64 << 20
"""Bytes: the extension takes one cluster, and is read at once."""
MAX_BITS: Final = 256 << 20
"""Bytes of all bitmaps together."""
MAX_BITMAPS: Final = 4096
MAX_ENTRIES: Final = MAX_BITS // SECTOR
"""Of the tables of all bitmaps together."""

_HEADING: Final = struct.Struct("<Q16s")
_FEATURE: Final = struct.Struct("<QQII")
_BITMAP: Final = struct.Struct("<Q16sII")


class StoredBitmap(NamedTuple):
    """One dirty bitmap.

    :ivar sectors: of the disk it belongs to
    :ivar id: 16 bytes, its name
    :ivar granularity: bytes
    :ivar table: per cluster of bits: 0 (all clean), 1 (all dirty) or the sector where it lies
    """

    sectors: int
    id: bytes
    granularity: int
    table: tuple[int, ...]

    @property
    def name(self) -> str:
        text = self.id.hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def decode_extension(data: bytes | bytearray | memoryview) -> tuple[StoredBitmap, ...]:
    """The bitmaps that an extension cluster describes.

    :raises ImageError: the checksum is wrong, a feature breaks the format, or is unknown and necessary
    """
    if len(data) < _HEADING.size:
        raise ImageError("the format extension is cut short")
    magic, checksum = _HEADING.unpack_from(data)
    if magic != MAGIC:
        raise ImageError(f"the format extension begins with {magic:#x}, expected {MAGIC:#x}")
    if hashlib.md5(memoryview(data)[_HEADING.size :], usedforsecurity=False).digest() != checksum:
        raise ImageError("the checksum of the format extension is wrong")
    found: list[StoredBitmap] = []
    at, entries = _HEADING.size, 0
    while True:
        if at + _FEATURE.size > len(data):
            raise ImageError(f"the format extension has no end: the feature at {at:#x} does not fit into it")
        kind, flags, size, _ = _FEATURE.unpack_from(data, at)
        at += _FEATURE.size
        if kind == END:
            return tuple(found)
        if size > len(data) - at:
            raise ImageError(f"feature {kind:#x} of the format extension has {size} bytes, more than are left")
        if kind == DIRTY_BITMAP:
            found.append(decode_bitmap(memoryview(data)[at : at + size]))
            entries += len(found[-1].table)
            if len(found) > MAX_BITMAPS or entries > MAX_ENTRIES:
                raise ImageError(f"the format extension has {len(found)} dirty bitmaps with tables of {entries} "
                                 f"entries, allowed are {MAX_BITMAPS} and {MAX_ENTRIES}")  # fmt: skip
        elif flags & NECESSARY:
            raise ImageError(f"the format extension has the unknown feature {kind:#x}, which is necessary",
                             errno=NotSupported.default_errno)  # fmt: skip
        at += align_up(size, 8)


def decode_bitmap(data: bytes | bytearray | memoryview) -> StoredBitmap:
    """The data of one dirty bitmap feature.

    :raises ImageError: it breaks the format
    """
    if len(data) < _BITMAP.size:
        raise ImageError(f"a dirty bitmap is described in {len(data)} bytes, expected at least {_BITMAP.size}")
    sectors, identity, granularity, entries = _BITMAP.unpack_from(data)
    if _BITMAP.size + 8 * entries > len(data):
        raise ImageError(f"the table of a dirty bitmap has {entries} entries, more than are there")
    if entries > MAX_ENTRIES:
        raise ImageError(f"the table of a dirty bitmap has {entries} entries, allowed are {MAX_ENTRIES}")
    try:
        check_granularity(granularity * SECTOR)
    except InvalidArgument as error:
        raise ImageError(error.message) from None
    table = struct.unpack_from(f"<{entries}Q", data, _BITMAP.size)
    return StoredBitmap(sectors, identity, granularity * SECTOR, table)


def read_extension(node: ParallelsNode) -> tuple[StoredBitmap, ...]:
    """The bitmaps of an image, none if it has no extension.

    :raises ImageError: it breaks the format or lies beyond the end of the file
    """
    header = node.header
    if not header.extension_sector:
        return ()
    try:
        if header.cluster_size > MAX_EXTENSION:
            raise ImageError(f"the format extension takes a cluster of {header.cluster_size} bytes, allowed are "
                             f"{MAX_EXTENSION}")  # fmt: skip
        data = read_exactly(node.file, header.extension_sector * SECTOR, header.cluster_size, "format extension")
        found = decode_extension(data)
        for stored in found:
            if stored.sectors != header.size // SECTOR:
                raise ImageError(f"dirty bitmap {stored.name} belongs to a disk of {stored.sectors} sectors, this one "
                                 f"has {header.size // SECTOR}")  # fmt: skip
        bits = sum(-(-header.size // stored.granularity) + 7 >> 3 for stored in found)
        if bits > MAX_BITS:
            raise ImageError(f"{len(found)} dirty bitmaps take {bits} bytes, allowed are {MAX_BITS}")
    except ImageError as error:
        error.where = error.where or node.filename
        raise
    return found


def load_bitmap(node: ParallelsNode, stored: StoredBitmap) -> Bitmap:
    """With its bits.

    :raises ImageError: they are not in the file, or the table has another length than it must have
    """
    bitmap = Bitmap(node.size, stored.granularity, stored.name, persistent=True, enabled=False)
    bitmap.read_only = True
    size = node.header.cluster_size
    if len(stored.table) != -(-bitmap.byte_length // size) or bitmap.byte_length > MAX_BITS:
        raise ImageError(f"the table of dirty bitmap {stored.name} has {len(stored.table)} entries of {size} bytes of "
                         f"bits, the disk needs {bitmap.byte_length}, allowed are {MAX_BITS}",
                         where=node.filename)  # fmt: skip
    for index, entry in enumerate(stored.table):
        length = min(size, bitmap.byte_length - index * size)
        if entry == 1:
            bitmap.load_ones(index * size * 8, min((index * size + length) * 8, bitmap.length))
        elif entry:
            data = read_exactly(node.file, entry * SECTOR, length, f"part of dirty bitmap {stored.name}")
            bitmap.load(index * size, data)
    return bitmap


class StoredBitmaps:
    """The bitmaps of an image: those of the extension while it is read-only, and others in memory only.

    Guarded by the node's lock.
    """

    def __init__(self, node: ParallelsNode) -> None:
        self._node = node
        self._stored = {stored.name: stored for stored in read_extension(node)} if node.read_only else {}
        self._loaded: dict[str, Bitmap] = {}

    @property
    def can_persist(self) -> bool:
        return bool(self._stored)

    def entries(self) -> list[tuple[str, int, bool]]:
        return [(stored.name, stored.granularity, False) for stored in self._stored.values()]

    def all(self) -> tuple[Bitmap, ...]:
        with self._node.lock:
            for name, stored in self._stored.items():
                if name not in self._loaded:
                    self._loaded[name] = load_bitmap(self._node, stored)
            return tuple(self._loaded.values())

    def find(self, name: str) -> Bitmap:
        for bitmap in self.all():
            if bitmap.name == name:
                return bitmap
        raise NotFound(f"there is no bitmap {name!r}", where=self._node.filename)

    def add(self, name: str, granularity: int = 0, *, persistent: bool = True, enabled: bool = True) -> Bitmap:
        if persistent:
            raise NotSupported("bitmaps are not stored in Parallels images, only read", where=self._node.filename)
        if any(bitmap.name == name for bitmap in self.all()):
            raise AlreadyExists(f"there is a bitmap {name!r} already", where=self._node.filename)
        bitmap = Bitmap(self._node.size, granularity or 65536, name, enabled=enabled)
        attach(self._node, bitmap)
        with self._node.lock:
            self._loaded[name] = bitmap
        return bitmap

    def remove(self, name: str) -> None:
        bitmap = self.find(name)
        if bitmap.persistent:
            raise NotSupported("bitmaps of Parallels images cannot be changed", where=self._node.filename)
        detach(self._node, bitmap)
        with self._node.lock:
            del self._loaded[name]
