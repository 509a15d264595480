"""Persistent bitmaps of qcow2: kept across openings, in use while written, never wrongly clean."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.bitmaps.bitmap import Bitmap
from byre.errors import AlreadyExists, Busy, ByreError, ImageError, NoSpace, NotFound, NotSupported, ReadOnly
from byre.formats.abilities import HasBitmaps
from byre.formats.qcow2 import layout
from byre.formats.qcow2.bitmaps import StoredBitmaps
from byre.formats.qcow2.opening import read_bitmaps
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from conftest import Run, peer_program
from support.images import detached, new_image, open_image

SIZE = 8 << 20
CLUSTER = 4096
ALONE: Any = {"backing": None}


def store(image: Image) -> StoredBitmaps:
    node: Any = image.node
    assert isinstance(node, HasBitmaps)
    found: StoredBitmaps = node.bitmap_store()
    return found


def dirty(bitmap: Bitmap) -> list[tuple[int, int]]:
    return [row for part in bitmap.runs() for row in zip(*(column.tolist() for column in part), strict=True)]


def entries(memory: MemoryNode) -> dict[str, layout.BitmapEntry]:
    """The directory as it is in the file."""
    with open_image(detached(MemoryNode(memory.to_bytes())), read_only=True, options=ALONE) as image:
        node: Any = image.node
        return {entry.name: entry for entry in read_bitmaps(node)}


def sound(memory: MemoryNode) -> None:
    with open_image(detached(memory), check=True, read_only=True, options=ALONE) as image:
        node: Any = image.node
        result = node.check(Control())
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.messages
    detached(memory)


@pytest.fixture
def memory() -> MemoryNode:
    made = new_image("qcow2", SIZE, cluster_size=CLUSTER)
    with open_image(made) as image:
        image.write(0, b"before" * 10000)
        store(image).add("follows")
        store(image).add("rests", 512, enabled=False).set(1024, 512)
    return made


def test_they_are_there_after_closing_and_opening(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        image.write(100_000, b"x" * 10)
        image.write_zeroes(1 << 20, CLUSTER)
        image.discard(2 << 20, CLUSTER)
        image.write_compressed(3 << 20, bytes(range(256)) * 16)
    with open_image(detached(memory), read_only=True) as image:
        follows, rests = store(image).all()
        assert dirty(follows) == [(98304, 4096), (1 << 20, 4096), (2 << 20, 4096), (3 << 20, 4096)]
        assert dirty(rests) == [(1024, 512)]
        assert (follows.enabled, rests.enabled) == (True, False)
        assert (follows.granularity, rests.granularity) == (4096, 512)
    sound(memory)


def test_in_use_is_on_disk_before_the_guests_bytes(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        image.read(0, SIZE)
        assert not entries(memory)["follows"].in_use
        image.write(0, b"x")
        found = entries(memory)
        assert found["follows"].in_use
        assert found["follows"].auto
        # One that follows nothing is as good as it was.
        assert not found["rests"].in_use
    assert not entries(memory)["follows"].in_use


def test_opening_without_writing_changes_nothing(memory: MemoryNode) -> None:
    before = memory.to_bytes()
    for read_only in (True, False):
        with open_image(detached(memory), read_only=read_only) as image:
            image.read(0, SIZE)
            for bitmap in store(image).all():
                assert bitmap.dirty_bits in (0, 1)
        assert memory.to_bytes() == before


def test_a_bitmap_of_a_read_only_image_cannot_be_changed(memory: MemoryNode) -> None:
    with open_image(detached(memory), read_only=True) as image:
        bitmap = store(image).find("rests")
        assert bitmap.read_only
        for change in (bitmap.clear_all, bitmap.enable, lambda: bitmap.set(0, 1)):
            with pytest.raises(ReadOnly):
                change()
        with pytest.raises(NotSupported, match="readonly"):
            store(image).remove("rests")
        with pytest.raises(ReadOnly):
            store(image).add("new")
        assert dirty(bitmap) == [(1024, 512)]


def crashed(memory: MemoryNode) -> MemoryNode:
    """What is in the file while an image with bitmaps is written."""
    with open_image(detached(memory)) as image:
        image.write(0, b"x")
        image.flush()
        return detached(MemoryNode(memory.to_bytes()))


def test_one_found_in_use_can_only_be_removed(memory: MemoryNode) -> None:
    left = crashed(memory)
    with open_image(detached(left)) as image:
        bitmap = store(image).find("follows")
        assert bitmap.inconsistent
        for action in (bitmap.check, lambda: bitmap.merge(store(image).find("rests"))):
            with pytest.raises(NotSupported, match="inconsistent"):
                action()
        with pytest.raises(AlreadyExists):
            store(image).add("follows")
        image.write(0, b"y")
    assert entries(left)["follows"].in_use
    assert not entries(left)["rests"].in_use
    with open_image(detached(left)) as image:
        with pytest.raises(NotSupported, match="inconsistent"):
            image.resize(2 * SIZE)
        store(image).remove("follows")
        image.resize(2 * SIZE)
    assert list(entries(left)) == ["rests"]
    sound(left)


def test_removing_is_durable_at_once(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        store(image).remove("follows")
        assert list(entries(memory)) == ["rests"]
        with pytest.raises(NotFound):
            store(image).find("follows")
        store(image).remove("rests")
        assert not entries(memory)
        image.write(0, b"x")
    with open_image(detached(memory)) as image:
        node: Any = image.node
        assert layout.find_extension(node.extensions, layout.EXTENSION_BITMAPS) is None
        assert not node.header.autoclear_features
    sound(memory)


def test_enabling_and_disabling_are_kept(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        store(image).find("follows").disable()
        rests = store(image).find("rests")
        rests.enable()
        # From now on a crash must not leave it looking right.
        assert entries(memory)["rests"].in_use
        image.write(2048, b"x")
    with open_image(detached(memory), read_only=True) as image:
        follows, rests = store(image).all()
        assert (follows.enabled, rests.enabled) == (False, True)
        assert (dirty(follows), dirty(rests)) == ([], [(1024, 512), (2048, 512)])
    sound(memory)


def test_bitmaps_that_are_not_persistent_are_gone(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        passing = store(image).add("passing", persistent=False)
        image.write(0, b"x")
        assert passing.dirty_bits == 1
        assert store(image).find("passing") is passing
        assert [bitmap.name for bitmap in store(image).all()] == ["follows", "rests", "passing"]
    assert list(entries(memory)) == ["follows", "rests"]


def test_what_cannot_be_added(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        for name, granularity, message in (
            ("", 0, "empty"), ("follows", 0, "exists"), ("b", 1000, "power of 2"), ("b", 256, "power of 2"),
            ("b" * 1024, 0, "Name length"), ("ü" * 512, 0, "Name length"),
        ):  # fmt: skip
            with pytest.raises(ByreError, match=message):
                store(image).add(name, granularity)
    with (
        open_image(new_image("qcow2", SIZE, compat="0.10")) as image,
        pytest.raises(NotSupported, match="v2 files"),
    ):
        store(image).add("b")
    with (
        open_image(new_image("qcow2", 3 << 40, cluster_size=1 << 21)) as image,
        pytest.raises(NotSupported, match="Too much space"),
    ):
        store(image).add("b", 512)
    sound(memory)


def test_resizing(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        image.write(SIZE - 1, b"x")
        image.resize(40 * SIZE)
        image.write(39 * SIZE, b"y")
    sound(memory)
    with open_image(detached(memory)) as image:
        follows, rests = store(image).all()
        assert dirty(follows) == [(SIZE - 4096, 4096), (39 * SIZE, 4096)]
        assert dirty(rests) == [(1024, 512)]
        image.resize(SIZE, shrink=True)
        assert dirty(follows) == [(SIZE - 4096, 4096)]
    sound(memory)
    with open_image(detached(memory), read_only=True) as image:
        assert [dirty(bitmap) for bitmap in store(image).all()] == [[(SIZE - 4096, 4096)], [(1024, 512)]]


def test_a_job_in_the_way_of_resizing(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        bitmap = store(image).find("follows")
        bitmap.freeze()
        with pytest.raises(Busy):
            image.resize(2 * SIZE)
        with pytest.raises(Busy):
            store(image).remove("follows")
        image.write(0, b"x")
        # Closed with a successor, what both have counts.
    with open_image(detached(memory), read_only=True) as image:
        assert dirty(store(image).find("follows")) == [(0, 4096)]


def test_reopening_stores_and_goes_on(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        image.write(0, b"x")
        image.reopen(read_only=True)
        assert not entries(memory)["follows"].in_use
        bitmap = store(image).find("follows")
        with pytest.raises(ReadOnly):
            bitmap.clear_all()
        image.reopen(read_only=False)
        assert not entries(memory)["follows"].in_use
        image.write(1 << 20, b"y")
        assert entries(memory)["follows"].in_use
    with open_image(detached(memory), read_only=True) as image:
        assert dirty(store(image).find("follows")) == [(0, 4096), (1 << 20, 4096)]
    sound(memory)


def test_a_bitmap_of_which_everything_is_dirty_takes_a_table_only() -> None:
    memory = new_image("qcow2", 1 << 30, cluster_size=512)
    before = memory.size
    with open_image(memory) as image:
        store(image).add("b", 512, enabled=False).set(0, 1 << 30)
    # 1 GiB / 512 / 8 / 512 entries
    assert memory.size - before < 512 * 8 + 4096
    with open_image(detached(memory), read_only=True) as image:
        assert store(image).find("b").dirty_bytes == 1 << 30
    sound(memory)


def test_the_image_cannot_grow_while_they_are_stored(memory: MemoryNode) -> None:
    class Full(MemoryNode):
        limit = 1 << 62

        def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
            if offset + len(buffer) > self.limit:
                raise NoSpace("full")
            super().write_from(offset, buffer, flags)

    full = Full(memory.to_bytes(), memory.size)
    image = open_image(full)
    image.write(0, b"x")
    image.flush()
    full.limit = full.size
    with pytest.raises(NoSpace):
        image.close()
    full.limit = 1 << 62
    assert entries(full)["follows"].in_use
    sound(full)


# -- headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [512, 1024, 65536])
@pytest.mark.parametrize("name", ["", "b", "a-rather-long-name" * 8])
def test_the_header_makes_room(cluster: int, name: str) -> None:
    options = {"backing_file": name, "backing_fmt": "raw"} if name else {}
    memory = new_image("qcow2", SIZE, cluster_size=cluster, **options)
    for names in (["one"], ["one", "two"], ["one"], []):
        with open_image(detached(memory), options=ALONE) as image:
            have = {bitmap.name for bitmap in store(image).all()}
            for gone in have - set(names):
                store(image).remove(gone)
            for new in set(names) - have:
                store(image).add(new)
            node: Any = image.node
            kinds = [row.type for row in node.extensions if row.type != layout.EXTENSION_BITMAPS]
        with open_image(detached(memory), options=ALONE, read_only=True) as image:
            node = image.node
            assert node.backing_name == name
            assert [row.type for row in node.extensions if row.type != layout.EXTENSION_BITMAPS] == kinds
            assert [bitmap.name for bitmap in store(image).all()] == names
        sound(memory)


def test_no_room_in_the_header() -> None:
    memory = new_image("qcow2", SIZE, cluster_size=512, backing_file="n" * 350, backing_fmt="raw")
    before = memory.to_bytes()
    with open_image(memory, options=ALONE) as image, pytest.raises(NotSupported, match="header has no room"):
        store(image).add("b")
    assert memory.to_bytes() == before


def test_extensions_behind_it_stay(memory: MemoryNode) -> None:
    """Unknown ones are kept to the byte, when the bitmaps' one goes as well."""
    with open_image(detached(memory), read_only=True) as image:
        node: Any = image.node
        header = node.header
        rows = (
            *node.extensions,
            layout.Extension(0x12345678, b"unknown"),
            layout.Extension(0x23456789, b"another one"),
        )
    memory.write_from(0, memoryview(layout.header_bytes(header, rows)))
    with open_image(detached(memory)) as image:
        image.write(0, b"x")
        store(image).remove("rests")
        store(image).remove("follows")
    with open_image(detached(memory)) as image:
        node = image.node
        assert node.extensions[-2:] == rows[-2:]
        assert layout.find_extension(node.extensions, layout.EXTENSION_BITMAPS) is None
        store(image).add("again")
    assert list(entries(memory)) == ["again"]
    sound(memory)


def test_an_extension_across_two_sectors(memory: MemoryNode) -> None:
    with open_image(detached(memory), read_only=True) as image:
        node: Any = image.node
        header, known = node.header, node.extensions
    bitmaps = next(row for row in known if row.type == layout.EXTENSION_BITMAPS)
    rows = (layout.Extension(0x12345678, bytes(368)), bitmaps)
    memory.write_from(0, memoryview(layout.header_bytes(header, rows)))
    with open_image(detached(memory)) as image:
        store(image).add("third").set(0, SIZE)
    assert list(entries(memory)) == ["follows", "rests", "third"]
    sound(memory)


def test_one_whose_bits_a_stranger_did_not_follow_is_forgotten(memory: MemoryNode) -> None:
    """The autoclear bit is gone: a program without bitmaps wrote to the image."""
    memory.write_from(88, memoryview(bytes(8)))
    with open_image(detached(memory)) as image:
        assert store(image).all() == ()
        image.write(0, b"x")
        store(image).add("follows")
    assert list(entries(memory)) == ["follows"]


# -- damage ---------------------------------------------------------------------------------------


def test_a_directory_that_makes_no_sense_is_refused_for_writing(memory: MemoryNode) -> None:
    with open_image(detached(memory), read_only=True) as image:
        node: Any = image.node
        data = layout.find_extension(node.extensions, layout.EXTENSION_BITMAPS)
        assert data is not None
        record = layout.decode_bitmaps_extension(data, 12)
    memory.write_from(record.directory_offset, memoryview(bytes(64)))
    before = memory.to_bytes()
    with pytest.raises(ImageError, match="directory"):
        open_image(detached(memory))
    with open_image(detached(memory), read_only=True) as image:
        assert image.read(0, 6) == b"before"
        with pytest.raises(ImageError, match="directory"):
            store(image)
    assert memory.to_bytes() == before


@pytest.mark.parametrize(
    "word",
    [2, 1 << 8, 1 << 56, 1 << 63, 4096 | 1, 512 * 3, 1 << 40],
    ids=["reserved-1", "reserved-8", "reserved-56", "reserved-63", "ones-with-offset", "unaligned", "behind-the-end"],
)
def test_a_table_that_makes_no_sense_is_inconsistent(memory: MemoryNode, word: int) -> None:
    entry = entries(memory)["follows"]
    memory.write_from(entry.table_offset, memoryview(struct.pack(">Q", word)))
    with open_image(detached(memory)) as image:
        assert store(image).find("follows").inconsistent
        assert not store(image).find("rests").inconsistent
        assert not entries(memory)["follows"].in_use
        image.write(0, b"x")
        # It could not follow.
        assert entries(memory)["follows"].in_use
    assert entries(memory)["follows"].in_use
    with open_image(detached(memory)) as image:
        store(image).remove("follows")
    assert list(entries(memory)) == ["rests"]


def test_a_table_of_the_wrong_length_or_extra_data_nobody_knows(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        store(image).add("long")
    with open_image(detached(memory), read_only=True) as image:
        node: Any = image.node
        one, two, three = read_bitmaps(node)
        strange = [
            one._replace(extra=b"?" * 8),
            two._replace(extra=b"!" * 8, flags=layout.BITMAP_EXTRA_COMPATIBLE),
            three._replace(table_size=2),
        ]
        data = layout.encode_bitmap_directory(strange)
        place = memory.size + -memory.size % CLUSTER
        record = layout.encode_bitmaps_extension(layout.BitmapsExtension(3, len(data), place))
        known = [row if row.type != layout.EXTENSION_BITMAPS else row._replace(data=record) for row in node.extensions]
        header = node.header
    memory.write_from(0, memoryview(layout.header_bytes(header, known)))
    memory.write_from(place, memoryview(data))
    with open_image(detached(memory), options={"overlap-check": "none"}) as image:  # nothing counts the directory
        assert [bitmap.inconsistent for bitmap in store(image).all()] == [True, False, True]
        store(image).find("rests").set(0, 1)
    kept = entries(memory)
    assert kept["follows"].extra == b"?" * 8
    assert (kept["rests"].extra, kept["rests"].flags) == (b"!" * 8, layout.BITMAP_EXTRA_COMPATIBLE)


def test_bits_that_take_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = new_image("qcow2", SIZE, cluster_size=512)
    with open_image(memory) as image:
        for name in ("clean", "bits", "ones", "more bits", "more ones"):
            bitmap = store(image).add(name, 512, enabled=False)
            for at in range(0, SIZE if "bits" in name else 0, 1 << 20):
                bitmap.set(at, 1)
            bitmap.set(0, SIZE if "ones" in name else 0)
    # A bitmap of which everything is dirty takes little.
    monkeypatch.setattr("byre.formats.qcow2.bitmaps.LOADED_LIMIT", 3000)
    with open_image(detached(memory), read_only=True) as image:
        usable = [bitmap.name for bitmap in store(image).all() if not bitmap.inconsistent]
        assert usable == ["clean", "bits", "ones", "more ones"]


def test_an_untrusted_image_may_have_few(memory: MemoryNode) -> None:
    with open_image(detached(memory)) as image:
        for number in range(63):
            store(image).add(f"b{number}")
    with pytest.raises(ImageError, match="65 bitmaps, allowed are 64"):
        open_image(detached(memory), policy=byre.Policy.untrusted())
    open_image(detached(memory)).close()


def test_many_threads(memory: MemoryNode) -> None:
    """Writers, and somebody who adds, changes and removes bitmaps meanwhile: no lock is waited for in a ring."""
    with open_image(detached(memory)) as image:
        image.write(0, bytes(SIZE))
        store(image).find("follows").clear_all()
        before = image.read(0, SIZE)
        stop = threading.Event()
        errors: list[BaseException] = []

        def write(seed: int) -> None:
            chooser = random.Random(seed)
            try:
                while not stop.is_set():
                    offset = chooser.randrange(SIZE - 5000)
                    match chooser.randrange(4):
                        case 0:
                            image.write_zeroes(offset, 5000, unmap=True)
                        case 1:
                            image.discard(offset, 5000)
                        case _:
                            image.write(offset, chooser.randbytes(chooser.randrange(1, 5000)))
            except BaseException as error:
                errors.append(error)

        writers = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
        for writer in writers:
            writer.start()
        for number in range(40):
            made = store(image).add("made", 512)
            store(image).find("rests").enable()
            store(image).find("rests").disable()
            made.merge(store(image).find("follows"))
            store(image).find("follows").freeze()
            time.sleep(0.002)
            store(image).find("follows").reclaim()
            if number % 2:
                made.clear_all()
            store(image).remove("made")
        stop.set()
        for writer in writers:
            writer.join()
        assert not errors
        after = image.read(0, SIZE)
    with open_image(detached(memory), read_only=True) as image:
        follows = store(image).find("follows")
        for at in range(0, SIZE, CLUSTER):
            assert before[at : at + CLUSTER] == after[at : at + CLUSTER] or follows.get(at), hex(at)
    sound(memory)


# -- any sequence, against a model ----------------------------------------------------------------


class Model:
    def __init__(self, size: int, granularity: int, enabled: bool) -> None:
        self.granularity = granularity
        self.enabled = enabled
        self.parts: set[int] = set()
        self.size = size

    def mark(self, offset: int, length: int, *, force: bool = False) -> None:
        if (self.enabled or force) and length:
            self.parts.update(range(offset // self.granularity, (offset + length - 1) // self.granularity + 1))

    def dirty(self) -> list[tuple[int, int]]:
        rows: list[tuple[int, int]] = []
        for part in sorted(self.parts):
            start = part * self.granularity
            end = min(start + self.granularity, self.size)
            if rows and sum(rows[-1]) == start:
                rows[-1] = (rows[-1][0], end - rows[-1][0])
            else:
                rows.append((start, end - start))
        return rows


def change_bitmaps(chooser: random.Random, image: Image, models: dict[str, Model]) -> None:
    names = sorted(models)
    name = chooser.choice(names) if names else ""
    match chooser.randrange(7) if names else 0:
        case 0 if len(names) < 5:
            new = chooser.choice([each for each in "abcdefgh" if each not in models])
            granularity, enabled = 512 << chooser.randrange(10), chooser.random() < 0.6
            store(image).add(new, granularity, enabled=enabled)
            models[new] = Model(image.size, granularity, enabled)
        case 1:
            store(image).remove(name)
            del models[name]
        case 2:
            store(image).find(name).clear_all()
            models[name].parts.clear()
        case 3:
            store(image).find(name).enable()
            models[name].enabled = True
        case 4:
            store(image).find(name).disable()
            models[name].enabled = False
        case 5:
            other = chooser.choice(names)
            store(image).find(name).merge(store(image).find(other))
            for start, length in models[other].dirty():
                models[name].mark(start, length, force=True)


def change_disk(chooser: random.Random, image: Image, models: dict[str, Model], cluster: int) -> None:
    size = image.size
    offset = chooser.randrange(size)
    length = min(size - offset, chooser.choice([1, 512, 3000, 65536, 300_000]))
    match chooser.randrange(6):
        case 0 | 1:
            image.write(offset, chooser.randbytes(length))
        case 2:
            image.write_zeroes(offset, length, unmap=chooser.random() < 0.5)
        case 3:
            image.discard(offset, length)
            # Clusters that are only partly inside keep what they hold.
            end = offset + length
            offset += -offset % cluster
            length = max(0, (end if end == size else end - end % cluster) - offset)
        case 4:
            offset -= offset % cluster
            length = min(cluster, size - offset)
            image.write_compressed(offset, b"abcd" * (length // 4))
        case 5 if chooser.random() < 0.4:
            new = chooser.choice([SIZE // 2, SIZE, SIZE + 512, 3 * SIZE])
            image.resize(new, shrink=True)
            for model in models.values():
                model.size = new
                model.parts = {part for part in model.parts if part * model.granularity < new}
            return
        case _:
            return
    for model in models.values():
        model.mark(offset, length)


def agree(image: Image, models: dict[str, Model]) -> None:
    found = store(image).all()
    assert {bitmap.name for bitmap in found} == set(models)
    for bitmap in found:
        model = models[bitmap.name]
        assert (bitmap.granularity, bitmap.enabled, bitmap.inconsistent) == (model.granularity, model.enabled, False)
        assert dirty(bitmap) == model.dirty(), bitmap
        assert bitmap.dirty_bits == len(model.parts)


@pytest.mark.parametrize("seed", range(10))
def test_any_sequence_of_changes(seed: int) -> None:
    chooser = random.Random(seed)
    cluster = 512 << chooser.choice([0, 1, 3, 7])
    options = {"refcount_bits": 1 << chooser.randrange(7)}
    memory = new_image("qcow2", SIZE, cluster_size=cluster, **options)
    models: dict[str, Model] = {}
    for _ in range(5):
        with open_image(detached(memory)) as image:
            for _ in range(chooser.randrange(14)):
                if chooser.random() < 0.4:
                    change_bitmaps(chooser, image, models)
                else:
                    change_disk(chooser, image, models, cluster)
            agree(image, models)
        with open_image(detached(memory), read_only=True) as image:
            agree(image, models)
        sound(memory)


# -- the peer -------------------------------------------------------------------------------------


@contextmanager
def served(path: Path, *names: str) -> Any:
    """The peer's NBD server with these bitmaps; gives a function that maps one of them."""
    socket = path.with_suffix(".sock")
    words = [word for name in names for word in ("-B", name)]
    server = subprocess.Popen([peer_program("qemu-nbd"), "-r", "-f", "qcow2", "-k", socket, "-t", *words, path])
    try:
        for _ in range(200):
            if socket.exists():
                break
            time.sleep(0.02)

        def look(qemu_img: Run, name: str) -> list[tuple[int, int]]:
            text = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
            rows = json.loads(qemu_img("map", "--output=json", "--image-opts", text).stdout)
            return [(row["start"], row["length"]) for row in rows if not row["data"]]

        yield look
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)


def open_path(path: Path, *, read_only: bool = False) -> Image:
    return byre.open(str(path), format="qcow2", read_only=read_only)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("options", "granularities"),
    [
        ("cluster_size=65536", (65536, 512)),
        ("cluster_size=512", (512, 4096)),
        ("cluster_size=2M", (1 << 21, 1 << 31)),
        ("extended_l2=on,cluster_size=16k,refcount_bits=1", (65536, 1024)),
    ],
)
def test_the_peer_reads_what_is_stored_here(
    tmp_path: Path, qemu_img: Run, options: str, granularities: tuple[int, int]
) -> None:
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "300M")
    chooser = random.Random(options)
    with open_path(path) as image:
        for name, granularity in zip("ab", granularities, strict=True):
            store(image).add(name, granularity)
        for _ in range(20):
            image.write(chooser.randrange(299 << 20), chooser.randbytes(chooser.choice([1, 4096, 200_000])))
        store(image).add("c", 4096, enabled=False).set(0, image.size)
    qemu_img("check", path)
    with open_path(path, read_only=True) as image:
        wanted = {bitmap.name: dirty(bitmap) for bitmap in store(image).all()}
    with served(path, *"abc") as look:
        for name, rows in wanted.items():
            assert look(qemu_img, name) == rows, name
    qemu_img("bitmap", "--merge", "a", path, "b")
    qemu_img("bitmap", "--remove", path, "c")
    qemu_img("check", path)
    with open_path(path, read_only=True) as image:
        both = store(image).find("b")
        assert all(both.get(start) for start, _ in wanted["a"] + wanted["b"])


@pytest.mark.oracle
def test_what_the_peer_stores_is_read_here(tmp_path: Path, qemu_img: Run, qemu_io: Run) -> None:
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", path, "100M")
    qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    qemu_img("bitmap", "--add", "--disable", path, "off")
    qemu_img("bitmap", "--add", "-g", "4M", path, "coarse")
    qemu_io("-c", "write 1000k 3k", "-c", "write -z 20M 1M", "-c", "discard 30M 64k", path)
    with open_path(path) as image:
        fine, off, coarse = store(image).all()
        assert dirty(fine) == [(1000 << 10, 3072), (20 << 20, 1 << 20), (30 << 20, 65536)]
        assert (dirty(off), off.enabled) == ([], False)
        assert dirty(coarse) == [(0, 4 << 20), (20 << 20, 4 << 20), (28 << 20, 4 << 20)]
        image.write(50 << 20, b"x")
        image.write_zeroes(60 << 20, 65536)
    qemu_io("-c", "write 70M 1", path)
    qemu_img("check", path)
    with open_path(path, read_only=True) as image:
        assert dirty(store(image).find("fine"))[3:] == [(50 << 20, 512), (60 << 20, 65536), (70 << 20, 512)]


@pytest.mark.oracle
def test_the_peer_agrees_on_what_a_crash_leaves(tmp_path: Path, qemu_img: Run) -> None:
    path, left = tmp_path / "a", tmp_path / "left"
    qemu_img("create", "-q", "-f", "qcow2", path, "10M")
    qemu_img("bitmap", "--add", path, "b")
    with open_path(path) as image:
        image.write(0, b"x")
        image.flush()
        left.write_bytes(path.read_bytes())
    info = json.loads(qemu_img("info", "--output=json", left).stdout)
    assert info["format-specific"]["data"]["bitmaps"][0]["flags"] == ["in-use", "auto"]
    assert qemu_img("bitmap", "--clear", left, "b", check=False).returncode == 1
    qemu_img("check", left)
    qemu_img("bitmap", "--remove", left, "b")
    qemu_img("check", left)


@pytest.mark.oracle
@pytest.mark.parametrize("change", ["resize", "header"])
def test_the_peer_goes_on_with_it(tmp_path: Path, qemu_img: Run, change: str) -> None:
    path, base = tmp_path / "a", tmp_path / "base"
    qemu_img("create", "-q", "-f", "qcow2", base, "10M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path, "10M")
    with open_path(path) as image:
        store(image).add("b").set(65536, 1)
        if change == "resize":
            image.resize(40 << 20)
    info = json.loads(qemu_img("info", "--output=json", path).stdout)
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(base), "qcow2")
    assert [row["name"] for row in info["format-specific"]["data"]["bitmaps"]] == ["b"]
    if change == "resize":
        qemu_img("resize", path, "80M")
    else:
        qemu_img("rebase", "-u", "-b", "", path)
    qemu_img("check", path)
    with open_path(path, read_only=True) as image:
        assert dirty(store(image).find("b")) == [(65536, 65536)]
