"""Copying between files by the system."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from byre.errors import ReadOnly

from .conftest import OpenFile, make


def test_the_system_copies_between_files(tmp_path: Path, open_file: OpenFile) -> None:
    content = random.Random(5).randbytes(200_000)
    source = open_file(make(tmp_path / "a", content), read_only=True)
    target = open_file(make(tmp_path / "b", b""))
    done = 0
    while done < 100_000:
        step = source.copy_range(1000 + done, target, 500 + done, 100_000 - done)
        assert step > 0
        done += step
    assert target.size == 100_500
    assert (tmp_path / "b").read_bytes() == bytes(500) + content[1000:101_000]
    assert source.copy_range(200_000, target, 0, 10) == 0
    with pytest.raises(ReadOnly):
        target.copy_range(0, source, 0, 10)
