"""Layers by the files they lie in: which file a layer is, and which layer a name means."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

from ..errors import ByreError
from . import chain
from .opening import has_protocol, resolve_backing

if TYPE_CHECKING:
    from .node import Node

__all__ = ["find_layer", "identity", "same_file"]


def identity(node: Node) -> object:
    """What tells the file under ``node`` from all others, (device, inode) for one; ``None`` if it has none."""
    while "file" in node.children:
        node = node.children["file"].node
    return getattr(node, "identity", None)


def same_file(node: Node, path: str) -> bool:
    """Whether ``path`` is the file that ``node`` lies in."""
    mine = identity(node)
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return False
    return mine is not None and mine in ((found.st_dev, found.st_ino), ("device", found.st_rdev))


def find_layer(top: Node, name: str) -> Node | None:
    """The layer below ``top`` that ``name`` means, ``None`` if there is none.

    As the layer above it records it, as it is called in messages, or as a path relative to the layer above.
    """
    layers = chain.layers(top)
    for above, layer in pairwise(layers):
        if name and name in (getattr(above, "backing_name", ""), layer.name):
            return layer
        if has_protocol(name):
            if name == layer.filename:
                return layer
            continue
        try:
            if same_file(layer, resolve_backing(above.filename, name)):
                return layer
        except ByreError:
            continue  # the layer above lies in no folder
    return None
