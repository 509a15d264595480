"""Compressed grains: a marker, then a zlib stream (RFC 1950) of at most one grain ("Stream-Optimized Compressed
Sparse Extents").

Whole grains in and out, no lock; the libraries are loaded on first use and let other threads run while they work.
"""

from __future__ import annotations

from ...errors import Corrupt, InvalidArgument
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR
from .layout import GRAIN_MARKER_SIZE, decode_marker, encode_grain_marker

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...graph.node import Node

__all__ = ["DEFAULT_LEVEL", "compressor", "decompress", "framed", "read_grain"]

DEFAULT_LEVEL: Final = 2
_ISAL_LEVELS: Final = 3
_WINDOW_BITS: Final = 15
_FIRST_READ: Final = 4096


def compressor(level: int | None = None) -> Callable[[memoryview], bytes]:
    """A function that compresses one grain, whatever comes of it; called from any number of threads at once.

    :param level: 1 to 9 (1 to 3 by ISA-L, from 4 on by zlib-ng: denser and slower)
    :raises InvalidArgument: no such level
    """
    level = DEFAULT_LEVEL if level is None else level
    if not 1 <= level <= 9:
        raise InvalidArgument(f"compression level {level}: allowed are 1 to 9")
    if level > _ISAL_LEVELS:
        from zlib_ng import zlib_ng

        return lambda data: zlib_ng.compress(data, level)
    from isal import igzip_lib

    compress, flag, memory = igzip_lib.compress, igzip_lib.COMP_ZLIB, igzip_lib.MEM_LEVEL_DEFAULT
    return lambda data: compress(data, level, flag, memory, _WINDOW_BITS)


def framed(sector: int, payload: bytes) -> bytes:
    """A compressed grain as it is stored: its marker, itself, and zeroes up to a whole sector."""
    length = GRAIN_MARKER_SIZE + len(payload)
    return b"".join((encode_grain_marker(sector, len(payload)), payload, bytes(-length % SECTOR)))


def decompress(data: bytes | bytearray | memoryview, buffer: memoryview) -> None:
    """Fill ``buffer``, one grain; a stream that holds less (the last grain's) is followed by zeroes.

    :raises Corrupt: the stream is damaged, or holds more
    """
    from isal import igzip_lib

    stream = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_ZLIB, _WINDOW_BITS)
    try:
        # One byte more than there may be: only then is the end, with its checksum, looked at.
        output = stream.decompress(data, len(buffer) + 1)
        good = stream.eof
    except igzip_lib.error:  # type: ignore[misc]
        good = False
    if not good:
        output = _decompress_again(data, len(buffer))
    if len(output) > len(buffer):
        raise Corrupt(f"a compressed grain holds more than {len(buffer)} bytes")
    buffer[: len(output)] = output
    if len(output) < len(buffer):
        buffer[len(output) :] = bytes(len(buffer) - len(output))


def _decompress_again(data: bytes | bytearray | memoryview, wanted: int) -> bytes:
    """With zlib, whose word counts: it reads some unusual Huffman codes that ISA-L refuses."""
    import zlib

    stream = zlib.decompressobj()
    try:
        output = stream.decompress(data, wanted + 1)
    except zlib.error as error:
        raise Corrupt(f"a compressed grain cannot be decoded: {error}") from None
    if not stream.eof and len(output) <= wanted:
        raise Corrupt(f"a compressed grain ends early, after {len(output)} bytes")
    return output


def read_grain(file: Node, host: int, grain: int, *, markers: bool) -> memoryview:
    """The compressed bytes of the grain stored at ``host``; twice a grain at most.

    :raises Corrupt: its marker makes no sense
    """
    if not markers:
        return _read(file, host, min(2 * grain, max(file.size - host, 0)))
    data = _read(file, host, _FIRST_READ)
    size = decode_marker(data).size
    if not 0 < size <= 2 * grain:
        raise Corrupt(f"the marker of the compressed grain at {host:#x} says {size} bytes")
    end = GRAIN_MARKER_SIZE + size
    if end > len(data):
        data = _read(file, host, end)
    return data[GRAIN_MARKER_SIZE:end]


def _read(file: Node, host: int, length: int) -> memoryview:
    data = memoryview(bytearray(length))
    file.read_into(host, data)
    return data
