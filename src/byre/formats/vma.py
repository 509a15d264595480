"""vma: backup archives of Proxmox virtual machines, read-only; one of the disks inside is shown.

Specification: pve-qemu-kvm, ``vma_spec.txt``. A header with the configuration of the machine and a list of its disks,
then extents: 512 bytes that name up to 59 clusters of 64 KiB, and those 4 KiB blocks of them that are not zero. Which
extent holds what is found out when the disk is first read, by a walk over all of them. All numbers are big-endian.
Option: ``device`` names the disk, the first one if left out.
"""

from __future__ import annotations

import struct

from ..errors import ImageError, NotFound
from ..io.extent import DATA, ZERO, Extent
from ..options import Option, OptionSet
from ..typing import TYPE_CHECKING, Final, NamedTuple
from .opening import read_exactly
from .readonly import ReadOnlyFormat, open_read_only

if TYPE_CHECKING:
    from array import array

    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest

__all__ = ["CHILDREN", "OPTIONS", "Device", "ExtentHeader", "Header", "VmaNode", "decode_extent_header",
           "decode_header", "encode_extent_header", "encode_header", "open_node"]  # fmt: skip

CHILDREN: Final = ("file",)
OPTIONS: Final = OptionSet(Option("device", "str", "Name of the disk that is shown"))

MAGIC: Final = b"VMA\0"
EXTENT_MAGIC: Final = b"VMAE"
FIXED_SIZE: Final = 12288
MAX_HEADER: Final = 16 << 20
EXTENT_SIZE: Final = 512
CLUSTERS: Final = 59
CLUSTER: Final = 65536
BLOCK: Final = 4096
MAX_EXTENTS: Final = 1 << 23
"""Extents of an archive; each takes 16 bytes of memory."""
MAX_INDEXED: Final = 1 << 22
"""Clusters whose places are kept, 14 bytes each; of a disk with more of them, only which extents to look at."""
_HEADERS_KEPT: Final = 256
_ROWS: Final = 2048
"""Clusters looked up at once."""


class Device(NamedTuple):
    """:ivar id: what extents call it; :ivar size: bytes"""

    id: int
    name: str
    size: int


class Header(NamedTuple):
    """:ivar time: of the backup, seconds since 1970; :ivar configs: (file name, content)"""

    uuid: bytes
    time: int
    size: int
    devices: tuple[Device, ...]
    configs: tuple[tuple[str, bytes], ...] = ()


def encode_header(header: Header) -> bytes:
    """The inverse of :func:`decode_header`; ``size`` is computed."""
    blobs, data = bytearray(b"\0"), bytearray(FIXED_SIZE)

    def keep(content: bytes) -> int:
        at = len(blobs)
        blobs.extend(struct.pack("<H", len(content)) + content)
        return at

    for index, (name, content) in enumerate(header.configs):
        struct.pack_into(">I", data, 2044 + 4 * index, keep(name.encode() + b"\0"))
        struct.pack_into(">I", data, 3068 + 4 * index, keep(content))
    for device in header.devices:
        struct.pack_into(">IIQ", data, 4096 + 32 * device.id, keep(device.name.encode() + b"\0"), 0, device.size)
    blobs.extend(bytes(-len(blobs) % 512))
    total = FIXED_SIZE + len(blobs)
    struct.pack_into(">4sI16sQ16x3I", data, 0, MAGIC, 1, header.uuid, header.time, FIXED_SIZE, len(blobs), total)
    return _with_digest(bytes(data + blobs), 32)


def _with_digest(data: bytes, at: int) -> bytes:
    return data[:at] + _digest(data, at) + data[at + 16 :]


def _digest(data: bytes | bytearray | memoryview, at: int) -> bytes:
    """MD5 of ``data`` with zeroes where the digest itself stands."""
    from hashlib import md5

    return md5(bytes(data[:at]) + bytes(16) + bytes(data[at + 16 :]), usedforsecurity=False).digest()


def header_length(data: bytes | bytearray | memoryview) -> int:
    """How long the whole header is, by its first 12 KiB.

    :raises ImageError: it is no such header
    """
    if len(data) < FIXED_SIZE:
        raise ImageError(f"the file has {len(data)} bytes, a vma header takes {FIXED_SIZE}")
    magic, version = struct.unpack_from(">4sI", data)
    if magic != MAGIC:
        raise ImageError(f"not a vma archive: it begins with {magic!r}")
    if version != 1:
        raise ImageError(f"the archive has version {version}; version 1 is known")
    at, length, size = struct.unpack_from(">3I", data, 48)
    if not FIXED_SIZE <= size <= MAX_HEADER or size % 512 or at < FIXED_SIZE or at + length > size:
        raise ImageError(f"the header has {size} bytes, of which {length} from {at:#x} hold names; allowed are "
                         f"{MAX_HEADER}")  # fmt: skip
    return int(size)


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:param data: the whole header, see :func:`header_length`

    :raises ImageError: it breaks the format
    """
    size = header_length(data)
    if len(data) != size:
        raise ImageError(f"a header of {len(data)} bytes says that it has {size}")
    if _digest(data, 32) != bytes(data[32:48]):
        raise ImageError("the checksum of the header is wrong")
    uuid, time = struct.unpack_from(">8x16sQ", data)
    at, length = struct.unpack_from(">2I", data, 48)
    blobs = bytes(data[at : at + length])
    devices, configs = [], []
    for index in range(256):
        name_at, bytes_long = struct.unpack_from(">I4xQ", data, 4096 + 32 * index)
        if name_at:
            if bytes_long >> 63:
                raise ImageError(f"device {index} has {bytes_long} bytes")
            devices.append(Device(index, _text(blobs, name_at), bytes_long))
        config_name, config = struct.unpack_from(">I1020xI", data, 2044 + 4 * index)
        if config_name and config:
            configs.append((_text(blobs, config_name), _blob(blobs, config)))
    return Header(uuid, time, size, tuple(devices), tuple(configs))


def _blob(blobs: bytes, at: int) -> bytes:
    # The one number that the specification does not say to be big-endian; writers have it the other way.
    length = int.from_bytes(blobs[at : at + 2], "little")
    if at + 2 + length > len(blobs):
        raise ImageError(f"a name of {length} bytes at {at:#x} does not fit the {len(blobs)} bytes of names")
    return blobs[at + 2 : at + 2 + length]


def _text(blobs: bytes, at: int) -> str:
    return _blob(blobs, at).partition(b"\0")[0].decode("utf-8", "replace")


class ExtentHeader(NamedTuple):
    """:ivar clusters: (device id, cluster number, mask of the blocks that are there) in the order of their data"""

    uuid: bytes
    clusters: tuple[tuple[int, int, int], ...]

    @property
    def block_count(self) -> int:
        return sum(mask.bit_count() for _, _, mask in self.clusters)


def encode_extent_header(header: ExtentHeader) -> bytes:
    """The inverse of :func:`decode_extent_header`."""
    data = struct.pack(">4sHH16s16x", EXTENT_MAGIC, 0, header.block_count, header.uuid)
    data += b"".join(struct.pack(">HBBI", mask, 0, device, number) for device, number, mask in header.clusters)
    return _with_digest(data.ljust(EXTENT_SIZE, b"\0"), 24)


_INFO = struct.Struct(">HxBI")


def decode_extent_header(data: bytes | bytearray | memoryview) -> ExtentHeader:
    """:param data: 512 bytes

    :raises ImageError: it breaks the format
    """
    if len(data) != EXTENT_SIZE or bytes(data[:4]) != EXTENT_MAGIC:
        raise ImageError(f"not an extent: it begins with {bytes(data[:4])!r}")
    if _digest(data, 24) != bytes(data[24:40]):
        raise ImageError("the checksum of the extent is wrong")
    (count,) = struct.unpack_from(">H", data, 6)
    rows = tuple(
        (device, number, mask) for mask, device, number in _INFO.iter_unpack(bytes(data[40:EXTENT_SIZE])) if device
    )
    header = ExtentHeader(bytes(data[8:24]), rows)
    if header.block_count != count:
        raise ImageError(f"the extent says that it has {count} blocks and lists {header.block_count}")
    return header


class _Index(NamedTuple):
    """Clusters of the disk: their numbers, where their blocks lie, which blocks there are."""

    numbers: array[int]
    hosts: array[int]
    masks: array[int]

    def sorted(self) -> _Index:
        """By number; what came later in the archive stays behind what came before."""
        from array import array

        import numpy as np

        order = np.argsort(np.frombuffer(self.numbers, np.uint32), kind="stable")
        return _Index(array("I", np.frombuffer(self.numbers, np.uint32)[order].tobytes()),
                      array("Q", np.frombuffer(self.hosts, np.uint64)[order].tobytes()),
                      array("H", np.frombuffer(self.masks, np.uint16)[order].tobytes()))  # fmt: skip

    def between(self, first: int, last: int) -> dict[int, tuple[int, int]]:
        """(place, mask) of the clusters from ``first`` to ``last`` that there are."""
        from bisect import bisect_left, bisect_right

        begin, end = bisect_left(self.numbers, first), bisect_right(self.numbers, last)
        places = zip(self.hosts[begin:end], self.masks[begin:end], strict=True)
        return dict(zip(self.numbers[begin:end], places, strict=True))


# -- the node -------------------------------------------------------------------------------------


def open_node(request: OpenRequest) -> Node:
    """The node of an existing archive; only its header is read.

    :raises ImageError: the header breaks the format
    :raises NotFound: it holds no such disk
    :raises NotSupported: it is to be written
    """
    wanted = request.options.text("device")
    return open_read_only(request, lambda file, flags: VmaNode(file, flags, wanted))


class VmaNode(ReadOnlyFormat):
    """An open archive. Guarded by ``lock``: the list of extents, the headers in memory.

    :raises ImageError: the header breaks the format
    :raises NotFound: it holds no such disk
    """

    driver = "vma"

    def __init__(self, file: Node, flags: OpenFlags, wanted: str | None) -> None:
        super().__init__(file, flags)
        fixed = read_exactly(file, 0, FIXED_SIZE, "header")
        self.header = decode_header(read_exactly(file, 0, header_length(fixed), "header"))
        self.device = self._choose(wanted)
        self.cluster_size, self.zero_unit = CLUSTER, BLOCK
        self._size = self.device.size
        self._extents: tuple[array[int], array[int], array[int]] | None = None
        self._index: _Index | None = None
        self._headers: dict[int, ExtentHeader] = {}

    def _choose(self, wanted: str | None) -> Device:
        disks = [device for device in self.header.devices if device.name != "vmstate" or wanted == "vmstate"]
        found = [device for device in disks if wanted in (None, device.name)]
        if not found:
            names = ", ".join(device.name for device in self.header.devices) or "none"
            raise NotFound(f"the archive holds no disk {wanted!r}; there are: {names}" if wanted
                           else "the archive holds no disk", where=self.filename)  # fmt: skip
        return found[0]

    # -- which extent holds what ------------------------------------------------------------------

    def _walk(self) -> tuple[array[int], array[int], array[int]]:
        """(offset, first cluster, last cluster) of the extents that hold something of the disk."""
        if self._extents is not None:
            return self._extents
        from array import array

        offsets, lows, highs = array("Q"), array("I"), array("I")
        index: _Index | None = _Index(array("I"), array("Q"), array("H"))
        at, size, count = self.header.size, self.file.size, 0
        while at < size:
            header = self._extent(at)
            mine = self._places(header, at)
            if mine:
                offsets.append(at)
                lows.append(min(mine)[0])
                highs.append(max(mine)[0])
            if index is not None:
                for number, host, mask in mine:
                    index.numbers.append(number)
                    index.hosts.append(host)
                    index.masks.append(mask)
                if len(index.numbers) > MAX_INDEXED:
                    index = None
            at += EXTENT_SIZE + header.block_count * BLOCK
            count += 1
            if count > MAX_EXTENTS:
                raise ImageError(f"the archive has more than {MAX_EXTENTS} extents", where=self.filename)
        if at > size:
            raise ImageError(f"the last extent ends at {at:#x}, past the end of the file ({size:#x})",
                             where=self.filename)  # fmt: skip
        self._index = index.sorted() if index is not None else None
        self._extents = offsets, lows, highs
        return self._extents

    def _places(self, header: ExtentHeader, at: int) -> list[tuple[int, int, int]]:
        """(number, where its blocks lie, mask) of the clusters of the disk in the extent at ``at``."""
        host, found = at + EXTENT_SIZE, []
        for device, number, mask in header.clusters:
            if device == self.device.id:
                found.append((number, host, mask))
            host += mask.bit_count() * BLOCK
        return found

    def _extent(self, at: int) -> ExtentHeader:
        found = self._headers.get(at)
        if found is None:
            try:
                found = decode_extent_header(read_exactly(self.file, at, EXTENT_SIZE, "extent"))
                if found.uuid != self.header.uuid:
                    raise ImageError("it belongs to another archive")
            except ImageError as error:
                raise ImageError(f"extent at {at:#x}: {error.message}", where=self.filename) from None
            if len(self._headers) >= _HEADERS_KEPT:
                del self._headers[next(iter(self._headers))]
            self._headers[at] = found
        return found

    def _clusters(self, first: int, last: int) -> dict[int, tuple[int, int]]:
        """(where its blocks lie, mask) of those clusters from ``first`` to ``last`` that are in the archive."""
        import numpy as np

        offsets, lows, highs = self._walk()
        if self._index is not None:
            return self._index.between(first, last)
        result: dict[int, tuple[int, int]] = {}
        hits = np.nonzero((np.frombuffer(lows, np.uint32) <= last) & (np.frombuffer(highs, np.uint32) >= first))[0]
        for hit in hits.tolist():
            for number, host, mask in self._places(self._extent(offsets[hit]), offsets[hit]):
                if first <= number <= last:
                    result[number] = host, mask
        return result

    # -- lookup -----------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> list[Extent]:
        first = offset // CLUSTER
        end = min(offset + length, (first + _ROWS) * CLUSTER)
        found = self._clusters(first, (end - 1) // CLUSTER)
        rows: list[Extent] = []
        while offset < end:
            number = offset // CLUSTER
            stop = min(end, (number + 1) * CLUSTER)
            host, mask = found.get(number, (0, 0))
            rows += _blocks(host, mask, offset, stop)
            offset = stop
        return rows

    def format_info(self) -> dict[str, object]:
        """The archive, and the disks in it."""
        import uuid

        return {
            "uuid": str(uuid.UUID(bytes=self.header.uuid)),
            "time": self.header.time,
            "device": self.device.name,
            "devices": [{"name": device.name, "size": device.size} for device in self.header.devices],
            "configurations": [name for name, _ in self.header.configs],
        }


def _blocks(host: int, mask: int, offset: int, end: int) -> list[Extent]:
    """The extents of one cluster from ``offset`` to ``end``; its blocks from ``host`` are those set in ``mask``."""
    rows: list[Extent] = []
    while offset < end:
        block = offset % CLUSTER // BLOCK
        rest = mask >> block
        present = rest & 1
        # The lowest bit that is different, 16 blocks being a cluster.
        other = ~rest & (rest + 1) if present else (rest & -rest) or 1 << 16 - block
        stop = min(end, (offset // BLOCK + other.bit_length() - 1) * BLOCK)
        if present:
            place = host + (mask & ((1 << block) - 1)).bit_count() * BLOCK + offset % BLOCK
            rows.append(Extent(offset, stop - offset, DATA, place))
        else:
            rows.append(Extent(offset, stop - offset, ZERO))
        offset = stop
    return rows
