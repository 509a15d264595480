"""What only some formats can do; callers ask ``isinstance(node, HasCompression)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ..jobs.job import Control

__all__ = ["BackingChangeable", "CheckResult", "Checkable", "HasCompression", "HasFormatInfo", "HasHoles"]


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


@runtime_checkable
class Checkable(Protocol):
    """The format's metadata can be checked, and mended."""

    def check(self, control: Control, fix: str = "") -> CheckResult:
        """:param fix: "", "leaks" or "all" """


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
    def change_backing(self, name: str, format: str) -> None:
        """Record another backing file (or none: "") in the image."""
