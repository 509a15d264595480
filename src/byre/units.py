"""Sizes as people write them: parse "64k", "1.5G", "2TiB"; print "1.5 GiB"."""

from __future__ import annotations

from .errors import InvalidArgument

__all__ = ["EIB", "GIB", "KIB", "MIB", "PIB", "SECTOR", "TIB", "align_down", "align_up", "format_size", "parse_size"]

SECTOR = 512
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
PIB = 1 << 50
EIB = 1 << 60

_SUFFIXES = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB, "P": PIB, "E": EIB}
_NAMES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def align_down(value: int, alignment: int) -> int:
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def parse_size(text: str, what: str = "size") -> int:
    """Bytes for ``text``: decimal or 0x digits, optionally a fraction, optionally a suffix B K M G T P E
    (also KiB, MB; always powers of 1024).

    :raises InvalidArgument: not a number, negative, or above 2**64 - 1
    """
    stripped = text.strip()
    digits = stripped.rstrip("BbKkMmGgTtPpEeIi") if not stripped.lower().startswith("0x") else stripped
    suffix = stripped[len(digits) :].upper()
    unit = _SUFFIXES.get(suffix[:1]) if suffix in _SUFFIXES or suffix[1:] in ("B", "IB") else None
    bad = InvalidArgument(
        f"invalid {what} {text[:40]!r}: expected a number of bytes, optionally with a suffix k, M, G, T, P or E"
    )
    if unit is None or not digits or digits[0] in "+-" or "_" in digits or not digits.isascii():
        raise bad
    try:
        if digits.lower().startswith("0x"):
            value = int(digits, 16)
        elif "." in digits:
            whole, _, fraction = digits.partition(".")
            if not (whole + fraction).isdigit() or (unit == 1 and fraction.strip("0")):
                raise bad
            value = int(whole or "0") * unit + round(int(fraction or "0") * unit / 10 ** len(fraction))
        else:
            if not digits.isdigit():
                raise bad
            value = int(digits) * unit
    except ValueError:
        raise bad from None
    if value >= 1 << 64:
        raise InvalidArgument(f"invalid {what} {text[:40]!r}: larger than 2^64 - 1 bytes")
    return value


def format_size(size: int) -> str:
    """``size`` in the largest binary unit that keeps it at 1 or above, three significant digits: "1.5 GiB"."""
    value = float(size)
    for name in _NAMES:
        if value < 1000 or name == "EiB":
            break
        value /= 1024
    return f"{value:.3g} {name}"
