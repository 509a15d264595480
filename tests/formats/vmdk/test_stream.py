"""Streams: disks written from beginning to end, into pipes as well."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import byre
from byre.errors import NotSupported
from byre.formats import vmdk as driver
from byre.protocols.memory import MemoryNode
from support import vmdk
from support.images import open_image

MIB = 1 << 20
GRAIN = 65536


def written(size: int, grains: dict[int, bytes]) -> bytes:
    out = bytearray()
    values = driver.CREATE_OPTIONS.parse({"size": size, "subformat": "streamOptimized"}, what="vmdk")
    node = driver.open_stream(out.extend, values, "disk.vmdk")
    for index, data in sorted(grains.items()):
        node.write_compressed(index * GRAIN, memoryview(data))
    node.finish()
    return bytes(out)


@pytest.mark.parametrize("where", [(), (0,), (1599,), (0, 511, 512, 513, 1023, 1599), tuple(range(500, 1100))])
def test_what_is_written_reads_back(where: tuple[int, ...]) -> None:
    size = 1600 * GRAIN
    grains = {index: index.to_bytes(4, "little") * (GRAIN // 4) for index in where}
    data = written(size, grains)
    assert len(data) % 512 == 0
    assert vmdk.look_through(data) == ([], [])
    with open_image(MemoryNode(data), "vmdk", read_only=True) as image:
        assert image.size == size
        for index in {0, 1, 510, 511, 512, 513, 1024, 1598, 1599, *where}:
            assert image.read(index * GRAIN, GRAIN) == grains.get(index, bytes(GRAIN)), index


def test_grains_come_in_order() -> None:
    values = driver.CREATE_OPTIONS.parse({"size": MIB, "subformat": "streamOptimized"}, what="vmdk")
    node = driver.open_stream(lambda data: None, values, "disk.vmdk")
    node.write_compressed(GRAIN, memoryview(bytes(GRAIN)))
    for offset in (0, GRAIN, 2 * GRAIN + 512):
        with pytest.raises(NotSupported, match="in order"):
            node.write_compressed(offset, memoryview(bytes(GRAIN)))
    with pytest.raises(NotSupported, match="cannot be read"):
        node.read_into(0, memoryview(bytearray(10)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    chooser = random.Random(3)
    with path.open("wb") as file:
        for offset in (0, 5 * MIB, 40 * MIB + 12345, 70 * MIB):
            file.seek(offset)
            file.write(chooser.randbytes(100_000))
        file.truncate(70 * MIB + 200_704)
    return path


def byre_program(*words: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "byre", *words], timeout=60, **more)  # type: ignore[call-overload, no-any-return]


OUTPUT = ("-O", "vmdk", "-o", "subformat=streamOptimized")


def same(path: Path, source: Path) -> None:
    with byre.open(path) as one, byre.open(source, format="raw") as other:
        assert one.size == other.size
        assert one.read(0, one.size) == other.read(0, other.size)


def test_to_standard_output(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out.vmdk"
    with subprocess.Popen([sys.executable, "-m", "byre", "convert", *OUTPUT, str(source), "-"],
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        target.write_bytes(process.stdout.read())
        assert process.wait() == 0
    same(target, source)


def test_to_a_fifo(tmp_path: Path, source: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    done = byre_program("convert", *OUTPUT, str(source), str(tmp_path / "fifo"))
    reader.join(30)
    assert done.returncode == 0
    (tmp_path / "out.vmdk").write_bytes(read[0])
    same(tmp_path / "out.vmdk", source)
    assert (tmp_path / "fifo").is_fifo()


def test_nobody_reads(source: Path) -> None:
    with subprocess.Popen([sys.executable, "-m", "byre", "convert", *OUTPUT, str(source), "-"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        message = process.stderr.read()
        assert process.wait() == 1
    assert "Broken pipe" in message
    assert "Traceback" not in message


def test_what_cannot_go_to_a_pipe(source: Path) -> None:
    for words in (("-O", "qcow2"), ("-O", "vmdk"), (*OUTPUT, "-p")):
        done = byre_program("convert", *words, str(source), "-", capture_output=True)
        assert done.returncode == 1
        assert done.stdout == b""
        assert done.stderr.startswith(b"byre: ")
