"""Extents of whole tables: the loop and the arrays say the same, and who asks seldom need not load numpy."""

from __future__ import annotations

import random
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

import byre
from byre.formats.qcow2.entries import COMPRESSED, COPIED, ZERO
from byre.formats.qcow2.image import Qcow2Node
from byre.graph.creating import create

BITS = 16
SIZE = 1 << BITS


def table(seed: int) -> array[int]:
    """Runs of every kind, of lengths from 1 to 50, some that nearly go on."""
    choose = random.Random(seed)
    words: list[int] = []
    while len(words) < 1 << BITS - 3:
        host = choose.randrange(1, 1 << 30) << BITS
        count = choose.choice((1, 2, 3, 50))
        kind = choose.randrange(7)
        if kind == 0:
            words += [0] * count
        elif kind < 3:
            words += [host + (number << BITS) | COPIED for number in range(count)]
        elif kind == 3:
            words += [host + (number << BITS) | (COPIED if number % 3 else 0) for number in range(count)]
        elif kind == 4:
            words += [(host + (number << BITS)) * choose.randrange(2) | ZERO for number in range(count)]
        elif kind == 5:
            words += [COMPRESSED | host >> 10] * count
        else:
            words += [host] * count
    # The last place there is, and what would follow if there were one more.
    words[100:103] = [(1 << 56) - SIZE | COPIED, 1 << 56 | COPIED, 0]
    return array("Q", words[: 1 << BITS - 3])


@pytest.mark.parametrize("seed", range(6))
def test_loop_and_arrays_agree(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.qcow2"
    create(str(path), "qcow2", 1 << 40)
    with byre.open(path) as image:
        assert isinstance(image.node, Qcow2Node)
        mapping = image.node.mapping
        words = table(seed)
        choose = random.Random(seed)
        for _ in range(40):
            index = choose.randrange(len(words) - 200)
            count = choose.randrange(1, len(words) - index)
            skip = choose.choice((0, 512, SIZE - 512))
            offset = (index << BITS) + skip
            length = (count << BITS) - skip - choose.choice((0, 512))
            if length > 0:
                rows = mapping._runs(words, index, count, offset, length)
                bulk = mapping._bulk(words[index : index + count], index << BITS).clip(offset, length)
                assert rows == list(bulk.coalesced())


def test_block_status_of_a_large_image_does_without_numpy(tmp_path: Path) -> None:
    """A server that is asked once in a while starts to answer at once."""
    path = tmp_path / "a.qcow2"
    create(str(path), "qcow2", 1 << 30)
    with byre.open(path, read_only=False) as image:
        image.write(0, b"x" * (40 << 20))
    script = (
        "import sys, byre\n"
        f"image = byre.open({str(path)!r})\n"
        "assert image.node.block_status(0, 1 << 30).length == 40 << 20\n"
        "assert 'numpy' not in sys.modules\n"
        "for _ in range(20): image.node.block_status(0, 1 << 30)\n"
        "assert 'numpy' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
