"""Opening qcow2 images: features, extensions, bits, and what each allows."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, Corrupt, ImageError, InvalidArgument, NotFound, NotSupported
from byre.formats.qcow2.image import Qcow2Node
from byre.graph.creating import create
from conftest import Run

DIRTY, CORRUPT = 1, 2
INCOMPATIBLE, COMPATIBLE, AUTOCLEAR = 72, 80, 88


def make(folder: Path, size: int = 1 << 20, **options: object) -> Path:
    path = folder / "disk.qcow2"
    create(str(path), "qcow2", size, options=options)
    return path


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def bits(path: Path, at: int) -> int:
    return int(struct.unpack_from(">Q", path.read_bytes(), at)[0])


def extensions(path: Path) -> dict[int, bytes]:
    data = path.read_bytes()
    at = struct.unpack_from(">I", data, 100)[0]
    found = {}
    while True:
        kind, length = struct.unpack_from(">II", data, at)
        if kind == 0:
            return found
        found[kind] = data[at + 8 : at + 8 + length]
        at += 8 + -(-length // 8) * 8


def append_extension(path: Path, kind: int, content: bytes) -> None:
    data = path.read_bytes()
    at = struct.unpack_from(">I", data, 100)[0]
    while struct.unpack_from(">I", data, at)[0]:
        at += 8 + -(-struct.unpack_from(">I", data, at + 4)[0] // 8) * 8
    patch(path, at, struct.pack(">II", kind, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0") + bytes(8))


# -- features ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [True, False])
def test_an_unknown_incompatible_feature_is_refused_by_its_name(tmp_path: Path, read_only: bool) -> None:
    path = make(tmp_path)
    patch(path, INCOMPATIBLE, struct.pack(">Q", 1 << 40))
    with pytest.raises(NotSupported, match="40"):
        byre.open(str(path), read_only=read_only)
    names = extensions(path)[0x6803F857]
    at = path.read_bytes().index(names)
    patch(path, at, struct.pack(">BB46s", 0, 40, b"time travel"))
    with pytest.raises(NotSupported, match="time travel"):
        byre.open(str(path), read_only=read_only)


def test_an_unknown_compatible_feature_is_ignored_and_kept(tmp_path: Path) -> None:
    path = make(tmp_path)
    patch(path, COMPATIBLE, struct.pack(">Q", 1 << 40))
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"x")
        image.resize(2 << 20)
    assert bits(path, COMPATIBLE) == 1 << 40


def test_autoclear_bits_go_with_the_first_write_and_not_before(tmp_path: Path) -> None:
    path = make(tmp_path)
    patch(path, AUTOCLEAR, struct.pack(">Q", 1 << 40 | 1))
    with byre.open(str(path)) as image:
        image.read(0, 512)
    with byre.open(str(path), read_only=False) as image:
        image.read(0, 512)
        image.flush()
    assert bits(path, AUTOCLEAR) == 1 << 40 | 1
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"x")
        assert bits(path, AUTOCLEAR) == 0


@pytest.mark.parametrize("request_name", ["zeroes", "discard", "compressed"])
def test_every_change_drops_autoclear_bits(tmp_path: Path, request_name: str) -> None:
    path = make(tmp_path)
    patch(path, AUTOCLEAR, struct.pack(">Q", 1 << 40))
    with byre.open(str(path), read_only=False) as image:
        if request_name == "zeroes":
            image.write_zeroes(0, 65536)
        elif request_name == "discard":
            image.discard(0, 65536)
        else:
            image.write_compressed(0, bytes(65536))
    assert bits(path, AUTOCLEAR) == 0


def test_a_raw_data_file_stays_one(tmp_path: Path) -> None:
    path = make(tmp_path, data_file=str(tmp_path / "data"), data_file_raw=True)
    patch(path, AUTOCLEAR, struct.pack(">Q", 1 << 40 | 2))
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"x")
    assert bits(path, AUTOCLEAR) == 2


def test_what_is_not_understood_is_kept_to_the_byte(tmp_path: Path) -> None:
    path = make(tmp_path, cluster_size=4096)
    append_extension(path, 0x12345678, b"an extension of the future")
    before = extensions(path)
    with byre.open(str(path), read_only=False) as image:
        assert isinstance(image.node, Qcow2Node)
        assert 0x12345678 in [extension.type for extension in image.node.extensions]
        image.write(0, b"x" * (1 << 20))
        image.resize(1 << 30)
        image.write((1 << 30) - 1, b"y")
    assert extensions(path) == before


def test_a_longer_header_is_kept(tmp_path: Path) -> None:
    path = make(tmp_path, cluster_size=4096)
    data = path.read_bytes()
    old = struct.unpack_from(">I", data, 100)[0]
    end = 1024
    moved = data[old:end]
    patch(path, 100, struct.pack(">I", old + 16))
    patch(path, old, b"future field 16!" + moved)
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"x")
        image.resize(1 << 30)
    assert path.read_bytes()[old : old + 16] == b"future field 16!"


# -- corrupt and dirty --------------------------------------------------------------------------------


def test_a_corrupt_image_is_read_and_not_written(tmp_path: Path) -> None:
    path = make(tmp_path)
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"data")
    patch(path, INCOMPATIBLE, struct.pack(">Q", CORRUPT))
    content = path.read_bytes()
    with byre.open(str(path)) as image:
        assert image.read(0, 4) == b"data"
        with pytest.raises(Corrupt, match="marked corrupt"):
            image.reopen(read_only=False)
        assert image.read_only
        assert image.read(0, 4) == b"data"
    with pytest.raises(Corrupt, match=r"marked corrupt.*byre check"):
        byre.open(str(path), read_only=False)
    assert path.read_bytes() == content


@pytest.mark.oracle
@pytest.mark.parametrize("how", ["open", "reopen"])
def test_a_dirty_image_is_mended_before_it_is_written(
    tmp_path: Path, qemu_img: Run, qemu_io_path: str, how: str
) -> None:
    """The peer, killed with lazy counts: reference counts are behind, data and tables are right."""
    import subprocess

    path = make(tmp_path, lazy_refcounts=True)
    command = [qemu_io_path, "-c", "write -P 7 0 256k", "-c", "flush", "-c", "abort", str(path)]
    subprocess.run(command, capture_output=True, check=False, cwd=tmp_path, preexec_fn=_no_core)
    assert bits(path, INCOMPATIBLE) & DIRTY
    content = path.read_bytes()
    with byre.open(str(path)) as image:
        assert image.read(0, 1 << 18) == b"\7" * (1 << 18)
    assert path.read_bytes() == content  # reading changes nothing
    if how == "open":
        image = byre.open(str(path), read_only=False)
    else:
        image = byre.open(str(path))
        image.reopen(read_only=False)
    with image:
        assert not bits(path, INCOMPATIBLE) & DIRTY
        image.write(1 << 18, b"\x08" * (1 << 18))
    qemu_img("check", path)
    with byre.open(str(path)) as image:
        assert image.read(0, 1 << 19) == b"\7" * (1 << 18) + b"\x08" * (1 << 18)


def _no_core() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# -- limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (4, struct.pack(">I", 4)),
        (20, struct.pack(">I", 8)),
        (20, struct.pack(">I", 22)),
        (20, struct.pack(">I", 1 << 31)),
        (24, struct.pack(">Q", 1 << 63)),
        (36, struct.pack(">I", 1 << 31)),
        (36, struct.pack(">I", 0)),
        (40, struct.pack(">Q", 1)),
        (40, struct.pack(">Q", 1 << 62)),
        (48, struct.pack(">Q", 7)),
        (56, struct.pack(">I", 1 << 31)),
        (60, struct.pack(">I", 65537)),
        (96, struct.pack(">I", 7)),
        (100, struct.pack(">I", 64)),
        (100, struct.pack(">I", 1 << 20)),
        (8, struct.pack(">QI", 104, 1024)),
        (8, struct.pack(">QI", 1 << 40, 5)),
        (32, struct.pack(">I", 3)),
        (104, struct.pack(">I", 0xFF << 24)),
    ],
)
def test_a_header_field_out_of_its_limits(tmp_path: Path, offset: int, data: bytes) -> None:
    path = make(tmp_path)
    patch(path, offset, data)
    for read_only in (True, False):
        with pytest.raises((ImageError, NotSupported)) as caught:
            byre.open(str(path), format="qcow2", read_only=read_only)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 4, 8, 71, 72, 103, 104, 511])
def test_a_file_that_is_cut_short(tmp_path: Path, length: int) -> None:
    path = make(tmp_path)
    os.truncate(path, length)
    with pytest.raises(ByreError), byre.open(str(path), format="qcow2") as image:
        image.read(0, 1)


def test_tables_past_the_end_of_the_file(tmp_path: Path) -> None:
    """A table must exist where the header says it is: nothing is allocated on the word of an image."""
    path = make(tmp_path)
    patch(path, 40, struct.pack(">Q", 1 << 50))
    with pytest.raises(ByreError), byre.open(str(path)) as image:
        image.read(0, 512)
    path = make(tmp_path)
    patch(path, 48, struct.pack(">Q", 1 << 50))
    with pytest.raises(ByreError), byre.open(str(path), read_only=False) as image:
        image.write(0, b"x")
        image.flush()


# -- data files ---------------------------------------------------------------------------------------


def test_a_data_file_given_by_the_user(tmp_path: Path) -> None:
    path = make(tmp_path, data_file=str(tmp_path / "data"))
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"here")
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(NotFound):
        byre.open(str(path))
    with byre.open(str(path), no_io=True) as image:
        assert image.size == 1 << 20
    data = {"driver": "file", "filename": str(tmp_path / "moved")}
    with byre.open({"driver": "qcow2", "file": str(path), "data-file": data}) as image:
        assert image.read(0, 4) == b"here"
    with byre.open({"driver": "qcow2", "file": str(path), "data-file.filename": data["filename"]}) as image:
        assert image.read(0, 4) == b"here"
    plain = tmp_path / "plain"
    create(str(plain), "qcow2", 1 << 20)
    with pytest.raises(InvalidArgument, match="the image has none"):
        byre.open({"driver": "qcow2", "file": str(plain), "data-file": data})


def test_a_relative_data_file_lies_beside_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create("disk.qcow2", "qcow2", 1 << 20, options={"data_file": "data"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with byre.open("../disk.qcow2", read_only=False) as image:
        image.write(0, b"x")
    assert (tmp_path / "data").read_bytes()[:1] == b"x"


# -- what info says -------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"compression_type": "zstd", "lazy_refcounts": True},
        {"refcount_bits": 1},
        {"extended_l2": True},
        {"data_file": "data", "data_file_raw": True},
    ],
)
def test_format_info_is_the_peer_s(tmp_path: Path, qemu_img: Run, options: dict[str, object]) -> None:
    import json

    if "data_file" in options:
        options = {**options, "data_file": str(tmp_path / "data")}
    path = make(tmp_path, **options)
    peer = json.loads(qemu_img("info", "--output=json", path).stdout)["format-specific"]["data"]
    with byre.open(str(path)) as image:
        assert isinstance(image.node, Qcow2Node)
        own = image.node.format_info()
    assert {key: own[key] for key in peer} == peer


@pytest.mark.oracle
def test_snapshots_are_listed(tmp_path: Path, qemu_img: Run) -> None:
    path = make(tmp_path)
    for name in ("one", "zwei ü"):
        qemu_img("snapshot", "-c", name, path)
    with byre.open(str(path)) as image:
        assert isinstance(image.node, Qcow2Node)
        assert [snapshot.name for snapshot in image.node.snapshots] == ["one", "zwei ü"]
