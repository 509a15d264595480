"""Child: the edge from a parent to a node, with a role and two permission sets."""

from __future__ import annotations

from ..typing import TYPE_CHECKING
from .node import PERM_ALL

if TYPE_CHECKING:
    from .node import Node

__all__ = ["Child"]


class Child:
    """An edge of the graph.

    :ivar parent: the node above; ``None`` where the parent is an Image
    :ivar name: the parent's name for it: "file", "backing", "data-file", ...
    :ivar role: "data", "metadata" (which includes data), "backing" or "filtered"
    :ivar used: permissions the parent uses
    :ivar shared: permissions the parent lets others use
    """

    __slots__ = ("name", "node", "owner", "parent", "role", "shared", "used")

    def __init__(self, node: Node, name: str, role: str, parent: Node | None = None, owner: str = "") -> None:
        self.node = node
        self.name = name
        self.role = role
        self.parent = parent
        self.owner = owner
        self.used = 0
        self.shared = PERM_ALL

    def describe(self) -> str:
        """Who holds this edge, for messages."""
        if self.parent is None:
            return self.owner or "an open image"
        return f"{self.parent.driver} node {self.parent.name!r} (as {self.name!r})"
