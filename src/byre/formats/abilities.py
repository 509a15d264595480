"""What only some formats can do; callers ask ``isinstance(node, HasCompression)``."""

from __future__ import annotations

from ..errors import NotSupported
from ..typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..bitmaps.bitmap import Bitmap
    from ..crypto.secrets import SecretProvider
    from ..graph.node import Node
    from ..jobs.job import Control
    from ..options import OptionValues

__all__ = [
    "Amendable",
    "BackingChangeable",
    "BitmapStore",
    "CheckResult",
    "Checkable",
    "Emptiable",
    "HasBitmaps",
    "HasCompression",
    "HasFormatInfo",
    "HasHoles",
    "HasSnapshots",
    "SnapshotEntry",
    "require_snapshots",
    "snapshot_holder",
]


class CheckResult(NamedTuple):
    """What ``check`` found; counts as ``qemu-img check --output json`` names them."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    messages: tuple[str, ...] = ()


@runtime_checkable
class HasCompression(Protocol):
    """Compressed clusters can be written."""

    cluster_size: int

    def write_compressed(self, offset: int, buffer: memoryview) -> None:
        """Write one cluster (or the shorter last one) compressed, or plain if it does not shrink."""

    def compress(self, buffer: memoryview) -> bytes | None:
        """The cluster's compressed form, ``None`` if it would not be smaller. Takes no lock; thread-safe."""

    def write_compressed_clusters(self, offset: int, payloads: list[bytes]) -> None:
        """Store consecutive clusters from ``offset`` that :meth:`compress` produced, packed, in one request."""


class BitmapStore(Protocol):
    """The dirty bitmaps of an image: the persistent ones and those that are only in memory."""

    @property
    def can_persist(self) -> bool:
        """Whether this image can keep bitmaps."""

    def entries(self) -> list[tuple[str, int, bool]]:
        """(name, granularity in bytes, inconsistent) of each persistent bitmap, without loading its bits."""

    def all(self) -> tuple[Bitmap, ...]:
        """All bitmaps, loaded."""

    def find(self, name: str) -> Bitmap:
        """:raises NotFound: there is none of that name"""

    def add(self, name: str, granularity: int = 0, *, persistent: bool = True, enabled: bool = True) -> Bitmap:
        """A new bitmap, all clean; granularity 0 is the default one.

        :raises AlreadyExists: there is one of that name
        """

    def remove(self, name: str) -> None:
        """:raises NotFound: there is none of that name"""


@runtime_checkable
class HasBitmaps(Protocol):
    """Dirty bitmaps can be kept in the image."""

    def bitmap_store(self) -> BitmapStore: ...


@runtime_checkable
class Checkable(Protocol):
    """The format's metadata can be checked, and mended."""

    def check(self, control: Control, fix: str = "") -> CheckResult:
        """:param fix: "", "leaks" or "all" """


class SnapshotEntry(Protocol):
    """One internal snapshot, as ``info`` shows it.

    :ivar date_sec: seconds since 1970
    :ivar vm_state_size: bytes of machine state
    """

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def date_sec(self) -> int: ...
    @property
    def date_nsec(self) -> int: ...
    @property
    def vm_clock_nsec(self) -> int: ...
    @property
    def vm_state_size(self) -> int: ...
    @property
    def disk_size(self) -> int | None: ...
    @property
    def icount(self) -> int | None: ...


@runtime_checkable
class HasSnapshots(Protocol):
    """The image keeps earlier states of the disk inside. Names are ids or names of snapshots, unless said otherwise."""

    @property
    def snapshots(self) -> Sequence[SnapshotEntry]: ...

    def create_snapshot(
        self, name: str, *, vm_state_size: int = 0, vm_clock_nsec: int = 0, icount: int | None = None
    ) -> SnapshotEntry:
        """Keep the disk as it is now; with the first ``vm_state_size`` bytes of machine state."""

    def apply_snapshot(self, name: str) -> None:
        """The disk becomes what it was then, in content and size."""

    def delete_snapshot(self, name: str) -> None:
        """Remove one, found by its name, else by its id."""

    def load_snapshot(self, name: str) -> None:
        """Show one instead of the disk; the node must be read-only, and stays so."""

    def load_snapshot_exactly(self, id: str | None, name: str | None) -> None:
        """As :meth:`load_snapshot`, for the one with this id and this name, where given."""

    def save_vmstate(self, offset: int, view: memoryview) -> None:
        """Write to the area of machine state behind the disk."""

    def load_vmstate(self, offset: int, view: memoryview) -> None:
        """Read from the area of machine state behind the disk; zeroes where nothing was written."""


def snapshot_holder(node: Node) -> HasSnapshots | None:
    """The node that has the snapshots of the disk ``node`` shows, below filters and raw; ``None`` if none has."""
    while not isinstance(node, HasSnapshots):
        if (node.kind != "filter" and node.driver != "raw") or len(node.children) != 1 or "file" not in node.children:
            return None
        node = node.children["file"].node
    return node


def require_snapshots(node: Node) -> HasSnapshots:
    """:raises NotSupported: :func:`snapshot_holder` finds none"""
    holder = snapshot_holder(node)
    if holder is None:
        raise NotSupported(f"driver {node.driver!r} has no internal snapshots", where=node.filename)
    return holder


@runtime_checkable
class HasFormatInfo(Protocol):
    def format_info(self) -> dict[str, object]:
        """The ``data`` of ``format-specific`` in ``info --output json``, keys in the peer's order."""


@runtime_checkable
class HasHoles(Protocol):
    def has_holes(self) -> bool:
        """Whether what it calls data may lie in holes of the file below, so that a look there is worthwhile."""


@runtime_checkable
class BackingChangeable(Protocol):
    def check_backing(self, name: str, format: str) -> None:
        """Refuse what :meth:`change_backing` would refuse, before anything is written.

        :raises NoSpace: the name is too long
        """

    def change_backing(self, name: str, format: str) -> None:
        """Record another backing file (or none: "") in the image; durable on return."""


@runtime_checkable
class KnowsParent(Protocol):
    """Refuses a backing file that was changed since the image was put on top of it."""

    def accept_changes_below(self) -> None:
        """The backing file is open for writing and about to be changed by somebody who keeps what the image reads as:
        it is known again afterwards. Durable on return.
        """


@runtime_checkable
class Emptiable(Protocol):
    def make_empty(self) -> None:
        """Everything becomes unallocated, so that the backing file shows; the space is given back."""


@runtime_checkable
class Amendable(Protocol):
    """Options of an existing image can be changed; the module of the format has ``AMEND_OPTIONS``."""

    def amend(self, options: OptionValues, control: Control, *, force: bool = False,
              secrets: SecretProvider | None = None) -> None:  # fmt: skip
        """Change what ``options`` say.

        :param force: allow what destroys data, such as erasing the last key slot
        :raises Cancelled: on request, with the image intact
        """
