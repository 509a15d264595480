"""What opening an image has in common for the formats: bytes of a header, limits, read-only fall-back."""

from __future__ import annotations

from ..errors import ImageError, NotSupported
from ..typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest

__all__ = ["check_size", "fit_flags", "read_exactly", "read_head"]


def read_head(file: Node, length: int) -> bytearray:
    """The first ``length`` bytes of ``file``, fewer if it is shorter."""
    data = bytearray(min(length, file.size))
    if data:
        file.read_into(0, memoryview(data))
    return data


def read_exactly(file: Node, offset: int, length: int, what: str) -> bytearray:
    """``length`` bytes at ``offset``, which must be there: nothing is allocated on the word of an image.

    :raises ImageError: the file ends before
    """
    if offset + length > file.size:
        raise ImageError(f"the {what} of {length} bytes at {offset:#x} reaches past the end of the file "
                         f"({file.size:#x})", where=file.filename)  # fmt: skip
    data = bytearray(length)
    if length:
        file.read_into(offset, memoryview(data))
    return data


def check_size(request: OpenRequest, size: int) -> None:
    """:raises ImageError: the virtual size is larger than an untrusted image may have"""
    allowed = request.opener.policy.max_size
    if allowed and size > allowed:
        raise ImageError(f"the virtual size is {size}, allowed are {allowed} bytes for an untrusted image",
                         hint="raise --max-size")  # fmt: skip


def fit_flags(request: OpenRequest, file: Node, reason: str = "") -> OpenFlags:
    """The flags to open with: read-only if the file is.

    :param reason: why the image cannot be written at all, "" if it can
    :raises NotSupported: it cannot, but is to be written
    """
    flags = request.flags
    if flags.read_only:
        return flags
    if reason and not flags.auto_read_only:
        raise NotSupported(reason, where=file.filename, hint="open it read-only")
    return flags._replace(read_only=True) if reason or file.read_only else flags
