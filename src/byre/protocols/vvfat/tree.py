"""The folder as it is when it is opened: what it holds, and the names that FAT has for it."""

from __future__ import annotations

import os
import stat

from ...errors import InvalidArgument, from_oserror
from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Entry", "directory_bytes", "scan", "short_name"]

MAX_ENTRIES: Final = 1 << 16
MAX_DEPTH: Final = 64
MAX_FILE: Final = (1 << 32) - 1
"""Bytes of a file; the field has 32 bits."""

ATTRIBUTE_READ_ONLY: Final = 0x01
ATTRIBUTE_LABEL: Final = 0x08
ATTRIBUTE_FOLDER: Final = 0x10
ATTRIBUTE_ARCHIVE: Final = 0x20
ATTRIBUTE_LONG: Final = 0x0F

_ALLOWED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~")
_FORBIDDEN: Final = frozenset('"*/:<>?\\|')


class Entry:
    """A file or a folder.

    :ivar name: as it is shown, with what FAT cannot hold replaced
    :ivar children: of a folder, by name; ``None`` for a file
    :ivar size: bytes of a file
    :ivar first: its first cluster, once it has a place
    """

    __slots__ = ("children", "first", "name", "path", "short", "size", "time", "writable")

    def __init__(self, path: str, name: str, *, size: int, time: float, writable: bool, folder: bool) -> None:
        self.path = path
        self.name = name
        self.size = size
        self.time = time
        self.writable = writable
        self.children: list[Entry] | None = [] if folder else None
        self.short = b""
        self.first = 0

    def walk(self) -> Iterator[Entry]:
        """This entry and everything below, folders before what is in them."""
        todo = [self]
        while todo:
            entry = todo.pop()
            yield entry
            todo += reversed(entry.children or ())

    @property
    def is_folder(self) -> bool:
        return self.children is not None

    def bytes_of_folder(self, *, root: bool) -> int:
        """What its own table takes: 32 bytes an entry, with those for long names."""
        return 32 * (sum(1 + _long_count(child) for child in self.children or ()) + (1 if root else 2))


def scan(folder: str) -> Entry:
    """The tree below ``folder``. Links are followed, but not into a ring; what is neither file nor folder is left out.

    :raises InvalidArgument: it is no folder, or holds more than FAT can
    """
    top = _entry(folder, "")
    if top is None or not top.is_folder:
        raise InvalidArgument("this is no folder", where=folder)
    count = 0
    todo: list[tuple[Entry, tuple[tuple[int, int], ...]]] = [(top, (_identity(folder),))]
    while todo:
        entry, above = todo.pop()
        if len(above) > MAX_DEPTH:
            raise InvalidArgument(f"folders are nested more than {MAX_DEPTH} deep", where=entry.path)
        for child in _children(entry):
            count += 1
            if count > MAX_ENTRIES:
                raise InvalidArgument(f"the folder holds more than {MAX_ENTRIES} files", where=folder)
            assert entry.children is not None
            if child.is_folder:
                identity = _identity(child.path)
                if identity in above:
                    continue
                todo.append((child, (*above, identity)))
            entry.children.append(child)
        _name_children(entry)
    return top


def _children(entry: Entry) -> Iterator[Entry]:
    try:
        names = sorted(os.listdir(entry.path))
    except OSError as error:
        raise from_oserror(error, "cannot list the folder", entry.path) from None
    for name in names:
        child = _entry(os.path.join(entry.path, name), name)
        if child is not None:
            yield child


def _entry(path: str, name: str) -> Entry | None:
    """``None`` for what cannot be shown."""
    try:
        found = os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            return None
        raise from_oserror(error, "cannot look at", path) from None
    folder = stat.S_ISDIR(found.st_mode)
    if not folder and not stat.S_ISREG(found.st_mode):
        return None
    if not folder and found.st_size > MAX_FILE:
        raise InvalidArgument(f"the file has {found.st_size} bytes, FAT allows {MAX_FILE}", where=path)
    shown = "".join("_" if char in _FORBIDDEN or not char.isprintable() else char for char in name)
    return Entry(path, shown, size=0 if folder else found.st_size, time=found.st_mtime,
                 writable=bool(found.st_mode & 0o200), folder=folder)  # fmt: skip


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


# -- names ----------------------------------------------------------------------------------------


def short_name(name: str, taken: set[bytes]) -> bytes:
    """The 11 bytes of a name in the old form, unlike any in ``taken``."""
    stem, dot, extension = name.rpartition(".")
    if not dot or not stem:
        stem, extension = name.lstrip("."), ""
    upper_stem, upper_extension = _plain(stem), _plain(extension)
    exact = name.upper() == (f"{upper_stem}.{upper_extension}" if upper_extension else upper_stem)
    if exact and 0 < len(upper_stem) <= 8 and len(upper_extension) <= 3:
        result = _padded(upper_stem, upper_extension)
        if result not in taken:
            return result
    for number in range(1, MAX_ENTRIES + 2):
        tail = f"~{number}"
        result = _padded((upper_stem or "_")[: 8 - len(tail)] + tail, upper_extension)
        if result not in taken:
            return result
    raise AssertionError("a folder has fewer entries than there are numbers")


def _plain(text: str) -> str:
    return "".join(char if char in _ALLOWED else "_" for char in text.upper() if char not in " .")


def _padded(stem: str, extension: str) -> bytes:
    return stem[:8].ljust(8).encode() + extension[:3].ljust(3).encode()


def _name_children(entry: Entry) -> None:
    taken: set[bytes] = set()
    for child in entry.children or ():
        child.short = short_name(child.name, taken)
        taken.add(child.short)


def _shown_short(short: bytes) -> str:
    stem, extension = short[:8].decode().rstrip(), short[8:].decode().rstrip()
    return f"{stem}.{extension}" if extension else stem


def _long_units(entry: Entry) -> bytes:
    """The long name in UTF-16, empty if the short one says it all."""
    if entry.name == _shown_short(entry.short):
        return b""
    return entry.name.encode("utf-16-le", "replace")[:510]


def _long_count(entry: Entry) -> int:
    return -(-len(_long_units(entry)) // 26)


# -- the entries of a folder ----------------------------------------------------------------------


def directory_bytes(entry: Entry, parent_first: int, label: bytes | None) -> bytes:
    """The table of a folder.

    :param parent_first: first cluster of the folder above, 0 for the root
    :param label: of the volume, 11 bytes, for the root; ``None`` for all others
    """
    rows = []
    if label is not None:
        rows.append(_row(label, ATTRIBUTE_LABEL, 0, 0, entry.time))
    else:
        rows.append(_row(b".".ljust(11), ATTRIBUTE_FOLDER, entry.first, 0, entry.time))
        rows.append(_row(b"..".ljust(11), ATTRIBUTE_FOLDER, parent_first, 0, entry.time))
    for child in entry.children or ():
        rows += _long_rows(child)
        attribute = ATTRIBUTE_FOLDER if child.is_folder else ATTRIBUTE_ARCHIVE
        attribute |= 0 if child.writable else ATTRIBUTE_READ_ONLY
        rows.append(_row(child.short, attribute, child.first, child.size, child.time))
    return b"".join(rows)


def _row(short: bytes, attribute: int, first: int, size: int, time: float) -> bytes:
    import struct

    date, clock = _dos_time(time)
    # 0xE5 as the first byte means a deleted entry; no name here begins with it.
    return struct.pack("<11sBBBHHHHHHHI", short, attribute, 0, 0, clock, date, date, first >> 16, clock, date,
                       first & 0xFFFF, size)  # fmt: skip


def _dos_time(time: float) -> tuple[int, int]:
    from time import localtime

    # The years that fit into seven bits.
    year, month, day, hour, minute, second, *_ = localtime(min(max(time, 315_619_200), 4_354_732_800))
    return (min(max(year, 1980), 2107) - 1980) << 9 | month << 5 | day, hour << 11 | minute << 5 | second // 2


def _long_rows(entry: Entry) -> list[bytes]:
    import struct

    units = _long_units(entry)
    if not units:
        return []
    checksum = 0
    for byte in entry.short:
        checksum = ((checksum & 1) << 7 | checksum >> 1) + byte & 0xFF
    count = -(-len(units) // 26)
    if len(units) % 26:
        units = (units + b"\0\0").ljust(count * 26, b"\xff")
    rows = []
    for number in range(count, 0, -1):
        part = units[(number - 1) * 26 : number * 26]
        order = number | (0x40 if number == count else 0)
        rows.append(
            struct.pack("<B10sBBB12sH4s", order, part[:10], ATTRIBUTE_LONG, 0, checksum, part[10:22], 0, part[22:])
        )
    return rows
