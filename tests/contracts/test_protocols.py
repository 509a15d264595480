"""The node contract on files, memory and null devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from byre.graph.graph import Graph
from byre.graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE, Node
from byre.graph.opening import Opener, OpenFlags, Policy
from byre.protocols.memory import MemoryNode
from contracts.node import NodeContract, ProtocolContract


def opened(spec: dict[str, object], *, direct: bool = False) -> Iterator[Node]:
    graph = Graph()
    node = Opener(graph, Policy()).open(spec, OpenFlags(read_only=False, direct=direct), protocol=True)
    root = graph.attach_image(node, "test", PERM_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL)
    yield node
    graph.detach(root)
    graph.release(node)


class TestMemory(ProtocolContract):
    @pytest.fixture
    def node(self) -> Node:
        return MemoryNode(self.content)


class TestFile(ProtocolContract):
    direct = False

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        path = tmp_path / "disk"
        path.write_bytes(self.content)
        yield from opened({"driver": "file", "filename": str(path)}, direct=self.direct)


class TestSparseFile(TestFile):
    content = bytes(200_000) + TestFile.content[:300_000] + bytes(548_576)

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        path = tmp_path / "disk"
        with path.open("wb") as file:
            file.truncate(len(self.content))
            file.seek(200_000)
            file.write(self.content[200_000:500_000])
        yield from opened({"driver": "file", "filename": str(path)})


class TestDirectFile(TestFile):
    """Past the page cache; on file systems that cannot, the driver falls back or refuses."""

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        from byre.errors import ByreError

        path = tmp_path / "disk"
        path.write_bytes(self.content)
        spec = {"driver": "file", "filename": str(path)}
        try:
            yield from opened(spec, direct=True)
        except ByreError as error:
            if "direct" not in str(error).lower():
                raise
            pytest.skip(str(error))


class TestOddFile(TestFile):
    """A size that is a multiple of nothing."""

    content = TestFile.content[: (1 << 20) - 13]


class TestNull(NodeContract):
    content = bytes(1 << 20)

    @pytest.fixture
    def node(self) -> Iterator[Node]:
        yield from opened({"driver": "null-co", "size": 1 << 20, "read-zeroes": True})
