"""``formats``: the catalog of drivers as a table."""

from __future__ import annotations

import sys
from typing import Final

from ..catalog import CATALOG
from . import common
from .output import print_json

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.Switch("markdown", "", "markdown", "", "as a Markdown table"),
    common.Switch("json", "", "json", "", "as JSON"),
)

HELP: Final = f"""\
usage: byre formats [OPTIONS]
List the formats, protocols and filters there are.

{common.option_help(_TABLE)}"""

_HEADINGS: Final = ("name", "kind", "can", "summary")
_ABILITIES: Final = {"r": "read", "w": "write", "c": "create"}


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if given.positional:
        raise common.UsageError(f"unexpected argument: {given.positional[0]}")
    if given.has("json"):
        print_json([
            {"name": row.name, "kind": row.kind, "abilities": _words(row.abilities), "summary": row.summary}
            for row in CATALOG
        ])  # fmt: skip
        return 0
    table: list[tuple[str, ...]] = [
        (row.name, row.kind, ", ".join(_words(row.abilities)), row.summary) for row in CATALOG
    ]
    sys.stdout.write(_markdown(table) if given.has("markdown") else _plain(table))
    return 0


def _words(abilities: str) -> list[str]:
    return [_ABILITIES[letter] for letter in abilities]


def _markdown(table: list[tuple[str, ...]]) -> str:
    rows = [_HEADINGS, ("---",) * len(_HEADINGS), *((f"`{name}`", *rest) for name, *rest in table)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _plain(table: list[tuple[str, ...]]) -> str:
    rows = [_HEADINGS, *table]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
                   for row in rows)  # fmt: skip
