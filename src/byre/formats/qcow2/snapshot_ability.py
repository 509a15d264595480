"""The methods by which a qcow2 node has snapshots and machine state; see :mod:`.snapshots` and :mod:`.vmstate`.

Apart from them because most commands need neither, and those modules load numpy.
"""

from __future__ import annotations

import threading

from ...typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from .directories import Snapshot
    from .image import Qcow2Node

__all__ = ["WithSnapshots"]


def _node(ability: WithSnapshots) -> Qcow2Node:
    return cast("Qcow2Node", ability)


class WithSnapshots:
    """See :class:`byre.formats.abilities.HasSnapshots`.

    :ivar loaded_snapshot: the id of the snapshot that a read-only node shows instead of the active layer
    :ivar vmstate_lock: held while machine state is written
    """

    def init_snapshots(self) -> None:
        self.loaded_snapshot: str | None = None
        self.vmstate_lock = threading.Lock()
        self._snapshots: tuple[Snapshot, ...] | None = None

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """Entries of the snapshot table, read on first use."""
        if self._snapshots is None:
            from .opening import read_snapshots

            self._snapshots = read_snapshots(_node(self))
        return self._snapshots

    def create_snapshot(
        self, name: str, *, vm_state_size: int = 0, vm_clock_nsec: int = 0, icount: int | None = None
    ) -> Snapshot:
        from .snapshots import create

        return create(_node(self), name, vm_state_size=vm_state_size, vm_clock_nsec=vm_clock_nsec, icount=icount)

    def apply_snapshot(self, name: str) -> None:
        from .snapshots import apply

        apply(_node(self), name)

    def delete_snapshot(self, name: str) -> None:
        from .snapshots import delete

        delete(_node(self), name)

    def load_snapshot(self, name: str) -> None:
        from .snapshots import find, load

        load(_node(self), find(self.snapshots, name))

    def load_snapshot_exactly(self, id: str | None, name: str | None) -> None:
        from .snapshots import find_exactly, load

        load(_node(self), find_exactly(self.snapshots, id, name))

    def save_vmstate(self, offset: int, view: memoryview) -> None:
        from .vmstate import save

        save(_node(self), offset, view)

    def load_vmstate(self, offset: int, view: memoryview) -> None:
        from .vmstate import load

        load(_node(self), offset, view)
