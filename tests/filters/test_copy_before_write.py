"""Copy-before-write and snapshot-access: the disk as it was can be read while it changes; nothing else changes."""

from __future__ import annotations

import hashlib
import random
import threading
from contextlib import suppress

import pytest

import byre
from byre.errors import AccessDenied, Busy, ByreError, InvalidArgument, IOFailure, NotFound, NotSupported
from byre.filters.copy_before_write import CopyBeforeWriteNode
from byre.filters.faults import FaultNode
from byre.filters.snapshot_access import SnapshotAccessNode
from byre.formats.qcow2.image import Qcow2Node
from byre.graph import chain
from byre.graph.graph import Graph
from byre.graph.live import insert_filter, quiesce, remove_filter
from byre.graph.node import PERM_RESIZE, PERM_WRITE, Node
from byre.image import Image
from byre.io.extent import DATA, ZERO
from byre.jobs.control import Control
from byre.protocols.memory import MemoryNode
from contracts.node import FilterContract
from support.images import detached, new_image, open_image, stack
from support.writers import Writers

K, M = 1 << 10, 1 << 20
SIZE = 2 * M


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


class TestContract(FilterContract):
    @pytest.fixture
    def node(self) -> Node:
        graph = Graph()
        filter_node, disk, target = CopyBeforeWriteNode(), MemoryNode(self.content), MemoryNode(size=len(self.content))
        for one in (filter_node, disk, target):
            graph.add(one)
        filter_node.filename = disk.filename
        graph.attach(filter_node, "file", disk, "filtered")
        graph.attach(filter_node, "target", target, "data")
        filter_node.begin(64 * K)
        return filter_node

    def test_read_only_refuses(self, node: Node) -> None:
        node.children["file"].node.read_only = True
        super().test_read_only_refuses(node)

    def test_growth_reads_as_zeroes_and_what_was_cut_off_does_not_come_back(self, node: Node) -> None:
        with pytest.raises(Busy, match="size cannot change"):
            node.resize(node.size * 2)

    def test_others_may_not_write(self, node: Node) -> None:
        graph = Graph()
        graph.nodes = {each.name: each for each in (node, node.children["file"].node)}
        graph.attach_image(node, "the guest", PERM_WRITE, PERM_WRITE)
        used, shared = node.child_permissions(node.children["file"], PERM_WRITE, 15)
        assert used & PERM_WRITE
        assert not shared & (PERM_WRITE | PERM_RESIZE)


class Setup:
    """A disk under a copy-before-write filter, which the guest writes through, and a view of the earlier state."""

    def __init__(
        self, *, target_format: str = "raw", cluster: int = 0, target_size: int = SIZE, **options: object
    ) -> None:
        self.graph = graph = Graph()
        self.fault, self.source_fault = FaultNode(), FaultNode()
        self.before = random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 2)
        disk = new_image("qcow2", SIZE, cluster_size=16 * K)
        with open_image(disk) as image:
            image.write(0, self.before[: SIZE // 2])
            if options.pop("with_bitmap", False):
                assert isinstance(image.node, Qcow2Node)
                image.node.bitmap_store().add("b").set(64 * K, 64 * K)
        source_file = stack(graph, detached(disk), [self.source_fault])
        target = new_image(target_format, target_size, **({"cluster_size": cluster} if cluster else {}))
        target_file = stack(graph, target, [self.fault])
        self.guest = byre.open(
            {
                "driver": "copy-before-write", "node-name": "cbw",
                "file": {"driver": "qcow2", "node-name": "disk", "file": source_file.name},
                "target": {"driver": target_format, "node-name": "target", "file": target_file.name}, **options,
            },
            read_only=False, graph=graph,
        )  # fmt: skip
        self.view = byre.open(
            {"driver": "snapshot-access", "node-name": "view", "file": "cbw"}, read_only=False, graph=graph
        )

    @property
    def filter(self) -> CopyBeforeWriteNode:
        assert isinstance(self.guest.node, CopyBeforeWriteNode)
        return self.guest.node

    def target_bytes(self) -> bytes:
        node = self.graph.find("target")
        data = bytearray(node.size)
        node.read_into(0, memoryview(data))
        return bytes(data)


@pytest.mark.parametrize(("target_format", "cluster"), [("raw", 0), ("qcow2", 4 * K), ("qcow2", 256 * K)])
def test_the_earlier_state_is_seen_whatever_is_written(target_format: str, cluster: int) -> None:
    setup = Setup(target_format=target_format, cluster=cluster)
    guest, view = setup.guest, setup.view
    guest.write(1000, b"new" * 10000)
    guest.write_zeroes(200 * K, 100 * K)
    guest.discard(400 * K, 200 * K)
    guest.write(SIZE - 100, b"end")
    assert view.read(0, SIZE) == setup.before
    assert guest.read(1000, 3) == b"new"
    node = setup.graph.find("target")
    assert (0, 64 * K) in [(extent.offset, min(extent.length, 64 * K)) for extent in node.extents(0, SIZE)]
    assert setup.filter.state.left < SIZE


def test_readers_and_writers() -> None:
    setup = Setup()
    stop = threading.Event()
    wrong: list[int] = []

    def look(seed: int) -> None:
        chooser = random.Random(seed)
        while not stop.is_set():
            offset = chooser.randrange(SIZE - 100 * K)
            length = chooser.choice((1, 4 * K, 100 * K))
            if setup.view.read(offset, length) != setup.before[offset : offset + length]:
                wrong.append(offset)

    readers = [threading.Thread(target=look, args=(seed,)) for seed in range(2)]
    for reader in readers:
        reader.start()
    with Writers(setup.guest, unit=16 * K) as writers:
        writers.more(150)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert setup.view.read(0, SIZE) == setup.before


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
def test_a_snapshot_of_a_disk_in_use_is_made_read_and_let_go(target_format: str) -> None:
    """As a user builds a backup by hand, again and again, while others write."""
    graph = Graph()
    disk = open_image(new_image("qcow2", SIZE, cluster_size=16 * K), "qcow2", graph=graph)
    disk.write(0, random.Random(2).randbytes(SIZE))
    layer = disk.node
    with Writers(disk, unit=16 * K) as writers:
        for _ in range(4):
            target = open_image(new_image(target_format, SIZE), target_format, graph=graph)
            keeper = CopyBeforeWriteNode(name="keeper")
            with writers.held(), quiesce(graph, [layer]):
                moment = digest(writers.model)
                graph.add(keeper)
                graph.attach(keeper, "target", target.node, "data")
                insert_filter(graph, keeper, disk)
                keeper.begin(64 * K)
            writers.more(10)
            view = byre.open({"driver": "snapshot-access", "file": "keeper"}, graph=graph)
            found = bytearray()
            for offset in range(0, SIZE, 256 * K):
                found += view.read(offset, 256 * K)
                writers.more(5)
            assert digest(found) == moment
            writers.more(10)
            assert digest(view.read(0, SIZE)) == moment
            view.close()
            remove_filter(graph, keeper)
            target.close()
            assert disk.node is layer
            writers.more(10)
    assert digest(disk.read(0, SIZE)) == digest(writers.model)
    assert isinstance(layer, Qcow2Node)
    assert layer.check(Control()).corruptions == 0
    assert len(graph.nodes) == len(list(graph.images)) + 1  # the disk and its file; nothing is left of the rest


def test_what_nobody_wants_is_not_copied_and_not_shown() -> None:
    setup = Setup()
    setup.view.discard(10, 256 * K)
    setup.guest.write(0, b"x" * 512 * K)
    with pytest.raises(AccessDenied, match="byte 0x10000 is not part of the snapshot"):
        setup.view.read(60 * K, 10 * K)
    assert setup.view.read(0, 64 * K) == setup.before[: 64 * K]
    assert setup.view.read(256 * K, 256 * K) == setup.before[256 * K : 512 * K]
    assert setup.target_bytes()[64 * K : 256 * K] == bytes(192 * K)
    # What was copied is given up as well.
    setup.view.discard(0, SIZE)
    assert setup.target_bytes() == bytes(SIZE)
    with pytest.raises(AccessDenied):
        setup.view.read(SIZE - 1, 1)


def test_only_what_is_dirty_in_a_bitmap() -> None:
    setup = Setup(with_bitmap=True, **{"bitmap.node": "disk", "bitmap.name": "b"})
    setup.guest.write(0, b"x" * 256 * K)
    assert setup.view.read(64 * K, 64 * K) == setup.before[64 * K : 128 * K]
    with pytest.raises(AccessDenied):
        setup.view.read(0, 1)
    with pytest.raises(AccessDenied):
        setup.view.read(128 * K, 1)
    assert setup.target_bytes()[: 64 * K] == bytes(64 * K)


def test_the_view_is_read_only() -> None:
    setup = Setup()
    for request in (lambda: setup.view.write(0, b"x"), lambda: setup.view.write_zeroes(0, 512)):
        with pytest.raises(NotSupported, match="cannot be written"):
            request()
    with pytest.raises(ByreError):
        setup.guest.resize(2 * SIZE)
    with pytest.raises(Busy):
        Image(setup.graph.find("disk"), setup.graph, read_only=False)


def test_extents_of_the_view() -> None:
    setup = Setup()
    setup.guest.write_zeroes(0, SIZE)
    setup.guest.write(SIZE - 64 * K, b"x" * 64 * K)
    found = [(extent.offset, extent.length, extent.kind) for extent in setup.view.extents()]
    assert found == [(0, SIZE // 2, DATA), (SIZE // 2, SIZE // 2, ZERO)]


# -- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["read", "write"])
def test_the_write_fails(side: str) -> None:
    setup = Setup()
    (setup.source_fault if side == "read" else setup.fault).fail(side)
    with pytest.raises(IOFailure, match=r"cannot copy the old content before writing: .*injected"):
        setup.guest.write(100, b"new")
    assert setup.guest.read(0, 200) == setup.before[:200]
    setup.guest.write(100, b"new")
    assert setup.guest.read(100, 3) == b"new"
    assert setup.view.read(0, SIZE) == setup.before


def test_the_snapshot_breaks() -> None:
    setup = Setup(**{"on-cbw-error": "break-snapshot"})
    setup.guest.write(0, b"first")
    setup.fault.fail("write")
    setup.guest.write(100 * K, b"second")
    assert setup.guest.read(100 * K, 6) == b"second"
    with pytest.raises(IOFailure, match="the snapshot is lost"):
        setup.view.read(0, 5)
    calls = setup.fault.calls["write"]
    setup.guest.write(300 * K, b"third")
    assert setup.fault.calls["write"] == calls


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_every_request_fails_once(policy: str) -> None:
    """Whatever fails, the disk holds what was written, and the view shows the earlier state or says that it cannot."""
    for nth in range(1, 40):
        setup = Setup(**{"on-cbw-error": policy})
        setup.fault.fail("any", nth)
        model = bytearray(setup.before)
        for number in range(6):
            offset = number * 150 * K
            with suppress(IOFailure):
                setup.guest.write(offset, b"n" * 5000)
                model[offset : offset + 5000] = b"n" * 5000
        hit = setup.fault.pending_failures == 0
        setup.fault.heal()
        assert setup.guest.read(0, SIZE) == model
        try:
            assert setup.view.read(0, SIZE) == setup.before
        except IOFailure:
            assert policy == "break-snapshot"
        if not hit:
            return
    raise AssertionError("never ran through")


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on-cbw-error": "panic"}, InvalidArgument, "on-cbw-error"),
        ({"cbw-timeout": -1}, InvalidArgument, "cbw-timeout"),
        ({"min-cluster-size": 3 * K}, InvalidArgument, "power of two"),
        ({"bitmap.name": "b"}, InvalidArgument, "by its node and its name"),
        ({"bitmap.name": "b", "bitmap.node": "disk"}, NotFound, "'b'"),
        ({"bitmap.name": "b", "bitmap.node": "nobody"}, NotFound, "nobody"),
        ({"target_size": M}, InvalidArgument, "different sizes"),
    ],
)
def test_options_that_are_none(options: dict[str, object], error: type[ByreError], message: str) -> None:
    with pytest.raises(error, match=message):
        Setup(**options)  # type: ignore[arg-type]


def test_children_that_are_missing_or_wrong() -> None:
    graph = Graph()
    graph.add(MemoryNode(size=SIZE, name="m"))
    with pytest.raises(InvalidArgument, match="needs a child 'target'"):
        byre.open({"driver": "copy-before-write", "file": "m"}, read_only=False, graph=graph)
    with pytest.raises(InvalidArgument, match="stands on a copy-before-write filter, not on 'memory'"):
        byre.open({"driver": "snapshot-access", "file": "m"}, graph=graph)
    with pytest.raises(InvalidArgument, match="needs a child 'file'"):
        byre.open({"driver": "snapshot-access"}, graph=graph)
    with pytest.raises(NotSupported, match="is for mirror jobs"):
        byre.open({"driver": "mirror_top", "file": "m"}, graph=graph)


def test_layers_see_the_view_as_a_disk_of_its_own() -> None:
    setup = Setup()
    assert isinstance(chain.skip_filters(setup.view.node), SnapshotAccessNode)
    assert chain.layers(setup.view.node) == [setup.view.node]
