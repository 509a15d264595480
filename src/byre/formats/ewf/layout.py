"""Structures of EWF as records; no I/O."""

from __future__ import annotations

import struct
import zlib

from ...errors import ImageError
from ...typing import Final, NamedTuple

__all__ = ["Section", "TableHead", "Volume", "decode_file_header", "decode_section", "decode_table_head",
           "decode_values", "decode_volume", "encode_file_header", "encode_section", "encode_table_head",
           "encode_volume"]  # fmt: skip

MAGIC: Final = b"EVF\x09\x0d\x0a\xff\x00"
LOGICAL_MAGIC: Final = b"LVF\x09\x0d\x0a\xff\x00"
VERSION_2_MAGICS: Final = (b"EVF2\x0d\x0a\x81\x00", b"LEF2\x0d\x0a\x81\x00")

FILE_HEADER_SIZE: Final = 13
SECTION_SIZE: Final = 76
VOLUME_SIZE: Final = 1052
SMART_VOLUME_SIZE: Final = 94
TABLE_HEAD_SIZE: Final = 24
COMPRESSED: Final = 1 << 31
MAX_CHUNK: Final = 64 << 20


def encode_file_header(segment: int) -> bytes:
    """The inverse of :func:`decode_file_header`."""
    return MAGIC + struct.pack("<BHH", 1, segment, 0)


def decode_file_header(data: bytes | bytearray | memoryview) -> int:
    """The number of the segment, counted from 1.

    :raises ImageError: it is no segment of an image that byre reads
    """
    raw = bytes(data[:8])
    if raw == LOGICAL_MAGIC:
        raise ImageError("this is logical evidence (L01), which holds files rather than a disk")
    if raw in VERSION_2_MAGICS:
        raise ImageError("this is an image of version 2 (Ex01), which is not supported")
    if len(data) < FILE_HEADER_SIZE or raw != MAGIC:
        raise ImageError(f"not an EWF segment: it begins with {raw!r}")
    start, segment, end = struct.unpack_from("<BHH", data, 8)
    if start != 1 or end or segment == 0:
        raise ImageError(f"the header of the segment holds the fields {start}, {segment}, {end}")
    return int(segment)


class Section(NamedTuple):
    """What stands before each section.

    :ivar next: where the next section begins in the file; its own place in the last one
    :ivar size: bytes, these 76 included; 0 where the writer did not say
    """

    type: str
    next: int
    size: int


def encode_section(section: Section) -> bytes:
    """The inverse of :func:`decode_section`."""
    data = struct.pack("<16sQQ40x", section.type.encode(), section.next, section.size)
    return data + struct.pack("<I", zlib.adler32(data))


def decode_section(data: bytes | bytearray | memoryview) -> Section:
    """:raises ImageError: wrong checksum, or a type that is no word"""
    if len(data) < SECTION_SIZE:
        raise ImageError(f"a section of {len(data)} bytes")
    _verify(data, SECTION_SIZE - 4, "section")
    kind, following, size = struct.unpack_from("<16sQQ", data)
    word = kind.partition(b"\0")[0]
    if not word.isalnum():
        raise ImageError(f"a section of the type {word!r}")
    return Section(word.decode(), following, size)


def _verify(data: bytes | bytearray | memoryview, length: int, what: str) -> None:
    (found,) = struct.unpack_from("<I", data, length)
    wanted = zlib.adler32(data[:length])
    if found != wanted:
        raise ImageError(f"the checksum of a {what} is {found:#010x}, computed {wanted:#010x}")


class Volume(NamedTuple):
    """What the image says of the disk.

    :ivar media_type: 0 removable, 1 fixed, 3 optical, 14 logical, 16 memory
    :ivar media_flags: 1 an image, 2 of a whole disk
    :ivar guid: of the set of segments
    """

    chunk_count: int
    sectors_per_chunk: int
    bytes_per_sector: int
    sector_count: int
    media_type: int = 1
    media_flags: int = 3
    compression: int = 0
    guid: bytes = bytes(16)

    @property
    def chunk_size(self) -> int:
        """Bytes."""
        return self.sectors_per_chunk * self.bytes_per_sector

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.sector_count * self.bytes_per_sector


_VOLUME = struct.Struct("<B3x3IQ12xB15xB11x16s")


def encode_volume(volume: Volume) -> bytes:
    """The inverse of :func:`decode_volume`, as EnCase writes it."""
    data = _VOLUME.pack(volume.media_type, *volume[:4], volume.media_flags, volume.compression, volume.guid)
    data = data.ljust(VOLUME_SIZE - 4, b"\0")
    return data + struct.pack("<I", zlib.adler32(data))


def decode_volume(data: bytes | bytearray | memoryview) -> Volume:
    """The data of a "volume" or "disk" section, EnCase's or the shorter one of SMART.

    :raises ImageError: numbers that make no disk
    """
    if len(data) >= VOLUME_SIZE:
        _verify(data, VOLUME_SIZE - 4, "volume")
        media, chunks, sectors, size, count, flags, compression, guid = _VOLUME.unpack_from(data)
        volume = Volume(chunks, sectors, size, count, media, flags, compression, guid)
    elif len(data) >= SMART_VOLUME_SIZE:
        _verify(data, SMART_VOLUME_SIZE - 4, "volume")
        chunks, sectors, size, count = struct.unpack_from("<4x4I", data)
        volume = Volume(chunks, sectors, size, count)
    else:
        raise ImageError(f"the description of the volume has {len(data)} bytes")
    if not volume.bytes_per_sector or volume.bytes_per_sector % 512 or not volume.sectors_per_chunk:
        raise ImageError(f"the volume has {volume.sectors_per_chunk} sectors of {volume.bytes_per_sector} bytes in a "
                         "chunk")  # fmt: skip
    if volume.chunk_size > MAX_CHUNK:
        raise ImageError(f"the chunk size is {volume.chunk_size}, allowed are {MAX_CHUNK}")
    if volume.size > volume.chunk_count * volume.chunk_size:
        raise ImageError(f"the volume has {volume.sector_count} sectors in {volume.chunk_count} chunks, which is too "
                         "few")  # fmt: skip
    return volume


class TableHead(NamedTuple):
    """The beginning of a table; ``base`` is added to its offsets."""

    entry_count: int
    base: int = 0


def encode_table_head(head: TableHead) -> bytes:
    """The inverse of :func:`decode_table_head`."""
    data = struct.pack("<I4xQ4x", *head)
    return data + struct.pack("<I", zlib.adler32(data))


def decode_table_head(data: bytes | bytearray | memoryview) -> TableHead:
    """:raises ImageError: wrong checksum or length"""
    if len(data) < TABLE_HEAD_SIZE:
        raise ImageError(f"a table of {len(data)} bytes")
    _verify(data, TABLE_HEAD_SIZE - 4, "table")
    head = TableHead(*struct.unpack_from("<I4xQ", data))
    if head.base >> 62:
        raise ImageError(f"the chunks of a table begin beyond every file, at {head.base:#x}")
    return head


_NAMES: Final = {
    "a": "description", "c": "case-number", "n": "evidence-number", "e": "examiner-name", "t": "notes",
    "md": "model", "sn": "serial-number", "av": "program-version", "ov": "platform", "m": "acquired",
    "u": "system-date",
}  # fmt: skip


def decode_values(data: bytes | bytearray | memoryview) -> dict[str, str]:
    """What the text of a "header" or "header2" section says of the case.

    :param data: the text, decompressed
    """
    raw = bytes(data)
    text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1", "replace")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    for index, line in enumerate(lines[:-2]):
        if line == "main":
            pairs = zip(lines[index + 1].split("\t"), lines[index + 2].split("\t"), strict=False)
            return {_NAMES[key]: value for key, value in pairs if key in _NAMES and value}
    return {}
