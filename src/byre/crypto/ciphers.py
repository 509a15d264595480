"""Disk encryption: sectors in bulk, each with an initialization vector that follows from its number.

A mode handles many sectors in one call: all blocks of a piece go through the cipher at once, and numpy does what is
between them. Pieces are long, for each step lets go of the interpreter lock, and threads that pass it to and fro do
less than one alone. Which position of a sector counts, in the guest's disk or in the file, is the format's affair.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import InvalidArgument, NotSupported
from .hashes import digest_size, new_digest
from .primitives import SLACK, Algorithm, BlockCipher, algorithm, block_cipher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Words = NDArray[np.uint64]

__all__ = ["IV_GENERATORS", "MODES", "CipherSpec", "SectorCipher", "make_cipher"]

MODES: Final = ("xts", "cbc", "ecb", "ctr")
IV_GENERATORS: Final = ("plain", "plain64", "essiv")

_WORD: Final = "<u8"
_PIECE: Final = 1 << 20
"""Bytes that go through a cipher at once, at most. A thread keeps five times as much memory for them."""
_CHAIN: Final = _PIECE // 512
"""Sectors decrypted in one chain."""
_GROUP: Final = 32
"""Tweaks are computed for so many blocks from one: the carry of a shift by less fits into 64 bits."""


class CipherSpec(NamedTuple):
    """How sectors are encrypted.

    :ivar mode: one of ``MODES``
    :ivar iv_generator: one of ``IV_GENERATORS``; "" where the mode takes none
    :ivar iv_hash: the hash of "essiv", else ""
    """

    algorithm: Algorithm
    mode: str
    iv_generator: str = "plain64"
    iv_hash: str = ""

    @property
    def key_size(self) -> int:
        """Bytes; xts takes two keys."""
        return self.algorithm.key_size * (2 if self.mode == "xts" else 1)

    def check(self) -> CipherSpec:
        """Itself.

        :raises InvalidArgument: unknown words
        :raises NotSupported: words that do not go together
        """
        if self.mode not in MODES:
            raise InvalidArgument(f"unknown cipher mode {self.mode!r}: expected one of {', '.join(MODES)}")
        if self.mode == "xts" and self.algorithm.block_size != 16:
            raise NotSupported(f"cipher mode xts needs blocks of 16 bytes, {self.algorithm.name} has "
                               f"{self.algorithm.block_size}")  # fmt: skip
        if self.mode == "ecb" and not self.iv_generator:
            return self
        if self.iv_generator not in IV_GENERATORS:
            raise NotSupported(f"IV generator {self.iv_generator!r} is not supported: expected one of "
                               f"{', '.join(IV_GENERATORS)}")  # fmt: skip
        if self.iv_generator == "essiv":
            _essiv_algorithm(self)
        return self

    def header_mode(self) -> str:
        """As LUKS headers write it: "xts-plain64", "cbc-essiv:sha256"."""
        parts = [self.mode] + ([self.iv_generator] if self.iv_generator else [])
        return "-".join(parts) + (f":{self.iv_hash}" if self.iv_generator == "essiv" else "")

    @classmethod
    def from_header(cls, cipher_name: str, cipher_mode: str, key_size: int) -> CipherSpec:
        """From what a LUKS header says.

        :param key_size: bytes of the whole key
        :raises NotSupported: byre does not know such a cipher
        """
        mode, _, vector = cipher_mode.partition("-")
        generator, _, iv_hash = vector.partition(":")
        each = key_size // 2 if mode == "xts" else key_size
        from .primitives import ALGORITHMS

        for kind in ALGORITHMS.values():
            if kind.header_name == cipher_name and kind.key_size == each and not (mode == "xts" and key_size % 2):
                return cls(kind, mode, generator, iv_hash).check()
        raise NotSupported(f"cipher {cipher_name!r} in mode {cipher_mode!r} with a key of {key_size} bytes "
                           "is not supported")  # fmt: skip


def _essiv_algorithm(spec: CipherSpec) -> Algorithm:
    """The cipher whose key is a digest of the key."""
    size = digest_size(spec.iv_hash)
    from .primitives import ALGORITHMS

    for kind in ALGORITHMS.values():
        if kind.header_name == spec.algorithm.header_name and kind.key_size == size:
            return kind
    raise NotSupported(f"IV generator essiv: no {spec.algorithm.header_name} cipher takes keys of {size} bytes, which "
                       f"{spec.iv_hash} gives")  # fmt: skip


def make_cipher(
    name: str, mode: str, key: bytes, *, iv_generator: str = "plain64", iv_hash: str = "", by_host: bool = False
) -> SectorCipher:
    """A cipher for 512-byte sectors, by the words of the command line.

    :raises ByreError: as :class:`SectorCipher`
    """
    return SectorCipher(CipherSpec(algorithm(name), mode, iv_generator, iv_hash).check(), key, by_host=by_host)


class SectorCipher:
    """Encrypts and decrypts whole sectors in place; satisfies :class:`byre.formats.base.Cipher`. Thread-safe.

    :param sector_size: bytes encrypted with one initialization vector, 512 to 4096; vectors count in 512 bytes all the
        same
    :param first_sector: added to every sector number (LUKS2 "iv_tweak")
    :ivar by_host: positions are those in the file, not those on the disk
    :raises NotSupported: no library offers the cipher
    """

    def __init__(self, spec: CipherSpec, key: bytes, *, sector_size: int = 512, first_sector: int = 0,
                 by_host: bool = False) -> None:  # fmt: skip
        if len(key) != spec.key_size:
            raise InvalidArgument(
                f"{spec.algorithm.name}-{spec.mode} takes keys of {spec.key_size} bytes, not {len(key)}"
            )
        self.spec = spec
        self.sector_size = sector_size
        self.by_host = by_host
        self._first_sector = first_sector
        vectors = _Vectors(spec, key)
        self._mode = _MODE_CLASSES[spec.mode](spec, key, vectors, sector_size)
        # A power of two of sectors: pieces end where sectors end.
        self._piece = max(self._mode.piece, sector_size)

    def __repr__(self) -> str:
        return f"SectorCipher({self.spec.algorithm.name}-{self.spec.header_mode()})"

    def encrypt(self, position: int, buffer: bytearray | memoryview) -> None:
        """:param position: of the first byte; a multiple of the sector size, as is the length of ``buffer``"""
        self._run(position, buffer, self._mode.encrypt)

    def decrypt(self, position: int, buffer: bytearray | memoryview) -> None:
        """:param position: of the first byte; a multiple of the sector size, as is the length of ``buffer``"""
        self._run(position, buffer, self._mode.decrypt)

    def _run(self, position: int, buffer: bytearray | memoryview, action: _Action) -> None:
        import numpy as np

        size = self.sector_size
        data = np.frombuffer(buffer, np.uint8)
        if position % size or len(data) % size:
            raise InvalidArgument(f"{len(data)} bytes at {position:#x} are not whole sectors of {size} bytes")
        first = position // 512 + self._first_sector
        step = size // 512
        count = len(data) // size
        numbers = np.arange(first, first + count * step, step, dtype=_WORD)
        per_piece = self._piece // size
        for at in range(0, count, per_piece):
            part = data[at * size : (at + per_piece) * size]
            action(part, numbers[at : at + per_piece])


class _Vectors:
    """Initialization vectors by sector number."""

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        self.words = spec.algorithm.block_size // 8
        self._mask = 0xFFFFFFFF if spec.iv_generator == "plain" else 0
        self._salt: BlockCipher | None = None
        if spec.iv_generator == "essiv":
            self._salt = block_cipher(_essiv_algorithm(spec), new_digest(spec.iv_hash, key))

    def blocks(self, numbers: Words) -> Words:
        """An array of (sectors, words of a block)."""
        import numpy as np

        result = np.zeros((len(numbers), self.words), _WORD)
        result[:, 0] = numbers & np.uint64(self._mask) if self._mask else numbers
        if self._salt is not None:
            result = _ecb(self._salt.encrypt, result)
        return result


def _ecb(action: _Blocks, source: Words) -> Words:
    """``source`` through a block cipher, in a new array of the same shape."""
    import numpy as np

    room = np.empty(source.nbytes + SLACK, np.uint8)
    action(source.reshape(-1).view(np.uint8), room)
    return room[: source.nbytes].view(_WORD).reshape(source.shape)


class _Mode:
    """One mode with its keys. ``encrypt`` and ``decrypt`` take a flat piece, in place, and its sector numbers.

    :ivar piece: bytes to give at once
    """

    piece = _PIECE

    def __init__(self, spec: CipherSpec, key: bytes, vectors: _Vectors, sector_size: int) -> None:
        self.vectors = vectors
        self.words = spec.algorithm.block_size // 8
        self.blocks = sector_size // spec.algorithm.block_size
        self.cipher = block_cipher(spec.algorithm, key[: spec.algorithm.key_size])

    def encrypt(self, data: Bytes, numbers: Words) -> None:
        raise NotImplementedError

    def decrypt(self, data: Bytes, numbers: Words) -> None:
        raise NotImplementedError


class _Ecb(_Mode):
    """Every block by itself (which hides little: equal blocks stay equal)."""

    def encrypt(self, data: Bytes, numbers: Words) -> None:
        data[:] = _ecb(self.cipher.encrypt, data.view(_WORD)).view("u1")

    def decrypt(self, data: Bytes, numbers: Words) -> None:
        data[:] = _ecb(self.cipher.decrypt, data.view(_WORD)).view("u1")


class _Cbc(_Mode):
    """Each block is mixed with the encrypted one before it.

    Decryption looks backwards only, so all blocks go at once; encryption goes block by block, but through all sectors
    of a piece at once, so that its pieces are larger still.
    """

    piece = 2 * _PIECE

    def encrypt(self, data: Bytes, numbers: Words) -> None:
        import numpy as np

        sectors = data.view(_WORD).reshape(len(numbers), self.blocks, self.words)
        previous = self.vectors.blocks(numbers)
        mixed = np.empty(previous.nbytes, np.uint8)
        mixed_words = mixed.view(_WORD).reshape(previous.shape)
        room = np.empty(previous.nbytes + SLACK, np.uint8)
        for index in range(self.blocks):
            np.bitwise_xor(sectors[:, index], previous, out=mixed_words)
            self.cipher.encrypt(mixed, room)
            previous = room[: mixed.nbytes].view(_WORD).reshape(previous.shape)
            sectors[:, index] = previous

    def decrypt(self, data: Bytes, numbers: Words) -> None:
        step = self.blocks * self.words * 8
        for at in range(0, len(numbers), _CHAIN):
            some = numbers[at : at + _CHAIN]
            self._decrypt_chain(data[at * step : (at + len(some)) * step], some)

    def _decrypt_chain(self, data: Bytes, numbers: Words) -> None:
        """Decrypt as if all were one sector, and mend the first block of each that is not the first."""
        import numpy as np

        sectors = data.view(_WORD).reshape(len(numbers), -1)
        vectors = self.vectors.blocks(numbers)
        mend = vectors[1:] ^ sectors[:-1, -self.words :]
        room = np.empty(data.nbytes + SLACK, np.uint8)
        self.cipher.decrypt_chained(vectors[0].tobytes(), data, room)
        data[:] = room[: data.nbytes]
        sectors[1:, : self.words] ^= mend


class _Ctr(_Mode):
    """Encrypted counters, mixed with the data; a sector's vector is its first counter, big-endian."""

    def encrypt(self, data: Bytes, numbers: Words) -> None:
        import numpy as np

        start = self.vectors.blocks(numbers).byteswap()
        counters = np.empty((len(numbers), self.blocks, self.words), _WORD)
        low = counters[:, :, -1]
        np.add(start[:, None, -1], np.arange(self.blocks, dtype=_WORD), out=low)
        if self.words == 2:
            np.add(start[:, None, 0], low < start[:, None, -1], out=counters[:, :, 0])
        stream = _ecb(self.cipher.encrypt, counters.byteswap())
        words = data.view(_WORD)
        words ^= stream.reshape(-1)

    decrypt = encrypt


class _Scratch(threading.local):
    """A thread's arrays for one piece; making them anew costs more than filling them."""

    tweaks: Words
    mixed: Bytes
    room: Bytes
    carry: Words
    shifted: Words
    folded: Words

    def __init__(self, piece: int) -> None:
        import numpy as np

        groups = piece // (16 * _GROUP)
        self.tweaks = np.empty((groups, _GROUP, 2), _WORD)
        self.mixed = np.empty(piece, np.uint8)
        self.room = np.empty(piece + SLACK, np.uint8)
        self.carry, self.shifted, self.folded = (np.empty((groups, _GROUP), _WORD) for _ in range(3))


class _Xts(_Mode):
    """IEEE 1619: each block between two additions of a tweak, which is the encrypted sector number times a power of x.

    All sectors are whole blocks, so no ciphertext is stolen.
    """

    def __init__(self, spec: CipherSpec, key: bytes, vectors: _Vectors, sector_size: int) -> None:
        super().__init__(spec, key, vectors, sector_size)
        import numpy as np

        self._tweak_cipher = block_cipher(spec.algorithm, key[spec.algorithm.key_size :])
        self._scratch = _Scratch(self.piece)
        self._shift = np.arange(_GROUP, dtype=_WORD)
        self._rest = np.uint64(63) - self._shift
        self._groups = self.blocks // _GROUP

    def encrypt(self, data: Bytes, numbers: Words) -> None:
        self._run(data, numbers, self.cipher.encrypt)

    def decrypt(self, data: Bytes, numbers: Words) -> None:
        self._run(data, numbers, self.cipher.decrypt)

    def _run(self, data: Bytes, numbers: Words, action: _Blocks) -> None:
        import numpy as np

        size = data.nbytes
        scratch = self._scratch
        words, tweaks = data.view(_WORD), self._tweaks(numbers).reshape(-1)
        mixed, room = scratch.mixed[:size], scratch.room[: size + SLACK]
        np.bitwise_xor(words, tweaks, out=mixed.view(_WORD))
        action(mixed, room)
        np.bitwise_xor(room[:size].view(_WORD), tweaks, out=words)

    def _tweaks(self, numbers: Words) -> Words:
        """(groups, blocks of a group, 2 words), in the thread's scratch."""
        import numpy as np

        first = _ecb(self._tweak_cipher.encrypt, self.vectors.blocks(numbers))
        if self._groups > 1:
            first = _group_starts(first, self._groups)
        scratch, count = self._scratch, len(first)
        tweaks, carry = scratch.tweaks[:count], scratch.carry[:count]
        shifted, folded = scratch.shifted[:count], scratch.folded[:count]
        low, high = first[:, :1], first[:, 1:]
        # x^s times a tweak: shift by s bits; the bits that leave come back times x^7 + x^2 + x + 1.
        np.right_shift(high >> np.uint64(1), self._rest, out=carry)
        np.left_shift(carry, np.uint64(1), out=folded)
        folded ^= carry
        for bits in (2, 7):
            np.left_shift(carry, np.uint64(bits), out=shifted)
            folded ^= shifted
        np.left_shift(low, self._shift, out=shifted)
        np.bitwise_xor(shifted, folded, out=tweaks[:, :, 0])
        np.left_shift(high, self._shift, out=shifted)
        np.right_shift(low >> np.uint64(1), self._rest, out=folded)
        np.bitwise_or(shifted, folded, out=tweaks[:, :, 1])
        return tweaks


def _group_starts(first: Words, groups: int) -> Words:
    """The tweak of every ``_GROUP``-th block of sectors that have ``groups`` times as many."""
    import numpy as np

    result = np.empty((len(first), groups, 2), _WORD)
    low, high = first[:, 0], first[:, 1]
    up, down = np.uint64(_GROUP), np.uint64(64 - _GROUP)
    for index in range(groups):
        result[:, index, 0], result[:, index, 1] = low, high
        carry = high >> down
        high = (high << up) | (low >> down)
        low = (low << up) ^ carry ^ (carry << np.uint64(1)) ^ (carry << np.uint64(2)) ^ (carry << np.uint64(7))
    return result.reshape(-1, 2)


_MODE_CLASSES: Final = {"xts": _Xts, "cbc": _Cbc, "ecb": _Ecb, "ctr": _Ctr}

if TYPE_CHECKING:
    from collections.abc import Callable

    _Action = Callable[[Bytes, Words], None]
    _Blocks = Callable[[Bytes, Bytes], None]
