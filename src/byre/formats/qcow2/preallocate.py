"""Preallocation of a range of an open image ("metadata", "falloc", "full"), as resizing wants it."""

from __future__ import annotations

from ...io import engine
from ...io.buffers import zero_view
from ...io.extent import MAY_UNMAP
from ...typing import TYPE_CHECKING, Final
from ...units import align_up

if TYPE_CHECKING:
    from ..base import Placement
    from .image import Qcow2Node

__all__ = ["preallocate"]

_STEP: Final = 1 << 20


def preallocate(node: Qcow2Node, start: int, end: int, mode: str) -> None:
    """Give every cluster of ``[start, end)`` space that reads as zeroes.

    :param mode: "metadata" (map it only), "falloc" (reserve the blocks) or "full" (write zeroes)
    """
    offset = min(align_up(start, node.cluster_size), end)
    # The first cluster may hold what lies before ``start``: writing to it keeps that.
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


def _fill(node: Qcow2Node, placement: Placement, mode: str) -> None:
    """Make the space read as zeroes; its blocks are reserved or written, as the mode says."""
    target = node.sources[placement.source].node
    if mode == "full":
        for start in range(0, placement.length, _STEP):
            target.write_from(placement.host + start, zero_view(min(_STEP, placement.length - start)))
    elif mode == "falloc" or not placement.zeroed:
        target.write_zeroes(placement.host, placement.length, 0 if mode == "falloc" else MAY_UNMAP)
