"""Hash functions by the names that LUKS headers and the command line use."""

from __future__ import annotations

from typing import Final

from ..errors import InvalidArgument, NotSupported

__all__ = ["HASHES", "check_hash", "digest_size", "new_digest"]

HASHES: Final = {"md5": 16, "sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64, "ripemd160": 20}
"""Digest sizes in bytes."""


def digest_size(name: str) -> int:
    """:raises InvalidArgument: byre does not know the hash"""
    size = HASHES.get(name)
    if size is None:
        raise InvalidArgument(f"unknown hash {name!r}: expected one of {', '.join(HASHES)}")
    return size


def new_digest(name: str, data: bytes) -> bytes:
    """The digest of ``data``.

    :raises NotSupported: this Python's library does not have the hash
    """
    import hashlib

    check_hash(name)
    return hashlib.new(name, data, usedforsecurity=True).digest()


def check_hash(name: str) -> str:
    """``name``, which this Python can compute.

    :raises InvalidArgument: byre does not know the hash
    :raises NotSupported: this Python's library does not have it
    """
    import hashlib

    digest_size(name)
    try:
        hashlib.new(name)
    except ValueError:
        raise NotSupported(f"hash {name} is not offered by this Python's library") from None
    return name
