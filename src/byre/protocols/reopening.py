"""Other flags for an open file: a second descriptor of it is made ready, then takes the first one's place."""

from __future__ import annotations

import os

from ..errors import ByreError, InvalidArgument
from ..typing import TYPE_CHECKING, NamedTuple
from . import descriptor

if TYPE_CHECKING:
    from ..graph.node import Limits
    from ..graph.opening import OpenFlags
    from ..io.align import AlignedAccess
    from ..options import OptionValues
    from .file import FileNode

__all__ = ["abort", "commit", "prepare"]


class _Prepared(NamedTuple):
    """What :func:`prepare` made."""

    opened: descriptor.Descriptor
    flags: OpenFlags
    options: OptionValues
    direct: AlignedAccess | None
    limits: Limits


def prepare(node: FileNode, flags: OpenFlags, options: OptionValues) -> object:
    """Open the file again, with the locks of now.

    :raises InvalidArgument: another file name or locking mode
    """
    for name, before in (("filename", node.filename), ("locking", node._locks.mode)):
        if name in options and options.text(name) != before:
            raise InvalidArgument(f"cannot change the option {name!r} of an open file", where=node._where)
    opened = descriptor.reopen_descriptor(
        node._fd, node.filename, node.identity,
        read_only=flags.read_only, direct=flags.direct, auto_read_only=flags.auto_read_only,
    )  # fmt: skip
    try:
        direct, limits = node._prepare_direct(opened, flags)
        node._locks.copy_to(opened.fd)
    except BaseException:
        os.close(opened.fd)
        raise
    return _Prepared(opened, flags, options, direct, limits)


def commit(node: FileNode, token: object) -> None:
    """The new descriptor takes the place of the old one; cannot fail."""
    assert isinstance(token, _Prepared)
    try:
        node._locks.copy_to(token.opened.fd)
    except ByreError:
        pass  # nothing is left to do unless permissions changed since
    old = node._fd
    node._fd = token.opened.fd
    node.open_flags, node.runtime = token.flags, token.options
    node.read_only = token.opened.read_only
    node._direct, node.limits = token.direct, token.limits
    node._space.fd, node._space.direct = node._fd, node._direct
    node._flushes.move(node._fd)
    descriptor.close_quietly(old)


def abort(token: object) -> None:
    """Close what :func:`prepare` opened."""
    assert isinstance(token, _Prepared)
    descriptor.close_quietly(token.opened.fd)
