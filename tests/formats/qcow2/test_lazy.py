"""Lazy reference counts: what a flush leaves out, what the dirty bit says, what a crash leaves; caches, discards."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from byre.errors import ByreError
from byre.filters.replay import WriteLog
from byre.filters.writelog import LogNode
from byre.formats.qcow2 import layout
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from conftest import Run
from support.images import detached, new_image, open_image
from support.walk import walk

CLUSTER = 4096
SIZE = CLUSTER * 64


def is_dirty(memory: MemoryNode) -> bool:
    return bool(memory.to_bytes()[79] & layout.INCOMPATIBLE_DIRTY)


def make(**options: object) -> MemoryNode:
    return new_image("qcow2", SIZE, cluster_size=CLUSTER, **options)


def copy_of(memory: MemoryNode) -> MemoryNode:
    """What a crash that loses nothing leaves."""
    return MemoryNode(memory.to_bytes())


def is_good(memory: MemoryNode) -> bool:
    return not any(walk(memory.to_bytes()))


@pytest.mark.parametrize("how", ["header", "option", "reopen"])
def test_a_flush_leaves_counts_and_sets_the_dirty_bit(how: str) -> None:
    memory = make(lazy_refcounts=how == "header")
    with open_image(memory, options={"lazy-refcounts": True} if how == "option" else None) as image:
        if how == "reopen":
            image.reopen(options={"lazy-refcounts": True})
        image.write(0, b"x" * CLUSTER)
        assert not is_dirty(memory)  # nothing on disk relies on anything yet
        image.flush()
        assert is_dirty(memory)
        crashed = copy_of(memory)
    assert not is_dirty(memory)
    assert not walk(memory.to_bytes()).damage
    assert walk(crashed.to_bytes()).damage  # which the dirty bit says
    with open_image(detached(crashed), read_only=True) as image:
        assert image.read(0, 4) == b"xxxx"
    assert is_dirty(crashed)
    with open_image(detached(crashed)) as image:
        assert not is_dirty(crashed)
        assert image.read(0, 4) == b"xxxx"
    assert is_good(crashed)


def test_the_option_is_stronger_than_the_header() -> None:
    memory = make(lazy_refcounts=True)
    with open_image(memory, options={"lazy-refcounts": False}) as image:
        image.write(0, b"x")
        image.flush()
        assert not is_dirty(memory)
        assert not walk(memory.to_bytes()).damage


def test_version_2_has_none() -> None:
    with pytest.raises(ByreError, match="version 3"):
        open_image(make(compat="0.10"), options={"lazy-refcounts": True})


def test_writing_in_place_is_not_dirty() -> None:
    memory = make(lazy_refcounts=True)
    with open_image(memory) as image:
        image.write(0, b"x" * CLUSTER)
    with open_image(detached(memory)) as image:
        image.write(5, b"in place")
        image.flush()
        assert not is_dirty(memory)


def test_counts_are_written_less_often() -> None:
    written = {}
    for lazy in (False, True):
        log = WriteLog()
        memory = make(lazy_refcounts=lazy)
        with open_image(memory, filters=[LogNode(log, disk="image")]) as image:
            for cluster in range(20):
                image.write(cluster * CLUSTER, b"x")
                image.flush()
        written[lazy] = sum(entry.kind == "write" for entry in log.entries)
    assert written[True] < written[False]


@pytest.mark.parametrize("way", ["off", "read-only", "close", "check", "snapshot", "invalidate", "resize", "amend"])
def test_what_makes_it_clean(way: str) -> None:
    """Everything that leaves the image to others, or looks at counts on disk, writes them first."""
    memory = make(lazy_refcounts=True)
    image = open_image(memory)
    node: Any = image.node
    image.write(0, b"x" * CLUSTER * 3)
    image.flush()
    assert is_dirty(memory)
    if way == "off":
        image.reopen(options={"lazy-refcounts": False})
    elif way == "read-only":
        image.reopen(read_only=True)
    elif way == "check":
        assert not node.check(Control()).corruptions
    elif way == "snapshot":
        image.create_snapshot("one")
    elif way == "invalidate":
        node.invalidate()
    elif way == "amend":
        from byre.formats.qcow2 import AMEND_OPTIONS

        node.amend(AMEND_OPTIONS.parse({"lazy_refcounts": "off"}, what="qcow2"), Control())
    elif way == "resize":
        image.resize(SIZE * 2)  # it goes on being lazy: what counts is that closing still makes it clean
    if way not in ("close", "resize"):
        assert not is_dirty(memory)
        assert not walk(memory.to_bytes()).damage
    image.close()
    assert not is_dirty(memory)
    assert is_good(memory)


def test_it_goes_on_after_each_of_them() -> None:
    memory = make(lazy_refcounts=True)
    with open_image(memory) as image:
        node: Any = image.node
        actions: list[Callable[[], object]] = [
            lambda: image.create_snapshot("a"),
            node.invalidate,
            lambda: node.check(Control()),
            lambda: image.delete_snapshot("a"),
            lambda: image.discard(0, CLUSTER * 4),
        ]
        for number, action in enumerate(actions):
            image.write(number * CLUSTER * 5, bytes([number + 1]) * CLUSTER * 2)
            image.flush()
            crashed = copy_of(memory)
            assert is_dirty(crashed)
            with open_image(crashed) as other:
                assert other.read(number * CLUSTER * 5, 8) == bytes([number + 1]) * 8
            assert not walk(crashed.to_bytes()).damage
            action()
    assert not walk(memory.to_bytes()).damage


def test_a_failed_image_stays_dirty() -> None:
    memory = make(lazy_refcounts=True)
    image = open_image(memory)
    image.write(0, b"x")
    image.flush()
    image.node.fail_stop(ByreError("a test"))  # type: ignore[attr-defined]
    with pytest.raises(ByreError):
        image.close()
    assert is_dirty(memory)


def test_many_counts_do_not_fill_memory() -> None:
    """The cache of blocks is smaller than what changes: counts are written in between, and everything is right."""
    memory = new_image("qcow2", 512 * 4096, cluster_size=512, lazy_refcounts=True)
    options = {"refcount-cache-size": 1024, "l2-cache-size": 2048}
    with open_image(memory, options=options) as image:
        for cluster in range(0, 4096, 2):
            image.write(cluster * 512, cluster.to_bytes(2, "big"))
        assert len(image.node.refcounts.blocks.tables) <= 4  # type: ignore[attr-defined]
        assert len(image.node.mapping.l2.tables) <= 4  # type: ignore[attr-defined]
    assert is_good(memory)


@pytest.mark.oracle
def test_the_peer_mends_what_a_crash_left(tmp_path: Any, qemu_img: Run, qemu_io: Run) -> None:
    memory = make(lazy_refcounts=True)
    with open_image(memory) as image:
        image.write(0, b"\x11" * CLUSTER * 3)
        image.flush()
        image.write(CLUSTER * 10, b"\x22" * CLUSTER)
        image.flush()
        crashed = copy_of(memory)
    path = tmp_path / "a.qcow2"
    path.write_bytes(crashed.to_bytes())
    qemu_io("-c", "read -P 0x11 0 12k", "-c", "read -P 0x22 40k 4k", "-c", "write 80k 4k", path)
    assert "No errors" in qemu_img("check", path).stdout


# -- caches ---------------------------------------------------------------------------------------


def tables_of(image: Image) -> int:
    return len(image.node.mapping.l2.tables)  # type: ignore[attr-defined]


def test_tables_not_used_for_long_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    from byre.io import tables

    now = itertools.count(0, 4)
    monkeypatch.setattr(tables, "monotonic", lambda: float(next(now)))
    memory = new_image("qcow2", 512 * 64 * 8, cluster_size=512)
    with open_image(memory, options={"cache-clean-interval": 10}) as image:
        for table in range(8):
            image.write(table * 512 * 64, b"x")
        for _ in range(20):
            image.flush()
        assert tables_of(image) == 0
        assert image.read(0, 1) == b"x"
    with open_image(detached(memory), options={"cache-clean-interval": 0}) as image:
        for table in range(8):
            image.read(table * 512 * 64, 1)
        for _ in range(20):
            image.flush()
        assert tables_of(image) == 8


def test_cache_sizes_change_on_reopening() -> None:
    memory = new_image("qcow2", 512 * 64 * 64, cluster_size=512)
    with open_image(memory, options={"cache-size": 4096}) as image:
        for table in range(64):
            image.write(table * 512 * 64, b"x")
        assert tables_of(image) <= 8
        image.reopen(options={"cache-size": 1 << 20})
        for table in range(64):
            assert image.read(table * 512 * 64, 1) == b"x"
        assert tables_of(image) == 64


# -- discards that keep their place ---------------------------------------------------------------


@pytest.mark.parametrize("extended", [False, True])
def test_discarded_clusters_keep_their_place(extended: bool) -> None:
    cluster = 65536 if extended else CLUSTER
    memory = new_image("qcow2", cluster * 16, cluster_size=cluster, extended_l2=extended)
    with open_image(memory, options={"discard-no-unref": True}) as image:
        image.write(0, b"x" * cluster * 4)
        image.flush()
        host = image.node.lookup(0, 1)[0].host  # type: ignore[attr-defined]
        length = memory.size
        image.discard(0, cluster * 2)
        image.write_zeroes(cluster * 2, cluster, unmap=True)
        assert image.read(0, cluster * 4) == bytes(cluster * 3) + b"x" * cluster
        image.discard(cluster * 8, cluster)  # never had a place
        assert memory.to_bytes()[host : host + cluster] == bytes(cluster)  # but gave back what it held
        image.write(0, b"y" * cluster)
        assert image.node.lookup(0, 1)[0].host == host  # type: ignore[attr-defined]
        assert memory.size == length
        image.create_snapshot("one")
        image.discard(0, cluster * 4)  # shared now: only the active layer lets go
        assert image.read(0, cluster * 4) == bytes(cluster * 4)
        image.apply_snapshot("one")
        assert image.read(0, cluster * 4) == b"y" * cluster + bytes(cluster * 2) + b"x" * cluster
    assert is_good(memory)
