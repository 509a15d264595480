"""Walking far where there is little."""

from __future__ import annotations

from pathlib import Path

import byre
from byre.jobs.stride import Stride


def test_windows_cover_grow_and_shrink(tmp_path: Path) -> None:
    byre.create(str(tmp_path / "a"), "qcow2", 1 << 40)
    with byre.open(str(tmp_path / "a")) as image:
        stride = Stride([image.node])
        position = 0
        lengths = []
        for offset, length in stride.windows(0, (1 << 40) + 5):
            assert offset == position
            position += length
            lengths.append(length)
            stride.saw(10**6 if len(lengths) == 10 else 1)
        assert position == (1 << 40) + 5
        assert lengths[0] == lengths[10] == 512 << 20
        assert max(lengths) == 16 << 30
        assert len(lengths) < 80


def test_windows_return_to_whole_tables(tmp_path: Path) -> None:
    byre.create(str(tmp_path / "a"), "qcow2", 1 << 40)
    with byre.open(str(tmp_path / "a")) as image:
        found = list(Stride([image.node]).windows(1000, 1 << 30))
        assert found == [(1000, (512 << 20) - 1000), (512 << 20, 512 << 20)]


def test_small_clusters_keep_windows_small(tmp_path: Path) -> None:
    byre.create(str(tmp_path / "a"), "qcow2", 1 << 34, options={"cluster_size": 512})
    with byre.open(str(tmp_path / "a")) as image:
        stride = Stride([image.node])
        for _offset, length in stride.windows(0, 1 << 34):
            assert length <= 128 << 20
            stride.saw(1)
