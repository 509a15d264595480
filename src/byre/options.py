"""Typed option sets: one declaration serves the command line, JSON, QMP and the documentation.

Also the syntax around them: ``key=value,key=value`` with ``,,`` for a comma, dotted keys for
nesting, and ``json:{...}`` names with the limits an untrusted text must keep.
"""

from __future__ import annotations

from .errors import InvalidArgument
from .typing import TYPE_CHECKING, Final, NamedTuple, cast
from .units import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Option", "OptionSet", "OptionValues", "flatten", "parse_json", "parse_keyval", "split_keyval", "unflatten"]

JSON_LIMIT: Final = 4096
JSON_DEPTH: Final = 8
NESTING_LIMIT: Final = 32
"""Groups within groups, however written: nodes are opened by recursion over them."""

_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")


class Option(NamedTuple):
    """One named value.

    :ivar type: "str", "bool", "size" (bytes, suffixes allowed), "int" or "enum" (one of ``choices``)
    :ivar help: a few words for the option list, as ``qemu-img create -o help`` prints them
    """

    name: str
    type: str
    help: str
    default: object = None
    choices: tuple[str, ...] = ()


class OptionValues:
    """The values given for an OptionSet; the getters fall back to the declared default."""

    def __init__(self, declared: OptionSet, given: dict[str, object]) -> None:
        self._declared = declared
        self.given = given

    def _get(self, name: str) -> object:
        return self.given[name] if name in self.given else self._declared[name].default

    def text(self, name: str) -> str | None:
        return cast("str | None", self._get(name))

    def word(self, name: str) -> str:
        """A "str" or "enum" option that has a default."""
        return cast("str", self._get(name))

    def number(self, name: str) -> int:
        """An "int" or "size" option that has a default."""
        return cast("int", self._get(name))

    def optional_number(self, name: str) -> int | None:
        return cast("int | None", self._get(name))

    def flag(self, name: str) -> bool:
        return bool(self._get(name))

    def __contains__(self, name: str) -> bool:
        """Whether the option was given explicitly."""
        return name in self.given


class OptionSet:
    """An ordered set of options."""

    def __init__(self, *options: Option) -> None:
        self.options = options
        self._by_name = {option.name: option for option in options}

    def __getitem__(self, name: str) -> Option:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Option]:
        return iter(self.options)

    def parse(self, given: Mapping[str, object], *, what: str) -> OptionValues:
        """Check and convert ``given`` (strings from a command line, or typed values from JSON or Python).

        :param what: named in messages, e.g. 'format "qcow2"'
        :raises InvalidArgument: unknown option, or a value that is not of the option's type
        """
        values: dict[str, object] = {}
        for name, value in given.items():
            option = self._by_name.get(name)
            if option is None:
                raise InvalidArgument(f"{what} has no option {name!r}")
            values[name] = convert(option, value)
        return OptionValues(self, values)


def convert(option: Option, value: object) -> object:
    """``value`` as the option's type.

    :raises InvalidArgument: it is not
    """
    kind = option.type
    if kind == "bool":
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value in _TRUE:
            return True
        if isinstance(value, str) and value in _FALSE:
            return False
        raise InvalidArgument(f"option {option.name!r} is {value!r}: expected 'on' or 'off'")
    if kind in ("size", "int"):
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
            return value
        if isinstance(value, str):
            return parse_size(value, f"value of option {option.name!r}:") if kind == "size" else _integer(option, value)
        raise InvalidArgument(f"option {option.name!r} is {value!r}: {_NUMBER}")
    if not isinstance(value, str):
        raise InvalidArgument(f"option {option.name!r} is {value!r}: expected a text")
    if kind == "enum" and value not in option.choices:
        raise InvalidArgument(f"option {option.name!r} is {value!r}: expected one of {', '.join(option.choices)}")
    return value


_NUMBER: Final = "expected a number that is not negative and has at most 64 bits"


def _integer(option: Option, text: str) -> int:
    try:
        number = int(text, 16 if text[:2] in ("0x", "0X") else 10) if text.isascii() and text.isalnum() else -1
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 64:
        raise InvalidArgument(f"option {option.name!r} is {text[:40]!r}: {_NUMBER}")
    return number


# -- syntax ---------------------------------------------------------------------------------------


def split_keyval(text: str) -> list[str]:
    """The parts of ``text`` between commas; ``,,`` stands for a comma inside a part."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def parse_keyval(text: str, *, implied: str = "") -> dict[str, str]:
    """A flat dict from ``key=value,key=value``; ``key`` alone means ``key=on``.

    :param implied: the key of a first part that has no ``=``
    """
    result: dict[str, str] = {}
    if not text:
        return result
    for index, part in enumerate(split_keyval(text)):
        key, separator, value = part.partition("=")
        if not separator:
            if index == 0 and implied:
                key, value = implied, part
            elif not part:
                continue
            else:
                value = "on"
        if not key:
            raise InvalidArgument(f"expected key=value, found {part!r} in {text!r}")
        result[key] = value
    return result


def unflatten(flat: Mapping[str, object], depth: int = 0) -> dict[str, object]:
    """Nested dicts from dotted keys: ``{"file.driver": "nbd"}`` becomes ``{"file": {"driver": "nbd"}}``.

    Lists stay as they are; a list in dotted keys stays a dict with the keys 0, 1, 2, ...

    :param depth: groups around these
    :raises InvalidArgument: a key is used both as a value and as a parent, or more than 32 groups are nested
    """
    root: dict[str, object] = {}
    for dotted, value in flat.items():
        first, *rest = dotted.split(".")
        if depth + len(rest) >= NESTING_LIMIT:
            raise InvalidArgument(f"option {dotted[:40]!r}... is nested too deep, allowed are {NESTING_LIMIT} groups")
        nested: object = unflatten(value, depth + 1 + len(rest)) if isinstance(value, dict) else value
        for part in reversed(rest):
            nested = {part: nested}
        _merge(root, {first: nested}, dotted)
    return root


def _merge(into: dict[str, object], more: Mapping[str, object], dotted: str) -> None:
    """Add ``more``, group by group; ``dotted`` is named in the refusal."""
    for key, value in more.items():
        below = into.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value, dotted)
        elif key in into and isinstance(below, dict) != isinstance(value, dict):
            raise InvalidArgument(f"option {dotted!r}: {key!r} is given as a value and as a group")
        else:
            into[key] = value


def flatten(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted keys from nested dicts and lists, the inverse of :func:`unflatten`."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def parse_json(text: str, what: str = "name") -> dict[str, object]:
    """The object in ``text``, which may come from an image: 4 KiB, depth 8, 64-bit numbers at most.

    :raises InvalidArgument: not a JSON object, or beyond a limit
    """
    if len(text) > JSON_LIMIT:
        raise InvalidArgument(f"JSON {what} has {len(text)} characters, allowed are {JSON_LIMIT}")
    import json

    def integer(digits: str) -> int:
        if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 64:
            raise InvalidArgument(f"JSON {what} holds the number {digits[:24]}, allowed are 64 bits")
        return int(digits)

    def real(digits: str) -> float:
        number = float(digits)
        if not -1e308 < number < 1e308:
            raise InvalidArgument(f"JSON {what} holds the number {digits[:24]}, allowed are 64 bits")
        return number

    text, deepest = _plain_json(text)
    if deepest > JSON_DEPTH:
        raise InvalidArgument(f"JSON {what} is nested {deepest} deep, allowed are {JSON_DEPTH}")
    try:
        value = json.loads(text, parse_int=integer, parse_float=real, parse_constant=real)
    except ValueError as error:
        raise InvalidArgument(f"JSON {what} cannot be parsed: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"JSON {what} must be an object")
    return unflatten(value)


def _plain_json(text: str) -> tuple[str, int]:
    """(``text`` with 'single-quoted' strings, which the peer's users write, in double quotes; its depth).

    Depth is found on the text, because the parser itself would recurse.
    """
    parts: list[str] = []
    depth = deepest = 0
    quote = ""
    escaped = False
    for c in text:
        if quote:
            if escaped:
                escaped = False
                # JSON knows no escaped apostrophe.
                parts.append("'" if c == "'" else "\\" + c)
                continue
            if c == "\\":
                escaped = True
                continue
            if c == quote:
                quote = ""
                c = '"'
            elif c == '"':
                c = '\\"'
        elif c in "\"'":
            quote = c
            c = '"'
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]}":
            depth -= 1
        parts.append(c)
    return "".join(parts), deepest
