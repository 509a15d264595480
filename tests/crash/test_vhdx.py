"""VHDX and VHD after a power cut: every state the disk could be in is judged, none may be bad.

With ``BYRE_CRASH_FULL=1`` all sequences of up to three operations run.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from byre.errors import ByreError
from byre.filters.replay import CrashState, WriteLog, crash_states
from byre.filters.writelog import LogNode
from byre.formats.vhdx import journal
from byre.formats.vhdx.image import VhdxNode
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from crash.harness import Bad, Recording, Step, compare
from crash.workloads import pattern, sequences
from support.images import detached, new_image, open_image

FULL = bool(os.environ.get("BYRE_CRASH_FULL"))
MIB = 1 << 20


class Setup(NamedTuple):
    """As the harness wants it, for an image of ``format``."""

    image: bytes
    format: str
    base: bytes | None = None
    data: bytes | None = None

    def open(self, image: bytes, data: bytes | None, log: WriteLog | None = None, *, read_only: bool = False) -> Image:
        filters = [LogNode(log, disk="image")] if log is not None else []
        return open_image(MemoryNode(image), self.format, graph=Graph(), filters=filters, read_only=read_only)


class Case(NamedTuple):
    """:ivar at_least: states that must come of it, lest the test has lost its teeth"""

    format: str
    unit: int
    blocks: int
    chosen: int
    at_least: int
    options: dict[str, Any]


CASES = {
    "vhdx": Case("vhdx", MIB, 3, 5, 120, {"block_size": MIB}),
    "vhdx-not-present": Case("vhdx", MIB, 3, 0, 30, {"block_size": MIB, "block_state_zero": False}),
    "vpc": Case("vpc", 2 * MIB, 3, 4, 90, {"force_size": True}),
}


def setup(case: Case) -> Setup:
    """Block 0 is there, block 1 was given up, the rest was never written."""
    memory = new_image(case.format, case.unit * case.blocks - 4096, **case.options)
    with open_image(memory, case.format) as image:
        image.write(1000, pattern(90, 20000))
        image.write(case.unit, pattern(91, 4096))
        image.flush()
        image.discard(case.unit, case.unit)
    return Setup(detached(memory).to_bytes(), case.format)


def steps(case: Case) -> dict[str, Step]:
    unit, last = case.unit, case.blocks - 1

    def new(image: Image, step: int) -> None:
        image.write((1 + step % last) * unit - 2048, pattern(step, 4096))

    def overwrite(image: Image, step: int) -> None:
        image.write(1024 * (step + 1), pattern(step, 5000))

    def zero(image: Image, step: int) -> None:
        image.write_zeroes(0 if step % 2 else 700, unit, unmap=step != 1)

    def discard(image: Image, step: int) -> None:
        image.discard(0, 2 * unit)

    def flush(image: Image, step: int) -> None:
        image.flush()

    return {"new": new, "overwrite": overwrite, "zero": zero, "discard": discard, "flush": flush}


def workloads(case: Case) -> list[tuple[str, ...]]:
    every = sequences(list(steps(case)), 3)
    if FULL:
        return every
    chooser = random.Random(case.format)
    fixed = [("new", "flush", "discard"), ("discard", "flush", "new"), ("new", "new", "flush")]
    return fixed + chooser.sample([one for one in every if len(one) > 1], case.chosen)


def judge(recording: Recording, state: CrashState, number: int) -> None:
    """What must hold of every state; every third is opened for writing and used as well."""
    setup: Any = recording.setup
    story = f"{'+'.join(recording.names)}: {state.story}"
    data = state.disks["image"].to_bytes()
    try:
        with setup.open(data, None, read_only=True) as image:
            found = image.read(0, image.size)
            result = image.node.check(Control())
            # A footer that is not there is made up for by its copy, and written when the image grows or is mended.
            wrong = [message for message in result.messages if "footer" not in message]
            if wrong:
                raise Bad(f"{story}\n{wrong}")
    except ByreError as error:
        raise Bad(f"{story}\ncannot be read: {error}") from error
    if len(found) not in recording.sizes:
        raise Bad(f"{story}\nsize {len(found)} was never set")
    compare(recording, state, found, story)
    if number % 3 == 0:
        use(setup, data, found, story)


def use(setup: Setup, data: bytes, found: bytes, story: str) -> None:
    """It can be written to, reads the same then, and is clean once it is closed."""
    expected = bytearray(found)
    memory = MemoryNode(data)
    try:
        with open_image(memory, setup.format) as image:
            if image.read(0, image.size) != found:
                raise Bad(f"{story}\nreads otherwise once it is opened for writing")
            for offset in range(0, len(found), len(found) // 4 // 512 * 512):
                image.write(offset, b"after the crash")
                expected[offset : offset + 15] = b"after the crash"
        with open_image(memory, setup.format, read_only=True) as image:
            if image.read(0, image.size) != expected:
                raise Bad(f"{story}\nwriting after the crash changed something else")
            result = image.node.check(Control())  # type: ignore[attr-defined]
            if [message for message in result.messages if "footer" not in message]:
                raise Bad(f"{story}\ncheck after the crash: {result.messages}")
            if isinstance(image.node, VhdxNode) and image.node.journal.active:
                raise Bad(f"{story}\nthe log is not empty after closing")
    except ByreError as error:
        raise Bad(f"{story}\ncannot be used: {error}") from error


def run(begin: Setup, workload: Sequence[tuple[str, Step]], seen: set[object]) -> int:
    recording = Recording(begin, workload)  # type: ignore[arg-type]
    count = 0
    for state in recording.states():
        identity = (state.digest, recording.prefix(state))
        if identity not in seen:
            seen.add(identity)
            judge(recording, state, count)
            count += 1
    return count


@pytest.mark.parametrize("name", CASES)
def test_no_state_is_bad(name: str) -> None:
    case = CASES[name]
    begin, table = setup(case), steps(case)
    seen: set[object] = set()
    judged = sum(run(begin, [(step, table[step]) for step in one], seen) for one in workloads(case))
    assert judged >= case.at_least


RESIZES: dict[str, Callable[[Image, int, int], None]] = {
    "grow": lambda image, unit, _: image.resize(image.size + unit),
    "shrink": lambda image, unit, _: image.resize(image.size - 2 * unit + 512, shrink=True),
}


@pytest.mark.parametrize("name", ["vhdx", "vpc"])
@pytest.mark.parametrize("sequence", [("new", "grow", "overwrite"), ("new", "shrink", "grow")])
def test_no_state_while_resizing_is_bad(name: str, sequence: tuple[str, ...]) -> None:
    case = CASES[name]
    table = steps(case)

    def step_of(one: str) -> tuple[str, Step]:
        if one in table:
            return one, table[one]
        return "resize", lambda image, number: RESIZES[one](image, case.unit, number)

    assert run(setup(case), [step_of(one) for one in sequence], set()) > 10


def test_a_block_table_that_moves() -> None:
    """Growing a VHDX file beyond its block table changes region tables and size in one entry of the log."""
    begin = setup(CASES["vhdx"])
    with begin.open(begin.image, None, read_only=True) as image:
        content, before = image.read(0, image.size), image.size
    log = WriteLog()
    with begin.open(begin.image, None, log) as image:
        image.resize(200 << 30)
        image.write(150 << 30, b"far away")
        assert image.read(0, before) == content
    found: set[int] = set()
    for state in crash_states(log):
        with begin.open(state.disks["image"].to_bytes(), None, read_only=True) as image:
            assert image.size in (before, 200 << 30), state.story
            assert image.read(0, before) == content, state.story
            if image.size > before:
                assert image.read(150 << 30, 8) in (bytes(8), b"far away"), state.story
            assert not image.node.check(Control()).corruptions, state.story  # type: ignore[attr-defined]
            found.add(image.size)
    assert len(found) == 2


# -- the log, entry by entry --------------------------------------------------------------------------


def test_the_log_is_written_before_the_table_and_the_table_before_the_next_entry() -> None:
    """The order of writes in one flush, as the crash model gives it."""
    begin = setup(CASES["vhdx"])
    log = WriteLog()
    with begin.open(begin.image, None, log) as image:
        image.write(2 * MIB, b"new block")
        before = len(log)
        image.flush()
        entries = [entry for entry in log.entries[before:] if entry.kind in ("write", "flush")]
    order = [entry.kind if entry.kind == "flush" else _place(entry.offset) for entry in entries]
    compact = [kind for kind, _ in itertools.groupby(order)]
    assert compact[:9] == ["flush", "log", "flush", "header", "flush", "header", "flush", "table", "flush"]


def _place(offset: int) -> str:
    return {0: "header", 1: "log", 2: "table", 3: "metadata"}.get(offset // MIB, "data")


def test_more_pages_than_an_entry_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several entries in a flush, each whole before the one before it is overwritten."""
    monkeypatch.setattr(journal, "PAGES_PER_ENTRY", 1)
    memory = new_image("vhdx", 3000 * MIB, block_size=MIB)
    blocks = (0, 700, 1400, 2100)
    with open_image(memory, "vhdx") as image:
        image.write(700 * MIB, b"there before")
    begin = Setup(detached(memory).to_bytes(), "vhdx")
    log = WriteLog()
    with begin.open(begin.image, None, log) as image:
        for block in blocks:
            image.write(block * MIB, pattern(block, 512))
        image.flush()
    seen: set[int] = set()
    for state in crash_states(log):
        with begin.open(state.disks["image"].to_bytes(), None, read_only=True) as image:
            for block in blocks:
                old = b"there before".ljust(512, b"\0") if block == 700 else bytes(512)
                assert image.read(block * MIB, 512) in (old, pattern(block, 512)), state.story
        seen.add(state.digest)
    assert len(seen) > 20


def test_an_entry_never_overwrites_the_one_before_it() -> None:
    """However long they are: torn, the new one leaves the old one to be replayed."""
    memory = MemoryNode(new_image("vhdx", 8 * MIB, block_size=MIB).to_bytes())
    log = WriteLog()
    with Setup(memory.to_bytes(), "vhdx").open(memory.to_bytes(), None, log) as image:
        node = image.node
        assert isinstance(node, VhdxNode)
        node.journal.begin()
        chooser = random.Random(2)
        for _ in range(100):
            count = chooser.choice((1, 5, 40, 83, 84, 120))
            pages = {3 * MIB + 512 * 1024 + number * 4096: bytes(4096) for number in range(count)}
            node.journal.commit(pages)
    places = [
        (entry.offset, entry.offset + entry.length)
        for entry in log.entries
        if entry.kind == "write" and MIB <= entry.offset < 2 * MIB
    ]
    assert len(places) > 100
    for before, after in itertools.pairwise(places):
        assert after[1] <= before[0] or before[1] <= after[0]
        assert after[1] <= 2 * MIB


# -- the peer -----------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["vhdx", "vpc"])
def test_the_peer_reads_the_same(name: str, qemu_img: Callable[..., Any], tmp_path: Path) -> None:
    """On a sample: the peer replays the log itself, and then reads what byre reads without changing a byte."""
    case = CASES[name]
    begin, table = setup(case), steps(case)
    recording = Recording(begin, [(step, table[step]) for step in ("new", "flush", "discard", "new")])  # type: ignore[arg-type]
    states = list(recording.states())
    for state in random.Random(7).sample(states, 8):
        data = state.disks["image"].to_bytes()
        with begin.open(data, None, read_only=True) as image:
            expected = image.read(0, image.size)
        (tmp_path / "image").write_bytes(data)
        if case.format == "vhdx":
            done = qemu_img("check", "-f", "vhdx", "-r", "all", tmp_path / "image", check=False)
            assert done.returncode == 0, f"{state.story}\n{done.stdout}{done.stderr}"
        qemu_img("convert", "-f", case.format, "-O", "raw", tmp_path / "image", tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes() == expected, state.story
