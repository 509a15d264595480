"""vpc: VHD, the disk format of Virtual PC, Hyper-V, XenServer and Azure: the driver's entry points.

Fixed and dynamic disks are read, written and made; differencing disks are read. A fixed disk whose size is a
multiple of 1 MiB (``subformat=fixed,force_size=on``) is what Azure takes.
"""

from __future__ import annotations

from ...options import Option, OptionSet
from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ...graph.creating import CreateRequest
    from ...graph.node import Node
    from ...graph.opening import OpenRequest
    from ...options import OptionValues

__all__ = [
    "CHILDREN",
    "CREATE_OPTIONS",
    "CREATE_PRINT_ORDER",
    "OPTIONS",
    "check_create",
    "create",
    "measure",
    "measure_unit",
    "open_node",
]

CHILDREN: Final = ("file", "backing")

OPTIONS: Final = OptionSet(
    Option("force_size_calc", "enum", "Take the size from the geometry or from the footer, whoever made the image",
           None, ("chs", "current_size")),
)  # fmt: skip

CREATE_OPTIONS: Final = OptionSet(
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("force_size", "bool",
           "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based "
           "calculation"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("size", "size", "Virtual disk size"),
    Option("subformat", "enum", "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
           None, ("dynamic", "fixed")),
)  # fmt: skip

CREATE_PRINT_ORDER: Final = ("size", "subformat", "force_size", "nocow", "extent_size_hint")
"""The order in which "Formatting ..." names the options that are given."""


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image."""
    from .opening import open_vpc

    return open_vpc(request)


def check_create(options: OptionValues) -> None:
    """Refuse what :func:`create` would refuse, before a file is touched."""
    from .creation import plan_of

    plan_of(options)


def create(request: CreateRequest) -> None:
    """Write an empty image into ``request.file``."""
    from .creation import create_vpc

    create_vpc(request)


def measure_unit(_options: OptionValues) -> int:
    """In which pieces an image holds data, bytes."""
    from .creation import BLOCK_SIZE

    return BLOCK_SIZE


def measure(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes."""
    from .creation import file_sizes

    return file_sizes(options, virtual_size, data_bytes or 0)
