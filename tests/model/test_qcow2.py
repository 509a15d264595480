"""A state machine drives an image and the model disk with the same requests and compares bytes, extents, check."""

from __future__ import annotations

import os
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

from byre.graph.graph import Graph
from byre.image import Image
from byre.io import extent as kinds
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from model.disk import COMPRESSED, DATA, UNALLOCATED, ZERO, ModelDisk
from support.images import layer, new_image, open_image
from support.walk import walk

CLUSTERS = 40
NAMES = {kinds.DATA: DATA, kinds.ZERO: ZERO, kinds.UNALLOCATED: UNALLOCATED, kinds.COMPRESSED: COMPRESSED}


class Machine(RuleBasedStateMachine):
    """Subclasses name the options; sizes are in eighths of a cluster, so that most requests are unaligned."""

    options: ClassVar[dict[str, Any]] = {}
    backing: ClassVar[tuple[float, ...]] = ()
    """Sizes of the layers below, relative to the image, the base first."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = int(self.options.get("cluster_size", 65536))
        self.unit = self.cluster // 8
        self.size = self.cluster * CLUSTERS
        self.image: Image | None = None
        #: Clusters a shrink ended in: the part cut off is overwritten, for which they may be allocated.
        self.cut: set[int] = set()

    # -- the image under test ---------------------------------------------------------------------

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        chooser = random.Random(seed)
        self.layers: list[MemoryNode] = []
        below: ModelDisk | None = None
        for part in self.backing:
            size = int(CLUSTERS * part) * self.cluster + (512 if not self.layers else 0)
            below = self.make_layer(size, below, chooser)
        self.model = ModelDisk(self.size, self.cluster, below, zeroes=self.options.get("compat") != "0.10")
        named = {"backing_file": "below", "backing_fmt": "qcow2"} if self.backing else {}
        data_file = MemoryNode() if "data_file" in self.options else None
        self.data = data_file
        self.file = new_image("qcow2", self.size, data_file, **self.options, **named)
        self.open()

    def make_layer(self, size: int, below: ModelDisk | None, chooser: random.Random) -> ModelDisk:
        """A lower layer, written in random order so that its mapping is in pieces."""
        named = {"backing_file": "below", "backing_fmt": "qcow2"} if below else {}
        memory = new_image("qcow2", size, cluster_size=self.cluster, **named)
        model = ModelDisk(size, self.cluster, below)
        graph = Graph()
        with open_image(memory, graph=graph, backing=self.chain(graph)) as image:
            for _ in range(8):
                offset = chooser.randrange(size // 512) * 512
                data = chooser.randbytes(min(chooser.randrange(1, 3 * self.cluster), size - offset))
                image.write(offset, data)
                model.write(offset, data)
        self.layers.append(memory)
        return model

    def chain(self, graph: Graph) -> dict[str, object] | None:
        spec: dict[str, object] | None = None
        for memory in self.layers:
            spec = layer(graph, memory, "qcow2", spec)
        return spec

    def open(self) -> None:
        graph = Graph()
        self.image = open_image(self.file, graph=graph, backing=self.chain(graph), data_file=self.data)

    # -- requests ---------------------------------------------------------------------------------

    where = st.integers(0, CLUSTERS * 8 - 1)
    much = st.integers(1, 30)
    odd = st.sampled_from((0, 0, 1, 511, 512))

    def range(self, at: int, length: int, odd: int) -> tuple[int, int]:
        offset = min(at * self.unit + odd, self.model.size - 1)
        return offset, min(max(length * self.unit - odd, 1), self.model.size - offset)

    @rule(at=where, length=much, odd=odd, seed=st.integers(0, 255), fua=st.booleans())
    def write(self, at: int, length: int, odd: int, seed: int, fua: bool) -> None:
        offset, length = self.range(at, length, odd)
        data = random.Random(seed).randbytes(64) * (length // 64 + 1)
        assert self.image is not None
        self.image.write(offset, data[:length], fua=fua)
        self.model.write(offset, data[:length])

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
        self.model.discard(offset, length)

    @precondition(lambda self: "data_file" not in self.options)
    @rule(at=st.integers(0, CLUSTERS - 1), seed=st.integers(0, 255), good=st.booleans())
    def write_compressed(self, at: int, seed: int, good: bool) -> None:
        offset = at * self.cluster
        if offset >= self.model.size:
            return
        length = min(self.cluster, self.model.size - offset)
        chooser = random.Random(seed)
        data = (chooser.randbytes(32) * length)[:length] if good else chooser.randbytes(length)
        assert self.image is not None
        payload = self.image.node.compress(memoryview(data))  # type: ignore[attr-defined]
        self.image.write_compressed(offset, data)
        self.model.write_compressed(offset, data, payload is not None)

    @rule(eighths=st.integers(1, CLUSTERS * 12))
    def resize(self, eighths: int) -> None:
        size = -(-eighths * self.unit // 512) * 512
        assert self.image is not None
        self.image.resize(size, shrink=True)
        if size < self.model.size and size % self.cluster:
            self.cut.add(size // self.cluster)
        self.model.resize(size)

    @rule()
    def flush(self) -> None:
        assert self.image is not None
        self.image.flush()

    @rule()
    def reopen(self) -> None:
        assert self.image is not None
        self.image.close()
        self.look_at_file()
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
        if self.image is None:
            return
        assert self.image.size == self.model.size
        assert self.image.read(0, self.image.size) == self.model.all()

    @invariant()
    def same_extents(self) -> None:
        """Kinds agree per cluster; where zeroes are meant, the format may keep data that is zero, or nothing."""
        if self.image is None:
            return
        for extent in self.image.node.extents(0, self.image.size):
            first, last = extent.offset // self.cluster, -(-extent.end // self.cluster)
            for index in range(first, last):
                self.compare_kind(NAMES[extent.kind], index, extent)

    def compare_kind(self, found: str, index: int, extent: kinds.Extent) -> None:
        expected = self.model.kinds[index]
        start = max(extent.offset, index * self.cluster)
        end = min(extent.end, (index + 1) * self.cluster)
        zero = not any(self.model.read(start, end - start))
        if found == expected:
            assert found != ZERO or zero
        elif found == UNALLOCATED:
            # Nothing here: right if what lies below reads the same.
            below = self.model.backing.read(start, end - start) if self.model.backing else bytes(end - start)
            assert self.model.read(start, end - start) == below, (expected, extent)
        elif found == ZERO:
            assert zero, (expected, extent)
        else:
            assert {found, expected} in ({DATA, ZERO}, {DATA, UNALLOCATED}), (found, expected, extent)
            assert expected != UNALLOCATED or self.loose or index in self.cut, (found, expected, extent)

    @property
    def loose(self) -> bool:
        """Preallocated clusters and subclusters hold what the model calls unallocated."""
        return "data_file_raw" in self.options or "extended_l2" in self.options

    def look_at_file(self) -> None:
        findings = walk(self.file.to_bytes())
        assert findings == ([], [], []), findings

    def teardown(self) -> None:
        if self.image is not None:
            self.image.close()
            self.look_at_file()


CASES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "512": ({"cluster_size": 512}, ()),
    "512-1bit": ({"cluster_size": 512, "refcount_bits": 1}, ()),
    "512-64bit-v3-backed": ({"cluster_size": 512, "refcount_bits": 64}, (0.5, 1.2)),
    "512-v2": ({"cluster_size": 512, "compat": "0.10"}, ()),
    "512-v2-backed": ({"cluster_size": 512, "compat": "0.10"}, (1.3, 0.7)),
    "4k-zstd-backed": ({"cluster_size": 4096, "compression_type": "zstd"}, (0.6,)),
    "extended": ({"cluster_size": 16384, "extended_l2": True}, ()),
    "extended-backed": ({"cluster_size": 16384, "extended_l2": True}, (0.7, 1.1)),
    "data-file": ({"cluster_size": 4096, "data_file": "data"}, ()),
    "raw-data-file": ({"cluster_size": 4096, "data_file": "data", "data_file_raw": True}, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_image_and_model_agree(name: str) -> None:
    options, backing = CASES[name]
    machine = type("Case", (Machine,), {"options": options, "backing": backing})
    examples = int(os.environ.get("BYRE_MODEL_EXAMPLES", "12"))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            # A failure is reported as it was found: shrinking runs take minutes.
            phases=(Phase.explicit, Phase.generate),
            deadline=None,
            derandomize="BYRE_MODEL_EXAMPLES" not in os.environ,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
