"""Bundles of Parallels images: chains, split disks, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import byre
from byre.catalog import probe
from byre.cli.main import main
from byre.errors import AccessDenied, ByreError, ImageError, NotSupported
from byre.formats.parallels.descriptor import TOP, decode_descriptor
from byre.graph.node import Node
from byre.graph.opening import Policy
from contracts.node import ReadOnlyFormatContract, patchwork

MIB = 1 << 20
ROOT = "{00000000-0000-0000-0000-000000000001}"
NOBODY = "{00000000-0000-0000-0000-000000000000}"


def image(guid: str, file: str, kind: str = "Compressed") -> str:
    return f"<Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{file}</File></Image>"


def storage(start: int, end: int, *images: str) -> str:
    """A range, in bytes."""
    return (f"<Storage><Start>{start // 512}</Start><End>{end // 512}</End><Blocksize>8</Blocksize>{''.join(images)}"
            "</Storage>")  # fmt: skip


def shot(guid: str, parent: str) -> str:
    return f"<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>"


def descriptor(size: int, *storages: str, shots: str = "", top: str = "", before: str = "") -> str:
    named = f"<TopGUID>{top}</TopGUID>" if top else ""
    start = f"<?xml version='1.0' encoding='UTF-8'?>\n{before}<Parallels_disk_image Version='1.0'>"
    return (f"{start}<Disk_Parameters><Disk_size>{size // 512}</Disk_size><Padding>0</Padding></Disk_Parameters>"
            f"<StorageData>{''.join(storages)}</StorageData><Snapshots>{named}{shots}</Snapshots>"
            "</Parallels_disk_image>")  # fmt: skip


def expandable(path: Path, size: int, writes: dict[int, bytes]) -> None:
    byre.create(str(path), "parallels", size, options={"cluster_size": 4096})
    with byre.open(str(path), read_only=False) as disk:
        for offset, data in writes.items():
            disk.write(offset, data)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """An expandable top over an expandable root."""
    expandable(tmp_path / "root.hds", MIB, {0: b"r" * 100_000})
    expandable(tmp_path / "top.hds", MIB, {4096: b"t" * 4096, 500_000 // 4096 * 4096: b"u" * 4096})
    text = descriptor(MIB, storage(0, MIB, image(ROOT, "root.hds"), image(TOP, "top.hds")),
                      shots=shot(ROOT, NOBODY) + shot(TOP, ROOT))  # fmt: skip
    (tmp_path / "DiskDescriptor.xml").write_text(text)
    return tmp_path / "DiskDescriptor.xml"


class TestContract(ReadOnlyFormatContract):
    """Two storages, each of an expandable image over a plain file."""

    content = patchwork(MIB)

    @pytest.fixture
    def node(self, tmp_path: Path) -> Iterator[Node]:
        half, data = MIB // 2, self.content
        (tmp_path / "a.raw").write_bytes(data[:half])
        expandable(tmp_path / "a.hds", half, {})
        lower = bytearray(data[half:])
        at = 100_000 // 4096 * 4096
        lower[at : at + 8192] = b"old" * 2730 + b"xx"
        (tmp_path / "b.raw").write_bytes(lower)
        expandable(tmp_path / "b.hds", half, {at: data[half + at : half + at + 8192]})
        text = descriptor(
            MIB,
            storage(half, MIB, image(ROOT, "b.raw", "Plain"), image(TOP, "b.hds")),
            storage(0, half, image(ROOT, "a.raw", "Plain"), image(TOP, "a.hds")),
            shots=shot(ROOT, NOBODY) + shot(TOP, ROOT),
        )
        (tmp_path / "disk.xml").write_text(text)
        with byre.open(str(tmp_path / "disk.xml")) as disk:
            yield disk.node


def test_a_chain(chain: Path) -> None:
    with byre.open(str(chain)) as disk:
        assert disk.format == "parallels"
        expected = bytearray(b"r" * 100_000).ljust(MIB, b"\0")
        expected[4096:8192] = b"t" * 4096
        at = 500_000 // 4096 * 4096
        expected[at : at + 4096] = b"u" * 4096
        assert disk.read(0, MIB) == expected


def test_probing_and_conversion(chain: Path, tmp_path: Path) -> None:
    assert probe(chain.read_bytes()).name == "parallels"
    assert main(["convert", "-O", "raw", str(chain), str(tmp_path / "out")]) == 0
    with byre.open(str(chain)) as disk:
        assert (tmp_path / "out").read_bytes() == disk.read(0, MIB)


def test_info_opens_none_of_the_images(chain: Path) -> None:
    (chain.parent / "top.hds").unlink()
    assert main(["info", str(chain)]) == 0
    assert main(["map", str(chain)]) == 1


def test_it_is_only_read_and_the_policy_decides(chain: Path) -> None:
    with pytest.raises(NotSupported, match="only be read"):
        byre.open(str(chain), read_only=False)
    with pytest.raises(AccessDenied, match=r"disk image of the bundle 'root\.hds'"):
        byre.open(str(chain), policy=Policy.untrusted())


def test_another_snapshot_is_the_top(chain: Path) -> None:
    chain.write_text(chain.read_text().replace("<Snapshots>", f"<Snapshots><TopGUID>{ROOT}</TopGUID>"))
    with byre.open(str(chain)) as disk:
        assert disk.read(4096, 4096) == b"r" * 4096


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<x/>", "expected <Parallels_disk_image>"),
        ("<Parallels_disk_image>", "cannot be parsed"),
        (descriptor(MIB, before='<!DOCTYPE x [<!ENTITY a "b">]>'), "document type"),
        (descriptor(MIB), "the storages end at 0"),
        (descriptor(MIB, storage(512, MIB, image(TOP, "x"))), "expected one from 0 on"),
        (descriptor(MIB, storage(0, 512, image(TOP, "x"))), "the storages end at 512"),
        (descriptor(MIB, storage(0, MIB)), "0 images"),
        (descriptor(MIB, storage(0, MIB, image(TOP, "x", "Odd"))), "type 'Odd'"),
        (descriptor(MIB, storage(0, MIB, image(TOP, ""))), "has no file"),
        (descriptor(MIB, storage(0, MIB, image(TOP, "x"), image(TOP, "y"))), "twice"),
        (descriptor(MIB, storage(0, MIB, image(ROOT, "x"), image(NOBODY[:-2] + "2}", "y"))), "has no image"),
        (descriptor(MIB, storage(0, MIB, image(TOP, "x")), top=ROOT), "has no image"),
        (descriptor(MIB, storage(0, MIB, image(TOP, "x")), shots=shot(TOP, TOP)), "circle"),
        (descriptor(MIB, storage(0, MIB, image(TOP, "x", "Plain"), image(ROOT, "y")), shots=shot(TOP, ROOT)), "plain"),
        (descriptor(MIB, storage(0, MIB, image(TOP, "x"))).replace("<Padding>0", "<Padding>1"), "padding"),
        (descriptor(MIB, storage(0, MIB, image(TOP, "x"))).replace("2048", "twelve"), "expected a number"),
        ("<a>" * 100, "nested deeper"),
        ("<a>" + " " * (1 << 20) + "</a>", "allowed are 1048576"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        decode_descriptor(text.encode())


def test_encodings() -> None:
    text = descriptor(MIB, storage(0, MIB, image(TOP, "grün"))).replace("UTF-8", "UTF-16")
    found = decode_descriptor(text.encode("utf-16"))
    assert found.storages[0].chain[0].file == "grün"
    for name in ("no-such-code", "utf-7", "cp037"):
        with pytest.raises(ByreError):
            decode_descriptor(text.replace("UTF-16", name).encode("utf-16"))
