"""Metadata contexts: what block status answers about a range, for each context an export has.

``base:allocation`` is the protocol's; ``qemu:allocation-depth`` and ``qemu:dirty-bitmap:NAME`` are described in the
peer's documentation (docs/interop/nbd.txt).
"""

from __future__ import annotations

from time import monotonic, thread_time
from typing import TYPE_CHECKING, Final

from ..graph import chain
from ..io.extent import UNALLOCATED, ZERO
from ..nbd import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ..bitmaps.bitmap import Bitmap
    from ..graph.node import Node
    from ..image import Image
    from ..io.extentmap import ExtentMap

__all__ = ["Context", "allocation", "allocation_depth", "dirty", "whole_blocks", "zero_run"]

if TYPE_CHECKING:
    Context = Callable[[Image, int, int, int], list[tuple[int, int]]]
    """(image, offset, length, limit) -> (length, flags) of extents; see :meth:`byre.nbd.disk.Disk.status`."""

_FEW: Final = 16
"""So many extents are looked up one by one, as most clients ask for one; more in windows, which numpy makes cheaper."""
_FIRST_WINDOW: Final = 16 << 20
"""Bytes of the first window. Later ones are twice as long each while there is not much in them."""
_MUCH: Final = 1024
"""Extents of a window."""
_MOST: Final = 1 << 17
"""The same, whatever there is in it."""
_BUSY: Final = 0.1
"""Seconds of a processor after which an answer is what was found until then: others wait, and the client asks on."""
_SECONDS: Final = 1.0
"""The same by the clock, and where there are a few extents only: who asks for many does not expect so few."""


def zero_run(node: Node, offset: int, length: int) -> tuple[bool, int]:
    """(whether it reads as zeroes, length) of the first run in a range, as far as metadata of the whole chain says."""
    kind, length, _ = _resolve(node, offset, length)
    return kind in (ZERO, UNALLOCATED), length


def _resolve(node: Node, offset: int, length: int) -> tuple[int, int, int]:
    """(kind, length, depth) of the first extent of a range; UNALLOCATED if no layer holds it."""
    depth = 0
    while True:
        node = chain.skip_filters(node)
        inside = node.size - offset
        if depth and inside <= 0:
            return ZERO, length, depth
        extent = node.block_status(offset, min(length, inside) if depth else length)
        length = extent.length
        backing = node.children.get("backing")
        if extent.kind != UNALLOCATED or backing is None:
            return extent.kind, length, depth
        node = backing.node
        depth += 1


def _runs(
    image: Image,
    offset: int,
    length: int,
    limit: int,
    flags_of: Callable[[int, int], int],
    all_flags_of: Callable[[ExtentMap], NDArray[np.int64]],
) -> list[tuple[int, int]]:
    """Extents with the flags of ``flags_of(kind, depth)``, or ``all_flags_of`` a map; alike neighbours are one."""
    runs: list[tuple[int, int]] = []
    end = offset + length
    for _ in range(_FEW):
        if offset >= end:
            return runs
        node = image.begin_batch()
        try:
            kind, step, depth = _resolve(node, offset, end - offset)
        finally:
            image.end_batch(0, 0, 0, 0, 0)
        if not _join(runs, step, flags_of(kind, depth), limit):
            return runs
        offset += step
    window, longest = _FIRST_WINDOW, _longest_window(image.node)
    started, began = thread_time(), monotonic()
    while offset < end:
        size = min(window - offset % window, end - offset)
        found = image.extents(offset, size)
        for step, flags in _coalesced(found.length, all_flags_of(found), limit + 1):
            if not _join(runs, step, flags, limit):
                return runs
        if monotonic() - began > _SECONDS or (len(runs) > _FEW and thread_time() - started > _BUSY):
            return runs
        offset += size
        if len(found.length) < _MUCH:
            window = min(window * 2, longest)
    return runs


def _longest_window(top: Node) -> int:
    """Bytes in which there are no more than ``_MOST`` extents, or those of one mapping table."""
    unit = min(layer.cluster_size if layer.layered else 0 for layer in chain.layers(top))  # type: ignore[attr-defined]
    return max(chain.window_size(top), min(chain.WINDOW_LIMIT, unit * _MOST))


def _coalesced(lengths: NDArray[np.int64], flags: NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """(length, flags) of the first ``limit`` runs of alike neighbours."""
    import numpy as np

    starts = np.concatenate(([0], np.flatnonzero(flags[1:] != flags[:-1]) + 1))
    sums = np.add.reduceat(lengths, starts)
    return zip(sums[:limit].tolist(), flags[starts[:limit]].tolist(), strict=True)


def _join(runs: list[tuple[int, int]], length: int, flags: int, limit: int) -> bool:
    """Add an extent; False if it would be one too many."""
    if runs and runs[-1][1] == flags:
        runs[-1] = runs[-1][0] + length, flags
    elif len(runs) >= limit:
        return False
    else:
        runs.append((length, flags))
    return True


def allocation(image: Image, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """``base:allocation``: holes that read as zeroes, or data."""
    hole = wire.STATE_HOLE | wire.STATE_ZERO

    def all_flags_of(found: ExtentMap) -> NDArray[np.int64]:
        flags: NDArray[np.int64] = ((found.kind == ZERO) | (found.kind == UNALLOCATED)).astype("i8") * hole
        return flags

    return _runs(image, offset, length, limit, lambda kind, _: hole if kind in (ZERO, UNALLOCATED) else 0, all_flags_of)


def allocation_depth(image: Image, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """``qemu:allocation-depth``: which layer holds a range: 1 for the active one, 0 for none."""

    def all_flags_of(found: ExtentMap) -> NDArray[np.int64]:
        flags: NDArray[np.int64] = (found.depth.astype("i8") + 1) * (found.kind != UNALLOCATED)
        return flags

    return _runs(
        image, offset, length, limit, lambda kind, depth: 0 if kind == UNALLOCATED else depth + 1, all_flags_of
    )


def dirty(bitmap: Bitmap) -> Context:
    """``qemu:dirty-bitmap:NAME``."""

    def status(_image: Image, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        end = offset + length
        until = thread_time() + _BUSY
        while offset < end and len(runs) < limit and not (len(runs) > _FEW and thread_time() > until):
            found = bitmap.next_dirty(offset, end)
            start = end if found is None else found[0]
            if start > offset:
                runs.append((start - offset, 0))
            if found is not None and len(runs) < limit:
                runs.append((min(start + found[1], end) - start, wire.STATE_DIRTY))
            offset = end if found is None else start + found[1]
        return runs

    return status


def whole_blocks(runs: list[tuple[int, int]], unit: int) -> list[tuple[int, int]]:
    """The same in multiples of ``unit``, as a minimum block size demands; what a block has in parts only, it has not.

    The last block is left out where its end is not known; a single one is kept, with no flag.
    """
    found: list[tuple[int, int]] = []
    begun = flags = 0  # of a block that is not whole yet
    for length, each in runs:
        if begun:
            flags &= each
            step = min(length, unit - begun)
            begun, length = begun + step, length - step
            if begun < unit:
                continue
            _join(found, unit, flags, len(runs) + 1)
        whole = length // unit * unit
        if whole:
            _join(found, whole, each, len(runs) + 1)
        begun, flags = length - whole, each
    return found or [(unit, 0)]
