"""Snapshot access: a disk as it was when the copy-before-write filter below was put in place; read-only.

Driver ``snapshot-access``: ``file`` is that filter. Discarding a range says that it will not be read again: it need
not be copied any more, and reading it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument, NotSupported
from ..graph import chain
from ..graph.node import PERM_ALL, PERM_READ, Node
from ..io.extent import DATA, NO_HOST, UNALLOCATED, ZERO, Extent
from ..options import OptionSet
from .point_in_time import KeepsSnapshot

if TYPE_CHECKING:
    from ..graph.child import Child
    from ..graph.opening import OpenRequest
    from ..io.extentmap import ExtentMap

__all__ = ["SnapshotAccessNode"]

OPTIONS: Final = OptionSet()
CHILDREN: Final = ("file",)


def open_node(request: OpenRequest) -> SnapshotAccessNode:
    spec = request.children.get("file")
    if spec is None:
        raise InvalidArgument("driver 'snapshot-access' needs a child 'file'")
    below = request.opener.open(spec, request.flags)
    if not isinstance(below, KeepsSnapshot):
        raise InvalidArgument(f"driver 'snapshot-access' stands on a copy-before-write filter, not on {below.driver!r}",
                              where=below.filename)  # fmt: skip
    node = SnapshotAccessNode(name=request.name, filename=below.filename, read_only=request.flags.read_only)
    request.opener.adopt(node)
    request.opener.graph.attach(node, "file", below, "data")
    return node


class SnapshotAccessNode(Node):
    """Reads the earlier state. A node of its own kind, not a filter: it reads differently from what is below."""

    driver = "snapshot-access"
    kind = "format"

    @property
    def below(self) -> KeepsSnapshot:
        node = self.children["file"].node
        assert isinstance(node, KeepsSnapshot)
        return node

    @property
    def size(self) -> int:
        return self.below.state.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), self.size - offset))
        if inside:
            self.below.read_snapshot(offset, buffer[:inside])
        buffer[inside:] = bytes(len(buffer) - inside)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        raise NotSupported("the earlier state of a disk cannot be written to", where=self.filename)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        raise NotSupported("the earlier state of a disk cannot be written to", where=self.filename)

    def discard(self, offset: int, length: int) -> None:
        self.below.discard_snapshot(offset, min(length, self.size - offset))

    def block_status(self, offset: int, length: int) -> Extent:
        if offset >= self.size:
            return Extent(offset, length, ZERO)
        return next(iter(self.extents(offset, min(length, self.size - offset))))

    def extents(self, offset: int, length: int) -> ExtentMap:
        """DATA and ZERO, without hosts: the bytes lie now here, now there."""
        import numpy as np

        from ..io.extentmap import ExtentMap

        parts = []
        state = self.below.state
        claim, pieces = state.begin_read(offset, length, looking=True)
        try:
            for at, size, copied in pieces:
                found = chain.extents(self.below.target if copied else self.below.below, at, size)
                kind = np.where(np.isin(found.kind, (ZERO, UNALLOCATED)), ZERO, DATA).astype(np.uint8)
                parts.append(ExtentMap(found.offset, found.length, kind, np.full(len(found), NO_HOST, np.int64)))
        finally:
            state.end_read(claim)
        return ExtentMap.concatenate(parts).coalesced()

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        return PERM_READ, PERM_ALL
