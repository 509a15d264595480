"""New QED images, and how large they get."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import ImageError, InvalidArgument
from ...units import SECTOR, align_up
from .layout import BACKING_FILE, DEFAULT_TABLE, HEADER_SIZE, MAX_NAME, NO_PROBE, Header, check_sizes, encode_header

if TYPE_CHECKING:
    from ...graph.creating import CreateRequest
    from ...options import OptionValues

__all__ = ["create_qed", "file_sizes", "plan"]


def plan(options: OptionValues) -> Header:
    """:raises InvalidArgument: options that no header can hold"""
    cluster, table = options.number("cluster_size"), options.optional_number("table_size") or DEFAULT_TABLE
    header = Header(cluster_size=cluster, table_size=table, l1_offset=cluster,
                    size=align_up(options.optional_number("size") or 0, SECTOR))  # fmt: skip
    try:
        check_sizes(header)
    except ImageError as error:
        raise InvalidArgument(error.message) from None
    name = (options.text("backing_file") or "").encode("utf-8", "surrogateescape")
    if not name:
        return header
    if len(name) > MAX_NAME:
        raise InvalidArgument(f"backing_file is longer than {MAX_NAME} bytes")
    features = BACKING_FILE | (NO_PROBE if options.text("backing_fmt") == "raw" else 0)
    return header._replace(features=features, backing_offset=HEADER_SIZE, backing_size=len(name))


def create_qed(request: CreateRequest) -> None:
    """Write an empty image: the length of the file says which clusters are in use, so it begins anew."""
    header, file = plan(request.options), request.file
    request.spoil()
    file.resize(0, exact=False)
    end = header.l1_offset + header.table_bytes
    file.write_zeroes(header.l1_offset, header.table_bytes)
    if file.size < end:
        file.resize(end, exact=False)
    file.flush()
    name = (request.options.text("backing_file") or "").encode("utf-8", "surrogateescape")
    file.write_from(0, memoryview(encode_header(header) + name))
    file.flush()


def file_sizes(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes; tables are counted as if all were needed."""
    header = plan(options)._replace(size=align_up(virtual_size, SECTOR))
    span = header.table_bytes // 8 * header.cluster_size
    tables = (1 + -(-virtual_size // span)) * header.table_bytes + header.cluster_size
    full = tables + align_up(virtual_size, header.cluster_size)
    return full if data_bytes is None else tables + data_bytes, full
