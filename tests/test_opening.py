"""byre.open: modes, what options may say, and names."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import byre
from byre.errors import InvalidArgument
from byre.graph.creating import create
from byre.image import Image
from byre.opening import CACHE_MODES

SIZE = 1 << 20


@pytest.fixture(params=["raw", "qcow2"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    name = str(tmp_path / f"disk.{request.param}")
    create(name, request.param, SIZE)
    return name


def open_as(path: str, **more: object) -> Image:
    return byre.open(path, format=path.rpartition(".")[2], **{"read_only": False, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", list(CACHE_MODES))
def test_every_cache_mode_reads_and_writes_any_range(path: str, cache: str) -> None:
    chance = random.Random(cache)
    model = bytearray(SIZE)
    with open_as(path, cache=cache) as image:
        for _ in range(60):
            at = chance.choice([0, 1, 511, 512, 4095, 4096, 65535, chance.randrange(SIZE), SIZE - 1])
            length = min(chance.choice([1, 511, 512, 4096, 5000, 70000, 200000]), SIZE - at)
            kind = chance.randrange(4)
            if kind < 2:
                data = chance.randbytes(length)
                image.write(at, data, fua=kind == 1)
                model[at : at + length] = data
            elif kind == 2:
                image.write_zeroes(at, length, unmap=chance.random() < 0.5)
                model[at : at + length] = bytes(length)
            assert image.read(at, length) == model[at : at + length]
        buffers = [bytearray(7), bytearray(4096), bytearray(1000)]
        image.readv_into(99, [memoryview(buffer) for buffer in buffers])
        assert b"".join(buffers) == model[99 : 99 + 5103]
        image.writev(SIZE - 5103, [memoryview(buffer) for buffer in buffers])
        model[SIZE - 5103 :] = b"".join(buffers)
        image.flush()
    for other in ("writeback", "none"):
        with open_as(path, cache=other, read_only=True) as image:
            assert image.read(0, SIZE) == model


@pytest.mark.parametrize("keywords", [{"cache": "fast"}, {"detect_zeroes": "maybe"}, {"discard": "maybe"}])
def test_unknown_modes(path: str, keywords: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        open_as(path, **keywords)


def test_write_back_can_be_asked_for_in_options(path: str) -> None:
    with byre.open({"driver": "raw", "file": path, "cache.writeback": "off"}, read_only=False) as image:
        assert image.writethrough
    with byre.open(
        {"driver": "raw", "file": path, "cache": {"writeback": True}}, read_only=False, cache="directsync"
    ) as image:
        assert not image.writethrough


def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "nbd:odd"):
        (tmp_path / name).write_bytes(bytes(512))
        with byre.open(Path(name), format="raw") as image:
            assert image.size == 512
        with byre.open(tmp_path / name, format="raw") as image:
            assert image.size == 512
