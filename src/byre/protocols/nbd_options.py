"""What options of an NBD node mean: where the server is, how to do TLS, how long to try."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument, NotFound, NotSupported
from ..nbd import uri, wire
from ..nbd.client_negotiation import Wishes
from ..nbd.session import MAX_CONNECTIONS, Settings
from ..options import Option, OptionSet

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

    from ..graph.opening import OpenRequest
    from ..nbd.client import Security
    from ..options import OptionValues

__all__ = ["OPTIONS", "parse_name", "settings_of"]

OPTIONS: Final = OptionSet(
    Option("server.type", "enum", "how the server is reached", None, ("unix", "inet", "vsock", "fd")),
    Option("server.path", "str", "Unix socket path to connect to"),
    Option("server.abstract", "bool", "the path is a name in the abstract namespace", False),
    Option("server.tight", "bool", "an abstract name ends where it ends", True),
    Option("server.host", "str", "TCP host to connect to"),
    Option("server.port", "str", "TCP or vsock port to connect to"),
    Option("server.ipv4", "bool", "whether IPv4 may be used"),
    Option("server.ipv6", "bool", "whether IPv6 may be used"),
    Option("server.keep-alive", "bool", "find out by keep-alive probes that a TCP server is gone", True),
    Option("server.cid", "str", "number of the virtual machine, for vsock"),
    Option("server.str", "str", "number of an open descriptor, for fd"),
    Option("path", "str", "Unix socket path to connect to"),
    Option("host", "str", "TCP host to connect to"),
    Option("port", "str", "TCP port to connect to"),
    Option("export", "str", "Name of the NBD export to open"),
    Option("tls", "enum", "whether to speak TLS: on demands it", "off", ("off", "on")),
    Option("tls-creds", "str", "ID of the TLS credentials to use; demands TLS"),
    Option("tls-hostname", "str", "Override hostname for validating TLS x509 certificate"),
    Option("tls-type", "enum", "kind of TLS without tls-creds", "x509", uri.TLS_TYPES),
    Option("tls-verify-peer", "bool", "check the server's certificate", True),
    Option("tls-certificates", "str", "folder with certificates or keys, in place of tls-creds"),
    Option("tls-username", "str", "which of the pre-shared keys to use", "qemu"),
    Option("x-dirty-bitmap", "str", "experimental: expose named dirty bitmap in place of block status"),
    Option("reconnect-delay", "int", "seconds after a disconnect during which requests wait for a new connection", 0),
    Option("open-timeout", "int", "seconds during which opening tries again, 0: once", 0),
    Option("connections", "int", "how many connections to use if the server allows several", 1),
    Option("request-timeout", "int", "seconds a server may be silent while it owes a reply, 0: for ever", 600),
)  # fmt: skip

_SECONDS_LIMIT: Final = 1 << 31


def parse_name(name: str) -> dict[str, object]:
    """Options for a URI or an older ``nbd:`` name.

    :raises InvalidArgument: the name is wrong
    """
    target = uri.parse(name)
    address = target.address
    server: dict[str, object] = {"type": address.kind}
    if address.kind == "unix":
        server["path"] = address.path
    elif address.kind == "vsock":
        server |= {"cid": str(address.cid), "port": str(address.port)}
    else:
        server |= {"host": address.host, "port": str(address.port)}
    found: dict[str, object] = {"server": server, **dict(target.tls_options)}
    if target.export:
        found["export"] = target.export
    if "tls-verify-peer" in found:
        found["tls-verify-peer"] = found["tls-verify-peer"] == "1"
    if target.tls:
        found["tls"] = "on"
    return found


def settings_of(request: OpenRequest, context: str) -> Settings:
    """How to reach the export that the options name.

    :param context: the metadata context to ask for
    :raises ByreError: options that contradict each other, credentials that are missing or unusable
    """
    options = request.options
    for name in ("export", "x-dirty-bitmap"):
        if len((options.text(name) or "").encode(errors="surrogateescape")) > wire.MAX_STRING:
            raise InvalidArgument(f"{name} is longer than {wire.MAX_STRING} bytes")
    address = _address(options)
    security = _security(request, address)
    return Settings(
        address,
        Wishes(options.text("export") or "", "require" if security else "off", (context,)),
        security,
        reconnect_delay=_seconds(options, "reconnect-delay"),
        open_timeout=_seconds(options, "open-timeout"),
        connections=max(1, min(options.number("connections"), MAX_CONNECTIONS)),
        patience=_seconds(options, "request-timeout"),
        families=_families(options),
        keep_alive=options.flag("server.keep-alive"),
    )


def _seconds(options: OptionValues, name: str) -> int:
    value = options.number(name)
    if value > _SECONDS_LIMIT:
        raise InvalidArgument(f"{name} is {value} seconds, allowed are {_SECONDS_LIMIT}")
    return value


def _families(options: OptionValues) -> str:
    """Which of IPv4 and IPv6 may be used: naming one as on leaves out the other, as with the peer."""
    v4, v6 = (options.flag(name) if name in options else None for name in ("server.ipv4", "server.ipv6"))
    if v4 is False and v6 is False:
        raise InvalidArgument("neither IPv4 nor IPv6 is allowed")
    if v6 is False or (v4 and not v6):
        return "ipv4"
    if v4 is False or (v6 and not v4):
        return "ipv6"
    return "any"


def _address(options: OptionValues) -> uri.Address:
    """:raises InvalidArgument: none is given, or two are"""
    given = {name: options.text(name) for name in ("path", "host", "port") if options.text(name)}
    nested = [name for name in options.given if name.startswith("server.")]
    if given and nested:
        raise InvalidArgument("Cannot use 'server' and path/host/port at the same time")
    if "path" in given and "host" in given:
        raise InvalidArgument("path and host may not be used at the same time")
    if "port" in given and "host" not in given:
        raise InvalidArgument("port may not be used without host")
    if given:
        server: Mapping[str, str | None] = {"type": "unix" if "path" in given else "inet", **given}
    else:
        server = {name: options.text(f"server.{name}") for name in ("type", "path", "host", "port", "cid", "str")}
    kind = server["type"]
    if not kind:
        raise InvalidArgument("NBD server address missing", hint="give server.type and what belongs to it")
    if kind == "unix":
        path = _needed(server, "path")
        return uri.Address("unix", path="\0" + path if options.flag("server.abstract") else path)
    if kind == "fd":
        return uri.Address("fd", fd=_number(server, "str", 1 << 20))
    if kind == "vsock":
        return uri.Address("vsock", cid=_number(server, "cid", 1 << 32), port=_number(server, "port", 1 << 32))
    port = _number(server, "port", 65536) if server.get("port") or nested else wire.DEFAULT_PORT
    return uri.Address("inet", host=_needed(server, "host"), port=port)


def _needed(server: Mapping[str, str | None], name: str) -> str:
    value = server.get(name)
    if not value:
        raise InvalidArgument(f"Parameter 'server.{name}' is missing")
    return value


def _number(server: Mapping[str, str | None], name: str, end: int) -> int:
    text = _needed(server, name)
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < end):
        raise InvalidArgument(f"server.{name} is {text[:40]!r}: expected a number below {end}")
    return int(text)


def _security(request: OpenRequest, address: uri.Address) -> Security | None:
    """How to do TLS, if the options ask for it.

    :raises ByreError: credentials that are missing or unusable
    """
    options = request.options
    if not options.text("tls-creds") and options.word("tls") == "off":
        named = [name for name in options.given if name.startswith("tls-")]
        if named:
            raise InvalidArgument(f"{named[0]} is given, but no TLS", hint="use nbds://, tls=on or tls-creds")
        return None
    from ..nbd.client import Security

    context = _tls_context(request)
    hostname = options.text("tls-hostname") or (address.host if address.kind == "inet" else None)
    if context.check_hostname and not hostname:
        raise InvalidArgument("the server's certificate cannot be checked: no host name to check it for",
                              hint="give tls-hostname")  # fmt: skip
    return Security(context, hostname)


def _tls_context(request: OpenRequest) -> ssl.SSLContext:
    """From an object, from a folder, or from the certificates the system trusts."""
    from ..nbd.tls import Credentials, client_context

    options = request.options
    identity, folder = options.text("tls-creds"), options.text("tls-certificates")
    kind = options.word("tls-type")
    if identity:
        credentials = request.opener.graph.tls_credentials.get(identity)
        if credentials is None:
            raise NotFound(f"No TLS credentials with id '{identity}'")
        return client_context(credentials, request.opener.secrets)
    if kind == "anon":
        raise NotSupported("anonymous TLS is not supported: anybody could listen in")
    if folder:
        made = Credentials("uri", kind, "client", folder, options.flag("tls-verify-peer"), options.word("tls-username"))
        return client_context(made, request.opener.secrets)
    if kind == "psk":
        raise InvalidArgument("pre-shared keys need tls-certificates (the folder with keys.psk) or tls-creds")
    import ssl

    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not options.flag("tls-verify-peer"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
