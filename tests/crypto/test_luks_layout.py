"""The LUKS1 header, field by field."""

from __future__ import annotations

import struct

import pytest

from byre.crypto import luks_layout
from byre.crypto.luks_layout import Header, KeySlot
from byre.errors import ImageError


def header(key_size: int = 64) -> Header:
    slots, end = luks_layout.new_slots(key_size)
    slots = (slots[0]._replace(active=True, iterations=1000, salt=bytes(range(32))), *slots[1:])
    return Header("aes", "xts-plain64", "sha256", end, key_size, b"d" * 20, b"s" * 32, 1000,
                  "572b8b96-b7b1-43e4-8254-9ac42b4a326c", slots)  # fmt: skip


@pytest.mark.parametrize("key_size", [16, 24, 32, 48, 64])
def test_encode_and_decode(key_size: int) -> None:
    one = header(key_size)
    data = luks_layout.encode_header(one)
    assert len(data) == luks_layout.HEADER_SIZE
    assert luks_layout.decode_header(data) == one
    assert luks_layout.encode_header(luks_layout.decode_header(data)) == data


def test_the_layout_of_a_new_volume() -> None:
    slots, end = luks_layout.new_slots(64)
    assert [slot.offset for slot in slots[:3]] == [4096, 262144, 520192]
    assert end == 2068480
    slots, end = luks_layout.new_slots(16)
    assert (slots[1].offset, end) == (69632, 528384)


def changed(at: int, form: str, value: object) -> bytes:
    data = bytearray(luks_layout.encode_header(header()))
    struct.pack_into(form, data, at, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "592 bytes"),
        (changed(0, ">B", 0), "magic"),
        (changed(6, ">H", 3), "version 3"),
        (changed(8, "32s", b"a" * 32), "cipher-name"),
        (changed(8, "32s", b"\x1b[2J"), "cipher-name"),
        (changed(72, "32s", b"\xff\xff"), "hash-spec"),
        (changed(104, ">I", 8), "payload"),
        (changed(108, ">I", 0), "key-bytes"),
        (changed(108, ">I", 0xFFFFFFFF), "key-bytes"),
        (changed(208, ">I", 1), "state"),
        (changed(208 + 40, ">I", 0), "overlaps the header"),
        (changed(208 + 40, ">I", 513), "overlaps"),
        (changed(208 + 44, ">I", 4001), "stripes"),
        (changed(208 + 7 * 48 + 40, ">I", 0xFFFFFFFF), "payload"),
    ],
)
def test_fields_outside_their_limits(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        luks_layout.decode_header(data)


def test_a_detached_header_has_no_payload_to_end_at() -> None:
    one = header()._replace(payload_offset=0)
    assert luks_layout.decode_header(luks_layout.encode_header(one)) == one


def test_slots_lie_where_they_are_said_to() -> None:
    one = header()
    data = luks_layout.encode_header(one)
    for index, slot in enumerate(one.slots):
        at = luks_layout.slot_position(index)
        assert data[at : at + 48] == luks_layout.encode_slot(slot)
    assert isinstance(one.slots[0], KeySlot)
