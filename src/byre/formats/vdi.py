"""vdi: VirtualBox disk images, version 1.1: dynamic, static, and differencing ones (which are only read).

There is no formal specification; the fields are those that VirtualBox writes. A header of 512 bytes, a map of 32-bit
block numbers, then the blocks. A differencing image names its parent by UUID alone; it is looked for beside the image,
and above it where the image lies in a folder "Snapshots". Not supported: version 1.0, undo images, extra bytes before
each block.
"""

from __future__ import annotations

import os
import struct

from ..errors import ByreError, ImageError, InvalidArgument, NotFound, NotSupported, from_oserror
from ..graph.graph import Graph
from ..graph.opening import Opener, OpenFlags, has_protocol
from ..io.extent import UNALLOCATED, ZERO
from ..options import Option, OptionSet
from ..typing import TYPE_CHECKING, Final, NamedTuple
from ..units import MIB, SECTOR, align_up
from .flatmap import EntryCode, FlatMap
from .mapped import MappedNode
from .opening import check_size, fit_flags, read_head
from .space import Space

if TYPE_CHECKING:
    from ..graph.creating import CreateRequest
    from ..graph.node import Node
    from ..graph.opening import OpenRequest
    from ..jobs.job import Control
    from ..options import OptionValues
    from .abilities import CheckResult

__all__ = ["CHILDREN", "CREATE_OPTIONS", "CREATE_PRINT_ORDER", "OPTIONS", "Header", "VdiNode", "check_create",
           "create", "decode_header", "encode_header", "measure", "measure_unit", "open_node"]  # fmt: skip

CHILDREN: Final = ("file", "backing")
OPTIONS: Final = OptionSet()
CREATE_OPTIONS: Final = OptionSet(
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("preallocation", "enum", "Preallocation mode (allowed values: off, metadata)", None, ("off", "metadata")),
    Option("size", "size", "Virtual disk size"),
    Option("static", "bool", "VDI static (pre-allocated) image", False),
)
CREATE_PRINT_ORDER: Final = ("size", "static", "preallocation", "nocow", "extent_size_hint")

SIGNATURE: Final = 0xBEDA107F
VERSION: Final = 0x10001
DYNAMIC, STATIC, DIFFERENCING = 1, 2, 4
ABSENT: Final = 0xFFFFFFFF
"""A block never written: what the parent has, zeroes without one."""
DISCARDED: Final = 0xFFFFFFFE
"""A block that reads as zeroes."""
HEADER_SIZE: Final = 512
BLOCK_SIZE: Final = MIB
"""Of new images; other programs know no other."""
MAX_BLOCK_SIZE: Final = 256 * MIB
MAX_MAP: Final = 32 * MIB
MAX_CANDIDATES: Final = 1000
"""Files looked at for a parent, in all folders together."""
NO_UUID: Final = bytes(16)

_WINDOW: Final = 1 << 18
_MESSAGES: Final = 100
"""Of each kind, that ``check`` gives."""

_FORMAT: Final = struct.Struct("<64s5I256s7IQ4I16s16s16s16s56s")
_DISK_SIZE_AT: Final = 368
_BLOCKS_AT: Final = 384
_ALLOCATED_AT: Final = 388
_TEXT: Final = b"<<< byre VirtualBox Disk Image >>>\n"


class Header(NamedTuple):
    """The fields in their order on disk; offsets and sizes are bytes, UUIDs as stored (little-endian fields)."""

    text: bytes = _TEXT.ljust(64, b"\0")
    signature: int = SIGNATURE
    version: int = VERSION
    header_size: int = 0x180
    image_type: int = DYNAMIC
    flags: int = 0
    description: bytes = bytes(256)
    map_offset: int = HEADER_SIZE
    data_offset: int = MIB
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    sector_size: int = SECTOR
    unused: int = 0
    disk_size: int = 0
    block_size: int = BLOCK_SIZE
    block_extra: int = 0
    block_count: int = 0
    allocated_count: int = 0
    uuid: bytes = NO_UUID
    modification_uuid: bytes = NO_UUID
    parent_uuid: bytes = NO_UUID
    parent_modification_uuid: bytes = NO_UUID
    rest: bytes = bytes(56)


def encode_header(header: Header) -> bytes:
    """The inverse of :func:`decode_header`."""
    return _FORMAT.pack(*header)


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:raises ImageError: it breaks the format, or goes beyond what is supported"""
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the file has {len(data)} bytes, a VDI header takes {HEADER_SIZE}")
    header = Header._make(_FORMAT.unpack_from(data))
    if header.signature != SIGNATURE:
        raise ImageError(f"not a VDI image: the signature is {header.signature:#010x}, expected {SIGNATURE:#010x}")
    if header.version != VERSION:
        raise _unsupported(f"the image has version {header.version >> 16}.{header.version & 0xFFFF}, known is 1.1")
    differs = header.parent_uuid != NO_UUID
    if header.image_type not in (DYNAMIC, STATIC, DIFFERENCING) or (header.image_type == DIFFERENCING) != differs:
        raise _unsupported(f"the image is of type {header.image_type} {'with' if differs else 'without'} a parent; "
                           "known are dynamic (1) and static (2) ones without, differencing (4) ones with")  # fmt: skip
    if header.sector_size != SECTOR or header.block_extra:
        raise _unsupported(f"sectors of {header.sector_size} bytes, {header.block_extra} extra bytes before each "
                           "block; known are 512 and 0")  # fmt: skip
    size = header.block_size
    if not SECTOR <= size <= MAX_BLOCK_SIZE or size & (size - 1):
        raise ImageError(f"the block size is {size}: expected a power of two from {SECTOR} to {MAX_BLOCK_SIZE}")
    _check_places(header)
    return header


def _unsupported(message: str) -> ImageError:
    return ImageError(message, errno=NotSupported.default_errno)


def _check_places(header: Header) -> None:
    if 4 * header.block_count > MAX_MAP:
        raise ImageError(f"the block map takes {4 * header.block_count} bytes, allowed are {MAX_MAP}")
    if header.map_offset % SECTOR or header.data_offset % SECTOR or header.map_offset < HEADER_SIZE:
        raise ImageError(f"the block map begins at {header.map_offset:#x} and the data at {header.data_offset:#x}: "
                         "expected multiples of 512 behind the header")  # fmt: skip
    if header.data_offset < header.map_offset + 4 * header.block_count:
        raise ImageError(f"the data begin at {header.data_offset:#x}, inside the block map at {header.map_offset:#x}")
    room = header.block_count * header.block_size
    if header.disk_size > room:
        raise ImageError(f"the disk size is {header.disk_size}, but the block map has room for {room} bytes")


# -- opening --------------------------------------------------------------------------------------


def open_node(request: OpenRequest) -> VdiNode:
    """The node of an existing image; a differencing one has its parent attached by the opener.

    :raises ImageError: the header breaks the format
    :raises NotFound: the parent is nowhere to be found
    """
    file = request.open_child("file")
    try:
        header = decode_header(read_head(file, HEADER_SIZE))
        if header.map_offset + 4 * header.block_count > file.size:
            raise ImageError(f"the block map ends at {header.map_offset + 4 * header.block_count:#x}, past the end of "
                             f"the file ({file.size:#x})")  # fmt: skip
        check_size(request, header.disk_size)
    except ImageError as error:
        error.where = error.where or file.filename
        raise
    reason = "differencing VDI images can only be read" if header.image_type == DIFFERENCING else ""
    flags = fit_flags(request, file, reason)
    node = VdiNode(request, file, header, flags)
    node.attach(request)
    if not flags.no_io:
        node.load()
    if header.image_type == DIFFERENCING and not (flags.no_backing or "backing" in request.children):
        node.backing_name = _find_parent(request, node.filename, header)
        node.backing_format = "vdi"
    return node


def uuid_text(raw: bytes) -> str:
    first, second, third = struct.unpack_from("<IHH", raw)
    return f"{first:08x}-{second:04x}-{third:04x}-{raw[8:10].hex()}-{raw[10:].hex()}"


def _find_parent(request: OpenRequest, filename: str, header: Header) -> str:
    """The path of the image whose UUID is ``header.parent_uuid``, relative to the folder of ``filename``.

    :raises NotFound: there is none
    :raises AccessDenied: the image may not name other files
    """
    wanted = uuid_text(header.parent_uuid)
    policy = request.opener.policy
    # Asked before anything is looked at: an image that nobody vouches for has no files searched either.
    policy.check(wanted, None if has_protocol(filename) else filename, "parent image", filename)
    own = os.path.realpath(filename)
    candidates = _candidates(os.path.dirname(filename))
    for path in candidates[:MAX_CANDIDATES]:
        if os.path.realpath(path) == own:
            continue
        found = _header_of(request, path)
        if found is None or found.uuid != header.parent_uuid:
            continue
        policy.check(path, path, "parent image", filename)
        if found.modification_uuid != header.parent_modification_uuid:
            request.opener.graph.warnings.append(
                f"{filename}: its parent {path} was changed after this image was made; it may read as neither"
            )
        return os.path.relpath(path, os.path.dirname(filename) or ".")
    raise NotFound(f"the parent of this differencing image, with UUID {wanted}, is not in its folder",
                   where=filename, hint="name it with backing.driver=vdi,backing.file.filename=...")  # fmt: skip


def _candidates(folder: str) -> list[str]:
    """VDI files beside the image; above them where they are snapshots, as VirtualBox has it."""
    folders = [folder]
    if os.path.basename(os.path.abspath(folder or ".")) == "Snapshots":
        folders.append(os.path.join(folder, ".."))
    found: list[str] = []
    for place in folders:
        try:
            with os.scandir(place or ".") as entries:
                names = sorted(entry.name for entry in entries
                               if entry.name.lower().endswith(".vdi") and entry.is_file())  # fmt: skip
        except OSError as error:
            raise from_oserror(error, "cannot look for the parent image", place) from None
        found += [os.path.join(place, name) for name in names]
    return found


def _header_of(request: OpenRequest, path: str) -> Header | None:
    """The header of a file, ``None`` if it is no VDI image that can be read."""
    graph = Graph()
    flags = OpenFlags(force_share=True, no_backing=True)
    try:
        node = Opener(graph, request.opener.policy).open(
            {"driver": "file", "filename": path}, flags, protocol=True, implicit=True
        )
    except ByreError:
        return None
    try:
        return decode_header(read_head(node, HEADER_SIZE))
    except ByreError:
        return None
    finally:
        graph.release(node)


class VdiNode(MappedNode):
    """An open image. Guarded by ``lock``: the map, ``header``."""

    driver = "vdi"
    dirty = False

    def __init__(self, request: OpenRequest, file: Node, header: Header, flags: OpenFlags) -> None:
        super().__init__(request, file, flags)
        self.header = header
        self.cluster_size = self.zero_unit = header.block_size
        self._size = align_up(header.disk_size, SECTOR)
        self.map: FlatMap = FlatMap(
            file, header.map_offset, header.block_count,
            EntryCode(header.data_offset, header.block_size, ABSENT, DISCARDED),
            Space(header.data_offset, header.block_size, header.data_offset), what="block map entry",
            hole=UNALLOCATED if header.image_type == DIFFERENCING else ZERO, before_table=self._count_blocks,
        )  # fmt: skip

    def load(self) -> None:
        """The map, and from it which blocks are free.

        :raises ImageError: it lies beyond the end of the file
        """
        import numpy as np

        header, found = self.header, self.map
        found.load()
        stored = -(-max(self.file.size - header.data_offset, 0) // header.block_size)
        limit = max(stored, min(header.allocated_count, header.block_count))
        used = np.frombuffer(found.entries, np.uint32)
        used = used[used < limit]
        count = max(int(used.max()) + 1 if len(used) else 0, min(header.allocated_count, header.block_count))
        space = Space(header.data_offset, header.block_size, header.data_offset + count * header.block_size)
        space.clean = max(space.clean, self.file.size)
        if not self.read_only:
            # What a crash left behind is used first, for the map has no other place for it.
            used = np.sort(used)
            space.use_gaps(used[at : at + _WINDOW].astype(np.int64) for at in range(0, len(used), _WINDOW))
        found.space = space

    def _count_blocks(self) -> None:
        """The header counts blocks before the map names them, so that no program gives them away twice."""
        count = (self.map.space.end - self.header.data_offset) // self.header.block_size
        if count != self.header.allocated_count:
            self.header = self.header._replace(allocated_count=count)
            self.file.write_from(_ALLOCATED_AT, memoryview(count.to_bytes(4, "little")))
            self.file.flush()

    # -- abilities --------------------------------------------------------------------------------

    def has_holes(self) -> bool:
        return self.header.image_type == STATIC

    def format_info(self) -> dict[str, object]:
        """The parent of a differencing image; empty for others."""
        if self.header.image_type != DIFFERENCING:
            return {}
        return {"uuid": uuid_text(self.header.uuid), "parent-uuid": uuid_text(self.header.parent_uuid)}

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        """Grow, as far as there is room for a longer map before the data.

        :raises NotSupported: to shrink, or beyond that room
        """
        self.check_writable("resize")
        header = self.header
        if preallocation != "off":
            raise NotSupported(f"preallocation mode {preallocation!r} is not supported for VDI", where=self.filename)
        if size < self._size:
            raise NotSupported("VDI images cannot shrink", where=self.filename)
        count = max(-(-size // header.block_size), header.block_count)
        room = min(header.data_offset - header.map_offset, MAX_MAP) // 4
        if count > room:
            raise NotSupported(f"the block map has room for {room} blocks, {room * header.block_size} bytes; {size} "
                               "were asked for", where=self.filename, hint="convert it to a new image")  # fmt: skip
        self.flush()
        with self.lock:
            self.check_failure()
            self.inflight.wait_all()
            self.guarded(lambda: self._grow(size, count))

    def _grow(self, size: int, count: int) -> None:
        """Map | header sector."""
        header, found = self.header, self.map
        added = count - header.block_count
        found.zero_tail(self._size)
        if header.image_type == STATIC:
            first = (found.space.end - header.data_offset) // header.block_size
            new = list(range(first, first + added))
            if added:
                found.space.append(added)
                self.file.resize(found.space.end, exact=False)
        else:
            new = [ABSENT] * added
        found.extend(new)
        allocated = (found.space.end - header.data_offset) // header.block_size
        self.header = header._replace(disk_size=size, block_count=count, allocated_count=allocated)
        # One sector: all of it or nothing.
        self.file.write_from(_DISK_SIZE_AT, memoryview(encode_header(self.header)[_DISK_SIZE_AT:HEADER_SIZE]))
        self.file.flush()
        self._size = align_up(size, SECTOR)

    def check(self, control: Control, fix: str = "") -> CheckResult:
        """Every block is used once and lies within the image; the header counts them."""
        return _check(self, fix)


def _check(node: VdiNode, fix: str) -> CheckResult:
    import numpy as np

    from .abilities import CheckResult

    with node.lock:
        node.check_failure()
        header = node.header
        entries = np.frombuffer(node.map.entries, np.uint32)
        messages: list[str] = []
        large = (entries < DISCARDED) & (entries >= header.block_count)
        for index in np.flatnonzero(large)[:_MESSAGES].tolist():
            messages.append(f"ERROR: block index {index} too large, is {entries[index]}")
        used = np.sort(entries[entries < header.block_count])
        again = np.append(False, used[1:] == used[:-1])[: len(used)]
        for block in np.unique(used[again])[:_MESSAGES].tolist():
            messages.append(f"ERROR: block {block} is used more than once")
        corruptions = int(large.sum()) + int(again.sum())
        used = used[~again]
        leaks = header.allocated_count - len(used)
        if leaks < 0 and not corruptions:
            messages.append(f"ERROR: allocated blocks mismatch, is {header.allocated_count}, should be {len(used)}")
        elif leaks > 0:
            messages.append(f"Leaked {leaks} blocks")
        result = CheckResult(corruptions + (leaks < 0), max(leaks, 0), messages=tuple(messages))
        if not fix or corruptions or not leaks:
            return result
        node.guarded(lambda: _recount(node, int(used[-1]) + 1 if len(used) else 0))
        left = node.header.allocated_count - len(used)
        return result._replace(corruptions=0, leaks=left, corruptions_fixed=result.corruptions,
                               leaks_fixed=max(leaks - left, 0))  # fmt: skip


def _recount(node: VdiNode, count: int) -> None:
    """Free blocks at the end are cut off; free ones between others are used first when the image is next written."""
    node.map.space.end = node.header.data_offset + count * node.header.block_size
    node._count_blocks()
    if node.file.size > node.map.space.end:
        node.file.resize(node.map.space.end, exact=False)


# -- creating -------------------------------------------------------------------------------------


def check_create(options: OptionValues) -> None:
    """Refuse what :func:`create` would refuse, before a file is touched."""
    _planned(options.number("size"))
    if options.flag("static") and options.text("preallocation") == "off":
        raise InvalidArgument("static=on and preallocation=off contradict each other")


def _planned(size: int) -> tuple[int, int]:
    """(blocks, where they begin). Aligned as VirtualBox has it, which leaves room for a longer map.

    :raises InvalidArgument: too large
    """
    most = MAX_MAP // 4 * BLOCK_SIZE
    if size > most:
        raise InvalidArgument(f"a size of {size} bytes is too large for VDI, allowed are {most}")
    blocks = -(-size // BLOCK_SIZE)
    return blocks, align_up(HEADER_SIZE + 4 * blocks, MIB)


def create(request: CreateRequest) -> None:
    """Write an image into ``request.file``: the map, then the header that makes it one."""
    options, file = request.options, request.file
    size = align_up(options.number("size"), SECTOR)
    blocks, data_offset = _planned(size)
    static = options.flag("static") or options.text("preallocation") == "metadata"
    header = Header(
        image_type=STATIC if static else DYNAMIC, data_offset=data_offset, disk_size=size, block_count=blocks,
        allocated_count=blocks if static else 0, uuid=_new_uuid(), modification_uuid=_new_uuid(),
    )  # fmt: skip
    _write_map(file, blocks, static=static)
    file.resize(data_offset + (blocks * BLOCK_SIZE if static else 0), exact=False)
    file.flush()
    file.write_from(0, memoryview(encode_header(header)))
    file.flush()


def _new_uuid() -> bytes:
    """A random UUID (version 4), as stored."""
    raw = bytearray(os.urandom(16))
    raw[7] = raw[7] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)


def _write_map(file: Node, blocks: int, *, static: bool) -> None:
    """In pieces of 1 MiB."""
    step = MIB // 4
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        part = struct.pack(f"<{count}I", *range(first, first + count)) if static else b"\xff" * (4 * count)
        file.write_from(HEADER_SIZE + 4 * first, memoryview(part))


def measure_unit(_options: OptionValues) -> int:
    """In which pieces data takes space, bytes."""
    return BLOCK_SIZE


def measure(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes."""
    blocks, data_offset = _planned(align_up(virtual_size, SECTOR))
    full = data_offset + blocks * BLOCK_SIZE
    static = options.flag("static") or options.text("preallocation") == "metadata"
    needed = full if static or data_bytes is None else data_offset + data_bytes
    return needed, full
