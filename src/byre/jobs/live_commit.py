"""Commit of layers between: what a backing file and those below it hold goes down into a base, under a disk in use.

Nobody writes to the layers concerned, so that one walk is enough; the guest, further up, goes on. Order: the base
grows | its data and tables are durable | every overlay's header names the base | success. The overlays read the same
at any moment. The commit of the active layer is another job (:mod:`.active_commit`).
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

from ..errors import AccessDenied, ByreError, InvalidArgument
from ..graph import blockers, chain
from ..graph.live import Frozen, Tolerated, quiesce, settled
from ..graph.relinking import NewHeader, Relinked, backing_edges, backing_name, check_header, dropped, overlays_of
from ..graph.reopening import set_read_only
from ..image import Image
from .above import ranges_above, take_back
from .blockcopy import CopySettings
from .errors_policy import check_policy
from .job import Job
from .livecopy import LiveCopy, Policies, sweep

if TYPE_CHECKING:
    from ..graph.graph import Graph
    from ..graph.node import Node
    from .job import Control
    from .journal import Journal

__all__ = ["LiveCommitJob", "live_commit_journal"]

_RETRY: Final = 0.2
_JOURNAL_PART: Final = 1 << 20
_LEAST: Final = 1 << 16


class LiveCommitJob(Job):
    """Commit ``top`` and the layers between into ``base``, which takes their place under every overlay of ``top``.

    A base that is shorter grows; of one that is longer, what the overlays would see behind the end of ``top`` becomes
    zeroes, as they read there so far. Afterwards the layers above the base are closed where nobody else uses them;
    files of layers between the two do not read as they did. A job that is not started must be cancelled, so that it
    lets go of the chain.

    :param top: the backing file of another layer
    :param base: a layer below it
    :param backing_file: how the headers of the overlays are to name the base; derived if left out
    :param on_error: "report", "ignore" (try again later), "stop", "enospc" or "auto"
    :param journal: of :func:`live_commit_journal`; what it says is done is not copied again; it is deleted in the end
    :raises InvalidArgument: ``base`` is not below ``top``, or ``top`` is an active layer
    :raises NotSupported: an overlay's format cannot change its backing file
    :raises AccessDenied: the format of the base is a guess
    :raises Busy: another job works on one of the layers
    """

    kind = "commit"

    def __init__(self, graph: Graph, top: Node, base: Node, *, backing_file: str | None = None,
                 on_error: str = "report", id: str = "", speed: int = 0, auto_finalize: bool = True,
                 auto_dismiss: bool = True, journal: Journal | None = None) -> None:  # fmt: skip
        super().__init__(id=id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.journal = journal
        self.top, self.base = top, base = chain.skip_filters(top), chain.skip_filters(base)
        self.backing_file = backing_file
        self.on_error = check_policy(on_error)
        self._graph = graph
        with settled(graph, [top, base]):
            _check(graph, top, base, backing_file)
            reason = f"block device is in use by block job: {self.kind}"
            edges = backing_edges(top, base)
            self._blocking = blockers.Blocking(graph, chain.layers(top)[: len(edges) + 1], reason)
            links = [*edges, *(overlay.children["backing"] for overlay in overlays_of(top))]
            self._frozen = Frozen(graph, links, reason)
            self._tolerated = Tolerated(graph, edges)
            self._was_read_only = base.read_only
        self._relinked: Relinked | None = None
        self._source: Image | None = None
        self._target: Image | None = None

    def run(self, control: Control) -> None:
        source, target = self._open()
        tail = self._tail()
        control.total = source.size + sum(length for _, length in tail)
        if target.size < source.size:
            target.within(lambda: self.base.resize(source.size))
        copy = LiveCopy(source, target, CopySettings(sparse=0, unmap=True), base=self.base)
        with self.journal.kept(target.flush) if self.journal is not None else nullcontext():
            while not self._sweep(copy, tail, control):
                control.done = 0
                if self.on_error == "ignore":
                    control.wait(_RETRY)
        target.flush()
        self._close()

    def _sweep(self, copy: LiveCopy, tail: list[tuple[int, int]], control: Control) -> bool:
        journal = self.journal

        def work(offset: int, length: int) -> tuple[int, int]:
            if journal is not None and journal.has(offset, length):
                return length, 0
            with copy.request():
                moved = copy.copy(offset, length)
            if journal is not None:
                journal.finished(offset, length)
            return length, moved

        least = max(_LEAST if journal is None else _JOURNAL_PART, getattr(self.base, "cluster_size", 0))
        ranges = ranges_above(copy.source, self.base, control, chunk=copy.chunk, least=least, top_too=True)
        policies = Policies(self.on_error, self.on_error)
        with copy.behind:
            return sweep(itertools.chain(ranges, tail), work, control, policies, chunk=copy.chunk)

    def _tail(self) -> list[tuple[int, int]]:
        """What the base holds behind the end of the top layer, where the overlays read zeroes so far."""
        end = min(self.base.size, max(overlay.size for overlay in overlays_of(self.top)))
        return list(chain.windows(self.top.size, end, 1 << 30))

    def _open(self) -> tuple[Image, Image]:
        graph, base = self._graph, self.base
        if base.read_only:
            with quiesce(graph, [base]):
                set_read_only(graph, base, False)
        name = f"the {self.kind} job"
        self._source = source = Image(self.top, graph, name=name)
        self._target = target = Image(base, graph, read_only=False, resizable=True, name=name)
        return source, target

    def _close(self) -> None:
        """Let go of the disks; the base is read-only again."""
        graph, base = self._graph, self.base
        handles = [handle for handle in (self._source, self._target) if handle is not None]
        self._source = self._target = None
        failed: ByreError | None = None
        for handle in handles:
            try:
                handle.close()
            except ByreError as error:
                failed = failed or error
        if self._was_read_only and not base.closed and not base.read_only:
            with quiesce(graph, [base]):
                set_read_only(graph, base, True)
        if failed is not None:
            raise failed

    def prepare(self) -> None:
        """The headers are written here, which may fail."""
        self._frozen.release()
        self._relinked = dropped(self._graph, self.top, self.base, backing_file=self.backing_file)

    def commit(self) -> None:
        if self._relinked is not None:
            self._relinked.finish()
        if self.journal is not None:
            self.journal.remove()

    def abort(self) -> None:
        """If another job of the transaction failed, the overlays stand on the old chain again."""
        take_back(self._relinked, self._graph)

    def clean(self) -> None:
        try:
            self._close()
        finally:
            for hold in (self._tolerated, self._frozen, self._blocking):
                hold.release()


def live_commit_journal(path: str, top: Node, base: Node, *, resume: bool) -> Journal:
    """The journal of a commit of ``top`` into ``base``; see :meth:`.journal.Journal.begin`."""
    from .journal import Journal, identity

    about = {"job": "commit", "image": identity(top, above=base), "base": identity(base, changing=True)[:1]}
    return Journal.begin(path, about, top.size, _JOURNAL_PART, resume=resume)


def _check(graph: Graph, top: Node, base: Node, backing_file: str | None) -> None:
    layers = chain.layers(top)
    if base not in layers[1:]:
        raise InvalidArgument("the base is not below the top layer", where=base.filename)
    overlays = overlays_of(top)
    if not overlays:
        raise InvalidArgument("the top layer is the backing file of no other: it is an active layer",
                              where=top.filename, hint="commit it as such, in two phases")  # fmt: skip
    above = layers[layers.index(base) - 1]
    if getattr(above, "backing_name", "") and not getattr(above, "backing_format", "") \
            and not hasattr(above, "backing_override") \
            and getattr(above, "records_backing_format", True):  # fmt: skip
        raise AccessDenied("the format of this backing file is not recorded, so it is not written to",
                           where=base.filename, hint="record it: rebase -u -b FILENAME -F FORMAT")  # fmt: skip
    for overlay in overlays:
        header = backing_name(overlay, base)
        check_header(overlay, header if backing_file is None else NewHeader(backing_file, header.format))
    for layer in layers[: layers.index(base)]:
        blockers.check(graph, layer, "commit-source")
    blockers.check(graph, base, "commit-target")
