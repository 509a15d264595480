"""Image locks: between nodes, between byre and the peer, and where there are none."""

from __future__ import annotations

import fcntl
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from byre.errors import Busy, NotSupported
from byre.graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE
from byre.protocols import locks

from .conftest import OpenFile

WRITER = (PERM_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL & ~(PERM_WRITE | PERM_RESIZE))
READER = (PERM_READ, PERM_ALL & ~(PERM_WRITE | PERM_RESIZE))
RAW_READER = (PERM_READ, PERM_ALL)

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def hold(qemu_io_path: str) -> Iterator[Hold]:
    """``hold(*arguments)``: a running qemu-io that has opened its image and waits for commands."""
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [qemu_io_path, *map(str, arguments)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        running.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        seen = ""
        while "MiB" not in seen:
            character = process.stdout.read(1)
            assert character, f"qemu-io ended: {seen}"
            seen += character
        return process

    yield run
    for process in running:
        if process.poll() is not None:
            continue
        process.communicate("quit\n", timeout=10)


def locked_bytes(path: Path) -> set[int]:
    """The bytes between 100 and 210 that somebody has locked."""
    found = set()
    with open(path, "rb") as stream:
        for byte in range(100, 210):
            request = struct.pack("@hhqqi4x", fcntl.F_WRLCK, 0, byte, 1, 0)
            answer = fcntl.fcntl(stream.fileno(), fcntl.F_OFD_GETLK, request)
            if struct.unpack("@hhqqi4x", answer)[0] != fcntl.F_UNLCK:
                found.add(byte)
    return found


# -- within byre ----------------------------------------------------------------------------------


def test_each_permission_has_its_byte(image: Path, open_file: OpenFile) -> None:
    node = open_file(image)
    assert locked_bytes(image) == set()
    node.set_permissions(*WRITER)
    assert locked_bytes(image) == {100, 101, 103, 201, 203}
    node.set_permissions(*READER)
    assert locked_bytes(image) == {100, 201, 203}
    node.set_permissions(0, PERM_ALL)
    assert locked_bytes(image) == set()


def test_two_nodes_exclude_each_other(image: Path, open_file: OpenFile) -> None:
    one, two = open_file(image), open_file(image)
    one.set_permissions(*READER)
    two.set_permissions(*READER)
    with pytest.raises(Busy, match='failed to get "write" lock') as caught:
        two.set_permissions(*WRITER)
    assert f"Is another process using the image [{image}]?" in str(caught.value)
    assert locked_bytes(image) == {100, 201, 203}
    one.close()
    two.set_permissions(*WRITER)
    three = open_file(image)
    with pytest.raises(Busy, match='failed to get shared "write" lock'):
        three.set_permissions(*READER)
    three.set_permissions(*RAW_READER)


def test_a_refused_change_keeps_the_old_locks(image: Path, open_file: OpenFile) -> None:
    one, two = open_file(image), open_file(image)
    one.set_permissions(PERM_READ, PERM_ALL & ~PERM_RESIZE)
    two.set_permissions(PERM_WRITE, PERM_ALL)
    with pytest.raises(Busy):
        two.set_permissions(PERM_RESIZE, PERM_ALL & ~PERM_READ)
    two.close()
    assert locked_bytes(image) == {100, 203}
    two = open_file(image)
    two.set_permissions(PERM_WRITE, PERM_ALL)
    assert locked_bytes(image) == {100, 101, 203}


def test_force_share_excludes_nobody(image: Path, open_file: OpenFile) -> None:
    writer, reader = open_file(image), open_file(image, read_only=True, force_share=True)
    writer.set_permissions(*WRITER)
    reader.set_permissions(*READER)
    reader.close()
    reader = open_file(image, read_only=True, force_share=True)
    writer.set_permissions(0, PERM_ALL)
    reader.set_permissions(*READER)
    assert locked_bytes(image) == {100}
    writer.set_permissions(*WRITER)


def test_no_locks_where_they_are_off(image: Path, open_file: OpenFile) -> None:
    one, two = open_file(image), open_file(image, options={"locking": "off"})
    one.set_permissions(*WRITER)
    two.set_permissions(*WRITER)


def test_systems_without_such_locks(image: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_SETLK", None)
    open_file(image).set_permissions(*WRITER)
    with pytest.raises(NotSupported, match="locking"):
        open_file(image, options={"locking": "on"})


def test_file_systems_without_locks(image: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(37, "No locks available")

    one, two = open_file(image), open_file(image, options={"locking": "on"})
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    one.set_permissions(*WRITER)
    with pytest.raises(NotSupported, match="No locks available"):
        two.set_permissions(*WRITER)


# -- with the peer --------------------------------------------------------------------------------


@pytest.mark.oracle
def test_a_writing_peer_keeps_byre_out(image: Path, open_file: OpenFile, hold: Hold) -> None:
    process = hold("-f", "raw", image)
    node = open_file(image)
    with pytest.raises(Busy, match="lock"):
        node.set_permissions(*WRITER)
    with pytest.raises(Busy, match='shared "write" lock'):
        node.set_permissions(*READER)
    shared = open_file(image, read_only=True, force_share=True)
    shared.set_permissions(*READER)
    process.communicate("quit\n", timeout=10)
    node.set_permissions(*WRITER)


@pytest.mark.oracle
def test_a_reading_peer_keeps_writers_out_only(image: Path, open_file: OpenFile, hold: Hold, qemu_img: object) -> None:
    assert callable(qemu_img)
    qcow2 = image.with_suffix(".qcow2")
    qemu_img("create", "-f", "qcow2", qcow2, "10M")
    hold("-r", "-f", "qcow2", qcow2)
    node = open_file(qcow2)
    node.set_permissions(*READER)
    with pytest.raises(Busy, match='"write" lock'):
        node.set_permissions(*WRITER)


@pytest.mark.oracle
def test_a_peer_that_shares_lets_byre_write(image: Path, open_file: OpenFile, hold: Hold) -> None:
    hold("-r", "-U", "-f", "raw", image)
    node = open_file(image)
    node.set_permissions(*WRITER)


@pytest.mark.oracle
def test_byre_keeps_the_peer_out(
    image: Path, open_file: OpenFile, qemu_io: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    node = open_file(image)
    node.set_permissions(*WRITER)
    refused = qemu_io("-f", "raw", "-c", "write 0 512", image, check=False)
    assert refused.returncode != 0
    assert 'Failed to get "write" lock' in refused.stderr
    assert "MiB" not in qemu_io("-r", "-f", "qcow2", "-c", "length", image, check=False).stdout
    assert qemu_io("-r", "-U", "-f", "raw", "-c", "length", image).stdout.startswith("1 MiB")
    node.set_permissions(*READER)
    assert qemu_io("-r", "-f", "raw", "-c", "length", image).stdout.startswith("1 MiB")
    assert qemu_io("-f", "raw", "-c", "write 0 512", image, check=False).returncode != 0
    node.set_permissions(0, PERM_ALL)
    qemu_io("-f", "raw", "-c", "write 0 512", image)


@pytest.mark.oracle
def test_creating_over_a_file_in_use(image: Path, open_file: OpenFile, hold: Hold) -> None:
    from byre.protocols.file import CREATE_OPTIONS, create

    image.write_bytes(b"\xaa" * (1 << 20))
    process = hold("-f", "raw", image)
    with pytest.raises(Busy, match="lock"):
        create(str(image), CREATE_OPTIONS.parse({"size": 512}, what="test"))
    assert image.read_bytes() == b"\xaa" * (1 << 20)
    process.communicate("quit\n", timeout=10)
    create(str(image), CREATE_OPTIONS.parse({"size": 512}, what="test"))
    assert image.read_bytes() == bytes(512)
