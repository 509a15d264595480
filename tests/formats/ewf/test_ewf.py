"""ewf: forensic images, forged here and made by an independent program."""

from __future__ import annotations

import hashlib
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import byre
from byre.catalog import probe
from byre.errors import AccessDenied, ByreError, ImageError, NotFound, NotSupported
from byre.formats.ewf import layout
from byre.formats.ewf.image import segment_name
from byre.formats.ewf.layout import Section, TableHead, Volume
from byre.graph.node import Node
from byre.graph.opening import Policy
from byre.io.extent import COMPRESSED
from contracts.node import ReadOnlyFormatContract, patchwork

PER_CHUNK = 8
CHUNK = PER_CHUNK * 512


class Segment:
    """A segment that is being put together."""

    def __init__(self, number: int) -> None:
        self.data = bytearray(layout.encode_file_header(number))

    def add(self, kind: str, data: bytes, *, last: bool = False, tables: Callable[[int], bytes] | None = None) -> None:
        at = len(self.data)
        body = tables(at + layout.SECTION_SIZE) if tables else data
        size = layout.SECTION_SIZE + len(body)
        self.data += layout.encode_section(Section(kind, at if last else at + size, 0 if last else size)) + body


def pack(content: bytes, plain: bool) -> list[tuple[bytes, bool]]:
    result = []
    for at in range(0, len(content), CHUNK):
        part = content[at : at + CHUNK]
        if plain and at // CHUNK % 2:
            result.append((part + struct.pack("<I", zlib.adler32(part)), False))
        else:
            result.append((zlib.compress(part), True))
    return result


def table(segment: Segment, chunks: list[tuple[bytes, bool]], *, base: int = 0, inside: bool = False) -> None:
    """A table with the chunks before it, or in its own section behind the entries as the first writers had them."""

    def entries(start: int) -> bytes:
        result = b""
        for data, packed in chunks:
            result += struct.pack("<I", (start - base) | (layout.COMPRESSED if packed else 0))
            start += len(data)
        return result

    body = b"".join(data for data, _ in chunks)
    head = layout.encode_table_head(TableHead(len(chunks), base))
    if inside:

        def build(at: int) -> bytes:
            return head + entries(at + len(head) + 4 * len(chunks)) + body

        segment.add("table", b"", tables=build)
        return
    at = len(segment.data) + layout.SECTION_SIZE
    segment.add("sectors", body)
    rows = entries(at)
    segment.add("table", head + rows + struct.pack("<I", zlib.adler32(rows)))
    segment.add("table2", head + rows + struct.pack("<I", zlib.adler32(rows)))


def forge(folder: Path, content: bytes, *, segments: int = 1, per_table: int = 7, inside: bool = False,
          plain: bool = True, base: int = 0, smart: bool = False) -> Path:  # fmt: skip
    """An image named disk.E01 in ``folder``."""
    chunks = pack(content, plain)
    volume = Volume(len(chunks), PER_CHUNK, 512, len(content) // 512, guid=bytes(range(16)))
    share = -(-len(chunks) // segments)
    first = folder / "disk.E01"
    for number in range(1, segments + 1):
        segment = Segment(number)
        if number == 1:
            text = "1\nmain\nc\te\tt\n007\tHolmes\tthe dog\n\n"
            segment.add("header2", zlib.compress(text.encode("utf-16")))
            segment.add("header", zlib.compress(text.encode()))
            if smart:
                short = struct.pack("<5I", 1, *volume[:4]).ljust(90, b"\0")
                segment.add("volume", short + struct.pack("<I", zlib.adler32(short)))
            else:
                segment.add("volume", layout.encode_volume(volume))
        mine = chunks[(number - 1) * share : number * share]
        for at in range(0, len(mine), per_table):
            table(segment, mine[at : at + per_table], base=base, inside=inside)
        if number == segments:
            segment.add("hash", hashlib.md5(content).digest() + bytes(20))
        segment.add("done" if number == segments else "next", b"", last=True)
        (folder / segment_name(str(first), number)).write_bytes(segment.data)
    return first


class TestContract(ReadOnlyFormatContract):
    content = patchwork(1 << 19)[: 1000 * 512]

    @pytest.fixture(params=[{}, {"segments": 3}, {"inside": True}, {"plain": False}, {"base": 13}, {"smart": True}])
    def node(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
        with byre.open(str(forge(tmp_path, self.content, **request.param))) as image:
            assert image.format == "ewf"
            yield image.node


def test_names_of_segments() -> None:
    names = [segment_name("d/x.E01", number) for number in (2, 99, 100, 101, 126, 775, 776, 14971)]
    assert names == [f"d/x.{end}" for end in ("E02", "E99", "EAA", "EAB", "EBA", "EZZ", "FAA", "ZZZ")]
    assert [segment_name("x.s01", number) for number in (2, 100)] == ["x.s02", "x.saa"]
    for first, number in (("x.E01", 14972), ("disk.raw", 2), ("E01", 2)):
        with pytest.raises(ImageError):
            segment_name(first, number)


def test_info_tells_of_the_case(tmp_path: Path) -> None:
    content = patchwork(1 << 16)
    with byre.open(str(forge(tmp_path, content, segments=2))) as image:
        info = image.node.format_info()  # type: ignore[attr-defined]
        assert (info["segments"], info["chunk-size"], info["media-type"]) == (2, CHUNK, "fixed")
        assert info["md5"] == hashlib.md5(content).hexdigest()
        assert (info["case-number"], info["examiner-name"], info["notes"]) == ("007", "Holmes", "the dog")
        assert {row.kind for row in image.extents()} == {COMPRESSED}


def test_codecs_keep_what_they_are_given() -> None:
    volume = Volume(4, 64, 512, 200, 3, 1, 2, bytes(range(16)))
    assert layout.decode_volume(layout.encode_volume(volume)) == volume
    assert layout.decode_section(layout.encode_section(Section("table2", 5, 6))) == Section("table2", 5, 6)
    assert layout.decode_table_head(layout.encode_table_head(TableHead(3, 1 << 40))) == TableHead(3, 1 << 40)
    assert layout.decode_file_header(layout.encode_file_header(300)) == 300
    assert probe(layout.encode_file_header(1)).name == "ewf"


def test_a_missing_segment_is_named(tmp_path: Path) -> None:
    first = forge(tmp_path, patchwork(1 << 16), segments=3)
    (tmp_path / "disk.E02").unlink()
    with pytest.raises(NotFound, match=r"disk\.E02"):
        byre.open(str(first))


def test_a_foreign_segment_is_refused(tmp_path: Path) -> None:
    first = forge(tmp_path, patchwork(1 << 16), segments=3)
    (tmp_path / "disk.E02").write_bytes((tmp_path / "disk.E03").read_bytes())
    with pytest.raises(ImageError, match="segment 3 of an image, expected was segment 2"):
        byre.open(str(first))


def test_segments_of_an_untrusted_image_are_not_opened(tmp_path: Path) -> None:
    first = forge(tmp_path, patchwork(1 << 16), segments=2)
    with pytest.raises(AccessDenied, match="segment file"):
        byre.open(str(first), policy=Policy.untrusted())
    with byre.open(str(forge(tmp_path, patchwork(1 << 16))), policy=Policy.untrusted()) as image:
        assert image.size == 1 << 16


def test_every_damaged_chunk_is_noticed(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(4 * CHUNK)
    path = forge(tmp_path, content)
    good = path.read_bytes()
    at = good.index(content[CHUNK : CHUNK + 100])
    for place in (at + 50, at + CHUNK + 1, at + CHUNK + 4 + 20):
        bad = bytearray(good)
        bad[place] ^= 0x10
        path.write_bytes(bad)
        with byre.open(str(path)) as image, pytest.raises(ImageError, match=r"chunk \d"):
            image.read(0, image.size)


def test_damaged_sections_and_lies(tmp_path: Path) -> None:
    content = patchwork(1 << 16)
    path = forge(tmp_path, content)
    good = path.read_bytes()
    for at in range(0, 2000, 7):
        bad = bytearray(good)
        bad[at] ^= 0x41
        path.write_bytes(bad)
        try:
            with byre.open(str(path), format="ewf") as image:
                image.read(0, image.size)
        except ByreError:
            pass
    for cut in range(13, len(good), 1231):
        path.write_bytes(good[:cut])
        with pytest.raises(ImageError):
            byre.open(str(path))


@pytest.mark.parametrize(
    ("head", "said"),
    [(layout.LOGICAL_MAGIC, "logical evidence"), (layout.VERSION_2_MAGICS[0], "Ex01"), (b"junk", "not an EWF")],
)
def test_other_kinds_are_told_apart(tmp_path: Path, head: bytes, said: str) -> None:
    path = tmp_path / "x.L01"
    path.write_bytes(head.ljust(600, b"\0"))
    with pytest.raises(ImageError, match=said):
        byre.open(str(path), format="ewf")


def test_sections_in_a_ring_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.E01"
    path.write_bytes(layout.encode_file_header(1) + layout.encode_section(Section("header", 13, 76)))
    with pytest.raises(ImageError, match="followed by"):
        byre.open(str(path))


def test_volumes_that_lie() -> None:
    good = Volume(4, 64, 512, 200)
    for bad, said in (
        (good._replace(bytes_per_sector=0), "sectors of 0 bytes"),
        (good._replace(sectors_per_chunk=0), "0 sectors"),
        (good._replace(sectors_per_chunk=1 << 20), "chunk size"),
        (good._replace(sector_count=300), "too few"),
    ):
        with pytest.raises(ImageError, match=said):
            layout.decode_volume(layout.encode_volume(bad))


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="only be read"):
        byre.open(str(forge(tmp_path, bytes(4096))), read_only=False)


@pytest.mark.oracle
@pytest.mark.parametrize("format", ["encase1", "encase5", "encase6", "ftk", "smart", "ewfx"])
def test_images_of_another_program(tmp_path: Path, ewfacquire: Callable[..., object], format: str) -> None:
    content = patchwork(3 << 20, seed=4) + random.Random(2).randbytes(1 << 20)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(content)
    ewfacquire("-u", "-q", "-f", format, "-c", "deflate:fast", "-S", "1MiB", "-t", str(tmp_path / "e"), str(raw))
    (first,) = tmp_path.glob("e.?01")
    with byre.open(str(first)) as image:
        assert image.format == "ewf"
        assert image.read(0, image.size) == content
        assert image.node.format_info().get("md5", hashlib.md5(content).hexdigest()) == (  # type: ignore[attr-defined]
            hashlib.md5(content).hexdigest()
        )


def test_a_segment_of_nothing_but_texts(tmp_path: Path) -> None:
    """Each unfolds to a megabyte; a few are enough."""
    segment = Segment(1)
    bomb = zlib.compress(b"1\nmain\nc\n007\n" + bytes((1 << 20) - 100))
    for _ in range(5000):
        segment.add("header", bomb)
    segment.add("done", b"", last=True)
    path = tmp_path / "disk.E01"
    path.write_bytes(segment.data)
    started = time.process_time()
    with pytest.raises(ImageError, match="does not describe its volume"):
        byre.open(str(path))
    assert time.process_time() - started < 2
