"""Serpent and twofish from the system's libgcrypt, through ctypes; without that library they are refused."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from ..errors import IOFailure, NotSupported

if TYPE_CHECKING:
    import ctypes

    from .primitives import Algorithm, Bytes

__all__ = ["GcryptCipher", "available"]

# Numbers of the library's stable interface (its manual, "Available ciphers" and "Available cipher modes").
_NUMBERS: Final = {"twofish-256": 10, "twofish-128": 303, "serpent-128": 304, "serpent-192": 305, "serpent-256": 306}
_MODE_ECB: Final = 1


def available(name: str) -> bool:
    """Whether cipher ``name`` can be had here."""
    return name in _NUMBERS and _load() is not None


def _load() -> ctypes.CDLL | None:
    import ctypes

    try:
        library = ctypes.CDLL("libgcrypt.so.20")
    except OSError:
        return None
    library.gcry_check_version.restype = ctypes.c_char_p
    library.gcry_check_version.argtypes = [ctypes.c_char_p]
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.gcry_cipher_open.argtypes = [ctypes.POINTER(pointer), ctypes.c_int, ctypes.c_int, ctypes.c_uint]
    library.gcry_cipher_setkey.argtypes = [pointer, ctypes.c_char_p, size]
    library.gcry_cipher_encrypt.argtypes = [pointer, pointer, size, pointer, size]
    library.gcry_cipher_decrypt.argtypes = [pointer, pointer, size, pointer, size]
    library.gcry_cipher_close.argtypes = [pointer]
    library.gcry_cipher_close.restype = None
    library.gcry_check_version(None)  # the library asks for this call before any other
    return library


class GcryptCipher:
    """One keyed cipher; see :class:`.primitives.BlockCipher`.

    Guarded by ``_lock``: the library's handle, which must not be used by two threads at once.

    :raises NotSupported: the library is not there, or does not have the cipher
    """

    def __init__(self, kind: Algorithm, key: bytes) -> None:
        import ctypes

        number = _NUMBERS.get(kind.name)
        library = _load() if number is not None else None
        if number is None or library is None:
            raise NotSupported(f"cipher {kind.name} is not offered by any library here",
                               hint="" if number is None else "it needs libgcrypt (libgcrypt.so.20)")  # fmt: skip
        self._library: Any = library
        self._lock = threading.Lock()
        self._handle = ctypes.c_void_p()
        self._check(library.gcry_cipher_open(ctypes.byref(self._handle), number, _MODE_ECB, 0), "open")
        self._check(library.gcry_cipher_setkey(self._handle, key, len(key)), "key")

    def encrypt(self, source: Bytes, room: Bytes) -> None:
        self._run(self._library.gcry_cipher_encrypt, source, room)

    def decrypt(self, source: Bytes, room: Bytes) -> None:
        self._run(self._library.gcry_cipher_decrypt, source, room)

    def decrypt_chained(self, vector: bytes, source: Bytes, room: Bytes) -> None:
        import numpy as np

        self.decrypt(source, room)
        block = len(vector)
        room[block : source.nbytes] ^= source[:-block]
        room[:block] ^= np.frombuffer(vector, np.uint8)

    def _run(self, function: Any, source: Bytes, room: Bytes) -> None:
        length = source.nbytes
        with self._lock:
            result = function(self._handle, room.ctypes.data, length, source.ctypes.data, length)
        self._check(result, "use")

    @staticmethod
    def _check(result: int, what: str) -> None:
        if result:
            raise IOFailure(f"libgcrypt cannot {what} the cipher (error {result & 0xFFFF})")

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle:
            self._library.gcry_cipher_close(handle)
