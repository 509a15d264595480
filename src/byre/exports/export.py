"""Export: an Image offered to the outside. What is common to all kinds; NBD is in :mod:`.nbd`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ReadOnly

if TYPE_CHECKING:
    from ..image import Image

__all__ = ["Export"]


class Export:
    """An image, and as what it is offered. The image stays the caller's, who closes it after the export.

    :ivar id: what the monitor calls it
    :ivar writable: clients may write
    """

    kind = ""

    def __init__(self, image: Image, *, id: str = "", writable: bool = False) -> None:
        """:raises ReadOnly: ``writable``, and the image is open read-only"""
        if writable and image.read_only:
            raise ReadOnly("cannot be exported for writing: the image is open read-only", where=image.filename)
        self.image = image
        self.id = id
        self.writable = writable

    def close(self) -> None:
        """Nobody uses it any more: let go of what it keeps busy. Closing twice is fine."""
