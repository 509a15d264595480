"""Compressed clusters: raw deflate (ISA-L, zlib) and zstd (docs/interop/qcow2, "Compressed Clusters Descriptor").

Whole clusters in, whole clusters out, no I/O and no lock; the libraries are loaded on first use and release the
interpreter lock while they work. Deflate is written with a window of 2^12 bytes, the one all readers have.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, cast

from ...errors import Corrupt, InvalidArgument
from .layout import COMPRESSION_ZLIB, COMPRESSION_ZSTD

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["DEFAULT_LEVELS", "compressor", "decompress"]

DEFAULT_LEVELS: Final = {COMPRESSION_ZLIB: 2, COMPRESSION_ZSTD: 2}
"""Measured against the peer's defaults on mixed files. Deflate: ISA-L's level 2 takes a tenth of zlib's time for 3 to
9 % more bytes, its level 3 half as much time again for 1 % less; zlib-ng's level 6 a third of the time for 1 to 4 %
more. zstd: level 2 takes four fifths of level 3's time for 1 % more."""

WRITTEN_WINDOW_BITS: Final = 12
READ_WINDOW_BITS: Final = 15
ZSTD_WINDOW_BITS: Final = 23
"""Frames that ask for more than 8 MiB are refused; a cluster has at most 2 MiB."""
_ISAL_LEVELS: Final = 3


def _zstd() -> ModuleType:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def compressor(kind: int, level: int | None = None) -> Callable[[memoryview], bytes | None]:
    """A function that compresses one full cluster; ``None`` is its answer where that would not be smaller.

    It is called from any number of threads at once.

    :param kind: ``COMPRESSION_ZLIB`` or ``COMPRESSION_ZSTD``
    :param level: deflate 1 to 9 (1 to 3 by ISA-L, from 4 on by zlib-ng: denser and slower); zstd 1 to 22
    :raises InvalidArgument: no such level
    """
    if level is None:
        level = DEFAULT_LEVELS[kind]
    highest = 22 if kind == COMPRESSION_ZSTD else 9
    if not 1 <= level <= highest:
        raise InvalidArgument(f"compression level {level}: allowed are 1 to {highest}")
    if kind == COMPRESSION_ZSTD:
        return _zstd_compressor(level)
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


def _zstd_compressor(level: int) -> Callable[[memoryview], bytes | None]:
    import threading

    zstd = _zstd()
    # A compressor keeps its tables from one frame to the next, but serves one thread at a time.
    own = threading.local()

    def run(data: memoryview) -> bytes | None:
        stream = getattr(own, "stream", None)
        if stream is None:
            stream = own.stream = zstd.ZstdCompressor(level)
        packed = cast("bytes", stream.compress(data, stream.FLUSH_FRAME))
        return packed if len(packed) < len(data) else None

    return run


def decompress(kind: int, data: bytes | bytearray | memoryview, buffer: memoryview) -> None:
    """Fill ``buffer``, one full cluster, from the stored bytes; what follows the compressed stream is ignored.

    Memory and time are bounded by the two lengths. A deflate stream may be longer than the cluster (reading stops
    there, as the specification says); zstd frames must end with it.

    :param data: up to the end of the last sector used
    :raises Corrupt: the stream is damaged or too short
    """
    if kind == COMPRESSION_ZSTD:
        _read_zstd(data, buffer)
    else:
        _read_deflate(data, buffer)


def _read_deflate(data: bytes | bytearray | memoryview, buffer: memoryview) -> None:
    from isal import igzip_lib

    wanted = len(buffer)
    damaged = cast("type[Exception]", igzip_lib.IsalError)
    stream = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE, READ_WINDOW_BITS)
    try:
        output = stream.decompress(data, wanted)
    except damaged:
        output = b""
    if len(output) != wanted:
        output = _read_deflate_again(data, wanted)
    buffer[:] = output


def _read_deflate_again(data: bytes | bytearray | memoryview, wanted: int) -> bytes:
    """With zlib, whose word counts: it reads some unusual Huffman codes that ISA-L refuses."""
    import zlib

    try:
        output = zlib.decompressobj(-READ_WINDOW_BITS).decompress(data, wanted)
    except zlib.error as error:
        raise Corrupt(f"a compressed cluster cannot be decoded: {error}") from None
    if len(output) != wanted:
        raise Corrupt(f"a compressed cluster holds only {len(output)} of {wanted} bytes")
    return output


def _read_zstd(data: bytes | bytearray | memoryview, buffer: memoryview) -> None:
    zstd = _zstd()
    options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_BITS}
    rest = memoryview(data)
    done = 0
    try:
        # Several frames may follow one another, and empty or skippable ones stand between them.
        while done < len(buffer):
            frame = rest[: zstd.get_frame_size(rest)]
            rest = rest[len(frame) :]
            stream = zstd.ZstdDecompressor(options=options)
            output = stream.decompress(frame, len(buffer) - done)
            if not stream.eof and stream.decompress(b"", 1):
                raise Corrupt(f"a compressed cluster holds more than {len(buffer)} bytes")
            buffer[done : done + len(output)] = output
            done += len(output)
    except zstd.ZstdError as error:
        if done or len(rest) < len(data):
            raise Corrupt(f"a compressed cluster holds only {done} of {len(buffer)} bytes ({error})") from None
        raise Corrupt(f"a compressed cluster cannot be decoded: {error}") from None
