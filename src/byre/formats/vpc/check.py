"""Checking a VHD image: both footers, and every entry of the block table (numpy). ``-r`` mends the footers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...units import SECTOR
from ..abilities import CheckResult
from . import layout
from .mapping import DynamicMapping
from .mapping_bulk import hosts, suspects

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .image import VpcNode

__all__ = ["check_image"]

_WINDOW: Final = 1 << 18
_MESSAGES: Final = 1000
"""Findings that are told one by one."""


def check_image(node: VpcNode, control: Control, fix: str) -> CheckResult:
    """Whether the footers agree and every block lies inside the file, where nothing else lies."""
    mapping = node.mapping
    if not isinstance(mapping, DynamicMapping):
        control.total = 1
        control.advance(1)
        return CheckResult()
    with node.lock:
        found = _check_table(mapping, control)
        damaged = _damaged_footers(node, mapping)
        if damaged and fix == "all":
            for at in damaged:
                node.file.write_from(at, memoryview(layout.encode_footer(node.footer)))
            node.guarded(node.file.flush)
            return CheckResult(found.count, corruptions_fixed=len(damaged), messages=tuple(found.messages))
    footers = tuple(f"ERROR the footer at {at:#x} is damaged, or differs from the other one" for at in damaged)
    return CheckResult(found.count + len(damaged), messages=(*found.messages, *footers))


def _damaged_footers(node: VpcNode, mapping: DynamicMapping) -> list[int]:
    """Where a footer should be, and none is that says the same as the one that counts."""
    expected = layout.encode_footer(node.footer)
    damaged: list[int] = []
    # After growth the footer at the end is written by the next flush.
    for at in (0,) if mapping.end_moved else (0, mapping.settled_end()):
        data = bytearray(layout.FOOTER_SIZE)
        node.file.read_into(at, memoryview(data))
        if data != expected:
            damaged.append(at)
    return damaged


class _Findings:
    """:ivar count: all of them, of which so many are told"""

    def __init__(self) -> None:
        self.count = 0
        self.messages: list[str] = []

    def add(self, rows: NDArray[Any], say: Callable[[int], str]) -> None:
        self.count += len(rows)
        self.say(rows, say)

    def say(self, rows: NDArray[Any], say: Callable[[int], str]) -> None:
        """As many as there is room for."""
        self.messages += [f"ERROR {say(int(row))}" for row in rows[: max(0, _MESSAGES - len(self.messages))]]


def _check_table(mapping: DynamicMapping, control: Control) -> _Findings:
    control.total = len(mapping.table)
    findings = _Findings()
    for first in range(0, len(mapping.table), _WINDOW):
        host = hosts(mapping, first, min(_WINDOW, len(mapping.table) - first))
        bad = np.flatnonzero(suspects(mapping, first, host)) + first
        findings.add(bad, lambda block: (
            f"block {block}: table entry {mapping.table[block]:#010x} points past the end of the file "
            f"({mapping.file.size:#x}) or where headers lie"
        ))  # fmt: skip
    table = np.frombuffer(mapping.table, np.uint32)
    entries = np.sort(table)
    entries = entries[: np.searchsorted(entries, layout.NONE)]
    shared = np.diff(entries) < (mapping.bitmap_size + mapping.block_size) // SECTOR
    findings.count += int(np.count_nonzero(shared))
    told = entries[1:][shared][:_MESSAGES]
    for first in range(0, len(table) if len(told) else 0, _WINDOW):
        rows = np.flatnonzero(np.isin(table[first : first + _WINDOW], told)) + first
        findings.say(rows, lambda block: (
            f"block {block}: its space at {mapping.table[block] * SECTOR:#x} is used by another block as well"
        ))  # fmt: skip
    control.advance(len(mapping.table))
    return findings
