"""bochs: growing disks of the Bochs emulator, versions 1 and 2, read-only.

Specification: Bochs, "Redolog and growing images" (development and user guides). A 512-byte header, a catalog of
32-bit extent numbers, then extents in the order in which they were first written: a bitmap with a bit for each
sector, and the sectors. All numbers are little-endian. Not supported: undoable and volatile disks (they are nothing
without the disk below, which they do not name).
"""

from __future__ import annotations

import struct
import sys
from array import array

from ..errors import ImageError, NotSupported
from ..io.extent import DATA, UNALLOCATED, Extent
from ..options import OptionSet
from ..typing import TYPE_CHECKING, Final, NamedTuple, cast
from ..units import SECTOR
from .opening import read_exactly, read_head
from .readonly import ReadOnlyFormat, open_read_only

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest

__all__ = ["CHILDREN", "HEADER_SIZE", "MAGIC", "OPTIONS", "BochsNode", "Header", "decode_header", "encode_header",
           "open_node"]  # fmt: skip

CHILDREN: Final = ("file",)
OPTIONS: Final = OptionSet()

MAGIC: Final = b"Bochs Virtual HD Image"
HEADER_SIZE: Final = 512
VERSION_1: Final = 0x10000
VERSION_2: Final = 0x20000

MAX_CATALOG: Final = 1 << 20
"""Entries; what the largest disk needs that Bochs can make, 8 TiB."""
MIN_EXTENT: Final = 512
MAX_EXTENT: Final = 8 << 20
NOT_ALLOCATED: Final = 0xFFFFFFFF

_BITMAPS_KEPT: Final = 256
"""Extents whose bitmaps stay in memory, of at most 2 KiB each."""


class Header(NamedTuple):
    """The header; sizes are bytes.

    :ivar header_size: where the catalog begins
    :ivar catalog_entries: how many extents the disk may have
    :ivar bitmap_size: of one extent's bitmap; whole sectors are stored
    :ivar extent_size: guest bytes of one extent
    """

    version: int
    header_size: int
    catalog_entries: int
    bitmap_size: int
    extent_size: int
    disk_size: int
    type: bytes = b"Redolog"
    subtype: bytes = b"Growing"

    @property
    def data_offset(self) -> int:
        """Where the first extent begins in the file."""
        return self.header_size + 4 * self.catalog_entries

    @property
    def bitmap_stored(self) -> int:
        return -(-self.bitmap_size // SECTOR) * SECTOR

    @property
    def extent_stored(self) -> int:
        """Bytes that one extent takes in the file, with its bitmap."""
        return self.bitmap_stored + self.extent_size


def _size_format(version: int) -> str:
    return "<Q" if version == VERSION_1 else "<4xQ"


def encode_header(header: Header) -> bytes:
    """The inverse of :func:`decode_header`."""
    data = struct.pack("<32s16s16s5I", MAGIC, header.type, header.subtype, header.version, header.header_size,
                       header.catalog_entries, header.bitmap_size, header.extent_size)  # fmt: skip
    return (data + struct.pack(_size_format(header.version), header.disk_size)).ljust(HEADER_SIZE, b"\0")


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """
    :raises ImageError: it breaks the format
    :raises NotSupported: another kind of disk, or another version
    """
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the file has {len(data)} bytes, a bochs header takes {HEADER_SIZE}")
    magic, kind, subtype, *numbers = struct.unpack_from("<32s16s16s5I", data)
    if magic.partition(b"\0")[0] != MAGIC:
        raise ImageError(f"not a bochs image: it begins with {bytes(magic[:22])!r}")
    version, header_size, catalog_entries, bitmap_size, extent_size = numbers
    kind, subtype = kind.partition(b"\0")[0], subtype.partition(b"\0")[0]
    if (kind, subtype) != (b"Redolog", b"Growing"):
        raise _unsupported(f"the disk is of kind {kind!r}, {subtype!r}; only growing disks can be read")
    if version not in (VERSION_1, VERSION_2):
        raise _unsupported(f"the header has version {version:#x}; versions {VERSION_1:#x} and {VERSION_2:#x} are known")
    disk_size = struct.unpack_from(_size_format(version), data, 84)[0]
    header = Header(version, header_size, catalog_entries, bitmap_size, extent_size, disk_size)
    _check(header)
    return header


def _unsupported(message: str) -> ImageError:
    # A decoder raises nothing but ImageError; errno says that it is not the bytes' fault.
    return ImageError(message, errno=NotSupported.default_errno)


def _check(header: Header) -> None:
    if header.catalog_entries > MAX_CATALOG:
        raise ImageError(f"the catalog has {header.catalog_entries} entries, allowed are {MAX_CATALOG}")
    size = header.extent_size
    if not MIN_EXTENT <= size <= MAX_EXTENT or size & (size - 1):
        raise ImageError(f"the extent size is {size}: expected a power of two from {MIN_EXTENT} to {MAX_EXTENT}")
    if not -(-size // SECTOR // 8) <= header.bitmap_size <= MAX_EXTENT:
        raise ImageError(f"the bitmap of {header.bitmap_size} bytes does not fit an extent of {size} bytes")
    if header.header_size < HEADER_SIZE:
        raise ImageError(f"the catalog begins at {header.header_size:#x}, inside the header")
    if header.disk_size > header.catalog_entries * size:
        raise ImageError(f"the disk size is {header.disk_size}, but the catalog has room for "
                         f"{header.catalog_entries * size} bytes")  # fmt: skip


def _run(bits: int, first: int) -> tuple[int, int]:
    """(kind of sector ``first``, how many from there are alike); 0 for all that follow."""
    rest = bits >> first
    if rest & 1:
        return DATA, (~rest & (rest + 1)).bit_length() - 1
    return UNALLOCATED, (rest & -rest).bit_length() - 1 if rest else 0


# -- the node -------------------------------------------------------------------------------------


def open_node(request: OpenRequest) -> BochsNode:
    """The node of an existing image; only the header is read.

    :raises ImageError: the header breaks the format
    :raises NotSupported: it is to be written
    """
    return cast("BochsNode", open_read_only(request, BochsNode.read))


class BochsNode(ReadOnlyFormat):
    """An open image. Guarded by ``lock``: the catalog and the bitmaps in memory."""

    driver = "bochs"

    def __init__(self, file: Node, header: Header, flags: OpenFlags) -> None:
        super().__init__(file, flags)
        self.header = header
        self.cluster_size = self.zero_unit = header.extent_size
        self._size = header.disk_size // SECTOR * SECTOR
        self._catalog: array[int] | None = None
        self._bitmaps: dict[int, int] = {}

    @classmethod
    def read(cls, file: Node, flags: OpenFlags) -> BochsNode:
        """:raises ImageError: the header breaks the format, or the file ends inside the catalog"""
        header = decode_header(read_head(file, HEADER_SIZE))
        if header.data_offset > file.size:
            raise ImageError(f"the catalog ends at {header.data_offset:#x}, past the end of the file ({file.size:#x})")
        return cls(file, header, flags)

    def _load_catalog(self) -> array[int]:
        data = read_exactly(self.file, self.header.header_size, 4 * self.header.catalog_entries, "catalog")
        catalog = array("I")
        catalog.frombytes(data)
        if sys.byteorder == "big":
            catalog.byteswap()
        self._catalog = catalog
        return catalog

    def _bitmap(self, host: int, index: int) -> int:
        """The bits of the extent whose bitmap lies at ``host``, sector 0 in the lowest."""
        bits = self._bitmaps.get(host)
        if bits is None:
            length = -(-self.header.extent_size // SECTOR // 8)
            bits = int.from_bytes(read_exactly(self.file, host, length, f"bitmap of extent {index}"), "little")
            if len(self._bitmaps) >= _BITMAPS_KEPT:
                del self._bitmaps[next(iter(self._bitmaps))]
            self._bitmaps[host] = bits
        return bits

    def lookup(self, offset: int, length: int) -> list[Extent]:
        header = self.header
        catalog = self._catalog if self._catalog is not None else self._load_catalog()
        index, within = divmod(offset, header.extent_size)
        if catalog[index] == NOT_ALLOCATED:
            return [Extent(offset, min(length, header.extent_size - within), UNALLOCATED)]
        host = header.data_offset + catalog[index] * header.extent_stored
        bits = self._bitmap(host, index)
        rows: list[Extent] = []
        end = min(within + length, header.extent_size)
        base, data = offset - within, host + header.bitmap_stored
        while within < end:
            kind, count = _run(bits, within // SECTOR)
            stop = min(end, (within // SECTOR + count) * SECTOR) if count else end
            rows.append(Extent(base + within, stop - within, kind, data + within if kind == DATA else -1))
            within = stop
        return rows
