"""Creating image files: the size and format of a backing file are settled here, the rest by the driver."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from ..catalog import driver
from ..errors import InvalidArgument, NotSupported
from ..options import OptionSet, OptionValues
from ..units import SECTOR, align_up
from .graph import Graph
from .node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE, Node
from .opening import Opener, OpenFlags, Policy, has_protocol, parse_filename, resolve_backing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["CreateRequest", "create"]


class CreateRequest:
    """What a format's ``create(request)`` is given.

    :ivar filename: as the user typed it
    :ivar options: typed values of the driver's ``CREATE_OPTIONS``; ``size`` is settled
    :ivar file: an empty, writable protocol node; the driver writes and flushes the image there
    :ivar graph: where further nodes may be opened
    """

    def __init__(self, filename: str, options: OptionValues, file: Node, graph: Graph,
                 create_file: Callable[[str, Mapping[str, object]], Node]) -> None:  # fmt: skip
        self.filename = filename
        self.options = options
        self.file = file
        self.graph = graph
        self._create_file = create_file

    def create_data_file(self, name: str, size: int) -> Node:
        """A writable protocol node for an external data file of ``size`` bytes, created if it does not exist.

        ``name`` is resolved against the folder of the image.
        """
        return self._create_file(resolve_backing(self.filename, name), {"size": size})


def create(
    filename: str,
    format: str = "raw",
    size: int | None = None,
    *,
    options: Mapping[str, object] | None = None,
    check_backing: bool = True,
    policy: Policy | None = None,
    announce: Callable[[OptionValues], None] | None = None,
) -> OptionValues:
    """Create an image.

    :param size: virtual size, bytes; may be left out with a backing file, whose size is taken then
    :param options: the driver's creation options ("cluster_size", "backing_file", ...)
    :param check_backing: open the backing file to see that it is there and how long it is
    :param announce: called with the settled options before anything is written
    :returns: the options as settled, for printing
    :raises ByreError: a failed creation removes what it made itself
    """
    row = driver(format)
    module = import_module(row.module)
    if not hasattr(module, "create"):
        raise NotSupported(f"format driver {format!r} cannot create images")
    declared: OptionSet = module.CREATE_OPTIONS
    given = dict(options or {})
    if size is not None:
        given["size"] = size
    values = declared.parse(given, what=f"format {format!r}")
    for name in ("backing_file", "backing_fmt"):
        if name in given and name not in declared:
            raise NotSupported(f"format {format!r} has no backing files")
    if values.text("backing_file") == "" if "backing_file" in declared else False:
        values.given.pop("backing_file", None)
    _settle_backing(filename, values, check_backing, policy or Policy(allow_references=True))
    if "size" not in values.given:
        raise InvalidArgument("no size: give one, or a backing file to take it from", where=filename)
    # Disks consist of sectors: the peer rounds up as well.
    values.given["size"] = align_up(values.number("size"), SECTOR)
    if announce is not None:
        announce(values)
    prepare = getattr(module, "check_create", None)
    if prepare is not None:
        prepare(values)  # refuse before anything is written
    _create_over_protocol(filename, module.create, values)
    return values


def _settle_backing(filename: str, values: OptionValues, check: bool, policy: Policy) -> None:
    """Open the backing file, unless told not to; take its size if none was given."""
    backing = values.given.get("backing_file")
    format_name = values.given.get("backing_fmt")
    if not isinstance(backing, str):
        return
    if isinstance(format_name, str):
        row = driver(format_name)
        if row.kind == "protocol":
            raise InvalidArgument(f"backing format {format_name!r} is a protocol, not a format", where=filename)
    if not check and "size" in values.given:
        return
    if not isinstance(format_name, str) and check:
        raise InvalidArgument("a backing file is given without its format", where=filename,
                              hint="use -F (or backing_fmt=)")  # fmt: skip
    graph = Graph()
    spec = resolve_backing(filename, backing)
    opener = Opener(graph, policy)
    node = opener.open_chain(spec, OpenFlags(), driver_name=str(format_name or ""))
    try:
        if "size" not in values.given:
            values.given["size"] = node.size
    finally:
        graph.release(node)


def _create_over_protocol(filename: str, make: Callable[[CreateRequest], None], values: OptionValues) -> None:
    """Create the file, let the format write into it, and remove both if that fails."""
    made: list[str] = []
    graph = Graph()
    opened: list[Node] = []

    def create_file(name: str, options: Mapping[str, object]) -> Node:
        given = parse_filename(name)
        row = driver(str(given["driver"]))
        protocol = import_module(row.module)
        if hasattr(protocol, "create") and row.name == "file":
            path = str(given["filename"])
            if not os.path.exists(path):
                made.append(path)
            protocol.create(path, protocol.CREATE_OPTIONS.parse(dict(options), what=f"driver {row.name!r}"))
        node = Opener(graph, Policy()).open(given, OpenFlags(read_only=False), protocol=True)
        opened.append(node)
        graph.attach_image(node, "image creation", PERM_READ | PERM_WRITE | PERM_RESIZE,
                           PERM_ALL & ~(PERM_WRITE | PERM_RESIZE))  # fmt: skip
        return node

    file_options: dict[str, object] = {key: values.given[key] for key in ("nocow", "extent_size_hint") if key in values.given}
    try:
        node = create_file(filename, {**file_options, "size": 0})
        make(CreateRequest(filename, values, node, graph, create_file))
    except BaseException:
        _close(graph, opened)
        for path in made:
            try:
                os.unlink(path)
            except OSError:
                pass
        raise
    _close(graph, opened)


def _close(graph: Graph, nodes: list[Node]) -> None:
    for node in nodes:
        for edge in list(node.parents):
            graph._unlink(edge)
        graph.release(node)


def is_plain_path(name: str) -> bool:
    return not has_protocol(name)
