"""Repairing qcow2 images: what was found is gone afterwards, guest data stays, the peer agrees."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.errors import ByreError, Corrupt, IOFailure, NotSupported
from byre.formats.abilities import Checkable, CheckResult
from byre.formats.qcow2 import check_counts, layout
from byre.graph.node import Node
from byre.jobs.job import Control

OFFSET = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
SIZE = 8 << 20


def check(path: Path, fix: str = "") -> CheckResult:
    with byre.open(str(path), format="qcow2", read_only=not fix, check=True, backing=False) as image:
        node = image.node
        assert isinstance(node, Checkable)
        return node.check(Control(), fix)


def clean(path: Path) -> bool:
    return check(path)[:3] == (0, 0, 0)


def content(path: Path) -> bytes:
    with byre.open(str(path), backing=False) as image:
        return bytes(image.read(0, image.size))


def digest(path: Path) -> str:
    """Of what the guest sees."""
    return hashlib.sha256(content(path)).hexdigest()


def raw_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def word(path: Path, offset: int) -> int:
    value: int = struct.unpack_from(">Q", path.read_bytes(), offset)[0]
    return value


def put(path: Path, offset: int, value: int, form: str = ">Q") -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, value))


def header(path: Path) -> layout.Header:
    return layout.decode_header(path.read_bytes()[:4096], repair=True)


def l2(path: Path, index: int) -> int:
    stride = 16 if header(path).extended_l2 else 8
    return (word(path, header(path).l1_table_offset) & OFFSET) + stride * index


def block(path: Path) -> int:
    return word(path, header(path).refcount_table_offset)


@pytest.fixture(params=[16, 1, 64])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """4 KiB clusters, refcounts of 16 bits and others: 300 KiB and 100 KiB of data."""
    path = tmp_path / "a.qcow2"
    byre.create(str(path), "qcow2", SIZE, options={"cluster_size": 4096, "refcount_bits": request.param})
    with byre.open(str(path), read_only=False) as image:
        image.write(0, bytes(range(256)) * 1200)
        image.write(1 << 20, b"b" * 100_000)
    return path


def set_count(path: Path, cluster: int, value: int) -> None:
    bits = 1 << header(path).refcount_order
    at = block(path) + cluster * bits // 8
    if bits == 1:
        byte = path.read_bytes()[at] & ~(1 << cluster % 8) | (value & 1) << cluster % 8
        put(path, at, byte, ">B")
    else:
        put(path, at, value, {16: ">H", 64: ">Q"}[bits])


# -- counts and flags -----------------------------------------------------------------------------


@pytest.mark.parametrize("fix", ["leaks", "all"])
def test_leaks(image: Path, fix: str) -> None:
    put(image, l2(image, 3), 0)
    put(image, l2(image, 70), 0)
    before = content(image)
    result = check(image, fix)
    assert result[:5] == (0, 0, 0, 0, 2)
    assert all(message.startswith(("Leaked cluster ", "Repairing cluster ")) for message in result.messages)
    assert clean(image)
    assert content(image) == before


def test_leaks_alone_leave_errors_alone(image: Path) -> None:
    put(image, l2(image, 3), word(image, l2(image, 4)))
    result = check(image, "leaks")
    assert result.leaks_fixed == 1
    assert result.corruptions > 0
    assert not result.corruptions_fixed
    assert not clean(image)


def test_a_count_of_zero_rebuilds(image: Path) -> None:
    before = content(image)
    host = (word(image, l2(image, 3)) & OFFSET) >> 12
    set_count(image, host, 0)
    set_count(image, host + 1, 0)
    refused = check(image, "leaks")
    assert refused.check_errors == 1
    assert "ERROR need to rebuild refcount structures" in refused.messages
    old = header(image).refcount_table_offset
    result = check(image, "all")
    assert result[:4] == (0, 0, 0, 2)
    assert "Rebuilding refcount structure" in result.messages
    assert header(image).refcount_table_offset != old
    assert clean(image)
    assert content(image) == before


@pytest.mark.parametrize("image", [16, 64], indirect=True)
def test_shared_clusters_get_their_count_and_lose_the_flag(image: Path) -> None:
    put(image, l2(image, 3), word(image, l2(image, 4)))
    before = content(image)
    result = check(image, "all")
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert result.leaks_fixed == 1
    assert result.corruptions_fixed == 3  # the count and two flags
    assert not word(image, l2(image, 3)) & COPIED
    assert clean(image)
    assert content(image) == before
    with byre.open(str(image), read_only=False) as opened:
        opened.write(3 << 12, b"new")
        assert opened.read(4 << 12, 3) == before[4 << 12 : (4 << 12) + 3]


@pytest.mark.parametrize("fix", ["leaks", "all"])
def test_flags(image: Path, fix: str) -> None:
    l1 = header(image).l1_table_offset
    put(image, l1, word(image, l1) & ~COPIED)
    for index in (0, 5, 30):
        put(image, l2(image, index), word(image, l2(image, index)) & ~COPIED)
    result = check(image, fix)
    assert result[:5] == (0, 0, 0, 4, 0)
    assert clean(image)


# -- structures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [0, 0x200, 0x7F, 1 << 40, 1 << 63, 0x3000, 0x1000])
def test_refcount_table_entries(image: Path, entry: int) -> None:
    before = content(image)
    put(image, header(image).refcount_table_offset, entry)
    assert not clean(image)
    length = image.stat().st_size
    result = check(image, "all")
    assert (result.corruptions, result.leaks) == (0, 0)
    assert clean(image)
    assert content(image) == before
    assert image.stat().st_size < length + (1 << 20)  # an offset far away does not grow the file


def test_no_refcount_table_at_all(image: Path) -> None:
    before = content(image)
    put(image, 48, 0)
    put(image, 56, 0, ">I")
    result = check(image, "all")
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert clean(image)
    assert content(image) == before


@pytest.mark.parametrize("dense", [1, 4096 * 8])
def test_rebuilding_in_windows(image: Path, monkeypatch: pytest.MonkeyPatch, dense: int) -> None:
    before = content(image)
    put(image, header(image).refcount_table_offset, 0)
    with open(image, "r+b") as file:
        file.truncate(3 << 30)
    monkeypatch.setattr(check_counts, "DENSE_BYTES", dense)
    monkeypatch.setattr(check_counts, "SPARSE_KEYS", 100)
    monkeypatch.setattr(check_counts, "BINS", 64)
    result = check(image, "all")
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert clean(image)
    assert content(image) == before


def test_a_file_that_cannot_grow(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a block device: the new structures go where nothing is."""
    before = content(image)
    with open(image, "r+b") as file:
        file.truncate(image.stat().st_size + (64 << 12))
    put(image, header(image).refcount_table_offset, 0)
    length = image.stat().st_size

    def refuse(self: Node, size: int, **more: object) -> None:
        raise NotSupported("this is a device")

    from byre.protocols.file import FileNode

    monkeypatch.setattr(FileNode, "resize", refuse)
    result = check(image, "all")
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    assert image.stat().st_size == length
    assert clean(image)
    assert content(image) == before


@pytest.mark.parametrize("image", [16], indirect=True)
def test_an_l2_table_on_top_of_the_header_is_not_written(image: Path) -> None:
    put(image, header(image).l1_table_offset, COPIED | 1)
    head = image.read_bytes()[:48]
    check(image, "all")
    assert image.read_bytes()[:48] == head


def test_preallocated_clusters_that_are_not_aligned(image: Path) -> None:
    put(image, l2(image, 5), (word(image, l2(image, 5)) + 512) | 1)
    result = check(image, "all")
    assert (result.corruptions, result.check_errors) == (0, 0)
    assert result.corruptions_fixed >= 1
    assert word(image, l2(image, 5)) == 1
    assert clean(image)


# -- feature bits ---------------------------------------------------------------------------------


def test_dirty_and_corrupt_bits_are_cleared(image: Path) -> None:
    put(image, 72, layout.INCOMPATIBLE_DIRTY | layout.INCOMPATIBLE_CORRUPT)
    with pytest.raises(ByreError, match="corrupt"):
        byre.open(str(image), read_only=False)
    assert clean(image)
    assert check(image, "all")[:5] == (0, 0, 0, 0, 0)
    assert word(image, 72) == 0
    with byre.open(str(image), read_only=False) as opened:
        opened.write(0, b"x")
    assert clean(image)


def test_bits_stay_where_damage_stays(image: Path) -> None:
    put(image, 72, layout.INCOMPATIBLE_CORRUPT)
    put(image, l2(image, 5), COPIED | 1 << 40)
    result = check(image, "all")
    assert result.corruptions
    assert word(image, 72) == layout.INCOMPATIBLE_CORRUPT


def test_a_dirty_image_is_mended_when_it_is_opened_for_writing(image: Path) -> None:
    before = content(image)
    for cluster in range(40):
        set_count(image, cluster, 0)
    put(image, 72, layout.INCOMPATIBLE_DIRTY)
    assert content(image) == before  # reading needs no repair
    assert word(image, 72) == layout.INCOMPATIBLE_DIRTY
    with byre.open(str(image), read_only=False) as opened:
        opened.write(2 << 20, b"c" * 10_000)
        assert opened.read(0, len(before))[: 2 << 20] == before[: 2 << 20]
    assert word(image, 72) == 0
    assert clean(image)


def test_a_dirty_image_that_cannot_be_mended_is_refused(image: Path) -> None:
    put(image, l2(image, 5), COPIED | 1 << 40)
    put(image, 72, layout.INCOMPATIBLE_DIRTY)
    with pytest.raises(Corrupt, match="could not be repaired"):
        byre.open(str(image), read_only=False)


# -- failures -------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_image_no_worse(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write of a rebuild fails in turn; what is on disk then can still be read and mended."""
    from byre.protocols.file import FileNode

    before = content(image)
    put(image, header(image).refcount_table_offset, 0)
    broken = image.read_bytes()
    write = FileNode.write_from
    for stop in range(20):
        image.write_bytes(broken)
        left = [stop]

        def failing(self: Any, offset: int, buffer: memoryview, flags: int = 0, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise IOFailure("no more")
            write(self, offset, buffer, flags)

        monkeypatch.setattr(FileNode, "write_from", failing)
        try:
            done = check(image, "all")
        except ByreError:
            done = None
        monkeypatch.undo()
        assert content(image) == before
        if done is not None and not done.check_errors:
            assert stop > 1
            break
        assert check(image, "all").corruptions == 0
        assert clean(image)
    else:
        pytest.fail("the repair never came to its end")


# -- side by side ---------------------------------------------------------------------------------


@pytest.fixture
def shots(tmp_path: Path, qemu_img: Any, qemu_io: Any) -> Path:
    """Three snapshots, written by the peer."""
    path = tmp_path / "s.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, SIZE)
    for number in range(3):
        qemu_io("-c", f"write -P {number + 1} {number * 50}k 300k", path)
        qemu_img("snapshot", "-c", f"s{number}", path)
    return path


def peer(qemu_img: Any, path: Path, *options: str) -> dict[str, Any] | None:
    done = qemu_img("check", "--output=json", *options, path, check=False)
    return json.loads(done.stdout) if done.stdout.strip() else None


@pytest.mark.oracle
def test_snapshot_entries_without_extra_data(shots: Path, qemu_img: Any, qemu_io: Any) -> None:
    """Incomplete entries are written anew, in another place, and refcount structures with them."""
    at = header(shots).snapshots_offset
    data = bytearray(shots.read_bytes())
    extra = struct.unpack_from(">I", data, at + 36)[0]
    # The first entry loses its extra data: what follows moves up.
    table = data[at : at + 4096]
    put_back = table[:36] + bytes(4) + table[40 + extra :]
    end = 40 + struct.unpack_from(">H", table, 12)[0] + struct.unpack_from(">H", table, 14)[0]
    size = 40 + extra + end - 40
    moved = put_back[:end] + bytes(-end % 8) + table[size + -size % 8 :]
    data[at : at + len(moved)] = moved
    shots.write_bytes(data)
    before = content(shots)
    assert check(shots).corruptions == 1
    assert (peer(qemu_img, shots) or {}).get("corruptions") == 1
    result = check(shots, "all")
    assert result[:4] == (0, 0, 0, 1)
    assert header(shots).snapshots_offset != at
    assert clean(shots)
    assert peer(qemu_img, shots) is not None
    qemu_img("check", shots)
    listed = qemu_img("snapshot", "-l", shots).stdout
    assert all(f"s{number}" in listed for number in range(3))
    assert content(shots) == before
    qemu_img("snapshot", "-a", "s0", shots)
    qemu_io("-c", "read -P 1 0 300k", shots)


LOST = {"not aligned": (0, 8, 1 << 9), "behind the end": (0, 8, 1 << 47)}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", LOST)
def test_a_snapshot_that_cannot_be_read_does_not_stay_for_ever(shots: Path, qemu_img: Any, qemu_io: Any,
                                                               kind: str) -> None:  # fmt: skip
    """With it the image could not be opened, or the snapshot not be deleted."""
    first, size, flip = LOST[kind]
    at = header(shots).snapshots_offset + first
    form = ">Q" if size == 8 else ">I"
    put(shots, at, struct.unpack_from(form, shots.read_bytes(), at)[0] ^ flip, form)
    before = content(shots)
    assert check(shots).corruptions == 1
    if kind != "behind the end":
        with byre.open(str(shots)) as image, pytest.raises(ByreError, match="check -r all"):
            _ = image.node.snapshots  # type: ignore[attr-defined]
    check(shots, "leaks")
    assert header(shots).nb_snapshots == 3
    result = check(shots, "all")
    assert result[:3] == (0, 0, 0)
    assert any("Discarding snapshot table entry 0" in line for line in result.messages)
    assert clean(shots)
    qemu_img("check", shots)
    assert content(shots) == before
    with byre.open(str(shots), read_only=False) as image:
        assert [shot.name for shot in image.node.snapshots] == ["s1", "s2"]  # type: ignore[attr-defined]
        image.apply_snapshot("s1")
        image.delete_snapshot("s2")
    assert clean(shots)
    assert "failed" not in qemu_io("-c", "read -P 2 50k 300k", shots).stdout


@pytest.mark.oracle
def test_opening_gives_up_no_snapshot(shots: Path) -> None:
    """The repair of an image that was not closed cleanly is not asked for."""
    at = header(shots).snapshots_offset
    put(shots, at, word(shots, at) ^ 1 << 47)
    put(shots, 72, 1)
    with pytest.raises(Corrupt, match="could not be repaired"):
        byre.open(str(shots), read_only=False)
    assert header(shots).nb_snapshots == 3


@pytest.mark.oracle
def test_too_much_extra_data_is_dropped(shots: Path, qemu_img: Any) -> None:
    at = header(shots).snapshots_offset
    put(shots, at + 36, 3000, ">I")
    refused = check(shots)
    assert refused.check_errors == 1
    assert peer(qemu_img, shots) is None
    result = check(shots, "all")
    assert result.corruptions_fixed > 0
    qemu_img("check", shots, check=False)
    assert check(shots).check_errors == 0


@pytest.mark.oracle
@pytest.mark.parametrize("options", ["", "refcount_bits=8", "extended_l2=on,cluster_size=16384", "compat=0.10"])
def test_random_damage_is_mended_as_by_the_peer(tmp_path: Path, qemu_img: Any, qemu_io: Any, options: str) -> None:
    """Wherever the peer's repair leaves nothing wrong, ours does, and the peer agrees; what cannot be mended agrees."""
    path, other = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    options = options if "cluster_size" in options else ",".join(filter(None, (options, "cluster_size=4096")))
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    qemu_io("-c", "write -P 1 0 600k", "-c", "write -P 2 3M 200k", path)
    if "extended" not in options:
        qemu_img("snapshot", "-c", "s", path)
        qemu_io("-c", "write -P 3 100k 300k", path)
    whole = path.read_bytes()
    head = header(path)
    tables = [word(path, head.l1_table_offset) & OFFSET, block(path)]
    chance = random.Random(options)
    for _ in range(10):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 2, 4))):
            at = chance.choice(tables) + 8 * chance.randrange(200)
            value = struct.unpack_from(">Q", data, at)[0]
            elsewhere = struct.unpack_from(">Q", data, tables[0] + 16 * chance.randrange(100))[0]
            changed = chance.choice((0, value ^ COPIED, elsewhere, value ^ 1 << chance.randrange(16, 30)))
            struct.pack_into(">Q", data, at, changed)
        path.write_bytes(data)
        other.write_bytes(data)
        fix = chance.choice(("all", "leaks"))
        theirs = peer(qemu_img, other, "-r", fix)
        mine = check(path, fix)
        if theirs is None:
            assert mine.check_errors
            continue
        after = check(path)
        assert (after.corruptions, after.leaks) == (theirs.get("corruptions", 0), theirs.get("leaks", 0))
        fixed = (theirs.get("corruptions-fixed", 0), theirs.get("leaks-fixed", 0))
        assert (mine.corruptions_fixed, mine.leaks_fixed) == fixed
        found = peer(qemu_img, path)
        assert found is not None
        assert (found.get("corruptions", 0), found.get("leaks", 0)) == (after.corruptions, after.leaks)


def test_what_does_not_fit_into_a_count_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    byre.create(str(path), "qcow2", SIZE, options={"refcount_bits": 1})
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"x" * 65536)
    put(path, l2(path, 1), word(path, l2(path, 0)))
    for fix in ("", "leaks", "all"):
        found = check(path, fix)
        assert found.corruptions == 1
        assert [text.partition("\n")[0] for text in found.messages] == ["ERROR: overflow cluster offset=0x50000"]


@pytest.mark.parametrize("fix", ["leaks", "all"])
def test_a_repair_clears_autoclear_bits_nobody_knows(image: Path, fix: str) -> None:
    """What they vouch for is not looked after from here on."""
    put(image, 88, 1 << 63 | 1 << 5)
    check(image)
    assert header(image).autoclear_features == 1 << 63 | 1 << 5
    check(image, fix)
    assert header(image).autoclear_features == 0


# -- tables that do not fit -----------------------------------------------------------------------


def snapshotted(path: Path) -> tuple[Path, int]:
    """An image with one snapshot; where its table lies."""
    byre.create(str(path), "qcow2", SIZE, options={"cluster_size": 4096})
    with byre.open(str(path), read_only=False) as image:
        image.write(0, bytes(range(256)) * 1200)
        image.create_snapshot("one")
        image.write(8192, b"n" * 40_000)
    return path, header(path).snapshots_offset


@pytest.mark.parametrize("size", [0xC002, 0x202, 0x4003])
def test_a_damaged_l1_size_is_cut_to_what_the_disk_needs(image: Path, size: int) -> None:
    before, good = content(image), header(image).l1_size
    put(image, 36, size, ">I")
    damaged = image.read_bytes()
    left = check(image, "leaks")
    assert left.corruptions
    assert not left.leaks_fixed
    assert image.read_bytes() == damaged  # nothing may be let go of: what is used is not certain
    result = check(image, "all")
    assert result[:5] == (0, 0, 0, 1, 0)
    assert f"Repairing L1 table: its {size} entries run into other metadata, the disk needs {good}" in result.messages
    assert header(image).l1_size == good
    assert clean(image)
    assert content(image) == before


def test_an_l1_table_with_room_to_spare_stays_as_it_is(image: Path) -> None:
    put(image, 36, 512, ">I")  # one cluster
    assert check(image, "all")[:5] == (0, 0, 0, 0, 0)
    assert header(image).l1_size == 512


@pytest.mark.parametrize("fix", ["leaks", "all"])
def test_clusters_of_a_disk_whose_l1_table_is_lost_are_not_freed(image: Path, fix: str) -> None:
    put(image, 40, 0x100_3000)
    damaged = image.read_bytes()
    result = check(image, fix)
    assert result.corruptions
    assert result.leaks
    assert not result.leaks_fixed
    assert image.read_bytes() == damaged
    put(image, 40, header(image).l1_table_offset - 0x100_0000)
    assert clean(image)


@pytest.mark.parametrize("size", [0x3002, 0x202, 0x200_0002])
def test_a_damaged_l1_size_of_a_snapshot_is_cut(tmp_path: Path, size: int) -> None:
    path, table = snapshotted(tmp_path / "a.qcow2")
    before, good = content(path), word(path, table + 8) >> 32
    put(path, table + 8, size, ">I")
    damaged = path.read_bytes()
    assert check(path, "leaks").corruptions
    if size < 0x10_0000:
        assert path.read_bytes() == damaged
    else:
        with byre.open(str(path)) as image, pytest.raises(ByreError, match="check -r all"):
            _ = image.node.snapshots  # type: ignore[attr-defined]
    result = check(path, "all")
    assert result[:3] == (0, 0, 0)
    assert clean(path)
    assert content(path) == before
    assert word(path, header(path).snapshots_offset + 8) >> 32 == good
    with byre.open(str(path), read_only=False) as opened:
        opened.apply_snapshot("one")
        assert bytes(opened.read(0, 256 * 1200)) == bytes(range(256)) * 1200
    assert clean(path)


@pytest.mark.parametrize("count", [1, 2, 0xE000, 0xFFFF_FFFF])
def test_a_damaged_number_of_snapshots_leaves_none(image: Path, count: int) -> None:
    """Without a snapshot table: what the header says would be entries."""
    before = content(image)
    put(image, 60, count, ">I")
    result = check(image, "all")
    assert result[:3] == (0, 0, 0)
    assert header(image).nb_snapshots == 0
    assert clean(image)
    assert content(image) == before


def test_empty_snapshot_entries_go(tmp_path: Path) -> None:
    path, _ = snapshotted(tmp_path / "a.qcow2")
    before = content(path)
    put(path, 60, 30, ">I")
    assert check(path, "all")[:3] == (0, 0, 0)
    assert header(path).nb_snapshots == 1
    assert clean(path)
    assert content(path) == before


def test_a_snapshot_table_that_reaches_past_the_end_is_not_freed(tmp_path: Path) -> None:
    """A damaged length of an id: the entry is cut off by the end of the file, the snapshot itself is whole."""
    path, table = snapshotted(tmp_path / "a.qcow2")
    before, shot_l1 = content(path), word(path, table)
    put(path, table + 12, 0xFFFF, ">H")
    damaged = path.read_bytes()
    assert check(path, "leaks").corruptions
    assert path.read_bytes() == damaged
    assert check(path, "all")[:3] == (0, 0, 0)
    assert clean(path)
    assert header(path).nb_snapshots == 1
    assert word(path, header(path).snapshots_offset) == shot_l1
    assert content(path) == before
    again = check(path, "all")
    assert again[:5] == (0, 0, 0, 0, 0)


# -- bitmaps whose bits or table are lost ---------------------------------------------------------


GRANULARITY = 65_536


@pytest.fixture
def bitmapped(tmp_path: Path) -> Path:
    """4 KiB clusters; the bitmap "b" says that the second and the last 64 KiB of the disk changed, "c" nothing."""
    path = tmp_path / "a.qcow2"
    byre.create(str(path), "qcow2", SIZE, options={"cluster_size": 4096})
    with byre.open(str(path), read_only=False) as image:
        image.node.bitmap_store().add("b", GRANULARITY)  # type: ignore[attr-defined]
        image.node.bitmap_store().add("c", 4096, enabled=False)  # type: ignore[attr-defined]
    with byre.open(str(path), read_only=False) as image:
        image.write(GRANULARITY, b"n" * 4096)
        image.write(SIZE - 4096, b"n" * 4096)
    assert changed(path) == {"b": 2 * GRANULARITY, "c": 0}
    return path


def bitmap_table(path: Path, number: int = 0) -> tuple[int, int]:
    """Where the directory entry of a bitmap is, and its table. Both entries are 32 bytes long."""
    data = path.read_bytes()
    directory: int = struct.unpack_from(">Q", data, data.index(struct.pack(">II", 0x2385_2875, 24)) + 24)[0]
    return directory + 32 * number, word(path, directory + 32 * number)


def changed(path: Path) -> dict[str, int]:
    """Bytes that each bitmap calls changed; all of them must be usable."""
    with byre.open(str(path)) as image:
        found = image.node.bitmap_store().all()  # type: ignore[attr-defined]
        assert not any(bitmap.inconsistent for bitmap in found)
        return {bitmap.name: bitmap.dirty_bytes for bitmap in found}


@pytest.mark.parametrize("place", [0x7F_0000, 0x80_0000_0000_0000])
def test_bits_past_the_end_of_the_file_count_as_changed(bitmapped: Path, place: int) -> None:
    before = digest(bitmapped)
    _, table = bitmap_table(bitmapped)
    put(bitmapped, table, place)
    assert check(bitmapped).corruptions == 1
    assert check(bitmapped, "leaks").corruptions == 1
    assert word(bitmapped, table) == place
    result = check(bitmapped, "all")
    assert result[0] == result[2] == 0
    assert result.corruptions_fixed == 1
    assert any("bitmap 'b': 1 clusters of its bits" in line for line in result.messages)
    assert word(bitmapped, table) == 1
    assert clean(bitmapped)
    assert changed(bitmapped) == {"b": SIZE, "c": 0}
    assert digest(bitmapped) == before
    assert check(bitmapped, "all")[:5] == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("number", [0, 1])
def test_a_bitmap_whose_table_is_lost_stays_and_counts_all_as_changed(bitmapped: Path, number: int, size: int) -> None:
    before = digest(bitmapped)
    place, _ = bitmap_table(bitmapped, number)
    put(bitmapped, place, 0x7F_F000)
    put(bitmapped, place + 8, size, ">I")
    assert check(bitmapped).corruptions == 1
    result = check(bitmapped, "all")
    assert result[0] == result[2] == 0
    assert result.corruptions_fixed == 1
    name = "bc"[number]
    assert any(f"bitmap '{name}': its table at 0x7ff000 lies past the end" in line for line in result.messages)
    assert clean(bitmapped)
    assert changed(bitmapped) == {"b": 2 * GRANULARITY, "c": 0} | {name: SIZE}
    assert digest(bitmapped) == before
    with byre.open(str(bitmapped), read_only=False) as image:  # the new table can be let go of again
        image.node.bitmap_store().remove(name)  # type: ignore[attr-defined]
    assert clean(bitmapped)


def test_bitmaps_are_left_alone_while_something_else_is_wrong(bitmapped: Path) -> None:
    """A file that grows would bring other references past its end to life."""
    place, _ = bitmap_table(bitmapped)
    put(bitmapped, place, 0x7F_F000)
    put(bitmapped, l2(bitmapped, 0), 0x7F_E000 | COPIED)
    assert check(bitmapped, "all").corruptions == 2
    assert word(bitmapped, place) == 0x7F_F000


def test_a_table_that_others_use_is_not_written(bitmapped: Path) -> None:
    """The table of the bitmap would be an L2 table, whose entries are no bits."""
    place, _ = bitmap_table(bitmapped)
    put(bitmapped, place, l2(bitmapped, 0))
    put(bitmapped, l2(bitmapped, 0), 0x7F_E000)
    put(bitmapped, l2(bitmapped, 16), 0)
    put(bitmapped, l2(bitmapped, 511), 0)
    table = l2(bitmapped, 0)
    check(bitmapped, "all")
    assert word(bitmapped, table) & OFFSET == 0x7F_E000


# -- L1 entries that point nowhere ----------------------------------------------------------------


@pytest.mark.parametrize("entry", [0x200, 0x1, COPIED, COPIED | 0x7F00_0000_0000_0E01])
def test_an_l1_entry_that_points_to_no_cluster_is_cleared(image: Path, entry: int) -> None:
    before = digest(image)
    at = header(image).l1_table_offset + 8 * (header(image).l1_size - 1)
    assert word(image, at) == 0
    put(image, at, entry)
    assert check(image).corruptions
    check(image, "leaks")
    assert word(image, at) == entry
    result = check(image, "all")
    assert result[:3] == (0, 0, 0)
    assert result.corruptions_fixed
    assert any(f"{entry:x} points to no L2 table" in line for line in result.messages)
    assert word(image, at) == 0
    assert clean(image)
    assert digest(image) == before
    assert check(image, "all")[:5] == (0, 0, 0, 0, 0)


def test_an_l1_entry_into_a_whole_table_is_not_cleared(image: Path) -> None:
    at = header(image).l1_table_offset
    put(image, at, word(image, at) | 0x200)
    check(image, "all")
    assert word(image, at) & OFFSET & ~0xFFF


def test_a_snapshot_table_that_reaches_into_other_metadata_is_written_anew(tmp_path: Path) -> None:
    """A damaged length of an id, that ends inside the file."""
    path, table = snapshotted(tmp_path / "a.qcow2")
    before, shot_l1 = digest(path), word(path, table)
    put(path, table + 12, 0x3001, ">H")
    damaged = raw_digest(path)
    assert check(path, "leaks").corruptions
    assert raw_digest(path) == damaged
    assert check(path, "all")[:3] == (0, 0, 0)
    assert clean(path)
    assert header(path).nb_snapshots == 1
    assert word(path, header(path).snapshots_offset) == shot_l1
    assert digest(path) == before
    assert check(path, "all")[:5] == (0, 0, 0, 0, 0)


def test_an_l1_table_that_runs_into_guest_data_is_cut(image: Path) -> None:
    """Where the words behind it are no entries."""
    before, good = digest(image), header(image).l1_size
    at, end = header(image).l1_table_offset, len(image.read_bytes())
    table = image.read_bytes()[at : at + good * 8]
    with open(image, "r+b") as file:  # the table moves behind everything else, guest data follow it
        file.seek(end)
        file.write(table.ljust(4096, b"\0") + b"guest data" * 4096)
    put(image, 40, end)
    assert check(image, "all")[0] == 0
    put(image, 36, 0x402, ">I")
    assert check(image).corruptions
    result = check(image, "all")
    assert result[:3] == (0, 0, 0)
    assert header(image).l1_size == good
    assert clean(image)
    assert digest(image) == before


def test_guest_data_that_a_damaged_snapshot_takes_for_a_table_stay(tmp_path: Path) -> None:
    path, table = snapshotted(tmp_path / "a.qcow2")
    with byre.open(str(path), read_only=False) as image:
        image.write(8192, b"\x09" * 4096)
    before = digest(path)
    put(path, word(path, table), word(path, l2(path, 2)))
    check(path, "all")
    assert digest(path) == before


def test_a_snapshot_whose_l1_table_would_be_the_header_goes(tmp_path: Path) -> None:
    path, table = snapshotted(tmp_path / "a.qcow2")
    before = digest(path)
    put(path, table, 0)
    result = check(path, "all")
    assert result[:3] == (0, 0, 0)
    assert any("Discarding snapshot table entry 0" in line for line in result.messages)
    assert header(path).nb_snapshots == 0
    assert clean(path)
    assert digest(path) == before
