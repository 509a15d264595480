"""Preallocation of a range of an open image ("metadata", "falloc", "full"), as resizing wants it."""

from __future__ import annotations

from ...io import engine
from ...io.buffers import zero_view
from ...io.extent import COMPRESSED, DATA, MAY_UNMAP
from ...typing import TYPE_CHECKING, Final
from ...units import align_down, align_up

if TYPE_CHECKING:
    from ..base import Placement
    from .image import Qcow2Node

__all__ = ["preallocate"]

_STEP: Final = 1 << 20


def preallocate(node: Qcow2Node, start: int, end: int, mode: str) -> None:
    """Give every cluster of ``[start, end)`` space that reads as zeroes.

    :param mode: "metadata" (map it only), "falloc" (reserve the blocks) or "full" (write zeroes)
    """
    offset = align_down(start, node.cluster_size)
    if _occupied(node, offset, start):
        # The first cluster may hold what lies before ``start``: writing to it keeps that.
        offset = min(align_up(start, node.cluster_size), end)
        engine._zero_as_data(node, start, offset, 0)
    host_end = 0
    while offset < end:
        with node.lock:
            node.check_failure()
            node.inflight.wait_all()
            placements = node.reserve(offset, min(end - offset, 64 << 20))
            fresh = [placement for placement in placements if placement.fresh]
            try:
                for placement in fresh:
                    _fill(node, placement, mode)
                    host_end = max(host_end, placement.host + placement.length)
            except BaseException:
                node.cancel(fresh)
                raise
            node.publish(fresh)
            offset = placements[-1].offset + placements[-1].length
    data = node.sources[0].node
    if host_end > data.size:
        data.resize(host_end, preallocation="falloc" if mode == "falloc" else "off")
    node.flush()


def _occupied(node: Qcow2Node, start: int, end: int) -> bool:
    """Whether part of a cluster, ``[start, end)``, has space of its own or reads as anything but zeroes."""
    if start >= end:
        return False
    with node.lock:
        mapped = any(extent.kind in (DATA, COMPRESSED) for extent in node.lookup(start, end - start))
    return mapped or not engine.reads_zero(node, start, end - start)


def _fill(node: Qcow2Node, placement: Placement, mode: str) -> None:
    """Make the space read as zeroes; its blocks are reserved or written, as the mode says."""
    target = node.sources[placement.source].node
    if mode == "full":
        for start in range(0, placement.length, _STEP):
            target.write_from(placement.host + start, zero_view(min(_STEP, placement.length - start)))
    elif mode == "falloc" or not placement.zeroed:
        target.write_zeroes(placement.host, placement.length, 0 if mode == "falloc" else MAY_UNMAP)
