"""Good images with random damage in their metadata, and what must hold whatever becomes of them.

Every step ends in success or a ByreError, soon, in little memory; without ``fix`` the file stays as it is. A finding
names the sample and the seed, with which :func:`attempt` does the same again.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import byre
from byre.cli.info import describe
from byre.errors import ByreError
from byre.formats.abilities import Checkable
from byre.graph.opening import Policy
from byre.image import Image
from byre.jobs.job import Control
from support.samples import Sample

__all__ = ["Bench", "Finding"]

MIB = 1 << 20
CPU_SECONDS = 4.0
"""Of processor time that one step may take."""
MEMORY = 224 * MIB
"""What one image may take on top of what is there; the limit for a whole program is 256 MiB."""
WINDOW = 64 * MIB
SECRETS = {"s": "correct horse"}
WORDS = (b"0", b"1", b"-1", b"4294967295", b"4294967296", b"9223372036854775807", b"18446744073709551616",
         b"1e9", b"0x10", b"9" * 400, b"", b"\xff\xfe", b"\x1b[31m", b"\0", b"\\", b'"', b"'", b"<", b"&amp;", b"]]>",
         b"nbd:localhost:1", b"json:{}", b"/dev/zero", b"/", b"..", b"FLAT", b"SPARSE", b"ZERO", b"RW", b"#",
         b"=", b" " * 300, "ü".encode(), b"\n", b"\r\n", b"A" * 5000)  # fmt: skip


class TooSlow(BaseException):
    """A step took too much processor time; no handler of errors swallows it."""


class Finding(Exception):
    """What must not be."""


class Bench:
    """One sample in a folder of its own, spoilt again and again."""

    def __init__(self, sample: Sample, folder: Path) -> None:
        self.sample = sample
        self.folder = folder
        self.path = sample.make(folder)
        self.good = self.path.read_bytes()
        self.files = {path: path.read_bytes() for path in folder.iterdir() if path != self.path and path.is_file()}
        self.slowest = 0.0
        self.most = 0
        self.outcomes: dict[str, int] = {}

    def attempt(self, seed: int, *, fix: bool = False) -> None:
        """
        :param fix: also mend and write, on what was spoilt
        :raises Finding: with the traceback or what else is wrong
        """
        chooser = random.Random(f"{self.sample.name} {seed}")
        spoilt = self._spoil(chooser)
        self.path.write_bytes(spoilt)
        stamp = self.path.stat()
        for name, step in self._steps(chooser):
            self._guard(seed, name, step)
        after = self.path.stat()
        if (stamp.st_mtime_ns, stamp.st_size) != (after.st_mtime_ns, after.st_size):
            raise Finding(f"{self.sample.name} seed {seed}: reading changed the image")
        if fix:
            for name, step in self._changes(chooser):
                self._guard(seed, name, step)
            for path, content in self.files.items():
                path.write_bytes(content)

    # -- damage -----------------------------------------------------------------------------------

    def _spoil(self, chooser: random.Random) -> bytes:
        data = bytearray(self.good)
        if self.sample.text:
            return bytes(_spoil_text(data, chooser))
        for _ in range(chooser.choice((1, 1, 2, 3, 8))):
            self._spoil_place(data, chooser)
        if chooser.random() < 0.05:
            del data[chooser.randrange(len(data)) :]
        elif chooser.random() < 0.03:
            data += chooser.randbytes(chooser.choice((1, 511, 512, 70_000)))
        if self.sample.seal is not None and chooser.random() < 0.85:
            with contextlib.suppress(struct.error):
                self.sample.seal(data)
        return bytes(data)

    def _spoil_place(self, data: bytearray, chooser: random.Random) -> None:
        begin, end = chooser.choice(self.sample.areas or ((0, 112), (0, len(data))))
        begin, end = begin % (len(data) + 1), end % (len(data) + 1) if end > 0 else len(data) + end
        at = chooser.randrange(begin, max(end, begin + 1))
        how = chooser.random()
        if how < 0.2:
            data[at % len(data)] ^= 1 << chooser.randrange(8)
        elif how < 0.3:
            data[at % len(data)] = chooser.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif how < 0.4:
            _put(data, at, chooser.randbytes(chooser.choice((2, 4, 8, 16, 64))))
        elif how < 0.5:
            other = chooser.randrange(begin, max(end, begin + 1))
            _put(data, at & ~3, bytes(data[other & ~3 : (other & ~3) + chooser.choice((4, 8, 16))]))
        else:
            width = chooser.choice((2, 4, 4, 8, 8))
            value = self._number(chooser, width)
            order = self.sample.order if chooser.random() < 0.9 else "<>"[self.sample.order == "<"]
            _put(data, at - at % width, struct.pack(order + {2: "H", 4: "I", 8: "Q"}[width], value))

    def _number(self, chooser: random.Random, width: int) -> int:
        length = len(self.good)
        value = chooser.choice((
            0, 1, 2, 3, 7, 63, 64, 511, 512, 513, 4095, 4096, 65535, 65536, MIB, length, length - 1, length + 1,
            length // 512, length // 512 + 1, length - 512, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 32, 1 << 40,
            1 << 52, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 63) - 512, (1 << 64) - 1, (1 << 64) - 512,
            1 << chooser.randrange(64), chooser.randrange(1 << 64),
        ))  # fmt: skip
        return (value + chooser.choice((0, 0, 0, 1, -1))) % (1 << 8 * width)

    # -- steps ------------------------------------------------------------------------------------

    def _open(self, **more: Any) -> Image:
        sample = self.sample
        spec: Any = str(self.path)
        if sample.options:
            spec = {"driver": sample.format, "file": {"driver": "file", "filename": spec}, **sample.options}
        return byre.open(spec, secrets=SECRETS, policy=Policy(max_iterations=200_000), **more)

    def _steps(self, chooser: random.Random) -> Iterator[tuple[str, Callable[[], None]]]:
        def info() -> None:
            with byre.open(str(self.path), no_io=True, backing=False) as image:
                text = json.dumps(describe(image.node))
            if re.search(r"[\x00-\x1f]", text):
                raise Finding("info has control characters outside its escapes")

        def check() -> None:
            with self._open(check=True, backing=False) as image:
                if isinstance(image.node, Checkable):
                    result = image.node.check(Control(), "")
                    if any(not message.replace("\n", "").isprintable() for message in result.messages):
                        raise Finding(f"check speaks unprintable: {result.messages}")

        def use() -> None:
            with self._open(format=self.sample.format) if not self.sample.options else self._open() as image:
                size = image.size
                places = [(0, 70_000), (max(0, size - 5000), 5000)]
                places += [(chooser.randrange(size), 9000) for _ in range(3) if size]
                for at, length in places:
                    length = min(length, size - at)
                    with contextlib.suppress(ByreError):
                        if length > 0 and len(image.read(at, length)) != length:
                            raise Finding("read gives another length")
                with contextlib.suppress(ByreError):
                    window = min(size, WINDOW)
                    at = chooser.choice((0, size - window))
                    _judge_map(image, at, window)

        return iter((("info", info), ("check", check), ("read", use)))

    def _changes(self, chooser: random.Random) -> Iterator[tuple[str, Callable[[], None]]]:
        original = self.path.read_bytes()

        def mend() -> None:
            with self._open(check=True, backing=False, read_only=False) as image:
                if isinstance(image.node, Checkable):
                    image.node.check(Control(), "all")

        def write() -> None:
            self.path.write_bytes(original)
            with self._open(read_only=False) as image:
                size = image.size
                for _ in range(4):
                    at = chooser.randrange(max(size, 1))
                    length = min(chooser.choice((512, 5000, 70_000)), size - at)
                    if length <= 0:
                        continue
                    kind = chooser.randrange(4)
                    with contextlib.suppress(ByreError):
                        if kind < 2:
                            image.write(at, b"w" * length)
                            image.flush()
                            if image.read(at, length) != b"w" * length:
                                raise Finding("what was written does not read back")
                        elif kind == 2:
                            image.write_zeroes(at, length)
                        else:
                            image.discard(at, length)
                with contextlib.suppress(ByreError):
                    image.resize(size + MIB)

        return iter((("mend", mend), ("write", write)))

    def _guard(self, seed: int, name: str, step: Callable[[], None]) -> None:
        where = f"{self.sample.name} seed {seed} {name}"
        before = _memory()
        old = signal.signal(signal.SIGPROF, _alarm)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        started = time.process_time()
        try:
            step()
            outcome = "fine"
        except ByreError as error:
            outcome = "refused"
            said = f"{error}"
            if not said or not said.isprintable():
                raise Finding(f"{where}: the error is not printable: {said!r}") from None
        except Finding as error:
            raise Finding(f"{where}: {error}") from None
        except TooSlow:
            raise Finding(f"{where}: still busy after {CPU_SECONDS} s\n{traceback.format_exc(limit=-8)}") from None
        except BaseException:
            raise Finding(f"{where}:\n{traceback.format_exc(limit=-6)}") from None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, old)
        self.slowest = max(self.slowest, time.process_time() - started)
        taken = _peak() - before
        self.most = max(self.most, taken)
        if taken > MEMORY:
            raise Finding(f"{where}: took {taken // MIB} MiB")
        key = f"{name} {outcome}"
        self.outcomes[key] = self.outcomes.get(key, 0) + 1


def _judge_map(image: Image, at: int, length: int) -> None:
    position = at
    for row in image.extents(at, length):
        if row.offset != position or row.length <= 0:
            raise Finding(f"the map goes on at {row.offset} with {row.length} bytes, expected {position}")
        position += row.length
    if position != at + length:
        raise Finding(f"the map ends at {position} instead of {at + length}")


def _put(data: bytearray, at: int, content: bytes) -> None:
    content = content[: max(0, len(data) - at)]
    data[at : at + len(content)] = content


def _spoil_text(data: bytearray, chooser: random.Random) -> bytearray:
    for _ in range(chooser.choice((1, 1, 2, 4))):
        how = chooser.randrange(6)
        numbers = [match.span() for match in re.finditer(rb"[0-9]+", data)]
        words = [match.span() for match in re.finditer(rb"[A-Za-z0-9_.{}-]+", data)]
        lines = data.split(b"\n")
        if how == 0 and numbers:
            begin, end = chooser.choice(numbers)
            data[begin:end] = chooser.choice(WORDS)
        elif how == 1 and words:
            begin, end = chooser.choice(words)
            data[begin:end] = chooser.choice(WORDS)
        elif how == 2:
            at = chooser.randrange(len(lines))
            lines.insert(chooser.randrange(len(lines)), lines[at])
            data = bytearray(b"\n".join(lines))
        elif how == 3:
            del lines[chooser.randrange(len(lines))]
            data = bytearray(b"\n".join(lines))
        elif how == 4 and len(words) > 1:
            (begin, end), (other, stop) = chooser.choice(words), chooser.choice(words)
            data[begin:end] = bytes(data[other:stop])
        elif data:
            data[chooser.randrange(len(data))] = chooser.randrange(256)
    return data


def _alarm(*_: object) -> None:
    raise TooSlow


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(key))


def _memory() -> int:
    """Bytes in use; the peak counts from now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")
