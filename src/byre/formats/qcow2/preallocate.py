"""Preallocation of a range of an open image ("metadata", "falloc", "full"), as resizing wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...io.extent import MAY_UNMAP
from ...units import align_down

if TYPE_CHECKING:
    from .image import Qcow2Node

__all__ = ["preallocate"]


def preallocate(node: Qcow2Node, start: int, end: int, mode: str) -> None:
    """Give every cluster of ``[start, end)`` space that reads as zeroes.

    :param mode: "metadata" (map it only), "falloc" (reserve the blocks) or "full" (write zeroes)
    """
    offset = align_down(start, node.cluster_size)
    host_end = 0
    while offset < end:
        with node.lock:
            node.check_failure()
            node.inflight.wait_all()
            placements = node.reserve(offset, min(end - offset, 64 << 20))
            fresh = [placement for placement in placements if placement.fresh]
            for placement in fresh:
                target = node.sources[placement.source].node
                if mode == "full":
                    target.write_zeroes(placement.host, placement.length)
                elif not placement.zeroed:
                    target.write_zeroes(placement.host, placement.length, 0 if mode == "falloc" else MAY_UNMAP)
                host_end = max(host_end, placement.host + placement.length)
            node.publish(fresh)
            offset = placements[-1].offset + placements[-1].length
    data = node.sources[0].node
    if host_end > data.size:
        data.resize(host_end, preallocation="falloc" if mode == "falloc" else "off")
    node.flush()
