"""The format contract on VMDK disks: one file and many, sparse and flat, with and without a parent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.image import Image
from byre.protocols.memory import MemoryNode
from contracts.node import FormatContract, ReadOnlyFormatContract, patchwork
from contracts.test_formats import scattered
from support import vmdk
from support.images import detached, layer, new_image, open_image

SIZE = 1 << 20


def open_parts(text: bytes, parts: list[MemoryNode], graph: Graph | None = None, *, read_only: bool = False) -> Image:
    """A disk whose extents are in memory."""
    graph = graph or Graph()
    names = []
    for part in parts:
        graph.add(detached(part))
        names.append(part.name)
    memory = MemoryNode(text)
    return open_image(memory, "vmdk", graph=graph, options={"extents": names}, read_only=read_only)


SPARSE: dict[str, dict[str, Any]] = {
    "new": {},
    "zero-grains": {"zeroed_grain": True},
}
FORGED: dict[str, dict[str, Any]] = {
    "4k": {"grain": 4096},
    "512-small-tables": {"grain": 512, "per_table": 16},
    "one-copy": {"grain": 4096, "redundant": False},
    "missing-tables": {"grain": 4096, "per_table": 8, "missing_tables": True},
    "zero-grains": {"grain": 8192, "per_table": 64, "zero_grains": True, "version": 2},
    "large": {"grain": 1 << 20},
}


class TestNew(FormatContract):
    content = patchwork(SIZE, seed=21)

    @pytest.fixture(params=list(SPARSE))
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        memory = new_image("vmdk", len(self.content), **SPARSE[request.param])
        with open_image(memory, "vmdk") as image:
            scattered(image, self.content, 65536)
            yield image.node
        assert vmdk.look_through(memory.to_bytes()) == ([], [])


class TestForged(FormatContract):
    content = patchwork(SIZE, seed=22)

    @pytest.fixture(params=list(FORGED))
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        options = FORGED[request.param]
        empty = vmdk.hosted(bytes(len(self.content)), **options)
        memory = MemoryNode(vmdk.hosted(self.content, **options) if request.param != "missing-tables" else empty)
        with open_image(memory, "vmdk") as image:
            if request.param == "missing-tables":
                scattered(image, self.content, int(options["grain"]))
            yield image.node
        assert vmdk.look_through(memory.to_bytes()) == ([], [])


class TestSplit(FormatContract):
    """Extents of several kinds, one of which ends inside a grain."""

    content = patchwork(SIZE, seed=23)

    @pytest.fixture(params=["sparse", "flat", "mixed", "odd"])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        kinds = {"sparse": "SSSS", "flat": "FFF", "mixed": "SFSF", "odd": "SFSS"}[request.param]
        sizes = self.sizes(len(kinds), 1536 if request.param == "odd" else 0)
        lines, parts, start = [], [], 0
        for index, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
            part = self.content[start : start + size]
            start += size
            if kind == "F":
                lines.append(f'RW {size // 512} FLAT "part{index}" 3')
                parts.append(MemoryNode(b"before" * 256 + part))
            else:
                lines.append(f'RW {size // 512} SPARSE "part{index}"')
                grain = 8192 if request.param == "odd" and index > 1 else 4096
                parts.append(MemoryNode(vmdk.hosted(part, grain=grain, text=b"")))
        with open_parts(vmdk.descriptor(lines, "custom"), parts) as image:
            yield image.node
        for kind, memory in zip(kinds, parts, strict=True):
            if kind == "F":
                assert memory.to_bytes().startswith(b"before" * 256)
            else:
                assert vmdk.look_through(memory.to_bytes()) == ([], [])

    def sizes(self, count: int, odd: int) -> list[int]:
        each = SIZE // count // 4096 * 4096 + odd
        return [each] * (count - 1) + [SIZE - each * (count - 1)]


class TestOverParent(FormatContract):
    content = patchwork(SIZE, seed=24)

    @pytest.fixture(params=["plain", "zero-grains"])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        below = patchwork(SIZE - 65536 * 2, seed=25)
        parent = MemoryNode(vmdk.hosted(below, grain=4096))
        before = parent.to_bytes()
        zero = request.param == "zero-grains"
        text = vmdk.descriptor(['RW 2048 SPARSE "memory"'], parent="12345678", more='parentFileNameHint="below"')
        top = MemoryNode(vmdk.hosted(bytes(SIZE), grain=8192, text=text, version=2 if zero else 1))
        if zero:
            data = bytearray(top.to_bytes())
            data[8] |= 4
            top = MemoryNode(bytes(data))
        graph = Graph()
        with open_image(top, "vmdk", graph=graph, backing=layer(graph, parent, "vmdk")) as image:
            assert image.read(0, SIZE) == below.ljust(SIZE, b"\0")
            scattered(image, self.content, 8192, below)
            yield image.node
        assert vmdk.look_through(top.to_bytes()) == ([], [])
        assert parent.to_bytes() == before


class TestReadOnlyKinds(ReadOnlyFormatContract):
    """Streams with a footer, ESX sparse and space-efficient sparse extents."""

    content = patchwork(SIZE, seed=26)

    @pytest.fixture(params=["stream", "stream-4k", "no-markers", "cowd", "cowd-4k", "sesparse", "sesparse-unmapped"])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        name = request.param
        if name.startswith(("stream", "no-markers")):
            data = vmdk.stream(self.content, grain=4096 if name == "stream-4k" else 65536, per_table=64,
                               markers=name != "no-markers")  # fmt: skip
            image = open_image(MemoryNode(data), "vmdk", read_only=True)
        else:
            kind = "SESPARSE" if name.startswith("sesparse") else "VMFSSPARSE"
            part = vmdk.cowd(self.content, grain=4096 if name == "cowd-4k" else 65536)
            if kind == "SESPARSE":
                part = vmdk.sesparse(self.content, zero_kind=1 if name.endswith("unmapped") else 2)
            text = vmdk.descriptor(
                [f'RW {SIZE // 512} {kind} "part"'], {"SESPARSE": "seSparse"}.get(kind, "vmfsSparse")
            )
            image = open_parts(text, [MemoryNode(part)], read_only=True)
        with image:
            yield image.node
