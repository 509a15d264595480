"""``serve -L``: what another NBD server offers, in the peer's layout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument, printable
from ..nbd import wire
from .serve import number
from .serve_sockets import LOCALHOST, credentials

if TYPE_CHECKING:
    from ..nbd.client_negotiation import Export
    from .common import Given

__all__ = ["list_exports"]

_FLAG_NAMES: Final = (
    (wire.TRANSMISSION_READ_ONLY, "readonly"),
    (wire.TRANSMISSION_FLUSH, "flush"),
    (wire.TRANSMISSION_FUA, "fua"),
    (wire.TRANSMISSION_ROTATIONAL, "rotational"),
    (wire.TRANSMISSION_TRIM, "trim"),
    (wire.TRANSMISSION_WRITE_ZEROES, "zeroes"),
    (wire.TRANSMISSION_DF, "df"),
    (wire.TRANSMISSION_MULTI_CONN, "multi"),
    (wire.TRANSMISSION_RESIZE, "resize"),
    (wire.TRANSMISSION_CACHE, "cache"),
    (wire.TRANSMISSION_FAST_ZERO, "fast-zero"),
    (wire.TRANSMISSION_BLOCK_STATUS_PAYLOAD, "block-status-payload"),
)


def list_exports(given: Given) -> int:
    """:raises ByreError: no connection, or the server cannot list"""
    from ..nbd.client import Security
    from ..nbd.session import list_exports as ask
    from ..nbd.uri import Address

    host = given.last("bind", LOCALHOST)
    if given.has("socket"):
        address = Address("unix", path=given.last("socket"))
    else:
        address = Address("inet", host=host, port=_port(given.last("port")))
    security = None
    found = credentials(given)
    if found is not None:
        from ..nbd.tls import client_context

        context = client_context(found, given.secrets())
        # Who is behind a unix socket no address tells.
        hostname = given.last("tls-hostname") or (None if given.has("socket") else host)
        if context.check_hostname and not hostname:
            raise InvalidArgument("No hostname for certificate validation", hint="give --tls-hostname")
        security = Security(context, hostname)
    limit = number(given, "handshake-limit", 10, "Invalid handshake limit '{}'") or 1 << 31
    exports = ask(address, tls="require" if security else "off", security=security, handshake_limit=float(limit))
    sys.stdout.write(f"exports available: {len(exports)}\n" + "".join(map(_described, exports)))
    return 0


def _port(text: str) -> int:
    """A port's number; services may be given by name."""
    if not text:
        return wire.DEFAULT_PORT
    if text.isdecimal() and int(text) < 1 << 16:
        return int(text)
    import socket

    try:
        return socket.getservbyname(text, "tcp")
    except OSError:
        raise InvalidArgument(f"invalid port {text!r}") from None


def _described(export: Export) -> str:
    lines = [f" export: '{printable(export.name)}'"]
    if export.description:
        lines.append(f"  description: {printable(export.description)}")
    info = export.info
    if info is not None:
        names = "".join(f" {name}" for flag, name in _FLAG_NAMES if info.flags & flag)
        lines += [f"  size:  {info.size}", f"  flags: {info.flags:#x} ({names} )"]
        if info.minimum:
            sizes = (("min", info.minimum), ("opt", info.preferred), ("max", info.maximum))
            lines += [f"  {what} block: {size}" for what, size in sizes]
        lines.append(f"  transaction size: {64 if info.extended else 32}-bit")
    if export.contexts:
        lines.append(f"  available meta contexts: {len(export.contexts)}")
        lines += [f"   {printable(context)}" for context in export.contexts]
    return "".join(f"{line}\n" for line in lines)
