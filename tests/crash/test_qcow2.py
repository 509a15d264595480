"""qcow2 after a power cut: every state the disk could be in is judged, none may be bad.

With ``BYRE_CRASH_FULL=1`` all sequences of up to three operations run on every setup (an hour); otherwise all
of one operation and a fixed choice of the longer ones, some 30,000 states.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import byre.formats.qcow2.image as qcow2
from byre.image import Image
from crash.harness import Bad, Recording, Setup, Tally, judge
from crash.workloads import grow, pattern, sequences, setup, shrink, steps

FULL = bool(os.environ.get("BYRE_CRASH_FULL"))


class Case(NamedTuple):
    """:ivar chosen: how many sequences of more than one operation run
    :ivar at_least: states these give; fewer mean that the test has lost its teeth
    """

    cluster: int
    clusters: int
    chosen: int
    at_least: int
    options: dict[str, Any]


CASES = {
    "512-1bit": Case(512, 96, 150, 1500, {"refcount_bits": 1}),
    "512-16bit": Case(512, 96, 150, 1500, {}),
    "512-64bit": Case(512, 96, 150, 1500, {"refcount_bits": 64}),
    "512-empty": Case(512, 96, 100, 800, {"filled": False}),
    "512-backed": Case(512, 96, 150, 1500, {"backed": True}),
    "512-v2": Case(512, 96, 100, 1000, {"compat": "0.10"}),
    "512-zstd-backed": Case(512, 96, 40, 400, {"compression_type": "zstd", "backed": True}),
    "512-data-file": Case(512, 96, 80, 500, {"data_file": True}),
    "512-raw-data-file": Case(512, 96, 80, 300, {"data_file": True, "data_file_raw": True}),
    "512-lazy": Case(512, 96, 50, 300, {"lazy_refcounts": True}),
    "4k-1bit": Case(4096, 24, 30, 1000, {"refcount_bits": 1}),
    "4k-16bit": Case(4096, 24, 30, 1000, {}),
    "4k-64bit": Case(4096, 24, 30, 1000, {"refcount_bits": 64}),
    "64k-1bit": Case(65536, 12, 1, 150, {"refcount_bits": 1}),
    "64k-16bit": Case(65536, 12, 1, 150, {"backed": True}),
    "64k-64bit": Case(65536, 12, 1, 150, {"refcount_bits": 64}),
    "16k-extended": Case(16384, 12, 6, 500, {"extended_l2": True}),
    "16k-extended-backed": Case(16384, 12, 6, 500, {"extended_l2": True, "backed": True}),
}


def workloads(case: Case, chosen: int) -> list[tuple[str, ...]]:
    names = list(steps(case.cluster, case.clusters, compressed="data_file" not in case.options))
    every = sequences(names, 3)
    if FULL:
        return every
    short = [one for one in every if len(one) == 1]
    longer = [one for one in every if len(one) > 1]
    random.Random(f"{case.cluster} {case.options}").shuffle(longer)
    return short + longer[:chosen]


def run(case: Case, chosen: int, tally: Tally) -> None:
    begin = setup(case.cluster, case.clusters, **case.options)
    table = steps(case.cluster, case.clusters, compressed="data_file" not in case.options)
    for sequence in workloads(case, chosen):
        tally.run(Recording(begin, [(name, table[name]) for name in sequence]), "")


@pytest.mark.parametrize("name", CASES)
def test_no_state_is_bad(name: str) -> None:
    case = CASES[name]
    tally = Tally()
    run(case, case.chosen, tally)
    assert tally.judged >= case.at_least


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_the_peer_finds_no_damage_either(name: str, qemu_img: Callable[..., Any], tmp_path: Path) -> None:
    """``qemu-img check`` on a sample: exit status 0, or 3 for leaks."""
    case = CASES[name]
    size = case.cluster * case.clusters
    (tmp_path / "base").write_bytes(bytes(size))
    (tmp_path / "data").write_bytes(bytes(size))
    begin = setup(case.cluster, case.clusters, **case.options)
    table = steps(case.cluster, case.clusters, compressed="data_file" not in case.options)
    chooser = random.Random(name)
    for sequence in chooser.sample(workloads(case, case.chosen), 3):
        states = list(Recording(begin, [(step, table[step]) for step in sequence]).states())
        for state in chooser.sample(states, min(3, len(states))):
            content = state.disks["image"].to_bytes()
            (tmp_path / "image").write_bytes(content)
            # A dirty image says that its counts are wrong; they can be made right.
            mend = ("-r", "all") if content[7] == 3 and content[79] & 1 else ()
            done = qemu_img("check", "-f", "qcow2", *mend, "image", check=False, cwd=tmp_path)
            assert done.returncode in (0, 3), f"{sequence} {state.story}\n{done.stdout}{done.stderr}"


# -- sizes ----------------------------------------------------------------------------------------

RESIZES: dict[str, Sequence[str]] = {
    "grow": ("grow", "far", "flush"),
    "grow-within-cluster": ("grow-little", "tail"),
    "shrink": ("shrink", "overwrite"),
    "shrink-grow": ("shrink", "grow", "new"),
    "written-shrink": ("tail", "flush", "shrink"),
    "shrink-into-cluster": ("tail", "shrink-little", "grow-little"),
    "grow-much": ("new", "grow-much", "tail"),
}


@pytest.mark.parametrize("workload", RESIZES)
@pytest.mark.parametrize("options", [{}, {"backed": True}, {"compat": "0.10"}], ids=["plain", "backed", "v2"])
def test_resizing(workload: str, options: dict[str, Any]) -> None:
    """Content stays, and what was cut off never comes back."""
    cluster = 512

    def tail(image: Image, step: int) -> None:
        image.write(image.size - 3 * cluster - 700, pattern(step, 3 * cluster))

    table = steps(cluster, 96) | {
        "grow": grow(40, cluster),
        "grow-much": grow(1200, cluster),  # a larger L1 table
        "grow-little": grow(1, cluster),
        "shrink": shrink(40, cluster),
        "shrink-little": shrink(1, cluster),
        "tail": tail,
    }
    begin = setup(cluster, 96, **options)
    tally = Tally(thorough_every=1)
    tally.run(Recording(begin, [(name, table[name]) for name in RESIZES[workload]]), "")
    assert tally.judged > 4


def test_a_growing_refcount_table() -> None:
    """512-byte clusters with 64-bit counts: a table covers 2 MiB of file, and moves when that is full."""
    cluster, clusters = 512, 4400
    begin = setup(cluster, clusters, refcount_bits=64)

    def fill(image: Image, step: int) -> None:
        image.write(0, pattern(7, 3600 * cluster))

    def more(image: Image, step: int) -> None:
        image.write(3700 * cluster, pattern(step, 400 * cluster))

    with begin.open(begin.image, None) as image:
        fill(image, 0)
        node = image.graph.find(image.node.children["file"].node.name)
    full = Setup(node.to_bytes())  # type: ignore[attr-defined]
    recording = Recording(full, [("more", more), ("flush", steps(cluster, clusters)["flush"]), ("more", more)])
    assert any(entry.kind == "write" and entry.offset == 48 for entry in recording.log.entries)
    states = list(recording.states())
    assert len(states) > 100
    for number, state in enumerate(random.Random(1).sample(states, 60)):
        judge(recording, state, thorough=number % 10 == 0)


def test_refcount_blocks_that_go_with_a_shrink() -> None:
    """512-byte clusters with 64-bit counts: each block counts 64 clusters, and most of those are cut off."""
    cluster, clusters = 512, 1400
    begin = setup(cluster, clusters, refcount_bits=64)
    with begin.open(begin.image, None) as image:
        image.write(0, pattern(7, 1300 * cluster))
        node = image.graph.find(image.node.children["file"].node.name)
    full = Setup(node.to_bytes())  # type: ignore[attr-defined]

    def less(image: Image, step: int) -> None:
        image.resize(200 * cluster, shrink=True)

    table = steps(cluster, 200)
    recording = Recording(full, [("less", less), ("overwrite", table["overwrite"]), ("flush", table["flush"])])
    states = list(recording.states())
    assert len(states) > 60
    for number, state in enumerate(random.Random(1).sample(states, min(60, len(states)))):
        judge(recording, state, thorough=number % 10 == 0)


# -- the judge itself -----------------------------------------------------------------------------


def first_bad(chosen: int = 30) -> str:
    try:
        run(CASES["512-16bit"], chosen, Tally())
    except Bad as bad:
        return str(bad)
    return ""


def test_tables_written_before_reference_counts_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    good = qcow2.Qcow2Node.write_back

    def hasty(node: qcow2.Qcow2Node) -> None:
        node.mapping.l2.write_dirty()
        good(node)

    monkeypatch.setattr(qcow2.Qcow2Node, "write_back", hasty)
    assert "is counted 0 times and referred to 1 times" in first_bad()


def test_space_freed_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(node: qcow2.Qcow2Node, first: int, count: int) -> None:
        assert node.refcounts is not None
        node.refcounts.lower([(first, count)])

    monkeypatch.setattr(qcow2.Qcow2Node, "_free", hasty)
    assert first_bad()


def noop(node: qcow2.Qcow2Node) -> None:
    pass


def test_a_flush_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qcow2.Qcow2Node, "flush", noop)
    assert "hold none of versions" in first_bad()


def test_lost_bytes_are_noticed() -> None:
    begin = setup(512, 96)
    recording = Recording(begin, [("overwrite", steps(512, 96)["overwrite"])])
    recording.versions = [version.copy() for version in recording.versions]
    for version in recording.versions:
        version[5] = 7
    with pytest.raises(Bad, match=r"guest sectors \[5\]"):
        judge(recording, next(recording.states()))
