"""New Parallels images, and how large they get."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import InvalidArgument
from ...units import SECTOR, align_up
from .layout import BAT_OFFSET, MAX_BAT, MAX_CLUSTER, Header, encode_header

if TYPE_CHECKING:
    from ...graph.creating import CreateRequest
    from ...options import OptionValues

__all__ = ["create_parallels", "file_sizes", "plan"]


def plan(options: OptionValues, size: int) -> Header:
    """The header of a new image.

    :raises InvalidArgument: options that no header can hold
    """
    size, cluster = align_up(size, SECTOR), align_up(options.number("cluster_size"), SECTOR)
    if not 0 < cluster <= MAX_CLUSTER:
        raise InvalidArgument(f"cluster_size is {cluster}, allowed are 512 to {MAX_CLUSTER}")
    entries = -(-size // cluster)
    if 4 * entries > MAX_BAT or size >= 1 << 63:
        raise InvalidArgument(f"a size of {size} bytes is too large for cluster_size={cluster}, which allows "
                              f"{MAX_BAT // 4 * cluster}", hint="use a larger cluster_size")  # fmt: skip
    sectors = size // SECTOR
    return Header(cylinders=sectors // 16 // 32 & 0xFFFFFFFF, tracks=cluster // SECTOR, entries=entries,
                  sectors=sectors, data_sector=align_up(BAT_OFFSET + 4 * entries, cluster) // SECTOR)  # fmt: skip


def create_parallels(request: CreateRequest) -> None:
    """Write an empty image: an empty BAT, then the header."""
    header, file = plan(request.options, request.options.number("size")), request.file
    request.spoil()
    start = header.data_sector * SECTOR
    file.resize(0, exact=False)
    file.write_zeroes(0, start)
    if file.size < start:
        file.resize(start, exact=False)
    file.flush()
    file.write_from(0, memoryview(encode_header(header)))
    file.flush()


def file_sizes(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes."""
    header = plan(options, virtual_size)
    start = header.data_sector * SECTOR
    full = start + header.entries * header.cluster_size
    return full if data_bytes is None else start + data_bytes, full
