"""ovf: an appliance given by its descriptor, with the disks beside it, read-only; see :mod:`.appliance`.

Option: ``disk`` names a disk by its id or its file, the first one if left out.
"""

from __future__ import annotations

import os

from ..typing import TYPE_CHECKING, Final
from .appliance import OPTIONS, open_image_in, open_package
from .opening import read_exactly
from .xmltree import MAX_XML

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..graph.opening import OpenRequest
    from .appliance import Disk, PackageNode

__all__ = ["CHILDREN", "OPTIONS", "matches", "open_node"]

CHILDREN: Final = ("file",)


def matches(head: bytes) -> bool:
    """Whether a file that begins so is a descriptor."""
    root = b"<Envelope" in head or b":Envelope" in head
    return root and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") and b"/ovf/envelope" in head


def open_node(request: OpenRequest) -> Node:
    """The node of an appliance given by its descriptor; the disks lie beside it.

    :raises ImageError: the descriptor breaks the format
    :raises NotFound: it lists no such disk
    :raises NotSupported: it is to be written
    """

    def open_disk(node: PackageNode, disk: Disk) -> Node | None:
        path = os.path.join(os.path.dirname(node.filename), disk.file)
        plain = None if ":" in disk.file.partition("/")[0] else path
        if node.open_flags.no_io:
            return None
        request.opener.policy.check(disk.file, plain, "disk", node.filename)
        given = {"driver": "file", "filename": path}
        file = request.opener.open(given, node.open_flags.for_file(), protocol=True, implicit=True)
        return open_image_in(request, node, disk, file)

    return open_package(
        request, lambda file: read_exactly(file, 0, min(file.size, MAX_XML + 1), "descriptor"), open_disk
    )
