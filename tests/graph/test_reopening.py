"""Reopening: one transaction over all nodes under a handle."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import byre
from byre.errors import Busy, ByreError, InvalidArgument, NotFound, ReadOnly
from byre.graph.creating import create
from byre.graph.graph import Graph
from byre.image import Image

DATA = b"data" * 1024


@pytest.fixture(params=["raw", "qcow2", "external"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    name = str(tmp_path / f"disk.{request.param}")
    external = {"data_file": str(tmp_path / "data")} if request.param == "external" else {}
    create(name, "raw" if request.param == "raw" else "qcow2", 1 << 20, options=external)
    with open_as(name) as image:
        image.write(0, DATA)
    return name


def open_as(path: str, **more: object) -> Image:
    return byre.open(path, format="raw" if path.endswith("raw") else "qcow2", **{"read_only": False, **more})  # type: ignore[arg-type]


def flags_of(image: Image) -> list[tuple[bool, object]]:
    nodes = [image.node, *(edge.node for edge in image.node.children.values())]
    return [(node.read_only, getattr(node, "open_flags", None)) for node in nodes]


def direct(image: Image) -> bool:
    import fcntl

    file = image.node.children["file"].node
    return bool(fcntl.fcntl(file._fd, fcntl.F_GETFL) & os.O_DIRECT)  # type: ignore[attr-defined]


def test_there_and_back(path: str) -> None:
    with open_as(path, read_only=True) as image:
        with pytest.raises(ReadOnly):
            image.write(0, b"x")
        image.reopen(read_only=False)
        assert not image.read_only
        image.write(1, b"ATA")
        image.reopen(read_only=True)
        with pytest.raises(ReadOnly):
            image.write(0, b"x")
        assert image.read(0, 4) == b"dATA"
        image.reopen(read_only=False)
        image.write(500_000, DATA)
        image.flush()
    with open_as(path) as image:
        assert image.read(0, 4) == b"dATA"
        assert image.read(500_000, len(DATA)) == DATA


def test_the_cache_mode_changes(path: str) -> None:
    with open_as(path) as image:
        for mode in ("none", "writeback", "unsafe", "directsync", "writethrough"):
            image.reopen(cache=mode)
            assert direct(image) == (mode in ("none", "directsync"))
            assert image.writethrough == (mode in ("writethrough", "directsync"))
            image.write(4097, mode.encode())
            assert image.read(4097, len(mode)) == mode.encode()
            assert not image.read_only
        with pytest.raises(InvalidArgument, match="unknown cache mode"):
            image.reopen(cache="fast")


def test_options_of_the_top_node(path: str) -> None:
    with open_as(path) as image:
        image.reopen(options={"detect-zeroes": "on", "discard": "ignore"})
        assert image.node.detect_zeroes == "on"  # type: ignore[attr-defined]
        assert not image.node.pass_discard  # type: ignore[attr-defined]
        image.reopen(options={"read-only": True})
        assert image.read_only
        assert image.node.detect_zeroes == "on"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {"nonsense": 1},
        {"driver": "vdi"},
        {"node-name": "other"},
        {"file.filename": "/other"},
        {"detect-zeroes": "maybe"},
        {"file.locking": "off"},
        {"read-only": "perhaps"},
    ],
)
def test_what_cannot_change_changes_nothing(path: str, options: dict[str, object]) -> None:
    with open_as(path) as image:
        before = flags_of(image)
        with pytest.raises(ByreError):
            image.reopen(read_only=True, cache="none", options=options)
        assert flags_of(image) == before
        assert not image.read_only
        image.write(0, b"still")
        assert image.read(0, 5) == b"still"


def test_refused_permissions_change_everything_back(path: str) -> None:
    """Another program reads the image: it may not be written."""
    with open_as(path, read_only=True) as image, open_as(path, read_only=True) as other:
        if path.endswith("raw"):
            pytest.skip("readers of raw images share everything")
        before = flags_of(image)
        with pytest.raises(Busy):
            image.reopen(read_only=False, cache="none")
        assert flags_of(image) == before
        assert image.read_only
        assert not image.writethrough
        assert image.read(0, 4) == b"data"
        assert not direct(image)
        with pytest.raises(ReadOnly):
            image.write(0, b"x")
        other.close()
        image.reopen(read_only=False, cache="none")
        image.write(0, b"mine")
        with pytest.raises(Busy):
            open_as(path)
    with open_as(path) as image:
        assert image.read(0, 4) == b"mine"


def test_a_file_that_is_gone(path: str) -> None:
    """The file that is open stays open, whatever has its name now."""
    with open_as(path, read_only=True) as image:
        os.rename(path, path + ".away")
        Path(path).write_bytes(b"another file" * 100)
        try:
            image.reopen(read_only=False)
            image.write(0, b"mine")
            moved = True
        except (NotFound, ByreError):
            moved = False
            assert image.read_only
        assert image.read(0, 4) == (b"mine" if moved else b"data")
    assert Path(path).read_bytes() == b"another file" * 100


def test_requests_wait_while_an_image_is_reopened(path: str) -> None:
    """Writers on the way when the cache mode changes are neither lost nor failed."""
    stop = threading.Event()
    written: list[int] = []
    failures: list[BaseException] = []

    def work(image: Image, number: int) -> None:
        at = number * 65536
        try:
            while not stop.is_set():
                image.write(at, bytes([number + 1]) * 5000)
                assert image.read(at, 5000) == bytes([number + 1]) * 5000
                written.append(number)
        except BaseException as error:
            failures.append(error)

    with open_as(path) as image:
        threads = [threading.Thread(target=work, args=(image, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for mode in ["none", "writeback", "directsync", "unsafe"] * 3:
            image.reopen(cache=mode)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not failures
    with open_as(path) as image:
        for number in set(written):
            assert image.read(number * 65536, 5000) == bytes([number + 1]) * 5000


def test_writes_are_on_disk_when_an_image_becomes_read_only(path: str) -> None:
    with open_as(path) as image:
        image.write(700_000, DATA)
        image.reopen(read_only=True)
        with open_as(path, read_only=True) as other:
            assert other.read(700_000, len(DATA)) == DATA


def test_the_backing_file_is_left_alone(tmp_path: Path) -> None:
    create(str(tmp_path / "base"), "qcow2", 1 << 20)
    create(str(tmp_path / "top"), "qcow2", 1 << 20, options={"backing_file": "base", "backing_fmt": "qcow2"})
    with byre.open(str(tmp_path / "top")) as image:
        image.reopen(read_only=False, cache="none")
        base = image.node.children["backing"].node
        assert base.read_only
        assert base.children["file"].node.read_only
        image.write(0, b"x")


def test_other_users_of_the_same_nodes_wait_as_well(path: str) -> None:
    """The file below is exchanged: nobody may be using the old descriptor, whichever handle he came through."""
    failures: list[BaseException] = []
    stop = threading.Event()
    graph = Graph()
    with open_as(path, graph=graph) as image, Image(image.node, graph, read_only=False) as other:
        base = other.node.children["file"].node
        inside = 0

        def work(number: int) -> None:
            try:
                while not stop.is_set():
                    other.write(number * 65536, bytes([number + 1]) * 5000)
                    assert other.read(number * 65536, 5000) == bytes([number + 1]) * 5000
            except BaseException as error:
                failures.append(error)

        commit = base.reopen_commit

        def checked(token: object) -> None:
            nonlocal inside
            inside += other._in_flight
            commit(token)

        base.reopen_commit = checked  # type: ignore[method-assign]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for mode in ["none", "writeback"] * 10:
            image.reopen(cache=mode)
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures
    assert inside == 0


def test_settings_of_a_node_below_a_filter_stay(tmp_path: Path) -> None:
    name = str(tmp_path / "a.qcow2")
    byre.create(name, "qcow2", 1 << 20)
    file = {"driver": "file", "filename": name}
    lower = {"driver": "qcow2", "detect-zeroes": "on", "discard": "ignore", "file": file}
    with byre.open({"driver": "throttle", "throttling.iops-total": 10**9, "file": lower}, read_only=False) as image:
        node = image.node.children["file"].node
        for read_only in (True, False):
            image.reopen(read_only=read_only)
            assert (node.detect_zeroes, node.pass_discard) == ("on", False)  # type: ignore[attr-defined]
            assert node.read_only == read_only
