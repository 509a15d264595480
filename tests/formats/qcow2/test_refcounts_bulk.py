"""Reference counts in bulk agree with counting one by one, for every width."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest

from byre.errors import Corrupt, IOFailure
from byre.formats.qcow2.image import Qcow2Node
from byre.formats.qcow2.refcounts import Refcounts
from byre.formats.qcow2.refcounts_bulk import RefcountOverflow, add_many, counted, get_many
from support.images import new_image, open_image


def cluster_numbers(values: list[int]) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(values, np.int64)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_up_and_down(bits: int) -> None:
    chooser = random.Random(bits)
    file = new_image("qcow2", 1 << 20, cluster_size=512, refcount_bits=bits)
    with contextlib.suppress(IOFailure), open_image(file) as image:
        node = image.node
        assert isinstance(node, Qcow2Node)
        refcounts = node.refcounts
        assert isinstance(refcounts, Refcounts)
        first = refcounts.allocate(600) >> 9
        model = dict.fromkeys(range(first, first + 600), 1)
        for _ in range(60):
            some = [chooser.randrange(first, first + 600) for _ in range(chooser.randrange(1, 300))]
            clusters, times = counted(cluster_numbers(some))
            assert dict(zip(clusters.tolist(), times.tolist(), strict=True)) == {c: some.count(c) for c in set(some)}
            down = chooser.random() < 0.5
            after = {c: model[c] + (-some.count(c) if down else some.count(c)) for c in set(some)}
            bad = any(model[c] == 0 or after[c] >> bits for c in after) if not down else min(after.values()) < 0
            if bad:
                with pytest.raises((RefcountOverflow, Corrupt)):
                    add_many(refcounts, clusters, times, down=down)
            else:
                freed = add_many(refcounts, clusters, times, down=down)
                model.update(after)
                assert freed.tolist() == sorted(c for c in after if model[c] == 0)
            every = cluster_numbers(sorted(model))
            assert get_many(refcounts, every).tolist() == [refcounts.get(c) for c in sorted(model)] == [
                model[c] for c in sorted(model)]  # fmt: skip
        node.failure = RuntimeError("nothing of this is to be written")  # which closing complains about


def test_beyond_all_blocks() -> None:
    file = new_image("qcow2", 1 << 20, cluster_size=512)
    with open_image(file) as image:
        assert isinstance(image.node, Qcow2Node)
        assert image.node.refcounts is not None
        far = cluster_numbers([1 << 20, 1 << 46])
        assert get_many(image.node.refcounts, far).tolist() == [0, 0]
        with pytest.raises(Corrupt, match="more refers to it"):
            add_many(image.node.refcounts, *counted(far))
