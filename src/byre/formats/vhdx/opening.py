"""Opening a VHDX image: headers, log, region table, metadata, parent; and what ``info`` says about it."""

from __future__ import annotations

from ...errors import ImageError, NotFound
from ...graph.chain import skip_filters
from ...typing import TYPE_CHECKING
from . import layout
from .image import VhdxNode, check_writable
from .replay import ReplayedFile, pending, replay

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...graph.node import Node
    from ...graph.opening import OpenRequest
    from .log import Entry

__all__ = ["check_parent", "describe", "open_vhdx", "reload"]


def open_vhdx(request: OpenRequest) -> VhdxNode:
    """The node for an image; a log that is not empty is replayed, into the file only if it is to be written.

    :raises ImageError: the file breaks the format
    """
    file = request.open_child("file")
    flags = request.flags
    if file.read_only and not flags.read_only:
        flags = flags._replace(read_only=True)
    try:
        header, index = read_header(file)
        entries = pending(file, header)
        view, regions, parameters = _read(file, header, entries)
        limit = request.opener.policy.max_size
        if limit and parameters.size > limit:
            raise ImageError(f"the virtual size is {parameters.size}, allowed are {limit} bytes for an untrusted image",
                             hint="raise --max-size")  # fmt: skip
        if parameters.has_parent and not flags.read_only:
            if not flags.auto_read_only:
                check_writable(parameters, file.filename)
            flags = flags._replace(read_only=True)
        node = VhdxNode(file, request.options, flags, name=request.name)
        request.opener.adopt(node)  # so that a failure from here on leaves no edge behind
        request.opener.graph.attach(node, "file", file, "data")
        node.load(view, header, index, regions, parameters)
        if entries and not flags.read_only:
            reload(node)
    except ImageError as error:
        error.where = error.where or file.filename
        raise
    if parameters.has_parent:
        node.backing_name = parent_name(parameters.parent, file.filename)
        node.backing_format = "vhdx"
    return node


def read_header(file: Node) -> tuple[layout.Header, int]:
    """(the current header, which of the two it is).

    :raises ImageError: no VHDX file, or neither header is valid
    """
    start = bytearray(8)
    file.read_into(0, memoryview(start))
    if start != layout.SIGNATURE:
        raise ImageError(f"the file begins with {bytes(start)!r}, expected is {layout.SIGNATURE!r}")
    copies = (bytearray(layout.HEADER_SIZE), bytearray(layout.HEADER_SIZE))
    for at, data in zip(layout.HEADER_OFFSETS, copies, strict=True):
        file.read_into(at, memoryview(data))
    index, header = layout.current_header(*copies)
    return header, index


def _read(
    file: Node, header: layout.Header, entries: list[Entry]
) -> tuple[Node, tuple[layout.Region, ...], layout.Parameters]:
    """(the file with ``entries`` replayed in memory, its regions, its metadata)."""
    view: Node = ReplayedFile(file, entries) if entries else file
    regions = read_regions(view)
    layout.check_apart([*regions, layout.Region(layout.NO_GUID, header.log_offset, header.log_length)])
    metadata = next(region for region in regions if region.guid == layout.METADATA_REGION)
    if metadata.offset + layout.TABLE_SIZE > view.size:
        raise ImageError(f"the metadata at {metadata.offset:#x} lie past the end of the file ({view.size:#x})",
                         hint="the file seems to be cut short")  # fmt: skip
    parameters = read_parameters(view, metadata)
    table = next(region for region in regions if region.guid == layout.BAT_REGION)
    count = layout.bat_entries(parameters.size, parameters.block_size, parameters.logical_sector,
                               has_parent=parameters.has_parent)  # fmt: skip
    if count * 8 > table.length:
        raise ImageError(f"the block table has room for {table.length // 8} entries, a disk of {parameters.size} bytes "
                         f"needs {count}")  # fmt: skip
    if table.offset + count * 8 > view.size:
        raise ImageError(f"the block table of {count * 8} bytes at {table.offset:#x} reaches past the end of the file "
                         f"({view.size:#x})", hint="the file seems to be cut short")  # fmt: skip
    return view, regions, parameters


def read_regions(file: Node) -> tuple[layout.Region, ...]:
    """The region table, or its second copy where the first is damaged."""
    failure: ImageError | None = None
    for at in layout.REGION_OFFSETS:
        data = bytearray(layout.TABLE_SIZE)
        file.read_into(at, memoryview(data))
        try:
            return layout.decode_region_table(data)
        except ImageError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def read_parameters(file: Node, region: layout.Region) -> layout.Parameters:
    """What the metadata in ``region`` say.

    :raises ImageError: an item is missing or outside its limits
    """
    table = bytearray(layout.TABLE_SIZE)
    file.read_into(region.offset, memoryview(table))
    entries = layout.decode_metadata_table(table)

    def item(guid: bytes, name: str, length: int) -> bytes:
        entry = entries.get(guid)
        if entry is None or entry.length < length or entry.offset + entry.length > region.length:
            raise ImageError(f"the metadata do not hold the {name}")
        data = bytearray(entry.length)
        file.read_into(region.offset + entry.offset, memoryview(data))
        return bytes(data)

    def number(guid: bytes, name: str, length: int) -> int:
        return int.from_bytes(item(guid, name, length)[:length], "little")

    block_size, fixed, has_parent = layout.decode_file_parameters(item(layout.FILE_PARAMETERS, "file parameters", 8))
    size = number(layout.VIRTUAL_SIZE, "virtual size", 8)
    logical = number(layout.LOGICAL_SECTOR, "logical sector size", 4)
    physical = number(layout.PHYSICAL_SECTOR, "physical sector size", 4)
    for name, value in (("logical", logical), ("physical", physical)):
        if value not in layout.SECTOR_SIZES:
            raise ImageError(f"the {name} sector size is {value}, allowed are 512 and 4096")
    if size > layout.MAX_VIRTUAL_SIZE or size % logical:
        raise ImageError(f"the virtual size is {size}, allowed are multiples of {logical} up to "
                         f"{layout.MAX_VIRTUAL_SIZE}")  # fmt: skip
    parent: Mapping[str, str] = {}
    if has_parent:
        parent = layout.decode_parent_locator(item(layout.PARENT_LOCATOR, "parent locator", 20))
    size_at = region.offset + entries[layout.VIRTUAL_SIZE].offset
    return layout.Parameters(block_size, fixed, has_parent, size, logical, physical, size_at, parent)


def reload(node: VhdxNode) -> None:
    """Replay the log into the file, say so in the headers, and read everything again; lock held, or nobody else there.

    :raises ImageError: the file breaks the format
    """
    header, index = read_header(node.file)
    entries = pending(node.file, header)
    if entries:
        replay(node.file, entries)
        node.replayed = True
    _, regions, parameters = _read(node.file, header, [])
    node.load(node.file, header, index, regions, parameters)
    node.journal.begin()


# -- parents --------------------------------------------------------------------------------------


def parent_name(locator: Mapping[str, str], where: str) -> str:
    """The parent as a path relative to the folder of the image: names are those of another system.

    :raises ImageError: the locator names none
    """
    relative = locator.get("relative_path", "").replace("\\", "/")
    absolute = locator.get("absolute_win32_path", "") or locator.get("volume_path", "")
    name = relative or absolute.replace("\\", "/").rpartition("/")[2]
    while name.startswith("./"):
        name = name[2:]
    if not name or "\0" in name:
        raise ImageError("the parent locator names no parent", where=where)
    return name


def check_parent(node: VhdxNode, below: Node) -> None:
    """
    :raises ImageError: ``below`` is a VHDX file, but was written to since this image was made
    :raises NotFound: the image does not say which parent it has
    """
    below = skip_filters(below)
    if not isinstance(below, VhdxNode):
        return  # named by the user, who knows what is in it
    locator = node.parameters.parent
    linkages = [locator[key].strip("{}").lower() for key in ("parent_linkage", "parent_linkage2") if locator.get(key)]
    if not linkages:
        raise NotFound("the parent locator has no parent_linkage", where=node.filename)
    found = layout.guid_text(below.journal.header.data_write_guid)
    if found not in linkages:
        raise ImageError(f"the parent {below.filename!r} has data write GUID {found}, this image was made over "
                         f"{linkages[0]!r}", where=node.filename,
                         hint="the parent was changed since, or is another disk")  # fmt: skip


# -- info -----------------------------------------------------------------------------------------


def describe(node: VhdxNode) -> dict[str, object]:
    """``format-specific`` of ``info --output json``."""
    parameters, header = node.parameters, node.journal.header
    kind = "differencing" if parameters.has_parent else "fixed" if parameters.fixed else "dynamic"
    result: dict[str, object] = {
        "subformat": kind,
        "log-size": header.log_length,
        "logical-sector-size": parameters.logical_sector,
        "physical-sector-size": parameters.physical_sector,
        "log-empty": node.view is node.file,
    }
    if parameters.has_parent:
        result["parent"] = dict(parameters.parent)
    return result
