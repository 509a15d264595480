"""Opening a VMDK disk: descriptor, extent files, headers, grain directories.

Extent files are named by the descriptor and pass the same gate as every file that an image names. To look only
(``info``), none is opened but those that are called after the image itself ("disk-s001.vmdk" of "disk.vmdk").
"""

from __future__ import annotations

import os
from itertools import pairwise

from ...errors import ByreError, Corrupt, ImageError
from ...graph.opening import has_protocol, resolve_backing
from ...typing import TYPE_CHECKING, Final, NamedTuple, cast
from ...units import SECTOR, align_up
from ..opening import check_size, fit_flags, read_exactly, read_head
from . import layout
from .descriptor import PLAIN_TYPES, Descriptor, ExtentLine, decode_descriptor
from .extents import DiskExtent, PlainExtent, SeSparseExtent, SeSparseTables, SparseExtent
from .image import VmdkNode
from .tables import GrainTables, decode_entries

if TYPE_CHECKING:
    from array import array

    from ...graph.node import Node
    from ...graph.opening import OpenRequest
    from .layout import SparseHeader

__all__ = ["check_distinct", "load_redundant", "open_vmdk"]

_CACHE_BYTES: Final = 16 << 20
_FEW_TABLES: Final = 1 << 16
_DIRECTORY_BYTES: Final = 64 << 20
"""Of all extents together."""
_DESCRIPTOR_SECTOR: Final = 1
_DESCRIPTOR_SECTORS: Final = 20


class _Disk(NamedTuple):
    """What the file the user named turns out to be.

    :ivar lines: the extents that the descriptor names; empty if the file itself is the only one
    """

    create_type: str
    descriptor: Descriptor | None
    descriptor_at: int = 0
    lines: tuple[ExtentLine, ...] = ()


def open_vmdk(request: OpenRequest) -> VmdkNode:
    """The node of an existing disk; its parent is attached by the opener.

    :raises ImageError: descriptor or headers break the format
    :raises ByreError: an extent may not, or cannot, be opened
    """
    file = request.open_child("file")
    try:
        disk = _identify(file)
        node = VmdkNode(file, disk.descriptor, disk.create_type, request.options, request.flags,
                        descriptor_at=disk.descriptor_at, name=request.name)  # fmt: skip
        request.opener.adopt(node)  # so that a failure from here on leaves no edge behind
        builder = _Builder(request, node)
        builder.build(disk)
        check_size(request, node.size)
    except ImageError as error:
        error.where = error.where or file.filename
        raise
    flags = fit_flags(request, file, node.refusal)
    node.open_flags, node.read_only = flags, flags.read_only
    builder.attach(role="metadata" if disk.lines else "data")
    return node


# -- what it is -----------------------------------------------------------------------------------


def _identify(file: Node) -> _Disk:
    head = read_head(file, layout.HEADER_SIZE)
    if head.startswith(layout.KDMV_MAGIC):
        return _identify_hosted(file, layout.decode_header(head))
    if head.startswith(layout.COWD_MAGIC):
        at = _DESCRIPTOR_SECTOR * SECTOR
        return _Disk("vmfsSparse", _embedded(file, at, _DESCRIPTOR_SECTORS * SECTOR, required=False), at)
    if head.startswith(layout.SESPARSE_MAGIC):
        return _Disk("seSparse", None)
    if file.size > layout.MAX_DESCRIPTOR:
        raise ImageError(f"this is neither a VMDK extent nor a descriptor, which would have {layout.MAX_DESCRIPTOR} "
                         f"bytes at most, not {file.size}")  # fmt: skip
    descriptor = decode_descriptor(read_head(file, file.size))
    return _Disk(descriptor.create_type, descriptor, 0, descriptor.extents())


def _identify_hosted(file: Node, header: SparseHeader) -> _Disk:
    """A hosted sparse extent with a descriptor inside, which may name other extents instead of this one."""
    at = (header.descriptor or _DESCRIPTOR_SECTOR) * SECTOR
    length = (header.descriptor_length or _DESCRIPTOR_SECTORS) * SECTOR
    descriptor = _embedded(file, at, length, required=True)
    assert descriptor is not None
    if not header.capacity and descriptor.create_type not in ("monolithicSparse", "streamOptimized"):
        return _Disk(descriptor.create_type, descriptor, at, descriptor.extents())
    return _Disk("streamOptimized" if header.compressed else "monolithicSparse", descriptor, at)


def _embedded(file: Node, at: int, length: int, *, required: bool) -> Descriptor | None:
    """The descriptor inside an extent.

    :raises ImageError: there is none
    """
    data = bytearray(length)
    file.read_into(at, memoryview(data))
    if not data[:1].strip(b"\0"):
        if not required:
            return None
        raise ImageError("the extent holds no descriptor", hint="open the descriptor file that names it")
    try:
        return decode_descriptor(data)
    except ImageError:
        if required or b"createType" in data:
            raise
        return None


# -- extents --------------------------------------------------------------------------------------


class _Builder:
    """Makes the extents of one disk.

    :ivar files: data children in the order of ``node.sources``, by the names their edges get
    """

    def __init__(self, request: OpenRequest, node: VmdkNode) -> None:
        self.request = request
        self.node = node
        self.files: list[tuple[str, Node]] = []
        self._by_path: dict[str, int] = {}
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self._written: set[str] = set()
        self._directories = 0
        self._sparse_count = 1

    def build(self, disk: _Disk) -> None:
        """Fill ``node`` with the extents of ``disk``."""
        self._sparse_count = max(sum(line.type in ("SPARSE", "VMFSSPARSE", "SESPARSE") for line in disk.lines), 1)
        self._written = {line.name for line in disk.lines if line.access == "RW"}
        extents: list[DiskExtent] = []
        start = 0
        for index, line in enumerate(disk.lines):
            extent = self._from_line(index, line, start)
            extents.append(extent)
            start = extent.end
        if not disk.lines:
            self.files.append(("file", self.node.file))
            extents.append(self._sparse(self.node.file, 0, 0, None, "", 0))
            if disk.descriptor is None:
                self._refuse("the extent has no descriptor")
                self.request.opener.graph.warnings.append(
                    f"{self.node.filename}: the extent holds no descriptor; what only its parent has reads as zeroes"
                )
        for source, ranges in self._ranges.items():
            ranges.sort()
            if any(before[1] > behind[0] for before, behind in pairwise(ranges)):
                self._refuse(f"extents overlap in the file {self.files[source][1].filename!r}")
        self.node.use_extents(extents)
        if len(extents) > 1 and any(extent.compressed for extent in extents):
            self._refuse("a disk of several extents, some of them compressed, can only be read")

    def attach(self, *, role: str) -> None:
        """The edges to the files."""
        graph, node = self.request.opener.graph, self.node
        main = graph.attach(node, "file", node.file, role)
        node.report = node.file.debug_event if node.file.takes_events else None
        edges = []
        for name, file in self.files:
            edges.append(main if name == "file" else graph.attach(node, name, file, "data"))
            if file.takes_events:
                node.report = file.debug_event
        node.sources = tuple(edges)
        for extent in node.extents_of_disk:
            if isinstance(extent, SparseExtent):
                extent.tables.report = node.report

    def _refuse(self, reason: str) -> None:
        self.node.refusal = self.node.refusal or reason

    def _from_line(self, index: int, line: ExtentLine, start: int) -> DiskExtent:
        """:raises ByreError: its file may not be opened, or does not hold what the line says"""
        size = line.sectors * SECTOR
        writable = line.access == "RW"
        if line.type == "ZERO" or line.access == "NOACCESS":
            return DiskExtent(start, size, line.type, writable=False)
        found = self._open(index, line)
        if found is None:
            return DiskExtent(start, size, line.type, name=self._shown(line.name), writable=False)
        source, file = found
        try:
            if line.type in PLAIN_TYPES:
                base = line.offset * SECTOR
                self._ranges.setdefault(source, []).append((base, base + size))
                return PlainExtent(start, size, line.type, file, base, name=file.filename, source=source,
                                   writable=writable)  # fmt: skip
            if source in self._ranges:
                raise ImageError("two extents of the disk are this file", where=file.filename)
            self._ranges[source] = []
            return self._sparse(file, start, index, line, line.type, source)
        except ImageError as error:
            error.where = error.where or file.filename
            raise

    def _shown(self, name: str) -> str:
        try:
            return resolve_backing(self.node.filename, name)
        except ByreError:
            return name

    # -- files ------------------------------------------------------------------------------------

    def _open(self, index: int, line: ExtentLine) -> tuple[int, Node] | None:
        """(source index, node) of an extent's file; ``None`` where it is not to be opened."""
        request, where = self.request, self.node.filename
        flags = request.flags.for_file()
        if line.name not in self._written:
            flags = flags._replace(read_only=True)
        given = self._given(index)
        if given is not None:
            return self._add(f"extents.{index}", request.opener.open(given, flags, protocol=True))
        path = resolve_backing(where, line.name)
        if path in self._by_path:
            source = self._by_path[path]
            return source, self.files[source][1]
        if request.flags.no_io and not self._is_own(line.name):
            return None
        try:
            request.opener.policy.check(line.name, None if has_protocol(line.name) else path, "extent", where)
            file = request.opener.open({"driver": "file", "filename": path}, flags, protocol=True, implicit=True)
        except ByreError as error:
            if request.flags.no_io:
                return None
            error.message = f"cannot open extent {index}: {error}"
            error.where, error.hint = where, ""
            raise
        found = self._add(f"extents.{index}", file)
        self._by_path[path] = found[0]
        return found

    def _given(self, index: int) -> object:
        """What the user gave for ``extents.N``."""
        given = self.request.children.get("extents")
        if isinstance(given, list):
            return given[index] if index < len(given) else None
        return cast("dict[str, object]", given).get(str(index)) if isinstance(given, dict) else None

    def _is_own(self, name: str) -> bool:
        """Whether the file is called after the image and lies beside it: then the user named it, too."""
        stem = os.path.splitext(os.path.basename(self.node.filename))[0]
        return "/" not in name and name.startswith(f"{stem}-") and self.request.opener.policy.mode == "allow"

    def _add(self, name: str, file: Node) -> tuple[int, Node]:
        """:raises ImageError: the file is one of the disk's already, under another name"""
        identity = getattr(file, "identity", None)
        others = [self.node.file, *(node for _, node in self.files)]
        if any(other is file or (identity is not None and getattr(other, "identity", None) == identity)
               for other in others):  # fmt: skip
            raise ImageError(f"{file.filename!r} is named twice in the disk, or is the descriptor itself",
                             where=self.node.filename)  # fmt: skip
        self.files.append((name, file))
        return len(self.files) - 1, file

    # -- sparse extents ---------------------------------------------------------------------------

    def _sparse(self, file: Node, start: int, index: int, line: ExtentLine | None, type: str,
                source: int) -> SparseExtent:  # fmt: skip
        """A sparse extent of any kind, by what ``file`` begins with."""
        head = read_head(file, layout.HEADER_SIZE)
        size = line.sectors * SECTOR if line else None
        writable = line is None or line.access == "RW"
        if head.startswith(layout.SESPARSE_MAGIC):
            return self._sesparse(file, head, start, size, type, source)
        if head.startswith(layout.COWD_MAGIC):
            return self._cowd(file, head, start, size, type, source)
        return self._hosted(file, head, start, size, index, type, source, writable)

    def _hosted(self, file: Node, head: bytearray, start: int, size: int | None, index: int, type: str, source: int,
                writable: bool) -> SparseExtent:  # fmt: skip
        header = layout.decode_header(head)
        if header.directory == layout.GD_AT_END:
            header = self._footer(file)
        if file.size < header.overhead * SECTOR:
            raise ImageError(f"File truncated, expecting at least {header.overhead * SECTOR} bytes; it has {file.size}")
        if header.version == 3 and not header.compressed:
            self._refuse("VMDK version 3 must be read only: changes are tracked elsewhere")
        if header.compressed and not header.markers:
            self._refuse("a compressed extent without markers can only be read")
        size = self._checked_size(header.capacity, size)
        directory = self._directory(file, header.directory, header.table_count, 4)
        tables = GrainTables(file, directory, header.directory * SECTOR, header.table_entries, 4,
                             self._capacity(header.table_entries * 4), self._relieve,
                             zero_grains=header.zero_grains)  # fmt: skip
        self.node.headers[index] = header
        return SparseExtent(start, size, type, file, header.grain * SECTOR, tables, compressed=header.compressed,
                            zero_grains=header.zero_grains, name=file.filename, source=source,
                            writable=writable)  # fmt: skip

    def _footer(self, file: Node) -> SparseHeader:
        self._refuse("a stream-optimized disk that ends with a footer is complete, and can only be read")
        end = align_up(file.size, SECTOR)
        data = bytearray(layout.FOOTER_SIZE)
        if end >= len(data):
            file.read_into(end - len(data), memoryview(data))
        return layout.decode_footer(data)

    def _cowd(self, file: Node, head: bytearray, start: int, size: int | None, type: str, source: int) -> SparseExtent:
        header = layout.decode_cowd_header(head)
        self._refuse("ESX sparse (COWD) extents can only be read")
        size = self._checked_size(header.capacity, size)
        entries = layout.COWD_TABLE_ENTRIES
        count = -(-header.capacity // (header.grain * entries))
        directory = self._directory(file, header.directory, count, 4)
        tables = GrainTables(file, directory, header.directory * SECTOR, entries, 4, self._capacity(entries * 4),
                             self._relieve)  # fmt: skip
        return SparseExtent(start, size, type, file, header.grain * SECTOR, tables, name=file.filename, source=source,
                            writable=False)  # fmt: skip

    def _sesparse(self, file: Node, head: bytearray, start: int, size: int | None, type: str,
                  source: int) -> SparseExtent:  # fmt: skip
        header = layout.decode_sesparse_header(head)
        self._refuse("space-efficient sparse extents can only be read")
        place = header.volatile * SECTOR
        volatile = read_exactly(file, place, layout.HEADER_SIZE, "volatile header")
        if layout.decode_sesparse_volatile(volatile):
            raise ImageError("the extent was not closed: its journal must be replayed, by the host that wrote it")
        size = self._checked_size(header.capacity, size)
        entries = layout.SESPARSE_TABLE_ENTRIES
        count = -(-header.capacity // (layout.SESPARSE_GRAIN * entries))
        directory = self._directory(file, header.directory, count, 8)
        tables = SeSparseTables(file, directory, header, self._capacity(entries * 8), self._relieve)
        return SeSparseExtent(start, size, type, file, tables, header, name=file.filename, source=source)

    def _checked_size(self, capacity: int, size: int | None) -> int:
        """Bytes: what the descriptor says, if the extent has room for it."""
        if size is not None and capacity * SECTOR < size:
            raise ImageError(f"the extent has {capacity * SECTOR} bytes, the descriptor says {size}")
        return capacity * SECTOR if size is None else size

    def _directory(self, file: Node, sector: int, count: int, width: int) -> array[int]:
        """The grain directory; left out where nothing will be read."""
        if self.request.flags.no_io:
            return decode_entries(b"", width)
        self._directories += count * width
        if self._directories > _DIRECTORY_BYTES:
            raise ImageError(f"the grain directories have more than {_DIRECTORY_BYTES} bytes together")
        directory = decode_entries(read_exactly(file, sector * SECTOR, count * width, "grain directory"), width)
        if not self.request.flags.check:
            check_distinct(directory)
        return directory

    def _capacity(self, table_size: int) -> int:
        """Tables of one extent that may be kept."""
        return _CACHE_BYTES // self._sparse_count // table_size

    def _relieve(self) -> None:
        self.node.write_back()


def check_distinct(*directories: array[int]) -> None:
    """:raises Corrupt: two tables are said to lie in one place: what is written into one would appear in the other"""
    count = sum(map(len, directories))
    if count < _FEW_TABLES:
        used = [entry for directory in directories for entry in directory if entry > 1]
        shared = len(set(used)) < len(used)
    else:
        from .bulk import has_repeats

        shared = has_repeats(*directories)
    if shared:
        raise Corrupt("two grain tables are said to lie in one place", hint='run "byre check"')


def load_redundant(extent: SparseExtent, header: SparseHeader) -> None:
    """The directory of the second copy of the tables, for an extent that is to be written."""
    tables = extent.tables
    if not header.redundant or len(tables.copies) > 1:
        return
    assert extent.file is not None
    data = read_exactly(extent.file, header.redundant_directory * SECTOR, header.table_count * 4,
                        "redundant grain directory")  # fmt: skip
    tables.copies.append(decode_entries(data, 4))
    tables.directory_hosts.append(header.redundant_directory * SECTOR)
