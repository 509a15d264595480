"""Bulk ciphers give, sector by sector, what the library's own modes give for one sector."""

from __future__ import annotations

import hashlib
import os
import random
import threading

import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from byre.crypto.ciphers import CipherSpec, SectorCipher, make_cipher
from byre.crypto.gcrypt import available
from byre.crypto.primitives import ALGORITHMS, algorithm
from byre.errors import ByreError, InvalidArgument, NotSupported

SECTOR = 512


def reference(spec: CipherSpec, key: bytes, number: int, data: bytes, *, encrypt: bool) -> bytes:
    """One sector, by the library."""
    size = spec.algorithm.block_size
    kind = CAST5 if spec.algorithm.header_name == "cast5" else algorithms.AES
    plain = number & 0xFFFFFFFF if spec.iv_generator == "plain" else number
    vector = plain.to_bytes(size, "little")
    if spec.iv_generator == "essiv":
        salt = hashlib.new(spec.iv_hash, key).digest()
        vector = Cipher(algorithms.AES(salt), modes.ECB()).encryptor().update(vector)
    if spec.mode == "xts":
        # One library call per block keeps essiv tweaks possible and long sectors plain.
        cipher = Cipher(kind(key), modes.XTS(vector))
    elif spec.mode == "cbc":
        cipher = Cipher(kind(key), modes.CBC(vector))
    elif spec.mode == "ecb":
        cipher = Cipher(kind(key), modes.ECB())
    elif kind is CAST5:
        first = int.from_bytes(vector, "big")
        count = range(first, first + len(data) // size)
        counters = b"".join((n % (1 << 64)).to_bytes(size, "big") for n in count)
        stream = Cipher(kind(key), modes.ECB()).encryptor().update(counters)
        return bytes(a ^ b for a, b in zip(stream, data, strict=True))
    else:
        cipher = Cipher(kind(key), modes.CTR(vector))
    context = cipher.encryptor() if encrypt else cipher.decryptor()
    return context.update(data)


GRID = [
    ("aes-128", "xts", "plain64", ""),
    ("aes-256", "xts", "plain64", ""),
    ("aes-192", "cbc", "plain64", ""),
    ("aes-256", "cbc", "essiv", "sha256"),
    ("aes-128", "cbc", "essiv", "md5"),
    ("aes-256", "cbc", "plain", ""),
    ("aes-256", "xts", "essiv", "sha256"),
    ("aes-256", "xts", "plain", ""),
    ("aes-256", "ecb", "", ""),
    ("aes-256", "ctr", "plain64", ""),
    ("aes-256", "ctr", "essiv", "sha256"),
    ("cast5-128", "cbc", "plain64", ""),
    ("cast5-128", "ecb", "plain64", ""),
    ("cast5-128", "ctr", "plain64", ""),
]


def cipher_of(name: str, mode: str, generator: str, iv_hash: str, seed: int = 1) -> tuple[SectorCipher, bytes]:
    spec = CipherSpec(algorithm(name), mode, generator, iv_hash).check()
    key = random.Random(seed).randbytes(spec.key_size)
    return SectorCipher(spec, key), key


@pytest.mark.parametrize("words", GRID, ids="-".join)
class TestAgainstTheLibrary:
    def test_any_length_and_position(self, words: tuple[str, str, str, str]) -> None:
        cipher, key = cipher_of(*words)
        chooser = random.Random(2)
        # Around a piece, one sector, many; numbers that need 32, 33 and 40 bits.
        for count in (1, 2, 5, 127, 128, 129, 300):
            for first in (0, 1, 12345, (1 << 32) - 3, (1 << 40) + 7):
                data = chooser.randbytes(count * SECTOR)
                buffer = bytearray(data)
                cipher.encrypt(first * SECTOR, buffer)
                for index in {0, count // 2, count - 1}:
                    part = slice(index * SECTOR, (index + 1) * SECTOR)
                    expected = reference(cipher.spec, key, first + index, data[part], encrypt=True)
                    assert bytes(buffer[part]) == expected, (count, first, index)
                cipher.decrypt(first * SECTOR, memoryview(buffer))
                assert bytes(buffer) == data

    def test_pieces_do_not_matter(self, words: tuple[str, str, str, str]) -> None:
        cipher, _ = cipher_of(*words)
        data = random.Random(3).randbytes(5000 * SECTOR)
        whole, parts = bytearray(data), bytearray(data)
        cipher.encrypt(1 << 20, whole)
        view, position = memoryview(parts), 0
        while position < len(parts):
            step = min(random.Random(position).choice((1, 3, 130, 2048)) * SECTOR, len(parts) - position)
            cipher.encrypt((1 << 20) + position, view[position : position + step])
            position += step
        assert whole == parts


class TestKnownAnswers:
    def test_ieee_1619_vector_2(self) -> None:
        """The first 32 bytes of a data unit, from the standard's annex B."""
        cipher = make_cipher("aes-128", "xts", b"\x11" * 16 + b"\x22" * 16)
        data = bytearray(b"\x44" * SECTOR)
        cipher.encrypt(0x3333333333 * SECTOR, data)
        assert data[:32].hex() == "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"


@pytest.mark.parametrize("sector_size", [1024, 2048, 4096])
@pytest.mark.parametrize("mode", ["xts", "cbc"])
def test_long_sectors_count_in_512_bytes(mode: str, sector_size: int) -> None:
    spec = CipherSpec(algorithm("aes-256"), mode).check()
    key = os.urandom(spec.key_size)
    cipher = SectorCipher(spec, key, sector_size=sector_size, first_sector=9)
    data = os.urandom(sector_size * 67)
    buffer = bytearray(data)
    cipher.encrypt(sector_size * 10, buffer)
    for index in (0, 33, 66):
        part = slice(index * sector_size, (index + 1) * sector_size)
        number = 9 + (10 + index) * sector_size // SECTOR
        assert buffer[part] == reference(spec, key, number, data[part], encrypt=True)
    cipher.decrypt(sector_size * 10, buffer)
    assert buffer == data


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name.startswith(("serpent", "twofish"))])
def test_ciphers_of_the_system_library(name: str) -> None:
    spec = CipherSpec(algorithm(name), "xts")
    key = bytes(range(spec.key_size))
    if not available(name):
        with pytest.raises(NotSupported, match=name):
            SectorCipher(spec, key)
        return
    cipher = SectorCipher(spec, key)
    data = os.urandom(SECTOR * 200)
    buffer = bytearray(data)
    cipher.encrypt(0, buffer)
    assert buffer != data
    cipher.decrypt(0, buffer)
    assert buffer == data


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        # Twofish: its authors' known answers. Serpent: NESSIE, set 1, vector 0.
        ("twofish-128", bytes(16), "9f589f5cf6122c32b6bfec2f2ae8c35a"),
        ("twofish-256", bytes(32), "57ff739d4dc92c1bd7fc01700cc8216f"),
        ("serpent-128", b"\x80" + bytes(15), "264e5481eff42a4606abda06c0bfda3d"),
        ("serpent-192", b"\x80" + bytes(23), "9e274ead9b737bb21efcfca548602689"),
        ("serpent-256", b"\x80" + bytes(31), "a223aa1288463c0e2be38ebd825616c0"),
    ],
)
def test_known_answers_of_the_system_library(name: str, key: bytes, expected: str) -> None:
    if not available(name):
        pytest.skip("the system's libgcrypt")
    buffer = bytearray(SECTOR)
    SectorCipher(CipherSpec(algorithm(name), "ecb"), key).encrypt(0, buffer)
    assert buffer.hex() == expected * (SECTOR // 16)


def test_parts_of_sectors_are_refused() -> None:
    cipher, _ = cipher_of("aes-128", "xts", "plain64", "")
    for position, length in ((1, 512), (0, 511), (512, 100)):
        with pytest.raises(InvalidArgument, match="whole sectors"):
            cipher.encrypt(position, bytearray(length))


def test_threads_do_not_disturb_each_other() -> None:
    cipher, _ = cipher_of("aes-256", "xts", "plain64", "")
    failures: list[int] = []

    def work(seed: int) -> None:
        chooser = random.Random(seed)
        for _ in range(20):
            data = chooser.randbytes(chooser.randrange(1, 300) * SECTOR)
            position = chooser.randrange(1 << 30) * SECTOR
            buffer = bytearray(data)
            cipher.encrypt(position, buffer)
            cipher.decrypt(position, buffer)
            if buffer != data:
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    "words",
    [
        ("cast5-128", "xts", "plain64", ""),
        ("aes-256", "cbc", "essiv", "sha1"),
        ("aes-256", "cbc", "essiv", ""),
        ("aes-256", "cbc", "essiv", "tiger"),
        ("aes-256", "cbc", "benbi", ""),
        ("aes-256", "gcm", "plain64", ""),
        ("aes-512", "xts", "plain64", ""),
    ],
    ids="-".join,
)
def test_words_that_do_not_go_together(words: tuple[str, str, str, str]) -> None:
    with pytest.raises(ByreError):
        cipher_of(*words)


@pytest.mark.parametrize("words", GRID, ids="-".join)
def test_what_headers_say_comes_back(words: tuple[str, str, str, str]) -> None:
    spec = CipherSpec(algorithm(words[0]), *words[1:])
    assert CipherSpec.from_header(spec.algorithm.header_name, spec.header_mode(), spec.key_size) == spec


def test_a_cipher_does_not_show_its_key() -> None:
    cipher = make_cipher("aes-128", "cbc", b"0123456789abcdef")
    assert "0123" not in repr(cipher)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(NotSupported, match=r"byre\[crypto\]"):
        make_cipher("aes-128", "cbc", bytes(16))
