"""Commands about the image as a whole: ``length``, ``info``, ``map``, ``alloc``, ``truncate``, ``reopen``."""

from __future__ import annotations

from ...catalog import driver
from ...errors import InvalidArgument
from ...formats.abilities import HasSnapshots
from ...graph import chain
from ...io.extent import NOT_COUNTED, UNALLOCATED
from ...opening import CACHE_MODES
from ...options import Option, convert, parse_keyval
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR
from .getopt import UsageError, scan
from .shell import Command, Failed
from .text import parse_number, size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...graph.node import Node
    from .shell import Shell

__all__ = ["COMMANDS"]

_PREALLOCATION: Final = ("off", "metadata", "falloc", "full")


def length(shell: Shell, _arguments: list[str]) -> None:
    shell.say(f"{size_text(shell.opened.size)}\n")


# -- info -----------------------------------------------------------------------------------------


def info(shell: Shell, _arguments: list[str]) -> None:
    from ...formats.abilities import HasFormatInfo

    node = shell.opened.node
    shell.say(f"format name: {node.driver}\n")
    if driver(node.driver).prefix:  # such a driver has a second name, the one before the colon
        shell.say(f"format name: {node.driver}\n")
    described = chain.skip_filters(node)
    sizes = unit_sizes(described)
    if sizes is None:
        raise Failed
    shell.say(f"cluster size: {size_text(sizes[0])}\nvm state offset: {size_text(sizes[1])}\n")
    if isinstance(described, HasFormatInfo) and node is described:
        shell.say("Format specific information:\n")
        shell.say("".join(f"    {line}\n" for line in _dump(described.format_info())))


def unit_sizes(node: Node) -> tuple[int, int] | None:
    """(cluster size, where a machine's state would begin), bytes; zeroes where there is none, ``None`` if unknown."""
    if node.driver == "raw":
        return unit_sizes(chain.skip_filters(node.children["file"].node))
    if node.kind == "protocol":
        return (0, 0) if node.driver in ("file", "host_device", "host_cdrom") else None
    cluster: int = getattr(node, "shown_cluster_size", getattr(node, "cluster_size", 0))
    # The state of a machine lies behind the last mapping table that the disk needs.
    span: int = getattr(node, "table_span", 0) if isinstance(node, HasSnapshots) else 0
    return cluster, -(-node.size // span) * span if span else 0


def _dump(values: dict[str, object]) -> Iterator[str]:
    """Lines for nested values, names as words."""
    for key, value in values.items():
        yield from _dump_one(f"{key.replace('_', ' ').replace('-', ' ')}:", value)


def _dump_one(label: str, value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield label
        yield from (f"    {line}" for line in _dump(value))
    elif isinstance(value, list | tuple):
        yield label
        for index, item in enumerate(value):
            yield from (f"    {line}" for line in _dump_one(f"[{index}]:", item))
    elif isinstance(value, bool):
        yield f"{label} {'true' if value else 'false'}"
    else:
        yield f"{label} {value}"


# -- map and alloc --------------------------------------------------------------------------------


def allocated_runs(node: Node, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, in this layer) of runs that cover the range; neighbours that are alike are not joined."""
    import numpy

    layer = chain.skip_filters(node)
    file = layer.children["file"].node if layer.driver == "raw" else layer
    if file.kind == "protocol" and file.driver != "nbd":
        yield offset, end - offset, True  # there is no layer below to look into
        return
    for at, step in chain.windows(offset, end, chain.window_size(node)):
        extents = layer.extents(at, step)
        held = (extents.kind != UNALLOCATED) & (extents.source != NOT_COUNTED)
        first = numpy.flatnonzero(numpy.concatenate(([True], held[1:] != held[:-1])))
        starts = extents.offset[first]
        ends = numpy.concatenate((starts[1:], [at + step]))
        yield from zip(starts.tolist(), (ends - starts).tolist(), held[first].tolist(), strict=True)


def joined(runs: Iterator[tuple[int, int, bool]]) -> Iterator[tuple[int, int, bool]]:
    """The runs with neighbours that are alike joined."""
    start, size, kind = 0, 0, False
    for offset, length, held in runs:
        if size and held == kind:
            size += length
            continue
        if size:
            yield start, size, kind
        start, size, kind = offset, length, held
    if size:
        yield start, size, kind


def show_map(shell: Shell, _arguments: list[str]) -> None:
    image = shell.opened
    for offset, size, held in joined(allocated_runs(image.node, 0, image.size)):
        words = "    allocated" if held else "not allocated"
        shell.say(f"{size_text(size)} ({size:#x}) bytes {words} at offset {size_text(offset)} ({offset:#x})\n")


def alloc(shell: Shell, arguments: list[str]) -> None:
    image = shell.opened
    offset = parse_number(arguments[0])
    count = parse_number(arguments[1]) if len(arguments) > 1 else SECTOR
    count = max(0, min(count, image.size - offset))
    held = sum(size for _, size, kind in allocated_runs(image.node, offset, offset + count) if kind) if count else 0
    shell.say(f"{held}/{count} bytes allocated at offset {size_text(offset)}\n")


# -- changes --------------------------------------------------------------------------------------


def truncate(shell: Shell, arguments: list[str]) -> None:
    def preallocation(text: str) -> str:
        if text not in _PREALLOCATION:
            raise InvalidArgument(f"Invalid preallocation mode '{text}'")
        return text

    given = scan("truncate", arguments, "m:", {"m": preallocation})
    if not given.rest:
        raise UsageError
    size = parse_number(given.rest[0])
    image = shell.opened
    shell.perform(lambda: image.resize(size, preallocation=given.text("m") or "off", shrink=True))


def reopen(shell: Shell, arguments: list[str]) -> None:
    options: dict[str, object] = {}
    access: list[bool] = []

    def cache_mode(text: str) -> str:
        if text not in CACHE_MODES:
            raise InvalidArgument(f"Invalid cache option: {text}")
        return text

    def seen(letter: str, text: str) -> None:
        if letter == "o":
            options.update(parse_keyval(text))
        elif letter in "rw":
            if access:
                raise InvalidArgument("Only one -r/-w option may be given")
            access.append(letter == "r")

    given = scan("reopen", arguments, "c:o:rw", {"c": cache_mode}, seen=seen)
    if given.rest:
        raise UsageError
    if "read-only" in options:
        if access:
            raise InvalidArgument("Cannot set both -r/-w and 'read-only'")
        access.append(bool(convert(Option("read-only", "bool", ""), options.pop("read-only"))))
    if "c" in given and ("cache.direct" in options or "cache.no-flush" in options):
        raise InvalidArgument("Cannot set both -c and the cache options")
    shell.requests.drain()
    shell.opened.reopen(read_only=access[0] if access else None, cache=given.text("c") or None, options=options)


COMMANDS = (
    Command("length", length, "show the size of the disk", alias="l"),
    Command("info", info, "show format, cluster size and details of the image", alias="i"),
    Command("map", show_map, "show which ranges the top layer holds", ""),
    Command("alloc", alloc, "show how much of a range the top layer holds", "offset [count]", 1, 2, "a"),
    Command("truncate", truncate, "change the size of the disk", "[-m prealloc_mode] off", 1, 3, "t", writes=True),
    Command("reopen", reopen, "change options of the open image", "[(-r|-w)] [-c cache] [-o options]", 0, -1, help="""
 Example: 'reopen -o lazy-refcounts=on'

 -r  read-only from now on
 -w  writable from now on
 -c  cache mode: none, directsync, writethrough, writeback or unsafe
 -o  options of the image's driver

"""),
)  # fmt: skip
