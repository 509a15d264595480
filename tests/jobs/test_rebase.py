"""rebase: the overlay reads the same over its new backing file, and holds no more than it must."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import byre
from byre.errors import ByreError, InvalidArgument, NoSpace, NotSupported
from byre.graph import chain
from byre.graph.layers import find_layer
from byre.image import Image
from byre.io.extent import COMPRESSED
from byre.jobs.rebase import NewBacking, RebaseJob
from support.chains import K, Layer, content, held, make_chain, make_layer

M = K * K


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rebase(top: str, new: Layer | None, *, compress: bool = False) -> None:
    """As the command does it."""
    with byre.open(top, format="qcow2", read_only=False, discard="ignore") as overlay:
        below = None if new is None else byre.open(new.name, format=new.format, graph=overlay.graph)
        RebaseJob(overlay, NewBacking(*new) if new else NewBacking(), below, compress=compress).execute()
        if below is not None:
            below.close()
        # The open image goes on over the new file.
        assert [node.filename for node in chain.layers(overlay.node)][1:2] == ([new.name] if new else [])


def make(name: str, size: int = M, below: str = "", **options: object) -> Layer:
    if below:
        options |= {"backing_file": below, "backing_fmt": "qcow2"}
    byre.create(name, "qcow2", size, options=options)
    return Layer(name, "qcow2")


def write(name: str, offset: int, data: bytes) -> None:
    with byre.open(name, format="qcow2", read_only=False) as image:
        image.write(offset, data)


@pytest.mark.parametrize("seed", range(60))
def test_random_chains(seed: int) -> None:
    chooser = random.Random(seed)
    old = make_chain(chooser, "old", chooser.randint(1, 3))
    top = make_layer(chooser, "top", chooser.choice((*old, old[-1], None)))
    new: Layer | None = chooser.choice((None, chooser.choice(old), Layer("", "")))
    if new is not None and not new.name:
        new = make_chain(chooser, "new", chooser.randint(1, 2), chooser.choice((None, *old)))[-1]
    with byre.open("top") as image:
        unit: int = image.node.zero_unit  # type: ignore[attr-defined]
        cluster: int = image.node.cluster_size  # type: ignore[attr-defined]
    before, had = content(top), held("top", unit)
    compress = chooser.random() < 0.3
    rebase("top", new, compress=compress)
    assert content(top) == before
    with byre.open("top") as image:
        assert image.node.check(byre.jobs.job.Control()).corruptions == 0  # type: ignore[attr-defined]
    # What is held now was held before or reads otherwise in the new backing file.
    below = b"" if new is None else content(new)
    below = below[: len(before)].ljust(len(before), b"\0")
    grain = cluster if compress else unit
    for index, now in enumerate(held("top", unit)):
        start = index * unit // grain * grain
        differs = before[start : start + grain] != below[start : start + grain]
        plain = before[index * unit : (index + 1) * unit] != below[index * unit : (index + 1) * unit]
        assert now >= (had[index] or plain), index
        assert now <= (had[index] or differs), index


def test_what_neither_holds_is_not_read() -> None:
    make("a", 64 * M)
    make("b", 64 * M, below="a")
    make("c", 64 * M, below="a")
    make("top", 64 * M, below="b")
    write("a", 0, b"a" * 4 * M)
    write("b", 10 * M, b"b" * 300 * K)
    write("c", 20 * M, b"c" * 300 * K)
    with byre.open("top", read_only=False) as overlay:
        below = byre.open("c", graph=overlay.graph)
        before = content(Layer("c", "qcow2"))
        RebaseJob(overlay, NewBacking("c", "qcow2"), below).execute()
        read = sum(node.stats.byte_count[0] for node in overlay.graph.nodes.values() if node.driver == "qcow2")
        assert overlay.read(20 * M, 300 * K) == bytes(300 * K)
        assert overlay.read(10 * M, 300 * K) == b"b" * 300 * K
        below.close()
    # a is below both: what comes from it in both chains needs no look.
    assert 0 < read < 2 * M
    assert before[20 * M :][: 300 * K] == b"c" * 300 * K
    with byre.open("top", backing=False) as alone:
        extents = [extent for extent in alone.extents() if extent.kind != 2]
    assert [(e.offset, e.length, e.kind) for e in extents] == [(10 * M, 320 * K, 0), (20 * M, 320 * K, 1)]


@pytest.mark.parametrize("sizes", [(M, 2 * M, 3 * M), (3 * M, 2 * M, M), (M, 3 * M, M), (2 * M, M, 3 * M)])
def test_shorter_and_longer(sizes: tuple[int, int, int]) -> None:
    for name, size in zip(("old", "new"), sizes, strict=False):
        make(name, size)
        write(name, 0, name.encode() * (size // 3))
    make("top", sizes[2], below="old")
    top = Layer("top", "qcow2")
    before = content(top)
    rebase("top", Layer("new", "qcow2"))
    assert content(top) == before
    rebase("top", None)
    assert content(top) == before
    rebase("top", Layer("old", "qcow2"))
    assert content(top) == before


def test_compressed_beside_subclusters() -> None:
    make("base")
    write("base", 0, b"b" * M)
    make("top", below="base", extended_l2=True, cluster_size=64 * K)
    write("top", 2 * K, b"t" * K)  # a subcluster of the first cluster
    before = content(Layer("top", "qcow2"))
    rebase("top", None, compress=True)
    assert content(Layer("top", "qcow2")) == before
    with byre.open("top") as image:
        kinds = [extent.kind for extent in image.extents()]
        assert kinds[0] != COMPRESSED
        assert set(kinds[1:]) == {COMPRESSED}


def test_a_layer_of_the_chain_is_not_opened_twice() -> None:
    make("a")
    make("b", below="a")
    make("top", below="b")
    write("b", 0, b"b" * 100)
    with byre.open("top", read_only=False) as overlay:
        layer = find_layer(overlay.node, "a")
        assert layer is chain.layers(overlay.node)[2]
        with Image(layer, overlay.graph) as below:
            RebaseJob(overlay, NewBacking("a", "qcow2"), below).execute()
        assert [node.filename for node in chain.layers(overlay.node)] == ["top", "a"]
        assert overlay.read(0, 100) == b"b" * 100
        overlay.write(M - 10, b"x" * 10)
        assert "b" not in {node.filename for node in overlay.graph.nodes.values()}


def test_refusals_before_anything_is_written() -> None:
    make("base", cluster_size=512)
    make("top", below="base", cluster_size=512)
    byre.create("plain", "raw", M)
    write("base", 0, b"b" * M)
    before = Path("top").read_bytes()
    too_long = "./" * 300 + "base"

    def refused(kind: type[ByreError], name: str, backing: NewBacking, format: str = "qcow2", **more: bool) -> str:
        with byre.open(name, format=format, read_only=False) as image, pytest.raises(kind) as caught:
            below = byre.open("base", graph=image.graph) if backing.name and not more.get("unsafe") else None
            try:
                RebaseJob(image, backing, below, **more).execute()
            finally:
                if below is not None:
                    below.close()
        return str(caught.value)

    assert "format must be specified" in refused(InvalidArgument, "top", NewBacking("base"))
    assert "unknown driver 'qcow3'" in refused(InvalidArgument, "top", NewBacking("base", "qcow3"))
    assert "base" in refused(NoSpace, "top", NewBacking(too_long, "qcow2"))
    refused(NoSpace, "top", NewBacking(too_long, "qcow2"), unsafe=True)
    refused(NotSupported, "plain", NewBacking("base", "qcow2"), "raw")
    refused(NotSupported, "plain", NewBacking(), "raw", compress=True)
    with byre.open("top", read_only=False) as image:
        itself = Image(image.node, image.graph)
        with itself, pytest.raises(InvalidArgument, match="the image itself"):
            RebaseJob(image, NewBacking("top", "qcow2"), itself)
    assert Path("top").read_bytes() == before


def test_unsafe_changes_the_name_only() -> None:
    make("base")
    make("other")
    write("base", 0, b"b" * M)
    make("top", below="base")
    with byre.open("top", read_only=False, backing=False) as overlay:
        RebaseJob(overlay, NewBacking("other", "qcow2"), unsafe=True).execute()
    assert content(Layer("top", "qcow2")) == bytes(M)
    with byre.open("top", read_only=False, backing=False) as overlay:
        RebaseJob(overlay, NewBacking(), unsafe=True).execute()
    with byre.open("top") as image:
        assert len(chain.layers(image.node)) == 1
    with byre.open("top", read_only=False, backing=False) as overlay:
        RebaseJob(overlay, NewBacking("base", "qcow2"), unsafe=True).execute()
    assert content(Layer("top", "qcow2")) == b"b" * M


def test_cancelled_midway_nothing_is_lost() -> None:
    make("base", 32 * M)
    write("base", 0, b"b" * 32 * M)
    make("top", 32 * M, below="base")
    with byre.open("top", read_only=False) as overlay:
        job = RebaseJob(overlay, NewBacking(), speed=8 * M)
        job.start()
        while job.control.done == 0:
            assert not job.join(0.01)
        job.cancel()
        assert job.join(20)
        assert isinstance(job.error, byre.errors.Cancelled)
        assert len(chain.layers(overlay.node)) == 2
    assert content(Layer("top", "qcow2")) == b"b" * 32 * M
