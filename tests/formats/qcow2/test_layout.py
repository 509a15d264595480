"""Header, extensions and directories: round trips, limits that name the field, and the peer's own bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byre.errors import ImageError, NoSpace, NotSupported
from byre.formats.qcow2 import layout
from byre.formats.qcow2.layout import Extension, Header, Snapshot, Truncated

Run = Callable[..., subprocess.CompletedProcess[str]]

V2 = Header(version=2, size=1 << 30, l1_size=2, l1_table_offset=3 << 16, refcount_table_offset=1 << 16,
            refcount_table_clusters=1)  # fmt: skip
V3 = V2._replace(version=3, header_length=112, extra=bytes(7))


def first_cluster(header: Header, extensions: tuple[Extension, ...] = (), name: str = "") -> bytes:
    return layout.header_bytes(header, extensions, name)


# -- header ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        V2,
        V3,
        V3._replace(header_length=104, extra=b""),
        V3._replace(header_length=144, extra=bytes(range(39))),
        V3._replace(
            incompatible_features=0x1F, autoclear_features=3, compatible_features=1, compression_type=1, l1_size=4
        ),
        V3._replace(incompatible_features=1 << 60, compatible_features=1 << 61, autoclear_features=1 << 62),
    ],
)
def test_header_round_trip(header: Header) -> None:
    assert layout.decode_header(layout.encode_header(header)) == header
    assert len(layout.encode_header(header)) == header.header_length


def test_header_geometry() -> None:
    assert (V3.cluster_size, V3.l2_bits, V3.refcount_block_bits, V3.subcluster_bits) == (65536, 13, 15, 16)
    extended = V3._replace(incompatible_features=layout.INCOMPATIBLE_EXTENDED_L2)
    assert (extended.l2_bits, extended.subcluster_bits) == (12, 11)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 1}, "version is 1, allowed is 2 or 3"),
        ({"version": 4}, "version is 4"),
        ({"cluster_bits": 8}, "cluster_bits is 8, allowed is 9 to 21"),
        ({"cluster_bits": 22}, "cluster_bits is 22"),
        ({"cluster_bits": 0xFFFFFFFF}, "cluster_bits"),
        ({"size": 1 << 63}, "size is 9223372036854775808, allowed is at most 9223372036854775296"),
        ({"crypt_method": 3}, "crypt_method is 3"),
        ({"l1_size": (32 << 20) // 8 + 1}, "l1_size is 4194305, allowed is at most 4194304"),
        ({"l1_size": 1}, "l1_size is 1, allowed is at least 2"),
        ({"l1_table_offset": 0x30200}, "l1_table_offset is 0x30200"),
        ({"l1_table_offset": 0}, "l1_table_offset is 0"),
        ({"l1_table_offset": 0xFFFFFFFFFFFF0000}, "l1_table_offset"),
        ({"refcount_table_offset": 0x10001}, "refcount_table_offset"),
        ({"refcount_table_offset": 0}, "refcount_table_offset"),
        ({"refcount_table_clusters": 129}, "refcount_table_clusters is 129, allowed is at most 128"),
        ({"refcount_table_clusters": 0}, "refcount_table_clusters is 0, allowed is at least 1"),
        ({"nb_snapshots": 65537}, "nb_snapshots is 65537, allowed is at most 65536"),
        ({"snapshots_offset": 7}, "snapshots_offset"),
        ({"refcount_order": 7}, "refcount_order is 7"),
        ({"compression_type": 2}, "compression_type is 2"),
        ({"compression_type": 1}, "bit 3"),
        ({"incompatible_features": 8}, "bit 3"),
        ({"incompatible_features": 16, "cluster_bits": 13, "l1_table_offset": 1 << 16, "l1_size": 999}, "14 to 21"),
        ({"autoclear_features": 2}, "bit 1"),
        ({"backing_file_offset": 70000, "backing_file_size": 3}, "backing_file_offset is 70000"),
        ({"backing_file_offset": 100, "backing_file_size": 3}, "backing_file_offset is 100"),
        ({"backing_file_offset": 200, "backing_file_size": 1024}, "backing_file_size is 1024, allowed is at most 1023"),
        ({"backing_file_offset": 65530, "backing_file_size": 7}, "backing_file_size is 7, allowed is at most 6"),
    ],
)
def test_limits_name_the_field(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        layout.decode_header(layout.encode_header(V3._replace(**change)))


@pytest.mark.parametrize("length", [0, 72, 103, 105, 111, 65544, 0xFFFFFFF8])
def test_header_length_is_checked(length: int) -> None:
    data = bytearray(first_cluster(V3))
    data[100:104] = length.to_bytes(4, "big")
    with pytest.raises(ImageError, match="header_length"):
        layout.decode_header(data)


def test_another_magic_and_short_data() -> None:
    with pytest.raises(ImageError, match="no qcow2 image"):
        layout.decode_header(bytes(200))
    for length, needed in ((0, 72), (71, 72), (80, 104), (104, 112)):
        with pytest.raises(Truncated) as caught:
            layout.decode_header(layout.encode_header(V3)[:length])
        assert caught.value.needed == needed


def test_repair_takes_what_it_can_mend() -> None:
    for change in ({"refcount_table_clusters": 0}, {"nb_snapshots": 70000}, {"snapshots_offset": 7}):
        data = layout.encode_header(V3._replace(**change))
        with pytest.raises(ImageError):
            layout.decode_header(data)
        layout.decode_header(data, repair=True)


def test_a_size_without_a_backing_file_means_nothing() -> None:
    data = layout.encode_header(V3._replace(backing_file_size=0xFFFFFFFF))
    assert layout.decode_header(data).backing_file_size == 0


# -- extensions -----------------------------------------------------------------------------------

EXTENSIONS = (
    Extension(layout.EXTENSION_BACKING_FORMAT, b"qcow2"),
    Extension(0x12345678, b"unknown, kept"),
    Extension(layout.EXTENSION_FEATURE_NAMES, layout.encode_feature_names()),
    Extension(0x12345678, b""),
)


@pytest.mark.parametrize("header", [V2, V3])
@pytest.mark.parametrize("name", ["", "base.qcow2", "n\u00e4me", "bad\udcff"])
def test_first_cluster_round_trip(header: Header, name: str) -> None:
    data = first_cluster(header, EXTENSIONS, name)
    assert len(data) == 65536
    decoded = layout.decode_header(data)
    assert layout.decode_extensions(data, decoded) == EXTENSIONS
    assert layout.decode_backing_name(data, decoded) == name
    assert first_cluster(decoded, EXTENSIONS, name) == data


def test_what_does_not_fit_is_no_space() -> None:
    small = V3._replace(cluster_bits=9, size=0, l1_size=0, l1_table_offset=0)
    with pytest.raises(NoSpace, match="do not fit"):
        first_cluster(small, EXTENSIONS[2:3], "x")
    with pytest.raises(NoSpace, match="1023"):
        first_cluster(V3, (), "x" * 1024)
    first_cluster(V3, (), "x" * 1023)


def test_extensions_must_end_before_the_name() -> None:
    data = bytearray(first_cluster(V3, EXTENSIONS, "base"))
    header = layout.decode_header(data)
    data[116:120] = (65536).to_bytes(4, "big")
    with pytest.raises(ImageError, match="65536 bytes long"):
        layout.decode_extensions(data, header)
    with pytest.raises(ImageError, match="does not fit"):
        layout.decode_extensions(data, header._replace(backing_file_offset=116))


def test_of_two_backing_formats_the_last_counts() -> None:
    pair = tuple(layout.Extension(layout.EXTENSION_BACKING_FORMAT, name) for name in (b"raw", b"qcow2"))
    data = first_cluster(V3, pair)
    assert layout.decode_extensions(data, layout.decode_header(data)) == pair[1:]


def test_a_known_extension_appears_once() -> None:
    names = layout.Extension(layout.EXTENSION_FEATURE_NAMES, layout.encode_feature_names())
    data = first_cluster(V3, (names, names))
    with pytest.raises(ImageError, match="twice"):
        layout.decode_extensions(data, layout.decode_header(data))


def test_extensions_say_how_much_they_need() -> None:
    data = first_cluster(V3, EXTENSIONS)
    header = layout.decode_header(data)
    length = header.header_length
    while True:
        try:
            assert layout.decode_extensions(data[:length], header) == EXTENSIONS
            break
        except Truncated as error:
            length, before = error.needed, length
        assert length > before
    assert length < 1000


def test_endless_empty_extensions_are_refused() -> None:
    data = bytearray(
        first_cluster(V3._replace(cluster_bits=21, l1_table_offset=1 << 21, refcount_table_offset=1 << 21))
    )
    data[112:] = (b"\1\2\3\4" + bytes(4)) * ((len(data) - 112) // 8)
    with pytest.raises(ImageError, match="more than 4096"):
        layout.decode_extensions(data, layout.decode_header(data))


def test_unknown_features_are_refused_by_name() -> None:
    names = (
        *layout.DEFAULT_FEATURE_NAMES,
        layout.FeatureName(0, 5, "fancy\x1b[31m"),
        layout.FeatureName(1, 6, "other"),
    )
    header = V3._replace(incompatible_features=0x61)
    with pytest.raises(
        NotSupported, match=r"Unsupported qcow2 feature\(s\): fancy\\x1b\[31m, incompatible feature bit 6$"
    ):
        layout.check_features(header, names)
    layout.check_features(V3._replace(incompatible_features=0x1F, compatible_features=1 << 40))


def test_pointers_round_trip_and_limits() -> None:
    record = layout.BitmapsExtension(2, 80, 5 << 16)
    assert layout.decode_bitmaps_extension(layout.encode_bitmaps_extension(record), 16) == record
    for field, value in (("nb_bitmaps", 0), ("nb_bitmaps", 65536), ("directory_size", 1 << 40),
                         ("directory_offset", 5), ("directory_offset", 0)):  # fmt: skip
        bad = record._replace(**{field: value})
        with pytest.raises(ImageError):
            layout.decode_bitmaps_extension(layout.encode_bitmaps_extension(bad), 16)
    pointer = layout.CryptoPointer(4 << 16, 2068480)
    assert layout.decode_crypto_pointer(layout.encode_crypto_pointer(pointer), 16) == pointer
    with pytest.raises(ImageError):
        layout.decode_crypto_pointer(layout.encode_crypto_pointer(pointer._replace(offset=512)), 16)


# -- snapshots and bitmaps ------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SNAPSHOTS = st.builds(
    Snapshot,
    st.integers(0, 1 << 40).map(lambda n: n << 9),
    st.integers(0, 1 << 22),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
    st.one_of(st.binary(max_size=60), st.builds(layout.snapshot_extra, st.integers(0, 99), st.integers(0, 99))),
    NAMES,
    NAMES,
)


@given(st.lists(SNAPSHOTS, max_size=5))
def test_snapshot_table_round_trip(snapshots: list[Snapshot]) -> None:
    data = layout.encode_snapshot_table(snapshots)
    assert len(data) % 8 == 0
    assert layout.decode_snapshot_table(data, len(snapshots)) == tuple(snapshots)
    # Read in growing pieces, as a reader that does not know the length must.
    length = 0
    while True:
        try:
            assert layout.decode_snapshot_table(data[:length], len(snapshots)) == tuple(snapshots)
            break
        except Truncated as error:
            length, before = error.needed, length
        assert before < length <= len(data)


def test_snapshot_fields() -> None:
    entry = Snapshot(65536, 1, 0, 0, 0, 77, b"", "1", "a")
    assert (entry.vm_state_size, entry.disk_size, entry.icount) == (77, None, None)
    entry = entry._replace(extra=layout.snapshot_extra(1 << 40, 4096))
    assert (entry.vm_state_size, entry.disk_size, entry.icount) == (1 << 40, 4096, None)
    assert entry._replace(extra=layout.snapshot_extra(0, 0, 5)).icount == 5


def test_snapshot_limits() -> None:
    entry = Snapshot(65536, 1, 0, 0, 0, 0, b"", "1", "a")
    for bad, words in (
        (entry._replace(extra=bytes(1025)), "extra_data_size is 1025, allowed is at most 1024"),
        (entry._replace(l1_size=1 << 23), "l1_size"),
        (entry._replace(l1_table_offset=512), "l1_table_offset"),
    ):
        with pytest.raises(ImageError, match=words):
            layout.decode_snapshot_table(layout.encode_snapshot_table([bad]), 1, 16)
    with pytest.raises(ImageError, match="65537 entries"):
        layout.decode_snapshot_table(b"", 65537)


def test_bitmap_directory_round_trip_and_limits() -> None:
    entry = layout.BitmapEntry(1 << 16, 1, layout.BITMAP_AUTO, 1, 16, b"", "b0")
    other = entry._replace(name="b\u00df", extra=b"12345", flags=layout.BITMAP_IN_USE | layout.BITMAP_EXTRA_COMPATIBLE)
    data = layout.encode_bitmap_directory([entry, other])
    assert layout.decode_bitmap_directory(data, 2, 16) == (entry, other)
    assert (entry.auto, entry.in_use, other.auto, other.in_use) == (True, False, False, True)
    for count, words in ((1, "end at"), (3, "ends in entry 2")):
        with pytest.raises(ImageError, match=words):
            layout.decode_bitmap_directory(data, count, 16)
    with pytest.raises(ImageError, match="earlier"):
        layout.decode_bitmap_directory(layout.encode_bitmap_directory([entry, entry]), 2, 16)
    for change in ({"table_offset": 512}, {"table_size": 0}, {"table_size": 1 << 20}, {"flags": 8}, {"type": 0},
                   {"granularity_bits": 8}, {"granularity_bits": 32}, {"name": ""}, {"name": "x" * 1024}):  # fmt: skip
        with pytest.raises(ImageError, match="entry 0: field"):
            layout.decode_bitmap_directory(layout.encode_bitmap_directory([entry._replace(**change)]), 1, 16)


# -- any bytes ------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_header_decodes_to_itself_or_is_refused(data: st.DataObject) -> None:
    damaged = bytearray(first_cluster(V3._replace(cluster_bits=12, size=1 << 20), EXTENSIONS, "base"))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, 600))] = data.draw(st.integers(0, 255))
    try:
        header = layout.decode_header(damaged)
        extensions = layout.decode_extensions(damaged, header)
        layout.decode_backing_name(damaged, header)
    except ImageError:
        return
    if header.backing_file_offset:
        assert layout.encode_header(header) == damaged[: header.header_length]
    again = layout.encode_extensions(extensions)
    area = first_cluster(header, extensions)
    assert layout.decode_extensions(area, layout.decode_header(area)) == extensions
    assert len(again) % 8 == 0


# -- the peer's bytes -----------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize(
    "options", ["compat=1.1", "compat=0.10", "compression_type=zstd", "extended_l2=on", "cluster_size=512"]
)
def test_the_peers_header_is_written_back_to_the_byte(tmp_path: Path, qemu_img: Run, options: str) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "a.qcow2"
    base.write_bytes(bytes(1 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path)
    header = layout.decode_header(path.read_bytes())
    data = path.read_bytes()[: header.cluster_size]
    extensions = layout.decode_extensions(data, header)
    name = layout.decode_backing_name(data, header)
    assert name == str(base)
    assert layout.find_extension(extensions, layout.EXTENSION_BACKING_FORMAT) == b"raw"
    assert layout.header_bytes(header, extensions, name) == data
    names = layout.find_extension(extensions, layout.EXTENSION_FEATURE_NAMES)
    if options not in ("compat=0.10", "cluster_size=512"):
        assert names == layout.encode_feature_names()
        assert layout.decode_feature_names(names) == layout.DEFAULT_FEATURE_NAMES


@pytest.mark.oracle
def test_the_peers_snapshots_and_bitmaps(tmp_path: Path, qemu_img: Run) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    for name in ("one", "zw\u00f6lf"):
        qemu_img("snapshot", "-c", name, path)
        qemu_img("bitmap", "--add", path, name)
    data = path.read_bytes()
    header = layout.decode_header(data)
    snapshots = layout.decode_snapshot_table(data[header.snapshots_offset :], header.nb_snapshots, header.cluster_bits)
    assert [(entry.id, entry.name, entry.disk_size) for entry in snapshots] == [
        ("1", "one", 1 << 20),
        ("2", "zw\u00f6lf", 1 << 20),
    ]
    encoded = layout.encode_snapshot_table(snapshots)
    assert data[header.snapshots_offset :][: len(encoded)] == encoded
    stored = layout.find_extension(layout.decode_extensions(data, header), layout.EXTENSION_BITMAPS)
    assert stored is not None
    where = layout.decode_bitmaps_extension(stored, header.cluster_bits)
    directory = data[where.directory_offset : where.directory_offset + where.directory_size]
    entries = layout.decode_bitmap_directory(directory, where.nb_bitmaps, header.cluster_bits)
    assert sorted(entry.name for entry in entries) == ["one", "zw\u00f6lf"]
    assert layout.encode_bitmap_directory(entries) == directory
