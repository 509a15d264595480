"""Repairs of qcow2 images and power cuts: whatever the moment, another repair ends clean, and nothing more is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from byre.filters.replay import WriteLog, crash_states
from byre.filters.writelog import LogNode
from byre.formats.qcow2 import layout
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from crash.workloads import setup
from support.images import open_image

SIZE = 256 * 1024
"""Two L2 tables, the second one is not there."""
CLUSTER = 1024
PAST = 0x7F_0000


def opened(data: bytes, log: WriteLog | None = None, *, check: bool = False) -> Image:
    filters = [LogNode(log, disk="image")] if log is not None else []
    return open_image(MemoryNode(data), filters=filters, read_only=log is None, options={"backing": None}, check=check)


def prepared() -> bytes:
    """Some data, a snapshot, a bitmap "b" that calls the first and the last 4 KiB changed."""
    log = WriteLog()
    with opened(setup(CLUSTER, SIZE // CLUSTER, refcount_bits=16).image, log) as image:
        node: Any = image.node
        image.write(5000, b"s" * 9000)
        image.create_snapshot("one")
        bitmap = node.bitmap_store().add("b", 4096)
        bitmap.set(0, 4096)
        bitmap.set(SIZE - 4096, 4096)
    return log.final("image").to_bytes()


def word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "big")


def put(data: bytes, at: int, value: int, length: int = 8) -> bytes:
    return data[:at] + value.to_bytes(length, "big") + data[at + length :]


def directory(data: bytes) -> int:
    return word(data, data.index((layout.EXTENSION_BITMAPS << 32 | 24).to_bytes(8, "big")) + 24)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "bits past the end": lambda data: put(data, word(data, directory(data)), PAST),
    "bitmap table past the end": lambda data: put(data, directory(data), PAST),
    "and its length": lambda data: put(put(data, directory(data), PAST), directory(data) + 8, 9, 4),
    "L1 entry": lambda data: put(data, layout.decode_header(data).l1_table_offset + 8, 0x200),
    "length of a snapshot's id": lambda data: put(data, layout.decode_header(data).snapshots_offset + 12, 4097, 2),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_power_cuts_while_repairing(what: str) -> None:
    whole = prepared()
    damaged = DAMAGE[what](whole)
    log = WriteLog()
    with opened(damaged, log, check=True) as image:
        node: Any = image.node
        assert node.check(Control(), "all")[0:3:2] == (0, 0)
    seen: set[object] = set()
    for state in crash_states(log):
        if state.digest not in seen:
            seen.add(state.digest)
            judge(whole, damaged, state.disks["image"].to_bytes(), f"{what}: {state.story}")
    assert len(seen) > 1


def judge(whole: bytes, damaged: bytes, data: bytes, story: str) -> None:
    with opened(damaged, check=True) as image:
        node: Any = image.node
        before = node.check(Control())
    with opened(data, check=True) as image:
        node = image.node
        result = node.check(Control())
        assert not result.check_errors, f"{story}\n{result.messages[:5]}"
        assert result.corruptions <= before.corruptions, f"{story}\n{result.messages[:5]}"
    log = WriteLog()
    with opened(data, log, check=True) as image:
        node = image.node
        result = node.check(Control(), "all")
        assert result[0:3:2] == (0, 0), f"{story}\n{result.messages[:5]}"
    with opened(log.final("image").to_bytes()) as image, opened(whole) as good:
        node = image.node
        assert node.check(Control())[:3] == (0, 0, 0), story
        (bitmap,) = node.bitmap_store().all()
        assert not bitmap.inconsistent, story
        assert bitmap.get(0), story
        assert bitmap.get(SIZE - 4096), story
        kept: Any = good.node
        assert [shot[0] for shot in node.snapshots] == [shot[0] for shot in kept.snapshots], story
        same = image.read(0, SIZE) == good.read(0, SIZE)
        assert same, story
