"""External snapshots of disks in use, and chains made shorter: content, headers, and all or nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest

import byre
from byre.errors import Busy, ByreError, InvalidArgument, IOFailure, NoSpace, NotFound, NotSupported, ReadOnly
from byre.graph import blockers, chain, live
from byre.graph.external import NewOverlay, append, snapshot
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.graph.relinking import change_backing_file, cut_short, drop_intermediate
from byre.image import Image
from support.chains import Layer, content
from support.failing import Failing
from support.load import load

M = 1 << 20


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, size: int = M, below: str = "", **options: object) -> None:
    if below:
        options |= {"backing_file": below, "backing_fmt": "qcow2"}
    byre.create(name, "qcow2", size, options=options, check_backing=False)


def names(image: Image) -> list[str]:
    return [layer.filename for layer in chain.layers(image.node)]


def overlay(graph: Graph, name: str, *, read_only: bool = False) -> Node:
    """An open node over ``name`` that nobody uses."""
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": name}, "backing": None}
    with byre.open(spec, graph=graph, read_only=read_only) as image:
        edge = graph.attach_image(image.node, "the test", 0, 15)
        node = image.node
    graph._unlink(edge)
    return node


def test_snapshots_under_load() -> None:
    make("disk")
    with byre.open("disk", read_only=False) as image, load(image) as busy:
        kept: list[bytes] = []
        for turn in range(8):
            target = busy.count + 20
            while busy.count < target:
                sleep(0.001)
            old = image.node
            made = snapshot(image.graph, [NewOverlay(image, f"over{turn}", node_name=f"n{turn}")])
            assert image.node is made[0]
            assert old.read_only
            kept.append(content(Layer(old.filename, "qcow2")))
        written = busy.end()
        assert image.read(0, M) == written
        assert len(names(image)) == 9
        # What a layer held when it was covered, it still holds.
        for turn, before in enumerate(kept):
            assert content(Layer(f"over{turn - 1}" if turn else "disk", "qcow2")) == before
        image.flush()
    assert content(Layer("over7", "qcow2")) == written
    with byre.open("over7") as image:
        assert image.node.backing_name == os.path.abspath("over6")  # type: ignore[attr-defined]


def test_several_disks_all_or_none() -> None:
    make("a")
    make("b")
    graph = Graph()
    with byre.open("a", graph=graph, read_only=False) as one, byre.open("b", graph=graph, read_only=False) as two:
        one.write(0, b"a")
        snapshot(graph, [NewOverlay(one, "a1"), NewOverlay(two.node, "b1", options={"cluster_size": 4096})])
        assert names(one) == ["a1", "a"]
        assert names(two) == ["b1", "b"]
        assert two.node.cluster_size == 4096  # type: ignore[attr-defined]
        # The second is refused: the first is not taken either, and no file is left.
        (Path("there")).mkdir()
        for bad in (NewOverlay(two, "there"), NewOverlay(two, "x", mode="some-paths"), NewOverlay(two, "x", "raw"),
                    NewOverlay(two, "missing", mode="existing"), NewOverlay(one, "x")):  # fmt: skip
            with pytest.raises(ByreError):
                snapshot(graph, [NewOverlay(one, "a2"), bad])
            assert sorted(os.listdir()) == ["a", "a1", "b", "b1", "there"]
            assert names(one) == ["a1", "a"]
            assert len(graph.nodes) == 8
        one.write(0, b"A")
        with blockers.Blocking(graph, [two.node], "block device is in use by block job: mirror"), \
                pytest.raises(Busy, match="block job: mirror"):  # fmt: skip
            snapshot(graph, [NewOverlay(one, "a2"), NewOverlay(two, "b2")])
    assert content(Layer("a", "qcow2"))[:1] == b"a"
    assert content(Layer("a1", "qcow2"))[:1] == b"A"


def test_an_overlay_that_is_there() -> None:
    make("disk")
    make("over", below="disk")
    graph = Graph()
    with byre.open("disk", graph=graph, read_only=False) as image:
        image.write(0, b"old")
        disk = image.node
        append(graph, [(image, overlay(graph, "over"))])
        image.write(1, b"new")
        assert image.read(0, 5) == b"onew\0"
        assert content(Layer("disk", "qcow2"))[:3] == b"old"
        assert disk.read_only
    with byre.open("over") as image:
        assert image.read(0, 5) == b"onew\0"
    with byre.open("disk", read_only=False) as image:
        snapshot(image.graph, [NewOverlay(image, "over", mode="existing")])
        assert image.read(0, 5) == b"onew\0"


ENCRYPTED = {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.iter-time": 10}
SECRETS = {"s": b"pass"}


def test_an_encrypted_overlay() -> None:
    make("disk")
    with byre.open("disk", read_only=False) as image:
        image.write(0, b"old")
        with pytest.raises(NotFound, match="'s'"):
            snapshot(image.graph, [NewOverlay(image, "over", options=ENCRYPTED)])
        assert not Path("over").exists()
        snapshot(image.graph, [NewOverlay(image, "over", options=ENCRYPTED)], secrets=SECRETS)
        image.write(4096, b"secret" * 100)
        assert image.read(0, 3) == b"old"
    assert b"secret" not in Path("over").read_bytes()
    with byre.open("disk", read_only=False) as image:
        again = NewOverlay(image, "over", mode="existing", options={"encrypt.key-secret": "s"})
        snapshot(image.graph, [again], secrets=SECRETS)
        assert image.read(4096, 6) == b"secret"


def test_an_overlay_of_several_files_goes_with_all_of_them() -> None:
    make("disk")
    make("other")
    graph = Graph()
    with (
        byre.open("disk", read_only=False, graph=graph) as image,
        byre.open("other", read_only=False, graph=graph) as other,
    ):
        split = NewOverlay(image, "over.vmdk", "vmdk", options={"subformat": "twoGbMaxExtentSparse"})
        with pytest.raises(ByreError):
            snapshot(graph, [split, NewOverlay(other, "absent/over")])
        assert sorted(path.name for path in Path().iterdir()) == ["disk", "other"]


def test_refused_overlays() -> None:
    make("disk")
    make("small", M // 2)
    make("good")
    make("chained", below="disk")
    graph = Graph()
    with byre.open("disk", graph=graph, read_only=False) as image:

        def refuse(node: Node, kind: type[ByreError], match: str) -> None:
            with pytest.raises(kind, match=match):
                append(graph, [(image, node)])
            assert names(image) == ["disk"]
            graph.release(node)

        refuse(overlay(graph, "small"), InvalidArgument, "smaller")
        refuse(overlay(graph, "good", read_only=True), ReadOnly, "read-only")
        good = overlay(graph, "good")
        with Image(good, graph):
            refuse(good, Busy, "already in use")
        good = overlay(graph, "good")
        with pytest.raises(InvalidArgument, match="twice"):
            append(graph, [(image, good), (image, good)])
        Path("raw").write_bytes(bytes(M))
        with byre.open("raw", format="raw", graph=graph, read_only=False) as raw:
            node = raw.node
            graph._unlink(raw._root)
            with pytest.raises(NotSupported, match="does not support backing"):
                append(graph, [(image, node)])
            graph._link(raw._root)
        append(graph, [(image, good)])
        with pytest.raises(Busy, match="used as backing hd"):
            append(graph, [(chain.layers(image.node)[1], overlay(graph, "small"))])


def test_what_was_written_is_durable_first() -> None:
    make("disk")
    with byre.open("disk", read_only=False) as image:
        image.write(0, b"x" * 4096)
        failing = Failing(image.node.children["file"].node, "flush", 1, IOFailure("no"))
        with pytest.raises(IOFailure):
            snapshot(image.graph, [NewOverlay(image, "over")])
        failing.mend()
        assert names(image) == ["disk"]
        assert not Path("over").exists()
        with pytest.raises(IOFailure):
            image.close()


CHANGES: dict[str, Callable[[Image], object]] = {
    "snapshot": lambda image: snapshot(image.graph, [NewOverlay(image, "over")]),
    "shorter": lambda image: drop_intermediate(image.graph, *chain.layers(image.node)[1:3]),
}


@pytest.mark.parametrize("kind", list(CHANGES))
def test_users_are_not_held_back_while_what_they_wrote_goes_to_the_disk(kind: str) -> None:
    make("l0")
    for level in (1, 2):
        make(f"l{level}", below=f"l{level - 1}")
    with byre.open("l2", read_only=False) as image:
        image.write(0, b"x" * 4096)
        file = image.node.children["file"].node
        begun, go_on, flush = threading.Event(), threading.Event(), file.flush

        def slow() -> None:
            first = not begun.is_set()
            begun.set()
            if first:
                assert go_on.wait(20)
            flush()

        file.flush = slow  # type: ignore[method-assign]
        change = threading.Thread(target=CHANGES[kind], args=(image,))
        change.start()
        try:
            assert begun.wait(20)
            image.check_idle()
            with image._gate:
                assert not image._paused
        finally:
            go_on.set()
        change.join()
        assert len(names(image)) == {"snapshot": 4, "shorter": 2}[kind]
        assert image.read(0, 4096) == b"x" * 4096


# -- shorter chains -------------------------------------------------------------------------------


def four(folder: str = "") -> None:
    """``l0`` to ``l3``; those between hold nothing."""
    for level in range(4):
        make(f"{folder}l{level}", below=f"l{level - 1}" if level else "")
    with byre.open(f"{folder}l0", read_only=False) as image:
        image.write(0, b"base")


def test_drop_intermediate_under_load() -> None:
    four()
    with byre.open("l3", read_only=False) as image, load(image) as busy:
        layers = chain.layers(image.node)
        drop_intermediate(image.graph, layers[1], layers[3])
        written = busy.end()
        assert names(image) == ["l3", "l0"]
        assert layers[1].closed
        assert image.node.backing_name == "l0"  # type: ignore[attr-defined]
    assert content(Layer("l3", "qcow2")) == written


@pytest.mark.parametrize(("opened", "expected"), [("sub/l3", "l0"), ("abs", "abs")])
def test_derived_names(opened: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    four("sub/")
    path = str(tmp_path / "sub" / "l3") if opened == "abs" else opened
    with byre.open(path, read_only=False) as image:
        layers = chain.layers(image.node)
        # Of a layer further up as well, which is open read-only.
        drop_intermediate(image.graph, layers[2], layers[3])
        cut_short(image.graph, image.node, layers[3])
        assert image.node.backing_name == (expected if expected == "l0" else str(tmp_path / "sub" / "l0"))  # type: ignore[attr-defined]
        assert image.read(0, 4) == b"base"
    with byre.open("sub/l3") as image:
        assert image.read(0, 4) == b"base"
        assert len(names(image)) == 2
    with byre.open("sub/l2") as image:
        assert image.read(0, 4) == b"base"
        assert len(names(image)) == 2


def test_an_overlay_elsewhere_names_the_path(tmp_path: Path) -> None:
    four()
    (tmp_path / "sub").mkdir()
    make("sub/top", below="../l3")
    with byre.open("sub/top", read_only=False) as image:
        layers = chain.layers(image.node)
        assert layers[-1].filename == "sub/../l0"
        drop_intermediate(image.graph, layers[1], layers[-1])
    with byre.open("sub/top") as image:
        assert image.read(0, 4) == b"base"
        assert len(names(image)) == 2


def test_refused_changes_leave_header_and_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    four()
    with byre.open("l3", read_only=False) as image:
        layers = chain.layers(image.node)
        with pytest.raises(NoSpace):
            drop_intermediate(image.graph, layers[1], layers[3], backing_file="x" * 2000)
        with pytest.raises(InvalidArgument, match="is not below"):
            drop_intermediate(image.graph, layers[3], layers[1])
        with pytest.raises(InvalidArgument, match="not the backing file of another"):
            drop_intermediate(image.graph, layers[0], layers[2])
        # The header has changed, and then the permissions are refused.
        seen: list[str] = []

        def refuse(_change: live.Rewiring) -> None:
            seen.append(image.node.backing_name)  # type: ignore[attr-defined]
            raise Busy("not now")

        with monkeypatch.context() as patch:
            patch.setattr(live.Rewiring, "_check", refuse)
            with pytest.raises(Busy, match="not now"):
                drop_intermediate(image.graph, layers[1], layers[3])
        assert seen == ["l0"]
        assert names(image) == ["l3", "l2", "l1", "l0"]
        assert image.node.backing_name == "l2"  # type: ignore[attr-defined]
    with byre.open("l3") as image:
        assert names(image) == ["l3", "l2", "l1", "l0"]


def test_change_of_a_backing_file_name() -> None:
    four()
    with byre.open("l3", read_only=False) as image:
        layers = chain.layers(image.node)
        change_backing_file(image.graph, layers[1], "./l1")
        assert layers[1].read_only
        change_backing_file(image.graph, layers[0], os.path.abspath("l2"), "qcow2")
        assert names(image) == ["l3", "l2", "l1", "l0"]
        with blockers.Blocking(image.graph, layers[1:2], "job"), pytest.raises(Busy, match="job"):
            change_backing_file(image.graph, layers[1], "l1")
        with pytest.raises(InvalidArgument, match="without its format"):
            change_backing_file(image.graph, layers[3], "x")
        with pytest.raises(InvalidArgument, match="'qcow3'"):  # recorded, it would keep the image from being opened
            change_backing_file(image.graph, layers[0], "l2", "qcow3")
    with byre.open("l3") as image:
        assert names(image)[1] == os.path.abspath("l2")
        assert names(image)[2].endswith("/./l1")
        assert image.read(0, 4) == b"base"
