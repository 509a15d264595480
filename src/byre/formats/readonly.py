"""What the formats that are only read have in common: opening and refusing."""

from __future__ import annotations

from ..errors import ImageError, NotSupported
from ..graph.node import PERM_ALL, PERM_READ
from ..typing import TYPE_CHECKING
from .base import FormatNode
from .opening import check_size, fit_flags

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..graph.child import Child
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest
    from ..options import OptionValues

__all__ = ["ReadOnlyFormat", "open_read_only"]


class ReadOnlyFormat(FormatNode):
    """An open image of a format that byre only reads. A subclass reads its header and sets ``_size``."""

    def __init__(self, file: Node, flags: OpenFlags, *, name: str = "") -> None:
        super().__init__(name=name, filename=file.filename, read_only=True)
        self.file = file
        self.open_flags = flags
        self.force_share = flags.force_share
        self.report = file.debug_event if file.takes_events else None

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        if self.force_share:
            return used & PERM_READ, PERM_ALL
        return super().child_permissions(child, used, shared)

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        if not flags.read_only:
            raise NotSupported(refusal(self.driver), where=self.filename)
        return flags


def refusal(driver: str) -> str:
    """Why nothing is written."""
    return f"{driver} images can only be read"


def open_read_only(request: OpenRequest, make: Callable[[Node, OpenFlags], ReadOnlyFormat]) -> ReadOnlyFormat:
    """The node that ``make`` reads from the child "file", attached.

    :raises ImageError: as ``make`` says, with the file's name
    :raises NotSupported: it is to be written
    """
    file = request.open_child("file")
    flags = fit_flags(request, file, refusal(request.row.name))
    try:
        node = make(file, flags)
        check_size(request, node.size)
    except ImageError as error:
        error.where = error.where or file.filename
        raise
    node.name = request.name
    node.sources = (request.opener.graph.attach(node, "file", file, "data"),)
    return node
