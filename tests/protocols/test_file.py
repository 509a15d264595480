"""Regular files: bytes, length, holes, flushes, direct I/O, reopening."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
from pathlib import Path

import pytest

import byre
from byre.errors import (
    AccessDenied,
    ByreError,
    InvalidArgument,
    IOFailure,
    NoSpace,
    NotFound,
    NotSupported,
    ReadOnly,
)
from byre.graph.opening import OpenFlags
from byre.io.extent import DATA, FUA, MAY_UNMAP, NO_FALLBACK, NO_HOST, ZERO, Extent
from byre.protocols import file as file_module
from byre.protocols import filespace, vectors
from byre.protocols.file import FileNode

from .conftest import OpenFile, make, read

KIB = 1024
MIB = 1 << 20


def statuses(node: FileNode, offset: int, length: int) -> list[Extent]:
    rows = []
    end = offset + length
    while offset < end:
        rows.append(node.block_status(offset, end - offset))
        assert rows[-1].offset == offset
        assert rows[-1].length > 0
        offset = rows[-1].end
    return rows


# -- bytes ----------------------------------------------------------------------------------------


def test_reads_what_the_file_holds_and_zeroes_past_its_end(tmp_path: Path, open_file: OpenFile) -> None:
    node = open_file(make(tmp_path / "a", b"0123456789"), read_only=True)
    assert node.size == 10
    assert read(node, 2, 5) == b"23456"
    assert read(node, 8, 6) == b"89\0\0\0\0"
    assert read(node, 1 << 40, 4) == bytes(4)
    first, second = bytearray(3), bytearray(b"\xee" * 9)
    node.readv_into(4, [memoryview(first), memoryview(second)])
    assert bytes(first + second) == b"456789" + bytes(6)


def test_writes_anywhere_and_grows(tmp_path: Path, open_file: OpenFile) -> None:
    node = open_file(make(tmp_path / "a", b""))
    node.write_from(5, memoryview(b"hello"))
    node.writev_from(10, [memoryview(b" "), memoryview(b""), memoryview(b"world")], FUA)
    assert node.size == 16
    assert (tmp_path / "a").read_bytes() == bytes(5) + b"hello world"
    stats = node.stats.as_dict()
    assert stats["write"]["operations"] == 2
    assert stats["write"]["bytes"] == 11
    assert node.stats.highest_written == 16


def test_more_buffers_than_one_call_takes(tmp_path: Path, open_file: OpenFile) -> None:
    node = open_file(make(tmp_path / "a", b""))
    content = random.Random(1).randbytes(3000 * 7)
    parts = [memoryview(content)[i : i + 7] for i in range(0, len(content), 7)]
    node.writev_from(3, parts)
    assert (tmp_path / "a").read_bytes() == bytes(3) + content
    targets = [bytearray(7) for _ in range(3000)]
    node.readv_into(3, [memoryview(target) for target in targets])
    assert b"".join(targets) == content


def test_short_writes_are_continued(tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        flat = b"".join(bytes(buffer) for buffer in buffers)[:5]
        return os.pwrite(fd, flat, offset)

    monkeypatch.setattr(file_module, "pwritev", short)
    monkeypatch.setattr(vectors, "pwritev", short)
    node = open_file(make(tmp_path / "a", 100))
    node.write_from(10, memoryview(b"abcdefghijklm"))
    node.writev_from(40, [memoryview(b"abc"), memoryview(b"defghi"), memoryview(b"jklmnopq")])
    assert read(node, 10, 13) == b"abcdefghijklm"
    assert read(node, 40, 17) == b"abcdefghijklmnopq"


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoSpace), (errno.EIO, IOFailure)])
def test_failed_write_names_file_offset_and_length(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[ByreError]
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    node = open_file(make(tmp_path / "a", 100))
    monkeypatch.setattr(file_module, "pwritev", fail)
    monkeypatch.setattr(vectors, "pwritev", fail)
    for offset in (0, 4096):
        with pytest.raises(kind) as caught:
            node.write_from(offset, memoryview(b"x" * 10))
        assert str(tmp_path / "a") in str(caught.value)
        assert f"10 bytes at {offset:#x}" in str(caught.value)
        assert caught.value.errno == number
    assert node.size == 100
    assert node.stats.as_dict()["write"]["failed"] == 2


def test_offsets_beyond_the_system_are_errors(tmp_path: Path, open_file: OpenFile) -> None:
    node = open_file(make(tmp_path / "a", 100))
    buffer = memoryview(bytearray(10))
    for offset in (1 << 63, 1 << 70, (1 << 63) - 5):
        with pytest.raises(ByreError):
            node.write_from(offset, buffer)
        with pytest.raises(ByreError):
            node.write_zeroes(offset, 10, MAY_UNMAP)
    with pytest.raises(ByreError):
        node.read_into(1 << 70, buffer)
    with pytest.raises(ByreError):
        node.resize(1 << 64)
    assert node.size == 100


def test_read_only_refuses_changes(tmp_path: Path, open_file: OpenFile) -> None:
    node = open_file(make(tmp_path / "a", b"x" * 100), read_only=True)
    for change in (
        lambda: node.write_from(0, memoryview(b"y")),
        lambda: node.writev_from(0, [memoryview(b"y")]),
        lambda: node.write_zeroes(0, 10),
        lambda: node.discard(0, 10),
        lambda: node.resize(5),
    ):
        with pytest.raises(ReadOnly):
            change()
    node.flush()
    assert (tmp_path / "a").read_bytes() == b"x" * 100


def test_size_changed_from_outside_is_seen_on_request(tmp_path: Path, open_file: OpenFile) -> None:
    node = open_file(make(tmp_path / "a", 100))
    os.truncate(tmp_path / "a", 50)
    assert node.size == 100
    node.refresh_size()
    assert node.size == 50
    assert read(node, 40, 20) == bytes(20)


# -- flushing -------------------------------------------------------------------------------------


def test_flush_reaches_the_disk_once_per_change(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    node = open_file(make(tmp_path / "a", 100))
    node.flush()
    assert len(calls) == 0
    node.write_from(0, memoryview(b"x"))
    node.flush()
    node.flush()
    assert len(calls) == 1
    node.write_from(0, memoryview(b"x"), FUA)
    assert len(calls) == 2
    node.write_zeroes(0, 10, FUA)
    assert len(calls) == 3
    node.resize(200)
    node.flush()
    assert len(calls) == 4
    quiet = open_file(tmp_path / "a", no_flush=True)
    quiet.write_from(0, memoryview(b"x"), FUA)
    quiet.flush()
    assert len(calls) == 4


def test_a_failed_flush_is_never_forgotten(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    node = open_file(make(tmp_path / "a", 100))
    node.write_from(0, memoryview(b"x"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(IOFailure, match="cannot flush"):
            node.flush()
    with pytest.raises(IOFailure, match="earlier flush failed"):
        node.flush()
    with pytest.raises(IOFailure, match="earlier flush failed"):
        node.write_from(0, memoryview(b"x"), FUA)
    node.write_from(0, memoryview(b"y"))  # plain requests go on; only durability cannot be promised
    assert read(node, 0, 1) == b"y"


# -- zeroes, discards, holes ----------------------------------------------------------------------


def test_zeroing_keeps_or_returns_the_space(folder: Path, open_file: OpenFile) -> None:
    node = open_file(make(folder / "a", b"\xaa" * MIB))
    node.write_zeroes(0, 256 * KIB)
    assert node.allocated_size() >= MIB
    assert read(node, 0, MIB) == bytes(256 * KIB) + b"\xaa" * (768 * KIB)
    node.write_zeroes(512 * KIB, 256 * KIB, MAY_UNMAP)
    assert node.allocated_size() < MIB
    node.write_zeroes(1000, 100, MAY_UNMAP | FUA)
    node.write_zeroes(600 * KIB + 1, 400 * KIB)
    expected = bytes(256 * KIB) + b"\xaa" * (256 * KIB) + bytes(488 * KIB + 1) + b"\xaa" * (24 * KIB - 1)
    assert read(node, 0, MIB) == expected
    assert (folder / "a").read_bytes() == expected


@pytest.mark.parametrize("flags", [0, MAY_UNMAP, NO_FALLBACK])
def test_zeroing_past_the_end_grows(folder: Path, open_file: OpenFile, flags: int) -> None:
    node = open_file(make(folder / "a", b"\xaa" * 5000))
    node.write_zeroes(4000, 100_000, flags)
    assert node.size == 104_000 == (folder / "a").stat().st_size
    assert (folder / "a").read_bytes() == b"\xaa" * 4000 + bytes(100_000)
    node.write_zeroes(200_000, 7, flags)
    assert node.size == 200_007 == (folder / "a").stat().st_size


def test_zeroing_without_help_from_the_system(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(filespace.space, "fallocate", lambda *arguments: asked.append(arguments) or False)
    node = open_file(make(tmp_path / "a", b"\xaa" * (3 * MIB)))
    with pytest.raises(NotSupported):
        node.write_zeroes(0, MIB, NO_FALLBACK)
    count = len(asked)
    node.write_zeroes(100, 2 * MIB, MAY_UNMAP)
    node.write_zeroes(3 * MIB - 5, 10)
    node.discard(0, MIB)
    assert (tmp_path / "a").read_bytes() == b"\xaa" * 100 + bytes(2 * MIB) + b"\xaa" * (MIB - 105) + bytes(10)
    assert len(asked) == count, "a refused call must be remembered"


def test_discard_only_where_asked_for(folder: Path, open_file: OpenFile) -> None:
    path = make(folder / "a", b"\xaa" * MIB)
    ignoring = open_file(path, unmap=False)
    ignoring.discard(0, MIB)
    assert path.stat().st_blocks * 512 >= MIB
    ignoring.close()
    node = open_file(path, unmap=True)
    node.discard(512 * KIB, 10 * MIB)
    assert node.size == MIB
    assert path.stat().st_blocks * 512 < MIB
    assert read(node, 0, MIB) == b"\xaa" * (512 * KIB) + bytes(512 * KIB)


def test_holes_are_found(folder: Path, open_file: OpenFile) -> None:
    node = open_file(make(folder / "a", 64 * MIB))
    node.write_from(MIB, memoryview(b"x" * (128 * KIB)))
    node.write_from(10 * MIB, memoryview(b"x" * (64 * KIB)))
    expected = [
        Extent(0, MIB, ZERO, 0),
        Extent(MIB, 128 * KIB, DATA, MIB),
        Extent(MIB + 128 * KIB, 9 * MIB - 128 * KIB, ZERO, MIB + 128 * KIB),
        Extent(10 * MIB, 64 * KIB, DATA, 10 * MIB),
        Extent(10 * MIB + 64 * KIB, 54 * MIB - 64 * KIB, ZERO, 10 * MIB + 64 * KIB),
        Extent(64 * MIB, MIB, ZERO, NO_HOST),
    ]
    assert statuses(node, 0, 65 * MIB) == expected
    assert list(node.extents(0, 65 * MIB)) == expected
    assert list(node.extents(MIB + 5, 10)) == [Extent(MIB + 5, 10, DATA, MIB + 5)]
    assert list(node.extents(100 * MIB, 10)) == [Extent(100 * MIB, 10, ZERO)]


def test_map_follows_changes_by_this_node(folder: Path, open_file: OpenFile) -> None:
    node = open_file(make(folder / "a", b"\xaa" * MIB))
    assert node.block_status(0, MIB) == Extent(0, MIB, DATA, 0)
    node.write_zeroes(0, 64 * KIB, MAY_UNMAP)
    assert node.block_status(0, MIB) == Extent(0, 64 * KIB, ZERO, 0)
    node.write_from(0, memoryview(b"x" * (64 * KIB)))
    assert node.block_status(0, MIB).kind == DATA
    node.resize(128 * KIB)
    node.resize(MIB)
    assert statuses(node, 0, MIB)[-1] == Extent(128 * KIB, 896 * KIB, ZERO, 128 * KIB)


def test_everything_is_data_where_the_system_cannot_tell(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(fd: int, offset: int) -> None:
        asked.append(offset)
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(filespace.space, "next_data", refuse)
    node = open_file(make(tmp_path / "a", MIB))
    assert statuses(node, 0, MIB) == [Extent(0, MIB, DATA, 0)]
    assert list(node.extents(10, 2 * MIB)) == [Extent(10, MIB - 10, DATA, 10), Extent(MIB, MIB + 10, ZERO)]
    assert len(asked) == 1


def test_a_long_run_is_looked_for_once(tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    find = filespace.space.next_data
    monkeypatch.setattr(filespace.space, "next_data", lambda fd, offset: calls.append(offset) or find(fd, offset))
    node = open_file(make(tmp_path / "a", b"\xaa" * (4 * MIB)))
    for start in range(0, 4 * MIB, 64 * KIB):
        assert list(node.extents(start, 64 * KIB)) == [Extent(start, 64 * KIB, DATA, start)]
        assert node.block_status(start, 64 * KIB).kind == DATA
    assert calls == [0]


def test_of_two_flushes_at_once_none_hides_a_failure(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()
    results: list[str] = []

    def report_once(_: int) -> None:
        # As the system does: the first caller learns of the failure, the next is told that all is well.
        if not started.is_set():
            started.set()
            threading.Event().wait(0.05)
            raise OSError(errno.EIO, "")

    def flush() -> None:
        try:
            node.flush()
            results.append("fine")
        except IOFailure:
            results.append("failed")

    node = open_file(make(tmp_path / "a", 100))
    node.write_from(0, memoryview(b"x"))
    monkeypatch.setattr(os, "fdatasync", report_once)
    threads = [threading.Thread(target=flush) for _ in range(2)]
    threads[0].start()
    started.wait(5)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert results == ["failed", "failed"]


def test_a_flush_under_way_keeps_its_descriptor(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs flush ahead of a change of the graph, which may open the file anew."""
    started, results = threading.Event(), list[object]()
    sync = os.fdatasync

    def slow(fd: int) -> None:
        started.set()
        threading.Event().wait(0.05)
        sync(fd)

    def flush() -> None:
        try:
            node.flush()
            results.append("fine")
        except IOFailure as error:
            results.append(error)

    node = open_file(make(tmp_path / "a", 100))
    node.write_from(0, memoryview(b"x"))
    monkeypatch.setattr(os, "fdatasync", slow)
    thread = threading.Thread(target=flush)
    thread.start()
    assert started.wait(5)
    node.reopen_commit(node.reopen_prepare(node.open_flags._replace(read_only=True), node.runtime))
    thread.join(5)
    assert results == ["fine"]


# -- length ---------------------------------------------------------------------------------------


def test_resize_and_preallocation(tmp_path: Path, open_file: OpenFile) -> None:
    node = open_file(make(tmp_path / "a", b"\xaa" * 1000))
    node.resize(10 * MIB)
    assert node.size == 10 * MIB
    assert node.allocated_size() < MIB
    node.resize(11 * MIB, preallocation="falloc")
    node.resize(12 * MIB, preallocation="full")
    assert node.allocated_size() >= 2 * MIB
    assert read(node, 990, 20) == b"\xaa" * 10 + bytes(10)
    node.resize(500)
    assert node.size == 500 == (tmp_path / "a").stat().st_size
    node.resize(1000)
    assert read(node, 0, 1000) == b"\xaa" * 500 + bytes(500)
    with pytest.raises(InvalidArgument, match="shrinks"):
        node.resize(10, preallocation="full")
    with pytest.raises(NotSupported):
        node.resize(2000, preallocation="metadata")
    assert node.size == 1000
    assert node.has_zero_init


def test_failed_preallocation_restores_the_length(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, offset + length // 2)
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    node = open_file(make(tmp_path / "a", 1000))
    with pytest.raises(NoSpace, match="from 1000 to 9000"):
        node.resize(9000, preallocation="falloc")
    assert node.size == 1000 == (tmp_path / "a").stat().st_size


@pytest.mark.parametrize("direct", [False, True])
def test_growing_by_writes_and_by_length_at_once(tmp_path: Path, open_file: OpenFile, direct: bool) -> None:
    node = open_file(make(tmp_path / "a", b"\xaa" * 8192), direct=direct)
    block, count, workers = 4096, 60, 4
    errors: list[BaseException] = []

    def write(worker: int) -> None:
        try:
            for index in range(worker, count * workers, workers):
                node.write_from(8192 + index * block, memoryview(bytes([index % 255 + 1]) * block))
                # Beyond everything: grows the file by setting its length.
                node.write_zeroes((index + 1) * block + (64 << 20), block, MAY_UNMAP)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert node.size == (tmp_path / "a").stat().st_size
    for index in range(count * workers):
        assert read(node, 8192 + index * block, block) == bytes([index % 255 + 1]) * block


# -- direct I/O -----------------------------------------------------------------------------------


def direct_node(path: Path, open_file: OpenFile) -> FileNode:
    try:
        return open_file(path, direct=True)
    except NotSupported as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("size", [0, 1, 700, 4096, 100_000])
def test_direct_requests_of_any_alignment(folder: Path, open_file: OpenFile, size: int) -> None:
    source = random.Random(size)
    content = bytearray(source.randbytes(size))
    path = make(folder / "a", bytes(content))
    node = direct_node(path, open_file)
    assert node.limits.request_alignment in (512, 1024, 2048, 4096)
    for _ in range(150):
        offset, length = source.randrange(120_000), source.choice([1, 100, 512, 4096, 8192, 20_000])
        if source.random() < 0.5:
            offset -= offset % 512
        kind = source.random()
        if kind < 0.4:
            data = source.randbytes(length)
            content.extend(bytes(max(0, offset + length - len(content))))
            content[offset : offset + length] = data
            half = length // 3
            node.writev_from(offset, [memoryview(data)[:half], memoryview(data)[half:]], FUA * (kind < 0.01))
        elif kind < 0.5:
            content.extend(bytes(max(0, offset + length - len(content))))
            content[offset : offset + length] = bytes(length)
            node.write_zeroes(offset, length, source.choice([0, MAY_UNMAP]))
        else:
            assert read(node, offset, length) == bytes(content[offset : offset + length]).ljust(length, b"\0")
        assert node.size == len(content)
    node.flush()
    assert path.read_bytes() == bytes(content)


def test_direct_io_sees_whole_units_at_the_end(tmp_path: Path, open_file: OpenFile) -> None:
    node = direct_node(make(tmp_path / "a", b"\xaa" * 8191), open_file)
    assert [(extent.offset, extent.length, extent.kind) for extent in node.extents(0, 8192)] == [(0, 8192, DATA)]
    for offset in (0, 8190, 8191):
        assert node.block_status(offset, 8192 - offset)[:3] == (offset, 8192 - offset, DATA)
    assert bytes(read(node, 0, 8192)) == b"\xaa" * 8191 + b"\0"
    assert node.block_status(8192, 512).kind == ZERO
    hole = direct_node(make(tmp_path / "b", 8191), open_file)
    assert [(extent.length, extent.kind) for extent in hole.extents(0, 8192)] == [(8192, ZERO)]


def test_direct_neighbours_do_not_undo_each_other(tmp_path: Path, open_file: OpenFile) -> None:
    slot, slots, workers = 100, 300, 4
    path = make(tmp_path / "a", slot * slots + 33)
    node = direct_node(path, open_file)

    def write(worker: int) -> None:
        for value in (1, 2):
            for index in range(worker, slots, workers):
                node.write_from(index * slot, memoryview(bytes([value * 10 + worker]) * slot))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_bytes()
    assert len(content) == slot * slots + 33
    for index in range(slots):
        assert content[index * slot : (index + 1) * slot] == bytes([20 + index % workers]) * slot


def test_direct_io_refused_by_the_file_system(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_open = os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "")
        return system_open(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(NotSupported, match="O_DIRECT") as caught:
        open_file(make(tmp_path / "a", 100), direct=True)
    assert caught.value.errno == errno.EINVAL


# -- opening --------------------------------------------------------------------------------------


def test_what_cannot_hold_an_image_is_refused_at_once(tmp_path: Path, open_file: OpenFile) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.symlink("fifo", tmp_path / "link")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, what in (
            (tmp_path / "fifo", "FIFO"),
            (tmp_path / "link", "FIFO"),
            (tmp_path / "socket", "socket"),
            (tmp_path, "directory"),
            ("/dev/null", "character device"),
            ("/dev/tty", "character device"),
        ):
            for read_only in (True, False):
                with pytest.raises(InvalidArgument, match=what):
                    open_file(name, read_only=read_only)
    for name in ("/proc/version", "/proc/self/mem", "/sys/kernel/uevent_seqnum"):
        with pytest.raises(AccessDenied, match="kernel"):
            open_file(name, read_only=True)


def test_a_fifo_that_appears_between_look_and_open(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    regular = os.stat(make(tmp_path / "a", 10))
    system_stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: regular if "fifo" in str(path) else system_stat(path, **more))
    with pytest.raises(InvalidArgument, match="FIFO"):
        open_file(tmp_path / "fifo", read_only=True)


def test_an_image_may_not_name_descriptors(tmp_path: Path, open_file: OpenFile) -> None:
    with open(make(tmp_path / "a", 10), "rb") as stream:
        for folder in ("/proc/self/fd", "/dev/fd"):
            with pytest.raises(AccessDenied):
                open_file(f"{folder}/{stream.fileno()}", read_only=True, implicit=True)
        assert open_file(f"/dev/fd/{stream.fileno()}", read_only=True).size == 10


def test_errors_name_the_file(tmp_path: Path, open_file: OpenFile) -> None:
    with pytest.raises(NotFound, match=str(tmp_path / "missing")):
        open_file(tmp_path / "missing")
    with pytest.raises(InvalidArgument, match="zero byte"):
        open_file("a\0b")
    with pytest.raises(InvalidArgument, match="needs a filename"):
        open_file("")
    for driver in ("host_device", "host_cdrom"):
        with pytest.raises(InvalidArgument, match="needs a block or character device"):
            open_file(make(tmp_path / "a", 10), driver=driver)
    with pytest.raises(NotFound) as caught:
        open_file(tmp_path / "escape\x1b[31m")
    assert "\x1b" not in str(caught.value)


def test_read_only_where_writing_is_denied(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_open = os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return system_open(path, flags, *more)

    path = make(tmp_path / "a", 10)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ReadOnly):
        open_file(path)
    node = open_file(path, auto_read_only=True)
    assert node.read_only
    assert node.size == 10


def test_options_of_the_peer_are_accepted(tmp_path: Path, open_file: OpenFile) -> None:
    options: dict[str, object] = {
        "aio": "io_uring",
        "locking": "off",
        "drop-cache": True,
        "x-check-cache-dropped": "on",
    }
    assert open_file(make(tmp_path / "a", 10), options=options).filename == str(tmp_path / "a")
    with pytest.raises(InvalidArgument, match="aio"):
        open_file(tmp_path / "a", options={"aio": "fast"})


def test_nothing_stays_open(tmp_path: Path, open_file: OpenFile) -> None:
    make(tmp_path / "a", 10)
    before = len(os.listdir("/proc/self/fd"))
    node = open_file(tmp_path / "a", direct=True)
    node.write_from(3, memoryview(b"xyz"))
    node.reopen_abort(node.reopen_prepare(OpenFlags(read_only=True), node.runtime))
    node.reopen_commit(node.reopen_prepare(OpenFlags(read_only=True), node.runtime))
    node.close()
    node.close()
    with pytest.raises(ByreError):
        open_file(tmp_path / "a", driver="host_device")
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ByreError):
        read(node, 0, 1)


# -- reopening and copying ------------------------------------------------------------------------


def test_identity_tells_files_apart(tmp_path: Path, open_file: OpenFile) -> None:
    path = make(tmp_path / "a", 10)
    os.link(path, tmp_path / "hard")
    os.symlink(path, tmp_path / "soft")
    nodes = [open_file(tmp_path / name) for name in ("a", "hard", "soft")]
    assert len({node.identity for node in nodes}) == 1
    assert open_file(make(tmp_path / "other", 10)).identity != nodes[0].identity


def test_bulk_writes_occupy_what_they_wrote_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "bulk"
    path.write_bytes(b"")
    with byre.open(str(path), format="raw", read_only=False, resizable=True) as image:
        image.resize(8 << 20)
        image.node.children["file"].node.bulk_size = 256 << 10  # type: ignore[attr-defined]
        image.write(1 << 20, b"x" * (1 << 20))
        image.write(4 << 20, b"y" * 4096)
    assert path.stat().st_size == 8 << 20
    assert (1 << 20) + 4096 <= path.stat().st_blocks * 512 <= (1 << 20) + 65536
    assert path.read_bytes()[1 << 20 : 2 << 20] == b"x" * (1 << 20)
