"""``bench``: how many requests per second an image takes.

Requests are made one after the other in this thread while they end in memory: the work is Python's then, and more
threads would only take turns. With direct I/O (``-t none``), and over a network, as many are in flight as ``-d`` says,
up to 64 threads.
"""

from __future__ import annotations

import sys
from itertools import cycle
from time import perf_counter
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import InvalidArgument
from . import common

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..image import Image

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.Switch("count", "c", "count", "COUNT", "how many requests (75000)"),
    common.Switch("depth", "d", "depth", "DEPTH", "how many at once (64)"),
    common.FORMAT,
    common.Switch("flush-interval", "", "flush-interval", "COUNT", "flush after this many writes"),
    common.Switch("aio", "i", "aio", "AIO", "threads, native or io_uring"),
    common.Switch("native", "n", "native", "", "as -i native"),
    common.Switch("no-drain", "", "no-drain", "", "do not wait for other requests before a flush"),
    common.Switch("offset", "o", "offset", "OFFSET", "where to begin (0)"),
    common.Switch("pattern", "", "pattern", "BYTE", "what to write (0)"),
    common.QUIET,
    common.Switch("size", "s", "buffer-size", "SIZE", "bytes per request (4k)"),
    common.Switch("step", "S", "step-size", "SIZE", "distance between requests (their size)"),
    common.Switch("cache", "t", "cache", "CACHE", "cache mode (writeback)"),
    common.Switch("write", "w", "write", "", "write instead of reading"),
    common.IMAGE_OPTS,
    common.OBJECT,
    common.FORCE_SHARE,
)

HELP: Final = f"""\
usage: byre bench [OPTIONS] FILENAME
Read, or with -w write, an image in equal steps and say how long it took.

{common.option_help(_TABLE)}"""

_MAX_INT: Final = (1 << 31) - 1
_MAX_THREADS: Final = 64


class _Plan(NamedTuple):
    """What to send; sizes in bytes."""

    requests: int
    depth: int
    offset: int
    size: int
    step: int
    write: bool
    flush_interval: int
    pattern: int


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    plan = _plan(given)
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    cache = _cache(given)
    if plan.write and given.has("force-share"):
        raise InvalidArgument("a write test cannot share the image (-U)")
    with common.open_image(given.positional[0], given, format=given.last("format"), read_only=not plan.write,
                           cache=cache) as image:  # fmt: skip
        kind = "write" if plan.write else "read"
        sys.stdout.write(f"Sending {plan.requests} {kind} requests, {plan.size} bytes each, {plan.depth} in parallel "
                         f"(starting at offset {plan.offset}, step size {plan.step})\n")  # fmt: skip
        if plan.flush_interval:
            sys.stdout.write(f"Sending flush every {plan.flush_interval} requests\n")
        sys.stdout.flush()
        remote = any(node.driver == "nbd" for node in image.graph.nodes.values())
        waits = remote or cache in ("none", "off", "directsync")
        started = perf_counter()
        _Bench(image, plan, min(plan.depth, _MAX_THREADS) if waits else 1).run()
        elapsed = perf_counter() - started
        sys.stdout.write(f"Run completed in {elapsed:3.3f} seconds.\n")
    return 0


def _plan(given: common.Given) -> _Plan:
    """:raises ByreError: numbers out of range, or that do not go together"""
    size = common.size_argument(given.last("size", "4096"), "buffer size", most=_MAX_INT)
    step = common.size_argument(given.last("step", "0"), "step size", most=_MAX_INT) or size
    plan = _Plan(
        requests=_number(given, "count", "request count", 75000),
        depth=_number(given, "depth", "queue depth", 64),
        offset=common.size_argument(given.last("offset", "0"), "offset"),
        size=size,
        step=step,
        write=given.has("write"),
        flush_interval=_number(given, "flush-interval", "flush interval", 0),
        pattern=_number(given, "pattern", "pattern byte", 0, 255),
    )
    if plan.flush_interval and not plan.write:
        raise InvalidArgument("--flush-interval is only available in write tests")
    if plan.flush_interval and plan.flush_interval < plan.depth:
        raise InvalidArgument("the flush interval cannot be smaller than the depth")
    return plan


def _number(given: common.Given, key: str, what: str, default: int, most: int = _MAX_INT) -> int:
    text = given.last(key, str(default))
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= most:
        raise InvalidArgument(f"invalid {what} {text!r}: allowed are 0 to {most}")
    return number


def _cache(given: common.Given) -> str:
    from ..opening import CACHE_MODES

    cache = given.last("cache", "writeback")
    if cache not in CACHE_MODES:
        raise InvalidArgument(f"invalid cache mode {cache!r}: expected one of {', '.join(CACHE_MODES)}")
    aio = "native" if given.has("native") else given.last("aio", "threads")
    if aio not in ("threads", "native", "io_uring"):
        raise InvalidArgument(f"invalid aio option {aio!r}: expected threads, native or io_uring")
    if aio == "native" and cache not in ("none", "off", "directsync"):
        raise InvalidArgument("native AIO needs a cache mode that bypasses the page cache", hint="use -t none")
    return cache


class _Bench:
    """One run. Requests wrap around at the end of the image."""

    def __init__(self, image: Image, plan: _Plan, threads: int) -> None:
        self._image = image
        self._plan = plan
        self._threads = max(1, threads)
        self._views = self._buffers()

    def _buffers(self) -> list[memoryview]:
        from ..io.buffers import aligned_buffer

        plan = self._plan
        slots = max(plan.depth, 1)
        whole = aligned_buffer(max(plan.size, 1) * slots)
        if plan.pattern:
            whole[:] = bytes([plan.pattern]) * len(whole)
        return [whole[i * plan.size : (i + 1) * plan.size] for i in range(slots)]

    def run(self) -> None:
        plan = self._plan
        if not plan.flush_interval:
            self._send(0, plan.requests)
            return
        # A flush is due whenever the number of requests left is a multiple of the interval.
        done = 0
        while done < plan.requests:
            left = plan.requests - done
            batch = min(left % plan.flush_interval or plan.flush_interval, left)
            self._send(done, batch)
            done += batch
            self._image.flush()

    def _send(self, first: int, count: int) -> None:
        """Requests number ``first`` to ``first + count``."""
        if self._threads == 1 or count < 2:
            self._loop(first, count, 1, self._views)
            return
        from ..io import workers

        threads = min(self._threads, count)

        def one(lane: int) -> None:
            self._loop(first + lane, -(-(count - lane) // threads), threads, [self._views[lane]])

        workers.run(range(threads), one, lambda _lane, _result: None, threads=threads, ahead=threads, in_order=False)

    def _loop(self, first: int, count: int, stride: int, views: list[memoryview]) -> None:
        plan = self._plan
        size = self._image.size
        if not size:
            raise InvalidArgument("the image is empty", where=self._image.filename)
        request: Callable[[int, memoryview], None] = self._image.write if plan.write else self._image.read_into
        step = plan.step * stride
        # As the peer does: the first request goes to the offset given, even past the end.
        offset = plan.offset if not first else (plan.offset + first * plan.step) % size
        for _, view in zip(range(count), cycle(views), strict=False):
            request(offset, view)
            offset += step
            if offset >= size:
                offset %= size
