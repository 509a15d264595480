"""Random chains of images as files, and what their layers hold."""

from __future__ import annotations

import random
from typing import NamedTuple

import byre
from byre.graph import chain
from byre.io.extent import UNALLOCATED

K = 1024
SIZES = (1024 * K, 1024 * K, 1024 * K + 512 * 77, 512 * K, 1600 * K)


class Layer(NamedTuple):
    name: str
    format: str


def scribble(chooser: random.Random, name: str, format: str, count: int, *, compress: bool = True) -> None:
    """``count`` writes of bytes, zeroes, compressed clusters and discards at random."""
    with byre.open(name, format=format, read_only=False, backing=True) as image:
        cluster = getattr(image.node, "cluster_size", 0)
        for _ in range(count):
            offset = chooser.randrange(image.size // 512) * 512
            length = min(chooser.choice((512, 4 * K, 64 * K, 100 * 512, 300 * K)), image.size - offset)
            what = chooser.random()
            if what < 0.55:
                image.write(offset, bytes((chooser.choice((0, 1, 2, 3)),)) * length)
            elif what < 0.75:
                image.write_zeroes(offset, length)
            elif what < 0.85:
                image.discard(offset, length)
            elif cluster and compress:
                offset -= offset % cluster
                data = bytes((chooser.choice((0, 1, 2, 3)),)) * min(cluster, image.size - offset)
                image.write_compressed(offset, data)


def make_layer(chooser: random.Random, name: str, below: Layer | None, *, raw: bool = False, size: int = 0) -> Layer:
    """An image with content, over ``below``; its size, cluster size and version chosen at random."""
    size = size or chooser.choice(SIZES)
    options: dict[str, object] = {}
    format = "raw" if raw else "qcow2"
    if not raw:
        options["cluster_size"] = chooser.choice((512, 4 * K, 64 * K, 64 * K, 256 * K))
        version = chooser.random()
        if version < 0.2:
            options["compat"] = "0.10"
        elif version < 0.5 and int(str(options["cluster_size"])) >= 16 * K:
            options["extended_l2"] = True
        if below is not None:
            options |= {"backing_file": below.name, "backing_fmt": below.format}
    byre.create(name, format, size, options=options)
    scribble(chooser, name, format, chooser.randrange(8))
    return Layer(name, format)


def make_chain(chooser: random.Random, prefix: str, count: int, below: Layer | None = None) -> list[Layer]:
    made: list[Layer] = []
    for index in range(count):
        raw = below is None and chooser.random() < 0.25
        below = make_layer(chooser, f"{prefix}{index}", below, raw=raw)
        made.append(below)
    return made


def content(layer: Layer) -> bytes:
    """What the image reads as, from a fresh opening."""
    with byre.open(layer.name, format=layer.format) as image:
        return image.read(0, image.size)


def held(name: str, unit: int) -> list[bool]:
    """Per ``unit`` bytes, whether the top layer of a qcow2 image holds something there."""
    with byre.open(name, format="qcow2") as image:
        layers = chain.layers(image.node)
        below = layers[1] if len(layers) > 1 else None
        found = [False] * -(-image.size // unit)
        for extent in chain.extents(image.node, 0, image.size, base=below):
            if extent.kind != UNALLOCATED:
                for index in range(extent.offset // unit, -(-extent.end // unit)):
                    found[index] = True
        return found
