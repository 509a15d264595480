"""Every write path of raw and qcow2 marks the bitmaps of its node; nothing else does."""

from __future__ import annotations

import random
from typing import Any

import pytest

from byre.bitmaps import tracking
from byre.bitmaps.bitmap import Bitmap
from byre.errors import AlreadyExists, ByreError
from byre.image import Image
from byre.protocols.memory import MemoryNode
from support.images import new_image, open_image

SIZE = 4 << 20
CLUSTER = 65536


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest) -> Any:
    with open_image(new_image(request.param, SIZE), request.param) as opened:
        yield opened


def follow(image: Image, granularity: int = 4096) -> Bitmap:
    bitmap = Bitmap(image.size, granularity)
    tracking.attach(image.node, bitmap)  # type: ignore[arg-type]
    return bitmap


def runs(bitmap: Bitmap) -> list[tuple[int, int]]:
    return [row for part in bitmap.runs() for row in zip(*(column.tolist() for column in part), strict=True)]


def test_each_kind_of_write(image: Image) -> None:
    bitmap = follow(image)
    image.write(5000, b"x")
    image.write(5000, b"y")  # in place
    image.writev(CLUSTER, [memoryview(b"a" * 4096), memoryview(b"b" * 4096)])
    image.write_zeroes(3 * CLUSTER, CLUSTER)
    image.write_zeroes(5 * CLUSTER + 10, 10)
    image.write(7 * CLUSTER, b"z", fua=True)
    image.discard(9 * CLUSTER, 2 * CLUSTER)
    image.read(0, SIZE)
    image.flush()
    assert runs(bitmap) == [
        (4096, 4096), (CLUSTER, 8192), (3 * CLUSTER, CLUSTER), (5 * CLUSTER, 4096), (7 * CLUSTER, 4096),
        (9 * CLUSTER, 2 * CLUSTER),
    ]  # fmt: skip


def test_compressed_writes_and_detected_zeroes() -> None:
    with open_image(new_image("qcow2", SIZE), detect_zeroes="unmap") as image:
        bitmap = follow(image)
        image.write_compressed(2 * CLUSTER, b"squeeze" * 9000 + bytes(2536))
        image.write(10 * CLUSTER, bytes(CLUSTER))
        assert runs(bitmap) == [(2 * CLUSTER, CLUSTER), (10 * CLUSTER, CLUSTER)]


def test_a_discard_that_is_ignored_marks_nothing() -> None:
    for format in ("raw", "qcow2"):
        with open_image(new_image(format, SIZE), format, discard="ignore") as image:
            bitmap = follow(image)
            image.discard(0, SIZE)
            assert bitmap.dirty_bits == 0


def test_a_write_that_fails_is_marked_one_that_is_refused_is_not() -> None:
    class Broken(MemoryNode):
        armed = False

        def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
            if self.armed:
                raise ByreError("broken")
            super().write_from(offset, buffer, flags)

    for format in ("raw", "qcow2"):
        made = new_image(format, SIZE)
        broken = Broken(made.to_bytes(), made.size)
        with open_image(broken, format) as image:
            image.write(0, b"x" * CLUSTER)
            bitmap = follow(image)
            broken.armed = True
            with pytest.raises(ByreError):
                image.write(4096, b"x" * 4096)
            with pytest.raises(ByreError):
                image.write(SIZE, b"x")
            broken.armed = False
            assert runs(bitmap) == [(4096, 4096)]


def test_resizing_the_node_resizes_its_bitmaps(image: Image) -> None:
    bitmap = follow(image)
    image.write(SIZE - 1, b"x")
    image.resize(2 * SIZE)
    image.write(2 * SIZE - 1, b"x")
    assert runs(bitmap)[-1] == (2 * SIZE - 4096, 4096)
    image.resize(SIZE // 2, shrink=True)
    assert bitmap.size == SIZE // 2
    assert bitmap.next_dirty(0, SIZE // 4) is None


def test_names_are_unique_and_a_detached_bitmap_is_left_alone(image: Image) -> None:
    node: Any = image.node
    bitmap = Bitmap(image.size, name="b")
    tracking.attach(node, bitmap)
    with pytest.raises(AlreadyExists):
        tracking.attach(node, Bitmap(image.size, name="b"))
    tracking.attach(node, Bitmap(image.size))
    tracking.attach(node, Bitmap(image.size))
    tracking.detach(node, bitmap)
    image.write(0, b"x")
    assert bitmap.dirty_bits == 0


@pytest.mark.parametrize("seed", range(4))
def test_what_differs_is_dirty(image: Image, seed: int) -> None:
    chooser = random.Random(seed)
    image.write(0, chooser.randbytes(SIZE // 2))
    before = image.read(0, SIZE)
    bitmap = follow(image, 512 << chooser.randrange(8))
    for _ in range(30):
        offset = chooser.randrange(SIZE)
        length = min(SIZE - offset, chooser.choice([1, 512, 5000, CLUSTER, 3 * CLUSTER]))
        match chooser.randrange(4):
            case 0 | 1:
                image.write(offset, chooser.randbytes(length))
            case 2:
                image.write_zeroes(offset, length, unmap=chooser.random() < 0.5)
            case 3:
                image.discard(offset, length)
    after = image.read(0, SIZE)
    step = bitmap.granularity
    for at in range(0, SIZE, step):
        assert before[at : at + step] == after[at : at + step] or bitmap.get(at), hex(at)
