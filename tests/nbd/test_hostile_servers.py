"""Servers that are mute, lie, drop connections or never come to an end: the client fails in time and within bounds."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from byre.errors import ByreError, IOFailure
from byre.nbd import handshake, wire
from byre.nbd.client import Connection
from byre.nbd.client_negotiation import Negotiated, Wishes
from byre.nbd.request import Request
from byre.nbd.session import Client, Settings, list_exports
from byre.nbd.transport import Transport, connect
from byre.nbd.uri import Address
from support.nbd_servers import FLAGS, SIZE, Script, Scripted, greet, requests, scripted, simple_disk, take

Answer = Callable[[socket.socket, wire.Request], None]


def settings(server: Scripted, **more: object) -> Settings:
    made = Settings(Address("unix", path=str(server.path)), Wishes(), handshake_limit=0.5, patience=0.5)
    return made._replace(**more)  # type: ignore[arg-type]


def answering(answer: Answer, mode: str = "simple") -> Script:
    def script(sock: socket.socket) -> None:
        greet(sock, mode=mode)
        for request, _ in requests(sock, extended=mode == "extended"):
            answer(sock, request)

    return script


def read(length: int = 4096, offset: int = 0) -> Request:
    return Request(wire.CMD_READ, offset, length, buffer=memoryview(bytearray(length)))


def failure_of(folder: Path, script: Script, request: Request | None = None) -> str:
    """What one request fails with; the connection is broken afterwards, and another request finds that out at once."""
    with scripted(folder, script) as server:
        client = Client(settings(server))
        started = time.monotonic()
        with pytest.raises(IOFailure) as caught:
            client.run_one(request or read())
        assert time.monotonic() - started < 2
        with pytest.raises(IOFailure, match="no connection"):
            client.run_one(read())
        client.close()
        assert server.connections == 1
    return str(caught.value)


# -- the handshake --------------------------------------------------------------------------------


def mute(sock: socket.socket) -> None:
    sock.recv(1)


def dripping(sock: socket.socket) -> None:
    for byte in b"NBDMAGICIHAVEOPT" * 100:
        sock.sendall(bytes([byte]))
        time.sleep(0.05)


def informing(sock: socket.socket) -> None:
    def without_end(sock: socket.socket, option: int, _data: bytes) -> bool:
        while option in (handshake.OPT_GO, handshake.OPT_LIST):
            kind = handshake.REP_INFO if option == handshake.OPT_GO else handshake.REP_SERVER
            sock.sendall(handshake.encode_option_reply(option, kind, b"\0\0\0\1x") * 100)
        return False

    greet(sock, on_option=without_end)


@pytest.mark.parametrize("script", [mute, dripping, informing, lambda sock: None])
def test_a_handshake_that_does_not_end(tmp_path: Path, script: Script) -> None:
    with scripted(tmp_path, script) as server:
        for attempt in (
            lambda: Client(settings(server)),
            lambda: list_exports(Address("unix", path=str(server.path)), handshake_limit=0.5),
        ):
            started = time.monotonic()
            with pytest.raises(ByreError):
                attempt()
            assert time.monotonic() - started < 2


def test_a_server_that_does_not_take_connections(tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "full"))
    listening.listen(0)
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for sock in waiting:
        sock.setblocking(False)
        try:
            sock.connect(str(tmp_path / "full"))
        except BlockingIOError:
            pass
    started = time.monotonic()
    with pytest.raises(IOFailure):
        Client(Settings(Address("unix", path=str(tmp_path / "full")), handshake_limit=0.3))
    assert time.monotonic() - started < 2
    for sock in (listening, *waiting):
        sock.close()


# -- replies --------------------------------------------------------------------------------------


def chunk(request: wire.Request, kind: int, data: bytes = b"", *, flags: int = 1, extended: bool = False,
          cookie: int | None = None, length: int | None = None) -> bytes:  # fmt: skip
    head = wire.Chunk(flags, kind, request.cookie if cookie is None else cookie,
                      len(data) if length is None else length, request.offset)  # fmt: skip
    return wire.encode_chunk(head, extended) + data


def data_at(offset: int, length: int) -> bytes:
    return offset.to_bytes(8, "big") + bytes(length)


SIMPLE: dict[str, Callable[[wire.Request], bytes]] = {
    "not in flight": lambda request: wire.encode_simple_reply(wire.SimpleReply(0, request.cookie + 5)),
    "begins with": lambda request: b"nonsense" * 2,
    "closed": lambda request: wire.encode_simple_reply(wire.SimpleReply(0, request.cookie)) + bytes(100),
}

STRUCTURED: dict[str, Callable[[wire.Request], bytes]] = {
    "without structure": lambda r: wire.encode_simple_reply(wire.SimpleReply(0, r.cookie)) + bytes(r.length),
    "not in flight": lambda r: chunk(r, wire.CHUNK_NONE, cookie=r.cookie + 1),
    "leaves out": lambda r: chunk(r, wire.CHUNK_NONE),
    "leaves out part": lambda r: chunk(r, wire.CHUNK_OFFSET_DATA, data_at(0, 4095)),
    "at 0xfff": lambda r: chunk(r, wire.CHUNK_OFFSET_DATA, data_at(4095, 2)),
    "with 4097 bytes": lambda r: chunk(r, wire.CHUNK_OFFSET_DATA, data_at(0, 4097)),
    "bytes at 0xffffffffffffffff": lambda r: chunk(r, wire.CHUNK_OFFSET_DATA, b"\xff" * 8 + bytes(1)),
    "some bytes twice": lambda r: chunk(r, wire.CHUNK_OFFSET_DATA, data_at(0, 4000), flags=0)
    + chunk(r, wire.CHUNK_OFFSET_DATA, data_at(3999, 97)),
    "bytes twice": lambda r: chunk(r, wire.CHUNK_OFFSET_DATA, data_at(2000, 100), flags=0)
    + chunk(r, wire.CHUNK_OFFSET_DATA, data_at(1950, 100)),
    "data chunk of 8 bytes": lambda r: chunk(r, wire.CHUNK_OFFSET_DATA, data_at(0, 0)),
    "with 0 bytes": lambda r: chunk(r, wire.CHUNK_OFFSET_HOLE, wire.encode_hole(wire.Hole(0, 0))),
    "with 1073741824 bytes": lambda r: chunk(r, wire.CHUNK_OFFSET_HOLE, wire.encode_hole(wire.Hole(0, 1 << 30))),
    "kind 2 and 13": lambda r: chunk(r, wire.CHUNK_OFFSET_HOLE, bytes(13)),
    "kind 77": lambda r: chunk(r, 77, bytes(4)),
    "kind 0 and 4": lambda r: chunk(r, wire.CHUNK_NONE, bytes(4)),
    "kind 0 and 0": lambda r: chunk(r, wire.CHUNK_NONE, flags=0),
    "status of context": lambda r: chunk(r, wire.CHUNK_BLOCK_STATUS, bytes(12)),
    "4294967295 bytes": lambda r: chunk(r, wire.CHUNK_ERROR, length=0xFFFFFFFF),
    "is too short": lambda r: chunk(r, wire.CHUNK_ERROR, b"\0"),
    "message of 99": lambda r: chunk(r, wire.CHUNK_ERROR, struct.pack(">IH", 5, 99)),
    "reports error": lambda r: chunk(
        r, wire.CHUNK_ERROR_OFFSET, wire.encode_error_payload(wire.ErrorPayload(5, "", 1 << 40))
    ),
    "reports error 5": lambda r: chunk(
        r, wire.CHUNK_ERROR, wire.encode_error_payload(wire.ErrorPayload(5, "x")), flags=0
    ) * 100,
}  # fmt: skip


@pytest.mark.parametrize("why", SIMPLE)
def test_simple_replies_that_break_the_rules(tmp_path: Path, why: str) -> None:
    def answer(sock: socket.socket, request: wire.Request) -> None:
        sock.sendall(SIMPLE[why](request))
        sock.shutdown(socket.SHUT_WR)

    assert why in failure_of(tmp_path, answering(answer))


@pytest.mark.parametrize("why", STRUCTURED)
def test_structured_replies_that_break_the_rules(tmp_path: Path, why: str) -> None:
    def answer(sock: socket.socket, request: wire.Request) -> None:
        sock.sendall(STRUCTURED[why](request))

    assert why in failure_of(tmp_path, answering(answer, "structured"))


def test_extended_replies_that_break_the_rules(tmp_path: Path) -> None:
    def other_offset(sock: socket.socket, request: wire.Request) -> None:
        moved = request._replace(offset=512)
        sock.sendall(chunk(moved, wire.CHUNK_OFFSET_DATA, data_at(0, 4096), extended=True))

    def compact(sock: socket.socket, request: wire.Request) -> None:
        sock.sendall(chunk(request, wire.CHUNK_OFFSET_DATA, data_at(0, 4096)))

    assert "for offset 0x200" in failure_of(tmp_path, answering(other_offset, "extended"))
    assert "begins with" in failure_of(tmp_path, answering(compact, "extended"))


STATUS: dict[str, bytes] = {
    "status of 0 bytes": struct.pack(">I", 7),
    "status of 7 bytes": struct.pack(">I", 7) + bytes(7),
    "context 8": struct.pack(">III", 8, 4096, 0),
}


@pytest.mark.parametrize("why", STATUS)
def test_block_status_that_breaks_the_rules(tmp_path: Path, why: str) -> None:
    def answer(sock: socket.socket, request: wire.Request) -> None:
        sock.sendall(chunk(request, wire.CHUNK_BLOCK_STATUS, STATUS[why]))

    request = Request(wire.CMD_BLOCK_STATUS, 0, 4096, contexts=(7,))
    assert why in failure_of(tmp_path, answering(answer, "structured"), request)


def test_empty_extents_break_the_connection(tmp_path: Path) -> None:
    def answer(sock: socket.socket, request: wire.Request) -> None:
        sock.sendall(chunk(request, wire.CHUNK_BLOCK_STATUS, struct.pack(">IIIII", 7, 512, 0, 0, 0)))

    request = Request(wire.CMD_BLOCK_STATUS, 0, 4096, contexts=(7,))
    assert "empty extent" in failure_of(tmp_path, answering(answer, "structured"), request)


def test_announced_payloads_are_not_allocated(tmp_path: Path) -> None:
    """A status of 4 GiB is refused on its length alone."""

    def answer(sock: socket.socket, request: wire.Request) -> None:
        sock.sendall(chunk(request, wire.CHUNK_BLOCK_STATUS, struct.pack(">I", 7), length=4 + (1 << 31)))

    request = Request(wire.CMD_BLOCK_STATUS, 0, 4096, contexts=(7,))
    assert "2147483648 bytes" in failure_of(tmp_path, answering(answer, "structured"), request)


# -- time -----------------------------------------------------------------------------------------


def test_a_server_that_falls_silent(tmp_path: Path) -> None:
    assert "silent" in failure_of(tmp_path, answering(lambda sock, request: None))


def test_a_server_that_stops_in_the_middle_of_a_reply(tmp_path: Path) -> None:
    def answer(sock: socket.socket, request: wire.Request) -> None:
        sock.sendall(wire.encode_simple_reply(wire.SimpleReply(0, request.cookie)) + bytes(100))

    assert "silent" in failure_of(tmp_path, answering(answer))


def test_a_server_that_takes_nothing(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        greet(sock)
        time.sleep(1.6)

    data = memoryview(bytes(8 << 20))
    request = Request(wire.CMD_WRITE, 0, len(data), payload=(data,))
    assert "stopped taking" in failure_of(tmp_path, script, request)


def test_all_threads_learn_that_the_connection_broke(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        greet(sock)
        for _ in range(8):
            take(sock, wire.REQUEST.size)
        sock.sendall(b"x" * 16)
        sock.recv(1)

    with scripted(tmp_path, script) as server:
        client = Client(settings(server, patience=0))
        failures: list[ByreError] = []

        def work() -> None:
            try:
                client.run_one(read())
            except ByreError as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert len(failures) == 8
        client.close()


# -- reconnecting ---------------------------------------------------------------------------------


def test_a_server_that_only_takes_connections_gets_few(tmp_path: Path) -> None:
    """No storm: 0.1 s, 0.2 s, 0.4 s ... between attempts, whoever asks."""

    def drops(sock: socket.socket) -> None:
        greet(sock)
        take(sock, wire.REQUEST.size)

    with scripted(tmp_path, drops) as server:
        client = Client(settings(server, reconnect_delay=1))
        started = time.monotonic()
        with pytest.raises(IOFailure):
            client.run_one(read())
        assert 0.9 < time.monotonic() - started < 3
        assert server.connections <= 6
        client.close()


def test_without_a_delay_requests_fail_and_a_later_one_connects(tmp_path: Path) -> None:
    disk = bytearray(b"x" * SIZE)
    with scripted(tmp_path, simple_disk(disk, answers=1), simple_disk(disk)) as server:
        client = Client(settings(server))
        client.run_one(read())
        for _ in range(2):
            with pytest.raises(IOFailure):
                client.run_one(read())
        time.sleep(0.15)
        request = read()
        client.run_one(request)
        assert request.buffer == b"x" * 4096
        client.close()
        assert server.connections == 2


def test_what_was_not_answered_is_sent_again(tmp_path: Path) -> None:
    disk = bytearray(SIZE)
    scripts = [simple_disk(disk, answers=3)] * 6 + [simple_disk(disk)]
    with scripted(tmp_path, *scripts) as server:
        client = Client(settings(server, reconnect_delay=20))

        def work(index: int) -> None:
            for slot in range(index, 24, 4):
                data = memoryview(bytes([slot + 1]) * 4096)
                client.run_one(Request(wire.CMD_WRITE, slot * 4096, 4096, payload=(data,)))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert disk[: 24 * 4096] == b"".join(bytes([slot + 1]) * 4096 for slot in range(24))
        assert server.connections > 3
        client.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"size": 2 * SIZE}, "something else"),
        ({"flags": wire.TRANSMISSION_HAS_FLAGS | wire.TRANSMISSION_READ_ONLY}, "something else"),
        ({"block_sizes": (4096, 4096, 1 << 25)}, "tighter"),
        ({"mode": "structured"}, "something else"),
    ],
)
def test_another_export_behind_the_same_name(tmp_path: Path, change: dict[str, object], why: str) -> None:
    def second(sock: socket.socket) -> None:
        greet(sock, **change)  # type: ignore[arg-type]
        sock.recv(1)

    with scripted(tmp_path, simple_disk(bytearray(SIZE), answers=0), second) as server:
        client = Client(settings(server, reconnect_delay=0.5))
        with pytest.raises(IOFailure, match=why):
            client.run_one(read())
        client.close()


def test_opening_waits_for_a_server(tmp_path: Path) -> None:
    path = tmp_path / "later"
    made: list[Scripted] = []

    def start() -> None:
        time.sleep(0.4)
        made.append(Scripted(path, simple_disk(bytearray(SIZE))))

    thread = threading.Thread(target=start)
    thread.start()
    client = Client(Settings(Address("unix", path=str(path)), open_timeout=5))
    assert client.info.size == SIZE
    client.close()
    thread.join()
    made[0].close()
    started = time.monotonic()
    with pytest.raises(ByreError, match="Failed to connect"):
        Client(Settings(Address("unix", path=str(tmp_path / "never")), open_timeout=0.3))
    assert 0.3 <= time.monotonic() - started < 1.5


def test_errors_of_the_server_are_errors_of_the_request(tmp_path: Path) -> None:
    def answer(sock: socket.socket, request: wire.Request) -> None:
        payload = wire.encode_error_payload(wire.ErrorPayload(28, "no room\x1b[31m left"))
        sock.sendall(chunk(request, wire.CHUNK_ERROR, payload))

    with scripted(tmp_path, answering(answer, "structured")) as server:
        client = Client(settings(server))
        for _ in range(2):
            with pytest.raises(ByreError, match="no room") as caught:
                client.run_one(read())
            assert caught.value.errno == 28
            assert str(caught.value).isprintable()
        client.close()
        assert server.connections == 1


def test_a_reply_in_pieces_in_any_order(tmp_path: Path) -> None:
    def answer(sock: socket.socket, request: wire.Request) -> None:
        parts = [3, 1, 0, 2]
        for count, part in enumerate(parts):
            offset = request.offset + part * 1024
            done = 1 if count == 3 else 0
            if part == 2:
                hole = wire.encode_hole(wire.Hole(offset, 1024))
                sock.sendall(chunk(request, wire.CHUNK_OFFSET_HOLE, hole, flags=done))
            else:
                data = offset.to_bytes(8, "big") + bytes([part + 1]) * 1024
                sock.sendall(chunk(request, wire.CHUNK_OFFSET_DATA, data, flags=done))

    with scripted(tmp_path, answering(answer, "structured")) as server:
        client = Client(settings(server))
        request = read(offset=8192)
        request.buffer[:] = b"\xee" * 4096  # type: ignore[index]
        client.run_one(request)
        assert request.buffer == b"\1" * 1024 + b"\2" * 1024 + bytes(1024) + b"\4" * 1024
        client.close()


def test_a_long_wait_for_a_server_is_no_recursion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from byre.nbd import session

    monkeypatch.setattr(session, "_FIRST_PAUSE", 0.0001)
    monkeypatch.setattr(session, "_LONGEST_PAUSE", 0.0001)
    with scripted(tmp_path, simple_disk(bytearray(SIZE), answers=0)) as server:
        client = Client(settings(server, reconnect_delay=0.5))
        server.path.unlink()
        with pytest.raises(IOFailure, match="Failed to connect"):
            client.run_one(read())
        client.close()


def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with two addresses, behind the first of which nobody says a word."""
    with socket.socket() as full, socket.socket() as good:
        for sock, backlog in ((full, 0), (good, 5)):
            sock.bind(("127.0.0.1", 0))
            sock.listen(backlog)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        time.sleep(0.1)
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", sock.getsockname()) for sock in (full, good)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: places)
        started = time.monotonic()
        transport = connect(Address("inet", host="two.example"), started + 1)
        assert time.monotonic() - started < 0.9
        transport.close()
        for sock in waiting:
            sock.close()


# -- several connections --------------------------------------------------------------------------

MULTI = FLAGS | wire.TRANSMISSION_MULTI_CONN


def several(disk: bytearray, answers: int = 1 << 60) -> Script:
    return simple_disk(disk, answers=answers, flags=MULTI)


def until(condition: Callable[[], bool], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def lines_up(client: Client) -> int:
    return sum(line.load == 0 for line in client._lines)


@pytest.mark.parametrize("delay", [0, 20])
def test_a_broken_connection_is_made_again_beside_the_others(tmp_path: Path, delay: float) -> None:
    """Two connections; one breaks, and what was asked on it is asked on the other; its successor is slow, and no
    request waits for it."""
    disk = bytearray(b"x" * SIZE)

    def slow(sock: socket.socket) -> None:
        time.sleep(0.8)
        several(disk)(sock)

    with scripted(tmp_path, several(disk, answers=1), several(disk), slow) as server:
        client = Client(settings(server, reconnect_delay=delay, connections=2, handshake_limit=5))
        longest = 0.0
        for _ in range(60):
            started = time.monotonic()
            request = read()
            client.run_one(request)
            longest = max(longest, time.monotonic() - started)
            assert request.buffer == b"x" * 4096
            time.sleep(0.01)
        assert longest < 0.4
        assert server.connections == 3
        for _ in range(100):
            client.run_one(read())
            if lines_up(client) == 2:
                break
            time.sleep(0.02)
        assert lines_up(client) == 2
        assert server.connections == 3
        client.close()


def test_all_connections_break_and_all_are_made_again(tmp_path: Path) -> None:
    """Also those that nobody used when the server went away: not one request fails for each of them."""
    disk = bytearray(b"x" * SIZE)
    scripts = [several(disk, answers=2)] * 4 + [several(disk)]
    with scripted(tmp_path, *scripts) as server:
        client = Client(settings(server, reconnect_delay=20, connections=4))
        for turn in range(200):
            client.run_one(read())
            if turn > 20 and lines_up(client) == 4:
                break
            time.sleep(0.01)
        assert lines_up(client) == 4
        client.close()


def test_idle_connections_that_died_with_the_server_cost_one_failure_at_most(tmp_path: Path) -> None:
    disk = bytearray(b"x" * SIZE)
    socks: list[socket.socket] = []

    def dying(sock: socket.socket) -> None:
        socks.append(sock)
        several(disk)(sock)

    with scripted(tmp_path, *[dying] * 4, several(disk)) as server:
        client = Client(settings(server, connections=4))
        for sock in socks:
            sock.shutdown(socket.SHUT_RDWR)
        failures = 0
        for _ in range(50):
            try:
                client.run_one(read())
            except IOFailure:
                failures += 1
            time.sleep(0.02)
            if server.connections == 8:
                break
        assert server.connections == 8
        assert until(lambda: lines_up(client) == 4)
        # One was lost with its four connections, the others came before the time for another attempt.
        assert failures <= 8
        client.run_one(read())
        client.close()


def test_a_poisonous_request_breaks_each_connection_once(tmp_path: Path) -> None:
    """A request that makes the server hang up is not sent for ever."""

    def drops(sock: socket.socket) -> None:
        greet(sock, flags=MULTI)
        take(sock, wire.REQUEST.size)

    with scripted(tmp_path, drops) as server:
        client = Client(settings(server, connections=3))
        with pytest.raises(IOFailure):
            client.run_one(read())
        assert server.connections == 3
        client.close()


def test_closing_while_a_connection_is_being_made_again(tmp_path: Path) -> None:
    disk = bytearray(SIZE)
    with scripted(tmp_path, several(disk, answers=0), several(disk), mute) as server:
        client = Client(settings(server, connections=2))
        for _ in range(20):
            client.run_one(read())
            time.sleep(0.01)
        assert server.connections == 3
        started = time.monotonic()
        client.close()
        assert time.monotonic() - started < 2


# -- the descriptor of a broken connection --------------------------------------------------------


class Watched(Transport):
    """Receiving goes on although the connection was shut down, until it is let go."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, "test")
        self.descriptor = sock
        self.receiving, self.go_on = threading.Event(), threading.Event()
        self.open_afterwards = False

    def receive_into(self, view: memoryview, *, whole: bool = False) -> int:
        self.receiving.set()
        self.go_on.wait(5)
        self.open_afterwards = self.descriptor.fileno() >= 0
        return super().receive_into(view, whole=whole)


def test_a_socket_is_closed_when_nobody_receives_any_more() -> None:
    """Its number is given to the next connection, from which a late receiver would take what belongs to others."""
    ours, theirs = socket.socketpair()
    with theirs:
        transport = Watched(ours)
        connection = Connection(transport, Negotiated(SIZE, FLAGS))
        request = read()
        assert connection.submit(request)
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(connection.wait(request)))
        thread.start()
        assert transport.receiving.wait(5)
        connection.close()  # as when another thread has noticed that the connection broke
        assert ours.fileno() >= 0
        transport.go_on.set()
        thread.join(5)
        assert results == [False]
        assert transport.open_afterwards
        assert ours.fileno() == -1


def test_an_idle_socket_is_closed_at_once() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = Connection(Transport(ours, "test"), Negotiated(SIZE, FLAGS))
        connection.close()
        connection.close()
        assert ours.fileno() == -1
        assert take(theirs, wire.REQUEST.size)[6:8] == b"\0\2"
