"""Creating empty VMDK disks of every subformat: which files, what is in them.

The layout is the peer's: descriptor, redundant directory and tables, directory and tables, grains; all tables are there
from the beginning and hold zeroes, so that none has to be allocated later.
"""

from __future__ import annotations

import os
from array import array

from ...errors import ImageError, InvalidArgument, NotSupported
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ...units import SECTOR, align_up
from . import layout
from .descriptor import NO_PARENT, Descriptor, ExtentLine, check_name, encode_descriptor, extent_line
from .tables import encode_entries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...graph.creating import CreateRequest
    from ...graph.node import Node
    from ...options import OptionValues

__all__ = ["Plan", "create_vmdk", "extent_names", "extent_sizes", "new_descriptor", "new_header", "plan"]

GRAIN_SECTORS: Final = 128
TABLE_ENTRIES: Final = 512
_TABLE_SECTORS: Final = TABLE_ENTRIES * 4 // SECTOR
_DESCRIPTOR_SECTORS: Final = 20
_SPLIT: Final = 2 << 30
"""Largest extent of a split disk, bytes."""
_ONE_WRITE: Final = 1 << 18


class Plan(NamedTuple):
    """What is to be made.

    :ivar flat: extents are plain; else sparse
    :ivar separate: the extents are files of their own beside the descriptor
    """

    subformat: str
    size: int
    flat: bool
    separate: bool
    compressed: bool
    zero_grains: bool
    preallocation: str
    database: dict[str, str]
    parent_name: str


def plan(options: OptionValues) -> Plan:
    """What ``options`` ask for.

    :raises InvalidArgument: options that exclude each other, or a size beyond what the format can hold
    """
    subformat = options.text("subformat") or "monolithicSparse"
    flat, parent = subformat.endswith("Flat"), options.text("backing_file") or ""
    if options.text("backing_fmt") not in (None, "vmdk"):
        raise InvalidArgument("backing_file must be a vmdk image")
    if flat and parent:
        raise NotSupported("Flat image can't have backing file")
    if flat and options.flag("zeroed_grain"):
        raise NotSupported("Flat image can't enable zeroed grain")
    preallocation = options.text("preallocation") or "off"
    if preallocation != "off" and not flat:
        raise NotSupported(f"preallocation {preallocation!r} is for flat subformats only")
    if parent:
        check_name(parent)
    size = options.number("size")
    separate = flat or subformat.startswith("twoGb")
    longest = min(size, _SPLIT) if subformat.startswith("twoGb") else size
    if not flat and new_header(longest // SECTOR).overhead * SECTOR >= 1 << 41:
        raise InvalidArgument(f"a sparse extent of {longest} bytes is too large: its tables alone would take 2 TiB")
    if separate and len(extent_sizes(subformat, size)) > 4096:
        raise InvalidArgument(f"{size} bytes take more than 4096 extents of 2 GiB")
    return Plan(subformat, size, flat, separate, subformat == "streamOptimized", options.flag("zeroed_grain"),
                preallocation, _database(options, size), parent)  # fmt: skip


def _database(options: OptionValues, size: int) -> dict[str, str]:
    """The "Disk Data Base": what the virtual machine is to see.

    :raises InvalidArgument: two hardware versions
    """
    adapter = options.text("adapter_type") or "ide"
    hardware = options.word("hwversion")
    if options.flag("compat6"):
        if hardware != "undefined":
            raise InvalidArgument("compat6 cannot be enabled with hwversion set")
        hardware = "6"
    heads = 16 if adapter == "ide" else 255
    values = {
        "adapterType": adapter,
        "geometry.cylinders": str(size // (63 * heads * SECTOR)),
        "geometry.heads": str(heads),
        "geometry.sectors": "63",
        "toolsVersion": options.text("toolsversion") or "2147483647",
        "virtualHWVersion": "4" if hardware == "undefined" else hardware,
    }
    for value in values.values():
        check_name(value)
    return values


def extent_sizes(subformat: str, size: int) -> list[int]:
    """Bytes of each extent file."""
    if not subformat.startswith("twoGb"):
        return [size] if size else []
    return [min(_SPLIT, size - start) for start in range(0, size, _SPLIT)]


def extent_names(filename: str, options: OptionValues) -> list[str]:
    """Names of the extent files beside the descriptor ``filename``: "disk-s001.vmdk", "disk-flat.vmdk"."""
    subformat = options.text("subformat") or "monolithicSparse"
    stem, suffix = os.path.splitext(_basename(filename))
    if subformat == "monolithicFlat":
        return [f"{stem}-flat{suffix}"] if options.number("size") else []
    if not subformat.startswith("twoGb"):
        return []
    letter = "f" if subformat.endswith("Flat") else "s"
    count = len(extent_sizes(subformat, options.number("size")))
    return [f"{stem}-{letter}{number:03}{suffix}" for number in range(1, count + 1)]


def _basename(filename: str) -> str:
    """The name of the file, without folders and without ``file:``."""
    return os.path.basename(filename) if "/" in filename else filename.removeprefix("file:")


def new_header(sectors: int, *, compressed: bool = False, zero_grains: bool = False) -> layout.SparseHeader:
    """The header of a new extent, where everything has its place."""
    tables = -(-sectors // (GRAIN_SECTORS * TABLE_ENTRIES))
    directory_sectors = -(-tables * 4 // SECTOR)
    redundant = 1 + _DESCRIPTOR_SECTORS
    directory = redundant + directory_sectors + tables * _TABLE_SECTORS
    overhead = align_up(directory + directory_sectors + tables * _TABLE_SECTORS, GRAIN_SECTORS)
    flags = layout.FLAG_NEWLINES | layout.FLAG_REDUNDANT
    if compressed:
        flags |= layout.FLAG_COMPRESSED | layout.FLAG_MARKERS
    if zero_grains:
        flags |= layout.FLAG_ZERO_GRAINS
    version = 3 if compressed else 2 if zero_grains else 1
    return layout.SparseHeader(version, flags, sectors, GRAIN_SECTORS, 1, _DESCRIPTOR_SECTORS, TABLE_ENTRIES, redundant,
                               directory, overhead, 0, layout.DEFLATE if compressed else 0)  # fmt: skip


# -- a plan to a disk -----------------------------------------------------------------------------


def create_vmdk(request: CreateRequest) -> None:
    """Write an empty disk into ``request.file`` and the extent files beside it.

    :raises ByreError: as :func:`plan`, a parent that is no VMDK disk, or a failed write
    """
    made = plan(request.options)
    parent_cid = _parent_cid(request, made.parent_name) if made.parent_name else NO_PARENT
    names = extent_names(request.filename, request.options)
    sizes = extent_sizes(made.subformat, made.size)
    text = new_descriptor(made, request.filename, names, parent_cid)
    if not made.separate:
        _write_sparse(request.file, made, made.size, text)
    else:
        for name, size in zip(names, sizes, strict=True):
            _make_extent(request, made, name, size)
        request.file.write_from(0, memoryview(text))
        request.file.resize(len(text), exact=False)
    request.file.flush()


def new_descriptor(made: Plan, filename: str, names: Sequence[str] = (), parent_cid: int = NO_PARENT) -> bytes:
    """The text, with a content ID of its own.

    :param names: of the extent files; the disk is ``filename`` alone without them
    :raises InvalidArgument: names that a descriptor cannot hold
    """
    shown = names or [_basename(filename)]
    for name in shown:
        check_name(name)
    kind = "FLAT" if made.flat else "SPARSE"
    parts = zip(shown, extent_sizes(made.subformat, made.size), strict=False)
    lines = [extent_line(ExtentLine("RW", size // SECTOR, kind, name)) for name, size in parts]
    cid = int.from_bytes(os.urandom(4), "little") % (NO_PARENT - 1)
    descriptor = Descriptor(cid, parent_cid, made.subformat, made.parent_name, tuple(lines))
    return encode_descriptor(descriptor, made.database)


def _parent_cid(request: CreateRequest, name: str) -> int:
    """The content ID of the parent.

    :raises InvalidArgument: it is no VMDK disk
    """
    from ...graph.graph import Graph
    from ...graph.opening import Opener, OpenFlags, Policy, resolve_backing

    graph = Graph()
    opener = Opener(graph, Policy(allow_references=True))
    flags = OpenFlags(no_io=True, no_backing=True)
    node = opener.open_chain(resolve_backing(request.filename, name), flags)
    try:
        if node.driver != "vmdk":
            raise InvalidArgument(f"Invalid backing file format: {node.driver}. Must be vmdk")
        return int(getattr(node, "cid", NO_PARENT))
    finally:
        graph.release(node)


def _make_extent(request: CreateRequest, made: Plan, name: str, size: int) -> None:
    if made.flat:
        file = request.create_data_file(name, 0 if made.preallocation != "off" else size)
        if file.size != size:
            file.resize(size, preallocation=made.preallocation, exact=False)
    else:
        file = request.create_data_file(name, 0)
        _write_sparse(file, made, size, b"")
    file.flush()


def _write_sparse(file: Node, made: Plan, size: int, descriptor: bytes) -> None:
    """Header, descriptor, and two empty copies of the tables."""
    header = new_header(size // SECTOR, compressed=made.compressed, zero_grains=made.zero_grains)
    room = header.descriptor_length * SECTOR
    if len(descriptor) > room:
        raise ImageError(f"the descriptor has {len(descriptor)} bytes, {room} are there for it",
                         where=file.filename, hint="use shorter names")  # fmt: skip
    length = header.overhead * SECTOR
    if not file.has_zero_init or file.size:
        file.write_zeroes(0, length)
    file.resize(max(length, file.size), exact=False)
    for directory in (header.redundant_directory, header.directory):
        _write_directory(file, directory, header.table_count)
    file.write_from(header.descriptor * SECTOR, memoryview(descriptor.ljust(room, b"\0")))
    file.flush()
    file.write_from(0, memoryview(layout.encode_header(header)))


def _write_directory(file: Node, sector: int, count: int) -> None:
    """A grain directory whose tables follow it."""
    first = sector + -(-count * 4 // SECTOR)
    for start in range(0, count, _ONE_WRITE):
        rows = range(start, min(count, start + _ONE_WRITE))
        places = range(first + rows.start * _TABLE_SECTORS, first + rows.stop * _TABLE_SECTORS, _TABLE_SECTORS)
        file.write_from(sector * SECTOR + start * 4, memoryview(encode_entries(array("I", places))))
