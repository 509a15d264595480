"""Chain: a view of active layer -> ... -> base, filters skipped. It holds no state; it walks the edges each time."""

from __future__ import annotations

from ..errors import NotFound
from ..io.extent import UNALLOCATED, ZERO
from ..typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..io.extentmap import ExtentMap
    from .node import Node

__all__ = ["WINDOW", "allocated_above", "depth", "extents", "find", "layers", "skip_filters", "windows"]

WINDOW: Final = 128 << 20
"""Bulk work walks a disk in steps of this many bytes (or one mapping table, if that is more)."""

WINDOW_LIMIT: Final = 4 << 30


def skip_filters(node: Node) -> Node:
    """The first node at or below ``node`` that is not a filter."""
    while node.kind == "filter" and "file" in node.children:
        node = node.children["file"].node
    return node


def layers(top: Node) -> list[Node]:
    """Every layer from ``top`` to its base."""
    return [layer for _, layer in _entries(top)]


def _entries(top: Node) -> Iterator[tuple[Node, Node]]:
    """Every layer from ``top`` to its base: (the filter through which it is reached or itself, the layer)."""
    node: Node | None = top
    while node is not None:
        layer = skip_filters(node)
        yield node, layer
        edge = layer.children.get("backing")
        node = edge.node if edge else None


def depth(top: Node) -> int:
    return len(layers(top))


def find(top: Node, name: str) -> Node:
    """The layer whose node name or file name is ``name``.

    :raises NotFound: the chain has none
    """
    for node in layers(top):
        if name in (node.name, node.filename):
            return node
    raise NotFound(f"{name!r} is not in the chain of {top.filename!r}")


def window_size(top: Node) -> int:
    """A window that spans whole mapping tables of every layer, bytes."""
    span = WINDOW
    for node in layers(top):
        span = max(span, min(getattr(node, "table_span", 0), WINDOW_LIMIT))
    return span


def windows(offset: int, end: int, step: int = WINDOW) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of consecutive windows up to ``end``, cut at multiples of ``step``."""
    while offset < end:
        length = min(step - offset % step, end - offset)
        yield offset, length
        offset += length


def extents(top: Node, offset: int, length: int, *, base: Node | None = None) -> ExtentMap:
    """What the range is, resolved over all layers above ``base`` (over all of them without one).

    A layer that ends before the range reads as zeroes behind its end where a layer above relies on it. What no
    layer holds stays UNALLOCATED. ``depth`` counts from ``top``.
    """
    from ..io.extentmap import ExtentMap

    result: ExtentMap | None = None
    for level, (entry, layer) in enumerate(_entries(top)):
        if layer is base:
            break
        # A filter may have something to say about it, if only that it cannot tell.
        part = _layer(entry, offset, length, level)
        result = part if result is None else result.overlay(part)
        if not (result.kind == UNALLOCATED).any():
            break
    if result is None:
        return ExtentMap.single(offset, length, UNALLOCATED)
    return result.coalesced()


def _layer(node: Node, offset: int, length: int, level: int) -> ExtentMap:
    """One layer over the range; behind its end it is ZERO, for that is what a layer above would read."""
    from ..io.extentmap import ExtentMap

    inside = max(0, min(length, node.size - offset))
    parts = [node.extents(offset, inside).with_depth(level)] if inside else []
    if inside < length:
        parts.append(ExtentMap.single(offset + inside, length - inside, ZERO, depth=level))
    return ExtentMap.concatenate(parts)


def allocated_above(top: Node, base: Node, offset: int, length: int) -> ExtentMap:
    """What the layers from ``top`` down to, but without, ``base`` hold; UNALLOCATED elsewhere."""
    return extents(top, offset, length, base=base)
