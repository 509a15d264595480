"""Opening chains of backing files: what names the next layer, what overrides it, loops and depth."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import byre
from byre.errors import Busy, ByreError, ImageError, InvalidArgument, NotFound
from byre.graph import chain
from byre.graph.graph import Graph

from .conftest import image, overlay, raw

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

KIB = 1024


# -- backing files --------------------------------------------------------------------------------


def test_a_chain_reads_through(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    image(tmp_path / "base.qcow2", b"base")
    overlay(tmp_path / "sub" / "mid.qcow2", "../base.qcow2")
    top = overlay(tmp_path / "top.qcow2", "sub/mid.qcow2")
    with byre.open(top) as opened:
        assert opened.read(0, 4) == b"base"
        assert [layer.driver for layer in chain.layers(opened.node)] == ["qcow2"] * 3
        assert opened.graph.warnings == []
    with byre.open(top, backing=False) as opened:
        assert opened.read(0, 4) == bytes(4)


def test_a_backing_format_that_was_not_recorded_gives_a_warning(tmp_path: Path) -> None:
    image(tmp_path / "base", b"base")
    top = overlay(tmp_path / "top", "base", None)
    with byre.open(top) as opened:
        assert opened.read(0, 4) == b"base"
        [warning] = opened.graph.warnings
    assert "base" in warning
    assert "not recorded" in warning


def test_a_recorded_format_is_not_probed(tmp_path: Path) -> None:
    image(tmp_path / "base", b"base")
    top = overlay(tmp_path / "top", "base", "raw")
    with byre.open(top) as opened:
        assert opened.read(0, 4) == b"QFI\xfb"


def test_overriding_the_backing_file(tmp_path: Path) -> None:
    image(tmp_path / "base", b"base")
    other = image(tmp_path / "other", b"other")
    plain = raw(tmp_path / "raw", b"plain")
    top = overlay(tmp_path / "top", "base")

    def read(**more: object) -> bytes:
        with byre.open({"driver": "qcow2", "file": top, **more}) as opened:
            return opened.read(0, 5)

    assert read() == b"base\0"
    assert read(backing=None) == bytes(5)
    assert read(backing="") == bytes(5)
    assert read(**{"backing.file.filename": other, "backing.driver": "qcow2"}) == b"other"
    assert read(backing={"driver": "qcow2", "file": {"driver": "file", "filename": other}}) == b"other"
    assert read(backing={"driver": "raw", "file": {"driver": "file", "filename": plain}}) == b"plain"
    assert read(**{"backing.file.filename": plain}) == b"plain"
    assert read(**{"backing.driver": "raw"}) == b"QFI\xfb\0"
    assert read(**{"backing.detect-zeroes": "off"}) == b"base\0"


def test_a_backing_override_where_there_is_no_backing_file(tmp_path: Path) -> None:
    path = image(tmp_path / "a")
    other = image(tmp_path / "b", b"b")
    with byre.open({"driver": "qcow2", "file": path, "backing": {"driver": "qcow2", "file": other}}) as opened:
        assert opened.read(0, 1) == b"b"
    with pytest.raises(InvalidArgument, match="has no backing file"):
        byre.open({"driver": "qcow2", "file": path, "backing": {"detect-zeroes": "off"}})


def test_a_node_as_backing_file(tmp_path: Path) -> None:
    base = image(tmp_path / "base", b"base")
    top = overlay(tmp_path / "top", "missing")
    graph = Graph()
    with byre.open({"driver": "qcow2", "file": base, "node-name": "lower"}, graph=graph) as lower:
        with byre.open({"driver": "qcow2", "file": top, "backing": "lower"}, graph=graph) as opened:
            assert opened.read(0, 4) == b"base"
            assert opened.node.children["backing"].node is lower.node
        assert lower.read(0, 4) == b"base"  # still there: somebody else holds it
        with pytest.raises(NotFound, match="no node named 'upper'"):
            byre.open({"driver": "qcow2", "file": top, "backing": "upper"}, graph=graph)
        assert len(lower.node.parents) == 1


def test_a_missing_backing_file_says_who_wants_it(tmp_path: Path) -> None:
    top = overlay(tmp_path / "top", "gone.img")
    with pytest.raises(NotFound) as caught:
        byre.open(top)
    assert str(tmp_path / "top") in str(caught.value)
    assert "gone.img" in str(caught.value)


def test_an_overlay_longer_and_shorter_than_its_backing_file(tmp_path: Path) -> None:
    raw(tmp_path / "base", b"\x11" * 64 * KIB)
    top = overlay(tmp_path / "long", "base", "raw", 256 * KIB)
    with byre.open(top) as opened:
        assert opened.read(0, 256 * KIB) == (b"\x11" * 64 * KIB).ljust(256 * KIB, b"\0")
    short = overlay(tmp_path / "short", "base", "raw", 32 * KIB)
    with byre.open(short) as opened:
        assert opened.size == 32 * KIB
        assert opened.read(0, 32 * KIB) == b"\x11" * 32 * KIB


def test_a_backing_file_shorter_than_the_layer_between(tmp_path: Path) -> None:
    """What lies behind the end of the middle layer is zero, whatever is below."""
    raw(tmp_path / "base", b"\x11" * 64 * KIB)
    overlay(tmp_path / "mid", "base", "raw", 16 * KIB)
    top = overlay(tmp_path / "top", "mid", "qcow2", 64 * KIB)
    with byre.open(top) as opened:
        assert opened.read(0, 64 * KIB) == (b"\x11" * 16 * KIB).ljust(64 * KIB, b"\0")


# -- loops and depth ------------------------------------------------------------------------------


def set_backing_name(path: Path, name: str) -> None:
    """Write a backing name into the header, which no program would."""
    with path.open("r+b") as file:
        file.seek(32 * KIB)
        file.write(name.encode())
        file.seek(8)
        file.write(struct.pack(">QI", 32 * KIB, len(name)))


@pytest.mark.parametrize("how", ["itself", "hard link", "symbolic link", "two"])
def test_loops_are_refused(tmp_path: Path, how: str) -> None:
    top = tmp_path / "top"
    image(top)
    if how == "itself":
        set_backing_name(top, "top")
    elif how == "two":
        image(tmp_path / "mid")
        set_backing_name(tmp_path / "mid", "./top")
        set_backing_name(top, str(tmp_path / "mid"))
    else:
        (tmp_path / "link").hardlink_to(top) if how == "hard link" else (tmp_path / "link").symlink_to(top)
        set_backing_name(top, "link")
    with pytest.raises((ImageError, Busy), match="twice"):
        byre.open(str(top))
    with pytest.raises(ByreError):
        byre.open(str(top), read_only=False)
    with byre.open(str(top), backing=False) as opened:
        assert opened.size == 64 * KIB


def test_two_hundred_layers_and_not_one_more(tmp_path: Path) -> None:
    name = image(tmp_path / "0", b"bottom", cluster_size=4096)
    template = Path(overlay(tmp_path / "1", "0")).read_bytes()
    for index in range(2, 201):
        path = tmp_path / str(index)
        path.write_bytes(template)
        at, _length = struct.unpack_from(">QI", template, 8)
        new = str(index - 1).encode()
        with path.open("r+b") as file:
            file.seek(at)
            file.write(new)
            file.seek(16)
            file.write(struct.pack(">I", len(new)))
        name = str(path)
    with byre.open(str(tmp_path / "199"), read_only=False) as opened:
        assert chain.depth(opened.node) == 200
        assert opened.read(0, 6) == b"bottom"
        opened.write(1, b"O")
        assert opened.read(0, 6) == b"bOttom"
        opened.write_zeroes(0, 1)
        assert opened.extents(0, 64 * KIB).bytes_of(0) > 0
    with pytest.raises(ImageError, match="longer than 200 layers"):
        byre.open(name)
