"""ova: an appliance in one tar archive, read-only; see :mod:`.appliance`."""

from __future__ import annotations

from ..errors import ImageError, NotFound
from ..typing import TYPE_CHECKING, Final
from .appliance import OPTIONS, open_image_in, open_package
from .opening import read_exactly
from .tar import members
from .xmltree import MAX_XML

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..graph.opening import OpenRequest
    from .appliance import Disk, PackageNode

__all__ = ["CHILDREN", "OPTIONS", "matches", "open_node"]

CHILDREN: Final = ("file",)


def matches(head: bytes) -> bool:
    """Whether a file that begins so is a tar archive whose first member is a descriptor."""
    name = head[:100].partition(b"\0")[0].lower()
    return head[257:262] == b"ustar" and name.endswith(b".ovf")


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
        file = request.opener.open(member, node.open_flags.for_file(), protocol=True)
        return open_image_in(request, node, disk, file)

    return open_package(request, descriptor, open_disk)
