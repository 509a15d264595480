"""The header of QED images and its limits (specification, "Header"). No I/O."""

from __future__ import annotations

import struct

from ...errors import ImageError, NotSupported
from ...typing import Final, NamedTuple
from ...units import SECTOR
from ..twolevel import MAX_L1_SIZE

__all__ = ["BACKING_FILE", "HEADER_SIZE", "MAX_NAME", "NEED_CHECK", "NO_PROBE", "ZERO_CLUSTER", "Header", "check_sizes",
           "decode_header", "encode_header"]  # fmt: skip

MAGIC: Final = b"QED\0"
HEADER_SIZE: Final = 64
BACKING_FILE: Final = 1
NEED_CHECK: Final = 2
NO_PROBE: Final = 4
"""The backing file is raw; nothing else can be said of its format."""
KNOWN_FEATURES: Final = BACKING_FILE | NEED_CHECK | NO_PROBE
MIN_CLUSTER: Final = 4096
MAX_CLUSTER: Final = 64 << 20
MAX_TABLE: Final = 16
DEFAULT_TABLE: Final = 4
MAX_NAME: Final = 1023
MAX_SIZE: Final = (1 << 63) - 512
ZERO_CLUSTER: Final = 1

_FORMAT: Final = struct.Struct("<4s3I5Q2I")


class Header(NamedTuple):
    """The fields in their order on disk (specification, "Header").

    :ivar table_size: of the L1 table and of each L2 table, clusters
    :ivar header_size: clusters
    :ivar size: of the disk, bytes
    """

    magic: bytes = MAGIC
    cluster_size: int = 65536
    table_size: int = DEFAULT_TABLE
    header_size: int = 1
    features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    l1_offset: int = 65536
    size: int = 0
    backing_offset: int = 0
    backing_size: int = 0

    @property
    def table_bytes(self) -> int:
        return self.table_size * self.cluster_size

    @property
    def most(self) -> int:
        """The largest disk that the tables can describe, bytes."""
        return min((self.table_bytes // 8) ** 2 * self.cluster_size, MAX_SIZE)


def encode_header(header: Header) -> bytes:
    """The inverse of :func:`decode_header`."""
    return _FORMAT.pack(*header)


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:raises ImageError: it breaks the format, or goes beyond what is supported"""
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the file has {len(data)} bytes, a QED header takes {HEADER_SIZE}")
    header = Header._make(_FORMAT.unpack_from(data))
    if header.magic != MAGIC:
        raise ImageError(f"not a QED image: it begins with {header.magic!r}")
    unknown = header.features & ~KNOWN_FEATURES
    if unknown:
        raise ImageError(f"unknown incompatible features: {unknown:#x}", errno=NotSupported.default_errno)
    check_sizes(header)
    if not 0 < header.header_size * header.cluster_size < 1 << 32:
        raise ImageError(f"the header takes {header.header_size} clusters of {header.cluster_size} bytes: expected at "
                         "least one, and less than 4 GiB")  # fmt: skip
    header_bytes = header.header_size * header.cluster_size
    if header.l1_offset % header.cluster_size or header.l1_offset < header_bytes or header.l1_offset >= 1 << 63:
        raise ImageError(f"the L1 table lies at {header.l1_offset:#x}: expected a cluster behind the header")
    if header.features & BACKING_FILE and (
        header.backing_offset < HEADER_SIZE
        or header.backing_offset + header.backing_size > header_bytes
        or header.backing_size > MAX_NAME
    ):
        raise ImageError(f"the name of the backing file, {header.backing_size} bytes at {header.backing_offset:#x}, "
                         f"does not lie within the header, or is longer than {MAX_NAME} bytes")  # fmt: skip
    return header


def check_sizes(header: Header) -> None:
    """:raises ImageError: clusters, tables or the disk are too large, or not a power of two"""
    size, table = header.cluster_size, header.table_size
    if not MIN_CLUSTER <= size <= MAX_CLUSTER or size & (size - 1):
        raise ImageError(f"the cluster size is {size}: expected a power of two from {MIN_CLUSTER} to {MAX_CLUSTER}")
    if not 1 <= table <= MAX_TABLE or table & (table - 1):
        raise ImageError(f"the table size is {table} clusters: expected a power of two from 1 to {MAX_TABLE}")
    if header.table_bytes > MAX_L1_SIZE:
        raise ImageError(f"a table takes {header.table_bytes} bytes, allowed are {MAX_L1_SIZE}")
    if header.size % SECTOR or header.size > header.most:
        raise ImageError(f"the disk size is {header.size}: expected a multiple of 512 up to {header.most}")
