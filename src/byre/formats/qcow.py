"""qcow: QEMU copy-on-write, version 1 (libyal, "QEMU Copy-On-Write file format"; version 2 and 3 are qcow2).

A header, the name of a backing file, an L1 table, then L2 tables and clusters in the order in which they came; no
reference counts, so what is overwritten in compressed form is lost space. Clusters may be compressed, or encrypted by
the old method (the passphrase is the key). The format of a backing file is not recorded. All numbers are big-endian.
"""

from __future__ import annotations

import struct
from functools import partial

from ..errors import ImageError, InvalidArgument, NotSupported
from ..io import engine
from ..options import Option, OptionSet
from ..typing import TYPE_CHECKING, Final, NamedTuple
from ..units import SECTOR, align_up
from .mapped import MappedNode
from .opening import check_size, fit_flags, read_exactly, read_head
from .space import Space
from .twolevel import MAX_L1_SIZE, Shape, TwoLevelMap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..graph.creating import CreateRequest
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest
    from ..io.extent import Extent
    from ..options import OptionValues

__all__ = ["CHILDREN", "CREATE_OPTIONS", "CREATE_PRINT_ORDER", "OPTIONS", "Header", "QcowNode", "check_create",
           "create", "decode_header", "encode_header", "measure", "measure_unit", "open_node"]  # fmt: skip

CHILDREN: Final = ("file", "backing")
CAN_COMPRESS: Final = True
OPTIONS: Final = OptionSet(
    Option("encrypt.format", "enum", "Encryption format", None, ("aes",)),
    Option("encrypt.key-secret", "str", "ID of the secret that provides the AES encryption key"),
)
CREATE_OPTIONS: Final = OptionSet(
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Format of the backing image"),
    Option("encrypt.format", "str", "Encrypt the image, format choices: 'aes'"),
    Option("encrypt.key-secret", "str", "ID of the secret that provides the AES encryption key"),
    Option("encryption", "bool",
           "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"),
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("size", "size", "Virtual disk size"),
)  # fmt: skip
CREATE_PRINT_ORDER: Final = ("size", "backing_file", "backing_fmt", "encryption", "encrypt.format",
                             "encrypt.key-secret", "nocow", "extent_size_hint")  # fmt: skip

MAGIC: Final = 0x514649FB
VERSION: Final = 1
AES: Final = 1
HEADER_SIZE: Final = 48
MAX_NAME: Final = 1023
MAX_SIZE: Final = (1 << 63) - 512
COMPRESSED: Final = 1 << 63

_FORMAT: Final = struct.Struct(">IIQIIQBBHIQ")


class Header(NamedTuple):
    """The fields in their order on disk.

    :ivar modified: time of the last change, which nobody keeps up
    :ivar l2_bits: log2 of the entries of an L2 table
    """

    magic: int = MAGIC
    version: int = VERSION
    backing_offset: int = 0
    backing_size: int = 0
    modified: int = 0
    size: int = 0
    cluster_bits: int = 12
    l2_bits: int = 9
    padding: int = 0
    crypt_method: int = 0
    l1_offset: int = HEADER_SIZE

    @property
    def l1_count(self) -> int:
        return -(-self.size >> (self.cluster_bits + self.l2_bits))


def encode_header(header: Header) -> bytes:
    """The inverse of :func:`decode_header`."""
    return _FORMAT.pack(*header)


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:raises ImageError: it breaks the format"""
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the file has {len(data)} bytes, a qcow header takes {HEADER_SIZE}")
    header = Header._make(_FORMAT.unpack_from(data))
    if header.magic != MAGIC:
        raise ImageError(f"not a qcow image: it begins with {header.magic:#010x}")
    if header.version != VERSION:
        hint = "it is a qcow2 image" if header.version in (2, 3) else ""
        raise ImageError(f"the image has version {header.version}, known here is 1", hint=hint,
                         errno=NotSupported.default_errno)  # fmt: skip
    if not 9 <= header.cluster_bits <= 16:
        raise ImageError(f"the cluster size is 2^{header.cluster_bits}: expected 2^9 to 2^16")
    if not 6 <= header.l2_bits <= 13:
        raise ImageError(f"an L2 table has 2^{header.l2_bits} entries: expected 2^6 to 2^13")
    if not 1 < header.size <= MAX_SIZE:
        raise ImageError(f"the disk size is {header.size}: expected 2 to {MAX_SIZE} bytes")
    if 8 * header.l1_count > MAX_L1_SIZE:
        raise ImageError(f"the L1 table takes {8 * header.l1_count} bytes, allowed are {MAX_L1_SIZE}")
    if header.crypt_method not in (0, AES):
        raise ImageError(f"unknown encryption method {header.crypt_method}")
    if header.l1_offset % 8 or not HEADER_SIZE <= header.l1_offset < 1 << 62:
        raise ImageError(f"the L1 table lies at {header.l1_offset:#x}: expected a multiple of 8 behind the header")
    if header.backing_offset and header.backing_size > MAX_NAME:
        raise ImageError(f"the name of the backing file has {header.backing_size} bytes, allowed are {MAX_NAME}")
    return header


# -- opening --------------------------------------------------------------------------------------


def open_node(request: OpenRequest) -> QcowNode:
    """The node of an existing image; its backing file is attached by the opener.

    :raises ImageError: the header breaks the format
    :raises AccessDenied: it is encrypted and no secret is named
    """
    file = request.open_child("file")
    flags = fit_flags(request, file)
    try:
        header = decode_header(read_head(file, HEADER_SIZE))
        if header.l1_offset + 8 * header.l1_count > file.size:
            raise ImageError(f"the L1 table ends at {header.l1_offset + 8 * header.l1_count:#x}, past the end of the "
                             f"file ({file.size:#x})")  # fmt: skip
        check_size(request, header.size)
        name = b""
        if header.backing_offset:
            name = bytes(read_exactly(file, header.backing_offset, header.backing_size, "name of the backing file"))
        _check_method(request, header)
    except (ImageError, InvalidArgument) as error:
        error.where = error.where or file.filename
        raise
    node = QcowNode(request, file, header, flags)
    node.backing_name = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    node.attach(request)
    if header.crypt_method:
        node.unlock(request)
    if not flags.no_io:
        node.map.load()
    return node


def _check_method(request: OpenRequest, header: Header) -> None:
    if request.options.text("encrypt.format") is not None and not header.crypt_method:
        raise InvalidArgument("the image is not encrypted, but option 'encrypt.format' is given")


class QcowNode(MappedNode):
    """An open image. Guarded by ``lock``: the map, ``header``.

    :ivar compression_level: of clusters that are written compressed; ``None`` for the default
    """

    driver = "qcow"
    dirty = False
    records_backing_format = False
    map: TwoLevelMap

    def __init__(self, request: OpenRequest, file: Node, header: Header, flags: OpenFlags) -> None:
        super().__init__(request, file, flags)
        self.header = header
        self.compression_level: int | None = None
        self.encrypted = bool(header.crypt_method)
        self._compress: Callable[[memoryview], bytes | None] | None = None
        self.cluster_size = self.zero_unit = 1 << header.cluster_bits
        self._size = header.size // SECTOR * SECTOR
        shape = Shape(self.cluster_size, 8 << header.l2_bits, "big", SECTOR, compressed=COMPRESSED)
        self.table_span = shape.span
        self.map = TwoLevelMap(file, shape, header.l1_offset, header.l1_count,
                               Space(0, self.cluster_size, file.size), self.write_back, self.report)  # fmt: skip

    def unlock(self, request: OpenRequest) -> None:
        """Take the key, or refuse what needs it where only metadata is asked for."""
        from ..crypto.locked import LockedCipher
        from ..errors import ByreError
        from .encryption import given_secret, legacy_cipher

        self.map.plain = False
        if self.open_flags.no_io or self.open_flags.check:
            self.use_cipher(LockedCipher(self.filename))
            return
        try:
            self.use_cipher(legacy_cipher(given_secret(request, "encrypt.key-secret")))
        except ByreError as error:
            error.where = error.where or self.filename
            raise

    # -- compressed clusters ----------------------------------------------------------------------

    def decompress(self, extent: Extent, buffer: memoryview) -> None:
        from .deflate import inflate

        bits, size = self.header.cluster_bits, self.cluster_size
        host = extent.host & ((1 << (63 - bits)) - 1)
        stored = memoryview(bytearray(extent.host >> (63 - bits) & (size - 1)))
        self.file.read_into(host, stored)
        skip = extent.offset & (size - 1)
        cluster = buffer if len(buffer) == size else memoryview(bytearray(size))
        try:
            inflate(stored, cluster)
        except ImageError as error:
            error.message = (
                f"cannot read the compressed cluster at guest offset {extent.offset - skip:#x}: {error.message}"
            )
            error.where = error.where or self.filename
            raise
        if cluster is not buffer:
            buffer[:] = cluster[skip : skip + len(buffer)]

    def compress(self, buffer: memoryview) -> bytes | None:
        """One cluster compressed; ``None`` if that does not make it smaller. No lock; a short cluster is padded."""
        if self._compress is None:
            from .deflate import DEFAULT_LEVEL, deflate

            self._compress = deflate(self.compression_level or DEFAULT_LEVEL)
        if len(buffer) < self.cluster_size:
            padded = bytearray(self.cluster_size)
            padded[: len(buffer)] = buffer
            buffer = memoryview(padded)
        return self._compress(buffer)

    def write_compressed(self, offset: int, buffer: memoryview) -> None:
        last = min(self.cluster_size, self._size - offset)
        if offset % self.cluster_size or len(buffer) not in (self.cluster_size, last):
            raise InvalidArgument(f"a compressed write covers exactly one cluster of {self.cluster_size} bytes, "
                                  f"not {len(buffer)} bytes at {offset:#x}", where=self.filename)  # fmt: skip
        self._check_compressible()
        payload = self.compress(buffer)
        if payload is None:
            engine.write(self, offset, buffer)
        else:
            engine.write_compressed(self, offset, [payload])

    def _check_compressible(self) -> None:
        if self.encrypted:
            raise NotSupported("an encrypted image cannot hold compressed clusters", where=self.filename)

    def write_compressed_clusters(self, offset: int, payloads: list[bytes]) -> None:
        self._check_compressible()
        if offset % self.cluster_size or not all(0 < len(payload) < self.cluster_size for payload in payloads):
            raise InvalidArgument(f"compressed clusters begin at multiples of {self.cluster_size} bytes and are "
                                  "smaller than that", where=self.filename)  # fmt: skip
        engine.write_compressed(self, offset, payloads)

    def reserve_compressed(self, lengths: Sequence[int]) -> list[int]:
        self.before_change()
        return [self.map.space.pack(length) for length in lengths]

    def publish_compressed(self, offset: int, hosts: Sequence[int], lengths: Sequence[int]) -> None:
        shift = 63 - self.header.cluster_bits
        words = [COMPRESSED | length << shift | host for host, length in zip(hosts, lengths, strict=True)]
        self.guarded(partial(self.map.publish_compressed, offset, words))

    def cancel_compressed(self, hosts: Sequence[int], lengths: Sequence[int]) -> None:
        """What was packed stays where it is: nothing refers to it."""

    # -- abilities --------------------------------------------------------------------------------

    def make_empty(self) -> None:
        """Nothing is allocated any more: the backing file shows everywhere. Durable on return."""
        self.check_writable("empty the image")
        self.flush()
        with self.lock:
            self.check_failure()
            claim = self.inflight.wait_idle()
            try:
                self.guarded(self._empty)
            finally:
                self.inflight.release(claim)

    def _empty(self) -> None:
        """The L1 table | then what it named goes."""
        found = self.map
        found.l2.drop_all()
        for index, entry in enumerate(found.l1):
            if entry:
                found.set_l1(index, 0)
        if found.dirty:
            found.write_back()
            self.file.flush()
        end = found.l1_offset + 8 * found.l1_count
        self.file.resize(end, exact=False)
        found.space = Space(0, self.cluster_size, end)


# -- creating -------------------------------------------------------------------------------------


def _planned(options: OptionValues, size: int) -> tuple[Header, bytes]:
    """(header, name of the backing file).

    :raises InvalidArgument: options that make no sense
    """
    method = options.text("encrypt.format")
    if options.flag("encryption"):
        method = method or "aes"
    if method not in (None, "aes"):
        raise InvalidArgument(f"unknown encryption format {method!r}: expected 'aes'")
    if method is None and options.text("encrypt.key-secret") is not None:
        raise InvalidArgument("option 'encrypt.key-secret' needs 'encrypt.format'")
    name = (options.text("backing_file") or "").encode("utf-8", "surrogateescape")
    if len(name) > MAX_NAME:
        raise InvalidArgument(f"backing_file is longer than {MAX_NAME} bytes")
    size = align_up(size, SECTOR)
    # Small clusters over a backing file, so that little is copied up.
    header = Header(
        backing_offset=HEADER_SIZE if name else 0, backing_size=len(name), size=size,
        cluster_bits=9 if name else 12, l2_bits=12 if name else 9, crypt_method=AES if method else 0,
        l1_offset=align_up(HEADER_SIZE + len(name), 8),
    )  # fmt: skip
    if size > MAX_SIZE or 8 * header.l1_count > MAX_L1_SIZE:
        most = min(MAX_SIZE, MAX_L1_SIZE // 8 << (header.cluster_bits + header.l2_bits))
        raise InvalidArgument(f"a size of {size} bytes is too large for qcow, allowed are {most}")
    return header, name


def check_create(options: OptionValues) -> None:
    """Refuse what :func:`create` would refuse, before a file is touched."""
    if not options.number("size"):
        raise InvalidArgument("a qcow image cannot have the size 0")
    _planned(options, options.number("size"))


def create(request: CreateRequest) -> None:
    """Write an empty image: the L1 table, then the header."""
    file = request.file
    header, name = _planned(request.options, request.options.number("size"))
    if header.crypt_method:
        from .encryption import creation_secret

        creation_secret(request, "encrypt.key-secret")
    request.spoil()
    length = align_up(8 * header.l1_count, SECTOR)
    file.write_zeroes(header.l1_offset, length)
    if file.size < header.l1_offset + length:
        file.resize(header.l1_offset + length, exact=False)
    file.flush()
    file.write_from(0, memoryview(encode_header(header) + name))
    file.flush()


def measure_unit(options: OptionValues) -> int:
    """In which pieces data takes space, bytes."""
    return 512 if options.text("backing_file") else 4096


def measure(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes; tables are counted as if all were needed."""
    header, _ = _planned(options, virtual_size)
    tables = header.l1_count * (8 << header.l2_bits)
    start = align_up(header.l1_offset + 8 * header.l1_count, 1 << header.cluster_bits) + tables
    full = start + align_up(virtual_size, 1 << header.cluster_bits)
    return full if data_bytes is None else start + data_bytes, full
