"""qcow2 on-disk records: header, header extensions, feature names (docs/interop/qcow2, "Header").

Pure codecs: bytes in, records out. Owns the limits of everything the header says; snapshot and bitmap
directories are in :mod:`.directories` (re-exported here). Whether tables lie inside the file is for whoever
knows the file's length.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ...errors import ImageError, NoSpace, NotSupported, printable
from .directories import (
    BITMAP_AUTO,
    BITMAP_EXTRA_COMPATIBLE,
    BITMAP_IN_USE,
    MAX_BITMAP_DIRECTORY,
    MAX_BITMAPS,
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
MAX_EXTENSIONS: Final = 4096
MAX_OFFSET: Final = (1 << 63) - 1

INCOMPATIBLE_DIRTY: Final = 1 << 0
INCOMPATIBLE_CORRUPT: Final = 1 << 1
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
INCOMPATIBLE_COMPRESSION: Final = 1 << 3
INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4
INCOMPATIBLE_KNOWN: Final = 0x1F
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

EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
EXTENSION_CRYPTO: Final = 0x0537BE77
EXTENSION_DATA_FILE: Final = 0x44415441
_KNOWN_EXTENSIONS: Final = {
    EXTENSION_BACKING_FORMAT: "backing format",
    EXTENSION_FEATURE_NAMES: "feature names",
    EXTENSION_BITMAPS: "bitmaps",
    EXTENSION_CRYPTO: "crypto header",
    EXTENSION_DATA_FILE: "data file",
}

V2_LENGTH: Final = 72
V3_LENGTH: Final = 104
_V2 = struct.Struct(">IIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")


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


class Extension(NamedTuple):
    """A header extension: ``type`` is one of the ``EXTENSION_*`` numbers or unknown."""

    type: int
    data: bytes


class FeatureName(NamedTuple):
    """A row of the feature name table.

    :ivar kind: 0 incompatible, 1 compatible, 2 autoclear
    """

    kind: int
    bit: int
    name: str


class BitmapsExtension(NamedTuple):
    """The bitmaps extension: where the bitmap directory is, in bytes."""

    nb_bitmaps: int
    directory_size: int
    directory_offset: int


class CryptoPointer(NamedTuple):
    """The full disk encryption header pointer, in bytes."""

    offset: int
    length: int


DEFAULT_FEATURE_NAMES: Final = (
    FeatureName(0, 0, "dirty bit"),
    FeatureName(0, 1, "corrupt bit"),
    FeatureName(0, 2, "external data file"),
    FeatureName(0, 3, "compression type"),
    FeatureName(0, 4, "extended L2 entries"),
    FeatureName(1, 0, "lazy refcounts"),
    FeatureName(2, 0, "bitmaps"),
    FeatureName(2, 1, "raw external data"),
)


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


# -- header extensions ----------------------------------------------------------------------------


def decode_extensions(data: bytes | bytearray | memoryview, header: Header) -> tuple[Extension, ...]:
    """All extensions between the header and the backing name (or the cluster's end), in order, to the byte.

    :param data: the image from its first byte; what lies past the end of a short file is given as zeroes
    :raises ImageError: an extension reaches past the area, or a known one appears twice
    :raises Truncated: more bytes are needed
    """
    end = header.backing_file_offset or header.cluster_size
    position = header.header_length
    found: list[Extension] = []
    known: set[int] = set()
    while position < end:
        if position + 8 > end:
            raise ImageError(f"qcow2 header extension at {position:#x} does not fit before {end:#x}")
        if len(data) < position + 8:
            raise Truncated("the qcow2 header extensions", position + 8, len(data))
        kind, length = _EXTENSION.unpack_from(data, position)
        if kind == EXTENSION_END:
            break
        position += 8
        if length > end - position:
            raise ImageError(
                f"qcow2 header extension {kind:#010x} at {position - 8:#x} is {length} bytes long, "
                f"allowed are {end - position} up to {end:#x}"
            )
        if len(data) < position + length:
            raise Truncated("the qcow2 header extensions", position + length, len(data))
        if kind in known:
            raise ImageError(f"qcow2 header extension {kind:#010x} ({_KNOWN_EXTENSIONS[kind]}) appears twice")
        if kind in _KNOWN_EXTENSIONS:
            known.add(kind)
        if len(found) >= MAX_EXTENSIONS:
            raise ImageError(f"the qcow2 header has more than {MAX_EXTENSIONS} extensions")
        found.append(Extension(kind, bytes(data[position : position + length])))
        position += -(-length // 8) * 8
    return tuple(found)


def encode_extensions(extensions: Sequence[Extension]) -> bytes:
    """The extension area with its end marker; each extension padded to 8 bytes."""
    parts = [_EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in extensions]
    return b"".join(parts) + _EXTENSION.pack(EXTENSION_END, 0)


def find_extension(extensions: Sequence[Extension], kind: int) -> bytes | None:
    """The data of the extension of type ``kind``, ``None`` if there is none."""
    return next((extension.data for extension in extensions if extension.type == kind), None)


def decode_feature_names(data: bytes) -> tuple[FeatureName, ...]:
    """The feature name table; an incomplete last row is ignored."""
    rows = _FEATURE.iter_unpack(data[: len(data) - len(data) % _FEATURE.size])
    return tuple(
        FeatureName(kind, bit, name.partition(b"\0")[0].decode("utf-8", "surrogateescape")) for kind, bit, name in rows
    )


def encode_feature_names(names: Sequence[FeatureName] = DEFAULT_FEATURE_NAMES) -> bytes:
    return b"".join(_FEATURE.pack(kind, bit, name.encode("utf-8", "surrogateescape")) for kind, bit, name in names)


def check_features(header: Header, names: Sequence[FeatureName] = ()) -> None:
    """Refuse an image that uses incompatible features byre does not know.

    :param names: the image's own feature name table
    :raises NotSupported: naming each of them
    """
    unknown = header.incompatible_features & ~INCOMPATIBLE_KNOWN
    if not unknown:
        return
    found = []
    for bit in range(64):
        if not unknown >> bit & 1:
            continue
        name = next((row.name for row in names if row.kind == 0 and row.bit == bit and row.name), "")
        found.append(printable(name) if name else f"incompatible feature bit {bit}")
    raise NotSupported(f"Unsupported qcow2 feature(s): {', '.join(found)}")


_BITMAPS = struct.Struct(">IIQQ")
_CRYPTO = struct.Struct(">QQ")


def decode_bitmaps_extension(data: bytes, cluster_bits: int = MIN_CLUSTER_BITS) -> BitmapsExtension:
    """The bitmaps extension's data (section "Bitmaps extension").

    :raises ImageError: a field is outside its limits
    """
    if len(data) != _BITMAPS.size:
        raise ImageError(f"qcow2 bitmaps extension is {len(data)} bytes long, allowed is {_BITMAPS.size}")
    count, reserved, size, offset = _BITMAPS.unpack(data)
    if reserved:
        raise ImageError(f"qcow2 bitmaps extension field reserved is {reserved:#x}, allowed is 0")
    if not 1 <= count <= MAX_BITMAPS:
        raise ImageError(f"qcow2 bitmaps extension field nb_bitmaps is {count}, allowed is 1 to {MAX_BITMAPS}")
    if not 24 * count <= size <= MAX_BITMAP_DIRECTORY:
        raise ImageError(
            f"qcow2 bitmaps extension field bitmap_directory_size is {size}, "
            f"allowed is {24 * count} to {MAX_BITMAP_DIRECTORY}"
        )
    if not offset or offset % (1 << cluster_bits) or offset > MAX_OFFSET - size:
        raise ImageError(
            f"qcow2 bitmaps extension field bitmap_directory_offset is {offset:#x}, allowed is a multiple of the "
            f"cluster size {1 << cluster_bits} that is not 0"
        )
    return BitmapsExtension(count, size, offset)


def encode_bitmaps_extension(record: BitmapsExtension) -> bytes:
    return _BITMAPS.pack(record.nb_bitmaps, 0, record.directory_size, record.directory_offset)


def decode_crypto_pointer(data: bytes, cluster_bits: int = MIN_CLUSTER_BITS) -> CryptoPointer:
    """The data of the crypto header extension (section "Full disk encryption header pointer").

    :raises ImageError: its length or the offset's alignment is wrong
    """
    if len(data) != _CRYPTO.size:
        raise ImageError(f"qcow2 crypto header extension is {len(data)} bytes long, allowed is {_CRYPTO.size}")
    offset, length = _CRYPTO.unpack(data)
    if not offset or offset % (1 << cluster_bits) or length > MAX_OFFSET or offset > MAX_OFFSET - length:
        raise ImageError(
            f"qcow2 crypto header of {length} bytes at {offset:#x}: allowed is an offset that is a multiple of the "
            f"cluster size {1 << cluster_bits} and not 0"
        )
    return CryptoPointer(offset, length)


def encode_crypto_pointer(pointer: CryptoPointer) -> bytes:
    return _CRYPTO.pack(*pointer)


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
