"""Every child call fails in turn: no damage, no hang, no false success, nothing left behind.

The n-th request to the file fails, for n = 1, 2, ... until the workload passes without a failure. A failed write
may have had no effect, half of it or all of it; a failed flush may have flushed or not.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from byre.errors import ByreError, IOFailure, NoSpace
from byre.filters.faults import FaultNode
from byre.formats.base import FormatNode
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from crash.workloads import pattern, setup, squeezable
from support.images import detached, new_image, open_image
from support.walk import walk

CLUSTER, CLUSTERS = 512, 96
SIZE = CLUSTER * CLUSTERS

Action = Callable[[Image], None]

ACTIONS: dict[str, Action] = {
    "new": lambda image: image.write(20 * CLUSTER + 100, pattern(1, 3 * CLUSTER)),
    "far": lambda image: image.write(90 * CLUSTER, pattern(2, CLUSTER)),
    "overwrite": lambda image: image.write(100, pattern(3, 800)),
    "over-compressed": lambda image: image.write(3 * CLUSTER + 10, pattern(4, 2 * CLUSTER)),
    "zero": lambda image: image.write_zeroes(100, 3 * CLUSTER, unmap=True),
    "zero-keep": lambda image: image.write_zeroes(0, 2 * CLUSTER, fua=True),
    "discard": lambda image: image.discard(0, 6 * CLUSTER),
    "compress": lambda image: image.write_compressed(30 * CLUSTER, squeezable(5, CLUSTER)),
    "compress-over": lambda image: image.write_compressed(0, squeezable(6, CLUSTER)),
    "fua": lambda image: image.write(40 * CLUSTER, pattern(7, 2000), fua=True),
    "grow": lambda image: image.resize(image.size + 4000 * CLUSTER),
    "shrink": lambda image: image.resize(10 * CLUSTER + 512, shrink=True),
    "flush": lambda image: image.flush(),
}


def check_idle(image: Image) -> None:
    node = image.node
    assert isinstance(node, FormatNode)
    assert node.inflight.claim_count == 0
    assert node.inflight.ticket_count == 0
    assert node.lock.acquire(timeout=1)
    node.lock.release()


def run_failing(
    begin: bytes, base: bytes | None, action: Action, nth: int, kind: str, effect: str, number: int
) -> bool:
    """One run with the ``nth`` request failing; False if the workload needed fewer."""
    memory = MemoryNode(begin)
    graph = Graph()
    fault = FaultNode()
    backing = None
    if base is not None:
        from support.images import layer

        backing = layer(graph, MemoryNode(base), "raw")
    image = open_image(memory, filters=[fault], graph=graph, backing=backing)
    before = image.read(0, image.size)
    fault.fail(kind, nth, number, effect=effect)
    failure: ByreError | None = None
    after = wanted(begin, base, action)
    try:
        action(image)
        image.flush()
    except ByreError as error:
        failure = error
    hit = fault.pending_failures == 0
    if failure:
        assert hit
        assert failure.errno == number, failure
    check_idle(image)
    fault.heal()
    stopped = image.node.failure is not None  # type: ignore[attr-defined]
    if stopped:
        assert failure, "a request succeeded although metadata could not be written"
        with pytest.raises(IOFailure):
            image.read(0, 512)
        with pytest.raises(ByreError):
            image.write(0, b"x")
    elif not failure:
        assert image.read(0, image.size) == after
    close_quietly(image, stopped)
    verify(memory, base, before, after, exact=not failure and not stopped)
    return hit


def close_quietly(image: Image, stopped: bool) -> None:
    try:
        image.close()
    except ByreError:
        assert stopped, "closing failed although nothing was wrong any more"


def verify(memory: MemoryNode, base: bytes | None, before: bytes, after: bytes, *, exact: bool) -> None:
    """The file is an image without damage, and each sector is as before or as wanted."""
    findings = walk(memory.to_bytes())
    assert not findings.damage, findings.damage
    assert not findings.copied, findings.copied
    if exact:
        assert not findings.leaks, findings.leaks
    graph = Graph()
    backing = None
    if base is not None:
        from support.images import layer

        backing = layer(graph, MemoryNode(base), "raw")
    with open_image(detached(memory), graph=graph, backing=backing, read_only=True) as image:
        found = image.read(0, image.size)
    if exact:
        assert found == after
        return
    assert len(found) in (len(before), len(after))
    length = max(len(before), len(after))
    old, new, now = (np.frombuffer(one.ljust(length, b"\0"), np.uint8)[: len(found)] for one in (before, after, found))
    wrong = np.flatnonzero((now != old) & (now != new))
    assert not len(wrong), f"bytes {wrong[:8].tolist()} are neither as before nor as wanted"


_wanted: dict[tuple[bytes, bytes | None, int], bytes] = {}


def wanted(begin: bytes, base: bytes | None, action: Action) -> bytes:
    """What the image reads like after the action, without failures."""
    key = (begin, base, id(action))
    if key not in _wanted:
        graph = Graph()
        backing = None
        if base is not None:
            from support.images import layer

            backing = layer(graph, MemoryNode(base), "raw")
        with open_image(MemoryNode(begin), graph=graph, backing=backing) as image:
            action(image)
            _wanted[key] = image.read(0, image.size)
    return _wanted[key]


@pytest.mark.parametrize("backed", [False, True], ids=["plain", "backed"])
@pytest.mark.parametrize("name", ACTIONS)
def test_each_call_in_turn(name: str, backed: bool) -> None:
    begin = setup(CLUSTER, CLUSTERS, backed=backed)
    action = ACTIONS[name]
    for kind, effect in (("any", "none"), ("change", "half"), ("change", "full"), ("flush", "none")):
        for nth in range(1, 1000):
            if not run_failing(
                begin.image, begin.base, action, nth, kind, effect, errno.ENOSPC if nth % 2 else errno.EIO
            ):
                break
        else:
            pytest.fail("the workload never ends")


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"preallocation": "metadata"}, {"cluster_size": 512}])
def test_creation_fails_or_makes_an_image(options: dict[str, Any]) -> None:
    """A failed create is a ByreError; a create that succeeds made a good image."""
    for kind in ("any", "flush"):
        for nth in range(1, 1000):
            graph, fault, memory = Graph(), FaultNode(), MemoryNode()
            graph.add(memory)
            graph.add(fault)
            graph.attach(fault, "file", memory, "filtered")
            fault.fail(kind, nth, errno.ENOSPC)
            try:
                new_image("qcow2", SIZE, file=fault, **options)
            except NoSpace:
                continue
            assert fault.pending_failures == 1, "a failure was swallowed"
            assert walk(memory.to_bytes()) == ([], [], [])
            break


def test_a_failed_data_write_leaves_the_image_usable() -> None:
    begin = setup(CLUSTER, CLUSTERS)
    fault = FaultNode()
    with open_image(MemoryNode(begin.image), filters=[fault]) as image:
        before = image.read(0, SIZE)
        for effect in ("none", "half", "full"):
            fault.fail("write", 1, errno.EIO, effect=effect)
            with pytest.raises(IOFailure, match="injected"):
                image.write(50 * CLUSTER, pattern(1, 3 * CLUSTER))
            assert image.node.failure is None  # type: ignore[attr-defined]
            assert image.read(0, SIZE) == before
        image.write(50 * CLUSTER + 7, pattern(2, CLUSTER))
        expected = bytearray(before)
        expected[50 * CLUSTER + 7 : 51 * CLUSTER + 7] = pattern(2, CLUSTER)
        assert image.read(0, SIZE) == expected
        check_idle(image)


def test_a_failed_flush_stops_the_node_for_good() -> None:
    begin = setup(CLUSTER, CLUSTERS)
    fault = FaultNode()
    image = open_image(MemoryNode(begin.image), filters=[fault])
    image.write(50 * CLUSTER, pattern(1, CLUSTER))
    fault.fail("flush", 1)
    with pytest.raises(IOFailure):
        image.flush()
    for request in (image.flush, lambda: image.read(0, 1), lambda: image.write(0, b"x"), lambda: image.discard(0, 512)):
        with pytest.raises(IOFailure, match="taken out of service"):
            request()
    writes = fault.calls["write"]
    with pytest.raises(ByreError):
        image.flush()
    try:
        image.close()
    except ByreError:
        pass
    assert fault.calls["write"] == writes, "metadata was written after the failure"


def test_random_failures_under_a_long_workload() -> None:
    """Many operations, each request failing now and then: whatever was acknowledged before the stop is there."""
    for seed in range(30):
        chooser = random.Random(seed)
        begin = setup(CLUSTER, CLUSTERS)
        memory, fault = MemoryNode(begin.image), FaultNode()
        image = open_image(memory, filters=[fault])
        for _ in range(40):
            if chooser.random() < 0.3:
                fault.fail("any", chooser.randrange(1, 8), effect=chooser.choice(("none", "half", "full")))
            action = ACTIONS[chooser.choice([name for name in ACTIONS if name not in ("grow", "shrink")])]
            try:
                action(image)
            except ByreError:
                pass
            check_idle(image)
            if image.node.failure is not None:  # type: ignore[attr-defined]
                break
        fault.heal()
        try:
            image.close()
        except ByreError:
            pass
        findings = walk(memory.to_bytes())
        assert not findings.damage, (seed, findings.damage)
        assert not findings.copied, (seed, findings.copied)
