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
    :ivar tolerant: how many jobs write to the backing file while they keep what the parent reads as it is
    :ivar frozen: why the edge must not lead to another layer; empty where it may
    """

    __slots__ = ("frozen", "name", "node", "owner", "parent", "role", "shared", "tolerant", "used")

    def __init__(self, node: Node, name: str, role: str, parent: Node | None = None, owner: str = "") -> None:
        self.node = node
        self.name = name
        self.role = role
        self.parent = parent
        self.owner = owner
        self.used = 0
        self.shared = PERM_ALL
        self.tolerant = 0
        self.frozen: tuple[str, ...] = ()

    @property
    def protects(self) -> bool:
        """Whether the parent relies on nobody writing below: an active overlay on its backing file, through filters."""
        if self.role == "backing":
            return bool(self.used) and not self.tolerant
        through = self.parent is not None and self.parent.kind == "filter" and self.name == "file"
        return through and any(edge.protects for edge in self.parent.parents)  # type: ignore[union-attr]

    def describe(self) -> str:
        """Who holds this edge, for messages."""
        if self.parent is None:
            return self.owner or "an open image"
        return f"{self.parent.driver} node {self.parent.name!r} (as {self.name!r})"
