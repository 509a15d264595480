"""The filter of a mirror: sees every write to the source and marks it dirty, or writes it to the target as well.

Made by the mirror job (driver ``mirror_top``), never opened. A write is marked when its bytes are there; the job
clears the mark before it reads. In write-blocking mode the mark is only made if one of the two writes fails: what was
in step stays so.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from ..errors import Busy, ByreError, NotSupported
from ..graph.node import PERM_ALL, PERM_RESIZE, PERM_WRITE
from ..options import OptionSet
from .base import FilterNode, RangeLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..bitmaps.bitmap import Bitmap
    from ..graph.child import Child
    from ..graph.node import Node
    from ..graph.opening import OpenRequest

__all__ = ["MirrorTopNode"]

OPTIONS: Final = OptionSet()
CHILDREN: Final = ("file",)


def open_node(request: OpenRequest) -> FilterNode:
    raise NotSupported(f"driver {request.row.name!r} is for mirror jobs; it cannot be opened")


class Witness(Protocol):
    """Is told of changes before they happen, and once they are marked; see :class:`byre.jobs.journal.Journal`."""

    def begin_change(self, offset: int, length: int) -> tuple[int, int]: ...
    def end_change(self, entry: tuple[int, int]) -> None: ...


class MirrorTopNode(FilterNode):
    """Marks ``dirty`` with what is written to ``file``.

    :ivar dirty: where source and target may differ
    :ivar ranges: keeps the job's copying apart from writes to both sides
    :ivar blocking: writes go to the child ``target`` before the caller is told; changed while no request is under way
    :ivar alone: nobody else may write to the source; not where the target lies below it
    :ivar witness: told of every change; ``None`` where nobody wants to know
    """

    driver = "mirror_top"

    def __init__(self, dirty: Bitmap, *, name: str = "", alone: bool = True) -> None:
        super().__init__(name=name)
        self.dirty = dirty
        self.ranges = RangeLock()
        self.blocking = False
        self.alone = alone
        self.witness: Witness | None = None

    # -- requests ---------------------------------------------------------------------------------

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self._change(offset, len(buffer), lambda node: node.write_from(offset, buffer, flags))

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        self._change(offset, sum(map(len, buffers)), lambda node: node.writev_from(offset, buffers, flags))

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self._change(offset, length, lambda node: node.write_zeroes(offset, length, flags))

    def discard(self, offset: int, length: int) -> None:
        # What a discarded range reads as differs from format to format: it is copied like any other change.
        with self._witnessed(offset, length):
            entry = self.ranges.enter(offset, offset + length, True) if self.blocking else None
            try:
                self.below.discard(offset, length)
            finally:
                self._mark(offset, length)
                if entry is not None:
                    self.ranges.leave(entry)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        raise Busy("the size cannot change while the disk is mirrored", where=self.filename)

    def _change(self, offset: int, length: int, action: Callable[[Node], None]) -> None:
        with self._witnessed(offset, length):
            if self.blocking:
                self._change_both(offset, length, action)
                return
            try:
                action(self.below)
            finally:
                # A write that failed may have changed something.
                self._mark(offset, length)

    @contextmanager
    def _witnessed(self, offset: int, length: int) -> Iterator[None]:
        witness = self.witness
        if witness is None:
            yield
            return
        entry = witness.begin_change(offset, length)
        try:
            yield
        finally:
            witness.end_change(entry)

    def _mark(self, offset: int, length: int) -> None:
        if length > 0:
            self.dirty.mark(offset, length)

    def _change_both(self, offset: int, length: int, action: Callable[[Node], None]) -> None:
        """Write to both; the parts at the ends are clean afterwards only if they were before."""
        entry = self.ranges.enter(offset, offset + length, True)
        same = False
        try:
            action(self.below)
            same = self._write_target(action)
        finally:
            if same:
                self.dirty.clear(offset, length)
            else:
                self._mark(offset, length)
            self.ranges.leave(entry)

    def _write_target(self, action: Callable[[Node], None]) -> bool:
        try:
            action(self.children["target"].node)
        except ByreError:
            return False  # the job tries again, and does what its policy says
        return True

    # -- permissions ------------------------------------------------------------------------------

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        if child.name == "target":
            return PERM_WRITE, PERM_ALL
        if self.parents and self.alone:
            # A write that does not come through here would not be seen.
            return used, shared & ~(PERM_WRITE | PERM_RESIZE)
        return used, shared
