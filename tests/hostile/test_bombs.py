"""Images of every format that cost as much as their limits allow: tables that are full, streams that unfold, lists
without end, names that lead back. See test_hostile_images.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import plistlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from byre.formats import asif, cloop, dmg, uimage, vma
from byre.formats.ewf import layout as ewf
from hostile import test_flat_formats as flat
from hostile.test_hostile_images import Attempts, attempts, folder, judge
from support.forged_vhd import Vhd, Vhdx

__all__ = ["attempts", "folder"]

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

INFO = ["info", "--output", "json", "image"]
CHECK = ["check", "image"]
MAP = ["map", "--max-length", "1G", "--output", "json", "image"]
READ = ["io", "-r", "-c", "read 0 64k", "-c", "map", "image"]
PEEK = ["io", "-r", "-c", "read 0 64k", "-c", "read 1000M 64k", "image"]
MEASURE = ["measure", "-O", "qcow2", "image"]
COMPARE = ["compare", "image", "empty"]
CONVERT = ["convert", "-O", "qcow2", "image", "out"]
MEND = ["check", "-r", "all", "image"]
WRITE = ["io", "-c", "write 0 64k", "-c", "discard 64k 64k", "-c", "flush", "image"]
EVERY = (["info", "image"], INFO, MAP, CHECK, MEASURE, READ, COMPARE, CONVERT)


class Case(NamedTuple):
    """:ivar make: writes the image (and what else it needs) as the path
    :ivar named: what the image names
    :ivar never: what must not be opened even where the image is trusted
    :ivar commands: those whose time does not depend on a virtual size of terabytes
    :ivar broken: it cannot be converted
    """

    name: str
    make: Callable[[Path], None]
    named: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    commands: tuple[list[str], ...] = EVERY
    broken: bool = False


def _parts(make: Callable[[], dict[int, bytes]], length: int = 0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open(path, "wb") as file:
            for offset, data in make().items():
                file.seek(offset)
                file.write(data)
            file.truncate(max(length, file.seek(0, os.SEEK_END)))

    return write


def _bytes(make: Callable[[], bytes], length: int = 0) -> Callable[[Path], None]:
    return _parts(lambda: {0: make()}, length)


# -- block maps -----------------------------------------------------------------------------------

FULL = 1 << 23
"""Entries of a map of 32 MiB."""


def _vdi(entries: bytes, allocated: int = FULL) -> Callable[[], dict[int, bytes]]:
    return lambda: flat.vdi(blocks=FULL, data_at=64 * MIB, size=FULL * 512, block=512, entries=entries,
                            allocated=allocated)  # fmt: skip


def _parallels(bat: bytes, tracks: int = 1) -> Callable[[], dict[int, bytes]]:
    count = len(bat) // 4
    data = -(-(64 + len(bat)) // 512)
    return lambda: flat.parallels(magic=b"WithoutFreeSpace", tracks=tracks, entries=count, sectors=count * tracks,
                                  data=data, bat=bat)  # fmt: skip


def _alternating() -> bytes:
    """Every second block is free."""
    import numpy as np

    return np.where(np.arange(FULL) % 2, 0xFFFFFFFF, np.arange(FULL)).astype("<u4").tobytes()


def _extension(kind: str) -> Callable[[], dict[int, bytes]]:
    """A format extension in a cluster of 64 MiB."""

    def make() -> dict[int, bytes]:
        size = 64 * MIB
        if kind == "table":
            body = struct.pack("<Q16sII", 2048, bytes(16), 8, (size - 200) // 8) + bytes(size - 200)
            rest = struct.pack("<QQII", 0x20385FAE252CB34A, 0, len(body) - 8, 0) + body[:-8]
        else:
            one = struct.pack("<QQII", 0x20385FAE252CB34A, 0, 32, 0) + struct.pack("<Q16sII", 2048, bytes(16), 8, 0)
            rest = one * (size // len(one) - 1)
        rest = rest[: size - 24].ljust(size - 24, b"\0")
        heading = struct.pack("<Q16s", 0xAB234CEF23DCEA87, hashlib.md5(rest).digest())
        return flat.parallels(tracks=size // 512, entries=1, sectors=2048, data=size // 512, extension=size // 512,
                              more={size: heading + rest})  # fmt: skip

    return make


def _scattered() -> dict[int, bytes]:
    """An L2 table every 4 GiB of a sparse file."""
    tables = struct.pack("<8192Q", *[(index + 1) << 32 for index in range(8192)])
    head = struct.pack("<4s3I5Q2I", b"QED\0", 4096, 16, 1, 0, 0, 0, 4096, 8192 * 8192 * 4096, 0, 0)
    return {0: head, 4096: tables}


def _vpc(table: bytes) -> dict[int, bytes]:
    made = Vhd(size=FULL * 4096, block_size=4096, max_entries=FULL)
    return {0: made.footer() + made.header(1536, ()), 1536: table, 40 * MIB - 512: made.footer()}


def _vhdx() -> dict[int, bytes]:
    """Blocks of 256 MiB, each in its place, without anything in them."""
    import numpy as np

    made = Vhdx(size=24 * TIB, block_size=256 * MIB).build()
    index = np.arange(24 * TIB // (256 * MIB), dtype=np.uint64)
    table = np.zeros(len(index) + len(index) // 16 + 1, "<u8")
    table[index + index // np.uint64(16)] = (index + np.uint64(1)) * np.uint64(256 * MIB) | np.uint64(6)
    return {0: made, 2 * MIB: table.tobytes()}


# -- streams --------------------------------------------------------------------------------------

CHUNK = 64 * MIB


def _dmg(chunks: list[dmg.Chunk], body: bytes = b"") -> bytes:
    listed = {"resource-fork": {"blkx": [{"Data": dmg.encode_block_table(0, chunks)}]}}
    metadata = plistlib.dumps(listed)
    sectors = max((chunk.offset + chunk.length for chunk in chunks), default=0) // 512
    return body + metadata + dmg.encode_trailer(dmg.Trailer(0, len(body), 0, 0, len(body), len(metadata), sectors))


def _dmg_listed(text: bytes) -> bytes:
    metadata = b'<?xml version="1.0"?>' + text
    return metadata + dmg.encode_trailer(dmg.Trailer(0, 0, 0, 0, 0, len(metadata), 2048))


def _dmg_bomb(kind: int, pack: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    def make() -> bytes:
        body = pack(bytes(CHUNK))
        return _dmg([dmg.Chunk(index * CHUNK, CHUNK, kind, 0, len(body)) for index in range(3)], body)

    return make


def _dmg_fork() -> bytes:
    """7000 types of 65,536 items, all the same table."""
    table = dmg.encode_block_table(0, [dmg.Chunk(0, 512, 1, 0, 512)])
    data = struct.pack(">I", len(table)) + table
    types = struct.pack(">H", 6999) + struct.pack(">4sHH", b"blkx", 0xFFFF, 56002) * 7000
    rest = struct.pack(">16x4x2x2xHH", 28, 0) + types + bytes(12 * 65536)
    fork = struct.pack(">4I", 256, 256 + len(data), len(data), len(rest)).ljust(256, b"\0") + data + rest
    return fork + dmg.encode_trailer(dmg.Trailer(0, 0, 0, len(fork), 0, 0, 2048))


def _cloop_bomb() -> bytes:
    packed = zlib.compress(bytes(CHUNK))
    head = cloop.encode_header(cloop.Header(CHUNK, 4))
    at = len(head) + 8 * 5
    # Each stream begins where the first does: the limit is on what lies between.
    return head + struct.pack(">5Q", at, at + len(packed), at, at + len(packed), at) + packed


def _uimage(compression: int, pack: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    def make() -> bytes:
        from formats.test_uimage import forge

        return forge(pack(bytes(CHUNK)), compression=compression)

    return make


def _uimage_sparse() -> bytes:
    return uimage.encode_header(uimage.Header(0, 1, 0xFFFFFFFF, 0, 0, 0, 5, 2, 2, 0, b"x\x1b[31m\xff"))


def _uimage_parts() -> bytes:
    return uimage.encode_header(uimage.Header(0, 1, 1 << 20, 0, 0, 0, 5, 2, 4, 0, b"x")) + b"\0\0\0\1" * (1 << 18)


class _Ewf:
    """A segment, section by section."""

    def __init__(self, chunks: int, sectors_per_chunk: int = 64) -> None:
        self.data = bytearray(ewf.encode_file_header(1))
        volume = ewf.Volume(chunks, sectors_per_chunk, 512, chunks * sectors_per_chunk)
        self.add("volume", ewf.encode_volume(volume))

    def add(self, kind: str, body: bytes, size: int | None = None) -> None:
        """:param size: what the section says that it has"""
        after = len(self.data) + ewf.SECTION_SIZE + len(body)
        length = ewf.SECTION_SIZE + len(body) if size is None else size
        self.data += ewf.encode_section(ewf.Section(kind, after, length)) + body

    def end(self, kind: str = "done") -> bytes:
        self.data += ewf.encode_section(ewf.Section(kind, len(self.data), 0))
        return bytes(self.data)


def _ewf_texts() -> bytes:
    image = _Ewf(1)
    bomb = zlib.compress(b"1\nmain\nc\n007\n" + bytes(MIB - 100))
    for _ in range(20000):
        image.add("header", bomb)
    return image.end()


def _ewf_tables() -> dict[int, bytes]:
    """Tables of 4 MiB each, which lie over one another."""
    image = _Ewf(80 << 20, 1)
    for _ in range(80):
        image.add("table", ewf.encode_table_head(ewf.TableHead(1 << 20, 0)), 5 * MIB)
    return {0: image.end()}


def _ewf_bomb() -> bytes:
    image = _Ewf(3, CHUNK // 512)
    packed = zlib.compress(bytes(CHUNK))
    image.add("sectors", packed)
    start = len(image.data) - len(packed)
    rows = struct.pack("<3I", *[start | ewf.COMPRESSED] * 3)
    image.add("table", ewf.encode_table_head(ewf.TableHead(3, 0)) + rows + struct.pack("<I", zlib.adler32(rows)))
    return image.end()


def _ewf_next(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """An image called image.E01 whose second segment is something else."""

    def write(path: Path) -> None:
        first = path.with_name("image.E01")
        image = _Ewf(1)
        first.write_bytes(image.end("next"))
        make(path.with_name("image.E02"))
        path.symlink_to("image.E01")

    return write


def _asif(**changes: object) -> Callable[[], bytes]:
    from formats.test_asif import HEADER

    return lambda: asif.encode_header(HEADER._replace(**changes))  # type: ignore[arg-type]


def _asif_full() -> dict[int, bytes]:
    """A directory that says everything lies in one table, and the table that everything lies in one chunk."""
    from formats.test_asif import CHUNK as SIZE
    from formats.test_asif import HEADER

    header = HEADER._replace(sectors=1 << 30, directories=(SIZE, SIZE))
    count = asif.geometry(header).table_count
    return {0: asif.encode_header(header), SIZE: struct.pack(">Q", 1) + struct.pack(">Q", 2) * count,
            2 * SIZE: struct.pack(">Q", 3 | 1 << 63) * (SIZE // 8), 3 * SIZE: b"x" * SIZE}  # fmt: skip


def _vma(extents: int, clusters: int) -> Callable[[], bytes]:
    """Extents that hold nothing, each for the first cluster and the last."""

    def make() -> bytes:
        uuid = bytes(16)
        size = clusters * vma.CLUSTER
        data = vma.encode_header(vma.Header(uuid, 1, 0, (vma.Device(1, "disk\x1b[31m", size),), ()))
        extent = vma.encode_extent_header(vma.ExtentHeader(uuid, ((1, 0, 0), (1, clusters - 1, 0))))
        return data + extent * extents

    return make


def _vma_header(size: int) -> bytes:
    raw = bytearray(vma.encode_header(vma.Header(bytes(16), 1, 0, (vma.Device(1, "disk", MIB),), ())))
    struct.pack_into(">3I", raw, 48, 12288, size - 12288, size)
    return bytes(raw)


# -- names ----------------------------------------------------------------------------------------


def _envelope(*hrefs: str, format: str = "") -> bytes:
    from formats.test_appliance import descriptor

    return descriptor(*((f"d{index}", href, format) for index, href in enumerate(hrefs)))


def _ovf(href: str, format: str = "raw", before: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        if before is not None:
            before(path.parent)
        path.write_bytes(_envelope(href, format=format))

    return make


def _ova(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        from formats.test_appliance import pack

        pack(path, *members)

    return make


def _ova_nested(path: Path) -> None:
    from formats.test_appliance import pack

    body = b"x" * 512
    for _ in range(400):
        body = pack(path, ("vm.ovf", _envelope("x")), ("x", body)).read_bytes().rstrip(b"\0") + bytes(512)
    path.write_bytes(body)


def _ova_chain(kind: bytes) -> bytes:
    from formats.test_tar import header

    return header(b"vm.ovf", b"0", 0) + (header(b"x", kind, 100) + b"11 a=12345\n".ljust(512, b"\0")) * 3000


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "fifo")


def _plain(folder: Path) -> None:
    (folder / "plain").write_bytes(bytes(MIB))


def _secret_below(folder: Path) -> None:
    """A disk of an appliance that names a file of its own."""
    from hostile import forge

    forge.write(folder / "disk", backing=b"/etc/shadow", extensions=forge.extension(0xE2792ACA, b"raw"))


def _many_extents(path: Path) -> None:
    from support.vmdk import descriptor

    for number in range(600):
        path.with_name(f"e{number}").write_bytes(b"x" * 512)
    path.write_bytes(descriptor([f'RW 1 FLAT "e{number}" 0' for number in range(600)], "twoGbMaxExtentFlat"))


def _xml(tag: bytes, count: int, inside: bytes = b"") -> bytes:
    return b'<?xml version="1.0" encoding="UTF-8"?>\n<' + tag + b">" + inside * count + b"</" + tag + b">"


ENTITIES = (b'<?xml version="1.0"?><!DOCTYPE lol [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
            b'<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1">&b;</Envelope>')  # fmt: skip

BELOW = (INFO, CHECK, ["info", "--backing-chain", "image"], MAP, CONVERT)


def _luks(**fields: int) -> bytes:
    """A LUKS1 header with fields of our choice in its first slot."""
    given = {"bits": 16, "payload": 4096, "iterations": 1000, "slot_iterations": 1000, "material": 8, "stripes": 4000}
    given |= fields
    slot = struct.pack(">II32sII", 0x00AC71F3, given["slot_iterations"], bytes(32), given["material"], given["stripes"])
    idle = struct.pack(">II32sII", 0x0000DEAD, 0, bytes(32), 1032, 4000)
    head = struct.pack(">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256",
                       given["payload"], given["bits"], bytes(20), bytes(32), given["iterations"],
                       b"\x1b[31muuid")  # fmt: skip
    return head + slot + idle * 7


def _luks2(text: bytes) -> bytes:
    data = bytearray(4 * MIB)
    struct.pack_into(">6sHQQ48s32s64s40s48sQ184s64s", data, 0, b"LUKS\xba\xbe", 2, 4 * MIB, 1, b"", b"sha256", b"salt",
                     b"uuid", b"", 0, b"", b"")  # fmt: skip
    data[4096 : 4096 + len(text)] = text
    data[448:512] = hashlib.sha256(data[: 4 * MIB]).digest().ljust(64, b"\0")
    return bytes(data)


CASES = (
    Case("vdi: 8 million blocks in one place", _parts(_vdi(bytes(4 * FULL)), 65 * MIB),
         commands=(INFO, CHECK, MEASURE, PEEK)),
    Case("vdi: 8 million blocks outside", _parts(_vdi(b"\xf0" * (4 * FULL)), 65 * MIB),
         commands=(INFO, CHECK, MAP, PEEK, CONVERT, MEND, WRITE), broken=True),
    Case("vdi: every second block free", _parts(lambda: _vdi(_alternating())(), 64 * MIB + FULL * 512),
         commands=(INFO, CHECK, PEEK, WRITE, MEND)),
    Case("parallels: 8 million clusters in one place", _parts(_parallels(struct.pack("<I", 65538) * (FULL - 64)),
                                                             33 * MIB), commands=(INFO, CHECK, PEEK)),
    Case("parallels: 8 million clusters outside", _parts(_parallels(b"\xff" * 4 * (FULL - 64)), 33 * MIB),
         commands=(INFO, CHECK, MAP, PEEK, CONVERT, MEND, WRITE), broken=True),
    Case("vpc: 8 million blocks in one place", _parts(lambda: _vpc(struct.pack(">I", 65600) * FULL), 40 * MIB),
         commands=(INFO, CHECK, PEEK)),
    Case("vpc: 8 million blocks outside", _parts(lambda: _vpc(b"\xf0" * 4 * FULL), 40 * MIB),
         commands=(INFO, CHECK, PEEK, CONVERT), broken=True),
    Case("vhdx: terabytes of large blocks", _parts(_vhdx, 64 * TIB), commands=(INFO, CHECK, PEEK)),
    Case("parallels: two clusters, terabytes apart",
         _parts(_parallels(struct.pack("<2I", 4, 0xFFFFFFF0) + bytes(512)), 2 * TIB),
         commands=(*EVERY, WRITE, MEND)),
    Case("parallels: bitmap of 8 million entries", _parts(_extension("table"))),
    Case("parallels: a million bitmaps", _parts(_extension("many"))),
    Case("qed: tables terabytes apart", _parts(_scattered, 40 * TIB), commands=(INFO, CHECK, READ)),
    Case("bundle: 100,000 elements", _bytes(lambda: _xml(b"Parallels_disk_image", 200_000, b"<a/>")), broken=True),
    Case("bundle: attributes", _bytes(lambda: b"<Parallels_disk_image "
         + b" ".join(b'a%d=""' % index for index in range(80_000)) + b"/>"), broken=True),
    Case("vmdk: more extents than files may be open", _many_extents, tuple(f"e{n}" for n in range(600)),
         commands=(INFO, CHECK, MAP, CONVERT)),
    Case("dmg: chunks of 64 MiB, zlib", _bytes(_dmg_bomb(0x80000005, zlib.compress))),
    Case("dmg: chunks of 64 MiB, bzip2", _bytes(_dmg_bomb(0x80000006, bz2.compress)),
         commands=(INFO, MAP, READ, CONVERT)),
    Case("dmg: chunks of 64 MiB, lzma", _bytes(_dmg_bomb(0x80000008, lzma.compress)),
         commands=(INFO, MAP, READ, CONVERT)),
    Case("dmg: adc that refers to itself", _bytes(lambda: _dmg([dmg.Chunk(0, 512 * 1000, 0x80000004, 0, 2000)],
                                                              b"\x80a" + b"\x7f\0\0" * 600)), broken=True),
    Case("dmg: 270,000 chunks", _bytes(lambda: _dmg([dmg.Chunk(n * 512, 512, 0, 0, 0) for n in range(270_000)])),
         commands=(INFO, MAP)),
    Case("dmg: tables without end", _bytes(_dmg_fork), broken=True),
    Case("dmg: list of tags", _bytes(lambda: _dmg_listed(b"<plist><array>" + b"<dict/>" * (2 << 20))), broken=True),
    Case("dmg: deep list", _bytes(lambda: _dmg_listed(b"<plist>" + b"<array>" * 30_000 + b"</array>" * 30_000)),
         broken=True),
    Case("dmg: entities", _bytes(lambda: _dmg_listed(b'<!DOCTYPE l [<!ENTITY a "aaaa">]><plist>&a;</plist>')),
         broken=True),
    Case("dmg: sectors of exabytes", _bytes(lambda: dmg.encode_trailer(dmg.Trailer(0, 0, 0, 0, 0, 1, 1 << 63))),
         broken=True),
    Case("cloop: blocks of 64 MiB", _bytes(_cloop_bomb), broken=True),
    Case("cloop: 4 million blocks", _bytes(lambda: cloop.encode_header(cloop.Header(512, (4 << 20) - 1)), 33 * MIB),
         commands=(INFO, CHECK, PEEK)),
    Case("uimage: gzip bomb", _bytes(_uimage(1, lambda data: zlib.compress(data, wbits=31)))),
    Case("uimage: bzip2 bomb", _bytes(_uimage(2, bz2.compress)), commands=(INFO, READ, CONVERT)),
    Case("uimage: lzma bomb", _bytes(_uimage(3, lambda data: lzma.compress(data, lzma.FORMAT_ALONE))),
         commands=(INFO, READ, CONVERT)),
    Case("uimage: bomb over the limit", _bytes(_uimage(1, lambda data: zlib.compress(data * 2, wbits=31))),
         broken=True),
    Case("uimage: 4 GiB of nothing", _bytes(_uimage_sparse, 5 * GIB)),
    Case("uimage: parts without end", _bytes(_uimage_parts), broken=True),
    Case("uimage: cut", _bytes(lambda: _uimage_sparse()[:40]), broken=False),
    Case("asif: one chunk for all", _parts(_asif_full), commands=(INFO, CHECK, MAP, PEEK)),
    Case("asif: directory of 32 MiB", _bytes(_asif(max_sectors=1 << 47), 64 * MIB), commands=(INFO, CHECK, MAP, READ)),
    Case("asif: directories nowhere", _bytes(_asif(directories=((1 << 64) - 8, (1 << 64) - 8)), MIB), broken=True),
    Case("asif: directory over the header", _bytes(_asif(directories=(0, 0)), MIB), commands=(INFO, CHECK, READ)),
    Case("ewf: texts without end", _bytes(_ewf_texts), broken=True),
    Case("ewf: full tables", _parts(_ewf_tables, 8 * MIB), commands=(INFO, CHECK, [
        "io", "-r", *(word for n in range(40) for word in ("-c", f"read {n * GIB} 512")), "image"])),
    Case("ewf: chunks of 64 MiB", _bytes(_ewf_bomb)),
    Case("ewf: next segment: FIFO", _ewf_next(os.mkfifo), ("image.E02",), ("image.E02",), broken=True),
    Case("ewf: next segment: folder", _ewf_next(os.mkdir), broken=True),
    Case("ewf: next segment: the first", _ewf_next(lambda path: path.symlink_to("image.E01")), broken=True),
    Case("vma: extents of nothing", _bytes(_vma(20_000, 16)), commands=(INFO, CHECK, MEASURE, READ, MAP, CONVERT)),
    Case("vma: extents of everything", _bytes(_vma(3_000, 1 << 14))),
    Case("vma: header of 4 GiB", _bytes(lambda: _vma_header(0xFFFFFE00)), broken=True),
    Case("vma: header of 16 MiB, sparse", _bytes(lambda: _vma_header(16 * MIB), 17 * MIB), broken=True),
    Case("ova: good", _ova(("vm.ovf", _envelope("disk", format="raw")), ("disk", bytes(MIB)))),
    Case("ova: within itself 400 times", _ova_nested, broken=True),
    Case("ova: long names", _bytes(lambda: _ova_chain(b"L")), broken=True),
    Case("ova: attributes", _bytes(lambda: _ova_chain(b"x")), broken=True),
    Case("ova: member outside", _ova(("vm.ovf", _envelope("/etc/shadow", format="raw"))), never=("/etc/shadow",),
         broken=True),
    Case("ova: entities", _ova(("vm.ovf", ENTITIES)), broken=True),
    Case("ova: disk that names a secret", lambda path: (_secret_below(path.parent), _ova(
        ("vm.ovf", _envelope("disk", format="qcow2")), ("disk", (path.parent / "disk").read_bytes()))(path))[0],
        ("/etc/shadow",), commands=BELOW),
    Case("ovf: itself", _ovf("image", ""), broken=True),
    Case("ovf: plain", _ovf("plain", before=_plain), ("plain",)),
    Case("ovf: FIFO", _ovf("fifo", before=_fifo), ("fifo",), ("fifo",), broken=True),
    Case("ovf: folder", _ovf("."), broken=True),
    Case("ovf: process", _ovf("/proc/self/environ"), ("/proc/self/environ",), ("/proc/self/environ",), broken=True),
    Case("ovf: terminal", _ovf("/dev/tty"), ("/dev/tty",), ("/dev/tty",), broken=True),
    Case("ovf: server", _ovf("nbd://127.0.0.1:1/x"), broken=True),
    Case("ovf: json", _ovf("json:{}"), broken=True),
    Case("ovf: escapes", _ovf("&#27;[31m&#155;"), broken=True),
    Case("ovf: not text", _bytes(lambda: _envelope("x").replace(b'"x"', b'"\xff\xfe"')), broken=True),
    Case("ovf: zero byte", _bytes(lambda: _envelope("x").replace(b'"x"', b'"x&#0;y"')), broken=True),
    Case("ovf: disk that names a secret", _ovf("disk", "qcow2", before=_secret_below), ("/etc/shadow", "disk"),
         commands=BELOW),
    Case("ovf: entities", _bytes(lambda: ENTITIES), broken=True),
    Case("ovf: 2000 disks", _bytes(lambda: _envelope(*["x"] * 2000)), broken=True),
    Case("ovf: a million elements", _bytes(lambda: _xml(b"Envelope", 900_000, b"<a/>").replace(
        b"<Envelope>", b'<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1">')), broken=True),
    Case("luks: stripes", _bytes(lambda: _luks(stripes=0xFFFFFFFF), 4 * MIB), broken=True),
    Case("luks: key of 4 GiB", _bytes(lambda: _luks(bits=0xFFFFFFFF), 4 * MIB), broken=True),
    Case("luks: payload nowhere", _bytes(lambda: _luks(payload=0xFFFFFFFF), 4 * MIB), broken=True),
    Case("luks: material nowhere", _bytes(lambda: _luks(material=0xFFFFFFFF), 4 * MIB), broken=True),
    Case("luks: nothing behind the header", _bytes(_luks), broken=True),
    Case("luks2: 4 MiB of brackets", _bytes(lambda: _luks2(b"[" * (4 * MIB - 4097))), broken=True),
    Case("luks2: a number of 4 million digits", _bytes(lambda: _luks2(b'{"config":' + b"9" * (4 * MIB - 5000) + b"}")),
         broken=True),
    Case("luks2: a million keys", _bytes(lambda: _luks2(
        b'{"keyslots":{' + b",".join(b'"%d":{}' % n for n in range(300_000)) + b"}}")), broken=True),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_every_command_survives(case: Case, folder: Path, attempts: Attempts) -> None:
    path = folder / "image"
    case.make(path)
    (folder / "empty").write_bytes(b"")
    before = path.stat()
    wrong: list[str] = []
    codes: dict[str, int] = {}
    for words in case.commands:
        if words in (MEND, WRITE) and (path.stat().st_mtime_ns, path.stat().st_size) != (
            before.st_mtime_ns, before.st_size,
        ) and not set(codes) & {"write", "mend"}:  # fmt: skip
            wrong.append("the source was changed")
        named = set(case.named) if words[0] == "info" and "--backing-chain" not in words else set()
        if any(name.startswith("image.") for name in case.named):
            named = set()  # the image does not choose those names
        got = attempts(folder, words)
        wrong += judge(words, got, named | set(case.never))
        codes["mend" if words is MEND else "write" if words is WRITE else words[0]] = got["code"]
        (folder / "out").unlink(missing_ok=True)
    if case.named:
        for words in (INFO, MAP, CONVERT):
            got = attempts(folder, [words[0], "--untrusted", *words[1:]])
            wrong += judge(words, got, set(case.named))
            (folder / "out").unlink(missing_ok=True)
    after = path.stat()
    if MEND not in case.commands and WRITE not in case.commands:
        assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size), "the source was changed"
    assert not wrong, "\n".join(wrong)
    if case.broken:
        assert codes.get("convert", 1) == 1, "a broken image was converted"
