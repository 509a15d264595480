"""detect-zeroes on nodes of every kind: zeroes are zero writes, other bytes are bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import byre
from byre.errors import InvalidArgument
from byre.filters.faults import FaultNode
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.io.extent import DATA, ZERO

SIZE = 1 << 20
FILE = {"driver": "file", "filename": "a"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"x" * SIZE)


def write(node: Node, offset: int, data: bytes) -> None:
    node.write_from(offset, memoryview(data))


@pytest.mark.parametrize(
    "spec",
    [
        FILE,
        {"driver": "throttle", "throttling.iops-total": 10**9, "file": FILE},
        {"driver": "blkdebug", "image": FILE},
        {"driver": "preallocate", "file": FILE},
        {"driver": "raw", "file": FILE},
        {"driver": "memory", "size": SIZE},
        {"driver": "quorum", "vote-threshold": 1, "children": [FILE]},
    ],
    ids=lambda spec: spec["driver"],
)
@pytest.mark.parametrize("mode", ["on", "unmap"])
def test_zeroes_are_no_data(spec: dict[str, object], mode: str) -> None:
    with byre.open({**spec, "detect-zeroes": mode}, read_only=False) as image:
        image.write(0, b"y" * SIZE)
        image.write(65536, bytes(131_072))
        image.write(262_144, bytes(65536) + b"z")
        image.writev(524_288, [memoryview(bytes(4096)), memoryview(bytes(61_440))], fua=True)
        image.writev(655_360, [memoryview(bytes(4096)), memoryview(b"w" * 4096)])
        image.write(0, b"")
        expected = bytearray(b"y" * SIZE)
        expected[65536:196_608] = bytes(131_072)
        expected[262_144:327_681] = bytes(65536) + b"z"
        expected[524_288:589_824] = bytes(65536)
        expected[655_360:663_552] = bytes(4096) + b"w" * 4096
        assert image.read(0, SIZE) == expected
        if mode == "unmap":
            kinds = [{row.kind for row in image.extents(offset, 65536)} for offset in range(0, 655_360, 65536)]
            assert kinds == [{ZERO if index in (1, 2, 8) else DATA} for index in range(10)]


def test_only_the_node_that_has_the_option() -> None:
    """A format that does not detect zeroes on a file that does: the image has data clusters in a hole of the file."""
    byre.create("b", "qcow2", SIZE)
    file = {"driver": "file", "filename": "b", "detect-zeroes": "unmap"}
    with byre.open({"driver": "qcow2", "file": file}, read_only=False) as image:
        image.write(0, b"x" * SIZE)
        image.flush()
        before = os.stat("b").st_blocks
        image.write(0, bytes(SIZE))
        assert {row.kind for row in image.extents()} == {DATA}
        assert os.stat("b").st_blocks <= before - (SIZE >> 9)
        assert image.read(0, SIZE) == bytes(SIZE)


def test_a_device_without_a_quick_way_is_written() -> None:
    graph = Graph()
    spec = {"driver": "blkdebug", "opt-write-zero": 65536, "image": FILE, "detect-zeroes": "on"}
    with byre.open(spec, read_only=False, graph=graph) as image:
        image.write(1000, bytes(1000))
        assert image.read(999, 1002) == b"x" + bytes(1000) + b"x"
        assert isinstance(image.node, FaultNode)
        assert image.node.calls["write"] == 1
        assert image.node.calls["write-zeroes"] == 0


def test_unmapping_needs_discards() -> None:
    with pytest.raises(InvalidArgument, match="detect-zeroes=unmap needs discard=unmap"):
        byre.open({**FILE, "detect-zeroes": "unmap", "discard": "ignore"}, read_only=False)
    with pytest.raises(InvalidArgument, match="discard=unmap"):
        byre.open("a", format="raw", detect_zeroes="unmap", discard="ignore", read_only=False)
    with byre.open({**FILE, "detect-zeroes": "on", "discard": "ignore"}, read_only=False) as image:
        write(image.node, 0, bytes(4096))
