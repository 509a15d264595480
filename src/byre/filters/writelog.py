"""Write logging: a filter that passes everything through and records what changes the node below.

Driver ``blklog``. The record (``replay.py``) is what crash tests enumerate disk states from. Several
disks share one log, and so one clock, with the option ``share-log`` (the node name of another
``blklog`` node) or by giving the same :class:`~byre.filters.replay.WriteLog` in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument
from ..io.extent import FUA
from ..options import Option, OptionSet
from .base import FilterNode, open_filtered
from .replay import SparseDisk, WriteLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..graph.opening import OpenRequest

__all__ = ["LogNode"]

OPTIONS: Final = OptionSet(Option("share-log", "str", "node name of a blklog node to share the log of"))
CHILDREN: Final = ("file",)

_STEP: Final = 1 << 20


def open_node(request: OpenRequest) -> LogNode:
    log = None
    partner_name = request.options.text("share-log")
    if partner_name is not None:
        partner = request.opener.graph.find(partner_name)
        if not isinstance(partner, LogNode):
            raise InvalidArgument(f"node {partner_name!r} is not a blklog node")
        log = partner.log
    node = LogNode(log, name=request.name, read_only=request.flags.read_only)
    spec = request.children.get("file")
    if spec is None:
        raise InvalidArgument("driver 'blklog' needs a child 'file'")
    below = request.opener.open(spec, request.flags.for_file(), protocol=True)
    open_filtered(request, node, "file", below)
    node.start()
    return node


class LogNode(FilterNode):
    """Records writes, zero writes, discards, flushes and resizes on their way to ``file``.

    :ivar log: where; shared with other nodes if so asked
    :ivar disk: this node's name there
    """

    driver = "blklog"

    def __init__(self, log: WriteLog | None = None, *, disk: str = "", name: str = "", read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self.log = WriteLog() if log is None else log
        self.disk = disk

    def start(self) -> None:
        """The child's content now is what the log starts from; before the first request, with the child attached."""
        self.disk = self.disk or self.name
        if self.disk in self.log.bases:
            raise InvalidArgument(f"the log has a disk {self.disk!r} already")
        self.log.add_disk(self.disk, capture(self))

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        seq = self.log.issue(self.disk, "write", offset, len(buffer), bytes(buffer), bool(flags & FUA))
        self.below.write_from(offset, buffer, flags)
        self.log.complete(seq)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        data = b"".join(buffers)
        seq = self.log.issue(self.disk, "write", offset, len(data), data, bool(flags & FUA))
        self.below.writev_from(offset, buffers, flags)
        self.log.complete(seq)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        seq = self.log.issue(self.disk, "zeroes", offset, length, fua=bool(flags & FUA))
        self.below.write_zeroes(offset, length, flags)
        self.log.complete(seq)

    def discard(self, offset: int, length: int) -> None:
        seq = self.log.issue(self.disk, "discard", offset, length)
        self.below.discard(offset, length)
        self.log.complete(seq)

    def flush(self) -> None:
        seq = self.log.issue(self.disk, "flush")
        self.below.flush()
        self.log.complete(seq)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        seq = self.log.issue(self.disk, "resize", size)
        self.below.resize(size, preallocation=preallocation, exact=exact)
        self.log.complete(seq)


def capture(node: FilterNode) -> SparseDisk:
    """The content below ``node`` as it is now; holes stay holes."""
    from ..io.extent import ZERO

    below = node.below
    disk = SparseDisk(below.size)
    offset = 0
    while offset < disk.size:
        extent = below.block_status(offset, disk.size - offset)
        length = extent.length
        if extent.kind != ZERO:
            length = min(length, _STEP)
            data = memoryview(bytearray(length))
            below.read_into(offset, data)
            disk.write(offset, data)
        offset += length
    return disk
