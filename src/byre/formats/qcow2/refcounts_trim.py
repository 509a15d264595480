"""Shrinking files: refcount blocks that are not needed any more, and the last cluster that is in use.

A block that lies in the middle of free space would keep the file from being cut off there.
"""

from __future__ import annotations

from ...errors import Corrupt
from ...typing import TYPE_CHECKING, Final
from .entries import REFCOUNT_OFFSET_MASK, get_refcount, set_refcount

if TYPE_CHECKING:
    from .refcounts import Refcounts

__all__ = ["drop_empty_blocks", "used_clusters"]

_ROUNDS: Final = 4
"""How often to look again: a block may be counted in another one that becomes empty by that."""


def drop_empty_blocks(refcounts: Refcounts) -> None:
    """Let go of refcount blocks that count nothing but such blocks; lock held, durable on return.

    **table without them | counts of their clusters.** A crash in between leaves leaks. Where the table contradicts
    itself, nothing changes.
    """
    for _ in range(_ROUNDS):
        try:
            empty = _empty_blocks(refcounts)
        except Corrupt:
            return
        if not empty:
            return
        refcounts.table = refcounts.table[:]  # whoever remembers where blocks lie must look again
        for index, cluster in empty.items():
            refcounts.set_entry(index, 0)
            refcounts.blocks.forget(cluster << refcounts.cluster_bits)
        refcounts.write_back()
        refcounts.file.flush()
        for cluster in empty.values():
            if refcounts.table[cluster >> refcounts.block_bits]:
                refcounts.release(cluster << refcounts.cluster_bits, 1)
        refcounts.write_back()
        refcounts.file.flush()


def _empty_blocks(refcounts: Refcounts) -> dict[int, int]:
    """Cluster of each block, by its index in the table, that counts itself and other such blocks at most.

    :raises Corrupt: the table contradicts itself
    """
    table, bits = refcounts.table, refcounts.cluster_bits
    clusters = [(entry & REFCOUNT_OFFSET_MASK) >> bits for entry in table if entry]
    if len(set(clusters)) != len(clusters) or any(
        cluster >> refcounts.block_bits >= len(table) for cluster in clusters
    ):
        raise Corrupt("two refcount blocks lie at one place, or one is not counted", where=refcounts.where)
    empty: dict[int, int] = {}
    inside: dict[int, list[int]] = {}
    # From the end on: a block lies in its own range, or in one before it.
    for index in range(len(table) - 1, -1, -1):
        block = refcounts._block(index)
        if block is None or block.data is None:
            continue
        cluster = block.host >> bits
        own = [cluster] if cluster >> refcounts.block_bits == index else []
        if _counts_only(refcounts, block.data, [*own, *inside.get(index, ())]):
            empty[index] = cluster
            inside.setdefault(cluster >> refcounts.block_bits, []).append(cluster)
    return empty


def _counts_only(refcounts: Refcounts, data: bytearray, clusters: list[int]) -> bool:
    """Whether every count is 0 but those of these clusters, which are 1."""
    if len(data) - data.count(0) > len(clusters):
        return False
    rest = bytearray(data)
    for cluster in clusters:
        low = cluster & (refcounts.block_entries - 1)
        if get_refcount(rest, low, refcounts.order) != 1:
            return False
        set_refcount(rest, low, refcounts.order, 0)
    return rest.count(0) == len(rest)


def used_clusters(refcounts: Refcounts) -> int:
    """How many clusters the file needs: those up to the last that is counted. Lock held.

    :raises Corrupt: an entry of the refcount table makes no sense
    """
    last = min(-(-refcounts.file.size >> refcounts.cluster_bits), len(refcounts.table) << refcounts.block_bits)
    while last > 0:
        index = last - 1 >> refcounts.block_bits
        base = index << refcounts.block_bits
        block = refcounts._block(index)
        if block is not None and block.data is not None:
            stop = ((last - base << refcounts.order) + 7) // 8
            found = len(block.data[:stop].rstrip(b"\0"))
            if found:
                last = min(last, base + (found * 8 - 1 >> refcounts.order) + 1)
                while not get_refcount(block.data, last - 1 - base, refcounts.order):
                    last -= 1
                return last
        last = base
    return 0
