"""The format contract on VHDX and VHD, dynamic and fixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from byre.graph.node import Node
from byre.protocols.memory import MemoryNode
from contracts.node import FormatContract, patchwork
from contracts.test_formats import scattered
from support.images import new_image, open_image

SIZE = 5 << 20

VHDX: dict[str, dict[str, Any]] = {
    "1M": {"block_size": 1 << 20},
    "2M-not-present": {"block_size": 2 << 20, "block_state_zero": False},
    "8M": {},
    "fixed": {"block_size": 1 << 20, "subformat": "fixed"},
}
VPC: dict[str, dict[str, Any]] = {
    "dynamic": {"force_size": True},
    "fixed": {"force_size": True, "subformat": "fixed"},
}


class TestVhdx(FormatContract):
    content = patchwork(SIZE, seed=11)

    @pytest.fixture(params=list(VHDX))
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        memory = new_image("vhdx", len(self.content), **VHDX[request.param])
        with open_image(memory, "vhdx") as image:
            scattered(image, self.content, 1 << 19)
            yield image.node
            final = image.read(0, image.size)
        with open_image(memory, "vhdx", read_only=True) as image:
            assert image.read(0, image.size) == final


class TestVpc(FormatContract):
    content = patchwork(SIZE, seed=12)

    @pytest.fixture(params=list(VPC))
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        memory = new_image("vpc", len(self.content), **VPC[request.param])
        with open_image(memory, "vpc") as image:
            scattered(image, self.content, 1 << 19)
            yield image.node
            final = image.read(0, image.size)
        with open_image(memory, "vpc", read_only=True) as image:
            assert image.read(0, image.size) == final


def test_a_node_over_memory_grows_the_memory() -> None:
    memory = new_image("vpc", 5 << 20)
    assert isinstance(memory, MemoryNode)
    before = memory.size
    with open_image(memory, "vpc") as image:
        image.write(0, b"x")
    assert memory.size == before + (2 << 20) + 512
