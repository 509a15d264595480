"""Checking a VHD image: both footers, and every entry of the block table (numpy). ``-r`` mends the footers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ..abilities import CheckResult
from . import layout
from .mapping import DynamicMapping
from .mapping_bulk import hosts, suspects

if TYPE_CHECKING:
    from ...jobs.job import Control
    from .image import VpcNode

__all__ = ["check_image"]

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
        messages = _check_table(mapping, control)
        damaged = _damaged_footers(node, mapping)
        corruptions = len(messages)
        if damaged and fix == "all":
            for at in damaged:
                node.file.write_from(at, memoryview(layout.encode_footer(node.footer)))
            node.guarded(node.file.flush)
            return CheckResult(corruptions, corruptions_fixed=len(damaged), messages=tuple(messages[:_MESSAGES]))
    messages += [f"ERROR the footer at {at:#x} is damaged, or differs from the other one" for at in damaged]
    return CheckResult(corruptions + len(damaged), messages=tuple(messages[:_MESSAGES]))


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


def _check_table(mapping: DynamicMapping, control: Control) -> list[str]:
    control.total = len(mapping.table)
    host = hosts(mapping, 0, len(mapping.table))
    bad = suspects(mapping, 0, host)
    messages = [
        f"ERROR block {block}: table entry {mapping.table[block]:#010x} points past the end of the file "
        f"({mapping.file.size:#x}) or where headers lie"
        for block in np.flatnonzero(bad).tolist()
    ]
    order = np.argsort(host, kind="stable")
    order = order[host[order] >= 0]
    length = mapping.bitmap_size + mapping.block_size
    shared = np.flatnonzero(np.diff(host[order]) < length) + 1
    messages += [
        f"ERROR block {order[row]}: its space at {host[order[row]]:#x} is used by block {order[row - 1]} as well"
        for row in shared.tolist()
    ]
    control.advance(len(mapping.table))
    return messages
