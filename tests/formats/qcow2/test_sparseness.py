"""When it is worthwhile to look for data in holes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import byre
from byre.formats.abilities import HasHoles


def answer(path: Path) -> bool:
    with byre.open(str(path), format="qcow2") as image:
        assert isinstance(image.node, HasHoles)
        return image.node.has_holes()


@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096, "refcount_bits": 1}, {"refcount_bits": 64}])
@pytest.mark.parametrize(("preallocation", "expected"), [("off", False), ("metadata", True)])
def test_preallocated_metadata(tmp_path: Path, options: dict[str, object], preallocation: str, expected: bool) -> None:
    path = tmp_path / "x"
    byre.create(str(path), "qcow2", 64 << 20, options={"preallocation": preallocation, **options})
    assert answer(path) is expected


def test_written_clusters_fill_the_holes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    byre.create(str(path), "qcow2", 4 << 20, options={"preallocation": "metadata"})
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"x" * (4 << 20))
    assert answer(path) is False


def test_a_long_file_of_which_nothing_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x"
    byre.create(str(path), "qcow2", 1 << 30)
    os.truncate(path, 1 << 40)
    assert answer(path) is False
