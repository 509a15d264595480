"""The demo's own parts: its file system is one that others accept, its picture is a PNG."""

from __future__ import annotations

import importlib
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the demo folder."""
    monkeypatch.syspath_prepend(str(DEMO))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


class Memory:
    """A device for the file system: bytes in memory."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data


def filled(load, size: int) -> tuple[Memory, dict[str, bytes]]:
    device = Memory(size)
    system = load("ext2").Ext2.format(device, size, label="test", uuid=bytes(range(16)), now=1_700_000_000)
    system.make_directories("/some/where")
    files = {
        f"/some/where/{number:03}-{'x' * (number % 40)}": bytes([number]) * (number * 701) for number in range(150)
    }
    files["/large"] = b"".join(struct.pack("<Q", number) for number in range(800_000))  # double indirect
    for path, data in files.items():
        system.write_file(path, data)
    system.make_symlink("/link", "some/where")
    for path in list(files)[::4]:
        freed = system.remove(path)
        assert sum(length for _, length in freed) >= len(files.pop(path))
    system.write_file("/some/late", b"late")
    files["/some/late"] = b"late"
    system.rewrite("/some/late", 1, b"AT")
    files["/some/late"] = b"lATe"
    system.sync()
    return device, files


@pytest.mark.parametrize("size", [24 << 20, (140 << 20) + 4096])
def test_files_are_read_back(load, size: int) -> None:
    device, files = filled(load, size)
    again = load("ext2").Ext2(device)
    assert set(again.files()) == set(files)
    assert all(again.read_file(path) == data for path, data in files.items())


@pytest.mark.parametrize("size", [24 << 20, (140 << 20) + 4096])
def test_the_checker_accepts_the_file_system(load, tmp_path: Path, size: int) -> None:
    checker = shutil.which("e2fsck") or shutil.which("e2fsck", path="/usr/sbin:/sbin")
    if not checker:
        pytest.skip("e2fsck is not installed")
    device, _ = filled(load, size)
    path = tmp_path / "disk.raw"
    path.write_bytes(device.data)
    done = subprocess.run([checker, "-fn", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_full_file_system_says_so(load) -> None:
    ext2 = load("ext2")
    device = Memory(8 << 20)
    system = ext2.Ext2.format(device, 8 << 20, label="small", uuid=bytes(16), now=0)
    with pytest.raises(ext2.FileSystemError, match="are free"):
        system.write_file("/large", bytes(9 << 20))


def test_the_picture_is_a_png(load, tmp_path: Path) -> None:
    picture = load("picture")
    layers = [picture.Layer("base", "a note", np.arange(1000) % 4), picture.Layer("top", "", np.full(1000, 2))]
    pixels = picture.draw("Heading", layers, 65536)
    path = tmp_path / "layers.png"
    picture.write_png(str(path), pixels)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks = {}
    at = 8
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        chunks[name] = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(data[at + 4 : at + 8 + length])
        at += 12 + length
    width, height = struct.unpack_from(">2I", chunks[b"IHDR"])
    assert (height, width, 3) == pixels.shape
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    assert (rows[:, 1:].reshape(pixels.shape) == pixels).all()
    assert {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()} >= {colour for _, colour in picture.KINDS}
