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

__all__ = ["METHODS", "ChunkCache", "lzfse_length", "unpack"]


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
    result: bytes | bytearray = decoder.decompress(data, limit + 1)
    while not decoder.eof and len(result) <= limit:
        rest = getattr(decoder, "unconsumed_tail", b"")
        some = decoder.decompress(rest, limit + 1 - len(result))
        if not some and not rest:
            raise ImageError(f"the stream ends early, after {len(result)} bytes")
        if isinstance(result, bytes):
            result = bytearray(result)  # most streams come whole, without this copy
        result += some
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
    length = lzfse_length(data)
    if length > limit:
        raise ImageError(f"the stream holds {length} bytes, allowed are {limit}")
    return bytes(module.decompress(bytes(data)))


def lzfse_length(data: bytes | bytearray | memoryview) -> int:
    """How much an LZFSE stream holds, as its blocks say: the library has no limit of its own.

    :raises ImageError: it does not end, or has a block of an unknown kind
    """
    raw, at, total = bytes(data), 0, 0
    while raw[at : at + 4] != b"bvx$":
        if at + 32 > len(raw) and raw[at : at + 4] not in (b"bvx-", b"bvxn"):
            raise ImageError(f"the stream ends early, after {total} bytes")
        kind = raw[at : at + 4]
        length, payload = (int.from_bytes(raw[at + n : at + n + 4], "little") for n in (4, 8))
        if kind == b"bvx-":
            at += 8 + length
        elif kind == b"bvxn":
            at += 12 + payload
        elif kind == b"bvx1":
            at += 772 + payload
        elif kind == b"bvx2":
            literals, matches, head = (int.from_bytes(raw[at + n : at + n + 8], "little") for n in (8, 16, 24))
            at += (head & 0xFFFFFFFF) + (literals >> 20 & 0xFFFFF) + (matches >> 40 & 0xFFFFF)
            if not head & 0xFFFFFFFF:
                raise ImageError(f"a block at {at:#x} has no header")
        else:
            raise ImageError(f"a block at {at:#x} begins with {kind!r}")
        total += length
    return total


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


_LARGE: Final = 2 << 20


class ChunkCache:
    """The chunks decoded last, at most ``capacity`` bytes of them (or one, if that is larger).

    Of large chunks one is decoded at a time, so that memory does not grow with the number of threads. Guarded by its
    own lock, which is not held meanwhile.
    """

    def __init__(self, capacity: int = 16 << 20) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._large = threading.Lock()
        self._chunks: dict[int, bytes] = {}
        self._used = 0

    def get(self, key: int, decode: Callable[[], bytes], size: int) -> bytes:
        """The chunk called ``key``, decoded now if it is not here.

        :param size: bytes it has, about
        """
        found = self._find(key)
        if found is not None:
            return found
        if size <= _LARGE:
            return self._keep(key, decode())
        with self._large:
            found = self._find(key)
            if found is not None:
                return found
            self._make_room(self._capacity)
            return self._keep(key, decode())

    def _find(self, key: int) -> bytes | None:
        with self._lock:
            found = self._chunks.pop(key, None)
            if found is not None:
                self._chunks[key] = found
            return found

    def _keep(self, key: int, made: bytes) -> bytes:
        self._make_room(len(made))
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = made
                self._used += len(made)
        return made

    def _make_room(self, size: int) -> None:
        with self._lock:
            while self._chunks and self._used + size > self._capacity:
                self._used -= len(self._chunks.pop(next(iter(self._chunks))))
