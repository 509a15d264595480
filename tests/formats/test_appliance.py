"""ovf and ova: appliances, made here with disks of several formats."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import byre
from byre.catalog import probe
from byre.cli.main import main
from byre.errors import AccessDenied, ByreError, ImageError, NotFound, NotSupported
from byre.formats import appliance
from byre.formats.appliance import Disk
from byre.graph.node import Node
from byre.graph.opening import Policy
from contracts.node import ReadOnlyFormatContract, patchwork

ENVELOPE = """<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
 <References>{files}</References>
 <DiskSection><Info>Disks</Info>{disks}</DiskSection>
 <VirtualSystem ovf:id="vm"><Info>x</Info></VirtualSystem>
</Envelope>"""
FORMATS = {
    "vmdk": "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized",
    "raw": "http://example.org/raw",
    "qcow2": "http://www.gnome.org/~markmc/qcow-image-format.html#qcow2",
    "": "http://example.org/other",
}


def descriptor(*disks: tuple[str, str, str], more: str = "") -> bytes:
    """:param disks: (id, file, format)"""
    files = "".join(f'<File ovf:id="f-{id}" ovf:href="{file}" {more}/>' for id, file, _ in disks if file)
    rows = ""
    for id, file, kind in disks:
        reference = f'ovf:fileRef="f-{id}"' if file else ""
        rows += f'<Disk ovf:diskId="{id}" {reference} ovf:format="{FORMATS[kind]}" '
        rows += 'ovf:capacity="16" ovf:capacityAllocationUnits="byte * 2^20"/>'
    return ENVELOPE.format(files=files, disks=rows).encode()


def pack(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def image_of(folder: Path, content: bytes, kind: str) -> bytes:
    raw, made = folder / "source", folder / f"made.{kind}"
    raw.write_bytes(content)
    assert main(["convert", "-q", "-f", "raw", "-O", kind, str(raw), str(made)]) == 0
    return made.read_bytes()


class TestContract(ReadOnlyFormatContract):
    content = patchwork(1 << 20)

    @pytest.fixture(params=["raw", "qcow2"])
    def node(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
        disk = image_of(tmp_path, self.content, request.param)
        path = pack(tmp_path / "vm.ova", ("vm.ovf", descriptor(("d", "disk.img", request.param))), ("disk.img", disk))
        with byre.open(str(path)) as image:
            assert image.format == "ova"
            yield image.node


@pytest.mark.parametrize("subformat", ["streamOptimized", "monolithicSparse"])
def test_a_vmdk_inside(tmp_path: Path, subformat: str) -> None:
    content = patchwork(1 << 20)
    (tmp_path / "x.raw").write_bytes(content)
    made = tmp_path / "x.vmdk"
    assert main(["convert", "-O", "vmdk", "-o", f"subformat={subformat}", str(tmp_path / "x.raw"), str(made)]) == 0
    path = pack(tmp_path / "vm.ova", ("vm.ovf", descriptor(("d", "x.vmdk", "vmdk"))), ("x.vmdk", made.read_bytes()))
    with byre.open(str(path)) as image:
        assert image.read(0, image.size) == content


def test_disks_by_id_and_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (("none", "", "vmdk"), ("sys", "sys.img", "raw"), ("data", "data.img", ""))
    first, second = patchwork(1 << 16, 1), patchwork(1 << 17, 2)
    path = pack(tmp_path / "vm.ova", ("vm.ovf", descriptor(*rows)), ("vm.mf", b"SHA256(x)= 0"), ("sys.img", first),
                ("data.img", image_of(tmp_path, second, "qcow2")))  # fmt: skip
    for name, content in (("sys", first), ("sys.img", first), ("data", second), ("data.img", second)):
        with byre.open({"driver": "ova", "file": {"driver": "file", "filename": str(path)}, "disk": name}) as image:
            assert image.read(0, image.size) == content
    assert main(["info", "--output=json", str(path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["virtual-size"] == 1 << 16
    assert result["format-specific"]["data"]["disk"] == "sys"
    assert result["format-specific"]["data"]["disks"][2] == {
        "id": "data", "file": "data.img", "capacity": 16 << 20, "format": "unknown",
    }  # fmt: skip
    for name, error in (("none", NotSupported), ("nosuch", NotFound)):
        with pytest.raises(error):
            byre.open({"driver": "ova", "file": {"driver": "file", "filename": str(path)}, "disk": name})


def test_a_descriptor_with_disks_beside_it(tmp_path: Path) -> None:
    content = patchwork(1 << 16)
    (tmp_path / "disk.img").write_bytes(content)
    path = tmp_path / "vm.ovf"
    path.write_bytes(descriptor(("d", "disk.img", "raw")))
    with byre.open(str(path)) as image:
        assert image.format == "ovf"
        assert image.read(0, image.size) == content
    with pytest.raises(AccessDenied, match="untrusted"):
        byre.open(str(path), policy=Policy.untrusted())
    path.write_bytes(descriptor(("d", "nbd:localhost:1", "raw")))
    with pytest.raises(AccessDenied, match="only plain files"):
        byre.open(str(path))


def test_an_archive_is_read_untrusted(tmp_path: Path) -> None:
    path = pack(tmp_path / "vm.ova", ("vm.ovf", descriptor(("d", "x", "raw"))), ("x", b"y" * 512))
    with byre.open(str(path), policy=Policy.untrusted()) as image:
        assert image.read(0, 512) == b"y" * 512


def test_probing(tmp_path: Path) -> None:
    other = pack(tmp_path / "x.tar", ("readme.txt", b"vm.ovf\0"), ("vm.ovf", b"x"))
    assert probe(other.read_bytes()[:2048]).name == "raw"
    assert probe(pack(tmp_path / "y.tar", ("vm.ovf", b"x")).read_bytes()[:2048]).name == "ova"
    assert probe(descriptor()).name == "ovf"
    assert probe(b"<html>see http://schemas.dmtf.org/ovf/envelope/1").name == "raw"
    assert probe(b"see http://schemas.dmtf.org/ovf/envelope/1").name == "raw"


def test_units_of_capacity() -> None:
    for units, factor in (("byte * 2^30", 1 << 30), ("GigaBytes", 1 << 30), ("MegaBytes", 1 << 20), ("", 1)):
        data = descriptor(("d", "f", "raw")).replace(b"byte * 2^20", units.encode())
        assert appliance.decode_descriptor(data) == (Disk("d", "f", 16 * factor, "raw"),)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no XML"),
        (b"<Envelope>", "no XML"),
        (b"<other/>", "rather than an envelope"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><Envelope>&a;</Envelope>', "document type"),
        (b"<a>" * 100 + b"</a>" * 100, "deep"),
        (b"<a>" + b" " * (5 << 20) + b"</a>", "allowed are"),
        (descriptor(("d", "f", "raw"), more='ovf:chunkSize="1000"'), "chunks"),
        (descriptor(("d", "f", "raw"), more='ovf:compression="gzip"'), "compressed"),
        (descriptor(("d", "f", "raw")).replace(b'id="f-d"', b'id="other"'), "not listed"),
    ],
)
def test_descriptors_that_lie(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        appliance.decode_descriptor(data)


def test_damaged_archives(tmp_path: Path) -> None:
    path = pack(tmp_path / "vm.ova", ("vm.ovf", descriptor(("d", "x", "raw"))), ("x", b"y" * 4096))
    good = path.read_bytes()
    for cut in range(0, len(good), 509):
        path.write_bytes(good[:cut])
        try:
            with byre.open(str(path), format="ova") as image:
                image.read(0, image.size)
        except ByreError:
            pass
    path.write_bytes(good[: good.rindex(b"y" * 100)])
    with pytest.raises(ImageError, match=r"past the end|damaged"):
        byre.open(str(path))
    missing = pack(tmp_path / "z.ova", ("vm.ovf", descriptor(("d", "x", "raw"))))
    with pytest.raises(NotFound, match="no member 'x'"):
        byre.open(str(missing))
    with pytest.raises(NotSupported, match="only be read"):
        byre.open(str(missing), read_only=False)


def test_an_appliance_that_is_its_own_disk(tmp_path: Path) -> None:
    path = tmp_path / "vm.ovf"
    path.write_bytes(descriptor(("d", "vm.ovf", "")))
    with pytest.raises(NotSupported, match="appliance itself"):
        byre.open(str(path))
    body = b"x" * 512
    for _ in range(300):
        archive = pack(tmp_path / "vm.ova", ("vm.ovf", descriptor(("d", "x", ""))), ("x", body))
        body = archive.read_bytes().rstrip(b"\0") + bytes(512)
    with pytest.raises(NotSupported, match="appliance itself"):
        byre.open(str(archive))


def test_info_of_a_descriptor_opens_no_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vm.ovf"
    path.write_bytes(descriptor(("d", "missing", "qcow2")))
    assert main(["info", "--untrusted", "--output=json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["virtual-size"] == 16 << 20
    path.write_bytes(descriptor(("d", "missing", "qcow2")).replace(b'"16"', b'"99999999999999999999"'))
    assert main(["info", str(path)]) == 0
