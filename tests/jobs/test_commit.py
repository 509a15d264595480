"""commit: the base reads as the image did, the image reads as before, and nothing else changes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import byre
from byre.errors import AccessDenied, ByreError, InvalidArgument, ReadOnly
from byre.graph import chain
from byre.io.extent import UNALLOCATED
from byre.jobs.commit import CommitJob
from byre.jobs.job import Control
from support.chains import K, Layer, content, held, make_chain, make_layer

M = K * K


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def commit(top: str, level: int = 1, **more: bool) -> None:
    with byre.open(top, format="qcow2", read_only=False) as image:
        base = chain.layers(image.node)[level]
        CommitJob(image, base, **more).execute()
        assert base.read_only


def make(name: str, size: int = M, below: str = "", below_format: str = "qcow2", **options: object) -> Layer:
    if below:
        options |= {"backing_file": below, "backing_fmt": below_format}
    byre.create(name, "qcow2", size, options=options)
    return Layer(name, "qcow2")


def write(name: str, offset: int, data: bytes) -> None:
    with byre.open(name, format="qcow2", read_only=False) as image:
        image.write(offset, data)


@pytest.mark.parametrize("seed", range(60))
def test_random_chains(seed: int) -> None:
    chooser = random.Random(seed)
    old = make_chain(chooser, "old", chooser.randint(1, 3))
    top = make_layer(chooser, "top", old[-1])
    level = chooser.randint(1, len(old))
    base = old[-level]
    before, base_before = content(top), content(base)
    files = {layer.name: Path(layer.name).read_bytes() for layer in old}
    empty = level == 1 and chooser.random() < 0.7
    commit("top", level, empty=empty)
    assert content(top) == before
    # A longer base keeps what lies behind the end of the image.
    assert content(base) == before + base_before[len(before) :]
    for layer in (top, *old):
        if layer.format == "qcow2":
            with byre.open(layer.name) as image:
                assert image.node.check(Control()).corruptions == 0  # type: ignore[attr-defined]
    assert not (empty and any(held("top", 512)))
    for layer in old:
        if layer is not base:
            assert Path(layer.name).read_bytes() == files[layer.name]


def test_the_base_grows_and_hides_what_is_below() -> None:
    make("lowest", 3 * M)
    write("lowest", 0, b"l" * 3 * M)
    make("base", M, below="lowest")
    make("top", 2 * M + 512, below="base")
    write("top", 5, b"top")
    before = content(Layer("top", "qcow2"))
    assert before[M:] == bytes(M + 512)
    commit("top")
    assert content(Layer("base", "qcow2")) == before == content(Layer("top", "qcow2"))


def test_a_raw_base_of_odd_length() -> None:
    Path("base").write_bytes(b"b" * 70001)
    make("top", 70144, below="base", below_format="raw")
    write("top", 69000, b"t" * 1144)
    before = content(Layer("top", "qcow2"))
    commit("top")
    assert Path("base").read_bytes() == before == b"b" * 69000 + b"t" * 1144


def test_only_what_is_above_the_base_moves() -> None:
    make("lowest", 16 * M)
    write("lowest", 0, b"l" * 16 * M)
    make("base", 16 * M, below="lowest")
    make("top", 16 * M, below="base")
    write("top", M, b"t" * M)
    with byre.open("top", read_only=False) as image:
        layers = chain.layers(image.node)
        CommitJob(image, layers[1], empty=False).execute()
        assert layers[2].stats.byte_count[0] == 0
        assert layers[1].stats.byte_count[1] == M
    with byre.open("base", backing=False) as base:
        data = [(extent.offset, extent.length) for extent in base.extents() if extent.kind != UNALLOCATED]
    assert data == [(M, M)]


def test_an_open_image_goes_on() -> None:
    make("base", M)
    make("top", M, below="base")
    write("top", 0, b"1" * 100)
    with byre.open("top", read_only=False) as image:
        base = chain.layers(image.node)[1]
        CommitJob(image, base).execute()
        assert image.read(0, 100) == b"1" * 100
        image.write(0, b"2" * 50)
        CommitJob(image, base).execute()
        image.write_zeroes(10, 10)
        assert image.read(0, 100) == b"2" * 10 + bytes(10) + b"2" * 30 + b"1" * 50
    assert content(Layer("base", "qcow2"))[:100] == b"2" * 50 + b"1" * 50


def test_refusals() -> None:
    make("base", M)
    make("top", M, below="base")
    with byre.open("top", read_only=False) as image:
        with pytest.raises(InvalidArgument, match="not below"):
            CommitJob(image, image.node)
        layers = chain.layers(image.node)
        layers[0].backing_format = ""  # type: ignore[attr-defined]
        with pytest.raises(AccessDenied, match="not recorded"):
            CommitJob(image, layers[1])
    with byre.open("top") as image, pytest.raises(ReadOnly):
        CommitJob(image, chain.layers(image.node)[1])
    write("top", 0, b"t")
    Path("base").chmod(0o444)
    with byre.open("top", read_only=False) as image:
        base = chain.layers(image.node)[1]
        with byre.open("base"), pytest.raises(ByreError, match="for writing"):
            CommitJob(image, base).execute()
        assert image.read(0, 1) == b"t"
        assert base.read_only


def test_a_limited_job_can_be_cancelled() -> None:
    make("base", 32 * M)
    make("top", 32 * M, below="base")
    write("top", 0, b"t" * 32 * M)
    with byre.open("top", read_only=False) as image:
        base = chain.layers(image.node)[1]
        job = CommitJob(image, base, speed=8 * M)
        job.start()
        while job.control.done == 0:
            assert not job.join(0.01)
        job.cancel()
        assert job.join(20)
        assert base.read_only
    assert content(Layer("top", "qcow2")) == b"t" * 32 * M
