"""VHDX and VHD images that nobody should vouch for: see test_hostile_images."""

from __future__ import annotations

import os
import random
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from hostile.test_hostile_images import CONVERT, LOOK, READ, WRITE, Attempts, attempts, folder, judge
from support.forged_vhd import FULL, KIB, MIB, PARTIAL, Block, Vhd, Vhdx, footer, log_entry

__all__ = ["attempts", "folder"]

GUID = uuid.UUID(int=0xBAD)
PAGE = bytes(4096)


class Case(NamedTuple):
    """:ivar named: what the image names; ``None`` in ``content`` for a file made by hand"""

    name: str
    content: Callable[[], bytes]
    named: tuple[str, ...] = ()
    length: int = 0
    broken: bool = True


def patched(data: bytes, *parts: tuple[int, bytes]) -> bytes:
    content = bytearray(data)
    for at, part in parts:
        content[at : at + len(part)] = part
    return bytes(content)


def overlapping() -> bytes:
    """A log of 16 MiB, each sector of it the beginning of an entry as long as the log."""
    head = bytearray(log_entry([(3 * MIB, 4096)], 1, GUID)[:4096])
    head[8:12] = struct.pack("<I", 16 * MIB)
    log = b"".join(bytes(head[:16]) + struct.pack("<Q", n + 1) + bytes(head[24:]) for n in range(16 * MIB // 4096))
    data = bytearray(Vhdx(log_guid=GUID, log_length=16 * MIB, log_offset=4 * MIB).build())
    return bytes(data[: 4 * MIB]) + log


def linked(**names: str) -> bytes:
    return Vhdx(parent={"parent_linkage": "{}", **names}).build()


def zeroes_in_the_log() -> bytes:
    """Thousands of ranges of zeroes, which reading only would have to keep."""
    entry = log_entry([(3 * MIB + 512 * KIB, 4096)] * 2000, 1, GUID)
    return Vhdx(log=entry, log_guid=GUID).build()


BIG_TABLE = Vhdx(size=64 << 40, block_size=MIB)

CASES = (
    Case("vhdx good", lambda: Vhdx(blocks={1: Block(FULL, b"x")}).build(), broken=False),
    Case("vhdx cut", lambda: Vhdx().build()[: 200 * KIB]),
    Case("vhdx log of overlapping entries", overlapping),
    Case("vhdx log of zeroes", zeroes_in_the_log),
    Case("vhdx log far away", lambda: Vhdx(log=log_entry([(1 << 62, PAGE)], 1, GUID), log_guid=GUID).build()),
    Case("vhdx log that grows", lambda: Vhdx(log=log_entry([(3 * MIB, PAGE)], 1, GUID, last=1 << 62),
                                             log_guid=GUID).build()),
    Case("vhdx log on top of the metadata", lambda: Vhdx(log_offset=3 * MIB).build()),
    Case("vhdx block at the end of all offsets",
         lambda: patched(Vhdx().build(), (2 * MIB, struct.pack("<Q", 0xFFFFFFFFFFF00006)))),
    Case("vhdx blocks in one place",
         lambda: patched(Vhdx(blocks={0: Block(FULL, b"x")}).build(),
                         (2 * MIB, struct.pack("<4Q", *[4 * MIB | FULL] * 4))),
         broken=False),
    Case("vhdx partial without a parent", lambda: Vhdx(blocks={0: Block(PARTIAL, b"x", (True,) * 99)}).build()),
    Case("vhdx size of 64 TiB", lambda: BIG_TABLE.build()),
    Case("vhdx region table full", lambda: Vhdx(extra_regions=[struct.pack("<16sQII", b"?" * 16, (n + 9) * MIB, MIB, 0)
                                                               for n in range(2045)]).build(), broken=False),
    Case("vhdx region at the end of all offsets",
         lambda: Vhdx(extra_regions=[struct.pack("<16sQII", b"?" * 16, (1 << 63) - MIB, MIB, 0)]).build()),
    Case("vhdx log at the end of all offsets", lambda: Vhdx(log_offset=(1 << 64) - MIB).build()),
    Case("vhdx parent a fifo", lambda: linked(relative_path="fifo"), ("fifo",)),
    Case("vhdx parent elsewhere", lambda: linked(relative_path="/proc/self/environ"), ("/proc/self/environ",)),
    Case("vhdx parent itself", lambda: linked(relative_path="image")),
    Case("vhdx parent with a word", lambda: linked(relative_path="nbd:localhost:1")),
    Case("vhdx parent with escapes", lambda: linked(relative_path="\x1b[31m\nx")),
    Case("vhdx parent plain", lambda: linked(relative_path="plain"), ("plain",)),
    Case("vpc good", lambda: Vhd(blocks={1: (b"x", (True,) * 4096)}).build(), broken=False),
    Case("vpc footer only", lambda: footer(1 << 40)),
    Case("vpc table of 4 GiB", lambda: Vhd(max_entries=0xFFFFFFFF).build(), broken=False),
    Case("vpc smallest blocks", lambda: patched(Vhd(size=64 * MIB, block_size=512).build())[:400000]),
    Case("vpc block of 2 GiB", lambda: Vhd(block_size=1 << 31, size=4 * MIB).build(), broken=False),
    Case("vpc table over the header", lambda: patched(Vhd().build(), (512 + 16, struct.pack(">Q", 512)))),
    Case("vpc table nowhere", lambda: patched(Vhd().build(), (512 + 16, struct.pack(">Q", 1 << 62)))),
    Case("vpc header nowhere", lambda: footer(8 * MIB, data_offset=(1 << 64) - 1)),
    Case("vpc blocks in one place",
         lambda: patched(Vhd(blocks={0: (b"x", (True,) * 4096)}).build(), (1536, struct.pack(">4I", *[4] * 4))),
         broken=False),
    Case("vpc parent a fifo", lambda: Vhd(kind=4, locators=[(b"W2ru", "fifo".encode("utf-16-le"))]).build(), ("fifo",)),
    Case("vpc parent with escapes", lambda: Vhd(kind=4, parent_name="\x1b[31m").build()),
    Case("vpc parent with a long name",
         lambda: patched(Vhd(kind=4, locators=[(b"W2ru", b"x")]).build(),
                         (512 + 576, struct.pack(">4sIIIQ", b"W2ru", 1, 0xFFFFFFFF, 0, 0)))),
    *(Case(f"vhdx damaged {seed}", lambda seed=seed: damaged(Vhdx(blocks={0: Block(FULL, b"x")}).build(), seed),  # type: ignore[misc]
           broken=False) for seed in range(4)),
    *(Case(f"vpc damaged {seed}", lambda seed=seed: damaged(Vhd(blocks={0: (b"x", ())}).build(), seed),  # type: ignore[misc]
           broken=False) for seed in range(6)),
)  # fmt: skip


def damaged(data: bytes, seed: int) -> bytes:
    """Bytes of headers and tables at random; checksums do not hide all of them."""
    chooser = random.Random(seed)
    content = bytearray(data)
    places = (
        [(0, 4096), (2 * MIB, 64), (3 * MIB, 300), (3 * MIB + 64 * KIB, 64)] if data[:4] == b"vhdx" else [(512, 1100)]
    )
    for _ in range(6):
        start, length = chooser.choice(places)
        content[start + chooser.randrange(length)] = chooser.choice((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(content)


HARMFUL = {"fifo", "/proc/self/environ"}
COMMANDS = (*LOOK, *READ, *WRITE)
LEFT_OUT = {
    "vhdx size of 64 TiB": (CONVERT,),
    "vhdx log of overlapping entries": tuple(words for words in (*READ, *WRITE) if words not in (READ[4], CONVERT)),
}
"""What would take long, or the same time again."""


@pytest.mark.parametrize("untrusted", [False, True], ids=["compatible", "untrusted"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_every_command_survives(case: Case, untrusted: bool, folder: Path, attempts: Attempts) -> None:
    if untrusted and not case.named:
        pytest.skip("names nothing")
    (folder / "image").write_bytes(case.content())
    (folder / "empty").write_bytes(b"")
    (folder / "plain").write_bytes(bytes(MIB))
    os.mkfifo(folder / "fifo")
    before = (folder / "image").stat()
    wrong: list[str] = []
    codes: dict[tuple[str, ...], int] = {}
    for words in COMMANDS:
        if words in LEFT_OUT.get(case.name, ()) or words[0] == "snapshot":
            continue
        if words is WRITE[0]:
            after = (folder / "image").stat()
            assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size), "the source was changed"
        got = attempts(folder, [words[0], *(["--untrusted"] if untrusted else []), *words[1:]])
        forbidden = set(case.named) if untrusted or words in LOOK else set(case.named) & HARMFUL
        wrong += judge(list(words), got, forbidden)
        codes[tuple(words)] = got["code"]
        for name in ("out", "overlay"):
            (folder / name).unlink(missing_ok=True)
    assert not wrong, "\n".join(wrong)
    if case.broken and tuple(CONVERT) in codes:
        assert codes[tuple(CONVERT)] == 1, "a broken image was converted"
