"""VHDX and VHD images forged byte by byte from their specifications, differencing ones and damaged ones as well.

Shares no code with byre, so that nothing byre refuses to write is out of reach.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KIB, MIB = 1 << 10, 1 << 20

BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
ITEMS = {
    "parameters": uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b"),
    "size": uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8"),
    "page83": uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746"),
    "logical": uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f"),
    "physical": uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556"),
    "locator": uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c"),
}
LOCATOR_TYPE = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULL, PARTIAL = 0, 1, 2, 3, 6, 7


_ROWS = [0] * 256
for _value in range(256):
    _row = _value
    for _ in range(8):
        _row = _row >> 1 ^ (0x82F63B78 if _row & 1 else 0)
    _ROWS[_value] = _row


def crc32c(data: bytes) -> int:
    """A byte at a time."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder = _ROWS[(remainder ^ byte) & 0xFF] ^ remainder >> 8
    return remainder ^ 0xFFFFFFFF


def seal(data: bytes) -> bytes:
    """With the checksum of VHDX structures at byte 4."""
    cleared = data[:4] + bytes(4) + data[8:]
    return cleared[:4] + struct.pack("<I", crc32c(cleared)) + cleared[8:]


class Block(NamedTuple):
    """One payload block.

    :ivar data: its content; for present states
    :ivar sectors: for PARTIAL: which logical sectors are here
    """

    state: int
    data: bytes = b""
    sectors: Sequence[bool] = ()


class Vhdx(NamedTuple):
    """A VHDX file to be made: ``Vhdx(...).build()``; sizes in bytes."""

    size: int = 4 * MIB
    blocks: Mapping[int, Block] = {}
    block_size: int = MIB
    logical: int = 512
    fixed: bool = False
    parent: Mapping[str, str] | None = None
    sequence: int = 5
    data_guid: uuid.UUID = uuid.UUID(int=0xDA7A)
    log_guid: uuid.UUID = uuid.UUID(int=0)
    log: bytes = b""
    log_length: int = MIB
    log_offset: int = MIB
    extra_regions: Sequence[bytes] = ()
    extra_items: Sequence[bytes] = ()

    @property
    def table_offset(self) -> int:
        return 2 * MIB

    @property
    def metadata_offset(self) -> int:
        return 3 * MIB

    @property
    def ratio(self) -> int:
        return (1 << 23) * self.logical // self.block_size

    def index(self, block: int) -> int:
        return block + block // self.ratio

    def header(self, sequence: int) -> bytes:
        body = struct.pack("<4sIQ16s16s16sHHIQ", b"head", 0, sequence, uuid.UUID(int=1).bytes_le,
                           self.data_guid.bytes_le, self.log_guid.bytes_le, 0, 1, self.log_length,
                           self.log_offset)  # fmt: skip
        return seal(body.ljust(4096, b"\0"))

    def region_table(self) -> bytes:
        rows = [
            struct.pack("<16sQII", BAT.bytes_le, self.table_offset, MIB, 1),
            struct.pack("<16sQII", METADATA.bytes_le, self.metadata_offset, MIB, 1),
            *self.extra_regions,
        ]
        head = struct.pack("<4sIII", b"regi", 0, len(rows), 0)
        return seal((head + b"".join(rows)).ljust(64 * KIB, b"\0"))

    def locator(self) -> bytes:
        pairs = [(key.encode("utf-16-le"), value.encode("utf-16-le")) for key, value in (self.parent or {}).items()]
        at = 20 + 12 * len(pairs)
        rows, texts = b"", b""
        for key, value in pairs:
            rows += struct.pack("<IIHH", at, at + len(key), len(key), len(value))
            texts += key + value
            at += len(key) + len(value)
        return LOCATOR_TYPE.bytes_le + struct.pack("<HH", 0, len(pairs)) + rows + texts

    def metadata(self) -> bytes:
        flags = self.fixed | (2 if self.parent is not None else 0)
        items = {
            "parameters": struct.pack("<II", self.block_size, flags),
            "size": struct.pack("<Q", self.size),
            "page83": uuid.UUID(int=83).bytes_le,
            "logical": struct.pack("<I", self.logical),
            "physical": struct.pack("<I", self.logical),
        }
        if self.parent is not None:
            items["locator"] = self.locator()
        rows, data = list(self.extra_items), b""
        for name, content in items.items():
            rows.append(struct.pack("<16sIIII", ITEMS[name].bytes_le, 64 * KIB + len(data), len(content), 4, 0))
            data += content
        head = struct.pack("<8sHH20x", b"metadata", 0, len(rows))
        return (head + b"".join(rows)).ljust(64 * KIB, b"\0") + data

    def build(self) -> bytes:
        """The file: headers, log, block table, metadata at 1, 2 and 3 MiB, then blocks and sector bitmaps."""
        content = bytearray(4 * MIB)
        table: dict[int, int] = {}
        bitmaps: dict[int, bytearray] = {}
        for number, block in self.blocks.items():
            entry = block.state
            if block.state in (FULL, PARTIAL):
                entry |= len(content)
                content += block.data.ljust(self.block_size, b"\0")
            table[self.index(number)] = entry
            if block.state == PARTIAL:
                chunk, inside = divmod(number, self.ratio)
                bits = bitmaps.setdefault(chunk, bytearray(MIB))
                first = inside * (self.block_size // self.logical)
                for sector, here in enumerate(block.sectors):
                    if here:
                        bits[(first + sector) // 8] |= 1 << (first + sector) % 8
        for chunk, bits in bitmaps.items():
            table[chunk * (self.ratio + 1) + self.ratio] = len(content) | FULL
            content += bits
        places = {
            0: b"vhdxfile",
            64 * KIB: self.header(self.sequence),
            128 * KIB: self.header(self.sequence + 1),
            192 * KIB: self.region_table(),
            256 * KIB: self.region_table(),
            MIB: self.log,
            self.metadata_offset: self.metadata(),
        }
        for at, data in places.items():
            content[at : at + len(data)] = data
        for index, entry in table.items():
            struct.pack_into("<Q", content, self.table_offset + 8 * index, entry)
        return bytes(content)


def log_entry(
    writes: Sequence[tuple[int, bytes | int]],
    sequence: int,
    guid: uuid.UUID,
    *,
    tail: int = 0,
    flushed: int = 4 * MIB,
    last: int = 4 * MIB,
) -> bytes:
    """An entry of the log: (file offset, 4096 bytes, or the length of a range of zeroes)."""
    descriptors, sectors = b"", b""
    for at, what in writes:
        if isinstance(what, int):
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, what, at, sequence)
        else:
            descriptors += b"desc" + what[-4:] + what[:8] + struct.pack("<QQ", at, sequence)
            high, low = struct.pack("<I", sequence >> 32), struct.pack("<I", sequence & 0xFFFFFFFF)
            sectors += b"data" + high + what[8:-4] + low
    rows = -(-(64 + len(descriptors)) // 4096) * 4096
    head = struct.pack("<4sIIIQII16sQQ", b"loge", 0, rows + len(sectors), tail, sequence, len(writes), 0,
                       guid.bytes_le, flushed, last)  # fmt: skip
    return seal((head + descriptors).ljust(rows, b"\0") + sectors)


# -- VHD ------------------------------------------------------------------------------------------


def sum_of(data: bytes) -> int:
    return ~sum(data) & 0xFFFFFFFF


def footer(
    size: int,
    kind: int = 3,
    *,
    unique: bytes = b"\1" * 16,
    application: bytes = b"win ",
    geometry: tuple[int, int, int] = (1, 1, 1),
    data_offset: int = 512,
    checksum: int | None = None,
) -> bytes:
    """A VHD footer."""
    parts = struct.pack(">8sIIQI4sI4sQQHBBI", b"conectix", 2, 0x10000, data_offset, 0, application, 0x10000, b"Wi2k",
                        size, size, *geometry, kind)  # fmt: skip
    rest = unique + bytes(428)
    found = sum_of(parts + rest) if checksum is None else checksum
    return parts + struct.pack(">I", found) + rest


class Vhd(NamedTuple):
    """A dynamic or differencing VHD file to be made: ``Vhd(...).build()``.

    :ivar blocks: (content, which sectors are there) by number
    :ivar locators: (platform, name) of the parent
    """

    size: int = 8 * MIB
    blocks: Mapping[int, tuple[bytes, Sequence[bool]]] = {}
    block_size: int = 2 * MIB
    kind: int = 3
    unique: bytes = b"\1" * 16
    parent_unique: bytes = bytes(16)
    parent_name: str = ""
    locators: Sequence[tuple[bytes, bytes]] = ()
    max_entries: int | None = None
    application: bytes = b"win "
    geometry: tuple[int, int, int] = (1, 1, 1)

    def footer(self) -> bytes:
        return footer(self.size, self.kind, unique=self.unique, application=self.application, geometry=self.geometry)

    def header(self, table: int, names_at: Sequence[int]) -> bytes:
        count = -(-self.size // self.block_size) if self.max_entries is None else self.max_entries
        before = struct.pack(">8sQQIII", b"cxsparse", (1 << 64) - 1, table, 0x10000, count, self.block_size)
        after = self.parent_unique + bytes(8) + self.parent_name.encode("utf-16-be").ljust(512, b"\0")
        for (platform, name), at in zip(self.locators, names_at, strict=True):
            after += struct.pack(">4sIIIQ", platform, 512, len(name), 0, at)
        after = after.ljust(1024 - 40, b"\0")
        return before + struct.pack(">I", sum_of(before + after)) + after

    def build(self) -> bytes:
        count = -(-self.size // self.block_size)
        names_at = [1536 + 512 * number for number in range(len(self.locators))]
        table_at = 1536 + 512 * len(self.locators)
        table_length = -(-4 * count // 512) * 512
        content = bytearray(self.footer() + self.header(table_at, names_at))
        for _, name in self.locators:
            content += name.ljust(512, b"\0")
        content += b"\xff" * table_length
        bitmap_length = -(-self.block_size // 512 // 8 // 512) * 512
        for number, (data, sectors) in self.blocks.items():
            struct.pack_into(">I", content, table_at + 4 * number, len(content) // 512)
            bits = bytearray(bitmap_length)
            for sector, here in enumerate(sectors):
                if here:
                    bits[sector // 8] |= 0x80 >> sector % 8
            content += bits + data.ljust(self.block_size, b"\0")
        return bytes(content + self.footer())
