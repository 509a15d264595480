"""Write-back beside other requests: nobody who only reads waits for a disk, and the order on disk is kept."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

import byre
from byre.errors import IOFailure
from byre.graph.creating import create
from byre.jobs.job import Control
from byre.protocols.file import FileNode

CLUSTER = 4096
PATIENCE = 0.5


def content(path: Path, offset: int, length: int) -> bytes:
    """Of a copy as the disk is now, which is what a crash would leave."""
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    with byre.open(copy, format="qcow2") as image:
        return bytes(image.read(offset, length))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, flushes of files take a second."""
    event = threading.Event()
    flush = FileNode.flush

    def slowly(node: FileNode) -> None:
        if event.is_set():
            time.sleep(1)
        flush(node)

    monkeypatch.setattr(FileNode, "flush", slowly)
    return event


def test_reads_and_lookups_do_not_wait_for_a_flush(tmp_path: Path, slow: threading.Event) -> None:
    path = tmp_path / "image.qcow2"
    create(str(path), "qcow2", 1 << 20, options={"cluster_size": CLUSTER})
    with byre.open(path, read_only=False) as image:
        image.write(0, b"a" * CLUSTER)
        image.flush()
        image.write(CLUSTER, b"b" * CLUSTER)
        slow.set()
        thread = threading.Thread(target=image.flush)
        thread.start()
        time.sleep(0.2)
        before = time.monotonic()
        assert image.read(0, 3) == b"aaa"
        assert image.read(CLUSTER, 3) == b"bbb"
        image.write(8 * CLUSTER, b"c" * CLUSTER)  # published while the flush is under way
        assert len(image.extents(0, 1 << 20)) >= 3
        assert time.monotonic() - before < PATIENCE
        assert thread.is_alive()
        slow.clear()
        thread.join()
        assert content(path, CLUSTER, 3) == b"bbb"
        image.flush()
        assert content(path, 8 * CLUSTER, 3) == b"ccc"


def test_a_table_that_was_written_meanwhile_is_not_written_as_it_was_before(
    tmp_path: Path, slow: threading.Event
) -> None:
    """An entry that is gone does not come back, for its cluster may be another's by now."""
    path = tmp_path / "image.qcow2"
    create(str(path), "qcow2", 1 << 20, options={"cluster_size": CLUSTER})
    with byre.open(path, read_only=False) as image:
        node = image.node
        image.write(0, b"a" * CLUSTER)
        image.flush()
        image.write(CLUSTER, b"b" * CLUSTER)
        slow.set()
        thread = threading.Thread(target=image.flush)
        thread.start()
        time.sleep(0.2)
        slow.clear()
        image.discard(CLUSTER, CLUSTER)
        with node.lock:  # type: ignore[attr-defined]
            node.write_back()  # type: ignore[attr-defined]
        image.write(2 * CLUSTER, b"c" * CLUSTER)  # the same page of the table changes again
        assert thread.is_alive()
        thread.join()
        assert content(path, CLUSTER, CLUSTER) == bytes(CLUSTER)
        image.flush()
        assert content(path, 2 * CLUSTER, 3) == b"ccc"


def test_a_flush_that_fails_beside_other_requests_counts_and_ends_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.qcow2"
    create(str(path), "qcow2", 1 << 20, options={"cluster_size": CLUSTER})
    with byre.open(path, read_only=False) as image:
        image.write(0, b"a" * CLUSTER)
        image.flush()
        image.write(CLUSTER, b"b" * CLUSTER)  # in a table that is there: the lock is let go meanwhile
        with monkeypatch.context() as failing, pytest.raises(IOFailure, match="it fails"):

            def fails(node: FileNode) -> None:
                raise IOFailure("it fails")

            failing.setattr(FileNode, "flush", fails)
            image.flush()
        stats = image.node.stats
        assert stats.failed_count[stats.FLUSH] == 1
        with pytest.raises(IOFailure):
            image.write(0, b"c" * CLUSTER)
        image.node.failure = None  # type: ignore[attr-defined]  # so that it can be closed


def test_many_that_write_and_flush_at_once(tmp_path: Path) -> None:
    """What each was told is durable is in the file, and the image is sound in the end."""
    path = tmp_path / "image.qcow2"
    size = 64 << 20
    create(str(path), "qcow2", size, options={"cluster_size": CLUSTER})
    with byre.open(path, read_only=False) as image:

        def work(number: int) -> None:
            chooser = random.Random(number)
            for turn in range(60):
                at = (chooser.randrange(size // CLUSTER // 8) * 8 + number) * CLUSTER
                if turn % 5 == 4:
                    image.discard(at, CLUSTER)
                image.write(at, bytes([number + 1]) * CLUSTER)
                image.flush()
                written.append(at)

        written: list[int] = []
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        copy = tmp_path / "copy.qcow2"
        copy.write_bytes(path.read_bytes())
        assert len(written) == 8 * 60
    for each in (copy, path):
        with byre.open(each, format="qcow2", check=True) as image:
            result = image.node.check(Control())  # type: ignore[attr-defined]
            assert (result.corruptions, result.check_errors) == (0, 0)
    with byre.open(copy) as image:
        for at in written:
            assert image.read(at, 1)[0] == at // CLUSTER % 8 + 1
