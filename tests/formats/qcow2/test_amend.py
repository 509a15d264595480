"""amend: what changes, what stays, what is refused with nothing changed; the peer agrees."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import byre
from byre.errors import Busy, ByreError, Cancelled, InvalidArgument, NotSupported, ReadOnly
from byre.formats.abilities import Amendable, BackingChangeable, Emptiable
from byre.formats.qcow2 import AMEND_OPTIONS, layout
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from conftest import Run
from support.images import detached, layer, new_image, open_image
from support.walk import walk

CLUSTER = 4096
COUNT = 48
SIZE = CLUSTER * COUNT


def amend(image: Image, control: Control | None = None, **options: object) -> Control:
    node: Any = image.node
    control = control or Control()
    given = {name.replace("__", "."): value for name, value in options.items()}
    node.amend(AMEND_OPTIONS.parse(given, what="qcow2"), control)
    return control


def is_good(memory: MemoryNode) -> bool:
    findings = walk(memory.to_bytes())
    return not (findings.damage or findings.copied or findings.leaks)


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def fill(image: Image, *, snapshots: bool = True, zeroes: bool = True, size: int = CLUSTER) -> None:
    """Data, holes, zero clusters with and without space, compressed clusters, shared by snapshots and not."""
    image.write(0, noise(1, 10 * size))
    image.write_compressed(12 * size, bytes(size - 9) + b"squeezed!")
    if snapshots:
        image.create_snapshot("one")
    if zeroes:
        image.write_zeroes(0, 2 * size)
        image.write_zeroes(5 * size, size, unmap=True)
        image.write_zeroes(20 * size, 2 * size)
    image.write(3 * size, noise(2, size))
    if snapshots:
        image.create_snapshot("two")
        image.create_snapshot("three")
    if zeroes:
        image.write_zeroes(8 * size, size)
        image.write_zeroes(6 * size, 100)


def contents(memory: MemoryNode, base: bytes | None = None) -> dict[str, bytes]:
    """What the guest sees, now and in every snapshot."""
    found: dict[str, bytes] = {}
    names: list[str | None] = [None]
    while names:
        name = names.pop()
        graph_options: dict[str, Any] = {}
        if base is not None:
            from byre.graph.graph import Graph

            graph = Graph()
            graph_options = {"graph": graph, "backing": layer(graph, MemoryNode(base), "raw")}
        with open_image(detached(memory), read_only=True, **graph_options) as image:
            node: Any = image.node
            if name is None:
                names += [shot.id for shot in node.snapshots]
            else:
                node.load_snapshot(name)
            found[name or ""] = image.read(0, image.size)
    detached(memory)
    return found


def make(*, backed: bool = False, content: bool = True, **options: object) -> tuple[MemoryNode, bytes | None]:
    base = noise(99, SIZE) if backed else None
    if backed:
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    memory = new_image("qcow2", SIZE, cluster_size=CLUSTER, **options)
    if content:
        with opened(memory, base) as image:
            fill(image, zeroes=options.get("compat") != "0.10", snapshots=options.get("refcount_bits", 16) != 1)
    return detached(memory), base


def opened(memory: MemoryNode, base: bytes | None = None, **more: Any) -> Image:
    if base is None:
        return open_image(detached(memory), **more)
    from byre.graph.graph import Graph

    graph = Graph()
    return open_image(detached(memory), graph=graph, backing=layer(graph, MemoryNode(base), "raw"), **more)


def test_the_abilities_are_there() -> None:
    memory, _ = make(content=False)
    with opened(memory) as image:
        for ability in (Amendable, BackingChangeable, Emptiable):
            assert isinstance(image.node, ability)


# -- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_down_and_up_again_change_nothing_the_guest_sees(backed: bool, lazy: bool) -> None:
    memory, base = make(backed=backed, lazy_refcounts=lazy)
    before = contents(memory, base)
    with opened(memory, base) as image:
        amend(image, compat="0.10")
        header = image.node.header  # type: ignore[attr-defined]
        assert (header.version, header.header_length) == (2, 72)
    assert contents(memory, base) == before
    assert is_good(memory)
    assert not any(memory.to_bytes()[72 + 40 : 100])
    with opened(memory, base) as image:
        image.write(7 * CLUSTER, b"now in version 2")
        amend(image, compat="v3")
        assert image.node.header.version == 3  # type: ignore[attr-defined]
        image.write_zeroes(30 * CLUSTER, CLUSTER)
    after = contents(memory, base)
    assert {name: data for name, data in after.items() if name} == {n: d for n, d in before.items() if n}
    assert after[""][7 * CLUSTER :][:16] == b"now in version 2"
    assert is_good(memory)


def test_the_cluster_of_a_snapshot_is_not_zeroed_in_place() -> None:
    """A fault that another program has: zeroes written with space kept, over a cluster a snapshot has as well."""
    memory, _ = make(content=False)
    with opened(memory) as image:
        image.write(0, noise(1, CLUSTER))
        image.create_snapshot("s")
        image.write_zeroes(0, CLUSTER)
        # As that program writes it: the cluster keeps its place in the active layer, and its count is 2.
    words_at = walk_entry(memory)
    shot_entry = int.from_bytes(memory.to_bytes()[words_at[1] : words_at[1] + 8], "big")
    memory.write_from(words_at[0], memoryview((shot_entry | 1).to_bytes(8, "big")))
    cluster = (shot_entry & ~1) // CLUSTER
    block = words_at[2] + 2 * cluster
    memory.write_from(block, memoryview((2).to_bytes(2, "big")))
    assert is_good(memory)
    for backed in (False, True):
        copy = MemoryNode(memory.to_bytes())
        if backed:
            with opened(copy) as image:
                image.node.change_backing("base", "raw")  # type: ignore[attr-defined]
        base = noise(3, SIZE) if backed else None
        with opened(copy, base) as image:
            amend(image, compat="0.10")
        assert is_good(copy)
        found = contents(copy, base)
        assert found[""][:CLUSTER] == bytes(CLUSTER)
        assert found["1"][:CLUSTER] == noise(1, CLUSTER)


def walk_entry(memory: MemoryNode) -> tuple[int, int, int]:
    """Where the first L2 entries of the active layer and of the first snapshot lie, and the refcount block."""
    with opened(memory, read_only=True) as image:
        node: Any = image.node
        mask = (1 << 62) - 1
        data = memory.to_bytes()
        active = int(node.mapping.l1[0]) & mask & ~(1 << 63)
        shot = int.from_bytes(data[node.snapshots[0].l1_table_offset :][:8], "big")
        block = int.from_bytes(data[node.header.refcount_table_offset :][:8], "big")
    detached(memory)
    return active & ~(1 << 63), shot, block


def test_unknown_compatible_bits_go_and_what_is_incompatible_forbids() -> None:
    memory, _ = make(content=False)
    for at in (80 + 2, 88 + 2):
        memory.write_from(at, memoryview(b"\4"))
    with opened(memory) as image:
        amend(image, compat="0.10")
    assert is_good(memory)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"refcount_bits": 8}, "refcount_bits=16"),
        ({"extended_l2": True, "cluster_size": 65536}, "extended L2"),
        ({"compression_type": "zstd"}, "zstd"),
    ],
)
def test_what_version_2_cannot_be(options: dict[str, Any], reason: str) -> None:
    memory = new_image("qcow2", 4 << 20, **options)
    with opened(memory) as image:
        image.write_compressed(0, bytes(image.node.cluster_size))  # type: ignore[attr-defined]
    before = memory.to_bytes()  # closed, the file ends with a whole cluster
    with opened(memory) as image:
        with pytest.raises(NotSupported, match=reason):
            amend(image, compat="0.10")
        assert memory.to_bytes() == before


def test_zstd_without_compressed_clusters_becomes_zlib() -> None:
    memory = new_image("qcow2", 4 << 20, compression_type="zstd")
    with opened(memory) as image:
        amend(image, compat="0.10")
        image.write_compressed(0, bytes(65536))
        assert image.read(0, 65536) == bytes(65536)
    with opened(memory) as image:
        assert image.node.compression_name == "zlib"  # type: ignore[attr-defined]
        assert image.read(0, 65536) == bytes(65536)


def test_a_data_file_forbids_version_2() -> None:
    data = MemoryNode()
    memory = new_image("qcow2", 4 << 20, data, data_file="data")
    with (
        open_image(memory, data_file=detached(data)) as image,
        pytest.raises(NotSupported, match="data file"),
    ):
        amend(image, compat="0.10")


@pytest.mark.parametrize("backed", [False, True])
def test_bitmaps_go_with_version_3(backed: bool) -> None:
    """All kinds of them, stored and not, and the space they take."""
    memory, base = make(backed=backed)
    with opened(memory, base) as image:
        node: Any = image.node
        for number in range(3):
            node.bitmap_store().add(f"{number}", enabled=number != 1).set(0, SIZE // 2)
    before = contents(memory, base)
    with opened(memory, base) as image:
        node = image.node
        stored = node.bitmap_store()
        stored.add("new")
        stored.add("in memory", persistent=False)
        stored.find("0")
        amend(image, compat="0.10")
        assert [bitmap.name for bitmap in stored.all()] == ["in memory"]
        with pytest.raises(NotSupported, match="v2"):
            stored.add("another")
    assert layout.EXTENSION_BITMAPS.to_bytes(4, "big") not in memory.to_bytes()[:CLUSTER]
    assert contents(memory, base) == before
    assert is_good(memory)
    with opened(memory, base) as image:
        amend(image, compat="1.1")
        assert not image.node.bitmap_store().all()  # type: ignore[attr-defined]
        image.node.bitmap_store().add("0")  # type: ignore[attr-defined]
    with opened(memory, base, read_only=True) as image:
        result = image.node.check(Control())  # type: ignore[attr-defined]
        assert not result.corruptions + result.leaks


def test_inconsistent_bitmaps_go_with_version_3() -> None:
    memory, _ = make(content=False)
    with opened(memory) as image:
        image.node.bitmap_store().add("b")  # type: ignore[attr-defined]
    with opened(memory) as image:
        image.write(0, b"in use from now on")
        data = memory.to_bytes()
    crashed = MemoryNode(data)
    with opened(crashed) as image:
        assert image.node.bitmap_store().find("b").inconsistent  # type: ignore[attr-defined]
        amend(image, compat="0.10")
    assert not walk(crashed.to_bytes()).damage
    assert layout.EXTENSION_BITMAPS.to_bytes(4, "big") not in crashed.to_bytes()[:CLUSTER]


def test_a_bitmap_a_job_works_with_forbids_version_2() -> None:
    memory, _ = make(content=False)
    with opened(memory) as image:
        bitmap = image.node.bitmap_store().add("b")  # type: ignore[attr-defined]
        bitmap.occupy()
        before = memory.to_bytes()
        with pytest.raises(Busy, match="'b'"):
            amend(image, compat="0.10")
        assert memory.to_bytes() == before
        bitmap.vacate()
        amend(image, compat="0.10")


def test_a_snapshot_of_another_size_forbids_version_2() -> None:
    memory, _ = make()
    with opened(memory) as image:
        image.resize(SIZE * 2)
        image.flush()
        before = memory.to_bytes()
        for more in ({}, {"size": SIZE * 3}, {"refcount_bits": 16}):
            with pytest.raises(NotSupported, match="snapshot"):
                amend(image, compat="0.10", **more)
        assert memory.to_bytes() == before
        amend(image, compat="0.10", size=SIZE)
    assert is_good(memory)


def test_a_snapshot_table_of_version_2_is_completed() -> None:
    memory, _ = make(compat="0.10")
    with opened(memory) as image:
        node: Any = image.node
        bare = [shot._replace(extra=b"") for shot in node.snapshots]
        data, at = layout.encode_snapshot_table(bare), node.header.snapshots_offset
    memory.write_from(at, memoryview(data.ljust(CLUSTER, b"\0")))
    before = contents(memory)
    with opened(memory) as image:
        assert image.node.snapshots[0].disk_size is None  # type: ignore[attr-defined]
        amend(image, compat="1.1")
    with opened(memory) as image:
        assert [shot.disk_size for shot in image.node.snapshots] == [SIZE] * 3  # type: ignore[attr-defined]
    assert contents(memory) == before
    assert is_good(memory)


# -- width of reference counts --------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_every_width_to_every_other(cluster: int) -> None:
    memory = new_image("qcow2", cluster * COUNT, cluster_size=cluster)
    with opened(memory) as image:
        fill(image, snapshots=False, size=cluster)
    before = contents(memory)
    widths = [1, 2, 4, 8, 16, 32, 64]
    order = [width for pair in itertools.pairwise(widths) for width in (*pair, 64, 1)]
    for width in order:
        with opened(memory) as image:
            amend(image, refcount_bits=width)
            header = image.node.header  # type: ignore[attr-defined]
            assert 1 << header.refcount_order == width
            image.write(40 * cluster, bytes([width]) * cluster)
            image.discard(40 * cluster, cluster)
        assert is_good(memory)
    assert contents(memory) == before


def test_a_count_too_large_is_refused_with_nothing_changed() -> None:
    memory, _ = make()
    with opened(memory) as image:
        image.flush()
        before = memory.to_bytes()
        for bits in (1, 2):
            with pytest.raises(InvalidArgument, match="refcount_bits"):
                amend(image, refcount_bits=bits, size=SIZE * 2, lazy_refcounts=True)
        assert memory.to_bytes() == before
        amend(image, refcount_bits=4)
    assert is_good(memory)


def test_a_wide_image_with_many_blocks() -> None:
    memory = new_image("qcow2", 512 * 5000, cluster_size=512)
    with opened(memory) as image:
        image.write(0, noise(5, 512 * 4000))
        image.discard(512 * 500, 512 * 3000)
    before = contents(memory)
    for bits in (64, 1, 16, 64):
        with opened(memory) as image:
            amend(image, refcount_bits=bits)
        assert is_good(memory)
    assert contents(memory) == before


# -- other options --------------------------------------------------------------------------------


def test_lazy_reference_counts_on_and_off() -> None:
    memory, _ = make(content=False)
    for lazy in (True, False):
        with opened(memory) as image:
            amend(image, lazy_refcounts=lazy)
            image.write(0, b"x")
            image.flush()
            assert bool(memory.to_bytes()[79] & 1) is lazy
        with opened(memory, read_only=True) as image:
            assert image.node.header.lazy_refcounts is lazy  # type: ignore[attr-defined]


def test_size() -> None:
    memory, _ = make()
    with opened(memory) as image:
        amend(image, size=SIZE * 3)
        assert image.size == SIZE * 3
        amend(image, size=SIZE // 2)
        assert image.size == SIZE // 2
    assert is_good(memory)


def test_the_name_of_the_data_file_and_whether_it_is_raw() -> None:
    data = MemoryNode()
    memory = new_image("qcow2", 4 << 20, data, data_file="data", data_file_raw=True)
    with open_image(memory, data_file=detached(data)) as image:
        amend(image, data_file_raw=True)
        amend(image, data_file_raw=False, data_file="elsewhere")
        with pytest.raises(InvalidArgument, match="data_file_raw"):
            amend(image, data_file_raw=True)
    with open_image(detached(memory), data_file=detached(data)) as image:
        node: Any = image.node
        assert layout.find_extension(node.extensions, layout.EXTENSION_DATA_FILE) == b"elsewhere"
        assert not node.header.raw_data_file
        amend(image, data_file="")
        assert layout.find_extension(node.extensions, layout.EXTENSION_DATA_FILE) is None


@pytest.mark.parametrize(
    "options",
    [
        {"compat": "0.42"},
        {"refcount_bits": 3},
        {"refcount_bits": 0},
        {"refcount_bits": 128},
        {"data_file": "x"},
        {"data_file_raw": True},
        {"backing_file": "x"},
        {"backing_fmt": "raw"},
        {"compat": "0.10", "lazy_refcounts": True},
        {"compat": "0.10", "refcount_bits": 8},
        {"encrypt__state": "active", "encrypt__new-secret": "s"},
    ],
)
def test_refusals_change_nothing(options: dict[str, object]) -> None:
    memory, _ = make()
    with opened(memory) as image:
        image.flush()
        before = memory.to_bytes()
        with pytest.raises(ByreError):
            amend(image, **options)
        assert memory.to_bytes() == before
        image.write(0, b"still in service")
    with opened(memory, read_only=True) as image, pytest.raises(ReadOnly):
        amend(image, size=SIZE)


def test_the_backing_file_may_be_named_as_it_is() -> None:
    memory, base = make(backed=True)
    with opened(memory, base) as image:
        amend(image, backing_file="base", backing_fmt="raw", lazy_refcounts=True)
        with pytest.raises(InvalidArgument, match="backing"):
            amend(image, backing_file="base", backing_fmt="qcow2")


# -- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"compat": "0.10"}, {"refcount_bits": 64}, {"refcount_bits": 4}])
def test_an_interruption_at_any_step_leaves_the_image_intact(options: dict[str, object]) -> None:
    original, base = make(backed=True)
    before = contents(original, base)
    for stop in itertools.count(1):
        memory = MemoryNode(original.to_bytes())
        control = Control()
        left = stop

        def count(control: Control = control) -> None:
            nonlocal left
            left -= 1
            if not left:
                control.cancel()

        control.on_advance = count
        with opened(memory, base) as image:
            try:
                amend(image, control, **options)
                done = True
            except Cancelled:
                done = False
            image.write(CLUSTER * 46, b"goes on")
        after = contents(memory, base)
        assert after[""][CLUSTER * 46 :][:7] == b"goes on"
        assert after[""][: CLUSTER * 46] == before[""][: CLUSTER * 46]
        assert [after[name] for name in after if name] == [before[name] for name in before if name]
        assert is_good(memory)
        if done:
            assert control.done == control.total > 0
            return


# -- emptying -------------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshots", [False, True])
def test_an_emptied_overlay_shows_its_backing_file(snapshots: bool) -> None:
    base = noise(99, SIZE)
    memory = new_image("qcow2", SIZE, cluster_size=CLUSTER, backing_file="base", backing_fmt="raw")
    with opened(memory, base) as image:
        fill(image, snapshots=snapshots)
    before = contents(memory, base)
    with opened(memory, base) as image:
        image.node.make_empty()  # type: ignore[attr-defined]
        assert image.read(0, SIZE) == base
        assert not any(image.node.mapping.l1)  # type: ignore[attr-defined]
    after = contents(memory, base)
    assert {name: data for name, data in after.items() if name} == {n: d for n, d in before.items() if n}
    assert is_good(memory)
    assert snapshots or memory.size < CLUSTER * 8
    with opened(memory, base) as image:
        image.write(0, b"used again")
        assert image.read(0, 10) == b"used again"


# -- any sequence ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_sequence_of_changes(data: st.DataObject) -> None:
    """Versions, widths and sizes in any order, with writes and snapshots in between: content and counts stay right."""
    cluster = data.draw(st.sampled_from((512, 4096)))
    memory = new_image("qcow2", cluster * COUNT, cluster_size=cluster,
                       compat=data.draw(st.sampled_from(("0.10", "1.1"))))  # fmt: skip
    expected = bytearray(cluster * COUNT)
    kept: dict[str, bytes] = {}
    for number in range(data.draw(st.integers(2, 8))):
        with opened(memory) as image:
            at = data.draw(st.integers(0, COUNT - 5)) * cluster
            kind = data.draw(st.sampled_from(("write", "zero", "discard", "snapshot", "delete")))
            if kind == "write":
                image.write(at, noise(number, 3 * cluster))
                expected[at : at + 3 * cluster] = noise(number, 3 * cluster)
            elif kind == "zero":
                image.write_zeroes(at, 3 * cluster, unmap=data.draw(st.booleans()))
                expected[at : at + 3 * cluster] = bytes(3 * cluster)
            elif kind == "discard":
                image.discard(at, 2 * cluster)
                expected[at : at + 2 * cluster] = bytes(2 * cluster)
            elif kind == "snapshot" and len(kept) < 3:
                name = f"s{number}"
                try:
                    image.create_snapshot(name)
                    kept[name] = bytes(expected)
                except InvalidArgument:
                    pass  # counts too narrow
            elif kind == "delete" and kept:
                name = data.draw(st.sampled_from(sorted(kept)))
                image.delete_snapshot(name)
                del kept[name]
            option = data.draw(st.sampled_from(("compat", "refcount_bits", "lazy_refcounts")))
            value = data.draw(
                {
                    "compat": st.sampled_from(("0.10", "1.1")),
                    "refcount_bits": st.sampled_from((1, 2, 4, 16, 64)),
                    "lazy_refcounts": st.booleans(),
                }[option]
            )
            try:
                amend(image, **{option: value})
            except (InvalidArgument, NotSupported):
                pass
            assert image.read(0, image.size) == expected
        assert is_good(memory)
    found = contents(memory)
    assert found.pop("") == expected
    assert sorted(found.values()) == sorted(kept.values())


# -- the peer -------------------------------------------------------------------------------------

GRID = [
    {"compat": "0.10"},
    {"refcount_bits": 1},
    {"refcount_bits": 32},
    {"lazy_refcounts": "on"},
    {"size": "3M"},
    {"compat": "1.1", "refcount_bits": 64, "lazy_refcounts": "on", "size": "5M"},
]


@pytest.mark.oracle
@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
@pytest.mark.parametrize("options", GRID, ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()))
def test_the_peer_finds_what_it_would_have_made(
    tmp_path: Path, qemu_img: Run, qemu_io: Run, cluster: str, options: dict[str, str]
) -> None:
    import json

    mine, theirs = tmp_path / "mine.qcow2", tmp_path / "theirs.qcow2"
    old = "1.1" if options.get("compat") != "1.1" else "0.10"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},compat={old}", mine, "2M")
    qemu_io("-c", "write -P 1 0 600k", "-c", "write -P 2 1M 100k", mine)
    if old == "1.1":
        qemu_io("-c", "write -z 64k 128k", "-c", "write -z -u 1M 64k", mine)
    theirs.write_bytes(mine.read_bytes())
    with byre.open(str(mine), read_only=False) as image:
        amend(image, **options)
    qemu_img("amend", "-f", "qcow2", "-o", ",".join(f"{k}={v}" for k, v in options.items()), theirs)
    assert "No errors" in qemu_img("check", mine).stdout
    assert qemu_img("compare", mine, theirs).returncode == 0
    one, two = (json.loads(qemu_img("info", "--output=json", path).stdout) for path in (mine, theirs))
    assert one["format-specific"] == two["format-specific"]
    assert one["virtual-size"] == two["virtual-size"]
    # And the other way round: what the peer made is good to byre.
    with byre.open(str(theirs), read_only=False) as image:
        assert not image.node.check(Control()).corruptions  # type: ignore[attr-defined]
        amend(image, compat="1.1", refcount_bits=16)
    assert "No errors" in qemu_img("check", theirs).stdout
    assert qemu_img("compare", mine, theirs).returncode == 0


@pytest.mark.oracle
def test_the_peer_reads_every_snapshot_of_a_downgraded_image(tmp_path: Path, qemu_img: Run, qemu_io: Run) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "a.qcow2"
    base.write_bytes(noise(4, 1 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", base, "-F", "raw", path)
    for number in range(4):
        qemu_io("-c", f"write -P {number + 1} {number * 64}k 96k", "-c", f"write -z {number * 100}k 40k", path)
        qemu_img("snapshot", "-c", f"s{number}", path)
    qemu_io("-c", "write -z 0 64k", path)
    names = ["", *(f"s{number}" for number in range(4))]

    def dump(name: str) -> bytes:
        target = tmp_path / "out.raw"
        qemu_img("convert", *(("-l", name) if name else ()), "-O", "raw", path, target)
        return target.read_bytes()

    before = {name: dump(name) for name in names}
    with byre.open(str(path), read_only=False) as image:
        amend(image, compat="0.10")
    assert "No errors" in qemu_img("check", path).stdout
    assert {name: dump(name) for name in names} == before
