"""Checking a VHDX image: every entry of its block table, as a whole (numpy).

Nothing is mended but the log, which is replayed when an image is opened for writing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ...units import MIB
from ..abilities import CheckResult
from ..clusterset import ClusterSet
from . import layout
from .mapping_bulk import payload_entries, suspects

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .image import VhdxNode

__all__ = ["check_image"]

_WINDOW: Final = 1 << 17
_UNITS: Final = 1 << 18
"""Mebibytes that are looked at in one step."""
_MESSAGES: Final = 1000
"""Findings that are told one by one."""


class _Findings:
    def __init__(self) -> None:
        self.count = 0
        self.messages: list[str] = []

    def add(self, message: str, count: int = 1) -> None:
        self.count += count
        if len(self.messages) < _MESSAGES:
            self.messages.append(f"ERROR {message}")


def check_image(node: VhdxNode, control: Control) -> CheckResult:
    """Whether every block lies inside the file, where nothing else lies, and has a state that exists."""
    mapping = node.mapping
    findings = _Findings()
    fixed = int(node.replayed)
    node.replayed = False
    blocks = -(-mapping.size // mapping.block_size)
    control.total = blocks
    taken = ClusterSet()  # of mebibytes of the file; a block takes whole ones
    for first in range(0, blocks, _WINDOW):
        count = min(_WINDOW, blocks - first)
        with node.lock:
            entries = payload_entries(mapping, first, count)
        _check_window(node, first, entries, taken, findings)
        control.advance(count)
    return CheckResult(corruptions=findings.count, corruptions_fixed=fixed, messages=tuple(findings.messages))


def _check_window(node: VhdxNode, first: int, entries: NDArray[np.uint64], taken: ClusterSet,
                  findings: _Findings) -> None:  # fmt: skip
    mapping = node.mapping
    state = (entries & np.uint64(layout.STATE_MASK)).astype(np.uint8)
    host = (entries & np.uint64(layout.OFFSET_MASK)).view(np.int64)
    start = np.arange(first, first + len(entries), dtype=np.int64) << mapping.block_bits
    bad = suspects(mapping, state, host, start)
    for row in np.flatnonzero(bad).tolist():
        findings.add(f"block {first + row}: table entry {int(entries[row]):#018x} has state "
                     f"{layout.BLOCK_NAMES[state[row]]} and offset {int(host[row]):#x}; the file has "
                     f"{mapping.file.size:#x} bytes")  # fmt: skip
    held = ((state == layout.FULLY_PRESENT) | (state == layout.PARTIALLY_PRESENT)) & ~bad
    reserved = np.flatnonzero(held & (entries & np.uint64(layout.RESERVED_MASK) != 0))
    for row in reserved.tolist():
        findings.add(f"block {first + row}: table entry {int(entries[row]):#018x} has reserved bits set")
    per_block = mapping.block_size // MIB
    rows, step = np.flatnonzero(held), max(_UNITS // per_block, 1)
    for at in range(0, len(rows), step):
        part = rows[at : at + step]
        units = (host[part] // MIB)[:, None] + np.arange(per_block)
        again = taken.add(units.reshape(-1))
        if len(again):
            for row in part[np.isin(units, again).any(axis=1)].tolist():
                findings.add(f"block {first + row}: its space at {int(host[row]):#x} is used by another block as well")
