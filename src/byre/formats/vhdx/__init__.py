"""VHDX, the disk format of Hyper-V ([MS-VHDX]): the driver's entry points.

Fixed and dynamic disks are read, written and made; differencing disks are read. What the options do is in
:mod:`.opening` and :mod:`.creation`, loaded when needed.
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

OPTIONS: Final = OptionSet()

CREATE_OPTIONS: Final = OptionSet(
    Option("block_size", "size",
           "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.", 0),
    Option("block_state_zero", "bool",
           "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using "
           "'qemu-img convert' with subformat=dynamic."),
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("log_size", "size", "Log size; min 1MB.", 1 << 20),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("size", "size", "Virtual disk size; max of 64TB."),
    Option("subformat", "enum", "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.", None,
           ("dynamic", "fixed")),
)  # fmt: skip

CREATE_PRINT_ORDER: Final = (
    "size", "log_size", "block_size", "subformat", "block_state_zero", "nocow", "extent_size_hint",
)  # fmt: skip
"""The order in which "Formatting ..." names the options that are given or have a default."""


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image."""
    from .opening import open_vhdx

    return open_vhdx(request)


def check_create(options: OptionValues) -> None:
    """Refuse what :func:`create` would refuse, before a file is touched."""
    from .creation import plan_of

    plan_of(options)


def create(request: CreateRequest) -> None:
    """Write an empty image into ``request.file``."""
    from .creation import create_vhdx

    create_vhdx(request)


def measure_unit(options: OptionValues) -> int:
    """In which pieces an image holds data, bytes; ``size`` is among the options."""
    from .creation import block_size_of

    return block_size_of(options, options.number("size"))


def measure(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes."""
    from .creation import file_sizes

    return file_sizes(options, virtual_size, data_bytes or 0)
