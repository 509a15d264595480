"""Preallocation: a filter between a format and its file that has the file grow in large steps, ahead of writes.

Driver ``preallocate``. A write behind the end of the file allocates ``prealloc-size`` bytes more than it needs, up to a
multiple of ``prealloc-align``; those above see the length that they wrote. What is left over is cut off when the
file is closed or becomes read-only. After a crash it stays: no matter to a format with tables, but a raw disk would
be found longer than it was.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, cast

from ..errors import ByreError, InvalidArgument
from ..graph.node import PERM_RESIZE, PERM_WRITE
from ..options import Option, OptionSet
from ..units import SECTOR, align_up
from .base import NotifyingFilter, open_filtered

if TYPE_CHECKING:
    from ..graph.child import Child
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest
    from ..options import OptionValues

__all__ = ["PreallocateNode"]

OPTIONS: Final = OptionSet(
    Option("prealloc-align", "size", "multiple of bytes that the file is extended to", 1 << 20),
    Option("prealloc-size", "size", "bytes to allocate ahead", 128 << 20),
)
CHILDREN: Final = ("file",)


def open_node(request: OpenRequest) -> PreallocateNode:
    below = request.open_child("file", flags=request.flags._replace(detect_zeroes="off"))
    settings = _settings(request.options, below)
    node = PreallocateNode(*settings, name=request.name, read_only=request.flags.read_only)
    node.runtime = request.options
    open_filtered(request, node, "file", below)
    return node


def _settings(options: OptionValues, below: Node) -> tuple[int, int]:
    """(alignment, bytes ahead), checked."""
    align = options.number("prealloc-align")
    unit = max(below.limits.request_alignment, SECTOR)
    if not align or align % unit:
        raise InvalidArgument(f"prealloc-align is {align}: expected a multiple of {unit}", where=below.filename)
    return align, options.number("prealloc-size")


class PreallocateNode(NotifyingFilter):
    """Grows ``file`` ahead of the writes to it.

    Guarded by ``_lock``: ``_end``, ``_allocated``. It is held while the file is made longer, so those who write behind
    its end wait for that.

    :ivar align: bytes that the file's length is rounded up to
    :ivar ahead: bytes allocated in advance
    """

    driver = "preallocate"

    def __init__(
        self, align: int = 1 << 20, ahead: int = 128 << 20, *, name: str = "", read_only: bool = False
    ) -> None:
        super().__init__(name=name, read_only=read_only)
        self.align = align
        self.ahead = ahead
        self.runtime: OptionValues | None = None
        self._lock = threading.Lock()
        self._end = -1  # of what was written; -1 while nothing was, and the file's own length counts
        self._allocated = -1

    @property
    def size(self) -> int:
        return self._end if self._end >= 0 else self.below.size

    def before_write(self, offset: int, length: int) -> None:
        if not length:
            return
        end = offset + length
        with self._lock:
            if self._end < 0:
                self._end = self._allocated = self.below.size
            if end <= self._end:
                return
            if end > self._allocated:
                self._extend(end)
            self._end = end

    def _extend(self, end: int) -> None:
        """Make room; a failure is none, for the write itself may well succeed."""
        try:
            self.below.resize(align_up(end + self.ahead, self.align), preallocation="falloc")
        except ByreError:
            pass
        self._allocated = self.below.size

    def discard(self, offset: int, length: int) -> None:
        self.below.discard(offset, length)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        with self._lock:
            if self._end <= size <= self._allocated and preallocation in ("off", "falloc"):
                self._end = size  # it is there already, and nothing was written to it
                return
            self._drop()
            self.below.resize(size, preallocation=preallocation, exact=exact)

    def refresh_size(self) -> None:
        with self._lock:
            self._drop()
        self.below.refresh_size()

    def _drop(self) -> None:
        """Cut off what was allocated in advance; the file's own length counts from now on. Lock held."""
        if 0 <= self._end < self._allocated:
            self.below.resize(self._end)
        self._end = self._allocated = -1

    # -- permissions, reopening, life -------------------------------------------------------------

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        if used & PERM_WRITE:
            # Nobody else may see or use the space that only this node knows to be unused.
            return used | PERM_RESIZE, shared & ~(PERM_WRITE | PERM_RESIZE)
        return used, shared

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        settings = self.align, self.ahead
        if self.runtime is not None or options.given:  # else made in Python
            settings = _settings(options, self.below)
        if flags.read_only:
            with self._lock:
                self._drop()
        return flags, options, settings

    def reopen_commit(self, token: object) -> None:
        flags, self.runtime, settings = cast("tuple[OpenFlags, OptionValues, tuple[int, int]]", token)
        self.align, self.ahead = settings
        self.read_only = flags.read_only
        if self.read_only:
            with self._lock:
                try:
                    self._drop()  # what the format wrote since
                except ByreError:
                    pass  # it can no longer be refused; the format lives with a longer file

    def inactivate(self) -> None:
        with self._lock:
            self._drop()
