"""stream: the disk reads the same while writers go on, whatever happens to the job; at the end the chain is shorter."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from time import sleep

import pytest

import byre
from byre.errors import Busy, Cancelled, InvalidArgument, IOFailure, NoSpace, NotSupported
from byre.graph import chain
from byre.graph.graph import Graph
from byre.graph.node import Node
from byre.image import Image
from byre.io.extent import UNALLOCATED
from byre.jobs.job import Control, Job
from byre.jobs.states import State
from byre.jobs.stream import StreamJob
from support.chains import K, Layer, content, make_chain, make_layer, scribble
from support.failing import Failing
from support.load import load

M = K * K


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, size: int = M, below: str = "", **options: object) -> None:
    if below:
        options |= {"backing_file": below, "backing_fmt": "qcow2"}
    byre.create(name, "qcow2", size, options=options)


def write(name: str, offset: int, data: bytes) -> None:
    with byre.open(name, format="qcow2", read_only=False) as image:
        image.write(offset, data)


def sound(name: str) -> None:
    with byre.open(name, format="qcow2") as image:
        result = image.node.check(Control())  # type: ignore[attr-defined]
        assert (result.corruptions, result.leaks) == (0, 0), result.messages


def names(image: Image) -> list[str]:
    return [layer.filename for layer in chain.layers(image.node)]


def holds(node: Node, below: Node | None, unit: int = 512) -> list[bool]:
    """Per ``unit`` bytes, whether a layer above ``below`` holds something."""
    found = [False] * -(-node.size // unit)
    for extent in chain.extents(node, 0, node.size, base=below):
        if extent.kind != UNALLOCATED:
            found[extent.offset // unit : -(-extent.end // unit)] = [True] * (
                -(-extent.end // unit) - extent.offset // unit)  # fmt: skip
    return found


def free(graph: Graph) -> bool:
    """Nothing is blocked, frozen or tolerated any more."""
    return not any(
        node.blockers or any(edge.frozen or edge.tolerant for edge in node.children.values())
        for node in graph.nodes.values()
    )


@pytest.mark.parametrize("seed", range(50))
def test_random_chains(seed: int) -> None:
    """At rest: what is streamed is exactly what the layers above the base held."""
    chooser = random.Random(seed)
    old = make_chain(chooser, "old", chooser.randint(1, 4))
    make_layer(chooser, "top", old[-1])
    before = content(Layer("top", "qcow2"))
    files = {layer.name: Path(layer.name).read_bytes() for layer in old}
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        # A layer in the middle, or the active one; onto any below it, or none.
        level = chooser.randrange(len(layers) - 1) if chooser.random() < 0.4 else 0
        node = layers[level]
        at = chooser.randint(level + 1, len(layers))
        base = layers[at] if at < len(layers) else None
        expected = holds(node, base)
        least = min(layer.size for layer in layers[level + 1 :])
        unit = node.zero_unit  # type: ignore[attr-defined]
        if chooser.random() < 0.5:
            job = StreamJob(image.graph, node, bottom=layers[at - 1]) if at > level + 1 else StreamJob(
                image.graph, node, base)  # fmt: skip
        else:
            job = StreamJob(image.graph, node, base)
        job.execute()
        assert image.read(0, image.size) == before
        assert chain.layers(image.node) == layers[: level + 1] + layers[at:]
        assert free(image.graph)
        assert node.read_only == (level > 0)
        found = holds(node, base)
        for start in range(0, len(found), unit // 512):
            # A unit is copied whole where a part of it is held above the base; what lies behind the end of a layer
            # below need not be.
            wanted = any(expected[start : start + unit // 512])
            if start * 512 < least or not wanted:
                assert any(found[start : start + unit // 512]) == wanted
        changed = node.filename
    assert content(Layer("top", "qcow2")) == before
    for layer in (Layer("top", "qcow2"), *old):
        if layer.format == "qcow2":
            sound(layer.name)
        if layer.name not in (changed, "top"):
            assert Path(layer.name).read_bytes() == files[layer.name]


@pytest.mark.parametrize("seed", range(12))
def test_under_load(seed: int) -> None:
    chooser = random.Random(seed)
    options = chooser.choice(({}, {"cluster_size": 4096}, {"extended_l2": True}, {"compat": "0.10"}))
    size = 4 * M
    make("base", size - 70000)
    scribble(chooser, "base", "qcow2", 12)
    make("mid", size, "base", cluster_size=chooser.choice((512, 65536)))
    scribble(chooser, "mid", "qcow2", 12)
    make("top", size, "mid", **options)
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        base = chooser.choice((layers[2], None))
        with load(image, seed=seed) as busy:
            while busy.count < 30:
                sleep(0.001)
            job = StreamJob(image.graph, image.node, base, speed=chooser.choice((0, 8 * M)))
            job.start()
            while not job.join(0.02):
                if chooser.random() < 0.3:
                    with suppress(Busy):  # it may have come to its end
                        job.pause()
                        sleep(0.02)
                        job.resume()
            assert job.join(60)
            assert job.error is None
        written = busy.end()
        assert image.read(0, size) == written
        assert names(image) == (["top", "base"] if base else ["top"])
        assert free(image.graph)
    assert content(Layer("top", "qcow2")) == written
    sound("top")
    if base is None:
        Path("base").unlink()
        Path("mid").unlink()
        assert content(Layer("top", "qcow2")) == written


@pytest.mark.parametrize("seed", range(6))
def test_cancelled_and_begun_again_under_load(seed: int) -> None:
    chooser = random.Random(seed)
    size = 16 * M
    make("base", size)
    write("base", 0, chooser.randbytes(size))
    make("mid", size, "base", cluster_size=4096)
    scribble(chooser, "mid", "qcow2", 20)
    make("top", size, "mid")
    with byre.open("top", read_only=False) as image, load(image, seed=seed, pause=0.0005) as busy:
        while len(chain.layers(image.node)) > 1:
            job = StreamJob(image.graph, chain.layers(image.node)[chooser.choice((0, 0, -2))], speed=64 * M)
            job.start()
            if not job.join(chooser.random() * 0.1):
                with suppress(Busy):
                    job.cancel()
            assert job.join(20)
            assert job.error is None or isinstance(job.error, Cancelled)
            assert free(image.graph)
        written = busy.end()
        assert image.read(0, size) == written
    assert content(Layer("top", "qcow2")) == written
    sound("top")
    sound("mid")


def test_the_backing_name_is_derived_or_given(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    make("sub/base")
    make("sub/mid", below="base")
    make("sub/top", below="mid")
    make("sub/other", below="mid")
    with byre.open("sub/top", read_only=False) as image:
        StreamJob(image.graph, image.node, chain.layers(image.node)[2]).execute()
        assert image.node.backing_name == "base"  # type: ignore[attr-defined]
    with byre.open("sub/top") as image:
        assert names(image) == ["sub/top", "sub/base"]
        assert image.node.backing_format == "qcow2"  # type: ignore[attr-defined]
    given = str(tmp_path / "sub" / "base")
    with byre.open("sub/other", read_only=False) as image:
        StreamJob(image.graph, image.node, chain.layers(image.node)[2], backing_file=given).execute()
    with byre.open("sub/other") as image:
        assert names(image) == ["sub/other", given]
        with pytest.raises(InvalidArgument, match="no base is to remain"):
            StreamJob(image.graph, image.node, backing_file="x")
        assert free(image.graph)


def test_two_at_once_in_one_chain() -> None:
    make("l0", 8 * M)
    write("l0", 0, b"0" * 8 * M)
    for level in range(1, 5):
        make(f"l{level}", 8 * M, f"l{level - 1}")
        write(f"l{level}", level * M, bytes((48 + level,)) * M)
    before = content(Layer("l4", "qcow2"))
    with byre.open("l4", read_only=False) as image:
        layers = chain.layers(image.node)
        upper = StreamJob(image.graph, layers[0], layers[2], id="upper", speed=8 * M)
        with pytest.raises(Busy, match="is busy: block device is in use by block job: stream"):
            StreamJob(image.graph, layers[1], None)
        lower = StreamJob(image.graph, layers[2], None, id="lower", speed=16 * M)
        for job in (lower, upper):
            job.start()
        for job in (lower, upper):
            assert job.join(60)
            assert job.error is None
        assert names(image) == ["l4", "l2"]
        assert image.read(0, 8 * M) == before
        assert free(image.graph)
    assert content(Layer("l4", "qcow2")) == before


def test_only_what_is_needed_is_copied() -> None:
    make("base", 64 * M)
    write("base", 0, b"b" * 64 * M)
    make("mid", 64 * M, "base")
    write("mid", 3 * M, b"m" * M)
    make("top", 64 * M, "mid")
    write("top", 3 * M, b"t" * 65536)
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        StreamJob(image.graph, image.node, layers[2]).execute()
        assert layers[2].stats.byte_count[0] == 0
        assert layers[0].stats.byte_count[1] <= M
    # Zeroes stay zero clusters, holes stay holes.
    with byre.open("top", read_only=False) as image:
        image.write_zeroes(8 * M, 8 * M)
    make("over", 64 * M, "top")
    with byre.open("over", read_only=False) as image:
        StreamJob(image.graph, image.node, chain.layers(image.node)[2]).execute()
        assert image.node.allocated_size() < 3 * M
        assert image.read(8 * M, 8 * M) == bytes(8 * M)


def test_cancelled_it_leaves_the_chain() -> None:
    make("base", 32 * M)
    write("base", 0, b"b" * 32 * M)
    make("mid", 32 * M, "base")
    make("top", 32 * M, "mid")
    with byre.open("top", read_only=False) as image:
        node = chain.layers(image.node)[1]
        job = StreamJob(image.graph, node, speed=8 * M)
        assert not node.read_only
        job.start()
        while job.progress().offset == 0:
            sleep(0.01)
        job.cancel()
        assert job.join(20)
        assert isinstance(job.error, Cancelled)
        assert node.read_only
        assert names(image) == ["top", "mid", "base"]
        assert free(image.graph)
        held = holds(node, chain.layers(image.node)[2])
        assert any(held)
        assert not all(held)
        # What is there need not be copied again.
        again = StreamJob(image.graph, node)
        again.execute()
        assert image.read(0, 32 * M) == b"b" * 32 * M
    sound("mid")
    never = byre.open("top", read_only=False)
    job = StreamJob(never.graph, never.node)
    job.cancel()
    assert free(never.graph)
    never.close()


# -- errors ---------------------------------------------------------------------------------------


def two_layers(size: int = 8 * M) -> bytes:
    make("base", size)
    write("base", 0, bytes(random.Random(1).randbytes(size)))
    make("top", size, "base")
    return content(Layer("top", "qcow2"))


def file_of(node: Node) -> Node:
    return node.children["file"].node


def test_a_stopped_job_goes_on_after_the_cause_is_gone() -> None:
    before = two_layers()
    with byre.open("top", read_only=False) as image:
        failing = Failing(file_of(image.node), "write_from", 3, NoSpace("no space left"), least=128 * K)
        job = StreamJob(image.graph, image.node, on_error="enospc", auto_dismiss=False)
        told: list[tuple[str, str, str]] = []
        job.on_error_event = lambda job, operation, action, error: told.append((operation, action, str(error)))
        job.start()
        for _ in range(500):
            if job.state is State.PAUSED:
                break
            sleep(0.01)
        assert job.state is State.PAUSED
        assert job.io_status == "nospace"
        assert told[0][:2] == ("read", "stop")
        failing.mend()
        job.resume()
        assert job.join(30)
        assert job.error is None
        assert job.io_status == "ok"
        assert image.read(0, image.size) == before
        assert names(image) == ["top"]
    assert content(Layer("top", "qcow2")) == before
    sound("top")


def test_ignored_errors_fail_the_job_in_the_end() -> None:
    before = two_layers()
    with byre.open("top", read_only=False) as image:
        base = chain.layers(image.node)[1]
        failing = Failing(file_of(base), "read_into", 4, IOFailure("bad sector"), once=True)
        job = StreamJob(image.graph, image.node, on_error="ignore")
        with pytest.raises(IOFailure, match="bad sector"):
            job.execute()
        failing.mend()
        assert names(image) == ["top", "base"]
        held = holds(image.node, base)
        assert held.count(True) >= len(held) // 2
        assert image.read(0, image.size) == before
        assert free(image.graph)


@pytest.mark.parametrize("which", ["top", "base"])
@pytest.mark.parametrize("method", ["read_into", "write_from", "writev_from", "flush", "write_zeroes"])
def test_the_nth_request_fails(which: str, method: str) -> None:
    """Whichever it is: the image, opened again, reads the same over the chain that its header names."""
    before = two_layers(M)
    keep = Path("top").read_bytes()
    for at in range(1, 200):
        Path("top").write_bytes(keep)
        image = byre.open("top", read_only=False)
        node = chain.layers(image.node)[which == "base"]
        failing = Failing(file_of(node), method, at, IOFailure("injected"), once=True)
        error = None
        try:
            StreamJob(image.graph, image.node).execute()
        except IOFailure as failed:
            error = failed
        assert free(image.graph)
        calls = failing.calls
        failing.mend()
        if error is None:
            assert names(image) == ["top"]
            assert image.read(0, M) == before
        try:
            image.close()
        except IOFailure:
            assert error is not None
        assert content(Layer("top", "qcow2")) == before
        with byre.open("top") as found:
            if error is None:
                assert names(found) == ["top"]
        if calls < at:
            break
    else:
        pytest.fail("it never came to an end")


def test_refusals() -> None:
    two_layers(M)
    Path("flat").write_bytes(bytes(M))
    with byre.open("top", read_only=False) as image:
        base = chain.layers(image.node)[1]
        with pytest.raises(InvalidArgument, match="not in the backing chain"):
            StreamJob(image.graph, image.node, image.node)
        with pytest.raises(InvalidArgument, match="at the same time"):
            StreamJob(image.graph, image.node, base, bottom=base)
        with pytest.raises(InvalidArgument, match="unknown error policy 'never'"):
            StreamJob(image.graph, image.node, on_error="never")
        with pytest.raises(Busy):
            held = StreamJob(image.graph, image.node)
            try:
                image.resize(2 * M)
            finally:
                held.cancel()
        held = StreamJob(image.graph, image.node)
        for refused in (lambda: image.create_snapshot("s"), lambda: image.reopen(read_only=True)):
            with pytest.raises(Busy, match=r"the stream job|block job: stream"):
                refused()
        held.cancel()
        assert not image.read_only
        image.create_snapshot("s")
        image.delete_snapshot("s")
        assert free(image.graph)
    with byre.open("flat", format="raw", read_only=False) as image, pytest.raises(NotSupported):
        StreamJob(image.graph, image.node)


def test_nothing_to_do() -> None:
    make("alone")
    with byre.open("alone", read_only=False) as image:
        job: Job = StreamJob(image.graph, image.node)
        job.execute()
        assert names(image) == ["alone"]
        assert free(image.graph)
