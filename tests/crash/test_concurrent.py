"""qcow2 after a power cut while several threads wrote, discarded and flushed: what each was told is durable is there.

The other crash tests run one operation after the other. Here the order is that of the threads, so a failure names a
seed that may need a few runs to show again.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from byre.graph.creating import create
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from support.images import open_image
from support.walk import walk

SECTOR = 512
THREADS = 4
TURNS = 40
CUTS = 25
"""Power cuts that are looked at for each run."""


class Event(NamedTuple):
    """A write (``data``), a new length, or a flush that covers the first ``covers`` events."""

    offset: int = 0
    data: bytes = b""
    size: int = 0
    covers: int = -1


class Logged(MemoryNode):
    """Memory that remembers what was done to it; its flushes take a while."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.events: list[Event] = []

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        data = bytes(buffer)
        super().write_from(offset, memoryview(data), flags)
        self.events.append(Event(offset, data))

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        super().write_zeroes(offset, length, flags)
        self.events.append(Event(offset, bytes(length)))

    def discard(self, offset: int, length: int) -> None:
        super().discard(offset, length)
        self.events.append(Event(offset, bytes(length)))

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        super().resize(size, preallocation=preallocation, exact=exact)
        self.events.append(Event(size=self.size))

    def flush(self) -> None:
        covered = len(self.events)
        time.sleep(random.choice((0, 0.0005, 0.002)))
        super().flush()
        self.events.append(Event(covers=covered))


class History:
    """Of one cluster, which one thread writes: its values in order, and how far they were durable when."""

    def __init__(self) -> None:
        self.values: list[tuple[int, int]] = [(0, 0)]
        self.durable: list[tuple[int, int]] = []

    def allowed(self, cut: int) -> set[int]:
        first = max((count for at, count in self.durable if at <= cut), default=0)
        return {value for number, (at, value) in enumerate(self.values)
                if number == first or (number > first and at <= cut)}  # fmt: skip


def run(image: Image, memory: Logged, cluster: int, count: int, seed: int) -> dict[int, History]:
    """Everybody at once; what may be found where."""
    histories = {index: History() for index in range(count)}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        chooser = random.Random(seed * THREADS + number)
        mine = range(number, count, THREADS)
        for turn in range(TURNS):
            index = chooser.choice(mine)
            history, choice = histories[index], chooser.random()
            if choice < 0.55:
                history.values.append((len(memory.events), turn + 1))
                image.write(index * cluster, bytes([turn + 1]) * cluster)
            elif choice < 0.8:
                history.values.append((len(memory.events), 0))
                if choice < 0.75:
                    image.discard(index * cluster, cluster)
                else:
                    image.write_zeroes(index * cluster, cluster, unmap=True)
            else:
                reached = [(histories[each], len(histories[each].values) - 1) for each in mine]
                image.flush()
                for each, last in reached:
                    each.durable.append((len(memory.events), last))

    def checked(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=checked, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return histories


def after(begin: bytes, events: list[Event], chooser: random.Random) -> bytes:
    """A state that a power cut behind ``events`` may leave: all that was flushed, any of the rest, torn in sectors."""
    durable = max((event.covers for event in events), default=0)
    ends = [event.size or event.offset + len(event.data) for event in events]
    disk = bytearray(begin).ljust(max([len(begin), *ends]), b"\0")
    for number, (offset, data, _, _) in enumerate(events):
        fate = chooser.random() if number >= durable else 1.0
        if fate >= 0.6:
            disk[offset : offset + len(data)] = data
        elif fate >= 0.45:
            for at in range(0, len(data), SECTOR):
                if chooser.random() < 0.5:
                    part = data[at : at + SECTOR]
                    disk[offset + at : offset + at + len(part)] = part
    return bytes(disk)


@pytest.mark.parametrize("clusters", [24, 300])
@pytest.mark.parametrize(
    ("cluster", "options"),
    [(512, {}), (4096, {}), (4096, {"lazy_refcounts": True}), (16384, {"extended_l2": True})],
    ids=["512", "4k", "4k-lazy", "16k-extended"],
)
def test_no_state_is_bad(cluster: int, options: dict[str, object], clusters: int, tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(str(path), "qcow2", clusters * cluster, options={"cluster_size": cluster, **options})
    begin = path.read_bytes()
    for seed in range(5):
        memory = Logged(begin)
        with open_image(memory, graph=Graph(), read_only=False) as image:
            histories = run(image, memory, cluster, clusters, seed)
            events = list(memory.events)
        chooser = random.Random(seed)
        for _ in range(CUTS):
            cut = chooser.randrange(len(events) + 1)
            state = after(begin, events[:cut], chooser)
            story = f"seed {seed}, cut behind {cut} of {len(events)} events"
            if not state[79] & 1:  # else the counts are said to be wrong
                findings = walk(state)
                bad = findings.damage + findings.copied
                assert not bad, f"{story}: {bad[:3]}"
            with open_image(MemoryNode(state), graph=Graph(), read_only=True) as image:
                for index, history in histories.items():
                    if len(history.values) > 1:
                        found = set(image.read(index * cluster, cluster))
                        assert found <= history.allowed(cut), f"{story}: cluster {index} holds {sorted(found)}"
