"""Repairing bitmaps whose bits or table lie past the end of the file (docs/interop/qcow2, "Bitmaps").

What changed there is not known any more, so all of it counts as changed: an entry of a table becomes "all ones", and so
does the whole of a table that is not there. A backup copies more than it needs then, never less; the bitmap stays.

Only done where nothing else is wrong any more: until then, clusters that seem to be free may not be, and a file that
grows would bring other references past its end to life. Order: entries, each in one sector | new tables and their
reference counts | the directory's entry.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import ByreError, printable
from ...io.tables import encode_words
from . import bitmap_store, entries, layout
from .check_reader import WORDS_STEP
from .directories import MAX_BITMAP_BYTES, MAX_BITMAP_TABLE_ENTRIES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from .check_findings import Findings
    from .check_reader import Subject
    from .image import Qcow2Node
    from .layout import BitmapEntry

__all__ = ["mend_bitmaps"]

_ALL_ONES = 1
_FIXED = 24
"""Bytes of a directory entry before its extra data."""


class _Lost(NamedTuple):
    """A bitmap without a table.

    :ivar position: host offset of its directory entry
    :ivar needed: entries its table must have
    """

    position: int
    entry: BitmapEntry
    needed: int


def mend_bitmaps(node: Qcow2Node, subject: Subject, findings: Findings) -> bool:
    """Mend what lies past the end of the file, if nothing else is wrong with the image; whether anything was written.

    :param findings: what is still wrong; messages are added, the caller counts anew
    :raises NoSpace: there is no room for a new table
    :raises IOFailure: writing failed
    """
    pointer = subject.bitmaps
    if pointer is None or findings.check_errors or not findings.corruptions or node._bitmaps is not None:
        return False
    data = subject.read(pointer.directory_offset, pointer.directory_size)
    directory = layout.decode_bitmap_directory(data.data, pointer.nb_bitmaps, subject.cluster_bits)
    subject.forget()
    if not _sole(subject, pointer.directory_offset, pointer.directory_size):
        return False
    lost: list[_Lost] = []
    broken: list[tuple[BitmapEntry, int]] = []
    position = pointer.directory_offset
    for entry in directory:
        end = entry.table_offset + entry.table_size * 8
        if end - subject.file_length >= subject.cluster_size:
            lost.append(_Lost(position, entry, _needed(node, entry)))
        elif _sole(subject, entry.table_offset, entry.table_size * 8):
            count = sum(len(rows) for _, _, rows in _beyond(subject, entry))
            broken += [(entry, count)] if count else []
        size = _FIXED + len(entry.extra) + len(entry.name.encode("utf-8", "surrogateescape"))
        position += size + -size % 8
    limit = min(MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAP_BYTES >> subject.cluster_bits)
    explained = len(lost) + sum(count for _, count in broken)
    if explained != findings.corruptions or any(row.needed > limit for row in lost):
        return False
    for entry, count in broken:
        _fill_entries(subject, entry)
        findings.say(f"Repairing bitmap '{printable(entry.name)}': {count} clusters of its bits lie past the end of "
                     "the file; all of what they stand for counts as changed")  # fmt: skip
    subject.file.flush()
    if lost:
        _write_tables(node, lost, findings)
    return True


def _needed(node: Qcow2Node, entry: BitmapEntry) -> int:
    """Entries of a table for the whole disk."""
    bits = -(-node.header.disk_size >> entry.granularity_bits)
    return max(1, -(-bits // (8 * node.cluster_size)))


def _sole(subject: Subject, offset: int, length: int) -> bool:
    """Whether nothing else refers to these clusters; the counts are right."""
    bits = subject.cluster_bits
    keys = np.arange(offset >> bits, (offset + length - 1 >> bits) + 1, dtype=np.int64)
    counts, failed = subject.gather(keys)
    return not failed.any() and bool((counts == 1).all())


def _beyond(subject: Subject, entry: BitmapEntry) -> Iterator[tuple[int, NDArray[Any], NDArray[np.intp]]]:
    """(host offset, words, which of them point past the end of the file) of pieces of a bitmap's table."""
    end = min(entry.table_offset + entry.table_size * 8, subject.file_length)
    for first, last in subject.data_ranges(entry.table_offset, end, 8):
        for offset in range(first, last, WORDS_STEP):
            words = subject.read(offset, min(WORDS_STEP, last - offset)).view(">u8")
            hosts = words.astype(np.uint64) & np.uint64(entries.OFFSET_MASK)
            rows = np.flatnonzero(hosts >= np.uint64(subject.file_length))
            if len(rows):
                yield offset, words, rows


def _fill_entries(subject: Subject, entry: BitmapEntry) -> None:
    for offset, words, rows in _beyond(subject, entry):
        words[rows] = _ALL_ONES
        low, high = int(rows[0]), int(rows[-1]) + 1
        subject.file.write_from(offset + low * 8, memoryview(words[low:high].tobytes()))


def _write_tables(node: Qcow2Node, lost: list[_Lost], findings: Findings) -> None:
    node.invalidate()
    with node.lock:
        batch = bitmap_store.Batch(node)
        try:
            places = [batch.place(encode_words(array("Q", [_ALL_ONES]) * row.needed)) for row in lost]
            batch.settle()
        except ByreError:
            batch.give_back()
            raise
        for row, place in zip(lost, places, strict=True):
            if row.needed != row.entry.table_size:
                node.file.write_from(row.position + 8, memoryview(row.needed.to_bytes(4, "big")))
                node.file.flush()
            # One field, aligned to 8 bytes: a crash leaves the old table or the new one.
            node.file.write_from(row.position, memoryview(place.to_bytes(8, "big")))
            findings.say(f"Repairing bitmap '{printable(row.entry.name)}': its table at {row.entry.table_offset:#x} "
                         "lies past the end of the file; the whole disk counts as changed")  # fmt: skip
        node.file.flush()
    node.invalidate()
