"""Polling for the next request: quick answers for a client that is alone and busy, no processor time for others."""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

import byre
from byre.exports.nbd import NbdExport
from byre.nbd.polling import POLL_NANOSECONDS, Polling, Receiver
from byre.nbd.server import Server, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DISK = bytes(range(256)) * 256


class Wire:
    """A link on which requests come when the test says so."""

    def __init__(self, looks: int = 0) -> None:
        self.looks = looks  # how often there is nothing before something is
        self.slept = self.looked = 0
        self.pause = 0.0

    def recv_into(self, view: memoryview) -> int:
        time.sleep(self.pause)
        self.slept += 1
        return 1

    recv_all_into = recv_into

    def recv_now(self, view: memoryview) -> int:
        self.looked += 1
        if self.looked % (self.looks + 1):
            raise BlockingIOError
        return 1


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})


def receive(receiver: Receiver, count: int, *, busy: bool = False) -> None:
    view = memoryview(bytearray(8))
    for _ in range(count):
        assert receiver.receive(view, busy=busy) == 1


@pytest.mark.usefixtures("processors")
class TestReceiver:
    def test_polls_once_requests_come_soon_after_each_other(self) -> None:
        wire = Wire(looks=3)
        receiver = Receiver(wire, Polling(10**9))  # type: ignore[arg-type]
        receive(receiver, 5)
        assert (wire.slept, wire.looked) == (5, 0)
        receive(receiver, 10)
        assert (wire.slept, wire.looked) == (5, 40)

    def test_polls_no_more_when_nothing_comes(self) -> None:
        wire = Wire()
        receiver = Receiver(wire, Polling(3 * 10**7))  # type: ignore[arg-type]
        receive(receiver, 6)
        assert wire.looked == 1
        wire.looks, wire.pause = 10**9, 0.07
        receive(receiver, 5)
        looked, slept = wire.looked, wire.slept
        receive(receiver, 5)
        assert (wire.looked, wire.slept) == (looked, slept + 5)

    def test_two_busy_clients_do_not_poll(self) -> None:
        polling, wires = Polling(10**9), (Wire(), Wire())
        receivers = [Receiver(wire, polling) for wire in wires]  # type: ignore[arg-type]
        for _ in range(50):
            for receiver in receivers:
                receive(receiver, 1)
        assert [wire.looked for wire in wires] == [0, 0]
        receive(receivers[0], 10)
        assert wires[0].looked > 0

    def test_does_not_poll_while_other_threads_work_for_the_client(self) -> None:
        wire = Wire()
        receiver = Receiver(wire, Polling(10**9))  # type: ignore[arg-type]
        receive(receiver, 50, busy=True)
        assert wire.looked == 0

    def test_never_where_it_was_not_asked_for(self) -> None:
        wire = Wire()
        receive(Receiver(wire, Polling()), 50)  # type: ignore[arg-type]
        assert wire.looked == 0


def test_one_processor_is_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert Polling(10**9).nanoseconds == 0


class Client:
    """Reads one request at a time."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.receive(18)
        self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        self.receive(10)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            assert part
            data += part
        return data

    def read(self, offset: int, length: int) -> bytes:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, offset, length))
        assert self.receive(16) == struct.pack(">IIQ", 0x67446698, 0, 7)
        return self.receive(length)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "disk").write_bytes(DISK)
    with byre.open(str(tmp_path / "disk"), format="raw") as image:
        server = Server(Settings(poll_nanoseconds=POLL_NANOSECONDS))
        export = NbdExport(image)
        server.add(export)
        server.listen_unix(str(tmp_path / "sock"))
        server.start()
        try:
            yield tmp_path / "sock"
        finally:
            server.stop()
            export.close()


def test_clients_read_what_is_there_alone_and_together(served: Path) -> None:
    def work(client: Client) -> None:
        for offset in range(0, 60000, 300):
            assert client.read(offset, 512) == DISK[offset : offset + 512]

    clients = [Client(served) for _ in range(3)]
    work(clients[0])
    errors: list[BaseException] = []

    def checked(client: Client) -> None:
        try:
            work(client)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=checked, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work(clients[2])
    for client in clients:
        client.socket.close()
    assert not errors


def test_an_idle_client_takes_no_processor_time(served: Path) -> None:
    client = Client(served)
    for _ in range(200):
        client.read(0, 512)
    used = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - used < 0.1
    client.socket.close()
