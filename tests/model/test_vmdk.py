"""A state machine drives VMDK disks and the model disk with the same requests and compares bytes, extents, check."""

from __future__ import annotations

import os
import random
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from byre.graph.graph import Graph
from byre.image import Image
from byre.io import extent as kinds
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from model.disk import DATA, UNALLOCATED, ZERO, ModelDisk
from support import vmdk
from support.images import detached, layer, open_image

GRAIN = 1024
GRAINS = 40
SIZE = GRAIN * GRAINS
NAMES = {kinds.DATA: DATA, kinds.ZERO: ZERO, kinds.UNALLOCATED: UNALLOCATED}


class Machine(RuleBasedStateMachine):
    """Subclasses name the options; sizes are in eighths of a grain, so that most requests are unaligned."""

    options: ClassVar[dict[str, Any]] = {}
    kinds: ClassVar[str] = "S"
    """One letter for each extent: S sparse, F flat."""
    backing: ClassVar[float] = 0

    def __init__(self) -> None:
        super().__init__()
        self.image: Image | None = None

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        chooser = random.Random(seed)
        self.base: bytes | None = None
        below: ModelDisk | None = None
        if self.backing:
            size = int(GRAINS * self.backing) * GRAIN + 512
            content = chooser.randbytes(size)
            self.base = vmdk.hosted(content, grain=GRAIN * 2, per_table=4)
            below = ModelDisk(size, GRAIN)
            below.write(0, content)
        zeroes = bool(self.options.get("zero_grains"))
        # A flat extent, and a sparse one without a parent, read as zeroes where they hold nothing.
        self.model = ModelDisk(SIZE, GRAIN, below, zeroes=zeroes or (not self.backing))
        parent = 'parentFileNameHint="base"' if self.backing else ""
        each = SIZE // len(self.kinds)
        lines = [f'RW {each // 512} {"SPARSE" if kind == "S" else "FLAT"} "part"{" 0" if kind == "F" else ""}'
                 for kind in self.kinds]  # fmt: skip
        text = vmdk.descriptor(lines, "custom" if len(lines) > 1 else "monolithicSparse",
                               parent="12345678" if self.backing else "ffffffff", more=parent)  # fmt: skip
        single = len(self.kinds) == 1
        self.parts = [
            MemoryNode(vmdk.hosted(bytes(each), grain=GRAIN, per_table=8, text=text if single else b"", **self.options)
                       if kind == "S" else bytes(each))
            for kind in self.kinds
        ]  # fmt: skip
        self.file = self.parts[0] if single else MemoryNode(text)
        self.open()

    def open(self) -> None:
        graph = Graph()
        options: dict[str, object] = {}
        if len(self.parts) > 1:
            for part in self.parts:
                graph.add(detached(part))
            options["extents"] = [part.name for part in self.parts]
        below = layer(graph, MemoryNode(self.base), "vmdk") if self.base is not None else None
        self.image = open_image(self.file, "vmdk", graph=graph, backing=below, options=options)

    # -- requests ---------------------------------------------------------------------------------

    where = st.integers(0, GRAINS * 8 - 1)
    much = st.integers(1, 30)
    odd = st.sampled_from((0, 0, 1, 511))

    def range(self, at: int, length: int, odd: int) -> tuple[int, int]:
        offset = min(at * GRAIN // 8 + odd, SIZE - 1)
        return offset, min(max(length * GRAIN // 8 - odd, 1), SIZE - offset)

    @rule(at=where, length=much, odd=odd, seed=st.integers(0, 255), fua=st.booleans())
    def write(self, at: int, length: int, odd: int, seed: int, fua: bool) -> None:
        offset, length = self.range(at, length, odd)
        data = random.Random(seed).randbytes(length)
        assert self.image is not None
        self.image.write(offset, data, fua=fua)
        self.model.write(offset, data)

    @rule(at=where, length=much, odd=odd, unmap=st.booleans())
    def write_zeroes(self, at: int, length: int, odd: int, unmap: bool) -> None:
        offset, length = self.range(at, length, odd)
        assert self.image is not None
        self.image.write_zeroes(offset, length, unmap=unmap)
        self.model.write_zeroes(offset, length)

    @rule(at=where, length=much)
    def discard(self, at: int, length: int) -> None:
        offset, length = self.range(at, length, 0)
        assert self.image is not None
        self.image.discard(offset, length)
        if "F" in self.kinds:
            # What a flat extent reads as afterwards is the file's business.
            found = self.image.read(offset, length)
            before = self.model.read(offset, length)
            assert all(new in (old, 0) for new, old in zip(found, before, strict=True))
            self.model.write(offset, found)
        else:
            self.model.discard(offset, length)

    @rule()
    def flush(self) -> None:
        assert self.image is not None
        self.image.flush()

    @rule()
    def reopen(self) -> None:
        assert self.image is not None
        self.image.close()
        self.look_at_files()
        self.open()

    @rule()
    def check(self) -> None:
        assert self.image is not None
        self.image.flush()
        result = self.image.node.check(Control())  # type: ignore[attr-defined]
        assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.messages

    # -- comparing --------------------------------------------------------------------------------

    @invariant()
    def same_bytes(self) -> None:
        if self.image is not None:
            assert self.image.read(0, SIZE) == self.model.all()

    @invariant()
    def extents_tell_the_truth(self) -> None:
        if self.image is None:
            return
        for extent in self.image.node.extents(0, SIZE):
            content = self.model.read(extent.offset, extent.length)
            if extent.kind == kinds.ZERO:
                assert not any(content), extent
            elif extent.kind == kinds.UNALLOCATED:
                below = self.model.backing
                assert content == (below.read(extent.offset, extent.length) if below else bytes(extent.length)), extent
            else:
                source = self.image.node.sources[extent.source].node  # type: ignore[attr-defined]
                found = bytearray(extent.length)
                source.read_into(extent.host, memoryview(found))
                assert found == content

    def look_at_files(self) -> None:
        for kind, part in zip(self.kinds, self.parts, strict=True):
            if kind == "S":
                assert vmdk.look_through(part.to_bytes()) == ([], [])
                assert part.to_bytes()[72] == 0, "it says that it was not closed"

    def teardown(self) -> None:
        if self.image is not None:
            self.image.close()
            self.look_at_files()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero-grains": {"options": {"zero_grains": True, "version": 2}},
    "missing-tables": {"options": {"missing_tables": True}},
    "one-copy": {"options": {"redundant": False}},
    "backed": {"backing": 0.7},
    "backed-larger": {"backing": 1.3},
    "backed-zero-grains": {"backing": 0.7, "options": {"zero_grains": True, "fill": False, "version": 2}},
    "split": {"kinds": "SSSS"},
    "mixed": {"kinds": "SFSF"},
}


@pytest.mark.parametrize("name", CASES)
def test_disk_and_model_agree(name: str) -> None:
    machine = type("Case", (Machine,), CASES[name])
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("BYRE_MODEL_EXAMPLES", "12")),
            stateful_step_count=25,
            phases=(Phase.explicit, Phase.generate),
            deadline=None,
            derandomize="BYRE_MODEL_EXAMPLES" not in os.environ,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
