"""The log of a VHDX file ([MS-VHDX] 2.3): a ring of entries, each a set of 4 KiB pages and where they belong.

Pure codecs. An entry counts if it carries the log GUID of the current header and its checksum is right; of those the
one with the highest sequence number ends the sequence to be replayed, which begins at the entry its tail points to.
"""

from __future__ import annotations

import struct

from ...errors import ImageError
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ...units import MIB
from . import layout
from .crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LOG_LIMIT", "PAGE", "PAGES_PER_ENTRY", "Entry", "Write", "decode_entry", "encode_entry", "find_sequence"]

PAGE: Final = 4096
LOG_LIMIT: Final = 16 * MIB
"""The longest log that is replayed: it is held in memory. Programs make logs of 1 MiB."""

_HEAD: Final = struct.Struct("<4sIIIQII16sQQ")
_DESCRIPTOR: Final = struct.Struct("<4s4s8sQQ")
PAGES_PER_ENTRY: Final = 84
"""What entries made here hold at most: a third of the smallest log, so that no entry meets its forerunner going round.

Their descriptors fit one sector together with the header.
"""


class Write(NamedTuple):
    """``length`` bytes at ``offset`` of the file: a page of ``data``, or zeroes where that is ``None``."""

    offset: int
    length: int
    data: bytes | None


class Entry(NamedTuple):
    """One entry of the log.

    :ivar tail: offset in the log of the oldest entry that must be replayed together with this one
    :ivar flushed_file_offset: the file was at least this long when the entry was written
    :ivar last_file_offset: and must be this long once it is replayed
    """

    length: int
    tail: int
    sequence_number: int
    log_guid: bytes
    flushed_file_offset: int
    last_file_offset: int
    writes: tuple[Write, ...]


class _Head(NamedTuple):
    length: int
    tail: int
    sequence_number: int
    descriptors: int
    log_guid: bytes
    flushed_file_offset: int
    last_file_offset: int


def encode_entry(pages: Sequence[tuple[int, bytes]], sequence_number: int, tail: int, log_guid: bytes,
                 file_length: int) -> bytes:  # fmt: skip
    """An entry that writes ``pages``, (file offset, 4096 bytes) each, at most ``PAGES_PER_ENTRY``."""
    length = PAGE * (1 + len(pages))
    parts = [_HEAD.pack(b"loge", 0, length, tail, sequence_number, len(pages), 0, log_guid, file_length, file_length)]
    parts += [_DESCRIPTOR.pack(b"desc", data[-4:], data[:8], at, sequence_number) for at, data in pages]
    head = b"".join(parts).ljust(PAGE, b"\0")
    high, low = (sequence_number >> 32).to_bytes(4, "little"), (sequence_number & 0xFFFFFFFF).to_bytes(4, "little")
    return layout.sealed(b"".join((head, *(b"data" + high + data[8:-4] + low for _, data in pages))))


def _decode_head(data: bytes | memoryview) -> _Head | None:
    """The fields of an entry's first sector, if they can be those of an entry."""
    if len(data) < _HEAD.size:
        return None
    signature, _, length, tail, sequence, count, _, guid, flushed, last = _HEAD.unpack_from(data)
    if signature != b"loge" or not length or length % PAGE or tail % PAGE or not sequence:
        return None
    if _descriptor_sectors(count) * PAGE > length:
        return None
    return _Head(length, tail, sequence, count, guid, flushed, last)


def _descriptor_sectors(count: int) -> int:
    """Sectors of the header and ``count`` descriptors."""
    return -(-(_HEAD.size + count * _DESCRIPTOR.size) // PAGE)


def decode_entry(data: bytes | bytearray | memoryview) -> Entry:
    """The entry that begins with ``data``.

    :raises ImageError: it is damaged, or not complete
    """
    head = _decode_head(memoryview(data))
    if head is None:
        raise ImageError("no entry of the log begins here")
    if head.length > len(data):
        raise ImageError(f"the log entry has {head.length} bytes, {len(data)} are there")
    view = memoryview(data)[: head.length]
    if crc32c(bytes(view[:4]) + bytes(4) + bytes(view[8:])) != int.from_bytes(view[4:8], "little"):
        raise ImageError("the checksum of the log entry is wrong")
    return Entry(head.length, head.tail, head.sequence_number, head.log_guid, head.flushed_file_offset,
                 head.last_file_offset, _decode_writes(view, head))  # fmt: skip


def _decode_writes(view: memoryview, head: _Head) -> tuple[Write, ...]:
    writes: list[Write] = []
    sector = _descriptor_sectors(head.descriptors) * PAGE
    rows = view[_HEAD.size : _HEAD.size + head.descriptors * _DESCRIPTOR.size]
    for kind, last, first, offset, sequence in _DESCRIPTOR.iter_unpack(rows):
        if sequence != head.sequence_number or offset % PAGE:
            raise ImageError(f"a descriptor in the log (sequence {sequence}, offset {offset:#x}) does not belong to "
                             f"its entry (sequence {head.sequence_number})")  # fmt: skip
        if kind == b"zero":
            # Bytes 8 to 15 are the length there.
            length = int.from_bytes(first, "little")
            _check_range(offset, length)
            writes.append(Write(offset, length, None))
        elif kind == b"desc":
            _check_range(offset, PAGE)
            content = bytes(view[sector : sector + PAGE])
            if len(content) < PAGE or content[:4] != b"data" or content[4:8] + content[-4:] != _halves(sequence):
                raise ImageError(f"the data sector for {offset:#x} in the log does not belong to its entry")
            writes.append(Write(offset, PAGE, first + content[8:-4] + last))
            sector += PAGE
        else:
            raise ImageError(f"a descriptor in the log begins with {kind!r}, expected is b'desc' or b'zero'")
    return tuple(writes)


def _halves(sequence: int) -> bytes:
    return (sequence >> 32).to_bytes(4, "little") + (sequence & 0xFFFFFFFF).to_bytes(4, "little")


def _check_range(offset: int, length: int) -> None:
    if length % PAGE or offset + length > 1 << 63:
        raise ImageError(f"the log writes {length} bytes at {offset:#x}, which is no range of whole pages")


# -- finding what is to be replayed (2.3.3) -------------------------------------------------------


def find_sequence(log: bytes | bytearray, log_guid: bytes) -> list[Entry]:
    """The entries to be replayed, in order; empty if the log holds none.

    :param log: the whole ring
    :raises ImageError: entries overlap each other so often that nobody wrote them
    """
    ring = _Ring(log, log_guid)
    newest = sorted(ring.heads, key=lambda at: ring.heads[at].sequence_number, reverse=True)
    alone: Entry | None = None
    for at in newest:
        entry = ring.entry(at)
        if entry is None:
            continue
        sequence = ring.sequence(ring.heads[at].tail, at)
        if sequence:
            return sequence
        # Some writers apply each entry before the next, and leave a tail that points nowhere.
        alone = alone or entry
    return [alone] if alone is not None else []


class _Ring:
    """The log of one file.

    :ivar heads: what may be an entry, by its offset
    """

    def __init__(self, log: bytes | bytearray, log_guid: bytes) -> None:
        self.log = memoryview(log)
        self.heads: dict[int, _Head] = {}
        self._entries: dict[int, Entry | None] = {}
        self._budget = 2 * len(log)
        at = log.find(b"loge")
        while at >= 0:
            if at % PAGE == 0:
                head = _decode_head(self.log[at : at + PAGE])
                if head is not None and head.log_guid == log_guid and head.length <= len(log) and head.tail < len(log):
                    self.heads[at] = head
            at = log.find(b"loge", at + 1)

    def entry(self, at: int) -> Entry | None:
        """The entry at ``at``, ``None`` if none that is valid begins there."""
        if at not in self._entries:
            self._entries[at] = self._decode(at)
        return self._entries[at]

    def _decode(self, at: int) -> Entry | None:
        if at not in self.heads:
            return None
        length = self.heads[at].length
        self._budget -= length
        if self._budget < 0:
            raise ImageError("the entries of the log overlap each other; nothing in it can be believed")
        data = self.log[at : at + length]
        if len(data) < length:
            data = memoryview(bytes(data) + bytes(self.log[: length - len(data)]))
        try:
            return decode_entry(data)
        except ImageError:
            return None

    def sequence(self, tail: int, head: int) -> list[Entry]:
        """The entries from ``tail`` to ``head``, whose numbers follow each other; empty if that is not so."""
        found: list[Entry] = []
        at = tail
        while len(found) <= len(self.heads):
            entry = self.entry(at)
            if entry is None or (found and entry.sequence_number != found[-1].sequence_number + 1):
                return []
            found.append(entry)
            if at == head:
                return found
            at = (at + entry.length) % len(self.log)
        return []
