"""L2 tables that are only looked at are cached in parts: no more than the cache holds, none older than the disk."""

from __future__ import annotations

import random
from typing import Any

import pytest

from byre.image import Image
from byre.protocols.memory import MemoryNode
from support.images import detached, new_image, open_image
from support.walk import walk


class Counting(MemoryNode):
    """Memory that counts the bytes read from it."""

    read = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read += len(buffer)
        super().read_into(offset, buffer)


def opened(memory: MemoryNode, **options: object) -> Image:
    return open_image(detached(memory), options={"l2-cache-entry-size": "512", **options})


@pytest.mark.parametrize("extended", [False, True])
def test_a_small_read_loads_a_small_part(extended: bool) -> None:
    cluster = 65536
    memory = Counting(new_image("qcow2", 64 << 20, cluster_size=cluster, extended_l2=extended).to_bytes())
    with opened(memory) as image:
        image.write(0, b"x" * (64 << 20))
    for entry, most in (("512", 512), ("4096", 4096), ("65536", 65536)):
        with opened(memory, **{"l2-cache-entry-size": entry}) as image:
            memory.read = 0
            assert image.read(40 << 20, 10) == b"x" * 10
            assert memory.read == most + 10
            assert image.read((40 << 20) + cluster, 10) == b"x" * 10
            assert memory.read == most + 20
            assert image.read((40 << 20) - 5, 8 * cluster) == b"x" * (8 * cluster)


def test_a_large_disk_is_read_in_parts_unless_the_cache_holds_it_all() -> None:
    memory = Counting(new_image("qcow2", 1 << 40).to_bytes())
    with open_image(memory) as image:
        image.write(5 << 30, b"x" * 65536)
        image.write(6 << 30, b"x" * 65536)
    for options, most in (({}, 4096), ({"l2-cache-size": str(128 << 20)}, 65536)):
        for read_only in (False, True):
            with open_image(detached(memory), options=options, read_only=read_only) as image:
                memory.read = 0
                assert image.read(5 << 30, 1) == b"x"
                assert memory.read == most + 1


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_parts_show_it(extended: bool, seed: int) -> None:
    """A cache of four tables of sixteen or thirty-two parts, far too small for the disk."""
    chance = random.Random(seed)
    cluster = 16384 if extended else 8192
    size = (24 << 20) + 512
    model = bytearray(size)
    memory = MemoryNode(new_image("qcow2", size, cluster_size=cluster, extended_l2=extended).to_bytes())
    kept: bytes | None = None
    image = opened(memory, **{"l2-cache-size": str(4 * cluster)})
    for _ in range(120):
        at = chance.randrange(size - 1)
        length = min(chance.choice((1, 511, 5000, cluster, 20 * cluster, 700 * cluster)), size - at)
        how = chance.choice(("write", "read", "read", "read", "zero", "discard", "flush", "keep", "apply", "reopen"))
        if how == "write":
            data = chance.randbytes(1) * min(length, 40 * cluster)
            image.write(at, data)
            model[at : at + len(data)] = data
        elif how == "zero":
            image.write_zeroes(at, length, unmap=chance.random() < 0.5)
            model[at : at + length] = bytes(length)
        elif how == "discard":
            start, end = -(-at // cluster) * cluster, (at + length) // cluster * cluster
            image.discard(at, length)
            if start < end:
                model[start:end] = bytes(end - start)
        elif how == "flush":
            image.flush()
        elif how == "keep" and kept is None:
            image.node.create_snapshot("s")  # type: ignore[attr-defined]
            kept = bytes(model)
        elif how == "apply" and kept is not None:
            image.node.apply_snapshot("s")  # type: ignore[attr-defined]
            model[:] = kept
        elif how == "reopen":
            image.close()
            image = opened(memory, **{"l2-cache-size": str(4 * cluster)})
        assert image.read(at, length) == model[at : at + length], how
        cache: Any = image.node.mapping.l2  # type: ignore[attr-defined]
        assert len(cache.parts) * 512 + len(cache.tables) * cluster <= 5 * cluster
    assert image.read(0, size) == model
    image.close()
    assert not any(walk(memory.to_bytes()))
