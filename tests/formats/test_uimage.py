"""uImage: U-Boot's legacy images, forged here."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backports import zstd

import byre
from byre.catalog import probe
from byre.cli.main import main
from byre.errors import ByreError, ImageError, InvalidArgument, NotSupported
from byre.formats import uimage
from byre.graph.node import Node
from byre.protocols.memory import MemoryNode
from contracts.node import ReadOnlyFormatContract, patchwork
from support.images import open_image

PACK: list[Callable[[bytes], bytes]] = [
    bytes, gzip.compress, bz2.compress, lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
]  # fmt: skip


def forge(payload: bytes, *, compression: int = 0, kind: int = 2, name: bytes = b"Linux-6.1") -> bytes:
    header = uimage.Header(0, 1700000000, len(payload), 0x80008000, 0x80008040, zlib.crc32(payload), 5, 2, kind,
                           compression, name)  # fmt: skip
    return uimage.encode_header(header._replace(header_crc=uimage.computed_crc(header))) + payload


def multi(*parts: bytes) -> bytes:
    body = b"".join(part.ljust(-(-len(part) // 4) * 4, b"\0") for part in parts)
    return forge(struct.pack(f">{len(parts) + 1}I", *map(len, parts), 0) + body, kind=4)


class TestContract(ReadOnlyFormatContract):
    content = patchwork(1 << 20)

    @pytest.fixture(params=[0, 1, 2, 3])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        data = forge(PACK[request.param](self.content), compression=request.param)
        with open_image(MemoryNode(data), "uimage", read_only=True) as image:
            yield image.node


def test_zstd_payload() -> None:
    with open_image(
        MemoryNode(forge(zstd.compress(b"kernel" * 1000), compression=6)), "uimage", read_only=True
    ) as image:
        assert image.read(0, image.size) == b"kernel" * 1000


def test_probing_and_header() -> None:
    assert probe(forge(b"x" * 600)).name == "uimage"
    header = uimage.Header(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, b"name")
    assert uimage.decode_header(uimage.encode_header(header)) == header


def test_info_tells_what_the_header_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "uImage"
    path.write_bytes(forge(gzip.compress(b"kernel" * 1000), compression=1))
    assert main(["info", "--output=json", str(path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["virtual-size"]) == ("uimage", 6000)
    data = result["format-specific"]["data"]
    assert data["name"] == "Linux-6.1"
    assert (data["os"], data["architecture"], data["type"], data["compression"]) == ("linux", "arm", "kernel", "gzip")
    assert (data["load-address"], data["entry-point"]) == (0x80008000, 0x80008040)
    assert (data["header-checksum"], data["data-checksum"]) == ("ok", "ok")


@pytest.mark.parametrize(("at", "which"), [(8, "header-checksum"), (70, "data-checksum")])
def test_wrong_checksums_are_told(at: int, which: str) -> None:
    data = bytearray(forge(b"x" * 100))
    data[at] ^= 1
    with open_image(MemoryNode(bytes(data)), "uimage", read_only=True) as image:
        assert isinstance(image.node, uimage.UImageNode)
        info = image.node.format_info()
        assert {key: info[key] for key in ("header-checksum", "data-checksum")} == {
            "header-checksum": "ok", "data-checksum": "ok", which: "wrong",
        }  # fmt: skip


def test_parts_of_a_multi_file_image() -> None:
    data = multi(b"kernel", b"initrd!", b"dtb")
    for part, content in enumerate((b"kernel", b"initrd!", b"dtb")):
        with open_image(MemoryNode(data), "uimage", read_only=True, options={"part": part}) as image:
            assert image.read(0, image.size) == content
            assert isinstance(image.node, uimage.UImageNode)
            assert [row["size"] for row in image.node.format_info()["parts"]] == [6, 7, 3]  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="no part 3"):
        open_image(MemoryNode(data), "uimage", read_only=True, options={"part": 3})


def test_payload_as_it_is_stored() -> None:
    packed = gzip.compress(b"kernel" * 1000)
    with open_image(
        MemoryNode(forge(packed, compression=1)), "uimage", read_only=True, options={"decompress": False}
    ) as image:
        assert image.read(0, image.size) == packed


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"short", "takes 64"),
        (bytes(64), "not a uImage"),
        (forge(b"x" * 100)[:-1], "past the end of the file"),
        (forge(b"x" * 100, compression=1), "gzip stream"),
        (forge(gzip.compress(bytes(10000))[:-9], compression=1), "gzip stream|ends early"),
        (forge(b"x" * 100, compression=77), "unknown way 77"),
        (forge(b"\1" * 100, kind=4), "does not end|past the end"),
        (forge(struct.pack(">3I", 50, 0, 0), kind=4), "past the end of the data"),
    ],
    ids=range(8),
)
def test_images_that_lie(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(data), "uimage", read_only=True)


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uimage, "MAX_DECODED", 1 << 20)
    data = forge(gzip.compress(bytes((1 << 20) + 1)), compression=1)
    with pytest.raises(ImageError, match="more than 1048576 bytes"):
        open_image(MemoryNode(data), "uimage", read_only=True)


@pytest.mark.parametrize(("compression", "module"), [(4, "lzo"), (5, "lz4.frame")])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, compression: int, module: str) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotSupported, match=module):
        open_image(MemoryNode(forge(b"x" * 64, compression=compression)), "uimage", read_only=True)


def test_it_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "uImage"
    path.write_bytes(forge(b"x" * 600))
    with pytest.raises(ByreError, match="only be read"):
        byre.open(str(path), read_only=False)
