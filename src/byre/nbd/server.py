"""The NBD server: sockets it listens on, exports, clients and their limits, and stopping within seconds.

A thread accepts; each client has a thread of its own (:mod:`.connection`). Knows no image: an export is anything that
has the methods of :class:`byre.nbd.disk.Disk`.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import threading
from time import monotonic
from typing import TYPE_CHECKING, Final

from ..errors import AlreadyExists, Busy, ByreError, InvalidArgument, NotFound, from_oserror, printable
from .connection import Connection, Host, Settings
from .memory import Budget, Share
from .polling import Polling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .disk import Disk

__all__ = ["CLIENT_MEMORY", "TOTAL_MEMORY", "Server", "Settings"]

CLIENT_MEMORY: Final = 64 << 20
"""Bytes of buffers for one client's requests."""
TOTAL_MEMORY: Final = 256 << 20
"""The same for all clients together."""
_WALKS: Final = 2
"""Clients for which extents are looked for at a time: more would wait for each other, and short requests for all."""
STOP_SECONDS: Final = 4.0
_GRACE: Final = 1.5
_LOOK: Final = 0.5
"""Seconds after which the main thread looks for signals: one that comes just before it waits does not wake it."""
_BACKLOG: Final = 128
_LINES: Final = 10
_EXHAUSTED: Final = (errno.ENFILE, errno.EMFILE, errno.ENOBUFS, errno.ENOMEM)


class Server(Host):
    """Serves exports to clients until it is stopped.

    Guarded by ``_changed``: exports, connections, claims.

    :param connections: most clients at a time, 0 for any number; who comes beyond is turned away at once
    :param report: told in a line what a client did wrong; ``None`` for nobody
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        connections: int = 0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.polling = Polling(self.settings.poll_nanoseconds)
        self.walks = threading.Semaphore(_WALKS)
        self._limit = connections
        self._report = report
        self._budget = Budget(TOTAL_MEMORY)
        self._changed = threading.Condition(threading.Lock())
        self._disks: tuple[Disk, ...] = ()
        self._claims: dict[int, int] = {}
        self._connections: dict[Connection, threading.Thread] = {}
        self._listening: list[socket.socket] = []
        self._paths: list[tuple[str, tuple[int, int]]] = []
        self._acceptor: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.stopping = False
        self._closed = False
        self._served = 0
        self._said = (0, 0)

    # -- exports ----------------------------------------------------------------------------------

    def add(self, disk: Disk) -> None:
        """Offer ``disk`` from now on.

        :raises AlreadyExists: there is an export of that name
        """
        with self._changed:
            if any(other.offer.name == disk.offer.name for other in self._disks):
                raise AlreadyExists(f"an export named {disk.offer.name!r} exists already")
            self._disks = (*self._disks, disk)

    def remove(self, name: str, *, force: bool = False) -> None:
        """Offer it no longer.

        :param force: clients that use it are turned out
        :raises Busy: clients use it
        :raises NotFound: there is none of that name
        """
        with self._changed:
            disk = next((each for each in self._disks if each.offer.name == name), None)
            if disk is None:
                raise NotFound(f"there is no export named {name!r}")
            users = [connection for connection in self._connections if connection.uses(disk)]
            if users and not force:
                raise Busy(f"export {name!r} still in use")
            self._disks = tuple(each for each in self._disks if each is not disk)
        for connection in users:
            connection.stop()
            connection.break_off()
        with self._changed:
            self._changed.wait_for(lambda: not any(each.uses(disk) for each in self._connections), STOP_SECONDS)

    def disks(self) -> Sequence[Disk]:
        return self._disks

    def claim(self, disk: Disk) -> str:
        with self._changed:
            if disk not in self._disks:
                return "the export is being removed"
            if disk.connections and self._claims.get(id(disk), 0) >= disk.connections:
                return f"export '{disk.offer.name}' has its {disk.connections} clients already"
            self._claims[id(disk)] = self._claims.get(id(disk), 0) + 1
        return ""

    def release(self, disk: Disk) -> None:
        with self._changed:
            self._claims[id(disk)] -= 1
            if not self._claims[id(disk)]:
                del self._claims[id(disk)]

    def share(self, interrupt: Callable[[], None]) -> Share:
        return Share(self._budget, CLIENT_MEMORY, lambda: self.stopping, interrupt)

    # -- listening --------------------------------------------------------------------------------

    def listen_unix(self, path: str) -> None:
        """Listen on a unix socket that only this user can reach (mode 0600); it is removed at the end.

        :raises Busy: a server listens there already
        :raises ByreError: the path cannot be used
        """
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(sock.fileno(), 0o600)  # before it has a name: there is no moment at which others could connect
            sock.bind(path)
            found = os.stat(path)
            os.chmod(path, 0o600)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno is None:
                raise InvalidArgument(f"cannot listen: {error}", where=printable(path)) from None
            raise from_oserror(error, "Failed to bind socket", printable(path)) from None
        self._paths.append((path, (found.st_dev, found.st_ino)))
        self._listening.append(sock)

    def listen_tcp(self, host: str, port: str | int) -> None:
        """Listen on the addresses of ``host``.

        :param port: a number or the name of a service
        :raises ByreError: no such host, or the port is taken
        """
        where = f"{host}:{port}"
        try:
            if str(port).isdecimal() and int(port) >> 16:
                raise OSError(errno.EINVAL, "a port is a number below 65536")  # the system would take its lower bits
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise InvalidArgument(f"address resolution failed: {why}", where=printable(where)) from None
        failure: OSError | None = None
        before = len(self._listening)
        for family, kind, protocol, _, address in found:
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:
                failure = error
                continue
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
                sock.listen(_BACKLOG)
            except OSError as error:
                sock.close()
                failure = error
                continue
            self._listening.append(sock)
        if len(self._listening) == before:
            assert failure is not None
            raise from_oserror(failure, "Failed to find an available port", printable(where)) from None

    def listen_on(self, sock: socket.socket) -> None:
        """Take over a socket that listens already."""
        self._listening.append(sock)

    @property
    def addresses(self) -> list[object]:
        """Where it listens: paths, or (host, port, ...)."""
        return [sock.getsockname() for sock in self._listening]

    # -- running ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Accept clients from now on, in threads."""
        self._acceptor = threading.Thread(target=self._accept_all, name="nbd accept", daemon=True)
        self._acceptor.start()

    def wait_until_unused(self) -> None:
        """Wait until a client was served and the last one has left, or the server was stopped."""
        with self._changed:
            while not self.stopping and (self._connections or not self._served):
                self._changed.wait(_LOOK)

    def wait(self) -> None:
        """Wait until the server is stopped."""
        with self._changed:
            while not self.stopping:
                self._changed.wait(_LOOK)

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def _accept_all(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        by_fd = {sock.fileno(): sock for sock in self._listening}
        for sock in self._listening:
            sock.setblocking(False)
            poll.register(sock, select.POLLIN)
        while not self.stopping:
            for fd, _ in poll.poll():
                if fd in by_fd:
                    self._accept(by_fd[fd])

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, address = listening.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                # Connections that wait keep the socket readable: do not spin until a descriptor is free.
                threading.Event().wait(0.1)
            return
        self.serve(sock, f"{address[0]}:{address[1]}" if isinstance(address, tuple) else f"client {sock.fileno()}")

    def serve(self, sock: socket.socket, peer: str) -> None:
        """Serve the client at the other end of a connected socket; one too many is turned away.

        :param peer: what it is called in messages
        """
        connection = Connection(sock, self, peer)
        thread = threading.Thread(target=self._serve, args=(connection,), name=f"nbd {peer}", daemon=True)
        with self._changed:
            if not self._has_place_locked():
                sock.close()
                return
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError:
            self._forget(connection)
            sock.close()

    def _has_place_locked(self) -> bool:
        """Whether one more client fits in; one that has just left makes room, once its thread has noticed."""
        if self.stopping:
            return False
        if not self._limit or len(self._connections) < self._limit:
            return True
        if any(connection.has_left() for connection in self._connections):
            self._changed.wait_for(lambda: len(self._connections) < self._limit, 1.0)
        return not self.stopping and len(self._connections) < self._limit

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        except ByreError as error:
            self._say(f"{connection.peer}: {error}" if connection.negotiated else f"option negotiation failed: {error}")
        except Exception as error:
            self._say(f"{connection.peer}: internal error, please report: {type(error).__name__}: {error}")
        finally:
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        with self._changed:
            self._connections.pop(connection, None)
            self._served += connection.negotiated
            self._changed.notify_all()

    def _say(self, line: str) -> None:
        """Report a line, but not more of them in a second than somebody can want to read."""
        with self._changed:
            now = int(monotonic())
            self._said = (now, self._said[1] + 1) if self._said[0] == now else (now, 1)
            if self._report is None or self.stopping or self._said[1] > _LINES:
                return
        self._report(line)

    # -- stopping ---------------------------------------------------------------------------------

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Close everything: requests under way are answered, then clients are turned out, whatever state they are in.

        Takes ``timeout`` seconds at most. Stopping twice is fine.
        """
        until = monotonic() + timeout
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
            connections = list(self._connections.items())
        with self._budget.changed:
            self._budget.changed.notify_all()
        self._stop_listening(until)
        for connection, _ in connections:
            connection.stop()
        self._join(connections, min(until, monotonic() + _GRACE))
        for connection, _ in connections:
            connection.break_off()
        self._join(connections, until)

    @staticmethod
    def _join(connections: list[tuple[Connection, threading.Thread]], until: float) -> None:
        for _, thread in connections:
            thread.join(max(until - monotonic(), 0))

    def _stop_listening(self, until: float) -> None:
        if self._closed:
            return
        self._closed = True
        os.write(self._wake_write, b"x")
        if self._acceptor is not None:
            self._acceptor.join(max(until - monotonic(), 0))
        for sock in self._listening:
            sock.close()
        for path, identity in self._paths:
            try:
                found = os.stat(path)
                if (found.st_dev, found.st_ino) == identity:
                    os.unlink(path)
            except OSError:
                pass  # somebody else has removed or replaced it
        os.close(self._wake_write)
        os.close(self._wake_read)


def _remove_stale(path: str) -> None:
    """Remove a socket on which nobody listens any more.

    :raises Busy: somebody does
    :raises AlreadyExists: it is no socket
    """
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise AlreadyExists("cannot listen: a file of that name exists", where=printable(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass  # listening, but busy
    raise Busy("cannot listen: another server does so already", where=printable(path))
