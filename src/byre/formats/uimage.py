"""uImage: legacy images of U-Boot, read-only; the payload is the disk.

Description: U-Boot, ``include/image.h`` ("legacy format image header") and the manual of ``mkimage``. A header of 64
bytes, then the data; a multi-file image begins its data with the lengths of its parts. All numbers are big-endian. A
compressed payload cannot be read from the middle: it is decoded whole when the image is opened, up to 64 MiB.
Options: ``part`` chooses one of several files, ``decompress=off`` shows the payload as it is stored.
"""

from __future__ import annotations

import struct

from ..errors import ImageError, InvalidArgument
from ..io.extent import COMPRESSED, DATA, Extent
from ..options import Option, OptionSet
from ..typing import TYPE_CHECKING, Final, NamedTuple
from .opening import read_exactly, read_head
from .readonly import ReadOnlyFormat, open_read_only

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest

__all__ = ["CHILDREN", "OPTIONS", "Header", "UImageNode", "decode_header", "decode_parts", "encode_header", "open_node"]

CHILDREN: Final = ("file",)
OPTIONS: Final = OptionSet(
    Option("part", "int", "Which file of a multi-file image is shown, counted from 0", 0),
    Option("decompress", "bool", "Show the payload decompressed", True),
)

MAGIC: Final = 0x27051956
HEADER_SIZE: Final = 64
MAX_PARTS: Final = 1024
MAX_DECODED: Final = 64 << 20
"""Bytes of a decoded payload, which is kept in memory."""
_STEP: Final = 1 << 18

MULTI: Final = 4
COMPRESSIONS: Final = ("none", "gzip", "bzip2", "lzma", "lzo", "lz4", "zstd")
SYSTEMS: Final = (
    "invalid", "openbsd", "netbsd", "freebsd", "4_4bsd", "linux", "svr4", "esix", "solaris", "irix", "sco", "dell",
    "ncr", "lynxos", "vxworks", "psos", "qnx", "u-boot", "rtems", "artos", "unity", "integrity", "ose", "plan9",
    "openrtos", "arm-trusted-firmware", "tee", "opensbi", "efi", "elf",
)  # fmt: skip
ARCHITECTURES: Final = (
    "invalid", "alpha", "arm", "x86", "ia64", "mips", "mips64", "powerpc", "s390", "sh", "sparc", "sparc64", "m68k",
    "nios", "microblaze", "nios2", "blackfin", "avr32", "st200", "sandbox", "nds32", "or1k", "arm64", "arc", "x86_64",
    "xtensa", "riscv",
)  # fmt: skip
TYPES: Final = (
    "invalid", "standalone", "kernel", "ramdisk", "multi", "firmware", "script", "filesystem", "flat_dt", "kwbimage",
    "imximage", "ublimage", "omapimage", "aisimage", "kernel_noload", "pblimage", "mxsimage", "gpimage", "atmelimage",
    "socfpgaimage", "x86_setup", "lpc32xximage", "loadable", "rkimage", "rksd", "rkspi", "zynqimage", "zynqmpimage",
    "zynqmpbif", "fpga", "vybridimage", "tee", "firmware_ivt", "pmmc", "stm32image", "socfpgaimage_v1", "mtk_image",
    "imx8mimage", "imx8image", "copro", "sunxi_egon",
)  # fmt: skip


class Header(NamedTuple):
    """The header; ``size`` counts the data behind it in bytes, the addresses are those of the machine it is for.

    :ivar header_crc: over the header with this field 0
    :ivar time: seconds since 1970
    """

    header_crc: int
    time: int
    size: int
    load: int
    entry: int
    data_crc: int
    system: int
    architecture: int
    type: int
    compression: int
    name: bytes


_HEADER = struct.Struct(">7I4B32s")


def encode_header(header: Header) -> bytes:
    """The inverse of :func:`decode_header`."""
    return _HEADER.pack(MAGIC, *header)


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:raises ImageError: it is no such header"""
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the file has {len(data)} bytes, a uImage header takes {HEADER_SIZE}")
    magic, *values = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ImageError(f"not a uImage: it begins with {magic:#x} instead of {MAGIC:#x}")
    header = Header._make(values)
    return header._replace(name=header.name.rstrip(b"\0"))


def computed_crc(header: Header) -> int:
    """What ``header_crc`` should be."""
    import zlib

    return zlib.crc32(encode_header(header._replace(header_crc=0)))


def decode_parts(data: bytes | bytearray | memoryview, size: int) -> list[tuple[int, int]]:
    """(offset in the data, length) of each file of a multi-file image.

    :param data: the beginning of its data
    :param size: bytes of its data
    :raises ImageError: the list does not end, or its files do not fit
    """
    lengths: list[int] = []
    while True:
        at = 4 * len(lengths)
        if at + 4 > len(data) or len(lengths) > MAX_PARTS:
            raise ImageError(f"the list of files does not end within {min(len(data), 4 * MAX_PARTS)} bytes")
        (length,) = struct.unpack_from(">I", data, at)
        if length == 0:
            break
        lengths.append(length)
    parts, start = [], 4 * len(lengths) + 4
    for index, length in enumerate(lengths):
        if start + length > size:
            raise ImageError(f"file {index} ends at {start + length:#x}, past the end of the data ({size:#x})")
        parts.append((start, length))
        start += -(-length // 4) * 4
    return parts


# -- the node -------------------------------------------------------------------------------------


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image; its payload is decoded where its size cannot be told otherwise.

    :raises ImageError: the header breaks the format
    :raises NotSupported: it is to be written, or no library decodes the payload
    """
    part, decompress = request.options.number("part"), request.options.flag("decompress")
    return open_read_only(request, lambda file, flags: UImageNode(file, flags, part, decompress))


class UImageNode(ReadOnlyFormat):
    """An open image.

    :ivar parts: (offset in the file, length) of the files it holds; one, unless it is a multi-file image
    :raises ImageError: the header breaks the format
    """

    driver = "uimage"

    def __init__(self, file: Node, flags: OpenFlags, part: int, decompress: bool) -> None:
        super().__init__(file, flags)
        self.header = header = decode_header(read_head(file, HEADER_SIZE))
        if HEADER_SIZE + header.size > file.size:
            raise ImageError(f"the data ends at {HEADER_SIZE + header.size:#x}, past the end of the file "
                             f"({file.size:#x})")  # fmt: skip
        self.parts = [(HEADER_SIZE, header.size)]
        if header.type == MULTI:
            listed = read_exactly(file, HEADER_SIZE, min(header.size, 4 * MAX_PARTS + 4), "list of files")
            self.parts = [(HEADER_SIZE + start, length) for start, length in decode_parts(listed, header.size)]
        if part >= len(self.parts):
            raise InvalidArgument(f"there is no part {part}: the image has {len(self.parts)}", where=file.filename)
        self.cluster_size = self.zero_unit = 512
        self._host, self._size = self.parts[part]
        self._payload: bytes | None = None
        # The files of a multi-file image are stored as they are, whatever the header says of the whole.
        if decompress and header.compression and header.type != MULTI:
            self._payload = self._decode()
            self._size = len(self._payload)

    def _decode(self) -> bytes:
        from .streams import unpack

        kind = _name(COMPRESSIONS, self.header.compression)
        if kind not in COMPRESSIONS:
            raise ImageError(f"the payload is compressed in the unknown way {self.header.compression}")
        if self._size > MAX_DECODED:
            raise ImageError(f"the compressed payload has {self._size} bytes, allowed are {MAX_DECODED}",
                             hint="open it with decompress=off")  # fmt: skip
        return unpack(kind, read_exactly(self.file, self._host, self._size, "payload"), MAX_DECODED, self.filename)

    def lookup(self, offset: int, length: int) -> list[Extent]:
        if self._payload is not None:
            return [Extent(offset, length, COMPRESSED, self._host)]
        return [Extent(offset, length, DATA, self._host + offset)]

    def decompress(self, extent: Extent, buffer: memoryview) -> None:
        assert self._payload is not None
        buffer[:] = self._payload[extent.offset : extent.offset + len(buffer)]

    def _data_crc(self) -> int:
        from isal import isal_zlib

        crc, at, end = 0, HEADER_SIZE, HEADER_SIZE + self.header.size
        piece = memoryview(bytearray(min(_STEP, self.header.size)))
        while at < end:
            piece = piece[: end - at]
            self.file.read_into(at, piece)
            crc = isal_zlib.crc32(piece, crc)
            at += len(piece)
        return int(crc)

    def format_info(self) -> dict[str, object]:
        """What the header says, with both checksums computed anew."""
        header = self.header
        info: dict[str, object] = {
            "name": header.name.decode("utf-8", "replace"),
            "time": header.time,
            "os": _name(SYSTEMS, header.system),
            "architecture": _name(ARCHITECTURES, header.architecture),
            "type": _name(TYPES, header.type),
            "compression": _name(COMPRESSIONS, header.compression),
            "data-size": header.size,
            "load-address": header.load,
            "entry-point": header.entry,
            "header-checksum": "ok" if computed_crc(header) == header.header_crc else "wrong",
            "data-checksum": "ok" if self._data_crc() == header.data_crc else "wrong",
        }
        if header.type == MULTI:
            info["parts"] = [{"offset": offset, "size": length} for offset, length in self.parts]
        return info


def _name(names: tuple[str, ...], number: int) -> str:
    return names[number] if number < len(names) else f"unknown ({number})"
