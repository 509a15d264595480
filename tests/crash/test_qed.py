"""qed, and the other formats without reference counts, after a power cut: every state the disk could be in is judged.

What must hold: no damage (leaks are allowed), every sector holds its last flushed value or one written since, reading
needs no repair, and opening for writing mends by itself.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any, NamedTuple

import pytest

from byre.errors import ByreError
from byre.filters.replay import CrashState, WriteLog
from byre.filters.writelog import LogNode
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from crash.harness import Bad, Recording, Step, compare
from crash.workloads import pattern
from support.images import layer, new_image, open_image
from support.vdi import small_vdi

CLUSTERS = 24


class Setup(NamedTuple):
    """An image to begin with; as the harness wants it."""

    format: str
    cluster: int
    image: bytes
    base: bytes | None = None
    data: bytes | None = None

    def open(self, image: bytes, data: bytes | None, log: WriteLog | None = None, *, read_only: bool = False,
             check: bool = False) -> Image:  # fmt: skip
        assert data is None
        graph = Graph()
        below = layer(graph, MemoryNode(self.base), "raw") if self.base is not None else None
        filters = [LogNode(log, disk="image")] if log is not None else []
        return open_image(MemoryNode(image), self.format, graph=graph, filters=filters, backing=below,
                          read_only=read_only, check=check)  # fmt: skip


def setup(format: str, *, backed: bool = False) -> Setup:
    """Clusters 0 to 7 hold data, in an order of their own."""
    cluster = 4096 if format == "qed" else 512 if backed or format == "vdi" else 4096 if format == "qcow" else 1024
    size = cluster * CLUSTERS
    base = pattern(99, size - cluster // 2) if backed else None
    named = {"backing_file": "base"} if backed else {}
    if format == "vdi":
        memory = small_vdi(size, cluster)
    elif format == "qed":
        memory = new_image("qed", size, cluster_size=4096, table_size=1, **named)
    elif format == "parallels":
        memory = new_image("parallels", size, cluster_size=cluster)
    else:
        memory = new_image("qcow", size, **named)
    made = Setup(format, cluster, memory.to_bytes(), base)
    graph = Graph()
    below = layer(graph, MemoryNode(base), "raw") if base is not None else None
    with open_image(memory, format, graph=graph, backing=below) as image:
        for index in (3, 0, 5, 1, 7, 2, 6, 4):
            image.write(index * cluster, pattern(index, cluster))
    return made._replace(image=memory.to_bytes())


def steps(made: Setup) -> dict[str, Step]:
    unit = made.cluster
    table: dict[str, Step] = {
        "new": lambda image, step: image.write(12 * unit, pattern(step, 3 * unit)),
        "part": lambda image, step: image.write(9 * unit + 100, pattern(step, unit)),
        "overwrite": lambda image, step: image.write(2 * unit + 50, pattern(step, 2 * unit)),
        "zero": lambda image, _: image.write_zeroes(unit, 9 * unit, unmap=True),
        "discard": lambda image, _: image.discard(4 * unit, 3 * unit),
        "flush": lambda image, _: image.flush(),
    }
    if made.format == "qcow":
        table["compressed"] = lambda image, step: image.write_compressed(6 * unit, bytes([step + 1]) * unit)
    else:
        table["resize"] = lambda image, _: image.resize(image.size + unit)
    return table


def judge(recording: Recording, state: CrashState) -> None:
    made: Any = recording.setup
    story = f"{made.format}: {'+'.join(recording.names)}: {state.story}"
    data = state.disks["image"].to_bytes()
    try:
        with made.open(data, None, read_only=True, check=True) as image:
            found = image.read(0, image.size)
            if len(found) not in recording.sizes:
                raise Bad(f"{story}\nsize {len(found)} was never set")
            compare(recording, state, found, story)
            if made.format != "qcow":
                result = image.node.check(Control())
                wrong = [text for text in result.messages if text != "ERROR image was not closed correctly"
                         and "eaked" not in text]  # fmt: skip
                if wrong or result.check_errors:
                    raise Bad(f"{story}\ncheck: {wrong}")
        with made.open(data, None) as image:
            assert image.read(0, image.size) == found, story
            image.write(10 * made.cluster + 5, b"after the crash")
            image.flush()
            expected = bytearray(found)
            expected[10 * made.cluster + 5 : 10 * made.cluster + 20] = b"after the crash"
            if image.read(0, image.size) != expected:
                raise Bad(f"{story}\nwriting after the crash changed something else")
            if made.format != "qcow" and image.node.check(Control()).corruptions:
                raise Bad(f"{story}\ndamage after writing on")
    except ByreError as error:
        raise Bad(f"{story}\ncannot be used: {error}") from error


CASES = {"qed": 3, "qed-backed": 2, "vdi": 2, "parallels": 2, "qcow": 2, "qcow-backed": 1}
"""How many of a hundred sequences run."""


@pytest.mark.parametrize("name", CASES)
def test_no_state_is_bad(name: str) -> None:
    format, _, backed = name.partition("-")
    made = setup(format, backed=bool(backed))
    table = steps(made)
    sequences = [*((one,) for one in table), *product(table, repeat=2), *product(table, repeat=3)]
    chosen = random.Random(name).sample(sequences, max(6, len(sequences) * CASES[name] // 100))
    chosen += [("new", "flush", "zero"), ("discard", "flush", "new"), ("part", "flush", "overwrite")]
    seen: set[object] = set()
    for sequence in chosen:
        recording = Recording(made, [(step, table[step]) for step in sequence])  # type: ignore[arg-type]
        for state in recording.states():
            identity = (state.digest, recording.prefix(state))
            if identity not in seen:
                seen.add(identity)
                judge(recording, state)
    assert len(seen) >= 100


def test_the_judge_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the flush between data and tables there are bad states: the enumeration would find them."""
    from byre.formats import twolevel

    def careless(self: twolevel.TwoLevelMap) -> None:
        self.l2.write_dirty()
        for index in sorted(self._l1_dirty):
            part = twolevel.encode_words(self.l1[index * 512 : index * 512 + 512], self.shape.order)
            self.file.write_from(self.l1_offset + index * 4096, memoryview(part))
        self._l1_dirty.clear()

    monkeypatch.setattr(twolevel.TwoLevelMap, "write_back", careless)
    made = setup("qed", backed=True)
    table = steps(made)
    with pytest.raises(Bad):
        for sequence in (("part", "flush"), ("new", "flush", "part")):
            recording = Recording(made, [(step, table[step]) for step in sequence])  # type: ignore[arg-type]
            for state in recording.states():
                judge(recording, state)
