"""Changing the metadata of a VHDX file through its log ([MS-VHDX] 2.3), and the two headers (2.2.2).

Each round of changes is an entry of the log: **the entry | the pages in place**, with a flush at the bar, and what the
pages refer to flushed before the entry. The first entry is there before the header names its log GUID, so that a log
that counts always holds something to replay; from then on each entry is a sequence of its own, written while its
forerunner is still whole. A header is changed by writing the other one, so that one of them is always valid.
"""

from __future__ import annotations

from ...errors import ImageError, NotSupported
from ...typing import TYPE_CHECKING
from . import layout
from .log import PAGE, PAGES_PER_ENTRY, encode_entry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...graph.node import Node

__all__ = ["Journal"]


class Journal:
    """Guarded by the node's lock.

    :ivar header: the current header as it is in the file
    :ivar begun: the headers say that the file is open for writing
    """

    def __init__(self, file: Node, header: layout.Header, index: int) -> None:
        self.file = file
        self.header = header
        self._index = index
        self._sequence = 0
        self._at = 0
        self.begun = False

    @property
    def active(self) -> bool:
        """Whether the log on disk counts."""
        return self.header.log_guid != layout.NO_GUID

    def begin(self) -> None:
        """Before the first change: both headers get new GUIDs, which children of this disk and others compare.

        :raises NotSupported: the file has no log
        """
        if self.begun:
            return
        if not self.header.log_length or self.header.log_offset + self.header.log_length > self.file.size:
            raise NotSupported("the file has no log, without which it cannot be changed safely",
                               where=self.file.filename, hint="convert it")  # fmt: skip
        self._update(self.header._replace(file_write_guid=layout.new_guid(), data_write_guid=layout.new_guid(),
                                          log_guid=layout.NO_GUID))  # fmt: skip
        self.begun = True

    def end(self) -> None:
        """The log is empty: everything in it is in place, and durable."""
        if self.active:
            self._update(self.header._replace(log_guid=layout.NO_GUID))

    def _update(self, wanted: layout.Header) -> None:
        """Both headers become ``wanted``, the one that does not count first; durable."""
        for _ in range(2):
            sequence = self.header.sequence_number + 1
            if sequence >> 64:
                raise ImageError("the sequence number of the headers has no successor", where=self.file.filename)
            header = wanted._replace(sequence_number=sequence)
            index = 1 - self._index
            self.file.write_from(layout.HEADER_OFFSETS[index], memoryview(layout.encode_header(header)))
            self.file.flush()
            self.header, self._index = header, index

    def commit(self, pages: Mapping[int, bytes]) -> None:
        """Write ``pages`` (4096 bytes each, by file offset) so that a crash leaves all or none of an entry.

        Up to 84 pages go into one entry. What they refer to must be flushed already; on return the change cannot
        be lost, but the pages themselves are flushed by the next flush of the file.
        """
        rows = sorted(pages.items())
        for start in range(0, len(rows), PAGES_PER_ENTRY):
            if start:
                self.file.flush()  # the entry before this one is no longer needed
            self._write(rows[start : start + PAGES_PER_ENTRY])

    def _write(self, rows: Sequence[tuple[int, bytes]]) -> None:
        guid = self.header.log_guid if self.active else layout.new_guid()
        length = PAGE * (1 + len(rows))
        if self._at + length > self.header.log_length:
            self._at = 0
        self._sequence += 1
        entry = encode_entry(rows, self._sequence, self._at, guid, self.file.size)
        self.file.write_from(self.header.log_offset + self._at, memoryview(entry))
        self.file.flush()
        self._at += length
        if not self.active:
            self._update(self.header._replace(log_guid=guid))
        for at, run in _runs(rows):
            self.file.write_from(at, memoryview(run))


def _runs(rows: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Neighbouring pages joined."""
    joined: list[tuple[int, list[bytes]]] = []
    for at, data in rows:
        if joined and joined[-1][0] + PAGE * len(joined[-1][1]) == at:
            joined[-1][1].append(data)
        else:
            joined.append((at, [data]))
    return [(at, b"".join(parts)) for at, parts in joined]
