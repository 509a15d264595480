"""VhdxNode: a VHDX image as a node; joins mapping and journal to the format contract.

Opening is in :mod:`.opening`, resizing in :mod:`.resizing`, checking in :mod:`.check`.
"""

from __future__ import annotations

from ...errors import NotSupported, ReadOnly
from ...graph.child import Child
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR
from ..stored import StoredFormat
from .journal import Journal
from .log import PAGE
from .mapping import Mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...graph.node import Node
    from ...graph.opening import OpenFlags
    from ...io.extent import Extent
    from ...io.extentmap import ExtentMap
    from ...jobs.job import Control
    from ...options import OptionValues
    from ..abilities import CheckResult
    from ..base import Placement
    from .layout import Header, Parameters, Region

__all__ = ["VhdxNode"]

_DIRTY_PAGES: Final = 4096
"""Changed pages of the block table that may wait for the next flush: 16 MiB."""


class VhdxNode(StoredFormat):
    """An open VHDX image. Guarded by ``lock``: mapping, journal, size.

    :ivar view: the file with its log replayed; where the image is only read, in memory
    :ivar parameters: what the metadata say
    :ivar regions: block table, metadata, and others that are not known
    :ivar replayed: a log was replayed into the file since the last check
    """

    driver = "vhdx"
    parameters: Parameters
    mapping: Mapping
    journal: Journal

    def __init__(self, file: Node, options: OptionValues, flags: OpenFlags, *, name: str = "") -> None:
        super().__init__(file, options, flags, name=name)
        self.view = file
        self.zero_unit = SECTOR
        self.regions: tuple[Region, ...] = ()
        self.replayed = False

    def load(self, view: Node, header: Header, index: int, regions: tuple[Region, ...],
             parameters: Parameters) -> None:  # fmt: skip
        """Take over what :mod:`.opening` read."""
        from . import layout

        self.view = view
        self.regions = regions
        self.parameters = parameters
        self.cluster_size = parameters.block_size
        self._size = parameters.size
        self.journal = Journal(self.file, header, index)
        table = next(region for region in regions if region.guid == layout.BAT_REGION)
        log = layout.Region(layout.NO_GUID, header.log_offset, header.log_length)
        self.mapping = Mapping(view, parameters, table.offset, (*regions, log), self.filename, self.relieve)
        if "file" in self.children:
            main = self.children["file"]
            self.sources = (main if view is self.file else Child(view, "file", "data", self),)

    def holders(self) -> tuple[object, ...]:
        return self.journal, self.mapping, self.mapping.table, self.view

    def child_moved(self, child: Child, before: Node) -> None:
        super().child_moved(child, before)
        if self.view is before:
            self.view = child.node

    @property
    def has_zero_init(self) -> bool:
        return not self.mapping.fixed or self.file.has_zero_init

    # -- the format contract ----------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> list[Extent]:
        return self.mapping.lookup(offset, length)

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        return self.mapping.lookup_all(offset, length)

    def in_place(self, offset: int, length: int) -> int:
        if not self.journal.begun or self.report is not None:
            return -1
        return self.mapping.in_place(offset, length)

    def reserve(self, offset: int, length: int) -> list[Placement]:
        self.before_change()
        return self.mapping.reserve(offset, length)

    def publish(self, placements: Sequence[Placement]) -> None:
        self.mapping.publish(placements)

    def cancel(self, placements: Sequence[Placement]) -> None:
        self.mapping.cancel(placements)

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        self.before_change()
        return self.mapping.unmap(offset, length, kind, keep)

    def before_change(self) -> None:
        """The headers say that the file is being written; changes do not pile up without bound. Lock held."""
        if not self.journal.begun:
            self.guarded(self.journal.begin)
        if len(self.mapping.table.dirty) > _DIRTY_PAGES:
            self.guarded(self.write_back)

    def write_back(self) -> None:
        """Data | log entry | block table in place (RELIABILITY 2.3); given up blocks may be used again then."""
        table = self.mapping.table
        if table.dirty:
            self.file.flush()
            self.journal.commit({table.offset + number * PAGE: table.page(number) for number in sorted(table.dirty)})
            table.dirty.clear()
        if self.mapping.released:
            self._reclaim()

    def _reclaim(self) -> None:
        """No entry on disk names these blocks any more: theirs is free space once no request uses it."""
        released, self.mapping.released = self.mapping.released, []
        size, mapping, punch = self.cluster_size, self.mapping, self.pass_discard

        def give_back() -> None:
            for host in released:
                if punch:
                    self.file.discard(host, size)
            mapping.free += released

        self.inflight.when_clear(give_back)

    def relieve(self) -> None:
        self.guarded(self.write_back)

    def guarded(self, action: Callable[[], None]) -> None:
        """A metadata change that fails half way takes the node out of service; one that is refused does not."""
        try:
            action()
        except NotSupported:
            raise
        except BaseException as error:
            self.fail_stop(error)
            raise

    # -- abilities --------------------------------------------------------------------------------

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        if self.read_only:
            raise ReadOnly("cannot resize: the image is open read-only", where=self.filename)
        from .resizing import resize

        resize(self, size, preallocation)

    def check(self, control: Control, fix: str = "") -> CheckResult:
        from .check import check_image

        return check_image(self, control)

    def has_holes(self) -> bool:
        return True  # blocks are large, and much of a new one is never written

    def format_info(self) -> dict[str, object]:
        from .opening import describe

        return describe(self)

    def chain_opened(self) -> None:
        if self.backing is not None:
            from .opening import check_parent

            check_parent(self, self.backing.node)

    # -- reopening and closing --------------------------------------------------------------------

    def settle(self) -> None:
        """Write everything back and say in the headers that the log is empty. Lock held."""
        self.guarded(self.write_back)
        if self.journal.active:
            self.guarded(self.file.flush)
            self.guarded(self.journal.end)

    def inactivate(self) -> None:
        super().inactivate()
        with self.lock:
            if not self.read_only and self.failure is None:
                self.settle()

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        if not flags.read_only:
            check_writable(self.parameters, self.filename)
        with self.lock:
            if not self.read_only and self.failure is None:
                self.settle()
        return flags, options

    def reopen_commit(self, token: object) -> None:
        super().reopen_commit(token)
        with self.lock:
            self.journal.begun = False

    def reopen_finish(self) -> None:
        if not self.read_only and self.view is not self.file:
            from .opening import reload

            with self.lock:
                self.guarded(lambda: reload(self))


def check_writable(parameters: Parameters, where: str) -> None:
    """:raises NotSupported: a differencing disk"""
    if parameters.has_parent:
        raise NotSupported("differencing disks can only be read", where=where, hint="open it read-only")
