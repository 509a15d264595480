"""ova: an appliance in one tar archive, read-only; see :mod:`.appliance`."""

from __future__ import annotations

import io

from ..errors import ImageError, NotFound
from ..typing import TYPE_CHECKING, Final
from .appliance import OPTIONS, open_package
from .opening import read_exactly
from .xmltree import MAX_XML

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..graph.opening import OpenRequest
    from .appliance import Disk, PackageNode

__all__ = ["CHILDREN", "MAX_MEMBERS", "OPTIONS", "matches", "open_node"]

CHILDREN: Final = ("file",)
MAX_MEMBERS: Final = 4096


def matches(head: bytes) -> bool:
    """Whether a file that begins so is a tar archive whose first member is a descriptor."""
    name = head[:100].partition(b"\0")[0].lower()
    return head[257:262] == b"ustar" and name.endswith(b".ovf")


class _Reader(io.RawIOBase):
    """A node as a file object, for the library that reads archives."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._node.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._node.size - self._at))
        if length:
            self._node.read_into(self._at, view[:length])
            self._at += length
        return length


def members(file: Node) -> dict[str, tuple[int, int]]:
    """(offset, length) of the plain files in the archive, in their order.

    :raises ImageError: it is no tar archive, or has too many members
    """
    import tarfile

    result: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.TarFile(fileobj=_Reader(file), mode="r") as archive:
            for count, member in enumerate(archive, 1):
                if count > MAX_MEMBERS:
                    raise ImageError(f"the archive has more than {MAX_MEMBERS} members", where=file.filename)
                if member.isreg() and not member.issparse():
                    result.setdefault(member.name, (member.offset_data, member.size))
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ImageError(f"the archive is damaged: {error}", where=file.filename) from None
    for name, (offset, length) in result.items():
        if offset + length > file.size:
            raise ImageError(f"the member {name!r} ends at {offset + length:#x}, past the end of the file "
                             f"({file.size:#x})", where=file.filename)  # fmt: skip
    return result


def open_node(request: OpenRequest) -> Node:
    """The node of an appliance; the archive's headers are read.

    :raises ImageError: the archive or its descriptor breaks the format
    :raises NotFound: it holds no such disk
    :raises NotSupported: it is to be written
    """
    listed: dict[str, tuple[int, int]] = {}

    def descriptor(file: Node) -> bytearray:
        listed.update(members(file))
        name = next((name for name in listed if name.lower().endswith(".ovf")), None)
        if name is None:
            raise ImageError("the archive holds no OVF descriptor")
        offset, length = listed[name]
        return read_exactly(file, offset, min(length, MAX_XML + 1), "descriptor")

    def open_disk(node: PackageNode, disk: Disk) -> Node:
        if disk.file not in listed:
            raise NotFound(f"the archive has no member {disk.file!r} for disk {disk.id!r}", where=node.filename)
        offset, length = listed[disk.file]
        member = {"driver": "raw", "offset": offset, "size": length, "file": node.file.name}
        image: dict[str, object] = {"file": member}
        return request.opener.open({**image, "driver": disk.format} if disk.format else image, node.open_flags)

    return open_package(request, descriptor, open_disk)
