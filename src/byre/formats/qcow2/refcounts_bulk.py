"""Reference counts of many clusters at once (numpy): what snapshots raise, lower and look up.

The bulk counterpart of :class:`.refcounts.Refcounts`, working on one refcount block after the other, so that memory
does not grow with the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import Corrupt, InvalidArgument
from ...io.tables import PAGE
from .entries_bulk import pack_refcounts, unpack_refcounts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...io.tables import Table
    from .refcounts import Refcounts

    Clusters = NDArray[np.int64]

__all__ = ["RefcountOverflow", "add_many", "check_many", "counted", "get_many"]


class RefcountOverflow(InvalidArgument):
    """A count would exceed what the width of the image's reference counts can hold."""


def counted(clusters: Clusters) -> tuple[Clusters, NDArray[np.uint64]]:
    """The distinct clusters, ascending, and how often each occurs."""
    # Stable sorting takes next to no time where there are few runs, which is the rule; np.unique knows only the other.
    ordered = np.sort(clusters, kind="stable")
    new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    first = np.flatnonzero(new)
    if len(first) == len(ordered):
        return ordered, np.ones(len(ordered), np.uint64)
    return ordered[first], np.diff(first, append=len(ordered)).astype(np.uint64)


def get_many(refcounts: Refcounts, clusters: Clusters) -> NDArray[np.uint64]:
    """The counts of ``clusters`` (ascending); 0 where there is no refcount block."""
    found = np.zeros(len(clusters), np.uint64)
    for index, first, end in _by_block(refcounts, clusters):
        block = refcounts._block(index)
        if block is not None:
            found[first:end] = _values(refcounts, block)[clusters[first:end] & (refcounts.block_entries - 1)]
    return found


def add_many(refcounts: Refcounts, clusters: Clusters, times: NDArray[np.uint64], *, down: bool = False) -> Clusters:
    """Raise the counts of ``clusters`` (ascending, distinct) by ``times``, or lower them; all or none.

    :returns: the clusters whose count is 0 now
    :raises RefcountOverflow: a count would become too large
    :raises Corrupt: a count would become negative, or has no block
    """
    now = check_many(refcounts, clusters, times, down=down)
    new = now - times if down else now + times
    for index, first, end in _by_block(refcounts, clusters):
        block = refcounts._block(index)
        if block is not None:
            _store(refcounts, block, clusters[first:end] & (refcounts.block_entries - 1), new[first:end])
    freed: Clusters = clusters[new == 0]
    return freed


def check_many(refcounts: Refcounts, clusters: Clusters, times: NDArray[np.uint64], *,
               down: bool = False) -> NDArray[np.uint64]:  # fmt: skip
    """Whether :func:`add_many` would succeed; the counts as they are.

    :raises RefcountOverflow: a count would become too large
    :raises Corrupt: a count is lower than what is known to refer to its cluster
    """
    now = get_many(refcounts, clusters)
    bad = now < times if down else now == 0
    if bad.any():
        at = int(np.argmax(bad))
        raise Corrupt(f"the refcount of host cluster {int(clusters[at])} is {int(now[at])}, but more refers to it",
                      where=refcounts.where, hint='run "byre check -r all"')  # fmt: skip
    if down:
        return now
    # A sum of 64-bit counts that wraps around is smaller than what it began with.
    bad = (now + times > np.uint64(refcounts.maximum)) | (now + times < now)
    if bad.any():
        at = int(np.argmax(bad))
        raise RefcountOverflow(
            f"the refcount of host cluster {int(clusters[at])} would become {int(now[at]) + int(times[at])}, allowed "
            f"is at most {refcounts.maximum} with refcount_bits={1 << refcounts.order}", where=refcounts.where,
            hint="use an image with a larger refcount_bits")  # fmt: skip
    return now


def _by_block(refcounts: Refcounts, clusters: Clusters) -> Iterator[tuple[int, int, int]]:
    """(block number, first, end) of the runs of ``clusters`` that one refcount block counts."""
    if not len(clusters):
        return
    blocks = clusters >> refcounts.block_bits
    starts = np.concatenate(([0], np.flatnonzero(blocks[1:] != blocks[:-1]) + 1, [len(blocks)]))
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield int(blocks[first]), first, end


def _values(refcounts: Refcounts, block: Table) -> NDArray[Any]:
    """The entries of a block: a view of its bytes where entries are whole bytes, else a copy."""
    assert block.data is not None
    if refcounts.order < 3:
        return unpack_refcounts(block.data, refcounts.order)
    return np.frombuffer(block.data, f">u{1 << (refcounts.order - 3)}")


def _store(refcounts: Refcounts, block: Table, low: Clusters, new: NDArray[np.uint64]) -> None:
    assert block.data is not None
    order = refcounts.order
    values = _values(refcounts, block)
    values[low] = new
    if order < 3:
        block.data[:] = pack_refcounts(values, order)
    for page in np.unique((low << order >> 3) // PAGE).tolist():
        refcounts.blocks.mark(block, page * PAGE, page * PAGE)
