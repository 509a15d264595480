"""Compressed clusters: raw deflate and zstd (docs/interop/qcow2, "Compressed Clusters Descriptor").

Whole clusters in, whole clusters out, no I/O and no lock; the libraries are loaded on first use and release the
interpreter lock while they work.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, cast

from ...errors import Corrupt, InvalidArgument
from ..deflate import DEFAULT_LEVEL, deflate, inflate
from .layout import COMPRESSION_ZLIB, COMPRESSION_ZSTD

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["DEFAULT_LEVELS", "compressor", "decompress"]

DEFAULT_LEVELS: Final = {COMPRESSION_ZLIB: DEFAULT_LEVEL, COMPRESSION_ZSTD: 2}
"""zstd, measured against the default of the peer on mixed files: level 2 takes 4/5 of level 3's time for 1 % more."""

ZSTD_WINDOW_BITS: Final = 23
"""Frames that ask for more than 8 MiB are refused; a cluster has at most 2 MiB."""


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
    return deflate(level)


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
        inflate(data, buffer)


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
