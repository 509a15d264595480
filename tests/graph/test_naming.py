"""The name a node is shown under opens the same thing again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import byre
from byre.errors import InvalidArgument
from byre.filters.throttle_group import ThrottleGroup
from byre.graph.graph import Graph
from byre.graph.naming import shown_name
from byre.graph.node import Node
from byre.graph.opening import resolve_backing

FILE = {"driver": "file", "filename": "a"}
QCOW2 = {"driver": "qcow2", "file": FILE}
NAMES = [
    (QCOW2, "a"),
    ({"driver": "raw", "file": FILE}, "a"),
    ({"driver": "raw", "file": FILE, "node-name": "n", "cache": {"direct": False}, "discard": "unmap"}, "a"),
    ({"driver": "raw", "file": FILE, "offset": 512}, {"driver": "raw", "offset": 512, "file": FILE}),
    ({"driver": "compress", "file": QCOW2}, {"driver": "compress", "file": QCOW2}),
    ({"driver": "throttle", "throttle-group": "g", "file": QCOW2},
     {"driver": "throttle", "throttle-group": "g", "file": QCOW2}),
    ({"driver": "qcow2", "file": {"driver": "quorum", "vote-threshold": 1, "children": [FILE, FILE]}},
     {"driver": "qcow2", "file": {"driver": "quorum", "vote-threshold": 1, "children": [FILE, FILE]}}),
    ("blkdebug::a", "blkdebug::a"),
    ({"driver": "qcow2", "file": {"driver": "blkdebug", "config": "c", "image": FILE}}, "blkdebug:c:a"),
    ({"driver": "blkdebug", "image": FILE, "set-state": [{"event": "read_aio", "new_state": 42}]},
     {"driver": "blkdebug", "set-state.0.event": "read_aio", "set-state.0.new_state": 42, "image": FILE}),
    ("blkverify:r:r", "blkverify:r:r"),
    ({"driver": "blkverify", "raw": FILE, "test": {"driver": "compress", "file": QCOW2}},
     {"driver": "blkverify", "raw": FILE, "test": {"driver": "compress", "file": QCOW2}}),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "expected"), NAMES)
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: object, expected: object) -> None:
    monkeypatch.chdir(tmp_path)
    byre.create("a", "qcow2", 1 << 20)
    Path("c").write_text("")
    Path("r").write_bytes(b"raw" * 512)

    def shown(target: object, format: str) -> tuple[str, list[str]]:
        graph = Graph()
        graph.throttle_groups["g"] = ThrottleGroup("g")
        with byre.open(target, format=format, graph=graph, backing=False) as image:  # type: ignore[arg-type]
            return shown_name(image.node), drivers(image.node)

    name, nodes = shown(spec, "")
    assert (json.loads(name[5:]) if name.startswith("json:") else name) == expected
    format = nodes[0] if not name.startswith("json:") and nodes[0] in ("raw", "qcow2") else ""
    assert shown(name, format) == (name, nodes)


def drivers(node: Node) -> list[str]:
    return [node.driver, *(driver for edge in node.children.values() for driver in drivers(edge.node))]


def test_no_folder_no_relative_backing_file() -> None:
    with pytest.raises(InvalidArgument, match="no folder"):
        resolve_backing("", "base")
    assert resolve_backing("", "/base") == "/base"
