"""The client's side of the handshake, without sockets: bytes in, bytes and events out.

:class:`ClientNegotiation` says how many bytes it wants next and what is to be sent before; never one byte more is
wanted than the server owes, so nothing is read ahead of TLS or of the transmission phase. Everything the server
says is bounded: replies per option, bytes per reply, exports per list.

The conversation itself is written as a generator that yields the number of bytes it waits for, 0 for "TLS now".
"""

from __future__ import annotations

import struct

from ..errors import AccessDenied, ByreError, InvalidArgument, NotFound, NotSupported, ProtocolError, printable
from ..typing import TYPE_CHECKING, Final, NamedTuple
from . import handshake, wire

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import TypeAlias, TypeVar

    _T = TypeVar("_T")
    Script: TypeAlias = Generator[int, bytes, _T]

__all__ = ["BASE_ALLOCATION", "ClientNegotiation", "Export", "Negotiated", "Wishes", "choose_export", "list_all"]

BASE_ALLOCATION: Final = "base:allocation"

SIZE_LIMIT: Final = (1 << 63) - 1
REPLY_LIMIT: Final = 256
"""Informational replies to one option."""
EXPORT_LIMIT: Final = 10_000
LIST_LIMIT: Final = 16 << 20
"""Bytes of a whole list of exports with what is said about each."""

_START_TLS: Final = 0
_NAMES: Final = {
    handshake.OPT_EXPORT_NAME: "EXPORT_NAME",
    handshake.OPT_LIST: "LIST",
    handshake.OPT_STARTTLS: "STARTTLS",
    handshake.OPT_INFO: "INFO",
    handshake.OPT_GO: "GO",
    handshake.OPT_STRUCTURED_REPLY: "STRUCTURED_REPLY",
    handshake.OPT_LIST_META_CONTEXT: "LIST_META_CONTEXT",
    handshake.OPT_SET_META_CONTEXT: "SET_META_CONTEXT",
    handshake.OPT_EXTENDED_HEADERS: "EXTENDED_HEADERS",
}


class Wishes(NamedTuple):
    """What the client asks for.

    :ivar tls: "off"; "require": no word about exports before TLS; "allow": TLS if the server has it
    :ivar contexts: metadata contexts, asked for where replies are structured
    """

    export: str = ""
    tls: str = "off"
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    structured: bool = True
    extended: bool = True


class Negotiated(NamedTuple):
    """What was agreed; the transmission phase follows.

    :ivar size: bytes
    :ivar flags: transmission flags
    :ivar minimum: block sizes in bytes; 0 where the server says nothing
    :ivar contexts: (name, id) of the metadata contexts that were granted
    :ivar mode: how the server talks: "oldstyle", "export-name", "simple", "structured" or "extended"
    """

    size: int
    flags: int
    minimum: int = 0
    preferred: int = 0
    maximum: int = 0
    contexts: tuple[tuple[str, int], ...] = ()
    mode: str = "simple"
    tls: bool = False
    name: str = ""
    description: str = ""

    @property
    def structured(self) -> bool:
        return self.mode in ("structured", "extended")

    @property
    def extended(self) -> bool:
        return self.mode == "extended"

    def context(self, name: str) -> int | None:
        """The id of context ``name``; ``None`` if it was not granted."""
        return dict(self.contexts).get(name)


class Export(NamedTuple):
    """One export of a server's list.

    :ivar info: what INFO says; ``None`` if the server has no INFO, or refuses it for this export
    :ivar contexts: names of the metadata contexts it has
    """

    name: str
    description: str = ""
    info: Negotiated | None = None
    contexts: tuple[str, ...] = ()


class ClientNegotiation:
    """One conversation: send :meth:`take_outgoing`, then do what ``wanted`` says, until ``done``.

    :ivar wanted: bytes to be handed to :meth:`receive`; 0: start TLS, then call :meth:`tls_started`
    :ivar result: a :class:`Negotiated` or a list of :class:`Export`, once ``done``
    :param script: made by :func:`choose_export` or :func:`list_all`
    """

    def __init__(self, script: Conversation) -> None:
        self._script = script
        self.done = False
        self.result: Negotiated | list[Export] | None = None
        self.wanted = 0
        self._steps = script.steps()
        self._advance(None)

    def _advance(self, data: bytes | None) -> None:
        try:
            self.wanted = next(self._steps) if data is None else self._steps.send(data)
        except StopIteration as end:
            self.done, self.result, self.wanted = True, end.value, 0

    def take_outgoing(self) -> bytes:
        """What is to be sent now."""
        data = bytes(self._script.outgoing)
        self._script.outgoing.clear()
        return data

    def receive(self, data: bytes) -> None:
        """:param data: exactly ``wanted`` bytes

        :raises ByreError: the server refuses what is asked, or breaks the protocol
        """
        if len(data) != self.wanted or self.done:
            raise ValueError(f"{len(data)} bytes given, {self.wanted} wanted")
        self._advance(data)

    def tls_started(self) -> None:
        self._advance(b"")

    def closed(self) -> ByreError:
        """What it means that the server closed the connection now."""
        return ProtocolError(f"the server closed the connection {self._script.phase}")


# -- the conversation -----------------------------------------------------------------------------


class Conversation:
    """What both purposes, choosing an export and listing all, have in common.

    :ivar phase: what goes on, for messages
    """

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes
        self.outgoing = bytearray()
        self.phase = "before it said a word"
        self.mode = "simple"
        self.tls = False
        self.no_zeroes = False
        self.received = 0

    def steps(self) -> Script[Negotiated | list[Export]]:
        raise NotImplementedError

    def _greeting(self) -> Script[Negotiated | None]:
        """Both greetings up to the options; an oldstyle server has said all there is then."""
        magic = yield 16
        if magic[:8] != handshake.INIT_MAGIC:
            raise ProtocolError(f"this is no NBD server: it begins with {magic[:8]!r}")
        self.phase = "in its greeting"
        if magic[8:] == handshake.OLDSTYLE_MAGIC.to_bytes(8, "big"):
            return (yield from self._oldstyle())
        if magic[8:] != handshake.OPTION_MAGIC:
            raise ProtocolError(f"unknown kind of NBD server: {magic[8:]!r}")
        flags = int.from_bytes((yield 2), "big")
        self.no_zeroes = bool(flags & handshake.FLAG_NO_ZEROES)
        answer = flags & (handshake.FLAG_FIXED_NEWSTYLE | handshake.FLAG_NO_ZEROES)
        self.outgoing += answer.to_bytes(4, "big")
        if not flags & handshake.FLAG_FIXED_NEWSTYLE:
            self.mode = "export-name"
        return None

    def _oldstyle(self) -> Script[Negotiated]:
        """The first protocol: one export, no name, no options."""
        size, flags = struct.unpack(">QI", (yield 12))
        yield 124
        self._refuse_plain("it speaks the oldstyle protocol")
        return self._checked(Negotiated(size, flags & 0xFFFF, mode="oldstyle"))

    def _refuse_plain(self, why: str) -> None:
        if self.wishes.tls == "require":
            raise AccessDenied(f"TLS is demanded, but the server cannot: {why}")

    def _checked(self, found: Negotiated) -> Negotiated:
        """:raises ProtocolError: sizes that cannot be"""
        if found.size > SIZE_LIMIT:
            raise ProtocolError(f"the server announces a size of {found.size} bytes, possible are {SIZE_LIMIT}")
        if found.minimum and found.size % found.minimum:
            raise ProtocolError(f"the size {found.size} is no multiple of the minimum block size {found.minimum}")
        return found._replace(tls=self.tls)

    # -- options ----------------------------------------------------------------------------------

    def _ask(self, option: int, data: bytes = b"") -> None:
        self.phase = f"instead of answering {_NAMES[option]}"
        self.outgoing += handshake.encode_option(option, data)

    def _reply(self, option: int) -> Script[tuple[int, bytes]]:
        """(kind, data) of the next reply to ``option``."""
        head = handshake.decode_option_reply((yield handshake.OPTION_REPLY_SIZE))
        if head.option != option:
            raise ProtocolError(f"a reply to option {head.option} comes where {_NAMES[option]} was asked")
        if head.length > handshake.MAX_OPTION:
            raise ProtocolError(
                f"a reply to {_NAMES[option]} has {head.length} bytes, allowed are {handshake.MAX_OPTION}"
            )
        self.received += head.length
        return head.kind, (yield head.length) if head.length else b""

    def _switch(self, option: int) -> Script[bool]:
        """Ask for something that is either granted or not; whether it was."""
        self._ask(option)
        kind, data = yield from self._reply(option)
        if kind == handshake.REP_ACK:
            if data:
                raise ProtocolError(f"the acknowledgement of {_NAMES[option]} has data")
            return True
        if not kind & handshake.REP_FLAG_ERROR:
            raise ProtocolError(f"unexpected reply {kind} to {_NAMES[option]}")
        if kind == handshake.REP_ERR_TLS_REQD:
            raise refusal(option, kind, data)
        return False

    def _secure(self) -> Script[None]:
        """TLS, before anything else is said; what the server said so far was only its greeting."""
        if self.wishes.tls == "off":
            return
        if self.mode == "export-name":
            self._refuse_plain("it knows no options")
            return
        self._ask(handshake.OPT_STARTTLS)
        kind, data = yield from self._reply(handshake.OPT_STARTTLS)
        if kind != handshake.REP_ACK:
            if not kind & handshake.REP_FLAG_ERROR:
                raise ProtocolError(f"unexpected reply {kind} to STARTTLS")
            self._refuse_plain(f"it answers {_said(data) or _kind_name(kind)}")
            return
        if data:
            raise ProtocolError("the acknowledgement of STARTTLS has data")
        self.phase = "before TLS was set up"
        yield _START_TLS
        self.tls = True

    def _headers(self) -> Script[None]:
        """Extended headers if possible, else structured replies."""
        if self.wishes.extended and (yield from self._switch(handshake.OPT_EXTENDED_HEADERS)):
            self.mode = "extended"
        elif self.wishes.structured and (yield from self._switch(handshake.OPT_STRUCTURED_REPLY)):
            self.mode = "structured"

    def _contexts(self, option: int, name: str, queries: tuple[str, ...]) -> Script[tuple[tuple[str, int], ...]]:
        """(name, id) of the contexts the server has; none if it knows nothing of contexts or of the export."""
        texts = [wanted.encode() for wanted in (name, *queries)]
        parts = [len(text).to_bytes(4, "big") + text for text in texts]
        self._ask(option, parts[0] + len(queries).to_bytes(4, "big") + b"".join(parts[1:]))
        found: list[tuple[str, int]] = []
        while True:
            kind, data = yield from self._reply(option)
            if kind == handshake.REP_ACK:
                return tuple(found)
            if kind & handshake.REP_FLAG_ERROR:
                return ()
            if kind != handshake.REP_META_CONTEXT:
                raise ProtocolError(f"unexpected reply {kind} to {_NAMES[option]}")
            number, context = handshake.decode_meta_context(data)
            if len(found) == REPLY_LIMIT:
                raise ProtocolError(f"more than {REPLY_LIMIT} replies to {_NAMES[option]}")
            unasked = context not in queries or any(context == seen or number == i for seen, i in found)
            if option == handshake.OPT_SET_META_CONTEXT and unasked:
                raise ProtocolError(f"the server grants metadata context {context!r} ({number}) unasked or twice")
            found.append((context, number))

    def _details(self, option: int, name: str) -> Script[Negotiated | None]:
        """GO or INFO; ``None`` if the server does not know the option.

        :raises ByreError: it refuses this export
        """
        raw = name.encode(errors="surrogateescape")
        wanted = (handshake.INFO_NAME, handshake.INFO_DESCRIPTION, handshake.INFO_BLOCK_SIZE)
        self._ask(option, struct.pack(f">I{len(raw)}sH3H", len(raw), raw, len(wanted), *wanted))
        found: Negotiated | None = None
        sizes, texts = (0, 0, 0), {handshake.INFO_NAME: "", handshake.INFO_DESCRIPTION: ""}
        for _ in range(REPLY_LIMIT):
            kind, data = yield from self._reply(option)
            if kind == handshake.REP_ACK:
                if found is None:
                    raise ProtocolError(f"{_NAMES[option]} is acknowledged without export information")
                return self._checked(found._replace(minimum=sizes[0], preferred=sizes[1], maximum=sizes[2],
                                                    name=texts[handshake.INFO_NAME],
                                                    description=texts[handshake.INFO_DESCRIPTION]))  # fmt: skip
            if kind == handshake.REP_ERR_UNSUP:
                return None
            if kind & handshake.REP_FLAG_ERROR:
                raise refusal(option, kind, data, name)
            if kind != handshake.REP_INFO or len(data) < 2:
                raise ProtocolError(f"unexpected reply {kind} of {len(data)} bytes to {_NAMES[option]}")
            what = int.from_bytes(data[:2], "big")
            if what == handshake.INFO_EXPORT:
                found = Negotiated(*handshake.decode_export_info(data), mode=self.mode)
            elif what == handshake.INFO_BLOCK_SIZE:
                sizes = handshake.decode_block_sizes(data)
            elif what in texts:
                texts[what] = handshake.text(data[2 : 2 + wire.MAX_STRING])
        raise ProtocolError(f"more than {REPLY_LIMIT} replies to {_NAMES[option]}")


class _Choose(Conversation):
    """To the transmission phase of one export."""

    def steps(self) -> Script[Negotiated | list[Export]]:
        found = yield from self._greeting()
        if found is not None:
            if self.wishes.export:
                raise NotFound(f"the server speaks the oldstyle protocol, which has no export {self.wishes.export!r}")
            return found
        yield from self._secure()
        contexts: tuple[tuple[str, int], ...] = ()
        if self.mode != "export-name":
            yield from self._headers()
            if self.mode != "simple" and self.wishes.contexts:
                option = handshake.OPT_SET_META_CONTEXT
                contexts = yield from self._contexts(option, self.wishes.export, self.wishes.contexts)
            found = yield from self._details(handshake.OPT_GO, self.wishes.export)
        if found is None:
            found = yield from self._by_name()
        return found._replace(contexts=contexts)

    def _by_name(self) -> Script[Negotiated]:
        """EXPORT_NAME, which has no way to say no but to hang up."""
        self._ask(handshake.OPT_EXPORT_NAME, self.wishes.export.encode(errors="surrogateescape"))
        self.phase = f"when asked for export {self.wishes.export!r}: it may not have it"
        size, flags = struct.unpack(">QH", (yield 10))
        if not self.no_zeroes:
            yield 124
        return self._checked(Negotiated(size, flags, mode=self.mode))


class _List(Conversation):
    """All exports with what INFO and LIST_META_CONTEXT say about them."""

    def steps(self) -> Script[Negotiated | list[Export]]:
        found = yield from self._greeting()
        if found is not None:
            return [Export("", info=found)]
        yield from self._secure()
        if self.mode == "export-name":
            raise NotSupported("the server cannot list its exports")
        yield from self._headers()
        exports = yield from self._names()
        with_info = True
        for index, export in enumerate(exports):
            if with_info:
                try:
                    info = yield from self._details(handshake.OPT_INFO, export.name)
                except ProtocolError:
                    raise
                except ByreError:
                    continue  # refused for this one
                with_info = info is not None
                contexts: tuple[tuple[str, int], ...] = ()
                if info is not None and self.mode != "simple":
                    contexts = yield from self._contexts(handshake.OPT_LIST_META_CONTEXT, export.name, ())
                exports[index] = self._described(export, info, contexts)
            if self.received > LIST_LIMIT:
                raise ProtocolError(f"the server says more than {LIST_LIMIT} bytes about its exports")
        self.outgoing += handshake.encode_option(handshake.OPT_ABORT)  # goodbye; the answer is not waited for
        return exports

    @staticmethod
    def _described(export: Export, info: Negotiated | None, contexts: tuple[tuple[str, int], ...]) -> Export:
        description = export.description or (info.description if info else "")
        return Export(export.name, description, info, tuple(name for name, _ in contexts))

    def _names(self) -> Script[list[Export]]:
        self._ask(handshake.OPT_LIST)
        exports: list[Export] = []
        while True:
            kind, data = yield from self._reply(handshake.OPT_LIST)
            if kind == handshake.REP_ACK:
                return exports
            if kind & handshake.REP_FLAG_ERROR:
                raise refusal(handshake.OPT_LIST, kind, data)
            if kind != handshake.REP_SERVER:
                raise ProtocolError(f"unexpected reply {kind} to LIST")
            if len(exports) == EXPORT_LIMIT or self.received > LIST_LIMIT:
                raise ProtocolError(f"the list of exports has more than {EXPORT_LIMIT} entries or {LIST_LIMIT} bytes")
            exports.append(Export(*handshake.decode_server_entry(data)))


def choose_export(wishes: Wishes) -> ClientNegotiation:
    """A conversation that ends in the transmission phase of ``wishes.export``; its result is a :class:`Negotiated`.

    :raises InvalidArgument: the export's name or a context's is too long
    """
    for name in (wishes.export, *wishes.contexts):
        if len(name.encode(errors="surrogateescape")) > wire.MAX_STRING:
            raise InvalidArgument(f"the name {name[:40]!r}... is longer than {wire.MAX_STRING} bytes")
    return ClientNegotiation(_Choose(wishes))


def list_all(wishes: Wishes) -> ClientNegotiation:
    """A conversation whose result is the list of :class:`Export`."""
    return ClientNegotiation(_List(wishes))


# -- refusals -------------------------------------------------------------------------------------


def refusal(option: int, kind: int, data: bytes, export: str = "") -> ByreError:
    """What a negative reply means, in words."""
    said = _said(data)
    tail = f"; the server says: {said}" if said else ""
    if kind == handshake.REP_ERR_UNKNOWN:
        return NotFound(f"the server has no export {export!r}{tail}")
    if kind == handshake.REP_ERR_TLS_REQD:
        return AccessDenied(f"the server demands TLS{tail}", hint="use nbds:// or tls-creds")
    if kind == handshake.REP_ERR_POLICY:
        return AccessDenied(f"the server forbids {_NAMES[option]}{tail}")
    if kind in (handshake.REP_ERR_UNSUP, handshake.REP_ERR_PLATFORM):
        return NotSupported(f"the server does not support {_NAMES[option]}{tail}")
    return ProtocolError(f"the server refuses {_NAMES[option]}: {_kind_name(kind)}{tail}")


def _said(data: bytes) -> str:
    return printable(data[: wire.MAX_STRING].decode(errors="replace"))


def _kind_name(kind: int) -> str:
    names = {
        handshake.REP_ERR_UNSUP: "not supported",
        handshake.REP_ERR_POLICY: "forbidden by policy",
        handshake.REP_ERR_INVALID: "invalid request",
        handshake.REP_ERR_PLATFORM: "not supported on its platform",
        handshake.REP_ERR_SHUTDOWN: "it is shutting down",
        handshake.REP_ERR_BLOCK_SIZE_REQD: "block sizes must be honoured",
        handshake.REP_ERR_TOO_BIG: "the request is too big",
        handshake.REP_ERR_EXT_HEADER_REQD: "extended headers are needed",
    }
    return names.get(kind, f"error {kind & ~handshake.REP_FLAG_ERROR}")
