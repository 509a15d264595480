"""The descriptor: the text that says which extents make up a disk, who its parent is, and its content ID.

"The Descriptor File" in the specification. Keys are compared without case; comments and blank lines may stand
anywhere, also before the first key. No I/O.
"""

from __future__ import annotations

from ...errors import ImageError, InvalidArgument, NotSupported, printable
from ...typing import Final, NamedTuple
from .layout import MAX_DESCRIPTOR, MAX_SECTORS

__all__ = [
    "NO_PARENT",
    "Descriptor",
    "ExtentLine",
    "check_name",
    "decode_descriptor",
    "encode_descriptor",
    "looks_like_descriptor",
    "parse_extent_line",
]  # fmt: skip

NO_PARENT: Final = 0xFFFFFFFF
MAX_EXTENTS: Final = 4096
_MAX_NAME: Final = 4096

CREATE_TYPES: Final = (
    "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "2GbMaxExtentSparse",
    "2GbMaxExtentFlat", "streamOptimized", "vmfs", "vmfsThin", "vmfsPreallocated", "vmfsEagerZeroedThick", "vmfsSparse",
    "seSparse", "custom", "fullDevice", "partitionedDevice",
)  # fmt: skip

ACCESS: Final = ("RW", "RDONLY", "NOACCESS")
PLAIN_TYPES: Final = ("FLAT", "VMFS")
SPARSE_TYPES: Final = ("SPARSE", "VMFSSPARSE", "SESPARSE")

_ENCODINGS: Final = {"windows-1252": "cp1252", "gbk": "gbk", "big5": "big5", "shift_jis": "shift_jis"}


class ExtentLine(NamedTuple):
    """One extent, as the descriptor has it.

    :ivar access: "RW", "RDONLY" or "NOACCESS"
    :ivar sectors: its length
    :ivar type: "FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE" or "ZERO"
    :ivar name: of its file; "" for ZERO
    :ivar offset: sector in the file where a FLAT extent begins
    """

    access: str
    sectors: int
    type: str
    name: str = ""
    offset: int = 0


class Descriptor(NamedTuple):
    """What a descriptor says.

    :ivar cid: content ID, another one after each session that wrote
    :ivar parent_cid: that of the parent when the disk was made; ``NO_PARENT`` without one
    :ivar parent_name: file name of the parent; "" without one
    :ivar extent_lines: as they are written
    :ivar cid_at: where in the text the digits of the content ID begin, bytes
    :ivar cid_digits: how many there are
    """

    cid: int
    parent_cid: int
    create_type: str
    parent_name: str = ""
    extent_lines: tuple[str, ...] = ()
    cid_at: int = 0
    cid_digits: int = 8
    parent_cid_at: int = 0
    parent_cid_digits: int = 8

    def extents(self) -> tuple[ExtentLine, ...]:
        """The extents, in the order of the disk.

        :raises ImageError: there is none, or a line cannot be understood
        """
        if len(self.extent_lines) > MAX_EXTENTS:
            raise ImageError(f"the descriptor has {len(self.extent_lines)} extents, allowed are {MAX_EXTENTS}")
        found = tuple(map(parse_extent_line, self.extent_lines))
        if not any(extent.type != "ZERO" for extent in found):
            raise ImageError("the descriptor names no extent that holds anything")
        if sum(extent.sectors for extent in found) > MAX_SECTORS:
            raise ImageError(f"the extents are longer than {MAX_SECTORS} sectors together")
        return found


# -- reading --------------------------------------------------------------------------------------


def looks_like_descriptor(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a descriptor, rather than any other text.

    Comments and blank lines may come first; the first key is the version, and those that only a descriptor has follow.
    """
    rest = head
    while rest:
        line, _, rest = rest.partition(b"\n")
        line = line.rstrip(b"\r").strip(b" \t")
        if line and not line.startswith(b"#"):
            key, _, value = line.partition(b"=")
            version = key.strip().lower() == b"version" and value.strip() in (b"1", b"2", b"3")
            return version and any(word in rest.lower() for word in (b"createtype", b"cid="))
    return False


def decode_descriptor(data: bytes | bytearray | memoryview) -> Descriptor:
    """
    :param data: the text; what follows a zero byte is ignored
    :raises ImageError: it lacks what a descriptor must have, or is longer than 1 MiB
    """
    if len(data) > MAX_DESCRIPTOR:
        raise ImageError(f"the descriptor has {len(data)} bytes, allowed are {MAX_DESCRIPTOR}")
    text = bytes(data).partition(b"\0")[0]
    values: dict[str, tuple[bytes, int]] = {}
    extent_lines: list[bytes] = []
    position = 0
    for line in text.split(b"\n"):
        word = line.split(None, 1)[:1]
        if word and word[0].upper() in (b"RW", b"RDONLY", b"NOACCESS"):
            extent_lines.append(line.strip())
        elif not line.lstrip().startswith(b"#"):
            key, equals, value = line.partition(b"=")
            if equals:
                at = position + len(key) + 1 + len(value) - len(value.lstrip())
                values.setdefault(key.strip().lower().decode("latin-1"), (value.strip(), at))
        position += len(line) + 1
    return _assemble(values, extent_lines)


def _assemble(values: dict[str, tuple[bytes, int]], extent_lines: list[bytes]) -> Descriptor:
    declared = values.get("encoding", (b"", 0))[0].strip(b'"').lower().decode("latin-1")
    encoding = _ENCODINGS.get(declared, "utf-8")

    def text(data: bytes) -> str:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            return data.decode("utf-8", "surrogateescape")

    version = values.get("version", (b"1", 0))[0]
    if version not in (b"1", b"2", b"3"):
        raise _unsupported(f"unsupported descriptor version {printable(text(version[:20]))!r}; 1 to 3 are known")
    create_type = text(values.get("createtype", (b"", 0))[0]).strip('"')
    if not create_type:
        raise ImageError("invalid VMDK image descriptor: it has no createType")
    known = {name.lower(): name for name in CREATE_TYPES}
    if create_type.lower() not in known:
        raise _unsupported(f"unsupported image type {create_type[:40]!r}")
    cid, cid_at, cid_digits = _content_id(values, "CID")
    parent_cid, parent_at, parent_digits = _content_id(values, "parentCID")
    name = text(values.get("parentfilenamehint", (b"", 0))[0]).strip('"')
    if len(name) > _MAX_NAME:
        raise ImageError(f"the name of the parent has {len(name)} characters, allowed are {_MAX_NAME}")
    return Descriptor(cid, parent_cid, known[create_type.lower()], name, tuple(map(text, extent_lines)), cid_at,
                      cid_digits, parent_at, parent_digits)  # fmt: skip


def _content_id(values: dict[str, tuple[bytes, int]], key: str) -> tuple[int, int, int]:
    """(value, where its digits begin, how many there are).

    :raises ImageError: there is none
    """
    value, at = values.get(key.lower(), (b"", 0))
    quoted = value.startswith(b'"')
    digits = value.strip(b'"')
    if not 1 <= len(digits) <= 8 or any(c not in b"0123456789abcdefABCDEF" for c in digits):
        found = printable(value[:20].decode("latin-1"))
        raise ImageError(f"invalid VMDK image descriptor: {key} is {found!r}, expected up to 8 hexadecimal digits")
    return int(digits, 16), at + quoted, len(digits)


def parse_extent_line(line: str) -> ExtentLine:
    """``ACCESS SECTORS TYPE "NAME" [OFFSET ...]``.

    :raises ImageError: it cannot be understood
    """
    words = line.split(None, 3)
    if len(words) < 3 or words[0].upper() not in ACCESS:
        raise _bad_line(line)
    access, count, kind = words[0].upper(), words[1], words[2].upper()
    if not (count.isascii() and count.isdecimal() and len(count) < 20) or not 0 < int(count) <= MAX_SECTORS:
        raise _bad_line(line)
    if kind == "ZERO":
        return ExtentLine(access, int(count), kind)
    if kind not in PLAIN_TYPES + SPARSE_TYPES:
        raise _unsupported(f"unsupported extent type {printable(kind[:20])!r}")
    # What follows the offset names a partition or a device, where there is one.
    parts = words[3].split('"', 2) if len(words) > 3 else []
    if len(parts) != 3 or parts[0] or not 0 < len(parts[1]) <= _MAX_NAME:
        raise _bad_line(line)
    name, offset = parts[1], "".join(parts[2].split()[:1])
    if kind == "FLAT":
        if not (offset.isascii() and offset.isdecimal() and len(offset) < 20) or int(offset) > MAX_SECTORS:
            raise _bad_line(line)
        return ExtentLine(access, int(count), kind, name, int(offset))
    if offset and (kind != "VMFS" or offset != "0"):
        raise _bad_line(line)
    return ExtentLine(access, int(count), kind, name)


def _bad_line(line: str) -> ImageError:
    return ImageError(f"invalid extent line: {printable(line[:100])}")


def _unsupported(message: str) -> ImageError:
    return ImageError(message, errno=NotSupported.default_errno)


# -- writing --------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """:raises InvalidArgument: a descriptor cannot hold this file name"""
    if any(c in name for c in '"\n\r\0') or len(name) > _MAX_NAME:
        raise InvalidArgument(f"a VMDK descriptor cannot hold the file name {printable(name[:100])!r}")


def encode_descriptor(descriptor: Descriptor, database: dict[str, str]) -> bytes:
    """A new descriptor.

    :param database: the "Disk Data Base" by key, without the prefix "ddb."
    """
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        f"CID={descriptor.cid:08x}",
        f"parentCID={descriptor.parent_cid:08x}",
        f'createType="{descriptor.create_type}"',
    ]
    if descriptor.parent_name:
        lines.append(f'parentFileNameHint="{descriptor.parent_name}"')
    lines += ["", "# Extent description", *descriptor.extent_lines, "", "# The Disk Data Base", "#DDB", ""]
    lines += [f'ddb.{key} = "{value}"' for key, value in sorted(database.items())]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def extent_line(extent: ExtentLine) -> str:
    """The inverse of :func:`parse_extent_line`."""
    offset = f" {extent.offset}" if extent.type == "FLAT" else ""
    return f'{extent.access} {extent.sectors} {extent.type} "{extent.name}"{offset}'
