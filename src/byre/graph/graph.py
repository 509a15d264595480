"""Graph: names, edges, permissions.

Conflicts between users of a node are found when an edge is made, never during a request.
"""

from __future__ import annotations

import threading

from ..errors import AlreadyExists, Busy, InvalidArgument, NotFound
from ..typing import TYPE_CHECKING
from .child import Child
from .node import PERM_ALL, PERM_NAMES, PERM_RESIZE, PERM_WRITE, Node

if TYPE_CHECKING:
    from ..filters.throttle_group import ThrottleGroup
    from ..image import Image
    from ..nbd.tls import Credentials

__all__ = ["Graph"]


class Graph:
    """All nodes that can meet each other.

    Guarded by ``lock`` (control path only): ``nodes``, ``images``, every node's ``children`` and ``parents``.

    :ivar warnings: sentences a program should show its user
    :ivar repairs: what was found and mended in images as they were opened, as ``check -r`` says it
    :ivar throttle_groups: the limits that throttle nodes name, by id
    :ivar tls_credentials: what network nodes name with ``tls-creds``, by id
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.nodes: dict[str, Node] = {}
        self.images: list[Image] = []
        self.warnings: list[str] = []
        self.repairs: list[str] = []
        self.throttle_groups: dict[str, ThrottleGroup] = {}
        self.tls_credentials: dict[str, Credentials] = {}
        #: The jobs at work here by id, and their registry: see ``jobs/registry.py``.
        self.jobs: dict[str, object] = {}
        self._next_name = 100

    # -- names ------------------------------------------------------------------------------------

    def add(self, node: Node) -> None:
        """Register ``node`` under its name, or a generated one ("#block123") if it has none."""
        with self.lock:
            if not node.name:
                self._next_name += 1
                node.name = f"#block{self._next_name}"
            elif node.name in self.nodes:
                raise AlreadyExists(f"a node named {node.name!r} exists already")
            self.nodes[node.name] = node

    def find(self, name: str) -> Node:
        """:raises NotFound: no node is called that"""
        with self.lock:
            node = self.nodes.get(name)
        if node is None:
            raise NotFound(f"there is no node named {name!r}")
        return node

    # -- edges ------------------------------------------------------------------------------------

    def attach(self, parent: Node, name: str, node: Node, role: str) -> Child:
        """Make the edge ``parent`` -> ``node``.

        :raises Busy: the permissions it needs conflict with another user of ``node``
        :raises InvalidArgument: one of them is closed, or has such a child, or they would make a ring
        """
        with self.lock:
            self.check_open(parent, node)
            if name in parent.children:
                raise InvalidArgument(f"node {parent.name!r} has a child {name!r} already")
            if self.reaches(node, parent):
                raise InvalidArgument(f"attaching {node.name!r} below {parent.name!r} would make a ring")
            child = Child(node, name, role, parent)
            self._link(child)
            parent.children[name] = child
            try:
                self.refresh_permissions(parent)
            except BaseException:
                del parent.children[name]
                self._unlink(child)
                raise
            return child

    def attach_image(self, node: Node, owner: str, used: int, shared: int) -> Child:
        """The edge from an Image (outside the graph) to its node."""
        with self.lock:
            self.check_open(node)
            child = Child(node, "root", "data", None, owner)
            self._link(child)
            child.used, child.shared = used, shared
            try:
                self.refresh_permissions(node)
            except BaseException:
                self._unlink(child)
                raise
            return child

    def set_image_permissions(self, child: Child, used: int, shared: int) -> None:
        with self.lock:
            before = child.used, child.shared
            child.used, child.shared = used, shared
            try:
                self.refresh_permissions(child.node)
            except BaseException:
                child.used, child.shared = before
                try:
                    self.refresh_permissions(child.node)
                except Busy:
                    pass  # a node that needs more than before keeps what it can get; the first error counts
                raise

    def detach(self, child: Child) -> None:
        """Cut an edge; the node below stays open."""
        with self.lock:
            if child.parent is not None:
                child.parent.children.pop(child.name, None)
            self._unlink(child)
            if not child.node.closed:
                self.refresh_permissions(child.node)

    def _link(self, child: Child) -> None:
        child.node.parents.append(child)

    def _unlink(self, child: Child) -> None:
        if child in child.node.parents:
            child.node.parents.remove(child)

    @staticmethod
    def check_open(*nodes: Node) -> None:
        """:raises InvalidArgument: one of ``nodes`` is closed, for nobody used it any more"""
        for node in nodes:
            if node.closed:
                raise InvalidArgument(f"node {node.name!r} is closed", where=node.filename)

    @staticmethod
    def reaches(start: Node, goal: Node) -> bool:
        """Whether ``goal`` is ``start`` or below it."""
        seen: set[int] = set()
        todo = [start]
        while todo:
            node = todo.pop()
            if node is goal:
                return True
            if id(node) not in seen:
                seen.add(id(node))
                todo += [edge.node for edge in node.children.values()]
        return False

    def below(self, top: Node) -> list[Node]:
        """``top`` and every node below it, each once."""
        with self.lock:
            found = [top]
            for node in found:
                found += [edge.node for edge in node.children.values() if edge.node not in found]
            return found

    # -- permissions ------------------------------------------------------------------------------

    def refresh_permissions(self, top: Node) -> None:
        """Carry permissions from ``top`` down; all or nothing.

        :raises Busy: two users of a node exclude each other, or somebody outside holds it
        """
        undo: list[tuple[Child, int, int]] = []
        changed: list[Node] = []
        try:
            todo = [top]
            while todo:
                node = todo.pop()
                used, shared = self.cumulative(node)
                self._check_conflicts(node)
                changed.append(node)
                node.set_permissions(used, shared)
                for edge in list(node.children.values()):
                    undo.append((edge, edge.used, edge.shared))
                    edge.used, edge.shared = node.child_permissions(edge, used, shared)
                    todo.append(edge.node)
        except BaseException:
            for edge, used, shared in reversed(undo):
                edge.used, edge.shared = used, shared
            for node in reversed(changed[:-1]):
                node.set_permissions(*self.cumulative(node))
            raise

    @staticmethod
    def cumulative(node: Node) -> tuple[int, int]:
        """(used by any parent, shared by all parents)."""
        used, shared = 0, PERM_ALL
        for edge in node.parents:
            used |= edge.used
            shared &= edge.shared
        return used, shared

    @staticmethod
    def _check_conflicts(node: Node) -> None:
        for one in node.parents:
            shared = one.shared & ~(PERM_WRITE | PERM_RESIZE) if one.protects else one.shared
            for other in node.parents:
                clash = other.used & ~shared
                if one is not other and clash:
                    names = ", ".join(name for bit, name in PERM_NAMES.items() if clash & bit)
                    raise Busy(
                        f"{other.describe()} needs permission {names!r}, which {one.describe()} does not share",
                        where=node.filename or node.name,
                    )

    # -- life -------------------------------------------------------------------------------------

    def release(self, node: Node) -> None:
        """Close ``node`` and what only it used, top down, once nobody has an edge to it."""
        error: BaseException | None = None
        todo = [node]
        while todo:
            here = todo.pop()
            with self.lock:
                if here.parents or here.closed:
                    continue
            try:
                here.inactivate()
            except Exception as failed:
                error = error or failed
            with self.lock:
                edges = list(here.children.values())
                here.closed = True
                for edge in edges:
                    self._unlink(edge)
                self.nodes.pop(here.name, None)
            try:
                here.close()
            except Exception as failed:
                error = error or failed
            # Its own ``children`` stay: a request that was about to go through a filter may still ask for the size.
            for edge in edges:
                if edge.node.parents:
                    self.refresh_permissions(edge.node)
                todo.append(edge.node)
        if error is not None:
            raise error
