"""Copy-on-read: what was read is in the active layer afterwards, nothing else is, and nobody's write is lost."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, InvalidArgument, IOFailure, NotFound, ReadOnly
from byre.filters.faults import FaultNode
from byre.graph import chain
from byre.graph.graph import Graph
from byre.graph.populate import populate
from byre.image import Image
from byre.io.extent import UNALLOCATED, ZERO
from byre.protocols.memory import MemoryNode
from contracts.node import patchwork, run_threads
from support.chains import Layer, content, make_chain, make_layer
from support.images import layer, new_image, open_image, stack
from support.walk import walk

K = 1024
SIZE = 1 << 20
VARIANTS = [{}, {"cluster_size": 512}, {"extended_l2": True}, {"compat": "0.10"}, {"cluster_size": 2 << 20}]


def held(node: object, offset: int = 0, length: int = SIZE) -> int:
    """Bytes that the top layer holds."""
    layers = chain.layers(node)  # type: ignore[arg-type]
    base = layers[1] if len(layers) > 1 else None
    found = chain.extents(layers[0], offset, length, base=base)
    return length - found.bytes_of(UNALLOCATED)


def two_layers(base: bytes, *, copy: bool = True, **options: object) -> tuple[Image, MemoryNode]:
    """An empty overlay over ``base`` with copy-on-read."""
    top = new_image("qcow2", len(base), backing_file="base", backing_fmt="raw", **options)
    graph = Graph()
    image = open_image(top, graph=graph, backing=layer(graph, MemoryNode(base), "raw"), copy_on_read=copy)
    return image, top


@pytest.mark.parametrize(
    "options",
    [{}, {"cluster_size": 512}, {"extended_l2": True}, {"compat": "0.10"}, {"cluster_size": 2 << 20}],
    ids=str,
)
def test_what_was_read_is_there_and_reads_the_same(options: dict[str, object]) -> None:
    data = patchwork(SIZE, 11)
    image, top = two_layers(data, **options)
    chooser = random.Random(5)
    with image:
        for _ in range(12):
            offset = chooser.randrange(SIZE)
            length = min(chooser.choice((1, 511, 4096, 100_000)), SIZE - offset)
            assert image.read(offset, length) == data[offset : offset + length]
            assert held(image.node, offset, length) == length
        assert image.read(0, SIZE) == data
        assert held(image.node) == SIZE
    assert walk(top.to_bytes()) == ([], [], [])
    with open_image(top, backing=None, options={"backing": ""}) as alone:
        assert alone.read(0, SIZE) == data


def test_only_whole_units_around_the_read() -> None:
    image, _ = two_layers(b"\xaa" * SIZE, extended_l2=True)
    with image:
        image.read(30 * K, 4 * K)
        assert held(image.node, 0, 64 * K) == 4 * K


def test_zeroes_are_kept_as_zero_clusters() -> None:
    image, top = two_layers(bytes(512 * K) + b"x" * (512 * K))
    before = len(top.to_bytes())
    with image:
        assert not any(image.read(0, 512 * K))
        found = chain.layers(image.node)[0].block_status(0, 512 * K)
        assert (found.kind, found.length) == (ZERO, 512 * K)
    assert len(top.to_bytes()) <= before + 2 * 65536  # a mapping table, no data


def test_dirty_bitmaps_do_not_see_it() -> None:
    image, _ = two_layers(patchwork(SIZE, 3), copy=False)
    with image:
        bitmap = image.node.bitmap_store().add("b", persistent=False)  # type: ignore[attr-defined]
        image.node.populate(0, SIZE)
        assert held(image.node) == SIZE
        assert bitmap.dirty_bytes == 0


def test_a_read_only_image_is_refused(tmp_path: Path) -> None:
    name = str(tmp_path / "a.qcow2")
    byre.create(name, "qcow2", SIZE)
    with pytest.raises(InvalidArgument, match="Can't use copy-on-read on read-only device"):
        byre.open(name, copy_on_read=True)
    with pytest.raises(InvalidArgument, match="read-only device"):
        byre.open({"driver": "copy-on-read", "file": {"driver": "qcow2", "file": name}})
    with byre.open(name, copy_on_read=True, read_only=False) as image:
        with pytest.raises(InvalidArgument, match="read-only device"):
            image.reopen(read_only=True)
        assert image.read(0, 10) == bytes(10)
    with byre.open(name) as image, pytest.raises(ReadOnly):
        image.node.populate(0, 10)


class TestBottom:
    """base (raw) <- middle <- top; the names of the layers are b, m and t."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        byre.create("b", "raw", SIZE)
        byre.create("m", "qcow2", SIZE, options={"backing_file": "b", "backing_fmt": "raw"})
        byre.create("t", "qcow2", SIZE, options={"backing_file": "m", "backing_fmt": "qcow2"})
        with byre.open("b", format="raw", read_only=False) as image:
            image.write(0, b"b" * SIZE)
        with byre.open("m", read_only=False) as image:
            image.write(128 * K, b"m" * 64 * K)
        return tmp_path

    @staticmethod
    def spec(bottom: str) -> dict[str, object]:
        backing = {"driver": "qcow2", "node-name": "m", "file": "m",
                   "backing": {"driver": "raw", "node-name": "b", "file": "b"}}  # fmt: skip
        top = {"driver": "qcow2", "node-name": "t", "file": "t", "backing": backing}
        return {"driver": "copy-on-read", "file": top, "bottom": bottom}

    def test_only_from_the_layers_down_to_it(self, folder: Path) -> None:
        with byre.open(self.spec("m"), read_only=False) as image:
            assert image.read(0, SIZE) == b"b" * 128 * K + b"m" * 64 * K + b"b" * (SIZE - 192 * K)
            assert held(image.node) == 64 * K
            assert held(image.node, 128 * K, 64 * K) == 64 * K

    def test_the_lowest_layer(self, folder: Path) -> None:
        with byre.open(self.spec("b"), read_only=False) as image:
            image.read(0, SIZE)
            assert held(image.node) == SIZE

    def test_a_name_that_the_chain_does_not_have(self, folder: Path) -> None:
        with pytest.raises(NotFound, match="Bottom node 'x' not found"):
            byre.open(self.spec("x"), read_only=False)

    def test_the_chain_stays_as_it_is_down_to_there(self, folder: Path) -> None:
        from byre.graph.live import set_backing

        with byre.open(self.spec("b"), read_only=False) as image:
            top = chain.layers(image.node)[0]
            with pytest.raises(ByreError, match="copy-on-read"):
                set_backing(image.graph, top, None)


def test_writers_at_the_same_time_win() -> None:
    """Readers copy what writers are just writing over; what was written stays."""
    data = patchwork(SIZE, 21)
    image, top = two_layers(data, cluster_size=4096)
    writers = 3

    def work(index: int) -> None:
        chooser = random.Random(index)
        if index < writers:
            for slot in range(index, SIZE // 1000, writers):
                if slot % 2:
                    image.write(slot * 1000, bytes((slot % 251,)) * 1000)
        else:
            for _ in range(60):
                offset = chooser.randrange(SIZE - 70_000)
                image.read(offset, chooser.choice((1000, 5000, 70_000)))

    with image:
        run_threads(work, 6)
        expected = bytearray(data)
        for slot in range(SIZE // 1000):
            if slot % 2:
                expected[slot * 1000 : slot * 1000 + 1000] = bytes((slot % 251,)) * 1000
        assert image.read(0, SIZE) == expected
        node = chain.layers(image.node)[0]
        assert (node.inflight.claim_count, node.inflight.ticket_count) == (0, 0)  # type: ignore[attr-defined]
    assert walk(top.to_bytes()) == ([], [], [])


def test_a_writer_waits_for_the_copy_of_its_cluster_and_is_not_overwritten() -> None:
    graph = Graph()
    base, top = MemoryNode(b"b" * SIZE), new_image("qcow2", SIZE, backing_file="base", backing_fmt="raw")
    gate = FaultNode(name="gate")
    stack(graph, base, [gate])
    backing = {"driver": "raw", "file": "gate"}
    with open_image(top, graph=graph, backing=backing, copy_on_read=True) as image:
        gate.set_breakpoint("read_aio", "held")
        reader = threading.Thread(target=lambda: image.read(0, 4 * K), daemon=True)
        reader.start()
        assert gate.wait_suspended("held", 10)
        writer = threading.Thread(target=lambda: image.write(1000, b"w" * 1000), daemon=True)
        writer.start()
        image.write(128 * K, b"elsewhere")  # other clusters are not held up
        writer.join(0.1)
        assert writer.is_alive()
        gate.resume("held")
        for thread in (reader, writer):
            thread.join(10)
            assert not thread.is_alive()
        assert image.read(0, 4 * K) == b"b" * 1000 + b"w" * 1000 + b"b" * (4 * K - 2000)


@pytest.mark.parametrize("where", ["file", "base"])
def test_every_request_below_fails_once(where: str) -> None:
    """The read may fail; content and structure stay right, and it succeeds the next time."""
    data = patchwork(512 * K, 8)
    nth = 0
    while True:
        nth += 1
        fault = FaultNode(name="fault")
        graph = Graph()
        base = MemoryNode(data)
        top = new_image("qcow2", len(data), backing_file="base", backing_fmt="raw", cluster_size=16 * K)
        filters = [fault] if where == "file" else []
        stack(graph, base, [] if filters else [fault])
        backing = {"driver": "raw", "file": base.name if filters else "fault"}
        image = open_image(top, graph=graph, filters=filters, backing=backing, copy_on_read=True)
        fault.fail("any" if where == "base" else "write", nth)
        try:
            for offset in range(0, len(data), 100_000):
                image.read(offset, min(100_000, len(data) - offset))
            image.flush()
        except IOFailure:
            pass
        happened = not fault.pending_failures
        fault.heal()
        try:
            image.close()
        except IOFailure:
            pass
        problems = walk(top.to_bytes())
        assert problems[0] == [], problems
        graph = Graph()
        with open_image(top, graph=graph, backing=layer(graph, MemoryNode(data), "raw")) as again:
            assert again.read(0, len(data)) == data
        if not happened:
            assert nth > 5
            return


@pytest.mark.parametrize("seed", range(8))
def test_populate_random_chains(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers above a base, copied up in pieces: the disk stays, and the base is needed only where it shows."""
    monkeypatch.chdir(tmp_path)
    chooser = random.Random(seed)
    layers: list[Layer] = make_chain(chooser, "layer", chooser.randrange(2, 5))
    top = make_layer(chooser, "top", layers[-1])
    expected = content(top)
    keep = chooser.randrange(len(layers) + 1)  # layers that stay below
    with byre.open("top", format="qcow2", read_only=False) as image:
        nodes = chain.layers(image.node)
        base = nodes[len(nodes) - keep] if keep else None
        above = chain.extents(image.node, 0, image.size, base=base)
        for _ in range(5):
            offset = chooser.randrange(image.size)
            image.node.populate(offset, min(300_000, image.size - offset), base=base)
        populate(nodes[0], 0, image.size, base=base)  # type: ignore[arg-type]
        assert populate(nodes[0], 0, image.size, base=base) == 0  # type: ignore[arg-type]
        assert image.read(0, image.size) == expected
        own = chain.extents(nodes[0], 0, image.size, base=nodes[1])
        for extent in above:
            if extent.kind != UNALLOCATED:
                inside = own.clip(extent.offset, extent.length)
                missing = [row for row in inside if row.kind == UNALLOCATED]
                # Version 2 has no zero clusters to say so with, and needs none where no layer shows through.
                assert not missing, (extent, missing)
    assert content(top) == expected
    with open("top", "rb") as file:
        assert walk(file.read()) == ([], [], [])
