"""stream: a layer takes in what it shows of the layers below it, and then does without them.

Works on an image in use, the active layer or one further down. Only what the layers above the base hold is copied, and
only where the layer itself holds nothing by then (:mod:`byre.graph.populate`), so that writers are never overwritten.
Order: copied data, reference counts | tables | the header names the base | success. The disk reads the same at any
moment, also after a crash, a failure or a cancellation; what was copied until then stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import ByreError, InvalidArgument
from ..graph import blockers, chain
from ..graph.live import Frozen, quiesce, settled
from ..graph.relinking import NewHeader, Relinked, backing_edges, backing_name, check_header, shortened
from ..graph.reopening import set_read_only
from ..image import Image
from ..io.workers import spare_threads
from ..units import KIB, MIB
from .above import ranges_above, take_back
from .behind import WriteBehind
from .errors_policy import check_policy
from .job import Job
from .livecopy import Policies, RangeFailed, sweep

if TYPE_CHECKING:
    from ..graph.graph import Graph
    from ..graph.node import Node
    from .job import Control
    from .journal import Journal

__all__ = ["StreamJob", "stream_journal"]

_CHUNK: Final = 2 * MIB
_LEAST: Final = 64 * KIB


class StreamJob(Job):
    """Copy into ``node`` what it shows of the layers above ``base``, which is its backing file afterwards.

    The layers between are closed where nobody else uses them. A job that is not started must be cancelled, so that it
    lets go of the chain.

    :param node: in ``graph``; a layer that is open read-only is writable while the job runs
    :param base: a layer below, which stays; ``None`` for no backing file at all
    :param bottom: instead of ``base``: the last layer that is copied from
    :param backing_file: how the header is to name the base; derived if left out
    :param on_error: "report", "ignore" (go on, and fail in the end), "stop", "enospc" or "auto"
    :param journal: of :func:`stream_journal`; deleted in the end
    :raises InvalidArgument: a base that is not below, both a base and a bottom, a name for no base
    :raises NotSupported: the format cannot change its backing file
    :raises Busy: another job works on one of the layers, or one cannot be written
    """

    kind = "stream"

    def __init__(self, graph: Graph, node: Node, base: Node | None = None, *, bottom: Node | None = None,
                 backing_file: str | None = None, on_error: str = "report", id: str = "", speed: int = 0,
                 auto_finalize: bool = True, auto_dismiss: bool = True,
                 journal: Journal | None = None) -> None:  # fmt: skip
        super().__init__(id=id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.journal = journal
        self.node = node = chain.skip_filters(node)
        self.backing_file = backing_file
        self.on_error = check_policy(on_error)
        self._graph = graph
        self._failed: ByreError | None = None
        self._relinked: Relinked | None = None
        with settled(graph, [node]):
            self.base = _base_of(node, base, bottom)
            if backing_file and self.base is None:
                raise InvalidArgument("a backing file name is given, but no base is to remain", where=node.filename)
            self._was_read_only = node.read_only
            self._take()

    def _take(self) -> None:
        """The chain is this job's from now on, as far as it works on it."""
        graph, node = self._graph, self.node
        edges = backing_edges(node, self.base)
        worked_on = [node, *chain.layers(node)[1 : max(len(edges), 1)]]
        for layer in worked_on:
            blockers.check(graph, layer, "stream")
        reason = f"block device is in use by block job: {self.kind}"
        self._blocking = blockers.Blocking(graph, worked_on, reason)
        self._frozen = Frozen(graph, edges, reason)
        try:
            if self._was_read_only:
                set_read_only(graph, node, False)
            header = backing_name(node, self.base)
            check_header(node, header if self.backing_file is None else NewHeader(self.backing_file, header.format))
            self._handle = Image(node, graph, unchanged=True, name=f"the {self.kind} job")
        except BaseException:
            self._let_go()
            raise

    def run(self, control: Control) -> None:
        node = self.node
        control.total = node.size
        least = max(_LEAST, getattr(node, "cluster_size", 1))
        chunk = max(_CHUNK, least)
        policies = Policies(self.on_error, self.on_error)
        while True:
            ranges = ranges_above(self._handle, self.base, control, chunk=chunk, least=least, top_too=False)
            with WriteBehind(node, early=False):
                whole = sweep(ranges, self._copy, control, policies, chunk=chunk, threads=self._threads())
            if whole or self.on_error == "ignore":
                break
            control.done = 0  # after a stop: what is there by now is passed over
        self._handle.within(node.flush)
        if self.on_error == "ignore" and self._failed is not None:
            raise self._failed

    def _threads(self) -> int:
        """A file in the page cache keeps a thread busy: one processor is left to the users of the disk then."""
        return spare_threads() if all(layer.buffered for layer in chain.layers(self.node)) else 0

    def _copy(self, offset: int, length: int) -> tuple[int, int]:
        node, base = self.node, self.base
        try:
            moved = self._handle.within(lambda: node.populate(offset, length, base=base))
        except ByreError as error:
            self._failed = self._failed or error
            raise RangeFailed(error, source=True) from error
        return length, moved

    def prepare(self) -> None:
        """The header is written here, which may fail."""
        self._frozen.release()
        if "backing" in self.node.children:
            self._relinked = shortened(self._graph, self.node, self.base, backing_file=self.backing_file)

    def commit(self) -> None:
        if self._relinked is not None:
            self._relinked.finish()
        if self.journal is not None:
            self.journal.remove()

    def abort(self) -> None:
        """If another job of the transaction failed, the layer stands on its old chain again."""
        take_back(self._relinked, self._graph)

    def clean(self) -> None:
        try:
            self._handle.close()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._frozen.release()
        self._blocking.release()
        if self._was_read_only and not self.node.closed and not self.node.read_only:
            with quiesce(self._graph, [self.node]):
                set_read_only(self._graph, self.node, True)


def stream_journal(path: str, node: Node, base: Node | None, *, resume: bool) -> Journal:
    """The journal of a stream into ``node``, which says no more than what is being done.

    What was copied is in the image itself, so a stream goes on where it was whenever it is started again.
    """
    from .journal import Journal, identity

    about = {"job": "stream", "image": identity(node, changing=True)[:1],
             "base": identity(base, changing=True)[:1] if base is not None else None}  # fmt: skip
    return Journal.begin(path, about, 0, MIB, resume=resume)


def _base_of(node: Node, base: Node | None, bottom: Node | None) -> Node | None:
    """The layer that stays the backing file.

    :raises InvalidArgument: it is not below ``node``
    """
    if base is not None and bottom is not None:
        raise InvalidArgument("'base' and 'bottom' cannot be specified at the same time", where=node.filename)
    below = chain.layers(node)[1:]
    given = bottom if base is None else base
    if given is None:
        return None
    given = chain.skip_filters(given)
    if given not in below:
        raise InvalidArgument(f"node {given.name!r} is not in the backing chain of {node.name!r}", where=node.filename)
    at = below.index(given) + (base is None)
    return below[at] if at < len(below) else None
