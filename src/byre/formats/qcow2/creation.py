"""Creating qcow2 images: options to a plan, a plan to an empty image.

The image is laid out at once instead of being grown: header, refcount table, refcount blocks, L1 table, then (with
preallocation) L2 tables and data, without a gap, so every cluster's refcount is 1. The header is written last: until
then the file is no qcow2 image.
"""

from __future__ import annotations

import errno

from ...errors import InvalidArgument
from ...typing import TYPE_CHECKING, Final, NamedTuple
from ...units import format_size
from . import layout
from .entries import ALL_ALLOCATED, COPIED

if TYPE_CHECKING:
    from array import array

    from ...graph.creating import CreateRequest
    from ...graph.node import Node
    from ...options import OptionValues

__all__ = ["Plan", "create_qcow2", "plan", "table_clusters"]

WINDOW: Final = 1 << 20
"""Tables are made and written in pieces of this many bytes."""
SMALL_CLUSTER: Final = 4096
"""Up to this cluster size the feature names are left out, to keep room for a backing file name."""
NEW_HEADER_LENGTH: Final = 112


class Plan(NamedTuple):
    """The image to be made; counts are clusters unless they say otherwise, in the order they lie in the file.

    :ivar data_clusters: preallocated guest clusters
    :ivar host_data_clusters: those of them that lie in the image file itself
    :ivar header: complete but for the backing file
    :ivar crypto: where the encryption header goes, if there is one
    """

    header: layout.Header
    extensions: tuple[layout.Extension, ...]
    backing_name: str
    data_file: str
    preallocation: str
    refcount_table_clusters: int
    refcount_block_clusters: int
    l1_clusters: int
    l2_clusters: int
    data_clusters: int
    host_data_clusters: int
    crypto_clusters: int = 0
    crypto: layout.CryptoPointer | None = None

    @property
    def crypto_start(self) -> int:
        return 1 + self.refcount_table_clusters + self.refcount_block_clusters + self.l1_clusters

    @property
    def l2_start(self) -> int:
        return self.crypto_start + self.crypto_clusters

    @property
    def clusters(self) -> int:
        """All clusters of the image file."""
        return self.l2_start + self.l2_clusters + self.host_data_clusters


# -- options to a plan ----------------------------------------------------------------------------


def cluster_bits_of(options: OptionValues) -> int:
    """log2 of the cluster size.

    :raises InvalidArgument: not a power of two in 512 bytes to 2 MiB, or too small for extended L2 entries
    """
    size = options.number("cluster_size")
    bits = size.bit_length() - 1
    if size != 1 << max(bits, 0) or not layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS:
        raise InvalidArgument(f"cluster_size is {size}, allowed is a power of two from 512 to 2097152 (2M)")
    if options.flag("extended_l2") and bits < 14:
        raise InvalidArgument(f"cluster_size is {size}, extended_l2 needs at least 16384 (16k)")
    return bits


def version_of(options: OptionValues) -> int:
    return 2 if options.text("compat") in ("0.10", "v2") else 3


def refcount_order_of(options: OptionValues) -> int:
    """log2 of the refcount width.

    :raises InvalidArgument: not a power of two up to 64, or not 16 in version 2
    """
    bits = options.number("refcount_bits")
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise InvalidArgument(f"refcount_bits is {bits}, allowed is a power of two from 1 to 64")
    if bits != 16 and version_of(options) < 3:
        raise InvalidArgument(f"refcount_bits is {bits}, compat=0.10 allows only 16", hint="use compat=1.1")
    return bits.bit_length() - 1


def l1_entries_of(size: int, cluster_bits: int, *, extended_l2: bool) -> int:
    """Entries of the L1 table.

    :raises InvalidArgument: more than 32 MiB of them
    """
    entries = layout.l1_entries_needed(size, cluster_bits, extended_l2=extended_l2)
    if entries * 8 > layout.MAX_L1_SIZE or size > layout.MAX_VIRTUAL_SIZE:
        largest = min(
            layout.MAX_L1_SIZE // 8 << (2 * cluster_bits - (4 if extended_l2 else 3)), layout.MAX_VIRTUAL_SIZE
        )
        raise InvalidArgument(
            f"a virtual size of {size} bytes ({format_size(size)}) is too large for cluster_size={1 << cluster_bits}, "
            f"which allows {largest} ({format_size(largest)})",
            hint="use a larger cluster_size" if cluster_bits < layout.MAX_CLUSTER_BITS else "",
            errno=errno.EFBIG,
        )
    return entries


def table_clusters(clusters: int, cluster_bits: int, refcount_order: int) -> tuple[int, int]:
    """(refcount table, refcount blocks) in clusters for ``clusters`` others and themselves: the smallest that do."""
    table = blocks = 0
    block_bits = cluster_bits + 3 - refcount_order
    while True:
        needed = -(-(clusters + table + blocks) >> block_bits)
        needed_table = -(-needed * 8 >> cluster_bits)
        if (needed, needed_table) == (blocks, table):
            return table, blocks
        blocks, table = needed, needed_table


def plan(options: OptionValues) -> Plan:
    """What to make of ``options`` (``size`` included).

    :raises InvalidArgument: options that contradict each other or the format's limits
    :raises NotSupported: a cipher that is not supported
    :raises NoSpace: the backing file name does not fit
    """
    cluster_bits, version, order = cluster_bits_of(options), version_of(options), refcount_order_of(options)
    crypt_method, crypto_length = _encryption(options)
    _check_version_2(options, version)
    preallocation = _check_combinations(options)
    size, extended = options.number("size"), options.flag("extended_l2")
    l1_entries = l1_entries_of(size, cluster_bits, extended_l2=extended)
    data_file = options.text("data_file") or ""
    data_clusters = -(-size >> cluster_bits) if preallocation != "off" else 0
    result = Plan(
        header=layout.Header(),
        extensions=_extensions(options, version, cluster_bits),
        backing_name=options.text("backing_file") or "",
        data_file=data_file,
        preallocation=preallocation,
        refcount_table_clusters=0,
        refcount_block_clusters=0,
        l1_clusters=-(-l1_entries * 8 >> cluster_bits),
        l2_clusters=l1_entries if data_clusters else 0,
        data_clusters=data_clusters,
        host_data_clusters=0 if data_file else data_clusters,
        crypto_clusters=-(-crypto_length >> cluster_bits),
    )
    table, blocks = table_clusters(result.clusters, cluster_bits, order)
    if (
        table << cluster_bits > layout.MAX_REFCOUNT_TABLE_SIZE
        or (result.clusters + table + blocks) << cluster_bits > 1 << 56
    ):
        raise InvalidArgument(
            f"preallocating {size} bytes ({format_size(size)}) with cluster_size={1 << cluster_bits} and refcount_bits="
            f"{1 << order} needs a larger refcount table than the format's readers accept",
            hint="use a larger cluster_size or fewer refcount_bits",
            errno=errno.EFBIG,
        )
    result = result._replace(refcount_table_clusters=table, refcount_block_clusters=blocks)
    if crypto_length:
        pointer = layout.CryptoPointer(result.crypto_start << cluster_bits, crypto_length)
        result = result._replace(crypto=pointer, extensions=_with_crypto(result.extensions, pointer))
    header = _header(options, result, version, cluster_bits, order, crypt_method)
    result = result._replace(header=header)
    layout.header_bytes(header, result.extensions, result.backing_name)
    return result


def _encryption(options: OptionValues) -> tuple[int, int]:
    """(method, bytes of the encryption header)."""
    if not any(name.startswith("encrypt") for name in options.given):
        return layout.CRYPT_NONE, 0
    from . import encryption

    encryption.check_secret(options)
    return encryption.planned_method(options), encryption.planned_size(options)


def _with_crypto(
    extensions: tuple[layout.Extension, ...], pointer: layout.CryptoPointer
) -> tuple[layout.Extension, ...]:
    """The pointer to the encryption header, ahead of the feature names, which readers can do without."""
    own = layout.Extension(layout.EXTENSION_CRYPTO, layout.encode_crypto_pointer(pointer))
    names = tuple(extension for extension in extensions if extension.type == layout.EXTENSION_FEATURE_NAMES)
    return (*(extension for extension in extensions if extension not in names), own, *names)


def _check_version_2(options: OptionValues, version: int) -> None:
    if version > 2:
        return
    wanted = {
        "extended_l2": options.flag("extended_l2"),
        "lazy_refcounts": options.flag("lazy_refcounts"),
        "data_file": bool(options.text("data_file")),
        "compression_type": options.word("compression_type") != "zlib",
    }
    for name, given in wanted.items():
        if given:
            raise InvalidArgument(f"{name} needs version 3, compat=0.10 is version 2", hint="use compat=1.1")


def _check_combinations(options: OptionValues) -> str:
    """The preallocation mode; :raises InvalidArgument: options that exclude each other"""
    preallocation = options.text("preallocation") or "off"
    backing = options.text("backing_file")
    if backing and preallocation != "off" and not options.flag("extended_l2"):
        raise InvalidArgument("backing_file and preallocation exclude each other unless extended_l2 is on")
    if options.text("backing_fmt") and not backing:
        raise InvalidArgument("backing_fmt is given without backing_file")
    if backing and len(backing.encode("utf-8", "surrogateescape")) > layout.MAX_BACKING_NAME:
        raise InvalidArgument(f"backing_file is longer than {layout.MAX_BACKING_NAME} bytes")
    if options.flag("data_file_raw"):
        if not options.text("data_file"):
            raise InvalidArgument("data_file_raw needs data_file")
        if backing:
            raise InvalidArgument("backing_file and data_file_raw exclude each other")
        # Readers that look at the tables must find what readers of the raw file find.
        return "metadata" if preallocation == "off" else preallocation
    return preallocation


def _extensions(options: OptionValues, version: int, cluster_bits: int) -> tuple[layout.Extension, ...]:
    found = []
    backing_format, data_file = options.text("backing_fmt"), options.text("data_file")
    if backing_format:
        found.append(layout.Extension(layout.EXTENSION_BACKING_FORMAT, backing_format.encode()))
    if data_file:
        name = data_file.encode("utf-8", "surrogateescape")
        found.append(layout.Extension(layout.EXTENSION_DATA_FILE, name))
    if version >= 3 and 1 << cluster_bits > SMALL_CLUSTER:
        found.append(layout.Extension(layout.EXTENSION_FEATURE_NAMES, layout.encode_feature_names()))
    return tuple(found)


def _header(options: OptionValues, made: Plan, version: int, cluster_bits: int, order: int,
            crypt_method: int) -> layout.Header:  # fmt: skip
    extended, size = options.flag("extended_l2"), options.number("size")
    kind = layout.COMPRESSION_NAMES.index(options.word("compression_type"))
    l1_entries = layout.l1_entries_needed(size, cluster_bits, extended_l2=extended)
    l1_start = 1 + made.refcount_table_clusters + made.refcount_block_clusters
    header = layout.Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        crypt_method=crypt_method,
        l1_size=l1_entries,
        l1_table_offset=l1_start << cluster_bits if l1_entries else 0,
        refcount_table_offset=1 << cluster_bits,
        refcount_table_clusters=made.refcount_table_clusters,
        refcount_order=order,
    )
    if version < 3:
        return header
    return header._replace(
        incompatible_features=(layout.INCOMPATIBLE_DATA_FILE if made.data_file else 0)
        | (layout.INCOMPATIBLE_COMPRESSION if kind else 0)
        | (layout.INCOMPATIBLE_EXTENDED_L2 if extended else 0),
        compatible_features=layout.COMPATIBLE_LAZY_REFCOUNTS if options.flag("lazy_refcounts") else 0,
        autoclear_features=layout.AUTOCLEAR_RAW_DATA if options.flag("data_file_raw") else 0,
        header_length=NEW_HEADER_LENGTH,
        compression_type=kind,
        extra=bytes(NEW_HEADER_LENGTH - layout.V3_LENGTH - 1),
    )


# -- a plan to an image ---------------------------------------------------------------------------


def create_qcow2(request: CreateRequest) -> None:
    """Write an empty image into ``request.file`` and, if asked for, create its data file.

    :raises ByreError: as :func:`plan`, or a failed write
    """
    made = plan(request.options)
    file = request.file
    if made.data_file:
        _make_data_file(request, made)
    if not file.has_zero_init:
        # An older image's header must not describe the new tables.
        _write(file, 0, bytes(made.header.cluster_size))
        file.flush()
    _write_refcounts(file, made)
    _write_l1(file, made)
    if made.header.crypt_method:
        from .encryption import write_header

        bits = made.header.cluster_bits
        _write_zeroes(file, made.crypto_start << bits, made.crypto_clusters << bits)
        write_header(request, made)
    if made.l2_clusters:
        _write_l2(file, made)
    if made.host_data_clusters:
        _make_data_area(file, made)
    file.flush()
    _write(file, 0, layout.header_bytes(made.header, made.extensions, made.backing_name))
    file.flush()


def _make_data_area(file: Node, made: Plan) -> None:
    """Behind the tables: as long as the disk where it stays sparse, whole clusters where space is reserved."""
    bits = made.header.cluster_bits
    if made.preallocation == "metadata":
        start = (made.l2_start + made.l2_clusters) << bits
        file.resize(start + made.header.size, exact=False)
    else:
        file.resize(made.clusters << bits, preallocation=made.preallocation, exact=False)


def _make_data_file(request: CreateRequest, made: Plan) -> None:
    size = made.header.size
    if made.preallocation in ("falloc", "full"):
        data = request.create_data_file(made.data_file, 0)
        data.resize(size, preallocation=made.preallocation, exact=False)
    else:
        data = request.create_data_file(made.data_file, size)
    data.flush()


def _write(file: Node, offset: int, data: bytes | bytearray | memoryview) -> None:
    file.write_from(offset, memoryview(data).cast("B"))


def _write_refcounts(file: Node, made: Plan) -> None:
    cluster_size, order = made.header.cluster_size, made.header.refcount_order
    first_block = (1 + made.refcount_table_clusters) * cluster_size
    blocks = made.refcount_block_clusters
    # The table: one entry per block, zeroes up to its end.
    _write_sequence(file, cluster_size, first_block, cluster_size, blocks, made.refcount_table_clusters * cluster_size)
    # The blocks: every cluster of the file counts 1, beyond its end 0.
    used = _ones(made.clusters - ((blocks - 1) << made.header.refcount_block_bits), order)
    full = _ones(1 << made.header.refcount_block_bits, order)
    per_window = max(1, WINDOW // cluster_size)
    for index in range(0, blocks - 1, per_window):
        count = min(per_window, blocks - 1 - index)
        _write(file, first_block + index * cluster_size, full * count)
    _write(file, first_block + (blocks - 1) * cluster_size, used.ljust(cluster_size, b"\0"))


def _ones(count: int, order: int) -> bytes:
    """``count`` refcounts of 1, in whole bytes."""
    if order >= 3:
        return (1).to_bytes(1 << (order - 3), "big") * count
    per_byte = 8 >> order
    pattern = sum(1 << (i << order) for i in range(per_byte))
    rest = sum(1 << (i << order) for i in range(count % per_byte))
    return bytes((pattern,)) * (count // per_byte) + (bytes((rest,)) if rest else b"")


def _write_l1(file: Node, made: Plan) -> None:
    length = made.header.l1_size * 8
    if not length:
        return
    start = made.header.l1_table_offset
    if made.l2_clusters:
        first = made.l2_start << made.header.cluster_bits | COPIED
        _write_sequence(file, start, first, made.header.cluster_size, made.l2_clusters, length)
    else:
        _write_sequence(file, start, 0, 0, 0, length)
    if made.preallocation in ("falloc", "full"):
        # No hole where space was asked for: a longer table fills the rest of its last cluster in place.
        _write(file, start + length, bytes((made.l1_clusters << made.header.cluster_bits) - length))


def _write_l2(file: Node, made: Plan) -> None:
    """All L2 tables, one behind the other: clusters in order; subclusters unallocated, as the peer leaves them.

    In a raw data file they are allocated: whoever reads the file itself sees zeroes there, and no backing file.
    """
    bits, extended = made.header.cluster_bits, made.header.extended_l2
    start = made.l2_start << bits
    first = 0 if made.data_file else (made.l2_start + made.l2_clusters) << bits
    bitmap = (ALL_ALLOCATED if made.header.raw_data_file else 0) if extended else None
    _write_sequence(file, start, first | COPIED, 1 << bits, made.data_clusters, made.l2_clusters << bits, bitmap)


def _write_sequence(
    file: Node, offset: int, first: int, step: int, count: int, length: int, second: int | None = None
) -> None:
    """A table of ``length`` bytes at ``offset``: ``count`` entries ``first``, ``first + step``, ..., then zeroes.

    :param second: a word to follow every entry
    """
    width = 8 if second is None else 16
    used = count * width
    for at in range(0, used, WINDOW):
        rows = range(at // width, min(count, (at + WINDOW) // width))
        _write(
            file,
            offset + at,
            memoryview(_words(range(first + rows.start * step, first + rows.stop * step, step), second)),
        )
    _write_zeroes(file, offset + used, length - used)


def _words(values: range, second: int | None) -> array[int]:
    import sys
    from array import array

    words = array("Q", values)
    if second is not None:
        entries, words = words, array("Q", [second]) * (2 * len(words))
        words[::2] = entries
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _write_zeroes(file: Node, offset: int, length: int) -> None:
    """Zeroes, written where they are few; in a new file's untouched part the length alone makes them."""
    if length <= 0:
        return
    if length <= WINDOW:
        _write(file, offset, bytes(length))
    elif file.has_zero_init and file.size <= offset:
        file.resize(offset + length)
    else:
        file.write_zeroes(offset, length)
