"""qcow, version 1: contract, header, compressed and encrypted clusters, backing files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.catalog import probe
from byre.errors import AccessDenied, ByreError, Corrupt, ImageError, InvalidArgument, NotSupported
from byre.filters.faults import FaultNode
from byre.formats import qcow
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.io.extent import COMPRESSED, DATA, UNALLOCATED
from byre.protocols.memory import MemoryNode
from contracts.node import FormatContract, patchwork
from contracts.test_formats import scattered
from support.images import layer, new_image, open_image

MIB = 1 << 20


def forged(size: int, cluster_bits: int, l2_bits: int) -> MemoryNode:
    """An empty image with tables of any size, which creation does not offer."""
    header = qcow.Header(size=size, cluster_bits=cluster_bits, l2_bits=l2_bits)
    return MemoryNode(qcow.encode_header(header) + bytes(8 * header.l1_count))


class TestContract(FormatContract):
    content = patchwork(1 << 20)

    @pytest.fixture(params=[(9, 13), (12, 9), (16, 6)])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        cluster_bits, l2_bits = request.param
        with open_image(forged(len(self.content), cluster_bits, l2_bits), "qcow") as image:
            scattered(image, self.content, 1 << cluster_bits)
            yield image.node


class TestBackedContract(FormatContract):
    @pytest.fixture
    def node(self) -> Iterator[Node]:
        below = patchwork(900_000, seed=5)
        content = bytearray(patchwork(MIB, seed=6))
        content[300_000:500_000] = below[300_000:500_000]
        self.content = bytes(content)
        top = new_image("qcow", MIB, backing_file="base")
        graph = Graph()
        with open_image(top, "qcow", graph=graph, backing=layer(graph, MemoryNode(below), "raw")) as image:
            assert image.node.cluster_size == 512  # type: ignore[attr-defined]
            scattered(image, self.content, 512, below)
            yield image.node


class TestCompressedContract(FormatContract):
    content = b"".join(patchwork(1 << 15, seed=n) if n % 2 else bytes([n]) * (1 << 15) for n in range(32))

    @pytest.fixture(params=[9, 16])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        size = 1 << request.param
        with open_image(forged(len(self.content), request.param, 9), "qcow") as image:
            for offset in range(0, len(self.content), size):
                part = self.content[offset : offset + size]
                if offset // size % 3 == 1:
                    image.write(offset, bytes(len(part)))
                image.write_compressed(offset, part)
            image.flush()
            assert any(row.kind == COMPRESSED for row in image.extents())
            yield image.node


class TestEncryptedContract(FormatContract):
    content = patchwork(1 << 20)

    @pytest.fixture
    def node(self) -> Iterator[Node]:
        with open_image(encrypted(len(self.content)), "qcow", **KEY) as image:
            scattered(image, self.content, 4096)
            yield image.node

    def test_data_extents_point_to_the_bytes(self, node: Node) -> None:
        pytest.skip("what lies there is encrypted")

    def test_what_it_cannot_do_it_says(self, node: Node) -> None:
        with pytest.raises(NotSupported, match="compressed"):
            node.write_compressed(0, memoryview(bytes(4096)))  # type: ignore[attr-defined]


KEY: dict[str, Any] = {"options": {"encrypt.key-secret": "s"}, "secrets": {"s": "a key"}}


def encrypted(size: int) -> MemoryNode:
    header = qcow.Header(size=size, crypt_method=qcow.AES)
    return MemoryNode(qcow.encode_header(header) + bytes(8 * header.l1_count))


def test_probing_and_header() -> None:
    memory = new_image("qcow", 10 * MIB, backing_file="base")
    data = memory.to_bytes()
    assert probe(data).name == "qcow"
    header = qcow.decode_header(data)
    assert qcow.encode_header(header) == data[:48]
    assert data[48:52] == b"base"
    assert (header.cluster_bits, header.l2_bits, header.l1_offset) == (9, 12, 56)
    header = qcow.decode_header(new_image("qcow", 10 * MIB).to_bytes())
    assert (header.cluster_bits, header.l2_bits, header.l1_offset) == (12, 9, 48)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"magic": 1}, "not a qcow image"),
        ({"version": 2}, "version 2, known here is 1; it is a qcow2 image"),
        ({"cluster_bits": 8}, "cluster size"),
        ({"cluster_bits": 63}, "cluster size"),
        ({"l2_bits": 5}, "L2 table"),
        ({"l2_bits": 255}, "L2 table"),
        ({"size": 0}, "disk size"),
        ({"size": 1 << 63}, "disk size"),
        ({"size": 1 << 60}, "allowed are 33554432"),
        ({"size": 1 << 40}, "past the end of the file"),
        ({"crypt_method": 2}, "encryption method 2"),
        ({"l1_offset": 8}, "L1 table lies at"),
        ({"l1_offset": 57}, "L1 table lies at"),
        ({"l1_offset": 1 << 62}, "L1 table lies at"),
        ({"l1_offset": 1 << 50}, "past the end of the file"),
        ({"backing_offset": 48, "backing_size": 1024}, "allowed are 1023"),
        ({"backing_offset": 1 << 40, "backing_size": 4}, "past the end of the file"),
    ],
)
def test_refusals(change: dict[str, Any], said: str) -> None:
    data = bytearray(new_image("qcow", 10 * MIB).to_bytes())
    data[:48] = qcow.encode_header(qcow.decode_header(data)._replace(**change))
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(bytes(data)), "qcow")


def test_entries_that_point_nowhere_are_named() -> None:
    memory = new_image("qcow", 8 * MIB)
    with open_image(memory, "qcow") as image:
        image.write(0, b"x" * 4096)
    table = struct.unpack_from(">Q", memory.to_bytes(), 48)[0]
    for at, word, said in ((48, 3 << 40, "L1 entry 0 at 0x30"), (48, table + 8, "L1 entry 0"),
                           (table, 3 << 40, "guest offset 0x0"), (table, 4097, "guest offset 0x0"),
                           (table, 48, "guest offset 0x0")):  # fmt: skip
        data = bytearray(memory.to_bytes())
        struct.pack_into(">Q", data, at, word)
        with open_image(MemoryNode(bytes(data)), "qcow") as image:
            for request in (lambda: image.read(0, 1), lambda: image.write(0, b"x"), image.extents):
                with pytest.raises(Corrupt, match=said):
                    request()
            assert image.read(4 * MIB, 512) == bytes(512)


# -- compressed clusters --------------------------------------------------------------------------


def test_compressed_clusters_are_packed_and_read_by_zlib() -> None:
    memory = new_image("qcow", MIB)
    with open_image(memory, "qcow") as image:
        for index in range(100):
            image.write_compressed(index * 4096, bytes([index]) * 4096)
        image.flush()
        assert memory.size <= 4 * 4096
        rows = image.node.extents(0, 100 * 4096)
        assert set(rows.kind.tolist()) == {COMPRESSED}
        assert len(rows) == 100
        host = int(rows.host[7]) & ((1 << 51) - 1)
        length = int(rows.host[7]) >> 51
        stored = memory.to_bytes()[host : host + length]
        assert zlib.decompressobj(-12).decompress(stored) == bytes([7]) * 4096


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    with open_image(new_image("qcow", MIB), "qcow") as image:
        image.write_compressed(0, patchwork(4096, seed=1).replace(b"\0", b"x"))
        image.write_compressed(MIB - 4096, b"z" * 4096)
        with pytest.raises(InvalidArgument, match="exactly one cluster"):
            image.write_compressed(512, b"z" * 4096)
        assert image.read(MIB - 4096, 4096) == b"z" * 4096


def test_a_compressed_cluster_takes_the_place_of_a_plain_one_and_the_reverse() -> None:
    memory = new_image("qcow", MIB)
    with open_image(memory, "qcow") as image:
        image.write(0, b"p" * 40960)
        image.write_compressed(4096, b"c" * 4096)
        image.write(8192 + 100, b"q" * 50)
        image.write(4096 + 100, b"d" * 50)
        expected = b"p" * 4096 + b"c" * 100 + b"d" * 50 + b"c" * 3946 + b"p" * 100 + b"q" * 50 + b"p" * 3946
        assert image.read(0, 12288) == expected
    with open_image(memory, "qcow", read_only=True) as image:
        assert image.read(0, 12288) == expected


def test_damaged_compressed_data_is_an_error_with_a_place() -> None:
    memory = new_image("qcow", MIB)
    with open_image(memory, "qcow") as image:
        image.write_compressed(8192, b"c" * 4096)
        host = int(image.node.extents(8192, 4096).host[0]) & ((1 << 51) - 1)
    data = bytearray(memory.to_bytes())
    data[host : host + 20] = b"\xff" * 20
    image = open_image(MemoryNode(bytes(data)), "qcow", read_only=True)
    with image, pytest.raises(Corrupt, match="compressed cluster at guest offset 0x2000"):
        image.read(8192 + 10, 10)


# -- encryption -----------------------------------------------------------------------------------


def test_encrypted() -> None:
    memory = encrypted(MIB)
    with open_image(memory, "qcow", **KEY) as image:
        image.write(5000, b"secret" * 1000)
        image.write_zeroes(8192, 4096)
        expected = image.read(0, MIB)
        assert expected[8192:12288] == bytes(4096)
    assert b"secret" not in memory.to_bytes()
    with open_image(memory, "qcow", **KEY, read_only=True) as image:
        assert image.read(0, MIB) == expected
    with pytest.raises(AccessDenied, match="key-secret"):
        open_image(memory, "qcow")
    image = open_image(memory, "qcow", read_only=True, no_io=True)
    with image, pytest.raises(AccessDenied, match="without its key"):
        image.node.cipher.decrypt(0, bytearray(512))  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="not encrypted"):
        open_image(new_image("qcow", MIB), "qcow", options={"encrypt.format": "aes"})


def test_creating_encrypted_images(tmp_path: Path) -> None:
    name = str(tmp_path / "image")
    byre.create(name, "qcow", MIB, options={"encryption": True, "encrypt.key-secret": "s"}, secrets={"s": "k"})
    with byre.open(
        {"driver": "qcow", "file": name, "encrypt": {"key-secret": "s"}}, read_only=False, secrets={"s": "k"}
    ) as image:
        image.write(0, b"x")
    with pytest.raises(AccessDenied):
        byre.create(name, "qcow", MIB, options={"encrypt.format": "aes"})
    with pytest.raises(InvalidArgument, match="expected 'aes'"):
        new_image("qcow", MIB, **{"encrypt.format": "luks", "encrypt.key-secret": "s"})
    with pytest.raises(InvalidArgument, match=r"needs 'encrypt\.format'"):
        new_image("qcow", MIB, **{"encrypt.key-secret": "s"})


# -- the rest -------------------------------------------------------------------------------------


def test_creation_refuses() -> None:
    for size, options in ((0, {}), (1 << 63, {}), (1 << 50, {}), (MIB, {"backing_file": "x" * 1024})):
        with pytest.raises(InvalidArgument):
            new_image("qcow", size, **options)


def test_kinds_and_emptying() -> None:
    base = MemoryNode(b"b" * MIB)
    top = new_image("qcow", MIB, backing_file="base")
    graph = Graph()
    with open_image(top, "qcow", graph=graph, backing=layer(graph, base, "raw")) as image:
        image.write(1024, b"x" * 512)
        rows = [(row.offset, row.length, row.kind) for row in image.node.extents(0, 4096)]
        assert rows == [(0, 1024, UNALLOCATED), (1024, 512, DATA), (1536, 2560, UNALLOCATED)]
        image.node.make_empty()  # type: ignore[attr-defined]
        assert image.read(0, MIB) == b"b" * MIB
        image.write(0, b"again")
        assert image.read(0, 600) == b"again" + b"b" * 595
        assert top.size <= 600 + 2 * 512 + 32768


def test_failures_leave_nothing_behind() -> None:
    for kind in ("write", "flush", "any"):
        for number in range(1, 40):
            memory, fault = new_image("qcow", MIB), FaultNode()
            image = open_image(memory, "qcow", filters=[fault])
            fault.fail(kind, number)
            failed = False
            try:
                image.write(1000, b"a" * 10_000)
                image.flush()
                image.write_compressed(40960, b"b" * 4096)
                image.write_zeroes(4096, 4096)
                image.flush()
            except ByreError:
                failed = True
            fault.heal()
            node: Any = image.node
            assert node.inflight.claim_count == 0
            assert node.inflight.ticket_count == 0
            if node.failure is None:
                image.write(60_000, b"c" * 5000)
                assert image.read(60_000, 5000) == b"c" * 5000
            try:
                image.close()
            except ByreError:
                pass
            with open_image(memory, "qcow", read_only=True) as image:
                image.read(0, MIB)
            if not failed:
                break
