"""Mapping: every kind of entry meets every kind of request, and the peer finds the bytes and nothing to mend."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import byre
from byre.errors import ByreError, Corrupt, NotSupported
from byre.formats.qcow2.image import Qcow2Node
from byre.graph.creating import create
from byre.image import Image
from byre.io.extent import COMPRESSED, DATA, UNALLOCATED, ZERO
from conftest import Run

GROUP = 4
"""Clusters that one (kind, request) pair has for itself."""


class Layout(NamedTuple):
    """What an image is made with."""

    cluster_size: int = 4096
    compat: str = "1.1"
    extended_l2: bool = False
    backing: bool = False
    data: str = ""  # "external", "raw"
    refcount_bits: int = 16
    compression_type: str = "zlib"
    fragmented: bool = True

    @property
    def snapshots(self) -> bool:
        return not self.data


LAYOUTS = {
    "plain": Layout(),
    "tiny": Layout(512),
    "large": Layout(65536, fragmented=False),
    "version 2": Layout(compat="0.10"),
    "version 2, backed": Layout(compat="0.10", backing=True),
    "backed": Layout(backing=True),
    "tiny, backed": Layout(512, backing=True),
    "subclusters": Layout(16384, extended_l2=True),
    "subclusters, backed": Layout(16384, extended_l2=True, backing=True),
    "external": Layout(data="external"),
    "external, backed": Layout(data="external", backing=True),
    "external raw": Layout(data="raw"),
    "subclusters, external": Layout(16384, extended_l2=True, data="external"),
    "subclusters, external raw": Layout(16384, extended_l2=True, data="raw"),
    "narrow counts": Layout(refcount_bits=8),
    "wide counts": Layout(512, refcount_bits=64),
    "zstd": Layout(compression_type="zstd", backing=True),
}


class Disk:
    """An image under test, and what it must read as.

    :ivar model: the expected bytes
    :ivar snapshot: the expected bytes of the internal snapshot
    """

    def __init__(self, folder: Path, layout: Layout, size: int, seed: int = 1) -> None:
        self.path = str(folder / "disk.qcow2")
        self.folder = folder
        self.layout = layout
        self.random = random.Random(seed)
        self.cluster = layout.cluster_size
        self.model = bytearray(size)
        self.snapshot = b""
        options: dict[str, object] = {"cluster_size": layout.cluster_size, "compat": layout.compat}
        if layout.compat != "0.10":
            options.update(
                extended_l2=layout.extended_l2,
                refcount_bits=layout.refcount_bits,
                compression_type=layout.compression_type,
            )
        if layout.backing:
            base = self.random.randbytes(size * 2 // 3)
            (folder / "base.raw").write_bytes(base)
            self.model[: len(base)] = base
            options.update(backing_file="base.raw", backing_fmt="raw")
        if layout.data:
            options.update(data_file=str(folder / "data"), data_file_raw=layout.data == "raw")
        create(self.path, "qcow2", size, options=options)
        self.image = self.open()

    def open(self, **more: object) -> Image:
        return byre.open(self.path, read_only=False, **more)  # type: ignore[arg-type]

    def reopen(self) -> None:
        self.image.close()
        self.image = self.open()

    def content(self, length: int) -> bytes:
        """Bytes that compress, and of which no two are alike by chance."""
        return (self.random.randbytes(16) * (length // 16 + 1))[:length]

    # -- requests: each on the image and on the model --------------------------------------------------

    def write(self, offset: int, length: int, **more: bool) -> None:
        data = self.content(length)
        self.image.write(offset, data, **more)
        self.model[offset : offset + length] = data

    def zero(self, offset: int, length: int, **more: bool) -> None:
        self.image.write_zeroes(offset, length, **more)
        self.model[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        """Afterwards the range may read as zeroes or as before, byte for byte; what it is becomes the model."""
        self.image.discard(offset, length)
        now = self.image.read(offset, length)
        old = self.model[offset : offset + length]
        step = 512
        for at in range(0, length, step):
            assert now[at : at + step] in (old[at : at + step], bytes(len(now[at : at + step])))
        self.model[offset : offset + length] = now

    def compress(self, offset: int, count: int) -> None:
        for at in range(offset, offset + count * self.cluster, self.cluster):
            data = self.content(min(self.cluster, len(self.model) - at))
            self.image.write_compressed(at, data)
            self.model[at : at + len(data)] = data

    def compress_run(self, offset: int, count: int) -> None:
        assert isinstance(self.image.node, Qcow2Node)
        data = [self.content(self.cluster) for _ in range(count)]
        payloads = [self.image.node.compress(memoryview(part)) for part in data]
        assert all(payloads)
        self.image.write_compressed_clusters(offset, [payload for payload in payloads if payload])
        self.model[offset : offset + count * self.cluster] = b"".join(data)

    # -- judging ----------------------------------------------------------------------------------------

    def verify(self) -> None:
        assert self.image.read(0, len(self.model)) == self.model

    def judge(self, qemu_img: Run) -> None:
        """Closed, the image is what the model says, for the peer too, and has neither damage nor leaks."""
        self.verify()
        self.image.close()
        with byre.open(self.path) as again:
            assert again.read(0, len(self.model)) == self.model
        expected = self.folder / "expected.raw"
        expected.write_bytes(self.model)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", self.path, expected)
        qemu_img("check", self.path)  # 0: no leak, no wrong COPIED flag, no damage
        if self.snapshot:
            qemu_img("convert", "-l", "snap", "-O", "raw", self.path, self.folder / "snap.raw")
            assert (self.folder / "snap.raw").read_bytes() == self.snapshot
        if self.layout.data == "raw":
            data = (self.folder / "data").read_bytes()
            assert data[: len(self.model)].ljust(len(self.model), b"\0") == self.model


Step = Callable[[Disk, int], None]


def _zero_allocated(disk: Disk, at: int, count: int = GROUP) -> None:
    disk.write(at, count * disk.cluster)
    disk.zero(at, count * disk.cluster)


def _mixed(disk: Disk, at: int) -> None:
    """Neighbours of different kinds."""
    disk.write(at, disk.cluster)
    disk.zero(at + disk.cluster, disk.cluster, unmap=True)
    _zero_allocated(disk, at + 3 * disk.cluster, 1)


def _pieces(disk: Disk, at: int) -> None:
    """Written in small pieces: with subclusters, some are allocated, some zero and some neither."""
    for piece in range(0, GROUP * disk.cluster, disk.cluster // 2):
        disk.write(at + piece + disk.cluster // 8 + 5, disk.cluster // 8)
    disk.zero(at + disk.cluster // 2, disk.cluster // 4, unmap=True)


KINDS: dict[str, Step] = {
    "unallocated": lambda disk, at: None,
    "data": lambda disk, at: disk.write(at, GROUP * disk.cluster),
    "zero": lambda disk, at: disk.zero(at, GROUP * disk.cluster, unmap=True),
    "allocated zero": _zero_allocated,
    "compressed": lambda disk, at: disk.compress(at, GROUP),
    "mixed": _mixed,
    "pieces": _pieces,
}


def _discard_odd(disk: Disk, at: int) -> None:
    disk.discard(at + 512, 2 * disk.cluster)


REQUESTS: dict[str, Step] = {
    "nothing": lambda disk, at: None,
    "bytes": lambda disk, at: disk.write(at + disk.cluster + 100, 3),
    "sector": lambda disk, at: disk.write(at + disk.cluster, 512),
    "head": lambda disk, at: disk.write(at + disk.cluster, disk.cluster // 2),
    "tail": lambda disk, at: disk.write(at + disk.cluster + disk.cluster // 2, disk.cluster // 2),
    "whole": lambda disk, at: disk.write(at + disk.cluster, 2 * disk.cluster),
    "across": lambda disk, at: disk.write(at + disk.cluster // 2 + 7, 3 * disk.cluster),
    "durable": lambda disk, at: disk.write(at + disk.cluster // 2, 2 * disk.cluster, fua=True),
    "zero bytes": lambda disk, at: disk.zero(at + disk.cluster + 100, 300),
    "zero part": lambda disk, at: disk.zero(at + disk.cluster // 2, disk.cluster // 4, unmap=True),
    "zero whole": lambda disk, at: disk.zero(at + disk.cluster, 2 * disk.cluster),
    "zero and unmap": lambda disk, at: disk.zero(at + disk.cluster, 2 * disk.cluster, unmap=True),
    "zero across": lambda disk, at: disk.zero(at + disk.cluster // 2 - 9, 3 * disk.cluster, unmap=True),
    "discard": lambda disk, at: disk.discard(at + disk.cluster, 2 * disk.cluster),
    "discard odd": _discard_odd,
    "compress": lambda disk, at: disk.compress(at + disk.cluster, 1),
    "compress run": lambda disk, at: disk.compress_run(at + disk.cluster, 3),
    "twice": lambda disk, at: (disk.write(at + 600, disk.cluster), disk.write(at + disk.cluster, 700))[0],
    "discard and write": lambda disk, at: (disk.discard(at, 2 * disk.cluster), disk.write(at + 99, disk.cluster))[0],
    "zero and write": lambda disk, at: (disk.zero(at, 2 * disk.cluster), disk.write(at + 99, disk.cluster))[0],
}


def _pairs(disk: Disk, shared: bool) -> list[tuple[str, str, int]]:
    kinds = list(KINDS)
    requests = list(REQUESTS)
    if disk.layout.data:
        kinds.remove("compressed")
        requests = [name for name in requests if not name.startswith("compress")]
    start = len(KINDS) * len(REQUESTS) * GROUP * disk.cluster if shared else 0
    found = []
    for kind in kinds:
        for request in requests:
            found.append((kind, request, start + len(found) * GROUP * disk.cluster))
    if disk.layout.fragmented:
        disk.random.shuffle(found)
    return found


def _size(layout: Layout) -> int:
    return (2 * len(KINDS) * len(REQUESTS) * GROUP * layout.cluster_size) + 1536


@pytest.mark.oracle
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_kind_meets_every_request(tmp_path: Path, qemu_img: Run, name: str) -> None:
    """Half of the kinds are shared with an internal snapshot, which must keep its content."""
    layout = LAYOUTS[name]
    disk = Disk(tmp_path, layout, _size(layout))
    shared = _pairs(disk, True) if layout.snapshots else []
    for kind, _, at in shared:
        KINDS[kind](disk, at)
    if layout.snapshots:
        disk.image.close()
        qemu_img("snapshot", "-c", "snap", disk.path)
        disk.snapshot = bytes(disk.model)
        disk.image = disk.open()
    own = _pairs(disk, False)
    for kind, _, at in own:
        KINDS[kind](disk, at)
    disk.verify()
    for number, (_, request, at) in enumerate(own + shared):
        REQUESTS[request](disk, at)
        if number % 50 == 20:
            disk.image.flush()
        if number % 120 == 60:
            disk.reopen()
    disk.judge(qemu_img)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["plain", "backed", "subclusters", "subclusters, backed", "external raw", "version 2"])
def test_the_peer_maps_the_same(tmp_path: Path, qemu_img: Run, name: str) -> None:
    layout = LAYOUTS[name]
    disk = Disk(tmp_path, layout, _size(layout) // 2)
    for kind, request, at in _pairs(disk, False):
        KINDS[kind](disk, at)
        REQUESTS[request](disk, at)
    disk.image.flush()
    table = disk.image.extents()
    disk.image.close()
    peer = json.loads(qemu_img("map", "--output=json", disk.path).stdout)
    kinds = bytearray(len(disk.model) // 512)
    for row in table:
        kinds[row.offset // 512 : row.end // 512] = bytes([row.kind]) * (row.length // 512)
    for row in peer:
        part = set(kinds[row["start"] // 512 : (row["start"] + row["length"]) // 512])
        if row["zero"]:
            assert part <= {ZERO, UNALLOCATED}
        if row["data"] and not row["zero"]:
            assert part <= {DATA, COMPRESSED}


@pytest.mark.parametrize("name", ["plain", "tiny", "subclusters", "external"])
def test_one_at_a_time_and_in_bulk_agree(tmp_path: Path, name: str) -> None:
    disk = Disk(tmp_path, LAYOUTS[name], _size(LAYOUTS[name]) // 2)
    for kind, request, at in _pairs(disk, False):
        KINDS[kind](disk, at)
        REQUESTS[request](disk, at)
    node = disk.image.node
    for offset, length in ((0, len(disk.model)), (512 * 3, disk.cluster * 401), (disk.cluster * 7 + 99, 5)):
        bulk = list(node.extents(offset, length))
        single = []
        at = offset
        while at < offset + length:
            single.append(node.block_status(at, offset + length - at))
            assert single[-1].offset == at
            at = single[-1].end
        from byre.io.extentmap import ExtentMap

        assert list(ExtentMap.from_extents(single).coalesced()) == bulk
    disk.image.close()


def test_space_is_given_back_and_used_again(tmp_path: Path) -> None:
    disk = Disk(tmp_path, Layout(65536), 16 << 20)
    disk.write(0, 16 << 20)
    disk.image.flush()
    full = Path(disk.path).stat().st_size
    for _ in range(4):
        disk.discard(0, 16 << 20)
        disk.image.flush()
        assert Path(disk.path).stat().st_blocks * 512 < 2 << 20
        disk.write(0, 16 << 20)
        disk.image.flush()
    assert Path(disk.path).stat().st_size <= full + (1 << 20)
    disk.verify()
    disk.image.close()


def test_discards_can_be_ignored(tmp_path: Path) -> None:
    disk = Disk(tmp_path, Layout(), 1 << 20)
    disk.write(0, 1 << 20)
    disk.image.close()
    with disk.open(discard="ignore") as image:
        image.discard(0, 1 << 20)
        assert image.read(0, 1 << 20) == disk.model
        assert image.extents().bytes_of(DATA) == 1 << 20


@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
def test_detecting_zeroes(tmp_path: Path, mode: str) -> None:
    disk = Disk(tmp_path, Layout(), 1 << 20)
    disk.image.close()
    disk.image = disk.open(detect_zeroes=mode)
    disk.write(0, 8192)
    for at in (0, 65536):
        disk.image.write(at, bytes(8192))
    disk.image.write(131072, bytes(4095) + b"\1")
    [first] = disk.image.extents(0, 8192)
    [second] = disk.image.extents(65536, 8192)
    assert first.kind == second.kind == (DATA if mode == "off" else ZERO)
    assert (first.host >= 0) == (mode != "unmap")
    assert disk.image.read(0, 8192) == bytes(8192)
    assert disk.image.read(131072, 4096) == bytes(4095) + b"\1"
    disk.image.close()


def test_zeroing_what_reads_as_zero_allocates_nothing(tmp_path: Path) -> None:
    disk = Disk(tmp_path, Layout(65536), 4 << 20)
    before = Path(disk.path).stat().st_size
    disk.zero(100, 1000)
    disk.zero(65536 + 5, 65536, unmap=True)
    disk.image.flush()
    assert disk.image.extents().bytes_of(DATA) == 0
    assert Path(disk.path).stat().st_size - before <= 2 * 65536
    disk.image.close()


def test_quick_zeroing_or_none(tmp_path: Path) -> None:
    disk = Disk(tmp_path, Layout(compat="0.10"), 1 << 20)
    disk.write(0, 8192)
    with pytest.raises(NotSupported):
        disk.image.write_zeroes(0, 8192, fallback=False)
    disk.verify()
    disk.image.close()


def test_version_2_forgets_clusters_instead_of_zeroing_them(tmp_path: Path) -> None:
    disk = Disk(tmp_path, Layout(compat="0.10", fragmented=False), 1 << 20)
    disk.zero(0, 1 << 20)
    disk.zero(0, 1 << 20, unmap=True)
    assert disk.image.extents().bytes_of(UNALLOCATED) == 1 << 20
    disk.write(0, 16384)
    disk.zero(4096, 8192, unmap=True)
    assert disk.image.extents(0, 16384).bytes_of(DATA) == 8192
    disk.image.flush()
    disk.verify()
    disk.image.close()


def test_version_2_keeps_a_backing_file_from_showing_through(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * (1 << 20))
    path = str(tmp_path / "overlay")
    options = {"compat": "0.10", "backing_file": "base", "backing_fmt": "raw"}
    create(path, "qcow2", 1 << 20, options=options)
    with byre.open(path, read_only=False, backing=False) as image:
        image.write_zeroes(0, 1 << 20, unmap=True)
    with byre.open(path) as image:
        assert image.read(0, 1 << 20) == bytes(1 << 20)


def test_a_disk_beyond_64_tib(tmp_path: Path) -> None:
    path = str(tmp_path / "huge")
    create(path, "qcow2", 100 << 40, options={"cluster_size": 2 << 20})
    places = [0, (64 << 40) - 3, (100 << 40) - 4096]
    with byre.open(path, read_only=False) as image:
        for at in places:
            image.write(at, b"here")
        image.write_zeroes(places[1], 2)
        image.discard(1 << 40, 98 << 40)
    with byre.open(path) as image:
        assert image.read(0, 4) == b"here"
        assert image.read(places[2], 4) == b"here"
        assert image.read(places[1] - 2, 8) in (bytes(4) + b"re" + bytes(2), bytes(8))
        table = image.extents(99 << 40, 1 << 40)
        assert table.end == 100 << 40
    assert Path(path).stat().st_blocks * 512 < 64 << 20


def patched(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def l2_offset(path: str) -> int:
    with byre.open(path) as image:
        assert isinstance(image.node, Qcow2Node)
        return image.node.mapping.l1[0] & 0x00FFFFFFFFFFFE00


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Callable[[int, int], str]]:
    """Makes an image in which one L1 or L2 entry is replaced."""
    disk = Disk(tmp_path, Layout(), 1 << 20)
    disk.write(0, 1 << 20)
    disk.image.close()
    table = l2_offset(disk.path)

    def damage(level: int, entry: int) -> str:
        with byre.open(disk.path) as image:
            assert isinstance(image.node, Qcow2Node)
            at = image.node.mapping.l1_offset if level == 1 else table + 3 * 8
        patched(disk.path, at, entry.to_bytes(8, "big"))
        return disk.path

    return damage  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("level", "entry"),
    [
        (1, 1 << 63 | 0x10200),
        (2, 1 << 63 | 0x10200),
        (2, 1 << 63 | 0xFFFFFFFFFFFE00),
        (2, 1 << 62),
        (2, 1 << 62 | (1 << 62) - 1),
    ],
)
def test_a_broken_entry_is_said_and_nothing_else_is_lost(
    damaged: Callable[[int, int], str], level: int, entry: int
) -> None:
    path = damaged(level, entry)
    with byre.open(path) as image:
        where = 3 * 4096
        if entry & 1 << 62 or entry == 1 << 63 | 0xFFFFFFFFFFFE00 & ~0xFFF:
            with pytest.raises(ByreError):
                image.read(where, 4096)
        else:
            with pytest.raises(Corrupt, match='run "byre check"'):
                image.read(where, 4096)
            with pytest.raises(Corrupt):
                image.extents()
        if level == 2:
            assert len(image.read(0, where)) == where
            assert len(image.read(where + 4096, 4096)) == 4096


@pytest.mark.parametrize("request_name", ["write", "write around", "zero", "discard", "compress"])
def test_a_broken_entry_is_not_written_through(damaged: Callable[[int, int], str], request_name: str) -> None:
    """The first write that meets it takes the image out of service and marks it; what is there stays."""
    path = damaged(2, 1 << 63 | 0x10200)
    with byre.open(path) as image:
        before = image.read(0, 3 * 4096)
    image = byre.open(path, read_only=False)
    requests: dict[str, Callable[[], None]] = {
        "write": lambda: image.write(3 * 4096, b"x"),
        "write around": lambda: image.write(2 * 4096, bytes(3 * 4096)),
        "zero": lambda: image.write_zeroes(3 * 4096, 4096, unmap=True),
        "discard": lambda: image.discard(2 * 4096, 3 * 4096),
        "compress": lambda: image.write_compressed(3 * 4096, bytes(4096)),
    }
    with pytest.raises(ByreError):
        requests[request_name]()
        image.flush()
    with pytest.raises(ByreError):
        image.close()
    with byre.open(path) as image:
        assert image.read(0, 2 * 4096) == before[: 2 * 4096]
    with pytest.raises(Corrupt, match="marked corrupt"):
        byre.open(path, read_only=False)


@pytest.mark.parametrize("bulk", [False, True])
def test_a_broken_entry_that_a_read_meets_ends_writing(damaged: Callable[[int, int], str], bulk: bool) -> None:
    path = damaged(2, 1 << 63 | 0x10200)
    image = byre.open(path, read_only=False)
    with pytest.raises(Corrupt, match="not aligned to a cluster"):
        if bulk:
            image.extents()
        else:
            image.read(3 * 4096, 1)
    with pytest.raises(ByreError, match="out of service"):
        image.write(0, b"x")
    with pytest.raises(ByreError):
        image.close()
    with byre.open(path) as image:
        assert len(image.read(0, 3 * 4096)) == 3 * 4096
    with pytest.raises(Corrupt, match="marked corrupt"):
        byre.open(path, read_only=False)


SNAPSHOT_OPTIONS: list[dict[str, object]] = [
    {"cluster_size": 512},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 4096, "compat": "0.10"},
]


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(SNAPSHOT_OPTIONS)))
def test_snapshots_of_the_peer_between_writes(tmp_path: Path, qemu_img: Run, number: int) -> None:
    """Created, applied and deleted by the peer at random: each keeps its content, and nothing leaks."""
    chance = random.Random(number)
    options = SNAPSHOT_OPTIONS[number]
    cluster = int(str(options["cluster_size"]))
    size = 300 * 512 if number == 0 else 1 << 20
    path = str(tmp_path / "disk")
    create(path, "qcow2", size, options=options)
    model = bytearray(size)
    kept: dict[str, bytes] = {}
    for turn in range(7):
        with byre.open(path, read_only=False) as image:
            for _ in range(40):
                at = chance.randrange(size)
                length = min(chance.choice([1, 600, 5000, 40000]), size - at)
                kind = chance.randrange(6)
                if kind == 3:
                    image.write_zeroes(at, length, unmap=chance.random() < 0.5)
                    model[at : at + length] = bytes(length)
                elif kind == 4:
                    image.discard(at, length)
                    model[at : at + length] = image.read(at, length)
                elif kind == 5:
                    at -= at % cluster
                    data = (chance.randbytes(8) * (cluster // 8))[: size - at]
                    image.write_compressed(at, data)
                    model[at : at + len(data)] = data
                else:
                    data = (chance.randbytes(8) * (length // 8 + 1))[:length]
                    image.write(at, data)
                    model[at : at + length] = data
            assert image.read(0, size) == model
        choice = chance.random()
        if choice < 0.6 or not kept:
            qemu_img("snapshot", "-c", f"s{turn}", path)
            kept[f"s{turn}"] = bytes(model)
        elif choice < 0.8:
            name = chance.choice(list(kept))
            qemu_img("snapshot", "-d", name, path)
            del kept[name]
        else:
            name = chance.choice(list(kept))
            qemu_img("snapshot", "-a", name, path)
            model = bytearray(kept[name])
        qemu_img("check", path)
    for name, content in kept.items():
        qemu_img("convert", "-l", name, "-O", "raw", path, tmp_path / "old")
        assert (tmp_path / "old").read_bytes() == content
