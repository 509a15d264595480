"""Key slots: what amend may do, and that no power cut locks anybody out."""

from __future__ import annotations

from itertools import combinations

import pytest

from byre.crypto.luks import read_volume
from byre.crypto.luks_slots import SlotChange, change_slots
from byre.errors import AccessDenied, ByreError, ImageError, InvalidArgument
from support.encrypted import MemoryArea, small_volume


def opens(area: MemoryArea, passphrase: bytes) -> bool:
    try:
        read_volume(area).unlock(area, passphrase)
    except AccessDenied:
        return False
    return True


def add(new: bytes, slot: int | None = None, *, force: bool = False) -> SlotChange:
    return SlotChange(True, new_secret=new, slot=slot, iter_time=0, force=force)


def active(area: MemoryArea) -> list[int]:
    header = read_volume(area).header
    assert header is not None
    return [index for index, slot in enumerate(header.slots) if slot.active]


def test_add_and_erase() -> None:
    area, _ = small_volume(b"one")
    change_slots(area, add(b"two", 4), b"one")
    change_slots(area, add(b"three"), b"two")
    assert active(area) == [0, 1, 4]
    assert all(opens(area, word) for word in (b"one", b"two", b"three"))
    change_slots(area, SlotChange(False, slot=4), b"")
    change_slots(area, SlotChange(False, old_secret=b"one"), b"")
    assert [opens(area, word) for word in (b"one", b"two", b"three")] == [False, False, True]


def test_erased_material_is_gone() -> None:
    area, _ = small_volume(b"one")
    change_slots(area, add(b"two"), b"one")
    before = bytes(area.data[:4096])
    change_slots(area, SlotChange(False, slot=0), b"")
    area.data[:4096] = before  # somebody puts the old header back
    assert opens(area, b"two")
    assert not opens(area, b"one")


def test_the_last_slot_stays_unless_forced() -> None:
    area, _ = small_volume(b"one")
    for change in (SlotChange(False, slot=0), SlotChange(False, old_secret=b"one")):
        with pytest.raises(AccessDenied, match="every key slot"):
            change_slots(area, change, b"one")
    change_slots(area, add(b"one"), b"one")
    with pytest.raises(AccessDenied, match="every key slot"):
        change_slots(area, SlotChange(False, old_secret=b"one"), b"one")
    assert opens(area, b"one")
    change_slots(area, SlotChange(False, old_secret=b"one", force=True), b"one")
    assert active(area) == []
    assert not opens(area, b"one")


def test_an_active_slot_is_replaced_only_by_force() -> None:
    area, _ = small_volume(b"one")
    with pytest.raises(InvalidArgument, match="in use"):
        change_slots(area, add(b"two", 0), b"one")
    change_slots(area, add(b"two", 0, force=True), b"one")
    assert active(area) == [0]
    assert (opens(area, b"one"), opens(area, b"two")) == (False, True)


def test_eight_slots() -> None:
    area, _ = small_volume(b"one")
    for index in range(7):
        change_slots(area, add(b"%d" % index), b"one")
    with pytest.raises(InvalidArgument, match="no key slot is free"):
        change_slots(area, add(b"more"), b"one")
    change_slots(area, add(b"more", 3, force=True), b"one")
    assert opens(area, b"more")
    assert not opens(area, b"2")


@pytest.mark.parametrize(
    ("change", "secret"),
    [
        (SlotChange(True), b"one"),
        (SlotChange(True, new_secret=b"x", old_secret=b"y"), b"one"),
        (add(b"x", 8), b"one"),
        (add(b"x", -1), b"one"),
        (add(b"x"), b"wrong"),
        (SlotChange(False), b"one"),
        (SlotChange(False, slot=0, new_secret=b"x"), b"one"),
        (SlotChange(False, slot=0, iter_time=1), b"one"),
        (SlotChange(False, slot=5), b"one"),
        (SlotChange(False, old_secret=b"nobody"), b"one"),
        (SlotChange(False, slot=1, old_secret=b"one", force=True), b"one"),
    ],
)
def test_refusals_write_nothing(change: SlotChange, secret: bytes) -> None:
    area, _ = small_volume(b"one")
    with pytest.raises(ByreError):
        change_slots(area, change, secret)
    assert area.log == []


def test_a_bomb_is_refused_before_any_work() -> None:
    area, _ = small_volume(b"one")
    area.data[212:216] = (200_000_000).to_bytes(4, "big")
    with pytest.raises(ImageError, match="200000000 iterations"):
        read_volume(area).unlock(area, b"one")
    area.data[212:216] = (999).to_bytes(4, "big")
    with pytest.raises(ImageError, match="999 iterations"):
        read_volume(area).unlock(area, b"one", limit=500)


def crash_states(before: bytes, log: list[tuple[int, bytes] | str]) -> list[bytes]:
    """Disks that a cut may leave: flushed writes are there, of the others any subset, each torn at any sector."""
    states: list[bytes] = []
    durable = MemoryArea(before)
    pending: list[tuple[int, bytes]] = []
    for entry in [*log, "|"]:
        if not isinstance(entry, str):
            pending.append(entry)
        for count in range(len(pending) + 1):
            for chosen in combinations(pending, count):
                area = MemoryArea(bytes(durable.data))
                for offset, data in chosen:
                    area.apply(offset, data)
                states.append(bytes(area.data))
        for offset, data in pending:
            for cut in range(512 - offset % 512, min(len(data), 2048), 512):
                for torn in ((offset, data[:cut]), (offset + cut, data[cut:])):
                    area = MemoryArea(bytes(durable.data))
                    area.apply(*torn)
                    states.append(bytes(area.data))
        if isinstance(entry, str):
            for offset, data in pending:
                durable.apply(offset, data)
            pending = []
    return list(dict.fromkeys(states))


@pytest.mark.parametrize(
    ("change", "always"),
    [
        (add(b"new"), [b"one", b"two"]),
        (add(b"new", 6), [b"one", b"two"]),
        (add(b"new", 0, force=True), [b"two"]),
        (SlotChange(False, slot=0), [b"two"]),
        (SlotChange(False, old_secret=b"one"), [b"two"]),
    ],
    ids=["add", "add across sectors", "replace", "erase", "erase by secret"],
)
def test_a_power_cut_locks_nobody_out(change: SlotChange, always: list[bytes]) -> None:
    area, _ = small_volume(b"one")
    change_slots(area, add(b"two", 1), b"one")
    before = bytes(area.data)
    area.log.clear()
    change_slots(area, change, b"one")
    states = crash_states(before, area.log)
    assert len(states) > 4
    for state in states:
        for passphrase in always:
            assert opens(MemoryArea(state), passphrase)


def test_replacing_the_only_passphrase_survives_a_cut() -> None:
    area, _ = small_volume(b"one")
    before = bytes(area.data)
    change_slots(area, add(b"two", 0, force=True), b"one")
    for state in crash_states(before, area.log):
        assert opens(MemoryArea(state), b"one") or opens(MemoryArea(state), b"two")
