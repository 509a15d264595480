"""Formats without reference counts against a plain array of bytes: the same requests, the same content, no damage."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from byre.errors import NotSupported
from byre.formats.abilities import Checkable
from byre.graph.graph import Graph
from byre.image import Image
from byre.io.extent import UNALLOCATED, ZERO
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from support.images import layer, new_image, open_image
from support.vdi import small_vdi

CLUSTERS = 48


class Machine(RuleBasedStateMachine):
    """Sizes are in eighths of a cluster, so that most requests are unaligned."""

    format: ClassVar[str] = ""
    cluster: ClassVar[int] = 4096
    options: ClassVar[dict[str, Any]] = {}
    opening: ClassVar[dict[str, Any]] = {}
    backed: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.image: Image | None = None

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        size = self.cluster * CLUSTERS
        self.base = random.Random(seed).randbytes(size - 3 * self.cluster // 2) if self.backed else b""
        self.content = bytearray(self.base.ljust(size, b"\0"))
        self.file = self.make(size)
        self.open()

    def make(self, size: int) -> MemoryNode:
        if self.format == "vdi":
            return small_vdi(size, self.cluster)
        named = {"backing_file": "below"} if self.backed else {}
        if self.format == "qed" and self.backed:
            named["backing_fmt"] = "raw"
        return new_image(self.format, size, **self.options, **named)

    def open(self) -> None:
        graph = Graph()
        below = layer(graph, MemoryNode(self.base), "raw") if self.backed else None
        self.image = open_image(self.file, self.format, graph=graph, backing=below, **self.opening)

    def range(self, at: int, length: int, odd: int) -> tuple[int, int]:
        unit = self.cluster // 8
        offset = min(at * unit + odd, len(self.content) - 1)
        return offset, min(max(length * unit - odd, 1), len(self.content) - offset)

    where = st.integers(0, CLUSTERS * 8 - 1)
    much = st.integers(1, 40)
    odd = st.sampled_from((0, 0, 1, 511))

    @rule(at=where, length=much, odd=odd, seed=st.integers(0, 255), fua=st.booleans())
    def write(self, at: int, length: int, odd: int, seed: int, fua: bool) -> None:
        offset, length = self.range(at, length, odd)
        data = (random.Random(seed).randbytes(64) * (length // 64 + 1))[:length]
        assert self.image is not None
        self.image.write(offset, data, fua=fua)
        self.content[offset : offset + length] = data

    @rule(at=where, length=much, odd=odd, unmap=st.booleans())
    def write_zeroes(self, at: int, length: int, odd: int, unmap: bool) -> None:
        offset, length = self.range(at, length, odd)
        assert self.image is not None
        self.image.write_zeroes(offset, length, unmap=unmap)
        self.content[offset : offset + length] = bytes(length)

    @rule(at=where, length=much)
    def discard(self, at: int, length: int) -> None:
        """Each byte is as before, or zero, and stays so."""
        offset, length = self.range(at, length, 0)
        assert self.image is not None
        self.image.discard(offset, length)
        found = self.image.read(offset, length)
        before = self.content[offset : offset + length]
        assert all(new in (old, 0) for new, old in zip(found, before, strict=True))
        self.content[offset : offset + length] = found

    @precondition(lambda self: self.format == "qcow" and not self.opening)
    @rule(at=st.integers(0, CLUSTERS - 1), count=st.integers(1, 3), seed=st.integers(0, 255))
    def write_compressed(self, at: int, count: int, seed: int) -> None:
        assert self.image is not None
        for index in range(at, min(at + count, CLUSTERS)):
            data = random.Random(seed + index).randbytes(32) * (self.cluster // 32)
            self.image.write_compressed(index * self.cluster, data)
            self.content[index * self.cluster : (index + 1) * self.cluster] = data

    @precondition(lambda self: self.format != "qcow")
    @rule(eighths=st.integers(1, 200))
    def grow(self, eighths: int) -> None:
        size = len(self.content) + -(-eighths * self.cluster // 8 // 512) * 512
        assert self.image is not None
        try:
            self.image.resize(size)
        except NotSupported:
            return  # no room for a longer table
        self.content += bytes(size - len(self.content))

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
    def check(self) -> None:
        assert self.image is not None
        node = self.image.node
        if isinstance(node, Checkable):
            self.image.flush()
            result = node.check(Control())
            assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.messages

    @invariant()
    def same_bytes(self) -> None:
        if self.image is None:
            return
        assert self.image.size == len(self.content)
        assert self.image.read(0, self.image.size) == self.content

    @invariant()
    def extents_tell_the_truth(self) -> None:
        if self.image is None:
            return
        end = 0
        for row in self.image.extents():
            assert row.offset == end
            end = row.end
            if row.kind in (ZERO, UNALLOCATED):
                assert not any(self.content[row.offset : row.end])
        assert end == len(self.content)

    def teardown(self) -> None:
        if self.image is not None:
            self.image.close()


CASES: dict[str, dict[str, Any]] = {
    "vdi": {"format": "vdi"},
    "vdi-512": {"format": "vdi", "cluster": 512},
    "qed": {"format": "qed", "options": {"cluster_size": 4096, "table_size": 1}},
    "qed-backed": {"format": "qed", "options": {"cluster_size": 4096, "table_size": 2}, "backed": True},
    "parallels": {"format": "parallels", "options": {"cluster_size": 4096}},
    "parallels-odd": {"format": "parallels", "cluster": 1536, "options": {"cluster_size": 1536}},
    "qcow": {"format": "qcow"},
    "qcow-backed": {"format": "qcow", "cluster": 512, "backed": True},
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_model(name: str) -> None:
    machine = type(name, (Machine,), CASES[name])
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15, stateful_step_count=25, deadline=None,
            suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate, Phase.shrink),
        ),
    )  # fmt: skip
