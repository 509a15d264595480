"""How large a qcow2 file gets: the arithmetic of ``measure``. No I/O.

The peer's rules, which overestimate a little: metadata is counted as if every cluster were allocated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...units import align_up
from .creation import cluster_bits_of, l1_entries_of, refcount_order_of, table_clusters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...options import OptionValues

__all__ = ["file_sizes", "touched_bytes"]


def file_sizes(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes.

    :param options: values of ``CREATE_OPTIONS``; with a backing file all clusters of the source are taken to be needed
    :param virtual_size: bytes; that of the source image if there is one
    :param data_bytes: bytes of the clusters (of this image) in which the source holds data, from
        :func:`touched_bytes`; ``None`` without a source
    :raises InvalidArgument: as creation would refuse
    """
    bits, order, extended = cluster_bits_of(options), refcount_order_of(options), options.flag("extended_l2")
    l1_entries_of(virtual_size, bits, extended_l2=extended)
    guest = align_up(virtual_size, 1 << bits)
    header = 0
    if any(name.startswith("encrypt") for name in options.given):
        from .encryption import planned_size

        header = align_up(planned_size(options), 1 << bits)
    full = _full_size(guest, bits, order, extended) + header
    if options.text("preallocation") in ("falloc", "full"):
        data_bytes = guest
    elif data_bytes is not None and options.text("backing_file"):
        # Nobody knows how much of the source the backing file holds as well.
        data_bytes = guest
    return full - guest + (data_bytes or 0), full


def _full_size(guest: int, bits: int, order: int, extended: bool) -> int:
    """Header, L1, L2, refcounts and ``guest`` bytes of data, each in whole clusters."""
    l2_tables = -(-(guest >> bits) >> (bits - (4 if extended else 3)))
    l1_clusters = -(-l2_tables * 8 >> bits)
    clusters = 1 + l2_tables + l1_clusters + (guest >> bits)
    table, blocks = table_clusters(clusters, bits, order)
    return (clusters + table + blocks) << bits


def touched_bytes(spans: Iterable[tuple[int, int]], cluster_size: int) -> int:
    """Bytes of the clusters in which ascending ``spans`` (offset, length) of data lie."""
    total = end = 0
    for offset, length in spans:
        first = max(end, offset - offset % cluster_size)
        last = align_up(offset + length, cluster_size)
        if last > first:
            total += last - first
            end = last
    return total
