"""Changing options and power cuts: whatever reaches the disk, the image is the old or the new one; every byte of the
disk and of its snapshots is what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from byre.errors import ByreError
from byre.formats.qcow2 import AMEND_OPTIONS, layout
from byre.image import Image
from byre.jobs.job import Control
from crash.harness import Bad, Recording, Setup, Step, judge
from crash.workloads import pattern, setup


def amend(**options: object) -> Step:
    def step(image: Image, _number: int) -> None:
        node: Any = image.node
        node.amend(AMEND_OPTIONS.parse(options, what="qcow2"), Control())

    return step


def rename(name: str, format: str) -> Step:
    def step(image: Image, _number: int) -> None:
        node: Any = image.node
        node.change_backing(name, format)

    return step


def empty(image: Image, _number: int) -> None:
    node: Any = image.node
    node.make_empty()


def write(image: Image, number: int) -> None:
    image.write(image.size // 2 + number % 8 * 512, pattern(number, 1500))


def flush(image: Image, _number: int) -> None:
    image.flush()


def with_snapshots(start: Setup, *, zeroes: bool = True) -> Setup:
    """``start`` with two snapshots, the second of which has zero clusters of its own."""
    image = start.open(start.image, None)
    node: Any = image.node
    below = image.graph.find(node.children["file"].node.name)
    cluster = node.cluster_size
    image.create_snapshot("one")
    if zeroes:
        image.write_zeroes(0, 3 * cluster)
        image.write_zeroes(8 * cluster, cluster)
    image.create_snapshot("two")
    image.write(cluster, pattern(55, cluster))
    if zeroes:
        image.write_zeroes(5 * cluster, cluster, unmap=True)
    image.close()
    return start._replace(image=below.to_bytes())  # type: ignore[attr-defined]


def snapshots_of(start: Setup, data: bytes) -> dict[str, bytes]:
    with start.open(data, None, read_only=True) as image:
        names = [shot.name for shot in image.node.snapshots]  # type: ignore[attr-defined]
    found = {}
    for name in names:
        with start.open(data, None, read_only=True) as image:
            image.node.load_snapshot(name)  # type: ignore[attr-defined]
            found[name] = image.read(0, image.size)
    return found


def run(start: Setup, steps: list[tuple[str, Step]], *, snapshots: bool) -> int:
    recording = Recording(start, steps)
    kept = snapshots_of(start, start.image) if snapshots else {}
    judged = 0
    seen: set[object] = set()
    for state in recording.states():
        identity = state.digest, recording.prefix(state)
        if identity in seen:
            continue
        seen.add(identity)
        judged += 1
        judge(recording, state, thorough=judged % 8 == 0)
        if kept:
            try:
                found = snapshots_of(start, state.disks["image"].to_bytes())
            except ByreError as error:
                raise Bad(f"{state.story}\na snapshot cannot be read: {error}") from error
            if found != kept:
                raise Bad(f"{state.story}\na snapshot has changed")
    return judged


CHANGES: dict[str, dict[str, object]] = {
    "down": {"compat": "0.10"},
    "wider": {"refcount_bits": 64},
    "narrower": {"refcount_bits": 4},
    "lazy": {"lazy_refcounts": "on"},
    "several": {"refcount_bits": 32, "lazy_refcounts": "on"},
}


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("cluster", [512, 4096])
@pytest.mark.parametrize("change", CHANGES)
def test_no_state_of_a_change_is_bad(change: str, cluster: int, backed: bool) -> None:
    start = with_snapshots(setup(cluster, 24, backed=backed))
    steps = [("write", write), ("amend", amend(**CHANGES[change])), ("write", write), ("flush", flush)]
    assert run(start, steps, snapshots=True) >= 12


@pytest.mark.parametrize("lazy", [False, True])
def test_no_state_of_going_down_after_writes_is_bad(lazy: bool) -> None:
    start = with_snapshots(setup(512, 24, lazy_refcounts=lazy))
    steps = [("write", write), ("flush", flush), ("amend", amend(compat="0.10")), ("flush", flush)]
    assert run(start, steps, snapshots=True) >= 12


@pytest.mark.parametrize("cluster", [512, 4096])
def test_no_state_of_going_up_is_bad(cluster: int) -> None:
    start = setup(cluster, 24, compat="0.10")
    steps = [("amend", amend(compat="1.1", refcount_bits=8, lazy_refcounts="on")), ("write", write), ("flush", flush)]
    assert run(start, steps, snapshots=False) >= 8


@pytest.mark.parametrize("cluster", [512, 1024, 65536])
def test_no_state_of_another_backing_name_is_bad(cluster: int) -> None:
    """The name is the old one or the new one, with its own format."""
    long = "a-long-name/" * (12 if cluster == 512 else 40)
    start = setup(cluster, 12, backed=True)
    changes: list[Callable[[Image, int], None]] = [rename(long, "raw"), rename("base", "qcow2"), rename("", "")]
    steps: list[tuple[str, Step]] = [("rename", change) for change in changes]
    wanted = {("base", b"raw"), (long, b"raw"), ("base", b"qcow2"), ("", None)}
    recording = Recording(start, steps)
    found = set()
    for state in recording.states():
        data = state.disks["image"].to_bytes()[:cluster]
        header = layout.decode_header(data)
        format = layout.find_extension(layout.decode_extensions(data, header), layout.EXTENSION_BACKING_FORMAT)
        found.add((layout.decode_backing_name(data, header), format))
    assert found == wanted or (cluster == 1024 and wanted <= found)


def test_no_state_of_emptying_is_bad() -> None:
    """The base holds what the overlay held, as after a commit: a reader never sees anything else."""
    start = setup(512, 48, backed=True)
    with start.open(start.image, None) as image:
        base = image.read(0, image.size)
    start = start._replace(base=base)
    assert run(start, [("empty", empty), ("flush", flush)], snapshots=False) >= 8


@pytest.mark.parametrize("cluster", [512, 4096])
@pytest.mark.parametrize("backed", [False, True])
def test_no_state_of_lazy_counts_and_snapshots_is_bad(cluster: int, backed: bool) -> None:
    """Each leaves the dirty bit to the other as it found it."""
    start = setup(cluster, 24, lazy_refcounts=True, backed=backed)
    steps: list[tuple[str, Step]] = [
        ("write", write),
        ("flush", flush),
        ("snapshot", lambda image, number: void(image.create_snapshot(f"s{number}"))),
        ("write", write),
        ("zero", lambda image, _number: image.write_zeroes(0, 4 * cluster)),
        ("flush", flush),
        ("snapshot", lambda image, number: void(image.create_snapshot(f"s{number}"))),
        ("discard", lambda image, _number: image.discard(0, 8 * cluster)),
        ("flush", flush),
        ("delete", lambda image, _number: image.delete_snapshot("s2")),
        ("write", write),
    ]
    assert run(start, steps, snapshots=False) >= 40


def void(_result: object) -> None:
    pass
