"""Asynchronous direct reads by the kernel: what is submitted ends with its bytes, or its error."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from byre.io.kernelaio import KernelAio

BLOCK = 4096
COUNT = 64


@pytest.fixture
def aio() -> Iterator[KernelAio]:
    try:
        queue = KernelAio(16)
    except OSError as error:
        pytest.skip(f"the system allows no asynchronous I/O: {error}")
    yield queue
    queue.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    content = random.Random(1).randbytes(BLOCK * COUNT)
    path = tmp_path / "disk"
    path.write_bytes(content)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"no direct I/O here: {error}")
    yield fd, content
    os.close(fd)


def test_reads_end_with_their_bytes(aio: KernelAio, disk: tuple[int, bytes]) -> None:
    fd, content = disk
    with mmap.mmap(-1, BLOCK * 16) as memory:
        first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(first)
        wanted = list(range(COUNT))
        under_way: dict[int, int] = {}
        free = list(range(16))
        while wanted or under_way:
            batch = []
            while wanted and free:
                slot, block = free.pop(), wanted.pop()
                under_way[slot] = block
                batch.append((slot, fd, block * BLOCK, address + slot * BLOCK, BLOCK))
            if batch:
                assert aio.submit(batch) == len(batch)
            for slot, result in aio.ended(5):
                assert result == BLOCK
                block = under_way.pop(slot)
                assert memory[slot * BLOCK : (slot + 1) * BLOCK] == content[block * BLOCK : (block + 1) * BLOCK]
                free.append(slot)
        del first


def test_the_end_of_the_file_and_what_cannot_be_read(aio: KernelAio, disk: tuple[int, bytes]) -> None:
    fd, _ = disk
    with mmap.mmap(-1, BLOCK * 2) as memory:
        first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(first)
        assert aio.submit([(7, fd, (COUNT - 1) * BLOCK, address, 2 * BLOCK)]) == 1
        assert aio.ended(5) == [(7, BLOCK)]
        assert aio.submit([(8, 10_000, 0, address, BLOCK)]) == 0  # no such descriptor
        if aio.submit([(9, fd, 1, address, BLOCK)]):  # not aligned: refused at once, or later
            assert aio.ended(5) == [(9, -errno.EINVAL)]
        del first


def test_nothing_ends_where_nothing_was_begun(aio: KernelAio) -> None:
    assert aio.ended(0.01) == []
