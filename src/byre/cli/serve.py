"""``serve``: offer an image to other programs as a network block device, with the options of ``qemu-nbd``.

What is offered is opened in :mod:`.serve_image`, sockets and TLS are set up in :mod:`.serve_sockets`, running in the
background is :mod:`.background`'s; ``-L`` is :mod:`.serve_list`, kernel devices are :mod:`.nbd_device`.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument
from ..nbd import wire
from ..opening import CACHE_MODES
from . import common

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..exports.nbd import NbdExport
    from ..nbd.server import Server

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT,
    common.Switch("read-only", "r", "read-only", "", "clients may only read"),
    common.Switch("snapshot", "s", "snapshot", "", "write to a temporary overlay, which is forgotten at the end"),
    common.Switch("load-snapshot", "l", "load-snapshot", "SNAPSHOT", "an internal snapshot, read-only"),
    common.Switch("offset", "o", "offset", "OFFSET", "where in the image the disk begins"),
    common.Switch("export-name", "x", "export-name", "NAME", "name of the export; empty if not given"),
    common.Switch("description", "D", "description", "TEXT", "what it is, for people"),
    common.Switch("bitmap", "B", "bitmap", "NAME", "show a dirty bitmap of the image; may be repeated"),
    common.Switch("allocation-depth", "A", "allocation-depth", "", "show which layer holds what"),
    common.Switch("shared", "e", "shared", "NUM", "most clients at a time (default 1), 0 for any number"),
    common.Switch("persistent", "t", "persistent", "", "go on when the last client has left"),
    common.Switch("fork", "", "fork", "", "go on in the background once clients can connect"),
    common.Switch("pid-file", "", "pid-file", "PATH", "write the process id there"),
    common.Switch("socket", "k", "socket", "PATH", "listen on a unix socket, which only this user can reach"),
    common.Switch("port", "p", "port", "PORT", f"listen on this TCP port (default {wire.DEFAULT_PORT})"),
    common.Switch("bind", "b", "bind", "ADDRESS", "listen on this address (default 127.0.0.1)"),
    common.Switch("tls-creds", "", "tls-creds", "ID", "the --object with TLS credentials; clients must use TLS"),
    common.Switch("tls-authz", "", "tls-authz", "ID", "the --object that says whose certificates are welcome"),
    common.Switch("tls-hostname", "", "tls-hostname", "NAME", "the name in the server's certificate, with -L"),
    common.Switch(
        "handshake-limit", "", "handshake-limit", "N", "seconds a client has to begin (default 10), 0 for any"
    ),
    common.Switch(
        "poll-max-ns",
        "",
        "poll-max-ns",
        "NS",
        "look for the next request of a busy client for so long before sleeping (default 50000), 0 for never",
    ),
    common.OBJECT,
    common.IMAGE_OPTS,
    common.Switch("cache", "", "cache", "CACHE", "cache mode of the image (default writeback)"),
    common.Switch("nocache", "n", "nocache", "", "the same as --cache=none"),
    common.Switch("aio", "", "aio", "MODE", "threads, native or io_uring; makes no difference here"),
    common.Switch("discard", "", "discard", "MODE", "whether clients can give space back: ignore (default), unmap"),
    common.Switch("detect-zeroes", "", "detect-zeroes", "MODE", "writes of zeroes become zero writes: off, on, unmap"),
    common.Switch("list", "L", "list", "", "show what another server offers"),
    common.Switch("connect", "c", "connect", "DEVICE", "make the kernel's device /dev/nbdN show the image"),
    common.Switch("disconnect", "d", "disconnect", "", "the argument is such a device: let go of it"),
    common.Switch("verbose", "v", "verbose", "", "say what clients do wrong"),
    common.Switch("version", "V", "version", "", "show the version"),
    common.Switch("trace", "T", "trace", "PATTERN", "accepted; there are no trace events"),
    common.Switch("selinux-label", "", "selinux-label", "LABEL", "refused: not supported"),
)

_TEXT: Final = """\
usage: {program} [OPTIONS] FILENAME
       {program} -L [OPTIONS]
       {program} -d DEVICE
Offer an image as a network block device.

{options}"""

HELP: Final = _TEXT.format(program="byre serve", options=common.option_help(_TABLE))

_IMAGE_SETTINGS: Final = ("export-name", "description", "offset", "connect", "disconnect", "format", "load-snapshot",
                          "bitmap", "allocation-depth", "aio", "discard", "cache", "nocache")  # fmt: skip


def run(arguments: list[str]) -> int:
    try:
        given = common.parse(_TABLE, arguments)
    except common.HelpRequested:
        if not common.as_peer():
            raise
        sys.stdout.write(_TEXT.format(program=common.PROGRAM.get(), options=common.option_help(_TABLE)))
        return 0
    if given.has("version"):
        from .refusals import version

        # The peer's first word is its name, the second its version.
        sys.stdout.write(version(common.PROGRAM.get()).replace("qemu-nbd version ", "qemu-nbd "))
        return 0
    _check(given)
    if given.has("list"):
        from .serve_list import list_exports

        return list_exports(given)
    if given.has("disconnect"):
        from .nbd_device import disconnect

        return disconnect(given.positional[0])
    if given.has("fork") or (given.has("connect") and not given.has("verbose")):
        from .background import in_background

        return in_background(lambda ready: _serve(given, ready), keep_stderr=given.has("verbose"))
    return _serve(given, lambda: None)


# -- what the options must be ---------------------------------------------------------------------


def _check(given: common.Given) -> None:
    """:raises InvalidArgument: options that exclude each other, or values that make no sense"""
    for first, second, text in (("cache", "nocache", "-n and --cache can only be specified once"),):
        if len(given.all(first)) + len(given.all(second)) > 1:
            raise InvalidArgument(text)
    for name in ("aio", "discard"):
        if len(given.all(name)) > 1:
            raise InvalidArgument(f"--{name} can only be specified once")
    _word(given, "cache", tuple(CACHE_MODES), "Invalid cache mode `{}'")
    _word(given, "aio", ("threads", "native", "io_uring"), "Invalid aio mode '{}'")
    _word(given, "discard", ("ignore", "off", "unmap", "on"), "Invalid discard mode `{}'")
    _word(given, "detect-zeroes", ("off", "on", "unmap"), "Failed to parse detect_zeroes mode: Invalid parameter '{}'")
    if given.last("detect-zeroes") == "unmap" and given.last("discard") not in ("unmap", "on"):
        raise InvalidArgument(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
        )
    for name, what in (("export-name", "export name"), ("description", "export description")):
        if len(given.last(name).encode(errors="surrogateescape")) > wire.MAX_STRING:
            raise InvalidArgument(f"{what} '{given.last(name)[:80]}...' too long")
    if given.has("selinux-label"):
        raise InvalidArgument("SELinux support not enabled in this binary")
    number(given, "shared", 1, "Invalid shared device number '{}'")
    number(given, "handshake-limit", 10, "Invalid handshake limit '{}'")
    number(given, "poll-max-ns", 0, "Invalid polling time '{}'")
    number(given, "offset", 0, "Invalid offset '{}'")
    if common.as_peer() and given.has("socket") and not given.last("socket").startswith("/"):
        raise InvalidArgument("socket path must be absolute")
    _check_mode(given)


def _check_mode(given: common.Given) -> None:
    if given.has("list"):
        if given.positional:
            raise InvalidArgument("List mode is incompatible with a file name")
        if any(given.has(name) for name in _IMAGE_SETTINGS):
            raise InvalidArgument("List mode is incompatible with per-device settings")
        if given.has("fork"):
            raise InvalidArgument("List mode is incompatible with forking")
    elif len(given.positional) != 1:
        raise common.UsageError("Invalid number of arguments")
    if given.has("connect"):
        from .nbd_device import index_of

        index_of(given.last("connect"))
    if given.has("image-opts") and given.has("format"):
        raise InvalidArgument("--image-opts and -f are mutually exclusive")
    if not given.has("tls-creds"):
        for name in ("tls-authz", "tls-hostname"):
            if given.has(name):
                raise InvalidArgument(f"--{name} is not permitted without --tls-creds")
    elif given.has("connect"):
        raise InvalidArgument("TLS is not supported with a host device")
    elif given.has("list") and given.has("tls-authz"):
        raise InvalidArgument("TLS authorization is incompatible with export list")
    elif given.has("tls-hostname") and not given.has("list"):
        raise InvalidArgument("TLS hostname is only supported with export list")


def _word(given: common.Given, name: str, allowed: tuple[str, ...], message: str) -> None:
    for value in given.all(name):
        if value not in allowed:
            raise InvalidArgument(message.format(value))


def number(given: common.Given, name: str, default: int, message: str) -> int:
    """The value of an option that is a count.

    :raises InvalidArgument: it is none
    """
    text = given.last(name)
    if not text:
        if given.has(name):
            raise InvalidArgument(message.format(text))
        return default
    try:
        value = int(text, 16 if text.lower().startswith("0x") else 10)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 63 or not text.isalnum() or (name != "offset" and value >= 1 << 31):
        raise InvalidArgument(message.format(text))
    return value


# -- serving --------------------------------------------------------------------------------------


def _serve(given: common.Given, ready: Callable[[], None]) -> int:
    """Open, listen, and serve until the end.

    :param ready: called when clients can connect
    """
    from . import serve_image, serve_sockets
    from .background import PidFile, no_interrupts

    server = serve_sockets.make_server(given)  # before the image is touched: a port that is taken ends it here
    with contextlib.ExitStack() as opened:
        try:
            export = opened.enter_context(serve_image.open_export(given, server_limit(given)))
            server.add(export)
            with PidFile(given.last("pid-file")):
                return _serve_export(given, server, export, ready)
        finally:
            with no_interrupts():  # what clients wrote is to be durable, however impatient somebody is
                server.stop()
                opened.close()


def server_limit(given: common.Given) -> int:
    """Most clients at a time, 0 for any number."""
    return number(given, "shared", 1, "Invalid shared device number '{}'")


def _serve_export(given: common.Given, server: Server, export: NbdExport, ready: Callable[[], None]) -> int:
    try:
        server.start()
        if given.has("connect"):
            from .nbd_device import Device

            with Device(given.last("connect"), server, export, verbose=given.has("verbose")) as device:
                ready()
                return device.wait()
        ready()
        if given.has("persistent"):
            server.wait()
        else:
            server.wait_until_unused()
    except KeyboardInterrupt:
        pass  # SIGTERM as well: how a server ends
    return 0
