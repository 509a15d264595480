"""Creating qcow2 images: what the peer finds in them, and what is refused before a file is touched."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from byre.errors import AccessDenied, ByreError, InvalidArgument, NoSpace
from byre.formats import qcow2
from byre.formats.qcow2 import creation, layout
from byre.graph.creating import create
from byre.options import OptionValues

Run = Callable[..., subprocess.CompletedProcess[str]]


def values(size: int = 64 << 20, **options: object) -> OptionValues:
    return qcow2.CREATE_OPTIONS.parse({"size": size, **options}, what="qcow2")


def header_of(path: Path) -> tuple[layout.Header, tuple[layout.Extension, ...]]:
    with path.open("rb") as file:
        data = file.read(2 << 20)
    header = layout.decode_header(data)
    return header, layout.decode_extensions(data, header)


class Recorder:
    """A new file, and the order in which it was written."""

    has_zero_init = True

    def __init__(self, size: int = 0, *, zero_init: bool = True) -> None:
        self.size = size
        self.has_zero_init = zero_init
        self.log: list[tuple[str, int, int]] = []
        self.largest = 0

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.log.append(("write", offset, len(buffer)))
        self.size = max(self.size, offset + len(buffer))
        self.largest = max(self.largest, len(buffer))

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.log.append(("zero", offset, length))
        self.size = max(self.size, offset + length)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        self.log.append((preallocation, 0, size))
        self.size = max(size, self.size)

    def flush(self) -> None:
        self.log.append(("flush", 0, 0))


class Request:
    def __init__(self, options: OptionValues, file: Recorder) -> None:
        self.options = options
        self.file = file


# -- without a peer -------------------------------------------------------------------------------


def test_a_plain_image_lies_where_the_peer_puts_it(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), "qcow2", 1 << 30)
    header, extensions = header_of(path)
    assert header.version == 3
    assert (header.refcount_table_offset, header.refcount_table_clusters) == (65536, 1)
    assert (header.l1_table_offset, header.l1_size) == (3 * 65536, 2)
    assert (header.size, header.cluster_bits, header.refcount_order, header.header_length) == (1 << 30, 16, 4, 112)
    assert layout.find_extension(extensions, layout.EXTENSION_FEATURE_NAMES) == layout.encode_feature_names()
    assert path.stat().st_size == 3 * 65536 + 16


@pytest.mark.parametrize("cluster_size", [4096, 65536])
@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_a_file_whose_space_is_reserved_has_no_hole(tmp_path: Path, preallocation: str, cluster_size: int) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), "qcow2", 1 << 20, options={"preallocation": preallocation, "cluster_size": cluster_size})
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        assert status.st_blocks * 512 >= status.st_size
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) >= status.st_size - (1 << 20)


@pytest.mark.parametrize("zero_init", [True, False])
def test_the_header_is_written_last_and_between_flushes(zero_init: bool) -> None:
    file = Recorder(0 if zero_init else 1 << 40, zero_init=zero_init)
    qcow2.create(Request(values(preallocation="metadata"), file))  # type: ignore[arg-type]
    assert file.log[-3:] == [("flush", 0, 0), ("write", 0, 65536), ("flush", 0, 0)]
    if zero_init:
        assert not any(entry[:2] == ("write", 0) for entry in file.log[:-2])
    else:
        assert file.log[:2] == [("write", 0, 65536), ("flush", 0, 0)]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64 << 40, {}),
        (1 << 61, {"cluster_size": 2 << 20}),
        (64 << 40, {"cluster_size": 65536, "refcount_bits": 64}),
        (1 << 40, {"preallocation": "metadata", "cluster_size": 2 << 20, "extended_l2": True}),
        (256 << 30, {"preallocation": "metadata", "refcount_bits": 1}),
    ],
)
def test_huge_images_need_little_memory(size: int, options: dict[str, object]) -> None:
    file = Recorder()
    qcow2.create(Request(values(size, **options), file))  # type: ignore[arg-type]
    assert file.largest <= 2 << 20
    assert len(file.log) < 10000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster_size": 1000}, "cluster_size"),
        ({"cluster_size": 256}, "cluster_size"),
        ({"cluster_size": 4 << 20}, "cluster_size"),
        ({"cluster_size": 0}, "cluster_size"),
        ({"refcount_bits": 3}, "refcount_bits"),
        ({"refcount_bits": 0}, "refcount_bits"),
        ({"refcount_bits": 128}, "refcount_bits"),
        ({"refcount_bits": 8, "compat": "0.10"}, "compat"),
        ({"compat": "0.9"}, "compat"),
        ({"compat": "v2", "lazy_refcounts": "on"}, "lazy_refcounts needs version 3"),
        ({"compat": "0.10", "extended_l2": "on"}, "extended_l2 needs version 3"),
        ({"compat": "0.10", "compression_type": "zstd"}, "compression_type needs version 3"),
        ({"compat": "0.10", "data_file": "d"}, "data_file needs version 3"),
        ({"compression_type": "lzma"}, "zlib, zstd"),
        ({"extended_l2": "on", "cluster_size": "8k"}, "16384"),
        ({"data_file_raw": "on"}, "data_file_raw needs data_file"),
        ({"data_file_raw": "on", "data_file": "d", "backing_file": "b"}, "data_file_raw exclude"),
        ({"backing_file": "b", "preallocation": "metadata"}, "extended_l2"),
        ({"backing_fmt": "raw"}, "without backing_file"),
        ({"backing_file": "x" * 1024}, "1023"),
        ({"preallocation": "some"}, "preallocation"),
        ({"size": 129 << 30, "cluster_size": 512}, "too large for cluster_size=512"),
        ({"size": (1 << 63) - 512, "cluster_size": 2 << 20}, "too large"),
        ({"size": 64 << 30, "cluster_size": 512, "preallocation": "metadata", "refcount_bits": 64}, "refcount table"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, object], words: str) -> None:
    path = tmp_path / "a.qcow2"
    with pytest.raises(InvalidArgument, match=words):
        qcow2.check_create(values(**options))
    with pytest.raises(ByreError):
        create(str(path), "qcow2", options={"size": 1 << 20, **options}, check_backing=False)
    assert not path.exists()


def test_encryption_needs_a_secret() -> None:
    for options in ({"encryption": "on"}, {"encrypt.format": "luks"}):
        with pytest.raises(AccessDenied, match="key-secret"):
            qcow2.check_create(values(**options))
    qcow2.check_create(values(encryption="off"))


def test_a_long_name_must_fit_in_the_first_cluster() -> None:
    with pytest.raises(NoSpace, match="do not fit"):
        qcow2.check_create(values(cluster_size=512, backing_file="x" * 400))
    qcow2.check_create(values(cluster_size=512, backing_file="x" * 300))


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1000])
def test_refcounts_of_one(order: int, count: int) -> None:
    from byre.formats.qcow2.entries_bulk import unpack_refcounts

    found = unpack_refcounts(creation._ones(count, order), order).tolist()
    assert found[:count] == [1] * count
    assert not any(found[count:])
    assert len(creation._ones(count, order)) == -(-(count << order) // 8)


@pytest.mark.parametrize("clusters", [1, 100, 32766, 32767, 10**6, 10**9])
@pytest.mark.parametrize(("bits", "order"), [(9, 0), (9, 6), (16, 4), (21, 6)])
def test_refcount_tables_describe_themselves_and_no_more(clusters: int, bits: int, order: int) -> None:
    table, blocks = creation.table_clusters(clusters, bits, order)
    per_block = 1 << (bits + 3 - order)
    assert blocks * per_block >= clusters + table + blocks
    assert table << bits >= blocks * 8
    assert (blocks - 1) * per_block < clusters + table + blocks


# -- the peer's view ------------------------------------------------------------------------------


def peer_check(qemu_img: Run, path: Path) -> dict[str, object]:
    done = qemu_img("check", "-f", "qcow2", "--output=json", path)
    found: dict[str, object] = json.loads(done.stdout)
    assert not found.get("leaks")
    assert not found.get("corruptions")
    assert not found["check-errors"]
    return found


def peer_info(qemu_img: Run, path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", path).stdout)
    for key in ("actual-size", "filename", "dirty-flag", "children"):
        found.pop(key, None)
    return found


def spans(qemu_img: Run, path: Path) -> list[tuple[bool, int]]:
    """(data, length) of what the peer's map shows, joined; whether data reads as zeroes is up to the file system."""
    found: list[tuple[bool, int]] = []
    for row in json.loads(qemu_img("map", "--output=json", "-f", "qcow2", path).stdout):
        length = row["length"]
        if found and found[-1][0] == row["data"]:
            length += found.pop()[1]
        found.append((row["data"], length))
    return found


GRID = [
    {"cluster_size": cluster, "refcount_bits": bits, "preallocation": preallocation}
    for cluster, bits, preallocation in itertools.product(
        (512, 4096, 65536, 2 << 20), (1, 4, 16, 64), ("off", "metadata")
    )
] + [
    {"compat": "0.10"},
    {"compat": "0.10", "preallocation": "metadata"},
    {"compat": "v3", "lazy_refcounts": "on"},
    {"compression_type": "zstd"},
    {"extended_l2": "on"},
    {"extended_l2": "on", "preallocation": "metadata", "cluster_size": 16384},
    {"extended_l2": "on", "preallocation": "falloc"},
    {"preallocation": "falloc"},
    {"preallocation": "full"},
    {"cluster_size": 1024, "refcount_bits": 2, "preallocation": "full"},
]


@pytest.mark.oracle
@pytest.mark.parametrize("options", GRID, ids=lambda options: ",".join(map(str, options.values())))
def test_the_peer_sees_the_same_image(tmp_path: Path, qemu_img: Run, options: dict[str, object]) -> None:
    mine, theirs = tmp_path / "mine.qcow2", tmp_path / "theirs.qcow2"
    size = 5 << 20 | 512
    create(str(mine), "qcow2", size, options=options)
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(f"{k}={v}" for k, v in options.items()), theirs, size)
    assert peer_info(qemu_img, mine) == peer_info(qemu_img, theirs)
    assert peer_check(qemu_img, mine).get("allocated-clusters") == peer_check(qemu_img, theirs).get(
        "allocated-clusters"
    )
    if options.get("cluster_size", 65536) not in (512, 1024, 4096):  # there the peer grew tables in between
        assert spans(qemu_img, mine) == spans(qemu_img, theirs)
    assert qemu_img("compare", "-f", "qcow2", "-F", "qcow2", mine, theirs).returncode == 0
    if options.get("preallocation", "off") != "off" or options.get("cluster_size", 65536) == 65536:
        assert mine.stat().st_size <= theirs.stat().st_size


@pytest.mark.oracle
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("raw", ["on", "off"])
@pytest.mark.parametrize("extended", ["on", "off"])
def test_data_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qemu_img: Run,
    qemu_io: Run,
    preallocation: str,
    raw: str,
    extended: str,
) -> None:
    # The peer looks for a relative name in the current folder, byre next to the image.
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.qcow2"
    options = {"data_file": "d", "data_file_raw": raw, "preallocation": preallocation, "extended_l2": extended}
    create(str(mine), "qcow2", 3 << 20, options=options)
    assert (tmp_path / "d").stat().st_size == 3 << 20
    peer_check(qemu_img, mine)
    data = peer_info(qemu_img, mine)["format-specific"]["data"]  # type: ignore[index]
    assert (data["data-file"], data["data-file-raw"], data["extended-l2"]) == ("d", raw == "on", extended == "on")
    qemu_io("-f", "qcow2", "-c", "write -P 7 1M 100k", mine)
    peer_check(qemu_img, mine)
    assert (tmp_path / "d").read_bytes()[1 << 20 : (1 << 20) + 100 * 1024] == b"\7" * 100 * 1024


@pytest.mark.oracle
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("extended", [False, True])
def test_backing_files(tmp_path: Path, qemu_img: Run, qemu_io: Run, cluster_size: int, extended: bool) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(b"\5" * (2 << 20))
    options: dict[str, object] = {"backing_file": "base.raw", "backing_fmt": "raw", "cluster_size": cluster_size}
    if extended:
        options |= {"extended_l2": "on", "preallocation": "metadata", "cluster_size": max(cluster_size, 16384)}
    create(str(top), "qcow2", options=options)
    peer_check(qemu_img, top)
    info = peer_info(qemu_img, top)
    assert (info["virtual-size"], info["backing-filename"], info["backing-filename-format"]) == (
        2 << 20,
        "base.raw",
        "raw",
    )
    assert "ERROR" not in qemu_io("-f", "qcow2", "-c", "read -P 5 0 2M", top).stdout
    assert "verification failed" not in qemu_io("-f", "qcow2", "-c", "read -P 5 0 2M", top).stdout


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64 << 40, {}),
        (1 << 50, {"cluster_size": 2 << 20}),
        (128 << 30, {"cluster_size": 512}),
        (0, {}),
        (0, {"preallocation": "metadata"}),
        (512, {"preallocation": "full"}),
        (1 << 28, {"preallocation": "metadata", "cluster_size": 1024, "refcount_bits": 64}),
    ],
)
def test_sizes_at_the_ends(tmp_path: Path, qemu_img: Run, qemu_io: Run, size: int, options: dict[str, object]) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), "qcow2", size, options=options)
    peer_check(qemu_img, path)
    if size:
        qemu_io("-f", "qcow2", "-c", f"write -P 9 {size - 512} 512", "-c", f"read -P 9 {size - 512} 512", path)
        peer_check(qemu_img, path)
