"""Short cuts: what is in memory is read without waiting, and only from where the bytes are."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import byre
from byre.graph.creating import create
from byre.protocols.memory import MemoryNode

SIZE = 4 << 20
CONTENT = random.Random(2).randbytes(SIZE)


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[byre.Image]:
    path = tmp_path / f"disk.{request.param}"
    create(str(path), request.param, SIZE)
    with byre.open(path, format=request.param, read_only=False) as opened:
        opened.write(0, CONTENT)
        yield opened


def cached(image: byre.Image, offset: int, length: int) -> bytes | None:
    buffer = bytearray(length)
    return bytes(buffer) if image.node.read_cached(offset, memoryview(buffer)) else None


def test_what_is_in_memory(image: byre.Image) -> None:
    image.read(0, SIZE)
    for offset, length in ((0, 512), (5, 4096), (65530, 20), (0, 262144), (SIZE - 512, 512)):
        assert cached(image, offset, length) == CONTENT[offset : offset + length]
    assert cached(image, SIZE - 512, 1024) is None


def test_it_follows_writes_discards_and_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(str(path), "qcow2", SIZE)
    with byre.open(path, read_only=False) as image:
        assert cached(image, 0, 512) is None
        image.write(0, b"a" * 131072)
        assert cached(image, 0, 131072) == b"a" * 131072
        image.write(65536, b"b" * 512)
        assert cached(image, 65535, 2) == b"ab"
        image.write_zeroes(0, 65536)
        assert cached(image, 0, 512) in (None, bytes(512))
        image.discard(65536, 65536)
        assert cached(image, 65536, 512) in (None, bytes(512))
        image.write(1 << 20, b"c" * 1000)
        assert cached(image, 1 << 20, 1000) == b"c" * 1000


def test_it_looks_through_a_chain(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create(str(base), "qcow2", SIZE)
    with byre.open(base, read_only=False) as image:
        image.write(0, CONTENT[: 1 << 20])
    create(str(top), "qcow2", SIZE, options={"backing_file": str(base), "backing_fmt": "qcow2"})
    with byre.open(top, read_only=False) as image:
        image.write(65536, b"t" * 65536)
        image.read(0, SIZE)
        assert cached(image, 0, 4096) == CONTENT[:4096]
        assert cached(image, 65536, 4096) == b"t" * 4096
        assert cached(image, 65000, 4096) in (None, CONTENT[65000:65536] + b"t" * 3560)


def test_encrypted_bytes_are_not_given_away(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    path = tmp_path / "disk.qcow2"
    options = {"encrypt.format": "luks", "encrypt.key-secret": "k", "encrypt.iter-time": 10}
    create(str(path), "qcow2", SIZE, options=options, secrets={"k": b"secret"})
    target = {"driver": "qcow2", "file": str(path), "encrypt.key-secret": "k"}
    with byre.open(target, read_only=False, secrets={"k": b"secret"}) as image:
        image.write(0, CONTENT[:65536])
        assert cached(image, 0, 512) in (None, CONTENT[:512])
        assert image.node.file_range(0, 512) is None


def test_ranges_in_files(image: byre.Image) -> None:
    """A range is named only where its bytes stay: in a raw file, or in a format that nobody writes to."""
    image.read(0, SIZE)
    place = image.node.file_range(4096, 8192)
    if image.format == "raw":
        assert place is not None
        assert os.pread(place[0], 8192, place[1]) == CONTENT[4096:12288]
    else:
        assert place is None
        image.close()
        with byre.open(image.filename) as reader:
            reader.read(0, SIZE)
            place = reader.node.file_range(4096, 8192)
            assert place is not None
            assert os.pread(place[0], 8192, place[1]) == CONTENT[4096:12288]
            assert reader.node.file_range(SIZE - 512, 1024) is None


def test_direct_ranges(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(str(path), "qcow2", SIZE)
    with byre.open(path, read_only=False, cache="none") as image:
        image.write(0, CONTENT[:131072])
        image.read(0, 4096)
        assert cached(image, 0, 4096) is None
        assert image.node.direct_range(100, 512) is None
        found = image.node.direct_range(0, 4096)
        assert found is not None
        fd, host, give_back = found
        assert give_back is not None
        assert image.node.inflight.ticket_count == 1  # type: ignore[attr-defined]
        give_back()
        assert image.node.inflight.ticket_count == 0  # type: ignore[attr-defined]
        assert host % 4096 == 0
        assert fd >= 0


def test_memory() -> None:
    node = MemoryNode(CONTENT)
    buffer = bytearray(1000)
    assert node.read_cached(5, memoryview(buffer))
    assert buffer == CONTENT[5:1005]
    assert node.buffered
