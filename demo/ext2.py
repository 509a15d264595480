"""A small ext2 file system writer and reader, so that the demo needs no ``mkfs`` and no ``mount``.

It formats a device and adds, rewrites, removes and reads files on it; the device is anything with ``read`` and
``write``, here a partition inside a byre image. Revision 1 with ``filetype`` and ``sparse_super``, 4 KiB blocks,
256-byte inodes; direct, indirect and double indirect blocks. ``fsck.ext4`` and the Linux driver accept the result.
The structures follow "The Second Extended File System: internal layout" (Dave Poirier).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Device", "Ext2", "FileSystemError"]

BLOCK = 4096
BLOCKS_PER_GROUP = 8 * BLOCK
INODE_SIZE = 256
BYTES_PER_INODE = 16384
ROOT = 2
FIRST_FREE_INODE = 11
DIRECT = 12
POINTERS = BLOCK // 4

MODE_FILE, MODE_DIRECTORY, MODE_SYMLINK = 0o100000, 0o040000, 0o120000
TYPE_FILE, TYPE_DIRECTORY, TYPE_SYMLINK = 1, 2, 7

# The superblock's fields that are not zero here: byte offset and format.
SUPERBLOCK = {
    "inode_count": (0, "<I"), "block_count": (4, "<I"), "reserved_blocks": (8, "<I"), "free_blocks": (12, "<I"),
    "free_inodes": (16, "<I"), "log_block_size": (24, "<I"), "log_fragment_size": (28, "<I"),
    "blocks_per_group": (32, "<I"), "fragments_per_group": (36, "<I"), "inodes_per_group": (40, "<I"),
    "write_time": (48, "<I"), "max_mounts": (54, "<H"), "magic": (56, "<H"), "state": (58, "<H"),
    "on_error": (60, "<H"), "last_check": (64, "<I"), "revision": (76, "<I"), "first_inode": (84, "<I"),
    "inode_size": (88, "<H"), "incompatible": (96, "<I"), "read_only_compatible": (100, "<I"), "uuid": (104, "16s"),
    "label": (120, "16s"), "made": (264, "<I"),
}  # fmt: skip
MAGIC = 0xEF53
INCOMPATIBLE_FILETYPE = 0x2
READ_ONLY_SPARSE_SUPER = 0x1

_GROUP = struct.Struct("<3I3H14x")
_INODE = struct.Struct("<2H5I2H3I60s3I16xH126x")
_ENTRY = struct.Struct("<IHBB")


class FileSystemError(Exception):
    """The file system is full, a name does not exist, or the device holds no ext2 of this kind."""


class Device(Protocol):
    """Where the file system lies; offsets and lengths in bytes."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> object: ...


class Inode(NamedTuple):
    """The fields of an inode that are used here.

    :ivar sectors: space taken, in units of 512 bytes, indirect blocks included
    :ivar block: fifteen block numbers, or the text of a short symbolic link
    """

    mode: int
    links: int
    size: int
    sectors: int
    time: int
    block: bytes

    def encode(self) -> bytes:
        times = (self.time, self.time, self.time, 0)
        return _INODE.pack(self.mode, 0, self.size, *times, 0, self.links, self.sectors, 0, 0, self.block, 0, 0, 0, 32)

    @classmethod
    def decode(cls, raw: bytes) -> Inode:
        field = _INODE.unpack(raw)
        return cls(mode=field[0], links=field[8], size=field[2], sectors=field[9], time=field[5], block=field[12])

    @property
    def is_directory(self) -> bool:
        return self.mode & 0o170000 == MODE_DIRECTORY


class Entry(NamedTuple):
    """One name in a directory; ``offset`` is where its record lies in the directory's bytes."""

    offset: int
    inode: int
    length: int
    type: int
    name: str


class Ext2:
    """An ext2 file system on ``device``. Call :meth:`sync` when done: bitmaps and counts are kept in memory."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._superblock = bytearray(device.read(1024, 1024))
        if (self._field("magic"), self._field("log_block_size"), self._field("inode_size")) != (MAGIC, 2, INODE_SIZE):
            raise FileSystemError("the device holds no ext2 file system with 4 KiB blocks and 256-byte inodes")
        self.block_count = self._field("block_count")
        self.inodes_per_group = self._field("inodes_per_group")
        self.now = self._field("write_time")
        count = -(-self.block_count // BLOCKS_PER_GROUP)
        table = device.read(BLOCK, count * _GROUP.size)
        self._groups = [list(_GROUP.unpack_from(table, index * _GROUP.size)) for index in range(count)]
        self._used_blocks = self._load_bits(0, BLOCKS_PER_GROUP)
        self._used_inodes = self._load_bits(1, self.inodes_per_group)
        self._inodes: dict[int, Inode] = {}
        # New blocks come after all others while there is room there; holes are filled later.
        self._last_block = int(np.flatnonzero(self._used_blocks[: self.block_count])[-1])

    @classmethod
    def format(cls, device: Device, size: int, *, label: str, uuid: bytes, now: int) -> Ext2:
        """Make an empty file system of ``size`` bytes on a device that reads as zeroes.

        :param uuid: 16 bytes
        :param now: seconds since 1970, used for every time stamp
        """
        block_count = size // BLOCK
        group_count = -(-block_count // BLOCKS_PER_GROUP)
        inodes_per_block = BLOCK // INODE_SIZE
        inodes_per_group = -(-size // BYTES_PER_INODE // group_count // inodes_per_block) * inodes_per_block
        groups = []
        for index in range(group_count):
            start = index * BLOCKS_PER_GROUP
            end = min(start + BLOCKS_PER_GROUP, block_count)
            bitmap = start + (2 if _has_superblock(index) else 0)
            first_data = bitmap + 2 + inodes_per_group // inodes_per_block
            if first_data >= end:
                raise FileSystemError(f"{size} bytes leave no room for data in block group {index}")
            groups.append((bitmap, bitmap + 1, bitmap + 2, end - first_data, inodes_per_group, 0))
            # Bits past the end of the group are set, so that nobody allocates them.
            blocks = np.zeros(8 * BLOCK, bool)
            blocks[: first_data - start] = True
            blocks[end - start :] = True
            device.write(bitmap * BLOCK, _pack(blocks))
            inodes = np.ones(8 * BLOCK, bool)
            inodes[:inodes_per_group] = False
            device.write((bitmap + 1) * BLOCK, _pack(inodes))
        superblock = _superblock(
            inode_count=inodes_per_group * group_count, free_inodes=inodes_per_group * group_count,
            block_count=block_count, free_blocks=sum(group[3] for group in groups), reserved_blocks=block_count // 20,
            log_block_size=2, log_fragment_size=2, blocks_per_group=BLOCKS_PER_GROUP,
            fragments_per_group=BLOCKS_PER_GROUP, inodes_per_group=inodes_per_group, write_time=now, last_check=now,
            made=now, max_mounts=0xFFFF, magic=MAGIC, state=1, on_error=1, revision=1, first_inode=FIRST_FREE_INODE,
            inode_size=INODE_SIZE, incompatible=INCOMPATIBLE_FILETYPE, read_only_compatible=READ_ONLY_SPARSE_SUPER,
            uuid=uuid, label=label.encode()[:16],
        )  # fmt: skip
        descriptors = b"".join(_GROUP.pack(*group) for group in groups)
        for index in range(group_count):
            if _has_superblock(index):
                start = index * BLOCKS_PER_GROUP * BLOCK
                struct.pack_into("<H", superblock, 90, index)
                device.write(start + (0 if index else 1024), bytes(superblock))
                device.write(start + BLOCK, descriptors)
        system = cls(device)
        system._used_inodes[: FIRST_FREE_INODE - 1] = True
        system._groups[0][4] -= FIRST_FREE_INODE - 1
        system._new_directory(ROOT, ROOT, 0o755)
        system.make_directory("/lost+found", 0o700)
        return system

    # -- what the demo does with it ---------------------------------------------------------------

    def make_directory(self, path: str, mode: int = 0o755) -> None:
        """Create an empty directory; its parents must exist."""
        parent, name = self._parent(path)
        number = self._new_inode()
        self._new_directory(number, parent, mode)
        self._link(parent, name, number, TYPE_DIRECTORY)
        above = self._inode(parent)
        self._store(parent, above._replace(links=above.links + 1))

    def make_directories(self, path: str) -> None:
        """Create ``path`` and whatever is missing above it."""
        done = ""
        for part in _parts(path):
            done = f"{done}/{part}"
            if not self.exists(done):
                self.make_directory(done)

    def write_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Create a file in an existing directory, or replace its content."""
        if self.exists(path):
            self.remove(path)
        parent, name = self._parent(path)
        number = self._new_inode()
        pointers, sectors = self._write_blocks(data)
        self._store(number, Inode(MODE_FILE | mode, 1, len(data), sectors, self.now, pointers))
        self._link(parent, name, number, TYPE_FILE)

    def make_symlink(self, path: str, target: str) -> None:
        """:param target: at most 59 bytes, kept in the inode"""
        text = target.encode()
        if len(text) >= 60:
            raise FileSystemError(f"the target of {path!r} is longer than 59 bytes")
        parent, name = self._parent(path)
        number = self._new_inode()
        self._store(number, Inode(MODE_SYMLINK | 0o777, 1, len(text), 0, self.now, text.ljust(60, b"\0")))
        self._link(parent, name, number, TYPE_SYMLINK)

    def rewrite(self, path: str, offset: int, data: bytes) -> None:
        """Overwrite part of a file in place; the range must lie inside it."""
        inode = self._inode(self._find(path))
        if offset + len(data) > inode.size:
            raise FileSystemError(f"{path!r} has {inode.size} bytes, cannot rewrite up to {offset + len(data)}")
        position = 0
        for start, length in self.runs(path):
            low, high = max(position, offset), min(position + length, offset + len(data))
            if low < high:
                self.device.write(start + low - position, data[low - offset : high - offset])
            position += length

    def remove(self, path: str) -> list[tuple[int, int]]:
        """Delete a file.

        :returns: the (offset, length) byte ranges of the device that became free
        """
        parent, name = self._parent(path)
        number = self._find(path)
        inode = self._inode(number)
        if inode.is_directory:
            raise FileSystemError(f"{path!r} is a directory")
        data, indirect = self._block_numbers(inode) if inode.sectors else ([], [])
        for block in (*data, *indirect):
            self._used_blocks[block] = False
            self._groups[block // BLOCKS_PER_GROUP][3] += 1
        self._used_inodes[number - 1] = False
        self._groups[(number - 1) // self.inodes_per_group][4] += 1
        # A deleted inode carries its time of deletion in the place of its links.
        raw = bytearray(inode._replace(links=0).encode())
        struct.pack_into("<I", raw, 20, self.now)
        self.device.write(self._inode_offset(number), bytes(raw))
        self._inodes.pop(number, None)
        self._unlink(parent, name)
        return list(_runs(sorted((*data, *indirect))))

    def read_file(self, path: str) -> bytes:
        """The content of a file, or of a directory."""
        return self._content(self._inode(self._find(path)))

    def runs(self, path: str) -> list[tuple[int, int]]:
        """Where a file's content lies: (offset, length) byte ranges of the device, in order of the file."""
        inode = self._inode(self._find(path))
        return list(_runs(self._block_numbers(inode)[0])) if inode.sectors else []

    def exists(self, path: str) -> bool:
        try:
            self._find(path)
        except FileSystemError:
            return False
        return True

    def files(self, path: str = "/") -> Iterator[str]:
        """The paths of all regular files below a directory."""
        for entry in list(self._entries(self._content(self._inode(self._find(path))))):
            below = f"{path.rstrip('/')}/{entry.name}"
            if entry.type == TYPE_DIRECTORY and entry.name not in (".", ".."):
                yield from self.files(below)
            elif entry.type == TYPE_FILE:
                yield below

    def sync(self) -> None:
        """Write bitmaps, group descriptors and the superblock's counts."""
        for index, group in enumerate(self._groups):
            start = index * BLOCKS_PER_GROUP
            self.device.write(group[0] * BLOCK, _pack(self._used_blocks[start : start + BLOCKS_PER_GROUP]))
            first = index * self.inodes_per_group
            inodes = np.ones(8 * BLOCK, bool)
            inodes[: self.inodes_per_group] = self._used_inodes[first : first + self.inodes_per_group]
            self.device.write(group[1] * BLOCK, _pack(inodes))
        self.device.write(BLOCK, b"".join(_GROUP.pack(*group) for group in self._groups))
        struct.pack_into("<I", self._superblock, 12, sum(group[3] for group in self._groups))
        struct.pack_into("<I", self._superblock, 16, sum(group[4] for group in self._groups))
        self.device.write(1024, bytes(self._superblock))

    # -- directories ------------------------------------------------------------------------------

    def _find(self, path: str) -> int:
        number = ROOT
        for part in _parts(path):
            inode = self._inode(number)
            if not inode.is_directory:
                raise FileSystemError(f"{path!r} does not exist: not a directory on the way")
            number = next((e.inode for e in self._entries(self._content(inode)) if e.name == part), 0)
            if number == 0:
                raise FileSystemError(f"{path!r} does not exist")
        return number

    def _parent(self, path: str) -> tuple[int, str]:
        *above, name = _parts(path)
        return self._find("/".join(above)), name

    @staticmethod
    def _entries(data: bytes) -> Iterator[Entry]:
        offset = 0
        while offset < len(data):
            inode, length, name_length, kind = _ENTRY.unpack_from(data, offset)
            name = data[offset + 8 : offset + 8 + name_length].decode(errors="replace")
            if inode:
                yield Entry(offset, inode, length, kind, name)
            offset += max(length, 8)

    def _new_directory(self, number: int, parent: int, mode: int) -> None:
        data = _entry(number, 12, ".", TYPE_DIRECTORY) + _entry(parent, BLOCK - 12, "..", TYPE_DIRECTORY)
        pointers, sectors = self._write_blocks(data)
        self._store(number, Inode(MODE_DIRECTORY | mode, 2, BLOCK, sectors, self.now, pointers))
        self._groups[(number - 1) // self.inodes_per_group][5] += 1

    def _link(self, directory: int, name: str, number: int, kind: int) -> None:
        """Add a name: in the slack behind an entry, or in a new block."""
        needed = _entry_size(name)
        inode = self._inode(directory)
        data = self._content(inode)
        for entry in self._entries(data):
            taken = _entry_size(entry.name)
            if entry.length - taken >= needed:
                both = _entry(entry.inode, taken, entry.name, entry.type)
                both += _entry(number, entry.length - taken, name, kind)
                self._patch(inode, entry.offset, both)
                return
        blocks, _ = self._block_numbers(inode)
        if len(blocks) == DIRECT:
            raise FileSystemError("a directory has more entries than its direct blocks hold")
        blocks += self._allocate(1)
        self.device.write(blocks[-1] * BLOCK, _entry(number, BLOCK, name, kind))
        pointers = struct.pack("<15I", *blocks, *[0] * (15 - len(blocks)))
        sectors = inode.sectors + BLOCK // 512
        self._store(directory, inode._replace(size=inode.size + BLOCK, sectors=sectors, block=pointers))

    def _unlink(self, directory: int, name: str) -> None:
        """Take a name away: the entry before it in the block swallows its record."""
        inode = self._inode(directory)
        before: Entry | None = None
        for entry in self._entries(self._content(inode)):
            if before is None or entry.offset // BLOCK != before.offset // BLOCK:
                before = None
            if entry.name == name:
                if before is None:
                    self._patch(inode, entry.offset, struct.pack("<I", 0))
                else:
                    self._patch(inode, before.offset + 4, struct.pack("<H", before.length + entry.length))
                return
            before = entry

    def _patch(self, inode: Inode, offset: int, data: bytes) -> None:
        """Write inside one block of a directory."""
        block = self._block_numbers(inode)[0][offset // BLOCK]
        self.device.write(block * BLOCK + offset % BLOCK, data)

    # -- inodes and blocks ------------------------------------------------------------------------

    def _inode_offset(self, number: int) -> int:
        group, index = divmod(number - 1, self.inodes_per_group)
        return self._groups[group][2] * BLOCK + index * INODE_SIZE

    def _inode(self, number: int) -> Inode:
        if number not in self._inodes:
            self._inodes[number] = Inode.decode(self.device.read(self._inode_offset(number), INODE_SIZE))
        return self._inodes[number]

    def _store(self, number: int, inode: Inode) -> None:
        self._inodes[number] = inode
        self.device.write(self._inode_offset(number), inode.encode())

    def _new_inode(self) -> int:
        free = np.flatnonzero(~self._used_inodes)
        if len(free) == 0:
            raise FileSystemError("no inode is free")
        index = int(free[0])
        self._used_inodes[index] = True
        self._groups[index // self.inodes_per_group][4] -= 1
        return index + 1

    def _content(self, inode: Inode) -> bytes:
        if not inode.sectors:
            return inode.block[: inode.size]
        runs = _runs(self._block_numbers(inode)[0])
        return b"".join(self.device.read(*run) for run in runs)[: inode.size]

    def _allocate(self, count: int) -> list[int]:
        """Free blocks, ascending, after the last ones given out if there is room."""
        free = np.flatnonzero(~self._used_blocks[self._last_block :]) + self._last_block
        if len(free) < count:
            free = np.flatnonzero(~self._used_blocks)
        if len(free) < count:
            raise FileSystemError(f"{count} blocks are needed, {len(free)} are free")
        blocks = [int(block) for block in free[:count]]
        self._used_blocks[blocks] = True
        for block in blocks:
            self._groups[block // BLOCKS_PER_GROUP][3] -= 1
        self._last_block = blocks[-1] if blocks else self._last_block
        return blocks

    def _write_blocks(self, data: bytes) -> tuple[bytes, int]:
        """Store ``data`` in new blocks; the fifteen block numbers of its inode, and its size in sectors."""
        blocks = self._allocate(-(-len(data) // BLOCK))
        padded = data.ljust(len(blocks) * BLOCK, b"\0")
        position = 0
        for start, length in _runs(blocks):
            self.device.write(start, padded[position : position + length])
            position += length
        top = blocks[:DIRECT] + [0] * (DIRECT - len(blocks))
        single, double = blocks[DIRECT : DIRECT + POINTERS], blocks[DIRECT + POINTERS :]
        extra = 0
        for group, depth in ((single, 1), (double, 2)):
            number, used = self._write_pointers(group, depth) if group else (0, 0)
            top.append(number)
            extra += used
        return struct.pack("<15I", *top, 0), (len(blocks) + extra) * (BLOCK // 512)

    def _write_pointers(self, blocks: list[int], depth: int) -> tuple[int, int]:
        """Store block numbers in indirect blocks; the number of the top one, and how many were taken."""
        used = 0
        if depth == 2:
            if len(blocks) > POINTERS * POINTERS:
                raise FileSystemError("a file is larger than double indirect blocks reach")
            parts = [blocks[at : at + POINTERS] for at in range(0, len(blocks), POINTERS)]
            blocks = []
            for part in parts:
                number, below = self._write_pointers(part, 1)
                blocks.append(number)
                used += below
        (number,) = self._allocate(1)
        self.device.write(number * BLOCK, struct.pack(f"<{len(blocks)}I", *blocks).ljust(BLOCK, b"\0"))
        return number, used + 1

    def _block_numbers(self, inode: Inode) -> tuple[list[int], list[int]]:
        """(blocks of the content in order, indirect blocks)."""
        pointers = struct.unpack("<15I", inode.block)
        count = -(-inode.size // BLOCK)
        blocks, indirect = list(pointers[:DIRECT]), []
        if pointers[12]:
            indirect.append(pointers[12])
            blocks += self._pointers(pointers[12])
        if pointers[13]:
            indirect.append(pointers[13])
            for number in filter(None, self._pointers(pointers[13])):
                indirect.append(number)
                blocks += self._pointers(number)
        return blocks[:count], indirect

    def _pointers(self, block: int) -> tuple[int, ...]:
        return struct.unpack(f"<{POINTERS}I", self.device.read(block * BLOCK, BLOCK))

    # -- superblock and bitmaps -------------------------------------------------------------------

    def _field(self, name: str) -> int:
        offset, form = SUPERBLOCK[name]
        return int(struct.unpack_from(form, self._superblock, offset)[0])

    def _load_bits(self, column: int, per_group: int) -> np.ndarray:
        """The block bitmap (column 0) or inode bitmap (column 1) of all groups, one bool for each."""
        parts = [np.frombuffer(self.device.read(group[column] * BLOCK, BLOCK), np.uint8) for group in self._groups]
        return np.concatenate([np.unpackbits(part, bitorder="little")[:per_group] for part in parts]).astype(bool)


def _superblock(**values: int | bytes) -> bytearray:
    raw = bytearray(1024)
    for name, value in values.items():
        offset, form = SUPERBLOCK[name]
        struct.pack_into(form, raw, offset, value)
    return raw


def _has_superblock(group: int) -> bool:
    """With ``sparse_super`` the groups 0, 1 and the powers of 3, 5 and 7 carry a copy."""
    if group < 2:
        return True
    return any(group == base**power for base in (3, 5, 7) for power in range(1, 20))


def _pack(bits: np.ndarray) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _entry_size(name: str) -> int:
    return 8 + -(-len(name.encode()) // 4) * 4


def _entry(inode: int, length: int, name: str, kind: int) -> bytes:
    text = name.encode()
    return (_ENTRY.pack(inode, length, len(text), kind) + text).ljust(length, b"\0")


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive block numbers joined to (offset, length) in bytes."""
    start = count = 0
    for block in blocks:
        if count and block == start + count:
            count += 1
            continue
        if count:
            yield start * BLOCK, count * BLOCK
        start, count = block, 1
    if count:
        yield start * BLOCK, count * BLOCK
