"""VMDK, VMware's disks: one file or many, with a descriptor that says what they are.

Specification: VMware, "Virtual Disk Format 5.0"; libvmdk's description of the rest. Read: monolithic and split, sparse
and flat, stream-optimized, ESX sparse (COWD) and space-efficient sparse (SEsparse) disks. Written: all but the last
two, and streams as their kind allows: each grain once. Not supported: raw device mappings, encrypted disks.

Options are declared here; what they do is in :mod:`.opening` and :mod:`.creation`, loaded when needed.
"""

from __future__ import annotations

from ...options import Option, OptionSet, OptionValues
from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...graph.creating import CreateRequest
    from ...graph.node import Node
    from ...graph.opening import OpenRequest
    from .stream import StreamNode

__all__ = ["CAN_COMPRESS", "CHILDREN", "CREATE_OPTIONS", "CREATE_PRINT_ORDER", "OPTIONS", "check_create", "create",
           "created_files", "matches", "open_node", "open_stream"]  # fmt: skip

CHILDREN: Final = ("file", "backing", "extents")

OPTIONS: Final = OptionSet()

SUBFORMATS: Final = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat",
                     "streamOptimized")  # fmt: skip

CREATE_OPTIONS: Final = OptionSet(
    Option("adapter_type", "enum",
           "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX", None,
           ("ide", "lsilogic", "buslogic", "legacyESX")),
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Must be 'vmdk' if present"),
    Option("compat6", "bool", "VMDK version 6 image", False),
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("hwversion", "str", "VMDK hardware version", "undefined"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("preallocation", "enum", "Preallocation mode (allowed values: off, falloc, full)", None,
           ("off", "falloc", "full")),
    Option("size", "size", "Virtual disk size"),
    Option("subformat", "enum", "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | "
           "twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ", None, SUBFORMATS),
    Option("toolsversion", "str", "VMware guest tools version"),
    Option("zeroed_grain", "bool", "Enable efficient zero writes using the zeroed-grain GTE feature"),
)  # fmt: skip

CREATE_PRINT_ORDER: Final = (
    "size", "adapter_type", "backing_file", "backing_fmt", "compat6", "hwversion", "toolsversion", "subformat",
    "zeroed_grain", "extent_size_hint", "nocow", "preallocation",
)  # fmt: skip
"""The order in which "Formatting ..." names the options that are given or have a default."""

CAN_COMPRESS: Final = True
"""``convert -c`` is accepted; what it does depends on the subformat."""


def matches(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a descriptor, which has no signature."""
    from .descriptor import looks_like_descriptor

    return looks_like_descriptor(head)


def open_node(request: OpenRequest) -> Node:
    """The node of an existing disk."""
    from .opening import open_vmdk

    return open_vmdk(request)


def check_create(options: OptionValues) -> None:
    """Refuse what :func:`create` would refuse, before a file is touched."""
    from .creation import plan

    plan(options)


def create(request: CreateRequest) -> None:
    """Write an empty disk: into ``request.file``, and into extent files beside it."""
    from .creation import create_vmdk

    create_vmdk(request)


def open_stream(write: Callable[[bytes], None], options: OptionValues, filename: str) -> StreamNode:
    """The target of a copy that goes to ``write`` from beginning to end, and is complete after ``finish()``."""
    from .stream import StreamNode

    return StreamNode(write, options, filename)


def created_files(filename: str, options: OptionValues) -> list[str]:
    """Names of the extent files that :func:`create` makes beside ``filename``, as the descriptor has them."""
    from .creation import extent_names

    return extent_names(filename, options)
