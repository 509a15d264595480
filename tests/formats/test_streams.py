"""Streams of foreign formats: nothing comes out beyond the bound, and large chunks are decoded one at a time."""

from __future__ import annotations

import bz2
import lzma
import sys
import threading
import time
import types
import zlib
from collections.abc import Callable

import pytest

from byre.errors import ImageError
from byre.formats.streams import ChunkCache, lzfse_length, unpack

MIB = 1 << 20
PACK: dict[str, Callable[[bytes], bytes]] = {
    "zlib": zlib.compress, "gzip": lambda data: zlib.compress(data, wbits=31), "bzip2": bz2.compress,
    "lzma": lzma.compress,
}  # fmt: skip
LZFSE = bytes.fromhex(
    "6276786eb80b000025000000680178f0fff0fff0fff0fff0fff0fff0fff0fff0fff0fff0fff8e27878060000000000000062767824"
)
"""3000 times "x" as Apple's library packs them."""


@pytest.mark.parametrize("method", PACK)
def test_no_more_than_the_bound(method: str) -> None:
    packed = PACK[method](bytes(MIB))
    assert unpack(method, packed, MIB, "here") == bytes(MIB)
    assert unpack(method, packed + b"what follows", MIB, "here") == bytes(MIB)
    with pytest.raises(ImageError, match=r"here: .* holds more than 1048575 bytes"):
        unpack(method, packed, MIB - 1, "here")
    for cut in (0, 1, len(packed) // 2, len(packed) - 1):
        with pytest.raises(ImageError, match="here"):
            unpack(method, packed[:cut], MIB, "here")


def test_lzfse_is_measured_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lzfse_length(LZFSE) == 3000
    library = types.ModuleType("liblzfse")
    library.decompress = lambda data: b"x" * 3000  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liblzfse", library)
    assert unpack("lzfse", LZFSE, 3000, "here") == b"x" * 3000
    with pytest.raises(ImageError, match="holds 3000 bytes, allowed are 2999"):
        unpack("lzfse", LZFSE, 2999, "here")
    for damaged in (LZFSE[:-4], LZFSE[:30], b"bvx9" + LZFSE[4:], b"bvx2" + bytes(60), b""):
        with pytest.raises(ImageError, match="here"):
            unpack("lzfse", damaged, 3000, "here")


@pytest.mark.parametrize(("keys", "decoded"), [(1, 1), (8, 8)])
def test_large_chunks_are_decoded_one_at_a_time(keys: int, decoded: int) -> None:
    cache = ChunkCache()
    running = most = calls = 0
    lock = threading.Lock()

    def decode() -> bytes:
        nonlocal running, most, calls
        with lock:
            running, calls = running + 1, calls + 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return bytes(8 * MIB)

    threads = [threading.Thread(target=cache.get, args=(index % keys, decode, 8 * MIB)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, calls) == (1, decoded)


def test_the_cache_keeps_what_fits() -> None:
    cache = ChunkCache(10 * 1024)
    made: list[int] = []

    def get(key: int, size: int = 1024) -> None:
        def decode() -> bytes:
            made.append(key)
            return bytes([key]) * size

        assert cache.get(key, decode, size) == bytes([key]) * size

    for key in (*range(10), 0, *range(1, 10)):
        get(key)
    assert made == list(range(10))
    get(10)
    get(0)  # the one that was used longest ago is gone
    assert made == [*range(10), 10, 0]
    get(11, 20_000)
    get(11, 20_000)
    assert made[-1] == 11
