"""Key slots of a LUKS1 volume: add, replace, erase, in an order that a power cut at any point survives.

New: material and salt | the slot's state. Erased: the state | the material. "|" is a flush. The header's other fields
never change, so only a slot's own bytes are written.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from ..errors import AccessDenied, InvalidArgument, NotSupported
from . import luks_layout
from .keys import MAX_ITERATIONS, iterations_for
from .luks import DEFAULT_ITER_TIME, new_slot_material, read_volume
from .luks_layout import encode_slot, slot_position

if TYPE_CHECKING:
    from .luks import Area, Volume
    from .luks_layout import Header, KeySlot

__all__ = ["SlotChange", "change_slots"]


class SlotChange(NamedTuple):
    """What ``amend`` asks for; passphrases, not names of secrets.

    :ivar active: write a passphrase, or else erase
    :ivar new_secret: the passphrase to add
    :ivar old_secret: erase the slots that open with it
    :ivar slot: the slot concerned; ``None`` for the first free one, or all that match ``old_secret``
    :ivar iter_time: milliseconds; ``None`` for the default
    :ivar force: overwrite an active slot; erase the last one
    """

    active: bool
    new_secret: bytes | None = None
    old_secret: bytes | None = None
    slot: int | None = None
    iter_time: int | None = None
    force: bool = False

    def check(self) -> None:
        """:raises InvalidArgument: parts that contradict each other"""
        if self.slot is not None and not 0 <= self.slot < luks_layout.SLOT_COUNT:
            raise InvalidArgument(f"key slot {self.slot} does not exist: there are 0 to {luks_layout.SLOT_COUNT - 1}")
        if self.active and self.new_secret is None:
            raise InvalidArgument("activating a key slot needs new-secret")
        if self.active and self.old_secret is not None:
            raise InvalidArgument("old-secret says which key slots to erase; it has no place in activating one")
        if self.active:
            return
        if self.new_secret is not None:
            raise InvalidArgument("new-secret has no place in erasing key slots")
        if self.iter_time is not None:
            raise InvalidArgument("iter-time has no place in erasing key slots")
        if self.slot is None and self.old_secret is None:
            raise InvalidArgument("erasing needs a key slot's number (keyslot) or its secret (old-secret)")


def change_slots(area: Area, change: SlotChange, secret: bytes, *, limit: int = MAX_ITERATIONS) -> Volume:
    """Carry out ``change``; durable on return.

    :param secret: a passphrase that opens the volume now; needed to add one
    :returns: the volume as it is now
    :raises NotSupported: LUKS2
    :raises AccessDenied: the secret does not open it, no slot matches, or the last slot would be erased
    """
    change.check()
    volume = read_volume(area)
    if volume.header is None:
        raise NotSupported("key slots of LUKS2 volumes cannot be changed")
    if change.active:
        _add(area, volume, change, secret, limit)
    else:
        _erase(area, volume, change, limit)
    return read_volume(area)


def _add(area: Area, volume: Volume, change: SlotChange, secret: bytes, limit: int) -> None:
    header = volume.header
    new_secret = change.new_secret
    assert header is not None
    assert new_secret is not None
    index = change.slot if change.slot is not None else _free_slot(header)
    if index is None:
        raise InvalidArgument("no key slot is free: all are in use", hint="erase one first")
    if header.slots[index].active and not change.force:
        raise InvalidArgument(f"key slot {index} is in use", hint="erase it first, or use --force")
    master_key = volume.unlock(area, secret, limit=limit)
    time = DEFAULT_ITER_TIME if change.iter_time is None else change.iter_time
    iterations = iterations_for(header.hash_name, header.key_size, time)

    def make(at: int) -> None:
        slot, material = new_slot_material(volume.spec, header.hash_name, master_key, new_secret, header.slots[at],
                                           iterations)  # fmt: skip
        _activate(area, at, slot, material)

    if header.slots[index].active:
        # While the slot is rewritten it opens with neither passphrase: the new one waits in a free slot meanwhile.
        spare = _free_slot(header)
        if spare is not None:
            make(spare)
        make(index)
        if spare is not None:
            _deactivate(area, header, spare)
    else:
        make(index)


def _free_slot(header: Header) -> int | None:
    return next((index for index, slot in enumerate(header.slots) if not slot.active), None)


def _erase(area: Area, volume: Volume, change: SlotChange, limit: int) -> None:
    header = volume.header
    assert header is not None
    chosen = [index for index, slot in enumerate(header.slots) if slot.active]
    active_count = len(chosen)
    if change.slot is not None:
        if change.slot not in chosen:
            if change.force:
                chosen = []
            else:
                raise InvalidArgument(f"key slot {change.slot} is erased already")
        chosen = [index for index in chosen if index == change.slot]
    if change.old_secret is not None:
        matching = volume.matching_slots(area, change.old_secret, limit=limit)
        chosen = [index for index in chosen if index in matching]
        if not chosen:
            raise AccessDenied("no key slot opens with the old secret; nothing was erased")
    if len(chosen) == active_count and not change.force:
        raise AccessDenied("this would erase every key slot in use, and with them all data of the image for ever",
                           hint="use --force if that is meant")  # fmt: skip
    for index in chosen:
        _deactivate(area, header, index)
    if change.slot is not None and not chosen:
        _wipe(area, header, change.slot)


# -- writing --------------------------------------------------------------------------------------


def _activate(area: Area, index: int, slot: KeySlot, material: bytes) -> None:
    """The state is written alone and last: the rest of a slot may lie across two sectors."""
    area.write(slot.offset, material)
    area.write(slot_position(index), encode_slot(slot._replace(active=False)))
    area.flush()
    area.write(slot_position(index), encode_slot(slot._replace(active=True))[:4])
    area.flush()


def _deactivate(area: Area, header: Header, index: int) -> None:
    slot = header.slots[index]._replace(active=False)
    area.write(slot_position(index), encode_slot(slot)[:4])
    area.flush()
    _wipe(area, header, index)
    area.write(slot_position(index), encode_slot(slot._replace(iterations=0, salt=bytes(luks_layout.SALT_SIZE))))
    area.flush()


def _wipe(area: Area, header: Header, index: int) -> None:
    """Overwrite the key material: random bytes, then zeroes, as a layer may take zeroes for no write at all."""
    offset, size = header.slots[index].offset, -(-header.material_size // 512) * 512
    for data in (os.urandom(size), bytes(size)):
        area.write(offset, data)
        area.flush()
