"""Reopening: other options for open nodes, as one transaction.

Every node under the handle prepares (opens what it needs, checks), then all commit, or all abort and
everything is as before. Requests are held back meanwhile.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..catalog import driver
from ..errors import Busy, InvalidArgument
from ..options import convert, flatten
from .live import quiesce
from .node import PERM_READ, PERM_RESIZE, PERM_WRITE, PERM_WRITE_UNCHANGED
from .opening import COMMON_OPTIONS, FLAG_FIELDS, OpenFlags

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..image import Image
    from ..options import OptionSet, OptionValues
    from .graph import Graph
    from .node import Node

__all__ = ["reopen", "set_read_only"]


def reopen(
    image: Image, *, read_only: bool | None, cache: tuple[bool, bool, bool] | None, options: Mapping[str, object]
) -> None:
    """See :meth:`byre.image.Image.reopen`.

    :param cache: (direct, no_flush, writethrough), ``None`` to leave them
    """
    changes: dict[str, object] = {}
    writethrough = image.writethrough
    if read_only is not None:
        changes["read_only"] = read_only
    if cache is not None:
        changes["direct"], changes["no_flush"], writethrough = cache
    with _held_still(image) as top:
        own, common = _split(top, options)
        changes.update(common)
        _transaction(image, top, changes, own)
        image.writethrough = writethrough


@contextmanager
def _held_still(image: Image) -> Iterator[Node]:
    """The node of ``image``; no request reaches it, nor what it owns, and nobody else changes the graph."""
    while True:
        with image.graph.lock:
            top = image.node
            nodes = _affected(top)
        with quiesce(image.graph, nodes):
            if image.node is top and _affected(top) == nodes:
                image._check_open()
                yield top
                return


def _split(top: Node, options: Mapping[str, object]) -> tuple[dict[Node, dict[str, object]], dict[str, object]]:
    """(driver options by node, changes of the flags every node has).

    :raises InvalidArgument: a driver or node name would change
    """
    own: dict[Node, dict[str, object]] = {}
    flags: dict[str, object] = {}
    for key, value in flatten(dict(options)).items():
        node, rest = _descend(top, key)
        if rest in ("driver", "node-name"):
            now = node.driver if rest == "driver" else node.name
            if value != now:
                raise InvalidArgument(f"cannot change option {key!r} from {now!r} to {value!r}", where=node.filename)
        elif rest in FLAG_FIELDS:
            flags[FLAG_FIELDS[rest]] = convert(COMMON_OPTIONS[rest], value)
        elif rest == "discard":
            flags["unmap"] = convert(COMMON_OPTIONS[rest], value) in ("unmap", "on")
        else:
            own.setdefault(node, {})[rest] = value
    return own, flags


def _descend(top: Node, key: str) -> tuple[Node, str]:
    """The node that dotted ``key`` concerns, and its option."""
    node = top
    while True:
        head, dot, rest = key.partition(".")
        if not dot or head not in node.children:
            return node, key
        node, key = node.children[head].node, rest


def _flags_of(node: Node) -> OpenFlags:
    flags = getattr(node, "open_flags", None)
    return flags if isinstance(flags, OpenFlags) else OpenFlags(read_only=node.read_only)


def _transaction(image: Image, top: Node, changes: dict[str, object], own: dict[Node, dict[str, object]]) -> None:
    """Change every node and then the permissions; if those are refused, change everything back."""
    nodes = _affected(top)
    before = [(node, _flags_of(node), _options(node, {})) for node in nodes]
    # Discards and zero detection are a matter of each node; one below a filter may have settings of its own.
    inherited = {key: value for key, value in changes.items() if key not in ("unmap", "detect_zeroes")}
    after = []
    for node in nodes:
        flags = _flags_of(node)._replace(**(changes if node is top else inherited))  # type: ignore[arg-type]
        after.append((node, flags, _options(node, own.get(node, {}))))
    was_read_only, used, shared = image.read_only, image._root.used, image._root.shared
    wanted = bool(changes.get("read_only", was_read_only))
    if wanted and not was_read_only:
        _check_no_writer(top, image)
    _switch(after, wanted)
    image.read_only = wanted
    try:
        needed = used & ~(PERM_WRITE | PERM_RESIZE) | PERM_READ if wanted else used | PERM_WRITE
        image.graph.set_image_permissions(image._root, needed, shared)
        for node in nodes:
            node.reopen_finish()
    except BaseException:
        _switch(before, was_read_only)
        image.read_only = was_read_only
        image.graph.set_image_permissions(image._root, used, shared)
        raise


def set_read_only(graph: Graph, node: Node, read_only: bool) -> None:
    """Make a node, and what it owns the writing of, read-only or writable, whoever uses it; all or nothing.

    Requests through the node are held back by the caller.

    :raises Busy: somebody here needs to write, or somebody outside has it locked
    """
    with graph.lock:
        if read_only and graph.cumulative(node)[0] & PERM_WRITE:
            raise Busy(f"node {node.name!r} is being written to", where=node.filename)
        nodes = _affected(node)
        before = [(one, _flags_of(one), _options(one, {})) for one in nodes]
        was = node.read_only
        after = [(one, flags._replace(read_only=read_only), options) for one, flags, options in before]
        _switch(after, read_only)
        try:
            graph.refresh_permissions(node)
            for one in nodes:
                one.reopen_finish()
        except BaseException:
            _switch(before, was)
            graph.refresh_permissions(node)
            raise


def _check_no_writer(top: Node, image: Image) -> None:
    """:raises Busy: somebody else writes to ``top``"""
    for edge in top.parents:
        if edge is not image._root and edge.used & (PERM_WRITE | PERM_WRITE_UNCHANGED):
            raise Busy(f"cannot make the image read-only: {edge.describe()} writes to it", where=top.filename)


def _switch(changes: list[tuple[Node, OpenFlags, OptionValues]], read_only: bool) -> None:
    """All nodes prepare, then all commit; or all abort."""
    prepared: list[tuple[Node, object]] = []
    try:
        for node, flags, options in changes:
            prepared.append((node, node.reopen_prepare(flags, options)))
    except BaseException:
        for node, token in reversed(prepared):
            node.reopen_abort(token)
        raise
    # A file must be writable before the format above it starts to write, and the reverse on the way back.
    for node, token in prepared if read_only else reversed(prepared):
        node.reopen_commit(token)


def _affected(top: Node) -> list[Node]:
    """The node and what it owns the writing of (no backing files), top first."""
    result: list[Node] = []
    todo = [top]
    while todo:
        node = todo.pop(0)
        result.append(node)
        todo += [edge.node for name, edge in node.children.items() if name != "backing"]
    return result


def _options(node: Node, given: dict[str, object]) -> OptionValues:
    """The node's driver options with ``given`` on top."""
    row = driver(node.driver)
    module = row.load()
    before = getattr(node, "runtime", None)
    values = dict(before.given) if before is not None else {}
    join = getattr(module, "join_options", None)
    values = join(values, given) if join is not None and given else {**values, **given}
    declared: OptionSet = module.OPTIONS
    return declared.parse(values, what=f"driver {row.name!r}")
