"""Opening: names, options, probing, and what an image may name."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import byre
from byre.errors import AccessDenied, Busy, ByreError, ImageError, InvalidArgument
from byre.formats.qcow2.image import Qcow2Node
from byre.graph.graph import Graph
from byre.graph.opening import Policy, has_protocol, parse_filename, resolve_backing
from byre.image import Image

from .conftest import image, overlay, raw

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

KIB = 1024


# -- names ----------------------------------------------------------------------------------------


def test_names_of_files_and_protocols() -> None:
    assert parse_filename("a.img") == {"driver": "file", "filename": "a.img"}
    assert parse_filename("./image:name") == {"driver": "file", "filename": "./image:name"}
    assert parse_filename("/a:b/c") == {"driver": "file", "filename": "/a:b/c"}
    assert parse_filename("file:a.img") == {"driver": "file", "filename": "a.img"}
    assert parse_filename("file:a:b") == {"driver": "file", "filename": "./a:b"}
    assert parse_filename("json:{'driver': 'raw'}") == {"driver": "raw"}
    with pytest.raises(InvalidArgument, match=r"unknown protocol 'image' in 'image:name'; write \./"):
        parse_filename("image:name")
    assert has_protocol("nbd:x")
    assert has_protocol(":x")
    assert not has_protocol("a/b:c")


@pytest.mark.parametrize(
    ("overlay", "name", "found"),
    [
        ("/a/b.qcow2", "c", "/a/c"),
        ("b.qcow2", "c", "c"),
        ("d/b.qcow2", "../c", "d/../c"),
        ("/a/b", "/c", "/c"),
        ("d/b", "nbd:x", "nbd:x"),
        ("file:d/b", "c", "d/c"),
        ("blkdebug:x:d/b", "c", "blkdebug:x:d/c"),
        ("d/b", "./e:f", "d/./e:f"),
    ],
)
def test_backing_names_start_from_the_folder_of_the_overlay(overlay: str, name: str, found: str) -> None:
    assert resolve_backing(overlay, name) == found


def test_a_relative_backing_name_needs_a_folder() -> None:
    with pytest.raises(InvalidArgument, match="no folder to start from"):
        resolve_backing("json:{}", "c")
    assert resolve_backing("json:{}", "/c") == "/c"


SPECS: list[Callable[[str], object]] = [
    lambda path: path,
    lambda path: f"file:{path}",
    lambda path: "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": path}}),
    lambda path: "json:" + json.dumps({"driver": "qcow2", "file.filename": path}),
    lambda path: f"json:{{'driver': 'qcow2', 'file': {{'filename': '{path}'}}}}",
    lambda path: "json:" + json.dumps({"filename": path}),
    lambda path: {"driver": "qcow2", "file": {"driver": "file", "filename": path}},
    lambda path: {"driver": "qcow2", "file": path},
    lambda path: {"driver": "qcow2", "filename": path},
    lambda path: {"driver": "qcow2", "file.driver": "file", "file.filename": path},
    lambda path: {"file": {"driver": "file", "filename": path}},
    lambda path: {"filename": path},
    lambda path: {"driver": "qcow2", "file": {"driver": "raw", "file": {"driver": "file", "filename": path}}},
]


@pytest.mark.parametrize("index", range(len(SPECS)))
def test_the_ways_to_say_which_image(tmp_path: Path, index: int) -> None:
    path = image(tmp_path / "a.qcow2", b"hello")
    spec: object = SPECS[index](path)
    with byre.open(spec) as opened:  # type: ignore[arg-type]
        assert opened.format == "qcow2"
        assert opened.read(0, 5) == b"hello"


def test_a_colon_in_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "image:name", b"hello")
    with byre.open("./image:name") as opened:
        assert opened.read(0, 5) == b"hello"
    with byre.open("file:image:name") as opened:
        assert opened.read(0, 5) == b"hello"
    with pytest.raises(InvalidArgument, match=r"write \./ before"):
        byre.open("image:name")


def test_probing_and_saying_the_format(tmp_path: Path) -> None:
    path = image(tmp_path / "a", b"hello")
    with byre.open(path, format="raw") as opened:
        assert opened.format == "raw"
        assert opened.read(0, 4) == b"QFI\xfb"
    other = raw(tmp_path / "b", b"text")
    with byre.open(other) as opened:
        assert opened.format == "raw"
    with pytest.raises(ImageError):
        byre.open(other, format="qcow2")
    with pytest.raises(InvalidArgument, match="unknown driver 'qcow3'"):
        byre.open(other, format="qcow3")


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"driver": "qcow2"},
        {"driver": "file"},
        {"driver": "nope", "file": "x"},
        {"driver": "qcow2", "file": {}},
        {"driver": 5, "file": "x"},
        {"filename": 5},
        {"driver": "qcow2", "file": 5},
        {"driver": "qcow2", "file": None},
        {"driver": "qcow2", "file": {"driver": "file", "filename": ""}},
        {"driver": "qcow2", "file": ["x"]},
        {"driver": "file", "filename": "a\0b"},
        {"driver": "raw", "file": {"driver": "file", "filename": None}},
    ],
)
def test_options_that_name_nothing(spec: dict[str, object]) -> None:
    with pytest.raises(ByreError):
        byre.open(spec)


def test_unknown_options_are_named(tmp_path: Path) -> None:
    path = image(tmp_path / "a")
    with pytest.raises(InvalidArgument, match="driver 'qcow2' has no option 'lazy'"):
        byre.open({"driver": "qcow2", "file": path, "lazy": True})
    with pytest.raises(InvalidArgument, match=r"has no option 'x\.y'"):
        byre.open({"driver": "qcow2", "file": path, "x": {"y": 1}})
    with pytest.raises(InvalidArgument, match="driver 'file' has no option 'mode'"):
        byre.open({"driver": "qcow2", "file": {"driver": "file", "filename": path, "mode": "x"}})
    with pytest.raises(InvalidArgument, match="'read-only' is 'maybe'"):
        byre.open({"driver": "qcow2", "file": path, "read-only": "maybe"})


def test_options_common_to_all_nodes(tmp_path: Path) -> None:
    path = image(tmp_path / "a")
    spec = {"driver": "qcow2", "file": path, "node-name": "top", "read-only": "on", "detect-zeroes": "on"}
    with byre.open(spec) as opened:
        assert opened.node.name == "top"
        assert opened.node.read_only
    with pytest.raises(ByreError, match="read-only"):
        byre.open(spec, read_only=False)
    graph = Graph()
    with byre.open({**spec, "node-name": "one"}, graph=graph) as opened:
        for driver in ("qcow2", "raw"):
            with pytest.raises(ByreError, match="'one' exists already"):
                byre.open({"driver": driver, "file": path, "node-name": "one"}, graph=graph)
            assert graph.find("one") is opened.node


# -- what an image may name -----------------------------------------------------------------------


def test_an_untrusted_image_opens_nothing(tmp_path: Path) -> None:
    raw(tmp_path / "base", b"x")
    top = overlay(tmp_path / "top", "base", "raw")
    with pytest.raises(AccessDenied, match="not opened for an untrusted image"):
        byre.open(top, policy=Policy.untrusted())
    with byre.open(top, policy=Policy.untrusted(), backing=False) as opened:
        assert opened.read(0, 1) == b"\0"
    spec = {"driver": "qcow2", "file": top, "backing": {"driver": "raw", "file": str(tmp_path / "base")}}
    with byre.open(spec, policy=Policy.untrusted()) as opened:
        assert opened.read(0, 1) == b"x"
    huge = image(tmp_path / "huge", size=17 << 40)
    with pytest.raises(ImageError, match="--max-size"):
        byre.open(huge, policy=Policy.untrusted())
    data = image(tmp_path / "data.qcow2", data_file=str(tmp_path / "data.raw"))
    with pytest.raises(AccessDenied, match=r"data file .*untrusted"):
        byre.open(data, policy=Policy.untrusted())


def test_below_allowed_folders(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "in", tmp_path / "in-not"
    allowed.mkdir()
    outside.mkdir()
    raw(allowed / "base", b"good")
    raw(outside / "secret", b"secret")
    (allowed / "link").symlink_to(outside / "secret")
    (allowed / "folder").symlink_to(outside)
    (tmp_path / "way-in").symlink_to(allowed)
    policy = Policy("below", (str(tmp_path / "way-in"),))
    for name in ("base", str(allowed / "base"), "../in/base"):
        with byre.open(overlay(allowed / "top", name, "raw"), policy=policy) as opened:
            assert opened.read(0, 4) == b"good"
    for name in ("link", "folder/secret", "../in-not/secret", str(outside / "secret"), "/proc/self/mem"):
        with pytest.raises(AccessDenied, match="outside the allowed folders"):
            byre.open(overlay(allowed / "top", name, "raw"), policy=policy)


@pytest.mark.parametrize(
    "name",
    [
        "json:{'driver': 'null-co'}",
        "json:{'driver':'file','filename':'/etc/passwd'}",
        "null-co://",
        "nbd://x",
        "nbd:x:1",
        "x:y",
    ],
)
def test_references_in_an_image(tmp_path: Path, name: str) -> None:
    top = overlay(tmp_path / "top", name, "raw")
    with pytest.raises(AccessDenied, match=r"not a plain file name.*--allow-ref"):
        byre.open(top)
    if "null-co" in name:
        with byre.open(top, policy=Policy(allow_references=True)) as opened:
            assert opened.read(0, 4) == bytes(4)


@pytest.mark.parametrize("name", ["json:{'driver': 'null-co'}", "nbd://localhost", "file:/etc/passwd", "fd:0"])
def test_a_data_file_is_a_plain_file(tmp_path: Path, name: str) -> None:
    path = image(tmp_path / "a", data_file=str(tmp_path / "data"))
    content = Path(path).read_bytes()
    at = content.index(struct.pack(">I", 0x44415441)) + 4
    old = struct.unpack_from(">I", content, at)[0]
    new = name.encode()[:old]
    assert len(new) <= old
    Path(path).write_bytes(
        content[:at]
        + struct.pack(">I", len(new))
        + new.ljust(-(-old // 8) * 8, b"\0")
        + content[at + 4 + -(-old // 8) * 8 :]
    )
    for policy in (Policy(), Policy(allow_references=True)):
        with pytest.raises(AccessDenied, match="only plain files"):
            byre.open(path, policy=policy)


@pytest.mark.parametrize("kind", ["fifo", "socket", "tty", "null", "zero", "proc", "folder"])
@pytest.mark.parametrize("role", ["backing", "data"])
def test_an_image_may_not_name_what_is_no_disk(tmp_path: Path, kind: str, role: str) -> None:
    target = tmp_path / "odd"
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    elif kind == "socket":
        listening = socket.socket(socket.AF_UNIX)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            listening.bind("odd")
        listening.close()
    else:
        target.symlink_to(
            {"tty": "/dev/tty", "null": "/dev/null", "zero": "/dev/zero", "proc": "/proc/self/status"}[kind]
        )
    if role == "backing":
        path = overlay(tmp_path / "top", "odd", "raw")
    else:
        path = image(tmp_path / "top", data_file=str(tmp_path / "dat"))
        content = Path(path).read_bytes()
        Path(path).write_bytes(content.replace(str(tmp_path / "dat").encode(), str(target).encode()))
    started = time.monotonic()
    with pytest.raises(ByreError):
        byre.open(path)
    with pytest.raises(ByreError):
        byre.open(path, read_only=False)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "format", ["file", "null-co", "memory", "host_device", "blkdebug", "blklog", "nonsense", "a\x1bb", "qcow2\0"]
)
def test_a_recorded_format_that_is_none(tmp_path: Path, format: str) -> None:
    raw(tmp_path / "base", b"base")
    top = overlay(tmp_path / "top", "base", "raw")
    content = Path(top).read_bytes()
    extension = struct.pack(">II", 0xE2792ACA, 3) + b"raw".ljust(8, b"\0")
    at = content.index(extension)
    # The extensions behind it give way: none of them is needed.
    name = format.encode()
    new = struct.pack(">II", 0xE2792ACA, len(name)) + name.ljust(-(-len(name) // 8) * 8, b"\0") + bytes(8)
    Path(top).write_bytes(content[:at] + new + content[at + len(new) :])
    if format == "file":  # as the peer has it: the bytes of the file
        with byre.open(top) as opened:
            assert opened.read(0, 4) == b"base"
        return
    with pytest.raises(ByreError) as caught:
        byre.open(top)
    assert "\x1b" not in str(caught.value)


def test_options_that_name_a_driver_mean_that_driver(tmp_path: Path) -> None:
    path = image(tmp_path / "a")
    with byre.open({"driver": "file", "filename": path}) as opened:
        assert opened.format == "file"
        assert opened.read(0, 4) == b"QFI\xfb"
    with pytest.raises(InvalidArgument, match="'null-co' is not an image format"):
        byre.open(path, format="null-co")


# -- failures -------------------------------------------------------------------------------------


def test_a_failed_opening_leaves_the_nodes_of_others_alone(tmp_path: Path) -> None:
    """Nodes that were there before keep no edge from what failed above them."""
    graph = Graph()
    path = image(tmp_path / "a")
    data = image(tmp_path / "data.qcow2", data_file=str(tmp_path / "gone"))
    (tmp_path / "gone").unlink()
    with byre.open(
        {"driver": "raw", "file": {"driver": "file", "filename": data, "node-name": "file0"}}, graph=graph
    ) as holder:
        before = dict(graph.nodes)
        node = graph.find("file0")
        for spec in (
            {"driver": "qcow2", "file": "file0"},
            {"driver": "qcow2", "file": "file0", "data-file": str(tmp_path / "gone")},
            {"driver": "qcow2", "file": path, "backing": {"driver": "qcow2", "file": "file0"}},
            {"driver": "raw", "file": "file0", "size": 1 << 40},
        ):
            with pytest.raises(ByreError):
                byre.open(spec, graph=graph)
            assert len(node.parents) == 1
            assert graph.nodes == before
        assert holder.read(0, 4) == b"QFI\xfb"
        with byre.open(data, format="raw", graph=graph) as again:
            assert again.read(0, 4) == b"QFI\xfb"


def test_broken_tables_fail_the_opening_and_close_everything(tmp_path: Path) -> None:
    path = Path(image(tmp_path / "a"))
    overlay(tmp_path / "top", "a")
    content = bytearray(path.read_bytes())
    content[36:40] = struct.pack(">I", 1 << 30)  # number of L1 entries
    path.write_bytes(content)
    for name in ("a", "top"):
        for read_only in (True, False):
            with pytest.raises(ByreError):
                byre.open(str(tmp_path / name), read_only=read_only)
    with pytest.raises(ByreError):
        byre.open(str(tmp_path / "nothing"))


def test_force_share_is_for_reading(tmp_path: Path) -> None:
    path = image(tmp_path / "a", b"a")
    with pytest.raises(InvalidArgument, match="read-only"):
        byre.open(path, read_only=False, force_share=True)
    with byre.open(path, read_only=False) as writer:
        with pytest.raises(Busy):
            byre.open(path)
        with byre.open(path, force_share=True) as reader:
            assert isinstance(reader, Image)
            assert isinstance(reader.node, Qcow2Node)
        writer.write(0, b"b")


def test_filters_are_opened_by_options(tmp_path: Path) -> None:
    path = image(tmp_path / "a", b"hello")
    spec = {"driver": "qcow2", "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": path}}}
    with byre.open(spec) as opened:
        assert opened.read(0, 5) == b"hello"
    with byre.open(f"blkdebug::{path}") as opened:
        assert opened.format == "qcow2"
        assert opened.read(0, 5) == b"hello"


def test_auto_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a"
    image(path, b"hello")
    if os.geteuid() == 0:
        pytest.skip("root may write everything")
    path.chmod(0o444)
    with pytest.raises(AccessDenied):
        byre.open(str(path), read_only=False)
    with byre.open({"driver": "qcow2", "file": {"filename": str(path)}, "auto-read-only": True}) as opened:
        assert opened.node.read_only


def test_an_encrypted_image_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    path = Path(image(tmp_path / "a"))
    content = bytearray(path.read_bytes())
    content[32:36] = struct.pack(">I", 1)
    path.write_bytes(content)
    with pytest.raises(ByreError, match="encrypted"):
        byre.open(str(path))
    with byre.open(str(path), no_io=True, backing=False) as opened:
        assert opened.size == 64 * KIB
