"""VMDK: every child call fails in turn: no damage, no false success, nothing left behind (see test_qcow2)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from byre.errors import ByreError, IOFailure
from byre.filters.faults import FaultNode
from byre.formats.base import FormatNode
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from crash.workloads import pattern
from faults.test_qcow2 import check_idle, close_quietly
from support import vmdk
from support.images import detached, open_image

GRAIN, GRAINS = 1024, 48
SIZE = GRAIN * GRAINS

ACTIONS: dict[str, Callable[[Image], None]] = {
    "new": lambda image: image.write(20 * GRAIN + 100, pattern(1, 3 * GRAIN)),
    "far": lambda image: image.write(40 * GRAIN, pattern(2, GRAIN)),
    "overwrite": lambda image: image.write(100, pattern(3, 800)),
    "zero": lambda image: image.write_zeroes(100, 3 * GRAIN, unmap=True),
    "discard": lambda image: image.discard(0, 6 * GRAIN),
    "fua": lambda image: image.write(30 * GRAIN, pattern(7, 2000), fua=True),
}
SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "missing-tables": {"missing_tables": True},
    "zero-grains": {"zero_grains": True, "version": 2},
}


def begin(**options: Any) -> bytes:
    content = bytearray(SIZE)
    content[: 4 * GRAIN] = pattern(90, 4 * GRAIN)
    return vmdk.hosted(bytes(content), grain=GRAIN, per_table=8, **options)


def read(memory: MemoryNode) -> bytes:
    with open_image(memory, "vmdk", read_only=True) as image:
        return image.read(0, SIZE)


def run_failing(data: bytes, action: Callable[[Image], None], nth: int, kind: str, effect: str, after: bytes) -> bool:
    """One run with the ``nth`` request failing; False if the workload needed fewer."""
    memory = MemoryNode(data)
    fault = FaultNode()
    image = open_image(memory, "vmdk", filters=[fault], graph=Graph())
    before = image.read(0, SIZE)
    fault.fail(kind, nth, errno.EIO, effect=effect)
    failure: ByreError | None = None
    try:
        action(image)
        image.flush()
    except ByreError as error:
        failure = error
    hit = fault.pending_failures == 0
    assert hit or not failure
    check_idle(image)
    fault.heal()
    assert isinstance(image.node, FormatNode)
    stopped = image.node.failure is not None
    if stopped:
        assert failure, "a request succeeded although metadata could not be written"
        with pytest.raises(IOFailure):
            image.read(0, 512)
    elif not failure:
        assert image.read(0, SIZE) == after
    close_quietly(image, stopped)
    closed = memory.to_bytes()
    found = vmdk.look_through(closed)
    assert not found.damage, found.damage
    assert not found.unequal or closed[72], "the copies differ, and nothing says so"
    now = read(detached(memory))
    if not failure:
        assert now == after
    wrong = [at for at in range(SIZE) if now[at] not in (before[at], after[at])]
    assert not wrong, f"bytes {wrong[:8]} are neither as before nor as wanted"
    return hit


@pytest.mark.parametrize("effect", ["none", "half", "full"])
@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("setup", SETUPS)
def test_each_request_fails_in_turn(setup: str, name: str, effect: str) -> None:
    data = begin(**SETUPS[setup])
    memory = MemoryNode(data)
    with open_image(memory, "vmdk") as image:
        ACTIONS[name](image)
    after = read(detached(memory))
    for kind in ("change", "flush", "read"):
        nth = 1
        while run_failing(data, ACTIONS[name], nth, kind, effect, after):
            nth += 1
            assert nth < 200
