"""VHDX and VHD: every child call fails in turn: no damage, no hang, no false success, nothing left behind."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from byre.errors import ByreError, IOFailure, NoSpace
from byre.filters.faults import FaultNode
from byre.graph.graph import Graph
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from crash.workloads import pattern
from faults.test_qcow2 import check_idle, close_quietly
from support.images import detached, new_image, open_image

MIB = 1 << 20
FORMATS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vhdx": ("vhdx", MIB, {"block_size": MIB}),
    "vpc": ("vpc", 2 * MIB, {"force_size": True}),
}

ACTIONS: dict[str, Callable[[Image, int], None]] = {
    "new": lambda image, unit: image.write(2 * unit - 100, pattern(1, 8192)),
    "overwrite": lambda image, unit: image.write(100, pattern(3, 800), fua=True),
    "zero": lambda image, unit: image.write_zeroes(100, unit, unmap=True),
    "discard": lambda image, unit: image.discard(0, 2 * unit),
    "again": lambda image, unit: (image.discard(0, unit), image.flush(), image.write(2 * unit, b"reused"))[-1],
    "grow": lambda image, unit: image.resize(image.size + 5 * unit),
    "shrink": lambda image, unit: image.resize(512, shrink=True),
}


def begin(name: str) -> bytes:
    driver, unit, options = FORMATS[name]
    memory = new_image(driver, 4 * unit, **options)
    with open_image(memory, driver) as image:
        image.write(0, pattern(90, unit + 5000))
    return detached(memory).to_bytes()


def content(name: str, data: bytes, action: Callable[[Image, int], None] | None = None) -> bytes:
    driver, unit, _ = FORMATS[name]
    with open_image(MemoryNode(data), driver) as image:
        if action is not None:
            action(image, unit)
        return image.read(0, image.size)


def run(name: str, data: bytes, action: Callable[[Image, int], None], before: bytes, after: bytes, nth: int,
        kind: str, effect: str) -> bool:  # fmt: skip
    """One run with the ``nth`` request failing; False if the workload needed fewer."""
    driver, unit, _ = FORMATS[name]
    memory, fault = MemoryNode(data), FaultNode()
    image = open_image(memory, driver, filters=[fault])
    number = errno.ENOSPC if nth % 2 else errno.EIO
    fault.fail(kind, nth, number, effect=effect)
    failure: ByreError | None = None
    try:
        action(image, unit)
        image.flush()
    except ByreError as error:
        failure = error
    hit = fault.pending_failures == 0
    if failure is not None:
        assert hit
        assert failure.errno == number, failure
    check_idle(image)
    fault.heal()
    stopped = image.node.failure is not None  # type: ignore[attr-defined]
    if stopped:
        assert failure, "a request succeeded although metadata could not be written"
        with pytest.raises(IOFailure):
            image.read(0, 512)
    elif not failure:
        assert image.read(0, image.size) == after
    close_quietly(image, stopped)
    verify(driver, memory, before, after, exact=not failure and not stopped)
    return hit


def verify(driver: str, memory: MemoryNode, before: bytes, after: bytes, *, exact: bool) -> None:
    """The file is an image without damage, and each byte is as before or as wanted; it can be written to."""
    with open_image(detached(memory), driver, read_only=True) as image:
        found = image.read(0, image.size)
        messages = image.node.check(Control()).messages  # type: ignore[attr-defined]
        # A footer that is not there yet is made up for by its copy.
        assert not [message for message in messages if "footer" not in message], messages
    if exact:
        assert found == after
    assert len(found) in (len(before), len(after))
    length = max(len(before), len(after))
    old, new, now = (np.frombuffer(one.ljust(length, b"\0"), np.uint8)[: len(found)] for one in (before, after, found))
    wrong = np.flatnonzero((now != old) & (now != new))
    assert not len(wrong), f"bytes {wrong[:8].tolist()} are neither as before nor as wanted"
    with open_image(detached(memory), driver) as image:
        image.write(0, b"goes on")
        assert image.read(0, 512) == b"goes on" + found[7:512]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("action", ACTIONS)
def test_each_call_in_turn(name: str, action: str) -> None:
    data = begin(name)
    before, after = content(name, data), content(name, data, ACTIONS[action])
    for kind, effect in (("any", "none"), ("change", "half"), ("flush", "none")):
        for nth in range(1, 200):
            if not run(name, data, ACTIONS[action], before, after, nth, kind, effect):
                break
        else:
            pytest.fail("the workload never ends")


@pytest.mark.parametrize("options", [{}, {"subformat": "fixed"}])
@pytest.mark.parametrize("driver", ["vhdx", "vpc"])
def test_creation_fails_or_makes_an_image(driver: str, options: dict[str, Any]) -> None:
    for kind in ("any", "flush"):
        for nth in range(1, 100):
            graph, fault, memory = Graph(), FaultNode(), MemoryNode()
            graph.add(memory)
            graph.add(fault)
            graph.attach(fault, "file", memory, "filtered")
            fault.fail(kind, nth, errno.ENOSPC)
            try:
                new_image(driver, 5 * MIB, file=fault, **options)
            except NoSpace:
                continue
            assert fault.pending_failures == 1, "a failure was swallowed"
            with open_image(memory, driver, read_only=True) as image:
                assert not any(image.read(0, image.size))
            break
