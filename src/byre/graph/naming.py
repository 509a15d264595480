"""Names: what to give to open a node again, as a plain name where one says it all, else as options in JSON.

For people and scripts who copy the name; messages use :attr:`Node.filename`, the file it is about. A filter's name is
its options, unless its module has ``plain_name(node)``; a format's is that of its file, unless options that change
what it shows (``NAME_OPTIONS`` of its module) were given. ``CHILD_NAMES`` of a module are options that only name a
child, ``CHILD_OPTIONS`` what options call the edges.
"""

from __future__ import annotations

from ..catalog import driver
from ..options import flatten
from ..typing import TYPE_CHECKING, cast
from .opening import COMMON_OPTIONS

if TYPE_CHECKING:
    from types import ModuleType

    from .node import Node

__all__ = ["open_options", "plain_name", "shown_name"]


def shown_name(node: Node) -> str:
    """The plain name of ``node`` if it has one, else ``json:{...}``."""
    name = plain_name(node)
    if name is not None:
        return name
    import json

    return f"json:{json.dumps(open_options(node))}"


def plain_name(node: Node) -> str | None:
    """The name that opens ``node`` again (given its format), ``None`` if only options can."""
    if node.kind == "protocol":
        return node.filename or None
    module = driver(node.driver).load()
    if node.kind == "filter":
        return cast("str | None", module.plain_name(node)) if hasattr(module, "plain_name") else None
    if own_options(node, module) or "file" not in node.children:
        return None
    return plain_name(node.children["file"].node)


def own_options(node: Node, module: ModuleType) -> dict[str, object]:
    """The driver's own options among those that were given, as far as they belong to the name."""
    belong: tuple[str, ...] | None = getattr(module, "NAME_OPTIONS", None if node.kind != "format" else ())
    elsewhere = {*getattr(module, "CHILDREN", ()), *getattr(module, "CHILD_NAMES", ()), "cache"}
    return {
        key: value
        for key, value in flatten(node.options).items()
        if key not in COMMON_OPTIONS
        and key.partition(".")[0] not in elsewhere
        and (belong is None or key.partition(".")[0] in belong)
    }


def open_options(node: Node) -> dict[str, object]:
    """Options that open ``node`` again; a backing file that the image names itself is left out."""
    module = driver(node.driver).load()
    names: dict[str, str] = getattr(module, "CHILD_OPTIONS", {})
    options: dict[str, object] = {"driver": node.driver, **own_options(node, module)}
    if node.kind == "protocol" and len(options) == 1:
        options["filename"] = node.filename
    for name, edge in node.children.items():
        first, _, index = name.partition(".")
        if name == "backing":
            continue
        below = open_options(edge.node)
        if index:
            cast("list[object]", options.setdefault(first, [])).append(below)
        else:
            options[names.get(name, name)] = below
    return options
