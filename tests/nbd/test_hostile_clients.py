"""Clients that break the protocol, stall, flood or hoard: they are dropped, and a good client never notices."""

from __future__ import annotations

import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import byre
from byre.exports.nbd import NbdExport
from byre.nbd import handshake, transmission, wire
from byre.nbd import server as server_module
from byre.nbd.connection import Settings
from byre.protocols.memory import MemoryNode
from support.nbd_talk import GREETING, Served, Talk, image_of, in_thread, named, queries, serving, wait_until

SIZE = 8 << 20
CONTENT = random.Random(1).randbytes(SIZE)
PATIENCE = 0.5
"""Seconds a good client waits for an answer at most."""


@pytest.fixture
def image() -> Iterator[byre.Image]:
    with image_of(MemoryNode(CONTENT)) as opened:
        yield opened


@pytest.fixture
def served(image: byre.Image, tmp_path: Path) -> Iterator[Served]:
    settings = Settings(handshake_seconds=1.0)
    with serving(tmp_path / "s", NbdExport(image, writable=True), settings=settings) as server:
        yield server


@contextmanager
def good_client(path: Path, *, writes: bool = False) -> Iterator[list[float]]:
    """Reads all the while, and checks what it reads; the seconds of each answer are collected.

    :param writes: it writes as well, short and long pieces
    """
    times: list[float] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        chooser = random.Random(9)
        try:
            with Talk(path, timeout=PATIENCE) as talk:
                talk.start("structured")
                while not stop.is_set():
                    offset, length = chooser.randrange(SIZE - (512 << 10)), chooser.choice((512, 4096, 256 << 10))
                    before = time.monotonic()
                    assert talk.read(offset, length) == CONTENT[offset : offset + length]
                    if writes:
                        size = chooser.choice((4096, 4096, 512 << 10))
                        assert talk.write(offset, CONTENT[offset : offset + size]) == 0
                    times.append(time.monotonic() - before)
                    time.sleep(0.005)
        except BaseException as error:
            errors.append(error)

    thread = in_thread(work)
    try:
        yield times
        deadline = time.monotonic() + 5
        while len(times) <= 5 and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(10)
    assert not errors, errors
    assert len(times) > 5
    assert max(times) < PATIENCE


def no_greeting(talk: Talk) -> None:
    talk.receive(18)


def garbage(talk: Talk) -> None:
    talk.send(random.Random(3).randbytes(5000))


def flags_from_the_future(talk: Talk) -> None:
    talk.receive(18)
    talk.send(b"\xff" * 4)


def http(talk: Talk) -> None:
    talk.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


def huge_option(talk: Talk) -> None:
    talk.greet()
    talk.send(struct.pack(">8sII", handshake.OPTION_MAGIC, handshake.OPT_GO, 0xFFFFFFFF) + bytes(1000))


def unfinished_option(talk: Talk) -> None:
    talk.greet()
    talk.send(struct.pack(">8sII", handshake.OPTION_MAGIC, handshake.OPT_GO, 4000) + bytes(10))


def drip(talk: Talk) -> None:
    """A byte now and then does not buy more time."""
    talk.receive(18)
    stream = GREETING + handshake.encode_option(handshake.OPT_LIST) * 100
    for byte in stream:
        try:
            talk.send(bytes([byte]))
        except OSError:
            return
        time.sleep(0.2)


def options_without_end(talk: Talk) -> None:
    """Never reads what is answered."""
    talk.greet()
    lists = handshake.encode_option(handshake.OPT_LIST) * 500
    try:
        while True:
            talk.send(lists)
    except OSError:
        pass


def wrong_magic(talk: Talk) -> None:
    talk.start()
    talk.send(b"\0" * 28)


def request_too_long(talk: Talk) -> None:
    talk.start()
    talk.request(wire.CMD_WRITE, 0, 0xFFFFFFFF)


def cut_header(talk: Talk) -> None:
    talk.start()
    talk.send(wire.encode_request(wire.Request(0, 0, 1, 0, 512), False)[:20])


def cut_payload(talk: Talk) -> None:
    talk.start()
    talk.send(wire.encode_request(wire.Request(wire.CMD_WRITE, 0, 1, 0, 1 << 20), False) + b"evil" * 1000)


ENDED: tuple[Callable[[Talk], None], ...] = (
    no_greeting, garbage, flags_from_the_future, http, huge_option, unfinished_option, drip, options_without_end,
    wrong_magic, request_too_long,
)  # fmt: skip


@pytest.mark.parametrize("attack", ENDED, ids=lambda attack: attack.__name__)
def test_it_is_dropped_in_time(served: Served, attack: Callable[[Talk], None]) -> None:
    with good_client(served.path), Talk(served.path) as talk:
        before = time.monotonic()
        attack(talk)
        assert talk.ended()
        assert time.monotonic() - before < 3
    wait_until(lambda: served.server.connection_count == 0)


@pytest.mark.parametrize("attack", [cut_header, cut_payload], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("leaves", [True, False])
def test_a_request_that_never_ends(
    served: Served, image: byre.Image, monkeypatch: pytest.MonkeyPatch, attack: Callable[[Talk], None], leaves: bool
) -> None:
    """Nothing of it is applied, and the connection ends, at once or when its time is over."""
    monkeypatch.setattr(transmission, "PAYLOAD_SECONDS", 0.5)
    monkeypatch.setattr("byre.nbd.connection._TICK", struct.pack("@ll", 0, 200_000))
    with good_client(served.path):
        with Talk(served.path) as talk:
            attack(talk)
            if leaves:
                talk.socket.close()
                time.sleep(0.3)
            else:
                assert talk.ended()
        wait_until(lambda: served.server.connection_count == 1)
    assert image.read(0, SIZE) == CONTENT


def test_the_limits_are_those_of_the_document() -> None:
    assert Settings().handshake_seconds == 10
    assert transmission.PAYLOAD_SECONDS == 30
    assert transmission.MAX_REQUESTS == 16
    assert server_module.CLIENT_MEMORY == 64 << 20
    assert server_module.TOTAL_MEMORY == 256 << 20
    assert (handshake.MAX_OPTION, wire.MAX_PAYLOAD, wire.MAX_STRING) == (64 << 10, 32 << 20, 4096)


def test_who_asks_for_much_and_takes_nothing(served: Served) -> None:
    """Answers wait in the server, but not without bound, and not in anybody's way."""
    hoarders = [Talk(served.path, timeout=0.2).start("structured") for _ in range(6)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with good_client(served.path, writes=True):
        for talk in hoarders:
            try:
                for _ in range(2000):
                    talk.request(wire.CMD_READ, 0, SIZE)
            except TimeoutError:
                pass
        time.sleep(0.5)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 64 << 20
    for talk in hoarders:
        talk.socket.close()


def test_hoarders_with_simple_replies(served: Served) -> None:
    hoarders = [Talk(served.path, timeout=0.2).start("simple") for _ in range(6)]
    with good_client(served.path, writes=True):
        for talk in hoarders:
            try:
                for _ in range(2000):
                    talk.request(wire.CMD_READ, 0, SIZE)
            except TimeoutError:
                pass
        with Talk(served.path, timeout=5) as talk:
            assert talk.start("simple").read(0, SIZE) == CONTENT
    for talk in hoarders:
        talk.socket.close()


def test_long_writes_that_stall_occupy_a_bounded_share(served: Served) -> None:
    """Twelve clients announce 32 MiB each and send all but the end; the server holds 256 MiB at most for them."""
    stalled = [Talk(served.path, timeout=1).start("structured") for _ in range(12)]
    head = wire.encode_request(wire.Request(wire.CMD_WRITE, 0, 1, 0, wire.MAX_PAYLOAD), False)
    for talk in stalled:
        talk.send(head)
    with good_client(served.path, writes=True):
        time.sleep(0.5)
        assert served.server._budget.used <= server_module.TOTAL_MEMORY
    for talk in stalled:
        talk.socket.close()


def all_but_the_end(talk: Talk) -> None:
    """32 MiB of which the last byte does not come."""
    talk.request(wire.CMD_WRITE, 0, wire.MAX_PAYLOAD, payload=bytes(wire.MAX_PAYLOAD - 1))


def announced(talk: Talk) -> None:
    talk.request(wire.CMD_WRITE, 0, wire.MAX_PAYLOAD)


def middling(talk: Talk) -> None:
    talk.request(wire.CMD_WRITE, 0, 4 << 20)


def dripping(talk: Talk) -> None:
    """A little every now and then does not count as coming."""
    talk.request(wire.CMD_WRITE, 0, 4 << 20, payload=bytes(1 << 20))

    def drip() -> None:
        try:
            while True:
                talk.send(bytes(1000))
                time.sleep(0.02)
        except OSError:
            pass

    in_thread(drip)


@pytest.mark.parametrize(
    ("attack", "count", "good"),
    [(announced, 40, 1 << 20), (announced, 40, 4 << 20), (all_but_the_end, 9, wire.MAX_PAYLOAD),
     (middling, 90, 2 << 20), (dripping, 70, 2 << 20)],
)  # fmt: skip
def test_long_writes_are_not_held_up_by_those_that_stall(
    tmp_path: Path, attack: Callable[[Talk], None], count: int, good: int
) -> None:
    """All the memory for long writes is held by clients that do not go on; a good one gets its own in time."""
    with (
        image_of(MemoryNode(bytes(wire.MAX_PAYLOAD))) as image,
        serving(tmp_path / "s", NbdExport(image, writable=True)) as served,
        Talk(served.path, timeout=5) as talk,
    ):
        talk.start("structured")
        stalled = [Talk(served.path, timeout=5).start("structured") for _ in range(count)]
        threads = [in_thread(attack, each) for each in stalled]
        for thread in threads:
            thread.join(10)
        time.sleep(0.1)
        data = random.Random(good).randbytes(good)
        for _ in range(3):
            before = time.monotonic()
            assert talk.write(0, data) == 0
            assert time.monotonic() - before < PATIENCE + good / (64 << 20)
        assert image.read(0, good) == data
        assert served.server._budget.used <= server_module.TOTAL_MEMORY
        for each in stalled:
            each.socket.close()


def test_nobody_is_turned_out_while_there_is_room(tmp_path: Path) -> None:
    """A slow client that is in nobody's way has its thirty seconds, and what it sends late is written."""
    with (
        image_of(MemoryNode(bytes(wire.MAX_PAYLOAD))) as image,
        serving(tmp_path / "s", NbdExport(image, writable=True)) as served,
        Talk(served.path, timeout=5) as slow,
        Talk(served.path, timeout=5) as talk,
    ):
        slow.start("structured")
        talk.start("structured")
        cookie = slow.request(wire.CMD_WRITE, 0, 8 << 20, payload=b"s" * (4 << 20))
        for _ in range(5):
            assert talk.write(16 << 20, bytes(8 << 20)) == 0
            time.sleep(0.1)
        slow.send(b"t" * (4 << 20))
        assert slow.reply()[0] == cookie
        assert image.read(0, 8 << 20) == b"s" * (4 << 20) + b"t" * (4 << 20)


def test_writers_that_take_no_answers_hold_no_memory(tmp_path: Path) -> None:
    """Long writes whose answers nobody fetches: once they are applied, the memory is for others."""
    with (
        image_of(MemoryNode(bytes(wire.MAX_PAYLOAD))) as image,
        serving(tmp_path / "s", NbdExport(image, writable=True)) as served,
    ):
        hoarders = [Talk(served.path, timeout=0.3).start("structured") for _ in range(12)]
        for each in hoarders:
            try:
                for _ in range(200):
                    each.request(wire.CMD_READ, 0, 1 << 20)
                for _ in range(4):
                    each.request(wire.CMD_WRITE, 0, 16 << 20, payload=bytes(16 << 20))
            except TimeoutError:
                pass
        with Talk(served.path, timeout=5) as talk:
            talk.start("structured")
            before = time.monotonic()
            assert talk.write(0, b"g" * (8 << 20)) == 0
            assert time.monotonic() - before < PATIENCE
        for each in hoarders:
            each.socket.close()


def test_a_flood_of_connections(served: Served) -> None:
    with good_client(served.path):
        mute = []
        for _ in range(150):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(served.path))
            mute.append(client)
        time.sleep(0.3)
        for client in mute:
            client.close()


def test_clients_that_are_as_busy_as_they_can(served: Served) -> None:
    """Fair shares: whoever asks without a pause does not starve who asks now and then."""
    stop = threading.Event()

    def flood(talk: Talk) -> None:
        batch = b"".join(
            wire.encode_request(wire.Request(wire.CMD_READ, 0, n, n * 4096, 4096), False) for n in range(32)
        )
        try:
            while not stop.is_set():
                talk.send(batch)
                talk.receive(32 * (4096 + 28))
        except OSError:
            pass

    talks = [Talk(served.path).start("structured") for _ in range(3)]
    threads = [in_thread(flood, talk) for talk in talks]
    try:
        with good_client(served.path):
            time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join(5)
        for talk in talks:
            talk.socket.close()


def test_every_strange_request_is_answered(served: Served) -> None:
    """Commands, flags and ranges at random: an answer to each, and never a byte outside the range."""
    chooser = random.Random(11)
    with good_client(served.path):
        for mode in ("simple", "structured", "extended"):
            with Talk(served.path) as talk:
                talk.start(mode, contexts=("base:allocation",) if mode != "simple" else ())
                for _ in range(300):
                    command = chooser.choice((0, 4, 5, 7, 8, 9, 77, 65535))
                    offset = chooser.choice((0, 1, 511, SIZE - 1, SIZE, 1 << 63, (1 << 64) - 1))
                    length = chooser.choice((0, 1, 512, 4097, 65536, SIZE))
                    flags = chooser.choice((0, 1, 2, 4, 8, 16, 64, 1 << 15))
                    if command == wire.CMD_TRIM and offset + length <= SIZE:
                        continue  # the good client compares
                    reply = talk.ask(command, offset, length, flags=flags)
                    assert reply.error in (0, 1, 22, 28, 75, 95)


def test_malformed_options_that_leave_the_connection_usable(served: Served) -> None:
    with Talk(served.path) as talk:
        talk.greet()
        for option in (
            handshake.OPT_GO,
            handshake.OPT_INFO,
            handshake.OPT_SET_META_CONTEXT,
            handshake.OPT_LIST,
            handshake.OPT_STARTTLS,
            0,
            1 << 31,
        ):
            for data in (b"\xff" * 8, b"\0" * 4096, b"x"):
                assert talk.option(option, data)[-1][0] & handshake.REP_FLAG_ERROR
        assert talk.option(handshake.OPT_STRUCTURED_REPLY)[-1][0] == handshake.REP_ACK
        assert (
            talk.option(handshake.OPT_SET_META_CONTEXT, queries("", *("x" * 20 for _ in range(2000))))[-1][0]
            == handshake.REP_ACK
        )
        assert talk.option(handshake.OPT_GO, named(""))[-1][0] == handshake.REP_ACK


def test_random_bytes_behind_a_good_handshake(served: Served) -> None:
    chooser = random.Random(12)
    with good_client(served.path):
        for _ in range(40):
            with Talk(served.path, timeout=2) as talk:
                talk.start(chooser.choice(("simple", "structured", "extended")))
                talk.send(wire.encode_request(wire.Request(0, 0, 5, 0, 512), talk.extended))
                data = bytearray(chooser.randbytes(200))
                data[:4] = struct.pack(">I", chooser.choice((wire.REQUEST_MAGIC, wire.EXTENDED_REQUEST_MAGIC, 0)))
                data[4:8] = struct.pack(">HH", chooser.choice((0, 32)), chooser.choice((0, 2, 3, 7)))
                talk.send(bytes(data))
                talk.socket.shutdown(socket.SHUT_WR)
                assert talk.ended()


def test_soak(served: Served) -> None:
    """Many clients come, work, and go in any way; memory and threads stay where they were."""
    errors: list[BaseException] = []

    def visit(seed: int) -> None:
        chooser = random.Random(seed)
        try:
            for _ in range(12):
                with Talk(served.path) as talk:
                    talk.start(chooser.choice(("simple", "structured", "extended")))
                    for _ in range(chooser.randrange(30)):
                        offset = chooser.randrange(SIZE - 70000)
                        length = chooser.choice((1, 4096, 70000))
                        if chooser.random() < 0.3:
                            assert talk.write(offset, CONTENT[offset : offset + length]) == 0
                        else:
                            assert talk.read(offset, length) == CONTENT[offset : offset + length]
                    for _ in range(chooser.randrange(5)):
                        talk.request(wire.CMD_READ, 0, chooser.choice((512, 1 << 20)))  # and leaves without the answer
        except BaseException as error:
            errors.append(error)

    for number in range(6):  # first, everything is loaded and warm
        visit(number)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threads = [in_thread(visit, number) for number in range(10)]
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    deadline = time.monotonic() + 5
    while served.server.connection_count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.server.connection_count == 0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < 40 << 20
