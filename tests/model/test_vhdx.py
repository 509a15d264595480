"""A state machine drives VHDX and VHD images and plain bytes with the same requests, and compares."""

from __future__ import annotations

import os
import random
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from byre.image import Image
from byre.io.extent import DATA, UNALLOCATED, ZERO
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from support.images import new_image, open_image

MIB = 1 << 20
BLOCKS = 5


class Machine(RuleBasedStateMachine):
    """Subclasses name format and options; offsets are in eighths of a block, so that most requests are unaligned."""

    format: ClassVar[str]
    options: ClassVar[dict[str, Any]]
    block: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.unit = self.block // 8
        self.image: Image | None = None

    @initialize(odd=st.integers(0, 7), seed=st.integers(0, 100))
    def begin(self, odd: int, seed: int) -> None:
        """Blocks in random order, so that the mapping is in pieces."""
        size = self.block * BLOCKS - odd * 512
        self.file: MemoryNode = new_image(self.format, size, **self.options)
        self.model = bytearray(size)
        self.open()
        order = list(range(BLOCKS))
        chooser = random.Random(seed)
        chooser.shuffle(order)
        for block in order[:3]:
            self.write(block * 8 + chooser.randrange(8), 1, 0, seed + block, fua=False)

    def open(self) -> None:
        self.image = open_image(self.file, self.format)

    where = st.integers(0, BLOCKS * 8 - 1)
    much = st.integers(1, 20)
    odd = st.sampled_from((0, 0, 1, 511, 512))

    def range(self, at: int, length: int, odd: int) -> tuple[int, int]:
        offset = min(at * self.unit + odd, len(self.model) - 1)
        return offset, min(max(length * self.unit - odd, 1), len(self.model) - offset)

    @rule(at=where, length=much, odd=odd, seed=st.integers(0, 255), fua=st.booleans())
    def write(self, at: int, length: int, odd: int, seed: int, fua: bool) -> None:
        offset, length = self.range(at, length, odd)
        data = (random.Random(seed).randbytes(64) * (length // 64 + 1))[:length]
        assert self.image is not None
        self.image.write(offset, data, fua=fua)
        self.model[offset : offset + length] = data

    @rule(at=where, length=much, odd=odd, unmap=st.booleans())
    def write_zeroes(self, at: int, length: int, odd: int, unmap: bool) -> None:
        offset, length = self.range(at, length, odd)
        assert self.image is not None
        self.image.write_zeroes(offset, length, unmap=unmap)
        self.model[offset : offset + length] = bytes(length)

    @rule(at=where, length=much)
    def discard(self, at: int, length: int) -> None:
        """Each byte is zero afterwards, or what it was."""
        offset, length = self.range(at, length, 0)
        assert self.image is not None
        self.image.discard(offset, length)
        found = self.image.read(offset, length)
        before = self.model[offset : offset + length]
        if found != before and any(found):
            assert all(new in (old, 0) for new, old in zip(found, before, strict=True))
        self.model[offset : offset + length] = found

    @rule(eighths=st.integers(1, (BLOCKS + 2) * 8))
    def resize(self, eighths: int) -> None:
        size = eighths * self.unit
        assert self.image is not None
        self.image.resize(size, shrink=True)
        if size <= len(self.model):
            del self.model[size:]
        else:
            self.model += bytes(size - len(self.model))

    @rule()
    def flush(self) -> None:
        assert self.image is not None
        self.image.flush()

    @rule()
    def reopen(self) -> None:
        assert self.image is not None
        self.image.close()
        self.open()

    @rule()
    def read_only_and_back(self) -> None:
        assert self.image is not None
        self.image.reopen(read_only=True)
        assert self.image.read(0, self.image.size) == self.model
        self.image.reopen(read_only=False)

    @rule()
    def check(self) -> None:
        assert self.image is not None
        self.image.flush()
        result = self.image.node.check(Control())  # type: ignore[attr-defined]
        assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.messages

    @invariant()
    def same_bytes(self) -> None:
        if self.image is not None:
            assert self.image.size == len(self.model)
            assert self.image.read(0, self.image.size) == self.model

    @invariant()
    def extents_tell_the_truth(self) -> None:
        if self.image is None:
            return
        for extent in self.image.node.extents(0, self.image.size):
            assert extent.kind in (DATA, ZERO, UNALLOCATED)
            if extent.kind != DATA:
                assert not any(self.model[extent.offset : extent.end]), extent

    def teardown(self) -> None:
        if self.image is not None:
            self.image.close()
            with open_image(self.file, self.format, read_only=True) as image:
                assert image.read(0, image.size) == self.model
                assert not image.node.check(Control()).messages  # type: ignore[attr-defined]


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vhdx": ("vhdx", MIB, {"block_size": MIB}),
    "vhdx-not-present": ("vhdx", MIB, {"block_size": MIB, "block_state_zero": False}),
    "vhdx-fixed": ("vhdx", MIB, {"block_size": MIB, "subformat": "fixed"}),
    "vpc": ("vpc", 2 * MIB, {"force_size": True}),
    "vpc-fixed": ("vpc", 2 * MIB, {"force_size": True, "subformat": "fixed"}),
}


@pytest.mark.parametrize("name", CASES)
def test_image_and_bytes_agree(name: str) -> None:
    format_name, block, options = CASES[name]
    machine = type("Case", (Machine,), {"format": format_name, "block": block, "options": options})
    examples = int(os.environ.get("BYRE_MODEL_EXAMPLES", "6"))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            # A failure is reported as it was found: shrinking runs take minutes.
            phases=(Phase.explicit, Phase.generate),
            deadline=None,
            derandomize="BYRE_MODEL_EXAMPLES" not in os.environ,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
