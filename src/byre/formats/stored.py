"""What formats that keep everything in a file have in common: opening, other options while open, failing, sharing."""

from __future__ import annotations

from ..graph.node import PERM_ALL, PERM_READ
from ..typing import TYPE_CHECKING, cast
from .base import FormatNode

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..graph.child import Child
    from ..graph.node import Node
    from ..graph.opening import OpenFlags
    from ..options import OptionValues

__all__ = ["StoredFormat"]


class StoredFormat(FormatNode):
    """An open image in ``file``.

    :ivar runtime: the options it was opened with, by the format's declaration
    :ivar open_flags: the flags it was opened with
    :ivar force_share: whoever else uses the file is no concern
    """

    def __init__(self, file: Node, options: OptionValues, flags: OpenFlags, *, name: str = "",
                 read_only: bool | None = None) -> None:  # fmt: skip
        super().__init__(name=name, filename=file.filename,
                         read_only=flags.read_only if read_only is None else read_only)  # fmt: skip
        self.file = file
        self.runtime = options
        self.open_flags = flags
        self.force_share = flags.force_share
        self.detect_zeroes = flags.detect_zeroes
        self.pass_discard = flags.unmap
        self.report = file.debug_event if file.takes_events else None

    def guarded(self, action: Callable[[], None]) -> None:
        """A metadata change that fails half way takes the node out of service."""
        try:
            action()
        except BaseException as error:
            self.fail_stop(error)
            raise

    def reopen_commit(self, token: object) -> None:
        """:param token: (flags, options), as ``reopen_prepare`` returned them"""
        flags, options = cast("tuple[OpenFlags, OptionValues]", token)
        with self.lock:
            self.open_flags, self.runtime = flags, options
            self.read_only = flags.read_only
            self.detect_zeroes = flags.detect_zeroes
            self.pass_discard = flags.unmap

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        if self.force_share:
            return used & PERM_READ, PERM_ALL
        return super().child_permissions(child, used, shared)
