"""What is no disk image is raw: file systems, archives, partitioned disks, programs, texts, noise, pieces of images.

Every image of every format is found, and nothing that a guest writes turns a disk that was probed as raw into one.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backports import zstd

import byre
from byre.catalog import PROBE_SIZE, TAIL_SIZE, formats, probe
from byre.errors import AccessDenied, ByreError
from support.samples import SAMPLES, Sample

KIB, MIB = 1 << 10, 1 << 20
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def probed(path: Path) -> str:
    """The format that byre finds, without what comes after finding it."""
    from byre.graph.graph import Graph
    from byre.graph.opening import Opener, OpenFlags, Policy

    graph = Graph()
    opener = Opener(graph, Policy())
    node = opener.open({"driver": "file", "filename": str(path)}, OpenFlags(), protocol=True)
    try:
        return opener.probe(node).name
    finally:
        graph.release(node)


# -- what is no image -----------------------------------------------------------------------------


def _noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def _program(name: str) -> str:
    """Also where a plain user's PATH has no system programs."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    return found


FILE_SYSTEMS: dict[str, tuple[str, ...]] = {
    "ext2": ("mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024", "-L", "conectix"),
    "ext3": ("mke2fs", "-q", "-F", "-t", "ext3"),
    "ext4": ("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-L", "KDMV"),
    "fat12": ("mkfs.fat", "-F", "12", "-n", "QED"),
    "fat16": ("mkfs.fat", "-F", "16", "-n", "VHDXFILE"),
    "fat32": ("mkfs.fat", "-F", "32", "-n", "CONECTIX"),
    "swap": ("mkswap", "-q", "-L", "vhdxfile"),
}
SIZES = {"fat12": 4, "fat16": 32, "fat32": 300}


def _with_partitions(kind: str) -> bytes:
    """A master boot record, or a GUID partition table with its copy at the end."""
    disk = bytearray(2 * MIB)
    disk[440:444] = b"QFI\xfb"
    row = struct.pack("<B3sB3sII", 0x80, b"\x20\x21\0", 0xEE if kind == "gpt" else 0x83, b"\xff\xff\xff", 1, 4095)
    disk[446:462], disk[510:512] = row, b"\x55\xaa"
    if kind == "gpt":
        names = "conectix".encode("utf-16-le")
        table = struct.pack("<16s16sQQQ72s", b"t" * 16, b"u" * 16, 34, 4000, 0, names).ljust(128 * 128, b"\0")
        for own, other, at in ((1, 4095, 2), (4095, 1, 4095 - 32)):
            head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, own, other, 34, 4062, b"d" * 16,
                               at, 128, 128, zlib.crc32(table))  # fmt: skip
            disk[own * 512 : own * 512 + 92] = head
            disk[at * 512 : at * 512 + len(table)] = table
    return bytes(disk)


def _zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("disk.vmdk", "# Disk DescriptorFile\nversion=1\n")
        archive.comment = b"conectix"
    return data.getvalue()


def _tar(name: str, format: int = tarfile.PAX_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format) as archive:
        for member, content in ((name, b"# Disk DescriptorFile\nversion=1\n"), ("vm.ovf", b"<Envelope/>")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def _cpio() -> bytes:
    def member(name: bytes, content: bytes) -> bytes:
        fields = (1, 0o100644, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name + b"\0"
        return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)

    return (member(b"vm.ovf", b"vhdxfile") + member(b"TRAILER!!!", b"")).ljust(4096, b"\0")


ELF = Path(sys.executable).read_bytes()[: 256 * KIB]
PE = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64) + b"PE\0\0" + _noise(4000)
PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n" + _noise(3000) + b"\n%%EOF\n"
DESCRIPTOR = b'# Disk DescriptorFile\nversion=1\nCID=12345678\ncreateType="monolithicFlat"\n'
HTML = (
    b"<!DOCTYPE html><html><head><title>KDMV</title></head><body>http://schemas.dmtf.org/ovf/envelope/1</body></html>"
)

CORPUS: dict[str, Callable[[], bytes]] = {
    "nothing": bytes,
    "zeroes": lambda: bytes(MIB),
    "ones": lambda: b"\xff" * MIB,
    "noise": lambda: _noise(MIB),
    "mbr": lambda: _with_partitions("mbr"),
    "gpt": lambda: _with_partitions("gpt"),
    "boot sector that says so": lambda: (
        (b"\xeb\x3cVMware Virtual disk, vhdxfile, QED".ljust(510, b"\0") + b"\x55\xaa") + bytes(MIB)
    ),
    "tar": lambda: _tar("readme.txt"),
    "tar, old": lambda: _tar("readme.txt", tarfile.USTAR_FORMAT),
    "tar of a descriptor": lambda: _tar("disk.vmdk", tarfile.GNU_FORMAT),
    "tar with an appliance behind": lambda: _tar("vm.ovf.txt"),
    "zip": _zip,
    "gzip": lambda: gzip.compress(_noise(5000)),
    "bzip2": lambda: bz2.compress(_noise(5000)),
    "xz": lambda: lzma.compress(_noise(5000)),
    "lzma": lambda: lzma.compress(_noise(5000), lzma.FORMAT_ALONE),
    "zstd": lambda: zstd.compress(_noise(5000)),
    "cpio": _cpio,
    "ar": lambda: b"!<arch>\nvm.ovf/         0           0     0     100644  8         `\nvhdxfile",
    "squashfs": lambda: b"hsqs" + _noise(4000),
    "xfs": lambda: b"XFSB" + _noise(4000),
    "ntfs": lambda: b"\xeb\x52\x90NTFS    " + _noise(4000),
    "btrfs": lambda: bytes(65536 + 64) + b"_BHRfS_M" + _noise(4000),
    "program": lambda: ELF,
    "program of another system": lambda: PE,
    "script": lambda: b"#!/bin/sh\n#V1.0 Format\nmodprobe cloop file=$0 && mount -r /dev/cloop $1\n",
    "script that makes a cloop": lambda: b"#!/bin/sh\ncat <<.\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r\n.\n",
    "pdf": lambda: PDF,
    "text": lambda: b"version=1\nThis is about VMDK, KDMV, QFI, conectix, vhdxfile, LUKS and QED.\n" * 50,
    "text about descriptors": lambda: b"The first line is:\n" + DESCRIPTOR,
    "text with a heading": lambda: b"# Disks\n\nversion=2 of this text\n",
    "ini": lambda: b"[disk]\nversion=1\nCID=12345678\n",
    "python": lambda: b"#!/usr/bin/env python3\nversion=1\nprint('COWD')\n",
    "json": lambda: b'{"driver": "qcow2", "file": {"driver": "file", "filename": "x"}}\n',
    "html": lambda: HTML,
    "xml": lambda: b'<?xml version="1.0"?>\n<domain type="kvm"><Parallels_disk_image/></domain>\n',
    "plist": lambda: b'<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0"><dict/></plist>\n',
    "utf-16": lambda: DESCRIPTOR.decode().encode("utf-16"),
    "png": lambda: b"\x89PNG\r\n\x1a\n" + _noise(3000),
    "device tree": lambda: b"\xd0\x0d\xfe\xed" + _noise(3000),
    "android boot": lambda: b"ANDROID!" + _noise(3000),
    "qcow2 of version 4": lambda: b"QFI\xfb\0\0\0\4" + bytes(600),
    "luks of version 3": lambda: b"LUKS\xba\xbe\0\3" + bytes(600),
    "footer before the end": lambda: bytes(MIB) + b"conectix" + bytes(2000),
    "trailer before the end": lambda: bytes(MIB) + b"koly\0\0\0\4\0\0\2\0" + bytes(2000),
    "footer without its fields": lambda: bytes(MIB - 512) + b"conectix".ljust(512, b"\0"),
    "trailer without its fields": lambda: bytes(MIB - 512) + b"koly".ljust(512, b"\0"),
    "bytes of a footer at the very end": lambda: bytes(MIB) + b"conectix",
}


@pytest.mark.parametrize("name", CORPUS)
def test_no_image(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CORPUS[name]())
    assert probed(path) == "raw"


@pytest.mark.oracle
@pytest.mark.parametrize("name", FILE_SYSTEMS)
def test_file_systems(name: str, tmp_path: Path) -> None:
    program, *words = FILE_SYSTEMS[name]
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.truncate(SIZES.get(name, 2) * MIB)
    subprocess.run([_program(program), *words, path], check=True, capture_output=True)
    assert probed(path) == "raw"


@pytest.mark.oracle
def test_optical_discs(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "vm.ovf").write_bytes(DESCRIPTOR)
    path = tmp_path / "file"
    subprocess.run([_program("genisoimage"), "-quiet", "-J", "-R", "-V", "vhdxfile", "-o", path, folder], check=True)
    assert probed(path) == "raw"


PEER_MISTAKES = {"text", "qcow2 of version 4"}
"""A text that begins with a version is a descriptor for it; what follows the magic of qcow2 is not looked at."""


@pytest.mark.oracle
def test_the_peer_takes_them_for_raw_as_well(tmp_path: Path, qemu_img: Run) -> None:
    """So that the corpus does not hold what is an image after all."""
    path = tmp_path / "file"
    for name, make in CORPUS.items():
        content = make()
        if len(content) < 512:
            continue
        path.write_bytes(content)
        shown = qemu_img("info", "-U", path, check=False).stdout
        assert ("file format: raw" in shown) == (name not in PEER_MISTAKES), name


def test_anything_short(tmp_path: Path) -> None:
    """The first bytes of everything, up to 600: found or not, opened or refused, never worse."""
    path = tmp_path / "file"
    for index, data in enumerate([make()[:600] for make in CORPUS.values()]):
        for length in range(index % 7, len(data), 41):
            path.write_bytes(data[:length])
            assert probed(path) == "raw", (length, data[:16])


# -- images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the files of all samples hold."""
    result = {}
    for sample in SAMPLES:
        result[sample.name] = sample.make(tmp_path_factory.mktemp("sample")).read_bytes()
    return result


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_each_image_is_found(sample: Sample, images: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(images[sample.name])
    assert probed(path) == sample.format


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_an_image_inside_another_file_is_none(sample: Sample, images: dict[str, bytes], tmp_path: Path) -> None:
    path, data = tmp_path / "file", images[sample.name]
    for before in (b"\0", b"x", bytes(512), bytes(4096), b"#!/bin/sh\nexit\n", _noise(MIB)):
        if sample.text and not before.strip(b"\0"):
            continue
        path.write_bytes(before + data[:MIB] + b"behind it" * 100)
        assert probed(path) == "raw", before[:4]


def test_short_images_are_refused_in_a_sentence(images: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    for sample in SAMPLES:
        data = images[sample.name]
        for length in {*range(0, min(600, len(data)), 37), 511, 512, 513}:
            path.write_bytes(data[:length])
            said = ""
            try:
                byre.open(str(path), no_io=True).close()
            except ByreError as error:
                said = str(error)
            assert not said or said.isprintable()


# -- guests ---------------------------------------------------------------------------------------


def _headers(images: dict[str, bytes]) -> Iterator[tuple[str, int, bytes]]:
    """(format, where to write, bytes that make a disk one of it), from the catalog and from images."""
    size = MIB
    for row in formats():
        for start, signatures in ((0, row.signatures), (size - TAIL_SIZE, row.tails)):
            for signature in signatures:
                length = max(at + len(magic) for at, magic in signature)
                block = bytearray(_noise(length))
                for at, magic in signature:
                    block[at : at + len(magic)] = magic
                yield row.name, start, bytes(block)
    for sample in SAMPLES:
        yield sample.format, 0, images[sample.name][:PROBE_SIZE]
        if len(images[sample.name]) >= TAIL_SIZE:
            yield sample.format, size - TAIL_SIZE, images[sample.name][-TAIL_SIZE:]


def _becomes(start: int, block: bytes) -> str:
    """The format of a disk of zeroes in which ``block`` was written."""
    disk = bytearray(MIB)
    disk[start : start + len(block)] = block
    return probe(bytes(disk[:PROBE_SIZE]), bytes(disk[-TAIL_SIZE:])).name


def test_what_a_guest_writes_into_a_disk_that_was_probed(images: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    seen: set[str] = set()
    with byre.open(str(path), read_only=False) as image, byre.open(str(path), format="raw", force_share=True) as other:
        assert image.format == "raw"
        for name, start, block in _headers(images):
            if _becomes(start, block) == "raw":
                continue
            seen.add(name)
            with pytest.raises(AccessDenied, match="look like"):
                image.write(start, block)
            # Piece by piece: the piece that completes it is refused, whichever that is.
            half = len(block) // 2
            refused = 0
            for at, piece in ((half, block[half:]), (0, block[:half])):
                try:
                    image.write(start + at, piece)
                except AccessDenied:
                    refused += 1
            assert refused, name
            image.write_zeroes(start, max(len(block), TAIL_SIZE))
            assert not any(other.read(0, MIB))
    assert probed(path) == "raw"
    assert seen == {row.name for row in formats()} - {"raw"}
    # Said to be raw, it may hold whatever the guest writes.
    with byre.open(str(path), format="raw", read_only=False) as image:
        image.write(0, images["qcow2"][:PROBE_SIZE])
    assert probed(path) == "qcow2"
