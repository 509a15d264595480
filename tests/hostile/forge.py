"""Images that nobody should vouch for, forged byte by byte from the qcow2 specification.

Shares no code with byre, so that nothing byre refuses to write is out of reach. Files are sparse where they can be.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

MAGIC = 0x514649FB
COPIED = 1 << 63
COMPRESSED = 1 << 62
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


class Head(NamedTuple):
    """The header fields; the defaults make a small, good image (see :func:`write`)."""

    magic: int = MAGIC
    version: int = 3
    backing_offset: int = 0
    backing_size: int = 0
    cluster_bits: int = 16
    size: int = MIB
    crypt_method: int = 0
    l1_size: int = 1
    l1_offset: int = 3 << 16
    refcount_offset: int = 1 << 16
    refcount_clusters: int = 1
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    length: int = 112
    compression: int = 0

    def encoded(self) -> bytes:
        return struct.pack(">IIQIIQIIQQIIQQQQII", *self[:18]) + bytes((self.compression,)) + bytes(7)


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


def extension(kind: int, data: bytes, length: int | None = None) -> bytes:
    return struct.pack(">II", kind, len(data) if length is None else length) + data + bytes(-len(data) % 8)


def write(
    path: Path,
    head: Head | None = None,
    *,
    extensions: bytes = b"",
    backing: bytes = b"",
    parts: Mapping[int, bytes] | None = None,
    length: int = 0,
) -> None:
    """A qcow2 image with 64 KiB clusters: header, refcount table, one refcount block, L1 and L2 in clusters 0 to 4.

    :param backing: the name; it is put behind the extensions
    :param parts: bytes put at offsets last of all
    :param length: of the file, if longer than what was written
    """
    head = head or Head()
    cluster = 1 << min(head.cluster_bits, 21)
    if backing:
        head = head._replace(backing_offset=head.length + len(extensions) + 8, backing_size=len(backing))
    content = {
        0: head.encoded() + extensions + bytes(8) + backing,
        cluster: words(2 * cluster),
        2 * cluster: struct.pack(">6H", 1, 1, 1, 1, 1, 1),
        3 * cluster: words(COPIED | 4 * cluster),
        4 * cluster: words(COPIED | 5 * cluster),
        5 * cluster: b"guest data".ljust(cluster, b"."),
        **(parts or {}),
    }
    with open(path, "wb") as file:
        for offset, data in content.items():
            file.seek(offset)
            file.write(data)
        file.truncate(max(length, file.seek(0, os.SEEK_END)))


class Case(NamedTuple):
    """:ivar make: writes the image (and what else it needs) into the folder of the path
    :ivar named: files the image names, which an untrusted image must not get opened
    :ivar good: it can be opened; else every command refuses it
    """

    name: str
    make: Callable[[Path], None]
    named: tuple[str, ...] = ()
    good: bool = False


def _header(name: str, good: bool = False, **changes: int) -> Case:
    return Case(name, lambda path: write(path, Head(**changes)), good=good)


def _backing(name: str, backing: bytes, named: tuple[str, ...] = (), before: Callable[[Path], None] | None = None,
             format: bytes = b"", good: bool = False) -> Case:  # fmt: skip
    def make(path: Path) -> None:
        if before is not None:
            before(path.parent)
        extensions = extension(0xE2792ACA, format) if format else b""
        write(path, backing=backing, extensions=extensions)

    return Case(name, make, named, good)


def _data_file(name: str, data_file: bytes, named: tuple[str, ...] = (),
               before: Callable[[Path], None] | None = None) -> Case:  # fmt: skip
    def make(path: Path) -> None:
        if before is not None:
            before(path.parent)
        write(path, Head(incompatible=4), extensions=extension(0x44415441, data_file))

    return Case(name, make, named)


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "fifo")


def _socket(folder: Path) -> None:
    import socket

    here = os.getcwd()
    os.chdir(folder)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("socket")
    finally:
        os.chdir(here)


def _plain(folder: Path) -> None:
    (folder / "plain").write_bytes(bytes(MIB))


def _ring(path: Path) -> None:
    write(path, backing=b"other")
    write(path.parent / "other", backing=path.name.encode())


def _hard_link(path: Path) -> None:
    write(path, backing=b"same")
    os.link(path, path.parent / "same")


def _long_chain(path: Path) -> None:
    folder = path.parent
    for index in range(1, 250):
        write(folder / f"c{index}", backing=f"c{index + 1}".encode(), extensions=extension(0xE2792ACA, b"qcow2"))
    write(folder / "c250")
    write(path, backing=b"c1", extensions=extension(0xE2792ACA, b"qcow2"))


def _same_l2_everywhere(path: Path) -> None:
    """16,384 L1 entries, all one full L2 table: 134 million references in a file of a megabyte."""
    entries = words(*[COPIED | 8 << 16] * 16384)
    table = words(*[COPIED | 5 << 16] * 8192)
    write(path, Head(size=8 * TIB, l1_size=16384, l1_offset=6 << 16), parts={6 << 16: entries, 8 << 16: table})


def _same_data_everywhere(path: Path) -> None:
    write(path, Head(size=512 * MIB), parts={4 << 16: words(*[5 << 16] * 8192)})


def _sparse_4_tib(path: Path) -> None:
    """Virtual 4 TiB of 512-byte clusters in a file as long: a walk along the file never ends."""
    size = 120 * GIB  # what an L1 table of 32 MiB maps
    l1_size = size // (512 * 64)
    write(path, Head(cluster_bits=9, size=size, l1_size=l1_size, l1_offset=1 << 20, refcount_offset=512),
          length=4 * TIB)  # fmt: skip


def _sparse_file(path: Path) -> None:
    write(path, Head(cluster_bits=9, size=MIB, l1_size=32, l1_offset=3 << 9, refcount_offset=512), length=4 * TIB)


def _far_data(path: Path) -> None:
    """A data cluster at the far end of a sparse file: counts must not be kept by file length."""
    far = (15 * TIB) & ~0xFFFF
    write(path, parts={4 << 16: words(COPIED | 5 << 16, COPIED | far)}, length=far + (1 << 16))


def _full_refcount_table(path: Path) -> None:
    """8 MiB of refcount table, every entry the same block."""
    table = words(*[2 << 16] * (1 << 20))
    write(path, Head(refcount_offset=16 << 16, refcount_clusters=128), parts={16 << 16: table})


def _full_l1(path: Path) -> None:
    """32 MiB of L1 table with scattered nonsense."""
    table = os.urandom(1 << 16) * 512
    write(path, Head(size=(1 << 22) * (1 << 29), l1_size=1 << 22, l1_offset=16 << 16), parts={16 << 16: table})


def _compressed_bomb(path: Path) -> None:
    """Deflate data that unfolds to gigabytes, behind every entry of an L2 table."""
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = b"".join(packer.compress(bytes(MIB)) for _ in range(64)) + packer.flush()
    entry = COMPRESSED | (min(len(bomb) // 512, 255) << 54) | (5 << 16)
    write(path, Head(size=512 * MIB), parts={4 << 16: words(*[entry] * 8192), 5 << 16: bomb})


def _zstd_window(path: Path) -> None:
    """A zstd frame that asks for a window of gigabytes."""
    frame = bytes.fromhex("28b52ffd") + bytes((0x00, 0xFF)) + bytes((0x01, 0x00, 0x00)) + bytes(500)
    entry = COMPRESSED | (3 << 54) | (5 << 16)
    write(path, Head(incompatible=8, compression=1), parts={4 << 16: words(*[entry] * 16), 5 << 16: frame})


def _compressed_noise(path: Path) -> None:
    entry = COMPRESSED | (255 << 54) | (5 << 16)
    write(path, parts={4 << 16: words(*[entry + 7 * i for i in range(16)]), 5 << 16: bytes(range(256)) * 512})


def _compressed_past_the_end(path: Path) -> None:
    write(path, parts={4 << 16: words(COMPRESSED | (255 << 54) | ((1 << 54) - 1), COMPRESSED | (6 << 16))})


def _tables_over_header(path: Path) -> None:
    write(path, Head(l1_offset=0x10000, refcount_offset=0x10000), parts={1 << 16: words(0, 1 << 16)})


def _self_referring_l2(path: Path) -> None:
    write(path, parts={3 << 16: words(COPIED | 3 << 16), 4 << 16: words(*[COPIED | 3 << 16] * 8192)})


def _l2_noise(path: Path) -> None:
    write(path, Head(size=512 * MIB), parts={4 << 16: bytes(os.urandom(1 << 16))})


def _extended_noise(path: Path) -> None:
    write(path, Head(size=256 * MIB, incompatible=16), parts={4 << 16: bytes(os.urandom(1 << 16))})


def _extended_contradiction(path: Path) -> None:
    """Subclusters that are allocated and zero at once."""
    write(path, Head(incompatible=16), parts={4 << 16: words(COPIED | 5 << 16, (1 << 64) - 1)})


def _snapshots(count: int, entry: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path, Head(snapshots=count, snapshots_offset=16 << 16), parts={16 << 16: entry})

    return make


def _snapshot_entry(l1_offset: int, l1_size: int, extra: int = 16, name: bytes = b"name") -> bytes:
    entry = struct.pack(">QIHHIIQII", l1_offset, l1_size, 1, len(name), 0, 0, 0, 0, extra)
    entry += words(0, MIB).ljust(extra, b"\0")[:extra] + b"1" + name
    return entry + bytes(-len(entry) % 8)


def _bitmaps(count: int, directory_size: int, directory: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        extensions = extension(0x23852875, struct.pack(">IIQQ", count, 0, directory_size, 16 << 16))
        write(path, Head(autoclear=1), extensions=extensions, parts={16 << 16: directory})

    return make


def _luks(path: Path) -> None:
    """A LUKS header whose key derivation takes days."""
    slot = struct.pack(">II32sII", 0x00AC71F3, 0xFFFFFFFF, bytes(32), 8, 4000)
    head = struct.pack(">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256", 4096, 32,
                       bytes(20), bytes(32), 0xFFFFFFFF, b"u" * 36)  # fmt: skip
    write(path, Head(crypt_method=2), extensions=extension(0x0537BE77, words(16 << 16, 16 * 65536)),
          parts={16 << 16: (head + slot * 8).ljust(16 * 65536, b"\0")})  # fmt: skip


def _random(path: Path) -> None:
    path.write_bytes(Head().encoded() + os.urandom(1 << 20))


BITMAP = struct.pack(">QIIBBHI", 17 << 16, 0x08000000, 0, 1, 0, 1, 0) + b"b" + bytes(7)

CASES = (
    Case("good", write, good=True),
    Case("empty file", lambda path: path.write_bytes(b""), good=True),
    Case("magic alone", lambda path: path.write_bytes(b"QFI\xfb"), good=True),
    Case("version 3 cut off", lambda path: path.write_bytes(Head().encoded()[:90])),
    Case("header alone", lambda path: path.write_bytes(Head().encoded())),
    Case("noise behind the header", _random),
    _header("version 1", good=True, version=1),
    _header("version 4", good=True, version=4),
    _header("clusters of a byte", good=True, cluster_bits=0),
    _header("clusters of 4 GiB", cluster_bits=32),
    _header("shift count", cluster_bits=0xFFFFFFFF),
    _header("size of 16 EiB", size=(1 << 64) - 1),
    _header("size of 8 EiB, one L1 entry", size=(1 << 63) - 512),
    _header("L1 of 32 GiB", l1_size=0xFFFFFFFF),
    _header("L1 past the end", good=True, l1_size=1 << 22, l1_offset=1 << 16, size=GIB),
    _header("L1 at 2^63", l1_offset=(1 << 63)),
    _header("no L1", l1_size=0, l1_offset=0),
    _header("refcount table of terabytes", refcount_clusters=0xFFFFFFFF),
    _header("refcount table past the end", good=True, refcount_offset=1 << 40),
    _header("refcount table nowhere", refcount_offset=0, refcount_clusters=0),
    _header("refcounts of 2^31 bits", refcount_order=31),
    _header("header of 4 GiB", length=0xFFFFFFF8),
    _header("all incompatible features", incompatible=(1 << 64) - 1),
    _header("unknown compression", incompatible=8, compression=77),
    _header("4 billion snapshots", snapshots=0xFFFFFFFF, snapshots_offset=4 << 16),
    _header("65536 snapshots past the end", good=True, snapshots=65536, snapshots_offset=5 << 16),
    _header("encrypted without a key header", crypt_method=2),
    _header("old encryption", crypt_method=1),
    _header("name before the header's end", backing_offset=8, backing_size=8),
    _header("name past the cluster", backing_offset=65530, backing_size=1023),
    _header("name at 2^63", backing_offset=1 << 63, backing_size=8),
    _header("dirty and corrupt", good=True, incompatible=3),
    _header("data file without a name", incompatible=4),
    Case("extension of 4 GiB", lambda path: write(path, extensions=extension(0x12345678, b"", 0xFFFFFFF8))),
    Case("many extensions", lambda path: write(path, extensions=extension(0x12345678, b"") * 8000), good=True),
    Case(
        "noise as feature names",
        lambda path: write(
            path,
            Head(incompatible=1 << 40),
            extensions=extension(0x6803F857, b"\0\x28\x1b[31m\x07\xff\n".ljust(48, b"\x9b")),
        ),
    ),
    Case("no end of the file", lambda path: write(path, length=8 * TIB), good=True),
    Case("four TiB of nothing", _sparse_4_tib, good=True),
    Case("four TiB file, 512-byte clusters", _sparse_file, good=True),
    Case("data at 15 TiB", _far_data, good=True),
    Case("one L2 table 16384 times", _same_l2_everywhere, good=True),
    Case("one data cluster 8192 times", _same_data_everywhere, good=True),
    Case("refcount table of one block", _full_refcount_table, good=True),
    Case("L1 of noise", _full_l1, good=True),
    Case("L2 of noise", _l2_noise, good=True),
    Case("extended L2 of noise", _extended_noise, good=True),
    Case("extended L2 contradiction", _extended_contradiction, good=True),
    Case("L2 that is L1 and data", _self_referring_l2, good=True),
    Case("tables over each other", _tables_over_header, good=True),
    Case("deflate bomb", _compressed_bomb, good=True),
    Case("zstd window", _zstd_window, good=True),
    Case("compressed noise", _compressed_noise, good=True),
    Case("compressed past the end", _compressed_past_the_end, good=True),
    Case("snapshot L1 at 2^63", _snapshots(1, _snapshot_entry(1 << 63, 1)), good=True),
    Case("snapshot L1 of 32 GiB", _snapshots(1, _snapshot_entry(3 << 16, 0xFFFFFFFF)), good=True),
    Case(
        "snapshot extra data of 4 GiB",
        _snapshots(1, struct.pack(">QIHHIIQII", 3 << 16, 1, 1, 1, 0, 0, 0, 0, 0xFFFFFFFF)),
        good=True,
    ),
    Case("4000 snapshots of one table", _snapshots(4000, _snapshot_entry(3 << 16, 1) * 4000), good=True),
    Case(
        "escape in a snapshot's name", _snapshots(1, _snapshot_entry(3 << 16, 1, name=b"\x1b[2J\x9b\n\xff")), good=True
    ),
    Case("4 billion bitmaps", _bitmaps(0xFFFFFFFF, 64, BITMAP), good=True),
    Case("bitmap directory of exabytes", _bitmaps(1, 1 << 62, BITMAP), good=True),
    Case("bitmap table of a gigabyte", _bitmaps(1, len(BITMAP), BITMAP), good=True),
    Case("days of key derivation", _luks),
    _backing("names itself", b"image"),
    Case("ring of two", _ring, ("other",)),
    Case("names itself by another name", _hard_link, ("same",)),
    Case("chain of 251", _long_chain, ("c1",)),
    _backing("FIFO below", b"fifo", ("fifo",), _fifo),
    _backing("FIFO below, raw", b"fifo", ("fifo",), _fifo, b"raw"),
    _backing("socket below", b"socket", ("socket",), _socket, b"raw"),
    _backing("terminal below", b"/dev/tty", ("/dev/tty",), None, b"raw"),
    _backing("/dev/zero below", b"/dev/zero", ("/dev/zero",), None, b"raw"),
    _backing("process memory below", b"/proc/self/mem", ("/proc/self/mem",), None, b"raw"),
    _backing("own standard input below", b"/dev/fd/0", ("/dev/fd/0",), None, b"raw"),
    _backing("folder below", b".", (), None, b"raw"),
    _backing("plain file below", b"plain", ("plain",), _plain, b"raw", good=True),
    _backing("secret below", b"/etc/shadow", ("/etc/shadow",), None, b"raw", good=True),
    _backing("json below", b'json:{"driver":"raw","file":{"driver":"file","filename":"plain"}}', ("plain",), _plain),
    _backing("deep json below", b"json:" + b'{"a":' * 150 + b"1" + b"}" * 150),
    _backing("huge number in json", b"json:" + b'{"driver":"null-co","size":' + b"9" * 400 + b"}"),
    _backing("a server below", b"nbd://127.0.0.1:1/x"),
    _backing("fd protocol below", b"fd:0"),
    _backing("escape sequence below", b"\x1b[31mred\x07\x9b\n\xff\xe2\x80\xae", (), None, b"qcow2"),
    _backing("escape in the format", b"plain", ("plain",), _plain, b"\x1b]0;owned\x07"),
    _backing("protocol as the format", b"plain", ("plain",), _plain, b"file", good=True),
    _backing("zero byte in the name", b"pl\0ain"),
    _data_file("data file: FIFO", b"fifo", ("fifo",), _fifo),
    _data_file("data file: terminal", b"/dev/tty", ("/dev/tty",)),
    _data_file("data file: process", b"/proc/self/environ", ("/proc/self/environ",)),
    _data_file("data file: json", b'json:{"driver":"file","filename":"plain"}', ("plain",), _plain),
    _data_file("data file: protocol", b"file:plain", ("plain",), _plain),
    _data_file("data file: itself", b"image"),
    _data_file("data file: escape", b"\x1b[31m\n"),
)
