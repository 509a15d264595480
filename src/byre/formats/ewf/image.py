"""An open EWF image: its segments, the tables in them, and chunks on demand."""

from __future__ import annotations

import os
import sys
import zlib
from array import array
from bisect import bisect_right

from ...errors import ImageError
from ...io.extent import COMPRESSED, Extent
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ..opening import read_exactly, read_head
from ..readonly import ReadOnlyFormat
from . import layout

if TYPE_CHECKING:
    from ...graph.child import Child
    from ...graph.node import Node
    from ...graph.opening import OpenFlags, OpenRequest
    from .layout import Section, Volume

__all__ = ["EwfNode", "open_segments", "segment_name"]

MAX_SEGMENTS: Final = 4096
MAX_SECTIONS: Final = 1 << 16
"""Of one segment."""
MAX_HEADER: Final = 1 << 20
"""Bytes of text about the case, decompressed."""
MAX_TEXTS: Final = 16
"""Texts about the case that are looked at; writers put two or three."""
_TABLES_KEPT: Final = 16
"""Tables whose entries are in memory, at most 64 MiB; usual are 16,375 of four bytes, 65,536 with newer writers."""
MAX_ENTRIES: Final = 1 << 20
_ROWS: Final = 1024


class _Table(NamedTuple):
    """One table.

    :ivar source: the segment's place in ``sources``
    :ivar first: the chunk that its first entry is for
    :ivar entries_at: where its entries lie in the segment
    :ivar end: where the last of its chunks ends
    """

    source: int
    first: int
    entry_count: int
    entries_at: int
    base: int
    end: int


def segment_name(first: str, number: int) -> str:
    """The file name of segment ``number`` (from 1), whose first one is ``first``: E01 to E99, EAA to EZZ, FAA to ZZZ.

    :raises ImageError: ``first`` does not end as a first segment does, or there are no more names
    """
    stem, dot, extension = first.rpartition(".")
    if not dot or len(extension) != 3 or extension[1:] != "01":
        raise ImageError(f"the image has further segments, but its name does not end in .E01: {first!r}", where=first)
    if number < 100:
        return f"{stem}.{extension[0]}{number:02}"
    rest, third = divmod(number - 100, 26)
    letter, second = divmod(rest, 26)
    code = ord(extension[0]) + letter
    if code > ord("z" if extension[0].islower() else "Z"):
        raise ImageError(f"there is no name for segment {number}", where=first)
    start = ord("a" if extension[0].islower() else "A")
    return f"{stem}.{chr(code)}{chr(start + second)}{chr(start + third)}"


def open_segments(node: EwfNode, request: OpenRequest) -> None:
    """Open and walk the segments behind the first one, which lie beside it.

    :raises ImageError: one is missing, or breaks the format
    """
    opener = request.opener
    number = 1
    while node.goes_on:
        number += 1
        if number > MAX_SEGMENTS:
            raise ImageError(f"the image has more than {MAX_SEGMENTS} segments", where=node.filename)
        path = segment_name(node.filename, number)
        opener.policy.check(os.path.basename(path), path, "segment file", node.filename)
        below = opener.open({"driver": "file", "filename": path}, node.open_flags.for_file(), protocol=True,
                            implicit=True)  # fmt: skip
        node.sources += (opener.graph.attach(node, f"segment-{number}", below, "data"),)
        node.add_segment(below, number)
    node.finish()


class EwfNode(ReadOnlyFormat):
    """Guarded by ``lock``: the entries of tables in memory.

    :ivar goes_on: further segments follow
    :ivar values: what the image says of the case
    :raises ImageError: the first segment breaks the format
    """

    driver = "ewf"

    def __init__(self, file: Node, flags: OpenFlags) -> None:
        from ..streams import ChunkCache

        super().__init__(file, flags)
        self.volume: Volume | None = None
        self.values: dict[str, str] = {}
        self.md5 = self.sha1 = b""
        self.segments: list[Node] = []
        self._texts = 0
        self._tables: list[_Table] = []
        self._firsts: list[int] = []
        self._entries: dict[int, array[int]] = {}
        self._chunks = ChunkCache()
        self.goes_on = True
        self.add_segment(file, 1)

    def child_moved(self, child: Child, before: Node) -> None:
        super().child_moved(child, before)
        if child in self.sources:
            self.segments[self.sources.index(child)] = child.node

    # -- walking ----------------------------------------------------------------------------------

    def add_segment(self, file: Node, number: int) -> None:
        """:raises ImageError: it is not segment ``number`` of an image, or breaks the format"""
        self.segments.append(file)
        try:
            found = layout.decode_file_header(read_head(file, layout.FILE_HEADER_SIZE))
            if found != number:
                raise ImageError(f"this is segment {found} of an image, expected was segment {number}")
            self._walk(file)
        except ImageError as error:
            error.where = error.where or file.filename
            raise

    def _walk(self, file: Node) -> None:
        at, sectors_end = layout.FILE_HEADER_SIZE, 0
        for _ in range(MAX_SECTIONS):
            section = layout.decode_section(read_exactly(file, at, layout.SECTION_SIZE, "section"))
            end = at + section.size if section.size else section.next
            if section.type in ("done", "next"):
                self.goes_on = section.type == "next"
                return
            if section.next <= at:
                raise ImageError(f"section {section.type!r} at {at:#x} is followed by one at {section.next:#x}")
            if section.type == "sectors":
                sectors_end = section.next
            self._take(file, section, at + layout.SECTION_SIZE, max(end, section.next), sectors_end)
            at = section.next
        raise ImageError(f"the segment has more than {MAX_SECTIONS} sections")

    def _take(self, file: Node, section: Section, at: int, end: int, sectors_end: int) -> None:
        """One section whose data lies from ``at`` to ``end``."""
        kind, length = section.type, end - at
        if kind in ("volume", "disk", "data") and self.volume is None and length >= layout.SMART_VOLUME_SIZE:
            data = read_exactly(file, at, min(length, layout.VOLUME_SIZE), "volume")
            self.volume = layout.decode_volume(data)
            self.cluster_size = self.zero_unit = self.volume.chunk_size
            self._size = self.volume.size
        elif kind in ("header", "header2") and len(self.segments) == 1 and self._texts < MAX_TEXTS:
            self._texts += 1
            self._take_values(file, at, length)
        elif kind == "table":
            self._take_table(file, at, end, sectors_end)
        elif kind == "hash" and length >= 16:
            self.md5 = bytes(read_exactly(file, at, 16, "hash"))
        elif kind == "digest" and length >= 36:
            digests = read_exactly(file, at, 36, "digest")
            self.md5, self.sha1 = bytes(digests[:16]), bytes(digests[16:])

    def _take_values(self, file: Node, at: int, length: int) -> None:
        from ..streams import unpack

        if length > MAX_HEADER:
            raise ImageError(f"the text about the case has {length} bytes, allowed are {MAX_HEADER}")
        text = unpack("zlib", read_exactly(file, at, length, "header"), MAX_HEADER, file.filename)
        self.values.update(layout.decode_values(text))

    def _take_table(self, file: Node, at: int, end: int, sectors_end: int) -> None:
        if self.volume is None:
            raise ImageError(f"a table at {at:#x} stands before the description of the volume")
        head = layout.decode_table_head(read_exactly(file, at, layout.TABLE_HEAD_SIZE, "table"))
        entries_at = at + layout.TABLE_HEAD_SIZE
        first = self._tables[-1].first + self._tables[-1].entry_count if self._tables else 0
        if head.entry_count > MAX_ENTRIES or first + head.entry_count > self.volume.chunk_count:
            raise ImageError(f"the table at {at:#x} has {head.entry_count} entries behind {first}, but the volume has "
                             f"{self.volume.chunk_count} chunks")  # fmt: skip
        if entries_at + 4 * head.entry_count > file.size:
            raise ImageError(f"the table at {at:#x} ends past the end of the file ({file.size:#x})")
        if head.entry_count:
            # The first writers had chunks in the table's own section, behind the entries.
            self._tables.append(
                _Table(len(self.segments) - 1, first, head.entry_count, entries_at, head.base, sectors_end or end)
            )

    def finish(self) -> None:
        """All segments are there.

        :raises ImageError: they hold no disk, or not all of it
        """
        count = self._tables[-1].first + self._tables[-1].entry_count if self._tables else 0
        if self.volume is None:
            raise ImageError("the image does not describe its volume", where=self.filename)
        if count * self.volume.chunk_size < self._size:
            raise ImageError(f"the tables list {count} chunks, the volume has {self.volume.chunk_count}",
                             where=self.filename)  # fmt: skip
        self._firsts = [table.first for table in self._tables]

    # -- reading ----------------------------------------------------------------------------------

    def _place(self, chunk: int) -> tuple[int, int, int, bool]:
        """(segment, begin, end, compressed) of a chunk; called with the lock held."""
        number = bisect_right(self._firsts, chunk) - 1
        table = self._tables[number]
        entries = self._entries.get(number)
        if entries is None:
            raw = read_exactly(self.segments[table.source], table.entries_at, 4 * table.entry_count, "table")
            entries = array("I")
            entries.frombytes(raw)
            if sys.byteorder == "big":
                entries.byteswap()
            if len(self._entries) >= _TABLES_KEPT:
                del self._entries[next(iter(self._entries))]
            self._entries[number] = entries
        index = chunk - table.first
        mask = layout.COMPRESSED - 1
        start = table.base + (entries[index] & mask)
        end = table.base + (entries[index + 1] & mask) if index + 1 < table.entry_count else table.end
        return table.source, start, end, bool(entries[index] & layout.COMPRESSED)

    def lookup(self, offset: int, length: int) -> list[Extent]:
        size = self.cluster_size
        rows: list[Extent] = []
        end = offset + length
        while offset < end and len(rows) < _ROWS:
            source, start, _, _ = self._place(offset // size)
            stop = min(end, (offset // size + 1) * size)
            rows.append(Extent(offset, stop - offset, COMPRESSED, start, source))
            offset = stop
        return rows

    def decompress(self, extent: Extent, buffer: memoryview) -> None:
        index = extent.offset // self.cluster_size
        data = self._chunks.get(index, lambda: self._chunk(index), self.cluster_size)
        start = extent.offset - index * self.cluster_size
        buffer[:] = data[start : start + len(buffer)]

    def _chunk(self, index: int) -> bytes:
        from ..streams import unpack

        with self.lock:
            source, start, end, compressed = self._place(index)
        file = self.segments[source]
        where = f"{file.filename}: chunk {index}"
        wanted = min(self.cluster_size, self._size - index * self.cluster_size)
        if not start < end <= start + 2 * self.cluster_size + 4096:
            raise ImageError(f"it lies from {start:#x} to {end:#x}", where=where)
        if compressed:
            data = unpack("zlib", read_exactly(file, start, end - start, f"chunk {index}"), self.cluster_size, where)
        else:
            raw = bytes(read_exactly(file, start, min(end - start, self.cluster_size + 4), f"chunk {index}"))
            data = raw[:-4]
            if zlib.adler32(data) != int.from_bytes(raw[-4:], "little"):
                raise ImageError("its checksum is wrong", where=where)
        if len(data) < wanted:
            raise ImageError(f"it holds {len(data)} bytes instead of {wanted}", where=where)
        return data

    def format_info(self) -> dict[str, object]:
        """What the image says of itself; the digests are those its writer recorded."""
        import uuid

        assert self.volume is not None
        media = {0: "removable", 1: "fixed", 3: "optical", 14: "logical", 16: "memory"}
        info: dict[str, object] = {
            "segments": len(self.segments),
            "media-type": media.get(self.volume.media_type, f"unknown ({self.volume.media_type})"),
            "bytes-per-sector": self.volume.bytes_per_sector,
            "chunk-size": self.volume.chunk_size,
        }
        if any(self.volume.guid):
            info["guid"] = str(uuid.UUID(bytes_le=self.volume.guid))
        if self.md5:
            info["md5"] = self.md5.hex()
        if self.sha1:
            info["sha1"] = self.sha1.hex()
        return {**info, **self.values}
