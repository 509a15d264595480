"""Runs a workload on an image over logged memory, then judges every state a crash could have left.

What must hold (docs, crash model): no damage to metadata; every sector holds its last flushed value or one
written since; read-only opening needs no repair; the image can be written to afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from byre.errors import ByreError
from byre.filters.replay import CrashState, WriteLog, crash_states
from byre.filters.writelog import LogNode
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from support.images import layer, open_image
from support.walk import walk

SECTOR = 512

Step = Callable[[Image, int], None]
"""One operation of a workload; the number says which step it is, so that each writes bytes of its own."""


class Setup(NamedTuple):
    """An image to begin with.

    :ivar image: the qcow2 file's bytes
    :ivar base: a raw backing file's bytes, if there is one
    :ivar data: the external data file's bytes, if there is one
    """

    image: bytes
    base: bytes | None = None
    data: bytes | None = None

    def open(self, image: bytes, data: bytes | None, log: WriteLog | None = None, *, read_only: bool = False) -> Image:
        graph = Graph()
        memory = MemoryNode(image)
        below = layer(graph, MemoryNode(self.base), "raw") if self.base is not None else None
        data_node = MemoryNode(data) if data is not None else None
        return open_image(
            memory,
            graph=graph,
            filters=[LogNode(log, disk="image")] if log is not None else [],
            backing=below,
            data_file=data_node,
            data_filters=[LogNode(log, disk="data")] if log is not None and data is not None else [],
            read_only=read_only,
        )


class Bad(AssertionError):
    """A state that must not be."""


class Recording:
    """A workload that ran to its end, with what the guest saw after each step.

    :ivar versions: guest content before the first and after each step, as rows of sectors
    :ivar begun: clock at the beginning of each step
    """

    def __init__(self, setup: Setup, steps: Sequence[tuple[str, Step]]) -> None:
        self.setup = setup
        self.names = tuple(name for name, _ in steps)
        self.log = WriteLog()
        self.begun: list[int] = []
        contents: list[bytes] = []
        image = setup.open(setup.image, setup.data, self.log)
        try:
            contents.append(image.read(0, image.size))
            for number, (name, step) in enumerate(steps):
                self.begun.append(self.log.clock)
                step(image, number)
                contents.append(image.read(0, image.size))
                if name in ("flush", "resize"):
                    self.log.mark(number + 1)
            self.begun.append(self.log.clock)
        finally:
            image.close()
        self.sizes = [len(content) for content in contents]
        self.width = max(self.sizes)
        self.versions = [as_sectors(content, self.width) for content in contents]

    def states(self) -> Iterator[CrashState]:
        return crash_states(self.log)

    def allowed(self, state: CrashState) -> tuple[int, int]:
        """The versions, first and last, whose sectors the state may hold."""
        last = sum(begun < state.time for begun in self.begun[:-1])
        return max((int(str(mark)) for mark in state.marks), default=0), last

    def prefix(self, state: CrashState) -> tuple[object, ...]:
        """What the verdict depends on besides the bytes: equal for equal beginnings of workloads."""
        first, last = self.allowed(state)
        return self.names[:last], first


def as_sectors(content: bytes, width: int) -> np.ndarray:  # type: ignore[type-arg]
    """One row per sector, padded with zeroes to ``width`` bytes."""
    padded = content.ljust(-(-width // SECTOR) * SECTOR, b"\0")
    return np.frombuffer(padded, np.uint64).reshape(-1, SECTOR // 8)


def same(one: np.ndarray, other: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Per sector, whether the rows are equal."""
    return (one == other).all(axis=1)  # type: ignore[no-any-return]


def judge(recording: Recording, state: CrashState, *, thorough: bool = False) -> None:
    """Everything that must hold of ``state``.

    :param thorough: also check with byre, write to the image and look again
    :raises Bad: it does not
    """
    story = f"{'+'.join(recording.names)}: {state.story}"
    data = state.disks["image"].to_bytes()
    external = state.disks["data"].to_bytes() if "data" in state.disks else None
    try:
        findings = walk(_mended(recording, data, external) if _is_dirty(data) else data)
    except ByreError as error:
        raise Bad(f"{story}\ncannot be mended: {error}") from error
    if findings.damage or findings.copied:
        raise Bad(f"{story}\n" + "\n".join((findings.damage + findings.copied)[:5]))
    try:
        with recording.setup.open(data, external, read_only=True) as image:
            found = image.read(0, image.size)
    except ByreError as error:
        raise Bad(f"{story}\ncannot be read: {error}") from error
    if len(found) not in recording.sizes:
        raise Bad(f"{story}\nsize {len(found)} was never set")
    compare(recording, state, found, story)
    if thorough:
        try:
            _use(recording, data, external, found, story)
        except ByreError as error:
            raise Bad(f"{story}\ncannot be used: {error}") from error


def _is_dirty(data: bytes) -> bool:
    """Whether the image says that its reference counts are not to be believed (incompatible feature bit 0)."""
    return data[7] >= 3 and bool(data[79] & 1)


def _mended(recording: Recording, data: bytes, external: bytes | None) -> bytes:
    """What opening a dirty image for writing makes of it."""
    with recording.setup.open(data, external) as image:
        node = image.graph.find(image.node.children["file"].node.name)
    assert isinstance(node, MemoryNode)
    mended = node.to_bytes()
    if _is_dirty(mended):
        raise Bad("the image is dirty after it was mended")
    return mended


def compare(recording: Recording, state: CrashState, found: bytes, story: str) -> None:
    first, last = recording.allowed(state)
    rows = as_sectors(found, recording.width)
    good = same(rows, recording.versions[first])
    for version in recording.versions[first + 1 : last + 1]:
        if good.all():
            break
        good |= same(rows, version)
    # Behind a smaller size there is nothing to compare.
    good[len(found) // SECTOR :] = True
    if not good.all():
        wrong = np.flatnonzero(~good).tolist()
        raise Bad(f"{story}\nguest sectors {wrong[:10]} hold none of versions {first} to {last}")


def _use(recording: Recording, data: bytes, external: bytes | None, found: bytes, story: str) -> None:
    """The image is still good for work: check finds no damage, and what is written now is there afterwards."""
    with recording.setup.open(data, external) as image:
        result = image.node.check(Control())  # type: ignore[attr-defined]
        if result.corruptions or result.check_errors:
            raise Bad(f"{story}\ncheck: {result.messages}")
        expected = bytearray(found)
        width = recording.width
        if image.size < width:
            image.resize(width)
            expected = expected.ljust(width, b"\0")
            if image.read(0, width) != expected:
                raise Bad(f"{story}\nafter growing again, bytes that were cut off are back")
        for offset in range(0, width, max(width // 5, 1)):
            part = b"after the crash"[: width - offset]
            image.write(offset, part)
            expected[offset : offset + len(part)] = part
        if image.read(0, width) != expected:
            raise Bad(f"{story}\nwriting after the crash changed something else")
        node = image.graph.find(image.node.children["file"].node.name)
    assert isinstance(node, MemoryNode)
    findings = walk(node.to_bytes())
    if findings.damage or findings.copied:
        raise Bad(f"{story}\nafter writing on: " + "\n".join((findings.damage + findings.copied)[:5]))


class Tally:
    """Judges states, each once, and counts them.

    :ivar judged: how many
    """

    def __init__(self, *, thorough_every: int = 10) -> None:
        self.judged = 0
        self._seen: set[object] = set()
        self._thorough = itertools.count(1)
        self._every = thorough_every

    def run(self, recording: Recording, key: object) -> None:
        """Every state of ``recording``; ``key`` tells setups apart."""
        for state in recording.states():
            identity = (key, state.digest, recording.prefix(state))
            if identity in self._seen:
                continue
            self._seen.add(identity)
            judge(recording, state, thorough=next(self._thorough) % self._every == 0)
            self.judged += 1
