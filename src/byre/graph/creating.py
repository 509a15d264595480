"""Creating image files: the size and format of a backing file are settled here, the rest by the driver."""

from __future__ import annotations

import os

from ..catalog import driver
from ..errors import ByreError, InvalidArgument, NotSupported
from ..options import OptionSet, OptionValues
from ..typing import TYPE_CHECKING
from ..units import SECTOR, align_up
from .chain import layers
from .graph import Graph
from .node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE, Node
from .opening import Opener, OpenFlags, Policy, parse_filename, resolve_backing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..crypto.secrets import SecretProvider

__all__ = ["CreateRequest", "companions", "create"]


class CreateRequest:
    """What a format's ``create(request)`` is given.

    :ivar filename: as the user typed it
    :ivar options: typed values of the driver's ``CREATE_OPTIONS``; ``size`` is settled
    :ivar file: an empty, writable protocol node; the driver writes and flushes the image there
    :ivar graph: where further nodes may be opened
    :ivar secrets: where keys are looked for
    :ivar spoil: to be called where a failed creation must not leave the file even if it was there before
    """

    def __init__(self, filename: str, options: OptionValues, file: Node, graph: Graph,
                 create_file: Callable[[str, Mapping[str, object]], Node], secrets: SecretProvider | None = None,
                 spoil: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        self.filename = filename
        self.options = options
        self.file = file
        self.graph = graph
        self.secrets = secrets
        self._create_file = create_file
        self.spoil = spoil

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
    secrets: SecretProvider | None = None,
    remark: str = "",
) -> OptionValues:
    """Create an image.

    :param size: virtual size, bytes; may be left out with a backing file, whose size is taken then
    :param options: the driver's creation options ("cluster_size", "backing_file", ...)
    :param check_backing: open the backing file to see that it is there and how long it is
    :param announce: called with the settled options before anything is written
    :param secrets: keys by the ids that options such as ``key-secret`` name: a mapping, or a function of the id
    :param remark: a note that an error gets if the backing file cannot be opened
    :returns: the options as settled, for printing
    :raises ByreError: a failed creation removes what it made itself
    """
    row = driver(format)
    module = row.load()
    if not hasattr(module, "create"):
        raise NotSupported(f"format driver {format!r} cannot create images")
    declared: OptionSet = module.CREATE_OPTIONS
    given = dict(options or {})
    if size is not None:
        given["size"] = size
    for name in ("backing_file", "backing_fmt"):
        if name in given and name not in declared:
            raise NotSupported(f"format {format!r} has no backing files")
    values = declared.parse(given, what=f"format {format!r}")
    if values.text("backing_file") == "" if "backing_file" in declared else False:
        values.given.pop("backing_file", None)
    _settle_backing(filename, values, check_backing, policy or Policy(allow_references=True), remark)
    if "size" not in values.given:
        raise InvalidArgument("no size: give one, or a backing file to take it from", where=filename)
    if announce is not None:
        announce(values)
    # Disks consist of sectors: the peer rounds up as well, and says what it was asked for.
    values.given["size"] = align_up(values.number("size"), SECTOR)
    _check_backing_format(filename, values)
    prepare = getattr(module, "check_create", None)
    if prepare is not None:
        prepare(values)  # refuse before anything is written
    _create_over_protocol(filename, module.create, values, secrets)
    return values


def companions(format: str, filename: str, options: Mapping[str, object]) -> list[str]:
    """Names of the files that creating ``filename`` makes beside it, as the image has them.

    :param options: "size" among them
    :raises InvalidArgument: an option that :func:`create` would refuse as well
    """
    data_file = options.get("data_file")
    names = [data_file] if isinstance(data_file, str) and data_file else []
    module = driver(format).load()
    if hasattr(module, "created_files"):
        names += module.created_files(filename, module.CREATE_OPTIONS.parse(options, what=f"format {format!r}"))
    return names


def _settle_backing(filename: str, values: OptionValues, check: bool, policy: Policy, remark: str) -> None:
    """Open the backing file, unless told not to; take its size if none was given."""
    backing = values.given.get("backing_file")
    format_name = values.given.get("backing_fmt")
    if not isinstance(backing, str):
        return
    spec = resolve_backing(filename, backing)
    if _same_file(filename, spec):
        raise InvalidArgument("an image cannot be its own backing file", where=filename)
    if not check and "size" in values.given:
        return
    graph = Graph()
    opener = Opener(graph, policy)
    try:
        _check_backing_format(filename, values)
        node = opener.open_chain(spec, OpenFlags(no_io=True), driver_name=str(format_name or ""))
    except ByreError as error:
        if remark:
            error.add_note(remark)
        raise
    try:
        if not isinstance(format_name, str) and check:
            raise InvalidArgument("a backing file is given without its format", where=filename,
                                  hint="use -F (or backing_fmt=)")  # fmt: skip
        for layer in layers(node):
            if _same_file(filename, layer.filename):
                raise InvalidArgument("the image is part of the backing chain it is to have", where=filename)
        if "size" not in values.given:
            values.given["size"] = node.size
    finally:
        graph.release(node)


def _check_backing_format(filename: str, values: OptionValues) -> None:
    """:raises InvalidArgument: the format that is to be recorded is none"""
    name = values.given.get("backing_fmt")
    if isinstance(name, str) and driver(name).kind == "protocol":
        raise InvalidArgument(f"backing format {name!r} is a protocol, not a format", where=filename)


def _same_file(one: str, other: str) -> bool:
    """Whether both names lead to one existing file."""
    try:
        names = [str(parse_filename(name).get("filename", "")) for name in (one, other)]
        return os.path.samefile(*names)
    except (OSError, ValueError, ByreError):
        return False


def _create_over_protocol(filename: str, make: Callable[[CreateRequest], None], values: OptionValues,
                          secrets: SecretProvider | None) -> None:  # fmt: skip
    """Create the file, let the format write into it, and remove both if that fails."""
    made: list[str] = []
    graph = Graph()
    opened: list[Node] = []

    def create_file(name: str, options: Mapping[str, object]) -> Node:
        given = parse_filename(name)
        row = driver(str(given["driver"]))
        protocol = row.load()
        if hasattr(protocol, "create") and row.name == "file":
            path = str(given["filename"])
            if not os.path.exists(path):
                made.append(path)
            protocol.create(path, protocol.CREATE_OPTIONS.parse(dict(options), what=f"driver {row.name!r}"))
        node = Opener(graph, Policy()).open(given, OpenFlags(read_only=False), protocol=True)
        opened.append(node)
        graph.attach_image(node, "image creation", PERM_READ | PERM_WRITE | PERM_RESIZE,
                           PERM_ALL & ~(PERM_WRITE | PERM_RESIZE))  # fmt: skip
        if not hasattr(protocol, "create") and node.size:
            # It was there before: nobody shall take it for what it was.
            node.write_zeroes(0, min(node.size, SECTOR))
        return node

    def spoil() -> None:
        """The file's former content is gone: a failed creation removes it although it was there before."""
        path = parse_filename(filename).get("filename")
        if isinstance(path, str) and path not in made and os.path.isfile(path):
            made.append(path)

    file_options: dict[str, object] = {
        key: values.given[key] for key in ("nocow", "extent_size_hint") if key in values.given
    }
    try:
        node = create_file(filename, {**file_options, "size": 0})
        make(CreateRequest(filename, values, node, graph, create_file, secrets, spoil))
        _close(graph, opened)
    except BaseException:
        _close(graph, opened)
        for path in made:
            try:
                os.unlink(path)
            except OSError:
                pass
        raise


def _close(graph: Graph, nodes: list[Node]) -> None:
    for node in nodes:
        for edge in list(node.parents):
            graph._unlink(edge)
        graph.release(node)
