"""Opening what lies below: the backing files of nodes just opened, by what they say or what the user gave instead.

A chain is opened in a loop, not by recursion, and is refused beyond ``CHAIN_LIMIT`` layers or when it meets itself.
"""

from __future__ import annotations

from ..catalog import driver
from ..errors import ImageError, InvalidArgument, NotFound, printable
from ..typing import TYPE_CHECKING
from .chain import skip_filters
from .opening import CHAIN_LIMIT, OpenFlags, has_protocol, parse_filename, resolve_backing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .node import Node
    from .opening import Opener

__all__ = ["open_backing_files"]


def open_backing_files(opener: Opener, created: list[Node]) -> None:
    """Open what lies below every node of ``created``, layer by layer; ``opener`` adds to it while it is walked.

    :raises ImageError: a chain that meets itself, or is longer than ``CHAIN_LIMIT`` layers
    """
    chains: dict[Node, set[object]] = {}
    for node in created:
        below = _open_backing(opener, node)
        if below is None:
            continue
        seen = chains.setdefault(node, {_identity(node)})
        if len(seen) >= CHAIN_LIMIT:
            raise ImageError(f"the backing chain is longer than {CHAIN_LIMIT} layers", where=node.filename)
        identity = _identity(below)
        if identity is not None and identity in seen:
            raise ImageError(f"the backing chain contains {below.filename!r} twice", where=node.filename)
        # Nodes without a file of their own count as well.
        seen.add(identity if identity is not None else below)
        chains[skip_filters(below)] = seen
        opener.graph.attach(node, "backing", below, "backing")


def _identity(node: Node) -> object:
    """(device, inode) of the file under ``node``; ``None`` if it has none."""
    while "file" in node.children:
        node = node.children["file"].node
    return getattr(node, "identity", None)


def _open_backing(opener: Opener, node: Node) -> Node | None:
    """The node below ``node``, by its options or by what the image says; ``None`` at the base."""
    if node.kind == "filter":
        return None
    override = getattr(node, "backing_override", "unset")
    if "backing" in node.children or override is None:
        return None
    flags = node.open_flags.for_backing() if hasattr(node, "open_flags") else OpenFlags()
    name: str = getattr(node, "backing_name", "")
    format_name: str = getattr(node, "backing_format", "")
    if isinstance(override, str) and override != "unset":
        return None if override == "" else opener.open(opener.graph.find(override).name, flags)
    extra = dict(override) if isinstance(override, dict) else {}
    if extra and ("driver" in extra or "file" in extra or "filename" in extra) and not _needs_name(extra):
        return opener.open(extra, flags)
    if not name:
        if extra:
            raise InvalidArgument("backing options are given, but the image has no backing file", where=node.filename)
        return None
    return _open_named(opener, node, name, format_name, extra, flags)


def _open_named(
    opener: Opener, node: Node, name: str, format_name: str, extra: dict[str, object], flags: OpenFlags
) -> Node:
    """The backing file ``name`` that the image ``node`` names, if it may.

    :param format_name: as the image says; "" probes
    :param extra: options that override parts of it
    """
    path = resolve_backing(node.filename, name)
    where = node.filename
    plain = None if has_protocol(name) else path
    opener.policy.check(name, plain, "backing file", where)
    if "driver" in extra:
        format_name = str(extra.pop("driver"))
    if not format_name and plain is not None and getattr(node, "records_backing_format", True):
        opener.graph.warnings.append(
            f"{printable(where)}: the format of backing file {name!r} is not recorded; probing it"
        )
    given = {"driver": "file", "filename": path} if plain is not None else parse_filename(path)
    try:
        if format_name:
            driver(format_name)
        if format_name and extra:
            # The options are the format's, not the file's.
            below = opener.open({"driver": format_name, "file": given, **extra}, flags, implicit=True)
        else:
            below = opener.open({**given, **extra}, flags, driver_name=format_name, implicit=True)
    except NotFound as error:
        raise NotFound(f"cannot open backing file {name!r}: {error}", where=where) from None
    return below


def _needs_name(extra: Mapping[str, object]) -> bool:
    """Whether options override only parts of a backing file whose name the image gives."""
    return "file" not in extra and "filename" not in extra and driver(str(extra.get("driver", "raw"))).kind == "format"
