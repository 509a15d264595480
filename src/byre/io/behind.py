"""Reading and writing behind the end of a disk, where a format keeps the state of a machine.

The area lies in the same tables as the disk, but it is no part of it: no backing file shows through, nothing becomes a
zero write, and no bitmap of the disk is marked.
"""

from __future__ import annotations

from ..errors import ReadOnly
from ..typing import TYPE_CHECKING
from . import engine, sectors
from .buffers import zero_fill

if TYPE_CHECKING:
    from ..formats.base import FormatNode

__all__ = ["read", "write"]


def read(node: FormatNode, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from guest offset ``offset``, zeroes where nothing was written."""
    if (offset | len(buffer)) & node.sector_mask:
        sectors.read(node, offset, buffer, read)
        return
    for _, _, view in engine.read_layer(node, offset, buffer, offset + len(buffer)):
        zero_fill(view)


def write(node: FormatNode, offset: int, buffer: memoryview) -> None:
    """Write whole clusters at guest offset ``offset``.

    :raises ReadOnly: the node is read-only
    """
    if node.read_only:
        raise ReadOnly("cannot write: the image is open read-only", where=node.filename)
    done = 0
    while done < len(buffer):
        done += engine.write_step(node, offset + done, buffer[done:])
