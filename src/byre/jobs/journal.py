"""Journal: what a job has done so far, in a file of its own, so that another run can go on after a crash.

A header says which job on which disks it is; behind it stands a bit for each part of the disk: set once the part is
durable in the target. A bit is set only behind a flush of the target; if the part may change again, the bit is cleared,
and that is durable, before it does. So whatever moment the process dies at, a set bit is the truth.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import threading
import zlib
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Final

from ..errors import AlreadyExists, ByreError, ImageError, InvalidArgument, from_oserror
from ..graph import chain
from ..io.workers import spawn
from .bits import PAGE, all_set, any_set, fill, join, pages_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ..graph.node import Node

__all__ = ["Journal", "identity"]

MAGIC: Final = b"byre journal 1\r\n"
_HEAD = struct.Struct("<16sIIQQ")
BITS_AT: Final = 65536
"""Where the bits begin; all in front of them is the header."""
MAX_BITS: Final = 1 << 31
_INTERVAL: Final = 1.0
"""Seconds between two checkpoints."""


def identity(node: Node, *, above: Node | None = None, changing: bool = False) -> list[dict[str, object]]:
    """What tells a disk from others: for each layer its file, and unless ``changing`` its size and last change.

    What is no file has no last change that one could rely on; a job on it begins anew.

    :param above: this layer and those below it are left out
    """
    rows = []
    for layer in chain.layers(node):
        if layer is above:
            break
        below = layer
        while "file" in below.children:
            below = below.children["file"].node
        row: dict[str, object] = {"driver": layer.driver}
        found = getattr(below, "identity", None)
        if found is not None:
            row["file"] = list(found)
        if not changing:
            row["size"] = layer.size
            known = os.path.isfile(below.filename)
            row["changed"] = os.stat(below.filename).st_mtime_ns if known else monotonic()
        rows.append(row)
    return rows


class Journal:
    """An open journal. Thread-safe.

    Guarded by ``_lock``: the bits, and the file. ``_turn`` is held during a checkpoint, and taken before ``_lock``.

    :ivar about: which job on which disks, as the header has it
    :ivar size: of the disk, bytes
    :ivar granularity: bytes of the disk for each bit
    """

    def __init__(self, path: str, descriptor: int, about: Mapping[str, object], size: int, granularity: int,
                 bits: bytearray) -> None:  # fmt: skip
        self.path = path
        self.about = about
        self.size = size
        self.granularity = granularity
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._done = bits
        self._pending = bytearray(len(bits))
        self._flushing = bytearray(len(bits))
        self._pages: set[int] = set()
        self._writes: list[tuple[int, int]] = []
        self._copies: list[tuple[int, int, list[tuple[int, int]]]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- the file ---------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str, about: Mapping[str, object], size: int, granularity: int) -> Journal:
        """A new journal in which nothing is done; durable on return.

        :param about: which job on which disks; anything JSON can hold
        :raises AlreadyExists: there is a journal, of a job that was not finished
        :raises InvalidArgument: the disk has too many parts of this size
        """
        count = -(-size // granularity)
        if count > MAX_BITS:
            raise InvalidArgument(f"a journal of {count} parts is too large: choose a larger granularity")
        head = _header(about, size, granularity)
        bits = bytearray(-(-count // 8))
        cls.check_absent(path)
        descriptor, named = _new_file(path)
        try:
            # Its space is taken now: taking back what is done must not fail for want of it.
            os.posix_fallocate(descriptor, 0, BITS_AT + len(bits))
            os.fsync(descriptor)
            # The header comes last: a journal that has one is complete.
            os.pwrite(descriptor, head, 0)
            os.fsync(descriptor)
            if not named:
                # With a descriptor, however useless, the link in /proc is followed.
                os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)
            _sync_folder(path)
        except OSError as error:
            os.close(descriptor)
            if named:
                os.unlink(path)
            raise from_oserror(error, "cannot write the journal", path) from None
        return cls(path, descriptor, _plain(about), size, granularity, bits)

    @staticmethod
    def check_absent(path: str) -> None:
        """:raises AlreadyExists: a journal is there, of a job that was not finished; or another file
        :raises NotFound: there is no folder to make it in
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            if not os.path.isdir(os.path.dirname(path) or "."):
                raise from_oserror(error, "cannot make the journal", path) from None
            return
        except OSError as error:
            raise from_oserror(error, "cannot make the journal", path) from None
        try:
            is_journal = stat.S_ISREG(os.fstat(descriptor).st_mode) and os.pread(descriptor, 16, 0) == MAGIC
        finally:
            os.close(descriptor)
        if is_journal:
            raise AlreadyExists("the journal of an unfinished job is there", where=path,
                                hint="go on with --resume, or delete it to begin anew")  # fmt: skip
        raise AlreadyExists("there is a file that is no journal", where=path, hint="give the journal another name")

    @classmethod
    def open(cls, path: str) -> Journal:
        """The journal of an unfinished job.

        :raises NotFound: there is none
        :raises ImageError: the file is no journal, or was never complete
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise from_oserror(error, "cannot open the journal", path) from None
        try:
            return cls(path, descriptor, *_load(descriptor, path))
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def begin(cls, path: str, about: Mapping[str, object], size: int, granularity: int, *, resume: bool,
              vouched: bool = False) -> Journal:  # fmt: skip
        """A new journal or, with ``resume``, the one that is there; if a source has changed since, nothing is done.

        :param vouched: the caller knows that the sources were changed by the job's own users only
        :raises AlreadyExists: there is one, and it is not to be resumed
        :raises InvalidArgument: it is of another job
        :raises ImageError: it is damaged
        """
        if not (resume and os.path.exists(path)):
            return cls.create(path, about, size, granularity)
        journal = cls.open(path)
        try:
            journal.check(about)
            if (journal.size, journal.granularity) != (size, granularity):
                raise InvalidArgument(
                    f"the journal is of another job: a disk of {journal.size} bytes in parts of {journal.granularity}",
                    where=path, hint="delete the journal to begin anew",
                )  # fmt: skip
            if journal.about != _plain(about) and not vouched:
                journal.forget(about)
        except BaseException:
            journal.close()
            raise
        return journal

    def check(self, about: Mapping[str, object]) -> None:
        """When files were changed does not matter here.

        :raises InvalidArgument: the journal is of another job
        """
        wanted, found = _without_times(_plain(about)), _without_times(self.about)
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                raise InvalidArgument(
                    f"the journal is of another job: its {key} is {_brief(found.get(key))}, here it is "
                    f"{_brief(wanted.get(key))}",
                    where=self.path, hint="delete the journal to begin anew",
                )  # fmt: skip

    def forget(self, about: Mapping[str, object]) -> None:
        """Nothing is done any more; the sources are now as ``about`` says."""
        with self._lock:
            self._done[:] = bytes(len(self._done))
            self._write(set(range(-(-len(self._done) // PAGE))))
            try:
                os.pwrite(self._descriptor, _header(about, self.size, self.granularity), 0)
                os.fdatasync(self._descriptor)
            except OSError as error:
                raise from_oserror(error, "cannot write the journal", self.path) from None
            self.about = _plain(about)

    def close(self) -> None:
        """Stop, and keep the file."""
        self.stop()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """The job is finished: delete the file."""
        self.close()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise from_oserror(error, "cannot delete the journal", self.path) from None

    # -- what is done -----------------------------------------------------------------------------

    def left(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is not done yet, ascending."""
        position = 0
        for offset, length in self.done():
            if position < offset:
                yield position, offset - position
            position = offset + length
        if position < self.size:
            yield position, self.size - position

    def done(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is durable in the target, ascending."""
        import numpy as np

        unit = self.granularity
        with self._lock:
            bits = np.frombuffer(bytes(self._done), np.uint8)
        carry = -1
        for at in range(0, len(bits), PAGE):
            part = np.unpackbits(bits[at : at + PAGE], bitorder="little")
            edges = np.flatnonzero(np.diff(part, prepend=np.uint8(carry >= 0), append=part[-1:])).tolist()
            for edge in edges:
                if carry < 0:
                    carry = at * 8 + edge
                else:
                    yield carry * unit, min((at * 8 + edge) * unit, self.size) - carry * unit
                    carry = -1
        if carry >= 0:
            yield carry * unit, self.size - carry * unit

    def has(self, offset: int, length: int) -> bool:
        """Whether all of a range is durable in the target."""
        first, last = offset // self.granularity, -(-(offset + length) // self.granularity)
        with self._lock:
            return offset + length <= self.size and all_set(self._done, first, last)

    def finished(self, offset: int, length: int, spoiled: Iterable[tuple[int, int]] = ()) -> None:
        """The range was written to the target. It counts once it is durable, unless it is being changed again.

        :param spoiled: parts (first, behind) that were changed while the range was copied, see :meth:`begin_copy`
        """
        position, end = self._inside(offset, length)
        with self._lock:
            for low, high in sorted({*self._writes, *spoiled}):
                if position < min(low, end):
                    self._set(self._pending, position, min(low, end))
                position = max(position, high)
            if position < end:
                self._set(self._pending, position, end)

    def begin_copy(self, offset: int, length: int) -> list[tuple[int, int]]:
        """A range is about to be read that others may change meanwhile; to be ended with :meth:`end_copy`.

        :returns: the parts that are changed from now on, growing; for :meth:`finished`
        """
        unit = self.granularity
        first, last = offset // unit, -(-(offset + length) // unit)
        with self._lock:
            spoiled = list(self._writes)
            self._copies.append((first, last, spoiled))
        return spoiled

    def end_copy(self, spoiled: list[tuple[int, int]]) -> None:
        with self._lock:
            self._copies = [copy for copy in self._copies if copy[2] is not spoiled]

    def ensure(self, offset: int, length: int, flush: Callable[[], None]) -> None:
        """What was :meth:`finished` in a range is durable, and known to be, on return."""
        unit = self.granularity
        first, last = offset // unit, -(-(offset + length) // unit)
        with self._lock:
            waiting = any_set(self._pending, first, last) or any_set(self._flushing, first, last)
        if waiting:
            self.checkpoint(flush)

    def begin_change(self, offset: int, length: int) -> tuple[int, int]:
        """The range is about to change in the source: what is said of it is taken back, durably.

        Give the result to :meth:`end_change` when the job knows of the change.
        """
        unit = self.granularity
        first, last = offset // unit, -(-(offset + length) // unit)
        entry = (first, last)
        with self._lock:
            for bits in (self._pending, self._flushing):
                fill(bits, first, last, False)
            if any_set(self._done, first, last):
                fill(self._done, first, last, False)
                self._write(set(pages_of(first, last)))
            self._writes.append(entry)
            for low, high, spoiled in self._copies:
                if first < high and low < last:
                    spoiled.append(entry)
        return entry

    def end_change(self, entry: tuple[int, int]) -> None:
        with self._lock:
            self._writes.remove(entry)

    def _inside(self, offset: int, length: int) -> tuple[int, int]:
        """The parts that lie wholly in a range."""
        unit, end = self.granularity, offset + length
        return -(-offset // unit), -(-self.size // unit) if end >= self.size else end // unit

    def _set(self, bits: bytearray, first: int, last: int) -> None:
        fill(bits, first, last, True)
        self._pages.update(pages_of(first, last))

    # -- durability -------------------------------------------------------------------------------

    def checkpoint(self, flush: Callable[[], None]) -> None:
        """What is finished so far becomes durable, and then known to be. One at a time; others wait.

        :param flush: of the target
        :raises ByreError: the flush or a write to the journal failed
        """
        with self._turn:
            self._checkpoint(flush)

    def _checkpoint(self, flush: Callable[[], None]) -> None:
        with self._lock:
            if not self._pages:
                return
            pages, self._pages = self._pages, set()
            for page in pages:
                part = slice(page * PAGE, (page + 1) * PAGE)
                self._flushing[part] = join(self._flushing[part], self._pending[part])
                self._pending[part] = bytes(len(self._pending[part]))
        try:
            flush()
        except BaseException:
            with self._lock:
                self._pages |= pages
            raise
        with self._lock:
            for page in pages:
                part = slice(page * PAGE, (page + 1) * PAGE)
                self._done[part] = join(self._done[part], self._flushing[part])
                self._flushing[part] = bytes(len(self._flushing[part]))
            self._write(pages)

    def _write(self, pages: set[int]) -> None:
        try:
            for page in sorted(pages):
                os.pwrite(self._descriptor, self._done[page * PAGE : (page + 1) * PAGE], BITS_AT + page * PAGE)
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise from_oserror(error, "cannot write the journal", self.path) from None

    def start(self, flush: Callable[[], None],
              request: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:  # fmt: skip
        """Make a checkpoint every second, on a thread of its own, until :meth:`stop`.

        :param request: entered around each, before others have to wait for it: for a ``flush`` that passes the gates of
            its disks, so that their graph stays as it is meanwhile
        """

        def run() -> None:
            while not self._stop.wait(_INTERVAL):
                try:
                    with request():
                        self.checkpoint(flush)
                except ByreError:
                    return  # less is known to be done; the job meets the same error where it matters

        self._stop.clear()
        self._thread = spawn(run, "journal")

    @contextmanager
    def kept(self, flush: Callable[[], None]) -> Iterator[None]:
        """Checkpoints are made in the body, and one at the end if all went well.

        :raises ByreError: that last one failed
        """
        self.start(flush)
        try:
            yield
        finally:
            self.stop()
        self.checkpoint(flush)

    def stop(self) -> None:
        """No more checkpoints."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _header(about: Mapping[str, object], size: int, granularity: int) -> bytes:
    text = json.dumps(about).encode()
    if _HEAD.size + len(text) > BITS_AT:
        raise InvalidArgument("the names of the disks are too long for a journal")
    return _HEAD.pack(MAGIC, zlib.crc32(text), len(text), size, granularity) + text


def _plain(about: Mapping[str, object]) -> dict[str, object]:
    """As JSON gives it back."""
    plain: dict[str, object] = json.loads(json.dumps(about))
    return plain


def _without_times(about: Mapping[str, object]) -> dict[str, object]:
    def strip(value: object) -> object:
        if isinstance(value, list):
            return [strip(one) for one in value]
        if isinstance(value, dict):
            return {key: strip(one) for key, one in value.items() if key != "changed"}
        return value

    return {key: strip(value) for key, value in about.items()}


def _load(descriptor: int, path: str) -> tuple[dict[str, object], int, int, bytearray]:
    try:
        head = os.pread(descriptor, BITS_AT, 0)
        length = os.fstat(descriptor).st_size
    except OSError as error:
        raise from_oserror(error, "cannot read the journal", path) from None
    if len(head) < _HEAD.size or not head.startswith(MAGIC):
        raise ImageError("the file is no journal, or one that was never complete", where=path,
                         hint="leave out --resume, and give the journal another name")  # fmt: skip
    _, crc, size_of_text, size, granularity = _HEAD.unpack_from(head)
    text = head[_HEAD.size : _HEAD.size + size_of_text]
    count = -(-size // granularity) if granularity else MAX_BITS + 1
    if zlib.crc32(text) != crc or count > MAX_BITS or length != BITS_AT + -(-count // 8):
        raise ImageError("the journal is damaged", where=path, hint="delete it and begin anew")
    about = json.loads(text)
    if not isinstance(about, dict):
        raise ImageError("the journal is damaged", where=path, hint="delete it and begin anew")
    bits = bytearray(os.pread(descriptor, -(-count // 8), BITS_AT))
    return about, size, granularity, bits


def _new_file(path: str) -> tuple[int, bool]:
    """(descriptor, whether it has its name already: where it can be done without, it gets one when it is complete)."""
    try:
        return os.open(os.path.dirname(path) or ".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), False
    except OSError:
        pass  # not this kind of file system, or no such folder
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), True
    except OSError as error:
        raise from_oserror(error, "cannot make the journal", path) from None


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
