"""The catalog: probing, and rows that keep their promises."""

from __future__ import annotations

from importlib import import_module

import pytest

from byre import catalog
from byre.catalog import CATALOG, TAIL_SIZE, Driver, by_prefix, driver, formats, probe
from byre.errors import InvalidArgument
from byre.options import OptionSet


def test_every_row_leads_to_a_driver() -> None:
    assert len({row.name for row in CATALOG}) == len(CATALOG)
    for row in CATALOG:
        module = import_module(row.module)
        assert isinstance(module.OPTIONS, OptionSet)
        assert callable(module.open_node)
        assert ("c" in row.abilities) == hasattr(module, "create") or row.name in ("host_device", "host_cdrom")
        assert row.kind in ("protocol", "format", "filter")
        assert row.summary
        if row.prefix:
            found = by_prefix(row.prefix)
            assert found is row


def test_probing() -> None:
    assert probe(b"").name == "raw"
    assert probe(bytes(2048)).name == "raw"
    assert probe(b"QFI\xfb\0\0\0\3" + bytes(100)).name == "qcow2"
    assert probe(b"QFI\xfb\0\0\0\2").name == "qcow2"
    assert probe(b"QFI\xfb\0\0\0").name == "raw"  # cut short
    assert probe(b"QFI\xfb\0\0\0\x09" + bytes(100)).name == "raw"
    assert probe(b"\0" + b"QFI\xfb\0\0\0\3").name == "raw"


def test_the_end_counts_where_the_beginning_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Driver("late", "format", "byre.formats.raw", "says at its end what it is", tails=(((4, b"late"),),))
    monkeypatch.setattr(catalog, "CATALOG", (*CATALOG, row))
    tail = b"\0\0\0\0late".ljust(TAIL_SIZE, b"\0")
    assert probe(bytes(2048), tail).name == "late"
    assert probe(tail, bytes(TAIL_SIZE)).name == "raw"
    assert probe(b"QFI\xfb\0\0\0\3", tail).name == "qcow2"
    assert probe(bytes(20), tail[:100]).name == "raw"


def test_an_unknown_driver_says_where_the_list_is() -> None:
    with pytest.raises(InvalidArgument, match=r"unknown driver 'vmkd'; byre formats"):
        driver("vmkd")
    assert {row.name for row in formats()} >= {"raw", "qcow2"}
