"""``map``: which layer of a chain holds each range, and where.

The disk is walked in windows of its :class:`ExtentMap`; rows become text in blocks, never one by one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import NotSupported, printable
from . import common

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ..graph.holes import Holes
    from ..graph.node import Node
    from ..image import Image
    from ..io.extentmap import ExtentMap

__all__ = ["HELP", "Rows", "rows", "run"]

_TABLE: Final = (
    common.FORMAT,
    common.IMAGE_OPTS,
    common.OBJECT,
    common.OUTPUT,
    common.Switch("start", "s", "start-offset", "OFFSET", "begin there"),
    common.Switch("length", "l", "max-length", "LENGTH", "look at no more than this"),
    common.FORCE_SHARE,
)

HELP: Final = f"""\
usage: byre map [OPTIONS] FILENAME
Say which layer of a chain of images holds each range, and at which offset of which file.

{common.option_help(_TABLE)}"""

# What a row is, as bits of its class.
_DATA: Final = 1
_ZERO: Final = 2
_COMPRESSED: Final = 4
_PRESENT: Final = 8
_HAS_OFFSET: Final = 16

_BLOCK: Final = 16384
"""Rows formatted at once."""

_ROWS: Final = 1 << 17
"""Rows of a window, at most."""

_FILE_UNIT: Final = 4096
"""How closely holes of a file may lie."""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    as_json = common.output_format(given) == "json"
    start = common.size_argument(given.last("start"), "start offset") if given.has("start") else 0
    length = common.size_argument(given.last("length"), "max length") if given.has("length") else None
    with common.open_image(given.positional[0], given, format=given.last("format")) as image:
        end = image.size if length is None else min(image.size, start + length)
        if as_json:
            _print_json(image, start, end)
        else:
            _print_human(image, start, end)
    return 0


class Rows(NamedTuple):
    """Neighbouring ranges that differ; columns of one length.

    :ivar start: guest offset, bytes
    :ivar kind: bits, see above
    :ivar depth: layer that answers
    :ivar host: offset in ``file``, 0 where there is none
    :ivar file: index into the list of file names, -1 where there is none
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    kind: NDArray[np.int64]
    depth: NDArray[np.int64]
    host: NDArray[np.int64]
    file: NDArray[np.int64]

    def part(self, index: slice | NDArray[np.bool_] | NDArray[np.intp]) -> Rows:
        return Rows(*(column[index] for column in self))

    def merged(self) -> Rows:
        """Neighbours that are alike joined."""
        import numpy as np

        if len(self.start) < 2:
            return self
        same = self.kind[1:] == self.kind[:-1]
        same &= self.depth[1:] == self.depth[:-1]
        same &= self.file[1:] == self.file[:-1]
        same &= (self.kind[1:] & _HAS_OFFSET == 0) | (self.host[1:] == self.host[:-1] + self.length[:-1])
        first = np.flatnonzero(np.concatenate(([True], ~same)))
        if len(first) == len(self.start):
            return self
        return self.part(first)._replace(length=np.add.reduceat(self.length, first))

    @staticmethod
    def joined(one: Rows, other: Rows) -> Rows:
        import numpy as np

        return Rows(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))


# -- looking --------------------------------------------------------------------------------------


def rows(image: Image, start: int, end: int, names: list[str]) -> Iterator[Rows]:
    """The ranges of ``[start, end)`` in order, neighbours merged over all windows.

    :param names: file names are added here
    """
    from ..graph import chain

    layers = chain.layers(image.node)
    index = _FileNames(layers, names)
    holes = _holes(layers)
    held: Rows | None = None  # the last row, which the next window may continue
    for offset, length in chain.windows(start, end, _step(layers, holes)):
        found = _classified(image.extents(offset, length), layers, index, holes)
        if held is not None:
            found = Rows.joined(held, found)
        found = found.merged()
        held = found.part(slice(-1, None))
        if len(found.start) > 1:
            yield found.part(slice(None, -1))
    if held is not None:
        yield held


def _step(layers: list[Node], holes: list[tuple[int, int, Holes]]) -> int:
    """Bytes to look at at once: many tables where rows are long, and no more rows than memory allows."""
    unit = min(getattr(layer, "cluster_size", _FILE_UNIT) for layer in layers)
    if any(len(found) > _ROWS for _, _, found in holes):
        unit = min(unit, _FILE_UNIT)
    return unit * _ROWS


class _FileNames:
    """Numbers for the files under the layers.

    :ivar of: by depth and data child: (number of the file's name, where in the file the child begins); the number is -1
        where the child is an image itself, whose offsets mean nothing to others
    """

    def __init__(self, layers: list[Node], names: list[str]) -> None:
        self.of: list[list[tuple[int, int]]] = []
        for layer in layers:
            files = [_file_below(edge.node) for edge in getattr(layer, "sources", ())] or [(layer, 0)]
            numbers = []
            for node, begin in files:
                if node is not layer and node.kind == "format":
                    numbers.append((-1, 0))
                    continue
                if node is layer or node.filename not in names:
                    names.append(node.filename)
                numbers.append((names.index(node.filename), begin))
            self.of.append(numbers)


def _file_below(node: Node) -> tuple[Node, int]:
    """What lies below slices of files, and where in it they begin."""
    from ..formats.raw import RawNode

    begin = 0
    while isinstance(node, RawNode):
        begin += node.base
        node = node.children["file"].node
    return node, begin


def _holes(layers: list[Node]) -> list[tuple[int, int, Holes]]:
    """(depth, data child, holes of its file) for the layers whose data may lie in holes."""
    from ..formats.abilities import HasHoles
    from ..graph.holes import Holes

    return [
        (depth, source, Holes(edge.node))
        for depth, layer in enumerate(layers)
        if isinstance(layer, HasHoles) and layer.has_holes()
        for source, edge in enumerate(getattr(layer, "sources", ()))
    ]


def _classified(extents: ExtentMap, layers: list[Node], index: _FileNames, holes: list[tuple[int, int, Holes]]) -> Rows:
    """What the extents look like from outside."""
    import numpy as np

    from ..io.extent import COMPRESSED, DATA, NOT_COUNTED, UNALLOCATED, WRITTEN_ZERO, ZERO

    sizes = np.array([layer.size for layer in layers], np.int64)
    if len(layers) > 1:
        extents = extents.split_at(np.unique(sizes[1:]))
    in_holes = np.zeros(len(extents), np.bool_)
    for level, source, found in holes:
        of_file = (extents.kind == DATA) & (extents.host >= 0) & (extents.depth == level) & (extents.source == source)
        if of_file.any():
            extents, in_holes = _cut(extents, in_holes, of_file, found)
    depth = extents.depth.astype(np.int64)
    uncounted = (extents.kind == DATA) & (extents.source == NOT_COUNTED)
    present = (extents.kind != UNALLOCATED) & ~uncounted
    # What no layer holds belongs to the base.
    depth = np.where(present, depth, len(layers) - 1)
    # Behind the end of a layer, it is the one above it that reads as zeroes.
    for level in range(len(layers) - 1, 0, -1):
        behind = (depth == level) & (extents.offset >= sizes[level])
        depth = np.where(behind, level - 1, depth)
        present &= ~behind
    zero = (extents.kind == ZERO) | ~(present | uncounted)
    placed = present & (extents.host >= 0) & (extents.kind != COMPRESSED)
    for level, layer in enumerate(layers):
        if getattr(layer, "encrypted", False):
            placed &= depth != level  # what lies there is of no use to anybody else
    kind = np.where(zero, _ZERO, np.where(uncounted, 0, _DATA)).astype(np.int64)
    kind |= np.where(in_holes, _ZERO, 0)
    kind |= np.where(extents.source == WRITTEN_ZERO, _ZERO | _DATA, 0)
    kind |= np.where(extents.kind == COMPRESSED, _COMPRESSED, 0)
    file = np.full(len(extents), -1, np.int64)
    host = np.where(placed, extents.host, 0)
    for level, numbers in enumerate(index.of):
        for source, (number, begin) in enumerate(numbers):
            chosen = placed & (depth == level) & (np.maximum(extents.source, 0) == source)
            if number < 0:
                placed &= ~chosen
            file[chosen] = number
            host[chosen] += begin
    kind |= np.where(present, _PRESENT, 0) | np.where(placed, _HAS_OFFSET, 0)
    return Rows(extents.offset, extents.length, kind, depth, np.where(placed, host, 0), file)


def _cut(
    extents: ExtentMap, known: NDArray[np.bool_], chosen: NDArray[np.bool_], holes: Holes
) -> tuple[ExtentMap, NDArray[np.bool_]]:
    """``extents`` cut at the holes under the ``chosen`` rows, and which rows lie in holes; ``known`` are kept."""
    import numpy as np

    before = extents.offset
    extents, found = holes.split(extents, chosen)
    owner = np.searchsorted(before, extents.offset, "right") - 1
    return extents, known[owner] | found


# -- printing -------------------------------------------------------------------------------------


def _blocks(image: Image, start: int, end: int, names: list[str]) -> Iterator[Rows]:
    for found in rows(image, start, end, names):
        for first in range(0, len(found.start), _BLOCK):
            yield found.part(slice(first, first + _BLOCK))


def _json_template(kind: int) -> str:
    """The text of one row; takes start, length, depth and offset."""

    def flag(bit: int) -> str:
        return "true" if kind & bit else "false"

    # "%.0s" takes its value and prints nothing of it.
    offset = ', "offset": %d' if kind & _HAS_OFFSET else "%.0s"
    return (
        f'{{ "start": %d, "length": %d, "depth": %d, "present": {flag(_PRESENT)}, "zero": {flag(_ZERO)}, '
        f'"data": {flag(_DATA)}, "compressed": {flag(_COMPRESSED)}{offset}}}'
    )


def _print_json(image: Image, start: int, end: int) -> None:
    import numpy as np

    templates = [_json_template(kind) for kind in range(32)]
    before = "["
    for block in _blocks(image, start, end, []):
        text = ",\n".join(map(templates.__getitem__, block.kind.tolist()))
        values = np.column_stack((block.start, block.length, block.depth, block.host))
        sys.stdout.write(before + text % tuple(values.ravel().tolist()))
        before = ",\n"
    if before == "[":
        before += _json_template(0) % (start, 0, 0, 0)
        sys.stdout.write(before + "]\n")
    else:
        sys.stdout.write("]\n")


def _print_human(image: Image, start: int, end: int) -> None:
    names: list[str] = []
    write = sys.stdout.write
    write(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n")
    for block in _blocks(image, start, end, names):
        hidden = (block.kind & (_DATA | _HAS_OFFSET)) == _DATA
        if hidden.any():
            _write_human(block.part(slice(0, int(hidden.argmax()))), names)
            raise NotSupported("the image holds external, encrypted or compressed clusters, which have no offset in a "
                               "file", where=image.filename, hint="use --output=json")  # fmt: skip
        _write_human(block, names)


def _write_human(block: Rows, names: list[str]) -> None:
    import numpy as np

    shown = block.part((block.kind & (_DATA | _ZERO)) == _DATA)
    if not len(shown.start):
        return
    # A file name is part of the template; a percent sign in it must not be taken for a value. Zero has no prefix.
    lines = [
        f"%{first}%#-16x%{last}{printable(name).replace('%', '%%')}\n"
        for name in names
        for last in ("#-16x", "-16d")
        for first in ("#-16x", "-16d")
    ]
    which = shown.file * 4 + (shown.host == 0) * 2 + (shown.start == 0)
    values = np.column_stack((shown.start, shown.length, shown.host))
    sys.stdout.write("".join(map(lines.__getitem__, which.tolist())) % tuple(values.ravel().tolist()))
