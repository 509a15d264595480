"""What the encrypted formats share: header areas in nodes, creation options to ciphers, new LUKS headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..crypto import luks
from ..crypto.hashes import check_hash
from ..crypto.locked import missing_key
from ..crypto.secrets import find_secret, find_text_secret
from ..errors import ImageError, InvalidArgument

if TYPE_CHECKING:
    from ..crypto.ciphers import CipherSpec, SectorCipher
    from ..crypto.luks_slots import SlotChange
    from ..crypto.secrets import SecretProvider
    from ..graph.creating import CreateRequest
    from ..graph.node import Node
    from ..graph.opening import OpenRequest
    from ..options import OptionValues

__all__ = ["NodeArea", "creation_secret", "given_secret", "legacy_cipher", "make_volume", "slot_change", "spec_of",
           "write_volume"]  # fmt: skip


class NodeArea:
    """A part of a node as a header area (:class:`byre.crypto.luks.Area`).

    :param start: where the area begins in ``file``
    :param length: what may be read and written; ``None`` for all there is
    """

    def __init__(self, file: Node, start: int = 0, length: int | None = None) -> None:
        self.file = file
        self._start = start
        self._length = length

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        inside = length if self._length is None else max(0, min(length, self._length - offset))
        self.file.read_into(self._start + offset, memoryview(data)[:inside])
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        if self._length is not None and offset + len(data) > self._length:
            raise ImageError(f"the encryption header of {self._length} bytes has no room for {len(data)} bytes at "
                             f"{offset:#x}", where=self.file.filename)  # fmt: skip
        self.file.write_from(self._start + offset, memoryview(data))

    def flush(self) -> None:
        self.file.flush()


def given_secret(request: OpenRequest, option: str) -> bytes:
    """The passphrase that ``option`` names.

    :raises AccessDenied: none is named
    :raises NotFound: nobody knows it
    """
    name = request.options.text(option)
    if name is None:
        raise missing_key(option)
    return find_secret(request.opener.secrets, name)


def legacy_cipher(secret: bytes) -> SectorCipher:
    """The old method of qcow and qcow2: the passphrase is the key, and any "opens" an image; sectors count as guests
    see them."""
    from ..crypto.ciphers import make_cipher

    return make_cipher("aes-128", "cbc", secret[:16].ljust(16, b"\0"))


def creation_secret(request: CreateRequest, option: str) -> bytes:
    """The passphrase that creation option ``option`` names: text, so that every program can be given it.

    :raises AccessDenied: none is named
    :raises InvalidArgument: it is not valid UTF-8
    """
    name = request.options.text(option)
    if name is None:
        raise missing_key(option)
    return find_text_secret(request.secrets, name)


def spec_of(options: OptionValues, prefix: str = "") -> CipherSpec:
    """The cipher that creation options ask for; ``prefix`` is "encrypt." in qcow2.

    :raises ByreError: unknown words, or words that do not go together
    """
    names = ("cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg")
    cipher, mode, generator, iv_hash = (options.text(prefix + name) for name in names)
    check_hash(options.text(f"{prefix}hash-alg") or "sha256")
    if iv_hash:
        check_hash(iv_hash)
    return luks.new_volume_spec(cipher or "aes-256", mode or "xts", generator or "", iv_hash or "")


def make_volume(request: CreateRequest, *, prefix: str = "", detached: bool = False) -> luks.NewVolume:
    """A new header as the creation options say; ``prefix`` is "encrypt." in qcow2.

    :raises ByreError: a missing secret, or a cipher that is not there
    """
    options = request.options
    time = options.optional_number(f"{prefix}iter-time")
    return luks.new_volume(
        spec_of(options, prefix), creation_secret(request, f"{prefix}key-secret"),
        hash_name=options.text(f"{prefix}hash-alg") or "sha256",
        iter_time=luks.DEFAULT_ITER_TIME if time is None else time, detached=detached,
    )  # fmt: skip


def write_volume(area: luks.Area, volume: luks.NewVolume) -> None:
    """The key material, then the header: until then nothing is a LUKS volume."""
    for offset, data in volume.parts[:-1]:
        area.write(offset, data)
    area.flush()
    area.write(*volume.parts[-1])
    area.flush()


def slot_change(options: OptionValues, key_secret: str | None, secrets: SecretProvider | None, *, prefix: str = "",
                force: bool = False) -> tuple[SlotChange, bytes]:  # fmt: skip
    """What ``amend`` options ask of key slots, and the passphrase that opens the volume now ("" where none is needed).

    :param key_secret: id of that passphrase
    :raises InvalidArgument: options that are missing, unknown or contradict each other
    :raises NotFound: nobody knows a secret
    """
    from ..crypto.luks_slots import SlotChange

    def secret(name: str | None) -> bytes | None:
        return None if name is None else find_secret(secrets, name)

    state = options.text(f"{prefix}state")
    if state not in ("active", "inactive"):
        raise InvalidArgument(f"option '{prefix}state' must be 'active' or 'inactive'" + (
            f", not {state!r}" if state is not None else ""))  # fmt: skip
    new_name = options.text(f"{prefix}new-secret")
    change = SlotChange(
        active=state == "active",
        new_secret=None if new_name is None else find_text_secret(secrets, new_name),
        old_secret=secret(options.text(f"{prefix}old-secret")),
        slot=options.optional_number(f"{prefix}keyslot"),
        iter_time=options.optional_number(f"{prefix}iter-time"),
        force=force,
    )
    change.check()
    return change, (secret(key_secret) or b"") if change.active else b""
