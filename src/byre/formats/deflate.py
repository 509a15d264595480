"""Raw deflate of clusters, as qcow and qcow2 have it: ISA-L where it is quick, zlib-ng where it is to be dense.

Whole clusters in, whole clusters out, no I/O and no lock; the libraries are loaded on first use and release the
interpreter lock while they work. It is written with a window of 2^12 bytes, the one all readers have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from ..errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEFAULT_LEVEL", "deflate", "inflate"]

DEFAULT_LEVEL: Final = 2
"""Measured against the peer's default on mixed files. ISA-L's level 2 takes a tenth of zlib's time for 3 to 9 % more
bytes, its level 3 half as much time again for 1 % less; zlib-ng's level 6 a third of the time for 1 to 4 % more."""

WRITTEN_WINDOW_BITS: Final = 12
READ_WINDOW_BITS: Final = 15
_ISAL_LEVELS: Final = 3


def deflate(level: int) -> Callable[[memoryview], bytes | None]:
    """A function that compresses one full cluster; ``None`` is its answer where that would not be smaller.

    It is called from any number of threads at once.

    :param level: 1 to 3 by ISA-L, from 4 to 9 by zlib-ng: denser and slower
    """
    return _isal_compressor(level) if level <= _ISAL_LEVELS else _zlib_compressor(level)


def _isal_compressor(level: int) -> Callable[[memoryview], bytes | None]:
    from isal import igzip_lib

    compress, flag, memory = igzip_lib.compress, igzip_lib.COMP_DEFLATE, igzip_lib.MEM_LEVEL_DEFAULT

    def run(data: memoryview) -> bytes | None:
        packed = compress(data, level, flag, memory, WRITTEN_WINDOW_BITS)
        return packed if len(packed) < len(data) else None

    return run


def _zlib_compressor(level: int) -> Callable[[memoryview], bytes | None]:
    from zlib_ng import zlib_ng

    def run(data: memoryview) -> bytes | None:
        stream = zlib_ng.compressobj(level, zlib_ng.DEFLATED, -WRITTEN_WINDOW_BITS, 9)
        packed = stream.compress(data) + stream.flush()
        return packed if len(packed) < len(data) else None

    return run


def inflate(data: bytes | bytearray | memoryview, buffer: memoryview) -> None:
    """Fill ``buffer``, one full cluster; what follows in the stream is ignored.

    :raises Corrupt: the stream is damaged or too short
    """
    from isal import igzip_lib

    wanted = len(buffer)
    damaged = cast("type[Exception]", igzip_lib.IsalError)
    stream = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE, READ_WINDOW_BITS)
    try:
        output = stream.decompress(data, wanted)
    except damaged:
        output = b""
    if len(output) != wanted:
        output = _inflate_again(data, wanted)
    buffer[:] = output


def _inflate_again(data: bytes | bytearray | memoryview, wanted: int) -> bytes:
    """With zlib, whose word counts: it reads some unusual Huffman codes that ISA-L refuses."""
    import zlib

    try:
        output = zlib.decompressobj(-READ_WINDOW_BITS).decompress(data, wanted)
    except zlib.error as error:
        raise Corrupt(f"a compressed cluster cannot be decoded: {error}") from None
    if len(output) != wanted:
        raise Corrupt(f"a compressed cluster holds only {len(output)} of {wanted} bytes")
    return output
