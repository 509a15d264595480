"""Copies from below and power cuts: at every moment the image reads what it read, and what was flushed is there."""

from __future__ import annotations

import pytest

from byre.filters.copy_on_read import cover
from byre.filters.replay import WriteLog, crash_states
from byre.graph import chain
from byre.image import Image
from byre.io.extent import UNALLOCATED
from crash.test_chains import DONE, after, filled, opened, sound, usable

OPTIONS = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "lazy_refcounts": True},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reading_keeps(options: dict[str, object]) -> None:
    cluster = int(str(options["cluster_size"]))
    size = cluster * 24 + 1536
    lowest = filled("lowest", size - cluster, 1, cluster_size=1024)
    old = filled("old", size - 1024, 2, below=[lowest], cluster_size=512)
    top = filled("top", size, 4, below=[old, lowest], **options)
    disks = [top, old, lowest]
    with opened(disks) as image:
        before = image.read(0, size)

    log = WriteLog()
    with opened(disks, read_only=False, log=log) as lower:
        with Image(cover(lower.graph, lower.node), lower.graph, read_only=False) as image:
            for offset in range(0, size, 5 * cluster):
                image.read(offset, min(3 * cluster, size - offset))
            image.flush()
            for offset in range(0, size, 4 * cluster):
                image.read(offset, min(4 * cluster, size - offset))
            image.flush()
            log.mark(DONE)
            assert image.read(0, size) == before
        assert not lower.node.closed
    assert {entry.disk for entry in log.entries if entry.kind == "write"} == {"top"}

    count = 0
    for state in crash_states(log):
        count += 1
        now = after(state, disks)
        sound(now[0], state.story)
        with opened(now) as image:
            assert image.read(0, size) == before, state.story
            if DONE in state.marks and "compat" not in options:
                layers = chain.layers(image.node)
                held = chain.extents(layers[0], 0, size, base=layers[1])
                assert not held.bytes_of(UNALLOCATED), state.story
        if count % 20 == 0:
            usable(now, state.story)
    assert count > 20
