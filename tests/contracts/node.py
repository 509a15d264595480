"""What every node must do, as test classes: a driver's tests inherit one and give a factory.

``NodeContract`` reads, ``WritableContract`` changes, ``ProtocolContract``, ``FormatContract`` and
``FilterContract`` add what is special to their kind. Content is random in a patchwork of data, zeroes
and holes; requests begin and end anywhere.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from byre.errors import NotSupported, ReadOnly
from byre.formats.abilities import Checkable, HasCompression
from byre.formats.base import FormatNode
from byre.graph.child import Child
from byre.graph.node import PERM_ALL, PERM_READ, PERM_WRITE, Node
from byre.io.extent import DATA, FUA, MAY_UNMAP, NO_FALLBACK, UNALLOCATED, ZERO, Extent
from byre.io.extentmap import ExtentMap

SIZE = 1 << 20


def patchwork(size: int, seed: int = 1) -> bytes:
    """Runs of random bytes and of zeroes, of odd lengths."""
    chooser = random.Random(seed)
    parts: list[bytes] = []
    left = size
    while left:
        length = min(left, chooser.choice((1, 100, 511, 512, 4096, 5000, 65536, 70001)))
        parts.append(chooser.randbytes(length) if chooser.random() < 0.6 else bytes(length))
        left -= length
    return b"".join(parts)


def ranges(size: int, count: int, seed: int = 2) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` inside ``size``: some random, some at the ends and at powers of two."""
    chooser = random.Random(seed)
    yield from ((0, 0), (0, 1), (0, size), (size - 1, 1), (size, 0), (511, 2), (4095, 4098), (65535, 2))
    for _ in range(count):
        offset = chooser.randrange(size)
        yield offset, min(chooser.choice((1, 512, 3000, 65536, 200_000)), size - offset)


def read(node: Node, offset: int, length: int) -> bytes:
    data = bytearray(b"\xaa" * length)
    node.read_into(offset, memoryview(data))
    return bytes(data)


def write(node: Node, offset: int, data: bytes, flags: int = 0) -> None:
    node.write_from(offset, memoryview(data), flags)


def run_threads(work: Any, count: int) -> None:
    """``work(index)`` in ``count`` threads at once; the first failure is raised here."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def body(index: int) -> None:
        try:
            start.wait()
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=body, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a request hangs"
    if failures:
        raise failures[0]


class NodeContract:
    """A node of ``SIZE`` bytes (or what the factory makes) that holds known bytes.

    Subclasses define ``content`` (the bytes) and the fixture ``node``.
    """

    content: bytes = patchwork(SIZE)

    @pytest.fixture
    def node(self) -> Iterator[Node]:
        raise NotImplementedError

    def test_size(self, node: Node) -> None:
        assert node.size == len(self.content)

    def test_any_range_reads_what_is_there(self, node: Node) -> None:
        for offset, length in ranges(len(self.content), 30):
            assert read(node, offset, length) == self.content[offset : offset + length], (offset, length)

    def test_past_the_end_are_zeroes(self, node: Node) -> None:
        size = len(self.content)
        assert read(node, size - 100, 300) == self.content[-100:] + bytes(200)
        assert read(node, size, 10) == bytes(10)
        assert read(node, size + (1 << 30), 5000) == bytes(5000)

    def test_several_buffers(self, node: Node) -> None:
        buffers = [memoryview(bytearray(length)) for length in (1, 0, 511, 4096, 70000)]
        node.readv_into(1234, buffers)
        assert b"".join(buffers) == self.content[1234 : 1234 + sum(map(len, buffers))]

    def test_block_status_is_consecutive_and_tells_the_truth(self, node: Node) -> None:
        size = len(self.content)
        for start in (0, 1, 12345, size - 1):
            offset = start
            while offset < size:
                extent = node.block_status(offset, size - offset)
                assert extent.offset == offset
                assert 0 < extent.length <= size - offset
                if extent.kind == ZERO:
                    assert not any(self.content[offset : extent.end]), extent
                offset = extent.end

    def test_extents_say_what_block_status_says(self, node: Node) -> None:
        size = len(self.content)
        for offset, length in ((0, size), (1, size - 1), (70001, 300_000), (size - 5, 5)):
            rows: list[Extent] = []
            at = offset
            while at < offset + length:
                rows.append(node.block_status(at, offset + length - at))
                at = rows[-1].end
            same_map(ExtentMap.from_extents(rows).coalesced(), node.extents(offset, length), offset, length)

    def test_readers_at_the_same_time(self, node: Node) -> None:
        def work(index: int) -> None:
            for offset, length in ranges(len(self.content), 20, seed=index):
                assert read(node, offset, length) == self.content[offset : offset + length]

        run_threads(work, 4)


def same_map(expected: ExtentMap, found: ExtentMap, offset: int, length: int) -> None:
    """Both cover the range and say the same about every byte, however it is cut."""
    for one in (expected, found):
        assert int(one.offset[0]) == offset
        assert one.end == offset + length
        assert (one.offset[1:] == one.offset[:-1] + one.length[:-1]).all()
    assert list(expected.coalesced()) == list(found.coalesced())


class WritableContract(NodeContract):
    """A node that can be changed."""

    def test_writes_change_their_range_and_nothing_else(self, node: Node) -> None:
        expected = bytearray(self.content)
        chooser = random.Random(3)
        for offset, length in ranges(len(expected), 40, seed=4):
            data = chooser.randbytes(length)
            write(node, offset, data, FUA if length % 5 == 0 else 0)
            expected[offset : offset + length] = data
            around = slice(max(0, offset - 600), offset + length + 600)
            assert read(node, around.start, len(expected[around])) == expected[around]
        node.flush()
        assert read(node, 0, len(expected)) == expected

    def test_a_vectored_write(self, node: Node) -> None:
        buffers = [memoryview(bytes([index]) * length) for index, length in enumerate((1, 0, 513, 70000), 1)]
        node.writev_from(777, buffers, FUA)
        data = b"".join(buffers)
        assert read(node, 0, len(self.content)) == self.content[:777] + data + self.content[777 + len(data) :]

    @pytest.mark.parametrize("flags", [0, FUA, MAY_UNMAP, MAY_UNMAP | FUA, NO_FALLBACK, NO_FALLBACK | MAY_UNMAP])
    def test_zeroes(self, node: Node, flags: int) -> None:
        expected = bytearray(self.content)
        for offset, length in ranges(len(expected), 20, seed=flags):
            try:
                node.write_zeroes(offset, length, flags)
                expected[offset : offset + length] = bytes(length)
            except NotSupported:
                # A refusal may come half way: each byte is as before, or zero.
                assert flags & NO_FALLBACK
                found = read(node, offset, length)
                assert all(new in (old, 0) for new, old in zip(found, expected[offset : offset + length], strict=True))
                expected[offset : offset + length] = found
            around = slice(max(0, offset - 600), offset + length + 600)
            assert read(node, around.start, len(expected[around])) == expected[around]
        assert read(node, 0, len(expected)) == expected

    def test_a_discard_touches_nothing_outside(self, node: Node) -> None:
        size = len(self.content)
        node.discard(100_001, 500_000)
        assert read(node, 0, 100_001) == self.content[:100_001]
        assert read(node, 600_001, size - 600_001) == self.content[600_001:]
        once = read(node, 0, size)
        assert read(node, 0, size) == once
        write(node, 200_000, b"again" * 1000)
        assert read(node, 199_999, 5002) == once[199_999:200_000] + b"again" * 1000 + once[205_000:205_001]

    def test_growth_reads_as_zeroes_and_what_was_cut_off_does_not_come_back(self, node: Node) -> None:
        size = len(self.content)
        try:
            node.resize(size + 100_352)
        except NotSupported:
            return
        assert node.size == size + 100_352
        assert read(node, 0, size + 100_352) == self.content + bytes(100_352)
        cut = 300_032
        try:
            node.resize(cut)
        except NotSupported:
            return
        assert node.size == cut
        node.resize(size)
        assert read(node, 0, size) == self.content[:cut] + bytes(size - cut)

    def test_read_only_refuses(self, node: Node) -> None:
        node.flush()
        node.read_only = True
        for change in (lambda: write(node, 0, b"x"), lambda: node.write_zeroes(0, 4096)):
            with pytest.raises(ReadOnly):
                change()
        node.read_only = False
        assert read(node, 0, len(self.content)) == self.content

    def test_writers_side_by_side(self, node: Node) -> None:
        """Each thread owns every fourth slot of 1000 bytes; neighbours share sectors and clusters."""
        slots = min(len(self.content) // 1000, 600)

        def work(index: int) -> None:
            for turn in (1, 2):
                for slot in range(index, slots, 4):
                    data = bytes([slot % 251, turn]) * 500
                    write(node, slot * 1000, data)
                    assert read(node, slot * 1000, 1000) == data

        run_threads(work, 4)
        expected = b"".join(bytes([slot % 251, 2]) * 500 for slot in range(slots))
        assert read(node, 0, slots * 1000) == expected
        assert read(node, slots * 1000, 1000) == self.content[slots * 1000 : slots * 1000 + 1000].ljust(1000, b"\0")


class ProtocolContract(WritableContract):
    """A leaf."""

    def test_it_is_a_leaf(self, node: Node) -> None:
        assert node.kind == "protocol"
        assert not node.children

    def test_a_write_past_the_end_grows_it(self, node: Node) -> None:
        size = len(self.content)
        write(node, size + 1000, b"far")
        assert node.size == size + 1003
        assert read(node, size - 1, 1004) == self.content[-1:] + bytes(1000) + b"far"

    def test_hosts_are_offsets(self, node: Node) -> None:
        for extent in node.extents(0, len(self.content)):
            assert extent.kind in (DATA, ZERO)
            assert extent.host in (extent.offset, -1)


class MappingContract(NodeContract):
    """What a format says of where its bytes lie."""

    def test_lookup_all_is_all_lookups(self, node: Node) -> None:
        if not isinstance(node, FormatNode):
            pytest.skip("no tables")
        size = len(self.content)
        for offset, length in ((0, size), (1, size - 2), (65_535, 70_000), (size - 1, 1)):
            rows: list[Extent] = []
            with node.lock:
                at = offset
                while at < offset + length:
                    part = node.lookup(at, offset + length - at)
                    assert part, "an empty answer"
                    assert all(one.end == two.offset for one, two in pairwise(part))
                    assert part[0].offset == at
                    rows += part
                    at = part[-1].end
                found = node.lookup_all(offset, length)
            same_map(ExtentMap.from_extents(rows), found, offset, length)

    def test_data_extents_point_to_the_bytes(self, node: Node) -> None:
        node.flush()
        for extent in node.extents(0, len(self.content)):
            if extent.kind == DATA and extent.host >= 0:
                source = node.sources[extent.source].node  # type: ignore[attr-defined]
                assert read(source, extent.host, extent.length) == self.content[extent.offset : extent.end]
            if extent.kind == UNALLOCATED and node.children.get("backing") is None:
                assert not any(self.content[extent.offset : extent.end])


class ReadOnlyFormatContract(MappingContract):
    """A format that is only read."""

    def test_it_refuses_to_be_changed(self, node: Node) -> None:
        assert node.read_only
        for change in (lambda: write(node, 0, b"x"), lambda: node.write_zeroes(0, 4096)):
            with pytest.raises(ReadOnly):
                change()
        node.flush()
        assert read(node, 0, len(self.content)) == self.content


class FormatContract(MappingContract, WritableContract):
    """A format; for those whose tables the engine works with, the mapping hooks as well."""

    def test_nothing_is_claimed_when_idle(self, node: Node) -> None:
        if not isinstance(node, FormatNode):
            pytest.skip("no claims")
        write(node, 1000, b"x" * 100_000)
        node.write_zeroes(5000, 100_000, MAY_UNMAP)
        node.discard(5000, 100_000)
        read(node, 0, len(self.content))
        assert node.inflight.claim_count == 0
        assert node.inflight.ticket_count == 0

    def test_what_it_cannot_do_it_says(self, node: Node) -> None:
        import byre

        if not isinstance(node, HasCompression):
            image = byre.Image(node, _graph_of(node), read_only=False)
            with pytest.raises(NotSupported, match="compressed"):
                image.write_compressed(0, bytes(65536))

    def test_check_finds_nothing(self, node: Node) -> None:
        if not isinstance(node, Checkable):
            pytest.skip("no check")
        from byre.jobs.job import Control

        write(node, 4000, b"y" * 100_000)
        node.flush()
        result = node.check(Control())
        assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.messages


def _graph_of(node: Node) -> Any:
    from byre.graph.graph import Graph

    graph = Graph()
    graph.nodes[node.name or "node"] = node
    return graph


class FilterContract(WritableContract):
    """A filter over one child, which it does not change."""

    def test_it_filters_one_child_called_file(self, node: Node) -> None:
        assert node.kind == "filter"
        assert node.children["file"].role == "filtered"
        assert node.size == node.children["file"].node.size
        assert node.filename == node.children["file"].node.filename

    def test_what_is_written_reaches_the_child(self, node: Node) -> None:
        write(node, 1000, b"through the filter")
        node.flush()
        assert read(node.children["file"].node, 990, 40)[10:28] == b"through the filter"

    def test_permissions_pass_through(self, node: Node) -> None:
        edge: Child = node.children["file"]
        used, shared = node.child_permissions(edge, PERM_READ | PERM_WRITE, PERM_ALL & ~PERM_WRITE)
        assert used & (PERM_READ | PERM_WRITE) == PERM_READ | PERM_WRITE
        assert not shared & PERM_WRITE
