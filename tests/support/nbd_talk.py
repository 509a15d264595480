"""A client that says exactly what a test wants it to say, and a server of the test's own images around it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import byre
from byre.exports.nbd import NbdExport
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.nbd import handshake, wire
from byre.nbd.connection import Settings
from byre.nbd.server import Server
from byre.nbd.wire import Chunk, Request

GREETING = struct.pack(">I", handshake.FLAG_FIXED_NEWSTYLE | handshake.FLAG_NO_ZEROES)


def image_of(node: Node, *, read_only: bool = False) -> byre.Image:
    graph = Graph()
    graph.add(node)
    return byre.Image(node, graph, read_only=read_only)


class Served(NamedTuple):
    server: Server
    path: Path
    reports: list[str]

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"


@contextmanager
def serving(
    path: Path, *exports: NbdExport, settings: Settings | None = None, connections: int = 0
) -> Iterator[Served]:
    """A server in this process that listens at ``path``; images stay the caller's."""
    reports: list[str] = []
    server = Server(settings, connections=connections, report=reports.append)
    for export in exports:
        server.add(export)
    server.listen_unix(str(path))
    server.start()
    try:
        yield Served(server, path, reports)
    finally:
        server.stop()
        for export in exports:
            export.close()


class Reply(NamedTuple):
    """All of an answer: the errno of the protocol (0 for success), its text, and the chunks with their payloads."""

    error: int
    message: str
    chunks: list[tuple[Chunk, bytes]]


class Talk:
    """One connection, spoken by hand. ``mode`` is "simple", "structured" or "extended"."""

    def __init__(self, path: Path, *, timeout: float = 10) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(str(path))
        self.mode = "simple"
        self.size = self.flags = 0
        self._cookie = 0

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_error: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise EOFError(f"the server closed after {len(data)} of {length} bytes")
            data += more
        return data

    def ended(self) -> bool:
        """Whether the server has closed the connection; waits for it."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    # -- handshake --------------------------------------------------------------------------------

    def greet(self) -> None:
        assert self.receive(18)[:16] == handshake.INIT_MAGIC + handshake.OPTION_MAGIC
        self.send(GREETING)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """(kind, data) of the replies, up to the one that is final."""
        self.send(handshake.encode_option(option, data))
        return self.option_replies()

    def option_replies(self) -> list[tuple[int, bytes]]:
        replies = []
        while True:
            reply = handshake.decode_option_reply(self.receive(handshake.OPTION_REPLY_SIZE))
            replies.append((reply.kind, self.receive(reply.length)))
            if reply.kind == handshake.REP_ACK or reply.kind & handshake.REP_FLAG_ERROR:
                return replies

    def start(self, mode: str = "structured", name: str = "", contexts: tuple[str, ...] = ()) -> Talk:
        """The whole handshake."""
        self.greet()
        self.mode = mode
        if mode != "simple":
            option = handshake.OPT_STRUCTURED_REPLY if mode == "structured" else handshake.OPT_EXTENDED_HEADERS
            assert self.option(option) == [(handshake.REP_ACK, b"")]
        if contexts:
            assert self.option(handshake.OPT_SET_META_CONTEXT, queries(name, *contexts))[-1][0] == handshake.REP_ACK
        replies = self.option(handshake.OPT_GO, named(name))
        assert replies[-1][0] == handshake.REP_ACK, replies
        info = next(data for kind, data in replies if kind == handshake.REP_INFO and data[:2] == b"\0\0")
        self.size, self.flags = handshake.decode_export_info(info)
        return self

    # -- transmission -----------------------------------------------------------------------------

    @property
    def extended(self) -> bool:
        return self.mode == "extended"

    def request(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """Send one request; its cookie."""
        self._cookie += 1
        head = wire.encode_request(Request(command, flags, self._cookie, offset, length), self.extended)
        self.send(head + payload)
        return self._cookie

    def reply(self, data_length: int = 0) -> tuple[int, Reply]:
        """The next whole answer and its cookie; chunks of other requests must not come in between.

        :param data_length: bytes behind a simple reply that succeeded
        """
        if self.mode == "simple":
            found = wire.decode_simple_reply(self.receive(wire.SIMPLE_REPLY.size))
            data = b"" if found.error else self.receive(data_length)
            return found.cookie, Reply(found.error, "", [(Chunk(1, wire.CHUNK_OFFSET_DATA, found.cookie, 0), data)])
        chunks: list[tuple[Chunk, bytes]] = []
        error, message = 0, ""
        size = wire.EXTENDED_CHUNK.size if self.extended else wire.CHUNK.size
        while True:
            chunk = wire.decode_chunk(self.receive(size), self.extended)
            payload = self.receive(chunk.length)
            assert not chunks or chunk.cookie == chunks[0][0].cookie
            chunks.append((chunk, payload))
            if chunk.is_error:
                error, message, _ = wire.decode_error_payload(payload, chunk.kind)
            if chunk.done:
                return chunk.cookie, Reply(error, message, chunks)

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> Reply:
        cookie = self.request(command, offset, length, flags=flags, payload=payload)
        found, reply = self.reply(length if command == wire.CMD_READ else 0)
        assert found == cookie
        return reply

    def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        reply = self.ask(wire.CMD_READ, offset, length, flags=flags)
        assert reply.error == 0, reply
        return assembled(reply, offset, length) if self.mode != "simple" else reply.chunks[0][1]

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        """The error of a write, 0 for success."""
        if self.extended:
            flags |= wire.CMD_FLAG_PAYLOAD_LEN
        return self.ask(wire.CMD_WRITE, offset, len(data), flags=flags, payload=data).error

    def status(
        self, offset: int, length: int, *, flags: int = 0, payload: bytes = b""
    ) -> dict[int, list[tuple[int, int]]]:
        """Extents by context id."""
        reply = self.ask(wire.CMD_BLOCK_STATUS, offset, length, flags=flags, payload=payload)
        assert reply.error == 0, reply
        return dict(wire.decode_block_status(data, self.extended) for _, data in reply.chunks)


def assembled(reply: Reply, offset: int, length: int) -> bytes:
    """The bytes of a read from its chunks; every byte must come exactly once."""
    data, seen = bytearray(length), bytearray(length)
    for chunk, payload in reply.chunks:
        if chunk.kind == wire.CHUNK_NONE:
            continue
        at = int.from_bytes(payload[:8], "big") - offset
        if chunk.kind == wire.CHUNK_OFFSET_DATA:
            part = payload[8:]
        else:
            assert chunk.kind == wire.CHUNK_OFFSET_HOLE
            part = bytes(wire.decode_hole(payload).length)
        assert part
        assert at >= 0
        assert not any(seen[at : at + len(part)])
        data[at : at + len(part)] = part
        seen[at : at + len(part)] = b"\1" * len(part)
    assert all(seen)
    return bytes(data)


def named(name: str, *infos: int) -> bytes:
    """The data of INFO and GO."""
    raw = name.encode()
    return struct.pack(">I", len(raw)) + raw + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def queries(name: str, *words: str) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    parts = [struct.pack(">I", len(name.encode())) + name.encode(), struct.pack(">I", len(words))]
    return b"".join([*parts, *(struct.pack(">I", len(word.encode())) + word.encode() for word in words)])


def in_thread(action: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=action, args=arguments, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def listens(path: Path) -> bool:
    """Whether somebody listens there, without connecting: some servers serve one connection only."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in lines)


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
