"""Memory the shell reads into and writes from: page aligned, filled from a byte or a file, compared with a byte."""

from __future__ import annotations

from ...typing import Final
from .text import MAX_REQUEST, Refused, parse_number

__all__ = ["allocate", "differs", "filled_from_file", "lengths", "split"]

_STEP: Final = 1 << 20
_MISALIGNMENT: Final = 16


def allocate(length: int, byte: int, *, misalign: bool = False) -> memoryview:
    """``length`` bytes of value ``byte``, on a page boundary or ``misalign``-ed from one."""
    if not length:
        return memoryview(bytearray())
    import mmap

    shift = _MISALIGNMENT if misalign else 0
    view = memoryview(mmap.mmap(-1, length + shift))[shift:]
    if byte:
        _fill(view, bytes([byte]) * min(length, _STEP))
    return view


def _fill(view: memoryview, unit: bytes) -> None:
    for at in range(0, len(view), len(unit)):
        step = min(len(unit), len(view) - at)
        view[at : at + step] = unit[:step]


def filled_from_file(length: int, name: str, *, misalign: bool = False) -> memoryview:
    """``length`` bytes with the content of file ``name``, repeated as often as it takes.

    :raises OSError: the file cannot be read
    :raises Refused: it is empty
    """
    view = allocate(length, 0, misalign=misalign)
    with open(name, "rb", buffering=0) as file:
        got = 0
        while got < length and (step := file.readinto(view[got:])):
            got += step
    if not got:
        raise Refused(f"{name}: file is empty")
    # Doubling copies: the part that is filled grows with each.
    while got < length:
        step = min(got, length - got)
        view[got : got + step] = view[:step]
        got += step
    return view


def differs(view: memoryview, byte: int) -> bool:
    """Whether any byte of ``view`` is not ``byte``."""
    unit = bytes([byte]) * min(len(view), _STEP)
    for at in range(0, len(view), _STEP):
        part = view[at : at + _STEP]
        if bytes(part) != unit[: len(part)]:
            return True
    return False


def lengths(arguments: list[str]) -> list[int]:
    """The lengths of a vectored request.

    :raises Refused: one is no number, or they are more than a request may have
    """
    result: list[int] = []
    for text in arguments:
        length = parse_number(text)
        if length > MAX_REQUEST:
            raise Refused(f"Argument '{text}' exceeds maximum size {MAX_REQUEST}")
        if sum(result) > MAX_REQUEST - length:
            raise Refused(f"The total number of bytes exceed the maximum size {MAX_REQUEST}")
        result.append(length)
    return result


def split(view: memoryview, parts: list[int]) -> list[memoryview]:
    """``view`` cut into consecutive parts of these lengths."""
    result = []
    at = 0
    for length in parts:
        result.append(view[at : at + length])
        at += length
    return result
