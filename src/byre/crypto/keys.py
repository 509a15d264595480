"""Keys from passphrases, and key material spread over many bytes so that it can be wiped (LUKS1 specification, 2.4)."""

from __future__ import annotations

import hashlib
import os
from typing import Final

from ..errors import ImageError, InvalidArgument, NotSupported
from .hashes import check_hash, digest_size

__all__ = ["MAX_ITERATIONS", "MIN_ITERATIONS", "af_merge", "af_split", "argon2", "iterations_for", "pbkdf2"]

MIN_ITERATIONS: Final = 1000
"""New key slots never have fewer, whatever the time allowed."""
MAX_ITERATIONS: Final = 100_000_000
"""What an image may ask for, unless its user says otherwise: beyond this, opening is an attack on the processor."""
MAX_ARGON2_MEMORY: Final = 4 << 20
"""KiB; also the most that cryptsetup writes."""
MAX_ARGON2_WORK: Final = 1 << 30
"""KiB times passes."""

_BENCHMARK_SECONDS: Final = 0.05


def pbkdf2(hash_name: str, secret: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """``length`` bytes (RFC 8018, PBKDF2 with HMAC). Runs outside the interpreter lock.

    :raises NotSupported: the hash is not offered here
    """
    check_hash(hash_name)
    return hashlib.pbkdf2_hmac(hash_name, secret, salt, iterations, length)


def check_iterations(iterations: int, limit: int, what: str) -> None:
    """:raises ImageError: an image asks for too many, or none"""
    if not 1 <= iterations <= limit:
        raise ImageError(f"{what} asks for {iterations} iterations, allowed are 1 to {limit}")


def iterations_for(hash_name: str, length: int, milliseconds: int) -> int:
    """Iterations of PBKDF2 that take this machine about ``milliseconds`` of processor time, at least 1000."""
    import time

    if milliseconds <= 0:
        return MIN_ITERATIONS
    count = 1 << 14
    while True:
        started = time.thread_time()
        pbkdf2(hash_name, b"password", b"salt" * 8, count, length)
        spent = time.thread_time() - started
        if spent >= _BENCHMARK_SECONDS:
            break
        count *= 2 if spent * 4 > _BENCHMARK_SECONDS else 4
    return max(MIN_ITERATIONS, min(MAX_ITERATIONS, int(count / spent * milliseconds / 1000)))


def argon2(kind: str, secret: bytes, salt: bytes, length: int, *, passes: int, memory: int, lanes: int) -> bytes:
    """``length`` bytes (RFC 9106).

    :param kind: "argon2i" or "argon2id"
    :param memory: KiB
    :raises ImageError: parameters outside their limits
    :raises NotSupported: the installed library does not have it
    """
    if passes < 1 or not 8 * lanes <= memory <= MAX_ARGON2_MEMORY or not 1 <= lanes <= 64:
        raise ImageError(f"{kind} with {passes} passes, {memory} KiB and {lanes} lanes is outside its limits "
                         f"(memory up to {MAX_ARGON2_MEMORY} KiB)")  # fmt: skip
    if passes * memory > MAX_ARGON2_WORK:
        raise ImageError(f"{kind} with {passes} passes over {memory} KiB takes more work than is allowed")
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.kdf import argon2 as library
    except ImportError:
        raise NotSupported(f"{kind} needs a recent package 'cryptography'",
                           hint="pip install --upgrade 'byre[crypto]'") from None  # fmt: skip
    maker = getattr(library, {"argon2i": "Argon2i", "argon2id": "Argon2id"}[kind], None)
    if maker is None:
        raise NotSupported(f"{kind} is not offered by the installed package 'cryptography'")
    try:
        made = maker(salt=salt, length=length, iterations=passes, lanes=lanes, memory_cost=memory)
        return bytes(made.derive(secret))
    except UnsupportedAlgorithm:
        raise NotSupported(f"{kind} is not offered by the library below the package 'cryptography'") from None
    except (ValueError, OverflowError) as error:
        raise ImageError(f"{kind}: {error}") from None


# -- anti-forensic splitter -----------------------------------------------------------------------


def af_split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """``stripes`` times as many bytes, all of which are needed to get ``key`` back."""
    size = len(key)
    if stripes < 1:
        raise InvalidArgument("key material needs at least one stripe")
    random = os.urandom(size * (stripes - 1))
    mixed = _folded(random, size, hash_name)
    return random + _xor(mixed, key)


def af_merge(material: bytes, stripes: int, hash_name: str) -> bytes:
    """The key that :func:`af_split` spread."""
    size = len(material) // stripes
    last = size * (stripes - 1)
    return _xor(_folded(material[:last], size, hash_name), material[last : last + size])


def _folded(material: bytes, size: int, hash_name: str) -> bytes:
    check_hash(hash_name)
    state = bytes(size)
    for at in range(0, len(material), size):
        state = _diffuse(_xor(state, material[at : at + size]), hash_name)
    return state


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


def _diffuse(data: bytes, hash_name: str) -> bytes:
    """Every piece of a digest's length becomes the digest of its number and itself."""
    step, new = digest_size(hash_name), hashlib.new
    parts = []
    for index, at in enumerate(range(0, len(data), step)):
        piece = data[at : at + step]
        parts.append(new(hash_name, index.to_bytes(4, "big") + piece).digest()[: len(piece)])
    return b"".join(parts)
