"""VMDK after a power cut: every state the disk could be in is judged, none may be bad.

Grains and tables lie inside the file and apart; what was flushed is there; a disk whose content changed has another
content ID. The two copies of the tables may differ until the disk is next written to. With ``BYRE_CRASH_FULL=1`` all
sequences of up to three operations run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from byre.errors import ByreError
from byre.filters.replay import CrashState, WriteLog
from byre.filters.writelog import LogNode
from byre.formats.vmdk import allocation, writing
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from crash.harness import Bad, Recording, Step, compare
from crash.workloads import pattern, sequences, squeezable
from support import vmdk
from support.images import layer, new_image, open_image, stack

FULL = bool(os.environ.get("BYRE_CRASH_FULL"))
GRAIN = 1024
GRAINS = 48
SIZE = GRAIN * GRAINS


class Setup(NamedTuple):
    """:ivar image: the extent with the descriptor, or the descriptor alone
    :ivar data: the extent, where it is a file of its own
    """

    image: bytes
    base: bytes | None = None
    data: bytes | None = None

    def open(self, image: bytes, data: bytes | None, log: WriteLog | None = None, *, read_only: bool = False) -> Image:
        graph = Graph()
        below = layer(graph, MemoryNode(self.base), "vmdk") if self.base is not None else None
        options: dict[str, object] = {}
        if data is not None:
            parts = [LogNode(log, disk="data")] if log is not None else []
            options["extents"] = [stack(graph, MemoryNode(data), parts).name]
        filters = [LogNode(log, disk="image")] if log is not None else []
        return open_image(MemoryNode(image), "vmdk", graph=graph, filters=filters, backing=below, options=options,
                          read_only=read_only)  # fmt: skip


class Case(NamedTuple):
    """:ivar at_least: states that must come of it, lest the test has lost its teeth"""

    chosen: int
    at_least: int
    options: dict[str, Any]


CASES = {
    "plain": Case(30, 500, {}),
    "zero-grains": Case(30, 500, {"zero_grains": True, "version": 2}),
    "one-copy": Case(20, 200, {"redundant": False}),
    "missing-tables": Case(30, 500, {"missing_tables": True}),
    "backed": Case(20, 300, {"backed": True}),
    "backed-zero-grains": Case(20, 300, {"backed": True, "zero_grains": True, "fill": False, "version": 2}),
    "split": Case(20, 300, {"split": True}),
}


def setup(*, backed: bool = False, split: bool = False, **options: Any) -> Setup:
    """Grains 0, 1 and 5 hold data, the rest nothing; tables of 8 entries."""
    content = bytearray(SIZE)
    content[: 2 * GRAIN] = pattern(90, 2 * GRAIN)
    content[5 * GRAIN : 6 * GRAIN] = pattern(91, GRAIN)
    base = vmdk.hosted(pattern(92, SIZE - 4 * GRAIN), grain=GRAIN) if backed else None
    text = vmdk.descriptor(
        [f'RW {SIZE // 512} SPARSE "part"'],
        "twoGbMaxExtentSparse" if split else "monolithicSparse",
        parent="12345678" if backed else "ffffffff",
        more='parentFileNameHint="base"' if backed else "",
    )
    extent = vmdk.hosted(bytes(content), grain=GRAIN, per_table=8, text=b"" if split else text, **options)
    return Setup(text, base, extent) if split else Setup(extent, base)


def steps() -> dict[str, Step]:
    half = GRAIN // 2

    def new(image: Image, step: int) -> None:
        image.write((6 + 3 * step) * GRAIN + half // 2, pattern(step, GRAIN + half))

    def overwrite(image: Image, step: int) -> None:
        image.write(half + step * 7, pattern(step, GRAIN))

    def far(image: Image, step: int) -> None:
        image.write((GRAINS - 1 - 9 * step) * GRAIN, pattern(step, GRAIN))

    def zero(image: Image, step: int) -> None:
        image.write_zeroes(GRAIN * (step % 2) + half, 2 * GRAIN, unmap=step != 1)

    def discard(image: Image, step: int) -> None:
        image.discard(0 if step != 1 else 5 * GRAIN, 2 * GRAIN)

    def flush(image: Image, step: int) -> None:
        image.flush()

    return {"new": new, "overwrite": overwrite, "far": far, "zero": zero, "discard": discard, "flush": flush}


def workloads(name: str) -> list[tuple[str, ...]]:
    every = sequences(list(steps()), 3)
    if FULL:
        return every
    chooser = random.Random(name)
    fixed = [("discard", "flush", "new"), ("new", "far", "flush"), ("zero", "flush", "far")]
    return [*fixed, *chooser.sample([one for one in every if len(one) > 1], CASES[name].chosen)]


def extent_of(state: CrashState) -> bytes:
    return state.disks["data" if "data" in state.disks else "image"].to_bytes()


def judge(recording: Recording, state: CrashState, number: int) -> None:
    """What must hold of every state; every fifth is opened for writing and used as well."""
    begin: Any = recording.setup
    story = f"{'+'.join(recording.names)}: {state.story}"
    found = vmdk.look_through(extent_of(state))
    if found.damage:
        raise Bad(f"{story}\n" + "\n".join(found.damage[:5]))
    if found.unequal and not extent_of(state)[72]:
        raise Bad(f"{story}\nthe copies differ, and nothing says so: {found.unequal}")
    image_bytes = state.disks["image"].to_bytes()
    data = state.disks["data"].to_bytes() if "data" in state.disks else None
    try:
        with begin.open(image_bytes, data, read_only=True) as image:
            content = image.read(0, SIZE)
            result = image.node.check(Control())
            if result.corruptions or result.check_errors:
                raise Bad(f"{story}\n{result.messages}")
            cid = image.node.cid
    except ByreError as error:
        raise Bad(f"{story}\ncannot be read: {error}") from error
    compare(recording, state, content, story)
    with begin.open(begin.image, begin.data, read_only=True) as image:
        if image.read(0, SIZE) != content and cid == 0x12345678:
            raise Bad(f"{story}\nother content under the same content ID")
    if number % 5 == 0:
        use(begin, image_bytes, data, content, story)


def use(begin: Setup, image_bytes: bytes, data: bytes | None, content: bytes, story: str) -> None:
    """It can be written to, reads the same then, and its copies are equal once it is closed."""
    expected = bytearray(content)
    try:
        with begin.open(image_bytes, data) as image:
            for offset in range(0, SIZE, SIZE // 7 // 512 * 512):
                image.write(offset, b"after the crash")
                expected[offset : offset + 15] = b"after the crash"
            if image.read(0, SIZE) != expected:
                raise Bad(f"{story}\nwriting after the crash changed something else")
            edge = "file" if data is None else "extents.0"
            memory = image.node.children[edge].node
    except ByreError as error:
        raise Bad(f"{story}\ncannot be used: {error}") from error
    assert isinstance(memory, MemoryNode)
    closed = memory.to_bytes()
    if vmdk.look_through(closed) != ([], []) or closed[72]:
        raise Bad(f"{story}\nafter writing on: {vmdk.look_through(closed)}")


def run(name: str, chosen: int | None = None) -> int:
    begin = setup(**CASES[name].options)
    table = steps()
    seen: set[object] = set()
    for sequence in workloads(name)[:chosen]:
        recording = Recording(begin, [(step, table[step]) for step in sequence])  # type: ignore[arg-type]
        for state in recording.states():
            identity = (state.digest, recording.prefix(state))
            if identity not in seen:
                seen.add(identity)
                judge(recording, state, len(seen))
    return len(seen)


@pytest.mark.parametrize("name", CASES)
def test_no_state_is_bad(name: str) -> None:
    assert run(name) >= CASES[name].at_least


def test_streams() -> None:
    """Compressed grains: what was flushed is there, and nothing points where nothing is."""
    memory = new_image("vmdk", 6 * 65536, subformat="streamOptimized")
    begin = Setup(memory.to_bytes())

    def write(image: Image, step: int) -> None:
        image.write(step * 65536, squeezable(step, 65536))

    def flush(image: Image, step: int) -> None:
        image.flush()

    recording = Recording(begin, [("write", write), ("write", write), ("flush", flush), ("write", write)])  # type: ignore[arg-type]
    states = list(recording.states())
    assert len(states) > 30
    for state in states:
        data = state.disks["image"].to_bytes()
        assert not vmdk.look_through(data).damage
        with begin.open(data, None, read_only=True) as image:
            compare(recording, state, image.read(0, image.size), state.story)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["plain", "zero-grains", "missing-tables"])
def test_the_peer_reads_the_same(name: str, qemu_img: Callable[..., Any], tmp_path: Any) -> None:
    begin = setup(**CASES[name].options)
    table = steps()
    chooser = random.Random(name)
    for sequence in chooser.sample(workloads(name), 3):
        recording = Recording(begin, [(step, table[step]) for step in sequence])  # type: ignore[arg-type]
        for state in chooser.sample(list(recording.states()), 3):
            data = state.disks["image"].to_bytes()
            (tmp_path / "image").write_bytes(data)
            with begin.open(data, None, read_only=True) as image:
                (tmp_path / "raw").write_bytes(image.read(0, SIZE))
            qemu_img("check", "-f", "vmdk", "image", cwd=tmp_path)
            qemu_img("compare", "-f", "vmdk", "-F", "raw", "image", "raw", cwd=tmp_path)


# -- the judge itself -----------------------------------------------------------------------------


def first_bad(name: str = "plain") -> str:
    try:
        run(name, 12)
    except Bad as bad:
        return str(bad)
    return ""


def test_tables_written_before_the_data_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(allocator: allocation.Allocator) -> None:
        allocator.extent.tables.write_back()

    monkeypatch.setattr(allocation.Allocator, "write_back", hasty)
    assert first_bad()


def test_space_reused_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(self: allocation.Allocator, entry: int) -> None:
        _, host = self.extent.classify(entry)
        if host >= self.floor:
            self._free.append((host, self.extent.grain))

    monkeypatch.setattr(allocation.Allocator, "_drop", hasty)
    assert "hold none of versions" in first_bad() + first_bad("zero-grains")


def test_a_content_id_that_stays_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_change_content_id", lambda node: None)
    assert "same content ID" in first_bad()
