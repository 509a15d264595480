"""vvfat: a folder shown as a disk with a FAT file system, read-only.

Structures follow Microsoft's "FAT: General Overview of On-Disk Format"; names and defaults are those of the field:
``fat:[floppy:][12|16|32:]FOLDER``. The folder is listed when the disk is opened; the files are read when they are asked
for. What changes in the folder meanwhile does not show, apart from the bytes of the files.
"""

from __future__ import annotations

from ...errors import InvalidArgument, NotSupported
from ...options import Option, OptionSet
from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ...graph.node import Node
    from ...graph.opening import OpenRequest

__all__ = ["OPTIONS", "open_node", "parse_filename"]

OPTIONS: Final = OptionSet(
    Option("dir", "str", "folder that is shown"),
    Option("fat-type", "int", "12, 16 or 32 bits in an entry of the table", 0),
    Option("floppy", "bool", "a floppy disk rather than a hard disk with one partition", False),
    Option("label", "str", "label of the volume, at most 11 characters", "QEMU VVFAT"),
    Option("rw", "bool", "writable, which is not supported", False),
)


def parse_filename(rest: str) -> dict[str, object]:
    """Options for ``fat:`` followed by ``rest``."""
    options: dict[str, object] = {}
    words = {"floppy": ("floppy", True), "rw": ("rw", True), "12": ("fat-type", 12), "16": ("fat-type", 16),
             "32": ("fat-type", 32)}  # fmt: skip
    while True:
        word, colon, more = rest.partition(":")
        if not colon or word not in words:
            return {**options, "dir": rest}
        key, value = words[word]
        options[key] = value
        rest = more


def open_node(request: OpenRequest) -> Node:
    """The disk that shows a folder.

    :raises InvalidArgument: options that make no disk, or a folder that does not fit
    :raises NotSupported: it is to be written
    """
    from .disk import VvfatNode
    from .geometry import Shape
    from .tree import scan

    options = request.options
    folder, label = options.text("dir"), options.word("label")
    if not folder:
        raise InvalidArgument("vvfat needs the folder to show, as 'dir'")
    if options.flag("rw") or not (request.flags.read_only or request.flags.auto_read_only):
        raise NotSupported(
            "a folder can only be shown read-only", where=folder, hint="leave out rw, and open it read-only"
        )
    if len(label) > 11 or not label.isascii() or not label.isprintable():
        raise InvalidArgument(f"the label {label!r} has more than 11 plain characters")
    floppy, bits = options.flag("floppy"), options.number("fat-type")
    if bits not in (0, 12, 16, 32) or (floppy and bits not in (0, 12)):
        raise InvalidArgument(f"fat-type is {bits}: expected 12{'' if floppy else ', 16 or 32'}")
    root = scan(folder)
    shape = Shape.fit(root, bits or (12 if floppy else 16), floppy=floppy, where=folder)
    return VvfatNode(root, shape, label, name=request.name, filename=f"fat:{folder}")
