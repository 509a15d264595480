"""What a byte range of one layer is: the answer every format and protocol gives.

Kinds and request flags are plain integers: an ``IntFlag`` operation costs more than
the system call it would accompany.
"""

from __future__ import annotations

from ..typing import Final, NamedTuple

__all__ = [
    "COMPRESSED",
    "DATA",
    "FUA",
    "KIND_NAMES",
    "MAY_UNMAP",
    "NOT_COUNTED",
    "NO_FALLBACK",
    "NO_HOST",
    "UNALLOCATED",
    "WRITTEN_ZERO",
    "ZERO",
    "Extent",
]

DATA: Final = 0
"""Bytes at ``host`` in data child number ``source``."""
ZERO: Final = 1
"""Reads as zeroes; with a host it is allocated as well."""
UNALLOCATED: Final = 2
"""Not in this layer: look in the backing file (zeroes if there is none or it is shorter)."""
COMPRESSED: Final = 3
"""The format must decode it; ``host`` is the format's own descriptor, opaque to everyone else."""

KIND_NAMES: Final = ("data", "zero", "unallocated", "compressed")
NO_HOST: Final = -1
NOT_COUNTED: Final = -1
"""``source`` of DATA that must be read like any other, but that a protocol says is not allocated."""
WRITTEN_ZERO: Final = -2
"""``source`` of what a protocol says is allocated and reads as zeroes."""

FUA: Final = 1
"""The write is durable when the call returns."""
MAY_UNMAP: Final = 2
"""write_zeroes may give the space back."""
NO_FALLBACK: Final = 4
"""write_zeroes raises NotSupported instead of writing buffers of zeroes."""


class Extent(NamedTuple):
    """``length`` bytes from guest ``offset`` that are alike; see the kinds above."""

    offset: int
    length: int
    kind: int
    host: int = NO_HOST
    source: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length
