"""NBD servers for the client's tests: peers as processes, and scripted ones that misbehave in one place each."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from byre.nbd import handshake, wire
from conftest import peer_program

FLAGS = (
    wire.TRANSMISSION_HAS_FLAGS
    | wire.TRANSMISSION_FLUSH
    | wire.TRANSMISSION_FUA
    | wire.TRANSMISSION_TRIM
    | wire.TRANSMISSION_WRITE_ZEROES
)
SIZE = 1 << 20


class Process:
    """A server that runs as a program of its own on a Unix socket."""

    def __init__(self, command: Sequence[object], path: Path) -> None:
        self.path = path
        self.command = [str(word) for word in command]
        self.start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.child = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 10
        while not _listens(self.path):
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.command} did not start: {self.child.stderr.read()!r}")  # type: ignore[union-attr]
            time.sleep(0.01)

    def kill(self) -> None:
        """As by a crash."""
        self.child.kill()
        self.child.wait(10)
        assert self.child.stderr is not None
        self.child.stderr.close()


def _listens(path: Path) -> bool:
    """Whether somebody listens there, without connecting: some servers serve one connection only."""
    try:
        lines = Path("/proc/net/unix").read_text().splitlines()
    except OSError:
        return path.exists()
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in lines)


@contextmanager
def running(command: Sequence[object], path: Path) -> Iterator[Process]:
    server = Process(command, path)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def qemu_nbd(folder: Path, image: Path, *options: str, format: str = "raw") -> Iterator[Process]:
    path = folder / "qemu.sock"
    command = [peer_program("qemu-nbd"), "-f", format, "-t", "-e", "8", "-k", path, *options, image]
    with running(command, path) as server:
        yield server


@contextmanager
def nbdkit(folder: Path, *words: str) -> Iterator[Process]:
    path = folder / "nbdkit.sock"
    with running([peer_program("nbdkit"), "-f", "-U", path, *words], path) as server:
        yield server


# -- scripted servers -----------------------------------------------------------------------------

Script = Callable[[socket.socket], None]


class Scripted:
    """Runs a script for each connection, the last one again and again; counts connections."""

    def __init__(self, path: Path, *scripts: Script) -> None:
        self.path = path
        self.connections = 0
        self._scripts = scripts
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(16)
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            script = self._scripts[min(self.connections, len(self._scripts) - 1)]
            self.connections += 1
            self._open.append(sock)
            thread = threading.Thread(target=self._run, args=(script, sock), daemon=True)
            self._threads.append(thread)
            thread.start()

    @staticmethod
    def _run(script: Script, sock: socket.socket) -> None:
        try:
            script(sock)
        except (OSError, EOFError):
            pass
        finally:
            sock.close()

    def close(self) -> None:
        for sock in (self._listening, *self._open):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()
        for thread in self._threads:
            thread.join(5)


@contextmanager
def scripted(folder: Path, *scripts: Script) -> Iterator[Scripted]:
    server = Scripted(folder / f"scripted{os.urandom(3).hex()}", *scripts)
    try:
        yield server
    finally:
        server.close()


def take(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def greet(
    sock: socket.socket,
    *,
    size: int = SIZE,
    flags: int = FLAGS,
    mode: str = "simple",
    block_sizes: tuple[int, int, int] | None = None,
    contexts: tuple[str, ...] = ("base:allocation",),
    on_option: Callable[[socket.socket, int, bytes], bool] | None = None,
) -> None:
    """A handshake up to the transmission phase.

    :param mode: "simple", "structured" or "extended"
    :param on_option: may answer an option itself, and says whether it did
    """
    sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    take(sock, 4)
    while True:
        option, length = struct.unpack(">II", take(sock, 16)[8:])
        data = take(sock, length)

        def reply(kind: int, payload: bytes = b"", option: int = option) -> None:
            sock.sendall(handshake.encode_option_reply(option, kind, payload))

        if on_option is not None and on_option(sock, option, data):
            continue
        if option == handshake.OPT_GO:
            if block_sizes:
                reply(handshake.REP_INFO, handshake.encode_block_sizes(*block_sizes))
            reply(handshake.REP_INFO, handshake.encode_export_info(handshake.ExportInfo(size, flags)))
            reply(handshake.REP_ACK)
            return
        if (option == handshake.OPT_EXTENDED_HEADERS and mode == "extended") or (
            option == handshake.OPT_STRUCTURED_REPLY and mode == "structured"
        ):
            reply(handshake.REP_ACK)
        elif option == handshake.OPT_SET_META_CONTEXT:
            for number, context in enumerate(contexts, 7):
                if context.encode() in data:
                    reply(handshake.REP_META_CONTEXT, handshake.encode_meta_context(number, context))
            reply(handshake.REP_ACK)
        else:
            reply(handshake.REP_ERR_UNSUP, b"no such option")


def requests(sock: socket.socket, *, extended: bool = False) -> Iterator[tuple[wire.Request, bytes]]:
    """(request, payload) until the client leaves."""
    size = (wire.EXTENDED_REQUEST if extended else wire.REQUEST).size
    while True:
        request = wire.decode_request(take(sock, size), extended)
        if request.command == wire.CMD_DISC:
            return
        payload = take(sock, request.length) if request.command == wire.CMD_WRITE else b""
        yield request, payload


def simple_disk(disk: bytearray, *, answers: int = 1 << 60, **greeting: object) -> Script:
    """A disk in memory that answers ``answers`` requests of a connection and hangs up."""

    def script(sock: socket.socket) -> None:
        greet(sock, size=len(disk), **greeting)  # type: ignore[arg-type]
        for count, (request, payload) in enumerate(requests(sock)):
            if count == answers:
                return
            end = request.offset + request.length
            data = b""
            if request.command == wire.CMD_READ:
                data = bytes(disk[request.offset : end])
            elif request.command == wire.CMD_WRITE:
                disk[request.offset : end] = payload
            elif request.command in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
                disk[request.offset : end] = bytes(request.length)
            sock.sendall(wire.encode_simple_reply(wire.SimpleReply(0, request.cookie)) + data)

    return script
