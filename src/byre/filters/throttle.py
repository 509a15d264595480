"""Throttling: a filter whose requests keep to the limits of a group.

Driver ``throttle`` with ``throttle-group`` (the name of a group, see ``throttle_group.py``), or with the limits
themselves: ``throttling.iops-total`` and so on, and ``throttling.group`` to share them. Reads, writes, zero writes,
discards and copies into the layer below are counted, flushes are not. While requests are drained (an Image is paused,
closed or reopened), nothing is held back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from ..errors import InvalidArgument, NotFound, NotSupported
from ..options import Option, OptionSet
from .base import CompressionFilter, open_filtered
from .throttle_group import LIMIT_OPTIONS, READ, WRITE, Member, ThrottleGroup, parse_limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..graph.graph import Graph
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest
    from ..options import OptionValues

__all__ = ["ThrottleNode"]

_PREFIX: Final = "throttling."
OPTIONS: Final = OptionSet(
    Option("throttle-group", "str", "name of the group"),
    Option(f"{_PREFIX}group", "str", "name of the group that has the limits given here"),
    *(option._replace(name=_PREFIX + option.name) for option in LIMIT_OPTIONS),
)
CHILDREN: Final = ("file",)


def open_node(request: OpenRequest) -> ThrottleNode:
    graph = request.opener.graph
    group = _group(graph, request.options)
    below = request.open_child("file", flags=request.flags._replace(detect_zeroes="off"))
    node = ThrottleNode(group, name=request.name, read_only=request.flags.read_only)
    node.graph, node.runtime = graph, request.options
    open_filtered(request, node, "file", below)
    return node


def _group(graph: Graph, options: OptionValues) -> ThrottleGroup:
    """The group that is named, or made from the limits given; given limits replace those of a group that exists."""
    limits = {key[len(_PREFIX) :]: value for key, value in options.given.items() if key.startswith(_PREFIX)}
    named, own = options.text("throttle-group"), cast("str | None", limits.pop("group", None))
    if named and (limits or own):
        raise InvalidArgument("throttle-group and throttling.* exclude each other", hint="limits belong to the group")
    if not named and not limits and not own:
        raise InvalidArgument("Please specify a throttle group", hint="throttle-group=ID, or throttling.iops-total=...")
    with graph.lock:
        if named:
            group = graph.throttle_groups.get(named)
            if group is None:
                raise NotFound(f"Throttle group '{named}' does not exist")
            return group
        parse_limits(limits)
        group = graph.throttle_groups.get(own) if own else None
        if group is None:
            group = ThrottleGroup(own or "", limits)
            if own:
                graph.throttle_groups[own] = group
        elif limits:
            group.set_limits(limits)
        return group


class ThrottleNode(CompressionFilter):
    """Holds requests back as its group says.

    Guarded by: the group. ``group`` changes only while no request is under way.
    """

    driver = "throttle"

    def __init__(self, group: ThrottleGroup, *, name: str = "", read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self.group = group
        self.graph: Graph | None = None
        self.runtime: OptionValues | None = None
        self._member = Member()
        group.join(self._member)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.group.admit(self._member, READ, len(buffer))
        self.below.read_into(offset, buffer)

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.group.admit(self._member, READ, sum(map(len, buffers)))
        self.below.readv_into(offset, buffers)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.group.admit(self._member, WRITE, len(buffer))
        self.below.write_from(offset, buffer, flags)

    def writev_from(self, offset: int, buffers: Sequence[memoryview], flags: int = 0) -> None:
        self.group.admit(self._member, WRITE, sum(map(len, buffers)))
        self.below.writev_from(offset, buffers, flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.group.admit(self._member, WRITE, length)
        self.below.write_zeroes(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.group.admit(self._member, WRITE, length)
        self.below.discard(offset, length)

    def before_compressed(self, offset: int, length: int) -> None:
        self.group.admit(self._member, WRITE, length)

    def populate(self, offset: int, length: int, *, base: Node | None = None, everything: bool = False) -> int:
        self.group.admit(self._member, WRITE, length)
        return self.below.populate(offset, length, base=base, everything=everything)

    # -- draining, reopening ----------------------------------------------------------------------

    def drain_begin(self) -> None:
        self.group.set_free(self._member, True)

    def drain_end(self) -> None:
        self.group.set_free(self._member, False)

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        # A node made in Python has no options: its group is the one it was given.
        if options.given == (self.runtime.given if self.runtime is not None else {}):
            return flags, self.runtime, self.group
        if self.graph is None:
            raise NotSupported("this node was made for its group and cannot get another", where=self.filename)
        return flags, options, _group(self.graph, options)

    def reopen_commit(self, token: object) -> None:
        flags, self.runtime, group = cast("tuple[OpenFlags, OptionValues | None, ThrottleGroup]", token)
        self.read_only = flags.read_only
        if group is not self.group:
            self.group.leave(self._member)
            self.group = group
            group.join(self._member)

    def close(self) -> None:
        self.group.leave(self._member)
        super().close()
