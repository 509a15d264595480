"""Operation blockers: what must not be done to a node for now, by kind of operation, with the reason.

A job blocks what would disturb it on every node it works on. That a node is the backing file of another blocks some
operations by itself. Requests are not concerned: reads and writes are the business of permissions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import Busy, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from .graph import Graph
    from .node import Node

__all__ = ["OPERATIONS", "Blocking", "check", "check_within"]

OPERATIONS: Final = frozenset({
    "backup-source", "backup-target", "change", "commit-source", "commit-target", "external-snapshot",
    "internal-snapshot", "internal-snapshot-delete", "mirror-source", "mirror-target", "replace", "resize", "stream",
})  # fmt: skip
"""``change`` is another backing file, in the graph or in the header; ``replace`` is another node in a node's place."""

_NOT_BELOW_AN_OVERLAY: Final = frozenset({
    "external-snapshot", "internal-snapshot", "internal-snapshot-delete", "mirror-target", "replace", "resize",
})  # fmt: skip
"""What a backing file is kept from; jobs that know what they do block and check on their own."""


def check(graph: Graph, node: Node, operation: str) -> None:
    """:raises Busy: ``operation`` on ``node`` is blocked; the message says by what"""
    with graph.lock:
        check_within(node, operation)


def check_within(node: Node, operation: str) -> None:
    """As :func:`check`, for a request: whoever changes the graph may hold its lock and wait for the request's end.

    :raises Busy: ``operation`` on ``node`` is blocked
    """
    if operation not in OPERATIONS:
        raise InvalidArgument(f"unknown operation {operation!r}: expected one of {', '.join(sorted(OPERATIONS))}")
    reasons = node.blockers.get(operation, ())
    if not reasons and operation in _NOT_BELOW_AN_OVERLAY:
        above = [edge for edge in tuple(node.parents) if edge.role == "backing" and not edge.tolerant]
        reasons = tuple(f"node is used as backing hd of {edge.parent.name!r}" for edge in above if edge.parent)
    if reasons:
        raise Busy(f"node {node.name!r} is busy: {reasons[0]}", where=node.filename)


class Blocking:
    """Blocks ``operations`` on ``nodes`` until :meth:`release`; a context manager. Releasing twice is fine.

    :param operations: some of :data:`OPERATIONS`; all of them if left out
    :param reason: for the refusal, such as "block device is in use by block job: stream"
    """

    def __init__(self, graph: Graph, nodes: Iterable[Node], reason: str,
                 operations: Iterable[str] = OPERATIONS) -> None:  # fmt: skip
        self._graph = graph
        self._reason = reason
        self._held: list[tuple[Node, str]] = []
        with graph.lock:
            for node in nodes:
                for operation in operations:
                    node.blockers[operation] = (*node.blockers.get(operation, ()), reason)
                    self._held.append((node, operation))

    def release(self) -> None:
        with self._graph.lock:
            for node, operation in self._held:
                reasons = list(node.blockers[operation])
                reasons.remove(self._reason)
                if reasons:
                    node.blockers[operation] = tuple(reasons)
                else:
                    del node.blockers[operation]
            self._held.clear()

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.release()
