"""Chains and power cuts: at every moment of a rebase and of a commit the overlay reads what it read, over the backing
file that its header names; when commit says that it is done, the base has everything.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest

import byre
from byre.filters.replay import CrashState, WriteLog, crash_states
from byre.filters.writelog import LogNode
from byre.graph import chain
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.commit import CommitJob
from byre.jobs.job import Control
from byre.jobs.rebase import NewBacking, RebaseJob
from byre.protocols.memory import MemoryNode
from support.images import detached, new_image, stack
from support.walk import walk

DONE = "done"


class Disk(NamedTuple):
    """An image in memory.

    :ivar backing: the name of the disk below, "" at the base
    """

    name: str
    data: bytes
    backing: str = ""
    format: str = "qcow2"


def filled(name: str, size: int, seed: int, *, below: Sequence[Disk] = (), **options: object) -> Disk:
    """An image with bytes, zeroes and compressed clusters at random, over the first of ``below``."""
    if below:
        options |= {"backing_file": below[0].name, "backing_fmt": below[0].format}
    file = new_image("qcow2", size, **options)
    disk = Disk(name, detached(file).to_bytes(), below[0].name if below else "")
    chooser = random.Random(seed)
    with opened([disk, *below], read_only=False) as image:
        cluster = image.node.cluster_size  # type: ignore[attr-defined]
        for number in range(6):
            offset = chooser.randrange(size // 512) * 512
            length = min(chooser.choice((512, cluster, 2 * cluster + 512)), size - offset)
            image.write(offset, chooser.randbytes(length))
            if number % 3 == 1:
                image.write_zeroes(offset // 2, length)
        at = size // 2 // cluster * cluster
        image.write_compressed(at, chooser.randbytes(60) + bytes(min(cluster, size - at) - 60))
        node = image.graph.find(image.node.children["file"].node.name)
    assert isinstance(node, MemoryNode)
    return disk._replace(data=node.to_bytes())


def opened(disks: Sequence[Disk], *, read_only: bool = True, log: WriteLog | None = None,
           graph: Graph | None = None) -> Image:  # fmt: skip
    """The first of ``disks`` over the second and so on; writes to each are logged under its name."""
    graph = graph or Graph()
    spec: dict[str, object] | None = None
    for disk in reversed(disks):
        filters = [LogNode(log, disk=disk.name)] if log is not None else []
        top = stack(graph, MemoryNode(disk.data), filters)
        spec = {"driver": disk.format, "file": top.name, **({"backing": spec} if spec else {})}
    assert spec is not None
    if "backing" not in spec and disks[0].format != "raw":
        spec["backing"] = None
    return byre.open(spec, read_only=read_only, graph=graph)


def after(state: CrashState, disks: Sequence[Disk]) -> list[Disk]:
    return [
        disk._replace(data=state.disks[disk.name].to_bytes()) if disk.name in state.disks else disk for disk in disks
    ]


def sound(disk: Disk, story: str) -> None:
    if disk.format == "qcow2" and not (disk.data[7] == 3 and disk.data[79] & 1):  # dirty: counts are made anew
        found = walk(disk.data)
        assert not found.damage, f"{story}\n{disk.name}: {found.damage[:5]}"
        assert not found.copied, f"{story}\n{disk.name}: {found.copied[:5]}"


def named(data: bytes) -> str:
    """The backing file that the image names."""
    with opened([Disk("top", data)]) as image:
        return str(image.node.backing_name)  # type: ignore[attr-defined]


def usable(disks: Sequence[Disk], story: str) -> None:
    """The image can be written to, and then reads what it read but for what was written."""
    with opened(disks, read_only=False) as image:
        expected = bytearray(image.read(0, image.size))
        assert image.node.check(Control()).corruptions == 0, story  # type: ignore[attr-defined]
        for offset in range(100, image.size, image.size // 4):
            part = b"after the crash"[: image.size - offset]
            image.write(offset, part)
            expected[offset : offset + len(part)] = part
        assert image.read(0, image.size) == expected, story


# -- rebase ---------------------------------------------------------------------------------------

REBASES = [
    # cluster size and options of the overlay, onto what, compressed
    ({"cluster_size": 512}, "new", False),
    ({"cluster_size": 512}, "", False),
    ({"cluster_size": 4096, "lazy_refcounts": True}, "new", False),
    ({"cluster_size": 4096, "refcount_bits": 64}, "", True),
    ({"cluster_size": 4096, "compat": "0.10"}, "new", False),
    ({"cluster_size": 16384, "extended_l2": True}, "new", True),
    ({"cluster_size": 16384, "extended_l2": True}, "", False),
]


@pytest.mark.parametrize(("options", "onto", "compress"), REBASES)
def test_rebase(options: dict[str, object], onto: str, compress: bool) -> None:
    cluster = int(str(options["cluster_size"]))
    size = cluster * 24 + 1536
    lowest = filled("lowest", size - cluster, 1, cluster_size=1024)
    old = filled("old", size - 1024, 2, below=[lowest], cluster_size=512)
    new = filled("new", size, 3, cluster_size=512)
    top = filled("top", size, 4, below=[old, lowest], **options)
    chains = {"old": [old, lowest], "new": [new], "": []}
    with opened([top, old, lowest]) as image:
        before = image.read(0, size)

    log = WriteLog()
    graph = Graph()
    with opened([top, old, lowest], read_only=False, log=log, graph=graph) as image:
        below = opened([new], graph=graph, log=log) if onto else None
        RebaseJob(image, NewBacking(onto, "qcow2" if onto else ""), below, compress=compress).execute()
        log.mark(DONE)
        assert image.read(0, size) == before
        if below is not None:
            below.close()
    assert not {entry.disk for entry in log.entries if entry.kind == "write"} - {"top"}

    names, count = set(), 0
    for state in crash_states(log):
        count += 1
        story = state.story
        after_top = after(state, [top])[0]
        sound(after_top, story)
        name = named(after_top.data)
        names.add(name)
        assert name == onto or DONE not in state.marks, story
        disks = [after_top, *chains[name]]
        with opened(disks) as image:
            assert image.read(0, image.size) == before, f"{story}, over {name!r}"
        if count % 20 == 0:
            usable(disks, story)
    assert names == {"old", onto}
    assert count > 40


# -- commit ---------------------------------------------------------------------------------------

COMMITS = [
    # cluster size and options of overlay and base, layers between, shorter base, emptied
    ({"cluster_size": 512}, {"cluster_size": 512}, False, False, True),
    ({"cluster_size": 4096}, {"cluster_size": 512, "refcount_bits": 64}, False, True, True),
    ({"cluster_size": 512}, {"cluster_size": 4096}, True, True, False),
    ({"cluster_size": 4096, "lazy_refcounts": True}, {"cluster_size": 4096, "lazy_refcounts": True}, False, True, True),
    ({"cluster_size": 4096, "compat": "0.10"}, {"cluster_size": 4096, "compat": "0.10"}, False, True, True),
    ({"cluster_size": 16384, "extended_l2": True}, {"cluster_size": 4096}, True, False, False),
    ({"cluster_size": 4096}, {}, False, True, True),
]


@pytest.mark.parametrize(("options", "base_options", "between", "shorter", "empty"), COMMITS)
def test_commit(options: dict[str, object], base_options: dict[str, object], between: bool, shorter: bool,
                empty: bool) -> None:  # fmt: skip
    cluster = int(str(options["cluster_size"]))
    size = cluster * 16 + 1536
    base_size = size - 2 * cluster - 512 if shorter else size + 1024
    if base_options:
        lowest = [filled("lowest", size, 1, cluster_size=1024)]
        base = filled("base", base_size, 2, below=lowest, **base_options)
    else:
        lowest = []
        base = Disk("base", random.Random(5).randbytes(base_size), "", "raw")
    middle = [filled("middle", size - 512, 3, below=[base, *lowest], cluster_size=512)] if between else []
    top = filled("top", size, 4, below=[*middle, base, *lowest], **options)
    disks = [top, *middle, base, *lowest]
    with opened(disks) as image:
        before = image.read(0, size)

    log = WriteLog()
    with opened(disks, read_only=False, log=log) as image:
        target = chain.layers(image.node)[1 + len(middle)]
        CommitJob(image, target, empty=empty).execute()
        log.mark(DONE)
        assert image.read(0, size) == before
    assert not {entry.disk for entry in log.entries if entry.kind == "write"} - {"top", "base"}

    count = 0
    for state in crash_states(log):
        count += 1
        story = state.story
        found = after(state, disks)
        for disk in found:
            sound(disk, story)
        with opened(found) as image:
            assert image.read(0, size) == before, story
        if DONE in state.marks:
            with opened(found[1 + len(middle) :]) as image:
                assert image.read(0, size) == before, story
        if count % 20 == 0:
            usable(found, story)
    assert count > 40
