"""Changing the graph while it is in use: filters put in and taken out, nodes replaced, backing files exchanged.

Requests that reach the nodes concerned are held back meanwhile, nobody else's. A change is one transaction: edges
move, then permissions are carried down once; if they are refused, everything is as before.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..catalog import driver
from ..errors import Busy, ByreError, InvalidArgument, NotSupported, ReadOnly
from . import blockers
from .child import Child
from .node import PERM_WRITE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from ..image import Image
    from .graph import Graph
    from .node import Node

__all__ = ["Frozen", "Rewiring", "Tolerated", "check_unfrozen", "insert_filter", "lead_backing", "node_at",
           "quiesce", "remove_filter", "replace_node", "set_backing", "settled", "supports_backing"]  # fmt: skip


@contextmanager
def quiesce(graph: Graph, nodes: Iterable[Node], *, running: Iterable[Image] = ()) -> Iterator[None]:
    """No request that reaches one of ``nodes`` through an Image is in flight, and none begins.

    The graph lock is held as well: edges stay as they are but for what the caller does. Nests. A thread must not
    call this within a request.

    :param running: Images that go on, such as those that the calling job reads and writes through in the body
    """
    wanted, spared = tuple(nodes), tuple(running)
    held: list[Image] = []
    try:
        while True:
            graph.lock.acquire()
            missing = [image for image in _users(graph, wanted) if image not in held and image not in spared]
            if not missing:
                break
            graph.lock.release()
            for image in missing:
                held.append(image)
                image.pause()
        try:
            yield
        finally:
            graph.lock.release()
    finally:
        for image in held:
            image.resume()


@contextmanager
def settled(graph: Graph, places: Sequence[Node | Image]) -> Iterator[list[Node]]:
    """As :func:`quiesce`, of what ``places`` are by the time that nobody else changes the graph.

    What is found in the body (edges, sizes, blockers) is true until its end.

    :param places: an Image stands for its node
    :returns: the nodes
    :raises InvalidArgument: one of them is closed
    """
    while True:
        nodes = list(map(node_at, places))
        with quiesce(graph, nodes):
            if nodes == list(map(node_at, places)):
                for place in places:
                    if not hasattr(place, "children"):
                        place._check_open()
                graph.check_open(*nodes)
                yield nodes
                return


def node_at(place: Node | Image) -> Node:
    """The node itself, or that of an Image as it is now."""
    found: Node = getattr(place, "node", place)  # type: ignore[arg-type]
    return found


def _users(graph: Graph, nodes: tuple[Node, ...]) -> list[Image]:
    """Images from which one of ``nodes`` can be reached."""
    return [image for image in graph.images if any(graph.reaches(image.node, node) for node in nodes)]


class Rewiring:
    """Moves edges; at the end of the ``with`` block permissions are checked, and all is undone if anything failed.

    Requests through the nodes concerned are held back by the caller (:func:`quiesce`).
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._moved: list[tuple[Child, Node | None, Node | None]] = []

    def move(self, child: Child, node: Node) -> None:
        """``child`` leads to ``node`` from now on.

        :raises NotSupported: its parent cannot do that while it is open
        :raises InvalidArgument: ``node`` is closed
        """
        self._graph.check_open(node)
        before = child.node
        self._moved.append((child, before, node))
        self._lead(child, before, node)

    def add(self, parent: Node, name: str, node: Node, role: str) -> Child:
        """A new edge."""
        self._graph.check_open(parent, node)
        if self._graph.reaches(node, parent):
            raise InvalidArgument(f"attaching {node.name!r} below {parent.name!r} would make a ring")
        child = Child(node, name, role, parent)
        self._moved.append((child, None, node))
        self._lead(child, None, node)
        return child

    def cut(self, child: Child) -> None:
        """The edge goes."""
        before = child.node
        self._moved.append((child, before, None))
        self._lead(child, before, None)

    def _lead(self, child: Child, before: Node | None, after: Node | None) -> None:
        if before is not None:
            before.parents.remove(child)
        if after is not None:
            child.node = after
            after.parents.append(child)
        parent = child.parent
        if parent is None:
            return
        if after is None:
            parent.children.pop(child.name, None)
            return
        parent.children[child.name] = child
        if before is not None:
            parent.child_moved(child, before)

    def __enter__(self) -> Rewiring:
        self._graph.lock.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        try:
            if error is None:
                try:
                    self._check()
                    return
                except BaseException:
                    self._undo()
                    raise
            self._undo()
        finally:
            self._graph.lock.release()

    def _check(self) -> None:
        """:raises ByreError: the permissions that follow conflict, or a node that is read-only is to be written"""
        self._refresh([before for _, before, _ in self._moved if before is not None])
        self._refresh([child.parent or child.node for child, _, after in self._moved if after is not None])
        for _, _, after in self._moved:
            if after is not None and after.read_only and self._graph.cumulative(after)[0] & PERM_WRITE:
                raise ReadOnly(f"node {after.name!r} is read-only, but it is to be written", where=after.filename)

    def _refresh(self, nodes: list[Node]) -> None:
        for node in dict.fromkeys(nodes):
            if not node.closed:
                self._graph.refresh_permissions(node)

    def _undo(self) -> None:
        nodes: list[Node] = []
        for child, before, after in reversed(self._moved):
            try:
                self._lead(child, after, before)
            except ByreError:
                pass  # a parent that cannot follow did not follow in the first place
            nodes += [node for node in (after, before) if node is not None]
        for node in nodes:
            try:
                self._refresh([node])
            except ByreError:
                pass  # it keeps what it can get; the first error counts


class Frozen:
    """The backing edges of a chain lead where they lead until :meth:`release`; releasing twice is fine.

    :param edges: backing edges; filters may still be put in and taken out
    """

    def __init__(self, graph: Graph, edges: Iterable[Child], reason: str) -> None:
        self._graph = graph
        self._reason = reason
        with graph.lock:
            self._edges = list(edges)
            for edge in self._edges:
                edge.frozen = (*edge.frozen, reason)

    def release(self) -> None:
        with self._graph.lock:
            for edge in self._edges:
                reasons = list(edge.frozen)
                reasons.remove(self._reason)
                edge.frozen = tuple(reasons)
            self._edges.clear()


class Tolerated:
    """The layers above may be read while somebody writes to the last of them, until :meth:`release`.

    For jobs that change a backing file and keep what the layers above read as it is. Releasing twice is fine.

    :param edges: backing edges from the active layer down to the one written to
    """

    def __init__(self, graph: Graph, edges: Iterable[Child]) -> None:
        self._graph = graph
        with graph.lock:
            self._edges = list(edges)
            for edge in self._edges:
                edge.tolerant += 1

    def release(self) -> None:
        with self._graph.lock:
            for edge in self._edges:
                edge.tolerant -= 1
            self._edges.clear()


def check_unfrozen(edge: Child) -> None:
    """:raises Busy: a job relies on this backing file"""
    if edge.frozen and edge.parent is not None:
        raise Busy(f"cannot change 'backing' link from {edge.parent.name!r} to {edge.node.name!r}: {edge.frozen[0]}",
                   where=edge.parent.filename)  # fmt: skip


# -- operations -----------------------------------------------------------------------------------


def insert_filter(graph: Graph, filter_node: Node, above: Node | Image, *, stay: Iterable[Image] = ()) -> None:
    """Whoever used ``above`` (Images and other nodes) goes through ``filter_node`` from now on.

    :param filter_node: in the graph; its edge ``file`` leads to ``above``, or is made here
    :param above: an Image stands for its node
    :param stay: Images that keep using ``above`` directly
    :raises InvalidArgument: the filter filters something else
    :raises ByreError: permissions conflict; everything is as before
    """
    stay = tuple(stay)
    with settled(graph, [above, filter_node]) as (node, _), Rewiring(graph) as change:
        edge = filter_node.children.get("file")
        if filter_node.kind != "filter" or (edge is not None and edge.node is not node):
            raise InvalidArgument(f"node {filter_node.name!r} is no filter of {node.name!r}")
        parents = _movable(graph, node, filter_node, stay)
        if edge is None:
            filter_node.limits = node.limits
            filter_node.filename = filter_node.filename or node.filename
            change.add(filter_node, "file", node, "filtered")
        for parent in parents:
            change.move(parent, filter_node)


def remove_filter(graph: Graph, filter_node: Node, *, close: bool = True) -> None:
    """Whoever used ``filter_node`` uses what it filters; then it is closed, unless ``close`` is false.

    :raises InvalidArgument: it is no filter, or somebody else has removed it
    :raises ByreError: permissions conflict; everything is as before
    """
    with settled(graph, [filter_node]):
        edge = filter_node.children.get("file")
        if filter_node.kind != "filter" or edge is None:
            raise InvalidArgument(f"node {filter_node.name!r} is no filter", where=filter_node.filename)
        # Before others go on past it: what it does at its end may be about the length of the file.
        filter_node.inactivate()
        with Rewiring(graph) as change:
            for parent in list(filter_node.parents):
                change.move(parent, edge.node)
    if close:
        graph.release(filter_node)


def replace_node(graph: Graph, old: Node | Image, new: Node | Image, *, stay: Iterable[Image] = ()) -> None:
    """Whoever used ``old`` uses ``new`` from now on, but for ``new`` itself and what it stands on.

    ``old`` stays open; :meth:`byre.graph.graph.Graph.release` closes it if nobody uses it. An Image stands for its
    node.

    :raises Busy: the operation is blocked, or permissions conflict; everything is as before
    """
    with settled(graph, [old, new]) as (before, after), Rewiring(graph) as change:
        blockers.check(graph, before, "replace")
        for parent in _movable(graph, before, after, tuple(stay)):
            change.move(parent, after)


def _movable(graph: Graph, old: Node, new: Node, stay: tuple[Image, ...]) -> list[Child]:
    """The edges to ``old`` that can lead to ``new`` instead."""
    roots = [image._root for image in stay]
    return [edge for edge in old.parents
            if edge not in roots and (edge.parent is None or not graph.reaches(new, edge.parent))]  # fmt: skip


def supports_backing(node: Node) -> bool:
    """Whether a node of this driver can have a backing file."""
    return "backing_file" in getattr(driver(node.driver).load(), "CREATE_OPTIONS", ())


def set_backing(graph: Graph, node: Node, below: Node | None) -> None:
    """``node`` reads what it does not hold from ``below`` (zeroes without one); what its header says stays.

    The old backing file stays open; :meth:`byre.graph.graph.Graph.release` closes it if nobody uses it.

    :raises NotSupported: the format has no backing files
    :raises Busy: a job relies on the old one, or permissions conflict; everything is as before
    :raises InvalidArgument: ``node`` would become its own backing file
    """
    if not supports_backing(node):
        raise NotSupported(f"driver {node.driver!r} does not support backing files", where=node.filename)
    with settled(graph, [node]), Rewiring(graph) as change:
        lead_backing(change, graph, node, below)


def lead_backing(change: Rewiring, graph: Graph, node: Node, below: Node | None) -> None:
    """The step of :func:`set_backing` for those who change more at once."""
    edge = node.children.get("backing")
    if edge is not None:
        check_unfrozen(edge)
    if below is None:
        if edge is not None:
            change.cut(edge)
    elif edge is None:
        change.add(node, "backing", below, "backing")
    elif graph.reaches(below, node):
        raise InvalidArgument(f"making {below.name!r} the backing file of {node.name!r} would make a ring")
    else:
        change.move(edge, below)
