"""Image: bounds, statistics, the gate, and closing."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import byre
from byre.errors import Busy, ByreError, InvalidArgument, IOFailure, NotSupported, ReadOnly
from byre.formats.abilities import Checkable
from byre.graph.creating import create
from byre.graph.graph import Graph
from byre.graph.live import replace_node
from byre.graph.opening import Opener, OpenFlags, Policy
from byre.image import Image
from byre.jobs.control import Control

SIZE = 1 << 20


@pytest.fixture(params=["raw", "qcow2"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    name = str(tmp_path / f"disk.{request.param}")
    create(name, request.param, SIZE)
    return name


def open_as(path: str, **more: object) -> Image:
    return byre.open(path, format=path.rpartition(".")[2], **{"read_only": False, **more})  # type: ignore[arg-type]


def test_bounds(path: str) -> None:
    with open_as(path) as image:
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (-1, 1), (-5, 5), (1 << 64, 1)):
            with pytest.raises(InvalidArgument, match="the image ends at 0x100000"):
                image.read(offset, length)
            with pytest.raises(InvalidArgument, match="the image ends at"):
                image.write(offset, bytes(length))
            with pytest.raises(InvalidArgument):
                image.write_zeroes(offset, length)
            with pytest.raises(InvalidArgument):
                image.discard(offset, length)
            with pytest.raises(InvalidArgument):
                image.extents(offset, length)
        with pytest.raises((InvalidArgument, ValueError)):
            image.read(0, -1)
        with pytest.raises(InvalidArgument):
            image.write_zeroes(512, -512)
        with pytest.raises(InvalidArgument):
            image.discard(512, -512)
        assert image.read(SIZE, 0) == b""
        image.write(SIZE, b"")
        image.write_zeroes(SIZE, 0)
        image.discard(0, 0)
        assert image.read(0, SIZE) == bytes(SIZE)


def test_any_buffer_will_do(path: str) -> None:
    from array import array

    with open_as(path) as image:
        for data in (b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), memoryview(array("I", [1])), array("H", [1, 2])):
            image.write(8, data)  # type: ignore[arg-type]
            assert image.read(8, 4) == bytes(memoryview(data).cast("B"))
        into = array("I", [0])
        image.read_into(8, memoryview(into).cast("B"))
        assert into.tobytes() == image.read(8, 4)


def test_reading_only(path: str) -> None:
    with open_as(path, read_only=True) as image:
        for request in (
            lambda: image.write(0, b"x"),
            lambda: image.writev(0, [memoryview(b"x")]),
            lambda: image.write_zeroes(0, 512),
            lambda: image.discard(0, 512),
            lambda: image.resize(SIZE * 2),
            lambda: image.write_compressed(0, bytes(65536)),
            lambda: image.write_compressed_clusters(0, [b"x"]),
        ):
            with pytest.raises(ReadOnly, match="open read-only"):
                request()
        image.flush()
    graph = Graph()
    with byre.open({"driver": "raw", "file": path, "node-name": "n", "read-only": True}, graph=graph) as image:
        with pytest.raises(ReadOnly):
            Image(image.node, graph, read_only=False)
        assert len(image.node.parents) == 1


def test_statistics(path: str) -> None:
    with open_as(path) as image:
        image.write(1000, bytes(500))
        image.write(0, b"x" * 100)
        image.read(0, 4096)
        image.readv_into(0, [memoryview(bytearray(10))])
        image.write_zeroes(65536, 65536)
        image.discard(0, 512)
        image.flush()
        stats = image.stats.as_dict()
        assert (stats["write"]["operations"], stats["write"]["bytes"]) == (2, 600)
        assert (stats["read"]["operations"], stats["read"]["bytes"]) == (2, 4106)
        assert (stats["zeroes"]["operations"], stats["zeroes"]["bytes"]) == (1, 65536)
        assert stats["discard"]["operations"] == 1
        assert stats["flush"]["operations"] == 1
        assert all(entry["nanoseconds"] > 0 for entry in stats.values())
        assert image.stats.highest_written == 131072
        assert image.node.stats.as_dict()["write"]["bytes"] >= 600


def test_failures_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(SIZE))
    faults = [{"event": "none", "iotype": kind, "errno": 5} for kind in ("read", "write")]
    spec = {"driver": "raw", "file": {"driver": "blkdebug", "image": str(tmp_path / "a"), "inject-error": faults}}
    with byre.open(spec, read_only=False) as image:
        with pytest.raises(IOFailure):
            image.read(0, 512)
        with pytest.raises(IOFailure):
            image.write(0, bytes(512))
        stats = image.stats.as_dict()
        assert (stats["read"]["failed"], stats["read"]["operations"]) == (1, 0)
        assert (stats["write"]["failed"], stats["write"]["operations"]) == (1, 0)


def test_statistics_from_many_threads(path: str) -> None:
    with open_as(path) as image:

        def work(number: int) -> None:
            view = memoryview(bytearray(16))
            for _ in range(300):
                image.read(number * 100, 16)
                image.readv_into(0, [view])
                image.write(number * 100, b"x" * 16)

        run_all([lambda number=number: work(number) for number in range(4)])  # type: ignore[misc]
        stats = image.stats.as_dict()
        assert (stats["read"]["operations"], stats["read"]["bytes"]) == (2400, 2400 * 16)
        assert (stats["write"]["operations"], stats["write"]["bytes"]) == (1200, 1200 * 16)


def run_all(actions: list) -> None:  # type: ignore[type-arg]
    failures: list[BaseException] = []

    def guarded(action: object) -> None:
        try:
            action()  # type: ignore[operator]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


# -- the gate ---------------------------------------------------------------------------------------


def test_a_paused_image_holds_requests_back(path: str) -> None:
    with open_as(path) as image:
        image.pause()
        done = threading.Event()
        thread = threading.Thread(target=lambda: (image.write(0, b"late"), done.set()))
        thread.start()
        assert not done.wait(0.05)
        image.pause()  # pauses nest
        image.resume()
        assert not done.wait(0.02)
        image.resume()
        assert done.wait(5)
        thread.join(5)
        assert image.read(0, 4) == b"late"


def test_pausing_waits_for_requests_in_flight(tmp_path: Path) -> None:
    spec = {"driver": "raw", "file": {"driver": "null-co", "size": SIZE, "latency-ns": 100_000_000}}
    with byre.open(spec, read_only=False) as image:
        thread = threading.Thread(target=lambda: image.read(0, 512))
        thread.start()
        while not image._in_flight:
            time.sleep(0.001)
        with pytest.raises(Busy, match="in use"):
            image.check_idle()
        image.pause()
        assert image._in_flight == 0
        image.check_idle()
        image.resume()
        thread.join(5)


def test_pausing_and_resuming_while_threads_work(path: str) -> None:
    stop = threading.Event()
    with open_as(path) as image:

        def work(number: int) -> None:
            while not stop.is_set():
                image.write(number * 4096, bytes([number]) * 4096)
                assert image.read(number * 4096, 4096) == bytes([number]) * 4096

        def pause() -> None:
            try:
                for _ in range(60):
                    image.pause()
                    assert image._in_flight == 0
                    image.resume()
            finally:
                stop.set()

        run_all([pause, *(lambda number=number: work(number) for number in range(3))])  # type: ignore[misc]
        assert image._in_flight == 0


# -- life -------------------------------------------------------------------------------------------


def held_back(image: Image, action: Callable[[], object], change: Callable[[], None]) -> list[object]:
    """What ``action`` came to, on a thread that was held at the gate while ``change`` was made."""
    outcome: list[object] = []

    def work() -> None:
        try:
            outcome.append(action())
        except ByreError as error:
            outcome.append(error)

    image.pause()
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.05)
    change()
    image.resume()
    thread.join()
    return outcome


REQUESTS: dict[str, Callable[[Image], object]] = {
    "read": lambda image: image.read(SIZE - 512, 512),
    "readv": lambda image: image.readv_into(SIZE - 512, [memoryview(bytearray(512))]),
    "write": lambda image: image.write(SIZE - 512, b"x" * 512),
    "writev": lambda image: image.writev(SIZE - 512, [memoryview(bytes(512))]),
    "zeroes": lambda image: image.write_zeroes(SIZE - 512, 512),
    "discard": lambda image: image.discard(SIZE - 512, 512),
    "map": lambda image: image.extents(SIZE - 512, 512),
}


@pytest.mark.parametrize("kind", list(REQUESTS))
def test_bounds_are_those_of_the_moment_when_a_held_back_request_goes_on(path: str, kind: str) -> None:
    with open_as(path) as image:
        outcome = held_back(image, lambda: REQUESTS[kind](image), lambda: image.node.resize(SIZE // 2))
        assert isinstance(outcome[0], InvalidArgument), outcome
        assert str(outcome[0]).endswith(f"the image ends at {SIZE // 2:#x}")
        outcome = held_back(image, lambda: REQUESTS[kind](image), lambda: image.node.resize(SIZE))
        assert not isinstance(outcome[0], ByreError), outcome


def test_a_held_back_flush_is_one_of_the_node_there_is_then(tmp_path: Path) -> None:
    graph, flushed = Graph(), []
    for name in ("a", "b"):
        create(str(tmp_path / name), "raw", SIZE)
    with byre.open(str(tmp_path / "a"), format="raw", read_only=False, graph=graph) as image:
        other = Opener(graph, Policy()).open_chain(str(tmp_path / "b"), OpenFlags(read_only=False), driver_name="raw")
        other.flush = lambda: flushed.append("b")  # type: ignore[method-assign]
        held_back(image, image.flush, lambda: replace_node(graph, image.node, other))
        assert flushed == ["b"]


def test_shrinking_waits_for_those_who_write_behind_the_new_end(path: str) -> None:
    with open_as(path) as image, Image(image.node, image.graph, read_only=False) as other:
        stop = threading.Event()
        refused: list[ByreError] = []

        def work() -> None:
            chance = random.Random(5)
            while not stop.is_set():
                try:
                    other.write(SIZE - 512 * chance.randrange(1, 2000), b"y" * 512)
                except InvalidArgument as error:
                    refused.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            image.resize(65536, shrink=True)
            assert image.read(0, 512) == bytes(512)
            image.resize(SIZE)
            time.sleep(0.005)
        image.resize(65536, shrink=True)
        stop.set()
        for thread in threads:
            thread.join()
        image.resize(SIZE)
        assert image.read(65536, SIZE - 65536) == bytes(SIZE - 65536)
        assert refused
        if isinstance(image.node, Checkable):
            image.flush()
            assert image.node.check(Control()).corruptions == 0


def test_lengths_that_no_image_has(path: str) -> None:
    with open_as(path) as image:
        for length in (-1, 1 << 62):
            with pytest.raises(InvalidArgument, match="cannot read"):
                image.read(0, length)


def test_closing(path: str) -> None:
    image = open_as(path)
    image.write(0, b"kept")
    image.close()
    image.close()
    for request in (
        lambda: image.read(0, 1),
        lambda: image.write(0, b"x"),
        image.flush,
        image.extents,
        lambda: image.write_zeroes(0, 1),
        lambda: image.resize(2 * SIZE),
        lambda: image.reopen(read_only=True),
        lambda: image.discard(0, 512),
        lambda: image.readv_into(0, []),
    ):
        with pytest.raises(InvalidArgument, match="the image is closed"):
            request()
    with open_as(path) as image:
        assert image.read(0, 4) == b"kept"
        image.close()
    assert not [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == path]


def test_closing_waits_for_requests_in_flight_and_refuses_later_ones(path: str) -> None:
    """A file descriptor that is closed under a request may by then be another file."""
    image = open_as(path)
    ended: list[str] = []

    def work(number: int) -> None:
        try:
            while True:
                image.write(number * 4096, bytes([number]) * 4096)
        except InvalidArgument as error:
            ended.append(str(error))

    def close() -> None:
        time.sleep(0.05)
        image.close()

    run_all([close, *(lambda number=number: work(number) for number in range(3))])  # type: ignore[misc]
    assert len(ended) == 3
    assert all("the image is closed" in message for message in ended)


def test_closing_a_paused_image_frees_those_who_wait(path: str) -> None:
    image = open_as(path)
    image.pause()
    failures: list[BaseException] = []

    def late() -> None:
        try:
            image.read(0, 1)
        except InvalidArgument as error:
            failures.append(error)

    thread = threading.Thread(target=late)
    thread.start()
    time.sleep(0.02)
    image.close()
    thread.join(5)
    assert len(failures) == 1


def test_an_error_inside_is_not_hidden_by_closing(tmp_path: Path) -> None:
    create(str(tmp_path / "a"), "qcow2", SIZE)
    spec = {
        "driver": "qcow2",
        "file": {
            "driver": "blkdebug",
            "image": str(tmp_path / "a"),
            "inject-error": [{"event": "flush_to_disk", "errno": 5}],
        },
    }

    def failing() -> None:
        with byre.open(spec, read_only=False) as image:
            image.write(0, b"x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    with pytest.raises(ByreError), byre.open(spec, read_only=False) as image:
        image.write(0, b"x")
    with byre.open(str(tmp_path / "a"), read_only=False):  # and it is closed: nobody holds it
        pass


def test_one_closes_while_another_uses_the_same_node(tmp_path: Path) -> None:
    graph = Graph()
    create(str(tmp_path / "a"), "qcow2", SIZE)
    one = byre.open({"driver": "qcow2", "file": str(tmp_path / "a"), "node-name": "n"}, graph=graph)
    two = Image(one.node, graph)
    one.close()
    assert two.read(0, 4) == bytes(4)
    assert not two.node.closed
    two.close()
    assert graph.nodes == {}


def test_formats_without_an_ability_say_so(tmp_path: Path) -> None:
    create(str(tmp_path / "a.raw"), "raw", SIZE)
    with open_as(str(tmp_path / "a.raw")) as image:
        with pytest.raises(NotSupported, match="no compressed clusters"):
            image.write_compressed(0, bytes(65536))
        with pytest.raises(NotSupported, match="no compressed clusters"):
            image.write_compressed_clusters(0, [b"x"])


def test_resizing(path: str) -> None:
    with open_as(path) as image:
        image.write(SIZE - 4, b"last")
        image.resize(2 * SIZE)
        assert image.size == 2 * SIZE
        assert image.read(SIZE - 4, 8) == b"last\0\0\0\0"
        with pytest.raises(InvalidArgument, match=r"would lose data; use --shrink"):
            image.resize(SIZE)
        with pytest.raises(InvalidArgument):
            image.resize(-512, shrink=True)
        image.resize(SIZE, shrink=True)
        assert image.read(SIZE - 4, 4) == b"last"
        with pytest.raises(InvalidArgument):
            image.read(SIZE, 1)
