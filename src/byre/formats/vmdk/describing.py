"""What ``info`` says about a VMDK disk, keys in the peer's order."""

from __future__ import annotations

from ...typing import TYPE_CHECKING
from .extents import PlainExtent

if TYPE_CHECKING:
    from .extents import DiskExtent
    from .image import VmdkNode

__all__ = ["describe"]


def describe(node: VmdkNode) -> dict[str, object]:
    """``format-specific`` of ``info --output json``."""
    return {
        "cid": node.cid,
        "parent-cid": node.parent_cid,
        "create-type": node.create_type,
        "extents": [_extent(extent) for extent in node.extents_of_disk],
    }


def _extent(extent: DiskExtent) -> dict[str, object]:
    result: dict[str, object] = {"compressed": True} if extent.compressed else {}
    result["virtual-size"] = extent.size
    result["filename"] = extent.name
    if extent.grain and not isinstance(extent, PlainExtent):
        result["cluster-size"] = extent.grain
    result["format"] = extent.type
    return result
