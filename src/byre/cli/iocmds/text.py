"""Numbers and reports as the io shell reads and prints them; pure functions, no I/O.

The formats are those users and scripts know from ``qemu-io``: sizes with up to three decimals,
times with two, one line of what was done and one of how fast.
"""

from __future__ import annotations

import re

from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "MAX_REQUEST",
    "Refused",
    "dump_lines",
    "duration_text",
    "parse_integer",
    "parse_number",
    "parse_pattern",
    "report",
    "size_text",
]

#: Most bytes one request of the shell may have.
MAX_REQUEST: Final = 0x7FFFFE00

_SIZE = re.compile(
    r"\s*\+?(?:0[xX](?P<hex>[0-9a-fA-F]+)"
    r"|(?P<whole>[0-9]+)(?:\.(?P<part>[0-9]*))?(?P<unit>[bBkKmMgGtTpPeE]?))",
    re.ASCII,
)
_INTEGER = re.compile(r"\s*(?P<sign>[+-]?)(?:0[xX](?P<hex>[0-9a-fA-F]+)|(?P<octal>0[0-7]*)|(?P<decimal>[1-9][0-9]*))",
                      re.ASCII)  # fmt: skip
_SHIFTS: Final = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_UNITS: Final = ("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)


class Refused(Exception):
    """A command cannot be run as given; the text goes to standard output, among the command's other lines."""


def parse_number(text: str) -> int:
    """Bytes for ``text``: decimal with an optional fraction and suffix (b k M G T P E), or hexadecimal.

    :raises Refused: no such number, or above 2**63 - 1
    """
    bad = Refused(f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")
    match = _SIZE.fullmatch(text)
    if match is None:
        raise bad
    if match["hex"]:
        value = int(match["hex"], 16)
    else:
        shift = _SHIFTS[match["unit"].upper()]
        part = match["part"] or ""
        if not shift and int(part or "0"):
            raise bad
        value = (int(match["whole"]) << shift) + (int(part or "0") << shift) // 10 ** len(part)
    if value >= 1 << 63:
        raise Refused(f"Parsing error: argument too large -- {text}")
    return value


def parse_integer(text: str) -> int | None:
    """A whole number as C programs read it (0x hexadecimal, leading 0 octal); ``None`` if it is not one."""
    match = _INTEGER.fullmatch(text)
    if match is None or len(text) > 32:
        return None
    value = (
        int(match["hex"], 16) if match["hex"] else int(match["octal"], 8) if match["octal"] else int(match["decimal"])
    )
    return -value if match["sign"] == "-" else value


def parse_pattern(text: str) -> int:
    """:raises Refused: not a number from 0 to 255"""
    value = parse_integer(text)
    if value is None or not 0 <= value <= 255:
        raise Refused(f"{text} is not a valid pattern byte")
    return value


def size_text(value: float) -> str:
    """``value`` bytes in the largest unit that keeps it at 1 or above: "64 KiB", "1.500 GiB", "12 bytes"."""
    for name, shift in _UNITS:
        if value >= 1 << shift:
            digits, unit = f"{value / (1 << shift):.3f}", name
            break
    else:
        digits, unit = f"{value:f}", "bytes"
    whole, zeroes, _ = digits.partition(".000")
    return f"{whole if zeroes else digits} {unit}"


def duration_text(seconds: float, *, fixed: bool = False) -> str:
    """ "00.12 sec", or h:mm:ss.ss from one second on, or always if ``fixed``."""
    whole = int(seconds)
    if not fixed and not whole:
        return f"{seconds:05.2f} sec"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60 + seconds - whole:05.2f}"


def report(verb: str, seconds: float, offset: int, asked: int, done: int, operations: int, *, machine: bool) -> str:
    """What was done and how fast; two lines, or with ``machine`` one: bytes,ops,time,bytes/sec,ops/sec."""
    seconds = max(seconds, 1e-9)
    rate, pace = done / seconds, operations / seconds
    if machine:
        return f"{done},{operations},{duration_text(seconds, fixed=True)},{rate:.3f},{pace:.3f}\n"
    return (
        f"{verb} {done}/{asked} bytes at offset {offset}\n"
        f"{size_text(done)}, {operations} ops; "
        f"{duration_text(seconds)} ({size_text(rate)}/sec and {pace:.4f} ops/sec)\n"
    )


def dump_lines(data: bytes, offset: int) -> Iterator[str]:
    """Sixteen bytes a line: address, hexadecimal, letters and digits."""
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        shown = "".join(chr(byte) if byte < 128 and chr(byte).isalnum() else "." for byte in row)
        yield f"{offset + at:08x}:  {row.hex(' ')}  {shown}\n"
