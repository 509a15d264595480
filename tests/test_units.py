"""Sizes as people write them, against what the peer accepts."""

from __future__ import annotations

import pytest

from byre.errors import InvalidArgument
from byre.units import EIB, GIB, KIB, TIB, align_down, align_up, format_size, parse_size
from conftest import Run


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1", 1), ("1b", 1), ("512B", 512), ("1k", KIB), ("1K", KIB), ("64M", 64 << 20), ("1.5G", 3 * GIB // 2),
     ("2T", 2 * TIB), ("1P", 1 << 50), ("1E", EIB), ("7.5E", 15 * EIB // 2), ("5.k", 5 * KIB), (".5G", GIB // 2),
     ("0x10", 16), ("0XfF", 255), ("010", 10), ("1.0", 1), (" 1k", KIB), ("2TiB", 2 * TIB), ("3kB", 3 * KIB),
     ("18446744073709551615", 2**64 - 1)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "k", "-1", "-0", "1.5", "0.5b", "1e3", "1_000", "1kk", "1Q", "1 k", "inf", "nan", "0x", "0x10k", "0x1.8",
     "1..5k", "1.5.1k", "\u0661", "\u00b2k", "1i", "16E", "18446744073709551616", "9" * 5000, "0x" + "f" * 5000, "1\0"],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_size(text, "image size")
    assert str(caught.value).startswith("invalid image size")


def test_a_fraction_is_exact_where_floating_point_is_not() -> None:
    assert parse_size("4503599627370496.5k") == 4503599627370496 * KIB + 512


@pytest.mark.oracle
def test_the_peer_reads_the_same(qemu_img: Run) -> None:
    for text in ("1", "1k", "1.5k", "1.5", "0x10", "5.k", "1e3", "-1", "1Q", "k", "1.9999k", "0.3M", "1.1T", "1kk"):
        done = qemu_img("measure", "-O", "raw", "--size", text, check=False)
        if done.returncode:
            with pytest.raises(InvalidArgument):
                parse_size(text)
        else:
            required = int(done.stdout.splitlines()[0].split(":")[1])
            assert align_up(parse_size(text), 512) == required


def test_printed_sizes() -> None:
    assert [format_size(n) for n in (0, 999, 1000, 1536, 196616, GIB, 5 * EIB)] == [
        "0 B", "999 B", "0.977 KiB", "1.5 KiB", "192 KiB", "1 GiB", "5 EiB",
    ]  # fmt: skip


def test_alignment() -> None:
    assert (align_down(1023, 512), align_up(1023, 512), align_up(1024, 512), align_up(0, 512)) == (512, 1024, 1024, 0)
