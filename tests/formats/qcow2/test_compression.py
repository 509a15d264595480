"""Compressed clusters: round trips, what readers must accept, and what they must refuse in bounded memory."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byre.errors import Corrupt, InvalidArgument
from byre.formats.qcow2.compression import compressor, decompress
from byre.formats.qcow2.layout import COMPRESSION_ZLIB, COMPRESSION_ZSTD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CLUSTER = 65536
KINDS = (COMPRESSION_ZLIB, COMPRESSION_ZSTD)


def text(seed: int = 1, length: int = CLUSTER) -> bytes:
    generator = random.Random(seed)
    words = [generator.randbytes(generator.randint(2, 12)).hex().encode() for _ in range(300)]
    return b" ".join(generator.choice(words) for _ in range(length // 5))[:length]


def unpack(kind: int, data: bytes, length: int = CLUSTER) -> bytes:
    buffer = bytearray(length)
    decompress(kind, data, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize(
    ("kind", "level"), [(0, None), (0, 1), (0, 2), (0, 3), (0, 6), (0, 9), (1, None), (1, 1), (1, 19)]
)
@pytest.mark.parametrize("length", [512, 4096, CLUSTER, 2 << 20])
def test_round_trip(kind: int, level: int | None, length: int) -> None:
    if level in (9, 19) and length > CLUSTER:
        pytest.skip("slow, and no different")
    data = text(length=length)
    packed = compressor(kind, level)(memoryview(data))
    assert packed is not None
    assert len(packed) < length
    # The stored length is known to a sector only: anything may follow.
    assert unpack(kind, packed + b"\xa5" * 511, length) == data


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_not_compressed(kind: int) -> None:
    assert compressor(kind)(memoryview(random.Random(1).randbytes(CLUSTER))) is None


@pytest.mark.parametrize("level", [1, 2, 3, 4, 6, 9])
def test_deflate_keeps_to_the_small_window(level: int) -> None:
    """Read in small steps zlib has nothing but its window of 2^12 bytes to copy from."""
    data = text(2) * 2
    packed = compressor(COMPRESSION_ZLIB, level)(memoryview(data))
    assert packed is not None
    stream = zlib.decompressobj(-12)
    output = stream.decompress(packed, 64)
    while not stream.eof:
        output += stream.decompress(stream.unconsumed_tail, 64)
    assert output == data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, -1, 99])
def test_levels_out_of_range_are_refused(kind: int, level: int) -> None:
    with pytest.raises(InvalidArgument, match="level"):
        compressor(kind, level)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_and_damaged_streams_are_corrupt(kind: int) -> None:
    packed = compressor(kind)(memoryview(text()))
    assert packed is not None
    for cut in (0, 1, 5, len(packed) // 2):
        with pytest.raises(Corrupt, match="compressed cluster"):
            unpack(kind, packed[:cut])
    with pytest.raises(Corrupt):
        unpack(kind, b"\xff" * 1000)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_are_decoded_or_corrupt(kind: int, data: st.DataObject) -> None:
    packed = bytearray(compressor(kind)(memoryview(text(length=4096))) or b"")
    for _ in range(data.draw(st.integers(0, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    stored = bytes(packed[: data.draw(st.integers(0, len(packed)))]) + data.draw(st.binary(max_size=40))
    try:
        unpack(kind, stored, 4096)
    except Corrupt:
        pass


def test_deflate_stops_when_the_cluster_is_full() -> None:
    stream = zlib.compressobj(6, zlib.DEFLATED, -12)
    packed = stream.compress(text(3, CLUSTER + 5000)) + stream.flush()
    assert unpack(COMPRESSION_ZLIB, packed) == text(3, CLUSTER + 5000)[:CLUSTER]


def test_deflate_without_an_end_is_read() -> None:
    stream = zlib.compressobj(6, zlib.DEFLATED, -12)
    packed = stream.compress(text()) + stream.flush(zlib.Z_SYNC_FLUSH)
    assert unpack(COMPRESSION_ZLIB, packed) == text()


def test_deflate_with_a_large_window_is_read() -> None:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert unpack(COMPRESSION_ZLIB, stream.compress(text()) + stream.flush()) == text()


def test_zstd_frames_may_follow_one_another() -> None:
    data = text()
    skippable = b"\x50\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"ignored"
    packed = zstd.compress(data[:1000]) + skippable + zstd.compress(b"") + zstd.compress(data[1000:])
    assert unpack(COMPRESSION_ZSTD, packed + bytes(300)) == data
    with pytest.raises(Corrupt, match="only 1000 of"):
        unpack(COMPRESSION_ZSTD, zstd.compress(data[:1000]) + bytes(300))


def test_zstd_with_a_checksum_is_read() -> None:
    options = {zstd.CompressionParameter.checksum_flag: 1}
    packed = zstd.compress(text(), options=options)
    assert unpack(COMPRESSION_ZSTD, packed) == text()
    with pytest.raises(Corrupt):
        unpack(COMPRESSION_ZSTD, packed[:-1] + bytes((packed[-1] ^ 1,)))


def test_zstd_frame_larger_than_the_cluster_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="more than 65536"):
        unpack(COMPRESSION_ZSTD, zstd.compress(text(3, CLUSTER + 1)))
    with pytest.raises(Corrupt, match="more than 65536"):
        unpack(COMPRESSION_ZSTD, zstd.compress(bytes(1 << 28)))


def test_zstd_window_is_limited() -> None:
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    stream = zstd.ZstdCompressor(options=options)
    packed = stream.compress(text()) + stream.flush()
    with pytest.raises(Corrupt):
        unpack(COMPRESSION_ZSTD, packed)


def test_many_empty_frames_take_bounded_time() -> None:
    import time

    packed = (b"\x50\x2a\x4d\x18" + bytes(4)) * 20000
    started = time.monotonic()
    with pytest.raises(Corrupt):
        unpack(COMPRESSION_ZSTD, packed)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_compressor(kind: int) -> None:
    pack = compressor(kind)
    failures: list[object] = []

    def work(seed: int) -> None:
        try:
            for i in range(20):
                data = text(seed * 100 + i, 16384)
                packed = pack(memoryview(data))
                assert packed is not None
                assert unpack(kind, packed, 16384) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("kind", "level", "cluster_bits"),
    [(kind, level, bits) for kind, level in ((0, 1), (0, 3), (0, 9), (1, None)) for bits in (9, 12, 16)]
    + [(0, None, 21)],
)
def test_the_peer_reads_what_is_written(
    tmp_path: Path,
    qemu_img: Callable[..., subprocess.CompletedProcess[str]],
    kind: int,
    level: int | None,
    cluster_bits: int,
) -> None:
    """An image put together by hand, one compressed cluster behind the other."""
    from byre.formats.qcow2 import entries

    cluster = 1 << cluster_bits
    count = min(40 if cluster_bits < 20 else 3, cluster // 8)
    image, raw = tmp_path / "a.qcow2", tmp_path / "a.raw"
    options = f"cluster_size={cluster},compression_type={('zlib', 'zstd')[kind]},preallocation=metadata"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, str(image), str(count * cluster))
    pack = compressor(kind, level)
    content = bytearray(image.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & entries.OFFSET_MASK
    start = int.from_bytes(content[l2 : l2 + 8], "big") & entries.OFFSET_MASK
    host, expected = start, bytearray()
    for index in range(count):
        data = text(index, cluster)
        packed = pack(memoryview(data))
        expected += data
        if packed is None:
            continue
        content[host : host + len(packed)] = packed
        entry = entries.compressed_entry(host, len(packed), cluster_bits)
        content[l2 + 8 * index : l2 + 8 * index + 8] = entry.to_bytes(8, "big")
        host += len(packed)
    image.write_bytes(content)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", str(image), str(raw))
    assert raw.read_bytes() == expected
