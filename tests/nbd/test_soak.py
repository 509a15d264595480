"""Soak: 200 clients of one server, who read, write, check, hang up at random; the server is killed behind their backs.

What was flushed is there afterwards, what was not is old or new, never anything else; the server's memory does not
grow. The short version belongs to every run; ``pytest -m slow`` runs the long one for ``BYRE_SOAK`` seconds (300).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from byre.graph.creating import create
from byre.nbd import wire
from support.nbd_talk import Talk, listens, wait_until

CONNECTIONS = 200
THREADS = 8
BLOCK = 16 << 10
BLOCKS = 12
"""Of each client; they lie between those of the others, so that clusters are shared."""
SCRATCH = CONNECTIONS * BLOCKS * BLOCK
"""Behind what is checked: for writes whose answer nobody waits for."""
SIZE = SCRATCH + (4 << 20)
GROWTH = 20 << 20
"""Bytes of resident memory by which the second half of a server's life may exceed the first."""


class Block:
    """What may be read from a block: what the last flush covered, or anything written since."""

    def __init__(self) -> None:
        self.current = 0
        self.durable = 0
        self.since: list[int] = []

    def written(self, value: int) -> None:
        self.current = value
        self.since.append(value)

    def flushed(self) -> None:
        self.durable = self.current
        self.since.clear()

    def survived(self, data: bytes) -> None:
        """:raises AssertionError: after a kill, it holds what it must not"""
        for value in (self.durable, *self.since):
            if data == content(value):
                self.current = value
                self.flushed()
                return
        raise AssertionError(f"durable {self.durable}, since {self.since}: found {data[:16]!r}")


def content(value: int) -> bytes:
    return value.to_bytes(8, "big") * (BLOCK // 8)


class Client:
    """One connection at a time, over and over, and the blocks that are its own."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self.blocks = [Block() for _ in range(BLOCKS)]
        self._path = path
        self._chooser = random.Random(number)
        self._talk: Talk | None = None
        self._value = number << 32

    def offset(self, index: int) -> int:
        return (index * CONNECTIONS + self.number) * BLOCK

    def connect(self) -> Talk:
        if self._talk is None:
            self._talk = Talk(self._path, timeout=60)
            self._talk.start(self._chooser.choice(("simple", "structured", "extended")))
        return self._talk

    def step(self) -> None:
        """One request of any kind, or an end of the connection of any kind."""
        talk, choose = self.connect(), self._chooser
        index = choose.randrange(BLOCKS)
        block, offset = self.blocks[index], self.offset(index)
        kind = choose.random()
        if kind < 0.45:
            assert talk.read(offset, BLOCK) == content(block.current)
        elif kind < 0.8:
            self._value += 1
            block.since.append(self._value)  # if the server dies before it answers, it may have been written
            assert talk.write(offset, content(self._value)) == 0
            block.since.pop()
            block.written(self._value)
        elif kind < 0.85:
            block.since.append(0)
            assert talk.ask(wire.CMD_WRITE_ZEROES, offset, BLOCK).error == 0
            block.since.pop()
            block.written(0)
        elif kind < 0.9:
            self.flush()
        elif kind < 0.93:
            length = choose.choice((512, 65536, 1 << 20))
            data = talk.read(choose.randrange(SCRATCH - length), length)
            assert len(data) == length
        elif kind < 0.97:
            self.hang_up()

    def flush(self) -> None:
        assert self.connect().ask(wire.CMD_FLUSH).error == 0
        for block in self.blocks:
            block.flushed()

    def hang_up(self) -> None:
        """With requests under way, in the middle of one, half, or politely."""
        talk, choose = self.connect(), self._chooser
        kind = choose.randrange(5)
        if kind == 0:
            for _ in range(choose.randrange(20)):
                talk.request(wire.CMD_READ, choose.randrange(SCRATCH), choose.choice((512, 256 << 10)))
        elif kind == 1:
            talk.request(wire.CMD_WRITE, self.offset(0), BLOCK, payload=b"never applied" * 10)
        elif kind == 2:
            flags = wire.CMD_FLAG_PAYLOAD_LEN if talk.extended else 0
            for _ in range(3):
                talk.request(wire.CMD_WRITE, SCRATCH + choose.randrange(2 << 20), 1 << 20, flags=flags,
                             payload=bytes(1 << 20))  # fmt: skip
        elif kind == 3:
            talk.request(wire.CMD_DISC)
            assert talk.ended()
        self.drop()

    def drop(self) -> None:
        if self._talk is not None:
            self._talk.socket.close()
            self._talk = None

    def check(self) -> None:
        """Everything, after the server was killed and started again."""
        self.drop()
        talk = self.connect()
        for index, block in enumerate(self.blocks):
            block.survived(talk.read(self.offset(index), BLOCK))


class Crowd:
    """All clients, each thread with its part of them. They stop at the first fault, or when the server is gone."""

    def __init__(self, path: Path) -> None:
        self.clients = [Client(number, path) for number in range(CONNECTIONS)]
        self.faults: list[BaseException] = []
        self.count = 0
        self._stop = threading.Event()
        self._killed = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._stop.clear()
        self._killed = False
        self._threads = [threading.Thread(target=self._work, args=(part,), daemon=True) for part in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def _work(self, part: int) -> None:
        mine = self.clients[part::THREADS]
        try:
            while not self._stop.is_set() and not self.faults:
                for client in mine:
                    client.step()
                self.count += len(mine)
        except (OSError, EOFError) as error:
            if not self._killed:
                self.faults.append(error)
        except BaseException as error:
            self.faults.append(error)

    def stop(self, *, killed: bool = False) -> None:
        self._killed = killed
        if not killed:
            self._stop.set()

    def join(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        if self.faults:
            raise self.faults[0]


class Life:
    """One life of the server, and what memory it took meanwhile."""

    def __init__(self, image: Path, format: str, path: Path) -> None:
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "byre", "serve", "-t", "-e", "0", "-f", format, "-k", path, image]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.sizes: list[int] = []
        wait_until(lambda: listens(path) or self.process.poll() is not None, 20)

    def watch(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.1)
            assert self.process.poll() is None, self.process.communicate()
            fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
            self.sizes.append(int(fields[1]) * os.sysconf("SC_PAGESIZE"))

    def growth(self) -> int:
        """Bytes by which the second half exceeds the first, whose beginning counts as loading."""
        half = len(self.sizes) // 2
        return max(self.sizes[half:]) - max(self.sizes[:half])

    def end(self, number: int) -> str:
        self.process.send_signal(number)
        return self.process.communicate(timeout=20)[1]


def soak(folder: Path, format: str, lives: int, seconds: float) -> list[int]:
    """Let the crowd loose on a server that is killed, and started again, ``lives`` times; growths of memory."""
    image, path = folder / f"disk.{format}", folder / "s"
    create(str(image), format, SIZE)
    crowd = Crowd(path)
    growths = []
    for number in range(lives):
        life = Life(image, format, path)
        try:
            for client in crowd.clients:
                client.check()
            crowd.start()
            life.watch(seconds)
            last = number == lives - 1
            crowd.stop(killed=not last)
            if last:
                crowd.join()
                for client in crowd.clients:
                    client.flush()
                    client.drop()
                assert "internal error" not in life.end(signal.SIGTERM)
                assert life.process.returncode == 0
            else:
                life.end(signal.SIGKILL)
                crowd.join()
        finally:
            crowd._stop.set()
            life.process.kill()
            life.process.wait()
        growths.append(life.growth())
        if format == "qcow2":
            done = subprocess.run([sys.executable, "-m", "byre", "check", image], capture_output=True, text=True)
            assert done.returncode in (0, 3), done  # leaks are what a kill may leave
    print(f"{format}: {crowd.count} requests, memory grew by {growths} bytes")
    return growths


@pytest.mark.parametrize(("format", "lives"), [("qcow2", 2), ("raw", 1)])
def test_a_crowd(tmp_path: Path, format: str, lives: int) -> None:
    assert max(soak(tmp_path, format, lives, 2.5)) < GROWTH


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_crowd_for_long(tmp_path: Path, format: str) -> None:
    seconds = float(os.environ.get("BYRE_SOAK", "300"))
    assert max(soak(tmp_path, format, 4, seconds / 8)) < GROWTH
