"""Active commit: what the layers of an image in use hold goes down into one of its backing files, which then takes its
place.

A mirror (:mod:`.mirror`) whose target lies below its source: what no layer above the base holds is there already. Two
phases as there: READY once the base reads as the image does, then complete (the users of the image use the base from
then on) or cancel (the image stays on top). The commit of layers that nobody writes to is in :mod:`.commit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ByreError
from ..graph import chain
from ..graph.live import Frozen, Tolerated, quiesce, settled
from ..graph.node import PERM_RESIZE
from ..graph.relinking import backing_edges
from ..graph.reopening import set_read_only
from .commit import check_base, keep_known
from .job import Job
from .livecopy import Policies
from .mirror import MirrorJob, MirrorOptions, default_granularity

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..image import Image
    from .journal import Journal

__all__ = ["ActiveCommitJob", "active_commit_journal"]


class ActiveCommitJob(MirrorJob):
    """Commit ``top``, the active layer, and those between into ``base``, while it is in use.

    A base that is shorter grows. Completed, the layers above the base are closed where nobody else uses them; their
    files still hold what they held, but the base has gone on.

    :param base: a layer below ``top``
    :param on_error: "report", "ignore", "stop", "enospc" or "auto"
    :param journal: of :func:`active_commit_journal`; what it says is done is not copied again, and it is deleted in the
        end
    :raises ByreError: as :func:`.commit.check_base` says; or another job works on one of them
    """

    kind = "commit"

    def __init__(self, top: Image, base: Node, *, id: str = "", on_error: str = "report", filter_name: str = "",
                 speed: int = 0, auto_finalize: bool = True, auto_dismiss: bool = True,
                 journal: Journal | None = None) -> None:  # fmt: skip
        Job.__init__(self, id=id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.journal = journal
        self.options = MirrorOptions(sync="top")
        self._frozen: Frozen | None = None
        self._tolerated: Tolerated | None = None
        base = chain.skip_filters(base)
        with settled(top.graph, [top, base]):
            check_base(top, base)
            self._was_read_only = base.read_only
            self._set_up(top, base, Policies(on_error, on_error), filter_name)
            # Writes to the base would be conflicts else: whoever writes the image must let others write below it.
            self._top.alone = False
            self._begin(base, leave=base)

    def _open_target(self) -> None:
        graph, base = self._graph, self._target_node
        edges = backing_edges(self._source_node, base)
        self._frozen = Frozen(graph, edges, f"the {self.kind} job relies on it")
        self._tolerated = Tolerated(graph, edges)
        if base.read_only:
            set_read_only(graph, base, False)
        super()._open_target()
        keep_known(graph, self._source_node, base)
        if base.size < self._source_node.size:
            edge = self._writer._root
            graph.set_image_permissions(edge, edge.used | PERM_RESIZE, edge.shared)
            try:
                base.resize(self._source_node.size)
            finally:
                graph.set_image_permissions(edge, edge.used & ~PERM_RESIZE, edge.shared)

    def clean(self) -> None:
        try:
            super().clean()
        finally:
            for hold in (self._frozen, self._tolerated):
                if hold is not None:
                    hold.release()

    def _close(self) -> None:
        graph, base, writer = self._graph, self._target_node, self._write
        if not self._moved and self._was_read_only and writer is not None and not base.closed:
            try:
                writer.flush()
                with quiesce(graph, [base]):
                    graph.set_image_permissions(writer._root, 0, writer._root.shared)
                    writer.read_only = True
                    set_read_only(graph, base, True)
            except ByreError as error:
                graph.warnings.append(f"the base stays open for writing: {error}")
        super()._close()


def active_commit_journal(path: str, top: Image, base: Node, *, resume: bool, vouched: bool = False) -> Journal:
    """The journal of a commit of ``top``, an active layer, into ``base``; see :meth:`.journal.Journal.begin`.

    :param vouched: since the job died, nobody has written to ``top``: what was written until then is accounted for
    """
    from .journal import Journal, identity

    base = chain.skip_filters(base)
    about = {"job": "active commit", "image": identity(top.node, above=base),
             "base": identity(base, changing=True)[:1]}  # fmt: skip
    return Journal.begin(path, about, top.size, default_granularity(base, MirrorOptions()), resume=resume,
                         vouched=vouched)  # fmt: skip
