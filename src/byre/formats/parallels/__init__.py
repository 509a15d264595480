"""parallels: expandable disks of Parallels and Virtuozzo, and bundles of them: the driver's entry points.

Specifications: QEMU, docs/interop/parallels (the image) and docs/interop/prl-xml (``DiskDescriptor.xml``). A header, a
table of 32-bit entries (BAT), clusters of any multiple of 512 bytes. Two magics differ in the unit of the entries:
sectors ("WithoutFreeSpace") or clusters ("WithouFreSpacExt", which new images have). Bundles are read; so are the dirty
bitmaps of the format extension, which goes when an image is first written, for nobody here keeps it up to date.
"""

from __future__ import annotations

from ...options import Option, OptionSet
from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ...graph.creating import CreateRequest
    from ...graph.node import Node
    from ...graph.opening import OpenRequest
    from ...options import OptionValues

__all__ = ["CHILDREN", "CREATE_OPTIONS", "CREATE_PRINT_ORDER", "OPTIONS", "check_create", "create", "measure",
           "open_node"]  # fmt: skip

CHILDREN: Final = ("file", "backing")
OPTIONS: Final = OptionSet()
CREATE_OPTIONS: Final = OptionSet(
    Option("cluster_size", "size", "Parallels image cluster size", 1 << 20),
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("size", "size", "Virtual disk size"),
)
CREATE_PRINT_ORDER: Final = ("size", "cluster_size", "nocow", "extent_size_hint")


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image, or of a bundle, by its descriptor."""
    from .image import open_parallels

    return open_parallels(request)


def check_create(options: OptionValues) -> None:
    """Refuse what :func:`create` would refuse, before a file is touched."""
    from .creation import plan

    plan(options, options.number("size"))


def create(request: CreateRequest) -> None:
    """Write an empty image into ``request.file``."""
    from .creation import create_parallels

    create_parallels(request)


def measure(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes."""
    from .creation import file_sizes

    return file_sizes(options, virtual_size, data_bytes)
