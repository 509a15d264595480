"""Reopening qcow2 images: what is refused, and what is on disk before the image is read-only."""

from __future__ import annotations

from pathlib import Path

import pytest

import byre
from byre.errors import NotSupported, ReadOnly
from byre.formats.abilities import require_snapshots
from byre.graph.creating import create
from support.images import detached, new_image, open_image

SIZE = 1 << 20


def test_an_image_that_shows_a_snapshot_stays_read_only() -> None:
    memory = new_image("qcow2", SIZE)
    with open_image(memory) as image:
        image.write(0, b"then")
        image.create_snapshot("one")
        image.write(0, b"now!")
    with open_image(detached(memory), read_only=True) as image:
        require_snapshots(image.node).load_snapshot("one")
        assert image.read(0, 4) == b"then"
        with pytest.raises(ReadOnly, match="is loaded, which cannot be written"):
            image.reopen(read_only=False)
        assert image.read_only
        assert image.read(0, 4) == b"then"


def test_an_option_the_image_cannot_have_changes_nothing() -> None:
    with open_image(new_image("qcow2", SIZE, compat="0.10")) as image:
        image.write(0, b"before")
        with pytest.raises(NotSupported, match="lazy-refcounts"):
            image.reopen(read_only=True, options={"lazy-refcounts": True})
        assert not image.read_only
        image.write(6, b" and after")
        assert image.read(0, 16) == b"before and after"


def test_everything_is_written_back_before_it_is_read_only(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.qcow2")
    create(path, "qcow2", SIZE)
    with byre.open(path, read_only=False) as image:
        image.write(4096, b"kept")
        image.reopen(read_only=True)
        with byre.open(path) as other:
            assert other.read(4096, 4) == b"kept"
        with pytest.raises(ReadOnly):
            image.write(0, b"x")
        image.reopen(read_only=False)
        image.write(0, b"x")
    with byre.open(path) as image:
        assert image.read(0, 1) == b"x"
