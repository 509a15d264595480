"""Resizing a VHD image: the footer says how large the disk is. It changes last when growing, first when shrinking."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from ...errors import InvalidArgument, NotSupported
from ...io import engine
from ...units import SECTOR, align_up
from . import layout
from .creation import CREATOR
from .mapping import DynamicMapping, FixedMapping, encode_table

if TYPE_CHECKING:
    from .image import VpcNode

__all__ = ["resize"]


def resize(node: VpcNode, size: int, preallocation: str) -> None:
    """Change the virtual size to ``size`` bytes. From then on the size in the footer counts, not the geometry.

    :raises InvalidArgument: a size the format does not have
    :raises NotSupported: preallocation
    """
    if not 0 <= size <= layout.MAX_SECTORS * SECTOR or size % SECTOR:
        raise InvalidArgument(f"the new size is {size}, allowed are multiples of {SECTOR} up to "
                              f"{layout.MAX_SECTORS * SECTOR} (2040 GiB)", where=node.filename)  # fmt: skip
    if preallocation != "off":
        raise NotSupported(f"preallocation {preallocation!r} is not for VHD images", where=node.filename)
    before = node.size
    with node.lock:
        node.check_failure()
        node.inflight.wait_all()
        node.guarded(node.write_back)
        mapping = node.mapping
        if isinstance(mapping, FixedMapping):
            node.guarded(lambda: _resize_fixed(node, mapping, size))
        elif size > before:
            _check_table_size(node, mapping, size)
            node.guarded(lambda: _grow(node, mapping, size))
        elif size < before:
            node.guarded(lambda: _shrink(node, mapping, size))
        node._size = size
    if size < before and isinstance(node.mapping, DynamicMapping):
        _zero_tail(node, node.mapping, size, min(before, align_up(size, node.cluster_size)))


def _resized(footer: layout.Footer, size: int) -> layout.Footer:
    """The footer for another size.

    A geometry that does not come to that size makes way for the largest one, by which no program measures a disk; a
    creator whose images are measured by their geometry is replaced as well.
    """
    cylinders, heads, sectors = layout.geometry(size // SECTOR)
    if cylinders * heads * sectors * SECTOR != size:
        cylinders, heads, sectors = layout.MAX_CYLINDERS, layout.MAX_HEADS, layout.MAX_TRACK
    return footer._replace(current_size=size, cylinders=cylinders, heads=heads, sectors=sectors,
                           creator_application=CREATOR)  # fmt: skip


def _resize_fixed(node: VpcNode, mapping: FixedMapping, size: int) -> None:
    """The footer at the new end | the rest of the old one, or what lies behind."""
    file, before = node.file, mapping.size
    footer = _resized(node.footer, size)
    old_footer = file.size - layout.FOOTER_SIZE
    file.resize(max(size + layout.FOOTER_SIZE, file.size), exact=False)
    if size < before:
        file.resize(size + layout.FOOTER_SIZE)
    file.write_from(size, memoryview(layout.encode_footer(footer)))
    file.flush()
    if size > before:
        # Whatever lies between the disk and its footer, and the old footer, become part of the disk.
        file.write_zeroes(before, min(old_footer + layout.FOOTER_SIZE, size) - before)
        file.flush()
    mapping.size, node.footer = size, footer


def _write_footers(node: VpcNode, mapping: DynamicMapping, footer: layout.Footer) -> None:
    data = memoryview(layout.encode_footer(footer))
    node.file.write_from(0, data)
    node.file.flush()
    node.file.write_from(mapping.settled_end(), data)
    mapping.end_moved = False
    node.footer = footer


def _check_table_size(node: VpcNode, mapping: DynamicMapping, size: int) -> None:
    count = -(-size // mapping.block_size)
    if count * 4 > layout.MAX_TABLE:
        raise InvalidArgument(f"the new size of {size} bytes needs a block table of {count * 4} bytes, allowed are "
                              f"{layout.MAX_TABLE}", where=node.filename)  # fmt: skip


def _grow(node: VpcNode, mapping: DynamicMapping, size: int) -> None:
    """Table | header | footers."""
    assert node.header is not None
    count = -(-size // mapping.block_size)
    more = array("I", (layout.NONE,)) * (count - len(mapping.table))
    if count <= node.header.max_entries:
        if more:
            node.file.write_from(mapping.table_offset + 4 * len(mapping.table), memoryview(encode_table(more)))
    else:
        _move_table(node, mapping, mapping.table + more)
    node.file.flush()
    mapping.table.extend(more)
    mapping.known.extend(bytes(len(more)))
    _write_footers(node, mapping, _resized(node.footer, size))
    mapping.size = size
    _reserve_places(node, mapping)


def _move_table(node: VpcNode, mapping: DynamicMapping, table: array[int]) -> None:
    """A larger table where the footer lies, with a footer behind it; the header changes in one sector."""
    assert node.header is not None
    offset = mapping.settled_end()
    data = encode_table(table)
    data += b"\xff" * (align_up(len(data), SECTOR) - len(data))
    node.file.write_from(offset, memoryview(data + layout.encode_footer(node.footer)))
    node.file.flush()
    header = node.header._replace(table_offset=offset, max_entries=len(table))
    node.file.write_from(node.footer.data_offset, memoryview(layout.encode_dynamic_header(header)))
    node.header = header
    mapping.table_offset, mapping.end = offset, offset + len(data)


def _reserve_places(node: VpcNode, mapping: DynamicMapping) -> None:
    assert node.header is not None
    place = mapping.table_offset, mapping.table_offset + 4 * node.header.max_entries
    mapping.reserved = (*mapping.reserved[:2], place)


def _shrink(node: VpcNode, mapping: DynamicMapping, size: int) -> None:
    """Footers | table; blocks behind the end are given up."""
    _write_footers(node, mapping, _resized(node.footer, size))
    count = -(-size // mapping.block_size)
    for block in range(count, len(mapping.table)):
        host = mapping.host(block)
        if host >= 0:
            mapping.drop(block, host)
    node.write_back()
    node.file.flush()
    del mapping.table[count:], mapping.known[count:]
    mapping.size = size


def _zero_tail(node: VpcNode, mapping: DynamicMapping, size: int, end: int) -> None:
    """What the last block holds behind the new end is overwritten, lest it comes back."""
    if end <= size:
        return
    with node.lock:
        node._size = mapping.size = end  # the engine clips at the size
    try:
        engine.write_zeroes(node, size, end - size)
        engine.flush(node)
    finally:
        with node.lock:
            node._size = mapping.size = size
