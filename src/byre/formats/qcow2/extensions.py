"""qcow2 header extensions and the feature name table (docs/interop/qcow2, "Header extensions").

Pure codecs; import them from :mod:`.layout`.
"""

from __future__ import annotations

import struct

from ...errors import ImageError, NotSupported, printable
from ...typing import TYPE_CHECKING, Final, NamedTuple
from .directories import MAX_BITMAP_DIRECTORY, MAX_BITMAPS, Truncated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .layout import Header

MAX_EXTENSIONS: Final = 4096
MAX_OFFSET: Final = (1 << 63) - 1
INCOMPATIBLE_KNOWN: Final = 0x1F

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

_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")


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


def decode_extensions(data: bytes | bytearray | memoryview, header: Header) -> tuple[Extension, ...]:
    """All extensions between the header and the backing name (or the cluster's end), in order, to the byte.

    :param data: the image from its first byte; what lies past the end of a short file is given as zeroes
    :raises ImageError: an extension reaches past the area, or a known one appears twice (of backing formats the last
        counts)
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
        if kind in known and kind == EXTENSION_BACKING_FORMAT:
            # Images exist that got a second one; programs go by the last.
            found = [row for row in found if row.type != kind]
        elif kind in known:
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


def decode_bitmaps_extension(data: bytes, cluster_bits: int = 9) -> BitmapsExtension:
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


def decode_crypto_pointer(data: bytes, cluster_bits: int = 9) -> CryptoPointer:
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
