"""Where ``serve`` listens, and how: unix socket, TCP, sockets handed over by systemd; TLS and who may connect."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument, from_oserror, printable
from ..nbd import wire
from ..nbd.polling import POLL_NANOSECONDS
from ..nbd.server import Server, Settings
from . import common

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from ..nbd.tls import Credentials

__all__ = ["activated_sockets", "credentials", "make_server"]

LOCALHOST: Final = "127.0.0.1"
_FIRST_ACTIVATED: Final = 3
_DEVICE_SOCKET: Final = "/var/lock/qemu-nbd-{}"


def make_server(given: common.Given) -> Server:
    """A server that listens as the options say; it accepts nobody yet.

    :raises ByreError: an address that cannot be used, TLS files that cannot be used
    """
    from .serve import number, server_limit

    seconds = number(given, "handshake-limit", 10, "Invalid handshake limit '{}'")
    poll = number(given, "poll-max-ns", POLL_NANOSECONDS, "Invalid polling time '{}'")
    settings = Settings(_tls(given), True, _authorization(given), float(seconds), poll)
    program = common.PROGRAM.get()  # which the threads of clients do not know
    server = Server(settings, connections=server_limit(given), report=lambda line: common.report(line, program=program))
    try:
        _listen(server, given)
    except BaseException:
        server.stop()
        raise
    return server


def _listen(server: Server, given: common.Given) -> None:
    handed = activated_sockets()
    if handed:
        _check_activation(given, len(handed))
        for sock in handed:
            server.listen_on(sock)
    elif given.has("socket"):
        server.listen_unix(given.last("socket"))
    elif not given.has("connect"):
        server.listen_tcp(given.last("bind", LOCALHOST), given.last("port", str(wire.DEFAULT_PORT)))


def activated_sockets() -> list[socket.socket]:
    """The listening sockets that systemd (or a program that does as it does) has opened for this process.

    :raises InvalidArgument: what was handed over is no listening socket
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    text = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # not for programs that this one starts
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        return []
    found = []
    for fd in range(_FIRST_ACTIVATED, _FIRST_ACTIVATED + int(text)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise from_oserror(error, "Failed to use socket activation", f"descriptor {fd}") from None
        if not listening:
            raise InvalidArgument("Failed to use socket activation: the socket does not listen",
                                  where=f"descriptor {fd}")  # fmt: skip
        found.append(sock)
    return found


def _check_activation(given: common.Given, count: int) -> None:
    for key, text in (
        ("connect", "NBD device can't be set when using socket activation"),
        ("socket", "Unix socket can't be set when using socket activation"),
        ("bind", "The interface can't be set when using socket activation"),
        ("port", "TCP port number can't be set when using socket activation"),
        ("list", "List mode is incompatible with socket activation"),
    ):
        if given.has(key):
            raise InvalidArgument(text)
    if count > 1 and common.as_peer():
        raise InvalidArgument("qemu-nbd does not support socket activation with LISTEN_FDS > 1")


# -- TLS ------------------------------------------------------------------------------------------


def credentials(given: common.Given) -> Credentials | None:
    """What ``--tls-creds`` names.

    :raises InvalidArgument: there is no such object, or it holds something else
    """
    if not given.has("tls-creds"):
        return None
    from ..nbd.tls import Credentials

    identifier = given.last("tls-creds")
    _, found = given.objects().get(identifier, ("", None))
    if found is None:
        raise InvalidArgument(f"Failed to get TLS creds: No TLS credentials with id '{printable(identifier)}'")
    if not isinstance(found, Credentials):
        raise InvalidArgument(
            f"Failed to get TLS creds: Object with id '{printable(identifier)}' is not TLS credentials"
        )
    return found


def _tls(given: common.Given) -> ssl.SSLContext | None:
    found = credentials(given)
    if found is None:
        return None
    from ..nbd.tls import server_context

    if given.has("tls-authz") and not (found.kind == "x509" and found.verify_peer):
        raise InvalidArgument("--tls-authz judges certificates, and these credentials ask clients for none",
                              hint="use tls-creds-x509 with verify-peer=on")  # fmt: skip
    return server_context(found, given.secrets())


def _authorization(given: common.Given) -> Callable[[str], bool] | None:
    if not given.has("tls-authz"):
        return None
    from ..nbd.authorization import Authorization

    identifier = given.last("tls-authz")
    _, found = given.objects().get(identifier, ("", None))
    if not isinstance(found, Authorization):
        raise InvalidArgument(f"no authorization object with id '{printable(identifier)}'",
                              hint="define one: --object authz-simple,id=...,identity=...")  # fmt: skip
    return found.allows
