"""Threads that keep a disk busy, each in sectors of its own, and know what it has to hold."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep

from byre.image import Image

UNIT = 512


class Load:
    """Writes, zeroes and reads at random; :meth:`content` is what the disk holds once the load has ended.

    :ivar count: requests so far
    """

    def __init__(self, image: Image, *, threads: int = 3, seed: int = 0, pause: float = 0.0) -> None:
        self._image = image
        self._model = bytearray(image.read(0, image.size))
        self._stop = threading.Event()
        self._pause = pause
        self.errors: list[BaseException] = []
        self.count = 0
        self._threads = [
            threading.Thread(target=self._work, args=(number, threads, random.Random(seed * 97 + number)))
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int, step: int, chooser: random.Random) -> None:
        image, model = self._image, self._model
        slots = len(model) // UNIT // step
        try:
            while not self._stop.is_set():
                offset = (chooser.randrange(slots) * step + number) * UNIT
                what = chooser.random()
                if what < 0.15:
                    image.write_zeroes(offset, UNIT, unmap=what < 0.07)
                    model[offset : offset + UNIT] = bytes(UNIT)
                elif what < 0.6:
                    data = chooser.randbytes(8) * (UNIT // 8)
                    image.write(offset, data)
                    model[offset : offset + UNIT] = data
                assert image.read(offset, UNIT) == model[offset : offset + UNIT], f"at {offset:#x}"
                self.count += 1
                sleep(self._pause)
        except BaseException as error:
            self.errors.append(error)

    def end(self) -> bytes:
        """Stop; what the disk holds now."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]
        return bytes(self._model)


@contextmanager
def load(image: Image, *, threads: int = 3, seed: int = 0, pause: float = 0.0) -> Iterator[Load]:
    """The disk is busy in the body."""
    work = Load(image, threads=threads, seed=seed, pause=pause)
    try:
        yield work
    finally:
        work._stop.set()
        for thread in work._threads:
            thread.join(30)
    work.end()
