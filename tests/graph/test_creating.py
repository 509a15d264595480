"""Creating image files: what is settled before anything is written, and what a failure leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import byre
from byre.errors import Busy, ByreError, InvalidArgument, NotFound, NotSupported
from byre.graph.creating import create
from conftest import Run


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    left = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            left.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    assert not [name for name in left if name.startswith(str(tmp_path))]


def test_sizes_are_rounded_up_to_sectors() -> None:
    for format in ("raw", "qcow2"):
        assert create("a", format, 1000).number("size") == 1024
        with byre.open("a", format=format) as image:
            assert image.size == 1024


def test_the_size_comes_from_the_backing_file() -> None:
    Path("base").write_bytes(bytes(70000))
    settled = create("a", "qcow2", options={"backing_file": "base", "backing_fmt": "raw"})
    assert settled.number("size") == 70144
    Path("sub").mkdir()
    create("sub/b", "qcow2", options={"backing_file": "../a", "backing_fmt": "qcow2"})
    with byre.open("sub/b") as image:
        assert image.size == 70144


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backing_file": "base"}, "without its format"),
        ({"backing_file": "gone", "backing_fmt": "raw"}, "gone"),
        ({"backing_file": "base", "backing_fmt": "file"}, "protocol"),
        ({"backing_file": "base", "backing_fmt": "vmkd"}, "unknown driver"),
        ({"backing_file": "base", "backing_fmt": "qcow2"}, "base"),
        ({"nonsense": 1}, "no option 'nonsense'"),
        ({"cluster_size": 1000}, "cluster"),
        ({"refcount_bits": 3}, "refcount"),
        ({"data_file": "d", "data_file_raw": True, "backing_file": "base", "backing_fmt": "raw"}, "raw"),
        ({"size": -1}, "size"),
        ({"preallocation": "some"}, "preallocation"),
        ({"compat": "2.0"}, "compat"),
        ({"size": 1 << 63}, "size"),
    ],
)
def test_a_refusal_touches_nothing(options: dict[str, object], error: str) -> None:
    Path("base").write_bytes(b"base".ljust(65536, b"\0"))
    Path("old").write_bytes(b"old content")
    for name in ("new", "old"):
        with pytest.raises(ByreError, match=error):
            create(name, "qcow2", None if "size" in options else 1 << 20, options=options)
    assert sorted(os.listdir()) == ["base", "old"]
    assert Path("old").read_bytes() == b"old content"


def test_no_size_at_all() -> None:
    for format in ("raw", "qcow2"):
        with pytest.raises(InvalidArgument, match="no size"):
            create("a", format)
    with pytest.raises(NotSupported, match="no backing files"):
        create("a", "raw", 512, options={"backing_file": "b"})
    with pytest.raises((NotSupported, InvalidArgument)):
        create("a", "blkdebug", 512)
    with pytest.raises(InvalidArgument, match="unknown driver"):
        create("a", "nope", 512)
    assert os.listdir() == []


def test_an_unchecked_backing_file_need_not_exist() -> None:
    create("a", "qcow2", 1 << 20, options={"backing_file": "later", "backing_fmt": "raw"}, check_backing=False)
    with pytest.raises(NotFound, match="later"):
        byre.open("a")
    with pytest.raises(NotFound):
        create("b", "qcow2", options={"backing_file": "later", "backing_fmt": "raw"}, check_backing=False)
    assert os.listdir() == ["a"]


def test_an_image_that_is_its_own_backing_file() -> None:
    create("a", "qcow2", 1 << 20)
    content = Path("a").read_bytes()
    Path("link").hardlink_to("a")
    for name in ("a", "./a", str(Path("a").absolute()), "link"):
        with pytest.raises(ByreError):
            create("a", "qcow2", options={"backing_file": name, "backing_fmt": "qcow2"})
        assert Path("a").read_bytes() == content
    with pytest.raises(ByreError):
        create("a", "qcow2", 1 << 20, options={"data_file": "a"})
    with pytest.raises(ByreError):
        create("new", "qcow2", 1 << 20, options={"data_file": "new"})
    assert sorted(os.listdir()) == ["a", "link"]


def test_an_image_in_use_is_not_overwritten() -> None:
    for format in ("qcow2", "raw"):
        create("a", format, 1 << 20)
        with byre.open("a", read_only=False, format=format) as image:
            image.write(0, b"mine")
            image.flush()
            before = Path("a").read_bytes()
            if format == "qcow2":
                for other in ("qcow2", "raw"):
                    with pytest.raises(Busy):
                        create("a", other, 1 << 20)
                assert Path("a").read_bytes() == before
            assert image.read(0, 4) == b"mine"
    create("base", "qcow2", 1 << 20)
    create("top", "qcow2", options={"backing_file": "base", "backing_fmt": "qcow2"})
    with byre.open("top"), pytest.raises(Busy):
        create("base", "qcow2", 1 << 20)


def test_an_old_image_is_replaced() -> None:
    create("a", "qcow2", 1 << 20)
    with byre.open("a", read_only=False) as image:
        image.write(0, b"old" * 1000)
    create("a", "qcow2", 1 << 21)
    with byre.open("a") as image:
        assert image.size == 1 << 21
        assert image.read(0, 3000) == bytes(3000)
    create("a", "raw", 4096)
    assert Path("a").read_bytes() == bytes(4096)


def test_a_failure_while_writing_removes_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from byre.protocols.file import FileNode

    def full(self: FileNode, offset: int, buffer: memoryview, flags: int = 0) -> None:
        from byre.errors import NoSpace

        raise NoSpace("no space left", where=self.filename)

    monkeypatch.setattr(FileNode, "write_from", full)
    monkeypatch.setattr(FileNode, "writev_from", full)
    with pytest.raises(ByreError, match="no space left"):
        create("a", "qcow2", 1 << 20, options={"data_file": "d"})
    assert os.listdir() == []
    Path("d").write_bytes(b"somebody's")
    with pytest.raises(ByreError):
        create("a", "qcow2", 1 << 20, options={"data_file": "d"})
    assert os.listdir() == ["d"]


def test_where_nothing_can_be_created() -> None:
    with pytest.raises(NotFound):
        create("no/such/folder", "qcow2", 512)
    Path("folder").mkdir()
    with pytest.raises(ByreError):
        create("folder", "raw", 512)
    os.mkfifo("fifo")
    with pytest.raises(ByreError):
        create("fifo", "raw", 512)
    with pytest.raises(ByreError):
        create("/dev/null", "qcow2", 512)
    assert sorted(os.listdir()) == ["fifo", "folder"]


@pytest.mark.oracle
def test_the_peer_opens_what_was_created(qemu_img: Run) -> None:
    for format, options in (
        ("raw", {"preallocation": "full"}),
        ("qcow2", {"preallocation": "metadata"}),
        ("qcow2", {"preallocation": "falloc"}),
        ("qcow2", {"cluster_size": 512, "refcount_bits": 64}),
        ("qcow2", {"extended_l2": True}),
        ("qcow2", {"data_file": "d"}),
    ):
        create("a", format, 3 << 20, options=options)
        if format == "qcow2":
            qemu_img("check", "a")
        create("z", "raw", 3 << 20)
        qemu_img("compare", "-f", format, "-F", "raw", "a", "z")
