"""Reference counts and the allocator over them, at every width."""

from __future__ import annotations

import itertools
import random
import struct
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, Corrupt, NoSpace
from byre.formats.qcow2.image import Qcow2Node
from byre.formats.qcow2.refcounts import Refcounts
from byre.graph.creating import create
from byre.image import Image
from byre.protocols.memory import MemoryNode
from conftest import Run
from support.images import new_image, open_image
from support.walk import walk

WIDTHS = (1, 2, 4, 8, 16, 32, 64)


def refcounts_of(image: Image) -> Refcounts:
    assert isinstance(image.node, Qcow2Node)
    assert image.node.refcounts is not None
    return image.node.refcounts


class Plain:
    """An allocator over memory, without an image around it: header in cluster 0, table in 1, one block in 2."""

    def __init__(self, width: int, cluster_bits: int = 9, table_clusters: int = 1) -> None:
        self.order = width.bit_length() - 1
        self.cluster = 1 << cluster_bits
        self.disk = MemoryNode(size=3 << cluster_bits)
        self.disk.write_from(self.cluster, memoryview(struct.pack(">Q", 2 << cluster_bits)))
        self.published: list[tuple[int, int]] = []
        self.refcounts = Refcounts(
            self.disk,
            cluster_bits,
            self.order,
            self.cluster,
            table_clusters,
            self.relieve,
            lambda offset, clusters: self.published.append((offset, clusters)),
            lambda first, count: "the header" if first == 0 else "",
            "test",
        )
        self.refcounts._change(0, 3, 1)

    def relieve(self) -> None:
        self.refcounts.write_back()

    def counts(self, clusters: int) -> list[int]:
        return [self.refcounts.get(index) for index in range(clusters)]

    def reloaded(self) -> Refcounts:
        """As another program would read the counts from the disk."""
        self.refcounts.write_back()
        offset, clusters = self.published[-1] if self.published else (self.cluster, 1)
        return Refcounts(
            self.disk,
            self.refcounts.cluster_bits,
            self.order,
            offset,
            clusters,
            self.relieve,
            lambda offset, clusters: None,
            lambda first, count: "",
            "test",
        )


@pytest.mark.parametrize("width", WIDTHS)
def test_allocation_against_a_model(width: int) -> None:
    """Clusters handed out were free, runs are contiguous, and the counts on disk are those in memory."""
    chance = random.Random(width)
    plain = Plain(width)
    counts = plain.refcounts
    taken: dict[int, int] = {0: 1, 1: 1, 2: 1}
    mine: list[tuple[int, int]] = []
    for _ in range(400):
        if mine and chance.random() < 0.4:
            host, count = mine.pop(chance.randrange(len(mine)))
            counts.lower([(host // plain.cluster, count)])
            for index in range(count):
                del taken[host // plain.cluster + index]
        else:
            count = chance.choice([1, 1, 1, 2, 5, 17, 70])
            host = counts.allocate(count)
            for index in range(count):
                assert taken.setdefault(host // plain.cluster + index, 1) == 1
                assert counts.get(host // plain.cluster + index) == 1
            mine.append((host, count))
            assert len(
                {cluster for run, n in mine for cluster in range(run // plain.cluster, run // plain.cluster + n)}
            ) == sum(n for _, n in mine)
        # What is counted and not mine counts the counts.
    again = plain.reloaded()
    top = max(taken) + 200
    assert [again.get(index) for index in range(top)] == plain.counts(top)
    owned = {cluster for run, n in mine for cluster in range(run // plain.cluster, run // plain.cluster + n)}
    table = set(range(again.table_offset // plain.cluster, again.table_offset // plain.cluster + again.table_clusters))
    blocks = {entry // plain.cluster for entry in again.table if entry}
    assert not owned & (table | blocks | {0})
    assert {index for index in range(top) if again.get(index)} == owned | table | blocks | {0} | (
        {1} - table - {1 if plain.published else -1}
    ) - owned | (set() if plain.published else {1})


def test_freed_clusters_are_found_again() -> None:
    plain = Plain(16)
    first = plain.refcounts.allocate(10)
    plain.refcounts.allocate(5)
    plain.refcounts.lower([(first // plain.cluster + 2, 3)])
    assert plain.refcounts.allocate(3) == first + 2 * plain.cluster
    assert plain.refcounts.allocate(1) > first + 10 * plain.cluster


def test_a_hole_that_is_too_small_is_passed_over_and_kept() -> None:
    plain = Plain(16)
    first = plain.refcounts.allocate(10)
    plain.refcounts.lower([(first // plain.cluster + 2, 2)])
    big = plain.refcounts.allocate(3)
    assert big >= first + 10 * plain.cluster
    assert plain.refcounts.allocate(2) == first + 2 * plain.cluster


def test_runs_cross_the_borders_of_blocks() -> None:
    plain = Plain(64)  # 64 clusters for each block
    spaces = [plain.refcounts.allocate(64) for _ in range(4)]
    for host in spaces:
        plain.refcounts.lower([(host // plain.cluster, 64)])
    host = plain.refcounts.allocate(100)
    assert host // plain.cluster // 64 != (host // plain.cluster + 99) // 64
    assert all(plain.refcounts.get(host // plain.cluster + index) == 1 for index in range(100))


def test_lowering_tells_what_became_free() -> None:
    plain = Plain(16)
    host = plain.refcounts.allocate(6)
    first = host // plain.cluster
    plain.refcounts._change(first + 3, 1, 1)
    assert plain.refcounts.lower([(first, 2), (first + 2, 3)]) == [
        (host, 3 * plain.cluster),
        (host + 4 * plain.cluster, plain.cluster),
    ]
    assert plain.refcounts.get(first + 3) == 1


def test_a_count_never_becomes_negative() -> None:
    plain = Plain(16)
    with pytest.raises(Corrupt, match="negative"):
        plain.refcounts.lower([(9, 1)])
    with pytest.raises(Corrupt, match="no refcount block"):
        plain.refcounts.lower([(1 << 30, 1)])


@pytest.mark.parametrize("entry", [0x200 + 1, 0x100, 1 << 56])
def test_a_broken_table_entry_is_named(entry: int) -> None:
    plain = Plain(16)
    plain.refcounts.write_back()
    plain.disk.write_from(plain.cluster + 8, memoryview(struct.pack(">Q", entry)))
    with pytest.raises(Corrupt, match="refcount table entry 1"):
        plain.reloaded().get(256)


def test_metadata_is_not_given_away() -> None:
    plain = Plain(16)
    plain.refcounts._change(0, 1, -1)
    plain.refcounts._hint = 0
    with pytest.raises(Corrupt, match="the header"):
        plain.refcounts.allocate(1)


def test_the_format_ends() -> None:
    plain = Plain(16, cluster_bits=9)
    plain.refcounts._hint = (1 << 47) - 1
    with pytest.raises(NoSpace, match=r"2\^56"):
        plain.refcounts.allocate(2)
    plain.refcounts._hint = 1 << 40
    with pytest.raises(NoSpace, match="8 MiB"):
        plain.refcounts.allocate(1)


@pytest.mark.parametrize("width", WIDTHS)
def test_compressed_clusters_share_until_the_count_is_full(width: int) -> None:
    """A cluster counts once for each compressed cluster in it, and no count overflows."""
    plain = Plain(width, 12)
    chance = random.Random(width)
    placed: list[tuple[int, int]] = []
    for _ in range(300):
        length = chance.choice([1, 7, 100, 511, 512, 2000, 4095])
        [host] = plain.refcounts.allocate_packed([length])
        placed.append((host, length))
        if chance.random() < 0.1:
            plain.refcounts.allocate(1)
    ends = sorted((host, host + length) for host, length in placed)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ends))
    expected: dict[int, int] = {}
    for host, length in placed:
        for cluster in range(host >> 12, (host + length - 1 >> 12) + 1):
            expected[cluster] = expected.get(cluster, 0) + 1
    again = plain.reloaded()
    assert {cluster: again.get(cluster) for cluster in expected} == expected
    assert max(expected.values()) <= (1 << width) - 1
    for host, length in placed:
        plain.refcounts.release_packed(host, length)
    assert all(plain.refcounts.get(cluster) == 0 for cluster in expected)


@pytest.mark.oracle
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("cluster_size", [512, 4096])
def test_tables_grow_and_the_peer_finds_nothing_wrong(
    tmp_path: Path, qemu_img: Run, width: int, cluster_size: int
) -> None:
    path = str(tmp_path / "a")
    size = 24 << 20 if cluster_size == 512 else 32 << 20
    create(path, "qcow2", size, options={"cluster_size": cluster_size, "refcount_bits": width})
    chance = random.Random(width)
    model = {}
    with byre.open(path, read_only=False) as image:
        before = refcounts_of(image).table_offset
        assert isinstance(image.node, Qcow2Node)
        for at in range(0, size, 1 << 20):
            data = chance.randbytes(1 << 16) * 16
            image.write(at, data)
            model[at] = data
        for at in range(0, 64 * cluster_size, cluster_size):
            image.write_compressed(at, b"z" * cluster_size)
        grew = refcounts_of(image).table_offset != before
    assert grew or (cluster_size, width) not in ((512, 16), (512, 64))
    qemu_img("check", path)
    with byre.open(path) as image:
        assert image.read(0, 64 * cluster_size) == b"z" * (64 * cluster_size)
        for at, data in model.items():
            if at >= 64 * cluster_size:
                assert image.read(at, 1 << 20) == data


def test_a_one_bit_image_with_compressed_clusters(tmp_path: Path) -> None:
    memory = new_image("qcow2", 1 << 20, cluster_size=4096, refcount_bits=1)
    with open_image(memory) as image:
        for at in range(0, 1 << 20, 4096):
            image.write_compressed(at, bytes([at >> 12]) * 4096)
        image.write(4096, b"new")
        image.discard(8192, 4096)
    assert not any(walk(memory.to_bytes()))
    with open_image(memory) as image:
        assert image.read(12288, 4096) == b"\3" * 4096
        assert image.read(4096, 5) == b"new\1\1"


class Recording(MemoryNode):
    """Memory that fails once it is longer than ``limit``, and remembers the order of things."""

    limit = 1 << 62

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        if offset + len(buffer) > max(self.limit, self.size):
            raise NoSpace("no space left", where=self.filename)
        super().write_from(offset, buffer, flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        if offset + length > max(self.limit, self.size):
            raise NoSpace("no space left", where=self.filename)
        super().write_zeroes(offset, length, flags)


@pytest.mark.parametrize("cluster_size", [512, 4096])
@pytest.mark.parametrize("slack", [0, 1, 5, 8, 9, 17, 40])
def test_a_full_disk(cluster_size: int, slack: int) -> None:
    """Each write is there or was refused; what was flushed stays; nothing is damaged."""
    source = new_image("qcow2", 4 << 20, cluster_size=cluster_size)
    disk = Recording(source.to_bytes())
    disk.limit = disk.size + 40 * cluster_size
    image = open_image(disk)
    kept: dict[int, bytes] = {}
    refused = 0
    disk.limit += slack * cluster_size
    try:
        for number in range(400):
            at = number * 3 * cluster_size + 100
            data = bytes([number % 251 + 1]) * (2 * cluster_size)
            try:
                image.write(at, data)
                kept[at] = data
            except NoSpace:
                refused += 1
                if refused > 3:
                    break
        for at, data in kept.items():
            assert image.read(at, len(data)) == data
        image.flush()
    except ByreError:
        kept.clear()  # metadata did not fit: out of service, and only what was flushed is promised
    try:
        image.close()
    except ByreError:
        pass
    findings = walk(disk.to_bytes())
    assert not findings.damage
    assert refused
    disk.limit = 1 << 62
    with open_image(disk) as image:
        for at, data in kept.items():
            assert image.read(at, len(data)) == data
        image.write(0, b"works again")


@pytest.mark.parametrize("immediately", [True, False])
@pytest.mark.parametrize(
    "event",
    ["reftable_grow", "refblock_alloc_write_blocks", "refblock_alloc_write_table", "refblock_alloc_switch_table"],
)
@pytest.mark.parametrize("number", [28, 5])
def test_a_table_that_cannot_be_moved(tmp_path: Path, event: str, number: int, immediately: bool) -> None:
    """Nothing of a bigger refcount table that failed may be written later over what comes to lie there."""
    path = tmp_path / "a"
    create(str(path), "qcow2", 64 << 20, options={"cluster_size": 512, "refcount_bits": 64})
    fault = {"event": event, "errno": number, "once": True, "immediately": immediately}
    image = byre.open(
        {"driver": "qcow2", "file": {"driver": "blkdebug", "image": str(path), "inject-error": [fault]}},
        read_only=False,
    )
    failed = flushed = 0
    for at in range(0, 3 << 20, 4096):
        try:
            image.write(at, b"x" * 4096)
            if at % 65536 == 0 and not failed:
                image.flush()
                flushed = at + 4096
        except ByreError:
            failed += 1
    assert failed
    try:
        image.close()
    except ByreError:
        pass
    assert not walk(path.read_bytes()).damage
    with byre.open(str(path), read_only=False) as image:
        assert image.read(0, flushed) == b"x" * flushed
        for at in range(0, 3 << 20, 65536):
            image.write(at, b"y" * 65536)
        assert image.read(0, 3 << 20) == b"y" * (3 << 20)
    assert not walk(path.read_bytes()).damage


def test_freed_clusters_are_used_again_only_after_their_mapping_is_gone() -> None:
    """Until the L2 table that let go is on disk, a crash would bring the old mapping back."""
    memory = new_image("qcow2", 1 << 20, cluster_size=4096)
    with open_image(memory) as image:
        image.write(0, b"a" * 65536)
        image.flush()
        old = {extent.host + at for extent in image.extents(0, 65536) for at in range(0, extent.length, 4096)}
        image.discard(0, 65536)
        image.write(1 << 19, b"b" * 65536)
        new = {extent.host + at for extent in image.extents(1 << 19, 65536) for at in range(0, extent.length, 4096)}
        assert not old & new
        image.flush()
        image.write(3 << 18, b"c" * 65536)
        newer = {extent.host + at for extent in image.extents(3 << 18, 65536) for at in range(0, extent.length, 4096)}
        assert old & newer
    assert not any(walk(memory.to_bytes()))
