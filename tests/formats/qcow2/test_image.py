"""The qcow2 node: order of writing back, failures, compressed clusters, threads, life."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, Corrupt, ImageError, InvalidArgument, IOFailure, NotSupported
from byre.formats.qcow2.image import Qcow2Node
from byre.graph.creating import create
from byre.image import Image
from byre.io.extent import COMPRESSED, DATA
from byre.protocols.memory import MemoryNode
from support.images import new_image, open_image
from support.walk import walk

CLUSTER = 4096


class Log(MemoryNode):
    """Memory that keeps what it was told, in order."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.log: list[tuple[str, int, int]] = []

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.log.append(("write", offset, len(buffer)))
        super().write_from(offset, buffer, flags)

    def discard(self, offset: int, length: int) -> None:
        self.log.append(("discard", offset, length))
        super().discard(offset, length)

    def flush(self) -> None:
        if self.log and self.log[-1][0] != "flush":
            self.log.append(("flush", 0, 0))

    def position(self, what: str, low: int, high: int, after: int = -1) -> int:
        """Index of the first entry of a kind inside ``[low, high)``, behind entry ``after``."""
        return next(i for i, (kind, at, _) in enumerate(self.log) if i > after and kind == what and low <= at < high)


def opened(size: int = 1 << 20, **options: object) -> tuple[Log, Image]:
    memory = Log(new_image("qcow2", size, **{"cluster_size": CLUSTER, **options}).to_bytes())
    return memory, open_image(memory)


def node_of(image: Image) -> Qcow2Node:
    assert isinstance(image.node, Qcow2Node)
    return image.node


def test_a_new_cluster_is_counted_and_filled_before_it_is_linked() -> None:
    disk, image = opened()
    image.write(100, b"x" * 10)
    image.flush()
    node = node_of(image)
    [extent] = [row for row in image.extents() if row.kind == DATA]
    table = node.mapping.l1[0] & 0x00FFFFFFFFFFFE00
    assert node.refcounts is not None
    block = node.refcounts.table[0]
    data = disk.position("write", extent.host, extent.host + CLUSTER)
    counts = disk.position("write", block, block + CLUSTER)
    taken = disk.position("write", table, table + CLUSTER)  # the space of the table: zeroes, which link nothing
    linked = disk.position("write", table, table + CLUSTER, after=taken)
    first_level = disk.position("write", node.mapping.l1_offset, node.mapping.l1_offset + CLUSTER)
    assert max(data, counts) < linked < first_level
    assert ("flush", 0, 0) in disk.log[max(data, counts) : linked]
    assert ("flush", 0, 0) in disk.log[linked:first_level]
    image.close()


def test_a_hole_is_punched_only_after_the_mapping_is_gone() -> None:
    disk, image = opened()
    image.write(0, b"x" * CLUSTER)
    image.flush()
    [extent] = [row for row in image.extents() if row.kind == DATA]
    table = node_of(image).mapping.l1[0] & 0x00FFFFFFFFFFFE00
    disk.log.clear()
    image.discard(0, CLUSTER)
    image.flush()
    unlinked = disk.position("write", table, table + CLUSTER)
    punched = disk.position("discard", extent.host, extent.host + CLUSTER)
    assert unlinked < punched
    assert ("flush", 0, 0) in disk.log[unlinked:punched]
    image.close()


def test_nothing_is_written_without_need() -> None:
    disk, image = opened()
    image.read(0, 1 << 20)
    image.flush()
    image.close()
    assert [entry for entry in disk.log if entry[0] != "flush"] == []


@pytest.mark.parametrize("request_discard", [None, True, False])
@pytest.mark.parametrize("other_discard", [None, True, False])
def test_what_is_given_back_to_the_file_system(request_discard: bool | None, other_discard: bool | None) -> None:
    options = {}
    if request_discard is not None:
        options["pass-discard-request"] = request_discard
    if other_discard is not None:
        options["pass-discard-other"] = other_discard
    memory = Log(new_image("qcow2", 1 << 20, cluster_size=CLUSTER).to_bytes())
    with open_image(memory, options=options) as image:
        image.write_compressed(0, bytes(CLUSTER))
        image.write(CLUSTER, b"x" * CLUSTER)
        image.flush()
        image.write(0, b"over the compressed one")
        image.flush()
        assert any(kind == "discard" for kind, _, _ in memory.log) == bool(other_discard)
        memory.log.clear()
        image.discard(CLUSTER, CLUSTER)
        image.flush()
        assert any(kind == "discard" for kind, _, _ in memory.log) == (request_discard is not False)


# -- failures -----------------------------------------------------------------------------------------


def faulty(path: Path, *faults: dict[str, object]) -> Image:
    spec = {"driver": "qcow2", "file": {"driver": "blkdebug", "image": str(path), "inject-error": list(faults)}}
    return byre.open(spec, read_only=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create(str(tmp_path / "a"), "qcow2", 4 << 20, options={"cluster_size": CLUSTER})
    return tmp_path / "a"


@pytest.mark.parametrize(
    "event", ["refblock_update_part", "refblock_alloc_hookup", "l2_update", "l1_update", "flush_to_disk"]
)
def test_a_metadata_failure_takes_the_image_out_of_service(path: Path, event: str) -> None:
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"kept" * 1024)
    image = faulty(path, {"event": event, "errno": 5, "once": True})
    image.write(0, b"in place, and not flushed" * 10)
    image.write(3 << 20, b"new")
    if event != "refblock_alloc_hookup":
        with pytest.raises(IOFailure):
            image.flush()
        requests: list[Callable[[], object]] = [
            lambda: image.read(0, 1),
            lambda: image.write(0, b"x"),
            image.flush,
            lambda: image.discard(0, CLUSTER),
            lambda: image.write_zeroes(0, CLUSTER),
            lambda: image.extents(),
            lambda: image.resize(8 << 20),
        ]
        for request in requests:
            with pytest.raises(IOFailure, match="out of service"):
                request()
    try:
        image.close()
    except ByreError:
        pass
    assert not walk(path.read_bytes()).damage
    with byre.open(str(path), read_only=False) as image:
        assert image.read(300, 3796) == (b"kept" * 1024)[300:]
        image.write(3 << 20, b"again")


@pytest.mark.parametrize("event", ["write_aio", "cluster_alloc_space"])
def test_a_data_failure_leaves_the_image_in_service(path: Path, event: str) -> None:
    image = faulty(path, {"event": event, "errno": 28, "once": True})
    with pytest.raises(ByreError):
        image.write(100, b"x" * 10)
    node = node_of(image)
    assert node.inflight.claim_count == node.inflight.ticket_count == 0
    assert image.read(0, CLUSTER) == bytes(CLUSTER)
    image.write(100, b"y" * 10)
    assert image.read(99, 12) == b"\0" + b"y" * 10 + b"\0"
    image.close()
    assert not any(walk(path.read_bytes()))


def test_a_failed_read_of_a_table_is_not_the_end(path: Path) -> None:
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"kept")
    image = faulty(path, {"event": "l2_load", "errno": 5, "once": True})
    with pytest.raises(IOFailure):
        image.read(0, 4)
    assert image.read(0, 4) == b"kept"
    image.write(4, b"more")
    image.close()
    assert not any(walk(path.read_bytes()))


# -- compressed clusters ----------------------------------------------------------------------------


def test_compressed_writes() -> None:
    disk, image = opened(CLUSTER * 8 + 512)
    image.write_compressed(0, b"a" * CLUSTER)
    image.write_compressed(CLUSTER * 8, b"b" * 512)  # the last cluster may be shorter
    image.write_compressed(CLUSTER, random.Random(1).randbytes(CLUSTER))  # does not become smaller
    assert [row.kind for row in image.node.extents(0, 2 * CLUSTER)] == [COMPRESSED, DATA]
    assert image.read(CLUSTER * 8 - 1, 513) == b"\0" + b"b" * 512
    assert image.read(5, 10) == b"a" * 10
    for offset, length in ((1, CLUSTER), (0, 512), (0, 2 * CLUSTER), (CLUSTER * 8, CLUSTER), (512, 512)):
        with pytest.raises(InvalidArgument):
            image.write_compressed(offset, bytes(length))
    for offset, payload in ((1, b"x"), (0, b""), (0, bytes(CLUSTER))):
        with pytest.raises(InvalidArgument):
            image.write_compressed_clusters(offset, [payload])
    image.close()
    assert not any(walk(disk.to_bytes()))


def test_a_compressed_cluster_that_is_damaged() -> None:
    disk, image = opened()
    image.write_compressed(0, b"abcd" * (CLUSTER // 4))
    image.write(CLUSTER, b"fine")
    image.flush()
    [entry] = [row.host for row in image.node.extents(0, CLUSTER)]
    host = entry & ((1 << (62 - 4)) - 1)
    image.close()
    disk.write_from(host, memoryview(b"\xff" * 40))
    with open_image(disk) as image:
        with pytest.raises(ImageError, match="compressed cluster at guest offset 0x0"):
            image.read(10, 10)
        assert image.read(CLUSTER, 4) == b"fine"
        with pytest.raises(ByreError):
            image.write(10, b"needs the rest of the cluster")
        image.write(0, b"z" * CLUSTER)  # the whole cluster needs nothing
        assert image.read(0, CLUSTER) == b"z" * CLUSTER
    assert not any(walk(disk.to_bytes()))


def test_a_data_file_has_no_compressed_clusters(tmp_path: Path) -> None:
    create(str(tmp_path / "a"), "qcow2", 1 << 20, options={"data_file": str(tmp_path / "d")})
    with byre.open(str(tmp_path / "a"), read_only=False) as image:
        with pytest.raises(NotSupported):
            image.write_compressed(0, bytes(65536))
        with pytest.raises(NotSupported):
            image.write_compressed_clusters(0, [b"x" * 100])
        image.write(0, b"x")
    with byre.open(str(tmp_path / "a")) as image:
        assert image.read(0, 2) == b"x\0"


# -- threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"extended_l2": True, "cluster_size": 16384}, {"compat": "0.10"}])
def test_writers_of_one_cluster(options: dict[str, object]) -> None:
    """Each thread owns interleaved slots inside shared clusters and verifies them while others write around them."""
    disk, image = opened(1 << 20, **options)
    failures: list[BaseException] = []
    slot, count = 700, 4

    def work(number: int) -> None:
        chance = random.Random(number)
        mine: dict[int, bytes] = {}
        try:
            for _ in range(150):
                at = (chance.randrange(0, (1 << 20) // slot // count - 1) * count + number) * slot
                kind = chance.randrange(6)
                data = bytes(slot) if kind == 0 else chance.randbytes(slot)
                if kind == 0:
                    image.write_zeroes(at, slot, unmap=True)
                else:
                    image.write(at, data)
                mine[at] = data
                if kind == 1:
                    image.flush()
                look = chance.choice(list(mine))
                assert image.read(look, slot) == mine[look]
            for at, data in mine.items():
                assert image.read(at, slot) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    image.close()
    assert not any(walk(disk.to_bytes()))


# -- life -----------------------------------------------------------------------------------------------


def test_tables_are_read_again_after_invalidation(path: Path) -> None:
    with byre.open(str(path), force_share=True) as reader:
        assert reader.read(0, 4) == bytes(4)
        with byre.open(str(path), read_only=False) as writer:
            writer.write(0, b"news")
        node_of(reader).invalidate()
        assert reader.read(0, 4) == b"news"


def test_a_count_that_is_wrong_is_not_believed(path: Path) -> None:
    """Metadata that is counted as free is not given away: the write is refused and the image marked."""
    content = bytearray(path.read_bytes())
    table = struct.unpack_from(">Q", content, 48)[0]
    block = struct.unpack_from(">Q", content, table)[0]
    content[block : block + 64] = bytes(64)
    path.write_bytes(content)
    image = byre.open(str(path), read_only=False)
    with pytest.raises(Corrupt, match=r"invalid .* free; run"):
        image.write(0, b"x")
    with pytest.raises(ByreError):
        image.close()
    with byre.open(str(path)) as image:
        assert image.read(0, 1) == b"\0"
