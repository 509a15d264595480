"""The header of Parallels images and its limits (specification, "Header"). No I/O."""

from __future__ import annotations

import struct

from ...errors import ImageError, NotSupported
from ...typing import Final, NamedTuple
from ...units import SECTOR, align_up

__all__ = ["BAT_OFFSET", "CLOSED", "HEADER_SIZE", "IN_USE", "MAX_BAT", "Header", "decode_header", "encode_header",
           "is_descriptor"]  # fmt: skip

MAGIC_SECTORS: Final = b"WithoutFreeSpace"
MAGIC_CLUSTERS: Final = b"WithouFreSpacExt"
VERSION: Final = 2
IN_USE: Final = 0x746F6E59
CLOSED: Final = 0x312E3276
HEADER_SIZE: Final = 64
BAT_OFFSET: Final = 64
MAX_BAT: Final = 32 << 20
"""Bytes of the BAT."""
MAX_CLUSTER: Final = 1 << 30
MAX_SECTORS: Final = ((1 << 63) - 512) // SECTOR

_FORMAT: Final = struct.Struct("<16s5IQ3IQ")


class Header(NamedTuple):
    """The fields in their order on disk.

    :ivar tracks: sectors of a cluster
    :ivar entries: of the BAT
    :ivar sectors: of the disk
    :ivar data_sector: where the data begin, in sectors; 0 (old magic only) for behind the BAT
    :ivar extension_sector: where the format extension lies, in sectors; 0 if there is none
    """

    magic: bytes = MAGIC_CLUSTERS
    version: int = VERSION
    heads: int = 16
    cylinders: int = 0
    tracks: int = 2048
    entries: int = 0
    sectors: int = 0
    in_use: int = CLOSED
    data_sector: int = 0
    flags: int = 0
    extension_sector: int = 0

    @property
    def cluster_size(self) -> int:
        return self.tracks * SECTOR

    @property
    def entry_unit(self) -> int:
        """Bytes that one unit of a BAT entry stands for."""
        return SECTOR if self.magic == MAGIC_SECTORS else self.cluster_size

    @property
    def size(self) -> int:
        """Of the disk, bytes. Images with the old magic have 32 bits of it."""
        return (self.sectors & 0xFFFFFFFF if self.magic == MAGIC_SECTORS else self.sectors) * SECTOR

    @property
    def bat_end(self) -> int:
        return BAT_OFFSET + 4 * self.entries

    def data_offset(self, file_size: int) -> tuple[int, bool]:
        """(where the data begin, bytes; whether the header says so rightly)."""
        least = align_up(self.bat_end, SECTOR)
        if self.magic == MAGIC_CLUSTERS:
            least = align_up(least, self.cluster_size)
        elif self.data_sector == 0:
            return least, True
        given = self.data_sector * SECTOR
        fits = least <= given <= align_up(file_size, SECTOR) and given % self.entry_unit == 0
        return (given, True) if fits else (least, False)


def is_descriptor(head: bytes | bytearray) -> bool:
    """Whether a file that begins like this is XML, the descriptor of a bundle."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<"


def encode_header(header: Header) -> bytes:
    """The inverse of :func:`decode_header`."""
    return _FORMAT.pack(*header)


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:raises ImageError: it breaks the format"""
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the file has {len(data)} bytes, a Parallels header takes {HEADER_SIZE}")
    header = Header._make(_FORMAT.unpack_from(data))
    if header.magic not in (MAGIC_SECTORS, MAGIC_CLUSTERS):
        raise ImageError(f"not a Parallels image: it begins with {header.magic!r}")
    if header.version != VERSION:
        raise ImageError(f"the image has version {header.version}, known is {VERSION}",
                         errno=NotSupported.default_errno)  # fmt: skip
    if not 0 < header.cluster_size <= MAX_CLUSTER:
        raise ImageError(f"a cluster has {header.tracks} sectors: expected 1 to {MAX_CLUSTER // SECTOR}")
    if 4 * header.entries > MAX_BAT:
        raise ImageError(f"the BAT takes {4 * header.entries} bytes, allowed are {MAX_BAT}")
    if header.size > min(MAX_SECTORS * SECTOR, header.entries * header.cluster_size):
        raise ImageError(f"the disk has {header.size // SECTOR} sectors, but the BAT has room for "
                         f"{header.entries * header.tracks}")  # fmt: skip
    if header.extension_sector > MAX_SECTORS:
        raise ImageError(f"the format extension lies at sector {header.extension_sector:#x}, behind any file's end")
    return header
