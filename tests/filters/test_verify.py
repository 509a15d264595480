"""The verifying filter: mirrored writes, compared reads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import byre
from byre.errors import Corrupt, InvalidArgument, IOFailure
from byre.filters.verify import VerifyNode, first_difference
from byre.graph.graph import Graph
from byre.protocols.memory import MemoryNode


def make(size: int = 1 << 20) -> tuple[VerifyNode, MemoryNode, MemoryNode]:
    graph = Graph()
    node, raw, test = VerifyNode(), MemoryNode(size=size), MemoryNode(size=size)
    for one in (node, raw, test):
        graph.add(one)
    graph.attach(node, "raw", raw, "filtered")
    graph.attach(node, "file", test, "filtered")
    return node, raw, test


def test_what_is_written_reads_back() -> None:
    node, raw, test = make()
    node.write_from(1000, memoryview(b"hello"))
    node.writev_from(1005, [memoryview(b" wor"), memoryview(b"ld")])
    node.write_zeroes(1000, 1)
    data = bytearray(11)
    node.read_into(1000, memoryview(data))
    assert data == b"\0ello world"
    node.flush()
    node.discard(0, 1 << 20)
    assert raw.to_bytes() == test.to_bytes()
    node.resize(5000)
    assert raw.size == test.size == node.size == 5000


def test_a_contradiction_names_the_first_offset_that_differs() -> None:
    node, raw, _ = make()
    raw.write_from(5003, memoryview(b"x"))
    node.read_into(0, memoryview(bytearray(5003)))
    with pytest.raises(Corrupt, match="read offset=4096 bytes=4096 contents mismatch at offset 5003"):
        node.read_into(4096, memoryview(bytearray(4096)))
    with pytest.raises(Corrupt, match="offset 5003"):
        node.readv_into(4000, [memoryview(bytearray(500)), memoryview(bytearray(5000))])


def test_one_side_failing_is_a_contradiction_both_failing_is_not() -> None:
    node, raw, test = make()
    raw.read_only = True
    with pytest.raises(Corrupt, match="return value mismatch 0 != -30"):
        node.write_from(0, memoryview(b"x"))
    test.read_only = True
    with pytest.raises(byre.errors.ReadOnly):
        node.write_from(0, memoryview(b"x"))


@pytest.mark.parametrize("at", [0, 1, 63, 64, 99, 100])
def test_first_difference(at: int) -> None:
    other = bytearray(100)
    if at < 100:
        other[at] = 1
        other[99] = 1
    assert first_difference(memoryview(bytes(100)), memoryview(other)) == at


def test_by_file_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(4096))
    with byre.open(f"blkverify:{tmp_path / 'a'}:{tmp_path / 'b'}", format="raw", read_only=False) as disk:
        disk.write(10, b"both")
        assert disk.read(8, 8) == b"\0\0both\0\0"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != bytes(4096)
    (tmp_path / "a").write_bytes(bytes(4096))
    with (
        byre.open({"driver": "blkverify", "raw": {"driver": "file", "filename": str(tmp_path / "a")},
                   "test": {"driver": "raw", "file.driver": "file", "file.filename": str(tmp_path / "b")}}) as disk,
        pytest.raises(Corrupt, match="contents mismatch at offset 10"),
    ):  # fmt: skip
        disk.read(0, 512)


def test_bad_names_and_options(tmp_path: Path) -> None:
    for name in ("blkverify:x", "blkverify::x"):
        with pytest.raises(InvalidArgument, match="blkverify:RAW:IMAGE"):
            byre.open(name)
    with pytest.raises(InvalidArgument, match="needs the children 'raw' and 'test'"):
        byre.open({"driver": "blkverify"})


def test_overlapping_requests_of_many_threads_never_contradict() -> None:
    node, raw, test = make(8192)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(200):
                at = (seed * 977 + turn * 389) % 4096
                if (turn + seed) % 3:
                    node.write_from(at, memoryview(bytes([seed * 16 + turn % 16]) * 3000))
                else:
                    node.read_into(at, memoryview(bytearray(4000)))
        except IOFailure as error:
            failures.append(error)
        except Corrupt as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert raw.to_bytes() == test.to_bytes()
