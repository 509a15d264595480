"""The moments a qcow2 image reports to a fault filter below it: the names scripts know from the peer, in its order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from byre.errors import ByreError
from byre.image import Image
from byre.protocols.memory import MemoryNode
from support.images import detached, new_image, open_image
from support.walk import walk

CLUSTER = 512
SPAN = CLUSTER * CLUSTER // 8
"""What one L2 table maps."""


class Listener(MemoryNode):
    """A file that hears of events, and fails the next write behind one of them."""

    takes_events = True

    def __init__(self, data: bytes, failing: str = "") -> None:
        super().__init__(data)
        self.events: list[str] = []
        self._failing = failing
        self._fail = False

    def debug_event(self, name: str) -> None:
        self.events.append(name)
        if name == self._failing:
            self._fail, self._failing = True, ""

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        if self._fail:
            self._fail = False
            raise ByreError("this write fails, for a test")
        super().write_from(offset, buffer, flags)


def shared_table(image: Image) -> None:
    image.write(0, b"x" * CLUSTER)
    image.flush()
    image.node.create_snapshot("s")  # type: ignore[attr-defined]


def nothing(image: Image) -> None:
    """No preparation."""


def written(image: Image) -> None:
    image.write(0, b"x" * image.size)


CASES: dict[str, tuple[Callable[[Image], None], Callable[[Image], None], list[str]]] = {
    "a new cluster, in part": (
        nothing,
        lambda image: image.write(10, b"y"),
        ["l2_alloc_write", "cluster_alloc", "cluster_alloc_space", "write_aio", "refblock_update_part", "l2_update",
         "l1_update"],
    ),
    "copy on write": (
        shared_table,
        lambda image: image.write(10, b"y"),
        ["l2_alloc_cow_read", "l2_alloc_write", "cow_read", "cow_write", "write_aio", "l2_update", "l1_update",
         "cluster_free"],
    ),
    "a compressed cluster": (
        nothing,
        lambda image: image.write_compressed(0, b"z" * CLUSTER),
        ["l2_alloc_write", "cluster_alloc_bytes", "write_compressed", "l2_update_compressed", "l2_update"],
    ),
    "growing": (
        nothing,
        lambda image: image.resize(200 * SPAN),
        ["l1_grow_alloc_table", "cluster_alloc", "l1_grow_write_table", "l1_grow_activate_table"],
    ),
    "shrinking": (
        written,
        lambda image: image.resize(SPAN, shrink=True),
        ["l2_update", "cluster_free", "l1_shrink_write_table", "l1_update", "l1_shrink_free_l2_clusters",
         "cluster_free"],
    ),
    "new refcount blocks": (
        nothing,
        lambda image: image.write(0, b"x" * (4 * SPAN)),
        ["refblock_alloc", "write_aio", "refblock_alloc_write", "refblock_update_part", "refblock_alloc_hookup",
         "l2_update"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_what_is_reported(name: str) -> None:
    prepare, act, expected = CASES[name]
    memory = new_image("qcow2", 8 * SPAN, cluster_size=CLUSTER)
    with open_image(memory) as image:
        prepare(image)
    file = Listener(detached(memory).to_bytes())
    with open_image(file) as image:
        assert file.events == ["reftable_load"]
        act(image)
        image.flush()
    position = 0
    for event in expected:
        assert event in file.events[position:], (event, file.events)
        position = file.events.index(event, position) + 1
    assert not walk(file.to_bytes()).damage


@pytest.mark.parametrize("event", ["l1_grow_write_table", "l1_grow_activate_table", "l1_shrink_write_table",
                                   "l1_shrink_free_l2_clusters", "refblock_alloc_write", "cluster_alloc_space",
                                   "l2_alloc_cow_read", "l2_update_compressed", "empty_image_prepare"])  # fmt: skip
def test_a_failure_at_any_of_them_damages_nothing(event: str) -> None:
    memory = new_image("qcow2", 8 * SPAN, cluster_size=CLUSTER)
    with open_image(memory) as image:
        image.write(SPAN, b"k" * CLUSTER)
        shared_table(image)
    file = Listener(detached(memory).to_bytes(), event)
    image = open_image(file)
    with suppress(ByreError):
        image.write(10, b"y")
        image.write(7 * SPAN - 100, b"y")
        image.write(2 * SPAN, b"w" * (4 * SPAN))
        image.write_compressed(7 * SPAN, b"z" * CLUSTER)
        image.flush()
        image.resize(200 * SPAN)
        image.resize(7 * SPAN, shrink=True)
        image.node.make_empty()  # type: ignore[attr-defined]
    assert event in file.events
    with suppress(ByreError):
        image.close()
    assert not walk(file.to_bytes()).damage
