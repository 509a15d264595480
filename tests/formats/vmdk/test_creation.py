"""Creating disks: which files come of it, what is refused, what is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.errors import ByreError, InvalidArgument, NotSupported
from byre.formats.vmdk.descriptor import Descriptor, decode_descriptor
from byre.graph.creating import companions, create
from support import vmdk

MIB = 1 << 20
GIB = 1 << 30


def descriptor_of(path: Path) -> Descriptor:
    data = path.read_bytes()
    return decode_descriptor(data[512 : 512 + 20 * 512] if data.startswith(b"KDMV") else data)


FILES = {
    "monolithicSparse": ["disk.vmdk"],
    "streamOptimized": ["disk.vmdk"],
    "monolithicFlat": ["disk-flat.vmdk", "disk.vmdk"],
    "twoGbMaxExtentSparse": ["disk-s001.vmdk", "disk-s002.vmdk", "disk.vmdk"],
    "twoGbMaxExtentFlat": ["disk-f001.vmdk", "disk-f002.vmdk", "disk.vmdk"],
}


@pytest.mark.parametrize("subformat", FILES)
def test_files(tmp_path: Path, subformat: str) -> None:
    path = tmp_path / "disk.vmdk"
    create(str(path), "vmdk", 3 * GIB, options={"subformat": subformat})
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES[subformat]
    found = descriptor_of(path)
    assert (found.create_type, found.parent_cid) == (subformat, 0xFFFFFFFF)
    assert sum(extent.sectors for extent in found.extents()) == 3 * GIB // 512
    with byre.open(path, read_only=False) as image:
        assert image.size == 3 * GIB
        assert image.format == "vmdk"
        image.write(2 * GIB, b"a" * 65536)
        assert image.read(2 * GIB - 10, 20) == bytes(10) + b"a" * 10
    assert companions("vmdk", str(path), {"subformat": subformat, "size": 3 * GIB}) == FILES[subformat][:-1]


def test_names_without_and_with_several_dots(tmp_path: Path) -> None:
    for name, flat in (("disk", "disk-flat"), ("a.b.img", "a.b-flat.img")):
        create(str(tmp_path / name), "vmdk", MIB, options={"subformat": "monolithicFlat"})
        assert (tmp_path / flat).stat().st_size == MIB
        assert descriptor_of(tmp_path / name).extents()[0].name == flat


def database(path: Path) -> dict[str, str]:
    text = path.read_bytes()[512:10752].rstrip(b"\0").decode()
    lines = [line.partition(" = ") for line in text.splitlines() if line.startswith("ddb.")]
    return {key[4:]: value.strip('"') for key, _, value in lines}


def test_what_the_machine_is_to_see(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    create(str(path), "vmdk", GIB)
    assert database(path) == {"adapterType": "ide", "geometry.cylinders": "2080", "geometry.heads": "16",
                              "geometry.sectors": "63", "toolsVersion": "2147483647",
                              "virtualHWVersion": "4"}  # fmt: skip
    create(str(path), "vmdk", GIB, options={"adapter_type": "lsilogic", "compat6": True, "toolsversion": "9"})
    found = database(path)
    assert (found["adapterType"], found["geometry.heads"], found["geometry.cylinders"]) == ("lsilogic", "255", "130")
    assert (found["virtualHWVersion"], found["toolsVersion"]) == ("6", "9")
    create(str(path), "vmdk", GIB, options={"hwversion": "13"})
    assert database(path)["virtualHWVersion"] == "13"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subformat": "cubic"}, "subformat"),
        ({"adapter_type": "nvme"}, "adapter_type"),
        ({"compat6": True, "hwversion": "5"}, "compat6"),
        ({"subformat": "monolithicFlat", "zeroed_grain": True}, "zeroed grain"),
        ({"subformat": "monolithicFlat", "backing_file": "base.vmdk", "backing_fmt": "vmdk"}, "backing"),
        ({"backing_file": "base.vmdk", "backing_fmt": "raw"}, "must be a vmdk image"),
        ({"toolsversion": 'a"b'}, "cannot hold"),
        ({"preallocation": "full"}, "flat"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    create(str(tmp_path / "base.vmdk"), "vmdk", MIB)
    with pytest.raises(ByreError, match=words):
        create(str(tmp_path / "disk.vmdk"), "vmdk", MIB, options=options)
    assert [p.name for p in tmp_path.iterdir()] == ["base.vmdk"]


def test_a_parent_must_be_vmdk(tmp_path: Path) -> None:
    create(str(tmp_path / "base"), "qcow2", MIB)
    with pytest.raises(InvalidArgument, match="Must be vmdk"):
        create(str(tmp_path / "disk.vmdk"), "vmdk", MIB, options={"backing_file": "base"}, check_backing=False)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse", "streamOptimized"])
def test_overlays_know_their_parent(tmp_path: Path, subformat: str) -> None:
    create(str(tmp_path / "base.vmdk"), "vmdk", 3 * MIB)
    with byre.open(tmp_path / "base.vmdk", read_only=False) as image:
        image.write(0, b"base" * 32768)
    path = tmp_path / "disk.vmdk"
    create(str(path), "vmdk", options={"subformat": subformat, "backing_file": "base.vmdk", "backing_fmt": "vmdk"})
    assert descriptor_of(path).parent_cid == descriptor_of(tmp_path / "base.vmdk").cid
    with byre.open(path, read_only=False) as image:
        assert image.size == 3 * MIB
        image.write(65536, b"over" * 16384)
        assert image.read(65532, 8) == b"baseover"
    with byre.open(path) as image:
        assert image.read(65532, 8) == b"baseover"


def test_sizes(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    create(str(path), "vmdk", 64 << 40)
    with byre.open(path, read_only=False) as image:
        assert image.size == 64 << 40
        image.write((64 << 40) - 512, b"end")
        assert image.read((64 << 40) - 512, 3) == b"end"
    path.unlink()
    with pytest.raises(InvalidArgument, match="too large"):
        create(str(path), "vmdk", 1 << 60)
    with pytest.raises(InvalidArgument, match="4096 extents"):
        create(str(path), "vmdk", 16 << 40, options={"subformat": "twoGbMaxExtentSparse"})
    create(str(path), "vmdk", 0)
    with byre.open(path) as image:
        assert image.size == 0


def test_preallocation_of_flat_disks(tmp_path: Path) -> None:
    create(str(tmp_path / "disk.vmdk"), "vmdk", MIB, options={"subformat": "monolithicFlat", "preallocation": "full"})
    assert (tmp_path / "disk-flat.vmdk").stat().st_blocks * 512 >= MIB


def test_a_failed_creation_removes_its_extents(tmp_path: Path) -> None:
    (tmp_path / "disk-s002.vmdk").mkdir()
    with pytest.raises(ByreError):
        create(str(tmp_path / "disk.vmdk"), "vmdk", 3 * GIB, options={"subformat": "twoGbMaxExtentSparse"})
    assert [p.name for p in tmp_path.iterdir()] == ["disk-s002.vmdk"]


def test_names_a_descriptor_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot hold"):
        create(str(tmp_path / 'a"b.vmdk'), "vmdk", MIB)
    with pytest.raises(ByreError):
        create(str(tmp_path / "disk.vmdk"), "vmdk", MIB, options={"backing_file": 'a"b', "backing_fmt": "vmdk"})
    assert not list(tmp_path.iterdir())


def test_the_layout_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    for options in ({}, {"zeroed_grain": True}, {"subformat": "streamOptimized"}):
        create(str(path), "vmdk", 100 * MIB, options=options)
        assert vmdk.look_through(path.read_bytes()) == ([], [])


def test_only_streams_go_to_a_pipe() -> None:
    from byre.formats import vmdk as driver

    for options in ({}, {"subformat": "monolithicFlat"}):
        values = driver.CREATE_OPTIONS.parse({"size": MIB, **options}, what="vmdk")
        with pytest.raises(InvalidArgument, match="streamOptimized"):
            driver.open_stream(lambda data: None, values, "-")
    values = driver.CREATE_OPTIONS.parse(
        {"size": MIB, "subformat": "streamOptimized", "backing_file": "x"}, what="vmdk"
    )
    with pytest.raises(NotSupported, match="backing"):
        driver.open_stream(lambda data: None, values, "-")


def run_byre(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "byre", *words], cwd=folder, capture_output=True, text=True, timeout=60
    )


FLAT = ("-O", "vmdk", "-o", "subformat=monolithicFlat")


def test_a_failed_conversion_removes_its_extents(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "raw").write_bytes(b"x" * MIB)
    source = "json:{'driver':'raw','file':{'driver':'blkdebug','image':{'driver':'file','filename':'raw'}," \
             "'inject-error':[{'event':'read_aio','errno':5}]}}"  # fmt: skip
    for options in (FLAT, ("-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse")):
        done = run_byre(tmp_path, "convert", *options, source, "below/disk.vmdk")
        assert done.returncode == 1
        assert not list((tmp_path / "below").iterdir()), done.stderr


def test_an_untrusted_conversion_writes_the_extents_it_made(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * MIB)
    done = run_byre(tmp_path, "convert", "--untrusted", "-f", "raw", *FLAT, "raw", "disk.vmdk")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "disk-flat.vmdk").read_bytes() == b"x" * MIB
    done = run_byre(tmp_path, "convert", "--untrusted", "-O", "raw", "disk.vmdk", "back")
    assert done.returncode == 1
    assert "not opened for an untrusted image" in done.stderr
