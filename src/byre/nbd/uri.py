"""Addresses of NBD servers: URIs as the specification's ``uri.md`` has them, and QEMU's older ``nbd:host:port`` names.

Also the way back: the name by which messages and ``info`` call an export.
"""

from __future__ import annotations

from ..errors import InvalidArgument
from ..typing import Final, NamedTuple
from .wire import DEFAULT_PORT, MAX_STRING

__all__ = ["SCHEMES", "Address", "Target", "parse", "show"]

SCHEMES: Final = ("nbd", "nbds", "nbd+tcp", "nbds+tcp", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")
TLS_TYPES: Final = ("x509", "psk", "anon")

_EXPORT_MARK: Final = ":exportname="
_TLS_KEYS: Final = ("tls-type", "tls-hostname", "tls-verify-peer", "tls-certificates", "tls-username")
_SAFE: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/:@!$'()*+,;=")


class Address(NamedTuple):
    """Where a server listens.

    :ivar kind: "unix", "inet", "vsock" or "fd"
    :ivar path: of a Unix socket; begins with NUL in the abstract namespace
    :ivar host: name or address, without brackets
    :ivar port: of "inet" and "vsock"
    :ivar cid: of "vsock"
    :ivar fd: of "fd", a connected socket this process has open
    """

    kind: str
    path: str = ""
    host: str = ""
    port: int = DEFAULT_PORT
    cid: int = 0
    fd: int = -1

    def __str__(self) -> str:
        """For messages, as the peer words it."""
        if self.kind == "unix":
            return self.path.replace("\0", "@")
        if self.kind == "fd":
            return f"fd {self.fd}"
        if self.kind == "vsock":
            return f"vsock {self.cid}:{self.port}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Target(NamedTuple):
    """What a name says.

    :ivar export: "" is a name as well: the server's default export
    :ivar tls: the name demands TLS
    :ivar tls_options: ``tls-type`` and the like, as the query has them; ``tls-username`` may come from the authority
    """

    address: Address
    export: str = ""
    tls: bool = False
    tls_options: tuple[tuple[str, str], ...] = ()


def parse(name: str) -> Target:
    """The target of ``nbd://host:port/export``, ``nbd+unix:///export?socket=path``, ``nbd:unix:path:exportname=x``...

    :raises InvalidArgument: what is wrong with the name
    """
    target = _parse_uri(name) if "://" in name else _parse_legacy(name)
    if len(target.export.encode(errors="surrogateescape")) > MAX_STRING:
        raise InvalidArgument(f"the export name is longer than {MAX_STRING} bytes", where=name[:80])
    return target


# -- URIs -----------------------------------------------------------------------------------------


def _parse_uri(name: str) -> Target:
    scheme, _, rest = name.partition("://")
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        raise _bad(name, f"scheme {scheme!r} is none of {', '.join(SCHEMES)}")
    rest = rest.partition("#")[0]
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    transport = scheme.partition("+")[2]
    parameters = _query(name, query)
    socket = parameters.pop("socket", "")
    user, at, place = authority.rpartition("@")
    if at:
        parameters.setdefault("tls-username", _unquote(name, user))
    if transport == "unix":
        if place:
            raise _bad(name, f"{scheme} takes no host, the path of the socket goes into ?socket=")
        if not socket:
            raise _bad(name, f"{scheme} needs the path of a socket: ?socket=PATH")
        address = Address("unix", path=socket)
    else:
        if socket:
            raise _bad(name, f"?socket= is for nbd+unix, not for {scheme}")
        address = _vsock(name, place) if transport == "vsock" else _inet(name, place)
    unknown = [key for key in parameters if key not in _TLS_KEYS]
    if unknown:
        raise _bad(name, f"unknown parameter {unknown[0]!r}")
    _check_tls(name, parameters)
    secure = scheme.startswith("nbds")
    if parameters and not secure:
        raise _bad(name, f"what concerns TLS needs nbds{scheme[3:]}://")
    export = _unquote(name, path) if slash else ""
    return Target(address, export, secure, tuple(parameters.items()))


def _query(name: str, query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in query.split("&"):
        if not part:
            continue
        key, _, value = part.partition("=")
        key = _unquote(name, key)
        if key in found:
            raise _bad(name, f"parameter {key!r} is given twice")
        found[key] = _unquote(name, value)
    return found


def _check_tls(name: str, parameters: dict[str, str]) -> None:
    if parameters.get("tls-type", "x509") not in TLS_TYPES:
        raise _bad(name, f"tls-type must be one of {', '.join(TLS_TYPES)}")
    if parameters.get("tls-verify-peer", "1") not in ("0", "1"):
        raise _bad(name, "tls-verify-peer must be 0 or 1")


def _inet(name: str, place: str) -> Address:
    host, port = _host_and_port(name, place)
    return Address("inet", host=host or "localhost", port=port if port >= 0 else DEFAULT_PORT)


def _vsock(name: str, place: str) -> Address:
    cid, port = _host_and_port(name, place)
    if not (cid.isascii() and cid.isdecimal() and int(cid) < 1 << 32):
        raise _bad(name, f"{cid!r} is not the number of a virtual machine")
    return Address("vsock", cid=int(cid), port=port if port >= 0 else DEFAULT_PORT)


def _host_and_port(name: str, place: str) -> tuple[str, int]:
    """(host without brackets, port or -1)."""
    if place.startswith("["):
        host, bracket, after = place[1:].partition("]")
        if not bracket or (after and not after.startswith(":")) or not host:
            raise _bad(name, f"{place!r} is not [ADDRESS]:PORT")
        port = after[1:]
    else:
        host, _, port = place.partition(":")
        if ":" in port:
            raise _bad(name, "an IPv6 address is written in brackets")
    if port and not (port.isascii() and port.isdecimal() and len(port) < 11 and int(port) < 1 << 32):
        raise _bad(name, f"{port!r} is not a port number")
    return _unquote(name, host), int(port) if port else -1


def _unquote(name: str, text: str) -> str:
    """``text`` with its %XX decoded.

    :raises InvalidArgument: a percent sign without two hexadecimal digits, or bytes that are not UTF-8
    """
    if "%" not in text:
        return text
    first, *rest = text.encode(errors="surrogateescape").split(b"%")
    parts = [first]
    try:
        for part in rest:
            if len(part) < 2 or not part[:2].isalnum():
                raise ValueError
            parts += (bytes((int(part[:2], 16),)), part[2:])
        return b"".join(parts).decode()
    except ValueError:
        raise _bad(name, f"{text[:60]!r} is not encoded as a URI demands") from None


def _bad(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"no valid NBD name: {why}", where=name)


# -- older names ----------------------------------------------------------------------------------


def _parse_legacy(name: str) -> Target:
    """``nbd:unix:PATH[:exportname=NAME]``, ``nbd:HOST:PORT[:exportname=NAME]``."""
    place, _, export = name.partition(_EXPORT_MARK)
    prefix, _, place = place.partition(":")
    if prefix != "nbd" or not place:
        raise _bad(name, "expected nbd:HOST:PORT or nbd:unix:PATH")
    if place.startswith("unix:"):
        if not place[5:]:
            raise _bad(name, "the path of the socket is missing")
        return Target(Address("unix", path=place[5:]), export)
    host, port = _host_and_port(name, place)
    if port < 0:
        raise _bad(name, "the port is missing")
    return Target(Address("inet", host=host or "localhost", port=port), export)


# -- names to show --------------------------------------------------------------------------------


def show(address: Address, export: str, *, named: bool = False, tls: bool = False) -> str:
    """The URI of an export; :func:`parse` of it gives the same export. "" where an address has none ("fd").

    :param named: an export was named, if only by its empty name, which is left out otherwise
    """
    scheme = "nbds" if tls else "nbd"
    path = f"/{_quote(export)}" if named or export else ""
    if address.kind == "unix":
        return f"{scheme}+unix://{path}?socket={_quote(address.path)}"
    if address.kind == "inet":
        return f"{scheme}://{address}{path}"
    if address.kind == "vsock":
        return f"{scheme}+vsock://{address.cid}:{address.port}{path}"
    return ""


def _quote(text: str) -> str:
    """Only what would be taken for something else is encoded: names stay as people write them."""
    data = text.encode(errors="surrogateescape")
    if all(byte in _SAFE for byte in data):
        return text
    return "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in data)
