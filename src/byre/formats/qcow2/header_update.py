"""Changing what the first cluster holds: header, extensions, backing file name; a crash leaves the old or the new.

Order (RELIABILITY 2.3): L2 tables, reference counts, data | new text in bytes that nothing uses yet | the first sector,
which makes it valid | what is left over is wiped. Extensions begin right behind the header, so where both the old and
the new ones reach beyond the first sector, the new ones are first valid further back, behind an extension that only
fills the gap, and then move to the front. Header fields and extensions that nobody here knows stay to the byte.
"""

from __future__ import annotations

import struct
from itertools import pairwise

from ...errors import InvalidArgument, NoSpace, ReadOnly
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR, align_up
from . import layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .image import Qcow2Node
    from .layout import Extension, Header

__all__ = ["FILLER", "change_backing", "check_backing", "plan_update", "update", "with_extension"]

FILLER: Final = 0x62797265
"""Type of the extension that fills the gap while others move; found again only after a crash, and dropped then."""

Write = tuple[int, bytes]
_Span = tuple[int, int]
_HEADING: Final = struct.Struct(">II")


class _Text:
    """A first cluster: its bytes, and which of them a reader looks at."""

    def __init__(self, data: bytes, live: tuple[_Span, ...]) -> None:
        self.data = data
        self.live = live

    @property
    def end(self) -> int:
        """Behind the last byte in use."""
        return max((end for start, end in self.live if end > start), default=0)

    @classmethod
    def found(cls, data: bytes) -> _Text:
        """What is there."""
        header = layout.decode_header(data, repair=True)
        extensions = layout.decode_extensions(data, header)
        limit = header.backing_file_offset or len(data)
        end = min(header.header_length + len(layout.encode_extensions(extensions)), limit)
        name = header.backing_file_offset
        return cls(data, ((0, end), (name, name + header.backing_file_size)))


def _encoded(header: Header, area: bytes, name: bytes, at: int) -> bytes:
    offset = at if name else 0
    return layout.encode_header(header._replace(backing_file_offset=offset, backing_file_size=len(name))) + area


def _made(size: int, header: Header, area: bytes, name: bytes, at: int) -> _Text | None:
    """Header and extensions at the beginning, ``name`` at ``at``; ``None`` if that does not fit."""
    front = _encoded(header, area, name, at)
    if (name and at < len(front)) or max(len(front), at + len(name)) > size:
        return None
    data = bytearray(size)
    data[: len(front)] = front
    data[at : at + len(name)] = name
    return _Text(bytes(data), ((0, len(front)), (at, at + len(name))))


def _filled(size: int, header: Header, area: bytes, name: bytes, first: int) -> _Text | None:
    """The same with the extensions not before ``first``, behind a filler; ``None`` if that does not fit."""
    start = header.header_length + _HEADING.size
    place = start + align_up(max(first - start, 0), 8)
    at = place + len(area)
    front = _encoded(header, _HEADING.pack(FILLER, place - start), name, at)
    if at + len(name) > size or len(front) > SECTOR:
        return None
    data = bytearray(size)
    data[: len(front)] = front
    data[place:at] = area
    data[at : at + len(name)] = name
    return _Text(bytes(data), ((0, len(front)), (place, at + len(name))))


def _steps(old: _Text, new: _Text) -> list[list[Write]] | None:
    """Writes from ``old`` to ``new``, a flush after each list; ``None`` if no order of them is safe."""
    between = bytearray(new.data)
    for start, end in old.live:
        start = max(start, SECTOR)
        if start < end:
            between[start:end] = old.data[start:end]
    for start, end in new.live:
        start = max(start, SECTOR)
        if start < end and between[start:end] != new.data[start:end]:
            return None
    prepared = old.data[:SECTOR] + bytes(between[SECTOR:])
    switched = new.data[:SECTOR] + prepared[SECTOR:]
    stages = (old.data, prepared, switched, new.data)
    steps = [_changes(before, after) for before, after in pairwise(stages)]
    return [step for step in steps if step]


def _changes(before: bytes, after: bytes) -> list[Write]:
    """The sectors that differ, neighbours together."""
    if before == after:
        return []
    found: list[Write] = []
    for at in range(0, len(after), SECTOR):
        if before[at : at + SECTOR] == after[at : at + SECTOR]:
            continue
        if found and found[-1][0] + len(found[-1][1]) == at:
            found[-1] = (found[-1][0], found[-1][1] + after[at : at + SECTOR])
        else:
            found.append((at, after[at : at + SECTOR]))
    return found


def plan_update(
    data: bytes, header: Header, extensions: Sequence[Extension], name: bytes
) -> tuple[list[list[Write]], bytes]:
    """How the first cluster comes from ``data`` to the new content, and what it holds then.

    A name that is there already may stay where it is. Where the cluster has no room for two copies (only small ones
    have not), everything is one write.

    :returns: lists of (offset, bytes) to write, with a flush behind each list; the cluster at the end
    :raises NoSpace: it does not fit
    """
    size = len(data)
    wanted = tuple(extension for extension in extensions if extension.type != FILLER)
    if header.header_length + len(layout.encode_extensions(wanted)) + len(name) > size:
        # Readers can do without the names of features.
        wanted = tuple(extension for extension in wanted if extension.type != layout.EXTENSION_FEATURE_NAMES)
    area = layout.encode_extensions(wanted)
    compact = _made(size, header, area, name, header.header_length + len(area))
    if compact is None or len(name) > layout.MAX_BACKING_NAME:
        raise NoSpace(
            f"header extensions ({len(area)} bytes) and backing file name ({len(name)} bytes) do not fit in the first "
            f"cluster of {size} bytes; a name may have {layout.MAX_BACKING_NAME}"
        )
    old = _Text.found(data)
    found = _direct(old, header, area, name)
    if found is not None:
        return found
    moved = _filled(size, header, area, name, max(old.end, compact.end))
    first = _steps(old, moved) if moved is not None else None
    if moved is not None and first is not None:
        rest = _direct(moved, header, area, name)
        assert rest is not None
        return first + rest[0], rest[1]
    return [_changes(data, compact.data)], compact.data


def _direct(old: _Text, header: Header, area: bytes, name: bytes) -> tuple[list[list[Write]], bytes] | None:
    """Without moving extensions: the name behind them, where it is, or behind everything there is."""
    end = header.header_length + len(area)
    stays = old.live[-1][1] - len(name)
    places = [end]
    if name and stays >= end and old.data[stays : stays + len(name)] == name:
        places.append(stays)
    places.append(max(end, old.end))
    for at in places:
        new = _made(len(old.data), header, area, name, at)
        steps = _steps(old, new) if new is not None else None
        if new is not None and steps is not None:
            return steps, new.data
    return None


def with_extension(extensions: Sequence[Extension], kind: int, data: bytes | None) -> tuple[Extension, ...]:
    """``extensions`` with the one of type ``kind`` replaced, added at the front or (``None``) left out."""
    found = [row for row in extensions if row.type == kind]
    if data is None:
        return tuple(row for row in extensions if row.type != kind)
    if not found:
        return (layout.Extension(kind, data), *extensions)
    return tuple(row._replace(data=data) if row.type == kind else row for row in extensions)


def update(
    node: Qcow2Node,
    fields: Mapping[str, object] | None = None,
    extensions: Sequence[Extension] | None = None,
    backing_name: str | None = None,
) -> None:
    """Change header fields, extensions or the backing file's name, durably, and with them the node; lock held.

    Everything else is written back before. A failure takes the node out of service.

    :param fields: fields of :class:`.layout.Header` that change; not those of the backing name
    :raises NoSpace: it does not fit; nothing has changed
    """
    node._guarded(node.settle)
    data = bytearray(node.cluster_size)
    node.file.read_into(0, memoryview(data))
    header = node.header._replace(**(fields or {}))  # type: ignore[arg-type]
    rows = node.extensions if extensions is None else extensions
    name = node.backing_name if backing_name is None else backing_name
    try:
        steps, final = plan_update(bytes(data), header, rows, name.encode("utf-8", "surrogateescape"))
    except NoSpace as error:
        error.where = error.where or node.filename
        raise

    def carry_out() -> None:
        node.file.flush()
        for step in steps:
            for offset, part in step:
                node.file.write_from(offset, memoryview(part))
            node.file.flush()

    node._guarded(carry_out)
    node.header = layout.decode_header(final)
    node.extensions = layout.decode_extensions(final, node.header)
    node.backing_name = name


def check_backing(node: Qcow2Node, name: str, format: str) -> None:
    """Everything for which :func:`change_backing` would refuse, with nothing changed.

    :raises InvalidArgument: a format without a file, or a file for an image whose data file is a disk by itself
    :raises NoSpace: the name is too long
    """
    if node.read_only:
        raise ReadOnly("cannot change the backing file: the image is open read-only", where=node.filename)
    if format and not name:
        raise InvalidArgument("a backing file format is given without a backing file", where=node.filename)
    if name and node.header.raw_data_file:
        raise InvalidArgument("an image with data_file_raw cannot have a backing file", where=node.filename)
    encoded = name.encode("utf-8", "surrogateescape")
    if "\0" in name or len(encoded) > layout.MAX_BACKING_NAME:
        raise NoSpace(f"a backing file name may have {layout.MAX_BACKING_NAME} bytes, none of them 0",
                      where=node.filename)  # fmt: skip
    data = bytearray(node.cluster_size)
    with node.lock:
        node.file.read_into(0, memoryview(data))
        try:
            plan_update(bytes(data), node.header, _with_format(node, format), encoded)
        except NoSpace as error:
            error.where = error.where or node.filename
            raise


def change_backing(node: Qcow2Node, name: str, format: str) -> None:
    """Record another backing file (or none: "") and its format in the image; durable on return.

    :raises ByreError: as :func:`check_backing` says
    """
    check_backing(node, name, format)
    with node.lock:
        node.check_failure()
        node._before_change()
        update(node, extensions=_with_format(node, format), backing_name=name)
        node.backing_format = format


def _with_format(node: Qcow2Node, format: str) -> tuple[Extension, ...]:
    recorded = format.encode("utf-8", "surrogateescape") or None
    return with_extension(node.extensions, layout.EXTENSION_BACKING_FORMAT, recorded)
