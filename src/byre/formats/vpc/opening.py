"""Opening a VHD image: footer, dynamic header, block table, parent; and what ``info`` says about it."""

from __future__ import annotations

from ...errors import ImageError
from ...graph.chain import skip_filters
from ...io.extent import UNALLOCATED
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR, align_up
from . import layout
from .image import VpcNode, check_writable
from .mapping import DynamicMapping, FixedMapping, decode_table

if TYPE_CHECKING:
    from ...graph.node import Node
    from ...graph.opening import OpenRequest

__all__ = ["check_parent", "describe", "open_vpc", "read_footer"]

_NAME_LIMIT: Final = 65536
"""Bytes of a parent's name that are read."""

_NAMES: Final = ((b"W2ru", "utf-16-le"), (b"Wi2r", "latin-1"), (b"W2ku", "utf-16-le"), (b"Wi2k", "latin-1"))
"""Where a parent's name is looked for: relative names first, then the last part of absolute ones."""


def open_vpc(request: OpenRequest) -> VpcNode:
    """The node for an image.

    :raises ImageError: the file breaks the format
    """
    file = request.open_child("file")
    flags, policy = request.flags, request.opener.policy
    if file.read_only and not flags.read_only:
        flags = flags._replace(read_only=True)
    try:
        footer = read_footer(file, repair=flags.check)
        size = layout.disk_size(footer, request.options.text("force_size_calc") or "")
        if policy.max_size and size > policy.max_size:
            raise ImageError(f"the virtual size is {size}, allowed are {policy.max_size} bytes for an untrusted image",
                             hint="raise --max-size")  # fmt: skip
        if footer.disk_type == layout.DIFFERENCING and not flags.read_only:
            if not flags.auto_read_only:
                check_writable(footer, file.filename)
            flags = flags._replace(read_only=True)
        header = None if footer.disk_type == layout.FIXED else _read_header(request, file, footer)
        mapping = _mapping(file, footer, header, size)
        node = VpcNode(file, footer, header, mapping, request.options, flags, name=request.name)
        if header is not None and footer.disk_type == layout.DIFFERENCING:
            node.backing_name = parent_name(file, header)
            node.backing_format = "vpc"
    except ImageError as error:
        error.where = error.where or file.filename
        raise
    node.sources = (request.opener.graph.attach(node, "file", file, "data"),)
    return node


# -- footer and header ----------------------------------------------------------------------------


def read_footer(file: Node, *, repair: bool = False) -> layout.Footer:
    """The footer that counts: that of a fixed disk at the end, else the copy at the beginning.

    A fixed disk is known by its end alone: its beginning is the guest's, who may write there what looks like a footer.

    :param repair: where the copy at the beginning is damaged, the one at the end does
    :raises ImageError: there is none
    """
    at_end = _footer_at(file, file.size - layout.FOOTER_SIZE)
    if isinstance(at_end, layout.Footer) and at_end.disk_type == layout.FIXED:
        return at_end
    found = _footer_at(file, 0)
    if isinstance(found, layout.Footer):
        if found.disk_type == layout.FIXED:
            raise ImageError("the footer at the beginning is that of a fixed disk, but there is none at the end",
                             hint="the file seems to be cut short")  # fmt: skip
        return found
    if isinstance(at_end, layout.Footer):
        if repair:
            return at_end
        found.hint = 'the footer at the end is good: run "byre check -r all"'
        raise found
    begins = bytearray(8)
    file.read_into(0, memoryview(begins))
    raise found if begins == b"conectix" else at_end


def _footer_at(file: Node, offset: int) -> layout.Footer | ImageError:
    if offset < 0:
        return ImageError(f"the file has {file.size} bytes, a footer alone has {layout.FOOTER_SIZE}")
    data = bytearray(layout.FOOTER_SIZE)
    file.read_into(offset, memoryview(data))
    try:
        return layout.decode_footer(data)
    except ImageError as error:
        return error


def _read_header(request: OpenRequest, file: Node, footer: layout.Footer) -> layout.DynamicHeader:
    offset = footer.data_offset
    if offset + layout.HEADER_SIZE > file.size:
        raise ImageError(f"the dynamic header at {offset:#x} lies past the end of the file ({file.size:#x})")
    data = bytearray(layout.HEADER_SIZE)
    file.read_into(offset, memoryview(data))
    header, sealed = layout.decode_dynamic_header(data)
    if not sealed:
        request.opener.graph.warnings.append(f"{file.filename}: the checksum of the dynamic header is wrong")
    return header


def _mapping(
    file: Node, footer: layout.Footer, header: layout.DynamicHeader | None, size: int
) -> FixedMapping | DynamicMapping:
    if header is None:
        if size > file.size - layout.FOOTER_SIZE:
            raise ImageError(f"the disk has {size} bytes, the file only {file.size - layout.FOOTER_SIZE} before its "
                             "footer", hint="the file seems to be cut short")  # fmt: skip
        return FixedMapping(file, size)
    count = -(-size // header.block_size)
    if count * 4 > layout.MAX_TABLE:
        raise ImageError(f"the block table has {count * 4} bytes, allowed are {layout.MAX_TABLE}")
    if count > header.max_entries:
        raise ImageError(f"the block table has {header.max_entries} entries, a disk of {size} bytes needs {count}")
    if header.table_offset + count * 4 > file.size:
        raise ImageError(f"the block table of {count * 4} bytes at {header.table_offset:#x} reaches past the end of "
                         f"the file ({file.size:#x})", hint="the file seems to be cut short")  # fmt: skip
    data = bytearray(count * 4)
    file.read_into(header.table_offset, memoryview(data))
    table_end = max(min(header.table_offset + header.max_entries * 4, file.size), header.table_offset + count * 4)
    reserved = ((0, layout.FOOTER_SIZE), (footer.data_offset, footer.data_offset + layout.HEADER_SIZE),
                (header.table_offset, table_end))  # fmt: skip
    mapping = DynamicMapping(file, size, header.block_size, header.table_offset, decode_table(data), _end(file),
                             reserved, file.filename)  # fmt: skip
    if footer.disk_type == layout.DIFFERENCING:
        mapping.hole = UNALLOCATED
    return mapping


def _end(file: Node) -> int:
    """Where the footer at the end lies, or should."""
    return file.size - layout.FOOTER_SIZE if file.size % SECTOR == 0 else align_up(file.size, SECTOR)


# -- parents --------------------------------------------------------------------------------------


def parent_name(file: Node, header: layout.DynamicHeader) -> str:
    """The parent as a path relative to the folder of the image: names are those of another system.

    :raises ImageError: the header names none
    """
    names = {each.platform: each for each in layout.locator_rows(header.locators)}
    for platform, encoding in _NAMES:
        locator = names.get(platform)
        if locator is None or locator.length > _NAME_LIMIT or locator.offset + locator.length > file.size:
            continue
        data = bytearray(locator.length)
        file.read_into(locator.offset, memoryview(data))
        text = data.decode(encoding, "replace").rstrip("\0").replace("\\", "/")
        if platform in (b"W2ku", b"Wi2k"):
            text = (header.parent_name.replace("\\", "/") or text).rpartition("/")[2]
        while text.startswith("./"):
            text = text[2:]
        if text and "\0" not in text:
            return text
    name = header.parent_name.replace("\\", "/").rpartition("/")[2]
    if not name:
        raise ImageError("the dynamic header names no parent")
    return name


def check_parent(node: VpcNode, below: Node) -> None:
    """:raises ImageError: ``below`` is a VHD file, but not the one this image was made over"""
    below = skip_filters(below)
    if not isinstance(below, VpcNode) or node.header is None:
        return  # named by the user, who knows what is in it
    if below.footer.unique_id != node.header.parent_id:
        raise ImageError(f"the parent {below.filename!r} has unique id {below.footer.unique_id.hex()}, this image was "
                         f"made over {node.header.parent_id.hex()}", where=node.filename)  # fmt: skip


# -- info -----------------------------------------------------------------------------------------


def describe(node: VpcNode) -> dict[str, object]:
    """``format-specific`` of ``info --output json``."""
    footer = node.footer
    result: dict[str, object] = {
        "subformat": layout.TYPE_NAMES[footer.disk_type],
        "creator": footer.creator_application.rstrip(b"\0 ").decode("latin-1"),
        "current-size": footer.current_size,
        "cylinders": footer.cylinders,
        "heads": footer.heads,
        "sectors": footer.sectors,
    }
    if node.header is not None and node.is_differencing:
        result["parent"] = node.backing_name
    return result
