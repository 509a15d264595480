"""vdi, qed, parallels, qcow and bochs images that nobody should vouch for: see test_hostile_images.

Forged from the descriptions of the formats; no code of byre is used.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from hostile.test_hostile_images import CONVERT, LOOK, READ, WRITE, Attempts, attempts, folder, judge

__all__ = ["attempts", "folder"]

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


class Case(NamedTuple):
    """:ivar parts: what lies where in the file; the last one says how long it is
    :ivar named: what the image names
    """

    name: str
    parts: Callable[[], dict[int, bytes]]
    named: tuple[str, ...] = ()
    broken: bool = True
    length: int = 0


def vdi(*, size: int = 4 * MIB, blocks: int = 4, kind: int = 1, map_at: int = 512, data_at: int = MIB,
        block: int = MIB, allocated: int = 0, parent: bytes = bytes(16),
        entries: bytes = b"") -> dict[int, bytes]:  # fmt: skip
    head = struct.pack("<64s5I256s7IQ4I16s16s16s16s", b"<<< x >>>", 0xBEDA107F, 0x10001, 384, kind, 0, b"", map_at,
                       data_at, 0, 0, 0, 512, 0, size, block, 0, blocks, allocated, b"u" * 16, b"m" * 16, parent,
                       bytes(16))  # fmt: skip
    table = entries or b"\xff" * (4 * min(blocks, 1000))
    return {MIB: b"x" * 4096, map_at: table, 0: head.ljust(512, b"\0")}


def qed(*, size: int = MIB, cluster: int = 4096, table: int = 4, header: int = 1, features: int = 0, l1_at: int = 4096,
        name: bytes = b"", name_at: int = 64, name_size: int | None = None, l1: bytes = b"",
        more: dict[int, bytes] | None = None) -> dict[int, bytes]:  # fmt: skip
    length = len(name) if name_size is None else name_size
    head = struct.pack("<4s3I5Q2I", b"QED\0", cluster, table, header, features, 0, 0, l1_at, size, name_at, length)
    return {0: head + name, 4096: l1.ljust(16384, b"\0"), 20480: bytes(4096), **(more or {})}


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def parallels(*, magic: bytes = b"WithouFreSpacExt", tracks: int = 8, entries: int = 256, sectors: int = 2048,
              in_use: int = 0, data: int = 8, extension: int = 0, bat: bytes = b"",
              more: dict[int, bytes] | None = None) -> dict[int, bytes]:  # fmt: skip
    head = struct.pack("<16s5IQ3IQ", magic, 2, 16, 1, tracks, entries, sectors, in_use, data, 0, extension)
    return {0: head + bat.ljust(4 * min(entries, 1000), b"\0"), 4096: bytes(4096), **(more or {})}


def extension(features: bytes) -> dict[int, bytes]:
    rest = features.ljust(4096 - 24, b"\0")
    return {8192: struct.pack("<Q16s", 0xAB234CEF23DCEA87, hashlib.md5(rest).digest()) + rest}


def bitmap(granularity: int, entries: int, table: bytes = b"", length: int | None = None) -> dict[int, bytes]:
    body = struct.pack("<Q16sII", 2048, b"i" * 16, granularity, entries) + table
    size = len(body) if length is None else length
    return extension(struct.pack("<QQII", 0x20385FAE252CB34A, 0, size, 0) + body)


def qcow(*, size: int = MIB, bits: int = 12, l2_bits: int = 9, crypt: int = 0, l1_at: int = 48, name: bytes = b"",
         name_at: int = 0, name_size: int | None = None, l1: tuple[int, ...] = (), l2: tuple[int, ...] = (),
         more: dict[int, bytes] | None = None) -> dict[int, bytes]:  # fmt: skip
    length = len(name) if name_size is None else name_size
    at = name_at or (16384 if name else 0)
    head = struct.pack(">IIQIIQBBHIQ", 0x514649FB, 1, at, length, 0, size, bits, l2_bits, 0, crypt, l1_at)
    table = struct.pack(f">{len(l1)}Q", *l1)
    return {0: (head + table).ljust(8192, b"\0"), 8192: struct.pack(f">{len(l2)}Q", *l2).ljust(8192, b"\0"),
            16384: name.ljust(4096, b"\0"), **(more or {})}  # fmt: skip


def qcow_packed(payload: bytes, length: int) -> dict[int, bytes]:
    entry = 1 << 63 | length << 51 | 20480
    return qcow(l1=(8192,), l2=(entry,) * 256, more={20480: payload})


def bomb() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(2)) + packer.flush()


def bundle(file: str = "plain", *, before: str = "", kind: str = "Plain", size: str = "2048", end: str = "2048",
           shots: str = "", guid: str = "{1}") -> dict[int, bytes]:  # fmt: skip
    text = (f'<?xml version="1.0" encoding="UTF-8"?>\n{before}<Parallels_disk_image Version="1.0"><Disk_Parameters>'
            f"<Disk_size>{size}</Disk_size><Padding>0</Padding></Disk_Parameters><StorageData><Storage><Start>0</Start>"
            f"<End>{end}</End><Blocksize>8</Blocksize><Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{file}</File>"
            f"</Image></Storage></StorageData>{shots}</Parallels_disk_image>")  # fmt: skip
    return {0: text.encode()}


def deep() -> dict[int, bytes]:
    start = b'<?xml version="1.0" encoding="UTF-8"?>\n<Parallels_disk_image>'
    return {0: start + b"<a>" * 20000 + b"</a>" * 20000 + b"</Parallels_disk_image>"}


ENTITIES = '<!DOCTYPE lol [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
FILE_ENTITY = '<!DOCTYPE lol [<!ENTITY a SYSTEM "/etc/passwd">]>'
LOOP = "<Snapshots><TopGUID>{1}</TopGUID><Shot><GUID>{1}</GUID><ParentGUID>{1}</ParentGUID></Shot></Snapshots>"


def bochs(*, entries: int = 64, extent: int = 16384, bits: int = 4, size: int = MIB, head: int = 512,
          catalog: bytes = b"\xff" * 256) -> dict[int, bytes]:  # fmt: skip
    data = struct.pack("<32s16s16s5IIQ", b"Bochs Virtual HD Image", b"Redolog", b"Growing", 0x20000, head, entries,
                       bits, extent, 0, size)  # fmt: skip
    return {0: data.ljust(512, b"\0") + catalog}


CASES = (
    Case("vdi good", vdi, broken=False),
    Case("vdi header alone", lambda: {0: vdi()[0]}),
    Case("vdi map of 16 GiB", lambda: vdi(blocks=0xFFFFFFFF, size=1 << 52, data_at=0xFFFFFE00)),
    Case("vdi map of 32 MiB that is not there", lambda: vdi(blocks=1 << 23, data_at=64 * MIB)),
    Case("vdi full map, sparse", lambda: {**vdi(blocks=1 << 23, data_at=64 * MIB, size=8 * TIB)}, broken=False,
         length=64 * MIB),
    Case("vdi size of 8 EiB", lambda: vdi(size=(1 << 63) - 512)),
    Case("vdi map over the header", lambda: vdi(map_at=0)),
    Case("vdi data over the map", lambda: vdi(data_at=512)),
    Case("vdi far entries", lambda: vdi(entries=struct.pack("<4I", 0xFFFFFFFD, 1 << 31, 5, 0))),
    Case("vdi one block for all", lambda: vdi(entries=bytes(16), allocated=1), broken=False),
    Case("vdi count of 4 billion", lambda: vdi(allocated=0xFFFFFFFF), broken=False),
    Case("vdi blocks of 2 GiB", lambda: vdi(block=1 << 31)),
    Case("vdi without a parent", lambda: vdi(kind=4, parent=b"p" * 16)),
    Case("vdi its own parent", lambda: vdi(kind=4, parent=b"u" * 16)),
    Case("qed good", qed, broken=False),
    Case("qed header alone", lambda: {0: qed()[0]}),
    Case("qed clusters of 2 GiB", lambda: qed(cluster=1 << 31)),
    Case("qed tables of a gigabyte", lambda: qed(cluster=1 << 26, table=16, l1_at=1 << 26)),
    Case("qed L1 at 2^63", lambda: qed(l1_at=1 << 63)),
    Case("qed L1 far away", lambda: qed(l1_at=1 << 40)),
    Case("qed header of terabytes", lambda: qed(header=0xFFFFFFFF)),
    Case("qed L1 of noise", lambda: qed(size=4 * GIB, l1=os.urandom(16384)), broken=False),
    Case("qed L2 of noise", lambda: qed(l1=words(20480), more={20480: os.urandom(16384)})),
    Case("qed one L2 32 times", lambda: qed(size=256 * MIB, l1=words(*[20480] * 32),
                                             more={20480: words(*[36864] * 2048), 36864: b"x" * 4096}), broken=False),
    Case("qed L1 that is L2", lambda: qed(l1=words(4096)), broken=False),
    Case("qed unknown features", lambda: qed(features=1 << 40)),
    Case("qed not closed", lambda: qed(features=2, l1=words(1 << 50)), broken=False),
    Case("qed far sparse data", lambda: qed(l1=words(20480), more={20480: words(14 * TIB).ljust(16384, b"\0"),
                                                                 14 * TIB: b"x" * 4096}), broken=False),
    Case("qed names itself", lambda: qed(features=1, name=b"image")),
    Case("qed FIFO below", lambda: qed(features=5, name=b"fifo"), ("fifo",)),
    Case("qed process below", lambda: qed(features=5, name=b"/proc/self/environ"), ("/proc/self/environ",)),
    Case("qed server below", lambda: qed(features=1, name=b"nbd://127.0.0.1:1/x")),
    Case("qed plain below", lambda: qed(features=5, name=b"plain"), ("plain",), broken=False),
    Case("qed escapes below", lambda: qed(features=5, name=b"\x1b[31m\n\x9b")),
    Case("qed name of 4 GiB", lambda: qed(features=1, name_size=0xFFFFFFFF)),
    Case("qed name behind the header", lambda: qed(features=1, name_at=0xFFFFFFF0, name_size=8)),
    Case("parallels good", parallels, broken=False),
    Case("parallels header alone", lambda: {0: parallels()[0][:64]}),
    Case("parallels no tracks", lambda: parallels(tracks=0)),
    Case("parallels clusters of terabytes", lambda: parallels(tracks=0xFFFFFFFF)),
    Case("parallels BAT of 16 GiB", lambda: parallels(entries=0xFFFFFFFF)),
    Case("parallels size of 8 ZiB", lambda: parallels(sectors=(1 << 64) - 1)),
    Case("parallels data nowhere", lambda: parallels(data=0xFFFFFFFF), broken=False),
    Case("parallels data over the BAT", lambda: parallels(data=1), broken=False),
    Case("parallels BAT of noise", lambda: parallels(bat=os.urandom(1000))),
    Case("parallels one cluster for all", lambda: parallels(bat=struct.pack("<I", 1) * 250), broken=False),
    Case("parallels not closed", lambda: parallels(in_use=0x746F6E59, bat=b"\xff" * 64)),
    *(Case(f"parallels extension at {sector:#x}", lambda sector=sector: parallels(extension=sector), broken=False)  # type: ignore[misc]
      for sector in (1, 1 << 40, 1 << 54, 1 << 55, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)),
    Case("parallels bitmap of 2^63 bits", lambda: parallels(extension=16, more=bitmap(1, 0xFFFFFFFF)), broken=False),
    Case("parallels bitmap bits nowhere", lambda: parallels(extension=16, more=bitmap(8, 1, words((1 << 64) - 1))),
         broken=False),
    Case("parallels bitmap granularity", lambda: parallels(extension=16, more=bitmap(0xFFFFFFFF, 1, words(1))),
         broken=False),
    Case("parallels feature of 4 GiB", lambda: parallels(extension=16, more=bitmap(8, 1, words(1), 0xFFFFFFFF)),
         broken=False),
    Case("parallels necessary feature", lambda: parallels(extension=16, more=extension(words(7, 1, 0))), broken=False),
    Case("bundle", bundle, ("plain",), broken=False),
    Case("bundle with entities", lambda: bundle("&b;", before=ENTITIES), broken=False),
    Case("bundle with a file as entity", lambda: bundle("&a;", before=FILE_ENTITY), ("/etc/passwd",), broken=False),
    Case("bundle deep", deep),
    Case("bundle cut off", lambda: {0: bundle()[0][:200]}),
    Case("bundle that is its own image", lambda: bundle("image", kind="Compressed")),
    Case("bundle of a FIFO", lambda: bundle("fifo"), ("fifo",)),
    Case("bundle of a process", lambda: bundle("/proc/self/environ"), ("/proc/self/environ",)),
    Case("bundle of a server", lambda: bundle("nbd://127.0.0.1:1/x")),
    Case("bundle of nothing", lambda: bundle("nothing")),
    Case("bundle in a circle", lambda: bundle(shots=LOOP)),
    Case("bundle with escapes", lambda: bundle("&#27;[31m&#10;x")),
    Case("bundle with long numbers", lambda: bundle(size="9" * 5000)),
    Case("bundle of 8 EiB", lambda: bundle(size="9" * 18, end="9" * 18)),
    Case("bundle of 100 MB", lambda: bundle("x" * 2 * MIB)),
    Case("qcow good", lambda: qcow(l1=(8192,), l2=(20480,), more={20480: b"x" * 4096}), broken=False),
    Case("qcow header alone", lambda: {0: qcow()[0][:48]}),
    Case("qcow clusters of a byte", lambda: qcow(bits=0)),
    Case("qcow clusters of exabytes", lambda: qcow(bits=63)),
    Case("qcow L2 of terabytes", lambda: qcow(l2_bits=63)),
    Case("qcow L1 of exabytes", lambda: qcow(size=(1 << 63) - 512, bits=9, l2_bits=6)),
    Case("qcow L1 of 32 MiB that is not there", lambda: qcow(size=8 * TIB)),
    Case("qcow L1 at 2^63", lambda: qcow(l1_at=1 << 63)),
    Case("qcow L1 over the header", lambda: qcow(l1_at=0)),
    Case("qcow L1 of noise", lambda: qcow(size=512 * MIB, more={48: os.urandom(2048)})),
    Case("qcow L2 of noise", lambda: qcow(l1=(8192,), more={8192: os.urandom(4096)})),
    Case("qcow one L2 64 times", lambda: qcow(size=128 * MIB, l1=(8192,) * 64, l2=(20480,) * 512,
                                               more={20480: b"x" * 4096}), broken=False),
    Case("qcow unknown encryption", lambda: qcow(crypt=2)),
    Case("qcow old encryption", lambda: qcow(crypt=1)),
    Case("qcow deflate bomb", lambda: qcow_packed(bomb(), 4095), broken=False),
    Case("qcow compressed noise", lambda: qcow_packed(os.urandom(5000), 4095)),
    Case("qcow compressed nothing", lambda: qcow_packed(b"x", 0)),
    Case("qcow compressed far away", lambda: qcow(l1=(8192,), l2=((1 << 64) - 1,) * 256)),
    Case("qcow names itself", lambda: qcow(name=b"image")),
    Case("qcow FIFO below", lambda: qcow(name=b"fifo"), ("fifo",)),
    Case("qcow process below", lambda: qcow(name=b"/proc/self/environ"), ("/proc/self/environ",)),
    Case("qcow json below", lambda: qcow(name=b'json:{"driver":"raw"}')),
    Case("qcow plain below", lambda: qcow(name=b"plain"), ("plain",), broken=False),
    Case("qcow escapes below", lambda: qcow(name=b"\x1b[31m\n\x9b")),
    Case("qcow name of 4 GiB", lambda: qcow(name=b"x", name_size=0xFFFFFFFF)),
    Case("qcow name at 2^63", lambda: qcow(name=b"x", name_at=1 << 63)),
    Case("bochs good", bochs, broken=False),
    Case("bochs header alone", lambda: {0: bochs()[0][:512]}),
    Case("bochs catalog of 16 GiB", lambda: bochs(entries=0xFFFFFFFF)),
    Case("bochs catalog of 4 MiB that is not there", lambda: bochs(entries=1 << 20)),
    Case("bochs extents of a byte", lambda: bochs(extent=1)),
    Case("bochs extents of 2 GiB", lambda: bochs(extent=1 << 31)),
    Case("bochs bitmaps of 4 GiB", lambda: bochs(bits=0xFFFFFFFF)),
    Case("bochs size of 16 EiB", lambda: bochs(size=(1 << 64) - 512)),
    Case("bochs catalog in the header", lambda: bochs(head=0)),
    Case("bochs far extents", lambda: bochs(catalog=struct.pack("<64I", *range(1 << 31, (1 << 31) + 64)))),
)  # fmt: skip


def make(case: Case, place: Path) -> None:
    with open(place / "image", "wb") as file:
        for offset, data in case.parts().items():
            file.seek(offset)
            file.write(data)
        file.truncate(max(case.length, file.seek(0, os.SEEK_END)))
    (place / "empty").write_bytes(b"")
    (place / "plain").write_bytes(bytes(MIB))
    os.mkfifo(place / "fifo")


NEVER = {"fifo", "/proc/self/environ", "/etc/passwd"}
SMALL = {"qed far sparse data", "vdi full map, sparse"}
"""Not converted: terabytes of nothing take their time."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_every_command_survives(case: Case, folder: Path, attempts: Attempts) -> None:
    make(case, folder)
    before = (folder / "image").stat()
    wrong: list[str] = []
    codes = {}
    modes = ((), ("--untrusted",)) if case.named else ((),)
    for extra in modes:
        for words_ in (*LOOK, *READ):
            if case.name in SMALL and words_[0] in ("convert", "compare"):
                continue
            got = attempts(folder, [words_[0], *extra, *words_[1:]])
            forbidden = set(case.named) if extra or words_ in LOOK else set(case.named) & NEVER
            wrong += judge(words_, got, forbidden)
            codes[tuple(words_)] = got["code"]
            for name in ("out", "overlay"):
                (folder / name).unlink(missing_ok=True)
    after = (folder / "image").stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size), "the source was changed"
    for words_ in WRITE:
        got = attempts(folder, [words_[0], *words_[1:]])
        wrong += judge(words_, got, set(case.named) & NEVER)
    assert not wrong, "\n".join(wrong)
    if case.broken:
        assert codes[tuple(CONVERT)] == 1, "a broken image was converted"


GOOD = {case.name.partition(" ")[0]: case.parts for case in CASES if case.name.endswith("good")}


@pytest.mark.parametrize("format", GOOD)
def test_damaged_at_random(format: str, folder: Path, attempts: Attempts) -> None:
    """Bytes of headers and tables, changed at random."""
    for seed in range(6):
        chooser = random.Random(f"{format} {seed}")
        parts = {at: bytearray(data) for at, data in GOOD[format]().items()}
        for _ in range(5):
            part = parts[chooser.choice(sorted(parts)[:2])]
            part[chooser.randrange(min(len(part), 400))] = chooser.choice((0, 1, 0x7F, 0x80, 0xFF))
        for name in ("image", "empty", "plain", "fifo"):
            (folder / name).unlink(missing_ok=True)
        make(Case("", lambda parts=parts: {at: bytes(data) for at, data in parts.items()}), folder)  # type: ignore[misc]
        wrong: list[str] = []
        for words_ in (*LOOK[:1], READ[2], READ[4], CONVERT, *WRITE[:1], WRITE[3]):
            wrong += judge(words_, attempts(folder, list(words_)), set())
            (folder / "out").unlink(missing_ok=True)
        assert not wrong, f"seed {seed}\n" + "\n".join(wrong)
