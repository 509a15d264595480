"""Snapshots and power cuts: after one at any moment the snapshot table is the old or the new one, the disk and every
snapshot hold what they held, and the image is good for work.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from byre.errors import ByreError
from byre.filters.replay import CrashState, WriteLog, crash_states
from byre.image import Image
from byre.jobs.job import Control
from conftest import Run
from crash.harness import Setup
from crash.workloads import pattern, setup
from support.walk import walk

PARTS = 12
"""The disk in as many parts as there are places to write to."""
SECTOR = 512

Step = Callable[[Image, int], None]


class Version(NamedTuple):
    """What the guest sees, and what each snapshot holds."""

    disk: bytes
    snapshots: dict[str, bytes]


def snapshots_of(start: Setup, data: bytes, names: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        with start.open(data, None, read_only=True) as image:
            node: Any = image.node
            node.load_snapshot(name)
            found[name] = image.read(0, image.size)
    return found


def names_in(image: Image) -> list[str]:
    node: Any = image.node
    return [shot.name for shot in node.snapshots]


class History:
    """A workload that ran to its end, each step made durable before the next."""

    def __init__(self, start: Setup, steps: Sequence[tuple[str, Step]]) -> None:
        self.start = start
        self.steps = tuple(name for name, _ in steps)
        self.log = WriteLog()
        image = start.open(start.image, None, self.log)
        self.versions = [self._look(image, start.image)]
        for number, (_, step) in enumerate(steps):
            step(image, number)
            image.flush()
            self.log.mark(number + 1)
            self.versions.append(self._look(image, self.log.final("image").to_bytes()))
        image.close()

    def _look(self, image: Image, data: bytes) -> Version:
        return Version(image.read(0, image.size), snapshots_of(self.start, data, names_in(image)))

    def around(self, state: CrashState) -> tuple[Version, Version]:
        """The versions before and after the step in which the power went."""
        done = max((int(str(mark)) for mark in state.marks), default=0)
        return self.versions[done], self.versions[min(done + 1, len(self.steps))]

    def current(self, state: CrashState) -> str:
        done = max((int(str(mark)) for mark in state.marks), default=0)
        return self.steps[done] if done < len(self.steps) else ""


def judge(history: History, state: CrashState) -> None:
    start = history.start
    story = f"{'+'.join(history.steps)}, in {history.current(state)!r}: {state.story}"
    old, new = history.around(state)
    data = state.disks["image"].to_bytes()
    found = walk(data)
    assert not found.damage, f"{story}\n{found.damage[:5]}"
    version_3 = data[7] == 3
    dirty = version_3 and data[79] & 1
    assert dirty or not version_3 or not found.copied, f"{story}\n{found.copied[:5]}"
    with start.open(data, None, read_only=True) as image:
        disk, names = image.read(0, image.size), names_in(image)
    check_disk(history.current(state), disk, old, new, story)
    assert names in (list(old.snapshots), list(new.snapshots)), story
    kept = snapshots_of(start, data, names)
    for name in names:
        assert kept[name] in (old.snapshots.get(name), new.snapshots.get(name)), f"{story}\nsnapshot {name}"
    use(start, data, disk, kept, story)


def check_disk(step: str, disk: bytes, old: Version, new: Version, story: str) -> None:
    if step.startswith("write"):
        for at in range(0, max(len(disk), len(old.disk)), SECTOR):
            part = disk[at : at + SECTOR]
            assert part in (old.disk[at : at + SECTOR], new.disk[at : at + SECTOR]), f"{story}\nsector {at // SECTOR}"
    else:
        assert disk in (old.disk, new.disk), f"{story}\nthe disk is neither what it was nor what it becomes"


def use(start: Setup, data: bytes, disk: bytes, kept: dict[str, bytes], story: str) -> None:
    """Opened for writing the image mends itself; writing everywhere changes the disk and no snapshot."""
    log = WriteLog()
    with start.open(data, None, log) as image:
        after = walk(log.final("image").to_bytes())
        assert not after.damage, story
        if data[7] == 3:
            assert not after.copied, f"{story}\n{after.copied[:5]}"
        node: Any = image.node
        result = node.check(Control())
        assert not result.check_errors, story
        assert data[7] == 2 or not result.corruptions, f"{story}\n{result.messages[:5]}"
        assert image.read(0, image.size) == disk, f"{story}\nmending changed the disk"
        expected = bytearray(disk)
        for offset in range(0, len(disk), 3 * SECTOR + 100):
            part = b"after the crash"[: len(disk) - offset]
            image.write(offset, part)
            expected[offset : offset + len(part)] = part
        node.create_snapshot("after the crash")
        kept = {**kept, "after the crash": bytes(expected)}
        for name in list(kept)[:1]:
            node.delete_snapshot(name)
            del kept[name]
        assert image.read(0, image.size) == expected, story
    final = log.final("image").to_bytes()
    found = walk(final)
    assert not found.damage, f"{story}\nafter writing on: {found.damage[:5]}"
    assert snapshots_of(start, final, list(kept)) == kept, f"{story}\nafter writing on, a snapshot changed"


# -- workloads ------------------------------------------------------------------------------------


def write(image: Image, step: int) -> None:
    unit = image.size // PARTS
    image.write((step * 2 % PARTS) * unit + unit // 3, pattern(step, min(unit * 2, image.size - unit * PARTS // 2)))


def create(image: Image, step: int) -> None:
    image.create_snapshot(f"s{step}")


def apply_first(image: Image, _step: int) -> None:
    image.apply_snapshot(names_in(image)[0])


def apply_last(image: Image, _step: int) -> None:
    image.apply_snapshot(names_in(image)[-1])


def delete_first(image: Image, _step: int) -> None:
    image.delete_snapshot(names_in(image)[0])


def delete_last(image: Image, _step: int) -> None:
    image.delete_snapshot(names_in(image)[-1])


def grow(image: Image, _step: int) -> None:
    image.resize(image.size + 3 * image.size // PARTS)


def state_and_create(image: Image, step: int) -> None:
    node: Any = image.node
    node.save_vmstate(100, memoryview(pattern(step, 1500)))
    node.create_snapshot(f"s{step}", vm_state_size=1600)


WORKLOADS: dict[str, list[tuple[str, Step]]] = {
    "create": [("create", create), ("write", write), ("create", create)],
    "delete": [("create", create), ("write", write), ("create", create), ("delete", delete_first),
               ("delete", delete_first)],
    "apply": [("create", create), ("write", write), ("apply", apply_first), ("write", write)],
    "apply and delete": [("create", create), ("write", write), ("create", create), ("apply", apply_first),
                         ("delete", delete_last), ("delete", delete_last)],
    "sizes": [("create", create), ("resize", grow), ("create", create), ("apply", apply_first), ("apply", apply_last)],
    "machine state": [("create", state_and_create), ("write", write), ("apply", apply_first)],
}  # fmt: skip

SETUPS: dict[str, dict[str, Any]] = {
    "512": {"cluster": 512, "clusters": 240},
    "512 v2": {"cluster": 512, "clusters": 240, "compat": "0.10"},
    "512, 64 bits": {"cluster": 512, "clusters": 240, "refcount_bits": 64},
    "4k, 4 bits": {"cluster": 4096, "clusters": 12, "refcount_bits": 4},
}


def histories() -> Iterator[Any]:
    for kind in SETUPS:
        for work in WORKLOADS:
            if kind == "512 v2" and work == "sizes":
                continue  # version 2 keeps no sizes
            yield pytest.param(kind, work, id=f"{kind}-{work}")


def history(kind: str, work: str) -> History:
    options = dict(SETUPS[kind])
    return History(setup(options.pop("cluster"), options.pop("clusters"), **options), WORKLOADS[work])


@pytest.mark.parametrize(("kind", "work"), list(histories()))
def test_every_crash_leaves_old_or_new(kind: str, work: str) -> None:
    past = history(kind, work)
    for state in crash_states(past.log):
        try:
            judge(past, state)
        except ByreError as error:
            raise AssertionError(f"{work}, in {past.current(state)!r}: {state.story}: {error}") from error


@pytest.mark.oracle
def test_the_peer_finds_nothing_worse(tmp_path: Path, qemu_img: Run) -> None:
    past = history("512", "apply and delete")
    states = list(crash_states(past.log))
    path = tmp_path / "disk.qcow2"
    for state in random.Random(1).sample(states, 8):
        path.write_bytes(state.disks["image"].to_bytes())
        dirty = path.read_bytes()[79] & 1
        done = qemu_img("check", *(["-r", "all"] if dirty else []), path, check=False)
        assert done.returncode in (0, 3), f"{state.story}\n{done.stdout}{done.stderr}"
