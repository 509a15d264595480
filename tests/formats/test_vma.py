"""vma: backup archives of Proxmox, forged here; an independent reader agrees."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import byre
from byre.catalog import probe
from byre.errors import ByreError, ImageError, NotFound, NotSupported
from byre.formats import vma
from byre.formats.vma import CLUSTER, Device, ExtentHeader, Header
from byre.graph.node import Node
from byre.io.extent import DATA, ZERO
from byre.protocols.memory import MemoryNode
from contracts.node import ReadOnlyFormatContract, patchwork
from support.images import open_image

UUID = bytes(range(16))


def forge(disks: dict[str, bytes], *, per_extent: int = 59, configs: tuple[tuple[str, bytes], ...] = ()) -> bytes:
    """An archive of ``disks``, whose clusters are mixed as those of disks that are saved at the same time."""
    devices = tuple(Device(index + 1, name, len(content)) for index, (name, content) in enumerate(disks.items()))
    todo: list[tuple[int, int, bytes]] = []
    for device, content in zip(devices, disks.values(), strict=True):
        for at in range(0, len(content), CLUSTER):
            todo.append((device.id, at // CLUSTER, content[at : at + CLUSTER].ljust(CLUSTER, b"\0")))
    chooser = random.Random(4)
    todo.sort(key=lambda row: row[1] + chooser.random() * 5)
    data = vma.encode_header(Header(UUID, 1700000000, 0, devices, configs))
    for at in range(0, len(todo), per_extent):
        rows, body = [], b""
        for device, number, content in todo[at : at + per_extent]:
            blocks = [content[start : start + 4096] for start in range(0, CLUSTER, 4096)]
            rows.append((device, number, sum(1 << index for index, block in enumerate(blocks) if any(block))))
            body += b"".join(block for block in blocks if any(block))
        data += vma.encode_extent_header(ExtentHeader(UUID, tuple(rows))) + body
    return data


class TestContract(ReadOnlyFormatContract):
    content = patchwork(3 << 20)[: (3 << 20) - 70_000]

    @pytest.fixture(params=[59, 1, 7])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        other = patchwork(1 << 20, seed=6)
        data = forge({"drive-scsi0": self.content, "vmstate": other}, per_extent=request.param)
        with open_image(MemoryNode(data), "vma", read_only=True) as image:
            yield image.node


def test_each_disk_by_its_name(tmp_path: Path) -> None:
    disks = {"vmstate": patchwork(100_000, 1), "drive-a": patchwork(1 << 20, 2), "drive-b": patchwork(1 << 19, 3)}
    path = tmp_path / "x.vma"
    path.write_bytes(forge(disks, configs=(("qemu-server.conf", b"cores: 2\n"),)))
    for name, content in disks.items():
        with byre.open({"driver": "vma", "file": {"driver": "file", "filename": str(path)}, "device": name}) as image:
            assert image.read(0, image.size) == content
    with byre.open(str(path)) as image:
        info = image.node.format_info()  # type: ignore[attr-defined]
        assert info["device"] == "drive-a"
        assert [row["name"] for row in info["devices"]] == list(disks)
        assert info["configurations"] == ["qemu-server.conf"]
    with pytest.raises(NotFound, match="drive-a, drive-b"):
        byre.open({"driver": "vma", "file": {"driver": "file", "filename": str(path)}, "device": "nosuch"})


def test_an_independent_reader_agrees(tmp_path: Path) -> None:
    from dissect.archive.vma import VMA

    disks = {"drive-a": patchwork(1 << 20, 2), "drive-b": patchwork(1 << 19, 3)}
    path = tmp_path / "x.vma"
    path.write_bytes(forge(disks, configs=(("qemu-server.conf", b"cores: 2\n"),)))
    with open(path, "rb") as file:
        archive = VMA(file)
        assert archive.config("qemu-server.conf") == b"cores: 2\n"
        for device, content in zip(archive.devices(), disks.values(), strict=True):
            assert device.open().read(len(content)) == content


def test_map_shows_blocks() -> None:
    content = bytes(4096) + b"x" * 8192 + bytes(CLUSTER)
    with open_image(MemoryNode(forge({"d": content})), "vma", read_only=True) as image:
        rows = [(row.offset, row.length, row.kind) for row in image.node.extents(0, image.size)]
        assert rows == [(0, 4096, ZERO), (4096, 8192, DATA), (12288, CLUSTER, ZERO)]


def test_codecs_keep_what_they_are_given() -> None:
    header = Header(UUID, 5, 0, (Device(1, "a", 5), Device(255, "b", 6)), (("c", b"d"),))
    decoded = vma.decode_header(vma.encode_header(header))
    assert decoded == header._replace(size=decoded.size)
    extent = ExtentHeader(UUID, ((1, 2, 0xF0F0), (3, 4, 1)))
    assert vma.decode_extent_header(vma.encode_extent_header(extent)) == extent
    assert probe(vma.encode_header(header)).name == "vma"


def spoil(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:5000], "past the end|takes 12288"),
        (spoil(0, b"VMB\0"), "not a vma"),
        (spoil(4, b"\0\0\0\2"), "version 2"),
        (spoil(40, b"x"), "checksum of the header"),
        (spoil(56, b"\x7f\0\0\0"), "allowed are"),
        (spoil(52, b"\x7f\0\0\0"), "hold names"),
    ],
)
def test_headers_that_lie(change: Callable[[bytes], bytes], said: str) -> None:
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(change(forge({"d": b"x" * 512}))), "vma", read_only=True)


@pytest.mark.parametrize("where", [0, 6, 30, 100])
def test_damaged_extents_are_refused_when_the_disk_is_read(where: int) -> None:
    data = forge({"d": patchwork(1 << 20)})
    at = data.index(b"VMAE")
    bad = bytearray(data)
    bad[at + where] ^= 1
    with (
        open_image(MemoryNode(bytes(bad)), "vma", read_only=True) as image,
        pytest.raises(ImageError, match="extent at"),
    ):
        image.read(0, image.size)


def test_an_archive_that_ends_early() -> None:
    data = forge({"d": patchwork(1 << 20)})
    with (
        open_image(MemoryNode(data[:-100]), "vma", read_only=True) as image,
        pytest.raises(ByreError, match="past the end"),
    ):
        image.read(0, image.size)


def test_it_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.vma"
    path.write_bytes(forge({"d": b"x" * 512}))
    with pytest.raises(NotSupported, match="only be read"):
        byre.open(str(path), read_only=False)
