"""qcow2 directories with entries of variable length: the snapshot table and the bitmap directory.

Pure codecs (docs/interop/qcow2, sections "Snapshots" and "Bitmap directory"); import them from :mod:`.layout`.
"""

from __future__ import annotations

import errno
import struct

from ...errors import ImageError
from ...typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_SNAPSHOTS: Final = 65536
MAX_SNAPSHOT_TABLE: Final = 64 << 20
MAX_SNAPSHOT_EXTRA: Final = 1024
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY: Final = 1024 * MAX_BITMAPS
MAX_BITMAP_TABLE_ENTRIES: Final = 0x8000000
MAX_BITMAP_BYTES: Final = 0x20000000
MAX_BITMAP_NAME: Final = 1023

BITMAP_IN_USE: Final = 1
BITMAP_AUTO: Final = 2
BITMAP_EXTRA_COMPATIBLE: Final = 4

_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")


class Truncated(ImageError):
    """A decoder was given too few bytes.

    :ivar needed: bytes to give it next time, counted from the same beginning (more may be asked for then)
    """

    def __init__(self, what: str, needed: int, given: int) -> None:
        super().__init__(f"{what} is cut off: {needed} bytes are needed, {given} are there")
        self.needed = needed


class Snapshot(NamedTuple):
    """A snapshot table entry.

    :ivar l1_size: entries of its L1 table
    :ivar state_size_32: the 32-bit state size field; :attr:`vm_state_size` is the one that counts
    :ivar extra: the extra data, to the byte
    """

    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    state_size_32: int
    extra: bytes
    id: str
    name: str

    @property
    def vm_state_size(self) -> int:
        """Bytes."""
        return self._extra_field(0) if len(self.extra) >= 8 else self.state_size_32

    @property
    def disk_size(self) -> int | None:
        """Virtual size in bytes when it was taken, ``None`` if not recorded (then the image's own)."""
        return self._extra_field(8) if len(self.extra) >= 16 else None

    @property
    def icount(self) -> int | None:
        """The instruction count of record/replay, ``None`` if not recorded."""
        if len(self.extra) < 24:
            return None
        count = self._extra_field(16)
        return None if count == (1 << 64) - 1 else count

    def _extra_field(self, at: int) -> int:
        return int.from_bytes(self.extra[at : at + 8], "big")


def snapshot_extra(vm_state_size: int, disk_size: int, icount: int | None = None) -> bytes:
    """Extra data for a new entry: all three fields the specification names."""
    return struct.pack(">QQQ", vm_state_size, disk_size, (1 << 64) - 1 if icount is None else icount)


def decode_snapshot_table(
    data: bytes | bytearray | memoryview, count: int, cluster_bits: int = 9
) -> tuple[Snapshot, ...]:
    """``count`` entries from the beginning of ``data``.

    :raises ImageError: an entry is outside its limits
    :raises Truncated: more bytes are needed; the table's length is only known once it is read
    """
    if count > MAX_SNAPSHOTS:
        raise ImageError(f"qcow2 snapshot table has {count} entries, allowed are {MAX_SNAPSHOTS}", errno=errno.EFBIG)
    found: list[Snapshot] = []
    position = 0
    for index in range(count):
        position += -position % 8
        if len(data) < position + _SNAPSHOT.size:
            # Every entry still to come has at least its fixed part.
            raise Truncated("the qcow2 snapshot table", position + (count - index) * _SNAPSHOT.size, len(data))
        offset, l1_size, id_size, name_size, sec, nsec, clock, state, extra_size = _SNAPSHOT.unpack_from(data, position)
        _check_snapshot(index, offset, l1_size, extra_size, cluster_bits)
        extra_end = position + _SNAPSHOT.size + extra_size
        id_end = extra_end + id_size
        end = id_end + name_size
        if end > MAX_SNAPSHOT_TABLE:
            raise ImageError(
                f"qcow2 snapshot table is longer than {MAX_SNAPSHOT_TABLE} bytes at entry {index}", errno=errno.EFBIG
            )
        if len(data) < end:
            raise Truncated("the qcow2 snapshot table", end + (count - index - 1) * _SNAPSHOT.size, len(data))
        extra = bytes(data[position + _SNAPSHOT.size : extra_end])
        name_id, name = _text(data[extra_end:id_end]), _text(data[id_end:end])
        found.append(Snapshot(offset, l1_size, sec, nsec, clock, state, extra, name_id, name))
        position = end
    return tuple(found)


_DISCARDED: Final = "check -r all discards the snapshot"


def _check_snapshot(index: int, offset: int, l1_size: int, extra_size: int, cluster_bits: int) -> None:
    where = f"qcow2 snapshot table entry {index}: field"
    if extra_size > MAX_SNAPSHOT_EXTRA:
        raise ImageError(f"{where} extra_data_size is {extra_size}, allowed is at most {MAX_SNAPSHOT_EXTRA}",
                         hint="check -r all removes the extra data", errno=errno.EFBIG)  # fmt: skip
    if l1_size * 8 > 32 << 20:
        raise ImageError(f"{where} l1_size is {l1_size}, allowed is at most {(32 << 20) // 8}",
                         hint=_DISCARDED, errno=errno.EFBIG)  # fmt: skip
    if offset % (1 << cluster_bits) or offset >= 1 << 63:
        raise ImageError(f"{where} l1_table_offset is {offset:#x}, allowed is a multiple of the cluster size "
                         f"{1 << cluster_bits}", hint=_DISCARDED)  # fmt: skip


def _text(data: bytes | bytearray | memoryview) -> str:
    return bytes(data).decode("utf-8", "surrogateescape")


def encode_snapshot_table(snapshots: Sequence[Snapshot]) -> bytes:
    """The table, each entry padded to 8 bytes; the inverse of :func:`decode_snapshot_table`."""
    parts = []
    for entry in snapshots:
        name_id = entry.id.encode("utf-8", "surrogateescape")
        name = entry.name.encode("utf-8", "surrogateescape")
        head = _SNAPSHOT.pack(entry.l1_table_offset, entry.l1_size, len(name_id), len(name), *entry[2:6],
                              len(entry.extra))  # fmt: skip
        part = head + entry.extra + name_id + name
        parts.append(part + bytes(-len(part) % 8))
    return b"".join(parts)


# -- bitmap directory -----------------------------------------------------------------------------


class BitmapEntry(NamedTuple):
    """A bitmap directory entry.

    :ivar table_size: entries of the bitmap table
    :ivar flags: ``BITMAP_*`` bits
    :ivar granularity_bits: log2 of the guest bytes one bit stands for
    :ivar extra: the extra data, to the byte
    """

    table_offset: int
    table_size: int
    flags: int
    type: int
    granularity_bits: int
    extra: bytes
    name: str

    @property
    def in_use(self) -> bool:
        """Not saved correctly: inconsistent."""
        return bool(self.flags & BITMAP_IN_USE)

    @property
    def auto(self) -> bool:
        """Enabled: it follows all writes."""
        return bool(self.flags & BITMAP_AUTO)


def decode_bitmap_directory(
    data: bytes | bytearray | memoryview, count: int, cluster_bits: int = 9
) -> tuple[BitmapEntry, ...]:
    """``count`` entries that fill ``data`` exactly.

    :raises ImageError: an entry is outside its limits, or count and length disagree
    """
    if len(data) > MAX_BITMAP_DIRECTORY:
        raise ImageError(f"qcow2 bitmap directory is {len(data)} bytes long, allowed are {MAX_BITMAP_DIRECTORY}")
    if count > MAX_BITMAPS:
        raise ImageError(f"qcow2 bitmap directory has {count} entries, allowed are {MAX_BITMAPS}")
    found: list[BitmapEntry] = []
    names: set[str] = set()
    position = 0
    for index in range(count):
        if len(data) < position + _BITMAP.size:
            raise ImageError(f"qcow2 bitmap directory ends in entry {index} of {count}")
        table, entries, flags, kind, bits, name_size, extra_size = _BITMAP.unpack_from(data, position)
        extra_end = position + _BITMAP.size + extra_size
        end = extra_end + name_size
        padded = end + -end % 8
        if padded > len(data):
            raise ImageError(f"qcow2 bitmap directory ends in entry {index} of {count}")
        extra = bytes(data[position + _BITMAP.size : extra_end])
        entry = BitmapEntry(table, entries, flags, kind, bits, extra, _text(data[extra_end:end]))
        _check_bitmap(index, entry, name_size, cluster_bits)
        if entry.name in names:
            raise ImageError(f"qcow2 bitmap directory entry {index} has the name of an earlier one")
        names.add(entry.name)
        found.append(entry)
        position = padded
    if position != len(data):
        raise ImageError(f"qcow2 bitmap directory is {len(data)} bytes long, but its {count} entries end at {position}")
    return tuple(found)


def _check_bitmap(index: int, entry: BitmapEntry, name_size: int, cluster_bits: int) -> None:
    checks = (
        ("bitmap_table_offset", entry.table_offset,
         0 < entry.table_offset < 1 << 63 and not entry.table_offset % (1 << cluster_bits),
         f"a multiple of the cluster size {1 << cluster_bits} that is not 0"),
        ("bitmap_table_size", entry.table_size,
         0 < entry.table_size <= min(MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAP_BYTES >> cluster_bits),
         f"1 to {min(MAX_BITMAP_TABLE_ENTRIES, MAX_BITMAP_BYTES >> cluster_bits)}"),
        ("flags", entry.flags, entry.flags < 8, "0 to 7"),
        ("type", entry.type, entry.type == 1, "1 (dirty tracking)"),
        ("granularity_bits", entry.granularity_bits, 9 <= entry.granularity_bits <= 31, "9 to 31"),
        ("name_size", name_size, 1 <= name_size <= MAX_BITMAP_NAME, f"1 to {MAX_BITMAP_NAME}"),
    )  # fmt: skip
    for field, value, good, allowed in checks:
        if not good:
            raise ImageError(f"qcow2 bitmap directory entry {index}: field {field} is {value}, allowed is {allowed}")


def encode_bitmap_directory(entries: Sequence[BitmapEntry]) -> bytes:
    """The directory, each entry padded to 8 bytes; the inverse of :func:`decode_bitmap_directory`."""
    parts = []
    for entry in entries:
        name = entry.name.encode("utf-8", "surrogateescape")
        part = _BITMAP.pack(*entry[:5], len(name), len(entry.extra)) + entry.extra + name
        parts.append(part + bytes(-len(part) % 8))
    return b"".join(parts)
