"""The server's side of the handshake (fixed newstyle): bytes in, events and bytes out. No sockets, no clock.

Follows "Fixed newstyle negotiation" of the protocol document. Owns what was agreed on so far; which exports there are,
and whether one more client may use one, it asks an :class:`Offers`. Deadlines and TLS itself are the caller's.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from ..errors import ProtocolError, printable
from . import handshake, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "TLS_OPTIONAL",
    "TLS_REQUIRED",
    "TLS_UNAVAILABLE",
    "Agreement",
    "ClientLeft",
    "Negotiation",
    "Offer",
    "Offers",
    "StartTls",
]  # fmt: skip

TLS_UNAVAILABLE: Final = 0
TLS_OPTIONAL: Final = 1
TLS_REQUIRED: Final = 2

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"

_GREETING: Final = (
    handshake.INIT_MAGIC
    + handshake.OPTION_MAGIC
    + struct.pack(">H", handshake.FLAG_FIXED_NEWSTYLE | handshake.FLAG_NO_ZEROES)
)
_KNOWN_CLIENT_FLAGS: Final = handshake.FLAG_FIXED_NEWSTYLE | handshake.FLAG_NO_ZEROES
_PADDING: Final = bytes(124)
_NAME_SHOWN: Final = 80


class Offer(NamedTuple):
    """What clients are told about an export.

    :ivar size: bytes
    :ivar flags: transmission flags; those that depend on what is negotiated are added here
    :ivar block_sizes: (minimum, preferred, maximum) in bytes
    :ivar contexts: names of the metadata contexts, by id
    """

    name: str
    description: str
    size: int
    flags: int
    block_sizes: tuple[int, int, int]
    contexts: tuple[str, ...]


class Offers(Protocol):
    """The exports there are."""

    def all(self) -> Sequence[Offer]:
        """In the order in which they are listed."""

    def find(self, name: str) -> Offer | None: ...

    def claim(self, name: str) -> str:
        """Take a place at the export for this client; the reason why there is none, "" if there is."""


class StartTls(NamedTuple):
    """Send what is to be sent, then do the TLS handshake, then go on; what was received so far is forgotten."""


class ClientLeft(NamedTuple):
    """Send what is to be sent, then close: the client asked for it, or for something that cannot be answered."""

    reason: str


class Agreement(NamedTuple):
    """The handshake is over.

    :ivar offer: the export that was agreed on; its place is claimed
    :ivar structured: replies come in chunks
    :ivar extended: headers are extended (which implies ``structured``)
    :ivar contexts: (id, name) of the metadata contexts chosen, in order of their ids
    :ivar rest: bytes received that belong to the transmission phase
    """

    offer: Offer
    structured: bool
    extended: bool
    contexts: tuple[tuple[int, str], ...]
    rest: bytes


Event = StartTls | ClientLeft | Agreement


class _Refusal(Exception):
    """An option is answered with this error, and the handshake goes on."""

    def __init__(self, kind: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class Negotiation:
    """One client's handshake.

    :meth:`feed` takes what was received; :meth:`step` answers one option at a time, so that a client that sends many
    at once makes nobody collect all the answers; :meth:`take` gives what is to be sent.

    :param tls: one of ``TLS_UNAVAILABLE``, ``TLS_OPTIONAL``, ``TLS_REQUIRED``
    :raises ProtocolError: (``step``) what cannot be answered: wrong magic, an option that is too long
    """

    def __init__(self, offers: Offers, tls: int = TLS_UNAVAILABLE) -> None:
        self._offers = offers
        self._tls = tls
        self._encrypted = False
        self._input = bytearray()
        self._output: list[bytes] = [_GREETING]
        self._flags = -1
        self._forget()

    def _forget(self) -> None:
        self._structured = self._extended = False
        self._chosen_for = ""
        self._contexts: tuple[tuple[int, str], ...] = ()

    # -- what the caller does ---------------------------------------------------------------------

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes were received."""
        self._input += data

    def take(self) -> bytes:
        """What is to be sent now."""
        data = b"".join(self._output)
        self._output.clear()
        return data

    def tls_started(self) -> None:
        """The TLS handshake after :class:`StartTls` succeeded."""
        self._encrypted = True

    def step(self) -> Event | bool:
        """Answer the next option: an event, True if there may be more, False if more bytes are needed."""
        if self._flags < 0:
            return self._receive_flags()
        if len(self._input) < handshake.OPTION_SIZE:
            return False
        option, length = handshake.decode_option(bytes(self._input[: handshake.OPTION_SIZE]))
        if length > handshake.MAX_OPTION:
            raise ProtocolError(f"option {option} has {length} bytes of data, allowed are {handshake.MAX_OPTION}")
        end = handshake.OPTION_SIZE + length
        if len(self._input) < end:
            return False
        data = bytes(self._input[handshake.OPTION_SIZE : end])
        del self._input[:end]
        return self._answer(option, data)

    def _receive_flags(self) -> bool:
        if len(self._input) < 4:
            return False
        flags = int.from_bytes(self._input[:4], "big")
        if flags & ~_KNOWN_CLIENT_FLAGS:
            raise ProtocolError(f"unknown client flags {flags:#x}")
        del self._input[:4]
        self._flags = flags
        return True

    # -- options ----------------------------------------------------------------------------------

    def _answer(self, option: int, data: bytes) -> Event | bool:
        if option == handshake.OPT_EXPORT_NAME:
            return self._export_name(data)
        if option == handshake.OPT_ABORT:
            self._reply(option, handshake.REP_ACK)
            return ClientLeft("the client ended the handshake")
        try:
            self._check_allowed(option)
            handler = self._HANDLERS.get(option)
            if handler is None:
                raise _Refusal(handshake.REP_ERR_UNSUP, f"Unsupported option {option}")
            return handler(self, option, data)
        except _Refusal as refusal:
            message = refusal.message.encode(errors="replace")[: wire.MAX_STRING]
            self._reply(option, refusal.kind, message)
            return True

    def _check_allowed(self, option: int) -> None:
        if self._tls == TLS_REQUIRED and not self._encrypted and option != handshake.OPT_STARTTLS:
            raise _Refusal(handshake.REP_ERR_TLS_REQD, f"Option {option} not permitted before TLS")
        if not self._flags & handshake.FLAG_FIXED_NEWSTYLE:
            raise _Refusal(handshake.REP_ERR_UNSUP, f"Unsupported option {option}")

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._output.append(handshake.encode_option_reply(option, kind, data))

    def _export_name(self, data: bytes) -> Event:
        """The old way to begin, which has no answer for errors."""
        if self._tls == TLS_REQUIRED and not self._encrypted:
            return ClientLeft("the client asked for an export before TLS")
        if len(data) > wire.MAX_STRING:
            return ClientLeft(f"an export name of {len(data)} bytes")
        offer = self._offers.find(data.decode(errors="replace"))
        if offer is None:
            return ClientLeft("export not found")
        refusal = self._offers.claim(offer.name)
        if refusal:
            return ClientLeft(refusal)
        self._output.append(struct.pack(">QH", offer.size, self._transmission_flags(offer)))
        if not self._flags & handshake.FLAG_NO_ZEROES:
            self._output.append(_PADDING)
        return self._agree(offer)

    def _start_tls(self, option: int, data: bytes) -> Event:
        _check_empty(data, "NBD_OPT_STARTTLS")
        if self._encrypted:
            raise _Refusal(handshake.REP_ERR_INVALID, "TLS already enabled")
        if self._tls == TLS_UNAVAILABLE:
            raise _Refusal(handshake.REP_ERR_POLICY, "TLS not configured")
        self._reply(option, handshake.REP_ACK)
        # Nothing that was said in the clear counts, also not what was sent ahead of its turn.
        self._input.clear()
        self._forget()
        return StartTls()

    def _list(self, option: int, data: bytes) -> bool:
        _check_empty(data, "NBD_OPT_LIST")
        for offer in self._offers.all():
            self._reply(option, handshake.REP_SERVER, handshake.encode_server_entry(offer.name, offer.description))
        self._reply(option, handshake.REP_ACK)
        return True

    def _structured_reply(self, option: int, data: bytes) -> bool:
        _check_empty(data, "NBD_OPT_STRUCTURED_REPLY")
        if self._extended:
            raise _Refusal(handshake.REP_ERR_EXT_HEADER_REQD, "extended headers already negotiated")
        if self._structured:
            raise _Refusal(handshake.REP_ERR_INVALID, "structured reply already negotiated")
        self._structured = True
        self._reply(option, handshake.REP_ACK)
        return True

    def _extended_headers(self, option: int, data: bytes) -> bool:
        _check_empty(data, "NBD_OPT_EXTENDED_HEADERS")
        if self._extended:
            raise _Refusal(handshake.REP_ERR_INVALID, "extended headers already negotiated")
        self._structured = self._extended = True
        self._reply(option, handshake.REP_ACK)
        return True

    def _info(self, option: int, data: bytes) -> Event | bool:
        """INFO and GO."""
        reader = _Reader(data, option)
        offer = self._find(reader.string())
        wanted = {reader.number(2) for _ in range(reader.number(2))}
        reader.end()
        if option == handshake.OPT_GO:
            refusal = self._offers.claim(offer.name)
            if refusal:
                raise _Refusal(handshake.REP_ERR_POLICY, refusal)
        for kind, text in ((handshake.INFO_NAME, offer.name), (handshake.INFO_DESCRIPTION, offer.description)):
            if kind in wanted and (text or kind == handshake.INFO_NAME):
                self._reply(option, handshake.REP_INFO, struct.pack(">H", kind) + text.encode())
        self._reply(option, handshake.REP_INFO, handshake.encode_block_sizes(*offer.block_sizes))
        info = handshake.ExportInfo(offer.size, self._transmission_flags(offer, asking=option == handshake.OPT_INFO))
        self._reply(option, handshake.REP_INFO, handshake.encode_export_info(info))
        self._reply(option, handshake.REP_ACK)
        return self._agree(offer) if option == handshake.OPT_GO else True

    def _transmission_flags(self, offer: Offer, *, asking: bool = False) -> int:
        """:param asking: the client may still choose metadata contexts"""
        flags = offer.flags | wire.TRANSMISSION_HAS_FLAGS
        flags |= wire.TRANSMISSION_DF if self._structured else 0
        # Choosing among contexts is for clients that have some.
        chooses = self._extended and (asking or self._contexts_for(offer))
        return flags | (wire.TRANSMISSION_BLOCK_STATUS_PAYLOAD if chooses else 0)

    def _contexts_for(self, offer: Offer) -> tuple[tuple[int, str], ...]:
        """What was chosen counts only for the export that it was chosen for."""
        return self._contexts if self._chosen_for == offer.name else ()

    def _agree(self, offer: Offer) -> Agreement:
        rest = bytes(self._input)
        self._input.clear()
        return Agreement(offer, self._structured, self._extended, self._contexts_for(offer), rest)

    def _find(self, name: str) -> Offer:
        offer = self._offers.find(name)
        if offer is None:
            shown = printable(name[:_NAME_SHOWN]) + ("..." if len(name) > _NAME_SHOWN else "")
            raise _Refusal(handshake.REP_ERR_UNKNOWN, f"export '{shown}' not present")
        return offer

    def _meta_context(self, option: int, data: bytes) -> bool:
        """LIST_META_CONTEXT and SET_META_CONTEXT."""
        setting = option == handshake.OPT_SET_META_CONTEXT
        if setting:
            self._chosen_for, self._contexts = "", ()  # whatever comes of it, what was chosen before is gone
        if not self._structured:
            name = "NBD_OPT_SET_META_CONTEXT" if setting else "NBD_OPT_LIST_META_CONTEXT"
            raise _Refusal(
                handshake.REP_ERR_INVALID, f"request option '{name}' when structured reply is not negotiated"
            )
        reader = _Reader(data, option)
        offer = self._find(reader.string())
        queries = {reader.string() for _ in range(reader.number(4))}
        reader.end()
        found = tuple((number, name) for number, name in enumerate(offer.contexts) if _chosen(name, queries, setting))
        for number, name in found:
            self._reply(
                option, handshake.REP_META_CONTEXT, handshake.encode_meta_context(number if setting else 0, name)
            )
        if setting:
            self._chosen_for, self._contexts = offer.name, found
        self._reply(option, handshake.REP_ACK)
        return True

    _HANDLERS: Final[dict[int, Callable[[Negotiation, int, bytes], Event | bool]]] = {
        handshake.OPT_STARTTLS: _start_tls,
        handshake.OPT_LIST: _list,
        handshake.OPT_STRUCTURED_REPLY: _structured_reply,
        handshake.OPT_EXTENDED_HEADERS: _extended_headers,
        handshake.OPT_INFO: _info,
        handshake.OPT_GO: _info,
        handshake.OPT_LIST_META_CONTEXT: _meta_context,
        handshake.OPT_SET_META_CONTEXT: _meta_context,
    }


def _chosen(name: str, queries: set[str], setting: bool) -> bool:
    """Whether a context is asked for; where contexts are listed, a namespace names all in it, and nothing names all."""
    if name in queries or setting:
        return name in queries
    return not queries or any(space in queries and name.startswith(space) for space in ("base:", "qemu:", DIRTY_BITMAP))


def _check_empty(data: bytes, option: str) -> None:
    if data:
        raise _Refusal(handshake.REP_ERR_INVALID, f"option '{option}' has unexpected length")


class _Reader:
    """Takes an option's data apart; what does not fit is a refusal."""

    def __init__(self, data: bytes, option: int) -> None:
        self._data = data
        self._at = 0
        self._option = option

    def _bytes(self, length: int) -> bytes:
        part = self._data[self._at : self._at + length]
        if len(part) < length:
            raise _Refusal(handshake.REP_ERR_INVALID, f"Inconsistent lengths in option {self._option}")
        self._at += length
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "big")

    def string(self) -> str:
        length = self.number(4)
        if length > wire.MAX_STRING:
            raise _Refusal(handshake.REP_ERR_INVALID, f"Invalid name length: {length}")
        raw = self._bytes(length)
        if b"\0" in raw:
            raise _Refusal(handshake.REP_ERR_INVALID, f"Unexpected embedded NUL in option {self._option}")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _Refusal(handshake.REP_ERR_INVALID, f"A string in option {self._option} is not UTF-8") from None

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Refusal(handshake.REP_ERR_INVALID, f"Inconsistent lengths in option {self._option}")
