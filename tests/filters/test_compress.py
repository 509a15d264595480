"""The compress filter: what is written is stored compressed, whatever its boundaries, and reads the same."""

from __future__ import annotations

import random

import pytest

import byre
from byre.errors import IOFailure, NotSupported
from byre.filters.compress import CompressNode
from byre.filters.faults import FaultNode
from byre.graph.graph import Graph
from byre.image import Image
from byre.io.extent import COMPRESSED, DATA
from byre.protocols.memory import MemoryNode
from contracts.node import run_threads
from support.images import layer, new_image, open_image, stack
from support.walk import walk

SIZE = (1 << 20) + 512


def compressed(memory: MemoryNode, fault: FaultNode | None = None) -> Image:
    graph = Graph()
    lower = open_image(memory, graph=graph, filters=[fault] if fault else [])
    node = CompressNode()
    graph.add(node)
    node.filename = "memory"
    graph.attach(node, "file", lower.node, "filtered")
    image = Image(node, graph, read_only=False)
    lower.close()
    return image


def text(offset: int, length: int) -> bytes:
    """Bytes that shrink, different everywhere."""
    line = b"%08d the quick brown fox jumps over the lazy dog\n"
    size = len(line % 0)
    first = offset // size
    lines = b"".join(line % index for index in range(first, (offset + length) // size + 1))
    return lines[offset - first * size :][:length]


@pytest.mark.parametrize("options", [{}, {"cluster_size": 512}, {"compression_type": "zstd"}], ids=str)
def test_a_disk_in_pieces(options: dict[str, object]) -> None:
    memory = new_image("qcow2", SIZE, **options)
    with compressed(memory) as image:
        offset = 0
        chooser = random.Random(1)
        while offset < SIZE:
            length = min(chooser.choice((1, 3000, 65536, 200_000)), SIZE - offset)
            image.write(offset, text(offset, length), fua=length == 3000)
            offset += length
        assert image.read(0, SIZE) == text(0, SIZE)
        kinds = {row.kind for row in image.extents()}
        assert COMPRESSED in kinds
        if "cluster_size" not in options:
            assert kinds == {COMPRESSED}
    assert walk(memory.to_bytes()) == ([], [], [])
    with open_image(memory) as image:
        assert image.read(0, SIZE) == text(0, SIZE)


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    noise = random.Random(2).randbytes(65536)
    with compressed(new_image("qcow2", SIZE)) as image:
        data = text(0, 131_072) + noise + text(0, 65536) + noise
        image.write(0, data)
        assert [(row.offset, row.kind) for row in image.extents(0, len(data))] == [
            (0, COMPRESSED), (65536, COMPRESSED), (131_072, DATA), (196_608, COMPRESSED), (262_144, DATA)
        ]  # fmt: skip
        assert image.read(0, len(data)) == data


def test_the_rest_of_a_cluster_comes_from_the_backing_file() -> None:
    graph = Graph()
    top = new_image("qcow2", SIZE, backing_file="base", backing_fmt="raw")
    lower = open_image(top, graph=graph, backing=layer(graph, MemoryNode(b"base" * (SIZE // 4)), "raw"))
    node = CompressNode()
    graph.add(node)
    graph.attach(node, "file", lower.node, "filtered")
    with lower, Image(node, graph, read_only=False) as image:
        image.write(1000, b"new")
        assert image.read(0, 65536) == (b"base" * 250 + b"new" + (b"base" * 16134)[3:])[:65536]
        assert next(iter(image.extents(0, 65536))).kind == COMPRESSED


def test_neighbours_in_one_cluster_do_not_lose_each_others_writes() -> None:
    memory = new_image("qcow2", SIZE)
    with compressed(memory) as image:

        def work(index: int) -> None:
            for slot in range(index, 400, 5):
                if slot % 7 == 0:
                    image.write_zeroes(slot * 1000, 1000)
                else:
                    image.write(slot * 1000, bytes((slot % 251,)) * 1000)

        run_threads(work, 5)
        for slot in range(400):
            byte = 0 if slot % 7 == 0 else slot % 251
            assert image.read(slot * 1000, 1000) == bytes((byte,)) * 1000
    assert walk(memory.to_bytes()) == ([], [], [])


def test_every_write_below_fails_once() -> None:
    nth = 0
    while True:
        nth += 1
        fault = FaultNode()
        memory = new_image("qcow2", SIZE)
        image = compressed(memory, fault)
        image.write(0, b"before" * 30_000)
        image.flush()
        fault.fail("write", nth)
        try:
            image.write(10_000, text(0, 150_000))
            image.flush()
        except IOFailure:
            pass
        happened = not fault.pending_failures
        fault.heal()
        try:
            image.close()
        except IOFailure:
            pass
        assert walk(memory.to_bytes())[0] == []
        with open_image(memory) as image:
            assert image.read(0, 10_000) == (b"before" * 30_000)[:10_000]
            assert image.read(160_000, 20_000) == (b"before" * 30_000)[160_000:180_000]
        if not happened:
            assert nth > 2
            return


def test_formats_without_compression_are_refused() -> None:
    graph = Graph()
    stack(graph, MemoryNode(bytes(SIZE)))
    name = next(iter(graph.nodes))
    with pytest.raises(NotSupported, match="Compression is not supported for underlying format: raw"):
        byre.open({"driver": "compress", "file": {"driver": "raw", "file": name}}, read_only=False, graph=graph)
    assert list(graph.nodes) == [name]


def test_through_filters_that_do_not_mind() -> None:
    """Throttled and copied-on-read images can be written compressed, and are throttled; others say that they cannot."""
    from byre.filters.throttle import ThrottleNode
    from byre.filters.throttle_group import WRITE, ThrottleGroup
    from byre.formats.abilities import HasCompression

    group = ThrottleGroup("g", {"bps-write": 10**6})
    graph = Graph()
    with open_image(new_image("qcow2", SIZE), graph=graph, copy_on_read=True) as lower:
        throttle = ThrottleNode(group)
        graph.add(throttle)
        graph.attach(throttle, "file", lower.node, "filtered")
        with Image(throttle, graph, read_only=False) as image:
            assert isinstance(image.node, HasCompression)
            image.write_compressed(0, text(0, 65536))
            image.write_compressed_clusters(65536, [image.node.compress(memoryview(text(0, 65536))) or b""] * 4)
            assert {row.kind for row in image.extents(0, 5 * 65536)} == {COMPRESSED}
            assert image.read(65536, 65536) == text(0, 65536)
            with group._lock:
                assert group._delay(WRITE) > 0.1
    graph = Graph()
    throttle = ThrottleNode(group)
    stack(graph, MemoryNode(bytes(SIZE)), [throttle])
    with Image(throttle, graph, read_only=False) as image, pytest.raises(NotSupported, match="compressed"):
        image.write_compressed(0, bytes(65536))
