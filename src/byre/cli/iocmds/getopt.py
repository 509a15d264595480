"""Options of one shell command: single letters, in any place, as a C program's ``getopt`` takes them."""

from __future__ import annotations

import sys

from ...typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Given", "UsageError", "scan"]


class UsageError(Exception):
    """The command line does not fit; the shell prints how the command is used."""


class Given:
    """Options found, and the arguments that remain.

    :ivar flags: letters that were given
    :ivar rest: arguments that are no options
    """

    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.rest: list[str] = []
        self._values: dict[str, object] = {}

    def __contains__(self, letter: str) -> bool:
        return letter in self.flags

    def number(self, letter: str, default: int = 0) -> int:
        return cast("int", self._values.get(letter, default))

    def text(self, letter: str) -> str:
        return cast("str", self._values.get(letter, ""))

    def set(self, letter: str, value: object = None) -> None:
        self.flags.add(letter)
        self._values[letter] = value


def scan(
    command: str,
    arguments: list[str],
    letters: str,
    convert: Mapping[str, Callable[[str], object]] | None = None,
    *,
    seen: Callable[[str, str], None] | None = None,
) -> Given:
    """Sort ``arguments`` into options and the rest.

    :param letters: those that exist; one followed by ``:`` takes a value
    :param convert: checks and converts the values, in the order they are given
    :param seen: told each option and its text, in order
    :raises UsageError: an unknown option, or one without its value; said on standard error
    """
    given = Given()
    queue = list(reversed(arguments))
    while queue:
        word = queue.pop()
        if word == "--":
            given.rest += reversed(queue)
            break
        if len(word) < 2 or word[0] != "-":
            given.rest.append(word)
            continue
        for at, letter in enumerate(word[1:], 2):
            index = letters.find(letter) if letter != ":" else -1
            if index < 0:
                _complain(f"{command}: invalid option -- '{letter}'")
            if letters[index + 1 : index + 2] != ":":
                given.set(letter)
                if seen:
                    seen(letter, "")
                continue
            if at == len(word) and not queue:
                _complain(f"{command}: option requires an argument -- '{letter}'")
            value = word[at:] or queue.pop()
            given.set(letter, convert[letter](value) if convert and letter in convert else value)
            if seen:
                seen(letter, value)
            break
    return given


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    raise UsageError
