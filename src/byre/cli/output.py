"""Text for people and JSON for programs, in the peer's layout.

JSON is written here, not by ``json``: its layout differs, and it is too slow to import for ``byre info``.
Strings that come from an image reach a terminal only through :func:`byre.errors.printable`.
"""

from __future__ import annotations

import sys

from ..errors import printable
from ..typing import TYPE_CHECKING
from ..units import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["human_size", "json_string", "ordered", "print_json", "print_structure", "to_json"]

_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def json_string(text: str) -> str:
    """``text`` as a JSON string in ASCII; bytes that are no text become U+FFFD."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return '"' + text.translate(_Escapes()) + '"'


class _Escapes(dict[int, str]):
    """What each code point becomes in JSON, found out once for a text."""

    def __missing__(self, code: int) -> str:
        shown = self[code] = _escaped(chr(code))
        return shown


def _escaped(character: str) -> str:
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    code = ord(character)
    if 0x20 <= code < 0x7F:
        return character
    if 0xD800 <= code < 0xE000:
        code = 0xFFFD
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
    return f"\\u{code:04X}"


def to_json(value: object, indent: str = "") -> str:
    """``value`` (dicts, lists, strings, numbers, booleans, ``None``) as indented JSON.

    An empty list or object takes two lines, as in the peer's output.
    """
    if isinstance(value, dict):
        inner = indent + "    "
        parts = [f"\n{inner}{json_string(str(key))}: {to_json(item, inner)}" for key, item in value.items()]
        return "{" + ",".join(parts) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)):
        inner = indent + "    "
        parts = [f"\n{inner}{to_json(item, inner)}" for item in value]
        return "[" + ",".join(parts) + f"\n{indent}]"
    if isinstance(value, str):
        return json_string(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def print_json(value: object) -> None:
    sys.stdout.write(to_json(value) + "\n")


def ordered(values: Mapping[str, object], order: tuple[str, ...]) -> dict[str, object]:
    """``values`` without those that are ``None``, in the ``order`` of keys in which the peer prints them."""
    return {key: values[key] for key in order if values.get(key) is not None}


def human_size(size: int) -> str:
    """``size`` bytes in the largest unit: "64 MiB"."""
    return format_size(size)


def print_structure(value: object, depth: int) -> None:
    """A nested value as indented lines: dashes in names become spaces, list items are numbered."""
    indent = "    " * depth
    if isinstance(value, dict):
        rows = [(key.replace("-", " "), item) for key, item in value.items()]
    else:
        assert isinstance(value, (list, tuple))
        rows = [(f"[{index}]", item) for index, item in enumerate(value)]
    for name, item in rows:
        if isinstance(item, (dict, list, tuple)):
            sys.stdout.write(f"{indent}{name}:\n")
            print_structure(item, depth + 1)
        else:
            sys.stdout.write(f"{indent}{name}: {_plain(item)}\n")


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return printable(str(value))
