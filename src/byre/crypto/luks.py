"""A LUKS volume: its header wherever it lies, unlocking it, making a new one.

Used for the format ``luks`` and for the header area of a qcow2 image alike: both hand over an :class:`Area`. What the
header looks like is in :mod:`.luks_layout` and :mod:`.luks2_layout`; changing key slots is in :mod:`.luks_slots`.
"""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from ..errors import AccessDenied, ImageError, NotSupported
from . import luks2_layout, luks_layout
from .ciphers import CipherSpec, SectorCipher
from .hashes import check_hash
from .keys import MAX_ITERATIONS, MIN_ITERATIONS, af_merge, af_split, argon2, check_iterations, iterations_for, pbkdf2
from .primitives import algorithm

if TYPE_CHECKING:
    from .luks_layout import Header, KeySlot

__all__ = [
    "DEFAULT_ITER_TIME",
    "Area",
    "NewVolume",
    "Volume",
    "header_length",
    "new_volume",
    "new_volume_spec",
    "read_volume",
]

DEFAULT_ITER_TIME: Final = 2000
"""Milliseconds that trying one passphrase takes."""


class Area(Protocol):
    """Where the header lies; offsets are relative to its beginning.

    ``read`` gives zeroes past the end.
    """

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def flush(self) -> None: ...


class Volume:
    """An opened header. Holds no key.

    :ivar version: 1 or 2
    :ivar header: of a LUKS1 volume
    :ivar metadata: of a LUKS2 volume
    :ivar payload_offset: bytes from the beginning of the file the data lies in
    :ivar payload_size: bytes; 0 for all that follows
    :ivar sector_size: bytes that are encrypted as a unit
    """

    def __init__(self, header: Header | None, metadata: luks2_layout.Metadata | None, uuid: str) -> None:
        self.header = header
        self.metadata = metadata
        self.uuid = uuid
        self.version = 1 if header is not None else 2
        self.sector_size = 512
        self.payload_size = 0
        self.first_sector = 0
        if header is not None:
            self.payload_offset = header.payload_offset
        if metadata is not None:
            segment = metadata.segment
            self.payload_offset, self.payload_size = segment.offset, segment.size
            self.sector_size, self.first_sector = segment.sector_size, segment.first_sector

    @property
    def spec(self) -> CipherSpec:
        """:raises NotSupported: a cipher byre does not know"""
        if self.header is not None:
            return CipherSpec.from_header(self.header.cipher_name, self.header.cipher_mode, self.header.key_size)
        assert self.metadata is not None
        if not self.metadata.slots:
            raise NotSupported("the LUKS2 volume has no key slot for a passphrase")
        return _split_encryption(self.metadata.segment.encryption, self.metadata.slots[0].key_size)

    def cipher(self, master_key: bytes, *, by_host: bool = False) -> SectorCipher:
        """What encrypts the data."""
        return SectorCipher(self.spec, master_key, sector_size=self.sector_size, first_sector=self.first_sector,
                            by_host=by_host)  # fmt: skip

    def unlock(self, area: Area, passphrase: bytes, *, limit: int = MAX_ITERATIONS) -> bytes:
        """The master key.

        :param limit: iterations the header may ask for altogether
        :raises AccessDenied: no key slot opens with this passphrase
        :raises ImageError: the header asks for more work than the limit
        """
        self.spec  # noqa: B018  a cipher that is not supported is said before any work
        for key in self._candidates(area, passphrase, limit):
            if key is not None:
                return key
        raise AccessDenied("no key slot opens with this secret")

    def matching_slots(self, area: Area, passphrase: bytes, *, limit: int = MAX_ITERATIONS) -> list[int]:
        """Numbers of the active slots of a LUKS1 volume that open with ``passphrase``."""
        return [index for index, key in enumerate(self._candidates(area, passphrase, limit)) if key is not None]

    def _candidates(self, area: Area, passphrase: bytes, limit: int) -> Iterator[bytes | None]:
        """The master key, or ``None``, for each slot in turn."""
        if self.header is not None:
            return _try_slots(self.header, area, passphrase, limit)
        assert self.metadata is not None
        return _try_slots2(self.metadata, area, passphrase, limit)

    def info(self, *, detached: bool = False) -> dict[str, object]:
        """What ``info`` says, names and order as the peer has them.

        :param detached: the header lies apart from the data
        """
        if self.header is None:
            return self._info2(detached)
        header = self.header
        mode, _, vector = header.cipher_mode.partition("-")
        generator, _, iv_hash = vector.partition(":")
        slots: list[dict[str, object]] = []
        for slot in header.slots:
            about: dict[str, object] = {"active": slot.active}
            if slot.active:
                about["iters"] = slot.iterations
            about["key-offset"] = slot.offset
            if slot.active:
                about["stripes"] = slot.stripes
            slots.append(about)
        return _info(generator, detached, header.hash_name, _shown_cipher(header.cipher_name, mode, header.key_size),
                     header.uuid, iv_hash, mode, slots, header.payload_offset, header.digest_iterations)  # fmt: skip

    def _info2(self, detached: bool) -> dict[str, object]:
        assert self.metadata is not None
        metadata = self.metadata
        name, _, rest = metadata.segment.encryption.partition("-")
        mode, _, vector = rest.partition("-")
        generator, _, iv_hash = vector.partition(":")
        key_size = metadata.slots[0].key_size if metadata.slots else 0
        slots: list[dict[str, object]] = []
        for slot in metadata.slots:
            about: dict[str, object] = {
                "active": slot.number in metadata.digest.slots,
                "kdf": str(slot.kdf.get("type")),
            }
            about.update({key: slot.kdf[key] for key in ("iterations", "time", "memory", "cpus") if key in slot.kdf})
            slots.append({**about, "key-offset": slot.offset, "stripes": slot.stripes})
        shown = _info(generator, detached, metadata.digest.hash_name, _shown_cipher(name, mode, key_size), self.uuid,
                      iv_hash, mode, slots, self.payload_offset, metadata.digest.iterations)  # fmt: skip
        return {**shown, "version": 2, "sector-size": self.sector_size}


def _info(generator: str, detached: bool, hash_name: str, cipher: str, uuid: str, iv_hash: str, mode: str,
          slots: list[dict[str, object]], payload: int, iterations: int) -> dict[str, object]:  # fmt: skip
    result: dict[str, object] = {
        "ivgen-alg": generator, "detached-header": detached, "hash-alg": hash_name, "cipher-alg": cipher, "uuid": uuid,
    }  # fmt: skip
    if iv_hash:
        result["ivgen-hash-alg"] = iv_hash
    return {**result, "cipher-mode": mode, "slots": slots, "payload-offset": payload, "master-key-iters": iterations}


def _shown_cipher(name: str, mode: str, key_size: int) -> str:
    return f"{name}-{key_size * 8 // (2 if mode == 'xts' else 1)}"


def _split_encryption(text: str, key_size: int) -> CipherSpec:
    name, _, mode = text.partition("-")
    return CipherSpec.from_header(name, mode, key_size)


# -- reading --------------------------------------------------------------------------------------


def read_volume(area: Area) -> Volume:
    """The header in ``area``.

    :raises ImageError: it breaks the format
    :raises NotSupported: it needs something byre does not do
    """
    head = area.read(0, luks2_layout.BINARY_SIZE)
    version = luks_layout.version_of(head)
    if version == 1:
        header = luks_layout.decode_header(head)
        return Volume(header, None, header.uuid)
    if version == 2 or head[:6] == luks_layout.MAGIC:
        return _read_volume2(area, head)
    # The first header of a LUKS2 volume may be damaged; the second begins where the first one's area ends.
    for offset in luks2_layout.AREA_SIZES:
        if area.read(offset, 6) == luks2_layout.SECOND_MAGIC:
            return _read_volume2(area, head)
    raise ImageError("not a LUKS volume: the magic number is missing")


def _read_volume2(area: Area, head: bytes) -> Volume:
    """From the newer of the two headers whose checksum is right."""
    best: tuple[luks2_layout.BinaryHeader, bytes] | None = None
    starts = [0, *luks2_layout.AREA_SIZES]
    for start in starts:
        try:
            header = luks2_layout.decode_binary_header(area.read(start, luks2_layout.BINARY_SIZE) if start else head)
        except ImageError as error:
            if not start and luks_layout.version_of(head) > 2:
                raise NotSupported(f"LUKS version {luks_layout.version_of(head)} is not supported") from error
            continue
        data = area.read(start, header.area_size)
        if header.offset != start or not luks2_layout.verify_area(header, data):
            continue
        if best is None or header.sequence > best[0].sequence:
            best = header, data
    if best is None:
        raise ImageError("neither header of the LUKS2 volume has the right checksum")
    return Volume(None, luks2_layout.decode_metadata(best[1][luks2_layout.BINARY_SIZE :]), best[0].uuid)


def _try_slots(header: Header, area: Area, passphrase: bytes, limit: int) -> Iterator[bytes | None]:
    check_hash(header.hash_name)
    active = [slot for slot in header.slots if slot.active]
    for slot in active:
        check_iterations(slot.iterations, limit, "a key slot")
    check_iterations(header.digest_iterations, limit, "the LUKS header")
    check_iterations(sum(slot.iterations for slot in active) or 1, limit, "the key slots together")
    for slot in header.slots:
        yield _try_slot(header, slot, area, passphrase) if slot.active else None


def _try_slot(header: Header, slot: KeySlot, area: Area, passphrase: bytes) -> bytes | None:
    spec = CipherSpec.from_header(header.cipher_name, header.cipher_mode, header.key_size)
    key = pbkdf2(header.hash_name, passphrase, slot.salt, slot.iterations, header.key_size)
    material = bytearray(area.read(slot.offset, -(-header.material_size // 512) * 512))
    _material_cipher(spec, key).decrypt(0, material)
    found = af_merge(bytes(material[: header.material_size]), slot.stripes, header.hash_name)
    digest = pbkdf2(header.hash_name, found, header.digest_salt, header.digest_iterations, len(header.digest))
    return found if hmac.compare_digest(digest, header.digest) else None


def _try_slots2(metadata: luks2_layout.Metadata, area: Area, passphrase: bytes, limit: int) -> Iterator[bytes | None]:
    digest = metadata.digest
    check_iterations(digest.iterations, limit, "the LUKS2 digest")
    for slot in metadata.slots:
        if slot.number not in digest.slots:
            continue
        key = _derive(slot, passphrase, limit)
        material = bytearray(area.read(slot.offset, -(-slot.key_size * slot.stripes // 512) * 512))
        _material_cipher(_split_encryption(slot.encryption, slot.area_key_size), key).decrypt(0, material)
        found = af_merge(bytes(material[: slot.key_size * slot.stripes]), slot.stripes, slot.af_hash)
        made = pbkdf2(digest.hash_name, found, digest.salt, digest.iterations, len(digest.digest))
        yield found if hmac.compare_digest(made, digest.digest) else None


def _derive(slot: luks2_layout.Slot, passphrase: bytes, limit: int) -> bytes:
    kind = luks2_layout.kdf_word(slot, "type")
    if kind == "pbkdf2":
        iterations = luks2_layout.kdf_number(slot, "iterations")
        check_iterations(iterations, limit, f"key slot {slot.number}")
        return pbkdf2(luks2_layout.kdf_word(slot, "hash"), passphrase, slot.salt, iterations, slot.area_key_size)
    if kind not in ("argon2i", "argon2id"):
        raise NotSupported(f"LUKS2 key derivation {kind!r} is not supported")
    passes, memory, lanes = (luks2_layout.kdf_number(slot, name) for name in ("time", "memory", "cpus"))
    return argon2(kind, passphrase, slot.salt, slot.area_key_size, passes=passes, memory=memory, lanes=lanes)


def _material_cipher(spec: CipherSpec, key: bytes) -> SectorCipher:
    """Key material is encrypted like the data, with sectors counted from its own beginning."""
    return SectorCipher(spec, key)


# -- making ---------------------------------------------------------------------------------------


class NewVolume(NamedTuple):
    """A header to be written.

    :ivar parts: (offset, bytes), the header itself last
    :ivar length: bytes of the whole area
    """

    header: Header
    master_key: bytes
    parts: tuple[tuple[int, bytes], ...]
    length: int


def new_volume_spec(
    cipher: str = "aes-256", mode: str = "xts", iv_generator: str = "", iv_hash: str = ""
) -> CipherSpec:
    """The cipher of a new volume; what is left out is chosen as the peer does.

    :raises ByreError: unknown words, or words that do not go together
    """
    generator = iv_generator or "plain64"
    wanted = (iv_hash or "sha256") if generator == "essiv" else ""
    return CipherSpec(algorithm(cipher), mode, generator, wanted).check()


def header_length(spec: CipherSpec) -> int:
    """Bytes before the payload of a new volume."""
    return luks_layout.new_slots(spec.key_size)[1]


def new_volume(
    spec: CipherSpec, passphrase: bytes, *, hash_name: str = "sha256", iter_time: int = DEFAULT_ITER_TIME,
    detached: bool = False,
) -> NewVolume:  # fmt: skip
    """A LUKS1 header with one active key slot and a random master key.

    :param iter_time: milliseconds that trying a passphrase should take
    :param detached: the header will lie apart from the data
    :raises ByreError: a cipher or hash that is not there
    """
    check_hash(hash_name)
    slots, length = luks_layout.new_slots(spec.key_size)
    master_key, salt = os.urandom(spec.key_size), os.urandom(luks_layout.SALT_SIZE)
    slot_iterations = iterations_for(hash_name, spec.key_size, iter_time)
    # The digest only tells right keys from wrong ones, which are too long to be tried.
    digest_iterations = max(MIN_ITERATIONS, iterations_for(hash_name, luks_layout.DIGEST_SIZE, iter_time) // 8)
    digest = pbkdf2(hash_name, master_key, salt, digest_iterations, luks_layout.DIGEST_SIZE)
    slot, material = new_slot_material(spec, hash_name, master_key, passphrase, slots[0], slot_iterations)
    header = luks_layout.Header(
        spec.algorithm.header_name, spec.header_mode(), hash_name, 0 if detached else length, spec.key_size, digest,
        salt, digest_iterations, new_uuid(), (slot._replace(active=True), *slots[1:]),
    )  # fmt: skip
    parts = ((slot.offset, material), (0, luks_layout.encode_header(header)))
    return NewVolume(header, master_key, parts, length)


def new_slot_material(spec: CipherSpec, hash_name: str, master_key: bytes, passphrase: bytes, slot: KeySlot,
                      iterations: int) -> tuple[KeySlot, bytes]:  # fmt: skip
    """(the slot with a new salt, its key material, encrypted and in whole sectors)."""
    salt = os.urandom(luks_layout.SALT_SIZE)
    key = pbkdf2(hash_name, passphrase, salt, iterations, spec.key_size)
    material = bytearray(af_split(master_key, slot.stripes, hash_name))
    material += bytes(-len(material) % 512)
    _material_cipher(spec, key).encrypt(0, material)
    return slot._replace(salt=salt, iterations=iterations), bytes(material)


def new_uuid() -> str:
    """A random UUID (RFC 9562, version 4)."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


if TYPE_CHECKING:
    from collections.abc import Iterator
