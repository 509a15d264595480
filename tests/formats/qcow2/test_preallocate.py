"""Preallocation of the space that resizing adds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, NoSpace
from byre.graph.creating import create
from byre.graph.graph import Graph
from conftest import Run

CLUSTER = 4096

LAYOUTS: dict[str, dict[str, object]] = {
    "plain": {"cluster_size": CLUSTER},
    "tiny": {"cluster_size": 512},
    "version 2": {"cluster_size": CLUSTER, "compat": "0.10"},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
    "external": {"cluster_size": CLUSTER, "data_file": "data"},
    "external raw": {"cluster_size": CLUSTER, "data_file": "data", "data_file_raw": True},
}


def make(folder: Path, size: int, **options: object) -> str:
    path = str(folder / "disk.qcow2")
    if options.get("data_file") == "data":
        options["data_file"] = str(folder / "data")
    create(path, "qcow2", size, options=options)
    return path


@pytest.mark.oracle
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("backed", [False, True])
def test_preallocating_new_space(tmp_path: Path, qemu_img: Run, mode: str, name: str, backed: bool) -> None:
    """Only the new space: the start of the cluster that holds the old end keeps what it reads as."""
    size = 6 * CLUSTER + 1024
    options = dict(LAYOUTS[name])
    if backed:
        if options.get("data_file_raw"):
            pytest.skip("a raw data file has no backing file")
        (tmp_path / "base").write_bytes(b"\xbb" * size)
        options.update(backing_file="base", backing_fmt="raw")
    path = make(tmp_path, size, **options)
    model = bytearray((b"\xbb" if backed else b"\0") * size)
    with byre.open(path, read_only=False) as image:
        image.write(CLUSTER, b"\xdd" * 700)
        model[CLUSTER : CLUSTER + 700] = b"\xdd" * 700
        image.resize(60 * CLUSTER, preallocation=mode)
        model = model.ljust(60 * CLUSTER, b"\0")
        assert image.read(0, len(model)) == model
        table = image.node.extents(8 * CLUSTER, 52 * CLUSTER)
        assert (table.host >= 0).all()
        image.write(10 * CLUSTER + 5, b"more")
        model[10 * CLUSTER + 5 : 10 * CLUSTER + 9] = b"more"
    (tmp_path / "expected").write_bytes(model)
    qemu_img("check", path)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "expected")
    file = tmp_path / "data" if "data_file" in options else Path(path)
    if mode != "metadata":
        assert file.stat().st_blocks * 512 >= 52 * CLUSTER
    if name == "external raw":
        assert file.read_bytes() == model


@pytest.mark.oracle
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation_that_fails_leaves_a_sound_image(tmp_path: Path, qemu_img: Run, mode: str) -> None:
    path = make(tmp_path, 6 * CLUSTER + 1024, cluster_size=CLUSTER)
    with byre.open(path, read_only=False) as image:
        image.write(0, b"kept")
    rules = {"event": "none", "iotype": "write-zeroes", "errno": 28}
    graph = Graph()
    spec = {
        "driver": "qcow2",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": path},
            "inject-error": [rules, {**rules, "iotype": "write", "sector": 200}],
        },
    }
    image = byre.open(spec, read_only=False, graph=graph)
    try:
        image.resize(600 * CLUSTER, preallocation=mode)
    except NoSpace:
        pass
    try:
        image.close()
    except ByreError:
        pass
    assert qemu_img("check", path, check=False).returncode in (0, 3)
    with byre.open(path) as image:
        assert image.read(0, 4) == b"kept"
        assert image.read(4, image.size - 4) == bytes(image.size - 4)


@pytest.mark.parametrize(("mode", "written"), [("full", True), ("falloc", False)])
def test_new_space_is_written_or_reserved(tmp_path: Path, mode: str, written: bool) -> None:
    path = make(tmp_path, 1 << 20, cluster_size=65536)
    with byre.open(path, read_only=False) as image:
        image.resize(4 << 20, preallocation=mode)
        table = image.node.extents(1 << 20, 3 << 20)
    assert Path(path).stat().st_blocks * 512 >= 3 << 20
    if written:
        with open(path, "rb") as file:
            for extent in table:
                assert os.lseek(file.fileno(), extent.host, os.SEEK_DATA) == extent.host
                assert os.lseek(file.fileno(), extent.host, os.SEEK_HOLE) >= extent.host + extent.length


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_a_cluster_that_holds_nothing_yet_becomes_new_space_as_a_whole(tmp_path: Path, mode: str) -> None:
    """Its part before the old end would otherwise be a hole, to be filled by a write that was to need no space."""
    size = 6 * CLUSTER + 1024
    path = make(tmp_path, size, cluster_size=CLUSTER)
    with byre.open(path, read_only=False) as image:
        image.resize(9 * CLUSTER, preallocation=mode)
        assert [(row.offset, row.length) for row in image.node.extents(0, 9 * CLUSTER)] == [
            (0, 6 * CLUSTER), (6 * CLUSTER, 3 * CLUSTER)]  # fmt: skip
        assert image.read(0, 9 * CLUSTER) == bytes(9 * CLUSTER)
    if mode != "metadata":
        before = os.stat(path).st_blocks
        with byre.open(path, read_only=False) as image:
            image.write(6 * CLUSTER, b"x" * 3 * CLUSTER)
        assert os.stat(path).st_blocks <= before + 8  # a file system may need a block for its own map
