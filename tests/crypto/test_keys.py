"""Key derivation and the anti-forensic splitter."""

from __future__ import annotations

import hashlib
import os

import pytest

from byre.crypto import keys
from byre.crypto.hashes import HASHES
from byre.errors import ByreError, ImageError, InvalidArgument


def test_pbkdf2_of_rfc_6070() -> None:
    assert keys.pbkdf2("sha1", b"password", b"salt", 4096, 20).hex() == "4b007901b765489abead49d926f721d065a429c1"


def test_unknown_hash() -> None:
    with pytest.raises(InvalidArgument, match="tiger"):
        keys.pbkdf2("tiger", b"a", b"b", 1, 16)


@pytest.mark.parametrize("hash_name", list(HASHES))
@pytest.mark.parametrize("size", [16, 24, 32, 64])
def test_split_and_merge(hash_name: str, size: int) -> None:
    key = os.urandom(size)
    try:
        material = keys.af_split(key, 50, hash_name)
    except ByreError as error:  # a hash that this Python's library does not have
        pytest.skip(str(error))
    assert len(material) == 50 * size
    assert keys.af_merge(material, 50, hash_name) == key
    damaged = bytearray(material)
    damaged[len(material) // 2] ^= 1
    assert keys.af_merge(bytes(damaged), 50, hash_name) != key


def test_merge_as_the_specification_spells_it() -> None:
    """d[k] = H(d[k-1] xor s[k]); key = d[n-1] xor s[n], H hashing each digest-sized piece with its number."""
    size, stripes = 40, 5
    material = bytes(range(200))

    def diffuse(data: bytes) -> bytes:
        first = hashlib.sha256((0).to_bytes(4, "big") + data[:32]).digest()
        return first + hashlib.sha256((1).to_bytes(4, "big") + data[32:]).digest()[:8]

    state = bytes(size)
    for index in range(stripes - 1):
        part = material[index * size : (index + 1) * size]
        state = diffuse(bytes(a ^ b for a, b in zip(state, part, strict=True)))
    expected = bytes(a ^ b for a, b in zip(state, material[-size:], strict=True))
    assert keys.af_merge(material, stripes, "sha256") == expected


def test_iterations_have_a_floor_and_grow_with_the_time() -> None:
    assert keys.iterations_for("sha256", 32, 0) == 1000
    assert keys.iterations_for("sha256", 32, 1) >= 1000
    assert keys.iterations_for("sha256", 32, 500) > 2000


@pytest.mark.parametrize("count", [0, -1, keys.MAX_ITERATIONS + 1])
def test_iterations_of_an_image_are_limited(count: int) -> None:
    with pytest.raises(ImageError, match="iterations"):
        keys.check_iterations(count, keys.MAX_ITERATIONS, "a key slot")


@pytest.mark.parametrize("kind", ["argon2i", "argon2id"])
def test_argon2(kind: str) -> None:
    one = keys.argon2(kind, b"secret", b"0123456789abcdef", 32, passes=4, memory=64, lanes=2)
    assert len(one) == 32
    assert one == keys.argon2(kind, b"secret", b"0123456789abcdef", 32, passes=4, memory=64, lanes=2)
    assert one != keys.argon2(kind, b"Secret", b"0123456789abcdef", 32, passes=4, memory=64, lanes=2)


@pytest.mark.parametrize(
    ("passes", "memory", "lanes"),
    [(0, 64, 1), (1, 4, 1), (1, 1 << 23, 1), (1 << 20, 1 << 20, 1), (1, 64, 0), (1, 64, 99)],
)
def test_argon2_has_limits(passes: int, memory: int, lanes: int) -> None:
    with pytest.raises(ImageError):
        keys.argon2("argon2id", b"s", b"0123456789abcdef", 32, passes=passes, memory=memory, lanes=lanes)
