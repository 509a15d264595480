"""Where qcow2 keeps bitmaps: tables and bits, the directory, the header extension (docs/interop/qcow2, "Bitmaps").

Functions that read and write these structures; what they mean is in :mod:`.bitmaps`. All are called with the node's
lock held. Order of writing (RELIABILITY 2.3): bits and tables, reference counts | directory | header extension and
autoclear bit, each change in one sector | what nothing refers to any more is let go.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from ...errors import ByreError, ImageError, NoSpace
from ...io.tables import decode_words, encode_words
from ...units import SECTOR, align_up
from . import layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...bitmaps.bitmap import Bitmap
    from .image import Qcow2Node
    from .layout import BitmapEntry

__all__ = ["Batch", "has_room", "load_bits", "replace_directory", "set_autoclear", "table_length", "update_directory"]

_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
_RESERVED: Final = 0xFF00_0000_0000_01FE
_ALL_ONES: Final = 1
_STEP: Final = 1 << 20
"""Bytes of bits read or written at once."""
_EXTENSION_BYTES: Final = 24
_AUTOCLEAR_AT: Final = 88
_ONES_SHARE: Final = 128
"""Bits that are all set take this part of the memory others do."""
_HEADING: Final = 8
"""Type and length of a header extension."""


def table_length(bitmap: Bitmap, cluster_size: int) -> int:
    """Entries of the table of ``bitmap``."""
    return max(1, -(-bitmap.byte_length // cluster_size))


# -- reading --------------------------------------------------------------------------------------


def read_table(node: Qcow2Node, entry: BitmapEntry) -> array[int]:
    """The bitmap table's entries.

    :raises ImageError: one of them is invalid, or it is not in the file
    """
    length = entry.table_size * 8
    if entry.table_offset + length > node.file.size:
        raise ImageError(f"the table of bitmap {entry.name!r} at {entry.table_offset:#x} lies behind the end of "
                         "the file", where=node.filename)  # fmt: skip
    data = bytearray(length)
    node.file.read_into(entry.table_offset, memoryview(data))
    table = decode_words(data)
    for index, word in enumerate(table):
        if word and (word & _RESERVED or (word & _OFFSET and word & (node.cluster_size - 1))):
            raise ImageError(f"entry {index} of the table of bitmap {entry.name!r} is {word:#x}, which is invalid",
                             where=node.filename)  # fmt: skip
    return table


def load_bits(node: Qcow2Node, entry: BitmapEntry, bitmap: Bitmap, budget: int) -> int:
    """Join the stored bits to ``bitmap``; about how many bytes of memory they take.

    :param budget: how many they may
    :raises ImageError: they are not there, are too many, or do not fit the disk's size
    """
    size = node.cluster_size
    if entry.table_size != table_length(bitmap, size):
        raise ImageError(f"the table of bitmap {entry.name!r} has {entry.table_size} entries, the disk needs "
                         f"{table_length(bitmap, size)}", where=node.filename)  # fmt: skip
    table = read_table(node, entry)
    done = 0
    for first, count, host in _stored_runs(table, size):
        length = min(count * size, bitmap.byte_length - first * size)
        done += length if host else -(-length // _ONES_SHARE)
        if done > budget:
            raise ImageError("the bitmaps of the image are too large to be loaded together", where=node.filename)
        if not host:
            bitmap.load_ones(first * size * 8, (first + count) * size * 8)
            continue
        if host + length > node.file.size:
            raise ImageError(f"bits of bitmap {entry.name!r} at {host:#x} lie behind the end of the file",
                             where=node.filename)  # fmt: skip
        data = bytearray(length)
        node.file.read_into(host, memoryview(data))
        bitmap.load(first * size, data)
    return done


def _stored_runs(table: array[int], size: int) -> Iterator[tuple[int, int, int]]:
    """(first entry, count, host offset) of clusters that lie side by side; host 0: all bits are set."""
    limit = max(1, _STEP // size)
    start = count = host = 0
    for index, word in enumerate(table):
        if count and count < limit and word == (host + count * size if host else _ALL_ONES):
            count += 1
            continue
        if count:
            yield start, count, host
        start, count, host = index, 1 if word else 0, word & _OFFSET
    if count:
        yield start, count, host


def clusters_of(node: Qcow2Node, entry: BitmapEntry) -> list[tuple[int, int]]:
    """(first cluster, count) runs that a bitmap takes: its bits and its table.

    :raises ImageError: its table is broken, so nobody knows
    """
    bits, size = node.header.cluster_bits, node.cluster_size
    runs = [(host >> bits, count) for _, count, host in _stored_runs(read_table(node, entry), size) if host]
    return [*runs, (entry.table_offset >> bits, -(-entry.table_size * 8 // size))]


# -- writing bits and tables ----------------------------------------------------------------------


class Batch:
    """Clusters allocated for something that nothing refers to yet."""

    def __init__(self, node: Qcow2Node) -> None:
        assert node.refcounts is not None
        self.node = node
        self.refcounts = node.refcounts
        self.runs: list[tuple[int, int]] = []

    def place(self, data: bytes | bytearray) -> int:
        """Write ``data`` to new clusters; their host offset."""
        size = self.node.cluster_size
        count = -(-len(data) // size)
        host = self.refcounts.allocate(count)
        self.runs.append((host, count))
        self.node.file.write_from(host, memoryview(data))
        return host

    def place_bitmap(self, bitmap: Bitmap) -> tuple[int, int]:
        """Write the bits and a table of them; the table's (host offset, entries)."""
        size = self.node.cluster_size
        table = array("Q", bytes(table_length(bitmap, size) * 8))
        waiting: list[int] = []
        parts: list[bytes] = []
        for index in range(len(table)):
            part = bitmap.dump(index * size, size)
            if not part.strip(b"\0"):
                continue
            # Unused bits behind the last one must be zero, which "all ones" does not say.
            if (index + 1) * size * 8 <= bitmap.length and not part.strip(b"\xff"):
                table[index] = _ALL_ONES
                continue
            waiting.append(index)
            parts.append(part)
            if len(parts) * size >= _STEP:
                self._place_parts(table, waiting, parts)
        self._place_parts(table, waiting, parts)
        return self.place(encode_words(table)), len(table)

    def _place_parts(self, table: array[int], indexes: list[int], parts: list[bytes]) -> None:
        if not parts:
            return
        host = self.place(b"".join(parts))
        for number, index in enumerate(indexes):
            table[index] = host + number * self.node.cluster_size
        indexes.clear()
        parts.clear()

    def settle(self) -> None:
        """Everything placed, and its reference counts, are durable."""
        self.refcounts.write_back()
        self.node.file.flush()

    def give_back(self) -> None:
        """It is not needed after all."""
        while self.runs:
            self.refcounts.release(*self.runs.pop())


# -- the directory --------------------------------------------------------------------------------


def directory_of(node: Qcow2Node) -> layout.BitmapsExtension | None:
    """Where the directory is, ``None`` if the image has no valid one."""
    data = layout.find_extension(node.extensions, layout.EXTENSION_BITMAPS)
    if data is None or not node.header.autoclear_features & layout.AUTOCLEAR_BITMAPS:
        return None
    return layout.decode_bitmaps_extension(data, node.header.cluster_bits)


def update_directory(node: Qcow2Node, entries: Sequence[BitmapEntry]) -> None:
    """Write the directory where it is; durable on return. Its length must be the same.

    Whatever sectors reach the disk, each entry has its old flags or its new ones.
    """
    record = directory_of(node)
    data = layout.encode_bitmap_directory(entries)
    assert record is not None
    assert record.directory_size == len(data)
    node.file.write_from(record.directory_offset, memoryview(data))
    node.file.flush()


def replace_directory(node: Qcow2Node, entries: Sequence[BitmapEntry], batch: Batch) -> list[tuple[int, int]]:
    """Write a new directory and make the header name it, durably; runs of clusters of the old one, now free.

    ``batch`` holds what the entries refer to; nothing of it is to be given back afterwards.
    """
    old = directory_of(node)
    data: bytes | None = None
    if entries:
        directory = layout.encode_bitmap_directory(entries)
        offset = batch.place(directory)
        data = layout.encode_bitmaps_extension(layout.BitmapsExtension(len(entries), len(directory), offset))
    batch.settle()
    node._guarded(lambda: _switch(node, data))
    batch.runs.clear()
    bits = node.header.cluster_bits
    return [] if old is None else [(old.directory_offset >> bits, -(-old.directory_size // node.cluster_size))]


# -- the header -----------------------------------------------------------------------------------


def set_autoclear(node: Qcow2Node, features: int) -> None:
    """Header bytes 88 to 95, durable."""
    if node.header.autoclear_features != features:
        node.header = node.header._replace(autoclear_features=features)
        node.file.write_from(_AUTOCLEAR_AT, memoryview(features.to_bytes(8, "big")))
        node.file.flush()


def _switch(node: Qcow2Node, data: bytes | None) -> None:
    """Let the header's bitmaps extension be ``data``, and the autoclear bit say whether there is one."""
    index = next((i for i, row in enumerate(node.extensions) if row.type == layout.EXTENSION_BITMAPS), -1)
    features = node.header.autoclear_features & layout.AUTOCLEAR_KNOWN
    on, off = features | layout.AUTOCLEAR_BITMAPS, features & ~layout.AUTOCLEAR_BITMAPS
    if data is None:
        set_autoclear(node, off)
        if index >= 0:
            _remove_extension(node, index)
        return
    if index < 0:
        set_autoclear(node, off)
        _append_extension(node, layout.Extension(layout.EXTENSION_BITMAPS, data))
    else:
        at = _places(node)[index] + _HEADING
        if at // SECTOR != (at + _EXTENSION_BYTES - 1) // SECTOR:
            # It cannot change in one piece: it is not valid meanwhile.
            set_autoclear(node, off)
        node.file.write_from(at, memoryview(data))
        node.file.flush()
        _set_extensions(node, index, [layout.Extension(layout.EXTENSION_BITMAPS, data)])
    set_autoclear(node, on)


def _places(node: Qcow2Node) -> list[int]:
    """Where each extension begins, and last where the next one would."""
    places = [node.header.header_length]
    for row in node.extensions:
        places.append(places[-1] + _HEADING + align_up(len(row.data), 8))
    return places


def _set_extensions(node: Qcow2Node, index: int, rows: list[layout.Extension]) -> None:
    node.extensions = (*node.extensions[:index], *rows, *node.extensions[index + 1 :])


def _remove_extension(node: Qcow2Node, index: int) -> None:
    """Those behind it move up; the last one becomes the end marker."""
    places = _places(node)
    rest = layout.encode_extensions(node.extensions[index + 1 :])
    if index + 1 < len(node.extensions):
        rest = rest.ljust(places[-1] - places[index], b"\0")
    node.file.write_from(places[index], memoryview(rest))
    node.file.flush()
    _set_extensions(node, index, [])


def has_room(node: Qcow2Node) -> bool:
    """Whether the first cluster can hold the bitmaps' extension."""
    if layout.find_extension(node.extensions, layout.EXTENSION_BITMAPS) is not None:
        return True
    end = _places(node)[-1] + 2 * _HEADING + _EXTENSION_BYTES
    return end + node.header.backing_file_size <= node.cluster_size


def _append_extension(node: Qcow2Node, extension: layout.Extension) -> None:
    """Put it behind the others: first its data, then, in place of the end marker, its type and length.

    :raises NoSpace: the first cluster is full
    """
    header, file = node.header, node.file
    place = _places(node)[-1]
    encoded = layout.encode_extensions([extension])
    _make_room(node, place + len(encoded), extension)
    file.write_from(place + _HEADING, memoryview(encoded[_HEADING:]))
    file.flush()
    file.write_from(place, memoryview(encoded[:_HEADING]))
    file.flush()
    assert header.header_length == node.header.header_length
    _set_extensions(node, len(node.extensions), [extension])


def _make_room(node: Qcow2Node, end: int, extension: layout.Extension) -> None:
    """Move the backing file's name, if it begins before ``end``: to unused bytes, then the fields that point to it."""
    header = node.header
    size = header.backing_file_size
    if end + (size if header.backing_file_offset else 0) > node.cluster_size:
        raise NoSpace("the header has no room for bitmaps", where=node.filename)
    if not header.backing_file_offset or header.backing_file_offset >= end:
        return
    place = align_up(max(end, header.backing_file_offset + size), 8)
    name = bytearray(size)
    node.file.read_into(header.backing_file_offset, memoryview(name))
    if place + size > node.cluster_size:
        _rewrite_first_cluster(node, extension, bytes(name))
        place = node.header.backing_file_offset
    else:
        node.file.write_from(place, memoryview(name))
        node.file.flush()
    # Header bytes 8 to 19: offset and length of the name.
    node.file.write_from(8, memoryview(place.to_bytes(8, "big") + size.to_bytes(4, "big")))
    node.file.flush()
    node.header = header._replace(backing_file_offset=place)


def _rewrite_first_cluster(node: Qcow2Node, extension: layout.Extension, name: bytes) -> None:
    """There is no room for two copies of the name: everything in one write (a cluster of 512 bytes is one sector)."""
    text = name.decode("utf-8", "surrogateescape")
    data = layout.header_bytes(node.header, (*node.extensions, extension), text)
    node.file.write_from(0, memoryview(data))
    node.file.flush()
    node.header = layout.decode_header(data)


def release_entry(node: Qcow2Node, entry: BitmapEntry) -> list[tuple[int, int]]:
    """Runs of clusters of a bitmap that is no longer in the directory.

    None if its table makes no sense: they stay counted, a leak, which check finds.
    """
    refcounts = node.refcounts
    assert refcounts is not None
    try:
        runs = clusters_of(node, entry)
    except ByreError:
        return []
    for first, count in runs:
        counted = (first + count - 1) << node.header.cluster_bits < node.file.size
        if not counted or node._metadata_at(first, count) or not all(map(refcounts.get, range(first, first + count))):
            return []
    return runs
