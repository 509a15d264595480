"""qcow2 on-disk records: header, header extensions, feature names (docs/interop/qcow2, "Header").

Pure codecs: bytes in, records out. Owns the limits of everything the header says; snapshot and bitmap
directories are in :mod:`.directories` (re-exported here). Whether tables lie inside the file is for whoever
knows the file's length.
"""

from __future__ import annotations

import errno
import struct

from ...errors import ImageError, NoSpace
from ...typing import TYPE_CHECKING, Final, NamedTuple
from .directories import (
    BITMAP_AUTO,
    BITMAP_EXTRA_COMPATIBLE,
    BITMAP_IN_USE,
    MAX_SNAPSHOTS,
    BitmapEntry,
    Snapshot,
    Truncated,
    decode_bitmap_directory,
    decode_snapshot_table,
    encode_bitmap_directory,
    encode_snapshot_table,
    snapshot_extra,
)
from .extensions import (
    DEFAULT_FEATURE_NAMES,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_CRYPTO,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    INCOMPATIBLE_KNOWN,
    MAX_OFFSET,
    BitmapsExtension,
    CryptoPointer,
    Extension,
    FeatureName,
    check_features,
    decode_bitmaps_extension,
    decode_crypto_pointer,
    decode_extensions,
    decode_feature_names,
    encode_bitmaps_extension,
    encode_crypto_pointer,
    encode_extensions,
    encode_feature_names,
    find_extension,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AUTOCLEAR_BITMAPS",
    "AUTOCLEAR_KNOWN",
    "AUTOCLEAR_RAW_DATA",
    "BITMAP_AUTO",
    "BITMAP_EXTRA_COMPATIBLE",
    "BITMAP_IN_USE",
    "COMPATIBLE_LAZY_REFCOUNTS",
    "COMPRESSION_NAMES",
    "COMPRESSION_ZLIB",
    "COMPRESSION_ZSTD",
    "CRYPT_AES",
    "CRYPT_LUKS",
    "CRYPT_NONE",
    "DEFAULT_FEATURE_NAMES",
    "EXTENSION_BACKING_FORMAT",
    "EXTENSION_BITMAPS",
    "EXTENSION_CRYPTO",
    "EXTENSION_DATA_FILE",
    "EXTENSION_FEATURE_NAMES",
    "INCOMPATIBLE_COMPRESSION",
    "INCOMPATIBLE_CORRUPT",
    "INCOMPATIBLE_DATA_FILE",
    "INCOMPATIBLE_DIRTY",
    "INCOMPATIBLE_EXTENDED_L2",
    "INCOMPATIBLE_KNOWN",
    "MAX_BACKING_NAME",
    "MAX_CLUSTER_BITS",
    "MAX_L1_SIZE",
    "MAX_REFCOUNT_TABLE_SIZE",
    "MAX_SNAPSHOTS",
    "MAX_VIRTUAL_SIZE",
    "MIN_CLUSTER_BITS",
    "BitmapEntry",
    "BitmapsExtension",
    "CryptoPointer",
    "Extension",
    "FeatureName",
    "Header",
    "Snapshot",
    "Truncated",
    "check_features",
    "decode_backing_name",
    "decode_bitmap_directory",
    "decode_bitmaps_extension",
    "decode_crypto_pointer",
    "decode_extensions",
    "decode_feature_names",
    "decode_header",
    "decode_snapshot_table",
    "encode_bitmap_directory",
    "encode_bitmaps_extension",
    "encode_crypto_pointer",
    "encode_extensions",
    "encode_feature_names",
    "encode_header",
    "encode_snapshot_table",
    "find_extension",
    "header_bytes",
    "l1_entries_needed",
    "snapshot_extra",
]

MAGIC: Final = 0x514649FB
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MAX_L1_SIZE: Final = 32 << 20
MAX_REFCOUNT_TABLE_SIZE: Final = 8 << 20
MAX_VIRTUAL_SIZE: Final = (1 << 63) - 512
MAX_BACKING_NAME: Final = 1023

INCOMPATIBLE_DIRTY: Final = 1 << 0
INCOMPATIBLE_CORRUPT: Final = 1 << 1
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
INCOMPATIBLE_COMPRESSION: Final = 1 << 3
INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4
COMPATIBLE_LAZY_REFCOUNTS: Final = 1 << 0
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_RAW_DATA: Final = 1 << 1
AUTOCLEAR_KNOWN: Final = 0x3

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2

COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1
COMPRESSION_NAMES: Final = ("zlib", "zstd")

V2_LENGTH: Final = 72
V3_LENGTH: Final = 104
_V2 = struct.Struct(">IIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")


class Header(NamedTuple):
    """The header's fields in the specification's order; sizes and offsets in bytes.

    :ivar backing_file_size: 0 where there is no backing file, whatever the image holds there
    :ivar compression_type: 0 where the field is absent
    :ivar extra: what follows the compression type up to ``header_length``, kept as it is
    """

    version: int = 3
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = CRYPT_NONE
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V2_LENGTH
    compression_type: int = COMPRESSION_ZLIB
    extra: bytes = b""

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible_features & INCOMPATIBLE_EXTENDED_L2)

    @property
    def disk_size(self) -> int:
        """The virtual size, bytes; an encrypted disk ends with a whole sector."""
        return self.size - self.size % 512 if self.crypt_method else self.size

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible_features & INCOMPATIBLE_DATA_FILE)

    @property
    def raw_data_file(self) -> bool:
        return bool(self.autoclear_features & AUTOCLEAR_RAW_DATA)

    @property
    def lazy_refcounts(self) -> bool:
        return bool(self.compatible_features & COMPATIBLE_LAZY_REFCOUNTS)

    @property
    def l2_bits(self) -> int:
        """log2 of the entries of an L2 table."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    @property
    def subcluster_bits(self) -> int:
        """log2 of the subcluster size (of the cluster size without extended L2 entries)."""
        return self.cluster_bits - (5 if self.extended_l2 else 0)

    @property
    def refcount_block_bits(self) -> int:
        """log2 of the entries of a refcount block."""
        return self.cluster_bits + 3 - self.refcount_order


def _bad(field: str, value: object, allowed: str, number: int = 0) -> ImageError:
    return ImageError(f"qcow2 header field {field} is {value}, allowed is {allowed}", errno=number)


# -- header ---------------------------------------------------------------------------------------


def decode_header(data: bytes | bytearray | memoryview, *, repair: bool = False) -> Header:
    """The header at the beginning of ``data``, all limits checked.

    :param data: the first bytes of the image, at least ``header_length`` of them
    :param repair: accept what ``check -r`` can mend: a missing refcount table, a bad snapshot table
    :raises ImageError: a field is outside its limits; unknown feature bits are left to :func:`check_features`
    :raises Truncated: more bytes are needed
    """
    if len(data) < V2_LENGTH:
        raise Truncated("the qcow2 header", V2_LENGTH, len(data))
    magic, version, *fields = _V2.unpack_from(data)
    if magic != MAGIC:
        raise ImageError(f"this is no qcow2 image: it begins with {magic:#010x} instead of {MAGIC:#010x}")
    if version not in (2, 3):
        raise _bad("version", version, "2 or 3", errno.ENOTSUP)
    header = Header(version, *fields)
    if not header.backing_file_offset:
        header = header._replace(backing_file_size=0)
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        raise _bad("cluster_bits", header.cluster_bits, f"{MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")
    if version == 3:
        header = _decode_version_3(data, header)
    _check_features_agree(header)
    _check_fields(header, repair)
    return header


def _decode_version_3(data: bytes | bytearray | memoryview, header: Header) -> Header:
    if len(data) < V3_LENGTH:
        raise Truncated("the qcow2 header", V3_LENGTH, len(data))
    incompatible, compatible, autoclear, order, length = _V3.unpack_from(data, V2_LENGTH)
    if length < V3_LENGTH or length % 8 or length > header.cluster_size:
        raise _bad("header_length", length, f"a multiple of 8 from {V3_LENGTH} to the cluster size")
    if len(data) < length:
        raise Truncated("the qcow2 header", length, len(data))
    return header._replace(
        incompatible_features=incompatible,
        compatible_features=compatible,
        autoclear_features=autoclear,
        refcount_order=order,
        header_length=length,
        compression_type=data[V3_LENGTH] if length > V3_LENGTH else COMPRESSION_ZLIB,
        extra=bytes(data[V3_LENGTH + 1 : length]),
    )


def _check_features_agree(header: Header) -> None:
    if header.compression_type >= len(COMPRESSION_NAMES):
        raise _bad("compression_type", header.compression_type, "0 (zlib) or 1 (zstd)")
    flagged = bool(header.incompatible_features & INCOMPATIBLE_COMPRESSION)
    if flagged != (header.compression_type != COMPRESSION_ZLIB):
        state = "set" if flagged else "not set"
        raise ImageError(
            f"qcow2 header field compression_type is {header.compression_type} while incompatible feature bit 3 "
            f"(compression type) is {state}; the bit must be set exactly when the type is not 0"
        )
    if header.extended_l2 and header.cluster_bits < 14:
        raise _bad("cluster_bits", header.cluster_bits, "14 to 21 with extended L2 entries")
    if header.raw_data_file and not header.has_data_file:
        raise ImageError(
            "qcow2 header field autoclear_features has bit 1 (raw external data) set, "
            "which is allowed only with incompatible bit 2 (external data file)"
        )


def _check_table(field: str, offset: int, length: int, cluster_size: int) -> None:
    if offset % cluster_size or offset > MAX_OFFSET - length:
        raise _bad(field, f"{offset:#x}", f"a multiple of the cluster size {cluster_size} below 2^63")


def _check_fields(header: Header, repair: bool) -> None:
    cluster_size = header.cluster_size
    if header.refcount_order > 6:
        raise _bad("refcount_order", header.refcount_order, "0 to 6 (64 bits)")
    if header.crypt_method > CRYPT_LUKS:
        raise _bad("crypt_method", header.crypt_method, "0 (none), 1 (AES) or 2 (LUKS)", errno.ENOTSUP)
    if header.size > MAX_VIRTUAL_SIZE:
        raise _bad("size", header.size, f"at most {MAX_VIRTUAL_SIZE}")
    table_size = header.refcount_table_clusters * cluster_size
    if table_size > MAX_REFCOUNT_TABLE_SIZE:
        raise _bad("refcount_table_clusters", header.refcount_table_clusters,
                   f"at most {MAX_REFCOUNT_TABLE_SIZE // cluster_size}", errno.EFBIG)  # fmt: skip
    _check_table("refcount_table_offset", header.refcount_table_offset, table_size, cluster_size)
    if not repair:
        if not header.refcount_table_clusters:
            raise _bad("refcount_table_clusters", 0, "at least 1")
        if not header.refcount_table_offset:
            raise _bad("refcount_table_offset", 0, "at least one cluster")
        if header.nb_snapshots > MAX_SNAPSHOTS:
            raise _bad("nb_snapshots", header.nb_snapshots, f"at most {MAX_SNAPSHOTS}", errno.EFBIG)
        _check_table("snapshots_offset", header.snapshots_offset, header.nb_snapshots * 40, cluster_size)
    _check_l1(header)
    _check_backing_name(header)


def _check_l1(header: Header) -> None:
    if header.l1_size * 8 > MAX_L1_SIZE:
        raise _bad("l1_size", header.l1_size, f"at most {MAX_L1_SIZE // 8}", errno.EFBIG)
    _check_table("l1_table_offset", header.l1_table_offset, header.l1_size * 8, header.cluster_size)
    needed = l1_entries_needed(header.size, header.cluster_bits, extended_l2=header.extended_l2)
    if header.l1_size < needed:
        raise _bad("l1_size", header.l1_size, f"at least {needed} for a virtual size of {header.size}")
    if header.l1_size and not header.l1_table_offset:
        raise _bad("l1_table_offset", 0, "at least one cluster")


def _check_backing_name(header: Header) -> None:
    offset, length = header.backing_file_offset, header.backing_file_size
    if not offset:
        return
    if not header.header_length <= offset <= header.cluster_size:
        raise _bad("backing_file_offset", offset, f"{header.header_length} to the cluster size {header.cluster_size}")
    limit = min(MAX_BACKING_NAME, header.cluster_size - offset)
    if length > limit:
        raise _bad("backing_file_size", length, f"at most {limit} (1023 bytes, within the first cluster)")


def l1_entries_needed(size: int, cluster_bits: int, *, extended_l2: bool = False) -> int:
    """Entries an L1 table needs to map ``size`` bytes."""
    return -(-size >> (2 * cluster_bits - (4 if extended_l2 else 3)))


def encode_header(header: Header) -> bytes:
    """The header's ``header_length`` bytes, the inverse of :func:`decode_header`."""
    first = _V2.pack(MAGIC, *header[:12])
    if header.version == 2:
        return first
    second = _V3.pack(*header[12:17])
    if header.header_length == V3_LENGTH:
        return first + second
    tail = bytes((header.compression_type,)) + header.extra
    if len(tail) != header.header_length - V3_LENGTH:
        raise ValueError(f"{len(tail)} bytes of additional fields in a header of {header.header_length} bytes")
    return first + second + tail


def decode_backing_name(data: bytes | bytearray | memoryview, header: Header) -> str:
    """The backing file's name, "" if there is none; undecodable bytes become surrogates (``os.fsencode``).

    :param data: the image from its first byte at least to the name's end
    :raises Truncated: more bytes are needed
    """
    if not header.backing_file_offset:
        return ""
    end = header.backing_file_offset + header.backing_file_size
    if len(data) < end:
        raise Truncated("the backing file name", end, len(data))
    # Other readers hold it as a C string: a name must not mean two files.
    name = bytes(data[header.backing_file_offset : end]).partition(b"\0")[0]
    return name.decode("utf-8", "surrogateescape")


# -- the first cluster ----------------------------------------------------------------------------


def header_bytes(header: Header, extensions: Sequence[Extension], backing_name: str | None = "") -> bytes:
    """The whole first cluster: header, extensions, backing name, zeroes.

    The backing fields of ``header`` are set from ``backing_name`` ("" or ``None``: no backing file); read them
    back with :func:`decode_header`.

    :raises NoSpace: extensions and name do not fit in the cluster
    """
    area = encode_extensions(extensions)
    name = (backing_name or "").encode("utf-8", "surrogateescape")
    offset = header.header_length + len(area)
    if len(name) > MAX_BACKING_NAME:
        raise NoSpace(f"the backing file name has {len(name)} bytes, allowed are {MAX_BACKING_NAME}")
    if offset + len(name) > header.cluster_size:
        raise NoSpace(
            f"header extensions ({len(area)} bytes) and backing file name ({len(name)} bytes) do not fit in the first "
            f"cluster of {header.cluster_size} bytes"
        )
    header = header._replace(backing_file_offset=offset if name else 0, backing_file_size=len(name))
    return (encode_header(header) + area + name).ljust(header.cluster_size, b"\0")
