"""The descriptor text, and telling it from other texts."""

from __future__ import annotations

import pytest

from byre.catalog import probe
from byre.errors import ImageError, InvalidArgument
from byre.formats.vmdk import matches
from byre.formats.vmdk.descriptor import (
    Descriptor,
    ExtentLine,
    check_name,
    decode_descriptor,
    encode_descriptor,
    extent_line,
    parse_extent_line,
)
from support.vmdk import descriptor

LINES = ['RW 4192256 SPARSE "disk-s001.vmdk"', 'RW 2048 SPARSE "disk-s002.vmdk"']


def test_what_it_says() -> None:
    found = decode_descriptor(descriptor(LINES, "twoGbMaxExtentSparse", cid="ab12", parent="1",
                                         more='parentFileNameHint="base.vmdk"'))  # fmt: skip
    assert (found.cid, found.parent_cid, found.create_type) == (0xAB12, 1, "twoGbMaxExtentSparse")
    assert found.parent_name == "base.vmdk"
    assert [extent.name for extent in found.extents()] == ["disk-s001.vmdk", "disk-s002.vmdk"]
    text = descriptor(LINES, cid="ab12")
    assert text[found.cid_at : found.cid_at + found.cid_digits] == b"ab12"


def test_new_ones_say_what_was_meant() -> None:
    lines = tuple(map(extent_line, (ExtentLine("RW", 100, "FLAT", "a b.vmdk", 7), ExtentLine("RW", 2, "SPARSE", "c"))))
    made = Descriptor(0x12AB, 0xFFFFFFFF, "custom", "über.vmdk", lines)
    found = decode_descriptor(encode_descriptor(made, {"adapterType": "ide"}))
    assert found[:5] == made[:5]
    assert found.extents() == (ExtentLine("RW", 100, "FLAT", "a b.vmdk", 7), ExtentLine("RW", 2, "SPARSE", "c"))


def test_case_white_space_and_comments_do_not_matter() -> None:
    text = (b"\n  # a comment\r\n\r\nVERSION = 3\r\ncid = DEADBEEF\r\nparentcid=FFFFFFFF\r\n"
            b'CREATETYPE = "vmfs"\r\nrw 10 vmfs "x-flat.vmdk"\r\n')  # fmt: skip
    found = decode_descriptor(text)
    assert (found.cid, found.create_type) == (0xDEADBEEF, "vmfs")
    assert found.extents() == (ExtentLine("RW", 10, "VMFS", "x-flat.vmdk"),)
    assert text[found.cid_at : found.cid_at + 8] == b"DEADBEEF"


def test_names_in_the_encoding_it_declares() -> None:
    text = descriptor(['RW 10 FLAT "Größe.vmdk" 0'], "monolithicFlat", more='encoding="windows-1252"').decode()
    assert decode_descriptor(text.encode("cp1252")).extents()[0].name == "Größe.vmdk"
    assert decode_descriptor(text.encode("utf-8")).extents()[0].name != "Größe.vmdk"
    plain = descriptor(['RW 10 FLAT "Größe.vmdk" 0'], "monolithicFlat")
    assert decode_descriptor(plain).extents()[0].name == "Größe.vmdk"


@pytest.mark.parametrize(
    "line",
    [
        'RW 12582912 VMFS "dummy.vmdk" 1',
        'RW -1 FLAT "x" 0',
        'RW 0 FLAT "x" 0',
        'RW 10 FLAT "x"',
        'RW 10 FLAT "x" -1',
        'RW 10 FLAT "x" 99999999999999999999',
        'RW 10 SPARSE "x" 5',
        "RW 10 SPARSE x",
        'RW 10 SPARSE ""',
        'RW 10 SPARSE "x',
        "RW ten ZERO",
        "RW 99999999999999999999 ZERO",
        "RW 10",
        'RW 10 "x"',
        'RW 10 VMFSRDM "x"',
        "WR 10 ZERO",
        "",
    ],
)
def test_extent_lines_that_make_no_sense(line: str) -> None:
    with pytest.raises(ImageError):
        parse_extent_line(line)


def test_extent_lines() -> None:
    assert parse_extent_line("RW 63 ZERO") == ExtentLine("RW", 63, "ZERO")
    assert parse_extent_line('RDONLY 5 FLAT "a\\b c" 3') == ExtentLine("RDONLY", 5, "FLAT", "a\\b c", 3)
    assert parse_extent_line('NOACCESS 5 FLAT "a" 3').access == "NOACCESS"
    assert parse_extent_line('RW 7 FLAT "\\\\.\\PhysicalDrive1" 63 partitionUUID x').offset == 63


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"version=1\n",
        descriptor(LINES).replace(b"createType", b"createtipe"),
        descriptor(LINES).replace(b"monolithicSparse", b"cubic"),
        descriptor(LINES).replace(b"CID=12345678", b"CID=12345678z"),
        descriptor(LINES).replace(b"CID=12345678", b"CID="),
        descriptor(LINES).replace(b"parentCID", b"parent"),
        descriptor(LINES).replace(b"version=1", b"version=4"),
        descriptor(LINES) + bytes(1 << 20),
        descriptor([]),
        descriptor(["RW 10 ZERO"] * 30000),
        descriptor(["RW 10 ZERO"] * 3),
        descriptor(['RW 18014398509481983 FLAT "x" 0'] * 2),
    ],
)
def test_descriptors_that_make_no_sense(text: bytes) -> None:
    with pytest.raises(ImageError):
        decode_descriptor(text).extents()


def test_names_that_it_cannot_hold() -> None:
    for name in ('a"b', "a\nb", "a\0b", "x" * 5000):
        with pytest.raises(InvalidArgument):
            check_name(name)


GOOD = [
    descriptor(LINES),
    b"#\n#\n\n" + descriptor(LINES),
    b'   \r\n \r\n# x\r\nversion=2\r\nCID=1\r\ncreateType="vmfs"\r\n',
    descriptor(LINES).replace(b"version=1", b"version=3"),
]
OTHER = [
    b"",
    b"#",
    b"# Disk DescriptorFile\n",
    b"version=1\n",
    b"version=1\nname=x\n",
    b"# a config file\nversion=2\nname=x\n",
    b"[section]\nversion=1\ncid=5\n",
    b"name=x\nversion=1\nCID=5\n",
    b"version=10\nCID=1\ncreateType=x\n",
    b"version=1.0\nCID=1\ncreateType=x\n",
    b"versions=1\nCID=1\n",
    b"conversion=1\nCID=1\ncreateType=x\n",
    b"<?xml version='1.0'?><a cid='1'/>",
    b'{"version": 1, "cid": 2}',
    b"#!/bin/sh\nversion=1\nexec true\n",
    b"Some text about version=1\nCID=1\ncreateType\n",
]


@pytest.mark.parametrize("head", GOOD)
def test_probing_finds_descriptors(head: bytes) -> None:
    assert matches(head[:2048])
    assert probe(head[:2048]).name == "vmdk"


@pytest.mark.parametrize("head", OTHER)
def test_probing_leaves_other_texts_alone(head: bytes) -> None:
    assert probe(head[:2048]).name == "raw"


def test_probing_knows_the_signatures() -> None:
    assert probe(b"KDMV".ljust(512, b"\0")).name == "vmdk"
    assert probe(b"COWD".ljust(512, b"\0")).name == "vmdk"
    sesparse = bytes.fromhex("bebafeca00000000 0100000002000000")
    assert probe(sesparse.ljust(512, b"\0")).name == "vmdk"
    assert probe(b"\xca\xfe\xba\xbe\0\0\0\x34".ljust(512, b"\0")).name == "raw"  # a Java class
    assert probe(bytes.fromhex("bebafeca00000002").ljust(512, b"\0")).name == "raw"
