"""Other flags for an open file: what changes, what may not, and what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from byre.errors import ByreError, InvalidArgument, ReadOnly
from byre.graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE
from byre.graph.opening import OpenFlags
from byre.protocols.file import OPTIONS

from .conftest import OpenFile, make


def test_reopen_changes_the_mode(tmp_path: Path, open_file: OpenFile) -> None:
    path = make(tmp_path / "a", b"x" * 5000)
    node = open_file(path, read_only=True)
    os.rename(path, tmp_path / "b")  # the node holds the file, not the name
    token = node.reopen_prepare(OpenFlags(read_only=False, direct=True), node.runtime)
    with pytest.raises(ReadOnly):
        node.write_from(0, memoryview(b"y"))
    node.reopen_commit(token)
    node.write_from(1, memoryview(b"yz"))
    assert node.limits.request_alignment > 1
    node.reopen_commit(node.reopen_prepare(OpenFlags(read_only=True), node.runtime))
    assert node.read_only
    assert node.limits.request_alignment == 1
    node.flush()
    assert (tmp_path / "b").read_bytes() == b"xyz" + b"x" * 4997


def test_reopen_keeps_name_and_locking(tmp_path: Path, open_file: OpenFile) -> None:
    node = open_file(make(tmp_path / "a", 10), options={"locking": "on", "aio": "native"})
    for change in ({"filename": "other"}, {"locking": "off"}):
        options = OPTIONS.parse({**node.runtime.given, **change}, what="test")
        with pytest.raises(InvalidArgument, match="cannot change"):
            node.reopen_prepare(OpenFlags(), options)
    node.reopen_commit(node.reopen_prepare(OpenFlags(), OPTIONS.parse({"aio": "threads"}, what="test")))
    assert node.runtime.word("aio") == "threads"


def test_locks_move_to_the_reopened_file(tmp_path: Path, open_file: OpenFile) -> None:
    path = make(tmp_path / "a", 5000)
    node, other = open_file(path), open_file(path)
    unshared = PERM_ALL & ~(PERM_WRITE | PERM_RESIZE)
    node.set_permissions(PERM_READ | PERM_WRITE, unshared)
    node.reopen_commit(node.reopen_prepare(OpenFlags(read_only=False), node.runtime))
    with pytest.raises(ByreError, match='"write" lock'):
        other.set_permissions(PERM_WRITE, PERM_ALL)
    token = node.reopen_prepare(OpenFlags(read_only=True), node.runtime)
    node.set_permissions(PERM_READ, PERM_ALL)
    node.reopen_commit(token)
    other.set_permissions(PERM_WRITE, PERM_ALL)
