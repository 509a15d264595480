"""A server process and twenty hostile clients at a time: a good client hardly notices, and memory stays bounded."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from byre.graph.creating import create
from byre.nbd import handshake, wire
from support.nbd_talk import Talk, in_thread, listens, wait_until

SIZE = 64 << 20
"""Its first half is read and compared, its second half is what hostile clients write to."""
HOSTILE = 20
PATIENCE = 0.5
"""Seconds a good client waits for an answer at most."""
BUFFERS = 256 << 20
"""Bytes that clients can make the server hold, all together."""
AROUND = 96 << 20
"""What a server with that many connections takes anyway: threads, input, output, what the allocator keeps."""
SECONDS = 0.4
BLOCK = 64 << 10
BLOCKS = [random.Random(number).randbytes(BLOCK) for number in range(16)]
HASHES = [hashlib.sha256(block).digest() for block in BLOCKS]

Attack = Callable[[Path, threading.Event], None]


class Server:
    def __init__(self, path: Path, process: subprocess.Popen[str]) -> None:
        self.path = path
        self.process = process

    def status(self, key: str) -> int:
        """A line of the kernel's account; bytes if it is memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        words = next(line for line in lines if line.startswith(f"{key}:")).split()
        return int(words[1]) << (10 if words[-1] == "kB" else 0)

    @property
    def memory(self) -> int:
        """Of its own, without what it has mapped of files."""
        return self.status("RssAnon")

    def end(self) -> None:
        """In time, whatever clients do."""
        before = time.monotonic()
        self.process.terminate()
        assert self.process.wait(10) == 0
        assert time.monotonic() - before < 5


@contextmanager
def serving(image: Path, image_format: str) -> Iterator[Server]:
    """A server, which must end in time."""
    path = image.parent / "socket"
    command = [sys.executable, "-m", "byre", "serve", "-t", "-e", "0", "-f", image_format, "-k", str(path), str(image)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: listens(path) or process.poll() is not None, 20)
            server = Server(path, process)
            yield server
            if process.returncode is None:
                server.end()
            assert process.stderr is not None
            assert "internal error" not in process.stderr.read()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    image = tmp_path_factory.mktemp("fairness") / "image"
    create(str(image), "qcow2", SIZE)
    with serving(image, "qcow2") as found:
        with Talk(found.path) as talk:
            talk.start("structured")
            for number in range(SIZE // 2 // BLOCK):
                assert talk.write(number * BLOCK, BLOCKS[number % 16]) == 0
        yield found


def connected(path: Path) -> Talk:
    return Talk(path, timeout=1)


# -- what hostile clients do ----------------------------------------------------------------------


def stall_in_a_long_write(path: Path, stop: threading.Event) -> None:
    """32 MiB are announced and one byte comes."""
    with connected(path) as talk:
        talk.start("structured")
        talk.request(wire.CMD_WRITE, SIZE // 2, wire.MAX_PAYLOAD, payload=b"x")
        stop.wait()


def stall_at_the_end_of_a_long_write(path: Path, stop: threading.Event) -> None:
    """Of 32 MiB all but one byte come; this fills memory."""
    with connected(path) as talk:
        talk.start("structured")
        talk.request(wire.CMD_WRITE, SIZE // 2, wire.MAX_PAYLOAD, payload=bytes(wire.MAX_PAYLOAD - 1))
        stop.wait()


def never_take_answers(path: Path, stop: threading.Event) -> None:
    """Reads of 32 MiB, as many as the server takes, in a mode that has it send holes or pieces, or all in one."""
    chooser = random.Random()
    with connected(path) as talk:
        talk.start(chooser.choice(("simple", "structured", "extended")))
        flags = 0 if talk.mode == "simple" else chooser.choice((0, wire.CMD_FLAG_DF))
        try:
            while not stop.is_set():
                talk.request(wire.CMD_READ, 0, wire.MAX_PAYLOAD, flags=flags)
        except TimeoutError:
            stop.wait()


def come_and_go(path: Path, stop: threading.Event) -> None:
    chooser = random.Random()
    while not stop.wait(0.01):
        with connected(path) as talk:
            if chooser.random() < 0.5:
                talk.start("structured")
                talk.request(wire.CMD_READ, 0, chooser.choice((512, 1 << 20, wire.MAX_PAYLOAD)))


def break_the_rules(path: Path, stop: threading.Event) -> None:
    chooser = random.Random()
    while not stop.wait(0.01):
        with connected(path) as talk:
            talk.start(chooser.choice(("simple", "structured", "extended")))
            for _ in range(20):
                command = chooser.choice((0, 7, 8, 9, 4711))
                offset, length = chooser.choice((0, SIZE, 1 << 63)), chooser.choice((0, 1 << 20, 0xFFFFFFFF))
                talk.request(command, offset, length, flags=chooser.choice((0, 4, 16, 1 << 15)))
            talk.send(chooser.randbytes(100))
            talk.ended()


def half_a_handshake(path: Path, stop: threading.Event) -> None:
    chooser = random.Random()
    while not stop.wait(0.02):
        with connected(path) as talk:
            talk.greet()
            data = handshake.encode_option(handshake.OPT_GO, bytes(chooser.choice((6, 4000, 60_000))))
            talk.send(data[: chooser.randrange(len(data))])
            stop.wait(chooser.choice((0, 0.3)))


def ask_for_lists(path: Path, stop: threading.Event) -> None:
    """Options without end, whose answers nobody takes."""
    while not stop.wait(0.01):
        with connected(path) as talk:
            talk.greet()
            try:
                while not stop.is_set():
                    talk.send(handshake.encode_option(handshake.OPT_LIST) * 200)
            except TimeoutError:
                pass


def clear_all(path: Path, stop: threading.Event) -> None:
    """Long requests that cost little to ask for: zeroes, trims, caching and status of everything there is."""
    with connected(path) as talk:
        talk.start("extended", contexts=("base:allocation",))
        try:
            while not stop.is_set():
                talk.request(wire.CMD_CACHE, 0, 8 << 20)
                talk.request(wire.CMD_WRITE_ZEROES, SIZE // 2, 4 << 20, flags=wire.CMD_FLAG_NO_HOLE)
                talk.request(wire.CMD_TRIM, SIZE // 2, SIZE // 2)
                talk.request(wire.CMD_BLOCK_STATUS, 0, SIZE)
        except TimeoutError:
            stop.wait()


ATTACKS: tuple[Attack, ...] = (
    stall_in_a_long_write, stall_at_the_end_of_a_long_write, never_take_answers, come_and_go, break_the_rules,
    half_a_handshake, ask_for_lists, clear_all,
)  # fmt: skip


@contextmanager
def attacked(path: Path, attacks: list[Attack]) -> Iterator[None]:
    stop = threading.Event()

    def run(attack: Attack) -> None:
        while not stop.is_set():
            try:
                attack(path, stop)
            except (OSError, EOFError):
                stop.wait(0.02)  # turned out: once more

    threads = [in_thread(run, attack) for attack in attacks]
    try:
        time.sleep(0.2)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)


def work(path: Path, seconds: float) -> list[float]:
    """Read and write for a while; the seconds that each answer took."""
    chooser = random.Random(5)
    times: list[float] = []
    end = time.monotonic() + seconds
    with Talk(path, timeout=5) as talk:
        talk.start("structured")
        while time.monotonic() < end or len(times) < 10:
            number = chooser.randrange(SIZE // 2 // BLOCK)
            before = time.monotonic()
            data = talk.read(number * BLOCK, BLOCK)
            times.append(time.monotonic() - before)
            assert hashlib.sha256(data).digest() == HASHES[number % 16]
            before = time.monotonic()
            assert talk.write(number * BLOCK, data[:4096]) == 0
            times.append(time.monotonic() - before)
            time.sleep(0.01)
    return times


@pytest.mark.parametrize("attack", [*ATTACKS, None], ids=lambda attack: attack.__name__ if attack else "all_kinds")
def test_a_good_client_among_hostile_ones(server: Server, attack: Attack | None) -> None:
    attacks = [attack] * HOSTILE if attack else [ATTACKS[number % len(ATTACKS)] for number in range(HOSTILE)]
    peak = server.memory
    with attacked(server.path, attacks):
        stop = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not stop.wait(0.02):
                peak = max(peak, server.memory)

        watcher = in_thread(watch)
        times = work(server.path, SECONDS)
        stop.set()
        watcher.join(5)
    assert max(times) < PATIENCE
    assert peak < BUFFERS + AROUND


def test_afterwards_nothing_is_left_of_them(server: Server) -> None:
    wait_until(lambda: server.status("Threads") < 8, 20)
    wait_until(lambda: server.memory < AROUND, 10)


# -- a disk in very many pieces --------------------------------------------------------------------

FRAGMENTED = 256 << 20
PIECE = 4096


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw and qcow2 images in which data and holes of 4 KiB alternate."""
    folder = tmp_path_factory.mktemp("pieces")
    with open(folder / "raw", "wb", buffering=0) as file:
        file.truncate(FRAGMENTED)
        for number in range(FRAGMENTED // PIECE // 2):
            os.pwrite(file.fileno(), b"%-*d" % (PIECE, number), number * 2 * PIECE)
    subprocess.run(
        [sys.executable, "-m", "byre", "convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={PIECE}",
         str(folder / "raw"), str(folder / "qcow2")], check=True,
    )  # fmt: skip
    return folder


def ask_what_there_is(path: Path, stop: threading.Event) -> None:
    """Block status of everything, all the time; answers are taken."""
    with connected(path) as talk:
        talk.start("extended", contexts=("base:allocation",))

        def take() -> None:
            try:
                while talk.socket.recv(1 << 20):
                    pass
            except OSError:
                pass

        taker = in_thread(take)
        try:
            while not stop.is_set():
                offset = random.randrange(FRAGMENTED // 4) // PIECE * PIECE
                talk.request(wire.CMD_BLOCK_STATUS, offset, FRAGMENTED - offset)
        finally:
            talk.socket.shutdown(socket.SHUT_RDWR)
            taker.join(5)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_good_client_among_those_that_ask_what_there_is(pieces: Path, image_format: str) -> None:
    times: list[float] = []
    with (
        serving(pieces / image_format, image_format) as server,
        attacked(server.path, [ask_what_there_is] * HOSTILE),
        Talk(server.path, timeout=10) as talk,
    ):
        talk.start("structured")
        end = time.monotonic() + 1
        while time.monotonic() < end:
            number = random.randrange(FRAGMENTED // PIECE // 2)
            before = time.monotonic()
            data = talk.read(number * 2 * PIECE, 2 * PIECE)
            times.append(time.monotonic() - before)
            assert (int(data[:PIECE]), any(data[PIECE:])) == (number, False)
            assert server.memory < AROUND
            time.sleep(0.01)
        server.end()  # in the middle of it
    assert max(times) < PATIENCE


def test_what_nobody_waits_for_is_left(pieces: Path) -> None:
    """Clients that have gone leave no work behind but what they wrote."""
    with serving(pieces / "raw", "raw") as server:
        for number in range(HOSTILE):
            with Talk(server.path) as talk:
                talk.start("extended", contexts=("base:allocation",))
                talk.request(wire.CMD_WRITE, number * 2 * PIECE, 7, flags=wire.CMD_FLAG_FUA | wire.CMD_FLAG_PAYLOAD_LEN,
                             payload=b"written")  # fmt: skip
                for _ in range(30):
                    talk.request(wire.CMD_CACHE, 0, FRAGMENTED)
                    talk.request(wire.CMD_BLOCK_STATUS, 0, FRAGMENTED)
        wait_until(lambda: server.status("Threads") < 8, 2)
        with Talk(server.path) as talk:
            talk.start("structured")
            for number in range(HOSTILE):
                assert talk.read(number * 2 * PIECE, 7) == b"written"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_server_that_has_much_to_do_stops_in_time(pieces: Path, image_format: str) -> None:
    with serving(pieces / image_format, image_format) as server, contextlib.ExitStack() as stack:
        for number in range(HOSTILE):
            talk = stack.enter_context(Talk(server.path)).start("extended", contexts=("base:allocation",))
            for _ in range(4):
                talk.request(wire.CMD_BLOCK_STATUS, 0, FRAGMENTED)
                talk.request(wire.CMD_CACHE, 0, FRAGMENTED)
                talk.request(wire.CMD_WRITE_ZEROES, number * PIECE, FRAGMENTED // 2, flags=wire.CMD_FLAG_NO_HOLE)
                talk.request(wire.CMD_TRIM, FRAGMENTED // 2 + number * PIECE, FRAGMENTED // 4)
        server.end()
