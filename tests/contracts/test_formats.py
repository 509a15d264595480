"""The format contract on raw and on qcow2 over a grid of what can differ."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.image import Image
from byre.protocols.memory import MemoryNode
from contracts.node import FormatContract, patchwork
from support.images import layer, new_image, open_image
from support.walk import walk

SIZE = 1 << 20


def scattered(image: Image, content: bytes, cluster: int, below: bytes = b"") -> None:
    """Write ``content`` cluster by cluster in random order, with detours that leave the mapping fragmented.

    Where ``below`` (what the backing file holds) agrees, the cluster is left unallocated.
    """
    chooser = random.Random(9)
    step = max(cluster, 4096)
    order = list(range(0, len(content), step))
    chooser.shuffle(order)
    below = below.ljust(len(content), b"\0")
    for offset in order:
        part = content[offset : offset + step]
        if part == below[offset : offset + step]:
            continue
        how = chooser.random()
        if not any(part):
            image.write_zeroes(offset, len(part), unmap=how < 0.5)
        elif how < 0.2:
            image.write(offset, bytes(len(part)))
            image.discard(offset, len(part))
            image.write(offset, part)
        elif how < 0.4:
            cut = len(part) // 3
            image.write(offset + cut, part[cut:])
            image.write(offset, part[:cut])
        else:
            image.write(offset, part)
    image.flush()


class TestRaw(FormatContract):
    @pytest.fixture
    def node(self) -> Iterator[Node]:
        with open_image(MemoryNode(self.content), "raw") as image:
            yield image.node


class TestRawSlice(FormatContract):
    @pytest.fixture
    def node(self) -> Iterator[Node]:
        memory = MemoryNode(b"before" * 100 + self.content + b"behind" * 100)
        options = {"offset": 600, "size": len(self.content)}
        with open_image(memory, "raw", options=options) as image:
            yield image.node
        data = memory.to_bytes()
        assert data.startswith(b"before" * 100)
        assert data.endswith(b"behind" * 100)

    def test_growth_reads_as_zeroes_and_what_was_cut_off_does_not_come_back(self, node: Node) -> None:
        with pytest.raises(Exception, match="slice"):
            node.resize(10)


GRID: dict[str, dict[str, object]] = {
    "v3": {},
    "v2": {"compat": "0.10"},
    "512": {"cluster_size": 512},
    "512-v2": {"cluster_size": 512, "compat": "0.10"},
    "4k-1bit": {"cluster_size": 4096, "refcount_bits": 1},
    "512-64bit": {"cluster_size": 512, "refcount_bits": 64},
    "2M": {"cluster_size": 2 << 20},
    "8k-2bit": {"cluster_size": 8192, "refcount_bits": 2},
    "lazy": {"lazy_refcounts": True},
    "extended": {"extended_l2": True},
    "extended-16k": {"extended_l2": True, "cluster_size": 16384},
    "extended-2M": {"extended_l2": True, "cluster_size": 2 << 20},
    "zstd": {"compression_type": "zstd"},
    "preallocated": {"preallocation": "metadata"},
}


class Qcow2Contract(FormatContract):
    options: dict[str, object]

    def cluster(self) -> int:
        return int(str(self.options.get("cluster_size", 65536)))

    @pytest.fixture(params=list(GRID))
    def options_of(self, request: pytest.FixtureRequest) -> dict[str, object]:
        self.options = GRID[request.param]
        return self.options


class TestQcow2(Qcow2Contract):
    @pytest.fixture
    def node(self, options_of: dict[str, object]) -> Iterator[Node]:
        memory = new_image("qcow2", len(self.content), **options_of)
        with open_image(memory) as image:
            scattered(image, self.content, self.cluster())
            yield image.node
        findings = walk(memory.to_bytes())
        assert findings == ([], [], []), findings


class TestQcow2Compressed(Qcow2Contract):
    """Half of the clusters are compressed, and are written over."""

    @pytest.fixture(params=["v3", "zstd", "v2", "512", "4k-1bit", "8k-2bit", "extended"])
    def options_of(self, request: pytest.FixtureRequest) -> dict[str, object]:
        self.options = GRID[request.param]
        return self.options

    content = b"".join(patchwork(1 << 15, seed=n) if n % 2 else bytes([n]) * (1 << 15) for n in range(32))

    @pytest.fixture
    def node(self, options_of: dict[str, object]) -> Iterator[Node]:
        memory = new_image("qcow2", len(self.content), **options_of)
        with open_image(memory) as image:
            size = self.cluster()
            for offset in range(0, len(self.content), size):
                part = self.content[offset : offset + size]
                if offset // size % 2:
                    image.write_compressed(offset, bytes(len(part)))
                image.write_compressed(offset, part)
            image.flush()
            yield image.node
        findings = walk(memory.to_bytes())
        assert findings == ([], [], []), findings


class TestQcow2Backed(Qcow2Contract):
    """Two layers below, one of them shorter, one longer than the top."""

    @pytest.fixture(params=["v3", "v2", "512", "extended", "2M"])
    def options_of(self, request: pytest.FixtureRequest) -> dict[str, object]:
        self.options = GRID[request.param]
        return self.options

    @pytest.fixture
    def node(self, options_of: dict[str, object]) -> Iterator[Node]:
        size, cluster = len(self.content), self.cluster()
        base_bytes = patchwork(size - 100_000, seed=5)
        base = MemoryNode(base_bytes)
        below = bytearray(base_bytes + bytes(150_000))
        middle_part = patchwork(cluster * 3, seed=6)
        middle = new_image("qcow2", size + 50_176, backing_file="base", backing_fmt="raw")
        graph = Graph()
        at = min(200_000, size - len(middle_part)) if len(middle_part) < size else 0
        middle_part = middle_part[: size - at]
        with open_image(middle, graph=graph, backing=layer(graph, base, "raw")) as image:
            image.write(at, middle_part)
        below[at : at + len(middle_part)] = middle_part
        # What the top is to read like: partly its own, partly what lies below.
        merged = bytearray(self.content)
        for offset in range(0, size, 3 * 65536):
            merged[offset : offset + 65536] = below[offset : offset + 65536][: size - offset]
        self.content = bytes(merged[:size])
        top = new_image("qcow2", size, backing_file="middle", backing_fmt="qcow2", **options_of)
        graph = Graph()
        layers = layer(graph, middle, "qcow2", layer(graph, base, "raw"))
        with open_image(top, graph=graph, backing=layers) as image:
            assert image.read(0, size) == bytes(below[:size])
            scattered(image, self.content, cluster, bytes(below))
            yield image.node
        findings = walk(top.to_bytes())
        assert findings == ([], [], []), findings
        assert base.to_bytes() == base_bytes


class TestQcow2DataFile(Qcow2Contract):
    @pytest.fixture(params=["v3", "512", "extended", "raw"])
    def options_of(self, request: pytest.FixtureRequest) -> dict[str, object]:
        self.raw = request.param == "raw"
        self.options = GRID.get(request.param, {"data_file_raw": True})
        return self.options

    @pytest.fixture
    def node(self, options_of: dict[str, object]) -> Iterator[Node]:
        data = MemoryNode()
        memory = new_image("qcow2", len(self.content), data, data_file="data", **options_of)
        with open_image(memory, data_file=data) as image:
            scattered(image, self.content, self.cluster())
            yield image.node
            final = image.read(0, image.size)
        findings = walk(memory.to_bytes())
        assert findings == ([], [], []), findings
        if self.raw:
            assert data.to_bytes()[: len(final)].ljust(len(final), b"\0") == final
