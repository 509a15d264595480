"""Small images as files, and a look at what stays open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import byre
from byre.graph.creating import create

KIB = 1024


def open_files() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    }


@pytest.fixture
def nothing_stays_open(tmp_path: Path) -> Iterator[None]:
    """Whatever a test opens or fails to open in its folder is closed at its end."""
    yield
    assert not [name for name in open_files() if name.startswith(str(tmp_path))]


def image(path: Path, content: bytes = b"", size: int = 64 * KIB, **options: object) -> str:
    """A qcow2 image at ``path`` with ``content`` at its start."""
    create(str(path), "qcow2", size, options=options, check_backing=False)
    if content:
        with byre.open(str(path), read_only=False, backing=False) as opened:
            opened.write(0, content)
    return str(path)


def overlay(path: Path, backing: str, format: str | None = "qcow2", size: int = 64 * KIB) -> str:
    more = {"backing_fmt": format} if format else {}
    return image(path, size=size, backing_file=backing, **more)


def raw(path: Path, content: bytes) -> str:
    path.write_bytes(content.ljust(64 * KIB, b"\0"))
    return str(path)
