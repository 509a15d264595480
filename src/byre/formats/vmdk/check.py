"""Checking a VMDK disk: every table and every grain lies inside its file, no two share a place, both copies agree.

The peer looks whether grains begin inside the file. Here they must also lie behind the metadata, and apart. Space in
the file that nothing names is no error: writers leave it behind as a matter of course. Mending makes the second copy of
the tables equal to the first, the one that is read. Memory: four bytes for each grain that is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...errors import Corrupt, NotSupported
from ...io.extent import COMPRESSED, DATA
from ...units import SECTOR
from ..abilities import CheckResult
from .bulk import classify, has_repeats, table_entries
from .extents import PlainExtent, SparseExtent
from .layout import UNCLEAN_AT
from .opening import load_redundant
from .tables import encode_entries
from .writing import new_allocator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .allocation import Allocator
    from .extents import DiskExtent
    from .image import VmdkNode

__all__ = ["check_image", "equalize"]

_GRAINS_AT_ONCE: Final = 1 << 18
_MESSAGES: Final = 100


class _Findings:
    def __init__(self) -> None:
        self.corruptions = 0
        self.fixed = 0
        self.messages: list[str] = []

    def damage(self, message: str, count: int = 1) -> None:
        self.corruptions += count
        self.note(f"ERROR: {message}")

    def note(self, message: str) -> None:
        if len(self.messages) < _MESSAGES:
            self.messages.append(message)


def check_image(node: VmdkNode, control: Control, fix: str = "") -> CheckResult:
    """What is wrong, and with ``fix`` "all" (or "leaks", of which there are none) mended.

    :raises NotSupported: ``fix`` on a disk that can only be read
    """
    if fix and node.refusal:
        raise NotSupported(node.refusal, where=node.filename)
    found = _Findings()
    control.total = node.size
    for extent in node.extents_of_disk:
        if isinstance(extent, SparseExtent):
            _check_sparse(node, extent, control, found, fix)
        else:
            _check_plain(extent, found)
            control.advance(extent.size)
    if fix:
        node.flush()
    return CheckResult(corruptions=found.corruptions, corruptions_fixed=found.fixed, messages=tuple(found.messages))


def _check_plain(extent: DiskExtent, found: _Findings) -> None:
    if isinstance(extent, PlainExtent) and extent.file is not None and extent.base >= max(extent.file.size, 1):
        found.damage(f"extent at {extent.start:#x} begins at {extent.base:#x} of {extent.name}, which points after EOF")


def _check_sparse(node: VmdkNode, extent: SparseExtent, control: Control, found: _Findings, fix: str) -> None:
    index = node.extents_of_disk.index(extent)
    header = node.headers.get(index)
    floor = header.overhead * SECTOR if header is not None and not extent.compressed else SECTOR
    if header is not None and header.redundant:
        load_redundant(extent, header)
    if has_repeats(*extent.tables.copies):
        found.damage(f"two grain tables of {extent.name} share a place; nothing else is looked at")
        control.advance(extent.size)
        return
    if fix == "all" and header is not None and header.redundant:
        _mend(node, index, extent, found)
    places = bytearray()
    unit = np.dtype(np.uint32 if extent.tables.width == 4 else np.uint64)
    for first, last in _windows(len(extent.tables.copies[0]), max(_GRAINS_AT_ONCE // extent.tables.per_table, 1)):
        control.advance(min(extent.size - first * extent.span, (last - first) * extent.span))
        with node.lock:
            entries = _entries(extent, first, last, found)
            unclean = header is not None and bool(header.unclean)
            _compare_copies(extent, first, last, found, unclean=unclean)
        if entries is not None:
            places += (_check_entries(extent, entries, first, floor, found) // SECTOR).astype(unit).tobytes()
    _check_apart(extent, np.frombuffer(places, unit), found)


def _mend(node: VmdkNode, index: int, extent: SparseExtent, found: _Findings) -> None:
    """Both copies of the tables are made equal, and the extent says that it is closed."""
    header = node.headers[index]
    with node.lock:
        node.check_failure()
        allocator = extent.allocator or new_allocator(node, index, extent)
        try:
            found.fixed += equalize(extent, allocator)
            if header.unclean:
                allocator.file.flush()
                allocator.file.write_from(UNCLEAN_AT, memoryview(b"\0"))
        except BaseException as error:
            node.fail_stop(error)
            raise
        node.headers[index] = header._replace(unclean=0)


def _windows(count: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, step):
        yield first, min(first + step, count)


def _entries(extent: SparseExtent, first: int, last: int, found: _Findings) -> NDArray[Any] | None:
    """Entries of tables ``first`` to ``last``; ``None`` if one of them cannot be found, which is told."""
    try:
        return table_entries(extent, first, last)
    except Corrupt:
        parts = []
        for index in range(first, last):
            try:
                parts.append(table_entries(extent, index, index + 1))
            except Corrupt as error:
                sector = (extent.start + index * extent.span) // SECTOR
                found.damage(f"could not get cluster_offset for sector {sector}: {error.message}")
                parts.append(np.zeros(extent.tables.per_table, parts[0].dtype if parts else np.uint32))
        return np.concatenate(parts) if parts else None


def _check_entries(extent: SparseExtent, entries: NDArray[Any], first: int, floor: int,
                   found: _Findings) -> NDArray[np.int64]:  # fmt: skip
    """Hosts of the grains that may be; those that lie outside are told."""
    grains = -(-extent.size // extent.grain) - first * extent.tables.per_table
    try:
        kind, host = classify(extent, entries[: max(grains, 0)])
    except Corrupt as error:
        found.damage(error.message)
        return np.zeros(0, np.int64)
    assert extent.file is not None
    held = np.flatnonzero((kind == DATA) | (kind == COMPRESSED))
    host = host[held]
    size = extent.file.size
    bad = (host >= size) | (host < floor)
    for number in held[bad][:_MESSAGES].tolist():
        sector = (extent.start + (first * extent.tables.per_table + number) * extent.grain) // SECTOR
        place = int(entries[number])
        where = "points after EOF" if place * SECTOR >= size else "points into the metadata"
        found.damage(f"cluster offset for sector {sector} {where}", 0)
    found.corruptions += int(bad.sum())
    return host[~bad]


def _check_apart(extent: SparseExtent, sectors: NDArray[Any], found: _Findings) -> None:
    """No two grains in one place; ``sectors``, where they lie, are sorted in place."""
    sectors.sort()
    least = 1 if extent.compressed else extent.grain // SECTOR
    close = np.flatnonzero(np.diff(sectors) < least)
    for number in close[:_MESSAGES].tolist():
        found.damage(f"two grains share the place {int(sectors[number + 1]) * SECTOR:#x} in {extent.name}", 0)
    found.corruptions += len(close)


# -- the second copy ------------------------------------------------------------------------------


def _compare_copies(extent: SparseExtent, first: int, last: int, found: _Findings, *, unclean: bool) -> None:
    for index in _unequal(extent, first, last):
        if unclean:
            found.note(
                f"the redundant grain table {index} differs; the extent was not closed, writing to it mends that"
            )
        else:
            found.damage(f"the redundant grain table {index} differs from the first")


def _unequal(extent: SparseExtent, first: int, last: int) -> Iterator[int]:
    """Tables whose second copy differs. Where the first cannot be found, that is told elsewhere; where the second
    cannot be found, it harms nobody who reads."""
    tables = extent.tables
    for copy in range(1, len(tables.copies)):
        one, other = (np.frombuffer(tables.copies[number], np.uint32)[first:last] for number in (0, copy))
        for index in (np.flatnonzero(one | other) + first).tolist():
            try:
                table, host = tables.get(index), tables.host(index, copy)
            except Corrupt:
                continue
            second = bytearray(tables.table_size)
            if host:
                tables.file.read_into(host, memoryview(second))
            if second != (encode_entries(table) if table is not None else bytes(tables.table_size)):
                yield index


def equalize(extent: SparseExtent, allocator: Allocator) -> int:
    """Make every redundant table equal to the first copy; how many differed. The node's lock is held."""
    different = list(_unequal(extent, 0, len(extent.tables.copies[0])))
    for index in different:
        allocator.rewrite_table(index)
    allocator.write_back()
    return len(different)
