"""Block ciphers in electronic code book mode, many blocks per call: what the modes in :mod:`.ciphers` are built from.

The ciphers themselves come from the ``cryptography`` package, or, for serpent and twofish, from libgcrypt where the
system has it. Nothing is imported before a key is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ..errors import InvalidArgument, NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

__all__ = ["ALGORITHMS", "SLACK", "Algorithm", "BlockCipher", "algorithm", "block_cipher", "cipher_primitives"]


class Algorithm(NamedTuple):
    """A cipher with one key size, under the name that QMP and the command line use.

    :ivar header_name: what LUKS headers call it; the key size is recorded beside it
    :ivar key_size: bytes
    :ivar block_size: bytes
    """

    name: str
    header_name: str
    key_size: int
    block_size: int = 16


ALGORITHMS: Final = {
    row.name: row
    for row in (
        Algorithm("aes-128", "aes", 16),
        Algorithm("aes-192", "aes", 24),
        Algorithm("aes-256", "aes", 32),
        Algorithm("cast5-128", "cast5", 16, 8),
        Algorithm("serpent-128", "serpent", 16),
        Algorithm("serpent-192", "serpent", 24),
        Algorithm("serpent-256", "serpent", 32),
        Algorithm("twofish-128", "twofish", 16),
        Algorithm("twofish-192", "twofish", 24),
        Algorithm("twofish-256", "twofish", 32),
    )
}


def algorithm(name: str) -> Algorithm:
    """:raises InvalidArgument: no cipher is called that"""
    found = ALGORITHMS.get(name)
    if found is None:
        raise InvalidArgument(f"unknown cipher {name!r}: expected one of {', '.join(ALGORITHMS)}")
    return found


SLACK: Final = 16
"""The library insists on this much room behind its output."""


class BlockCipher(Protocol):
    """Whole blocks, each on its own. Thread-safe.

    ``source`` and ``room`` are flat, contiguous and apart from each other; the result is the beginning of ``room``,
    which is ``SLACK`` bytes longer than ``source``.
    """

    def encrypt(self, source: Bytes, room: Bytes) -> None: ...
    def decrypt(self, source: Bytes, room: Bytes) -> None: ...

    def decrypt_chained(self, vector: bytes, source: Bytes, room: Bytes) -> None:
        """As :meth:`decrypt`; then each block is mixed with the encrypted one before it, the first with ``vector``."""


def block_cipher(kind: Algorithm, key: bytes) -> BlockCipher:
    """``kind`` with ``key``.

    :raises InvalidArgument: the key has another length
    :raises NotSupported: no library here offers the cipher
    """
    if len(key) != kind.key_size:
        raise InvalidArgument(f"cipher {kind.name} takes keys of {kind.key_size} bytes, not {len(key)}")
    if kind.header_name in ("aes", "cast5"):
        return _Library(kind, key)
    from .gcrypt import GcryptCipher

    return GcryptCipher(kind, key)


def cipher_primitives() -> tuple[ModuleType, ModuleType]:
    """``cryptography``'s modules (ciphers, algorithms).

    :raises NotSupported: the package is not installed
    """
    try:
        from cryptography.hazmat.primitives import ciphers
        from cryptography.hazmat.primitives.ciphers import algorithms
    except ImportError:
        raise NotSupported(
            "encryption needs the package 'cryptography', which is not installed",
            hint="install byre with its extra 'crypto': pip install 'byre[crypto]'",
        ) from None
    return ciphers, algorithms


class _Library:
    """AES or CAST5 from the ``cryptography`` package.

    A context of ECB carries nothing from one call on whole blocks to the next, but it is one object of the library:
    each call makes its own, which costs two microseconds and needs no lock.
    """

    def __init__(self, kind: Algorithm, key: bytes) -> None:
        ciphers, algorithms = cipher_primitives()
        cipher = _cast5() if kind.header_name == "cast5" else algorithms.AES
        from cryptography.hazmat.primitives.ciphers import modes

        self._cipher: Any = ciphers.Cipher(cipher(key), modes.ECB())
        self._chained: Callable[[bytes], Any] = lambda vector: ciphers.Cipher(cipher(key), modes.CBC(vector))

    def encrypt(self, source: Bytes, room: Bytes) -> None:
        self._cipher.encryptor().update_into(source, room)

    def decrypt(self, source: Bytes, room: Bytes) -> None:
        self._cipher.decryptor().update_into(source, room)

    def decrypt_chained(self, vector: bytes, source: Bytes, room: Bytes) -> None:
        self._chained(vector).decryptor().update_into(source, room)


def _cast5() -> Any:
    """CAST5, which newer releases of the library keep among the ciphers nobody should choose any more."""
    try:
        from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
    except ImportError:
        raise NotSupported("cipher cast5-128 is not offered by the installed 'cryptography' package") from None
    return CAST5
