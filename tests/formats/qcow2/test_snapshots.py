"""Internal snapshots: what they hold, what happens to the disk, and what the image looks like afterwards."""

from __future__ import annotations

import contextlib
import copy
import random
import struct
import threading
from pathlib import Path

import pytest

import byre
from byre.errors import Busy, ByreError, Corrupt, ImageError, InvalidArgument, NotFound, NotSupported, ReadOnly
from byre.filters.faults import FaultNode
from byre.formats.abilities import HasSnapshots, snapshot_holder
from byre.formats.qcow2 import layout
from byre.formats.qcow2.image import Qcow2Node
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from conftest import Run
from model.disk import ModelDisk
from support.images import detached, layer, new_image, open_image
from support.walk import walk

KIB = 1024


def node_of(image: Image) -> Qcow2Node:
    assert isinstance(image.node, Qcow2Node)
    return image.node


def content(file: MemoryNode, snapshot: str = "") -> bytes:
    """What the disk, or a snapshot of it, reads as in an image opened for that."""
    with open_image(detached(file), read_only=True) as image:
        if snapshot:
            node_of(image).load_snapshot(snapshot)
        return image.read(0, image.size)


def assert_sound(file: MemoryNode) -> None:
    """Nothing is damaged, leaked or wrongly flagged, and the dirty bit is off."""
    data = file.to_bytes()
    found = walk(data)
    assert found == ([], [], [])
    if data[4:8] == b"\0\0\0\3":
        assert data[79] & 1 == 0


# -- against a model ------------------------------------------------------------------------------

GRID = [
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "compat": "0.10"},
    {"cluster_size": 4096, "refcount_bits": 8},
    {"cluster_size": 4096, "refcount_bits": 4},
    {"cluster_size": 16384, "extended_l2": "on"},
    {"cluster_size": 65536, "refcount_bits": 32, "compression_type": "zstd"},
]


class Machine:
    """An image and a model of it with snapshots, to which the same things are done."""

    def __init__(self, seed: int, options: dict[str, object]) -> None:
        self.chooser = random.Random(seed)
        self.cluster = int(str(options["cluster_size"]))
        self.size = self.cluster * 24 + 512
        self.v3 = options.get("compat") != "0.10"
        self.limit = 10 if options.get("refcount_bits") == 4 else 40
        self.file = new_image("qcow2", self.size, **options)
        self.image = open_image(self.file)
        self.disk = ModelDisk(self.size, self.cluster, zeroes=self.v3)
        self.kept: dict[str, ModelDisk] = {}
        self.count = 0

    def place(self) -> tuple[int, int]:
        offset = self.chooser.randrange(self.disk.size)
        return offset, min(self.chooser.randrange(1, 3 * self.cluster), self.disk.size - offset)

    def write(self) -> None:
        offset, length = self.place()
        data = self.chooser.randbytes(length)
        self.image.write(offset, data)
        self.disk.write(offset, data)

    def compressed(self) -> None:
        offset = self.chooser.randrange(self.disk.size // self.cluster) * self.cluster
        data = (self.chooser.randbytes(40) * (self.cluster // 40 + 1))[: self.cluster]
        self.image.write_compressed(offset, data)
        self.disk.write(offset, data)

    def zeroes(self) -> None:
        offset, length = self.place()
        self.image.write_zeroes(offset, length, unmap=self.chooser.random() < 0.5)
        self.disk.write_zeroes(offset, length)

    def discard(self) -> None:
        offset, length = self.place()
        self.image.discard(offset, length)
        self.disk.discard(offset, length)

    def create(self) -> None:
        if len(self.kept) >= self.limit:
            return
        self.count += 1
        name = f"snapshot {self.count}"
        shot = self.image.create_snapshot(name)
        assert (shot.name, shot.disk_size) == (name, self.disk.size)
        self.kept[name] = copy.deepcopy(self.disk)

    def apply(self) -> None:
        if self.kept:
            name = self.chooser.choice(list(self.kept))
            self.image.apply_snapshot(name)
            self.disk = copy.deepcopy(self.kept[name])

    def delete(self) -> None:
        if self.kept:
            name = self.chooser.choice(list(self.kept))
            self.image.delete_snapshot(name)
            del self.kept[name]

    def grow(self) -> None:
        if self.v3 and self.disk.size < 3 * self.size:
            size = self.disk.size + 512 * self.chooser.randrange(1, 4 * self.cluster // 512)
            self.image.resize(size)
            self.disk.resize(size)

    def look(self) -> None:
        """Close, judge, open again."""
        self.image.close()
        assert_sound(self.file)
        assert content(self.file) == self.disk.all()
        for name, disk in self.kept.items():
            assert content(self.file, name) == disk.all(), name
        self.image = open_image(detached(self.file))
        assert [shot.name for shot in node_of(self.image).snapshots] == list(self.kept)


@pytest.mark.parametrize("options", GRID, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_operations_agree_with_a_model(options: dict[str, object], seed: int) -> None:
    machine = Machine(seed, options)
    steps = [machine.write] * 4 + [machine.compressed] * 2 + [machine.zeroes, machine.discard, machine.grow]
    steps += [machine.create] * 3 + [machine.apply] * 2 + [machine.delete] * 2
    for number in range(60):
        machine.chooser.choice(steps)()
        assert machine.image.size == machine.disk.size
        if number % 12 == 11:
            machine.look()
    while machine.kept:
        machine.delete()
    machine.look()
    machine.image.close()


def test_over_a_backing_file_the_snapshot_keeps_what_the_disk_read_as() -> None:
    base = random.Random(1).randbytes(40 * KIB)
    file = new_image("qcow2", 64 * KIB, cluster_size=4096, backing_file="base", backing_fmt="raw")
    graph = Graph()
    with open_image(file, graph=graph, backing=layer(graph, MemoryNode(base), "raw")) as image:
        image.write(100, b"first")
        before = image.read(0, image.size)
        image.create_snapshot("one")
        image.write(0, bytes(64 * KIB))
        image.apply_snapshot("one")
        assert image.read(0, image.size) == before
    assert_sound(file)


# -- names, ids, entries --------------------------------------------------------------------------


@pytest.fixture
def file() -> MemoryNode:
    memory = new_image("qcow2", 256 * KIB, cluster_size=4096)
    with open_image(memory) as image:
        image.write(0, b"A" * 100 * KIB)
    return memory


def test_ids_count_on_from_the_largest(file: MemoryNode) -> None:
    with open_image(detached(file)) as image:
        assert [image.create_snapshot(name).id for name in "abc"] == ["1", "2", "3"]
        image.delete_snapshot("b")
        assert image.create_snapshot("d").id == "4"
        image.delete_snapshot("4")
        assert image.create_snapshot("e").id == "4"
        assert [(shot.id, shot.name) for shot in node_of(image).snapshots] == [("1", "a"), ("3", "c"), ("4", "e")]


def test_a_name_that_is_another_ones_id(file: MemoryNode) -> None:
    with open_image(detached(file)) as image:
        image.create_snapshot("2")
        image.write(0, b"B")
        image.create_snapshot("x")
        image.apply_snapshot("2")  # the id comes first
        assert image.read(0, 1) == b"B"
        image.delete_snapshot("2")  # the name comes first
        assert [shot.name for shot in node_of(image).snapshots] == ["x"]
        image.delete_snapshot("2")
        assert node_of(image).snapshots == ()
    assert_sound(file)


def test_equal_names_mean_the_first(file: MemoryNode) -> None:
    with open_image(detached(file)) as image:
        image.create_snapshot("same")
        image.write(0, b"B")
        image.create_snapshot("same")
        image.apply_snapshot("same")
        assert image.read(0, 1) == b"A"
    with open_image(detached(file), read_only=True) as image:
        node_of(image).load_snapshot_exactly("2", "same")
        assert image.read(0, 1) == b"B"
    with open_image(detached(file), read_only=True) as image, pytest.raises(NotFound, match="'2' and name 'other'"):
        node_of(image).load_snapshot_exactly("2", "other")


def test_what_is_not_there(file: MemoryNode) -> None:
    before = file.to_bytes()
    with open_image(detached(file)) as image:
        for action in (image.apply_snapshot, image.delete_snapshot):
            with pytest.raises(NotFound, match="there is no snapshot 'gone'"):
                action("gone")
    assert file.to_bytes() == before


def test_a_name_that_is_too_long_is_not_cut(file: MemoryNode) -> None:
    before = file.to_bytes()
    with open_image(detached(file)) as image, pytest.raises(InvalidArgument, match="255 bytes"):
        image.create_snapshot("ä" * 128)
    assert file.to_bytes() == before
    with open_image(detached(file)) as image:
        image.create_snapshot("ä" * 127)
        image.apply_snapshot("ä" * 127)


def rewrite_table(file: MemoryNode, change: list[layout.Snapshot]) -> None:
    """Put other entries, of the same length in clusters, into the snapshot table."""
    header = layout.decode_header(file.to_bytes()[:4096])
    file.write_from(header.snapshots_offset, memoryview(layout.encode_snapshot_table(change)))


def test_extra_data_and_all_fields_are_kept_to_the_byte(file: MemoryNode) -> None:
    with open_image(detached(file)) as image:
        image.create_snapshot("one")
        shots = list(node_of(image).snapshots)
    odd = shots[0]._replace(date_sec=7, date_nsec=8, vm_clock_nsec=1 << 60, id="id \udcff", name="näme",
                            extra=layout.snapshot_extra(0, 256 * KIB, 12345) + b"what nobody knows")  # fmt: skip
    rewrite_table(file, [odd])
    with open_image(detached(file)) as image:
        image.create_snapshot("two")
        image.delete_snapshot("two")
        assert node_of(image).snapshots == (odd,)
    with open_image(detached(file)) as image:
        assert node_of(image).snapshots == (odd,)
        assert odd.icount == 12345
    assert_sound(file)


def test_entries_without_a_disk_size_get_one_when_the_table_is_written(file: MemoryNode) -> None:
    with open_image(detached(file)) as image:
        image.create_snapshot("one")
        shots = list(node_of(image).snapshots)
    rewrite_table(file, [shots[0]._replace(extra=b"", state_size_32=77)])
    with open_image(detached(file)) as image:
        image.create_snapshot("two")
        first = node_of(image).snapshots[0]
        assert (first.disk_size, first.vm_state_size, first.icount) == (256 * KIB, 77, None)
    assert_sound(file)


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [512, 4096])
def test_applying_brings_back_the_size(cluster: int) -> None:
    small, large = 100 * KIB + 512, 900 * KIB
    file = new_image("qcow2", small, cluster_size=cluster)
    with open_image(file) as image:
        image.write(0, b"s" * small)
        image.create_snapshot("small")
        image.resize(large)
        image.write(0, b"L" * large)
        image.create_snapshot("large")
        image.apply_snapshot("small")
        assert image.size == small
        assert image.read(0, small) == b"s" * small
        image.resize(large)
        assert image.read(small, large - small) == bytes(large - small), "what was cut off came back"
        image.apply_snapshot("large")
        assert image.read(0, image.size) == b"L" * large
    assert_sound(file)
    assert content(file, "small") == b"s" * small
    assert content(file, "large") == b"L" * large


# -- refusals: nothing is changed -----------------------------------------------------------------


@pytest.mark.parametrize(("bits", "fit"), [(1, 0), (2, 2), (4, 14)])
def test_counts_too_narrow_are_refused_before_anything_is_changed(bits: int, fit: int) -> None:
    file = new_image("qcow2", 256 * KIB, cluster_size=4096, refcount_bits=bits)
    with open_image(file) as image:
        image.write(0, b"x" * 5000)
        for number in range(fit):
            image.create_snapshot(str(number))
    before = file.to_bytes()
    with open_image(detached(file)) as image, pytest.raises(InvalidArgument, match=f"refcount_bits={bits}"):
        image.create_snapshot("one too many")
    assert file.to_bytes() == before
    with open_image(detached(file)) as image:
        with pytest.raises(InvalidArgument):
            image.create_snapshot("one too many")
        image.write(0, b"still at work")
    assert_sound(file)


def test_many_compressed_clusters_in_one_host_cluster_are_counted_together() -> None:
    """They lie in several L2 tables, so that no single one shows that the counts are too narrow."""
    file = new_image("qcow2", 4 << 20, cluster_size=512, refcount_bits=4)
    with open_image(file) as image:
        for number in range(5):
            image.write_compressed(number * 32 * KIB, bytes([number]) * 512)
        for name in ("one", "two"):
            image.create_snapshot(name)
        before = [image.read(number * 32 * KIB, 512) for number in range(5)]
        with pytest.raises(InvalidArgument, match="refcount_bits=4"):
            image.create_snapshot("three")
        image.write_compressed(7 * 32 * KIB, b"7" * 512)
        assert [image.read(number * 32 * KIB, 512) for number in range(5)] == before
        assert len(node_of(image).snapshots) == 2
    assert_sound(file)


def test_the_most_snapshots_there_can_be(file: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_SNAPSHOTS", 2)
    with open_image(detached(file)) as image:
        image.create_snapshot("one")
        image.create_snapshot("two")
        with pytest.raises(InvalidArgument, match="2 snapshots, which is the most") as caught:
            image.create_snapshot("three")
        assert caught.value.errno == 27
        assert len(node_of(image).snapshots) == 2
    assert_sound(file)


def test_where_there_can_be_none(file: MemoryNode) -> None:
    with open_image(detached(file), read_only=True) as image, pytest.raises(ReadOnly):
        image.create_snapshot("no")
    with open_image(MemoryNode(bytes(4096)), "raw") as image:
        with pytest.raises(NotSupported, match="'raw'"):
            image.create_snapshot("no")
        assert snapshot_holder(image.node) is None
    data = MemoryNode()
    outside = new_image("qcow2", 64 * KIB, data, cluster_size=4096, data_file="data")
    with open_image(outside, data_file=data) as image, pytest.raises(NotSupported, match="external data file"):
        image.create_snapshot("no")


def test_below_filters(file: MemoryNode) -> None:
    graph = Graph()
    graph.add(detached(file))
    spec = {"driver": "blkdebug", "image": {"driver": "qcow2", "file": file.name}}
    with byre.open(spec, read_only=False, graph=graph) as image:
        assert isinstance(snapshot_holder(image.node), HasSnapshots)
        image.create_snapshot("one")
        image.write(0, b"B")
        image.apply_snapshot("one")
        assert image.read(0, 1) == b"A"


@pytest.mark.parametrize("action", ["create", "apply", "delete"])
def test_damaged_tables_are_refused_untouched(file: MemoryNode, action: str) -> None:
    with open_image(detached(file)) as image:
        image.create_snapshot("one")
        image.write(0, b"B" * 9000)
    header = layout.decode_header(file.to_bytes()[:4096])
    with open_image(detached(file), read_only=True) as image:
        table = node_of(image).snapshots[0].l1_table_offset
    at = header.l1_table_offset if action == "create" else table
    (entry,) = struct.unpack_from(">Q", file.to_bytes(), at)
    file.write_from(at, memoryview(struct.pack(">Q", entry + 512)))
    before = file.to_bytes()
    with open_image(detached(file)) as image, pytest.raises(Corrupt, match="points to no cluster"):
        getattr(image, f"{action}_snapshot")("one")
    assert file.to_bytes() == before


def test_a_snapshot_of_impossible_size_is_refused(file: MemoryNode) -> None:
    with open_image(detached(file)) as image:
        image.create_snapshot("one")
        shots = list(node_of(image).snapshots)
    rewrite_table(file, [shots[0]._replace(extra=layout.snapshot_extra(0, 1 << 62))])
    before = file.to_bytes()
    with open_image(detached(file)) as image, pytest.raises(ImageError, match="which no image can have"):
        image.apply_snapshot("one")
    with open_image(detached(file), read_only=True) as image, pytest.raises(ImageError):
        node_of(image).load_snapshot("one")
    assert file.to_bytes() == before


@pytest.mark.oracle
def test_dirty_bitmaps_keep_a_snapshot_from_being_applied(tmp_path: Path, qemu_img: Run) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("bitmap", "--add", path, "b")
    with byre.open(str(path), read_only=False) as image:
        image.create_snapshot("one")
        with pytest.raises(Busy, match="bitmaps"):
            image.apply_snapshot("one")
        image.delete_snapshot("one")
    assert '"name": "b"' in qemu_img("info", "--output=json", path).stdout
    assert "No errors were found" in qemu_img("check", path).stdout


# -- looking into one -----------------------------------------------------------------------------


def test_a_loaded_snapshot_stays_read_only(file: MemoryNode) -> None:
    with open_image(detached(file)) as image:
        image.create_snapshot("one")
        image.write(0, b"B")
        with pytest.raises(InvalidArgument, match="read-only"):
            node_of(image).load_snapshot("one")
    before = file.to_bytes()
    with open_image(detached(file), read_only=True) as image:
        node_of(image).load_snapshot("one")
        assert image.read(0, 2) == b"AA"
        with pytest.raises(ReadOnly, match="loaded"):
            image.reopen(read_only=False)
        assert image.read(0, 2) == b"AA"
        node_of(image).load_snapshot("1")
        assert image.read(0, 2) == b"AA"
    assert file.to_bytes() == before


# -- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["create", "apply", "delete"])
@pytest.mark.parametrize("kind", ["write", "flush"])
def test_a_failure_at_any_request_leaves_old_or_new(file: MemoryNode, action: str, kind: str) -> None:
    """Each write and each flush of an operation fails in turn; the image, opened again, is sound and as it was."""
    with open_image(detached(file)) as image:
        image.create_snapshot("one")
        image.write(0, b"B" * 9000)
    start, disk, shot = file.to_bytes(), content(file), content(file, "one")
    for number in range(100):
        memory = MemoryNode(start)
        fault = FaultNode()
        image = open_image(memory, filters=[fault])
        fault.fail(kind, number + 1)
        try:
            getattr(image, f"{action}_snapshot")("one" if action != "create" else "two")
        except ByreError:
            with contextlib.suppress(ByreError):
                image.close()
        else:
            break
        with open_image(detached(memory)) as again:
            names = [entry.name for entry in node_of(again).snapshots]
            result = node_of(again).check(Control())
            assert (result.corruptions, result.check_errors) == (0, 0), number
            assert again.read(0, again.size) in ((disk, shot) if action == "apply" else (disk,))
        if "one" in names:
            assert content(memory, "one") == shot
        if "two" in names:
            assert content(memory, "two") == disk
    else:
        pytest.fail("it never succeeded")
    assert number > 3


# -- with others at work --------------------------------------------------------------------------


def test_while_others_read_and_write() -> None:
    file = new_image("qcow2", 1 << 20, cluster_size=4096)
    stop = threading.Event()
    failures: list[BaseException] = []
    with open_image(file) as image:

        def work(lane: int) -> None:
            chooser = random.Random(lane)
            stamp = 0
            try:
                while not stop.is_set():
                    stamp += 1
                    block = chooser.randrange(32) * 8 + lane
                    image.write(block * 4096, struct.pack(">II", lane, stamp) * 512)
                    other = chooser.randrange(256)
                    found = image.read(other * 4096, 4096)
                    assert found == found[:8] * 512, "a torn block"
                    assert found[:8] == bytes(8) or struct.unpack(">II", found[:8])[0] == other % 8
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(lane,)) for lane in range(4)]
        for thread in threads:
            thread.start()
        for number in range(12):
            image.create_snapshot(f"s{number}")
            if number % 4 == 3:
                image.delete_snapshot(f"s{number - 2}")
        stop.set()
        for thread in threads:
            thread.join()
        final = image.read(0, image.size)
    assert not failures, failures
    assert_sound(file)
    assert content(file) == final
    for number in (0, 11):
        kept = content(file, f"s{number}")
        for block in range(256):
            part = kept[block * 4096 : (block + 1) * 4096]
            assert part == part[:8] * 512, "a write was caught half way"


# -- the peer -------------------------------------------------------------------------------------

PEER_GRID = [
    "cluster_size=64k",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,refcount_bits=4",
    "compat=0.10",
    "extended_l2=on,cluster_size=16k",
]


@pytest.mark.oracle
@pytest.mark.parametrize("options", PEER_GRID)
def test_turn_by_turn_with_the_peer(tmp_path: Path, qemu_img: Run, options: str) -> None:
    """byre and the peer take turns with the same image; each finds what the other made, and nothing wrong."""
    run, path = qemu_img, tmp_path / "disk.qcow2"
    chooser = random.Random(options)
    run("create", "-q", "-f", "qcow2", "-o", options, path, "3M")
    kept: dict[str, bytes] = {}

    def disk() -> bytes:
        with byre.open(str(path)) as image:
            return image.read(0, image.size)

    for turn in range(8):
        ours = turn % 2 == 0
        offset, length = chooser.randrange(2 << 20), chooser.randrange(1, 400000)
        with byre.open(str(path), read_only=False) as image:
            image.write(offset, chooser.randbytes(length))
            image.write_compressed(turn * 65536, b"%d" % turn * 65536 if image.node.cluster_size == 65536 else  # type: ignore[attr-defined]
                                   b"%d" % turn * image.node.cluster_size)  # type: ignore[attr-defined]  # fmt: skip
        name = f"turn{turn}"
        if ours:
            with byre.open(str(path), read_only=False) as image:
                image.create_snapshot(name)
        else:
            run("snapshot", "-c", name, path)
        kept[name] = disk()
        victim = chooser.choice(list(kept))
        target = chooser.choice(list(kept))
        if turn % 3 == 2:
            del kept[victim]
            if ours:
                run("snapshot", "-d", victim, path)
            else:
                with byre.open(str(path), read_only=False) as image:
                    image.delete_snapshot(victim)
        elif turn % 3 == 1:
            if ours:
                run("snapshot", "-a", target, path)
            else:
                with byre.open(str(path), read_only=False) as image:
                    image.apply_snapshot(target)
            assert disk() == kept[target]
        assert "No errors were found" in run("check", path).stdout
        assert_sound(MemoryNode(path.read_bytes()))
        listed = run("snapshot", "-l", path).stdout
        for name, data in kept.items():
            assert name in listed
            run("convert", "-l", name, "-O", "raw", path, tmp_path / "raw")
            assert (tmp_path / "raw").read_bytes() == data
            with byre.open(str(path)) as image:
                image.node.load_snapshot(name)  # type: ignore[attr-defined]
                assert image.read(0, image.size) == data
