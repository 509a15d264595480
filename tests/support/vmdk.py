"""VMDK disks made and looked through by their description alone, without the code under test."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

SECTOR = 512
NEWLINES = b"\n \r\n"
AT_END = (1 << 64) - 1

DESCRIPTOR = """# Disk DescriptorFile
version=1
CID={cid}
parentCID={parent}
createType="{kind}"
{more}
# Extent description
{lines}

# The Disk Data Base
#DDB

ddb.adapterType = "ide"
"""


def descriptor(lines: Sequence[str], kind: str = "monolithicSparse", *, cid: str = "12345678", parent: str = "ffffffff",
               more: str = "") -> bytes:  # fmt: skip
    return DESCRIPTOR.format(cid=cid, parent=parent, kind=kind, more=more, lines="\n".join(lines)).encode()


def header(capacity: int, *, version: int = 1, flags: int = 3, grain: int = 128, text_at: int = 1, text: int = 20,
           per_table: int = 512, redundant: int = 0, directory: int = 0, overhead: int = 0, unclean: int = 0,
           newlines: bytes = NEWLINES, compression: int = 0) -> bytes:  # fmt: skip
    """A hosted sparse header; places and lengths in sectors."""
    fields = (version, flags, capacity, grain, text_at, text, per_table, redundant, directory, overhead, unclean)
    return struct.pack("<4sIIQQQQIQQQB4sH", b"KDMV", *fields, newlines, compression).ljust(SECTOR, b"\0")


def _grains(content: bytes, grain: int) -> list[bytes]:
    return [content[at : at + grain] for at in range(0, len(content), grain)]


def hosted(content: bytes, *, grain: int = 65536, per_table: int = 512, redundant: bool = True,
           zero_grains: bool = False, fill: bool = True, version: int = 1, seed: int = 1, missing_tables: bool = False,
           text: bytes | None = None) -> bytes:  # fmt: skip
    """A sparse extent whose grains lie in random order; zeroes are left out (or zero grains).

    :param zero_grains: the extent may have them
    :param fill: zeroes are zero grains then; otherwise they are left out
    :param missing_tables: tables with nothing in them are left out
    """
    sectors = len(content) // SECTOR
    grains = _grains(content, grain)
    tables = -(-len(grains) // per_table)
    table_sectors = -(-per_table * 4 // SECTOR)
    directory_sectors = -(-tables * 4 // SECTOR)
    first = 21
    copies = 2 if redundant else 1
    places = [first + copy * (directory_sectors + tables * table_sectors) for copy in range(copies)]
    overhead = first + copies * (directory_sectors + tables * table_sectors)
    start = -(-overhead * SECTOR // grain) * grain
    order = [index for index, part in enumerate(grains) if any(part)]
    random.Random(seed).shuffle(order)
    entries = [1 if zero_grains and fill else 0] * (tables * per_table)
    for place, index in enumerate(order):
        entries[index] = (start + place * grain) // SECTOR
    body = bytearray(start + len(order) * grain)
    flags = 1 | (2 if redundant else 0) | (4 if zero_grains else 0)
    body[:SECTOR] = header(
        sectors, version=version, flags=flags, grain=grain // SECTOR, per_table=per_table, overhead=overhead,
        redundant=places[0] if redundant else 0, directory=places[-1],
    )  # fmt: skip
    inside = descriptor([f'RW {sectors} SPARSE "memory"']) if text is None else text
    body[SECTOR : SECTOR + len(inside)] = inside
    for place in places:
        for index in range(tables):
            own = entries[index * per_table : (index + 1) * per_table]
            at = place + directory_sectors + index * table_sectors
            if missing_tables and not any(own):
                continue
            struct.pack_into("<I", body, place * SECTOR + index * 4, at)
            struct.pack_into(f"<{per_table}I", body, at * SECTOR, *own)
    for place, index in enumerate(order):
        body[start + place * grain : start + place * grain + len(grains[index])] = grains[index]
    return bytes(body)


def stream(content: bytes, *, grain: int = 65536, per_table: int = 512, markers: bool = True, text: bytes | None = None,
           level: int = 6, payload: bytes = b"") -> bytes:  # fmt: skip
    """A stream-optimized extent as VMware writes it: grains, each table behind its grains, directory, footer."""
    sectors = len(content) // SECTOR
    inside = descriptor([f'RW {sectors} SPARSE "memory"'], "streamOptimized") if text is None else text
    flags = 1 | 1 << 16 | (1 << 17 if markers else 0)
    common = {"version": 3, "flags": flags, "grain": grain // SECTOR, "per_table": per_table, "overhead": 21,
              "compression": 1}  # fmt: skip
    out = bytearray(header(sectors, directory=AT_END, **common))  # type: ignore[arg-type]
    out += inside.ljust(20 * SECTOR, b"\0")
    grains = _grains(content, grain)
    directory = []
    for base in range(0, len(grains), per_table):
        table = []
        for index, part in enumerate(grains[base : base + per_table], base):
            if not any(part):
                table.append(0)
                continue
            table.append(len(out) // SECTOR)
            packed = payload or zlib.compress(part, level)
            out += struct.pack("<QI", index * grain // SECTOR, len(packed)) if markers else b""
            out += packed
            out += bytes(-len(out) % SECTOR)
        if any(table):
            length = per_table * 4
            out += struct.pack("<QII", -(-length // SECTOR), 0, 1).ljust(SECTOR, b"\0")
            directory.append(len(out) // SECTOR)
            out += struct.pack(f"<{len(table)}I", *table).ljust(-(-length // SECTOR) * SECTOR, b"\0")
        else:
            directory.append(0)
    out += struct.pack("<QII", 1, 0, 2).ljust(SECTOR, b"\0")
    at = len(out) // SECTOR
    out += struct.pack(f"<{len(directory)}I", *directory)
    out += bytes(-len(out) % SECTOR)
    out += struct.pack("<QII", 1, 0, 3).ljust(SECTOR, b"\0")
    out += header(sectors, directory=at, **common)  # type: ignore[arg-type]
    return bytes(out + bytes(SECTOR))


def cowd(content: bytes, *, grain: int = 65536, seed: int = 1, text: bytes = b"") -> bytes:
    """An ESX sparse extent."""
    grains = _grains(content, grain)
    tables = -(-len(grains) // 4096)
    directory, table_at = 4, 4 + -(-tables * 4 // SECTOR)
    start = -(-(table_at + tables * 32) * SECTOR // grain) * grain
    order = [index for index, part in enumerate(grains) if any(part)]
    random.Random(seed).shuffle(order)
    entries = [0] * (tables * 4096)
    for place, index in enumerate(order):
        entries[index] = (start + place * grain) // SECTOR
    body = bytearray(start + len(order) * grain)
    struct.pack_into("<4s7I", body, 0, b"COWD", 1, 3, len(content) // SECTOR, grain // SECTOR, directory, tables,
                     len(body) // SECTOR)  # fmt: skip
    body[SECTOR : SECTOR + len(text)] = text
    struct.pack_into(f"<{tables}I", body, directory * SECTOR, *(table_at + index * 32 for index in range(tables)))
    struct.pack_into(f"<{len(entries)}I", body, table_at * SECTOR, *entries)
    for place, index in enumerate(order):
        body[start + place * grain : start + place * grain + len(grains[index])] = grains[index]
    return bytes(body)


def sesparse(content: bytes, *, seed: int = 1, zero_kind: int = 2, replay: int = 0) -> bytes:
    """A space-efficient sparse extent, with 4 KiB grains.

    :param zero_kind: type of entries for zeroes: 0 unallocated, 1 unmapped, 2 zero
    """
    grain = 4096
    grains = _grains(content, grain)
    tables = max(-(-len(grains) // 4096), 1)
    volatile, directory = 1, 8
    directory_sectors = -(-tables * 8 // SECTOR)
    first_table = directory + directory_sectors
    start = -(-(first_table + tables * 64) // 8) * 8
    order = [index for index, part in enumerate(grains) if any(part)]
    chooser = random.Random(seed)
    chooser.shuffle(order)
    numbers = list(range(tables))
    chooser.shuffle(numbers)
    entries = [zero_kind << 60] * (tables * 4096)
    for place, index in enumerate(order):
        entries[index] = 3 << 60 | (place & 0xFFF) << 48 | place >> 12
    body = bytearray(start * SECTOR + len(order) * grain)
    words = [0xCAFEBABE, 0x200000001, len(content) // SECTOR, 8, 64] + [0] * 21
    words[10:12] = volatile, 1
    words[16:20] = directory, directory_sectors, first_table, tables * 64
    words[24:26] = start, len(order) * 8
    struct.pack_into("<26Q", body, 0, *words)
    struct.pack_into("<4Q", body, volatile * SECTOR, 0xCAFECAFE, 0, 0, replay)
    for index, number in enumerate(numbers):
        struct.pack_into("<Q", body, directory * SECTOR + index * 8, 0x10000000 << 32 | number)
        own = entries[index * 4096 : (index + 1) * 4096]
        struct.pack_into("<4096Q", body, (first_table + number * 64) * SECTOR, *own)
    for place, index in enumerate(order):
        at = start * SECTOR + place * grain
        body[at : at + len(grains[index])] = grains[index]
    return bytes(body)


# -- looking through ------------------------------------------------------------------------------


class Found(NamedTuple):
    """What is wrong with a hosted sparse extent.

    :ivar damage: grains or tables outside the file, inside the metadata, or in one place
    :ivar unequal: tables whose two copies differ
    """

    damage: list[str]
    unequal: list[str]


def look_through(data: bytes) -> Found:
    """The tables of a hosted sparse extent, both copies."""
    fields = struct.unpack_from("<4sIIQQQQIQQQB4sH", data)
    _, _, flags, capacity, grain, _, _, per_table, redundant, directory, overhead, _, _, compression = fields
    if directory == AT_END:
        return look_through(data[-2 * SECTOR : -SECTOR] + data[SECTOR:])
    count = -(-capacity // (grain * per_table))
    damage: list[str] = []
    unequal: list[str] = []
    taken: dict[int, str] = {}

    def claim(what: str, start: int, sectors: int, floor: int) -> None:
        if start < floor or start * SECTOR >= len(data):
            damage.append(f"{what} lies at sector {start}, the file has {len(data) // SECTOR}")
            return
        for sector in range(start, start + sectors):
            if sector in taken:
                damage.append(f"{what} and {taken[sector]} share sector {sector}")
                return
            taken[sector] = what

    def table(place: int, index: int) -> tuple[int, tuple[int, ...]]:
        at = struct.unpack_from("<I", data, place * SECTOR + index * 4)[0]
        raw = data[at * SECTOR : at * SECTOR + per_table * 4].ljust(per_table * 4, b"\0")
        return at, struct.unpack(f"<{per_table}I", raw) if at else (0,) * per_table

    table_sectors = -(-per_table * 4 // SECTOR)
    for index in range(count):
        at, entries = table(directory, index)
        if at:
            claim(f"table {index}", at, table_sectors, 1)
        if flags & 2 and redundant:
            other_at, other = table(redundant, index)
            if other != entries:
                unequal.append(f"table {index}")
            if other_at:
                claim(f"second table {index}", other_at, table_sectors, 1)
        for number, entry in enumerate(entries):
            if entry and not (entry == 1 and flags & 4):
                sectors = grain
                if compression:
                    size = struct.unpack_from("<QI", data, entry * SECTOR)[1]
                    sectors = -(-(size + 12) // SECTOR)
                claim(f"grain {index * per_table + number}", entry, sectors, overhead if not compression else 1)
    return Found(damage, unequal)
