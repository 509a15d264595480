"""Names of NBD exports: URIs of the specification, older names, and the names that are shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre.errors import InvalidArgument
from byre.nbd.uri import SCHEMES, Address, Target, parse, show


@pytest.mark.parametrize(
    ("name", "export"),
    [
        ("nbd://example.com/disk", "disk"),
        ("nbd+unix:///disk?socket=sock", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/hello%20world", "hello world"),
        ("nbd://example.com/caf%C3%A9", "café"),
        ("nbd://example.com/a?", "a"),
        ("nbd:unix:/tmp/s:exportname=a b", "a b"),
        ("nbd:unix:/tmp/s:exportname=", ""),
        ("nbd:localhost:10:exportname=/x", "/x"),
    ],
)
def test_export_names(name: str, export: str) -> None:
    assert parse(name).export == export


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("nbd://example.com:10810/x", Address("inet", host="example.com", port=10810)),
        ("nbd+tcp://example.com", Address("inet", host="example.com", port=10809)),
        ("NBD://example.com", Address("inet", host="example.com", port=10809)),
        ("nbd://[::1]/x", Address("inet", host="::1", port=10809)),
        ("nbd://[fe80::1]:5/x", Address("inet", host="fe80::1", port=5)),
        ("nbd:///x", Address("inet", host="localhost", port=10809)),
        ("nbd+unix:///?socket=%00/abstract", Address("unix", path="\0/abstract")),
        ("nbd+unix://?socket=/a%26b", Address("unix", path="/a&b")),
        ("nbd+vsock://3:77/x", Address("vsock", cid=3, port=77)),
        ("nbd:127.0.0.1:5", Address("inet", host="127.0.0.1", port=5)),
        ("nbd:[::1]:5", Address("inet", host="::1", port=5)),
        ("nbd:unix:/tmp/a:b", Address("unix", path="/tmp/a:b")),
    ],
)
def test_addresses(name: str, address: Address) -> None:
    assert parse(name).address == address


def test_tls() -> None:
    assert not parse("nbd://h/x").tls
    found = parse("nbds://alice@h/x?tls-verify-peer=0&tls-hostname=other&tls-type=psk&tls-certificates=/a")
    assert found.tls
    assert dict(found.tls_options) == {
        "tls-username": "alice", "tls-verify-peer": "0", "tls-hostname": "other", "tls-type": "psk",
        "tls-certificates": "/a",
    }  # fmt: skip
    assert parse("nbds+unix:///?socket=s").tls


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("http://h/x", "scheme"),
        ("nbd+unix:///x", "socket"),
        ("nbd+unix://host/x?socket=s", "host"),
        ("nbd://h/x?socket=s", "socket"),
        ("nbd://h/x?colour=red", "colour"),
        ("nbd+unix:///?socket=a&socket=b", "twice"),
        ("nbd://h:port/x", "port"),
        ("nbd://h:99999999999999/x", "port"),
        ("nbd://::1/x", "brackets"),
        ("nbd://[::1/x", "ADDRESS"),
        ("nbd://h/%zz", "encoded"),
        ("nbd://h/%+1", "encoded"),
        ("nbd://h/%ff", "encoded"),
        ("nbd://h/%f", "encoded"),
        ("nbds://h/?tls-type=magic", "tls-type"),
        ("nbds://h/?tls-verify-peer=maybe", "tls-verify-peer"),
        ("nbd://h/?tls-hostname=x", "nbds"),
        ("nbd+vsock://abc:5/", "number"),
        ("nbd:", "expected"),
        ("nbd:host", "port"),
        ("nbd:unix:", "path"),
        ("nbd://h/" + "x" * 5000, "4096"),
    ],
)
def test_what_is_wrong_is_said(name: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        parse(name)


@given(st.text())
def test_any_text_is_a_name_or_refused(text: str) -> None:
    for name in (text, f"nbd://{text}", f"nbd+unix:///{text}", f"nbd:{text}", f"nbds://h/?{text}"):
        try:
            assert isinstance(parse(name), Target)
        except InvalidArgument:
            pass


_text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)


@given(_text, _text, st.booleans())
def test_what_is_shown_can_be_given_again(path: str, export: str, tls: bool) -> None:
    for address in (Address("unix", path=path), Address("inet", host="::1", port=7), Address("inet", host="h")):
        found = parse(show(address, export, tls=tls))
        assert (found.address, found.export, found.tls) == (address, export, tls)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("nbd:unix:/tmp/s", "nbd+unix://?socket=/tmp/s"),
        ("nbd:unix:/tmp/s:exportname=x", "nbd+unix:///x?socket=/tmp/s"),
        ("nbd:127.0.0.1:10809", "nbd://127.0.0.1:10809"),
        ("nbd://127.0.0.1/a/b", "nbd://127.0.0.1:10809/a/b"),
    ],
)
def test_shown_as_the_peer_shows_it(name: str, shown: str) -> None:
    target = parse(name)
    assert show(target.address, target.export) == shown


def test_every_scheme_selects_the_driver() -> None:
    from byre.catalog import by_prefix

    assert {getattr(by_prefix(scheme), "name", "") for scheme in SCHEMES} == {"nbd"}
