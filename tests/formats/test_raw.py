"""raw: the bytes of the file, a slice of them, and the guard over a probed image's first and last sector."""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path

import pytest

import byre
from byre import catalog
from byre.catalog import Driver
from byre.errors import AccessDenied, ByreError, ImageError, InvalidArgument, ReadOnly
from byre.graph.creating import create
from byre.image import Image
from byre.io.extent import DATA, ZERO
from conftest import Run

MAGIC = b"QFI\xfb\0\0\0\3"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    name = tmp_path / "disk.img"
    name.write_bytes(bytes(1 << 20))
    return name


def probed(path: Path, **more: object) -> Image:
    return byre.open(str(path), **{"read_only": False, **more})  # type: ignore[arg-type]


def named(path: Path, **more: object) -> Image:
    return probed(path, format="raw", **more)


# -- the first sector of a probed image ---------------------------------------------------------------


@pytest.mark.parametrize("cut", range(9))
def test_a_guest_cannot_turn_a_probed_image_into_another_format(path: Path, cut: int) -> None:
    """However the bytes come: in one request or piece by piece."""
    with probed(path) as image:
        with pytest.raises(AccessDenied, match=r"probed as raw, look like qcow2.*-f raw"):
            image.write(0, MAGIC[:cut])
            image.write(cut, MAGIC[cut:])
        with pytest.raises(AccessDenied):
            image.writev(0, [memoryview(MAGIC[:cut]), memoryview(MAGIC[cut:] + bytes(600))])
        image.write(0, b"QFI")
        image.write(3, b"x")
        image.write(1 << 19, MAGIC)  # anywhere else it may be
    with probed(path) as image:
        assert image.format == "raw"


def test_zeroes_can_complete_a_signature_too(path: Path) -> None:
    for fill in ("write_zeroes", "unmap", "discard"):
        path.write_bytes(b"QFI\xfb\xff\xff\xff\3".ljust(4096, b"\xff").ljust(1 << 20, b"\0"))
        with probed(path) as image:
            with pytest.raises(AccessDenied, match="look like qcow2"):
                image.discard(4, 3) if fill == "discard" else image.write_zeroes(4, 3, unmap=fill == "unmap")
            assert image.read(4, 3) == b"\xff" * 3
            image.write_zeroes(0, 4096)  # this leads nowhere
        assert path.read_bytes()[:4096] == bytes(4096)


def test_detected_zeroes_can_complete_a_signature_too(path: Path) -> None:
    path.write_bytes(b"QFI\xfb\xff\xff\xff\3".ljust(1 << 20, b"\0"))
    with probed(path, detect_zeroes="unmap") as image, pytest.raises(AccessDenied):
        image.write(4, bytes(3))


def test_a_raw_image_by_name_takes_every_byte(path: Path) -> None:
    with named(path) as image:
        image.write(0, MAGIC + bytes(504))
    assert path.read_bytes()[:8] == MAGIC
    with byre.open({"driver": "raw", "file": str(path)}, read_only=False) as image:
        image.write(0, MAGIC)
        image.write(4, b"\0\0\0\2")


def test_an_image_shorter_than_a_sector_is_guarded(tmp_path: Path) -> None:
    short = tmp_path / "short"
    for length in (0, 1, 5):
        short.write_bytes(MAGIC[:length])
        with probed(short) as image:
            if image.size >= 8:
                with pytest.raises(AccessDenied):
                    image.write(length, MAGIC[length:])
            image.resize(4096)
            with pytest.raises(AccessDenied):
                image.write(length, MAGIC[length:])


def test_the_overlay_says_raw_so_nothing_is_probed(tmp_path: Path, path: Path) -> None:
    path.write_bytes(MAGIC.ljust(65536, b"\0"))
    create(str(tmp_path / "top"), "qcow2", options={"backing_file": "disk.img", "backing_fmt": "raw"})
    with byre.open(str(tmp_path / "top")) as image:
        assert image.read(0, 8) == MAGIC


# -- its last sector ----------------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The last sector of a format that is known by it."""
    row = Driver("late", "format", "byre.formats.raw", "says at its end what it is", tails=(((2, b"late\0\0end"),),))
    monkeypatch.setattr(catalog, "CATALOG", (*catalog.CATALOG, row))
    return b"..late\0\0end".ljust(512, b".")


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_guest_cannot_turn_a_probed_image_into_another_format_by_its_end(path: Path, late: bytes, cut: int) -> None:
    end = (1 << 20) - 512
    with probed(path) as image:
        with pytest.raises(AccessDenied, match=r"probed as raw, look like late.*-f raw"):
            image.write(end, late[:cut])
            image.write(end + cut, late[cut:])
        with pytest.raises(AccessDenied):
            image.writev(end - 4096, [memoryview(bytes(4096) + late[:cut]), memoryview(late[cut:])])
        with pytest.raises(AccessDenied):
            image.write(0, bytes(end) + late)
        image.write(end - 512, late)  # anywhere else it may be
        with pytest.raises(AccessDenied, match="look like late"):
            image.resize(end, shrink=True)
        assert image.size == 1 << 20
    with probed(path) as image:
        assert image.format == "raw"
    with named(path) as image:
        image.write(end, late)


def test_zeroes_can_complete_the_end_too(path: Path, late: bytes) -> None:
    fills = {"zeroes": Image.write_zeroes, "unmap": partial(Image.write_zeroes, unmap=True), "discard": Image.discard}
    for fill in fills:
        path.write_bytes(bytes((1 << 20) - 512) + late.replace(b"\0\0", b"xx"))
        end = (1 << 20) - 512
        with probed(path) as image:
            with pytest.raises(AccessDenied, match="look like late"):
                fills[fill](image, end + 6, 2)
            image.write_zeroes(0, 1 << 20)  # this leads nowhere
        assert not any(path.read_bytes())


# -- slices -------------------------------------------------------------------------------------------


def test_a_slice(path: Path) -> None:
    content = random.Random(1).randbytes(1 << 20)
    path.write_bytes(content)
    spec = {"driver": "raw", "offset": 5000, "size": 30000, "file": str(path)}
    with byre.open(spec, read_only=False) as image:
        assert image.size == 30000
        assert image.read(0, 30000) == content[5000:35000]
        image.write(29990, b"0123456789")
        image.write_zeroes(0, 10)
        with pytest.raises(InvalidArgument):
            image.write(29991, b"0123456789")
        with pytest.raises(ByreError):
            image.resize(40000)
        [row] = image.extents(100, 50)
        assert (row.offset, row.length, row.kind, row.host) == (100, 50, DATA, 5100)
    changed = content[:5000] + bytes(10) + content[5010:34990] + b"0123456789" + content[35000:]
    assert path.read_bytes() == changed


def test_a_slice_to_the_end_of_the_file(path: Path) -> None:
    with byre.open({"driver": "raw", "offset": "4k", "file": str(path)}, read_only=False) as image:
        assert image.size == (1 << 20) - 4096
        image.write(0, b"x")
    assert path.read_bytes()[4096:4097] == b"x"


@pytest.mark.parametrize(
    "options", [{"offset": 2 << 20}, {"size": 2 << 20}, {"offset": 1 << 19, "size": (1 << 19) + 1}, {"offset": -1}]
)
def test_a_slice_outside_of_the_file(path: Path, options: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument):
        byre.open({"driver": "raw", "file": str(path), **options})


# -- sizes, holes, limits -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 511, 513, 70001])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_file_that_is_no_multiple_of_a_sector(tmp_path: Path, length: int, cache: str) -> None:
    content = random.Random(length).randbytes(length)
    path = tmp_path / "a"
    path.write_bytes(content)
    size = -(-length // 512) * 512
    with named(path, cache=cache) as image:
        assert image.size == size
        assert image.read(0, size) == content.ljust(size, b"\0")
        assert image.extents().end == size
    assert path.stat().st_size == length
    with named(path, cache=cache) as image:
        image.write(size - 1, b"\xff")
        assert image.read(0, size) == content.ljust(size - 1, b"\0")[: size - 1] + b"\xff"
    assert path.stat().st_size == size


def test_holes(path: Path) -> None:
    os.truncate(path, 0)
    os.truncate(path, 1 << 20)
    with named(path) as image:
        assert [(row.kind, row.length) for row in image.extents()] == [(ZERO, 1 << 20)]
        image.write(1 << 19, b"x" * 65536)
        kinds = [row.kind for row in image.extents()]
        assert kinds == [ZERO, DATA, ZERO]
        image.discard(1 << 19, 65536)
        assert image.read(1 << 19, 65536) == bytes(65536)
        assert path.stat().st_blocks == 0
    with named(path, discard="ignore") as image:
        image.write(0, b"x" * 65536)
        image.discard(0, 65536)
        assert image.read(0, 65536) == b"x" * 65536


@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
def test_detecting_zeroes(path: Path, mode: str) -> None:
    path.write_bytes(b"\xff" * (1 << 20))
    with named(path, detect_zeroes=mode) as image:
        image.write(65536, bytes(65536))
        image.writev(262144, [memoryview(bytes(4096)), memoryview(bytes(61440))])
        image.write(0, bytes(100) + b"x")
        assert image.read(65536, 65536) == image.read(262144, 65536) == bytes(65536)
        assert image.read(0, 102) == bytes(100) + b"x\xff"
        image.flush()
    assert (path.stat().st_blocks < 2048) == (mode == "unmap")


def test_resizing(path: Path) -> None:
    with named(path) as image:
        image.write((1 << 20) - 1, b"x")
        image.resize(1 << 19, shrink=True)
        image.resize(1 << 20)
        assert image.read((1 << 20) - 1, 1) == b"\0"
        image.resize(2 << 20, preallocation="falloc")
        assert path.stat().st_blocks * 512 >= 1 << 20
        with pytest.raises(ByreError):
            image.resize(3 << 20, preallocation="metadata")
        with pytest.raises(ByreError):
            image.resize(1 << 63)
        assert image.size == 2 << 20
    with named(path, read_only=True) as image, pytest.raises(ReadOnly):
        image.resize(1 << 20, shrink=True)


def test_raw_images_may_be_shared(path: Path) -> None:
    with named(path) as one, named(path) as two:
        one.write(0, b"x")
        assert two.read(0, 1) == b"x"


@pytest.mark.oracle
def test_the_peer_reads_the_same(path: Path, qemu_img: Run) -> None:
    chance = random.Random(7)
    model = bytearray(1 << 20)
    with named(path, cache="none") as image:
        for _ in range(50):
            at, length = chance.randrange(1 << 20), chance.randrange(1, 60000)
            data = chance.randbytes(min(length, (1 << 20) - at))
            image.write(at, data)
            model[at : at + len(data)] = data
    other = path.with_name("other")
    other.write_bytes(model)
    qemu_img("compare", "-f", "raw", "-F", "raw", path, other)


def test_creation(tmp_path: Path) -> None:
    for mode, full in (("off", False), ("falloc", True), ("full", True)):
        path = tmp_path / mode
        create(str(path), "raw", 1 << 20, options={"preallocation": mode})
        assert path.stat().st_size == 1 << 20
        assert (path.stat().st_blocks * 512 >= 1 << 20) == full
    with pytest.raises(ByreError):
        create(str(tmp_path / "x"), "raw", 1 << 63)
    with pytest.raises((ImageError, InvalidArgument)):
        create(str(tmp_path / "x"), "raw", 512, options={"preallocation": "metadata"})
    assert not (tmp_path / "x").exists()
