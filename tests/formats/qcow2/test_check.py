"""Checking qcow2 images: counts, messages and statistics, side by side with the peer where it says the same."""

from __future__ import annotations

import json
import random
import resource
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.errors import Cancelled, InvalidArgument, ReadOnly
from byre.formats.abilities import Checkable, CheckResult
from byre.formats.qcow2 import check_counts, check_findings, layout
from byre.jobs.job import Control

OFFSET = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
COUNTS = ("corruptions", "leaks", "check-errors", "image-end-offset", "total-clusters", "allocated-clusters",
          "fragmented-clusters", "compressed-clusters")  # fmt: skip


def check(path: Path, fix: str = "", control: Control | None = None) -> CheckResult:
    with byre.open(str(path), format="qcow2", read_only=not fix, check=True, backing=False) as image:
        node = image.node
        assert isinstance(node, Checkable)
        return node.check(control or Control(), fix)


def counts(result: CheckResult) -> tuple[int, ...]:
    return (result.corruptions, result.leaks, result.check_errors, result.image_end_offset, result.total_clusters,
            result.allocated_clusters, result.fragmented_clusters, result.compressed_clusters)  # fmt: skip


class Patch:
    """An image file whose 64-bit fields are found and changed by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.header = layout.decode_header(self.data)

    def word(self, offset: int) -> int:
        value: int = struct.unpack_from(">Q", self.data, offset)[0]
        return value

    def put(self, offset: int, value: int) -> None:
        struct.pack_into(">Q", self.data, offset, value & (1 << 64) - 1)
        self.path.write_bytes(self.data)

    def l1(self, index: int = 0) -> int:
        return self.header.l1_table_offset + 8 * index

    def l2(self, index: int = 0, l1_index: int = 0) -> int:
        stride = 16 if self.header.extended_l2 else 8
        return (self.word(self.l1(l1_index)) & OFFSET) + stride * index

    def table(self, index: int = 0) -> int:
        return self.header.refcount_table_offset + 8 * index

    def count(self, cluster: int) -> int:
        """Where the (16-bit) refcount of a cluster lies."""
        return self.word(self.table()) + 2 * cluster

    def put_count(self, cluster: int, value: int) -> None:
        struct.pack_into(">H", self.data, self.count(cluster), value)
        self.path.write_bytes(self.data)

    def fields(self) -> list[int]:
        """Offsets of all entries of refcount table and blocks, L1 and L2 tables, those in use listed more often."""
        size = self.header.cluster_size
        found = list(range(self.table(), self.table(32), 8))
        blocks = [self.word(self.table(i)) for i in range(self.header.refcount_table_clusters * size // 8)]
        tables = [self.word(self.l1(i)) & OFFSET for i in range(self.header.l1_size)]
        found += list(range(self.l1(), self.l1(self.header.l1_size), 8)) * 4
        for start in [host for host in blocks + tables if 0 < host < len(self.data)]:
            mine = range(start, min(start + size, len(self.data) - 7), 8)
            used = [at for at in mine if self.word(at)]
            found += used * 4 + list(mine)[:32]
        return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Version 3, 64 KiB clusters: 10 clusters of data, of the first 4 and 6 from 1 MiB."""
    path = tmp_path / "a.qcow2"
    byre.create(str(path), "qcow2", 64 << 20)
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"a" * (4 << 16))
        image.write(1 << 20, b"b" * (6 << 16))
    return path


# -- alone ----------------------------------------------------------------------------------------


def test_a_sound_image(image: Path) -> None:
    before = image.read_bytes()
    control = Control()
    result = check(image, control=control)
    assert result[:5] == (0, 0, 0, 0, 0)
    assert result.total_clusters == 1024
    assert result.allocated_clusters == 10
    assert result.fragmented_clusters == 0
    assert result.image_end_offset == len(before)
    assert result.messages == ()
    assert control.done > 0
    assert image.read_bytes() == before


def test_a_leaked_cluster(image: Path) -> None:
    patch = Patch(image)
    host = patch.word(patch.l2(3)) & OFFSET
    patch.put(patch.l2(3), 0)
    result = check(image)
    assert result[:3] == (0, 1, 0)
    assert result.messages == (f"Leaked cluster {host >> 16} refcount=1 reference=0",)


def test_a_count_too_low(image: Path) -> None:
    patch = Patch(image)
    host = patch.word(patch.l2(3))
    patch.put(patch.l2(2), host)
    result = check(image)
    cluster = (host & OFFSET) >> 16
    assert result[:3] == (1, 1, 0)
    assert f"ERROR cluster {cluster} refcount=1 reference=2" in result.messages


def test_copied_flags(image: Path) -> None:
    patch = Patch(image)
    entry, l1_entry = patch.word(patch.l2(3)), patch.word(patch.l1())
    patch.put(patch.l2(3), entry & ~COPIED)
    patch.put(patch.l1(), l1_entry & ~COPIED)
    result = check(image)
    assert result[:3] == (2, 0, 0)
    assert result.messages == (
        f"ERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry={l1_entry & ~COPIED:x} refcount=1",
        f"ERROR OFLAG_COPIED data cluster: l2_entry={entry & ~COPIED:x} refcount=1",
    )


def test_fragmented(image: Path) -> None:
    patch = Patch(image)
    first, second = patch.word(patch.l2(0)), patch.word(patch.l2(2))
    patch.put(patch.l2(0), second)
    patch.put(patch.l2(2), first)
    result = check(image)
    assert result[:3] == (0, 0, 0)
    assert result.fragmented_clusters == 3


def test_what_the_node_wrote_but_not_flushed_counts(image: Path) -> None:
    with byre.open(str(image), read_only=False) as opened:
        opened.write(32 << 20, b"c" * 100)
        node = opened.node
        assert isinstance(node, Checkable)
        result = node.check(Control(), "")
        assert result[:3] == (0, 0, 0)
        assert result.allocated_clusters == 11
        assert opened.read(32 << 20, 3) == b"ccc"


def test_messages_are_limited(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_findings, "MESSAGE_LIMIT", 3)
    patch = Patch(image)
    for index in range(4):
        patch.put(patch.l2(index), 0)
    result = check(image)
    assert result.leaks == 4
    assert len(result.messages) == 4
    assert result.messages[-1] == "1 more messages left out"


def test_requests_that_make_no_sense(image: Path) -> None:
    with byre.open(str(image), check=True) as opened:
        node = opened.node
        assert isinstance(node, Checkable)
        with pytest.raises(InvalidArgument, match="unknown repair"):
            node.check(Control(), "some")
        with pytest.raises(ReadOnly):
            node.check(Control(), "all")


def test_cancelling(image: Path) -> None:
    class Stop(Control):
        def advance(self, count: int, moved: int | None = None) -> None:
            raise Cancelled("the job was cancelled")

    with pytest.raises(Cancelled):
        check(image, control=Stop())


# -- hostile images -------------------------------------------------------------------------------


def header(bits: int, size: int, l1_size: int, l1: int, table: int, clusters: int, shots: int = 0,
           shots_at: int = 0) -> bytes:  # fmt: skip
    return layout.encode_header(
        layout.Header(
            cluster_bits=bits, size=size, l1_size=l1_size, l1_table_offset=l1, refcount_table_offset=table,
            refcount_table_clusters=clusters, nb_snapshots=shots, snapshots_offset=shots_at, header_length=104,
        )
    )  # fmt: skip


def sparse(path: Path, length: int, parts: dict[int, bytes]) -> Path:
    with open(path, "wb") as file:
        file.truncate(length)
        for offset, data in parts.items():
            file.seek(offset)
            file.write(data)
    return path


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


def test_a_file_of_4_tib_with_small_clusters_costs_what_its_tables_cost(tmp_path: Path) -> None:
    data = [COPIED | (0x100_0000_0000 + i * 0x3_0000_0000) for i in range(64)]
    path = sparse(tmp_path / "x", 4 << 40, {
        0: header(9, 1 << 30, 32768, 512, 0x100000, 1), 512: words(COPIED | 0x200000), 0x200000: words(*data),
        0x100000: words(0x100200),
    })  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = check(path)
    assert result.allocated_clusters == 64
    # Nothing has a reference count: header, L1 (512), L2, data, refcount table, block; and the COPIED flags.
    assert result.corruptions == 1 + 512 + 1 + 64 + 2 + 65
    assert result.image_end_offset == max(data) - COPIED + 512
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_one_l2_table_under_16384_names_is_read_once(tmp_path: Path) -> None:
    count = 16384
    path = sparse(tmp_path / "x", 1 << 30, {
        0: header(16, count << 29, count, 0x10000, 0x1000000, 1), 0x10000: words(*[0x2000000] * count),
        0x2000000: words(*[COPIED | 0x3000000] * 8192), 0x1000000: words(0x1010000),
    })  # fmt: skip
    control = Control()
    result = check(path, control=control)
    assert result.allocated_clusters == count * 8192
    assert result.corruptions > count * 8192
    assert control.done == 2 << 16  # once for the references, once for the flags


def test_l1_entries_into_holes(tmp_path: Path) -> None:
    count = 1 << 19
    path = sparse(tmp_path / "x", 1 << 40, {
        0: header(16, count << 29, count, 0x10000, 0x8000000, 1), 0x8000000: words(0x8010000),
        0x10000: words(*range(0x10000000, 0x10000000 + (count << 16), 1 << 16)),
    })  # fmt: skip
    control = Control()
    result = check(path, control=control)
    assert result.corruptions >= count
    assert control.done < 16 << 20


def test_many_snapshots_with_overlapping_tables(tmp_path: Path) -> None:
    count = 4096
    table = b"".join(
        struct.pack(">QIHHIIQII", 0x10000000 + (i * 7 % 512) * 0x10000, 1 << 22, 1, 1, 0, 0, 0, 0, 16) + bytes(16)
        + b"ab" + bytes(6)
        for i in range(count)
    )  # fmt: skip
    path = sparse(tmp_path / "x", 1 << 30, {
        0: header(16, 1 << 30, 2, 0x10000, 0x20000, 1, count, 0x100000), 0x20000: words(0x30000), 0x100000: table,
        0x10000000: words(*[0x10000000] * 8192),
    })  # fmt: skip
    assert check(path).corruptions > count


# -- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dense", "sparse_keys"), [(1, 4), (1, 1 << 20), (1 << 15, 4), (1 << 16, 1 << 10)])
def test_any_cut_into_windows_finds_the_same(
    image: Path, monkeypatch: pytest.MonkeyPatch, dense: int, sparse_keys: int
) -> None:
    patch = Patch(image)
    patch.put(patch.l2(3), patch.word(patch.l2(20)))
    patch.put(patch.l2(5), COPIED | (len(patch.data) + (5 << 16)))
    patch.put(patch.l2(6), COPIED | (1 << 50))
    patch.put_count(100, 3)
    with open(image, "r+b") as file:
        file.truncate(20 << 30)
    whole = check(image)
    monkeypatch.setattr(check_counts, "DENSE_BYTES", dense)
    monkeypatch.setattr(check_counts, "SPARSE_KEYS", sparse_keys)
    monkeypatch.setattr(check_counts, "BINS", 16)
    parts = check(image)
    assert parts[:-1] == whole[:-1]
    assert Counter(parts.messages) == Counter(whole.messages)


def test_more_references_than_a_narrow_counter_holds(image: Path) -> None:
    patch = Patch(image)
    entry = patch.word(patch.l2(3))
    for index in range(100, 500):
        struct.pack_into(">Q", patch.data, patch.l2(index), entry)
    patch.put(patch.l2(500), entry)
    result = check(image)
    assert f"ERROR cluster {(entry & OFFSET) >> 16} refcount=1 reference=402" in result.messages


# -- side by side ---------------------------------------------------------------------------------

KINDS = {
    "plain": (["-o", "cluster_size=65536"], "64M", 0),
    "small": (["-o", "cluster_size=512"], "1M", 0),
    "snapshots": (["-o", "cluster_size=4096"], "8M", 3),
    "bits1": (["-o", "cluster_size=4096,refcount_bits=1"], "8M", 0),
    "bits2": (["-o", "cluster_size=2048,refcount_bits=2"], "8M", 1),
    "bits8": (["-o", "cluster_size=1024,refcount_bits=8"], "4M", 2),
    "bits64": (["-o", "cluster_size=1024,refcount_bits=64"], "4M", 1),
    "extended": (["-o", "cluster_size=16384,extended_l2=on"], "32M", 0),
    "version2": (["-o", "cluster_size=4096,compat=0.10"], "8M", 1),
    "data file": (["-o", "cluster_size=4096,data_file=data.raw"], "8M", 0),
    "compressed": (["-o", "cluster_size=4096"], "8M", 0),
    "bitmaps": (["-o", "cluster_size=4096"], "8M", 0),
}


@pytest.fixture(params=KINDS)
def peer_image(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu_img: Any,
               qemu_io: Any) -> Path:  # fmt: skip
    """An image of some kind, written by the peer."""
    monkeypatch.chdir(tmp_path)
    options, size, snapshots = KINDS[request.param]
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *options, path, size)
    commands = ["write -P 1 0 300k", "write -P 2 600k 100k", "write -z 800k 40k"]
    if request.param == "compressed":
        commands += [f"write -c -P {i} {1000 + 4 * i}k 4k" for i in range(20)]
    qemu_io(*(word for command in commands for word in ("-c", command)), path)
    for number in range(snapshots):
        qemu_img("snapshot", "-c", f"s{number}", path)
        qemu_io("-c", "write -P 9 40k 60k", "-c", f"write -P 7 {number * 100}k 50k", path)
    if request.param == "bitmaps":
        qemu_img("bitmap", "--add", path, "b")
        qemu_io("-c", "write -P 1 0 100k", path)
    return path


def peer_check(qemu_img: Any, path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    done = qemu_img("check", "--output=json", path, check=False)
    ours = ("qemu-img: Check failed", "Use qemu-img amend", "qcow2: Image is corrupt", "qcow2: Marking image")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(ours)]
    return (json.loads(done.stdout) if done.stdout.strip() else None), lines


def compare(qemu_img: Any, path: Path, what: object = "") -> None:
    theirs, lines = peer_check(qemu_img, path)
    mine = check(path)
    if theirs is None:
        assert mine.check_errors, what
        return
    assert counts(mine) == tuple(theirs.get(name, 0) for name in COUNTS), what
    said = [line for text in mine.messages for line in text.splitlines() if not line.startswith("Use qemu-img amend")]
    assert Counter(said) == Counter(lines), what


@pytest.mark.oracle
def test_sound_images_of_the_peer(peer_image: Path, qemu_img: Any) -> None:
    assert check(peer_image)[:3] == (0, 0, 0)
    compare(qemu_img, peer_image)


@pytest.mark.oracle
def test_damage_as_the_peer_sees_it(peer_image: Path, qemu_img: Any) -> None:
    """Random damage to tables: the same counts, the same statistics, the same lines."""
    whole = peer_image.read_bytes()
    fields = Patch(peer_image).fields()
    chance = random.Random(len(whole))
    for _ in range(12):
        peer_image.write_bytes(whole)
        patch = Patch(peer_image)
        log = []
        for _ in range(chance.choice((1, 1, 2, 4))):
            at = chance.choice(fields)
            value = damaged(patch, at, chance.choice(fields), chance)
            log.append(f"{at:#x}: {patch.word(at):#x} -> {value:#x}")
            patch.put(at, value)
        compare(qemu_img, peer_image, log)


def damaged(patch: Patch, at: int, other: int, chance: random.Random) -> int:
    value, size = patch.word(at), patch.header.cluster_size
    flags = value & ~OFFSET
    return chance.choice((
        0, value ^ COPIED, value ^ 1 << chance.randrange(64), patch.word(other), value | 1,
        flags | chance.randrange(len(patch.data) + 4 * size) & OFFSET,
        flags | chance.randrange(len(patch.data)) // size * size,
        flags | (len(patch.data) // size + chance.randrange(1, 200)) * size,
        chance.getrandbits(64), value ^ 1 << chance.randrange(9),
    ))  # fmt: skip


@pytest.mark.oracle
def test_every_bit_of_an_entry(peer_image: Path, qemu_img: Any) -> None:
    """Some bits of an L1, an L2 and a refcount table entry, one at a time."""
    whole = peer_image.read_bytes()
    patch = Patch(peer_image)
    for at, bits in (
        (patch.l1(), (1, 8, 9, 40, 56, 62)),
        (patch.l2(), (0, 1, 8, 9, 56, 61, 62)),
        (patch.table(), (3, 9)),
    ):
        for bit in bits:
            peer_image.write_bytes(whole)
            patch = Patch(peer_image)
            patch.put(at, patch.word(at) ^ 1 << bit)
            compare(qemu_img, peer_image, (hex(at), bit))
