"""Run-time options of a qcow2 image: what is refused at opening and at reopening, and what replaces what."""

from __future__ import annotations

from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, InvalidArgument, NotSupported
from byre.formats.qcow2.runtime import join_options


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    byre.create(str(path), "qcow2", 64 << 20)
    return path


BAD = [
    ({"cache-size": "1M", "l2-cache-size": "64k", "refcount-cache-size": "64k"}, "cannot all be given"),
    ({"cache-size": "1M", "l2-cache-size": "2M"}, "more than 'cache-size'"),
    ({"cache-size": "1M", "refcount-cache-size": "2M"}, "more than 'cache-size'"),
    ({"l2-cache-entry-size": "33k"}, "power of two"),
    ({"l2-cache-entry-size": "128k"}, "cluster size"),
    ({"l2-cache-entry-size": "256"}, "power of two"),
    ({"refcount-cache-size": "256T"}, "refcount-cache-size"),
    ({"overlap-check": "blubb"}, "one of"),
    ({"cache-clean-interval": "-1"}, "cache-clean-interval"),
]
GOOD: list[dict[str, object]] = [
    {"cache-size": "1M", "l2-cache-size": "64k"},
    {"cache-size": "1M", "refcount-cache-size": "64k"},
    {"l2-cache-entry-size": "512", "l2-cache-size": "1T"},
    {"overlap-check.template": "all", "overlap-check.active-l1": "off"},
    {"lazy-refcounts": "on", "discard-no-unref": "on"},
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_values_that_make_no_sense_are_refused(disk: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        byre.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(disk)}, **options})
    with byre.open(str(disk), format="qcow2", read_only=False) as image:
        with pytest.raises(InvalidArgument, match=said):
            image.reopen(options=options)
        image.write(0, b"still works")
        assert image.read(0, 11) == b"still works"


@pytest.mark.parametrize("options", GOOD)
def test_values_that_do_are_taken(disk: Path, options: dict[str, object]) -> None:
    with byre.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(disk)}, **options}) as image:
        image.reopen(options=options)


def test_a_cache_of_too_many_entries_counts_up_to_the_size_of_all_tables(tmp_path: Path) -> None:
    path = tmp_path / "huge.qcow2"
    byre.create(str(path), "qcow2", 32 << 50, options={"cluster_size": 256 << 10})
    options = {"l2-cache-entry-size": "512", "l2-cache-size": "1T"}
    with byre.open(str(path), format="qcow2") as image, pytest.raises(InvalidArgument, match="l2-cache-size"):
        image.reopen(options=options)


def test_version_2_has_no_lazy_refcounts(tmp_path: Path) -> None:
    path = tmp_path / "old.qcow2"
    byre.create(str(path), "qcow2", 1 << 20, options={"compat": "0.10"})
    with byre.open(str(path), format="qcow2") as image, pytest.raises(NotSupported, match="version 3"):
        image.reopen(options={"lazy-refcounts": "on"})


def test_new_templates_and_sizes_replace_older_ones(disk: Path) -> None:
    with byre.open(str(disk), format="qcow2") as image:
        for options in (
            {"overlap-check": "none"},
            {"overlap-check.template": "all"},
            {"cache-size": "1M"},
            {"l2-cache-size": "2M"},
            {"refcount-cache-size": "2M"},
            {"cache-size": "1M"},
        ):
            image.reopen(options=options)
        with pytest.raises(ByreError):
            image.reopen(options={"cache-size": "1M", "l2-cache-size": "2M"})
        image.reopen(options={"overlap-check": "all", "overlap-check.template": "all"})
        with pytest.raises(InvalidArgument, match="contradict"):
            image.reopen(options={"overlap-check": "constant", "overlap-check.template": "all"})
    assert join_options({"overlap-check": "none", "a": 1}, {"overlap-check.active-l1": True}) == {
        "overlap-check": "none", "a": 1, "overlap-check.active-l1": True,
    }  # fmt: skip
