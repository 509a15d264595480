"""The copy engine: which zeroes are found, what reaches the target, what happens when reading fails."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, Cancelled
from byre.image import Image
from byre.jobs.blockcopy import COPY, ZERO, BlockCopy, CopySettings, Segment, SourceDisk
from byre.jobs.job import Control

SECTOR = 512


# -- copying --------------------------------------------------------------------------------------


def raw(path: Path, content: bytes) -> Image:
    path.write_bytes(content)
    return byre.open(str(path), format="raw")


def target(path: Path, size: int, format: str = "raw", **options: object) -> Image:
    byre.create(str(path), format, size, options=options)
    return byre.open(str(path), format=format, read_only=False, cache="unsafe")


def content(image: Image) -> bytes:
    return image.read(0, image.size)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("in_order", [True, False])
def test_segments_arrive(tmp_path: Path, format: str, threads: int, in_order: bool) -> None:
    data = bytearray(os.urandom(3 << 20))
    data[100_000:900_000] = bytes(800_000)
    with raw(tmp_path / "a", bytes(data)) as source, target(tmp_path / "b", len(data), format) as out:
        segments = [Segment(0, 1_500_000 // SECTOR * SECTOR, COPY), Segment(2 << 20, 1 << 20, COPY)]
        options = CopySettings(threads=threads, in_order=in_order, zero_init=True)
        BlockCopy(SourceDisk([source]), out, options).run(segments, Control())
        expected = bytearray(len(data))
        for offset, length, _ in segments:
            expected[offset : offset + length] = data[offset : offset + length]
        assert content(out) == bytes(expected)


def test_zero_segments_overwrite_unless_the_target_is_known_to_be_zero(tmp_path: Path) -> None:
    with raw(tmp_path / "a", bytes(1 << 20)) as source:
        for zero_init, expected in ((False, bytes(1 << 20)), (True, b"\xff" * (1 << 20))):
            with target(tmp_path / "b", 1 << 20) as out:
                out.write(0, b"\xff" * (1 << 20))
                copy = BlockCopy(SourceDisk([source]), out, CopySettings(zero_init=zero_init))
                copy.run([Segment(0, 1 << 19, ZERO), Segment(1 << 19, 1 << 19, COPY)], Control())
                assert content(out) == expected


def test_sources_are_joined_and_padded_to_sectors(tmp_path: Path) -> None:
    parts = [os.urandom(700), os.urandom(1024), os.urandom(1)]
    images = [raw(tmp_path / str(i), part) for i, part in enumerate(parts)]
    disk = SourceDisk(images)
    whole = b"".join(part.ljust(-(-len(part) // 512) * 512, b"\0") for part in parts)
    assert disk.size == len(whole)
    for offset, length in ((0, len(whole)), (600, 900), (1023, 2), (2047, 513)):
        buffer = bytearray(b"\xaa" * length)
        disk.read_into(offset, memoryview(buffer))
        assert bytes(buffer) == whole[offset : offset + length]
    for image in images:
        image.close()


def test_skip_and_size_make_a_window(tmp_path: Path) -> None:
    data = os.urandom(5000)
    with raw(tmp_path / "a", data) as image:
        disk = SourceDisk([image], skip=1000, size=3000)
        buffer = bytearray(3000)
        disk.read_into(0, memoryview(buffer))
        assert disk.size == 3000
        assert bytes(buffer) == data[1000:4000]


def test_progress_ends_at_the_size_of_the_disk(tmp_path: Path) -> None:
    with raw(tmp_path / "a", os.urandom(3 << 20)) as source, target(tmp_path / "b", 3 << 20) as out:
        control = Control(3 << 20)
        BlockCopy(SourceDisk([source]), out, CopySettings(zero_init=True)).run([Segment(1 << 20, 4096, COPY)], control)
        assert control.done == 3 << 20


def failing(path: Path, size: int, sectors: set[int]) -> tuple[Image, bytes]:
    """An image whose reads fail where they touch one of ``sectors``."""
    data = os.urandom(size)
    image = raw(path, data)
    plain = image.node.read_into

    def read_into(offset: int, buffer: memoryview) -> None:
        for sector in sectors:
            if offset < (sector + 1) * SECTOR and sector * SECTOR < offset + len(buffer):
                raise ByreError("bad sector")
        plain(offset, buffer)

    image.node.read_into = read_into  # type: ignore[method-assign]
    return image, data


def test_salvage_loses_only_the_bad_sectors(tmp_path: Path) -> None:
    bad = {0, 17, 18, 2047}
    source, data = failing(tmp_path / "a", 1 << 20, bad)
    warnings: list[str] = []
    with source, target(tmp_path / "b", 1 << 20) as out:
        settings = CopySettings(salvage=warnings.append)
        BlockCopy(SourceDisk([source]), out, settings).run([Segment(0, 1 << 20, COPY)], Control())
        expected = bytearray(data)
        for sector in bad:
            expected[sector * SECTOR : (sector + 1) * SECTOR] = bytes(SECTOR)
        assert content(out) == bytes(expected)
    assert [int(text.split("offset ")[1].split(":")[0]) for text in warnings] == [s * SECTOR for s in sorted(bad)]


def test_without_salvage_the_error_says_where(tmp_path: Path) -> None:
    source, _ = failing(tmp_path / "a", 4 << 20, {4096})
    with (
        source,
        target(tmp_path / "b", 4 << 20) as out,
        pytest.raises(ByreError, match="error while reading at byte 2097152: bad sector"),
    ):
        BlockCopy(SourceDisk([source]), out, CopySettings()).run([Segment(0, 4 << 20, COPY)], Control())
    assert threading.active_count() < 3


def test_cancelling_stops_the_threads(tmp_path: Path) -> None:
    with raw(tmp_path / "a", os.urandom(8 << 20)) as source, target(tmp_path / "b", 8 << 20) as out:
        control = Control(speed=1 << 20)
        timer = threading.Timer(0.1, control.cancel)
        timer.start()
        with pytest.raises(Cancelled):
            BlockCopy(SourceDisk([source]), out, CopySettings()).run([Segment(0, 8 << 20, COPY)], control)
        timer.join()


def test_offload_copies_the_same_bytes(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    with raw(tmp_path / "a", data) as source, target(tmp_path / "b", len(data)) as out:
        settings = CopySettings(offload=True, zero_init=True)
        BlockCopy(SourceDisk([source]), out, settings).run([Segment(0, len(data), COPY)], Control())
        assert content(out) == data


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [4096, 65536])
@pytest.mark.parametrize("in_order", [True, False])
def test_compressed_clusters(tmp_path: Path, kind: str, cluster: int, in_order: bool) -> None:
    size = (2 << 20) + 512
    data = bytearray(b"compressible " * (size // 13 + 1))[:size]
    data[cluster : 3 * cluster] = bytes(2 * cluster)
    data[1 << 20 : (1 << 20) + 300_000] = os.urandom(300_000)
    with raw(tmp_path / "a", bytes(data)) as source:
        options = {"cluster_size": str(cluster), "compression_type": kind}
        with target(tmp_path / "b", size, "qcow2", **options) as out:
            settings = CopySettings(compress=True, zero_init=True, in_order=in_order)
            BlockCopy(SourceDisk([source]), out, settings).run([Segment(0, size, COPY)], Control())
            assert content(out) == bytes(data)
        assert os.path.getsize(tmp_path / "b") < 1 << 20
