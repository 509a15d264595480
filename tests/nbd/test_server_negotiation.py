"""The server's side of the handshake, without sockets: every option, every refusal, and whatever bytes may come."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byre.errors import ProtocolError
from byre.nbd import handshake, wire
from byre.nbd.server_negotiation import (
    TLS_OPTIONAL,
    TLS_REQUIRED,
    TLS_UNAVAILABLE,
    Agreement,
    ClientLeft,
    Negotiation,
    Offer,
    StartTls,
)
from support.nbd_talk import GREETING, named, queries

CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1")
DISK = Offer(
    "disk", "a disk", 1 << 20, wire.TRANSMISSION_HAS_FLAGS | wire.TRANSMISSION_FLUSH, (1, 4096, 1 << 25), CONTEXTS
)
EMPTY = Offer("", "", 512, wire.TRANSMISSION_HAS_FLAGS | wire.TRANSMISSION_READ_ONLY, (1, 4096, 1 << 25), CONTEXTS[:1])
MAX_MESSAGE = 4096


class Exports:
    """Two exports; ``full`` names one that takes no more clients."""

    def __init__(self, full: str = "none") -> None:
        self.full = full
        self.claimed: list[str] = []

    def all(self) -> list[Offer]:
        return [EMPTY, DISK]

    def find(self, name: str) -> Offer | None:
        return next((offer for offer in self.all() if offer.name == name), None)

    def claim(self, name: str) -> str:
        if name == self.full:
            return "too many clients"
        self.claimed.append(name)
        return ""


def started(tls: int = TLS_UNAVAILABLE, *, full: str = "none", flags: bytes = GREETING) -> Negotiation:
    negotiation = Negotiation(Exports(full), tls)
    assert negotiation.take() == b"NBDMAGICIHAVEOPT\0\3"
    negotiation.feed(flags)
    assert negotiation.step() is True
    return negotiation


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, kind, data) of each reply."""
    found = []
    while data:
        head = handshake.decode_option_reply(data[:20])
        found.append((head.option, head.kind, data[20 : 20 + head.length]))
        assert len(data) >= 20 + head.length
        data = data[20 + head.length :]
    return found


def answer(negotiation: Negotiation, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    """(kind, data) of the replies to one option that does not end the handshake."""
    negotiation.feed(handshake.encode_option(option, data))
    assert negotiation.step() is True
    found = replies(negotiation.take())
    assert all(reply[0] == option for reply in found)
    return [reply[1:] for reply in found]


def refused(negotiation: Negotiation, option: int, data: bytes = b"") -> tuple[int, str]:
    """(kind, text) of a refusal."""
    ((kind, text),) = answer(negotiation, option, data)
    assert kind & handshake.REP_FLAG_ERROR
    assert len(text) <= MAX_MESSAGE
    return kind, text.decode()


class TestOptions:
    def test_list(self) -> None:
        found = answer(started(), handshake.OPT_LIST)
        assert [handshake.decode_server_entry(data) for kind, data in found[:-1]] == [("", ""), ("disk", "a disk")]
        assert found[-1] == (handshake.REP_ACK, b"")

    def test_list_takes_no_data(self) -> None:
        assert refused(started(), handshake.OPT_LIST, b"x")[0] == handshake.REP_ERR_INVALID

    def test_an_unknown_option_is_refused_and_the_next_one_served(self) -> None:
        negotiation = started()
        assert refused(negotiation, 4711, b"whatever")[0] == handshake.REP_ERR_UNSUP
        assert answer(negotiation, handshake.OPT_LIST)[-1] == (handshake.REP_ACK, b"")

    def test_abort(self) -> None:
        negotiation = started()
        negotiation.feed(handshake.encode_option(handshake.OPT_ABORT))
        assert isinstance(negotiation.step(), ClientLeft)
        assert replies(negotiation.take()) == [(handshake.OPT_ABORT, handshake.REP_ACK, b"")]

    @pytest.mark.parametrize("option", [handshake.OPT_INFO, handshake.OPT_GO])
    def test_info_and_go_say_what_was_asked_for_and_what_matters(self, option: int) -> None:
        negotiation = started()
        negotiation.feed(
            handshake.encode_option(option, named("disk", handshake.INFO_NAME, handshake.INFO_DESCRIPTION, 77))
        )
        event = negotiation.step()
        infos = [data for _, kind, data in replies(negotiation.take()) if kind == handshake.REP_INFO]
        assert infos == [
            b"\0\1disk", b"\0\2a disk", handshake.encode_block_sizes(1, 4096, 1 << 25),
            handshake.encode_export_info(handshake.ExportInfo(1 << 20, DISK.flags)),
        ]  # fmt: skip
        if option == handshake.OPT_INFO:
            assert event is True
        else:
            assert event == Agreement(DISK, False, False, (), b"")

    def test_go_for_an_export_that_is_not_there(self) -> None:
        kind, text = refused(started(), handshake.OPT_GO, named("x" * 4096))
        assert kind == handshake.REP_ERR_UNKNOWN
        assert len(text) < 200

    def test_go_for_an_export_that_is_full(self) -> None:
        negotiation = started(full="disk")
        assert refused(negotiation, handshake.OPT_GO, named("disk"))[0] == handshake.REP_ERR_POLICY
        negotiation.feed(handshake.encode_option(handshake.OPT_GO, named("")))
        assert isinstance(negotiation.step(), Agreement)

    @pytest.mark.parametrize(
        "data",
        [b"", b"\0\0\0\5disk", struct.pack(">I", 5000) + bytes(5002), named("disk")[:-1], named("disk") + b"\0",
         named("di\0sk"), b"\0\0\0\2\xff\xfe\0\0", struct.pack(">I", 0) + b"\0\3\0\1"],
    )  # fmt: skip
    def test_malformed_go(self, data: bytes) -> None:
        assert refused(started(), handshake.OPT_GO, data)[0] == handshake.REP_ERR_INVALID

    def test_go_hands_over_what_was_sent_ahead(self) -> None:
        negotiation = started()
        negotiation.feed(handshake.encode_option(handshake.OPT_GO, named("disk")) + b"the first request")
        event = negotiation.step()
        assert isinstance(event, Agreement)
        assert event.rest == b"the first request"

    @pytest.mark.parametrize(("flags", "padding"), [(3, 0), (1, 124), (0, 124)])
    def test_export_name(self, flags: int, padding: int) -> None:
        negotiation = started(flags=struct.pack(">I", flags))
        negotiation.feed(handshake.encode_option(handshake.OPT_EXPORT_NAME, b"disk"))
        event = negotiation.step()
        assert isinstance(event, Agreement)
        assert negotiation.take() == struct.pack(">QH", 1 << 20, DISK.flags) + bytes(padding)

    @pytest.mark.parametrize("name", [b"other", b"x" * 4097, b"\xff"])
    def test_export_name_has_no_answer_but_the_end(self, name: bytes) -> None:
        negotiation = started()
        negotiation.feed(handshake.encode_option(handshake.OPT_EXPORT_NAME, name))
        assert isinstance(negotiation.step(), ClientLeft)
        assert negotiation.take() == b""

    def test_clients_without_fixed_newstyle_know_export_name_only(self) -> None:
        assert refused(started(flags=bytes(4)), handshake.OPT_LIST)[0] == handshake.REP_ERR_UNSUP


class TestReplies:
    def test_structured_replies_once(self) -> None:
        negotiation = started()
        assert answer(negotiation, handshake.OPT_STRUCTURED_REPLY) == [(handshake.REP_ACK, b"")]
        assert refused(negotiation, handshake.OPT_STRUCTURED_REPLY)[0] == handshake.REP_ERR_INVALID
        assert answer(negotiation, handshake.OPT_EXTENDED_HEADERS) == [(handshake.REP_ACK, b"")]

    def test_extended_headers_replace_structured_replies(self) -> None:
        negotiation = started()
        assert answer(negotiation, handshake.OPT_EXTENDED_HEADERS) == [(handshake.REP_ACK, b"")]
        assert refused(negotiation, handshake.OPT_EXTENDED_HEADERS)[0] == handshake.REP_ERR_INVALID
        assert refused(negotiation, handshake.OPT_STRUCTURED_REPLY)[0] == handshake.REP_ERR_EXT_HEADER_REQD

    @pytest.mark.parametrize(
        ("option", "flags"),
        [(handshake.OPT_STRUCTURED_REPLY, wire.TRANSMISSION_DF),
         (handshake.OPT_EXTENDED_HEADERS, wire.TRANSMISSION_DF | wire.TRANSMISSION_BLOCK_STATUS_PAYLOAD)],
    )  # fmt: skip
    def test_flags_that_depend_on_them(self, option: int, flags: int) -> None:
        negotiation = started()
        answer(negotiation, option)
        found = answer(negotiation, handshake.OPT_INFO, named("disk"))
        assert (
            handshake.REP_INFO,
            handshake.encode_export_info(handshake.ExportInfo(1 << 20, DISK.flags | flags)),
        ) in found

    @pytest.mark.parametrize("option", [handshake.OPT_STRUCTURED_REPLY, handshake.OPT_EXTENDED_HEADERS])
    def test_they_take_no_data(self, option: int) -> None:
        assert refused(started(), option, b"x")[0] == handshake.REP_ERR_INVALID


class TestContexts:
    @pytest.fixture
    def negotiation(self) -> Negotiation:
        negotiation = started()
        answer(negotiation, handshake.OPT_STRUCTURED_REPLY)
        return negotiation

    @pytest.mark.parametrize(
        ("words", "found"),
        [((), CONTEXTS), (("base:",), CONTEXTS[:1]), (("qemu:",), CONTEXTS[1:]),
         (("qemu:dirty-bitmap:",), CONTEXTS[2:]),
         (("base:allocation", "qemu:dirty-bitmap:b1", "x:y"), (CONTEXTS[0], CONTEXTS[3])), (("nobody:",), ())],
    )  # fmt: skip
    def test_list(self, negotiation: Negotiation, words: tuple[str, ...], found: tuple[str, ...]) -> None:
        said = answer(negotiation, handshake.OPT_LIST_META_CONTEXT, queries("disk", *words))
        assert [handshake.decode_meta_context(data) for _, data in said[:-1]] == [(0, name) for name in found]

    @pytest.mark.parametrize(
        ("words", "found"),
        [((), ()), (("base:",), ()), (("base:allocation", "qemu:dirty-bitmap:b0", "unknown"), (0, 2)),
         (("base:allocation", "base:allocation"), (0,))],
    )  # fmt: skip
    def test_set(self, negotiation: Negotiation, words: tuple[str, ...], found: tuple[int, ...]) -> None:
        said = answer(negotiation, handshake.OPT_SET_META_CONTEXT, queries("disk", *words))
        expected = tuple((number, CONTEXTS[number]) for number in found)
        assert tuple(handshake.decode_meta_context(data) for _, data in said[:-1]) == expected
        negotiation.feed(handshake.encode_option(handshake.OPT_GO, named("disk")))
        event = negotiation.step()
        assert isinstance(event, Agreement)
        assert event.contexts == expected

    def test_the_last_set_counts_even_if_it_is_refused(self, negotiation: Negotiation) -> None:
        answer(negotiation, handshake.OPT_SET_META_CONTEXT, queries("disk", "base:allocation"))
        assert (
            refused(negotiation, handshake.OPT_SET_META_CONTEXT, queries("other", "base:allocation"))[0]
            == handshake.REP_ERR_UNKNOWN
        )
        negotiation.feed(handshake.encode_option(handshake.OPT_GO, named("disk")))
        event = negotiation.step()
        assert isinstance(event, Agreement)
        assert event.contexts == ()

    def test_contexts_of_another_export_do_not_count(self, negotiation: Negotiation) -> None:
        answer(negotiation, handshake.OPT_SET_META_CONTEXT, queries("", "base:allocation"))
        negotiation.feed(handshake.encode_option(handshake.OPT_GO, named("disk")))
        event = negotiation.step()
        assert isinstance(event, Agreement)
        assert event.contexts == ()

    @pytest.mark.parametrize(
        ("contexts_of", "option", "offered"),
        [(None, handshake.OPT_GO, False), (None, handshake.OPT_EXPORT_NAME, False), (None, handshake.OPT_INFO, True),
         ("", handshake.OPT_GO, False), ("disk", handshake.OPT_GO, True), ("disk", handshake.OPT_EXPORT_NAME, True)],
    )  # fmt: skip
    def test_filters_are_offered_to_those_who_chose_contexts(
        self, contexts_of: str | None, option: int, offered: bool
    ) -> None:
        negotiation = started()
        answer(negotiation, handshake.OPT_EXTENDED_HEADERS)
        if contexts_of is not None:
            answer(negotiation, handshake.OPT_SET_META_CONTEXT, queries(contexts_of, "base:allocation"))
        negotiation.feed(
            handshake.encode_option(option, b"disk" if option == handshake.OPT_EXPORT_NAME else named("disk"))
        )
        negotiation.step()
        said = negotiation.take()
        if option != handshake.OPT_EXPORT_NAME:
            said = next(data for _, kind, data in replies(said) if kind == handshake.REP_INFO and data[:2] == b"\0\0")
        flags = int.from_bytes(said[10:12] if option != handshake.OPT_EXPORT_NAME else said[8:10], "big")
        assert bool(flags & wire.TRANSMISSION_BLOCK_STATUS_PAYLOAD) is offered

    @pytest.mark.parametrize("option", [handshake.OPT_LIST_META_CONTEXT, handshake.OPT_SET_META_CONTEXT])
    def test_they_need_structured_replies(self, option: int) -> None:
        assert refused(started(), option, queries("disk"))[0] == handshake.REP_ERR_INVALID

    @pytest.mark.parametrize(
        "data", [b"", queries("disk", "a")[:-1], queries("disk") + b"x", queries("disk", "x" * 4097)]
    )
    def test_malformed(self, negotiation: Negotiation, data: bytes) -> None:
        assert refused(negotiation, handshake.OPT_SET_META_CONTEXT, data)[0] == handshake.REP_ERR_INVALID

    def test_as_many_queries_as_an_option_holds_take_no_time(self, negotiation: Negotiation) -> None:
        data = queries("disk", *("q" for _ in range((handshake.MAX_OPTION - 64) // 5)))
        before = time.monotonic()
        answer(negotiation, handshake.OPT_LIST_META_CONTEXT, data)
        assert time.monotonic() - before < 1


class TestTls:
    def test_nothing_before_it_where_it_is_required(self) -> None:
        negotiation = started(TLS_REQUIRED)
        for option in (
            handshake.OPT_LIST,
            handshake.OPT_GO,
            handshake.OPT_STRUCTURED_REPLY,
            handshake.OPT_LIST_META_CONTEXT,
            99,
        ):
            assert refused(negotiation, option)[0] == handshake.REP_ERR_TLS_REQD
        negotiation.feed(handshake.encode_option(handshake.OPT_EXPORT_NAME, b"disk"))
        assert isinstance(negotiation.step(), ClientLeft)
        assert negotiation.take() == b""

    def test_abort_is_always_allowed(self) -> None:
        negotiation = started(TLS_REQUIRED)
        negotiation.feed(handshake.encode_option(handshake.OPT_ABORT))
        assert isinstance(negotiation.step(), ClientLeft)

    @pytest.mark.parametrize("mode", [TLS_REQUIRED, TLS_OPTIONAL])
    def test_what_was_said_in_the_clear_is_forgotten(self, mode: int) -> None:
        negotiation = started(mode)
        if mode == TLS_OPTIONAL:
            answer(negotiation, handshake.OPT_STRUCTURED_REPLY)
            answer(negotiation, handshake.OPT_SET_META_CONTEXT, queries("disk", "base:allocation"))
        # A request injected behind STARTTLS must not be served once TLS is there.
        negotiation.feed(
            handshake.encode_option(handshake.OPT_STARTTLS) + handshake.encode_option(handshake.OPT_GO, named("disk"))
        )
        assert isinstance(negotiation.step(), StartTls)
        assert replies(negotiation.take()) == [(handshake.OPT_STARTTLS, handshake.REP_ACK, b"")]
        negotiation.tls_started()
        assert negotiation.step() is False
        assert refused(negotiation, handshake.OPT_LIST_META_CONTEXT, queries("disk"))[0] == handshake.REP_ERR_INVALID
        assert refused(negotiation, handshake.OPT_STARTTLS)[0] == handshake.REP_ERR_INVALID
        negotiation.feed(handshake.encode_option(handshake.OPT_GO, named("disk")))
        assert negotiation.step() == Agreement(DISK, False, False, (), b"")

    def test_where_there_is_none(self) -> None:
        negotiation = started()
        assert refused(negotiation, handshake.OPT_STARTTLS)[0] == handshake.REP_ERR_POLICY
        assert refused(negotiation, handshake.OPT_STARTTLS, b"x")[0] == handshake.REP_ERR_INVALID


class TestHostile:
    def test_wrong_magic(self) -> None:
        negotiation = started()
        negotiation.feed(b"IWANTOPT" + bytes(8))
        with pytest.raises(ProtocolError):
            negotiation.step()

    def test_unknown_client_flags(self) -> None:
        negotiation = Negotiation(Exports())
        negotiation.feed(b"\0\0\0\7")
        with pytest.raises(ProtocolError):
            negotiation.step()

    @pytest.mark.parametrize("length", [handshake.MAX_OPTION + 1, (1 << 32) - 1])
    def test_an_option_that_is_too_long_ends_it_before_it_arrives(self, length: int) -> None:
        negotiation = started()
        negotiation.feed(struct.pack(">8sII", handshake.OPTION_MAGIC, handshake.OPT_LIST, length))
        with pytest.raises(ProtocolError):
            negotiation.step()

    def test_many_options_at_once_are_answered_one_by_one(self) -> None:
        negotiation = started()
        negotiation.feed(handshake.encode_option(handshake.OPT_LIST) * 1000)
        for _ in range(1000):
            assert negotiation.step() is True
            assert len(negotiation.take()) < 200
        assert negotiation.step() is False


OPTIONS = st.sampled_from([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 1 << 31])
DATA = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda name: named(name), st.sampled_from(["", "disk", "x"])),
    st.builds(lambda name, words: queries(name, *words), st.sampled_from(["", "disk"]),
              st.lists(st.sampled_from([*CONTEXTS, "base:", "qemu:", "x"]), max_size=3)),
)  # fmt: skip
PARTS = st.one_of(st.builds(handshake.encode_option, OPTIONS, DATA), st.binary(max_size=30))


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(PARTS, max_size=12), tls=st.sampled_from([0, 1, 2]), cut=st.integers(1, 7), flags=st.integers(0, 3)
)
def test_whatever_comes_is_answered_or_ends_it(parts: list[bytes], tls: int, cut: int, flags: int) -> None:
    """All output is well-formed replies; before TLS is there, no agreement is made where TLS is required."""
    negotiation = Negotiation(Exports(), tls)
    negotiation.take()
    stream = struct.pack(">I", flags) + b"".join(parts)
    encrypted = False
    for start in range(0, len(stream), cut):
        negotiation.feed(stream[start : start + cut])
        while True:
            try:
                event = negotiation.step()
            except ProtocolError:
                return
            output = negotiation.take()
            if isinstance(event, Agreement):
                assert encrypted or tls != TLS_REQUIRED
                return
            replies(output)
            if isinstance(event, ClientLeft):
                return
            if isinstance(event, StartTls):
                encrypted = True
                negotiation.tls_started()
            elif not event:
                break
