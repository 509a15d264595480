"""Threads that write, zero and discard, and a model that takes the same: what a job must not lose."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from types import TracebackType
from typing import Self

from byre.errors import ByreError
from byre.image import Image

__all__ = ["Writers", "until"]


def until(condition: object, seconds: float = 20.0) -> None:
    """Wait for ``condition()``."""
    deadline = monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert monotonic() < deadline, "waited in vain"
        sleep(0.002)


class Writers:
    """Each thread changes units of its own, interleaved with those of the others. A context manager.

    :param unit: bytes; a discard of less than a cluster does nothing
    :param refused: requests may be refused; the model follows what the disk holds then
    :ivar model: what the disk holds, while nobody writes
    """

    def __init__(self, image: Image, *, threads: int = 3, unit: int = 4096, seed: int = 0, pause: float = 0.0005,
                 refused: bool = False) -> None:  # fmt: skip
        self._image = image
        self._unit = unit
        self._pause = pause
        self._refused = refused
        self.model = bytearray(image.read(0, image.size))
        self.errors: list[BaseException] = []
        self._changed = threading.Condition()
        self._held = 0
        self._busy = 0
        self._ended = False
        self._count = 0
        self._threads = [
            threading.Thread(target=self._work, args=(number, threads, random.Random(f"{seed} {number}")), daemon=True)
            for number in range(threads)
        ]

    @property
    def count(self) -> int:
        """Requests so far."""
        with self._changed:
            return self._count

    def _work(self, number: int, step: int, chooser: random.Random) -> None:
        try:
            while self._begin():
                try:
                    slots = (len(self.model) // self._unit - number - 1) // step + 1
                    offset = (chooser.randrange(slots) * step + number) * self._unit
                    self._change(offset, chooser)
                finally:
                    self._end()
                if self._pause:
                    sleep(self._pause)
        except BaseException as error:
            self.errors.append(error)

    def _change(self, offset: int, chooser: random.Random) -> None:
        image, model, unit = self._image, self.model, self._unit
        start = offset + chooser.choice((0, 0, 512))
        length = offset + unit - start
        what = chooser.random()
        try:
            if what < 0.6:
                data = chooser.randbytes(8) * (length // 8)
                image.write(start, data)
                model[start : start + length] = data
            elif what < 0.8:
                image.write_zeroes(start, length, unmap=what < 0.7)
                model[start : start + length] = bytes(length)
            elif what < 0.9:
                image.discard(offset, unit)
                model[offset : offset + unit] = image.read(offset, unit)
            else:
                assert image.read(offset, unit) == model[offset : offset + unit], f"at {offset:#x}"
        except ByreError:
            if not self._refused:
                raise
            model[offset : offset + unit] = image.read(offset, unit)

    def _begin(self) -> bool:
        with self._changed:
            while self._held and not self._ended:
                self._changed.wait()
            self._busy += 1
            return not self._ended

    def _end(self) -> None:
        with self._changed:
            self._busy -= 1
            self._count += 1
            self._changed.notify_all()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody writes in the body, and the model is what the disk holds."""
        with self._changed:
            self._held += 1
            while self._busy and not self.errors:
                self._changed.wait(0.1)
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1
                self._changed.notify_all()

    def more(self, count: int) -> None:
        """Wait until so many more requests are done."""
        wanted = self.count + count
        until(lambda: self.count >= wanted or self.errors)
        self.check()

    def check(self) -> None:
        if self.errors:
            raise self.errors[0]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(30)
            assert error is not None or not thread.is_alive(), "a writer hangs"
        if error is None:
            self.check()
