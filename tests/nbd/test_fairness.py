"""A server process and twenty hostile clients at a time: a good client hardly notices, and memory stays bounded."""

from __future__ import annotations

import hashlib
import random
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fairness")
    image, path = folder / "image", folder / "socket"
    create(str(image), "qcow2", SIZE)
    command = [sys.executable, "-m", "byre", "serve", "-t", "-e", "0", "-f", "qcow2", "-k", str(path), str(image)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: listens(path) or process.poll() is not None, 20)
            with Talk(path) as talk:
                talk.start("structured")
                for number in range(SIZE // 2 // BLOCK):
                    assert talk.write(number * BLOCK, BLOCKS[number % 16]) == 0
            yield Server(path, process)
            process.terminate()
            before = time.monotonic()
            assert process.wait(10) == 0
            assert time.monotonic() - before < 5
            assert process.stderr is not None
            assert "internal error" not in process.stderr.read()
        finally:
            process.kill()


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
