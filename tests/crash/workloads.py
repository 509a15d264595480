"""Images to crash and things to do to them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from crash.harness import Setup, Step
from support.images import detached, layer, new_image, open_image


def pattern(step: int, length: int) -> bytes:
    """Bytes that differ by step and by sector and do not compress away."""
    return random.Random(step).randbytes(length)


def squeezable(step: int, length: int) -> bytes:
    """Bytes that compress to a good third."""
    chooser = random.Random(step)
    return b"".join(chooser.randbytes(150) + bytes(362) for _ in range(length // 512 + 1))[:length]


def setup(
    cluster: int,
    clusters: int,
    *,
    filled: bool = True,
    backed: bool = False,
    data_file: bool = False,
    **options: object,
) -> Setup:
    """An image of ``clusters`` guest clusters.

    Filled: 0 and 1 data, 2 zero, 3 and 4 compressed (packed together where possible), 5 data; the rest is not
    allocated.
    """
    size = cluster * clusters
    base = pattern(99, size - cluster * 2 - 700) if backed else None
    if backed:
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    if data_file:
        options |= {"data_file": "data"}
    data = MemoryNode() if data_file else None
    memory = new_image("qcow2", size, data, cluster_size=cluster, **options)
    if filled:
        graph = Graph()
        below = layer(graph, MemoryNode(base), "raw") if base is not None else None
        with open_image(memory, graph=graph, backing=below, data_file=data) as image:
            image.write(0, pattern(90, 2 * cluster))
            image.write(5 * cluster, pattern(91, cluster))
            if options.get("compat") != "0.10":
                image.write_zeroes(2 * cluster, cluster)
            if not data_file:
                image.write_compressed(3 * cluster, squeezable(92, cluster))
                image.write_compressed(4 * cluster, squeezable(93, cluster))
    detached(memory)
    return Setup(memory.to_bytes(), base, data.to_bytes() if data is not None else None)


def steps(cluster: int, clusters: int, *, compressed: bool = True) -> dict[str, Step]:
    """The operations, by name. Each number of a step hits another place where there is one."""
    half = cluster // 2

    def new(image: Image, step: int) -> None:
        image.write((6 + 2 * step) % (clusters - 2) * cluster + half // 2, pattern(step, cluster + half))

    def overwrite(image: Image, step: int) -> None:
        image.write(half + step * 7, pattern(step, cluster))

    def over_compressed(image: Image, step: int) -> None:
        image.write((3 + step % 2) * cluster + 100, pattern(step, half))

    def far(image: Image, step: int) -> None:
        image.write((clusters - 1 - step) * cluster, pattern(step, cluster))

    def zero(image: Image, step: int) -> None:
        image.write_zeroes(cluster * (step % 2) + half, 2 * cluster, unmap=step != 1)

    def discard(image: Image, step: int) -> None:
        image.discard(0 if step != 1 else 3 * cluster, 2 * cluster)

    def compress(image: Image, step: int) -> None:
        image.write_compressed((7 + step) * cluster, squeezable(step, cluster))

    def compress_over(image: Image, step: int) -> None:
        image.write_compressed((step % 2) * 3 * cluster, squeezable(step + 50, cluster))

    def flush(image: Image, step: int) -> None:
        image.flush()

    table: dict[str, Step] = {
        "new": new,
        "overwrite": overwrite,
        "far": far,
        "zero": zero,
        "discard": discard,
        "flush": flush,
    }
    if compressed:
        table |= {"over-compressed": over_compressed, "compress": compress, "compress-over": compress_over}
    return table


def sequences(names: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """All sequences of 1 to ``length`` operations, without those that begin with or repeat a flush."""
    found: list[tuple[str, ...]] = []
    for count in range(1, length + 1):
        for one in itertools.product(names, repeat=count):
            doubled = any(a == b == "flush" for a, b in itertools.pairwise(one))
            if one[0] != "flush" and not doubled:
                found.append(one)
    return found


def grow(factor: int, cluster: int) -> Callable[[Image, int], None]:
    def step(image: Image, number: int) -> None:
        image.resize(image.size + factor * cluster)

    return step


def shrink(clusters: int, cluster: int) -> Callable[[Image, int], None]:
    def step(image: Image, number: int) -> None:
        image.resize(image.size - clusters * cluster, shrink=True)

    return step
