"""Requests on encrypted nodes: whole sectors below, any bytes above, also with several threads in one sector."""

from __future__ import annotations

import random
import threading

import pytest

from byre.errors import AccessDenied
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from support.encrypted import SECRETS, new_encrypted, open_encrypted
from support.images import layer, new_image, open_image
from support.walk import walk

SIZE = 300 * 1024
KINDS = {
    "luks": ("luks", {}),
    "luks-cbc": ("luks", {"cipher_mode": "cbc", "ivgen_alg": "essiv"}),
    "qcow2-luks": ("qcow2", {"format": "luks"}),
    "qcow2-luks-4k": ("qcow2", {"format": "luks", "cluster_size": 4096, "cipher_mode": "cbc"}),
    "qcow2-luks-subclusters": ("qcow2", {"format": "luks", "extended_l2": True}),
    "qcow2-aes-512": ("qcow2", {"format": "aes", "cluster_size": 512}),
}


class Recorder(MemoryNode):
    """Remembers the ranges that were asked for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.ranges: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.ranges.append((offset, len(buffer)))
        super().read_into(offset, buffer)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.ranges.append((offset, len(buffer)))
        super().write_from(offset, buffer, flags)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return KINDS[request.param]


def fill(image: Image, model: bytearray) -> None:
    """Any content where the format promises none."""
    if image.format == "luks":
        image.write(0, bytes(model))


def test_any_range_against_a_model(kind: tuple[str, dict[str, object]]) -> None:
    format, options = kind
    memory, model, chooser = new_encrypted(format, SIZE, **options), bytearray(SIZE), random.Random(1)
    with open_encrypted(memory, format) as image:
        fill(image, model)
        for _ in range(150):
            offset = chooser.randrange(SIZE)
            length = min(chooser.choice((1, 100, 511, 512, 4096, 5000, 70_000)), SIZE - offset)
            if chooser.random() < 0.4:
                offset -= offset % 512
            action = chooser.randrange(5)
            if action < 2:
                data = chooser.randbytes(length)
                image.write(offset, data)
                model[offset : offset + length] = data
            elif action == 2:
                image.write_zeroes(offset, length, unmap=chooser.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            else:
                assert image.read(offset, length) == model[offset : offset + length]
        assert image.read(0, SIZE) == model
    with open_encrypted(memory, format, read_only=True) as image:
        assert image.read(0, SIZE) == model
        assert image.read(SIZE - 3, 3) == model[-3:]
    if format == "qcow2":
        assert walk(memory.to_bytes()) == ([], [], [])
        written = next(bytes(model[at : at + 512]) for at in range(0, SIZE, 512) if len(set(model[at : at + 512])) > 9)
        assert written not in memory.to_bytes()


def test_zero_detection(kind: tuple[str, dict[str, object]]) -> None:
    format, options = kind
    memory = new_encrypted(format, SIZE, **options)
    with open_encrypted(memory, format, detect_zeroes="on") as image:
        image.write(0, b"x" * 5000)
        image.write(700, bytes(3000))
        assert image.read(0, 5000) == b"x" * 700 + bytes(3000) + b"x" * 1300


def test_only_whole_sectors_reach_the_file() -> None:
    recorder = Recorder(new_encrypted("luks", SIZE).to_bytes())
    with open_encrypted(recorder, "luks") as image:
        payload = image.node.volume.payload_offset  # type: ignore[attr-defined]
        recorder.ranges.clear()
        image.write(700, b"y" * 1000)
        image.write(5000, b"y")
        image.read(3, 2000)
        ranges = [(at - payload, length) for at, length in recorder.ranges if at >= payload]
        assert ranges
        assert all(at % 512 == 0 and length % 512 == 0 for at, length in ranges)


def test_neighbours_in_one_sector(kind: tuple[str, dict[str, object]]) -> None:
    """Each thread owns every fourth stretch of 100 bytes; readers see their own, old or new, never anything else."""
    format, options = kind
    memory = new_encrypted(format, SIZE, **options)
    failures: list[str] = []
    with open_encrypted(memory, format) as image:
        fill(image, bytearray(SIZE))
        stretch, count, rounds = 100, 4, 5
        spots = range(0, 4096, stretch * count)

        def work(index: int) -> None:
            chooser = random.Random(index)
            for turn in range(rounds):
                value = bytes([1 + index * rounds + turn])
                for start in spots:
                    at = start + index * stretch
                    image.write(at, value * stretch)
                    if image.read(at, stretch) != value * stretch:
                        failures.append(f"{index} {turn} {at}")
                if chooser.random() < 0.3:
                    image.flush()

        def whole(index: int) -> None:
            chooser = random.Random(index)
            for _ in range(rounds * 20):
                at = 16384 + chooser.randrange(8) * 512
                image.write(at, bytes([index]) * 512)
                found = image.read(at, 512)
                if len(set(found)) > 2:
                    failures.append("torn")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
        threads += [threading.Thread(target=whole, args=(n,)) for n in (200, 201)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not failures, failures[:3]
        for index in range(count):
            value = bytes([1 + index * rounds + rounds - 1])
            for start in spots:
                assert image.read(start + index * stretch, stretch) == value * stretch
        node = image.node
        assert node.inflight.claim_count == 0  # type: ignore[attr-defined]
        assert node.inflight.ticket_count == 0  # type: ignore[attr-defined]


def test_an_encrypted_layer_below_a_plain_one() -> None:
    """The upper layer asks for bytes that begin and end between the lower one's sectors."""
    content = random.Random(4).randbytes(SIZE)
    base = new_encrypted("qcow2", SIZE, format="luks")
    with open_encrypted(base, "qcow2") as image:
        image.write(0, content)
    top = new_image("qcow2", SIZE, backing_file="base", backing_fmt="qcow2", cluster_size=512)
    graph = Graph()
    below = {**layer(graph, base, "qcow2"), "encrypt.key-secret": "s"}
    with open_image(top, graph=graph, backing=below, secrets=SECRETS) as image:
        image.write(1000, b"top")
        assert image.read(777, 2000) == content[777:1000] + b"top" + content[1003:2777]


def test_a_failed_write_leaves_no_claim() -> None:
    from byre.errors import IOFailure

    class Failing(MemoryNode):
        fail = False

        def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
            if self.fail:
                raise IOFailure("no")
            super().write_from(offset, buffer, flags)

    memory = Failing(new_encrypted("luks", SIZE).to_bytes())
    with open_encrypted(memory, "luks") as image:
        memory.fail = True
        with pytest.raises(IOFailure):
            image.write(5, b"x")
        memory.fail = False
        image.write(5, b"x")
        assert image.read(5, 1) == b"x"


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_without_the_key_metadata_only(format: str) -> None:
    memory = new_encrypted(format, SIZE, **({"format": "luks"} if format == "qcow2" else {}))
    with open_encrypted(memory, format) as image:
        image.write(0, b"x" * 512)
    with pytest.raises(AccessDenied, match="key-secret"):
        open_image(memory, format)
    with open_image(memory, format, read_only=True, no_io=True) as image:
        assert image.size == SIZE
        if format == "luks":
            with pytest.raises(AccessDenied, match="without its key"):
                image.read(0, 512)
