"""A qcow2 node to oneself: for changes of its structures that no request may see half done."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...errors import ByreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .image import Qcow2Node

__all__ = ["exclusive"]


@contextmanager
def exclusive(node: Qcow2Node) -> Iterator[None]:
    """The node's lock is held and no request under way; everything is on disk, no L2 table cached.

    :raises IOFailure: the node is out of service
    """
    with node.lock:
        node.check_failure()
        claim = node.inflight.wait_idle()
        try:
            node.check_failure()
            node._before_change()
            node._guarded(node.settle)
            node._guarded(node.file.flush)
            node.mapping.l2.drop_all()
            yield
        except ByreError as error:
            error.where = error.where or node.filename
            raise
        finally:
            if node.failure is None:
                # Nothing is dirty in it, unless the caller left without writing back.
                node._guarded(node.settle)
                node.mapping.l2.drop_all()
            node.inflight.release(claim)
