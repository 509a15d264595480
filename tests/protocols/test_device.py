"""Block devices, on a loop device; skipped where none can be made."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, InvalidArgument, NoSpace
from byre.io.extent import DATA, MAY_UNMAP, NO_FALLBACK, Extent
from byre.protocols.descriptor import open_descriptor
from byre.protocols.file import CREATE_OPTIONS, create

from .conftest import OpenFile

SIZE = 4 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    losetup = shutil.which("losetup") or shutil.which("losetup", path="/sbin:/usr/sbin")
    if losetup is None or os.geteuid() != 0:
        pytest.skip("needs losetup and root")
    (tmp_path / "store").write_bytes(b"\xaa" * SIZE)
    made = subprocess.run([losetup, "-f", "--show", str(tmp_path / "store")], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run([losetup, "-d", made.stdout.strip()], check=True)


@pytest.mark.parametrize("driver", ["host_device", "host_cdrom"])
def test_a_character_device_is_opened_where_the_user_says_so(open_file: OpenFile, driver: str) -> None:
    node = open_file("/dev/null", driver=driver)
    assert (node.driver, node.size) == (driver, 0)
    with pytest.raises(InvalidArgument, match="character device"):
        open_file("/dev/null", driver="file")


def test_an_image_cannot_name_a_character_device(tmp_path: Path) -> None:
    with pytest.raises(ByreError):
        open_descriptor("/dev/null", read_only=True, implicit=True, character=True)
    overlay = str(tmp_path / "overlay.qcow2")
    options = {"backing_file": "/dev/null", "backing_fmt": "raw"}
    byre.create(overlay, "qcow2", 1 << 20, options=options, check_backing=False)
    with pytest.raises(ByreError):
        byre.open(overlay)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("driver", ["file", "host_device"])
def test_a_device_is_a_disk_of_fixed_size(device: str, open_file: OpenFile, direct: bool, driver: str) -> None:
    node = open_file(device, driver=driver, direct=direct)
    assert node.driver == driver
    assert node.size == SIZE
    assert not node.has_zero_init
    content = bytearray(b"\xaa" * SIZE)
    node.write_from(777, memoryview(b"hello"))
    content[777:782] = b"hello"
    node.write_zeroes(100_000, 300_001)
    node.write_zeroes(1_000_000, 200_003, MAY_UNMAP)
    node.write_zeroes(1 << 20, 1 << 20, MAY_UNMAP | NO_FALLBACK)
    node.write_zeroes(3000, 10)
    for offset, length in ((100_000, 300_001), (1_000_000, 200_003), (1 << 20, 1 << 20), (3000, 10)):
        content[offset : offset + length] = bytes(length)
    buffer = bytearray(SIZE + 10)
    node.read_into(0, memoryview(buffer))
    assert buffer == content + bytes(10)
    node.discard((3 << 20) + 5, 100_000)
    node.flush()
    node.read_into(0, memoryview(buffer))
    assert buffer[: 3 << 20] == content[: 3 << 20]
    assert node.block_status(0, 2 * SIZE) == Extent(0, SIZE, DATA, 0)
    with pytest.raises(NoSpace):
        node.write_from(SIZE - 5, memoryview(b"x" * 10))
    with pytest.raises(NoSpace):
        node.write_zeroes(SIZE - 5, 10)
    node.resize(SIZE)
    node.resize(SIZE - 512, exact=False)
    for size, exact in ((SIZE - 512, True), (SIZE + 512, False)):
        with pytest.raises(InvalidArgument):
            node.resize(size, exact=exact)
    assert node.size == SIZE


def test_creating_on_a_device_clears_its_first_sector(device: str, open_file: OpenFile) -> None:
    with pytest.raises(InvalidArgument, match="are needed"):
        create(device, CREATE_OPTIONS.parse({"size": SIZE + 512}, what="test"))
    create(device, CREATE_OPTIONS.parse({"size": SIZE}, what="test"))
    buffer = bytearray(1024)
    open_file(device, read_only=True).read_into(0, memoryview(buffer))
    assert bytes(buffer) == bytes(512) + b"\xaa" * 512
