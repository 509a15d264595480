"""What stands for the cipher of an image that was opened without its key: metadata can be looked at, data cannot."""

from __future__ import annotations

from typing import NoReturn

from ..errors import AccessDenied

__all__ = ["LockedCipher", "missing_key"]


def missing_key(option: str) -> AccessDenied:
    """The refusal of an image whose key was not given; ``option`` names the secret."""
    return AccessDenied(f"the image is encrypted and option {option!r} is not given",
                        hint=f"define a secret with --object secret,id=ID,file=PATH and give {option}=ID")  # fmt: skip


class LockedCipher:
    """Refuses every request. :param where: the image, for messages"""

    by_host = False
    sector_size = 512

    def __init__(self, where: str) -> None:
        self._where = where

    def encrypt(self, position: int, buffer: bytearray | memoryview) -> NoReturn:
        raise AccessDenied("the image was opened without its key", where=self._where)

    decrypt = encrypt
