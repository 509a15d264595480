"""Bitmaps and power cuts: whatever the moment, a bitmap that says it is consistent covers all that has changed.

It may become inconsistent ("in use"); it is never wrongly clean, and none is lost that was there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from byre.bitmaps.bitmap import Bitmap
from byre.filters.replay import CrashState, WriteLog, crash_states
from byre.formats.qcow2 import AMEND_OPTIONS
from byre.image import Image
from byre.jobs.job import Control
from conftest import Run
from crash.harness import Setup
from crash.workloads import pattern, setup, squeezable
from support.walk import walk

Step = Callable[[Image], None]


def store(image: Image) -> Any:
    node: Any = image.node
    return node.bitmap_store()


class Start(NamedTuple):
    """An image with three bitmaps: "follows" (all clean, enabled), "rests" (disabled, some bits set), "full" (enabled,
    everything dirty).

    :ivar content: what the guest sees
    :ivar resting: the bits of "rests"
    """

    setup: Setup
    content: bytes
    resting: bytes


def prepared(cluster: int, clusters: int, *, across: bool = False, **options: object) -> Start:
    """
    :param across: the directory entry of "follows" lies in two sectors, its flags in the second
    """
    made = setup(cluster, clusters, **options)  # type: ignore[arg-type]
    log = WriteLog()
    with made.open(made.image, None, log) as image:
        if across:
            store(image).add("x" * (504 - 24), 4096, enabled=False)
        store(image).add("follows", 512)
        rests = store(image).add("rests", 512, enabled=False)
        rests.set(0, 1)
        rests.set(image.size // 3, cluster)
        store(image).add("full", 1024).set(0, image.size)
        content = image.read(0, image.size)
        resting = rests.dump(0, rests.byte_length)
    return Start(Setup(log.final("image").to_bytes(), made.base), content, resting)


# -- judging --------------------------------------------------------------------------------------


def judge(start: Start, name: str, state: CrashState, gone: set[str]) -> None:
    story = f"{name}: {state.story}"
    data = state.disks["image"].to_bytes()
    found = walk(data)
    assert not found.damage, f"{story}\n{found.damage[:5]}"
    with start.setup.open(data, None, read_only=True) as image:
        content = image.read(0, image.size)
        node: Any = image.node
        result = node.check(Control())
        assert not result.corruptions, f"{story}\n{result.messages[:5]}"
        assert not result.check_errors, f"{story}\n{result.messages[:5]}"
        bitmaps = {bitmap.name: bitmap for bitmap in store(image).all()}
        missing = {"follows", "rests", "full"} - set(bitmaps) - gone
        assert not missing, f"{story}\nlost: {missing}"
        for bitmap in bitmaps.values():
            if not bitmap.inconsistent:
                look_at(start, bitmap, content, story)
    go_on(start, data, content, story)


def look_at(start: Start, bitmap: Bitmap, content: bytes, story: str) -> None:
    assert bitmap.size == len(content), story
    if bitmap.name == "rests" and not bitmap.enabled:
        size = min(len(start.content), len(content)) // 512 // 8
        assert bitmap.dump(0, size) == start.resting[:size], f"{story}\n{bitmap}"
    if bitmap.name in ("follows", "full"):
        step = bitmap.granularity
        for at in range(0, min(len(content), len(start.content)), step):
            same = content[at : at + step] == start.content[at : at + step]
            assert same or bitmap.get(at), f"{story}\n{bitmap} is wrongly clean at {at:#x}"
    if bitmap.name == "full":
        assert bitmap.next_clean(0, min(len(content), len(start.content))) is None, f"{story}\n{bitmap}"


def go_on(start: Start, data: bytes, content: bytes, story: str) -> None:
    """The image is good for work, and so are the bitmaps that are consistent."""
    log = WriteLog()
    with start.setup.open(data, None, log) as image:
        for bitmap in store(image).all():
            if bitmap.inconsistent:
                store(image).remove(bitmap.name)
        names = [bitmap.name for bitmap in store(image).all()]
        store(image).add("after the crash", 512)
        image.write(1000, b"after the crash")
    final = log.final("image").to_bytes()
    assert not walk(final).damage, f"{story}\nafter writing on"
    with start.setup.open(final, None, read_only=True) as image:
        node: Any = image.node
        result = node.check(Control())
        assert not result.corruptions, f"{story}\nafter writing on: {result.messages[:5]}"
        assert image.read(0, image.size) == content[:1000] + b"after the crash" + content[1015:], story
        found = {bitmap.name: bitmap for bitmap in store(image).all()}
        assert list(found) == [*names, "after the crash"], story
        assert not any(bitmap.inconsistent for bitmap in found.values()), story
        assert found["after the crash"].dirty_bytes == 512, story
        if "follows" in found:
            assert found["follows"].get(1000), story


# -- workloads ------------------------------------------------------------------------------------


def write(image: Image) -> None:
    image.write(image.size // 2 + 300, pattern(1, image.size // 5))


def overwrite(image: Image) -> None:
    image.write(700, pattern(2, 900))


def zero(image: Image) -> None:
    image.write_zeroes(0, image.size // 3, unmap=True)


def discard(image: Image) -> None:
    image.discard(0, image.size // 3)


def compress(image: Image) -> None:
    node: Any = image.node
    at = image.size // 2
    image.write_compressed(at - at % node.cluster_size, squeezable(3, node.cluster_size))


def flush(image: Image) -> None:
    image.flush()


def add(image: Image) -> None:
    store(image).add("another", 512)


def remove(image: Image) -> None:
    store(image).remove("rests")


def remove_all(image: Image) -> None:
    for bitmap in store(image).all():
        store(image).remove(bitmap.name)


def enable(image: Image) -> None:
    store(image).find("rests").enable()


def merge(image: Image) -> None:
    store(image).find("full").merge(store(image).find("rests"))
    store(image).find("follows").merge(store(image).find("rests"))


def grow(image: Image) -> None:
    image.resize(image.size * 3)


def shrink(image: Image) -> None:
    image.resize(image.size // 2, shrink=True)


def store_and_go_on(image: Image) -> None:
    image.reopen(read_only=True)
    image.reopen(read_only=False)


WORKLOADS: dict[str, tuple[Step, ...]] = {
    "write": (write, flush, overwrite),
    "zero, discard, compress": (zero, compress, flush, discard),
    "store twice": (write, store_and_go_on, overwrite),
    "add": (add, overwrite, store_and_go_on, write),
    "remove": (overwrite, remove, write),
    "remove all": (remove_all, write),
    "remove all and add": (remove_all, add, overwrite, store_and_go_on, write),
    "enable": (enable, write, flush),
    "merge": (merge, overwrite),
    "grow": (overwrite, grow, write),
    "shrink": (write, shrink, overwrite),
}

SETUPS: dict[str, dict[str, Any]] = {
    "512": {"cluster": 512, "clusters": 60},
    "4k, 1 bit": {"cluster": 4096, "clusters": 16, "refcount_bits": 1, "filled": False},
    "1k, backing file": {"cluster": 1024, "clusters": 30, "backed": True},
    "4k, across": {"cluster": 4096, "clusters": 12, "across": True, "filled": False},
}


@pytest.mark.parametrize("kind", SETUPS)
@pytest.mark.parametrize("work", WORKLOADS)
def test_power_cuts(kind: str, work: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    start = prepared(**SETUPS[kind])
    log = WriteLog()
    image = start.setup.open(start.setup.image, None, log)
    for step in WORKLOADS[work]:
        step(image)
    image.close()
    everything = {"follows", "rests", "full"}
    gone = {"rests"} if work == "remove" else everything if work.startswith("remove all") else set()
    seen: set[object] = set()
    for state in crash_states(log):
        if state.digest not in seen:
            seen.add(state.digest)
            judge(start, f"{kind}, {work}", state, gone)
    assert len(seen) > 10
    final = log.final("image").to_bytes()
    with start.setup.open(final, None, read_only=True) as image:
        assert not any(bitmap.inconsistent for bitmap in store(image).all())


def amend(image: Image, compat: str) -> None:
    node: Any = image.node
    node.amend(AMEND_OPTIONS.parse({"compat": compat}, what="qcow2"), Control())


@pytest.mark.parametrize("kind", [kind for kind in SETUPS if "1 bit" not in kind])
def test_power_cuts_while_version_2_comes_and_bitmaps_go(kind: str) -> None:
    """Whatever the moment, it is version 3 with all bitmaps or version 2 without any."""
    start = prepared(**SETUPS[kind])
    log = WriteLog()
    image = start.setup.open(start.setup.image, None, log)
    write(image)
    if not SETUPS[kind].get("backed"):
        image.write_zeroes(0, image.size // 3)  # with a backing file, a zero cluster is written: a long test
    amend(image, "0.10")
    image.write(1000, b"in version 2")
    image.close()
    versions: set[int] = set()
    seen: set[object] = set()
    for state in crash_states(log):
        if state.digest in seen:
            continue
        seen.add(state.digest)
        data = state.disks["image"].to_bytes()
        versions.add(data[7])
        if data[7] == 2:
            after = WriteLog()
            with start.setup.open(data, None, after) as image:
                assert not store(image).all()
                amend(image, "1.1")
            state = state._replace(disks={**state.disks, "image": after.final("image")})
            judge(start, kind, state, {"follows", "rests", "full"})
        else:
            judge(start, kind, state, set())
    assert versions == {2, 3}
    assert not walk(log.final("image").to_bytes()).leaks


@pytest.mark.oracle
def test_the_peer_reads_every_state(tmp_path: Path, qemu_img: Run) -> None:
    start = prepared(cluster=4096, clusters=16)
    log = WriteLog()
    image = start.setup.open(start.setup.image, None, log)
    add(image)
    write(image)
    image.close()
    path = tmp_path / "state"
    for state in list(crash_states(log))[::25]:
        path.write_bytes(state.disks["image"].to_bytes())
        done = qemu_img("check", path, check=False)
        assert done.returncode in (0, 3), f"{state.story}\n{done.stdout}{done.stderr}"
        assert '"follows"' in qemu_img("info", "--output=json", path).stdout, state.story
