"""Creating VHDX images: headers, log, block table, metadata, and then the blocks ([MS-VHDX] 2.1).

The signature is written last: until then the file is no VHDX image.
"""

from __future__ import annotations

from array import array

from ...errors import InvalidArgument
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ...units import KIB, MIB, align_up
from . import layout

if TYPE_CHECKING:
    from ...graph.creating import CreateRequest
    from ...graph.node import Node
    from ...options import OptionValues

__all__ = ["Plan", "block_size_of", "create_vhdx", "file_sizes", "plan_of", "write_image"]

_LOG_OFFSET: Final = MIB
_ITEMS_AT: Final = 64 * KIB
_TABLE_STEP: Final = 1 << 17
"""Blocks whose table entries are made and written together: 1 MiB."""
_CREATOR: Final = "byre"


class Plan(NamedTuple):
    """The image to be made; sizes in bytes.

    :ivar zero_blocks: blocks are marked as zero rather than as not present
    """

    size: int
    block_size: int
    log_size: int
    fixed: bool
    zero_blocks: bool
    logical_sector: int = 512

    @property
    def table_offset(self) -> int:
        return _LOG_OFFSET + self.log_size

    @property
    def table_entries(self) -> int:
        return layout.bat_entries(self.size, self.block_size, self.logical_sector, has_parent=False)

    @property
    def table_length(self) -> int:
        return max(align_up(self.table_entries * 8, MIB), MIB)

    @property
    def metadata_offset(self) -> int:
        return self.table_offset + self.table_length

    @property
    def data_offset(self) -> int:
        """Where blocks begin; up to here an empty dynamic image goes."""
        return self.metadata_offset + MIB

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)


def block_size_of(options: OptionValues, size: int) -> int:
    """The block size for a disk of ``size`` bytes; what is given is rounded up to mebibytes, as the peer does.

    :raises InvalidArgument: then it is no power of two
    """
    given = align_up(options.number("block_size"), MIB)
    if not given:
        return layout.default_block_size(size)
    block_size = min(given, layout.MAX_BLOCK)
    if block_size & (block_size - 1):
        raise InvalidArgument(f"block_size is {given}, allowed are powers of two from {layout.MIN_BLOCK} to "
                              f"{layout.MAX_BLOCK}")  # fmt: skip
    return block_size


def plan_of(options: OptionValues, size: int | None = None) -> Plan:
    """What to make of ``options``.

    :param size: bytes, if not what they say
    :raises InvalidArgument: they are outside the limits of the format
    """
    size = options.number("size") if size is None else size
    if size > layout.MAX_VIRTUAL_SIZE:
        raise InvalidArgument(f"a size of {size} bytes is too large, allowed are {layout.MAX_VIRTUAL_SIZE} (64 TiB)")
    log_size = align_up(options.number("log_size"), MIB)
    if not MIB <= log_size < 1 << 32:
        raise InvalidArgument(f"log_size is {log_size}, allowed is 1 MiB or more, below 4 GiB")
    given = options.given.get("block_state_zero")
    return Plan(size, block_size_of(options, size), log_size, options.text("subformat") == "fixed",
                given is None or bool(given))  # fmt: skip


def file_sizes(options: OptionValues, virtual_size: int, data_bytes: int) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes; ``data_bytes`` are those of the blocks that hold data."""
    plan = plan_of(options, virtual_size)
    full = plan.data_offset + plan.blocks * plan.block_size
    return full if plan.fixed else plan.data_offset + data_bytes, full


def create_vhdx(request: CreateRequest) -> None:
    """Write an empty image into ``request.file``; durable on return."""
    request.spoil()
    write_image(request.file, plan_of(request.options))


def write_image(file: Node, plan: Plan) -> None:
    """The image of ``plan``, in an empty file."""
    end = plan.data_offset + (plan.blocks * plan.block_size if plan.fixed else 0)
    file.resize(end, exact=False)
    if not file.has_zero_init:
        file.write_zeroes(0, end)
    header = layout.Header(1, layout.new_guid(), layout.new_guid(), layout.NO_GUID, 0, 1, plan.log_size, _LOG_OFFSET)
    for number, at in enumerate(layout.HEADER_OFFSETS):
        data = layout.encode_header(header._replace(sequence_number=number + 1))
        file.write_from(at, memoryview(data))
    table = layout.encode_region_table(
        [
            layout.Region(layout.BAT_REGION, plan.table_offset, plan.table_length),
            layout.Region(layout.METADATA_REGION, plan.metadata_offset, MIB),
        ]
    )
    for at in layout.REGION_OFFSETS:
        file.write_from(at, memoryview(table))
    file.write_from(plan.metadata_offset, memoryview(_metadata(plan)))
    if plan.fixed or plan.zero_blocks:
        _write_table(file, plan)
    file.flush()
    file.write_from(0, memoryview(layout.SIGNATURE + _CREATOR.encode("utf-16-le")))
    file.flush()


def _metadata(plan: Plan) -> bytes:
    """The metadata table and its items."""
    needed, disk = layout.IS_REQUIRED, layout.IS_VIRTUAL_DISK
    items = (
        (layout.FILE_PARAMETERS, needed, plan.block_size.to_bytes(4, "little") + plan.fixed.to_bytes(4, "little")),
        (layout.VIRTUAL_SIZE, needed | disk, plan.size.to_bytes(8, "little")),
        (layout.PAGE_83, needed | disk, layout.new_guid()),
        (layout.LOGICAL_SECTOR, needed | disk, plan.logical_sector.to_bytes(4, "little")),
        (layout.PHYSICAL_SECTOR, needed | disk, plan.logical_sector.to_bytes(4, "little")),
    )
    entries: list[layout.MetadataEntry] = []
    at = _ITEMS_AT
    for guid, flags, data in items:
        entries.append(layout.MetadataEntry(guid, at, len(data), flags))
        at += len(data)
    return layout.encode_metadata_table(entries) + b"".join(data for _, _, data in items)


def _write_table(file: Node, plan: Plan) -> None:
    """The block table where its entries are not 0, a piece at a time."""
    ratio = layout.chunk_ratio(plan.block_size, plan.logical_sector)
    first = 0
    while first < plan.blocks:
        # Pieces end where the entry of a sector bitmap follows, or before.
        count = min(plan.blocks - first, _TABLE_STEP, ratio - first % ratio)
        if plan.fixed:
            begin = plan.data_offset + first * plan.block_size | layout.FULLY_PRESENT
            words = array("Q", range(begin, begin + count * plan.block_size, plan.block_size))
        else:
            words = array("Q", (layout.ZERO,)) * count
        at = plan.table_offset + 8 * (first + first // ratio)
        file.write_from(at, memoryview(_little_endian(words)))
        first += count


def _little_endian(words: array[int]) -> bytes:
    import sys

    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
