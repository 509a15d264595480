"""Creating VHD images: a footer behind a disk of zeroes, or header, block table and two footers."""

from __future__ import annotations

from ...errors import InvalidArgument
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ...units import MIB, SECTOR, align_up
from . import layout

if TYPE_CHECKING:
    from ...graph.creating import CreateRequest
    from ...graph.node import Node
    from ...options import OptionValues

__all__ = ["BLOCK_SIZE", "Plan", "create_vpc", "file_sizes", "new_footer", "plan_of", "write_image"]

BLOCK_SIZE: Final = 2 * MIB
_TABLE_AT: Final = 1536
CREATOR: Final = b"byre"
"""Readers that do not know a creator go by the size in the footer, which is always right here."""
_HOST: Final = b"Wi2k"


class Plan(NamedTuple):
    """The image to be made.

    :ivar size: bytes; what was asked for, or a little more where it has to fit a geometry
    :ivar chs: cylinders, heads, sectors per track
    """

    size: int
    chs: tuple[int, int, int]
    fixed: bool

    @property
    def blocks(self) -> int:
        return -(-self.size // BLOCK_SIZE)

    @property
    def data_offset(self) -> int:
        """Where the first block of a dynamic disk goes."""
        return _TABLE_AT + align_up(self.blocks * 4, SECTOR)


def plan_of(options: OptionValues, size: int | None = None) -> Plan:
    """What to make of ``options``.

    :param size: bytes, if not what they say
    :raises InvalidArgument: a size above 2040 GiB
    """
    sectors = (options.number("size") if size is None else size) // SECTOR
    if sectors > layout.MAX_SECTORS:
        raise InvalidArgument(f"a size of {sectors * SECTOR} bytes is too large, allowed are "
                              f"{layout.MAX_SECTORS * SECTOR} (2040 GiB)")  # fmt: skip
    if options.flag("force_size"):
        chs = layout.MAX_CYLINDERS, layout.MAX_HEADS, layout.MAX_TRACK
    else:
        chs = layout.covering_geometry(sectors)
        product = chs[0] * chs[1] * chs[2]
        if product != layout.MAX_GEOMETRY:
            sectors = product
    return Plan(sectors * SECTOR, chs, options.text("subformat") == "fixed")


def file_sizes(options: OptionValues, virtual_size: int, data_bytes: int) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes; ``data_bytes`` are those of the blocks that hold data."""
    plan = plan_of(options, virtual_size)
    if plan.fixed:
        full = plan.size + layout.FOOTER_SIZE
        return full, full
    bitmap = layout.bitmap_size(BLOCK_SIZE)
    empty = plan.data_offset + layout.FOOTER_SIZE
    per_block = BLOCK_SIZE + bitmap
    return empty + data_bytes // BLOCK_SIZE * per_block, empty + plan.blocks * per_block


def new_footer(size: int, chs: tuple[int, int, int], disk_type: int) -> layout.Footer:
    """A footer for a new disk of ``size`` bytes."""
    import os
    from time import time

    stamp = max(int(time()) - layout.TIME_BASE, 0) & 0xFFFFFFFF
    offset = layout.NO_OFFSET if disk_type == layout.FIXED else layout.FOOTER_SIZE
    return layout.Footer(2, 0x10000, offset, stamp, CREATOR, 0x10000, _HOST, size, size, *chs, disk_type,
                         os.urandom(16))  # fmt: skip


def create_vpc(request: CreateRequest) -> None:
    """Write an empty image into ``request.file``; durable on return."""
    request.spoil()
    write_image(request.file, plan_of(request.options))


def write_image(file: Node, plan: Plan) -> None:
    """The image of ``plan``, in an empty file."""
    if plan.fixed:
        file.resize(plan.size + layout.FOOTER_SIZE, exact=False)
        footer = layout.encode_footer(new_footer(plan.size, plan.chs, layout.FIXED))
        # A device keeps its length; the footer is looked for at its end.
        file.write_from(max(file.size, plan.size + layout.FOOTER_SIZE) - layout.FOOTER_SIZE, memoryview(footer))
        file.flush()
        return
    footer = layout.encode_footer(new_footer(plan.size, plan.chs, layout.DYNAMIC))
    header = layout.DynamicHeader(layout.NO_OFFSET, _TABLE_AT, 0x10000, plan.blocks, BLOCK_SIZE)
    table = b"\xff" * (plan.data_offset - _TABLE_AT)
    file.resize(plan.data_offset + layout.FOOTER_SIZE, exact=False)
    file.write_from(layout.FOOTER_SIZE, memoryview(layout.encode_dynamic_header(header) + table + footer))
    file.flush()
    file.write_from(0, memoryview(footer))
    file.flush()
