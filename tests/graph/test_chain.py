"""Chains: layers with filters skipped, and what a range is over all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import byre
from byre.errors import NotFound
from byre.graph import chain
from byre.graph.creating import create
from byre.image import Image
from byre.io.extent import COMPRESSED, DATA, UNALLOCATED, ZERO

K = 65536


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """Three layers of 8 clusters (raw; 4 clusters long), each of which holds something the others do not.

    base (raw, 4 clusters): data everywhere; mid: 1 compressed, 2 zero, 5 data; top: 0 data, 6 allocated zero.
    """
    (tmp_path / "base").write_bytes(b"b" * (4 * K))
    create(str(tmp_path / "mid"), "qcow2", 8 * K, options={"backing_file": "base", "backing_fmt": "raw"})
    with byre.open(str(tmp_path / "mid"), read_only=False) as mid:
        mid.write_compressed(K, b"m" * K)
        mid.write_zeroes(2 * K, K, unmap=True)
        mid.write(5 * K, b"m" * K)
    create(str(tmp_path / "top"), "qcow2", 10 * K, options={"backing_file": "mid", "backing_fmt": "qcow2"})
    with byre.open(str(tmp_path / "top"), read_only=False) as top:
        top.write(0, b"t" * K)
        top.write(6 * K, b"t" * K)
        top.write_zeroes(6 * K, K)
    opened = byre.open(str(tmp_path / "top"))
    yield opened
    opened.close()


def test_layers(image: Image, tmp_path: Path) -> None:
    layers = chain.layers(image.node)
    assert [layer.driver for layer in layers] == ["qcow2", "qcow2", "raw"]
    assert chain.depth(image.node) == 3
    assert chain.find(image.node, str(tmp_path / "mid")) is layers[1]
    assert chain.find(image.node, layers[2].name) is layers[2]
    with pytest.raises(NotFound):
        chain.find(image.node, "elsewhere")


def test_extents_over_all_layers(image: Image) -> None:
    table = image.extents()
    rows = [
        (row.offset // K, row.length // K, row.kind, depth)
        for row, depth in zip(table, table.depth.tolist(), strict=True)
    ]
    assert rows == [
        (0, 1, DATA, 0),
        (1, 1, COMPRESSED, 1),
        (2, 1, ZERO, 1),
        (3, 1, DATA, 2),
        (4, 1, ZERO, 2),
        (5, 1, DATA, 1),
        (6, 1, ZERO, 0),
        (7, 1, ZERO, 2),
        (8, 2, ZERO, 1),
    ]
    for row, depth in zip(table, table.depth.tolist(), strict=True):
        if row.kind == DATA:
            layer = chain.layers(image.node)[depth]
            file = layer.children["file"].node
            found = bytearray(row.length)
            file.read_into(row.host, memoryview(found))
            assert found == image.read(row.offset, row.length)


def test_a_part_of_the_disk(image: Image) -> None:
    table = image.extents(K + 100, 2 * K)
    assert [(row.offset, row.length, row.kind) for row in table] == [
        (K + 100, K - 100, COMPRESSED),
        (2 * K, K, ZERO),
        (3 * K, 100, DATA),
    ]
    assert len(image.extents(0, 0)) == 0


def test_above_a_base(image: Image) -> None:
    layers = chain.layers(image.node)
    above = chain.allocated_above(image.node, layers[1], 0, 10 * K)
    assert [(row.offset // K, row.length // K, row.kind) for row in above] == [
        (0, 1, DATA),
        (1, 5, UNALLOCATED),
        (6, 1, ZERO),
        (7, 3, UNALLOCATED),
    ]
    nothing = chain.allocated_above(image.node, image.node, 0, 10 * K)
    assert [(row.length, row.kind) for row in nothing] == [(10 * K, UNALLOCATED)]


def test_filters_are_no_layers(tmp_path: Path, image: Image) -> None:
    spec = {"driver": "blkdebug", "image": {"driver": "qcow2", "file": {"filename": str(tmp_path / "top")}}}
    with byre.open(spec) as filtered:
        assert [layer.driver for layer in chain.layers(filtered.node)] == ["qcow2", "qcow2", "raw"]
        assert list(filtered.extents()) == list(image.extents())


def test_windows() -> None:
    assert list(chain.windows(0, 10, 4)) == [(0, 4), (4, 4), (8, 2)]
    assert list(chain.windows(3, 9, 4)) == [(3, 1), (4, 4), (8, 1)]
    assert list(chain.windows(5, 5, 4)) == []
    assert sum(length for _, length in chain.windows(1, (1 << 40) + 7)) == (1 << 40) + 6


def test_a_window_spans_whole_tables(image: Image) -> None:
    assert chain.window_size(image.node) >= chain.WINDOW
    assert chain.window_size(image.node) % image.node.table_span == 0  # type: ignore[attr-defined]
