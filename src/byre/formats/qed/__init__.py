"""qed: QEMU Enhanced Disk (specification: QEMU, docs/interop/qed_spec): the driver's entry points.

A header, an L1 table and L2 tables of equal size, clusters; no reference counts. Where new clusters go depends on the
length of the file alone. While an image may have clusters that no table names, a bit in the header says that it needs a
check; it is set before the first allocating write, and cleared when the image is closed or when a flush finds that
there was nothing left to write.
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
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Image format of the base image"),
    Option("cluster_size", "size", "Cluster size (in bytes)", 65536),
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("size", "size", "Virtual disk size"),
    Option("table_size", "size", "L1/L2 table size (in clusters)"),
)
CREATE_PRINT_ORDER: Final = ("size", "backing_file", "backing_fmt", "cluster_size", "table_size", "nocow",
                             "extent_size_hint")  # fmt: skip


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image."""
    from .image import open_qed

    return open_qed(request)


def check_create(options: OptionValues) -> None:
    """Refuse what :func:`create` would refuse, before a file is touched."""
    from .creation import plan

    plan(options)


def create(request: CreateRequest) -> None:
    """Write an empty image into ``request.file``."""
    from .creation import create_qed

    create_qed(request)


def measure(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes; see :func:`.creation.file_sizes`."""
    from .creation import file_sizes

    return file_sizes(options, virtual_size, data_bytes)
