"""Nodes over real files, opened as the graph opens them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from byre.graph.graph import Graph
from byre.graph.opening import Opener, OpenFlags, Policy
from byre.protocols.file import FileNode

OpenFile = Callable[..., FileNode]


def make(path: Path, content: bytes | int) -> Path:
    if isinstance(content, int):
        path.touch()
        os.truncate(path, content)
    else:
        path.write_bytes(content)
    return path


def read(node: FileNode, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    node.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture
def open_file() -> Iterator[OpenFile]:
    """``open_file(path, read_only=False, driver="file", options={}, **flags)`` -> FileNode, closed at the end."""
    opened: list[FileNode] = []

    def run(
        path: object,
        *,
        read_only: bool = False,
        driver: str = "file",
        implicit: bool = False,
        options: dict[str, object] | None = None,
        **flags: object,
    ) -> FileNode:
        spec = {"driver": driver, "filename": str(path), **(options or {})}
        own = OpenFlags(read_only=read_only)._replace(**flags)  # type: ignore[arg-type]
        node = Opener(Graph(), Policy()).open(spec, own, protocol=True, implicit=implicit)
        assert isinstance(node, FileNode)
        opened.append(node)
        return node

    yield run
    for node in opened:
        node.close()


@pytest.fixture(params=["disk", "tmpfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on the file system of the temporary files, and one on tmpfs, which cannot zero a range."""
    if request.param == "disk":
        yield tmp_path
        return
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no tmpfs at /dev/shm")
    import shutil
    import tempfile

    path = tempfile.mkdtemp(prefix="byre-test-", dir="/dev/shm")
    yield Path(path)
    shutil.rmtree(path)
