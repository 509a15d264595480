"""Numbers, sizes, times and reports of the io shell."""

from __future__ import annotations

import pytest

from byre.cli.iocmds import buffers
from byre.cli.iocmds.getopt import UsageError, scan
from byre.cli.iocmds.text import (
    Refused,
    dump_lines,
    duration_text,
    parse_integer,
    parse_number,
    parse_pattern,
    report,
    size_text,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1k", 1024),
        ("1K", 1024),
        ("1.5k", 1536),
        ("0x10", 16),
        ("0x1e", 30),
        ("010", 10),
        ("1b", 1),
        ("7E", 7 << 60),
        (" 5", 5),
        ("+5", 5),
        ("1.", 1),
        ("1.0", 1),
        ("0.25M", 262144),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_numbers(text: str, value: int) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "1kb", "1KiB", "1.5", "1e3", "0x", "0x10k", "1_0", "١", "1 k", "five", "1.5.5"]
)
def test_no_numbers(text: str) -> None:
    with pytest.raises(Refused, match="non-numeric argument"):
        parse_number(text)


@pytest.mark.parametrize("text", ["8E", "9223372036854775808", "9" * 400])
def test_numbers_too_large(text: str) -> None:
    with pytest.raises(Refused, match="too large"):
        parse_number(text)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("010", 8), ("0x10", 16), ("-3", -3), ("08", None), ("", None), ("x", None)]
)
def test_integers(text: str, value: int | None) -> None:
    assert parse_integer(text) == value


def test_patterns_are_one_byte() -> None:
    assert parse_pattern("0xff") == 255
    for text in ("256", "-1", "0xfg", "9" * 99):
        with pytest.raises(Refused, match="not a valid pattern byte"):
            parse_pattern(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (1024, "1 KiB"),
        (1536, "1.500 KiB"),
        (65536, "64 KiB"),
        (1 << 60, "1 EiB"),
        (54.658886, "54.658886 bytes"),
        ((1 << 20) + 1, "1 MiB"),
        (float("inf"), "inf EiB"),
    ],
)
def test_sizes(value: float, text: str) -> None:
    assert size_text(value) == text


def test_durations() -> None:
    assert duration_text(0.1234) == "00.12 sec"
    assert duration_text(0.1234, fixed=True) == "0:00:00.12"
    assert duration_text(1.5) == "0:00:01.50"
    assert duration_text(3725.25) == "1:02:05.25"


def test_report_for_people_and_for_machines() -> None:
    assert report("read", 0.5, 4096, 65536, 65536, 1, machine=False) == (
        "read 65536/65536 bytes at offset 4096\n64 KiB, 1 ops; 00.50 sec (128 KiB/sec and 2.0000 ops/sec)\n"
    )
    assert report("read", 0.5, 0, 65536, 65536, 1, machine=True) == "65536,1,0:00:00.50,131072.000,2.000\n"
    assert "sec (" in report("read", 0.0, 0, 0, 0, 1, machine=False)


def test_dump() -> None:
    assert list(dump_lines(b"Ab1\xe9 -" + bytes(12), 0x10)) == [
        "00000010:  41 62 31 e9 20 2d 00 00 00 00 00 00 00 00 00 00  Ab1.............\n",
        "00000020:  00 00  ..\n",
    ]


def test_options_are_taken_in_any_place(capsys: pytest.CaptureFixture[str]) -> None:
    given = scan("read", ["0", "-qP", "7", "512", "-l5"], "qP:l:", {"P": parse_pattern, "l": parse_number})
    assert (given.rest, given.number("P"), given.number("l"), "q" in given) == (["0", "512"], 7, 5, True)
    assert scan("read", ["--", "-q", "-"], "q").rest == ["-q", "-"]
    for bad, complaint in (
        (["-x"], "read: invalid option -- 'x'"),
        (["-:"], "read: invalid option -- ':'"),
        (["-P"], "read: option requires an argument -- 'P'"),
    ):
        with pytest.raises(UsageError):
            scan("read", bad, "qP:")
        assert capsys.readouterr().err.strip() == complaint


@pytest.mark.parametrize("misalign", [False, True])
def test_buffers(misalign: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    size = (2 << 20) + 5
    view = buffers.allocate(size, 0xCD, misalign=misalign)
    assert len(view) == size
    assert not buffers.differs(view, 0xCD)
    view[-1] = 0
    assert buffers.differs(view, 0xCD)
    (tmp_path / "source").write_bytes(b"abc")
    assert bytes(buffers.filled_from_file(10, str(tmp_path / "source"))) == b"abcabcabca"
    assert bytes(buffers.filled_from_file(2, str(tmp_path / "source"))) == b"ab"
    assert len(buffers.allocate(0, 1)) == 0
