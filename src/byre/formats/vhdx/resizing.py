"""Resizing a VHDX image: all through the log, so that a crash leaves the old size or the new one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...errors import InvalidArgument, NotSupported
from ...io import engine
from ...units import MIB, align_up
from . import layout
from .bat import BlockTable
from .log import PAGE

if TYPE_CHECKING:
    from .image import VhdxNode
    from .mapping import Mapping

__all__ = ["resize"]

_COPY: Final = MIB
_DROP: Final = 1 << 17
"""Blocks that are given up in one go."""


def resize(node: VhdxNode, size: int, preallocation: str) -> None:
    """Change the virtual size to ``size`` bytes.

    :raises InvalidArgument: a size the format does not have
    :raises NotSupported: preallocation
    """
    sector = node.parameters.logical_sector
    if not 0 <= size <= layout.MAX_VIRTUAL_SIZE or size % sector:
        raise InvalidArgument(f"the new size is {size}, allowed are multiples of {sector} up to "
                              f"{layout.MAX_VIRTUAL_SIZE}", where=node.filename)  # fmt: skip
    if preallocation != "off":
        raise NotSupported(f"preallocation {preallocation!r} is not for VHDX images", where=node.filename)
    before = node.size
    with node.lock:
        node.check_failure()
        node.inflight.wait_all()
        node.before_change()
        node.guarded(node.write_back)
        if size < before:
            _shrink(node, size)
        elif size > before:
            _grow(node, size)
    if size < before:
        _zero_tail(node, size, min(before, align_up(size, node.cluster_size)))


def _write_size(node: VhdxNode, size: int, pages: dict[int, bytes] | None = None) -> None:
    """The virtual size on disk, with ``pages`` in the same entry of the log; durable. Lock held."""
    at = node.parameters.size_at
    changed = dict(pages or {})
    data = size.to_bytes(8, "little")
    for position in range(8):  # the item may cross pages
        start = (at + position) // PAGE * PAGE
        if start not in changed:
            page = bytearray(PAGE)
            node.file.read_into(start, memoryview(page))
            changed[start] = bytes(page)
        before, skip = changed[start], at + position - start
        changed[start] = before[:skip] + data[position : position + 1] + before[skip + 1 :]
    node.file.flush()
    node.journal.commit(changed)
    node.file.flush()


def _take_size(node: VhdxNode, size: int) -> None:
    mapping, parameters = node.mapping, node.parameters
    node.parameters = parameters._replace(size=size)
    node._size = mapping.size = size
    mapping.table.count = layout.bat_entries(size, parameters.block_size, parameters.logical_sector,
                                             has_parent=parameters.has_parent)  # fmt: skip


def _shrink(node: VhdxNode, size: int) -> None:
    """The size first, then the blocks behind it; entries a crash leaves there are cleared by growing."""
    mapping = node.mapping
    node.guarded(lambda: _write_size(node, size))
    first, last = -(-size // mapping.block_size), -(-mapping.size // mapping.block_size)
    for start in range(first, last, _DROP):
        mapping.drop(start, min(_DROP, last - start))
        node.guarded(node.write_back)
    _take_size(node, size)


def _zero_tail(node: VhdxNode, size: int, end: int) -> None:
    """What the last block holds behind the new end is overwritten, lest it comes back."""
    if end <= size:
        return
    with node.lock:
        node._size = node.mapping.size = end  # the engine clips at the size
    try:
        engine.write_zeroes(node, size, end - size)
        engine.flush(node)
    finally:
        with node.lock:
            node._size = node.mapping.size = size


def _grow(node: VhdxNode, size: int) -> None:
    parameters = node.parameters
    entries = layout.bat_entries(size, parameters.block_size, parameters.logical_sector, has_parent=False)
    region = next(region for region in node.regions if region.guid == layout.BAT_REGION)
    if entries * 8 > 0xFFF00000:
        raise InvalidArgument(f"the new size of {size} bytes needs a block table of {entries * 8} bytes, allowed are "
                              f"{0xFFF00000}", where=node.filename)  # fmt: skip
    first = -(-parameters.size // parameters.block_size)
    _complete_last_block(node)
    if entries * 8 <= region.length:
        node.guarded(lambda: _clear_table(node, region, entries))
        node.guarded(lambda: _write_size(node, size))
    else:
        node.guarded(lambda: _move_table(node, region, entries, size))
    _take_size(node, size)
    if parameters.fixed:
        _fill(node.mapping, first, -(-size // parameters.block_size))


def _fill(mapping: Mapping, first: int, end: int) -> None:
    """A fixed disk has space for all its blocks. Until it does, those that have none read as zeroes as well."""
    while first < end:
        placement = mapping.allocate(first, end - 1)
        mapping.publish([placement])
        first += placement.length >> mapping.block_bits


def _complete_last_block(node: VhdxNode) -> None:
    """Older programs made files that end inside the last block."""
    mapping = node.mapping
    if mapping.size % mapping.block_size:
        block = mapping.size >> mapping.block_bits
        entry = mapping.entry(block)
        if entry & layout.STATE_MASK == layout.FULLY_PRESENT:
            end = mapping.host(entry, block) + mapping.block_size
            if end > node.file.size:
                node.file.resize(end, exact=False)


def _clear_table(node: VhdxNode, region: layout.Region, entries: int) -> None:
    """Entries behind the old end may hold anything; nothing refers to them yet."""
    table = node.mapping.table
    start = region.offset + 8 * table.count
    node.file.write_zeroes(start, 8 * (entries - table.count))


def _move_table(node: VhdxNode, region: layout.Region, entries: int, size: int) -> None:
    """A larger block table at the end of the file; region table and size change in one entry of the log."""
    file, table = node.file, node.mapping.table
    offset = align_up(file.size, MIB)
    length = align_up(entries * 8, MIB)
    file.resize(offset + length, exact=False)
    if not file.has_zero_init:
        file.write_zeroes(offset, length)
    used = table.count * 8
    buffer = bytearray(_COPY)
    for at in range(0, used, _COPY):
        part = memoryview(buffer)[: min(_COPY, used - at)]
        file.read_into(region.offset + at, part)
        file.write_from(offset + at, part)
    moved = region._replace(offset=offset, length=length)
    regions = tuple(moved if each is region else each for each in node.regions)
    encoded = layout.encode_region_table(regions)
    pages: dict[int, bytes] = {}
    for start in layout.REGION_OFFSETS:
        for at in range(0, layout.TABLE_SIZE, PAGE):
            pages[start + at] = encoded[at : at + PAGE]
    _write_size(node, size, pages)
    node.regions = regions
    header = node.journal.header
    node.mapping.table = BlockTable(file, offset, table.count, node.relieve)
    node.mapping.use_regions((*regions, layout.Region(layout.NO_GUID, header.log_offset, header.log_length)))
