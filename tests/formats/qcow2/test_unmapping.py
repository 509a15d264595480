"""Many entries unmapped at once: as one by one, whatever they are."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest

from byre.errors import Corrupt, IOFailure
from byre.formats.qcow2 import unmapping
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from support.images import detached, layer, new_image, open_image
from support.walk import walk

CLUSTER = 4096
COUNT = 600
SIZE = COUNT * CLUSTER

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "snapshot": {"snapshot": True},
    "backed": {"backed": True},
    "version 2": {"compat": "0.10"},
    "version 2, backed": {"compat": "0.10", "backed": True},
    "data file": {"data_file": "data"},
    "narrow counts": {"refcount_bits": 1},
    "wide counts": {"refcount_bits": 64},
}


class Case:
    """An image with entries of every kind, one random thing done to long ranges of it, and what came of it."""

    def __init__(self, layout: dict[str, Any], seed: int) -> None:
        chance = random.Random(seed)
        options = dict(layout)
        backed, snapshot = options.pop("backed", False), options.pop("snapshot", False)
        self.data = MemoryNode() if "data_file" in options else None
        if backed:
            options |= {"backing_file": "base", "backing_fmt": "raw"}
        self.base = bytes(chance.randbytes(1) * SIZE) if backed else b""
        self.memory = new_image("qcow2", SIZE, self.data, cluster_size=CLUSTER, **options)
        with self.open() as image:
            for _ in range(60):
                self.scatter(image, chance, "data_file" in options, options.get("compat") == "0.10")
            if snapshot:
                image.node.create_snapshot("s")  # type: ignore[attr-defined]
        with self.open() as image:
            for _ in range(3):
                start = chance.randrange(COUNT // 2)
                length = chance.randrange(COUNT // 3, COUNT - start)
                how = chance.choice(("discard", "zero", "zero unmap", "shrink"))
                if how == "discard":
                    image.discard(start * CLUSTER, length * CLUSTER)
                elif how == "shrink" and not snapshot:
                    image.resize(SIZE // 4, shrink=True)
                    image.resize(SIZE)
                else:
                    image.write_zeroes(start * CLUSTER, length * CLUSTER, unmap=how == "zero unmap")
            image.flush()
            self.content = image.read(0, SIZE)
            node: Any = image.node
            self.words = [list(node.mapping.l2.get(entry & ~(1 << 63)).words) for entry in node.mapping.l1 if entry]
        self.findings = walk(self.memory.to_bytes())

    def open(self) -> Image:
        graph = Graph()
        below = layer(graph, MemoryNode(self.base), "raw") if self.base else None
        if self.data is not None:
            detached(self.data)
        return open_image(detached(self.memory), graph=graph, backing=below, data_file=self.data)

    def scatter(self, image: Image, chance: random.Random, external: bool, old: bool) -> None:
        at, length = chance.randrange(COUNT - 20) * CLUSTER, chance.randrange(1, 20) * CLUSTER
        how = chance.random()
        if how < 0.5:
            image.write(at, chance.randbytes(length))
        elif how < 0.7 and not external:
            image.write_compressed(at, b"squeeze" * (CLUSTER // 7) + bytes(CLUSTER % 7))
        elif not old:
            image.write_zeroes(at, length, unmap=how < 0.85)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_in_bulk_as_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(8):
        found = []
        for bulk in (1, 1 << 30):
            monkeypatch.setattr(unmapping, "_BULK", bulk)
            found.append(Case(LAYOUTS[name], seed))
        quick, slow = found
        assert quick.content == slow.content, seed
        assert quick.words == slow.words, seed
        assert not any(quick.findings), (seed, quick.findings)
        if name != "snapshot":  # which says when it was taken
            assert quick.memory.to_bytes() == slow.memory.to_bytes(), seed


def test_an_entry_that_refers_to_no_cluster_stops_it() -> None:
    memory = new_image("qcow2", SIZE, cluster_size=CLUSTER)
    with open_image(memory) as image:
        image.write(0, b"x" * SIZE)
    with suppress(IOFailure), open_image(detached(memory)) as image:
        node: Any = image.node
        table = node.mapping.l2.get(node.mapping.l1[0] & ~(1 << 63))
        table.words[300] |= 512
        with pytest.raises(Corrupt, match="does not point to a cluster"):
            image.discard(0, SIZE)
        assert node.failure is not None
