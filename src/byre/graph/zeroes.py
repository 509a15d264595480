"""Zero detection on any node: writes of nothing but zeroes become zero writes (``detect-zeroes=on|unmap``).

Formats do this themselves, in the engine. For filters and protocols, the writing methods of that one node are
replaced when it is opened, so that nodes without the option pay nothing for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import NotSupported
from ..io.buffers import is_zero
from ..io.extent import FUA, MAY_UNMAP, NO_FALLBACK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .node import Node

__all__ = ["detect_zeroes"]


def detect_zeroes(node: Node, mode: str) -> None:
    """:param mode: "on", or "unmap": the space may be given back"""
    if hasattr(node, "detect_zeroes"):
        node.detect_zeroes = mode
        return
    write, writev = node.write_from, node.writev_from
    kind = NO_FALLBACK | (MAY_UNMAP if mode == "unmap" else 0)

    def zeroed(offset: int, length: int, flags: int) -> bool:
        # Without a quick way, the buffer at hand is as good as any.
        try:
            node.write_zeroes(offset, length, flags & FUA | kind)
        except NotSupported:
            return False
        return True

    def write_from(offset: int, buffer: memoryview, flags: int = 0) -> None:
        if not len(buffer) or not is_zero(buffer) or not zeroed(offset, len(buffer), flags):
            write(offset, buffer, flags)

    def writev_from(offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        length = sum(map(len, buffers))
        if not length or not all(map(is_zero, buffers)) or not zeroed(offset, length, flags):
            writev(offset, buffers, flags)

    vars(node).update(write_from=write_from, writev_from=writev_from)
