"""The first cluster changes in steps: whatever reaches the disk, a reader finds the old content or the new one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byre.errors import InvalidArgument, NoSpace, ReadOnly
from byre.formats.qcow2 import header_update, layout
from byre.formats.qcow2.layout import Extension, Header
from conftest import Run
from support.images import detached, new_image, open_image

SECTOR = 512

Content = tuple[Header, tuple[Extension, ...], str]


def content(data: bytes) -> Content:
    header = layout.decode_header(data, repair=True)
    extensions = tuple(row for row in layout.decode_extensions(data, header) if row.type != header_update.FILLER)
    name = layout.decode_backing_name(data, header)
    return header._replace(backing_file_offset=0), extensions, name


def after(data: bytes, writes: list[tuple[int, bytes]], sectors: list[tuple[int, bytes]] | None = None) -> bytes:
    result = bytearray(data)
    for offset, part in writes if sectors is None else sectors:
        result[offset : offset + len(part)] = part
    return bytes(result)


def torn(writes: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return [(offset + at, part[at : at + SECTOR]) for offset, part in writes for at in range(0, len(part), SECTOR)]


def check_steps(data: bytes, wanted: Content) -> bytes:
    """Every subset of the sectors of each step is the old content or the new one; the last is the new one."""
    header, extensions, name = wanted
    old = content(data)
    steps, final = header_update.plan_update(data, header, extensions, name.encode("utf-8", "surrogateescape"))
    found = content(final)
    new = header._replace(backing_file_offset=0, backing_file_size=len(name.encode())), tuple(extensions), name
    assert found == new
    for step in steps:
        pieces = torn(step)
        few = pieces if len(pieces) <= 6 else pieces[:3] + pieces[-3:]
        for count in range(len(few) + 1):
            for chosen in itertools.combinations(few, count):
                rest = [piece for piece in pieces if piece not in few]
                for lost in (list(chosen), list(chosen) + rest):
                    assert content(after(data, [], lost)) in (old, new)
        data = after(data, step)
    assert data == final
    return data


def first_cluster(size: int, extensions: tuple[Extension, ...] = (), name: str = "", version: int = 3) -> bytes:
    header = Header(
        version=version, cluster_bits=size.bit_length() - 1, size=1 << 20, l1_size=1 << 20 >> 18 if size == 512 else 64,
        l1_table_offset=size, refcount_table_offset=2 * size, refcount_table_clusters=1,
        header_length=112 if version == 3 else 72, extra=bytes(7) if version == 3 else b"",
    )  # fmt: skip
    header = header._replace(l1_size=max(64, layout.l1_entries_needed(1 << 20, header.cluster_bits)))
    return layout.header_bytes(header, extensions, name)


names = st.text("abcdefghij/.", max_size=60) | st.integers(100, 900).map(lambda n: "n" * n)
extensions = st.lists(
    st.tuples(st.integers(0x100, 0x10000), st.binary(max_size=40) | st.binary(min_size=300, max_size=600)),
    max_size=4, unique_by=lambda row: row[0],
).map(lambda rows: tuple(Extension(*row) for row in rows))  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_crash_leaves_the_old_or_the_new(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from((16384, 65536)))
    cluster = first_cluster(size, data.draw(extensions), data.draw(names), data.draw(st.sampled_from((2, 3))))
    for _ in range(data.draw(st.integers(1, 3))):
        header = content(cluster)[0]
        if data.draw(st.booleans()):
            up = header.version == 2
            header = header._replace(version=3 if up else 2, header_length=112 if up else 72,
                                     extra=bytes(7) if up else b"", backing_file_size=0)  # fmt: skip
        cluster = check_steps(cluster, (header, data.draw(extensions), data.draw(names)))


@pytest.mark.parametrize("size", [512, 1024, 4096])
def test_small_clusters_hold_what_fits(size: int) -> None:
    cluster = first_cluster(size, (), "base")
    header, extensions, _ = content(cluster)
    longest = min(size - 112 - 8, layout.MAX_BACKING_NAME)
    _, final = header_update.plan_update(cluster, header, extensions, b"x" * longest)
    assert content(final)[2] == "x" * longest
    with pytest.raises(NoSpace):
        header_update.plan_update(cluster, header, extensions, b"x" * (longest + 1))


def test_feature_names_give_way_to_a_backing_name() -> None:
    names = Extension(layout.EXTENSION_FEATURE_NAMES, layout.encode_feature_names())
    cluster = first_cluster(1024, (names,))
    header, extensions, _ = content(cluster)
    _, final = header_update.plan_update(cluster, header, extensions, b"x" * 700)
    assert content(final)[1:] == ((), "x" * 700)


def test_nothing_to_do_is_nothing_done() -> None:
    cluster = first_cluster(65536, (Extension(0x1234, b"kept"),), "base")
    header, extensions, name = content(cluster)
    assert header_update.plan_update(cluster, header, extensions, name.encode()) == ([], cluster)


# -- the backing file -----------------------------------------------------------------------------


def node_of(image: Any) -> Any:
    return image.node


def test_the_backing_file_is_recorded_and_forgotten() -> None:
    memory = new_image("qcow2", 1 << 20, cluster_size=4096)
    with open_image(memory) as image:
        node_of(image).change_backing("base.img", "raw")
        assert (node_of(image).backing_name, node_of(image).backing_format) == ("base.img", "raw")
    with open_image(detached(memory), backing=None, options={"backing": None}) as image:
        assert node_of(image).backing_name == "base.img"
        node_of(image).change_backing("", "")
    with open_image(detached(memory)) as image:
        assert (node_of(image).backing_name, node_of(image).backing_format) == ("", "")
        assert layout.find_extension(node_of(image).extensions, layout.EXTENSION_BACKING_FORMAT) is None


def test_what_no_backing_file_can_be() -> None:
    memory = new_image("qcow2", 1 << 20)
    with open_image(memory) as image:
        before = memory.to_bytes()
        with pytest.raises(NoSpace):
            node_of(image).change_backing("x" * 1024, "raw")
        with pytest.raises(InvalidArgument, match="without a backing file"):
            node_of(image).change_backing("", "raw")
        assert memory.to_bytes() == before
        image.write(0, b"still in service")
    with open_image(detached(memory), read_only=True) as image, pytest.raises(ReadOnly):
        node_of(image).change_backing("x", "raw")


def test_unknown_extensions_and_header_fields_stay() -> None:
    memory = new_image("qcow2", 1 << 20)
    data = memory.to_bytes()[:65536]
    header, known, _ = content(data)
    header = header._replace(header_length=128, extra=b"\0" * 7 + b"from the future!"[:16])
    strange = (Extension(0xCAFE, b"to the byte\1"), *known)
    memory.write_from(0, memoryview(layout.header_bytes(header, strange)))
    with open_image(detached(memory)) as image:
        node_of(image).change_backing("base", "qcow2")
    found, rows, name = content(memory.to_bytes()[:65536])
    assert (found.extra, name) == (header.extra, "base")
    assert [row for row in rows if row.type != layout.EXTENSION_BACKING_FORMAT] == list(strange)


@pytest.mark.oracle
@pytest.mark.parametrize("cluster", [512, 4096, 65536])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_the_peer_reads_the_name(tmp_path: Any, qemu_img: Run, cluster: int, compat: str) -> None:
    import json

    import byre

    path = tmp_path / "a.qcow2"
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(1 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},compat={compat}", path, "1M")
    for name in ("base.raw", "./././base.raw", str(base)):
        with byre.open(str(path), read_only=False, backing=False) as image:
            node_of(image).change_backing(name, "raw")
        info = json.loads(qemu_img("info", "--output=json", path).stdout)
        assert (info["backing-filename"], info["backing-filename-format"]) == (name, "raw")
        qemu_img("check", "-q", path)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", path)
    with byre.open(str(path)) as image:
        assert node_of(image).backing_name == ""
