"""Creating files: sizes, preallocation, what is emptied and what is removed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from byre.errors import Busy, ByreError, InvalidArgument, NoSpace, NotFound
from byre.graph.node import PERM_ALL, PERM_WRITE
from byre.io.extent import DATA, ZERO
from byre.protocols import filecreate
from byre.protocols.file import CREATE_OPTIONS, create

from .conftest import OpenFile


def make(path: object, **options: object) -> None:
    create(str(path), CREATE_OPTIONS.parse(options, what="test"))


def test_sizes_are_whole_sectors(tmp_path: Path) -> None:
    for size, expected in ((0, 0), (1, 512), (1024, 1024), ("1.5k", 1536), (1 << 40, 1 << 40)):
        make(tmp_path / "a", size=size)
        assert (tmp_path / "a").stat().st_size == expected
    assert (tmp_path / "a").stat().st_blocks < 100


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_preallocation(tmp_path: Path, mode: str) -> None:
    make(tmp_path / "a", size="3M", preallocation=mode, nocow="on", extent_size_hint="64k")
    status = (tmp_path / "a").stat()
    assert status.st_size == 3 << 20
    assert (status.st_blocks * 512 >= 3 << 20) == (mode != "off")


def test_an_existing_file_is_emptied_in_place(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5000)
    os.chmod(tmp_path / "a", 0o600)
    before = (tmp_path / "a").stat()
    make(tmp_path / "a", size=1024)
    assert (tmp_path / "a").read_bytes() == bytes(1024)
    assert ((tmp_path / "a").stat().st_ino, (tmp_path / "a").stat().st_mode) == (before.st_ino, before.st_mode)


def test_a_file_in_use_is_left_alone(tmp_path: Path, open_file: OpenFile) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5000)
    node = open_file(tmp_path / "a", read_only=True)
    node.set_permissions(0, PERM_ALL & ~PERM_WRITE)
    with pytest.raises(Busy, match='"write" lock'):
        make(tmp_path / "a", size=1024)
    assert (tmp_path / "a").read_bytes() == b"x" * 5000


def test_a_failure_removes_only_what_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(filecreate, "set_length", fail)
    (tmp_path / "old").write_bytes(b"x" * 5000)
    for name in ("old", "new"):
        with pytest.raises(NoSpace, match=name):
            make(tmp_path / name, size=1024)
    assert (tmp_path / "old").exists()
    assert not (tmp_path / "new").exists()


def test_refusals_come_before_anything_is_touched(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"x" * 5000)
    os.mkfifo(tmp_path / "fifo")
    for name, options in (
        ("old", {"size": (1 << 63) - 1}),
        ("old", {"size": 512, "extent_size_hint": "4G"}),
        ("new", {"size": 1 << 63}),
        ("fifo", {"size": 512}),
        ("", {"size": 512}),
    ):
        with pytest.raises(InvalidArgument):
            make(tmp_path / name, **options)
    with pytest.raises(ByreError):
        make(tmp_path / "new", size=512, preallocation="metadata")
    with pytest.raises(NotFound, match="cannot create"):
        make(tmp_path / "missing" / "a", size=512)
    with pytest.raises(InvalidArgument, match="zero byte"):
        make("a\0b", size=512)
    assert (tmp_path / "old").read_bytes() == b"x" * 5000
    assert sorted(os.listdir(tmp_path)) == ["fifo", "old"]


def test_a_dangling_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.symlink("target", tmp_path / "link")
    make(tmp_path / "link", size=512)
    assert (tmp_path / "target").read_bytes() == bytes(512)
    assert (tmp_path / "link").is_symlink()


def test_the_first_block_is_written_and_no_other(tmp_path: Path, open_file: OpenFile) -> None:
    make(tmp_path / "large", size=1 << 20)
    node = open_file(tmp_path / "large")
    assert [extent.kind for extent in node.extents(0, 1 << 20)] == [DATA, ZERO]
    assert node.block_status(0, 1 << 20).length == 4096
    make(tmp_path / "small", size=1024)
    assert (tmp_path / "small").stat().st_size == 1024
    make(tmp_path / "empty", size=0)
    assert (tmp_path / "empty").stat().st_size == 0


def test_nothing_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    make(tmp_path / "a", size=512)
    with pytest.raises(ByreError):
        make(tmp_path, size=512)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.oracle
def test_options_are_described_as_the_peer_does(qemu_img: Callable[..., object]) -> None:
    printed = str(getattr(qemu_img("create", "-f", "raw", "-o", "help", "x"), "stdout", ""))
    peer = {line.split("=")[0].strip(): line.split(" - ", 1)[1] for line in printed.splitlines() if " - " in line}
    own = {option.name: option.help for option in CREATE_OPTIONS.options}
    assert own == peer
