"""The client's side of the handshake against scripts, against byre's own server side, and against noise."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre.errors import AccessDenied, ByreError, InvalidArgument, NotFound, NotSupported, ProtocolError
from byre.nbd import handshake, wire
from byre.nbd.client_negotiation import (
    EXPORT_LIMIT,
    ClientNegotiation,
    Negotiated,
    Wishes,
    choose_export,
    list_all,
)
from byre.nbd.server_negotiation import TLS_REQUIRED, TLS_UNAVAILABLE, Agreement, Negotiation, Offer

NEWSTYLE = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
FLAGS = wire.TRANSMISSION_HAS_FLAGS | wire.TRANSMISSION_FLUSH


class Offers:
    def __init__(self, *offers: Offer) -> None:
        self.offers = offers

    def all(self) -> Sequence[Offer]:
        return self.offers

    def find(self, name: str) -> Offer | None:
        return next((offer for offer in self.offers if offer.name == name), None)

    def claim(self, name: str) -> str:
        return "too many connections" if name == "full" else ""


OFFERS = Offers(
    Offer("", "the default", 1 << 20, FLAGS, (1, 4096, 32 << 20), ("base:allocation",)),
    Offer("disk", "", 3 << 30, FLAGS | wire.TRANSMISSION_MULTI_CONN, (512, 65536, 1 << 20),
          ("base:allocation", "qemu:dirty-bitmap:b", "qemu:allocation-depth")),
    Offer("full", "nobody more", 512, FLAGS, (1, 4096, 32 << 20), ()),
)  # fmt: skip


def converse(client: ClientNegotiation, server: Negotiation) -> Agreement | None:
    """Both sides in one thread until the client is done."""
    outbox = bytearray(server.take())
    agreement: Agreement | None = None
    while True:
        server.feed(client.take_outgoing())
        event: object = True
        while event is True:
            event = server.step()
        if isinstance(event, Agreement):
            agreement = event
        outbox += server.take()
        if client.done:
            assert not (isinstance(client.result, Negotiated) and outbox), "bytes of the handshake are left"
            return agreement
        if client.wanted == 0:
            server.tls_started()
            client.tls_started()
            continue
        assert len(outbox) >= client.wanted, "both wait"
        data = bytes(outbox[: client.wanted])
        del outbox[: len(data)]
        client.receive(data)


def chosen(wishes: Wishes, tls: int = TLS_UNAVAILABLE) -> tuple[Negotiated, Agreement]:
    client = choose_export(wishes)
    agreement = converse(client, Negotiation(OFFERS, tls))
    assert isinstance(client.result, Negotiated)
    assert agreement is not None
    return client.result, agreement


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("structured", [True, False])
def test_both_sides_agree(structured: bool, extended: bool) -> None:
    wishes = Wishes("disk", structured=structured, extended=extended)
    found, agreement = chosen(wishes)
    assert (found.size, found.minimum, found.preferred, found.maximum) == (3 << 30, 512, 65536, 1 << 20)
    assert found.flags & wire.TRANSMISSION_MULTI_CONN
    assert found.mode == ("extended" if extended else "structured" if structured else "simple")
    assert (agreement.structured, agreement.extended) == (found.structured, found.extended)
    assert dict(found.contexts) == {name: number for number, name in agreement.contexts}
    assert found.name == "disk"
    assert not found.tls


def test_contexts() -> None:
    found, _ = chosen(Wishes("disk", contexts=("qemu:dirty-bitmap:b", "none:such")))
    assert [name for name, _ in found.contexts] == ["qemu:dirty-bitmap:b"]
    assert found.context("none:such") is None
    assert chosen(Wishes("disk", contexts=()))[0].contexts == ()


def test_refusals() -> None:
    with pytest.raises(NotFound, match="no export 'absent'"):
        chosen(Wishes("absent"))
    with pytest.raises(AccessDenied, match="too many connections"):
        chosen(Wishes("full"))
    with pytest.raises(AccessDenied, match="demands TLS"):
        chosen(Wishes("disk"), TLS_REQUIRED)
    with pytest.raises(AccessDenied, match="TLS is demanded"):
        chosen(Wishes("disk", tls="require"))
    with pytest.raises(InvalidArgument, match="longer"):
        choose_export(Wishes("x" * 4097))


def test_tls_comes_before_any_word_about_exports() -> None:
    client = choose_export(Wishes("disk", tls="require"))
    server = Negotiation(OFFERS, TLS_REQUIRED)
    first = server.take()
    client.receive(first[:16])
    client.receive(first[16:18])
    server.feed(client.take_outgoing())
    assert b"disk" not in bytes(server._input)
    client = choose_export(Wishes("disk", tls="require"))
    converse(client, Negotiation(OFFERS, TLS_REQUIRED))
    assert isinstance(client.result, Negotiated)
    assert client.result.tls
    assert chosen(Wishes("disk", tls="allow"))[0].tls is False


def test_the_list() -> None:
    client = list_all(Wishes())
    converse(client, Negotiation(OFFERS))
    assert isinstance(client.result, list)
    assert [export.name for export in client.result] == ["", "disk", "full"]
    first, second, _ = client.result
    assert first.description == "the default"
    assert second.contexts == OFFERS.offers[1].contexts
    assert second.info is not None
    assert second.info.size == 3 << 30
    assert second.info.mode == "extended"


# -- scripts --------------------------------------------------------------------------------------


def play(client: ClientNegotiation, data: bytes) -> ClientNegotiation:
    """Give the client what a server says, whatever it sends."""
    while not client.done and client.wanted:
        if len(data) < client.wanted:
            raise client.closed()
        part, data = data[: client.wanted], data[client.wanted :]
        client.receive(part)
    return client


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return handshake.encode_option_reply(option, kind, data)


UNSUPPORTED = b"".join(
    reply(option, handshake.REP_ERR_UNSUP)
    for option in (handshake.OPT_EXTENDED_HEADERS, handshake.OPT_STRUCTURED_REPLY)
)
INFO = reply(handshake.OPT_GO, handshake.REP_INFO, handshake.encode_export_info(handshake.ExportInfo(4096, FLAGS)))
ACK = reply(handshake.OPT_GO, handshake.REP_ACK)


def test_oldstyle_servers() -> None:
    data = b"NBDMAGIC" + handshake.OLDSTYLE_MAGIC.to_bytes(8, "big") + struct.pack(">QI", 8 << 30, 0) + bytes(124)
    found = play(choose_export(Wishes()), data).result
    assert isinstance(found, Negotiated)
    assert (found.size, found.mode) == (8 << 30, "oldstyle")
    with pytest.raises(NotFound, match="oldstyle"):
        play(choose_export(Wishes("x")), data)
    with pytest.raises(AccessDenied, match="TLS"):
        play(choose_export(Wishes(tls="require")), data)
    listed = play(list_all(Wishes()), data).result
    assert isinstance(listed, list)
    assert [export.name for export in listed] == [""]


@pytest.mark.parametrize("zeroes", [True, False])
def test_servers_that_know_only_export_name(zeroes: bool) -> None:
    answer = struct.pack(">QH", 4096, FLAGS) + (bytes(124) if zeroes else b"")
    flags = 0 if zeroes else handshake.FLAG_NO_ZEROES
    start = b"NBDMAGICIHAVEOPT"
    for data in (
        start + struct.pack(">H", flags) + answer,
        start + struct.pack(">H", flags | handshake.FLAG_FIXED_NEWSTYLE) + UNSUPPORTED
        + reply(handshake.OPT_GO, handshake.REP_ERR_UNSUP) + answer,
    ):  # fmt: skip
        found = play(choose_export(Wishes("x")), data).result
        assert isinstance(found, Negotiated)
        assert (found.size, found.flags) == (4096, FLAGS)
    with pytest.raises(AccessDenied, match="TLS"):
        play(choose_export(Wishes(tls="require")), start + struct.pack(">H", flags) + answer)
    with pytest.raises(ProtocolError, match="may not have it"):
        play(choose_export(Wishes("x")), start + struct.pack(">H", flags))
    with pytest.raises(NotSupported, match="list"):
        play(list_all(Wishes()), start + struct.pack(">H", flags))


def info(data: bytes) -> bytes:
    return reply(handshake.OPT_GO, handshake.REP_INFO, data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 400 Bad", "no NBD server"),
        (b"NBDMAGIC12345678", "unknown kind"),
        (NEWSTYLE + b"x" * 20, "option reply begins"),
        (NEWSTYLE + reply(handshake.OPT_LIST, handshake.REP_ACK), "reply to option 3"),
        (NEWSTYLE + reply(handshake.OPT_EXTENDED_HEADERS, handshake.REP_ACK, b"x"), "has data"),
        (NEWSTYLE + reply(handshake.OPT_EXTENDED_HEADERS, handshake.REP_SERVER), "unexpected reply"),
        (NEWSTYLE + reply(handshake.OPT_EXTENDED_HEADERS, handshake.REP_ERR_UNSUP, bytes(70_000)), "allowed are"),
        (NEWSTYLE + UNSUPPORTED + ACK, "without export information"),
        (NEWSTYLE + UNSUPPORTED + INFO * 400, "more than"),
        (NEWSTYLE + UNSUPPORTED + info(b"\0"), "unexpected reply"),
        (NEWSTYLE + UNSUPPORTED + info(b"\0\0xx"), "export information"),
        (NEWSTYLE + UNSUPPORTED + info(struct.pack(">HIII", 3, 3, 4096, 8192)), "power of two"),
        (NEWSTYLE + UNSUPPORTED + info(struct.pack(">HIII", 3, 8192, 8192, 8192)) + INFO + ACK, "no multiple"),
        (NEWSTYLE + UNSUPPORTED + info(struct.pack(">HQH", 0, 1 << 63, 1)) + ACK, "size of"),
        (NEWSTYLE + UNSUPPORTED + reply(handshake.OPT_GO, handshake.REP_ERR_SHUTDOWN, b"bye\x1b"), "shutting down"),
    ],
)  # fmt: skip
def test_what_breaks_the_protocol(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why) as caught:
        play(choose_export(Wishes()), data)
    assert str(caught.value).isprintable()


def meta(*granted: tuple[int, str]) -> bytes:
    start = NEWSTYLE + reply(handshake.OPT_EXTENDED_HEADERS, handshake.REP_ACK)
    option = handshake.OPT_SET_META_CONTEXT
    return start + b"".join(
        reply(option, handshake.REP_META_CONTEXT, handshake.encode_meta_context(number, name))
        for number, name in granted
    )


@pytest.mark.parametrize("data", [
    meta((1, "other:context")), meta((1, "base:allocation"), (2, "base:allocation")), meta((1, "base:allocation")) * 2,
])  # fmt: skip
def test_contexts_nobody_asked_for(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        play(choose_export(Wishes()), data)


def test_lists_without_end() -> None:
    entry = reply(handshake.OPT_LIST, handshake.REP_SERVER, handshake.encode_server_entry("x"))
    with pytest.raises(ProtocolError, match="more than"):
        play(list_all(Wishes()), NEWSTYLE + UNSUPPORTED + entry * (EXPORT_LIMIT + 1))
    long = reply(handshake.OPT_LIST, handshake.REP_SERVER, handshake.encode_server_entry("x" * 4096, "d" * 50_000))
    with pytest.raises(ProtocolError, match="more than"):
        play(list_all(Wishes()), NEWSTYLE + UNSUPPORTED + long * 400)


_kinds = st.sampled_from((
    handshake.REP_ACK, handshake.REP_INFO, handshake.REP_SERVER, handshake.REP_META_CONTEXT, handshake.REP_ERR_UNSUP,
    handshake.REP_ERR_POLICY, handshake.REP_ERR_INVALID, 77,
))  # fmt: skip
_payloads = st.one_of(
    st.just(b""), st.binary(max_size=40), st.just(handshake.encode_export_info(handshake.ExportInfo(1024, 1))),
    st.just(handshake.encode_meta_context(1, "base:allocation")), st.just(handshake.encode_server_entry("a", "b")),
    st.just(handshake.encode_block_sizes(1, 4096, 1 << 20)),
)  # fmt: skip


@given(st.booleans(), st.sampled_from(("off", "allow", "require")), st.lists(st.tuples(_kinds, _payloads), max_size=30),
       st.binary(max_size=60), st.sampled_from((0, 1, 2, 3, 0xFFFF)))  # fmt: skip
def test_any_server_ends_in_a_result_or_an_error(
    listing: bool, tls: str, answers: list[tuple[int, bytes]], noise: bytes, flags: int
) -> None:
    """Replies of any kind to the option that was asked last, then noise."""
    make: Callable[[Wishes], ClientNegotiation] = list_all if listing else choose_export
    client = make(Wishes(tls=tls))
    stream = bytearray(NEWSTYLE[:16] + struct.pack(">H", flags))
    left = list(answers)
    try:
        for _ in range(2000):
            sent = client.take_outgoing()
            if client.done:
                return
            if client.wanted == 0:
                client.tls_started()
                continue
            if (len(sent) >= 16 and sent[:8] == handshake.OPTION_MAGIC) or sent[4:12] == handshake.OPTION_MAGIC:
                at = 0 if sent[:8] == handshake.OPTION_MAGIC else 4
                option = int.from_bytes(sent[at + 8 : at + 12], "big")
                for kind, data in left[:4]:
                    stream += reply(option, kind, data)
                del left[:4]
                stream += b"" if left else noise
            if len(stream) < client.wanted:
                raise client.closed()
            data = bytes(stream[: client.wanted])
            del stream[: len(data)]
            client.receive(data)
    except ByreError:
        return
    raise AssertionError("no end")
