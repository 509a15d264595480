"""``serve -c`` and ``-d``: the kernel's own NBD client, reached through its generic netlink interface.

The kernel is handed one end of a connected socket on which the handshake is done already; it then shows /dev/nbdN.
Constants and attributes as in the kernel's ``include/uapi/linux/nbd-netlink.h`` and ``linux/genetlink.h``.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
from typing import TYPE_CHECKING, Final

from ..errors import ByreError, InvalidArgument, NotSupported, from_oserror, printable
from ..nbd import handshake

if TYPE_CHECKING:
    from ..exports.nbd import NbdExport
    from ..nbd.server import Server

__all__ = ["Device", "disconnect", "index_of"]

_NETLINK_GENERIC: Final = 16
_CONTROL: Final = 16  # GENL_ID_CTRL
_GET_FAMILY: Final = 3
_ATTR_FAMILY_ID: Final = 1
_ATTR_FAMILY_NAME: Final = 2
_ERROR: Final = 2
_REQUEST: Final = 1
_ACK: Final = 4
_NESTED: Final = 0x8000

_CONNECT: Final = 1
_DISCONNECT: Final = 2
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS, _CLIENT_FLAGS, _SOCKETS = range(1, 8)
_SOCKET_ITEM: Final = 1
_SOCKET_FD: Final = 1
_BLOCK: Final = 512


def disconnect(path: str) -> int:
    """Make the kernel let go of ``path``; the exit code.

    :raises ByreError: it is no such device, or the kernel has no NBD
    """
    import sys

    index = index_of(path)
    with _Netlink() as netlink:
        netlink.call(_DISCONNECT, _number(_INDEX, index, 4), path)
    sys.stdout.write(f"{printable(path)} disconnected\n")
    return 0


class Device:
    """A kernel device that shows an export, from entry to exit."""

    def __init__(self, path: str, server: Server, export: NbdExport, *, verbose: bool = False) -> None:
        self._path = path
        self._server = server
        self._export = export
        self._verbose = verbose
        self._index = index_of(path)
        self._netlink = _Netlink()

    def __enter__(self) -> Device:
        """:raises ByreError: the kernel refuses; nothing stays behind"""
        ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._server.serve(ours, self._path)
            info = _shake_hands(kernels, self._export.name)
            sockets = _nest(_SOCKETS, _nest(_SOCKET_ITEM, _number(_SOCKET_FD, kernels.fileno(), 4)))
            attributes = (
                _number(_INDEX, self._index, 4)
                + _number(_SIZE, info.size, 8)
                + _number(_BLOCK_SIZE, _BLOCK, 8)
                + _number(_SERVER_FLAGS, info.flags, 8)
                + sockets
            )
            self._netlink.call(_CONNECT, attributes, self._path)
        except BaseException:
            self._netlink.close()
            raise
        finally:
            kernels.close()
        if self._verbose:
            import sys

            sys.stderr.write(f"NBD device {self._path} is now connected to {self._export.image.filename}\n")
        return self

    def wait(self) -> int:
        """Wait until somebody disconnects the device; the exit code."""
        self._server.wait_until_unused()
        return 0

    def __exit__(self, *_error: object) -> None:
        try:
            self._netlink.call(_DISCONNECT, _number(_INDEX, self._index, 4), self._path)
        except ByreError:
            pass  # disconnected already
        self._netlink.close()


def _shake_hands(sock: socket.socket, name: str) -> handshake.ExportInfo:
    """The client's side of the handshake with our own server, for a kernel that knows the transmission phase only."""
    sock.settimeout(10)
    raw = name.encode()
    hello = struct.pack(">I", handshake.FLAG_FIXED_NEWSTYLE | handshake.FLAG_NO_ZEROES)
    data = struct.pack(">I", len(raw)) + raw + struct.pack(">H", 0)
    try:
        _exactly(sock, 18)
        sock.sendall(hello + handshake.encode_option(handshake.OPT_GO, data))
        info = None
        while True:
            reply = handshake.decode_option_reply(_exactly(sock, handshake.OPTION_REPLY_SIZE))
            payload = _exactly(sock, reply.length)
            if reply.kind == handshake.REP_ACK and info is not None:
                sock.settimeout(None)
                return info
            if reply.kind != handshake.REP_INFO:
                raise ByreError(f"the server refused: {payload.decode(errors='replace')}")
            if int.from_bytes(payload[:2], "big") == handshake.INFO_EXPORT:
                info = handshake.decode_export_info(payload)
    except OSError as error:
        raise from_oserror(error, "cannot reach the server", "the kernel's socket") from None


def _exactly(sock: socket.socket, length: int) -> bytes:
    data = sock.recv(length, socket.MSG_WAITALL) if length else b""
    if len(data) < length:
        raise ByreError("the server closed the connection")
    return data


def index_of(path: str) -> int:
    """The N of /dev/nbdN.

    :raises InvalidArgument: it is not called so
    """
    found = re.fullmatch(r"(?:/dev/)?nbd(\d{1,5})", path)
    if not found:
        raise InvalidArgument("is not one of the kernel's devices /dev/nbdN", where=printable(path))
    return int(found[1])


# -- netlink --------------------------------------------------------------------------------------


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("@HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _number(kind: int, value: int, size: int) -> bytes:
    return _attribute(kind, struct.pack("@Q" if size == 8 else "@I", value))


def _nest(kind: int, payload: bytes) -> bytes:
    return _attribute(kind | _NESTED, payload)


class _Netlink:
    """A generic netlink socket, and the number under which the kernel has its family "nbd"."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
        except OSError as error:
            raise from_oserror(error, "this system has no generic netlink", "netlink") from None
        self._socket.settimeout(10)
        try:
            self._family = self._find()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> _Netlink:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def _find(self) -> int:
        reply = self._exchange(_CONTROL, _GET_FAMILY, 1, _attribute(_ATTR_FAMILY_NAME, b"nbd\0"), _REQUEST)
        code = _error_of(reply)
        if code == errno.ENOENT:
            hint = "" if os.path.exists("/sys/module/nbd") else "load it with: modprobe nbd"
            raise NotSupported("the kernel has no NBD support loaded (generic netlink family 'nbd')", hint=hint)
        if code:
            raise from_oserror(OSError(code, ""), "cannot ask the kernel for its NBD support", "netlink")
        at = 20
        while at + 4 <= len(reply):
            length, kind = struct.unpack_from("@HH", reply, at)
            if kind == _ATTR_FAMILY_ID and length == 6:
                return int(struct.unpack_from("@H", reply, at + 4)[0])
            at += max(4, -(-length // 4) * 4)
        raise NotSupported("the kernel's answer about its NBD support makes no sense")

    def call(self, command: int, attributes: bytes, path: str) -> None:
        """:raises ByreError: the kernel refuses"""
        code = _error_of(self._exchange(self._family, command, 1, attributes, _REQUEST | _ACK))
        if code:
            verb = "connect" if command == _CONNECT else "disconnect"
            raise from_oserror(OSError(code, ""), f"the kernel cannot {verb} the device", printable(path))

    def _exchange(self, kind: int, command: int, version: int, attributes: bytes, flags: int) -> bytes:
        body = struct.pack("@BBH", command, version, 0) + attributes
        message = struct.pack("@IHHII", 16 + len(body), kind, flags, 1, 0) + body
        try:
            self._socket.send(message)
            while True:
                reply = self._socket.recv(65536)
                # A reply and its acknowledgement may come apart; the acknowledgement is what counts.
                if not flags & _ACK or struct.unpack_from("@H", reply, 4)[0] == _ERROR:
                    return reply
        except OSError as error:
            raise from_oserror(error, "cannot talk to the kernel", "netlink") from None


def _error_of(reply: bytes) -> int:
    """The errno value in an error message; 0 for an acknowledgement, or any other message."""
    if len(reply) >= 20 and struct.unpack_from("@H", reply, 4)[0] == _ERROR:
        return -int(struct.unpack_from("@i", reply, 16)[0])
    return 0
