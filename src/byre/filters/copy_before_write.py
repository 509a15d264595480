"""Copy before write: what a write is about to replace is copied to a target first.

Driver ``copy-before-write``: ``file`` is the disk, ``target`` takes the old bytes, at the same offsets. From the moment
the filter is in place, target and disk together hold the disk as it was (:mod:`.point_in_time`); the backup job
copies the rest, and ``snapshot-access`` shows it. If copying fails, the write fails (``break-guest-write``) or the
earlier state is given up (``break-snapshot``).
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Final

from ..errors import Busy, ByreError, InvalidArgument, IOFailure, NotSupported
from ..formats.abilities import HasBitmaps
from ..graph.chain import skip_filters
from ..graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE
from ..io import engine
from ..io.extent import MAY_UNMAP
from ..io.workers import spawn
from ..options import Option, OptionSet
from ..units import KIB, MIB
from .base import NotifyingFilter, open_filtered
from .point_in_time import PointInTime

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..bitmaps.bitmap import Bitmap
    from ..graph.child import Child
    from ..graph.node import Node
    from ..graph.opening import OpenRequest

__all__ = ["ON_ERROR", "CopyBeforeWriteNode", "cluster_for", "find_bitmap"]

ON_ERROR: Final = ("break-guest-write", "break-snapshot")
LEAST_CLUSTER: Final = 64 * KIB
MOST_CLUSTER: Final = 64 * MIB
_STEP: Final = MIB

OPTIONS: Final = OptionSet(
    Option("bitmap.node", "str", "node of the bitmap"),
    Option("bitmap.name", "str", "only what is dirty in this bitmap is copied"),
    Option("on-cbw-error", "enum", "what a failed copy breaks", "break-guest-write", ON_ERROR),
    Option("cbw-timeout", "int", "seconds until a copy counts as failed, 0 for no limit", 0),
    Option("min-cluster-size", "size", "copy at least so much at once", 0),
)
CHILDREN: Final = ("file", "target")


def open_node(request: OpenRequest) -> CopyBeforeWriteNode:
    options = request.options
    for child in CHILDREN:
        if not request.has_child(child):
            raise InvalidArgument(f"driver 'copy-before-write' needs a child {child!r}")
    below = request.opener.open(request.children["file"], request.flags)
    target = request.opener.open(request.children["target"], request.flags._replace(read_only=False))
    wanted = None
    name = options.text("bitmap.name")
    if (name is None) != (options.text("bitmap.node") is None):
        raise InvalidArgument("a bitmap is given by its node and its name")
    if name is not None:
        wanted = find_bitmap(request.opener.graph.find(str(options.text("bitmap.node"))), name)
    timeout: float = options.number("cbw-timeout")
    if timeout < 0:
        raise InvalidArgument(f"option 'cbw-timeout' is {timeout}: expected seconds, or 0 for no limit")
    node = CopyBeforeWriteNode(
        name=request.name,
        read_only=below.read_only,
        on_error=options.text("on-cbw-error") or "",
        timeout=timeout,
    )
    open_filtered(request, node, "file", below)
    request.opener.graph.attach(node, "target", target, "data")
    node.begin(cluster_for(target, options.number("min-cluster-size")), wanted)
    return node


def find_bitmap(node: Node, name: str) -> Bitmap:
    """:raises ByreError: there is none, or it cannot be used now"""
    holder = skip_filters(node)
    if isinstance(holder, HasBitmaps):
        found = holder.bitmap_store().find(name)
    else:
        tracked = holder.tracker.find(name) if holder.tracker is not None else None
        if tracked is None:
            raise InvalidArgument(f"node {node.name!r} has no dirty bitmap {name!r}")
        found = tracked
    found.check(read_only=True)
    return found


def cluster_for(target: Node, least: int = 0) -> int:
    """What to copy at a time so that no cluster of ``target`` is written in parts; 64 KiB and ``least`` at least.

    :raises InvalidArgument: ``least`` is no power of two, or too large
    """
    if least & (least - 1) or least > MOST_CLUSTER:
        raise InvalidArgument(f"min-cluster-size is {least}: expected a power of two up to {MOST_CLUSTER}")
    return max(LEAST_CLUSTER, least, int(getattr(skip_filters(target), "cluster_size", 0)))


class CopyBeforeWriteNode(NotifyingFilter):
    """Copies to ``target`` what writes, zero writes and discards are about to replace in ``file``.

    :ivar state: what is copied; made by :meth:`begin`
    :ivar on_error: one of ``ON_ERROR``
    :ivar timeout: seconds a copy may take, 0 for no limit
    :ivar copier: copies a claimed (offset, length) instead of the filter itself
    :ivar on_kept: called with (offset, length) of a write before it goes ahead: nobody needs what is there any more
    :ivar alone: nobody else may write to the disk; not where a job gives up in it what has been copied
    """

    driver = "copy-before-write"

    def __init__(self, *, name: str = "", read_only: bool = False, on_error: str = "", timeout: float = 0) -> None:
        super().__init__(name=name, read_only=read_only)
        self.on_error = on_error or ON_ERROR[0]
        self.timeout = timeout
        self.copier: Callable[[int, int], None] | None = None
        self.on_kept: Callable[[int, int], None] | None = None
        self.alone = True
        self._state: PointInTime | None = None

    def begin(self, cluster: int, wanted: Bitmap | None = None) -> None:
        """The state to keep is the one of now; with both children attached, before the first write.

        :param wanted: only what is dirty there is kept
        :raises InvalidArgument: the target has another size
        """
        if self.target.size != self.below.size:
            raise InvalidArgument(
                f"source and target have different sizes: {self.below.size} and {self.target.size} bytes",
                where=self.filename,
            )
        self._state = PointInTime(self.below.size, cluster, wanted)

    @property
    def target(self) -> Node:
        return self.children["target"].node

    @property
    def state(self) -> PointInTime:
        assert self._state is not None
        return self._state

    # -- requests ---------------------------------------------------------------------------------

    def before_write(self, offset: int, length: int) -> None:
        """Return when nobody needs what is in the range now.

        :raises ByreError: it could not be copied, and the earlier state counts for more than the write
        """
        if length <= 0 or self.state.failure is not None:
            return
        try:
            if self.timeout:
                self._copy_in_time(offset, length)
            else:
                self._copy_range(offset, length)
        except ByreError as error:
            if self.state.failure is not None:
                return
            if self.on_error == "break-snapshot":
                self.state.give_up(error)
                return
            error.message = f"cannot copy the old content before writing: {error.message}"
            raise

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        raise Busy("the size cannot change while the disk is copied before writes", where=self.filename)

    # -- copying ----------------------------------------------------------------------------------

    def _copy_range(self, offset: int, length: int) -> None:
        state = self.state
        while True:
            claim = state.hold_back(offset, length, max(_STEP, state.cluster))
            if claim is None:
                if self.on_kept is not None:
                    self.on_kept(offset, length)
                return
            copied = False
            try:
                self.copy(*claim)
                copied = True
            finally:
                state.settle(claim, copied=copied)

    def _copy_in_time(self, offset: int, length: int) -> None:
        """As :meth:`_copy_range`; a copy that takes too long goes on, but nobody waits for it."""
        outcome: list[ByreError] = []
        done = threading.Event()

        def work() -> None:
            try:
                self._copy_range(offset, length)
            except ByreError as error:
                outcome.append(error)
            finally:
                done.set()

        spawn(work, "copy before write")
        if not done.wait(self.timeout):
            raise IOFailure(f"copying took longer than {self.timeout:g} s", where=self.filename, errno=errno.ETIMEDOUT)
        if outcome:
            raise outcome[0]

    def copy(self, offset: int, length: int) -> None:
        """Copy a claimed range to the target, as zeroes what is known to read so."""
        if self.copier is not None:
            self.copier(offset, length)
            return
        end = offset + length
        while offset < end:
            step = min(self.state.cluster, end - offset)
            _copy_cluster(self.below, self.target, offset, step)
            offset += step

    # -- the earlier state ------------------------------------------------------------------------

    def read_snapshot(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the earlier state from ``offset``.

        :raises AccessDenied: part of it does not belong to the state, or was let go
        """
        claim, pieces = self.state.begin_read(offset, len(buffer))
        try:
            for at, length, copied in pieces:
                view = buffer[at - offset : at - offset + length]
                (self.target if copied else self.below).read_into(at, view)
        finally:
            self.state.end_read(claim)

    def discard_snapshot(self, offset: int, length: int) -> None:
        """Nobody wants the earlier state of the whole clusters in this range any more."""
        first, size = self.state.let_go(offset, length)
        if size:
            self.target.discard(first, size)

    # -- permissions ------------------------------------------------------------------------------

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        if child.name == "target":
            return PERM_READ | PERM_WRITE, PERM_ALL & ~PERM_RESIZE
        if not self.parents or not self.alone:
            return used, shared
        # A write that does not come through here would change what is kept.
        return used | PERM_READ, shared & ~(PERM_WRITE | PERM_RESIZE)


def _copy_cluster(source: Node, target: Node, offset: int, length: int) -> None:
    """Copy one cluster, as zeroes if ``source`` is known to read so."""
    if engine.reads_zero(source, offset, length):
        try:
            target.write_zeroes(offset, length, MAY_UNMAP)
        except NotSupported:
            target.write_from(offset, memoryview(bytes(length)))
        return
    view = memoryview(bytearray(length))
    source.read_into(offset, view)
    target.write_from(offset, view)
