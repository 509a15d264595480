"""Encryption of qcow2 images: unlocking at opening, planning and writing a header at creation, what ``info`` shows.

LUKS has its header in clusters of the image, which a header extension points to, and counts sectors by where they lie
in the file. The old method has no header at all: the passphrase is the key, and sectors count as the guest sees them;
any key "opens" such an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...crypto import luks
from ...crypto.locked import LockedCipher, missing_key
from ...errors import ByreError, ImageError, InvalidArgument, NotSupported, ReadOnly
from ..encryption import NodeArea, creation_secret, given_secret, legacy_cipher, make_volume, spec_of, write_volume
from . import layout

if TYPE_CHECKING:
    from ...crypto.ciphers import SectorCipher
    from ...crypto.luks_slots import SlotChange
    from ...graph.creating import CreateRequest
    from ...graph.opening import OpenRequest
    from ...options import OptionValues
    from .creation import Plan
    from .image import Qcow2Node

__all__ = ["change_key_slots", "check_secret", "describe", "planned_method", "planned_size", "unlock", "write_header"]

_NAMES: Final = {layout.CRYPT_AES: "aes", layout.CRYPT_LUKS: "luks"}


# -- opening --------------------------------------------------------------------------------------


def unlock(request: OpenRequest, node: Qcow2Node) -> None:
    """Give ``node`` its cipher; without a key one that refuses, where only metadata is asked for.

    :raises InvalidArgument: the options name another method than the image has
    :raises AccessDenied: no secret is named, or it opens no key slot
    :raises ImageError: the encryption header is missing or breaks its format
    """
    method, wanted = node.header.crypt_method, request.options.text("encrypt.format")
    has = _NAMES.get(method)
    if wanted is not None and wanted != has:
        raise InvalidArgument(f"the image is {f'encrypted with {has!r}' if has else 'not encrypted'}, but option "
                              f"'encrypt.format' says {wanted!r}", where=node.filename)  # fmt: skip
    if not method:
        return
    try:
        if method == layout.CRYPT_LUKS:
            node.area = _area(node)
            node.volume = luks.read_volume(node.area)
            if node.volume.version != 1:
                raise NotSupported("qcow2 images have LUKS1 headers; this one is of another version")
        if node.open_flags.no_io or node.open_flags.check:
            node.use_cipher(LockedCipher(node.filename))
        else:
            node.use_cipher(_cipher(node, given_secret(request, "encrypt.key-secret"), request))
    except ByreError as error:
        error.where = error.where or node.filename
        raise


def _area(node: Qcow2Node) -> NodeArea:
    data = layout.find_extension(node.extensions, layout.EXTENSION_CRYPTO)
    if data is None:
        raise ImageError("the image is encrypted with LUKS but has no encryption header extension")
    pointer = layout.decode_crypto_pointer(data, node.header.cluster_bits)
    return NodeArea(node.file, pointer.offset, pointer.length)


def _cipher(node: Qcow2Node, secret: bytes, request: OpenRequest) -> SectorCipher:
    if node.volume is None:
        return legacy_cipher(secret)
    assert node.area is not None
    key = node.volume.unlock(node.area, secret, limit=request.opener.policy.max_iterations)
    return node.volume.cipher(key, by_host=True)


def describe(node: Qcow2Node) -> dict[str, object] | None:
    """The ``encrypt`` section of ``info``, in the peer's order; ``None`` for an image that is not encrypted."""
    method = node.header.crypt_method
    if not method:
        return None
    about = node.volume.info() if node.volume is not None else {"cipher-mode": None}
    result: dict[str, object] = {}
    for key, value in about.items():
        if key == "cipher-mode":
            result["format"] = _NAMES[method]
        if value is not None:
            result[key] = value
    return result


def change_key_slots(node: Qcow2Node, change: SlotChange, secret: bytes, *, limit: int) -> None:
    """Add or erase key slots; see :func:`byre.crypto.luks_slots.change_slots`.

    :raises NotSupported: the image is not encrypted with LUKS
    """
    from ...crypto.luks_slots import change_slots

    if node.read_only:
        raise ReadOnly("cannot change key slots: the image is open read-only", where=node.filename)
    if node.area is None:
        raise NotSupported("only images encrypted with LUKS have key slots", where=node.filename)
    try:
        node.volume = change_slots(node.area, change, secret, limit=limit)
    except ByreError as error:
        error.where = error.where or node.filename
        raise


# -- creating -------------------------------------------------------------------------------------


def planned_method(options: OptionValues) -> int:
    """The method that creation options ask for: 0, or one of layout's ``CRYPT_*``.

    :raises InvalidArgument: an unknown method, or options of encryption without one
    """
    name = options.text("encrypt.format")
    if options.flag("encryption"):
        if name not in (None, "aes"):
            raise InvalidArgument(f"encryption=on means encrypt.format=aes, but {name!r} is given")
        name = "aes"
    if name is None:
        given = [option for option in options.given if option.startswith("encrypt.")]
        if given:
            raise InvalidArgument(f"option {given[0]!r} needs 'encrypt.format'")
        return layout.CRYPT_NONE
    methods = {word: number for number, word in _NAMES.items()}
    if name not in methods:
        raise InvalidArgument(f"unknown encryption format {name!r}: expected 'aes' or 'luks'")
    return methods[name]


def planned_size(options: OptionValues) -> int:
    """Bytes of the encryption header that creation options ask for.

    :raises ByreError: as :func:`planned_method`; ciphers that are unknown or do not go together
    """
    if planned_method(options) != layout.CRYPT_LUKS:
        return 0
    return luks.header_length(spec_of(options, "encrypt."))


def check_secret(options: OptionValues) -> None:
    """:raises AccessDenied: encryption is asked for, but no secret is named"""
    if planned_method(options) and options.text("encrypt.key-secret") is None:
        raise missing_key("encrypt.key-secret")


def write_header(request: CreateRequest, made: Plan) -> None:
    """The encryption header of a new image, in its clusters, which read as zeroes."""
    if made.header.crypt_method == layout.CRYPT_AES:
        creation_secret(request, "encrypt.key-secret")
    if made.crypto is None:
        return
    volume = make_volume(request, prefix="encrypt.")
    write_volume(NodeArea(request.file, made.crypto.offset, made.crypto.length), volume)
