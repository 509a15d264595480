"""Aligned access over something that insists on it, against a bytearray."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import pytest

from byre.io.align import AlignedAccess
from byre.io.buffers import address_of


class Strict:
    """Takes aligned requests only."""

    def __init__(self, size: int, alignment: int, memory_alignment: int) -> None:
        self.content = bytearray(size)
        self.alignment = alignment
        self.memory_alignment = memory_alignment
        self.delay = 0.0
        self.tails = 0

    def check(self, offset: int, buffer: memoryview) -> None:
        assert offset % self.alignment == 0
        assert len(buffer) % self.alignment == 0
        assert address_of(buffer) % self.memory_alignment == 0

    def read(self, offset: int, buffer: memoryview) -> None:
        self.check(offset, buffer)
        part = self.content[offset : offset + len(buffer)]
        time.sleep(self.delay)
        buffer[:] = part.ljust(len(buffer), b"\0")

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            self.check(offset, buffer)
            self.put(offset, buffer)
            offset += len(buffer)

    def put(self, offset: int, buffer: memoryview) -> None:
        time.sleep(self.delay)
        self.content.extend(bytes(max(0, offset + len(buffer) - len(self.content))))
        self.content[offset : offset + len(buffer)] = buffer

    def write_tail(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.tails += 1
        for buffer in buffers:
            self.put(offset, buffer)
            offset += len(buffer)

    def access(self, *, tail: bool) -> AlignedAccess:
        return AlignedAccess(
            self.alignment,
            self.memory_alignment,
            self.read,
            self.write,
            end=lambda: len(self.content),
            write_tail=self.write_tail if tail else None,
        )


@pytest.mark.parametrize(("alignment", "memory"), [(512, 1), (512, 512), (4096, 4096), (1 << 21, 1)])
@pytest.mark.parametrize("tail", [True, False])
def test_any_range_gives_the_same_bytes(alignment: int, memory: int, tail: bool) -> None:
    source = random.Random(alignment + memory)
    size = 3 * alignment + 77 if tail else 4 * alignment
    strict = Strict(size, alignment, memory)
    access = strict.access(tail=tail)
    model = bytearray(size)
    for _ in range(200 if alignment < 10_000 else 20):
        offset, length = source.randrange(5 * alignment), source.choice([0, 1, 100, alignment, 3 * alignment + 1])
        if source.random() < 0.3:
            offset -= offset % alignment
        if source.random() < 0.5:
            buffer = bytearray(length)
            access.read_into(offset, memoryview(buffer))
            assert buffer == model[offset : offset + length].ljust(length, b"\0")
        else:
            data = source.randbytes(length)
            cut = length // 3
            access.writev_from(offset, [memoryview(data)[:cut], memoryview(data)[cut:cut], memoryview(data)[cut:]])
            if length:
                model.extend(bytes(max(0, offset + length - len(model))))
                model[offset : offset + length] = data
        if tail:
            assert len(strict.content) == len(model)
        assert strict.content[: len(model)] == model


def test_writers_of_one_block_wait_for_each_other() -> None:
    strict = Strict(8192, 4096, 1)
    strict.delay = 0.005
    access = strict.access(tail=True)
    writers = [(index * 1000, b"x" * 1000) for index in range(8)] + [(0, b"")]
    threads = [
        threading.Thread(target=access.writev_from, args=(offset, [memoryview(data)])) for offset, data in writers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert strict.content == b"x" * 8000 + bytes(192)


def test_an_aligned_write_is_not_undone_by_a_partial_one() -> None:
    for _ in range(5):
        strict = Strict(4096, 4096, 1)
        strict.delay = 0.003
        access = strict.access(tail=True)
        partial = threading.Thread(target=access.writev_from, args=(100, [memoryview(b"p" * 10)]))
        whole = threading.Thread(target=access.writev_from, args=(0, [memoryview(b"w" * 4096)]))
        partial.start()
        time.sleep(0.001)
        whole.start()
        partial.join()
        whole.join()
        assert strict.content[:100] + strict.content[110:] == b"w" * 4086
        assert strict.content[100:110] in (b"p" * 10, b"w" * 10)


def test_aligned_writes_go_on_side_by_side() -> None:
    strict = Strict(8192, 4096, 1)
    access = strict.access(tail=True)
    meeting = threading.Barrier(2, timeout=5)

    def put(offset: int, buffer: memoryview) -> None:
        meeting.wait()

    strict.put = put  # type: ignore[method-assign]
    threads = [
        threading.Thread(target=access.writev_from, args=(offset, [memoryview(bytes(4096))])) for offset in (0, 4096)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not meeting.broken


def test_a_failed_request_leaves_no_claim() -> None:
    strict = Strict(8192, 4096, 1)
    access = strict.access(tail=True)

    def fail(offset: int, buffer: memoryview) -> None:
        raise OSError("broken")

    put, strict.put = strict.put, fail  # type: ignore[method-assign]
    for offset, length in ((0, 4096), (5, 10), (8190, 10)):
        with pytest.raises(OSError, match="broken"):
            access.writev_from(offset, [memoryview(bytes(length))])
    strict.put = put  # type: ignore[method-assign]
    access.writev_from(5, [memoryview(b"later")])
    assert strict.content[5:10] == b"later"
