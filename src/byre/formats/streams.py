"""Compressed streams of foreign formats, and the last ones decoded.

Every stream is decoded with a bound on what comes out, whatever it announces. The libraries are loaded on first use and
release the interpreter lock while they work.
"""

from __future__ import annotations

import threading

from ..errors import ImageError, NotSupported
from ..typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

__all__ = ["METHODS", "ChunkCache", "unpack"]


def unpack(method: str, data: bytes | bytearray | memoryview, limit: int, where: str) -> bytes:
    """What the stream ``data`` holds; bytes behind its end do not matter.

    :param method: one of ``METHODS``
    :param limit: most bytes that may come out
    :param where: named in errors
    :raises ImageError: it is no such stream, ends early, or holds more
    :raises NotSupported: no library here decodes it
    """
    try:
        result = METHODS[method](data, limit)
    except (ImageError, NotSupported) as error:
        error.where = error.where or where
        raise
    except Exception as error:
        raise ImageError(f"the {method} stream of {len(data)} bytes is damaged: {error}", where=where) from None
    if len(result) > limit:
        raise ImageError(f"the {method} stream of {len(data)} bytes holds more than {limit} bytes", where=where)
    return result


def _feed(decoder: Any, data: bytes | bytearray | memoryview, limit: int) -> bytes:
    """One stream through an object with ``decompress(data, max_length)`` and ``eof``."""
    result = bytearray()
    piece = bytes(data)
    while not decoder.eof and len(result) <= limit:
        some = decoder.decompress(piece, limit + 1 - len(result))
        piece = getattr(decoder, "unconsumed_tail", b"")
        if not some and not piece:
            break
        result += some
    if not decoder.eof and len(result) <= limit:
        raise ImageError(f"the stream ends early, after {len(result)} bytes")
    return bytes(result)


def _zlib(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    from isal import isal_zlib

    return _feed(isal_zlib.decompressobj(), data, limit)


def _gzip(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    from isal import isal_zlib

    return _feed(isal_zlib.decompressobj(wbits=31), data, limit)


def _bzip2(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    import bz2

    return _feed(bz2.BZ2Decompressor(), data, limit)


def _lzma(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    """xz or the older lzma container, told apart by their beginning."""
    import lzma

    return _feed(lzma.LZMADecompressor(memlimit=_LZMA_MEMORY), data, limit)


_LZMA_MEMORY: Final = 128 << 20


def _zstd(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    import sys

    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 27})
    return _feed(decoder, data, limit)


def _library(name: str, stream: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise NotSupported(f"{stream} streams need the package {name!r}, which is not installed") from None


def _lz4(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    """Frames, the older one of the kernel ("legacy") included."""
    frame = _library("lz4.frame", "lz4")
    if bytes(data[:4]) == _LZ4_LEGACY:
        return _lz4_legacy(data, limit)
    decoder = frame.LZ4FrameDecompressor()
    return _feed(decoder, data, limit)


_LZ4_LEGACY: Final = b"\x02\x21\x4c\x18"
_LZ4_LEGACY_BLOCK: Final = 8 << 20


def _lz4_legacy(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    block = _library("lz4.block", "lz4")
    result, at = bytearray(), 4
    while at + 4 <= len(data) and len(result) <= limit:
        length = int.from_bytes(data[at : at + 4], "little")
        if length == 0 or at + 4 + length > len(data):
            break
        result += block.decompress(bytes(data[at + 4 : at + 4 + length]), uncompressed_size=_LZ4_LEGACY_BLOCK)
        at += 4 + length
    return bytes(result)


def _lzo(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    module = _library("lzo", "lzo")
    return bytes(module.decompress(bytes(data), False, limit))


def _lzfse(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    module = _library("liblzfse", "LZFSE")
    result = bytes(module.decompress(bytes(data)))
    return result[: limit + 1]


def _adc(data: bytes | bytearray | memoryview, limit: int) -> bytes:
    """Apple Data Compression: literal runs, and two sizes of references back."""
    source, result, at = bytes(data), bytearray(), 0
    while at < len(source) and len(result) <= limit:
        code = source[at]
        if code & 0x80:
            length, back = (code & 0x7F) + 1, 0
            result += source[at + 1 : at + 1 + length]
            at += 1 + length
            continue
        if code & 0x40:
            length, width = (code & 0x3F) + 4, 3
            back = int.from_bytes(source[at + 1 : at + 3], "big") + 1
        else:
            length, width = (code >> 2 & 0x0F) + 3, 2
            back = ((code & 3) << 8 | int.from_bytes(source[at + 1 : at + 2], "big")) + 1
        if at + width > len(source) or back > len(result):
            raise ImageError(f"a reference {back} bytes back at {at:#x}, where {len(result)} bytes are decoded")
        chunk = result[len(result) - back :][:length]
        # A reference may reach into what it makes itself.
        result += (chunk * (length // len(chunk) + 1))[:length]
        at += width
    return bytes(result)


METHODS: Final[dict[str, Callable[[bytes | bytearray | memoryview, int], bytes]]] = {
    "zlib": _zlib,
    "gzip": _gzip,
    "bzip2": _bzip2,
    "lzma": _lzma,
    "zstd": _zstd,
    "lz4": _lz4,
    "lzo": _lzo,
    "lzfse": _lzfse,
    "adc": _adc,
}


class ChunkCache:
    """The chunks decoded last, at most ``capacity`` bytes of them (or one, if that is larger).

    Guarded by its own lock, which is not held while a chunk is decoded.
    """

    def __init__(self, capacity: int = 16 << 20) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._chunks: dict[int, bytes] = {}
        self._used = 0

    def get(self, key: int, decode: Callable[[], bytes]) -> bytes:
        """The chunk called ``key``, decoded now if it is not here."""
        with self._lock:
            found = self._chunks.pop(key, None)
            if found is not None:
                self._chunks[key] = found
                return found
        made = decode()
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = made
                self._used += len(made)
            while self._used > self._capacity and len(self._chunks) > 1:
                self._used -= len(self._chunks.pop(next(iter(self._chunks))))
        return made
