"""qed: contract, header, the need-check bit, check and repair, backing files, growing."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.catalog import probe
from byre.errors import ByreError, Corrupt, ImageError, InvalidArgument, NoSpace, NotSupported
from byre.filters.faults import FaultNode
from byre.formats.qed import layout
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.image import Image
from byre.io.extent import DATA, UNALLOCATED, ZERO
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from contracts.node import FormatContract, patchwork
from contracts.test_formats import scattered
from support.images import layer, new_image, open_image

MIB = 1 << 20
SMALL: dict[str, Any] = {"cluster_size": 4096, "table_size": 1}


def header_of(memory: MemoryNode) -> layout.Header:
    return layout.decode_header(memory.to_bytes()[:64])


def tables_of(memory: MemoryNode) -> int:
    """Where the first L2 table lies (clusters of 4096 bytes, so that the L1 table is at 4096)."""
    return int(struct.unpack_from("<Q", memory.to_bytes(), 4096)[0])


def checked(image: Image, fix: str = "") -> Any:
    return image.node.check(Control(), fix)  # type: ignore[attr-defined]


class TestContract(FormatContract):
    content = patchwork(1 << 20)

    @pytest.fixture(params=[(4096, 1), (65536, 4), (1 << 20, 16)])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        cluster, table = request.param
        memory = new_image("qed", len(self.content), cluster_size=cluster, table_size=table)
        with open_image(memory, "qed") as image:
            scattered(image, self.content, cluster)
            yield image.node
        if image.node.failure is None:
            assert not header_of(memory).features & layout.NEED_CHECK
            with open_image(memory, "qed", read_only=True) as image:
                assert checked(image)[:3] == (0, 0, 0)


class TestBackedContract(FormatContract):
    """Over a shorter backing file."""

    @pytest.fixture
    def node(self) -> Iterator[Node]:
        below = patchwork(900_000, seed=5)
        content = bytearray(patchwork(MIB, seed=6))
        content[300_000:500_000] = below[300_000:500_000]
        self.content = bytes(content)
        top = new_image("qed", MIB, backing_file="base", backing_fmt="raw", **SMALL)
        graph = Graph()
        with open_image(top, "qed", graph=graph, backing=layer(graph, MemoryNode(below), "raw")) as image:
            assert image.read(0, MIB) == below.ljust(MIB, b"\0")
            scattered(image, self.content, 4096, below)
            yield image.node


def test_probing_and_header() -> None:
    memory = new_image("qed", 10 * MIB, backing_file="base", backing_fmt="raw")
    data = memory.to_bytes()
    assert probe(data).name == "qed"
    header = layout.decode_header(data)
    assert layout.encode_header(header) == data[:64]
    assert header.features == layout.BACKING_FILE | layout.NO_PROBE
    assert data[64:68] == b"base"
    assert memory.size == 5 * 65536


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"magic": b"QEX\0"}, "not a QED image"),
        ({"features": 8}, "unknown incompatible features: 0x8"),
        ({"cluster_size": 0}, "cluster size is 0"),
        ({"cluster_size": 5000}, "power of two"),
        ({"cluster_size": 1 << 27}, "power of two"),
        ({"table_size": 0}, "table size is 0"),
        ({"table_size": 3}, "power of two"),
        ({"table_size": 32}, "power of two"),
        ({"table_size": 16, "cluster_size": 1 << 26}, "allowed are 33554432"),
        ({"header_size": 0}, "at least one"),
        ({"header_size": 0xFFFFFFFF}, "less than 4 GiB"),
        ({"l1_offset": 1}, "L1 table lies at"),
        ({"l1_offset": 0}, "L1 table lies at"),
        ({"l1_offset": 1 << 40}, "past the end of the file"),
        ({"l1_offset": 1 << 63}, "L1 table lies at"),
        ({"size": 1 << 63}, "disk size"),
        ({"size": 100}, "multiple of 512"),
        ({"features": 1, "backing_offset": 10, "backing_size": 5}, "name of the backing file"),
        ({"features": 1, "backing_offset": 64, "backing_size": 2000}, "longer than 1023"),
        ({"features": 1, "backing_offset": 65530, "backing_size": 20}, "within the header"),
    ],
)
def test_refusals(change: dict[str, Any], said: str) -> None:
    data = bytearray(new_image("qed", 10 * MIB).to_bytes())
    data[:64] = layout.encode_header(layout.decode_header(data)._replace(**change))
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(bytes(data)), "qed")


def test_kinds() -> None:
    with open_image(new_image("qed", MIB, backing_file="x", **SMALL), "qed", options={"backing": None}) as image:
        image.write(8192, b"x" * 4096)
        image.write_zeroes(16384, 4096)
        rows = [(row.offset, row.length, row.kind) for row in image.node.extents(0, 32768)]
    assert rows == [(0, 8192, UNALLOCATED), (8192, 4096, DATA), (12288, 4096, UNALLOCATED), (16384, 4096, ZERO),
                    (20480, 12288, UNALLOCATED)]  # fmt: skip


def test_entries_that_point_nowhere_are_named() -> None:
    memory = new_image("qed", 8 * MIB, **SMALL)
    with open_image(memory, "qed") as image:
        image.write(0, b"x" * 4096)
    table = tables_of(memory)
    for at, word, said in ((4096, 3 << 40, "L1 entry 0 at 0x1000"), (table, 3 << 40, "guest offset 0x0"),
                           (table, 8192 + 512, "guest offset 0x0"), (table, 4096, "guest offset 0x0")):  # fmt: skip
        data = bytearray(memory.to_bytes())
        struct.pack_into("<Q", data, at, word)
        with open_image(MemoryNode(bytes(data)), "qed") as image:
            for request in (lambda: image.read(0, 1), lambda: image.write(0, b"x"), image.extents):
                with pytest.raises(Corrupt, match=said):
                    request()
            assert image.read(4 * MIB, 512) == bytes(512)


# -- the need-check bit ---------------------------------------------------------------------------


def test_the_bit_is_set_before_allocating_and_goes_when_closed() -> None:
    memory = new_image("qed", MIB, **SMALL)
    with open_image(memory, "qed") as image:
        assert not header_of(memory).features
        image.write(0, b"x" * 100)
        assert header_of(memory).features == layout.NEED_CHECK
        image.flush()
        assert header_of(memory).features == layout.NEED_CHECK
        image.flush()  # nothing was left to write
        assert not header_of(memory).features
        image.write(0, b"y" * 100)  # in place
        assert not header_of(memory).features
        image.write(8192, b"z" * 100)
        assert header_of(memory).features == layout.NEED_CHECK
    assert not header_of(memory).features


def test_reopening_read_only_leaves_it_clean() -> None:
    memory = new_image("qed", MIB, **SMALL)
    with open_image(memory, "qed") as image:
        image.write(0, b"x" * 100)
        image.reopen(read_only=True)
        assert not header_of(memory).features
        assert image.read(0, 100) == b"x" * 100


def test_autoclear_bits_go_with_the_first_allocation() -> None:
    data = bytearray(new_image("qed", MIB, **SMALL).to_bytes())
    struct.pack_into("<Q", data, 32, 7)
    memory = MemoryNode(bytes(data))
    with open_image(memory, "qed") as image:
        image.write(0, b"x")
    assert header_of(memory).autoclear_features == 0


def test_an_image_that_was_not_closed_is_checked_when_it_is_written() -> None:
    memory = new_image("qed", MIB, **SMALL)
    with open_image(memory, "qed") as image:
        image.write(0, b"x" * 8192)
    data = bytearray(memory.to_bytes())
    struct.pack_into("<Q", data, 16, layout.NEED_CHECK)
    struct.pack_into("<Q", data, tables_of(memory) + 16, 77 << 12)  # a cluster that never came
    with open_image(MemoryNode(bytes(data)), "qed", read_only=True) as image:
        assert image.read(0, 8192) == b"x" * 8192
        assert image.node.dirty  # type: ignore[attr-defined]
    memory = MemoryNode(bytes(data))
    with open_image(memory, "qed") as image:
        assert any("L2 entry 2 of table 0 points to 0x4d000" in text for text in image.graph.repairs)
        assert image.read(0, 12288) == b"x" * 8192 + bytes(4096)
        assert not header_of(memory).features


# -- check ----------------------------------------------------------------------------------------


L2 = 20480
"""Where the first L2 table of :func:`damaged` lies, behind three clusters."""


def damaged(*changes: tuple[int, int]) -> MemoryNode:
    memory = new_image("qed", 8 * MIB, **SMALL)
    with open_image(memory, "qed") as image:
        image.write(0, b"x" * 12288)
        image.write(2 * MIB, b"y" * 4096)
    data = bytearray(memory.to_bytes())
    for at, word in changes:
        struct.pack_into("<Q", data, at, word)
    assert tables_of(memory) == L2
    return MemoryNode(bytes(data))


def test_check_finds_and_mends() -> None:
    with open_image(damaged(), "qed", check=True) as image:
        found = checked(image)
        assert (found.corruptions, found.leaks) == (0, 0)
        assert (found.total_clusters, found.allocated_clusters, found.fragmented_clusters) == (2048, 4, 0)
    memory = damaged((L2, 1 << 40), (4096 + 16, 12345))
    with open_image(memory, "qed", read_only=True, check=True) as image:
        found = checked(image)
        assert (found.corruptions, found.leaks) == (2, 1)
        assert "L2 entry 0 of table 0 points to 0x10000000000" in "".join(found.messages)
    with open_image(memory, "qed", check=True) as image:
        found = checked(image, "all")
        assert (found.corruptions, found.corruptions_fixed, found.leaks) == (0, 2, 1)
        assert checked(image)[:3] == (0, 1, 0)
    with open_image(memory, "qed") as image:
        assert image.read(0, 12288) == bytes(4096) + b"x" * 8192


def test_clusters_used_twice_cannot_be_mended() -> None:
    for changes in ([(L2, 16384)], [(4096 + 8, L2)]):
        with open_image(damaged(*changes), "qed", check=True) as image:
            assert checked(image).corruptions == 1
            assert checked(image, "all").corruptions == 1


def test_leaks_at_the_end_are_cut_off() -> None:
    memory = damaged()
    size = memory.size
    memory.resize(size + 3 * 4096 + 100)
    with open_image(memory, "qed", check=True) as image:
        assert checked(image).leaks == 3
        found = checked(image, "leaks")
        assert (found.leaks, found.leaks_fixed) == (0, 3)
        image.write(MIB, b"new" * 5000)
        image.flush()
        assert checked(image)[:3] == (0, 0, 0)
    assert memory.size == size + 4 * 4096


# -- backing files, size, creation ----------------------------------------------------------------


def test_another_backing_file(tmp_path: Path) -> None:
    for name in ("a.raw", "b.raw"):
        (tmp_path / name).write_bytes(name[:1].encode() * MIB)
    top = str(tmp_path / "top.qed")
    byre.create(top, "qed", options={"backing_file": "a.raw", "backing_fmt": "raw", **SMALL})
    with byre.open(top, read_only=False, backing=False) as image:
        image.node.change_backing("b.raw", "raw")  # type: ignore[attr-defined]
        with pytest.raises(NoSpace, match="1024 bytes"):
            image.node.change_backing("x" * 1024, "raw")  # type: ignore[attr-defined]
    with byre.open(top) as image:
        assert image.read(0, 5) == b"bbbbb"
    with byre.open(top, read_only=False, backing=False) as image:
        image.node.change_backing("b.raw", "qcow2")  # type: ignore[attr-defined]
        image.node.change_backing("", "")  # type: ignore[attr-defined]
    with byre.open(top) as image:
        assert image.read(0, 5) == bytes(5)
    header = layout.decode_header(Path(top).read_bytes()[:64])
    assert (header.features, header.backing_size) == (0, 0)


def test_commit_goes_into_a_probed_base(tmp_path: Path) -> None:
    from byre.cli.main import main

    base, top = str(tmp_path / "base.qed"), str(tmp_path / "top.qed")
    byre.create(base, "qed", MIB)
    byre.create(top, "qed", options={"backing_file": "base.qed", "backing_fmt": "qed"})
    with byre.open(top, read_only=False) as image:
        assert not image.graph.warnings
        image.write(5000, b"up")
    assert main(["commit", "-q", top]) == 0
    with byre.open(base) as image:
        assert image.read(5000, 2) == b"up"


def test_growing_hides_what_lies_below() -> None:
    base = MemoryNode(b"b" * MIB)
    top = new_image("qed", 300 * 512, backing_file="base", backing_fmt="raw", **SMALL)
    graph = Graph()
    with open_image(top, "qed", graph=graph, backing=layer(graph, base, "raw")) as image:
        image.write(1000, b"x")
        image.resize(MIB + 512)
        assert image.read(0, MIB + 512) == (b"b" * 1000 + b"x" + b"b" * (300 * 512 - 1001)).ljust(MIB + 512, b"\0")
        with pytest.raises(NotSupported, match="shrink"):
            image.resize(512, shrink=True)
        with pytest.raises(InvalidArgument, match="allowed are multiples"):
            image.resize(1 << 40)
    assert header_of(top).size == MIB + 512


def test_creation_refuses() -> None:
    for options in ({"cluster_size": 2048}, {"cluster_size": 1 << 27}, {"table_size": 3}, {"backing_file": "x" * 1024},
                    {"cluster_size": 1 << 26, "table_size": 16}):  # fmt: skip
        with pytest.raises(InvalidArgument):
            new_image("qed", MIB, **options)
    with pytest.raises(InvalidArgument, match="disk size"):
        new_image("qed", 1 << 40, **SMALL)


def test_failures_leave_nothing_behind() -> None:
    """The n-th request below fails, for n = 1, 2, ...: the image is usable, or out of service and sound on disk."""
    for kind in ("write", "flush", "any"):
        for number in range(1, 40):
            memory, fault = new_image("qed", MIB, **SMALL), FaultNode()
            image = open_image(memory, "qed", filters=[fault])
            fault.fail(kind, number)
            failed = False
            try:
                image.write(1000, b"a" * 10_000)
                image.flush()
                image.write(60_000, b"b" * 5000)
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
            with open_image(memory, "qed") as image:
                assert checked(image).corruptions == 0
            if not failed:
                break
