"""Places that disk images are taken to, and what each accepts: for ``convert --for`` and ``lint``.

Every rule comes from what the place publishes for those who bring a disk; where it says nothing, nothing is demanded.
"""

from __future__ import annotations

import os

from .errors import InvalidArgument
from .typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .image import Image

__all__ = ["PROFILES", "Finding", "Profile", "lint", "profile"]

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_TIB: Final = 1 << 40
_STREAM: Final = "vmdk:streamOptimized"


class Profile(NamedTuple):
    """One place.

    :ivar title: its name in sentences
    :ivar format: what ``convert --for`` writes, with ``options`` unless the user has others
    :ivar alignment: the virtual size is a multiple of it, bytes
    :ivar max_size: largest virtual size, bytes
    :ivar accepted: formats it takes; for vmdk, vpc and vhdx with a subformat behind a colon, where not all will do
    :ivar extensions: how the name of the file must end, if that matters; without a dot, the whole name
    :ivar solid: the file must have no holes
    :ivar snapshots: internal snapshots are taken along
    """

    name: str
    title: str
    format: str
    options: tuple[tuple[str, str], ...]
    alignment: int
    max_size: int
    accepted: tuple[str, ...]
    extensions: tuple[str, ...] = ()
    solid: bool = False
    snapshots: bool = False


PROFILES: Final = (
    Profile("azure", "Azure", "vpc", (("subformat", "fixed"), ("force_size", "on")), _MIB, 4095 * _GIB, ("vpc:fixed",),
            (".vhd",)),
    Profile("hyperv", "Hyper-V", "vhdx", (("subformat", "dynamic"),), 512, 64 * _TIB, ("vhdx", "vpc"),
            (".vhdx", ".vhd"), solid=True),
    Profile("esxi", "ESXi", "vmdk", (("subformat", "streamOptimized"), ("adapter_type", "lsilogic")), _MIB, 62 * _TIB,
            ("vmdk:streamOptimized", "vmdk:vmfs"), (".vmdk",)),
    Profile("virtualbox", "VirtualBox", "vdi", (), 512, 2 * _TIB, ("vdi", "vmdk", "vpc"), (".vdi", ".vmdk", ".vhd")),
    Profile("aws", "AWS VM Import", "vmdk", (("subformat", "streamOptimized"), ("adapter_type", "lsilogic")), _MIB,
            16 * _TIB, ("vmdk:streamOptimized", "raw", "vpc", "vhdx")),
    Profile("gcp", "Google Compute Engine", "raw", (), _GIB, 64 * _TIB, ("raw",), ("disk.raw", ".tar.gz")),
    Profile("proxmox", "Proxmox VE", "qcow2", (("compat", "1.1"),), 512, 128 * _TIB, ("qcow2", "raw", "vmdk"),
            snapshots=True),
)  # fmt: skip


def profile(name: str) -> Profile:
    """:raises InvalidArgument: no place is called that"""
    for row in PROFILES:
        if row.name == name:
            return row
    raise InvalidArgument(f"unknown place {name!r}: expected one of {', '.join(row.name for row in PROFILES)}")


class Finding(NamedTuple):
    """Something a place minds.

    :ivar refused: it will not take the image; otherwise it takes it, but the user should know
    :ivar fix: what to do
    """

    refused: bool
    message: str
    fix: str = ""


def lint(image: Image, place: Profile) -> list[Finding]:
    """What ``place`` would say of an open image; nothing is read but its metadata."""
    convert = f"byre convert --for {place.name}"
    findings = [*_format(image, place, convert), *_size(image, place, convert), *_layers(image, place)]
    return [*findings, *_state(image), *_file(image, place)]


def _specific(image: Image) -> dict[str, object]:
    from .formats.abilities import HasFormatInfo

    return image.node.format_info() if isinstance(image.node, HasFormatInfo) else {}


def _kind(image: Image) -> str:
    """The subformat, in the words of the format."""
    about = _specific(image)
    return str(about.get("create-type", about.get("subformat", "")))


def _format(image: Image, place: Profile, convert: str) -> Iterator[Finding]:
    kind = _kind(image)
    if image.format in place.accepted or f"{image.format}:{kind}" in place.accepted:
        if f"{image.format}:{kind}" == _STREAM and _STREAM in place.accepted:
            yield from _stream(image, convert)
        return
    wanted = ", ".join(word.replace(":", " ") for word in place.accepted)
    has = f"{image.format} {kind}".rstrip()
    yield Finding(True, f"the format is {has}; {place.title} takes {wanted}", convert)


def _stream(image: Image, convert: str) -> Iterator[Finding]:
    headers: dict[int, object] = getattr(image.node, "headers", {})
    versions = [int(getattr(header, "version", 3)) for header in headers.values()]
    if any(version < 3 for version in versions):
        yield Finding(True, f"the header of the stream has version {min(versions)}; version 3 is expected", convert)


def _size(image: Image, place: Profile, convert: str) -> Iterator[Finding]:
    size = image.size
    if size % place.alignment:
        yield Finding(True, f"the virtual size is {size} bytes, which is no multiple of {place.alignment}",
                      f"{convert}, or byre resize")  # fmt: skip
    if size > place.max_size:
        yield Finding(True, f"the virtual size is {size} bytes; {place.title} takes up to {place.max_size}",
                      "shrink the file system in it, then byre resize --shrink")  # fmt: skip
    if size == 0:
        yield Finding(True, "the disk is empty")


def _layers(image: Image, place: Profile) -> Iterator[Finding]:
    name = str(getattr(image.node, "backing_name", ""))
    if name:
        yield Finding(True, f"the image needs the backing file {name!r}", "byre rebase -b '' makes it independent")
    about = _specific(image)
    if about.get("data-file"):
        yield Finding(True, f"the image needs the data file {about['data-file']!r}", "convert it into one file")
    if "encrypt" in about or getattr(image.node, "encrypted", False) or image.format == "luks":
        yield Finding(True, "the image is encrypted", "convert it with its key into one that is not")
    snapshots = getattr(image.node, "snapshots", ())
    if snapshots and not place.snapshots:
        yield Finding(False, f"{len(snapshots)} internal snapshots in the image are not taken along")


def _state(image: Image) -> Iterator[Finding]:
    about = _specific(image)
    if about.get("corrupt"):
        yield Finding(True, "the image is marked as corrupt", "byre check -r all")
    if about.get("log-empty") is False:
        yield Finding(True, "the log of the image has not been replayed", "byre check -r all")
    if getattr(image.node, "dirty", False):
        yield Finding(False, "the image was not shut down cleanly", "byre check -r leaks")


def _named_well(name: str, place: Profile) -> bool:
    return any(name.endswith(end) if end.startswith(".") else name == end for end in place.extensions)


def _file(image: Image, place: Profile) -> Iterator[Finding]:
    name = image.filename
    if place.extensions and not _named_well(os.path.basename(name).lower(), place):
        wanted = " or ".join(f"end in {end}" if end.startswith(".") else f"be {end}" for end in place.extensions)
        yield Finding(True, f"the name of the file must {wanted}", "rename it")
    edge = image.node.children.get("file")
    if edge is None:
        return
    length, occupied = edge.node.size, edge.node.allocated_size()
    if image.format == "vpc" and _kind(image) == "fixed" and length != image.size + 512:
        yield Finding(True, f"the file has {length} bytes; the disk and its footer have {image.size + 512}",
                      f"byre convert --for {place.name}")  # fmt: skip
    if place.solid and 0 <= occupied < length - _MIB // 8:
        yield Finding(
            True,
            f"the file has holes ({occupied} of {length} bytes are allocated); {place.title} refuses sparse files",
            f"fallocate -l {length} {os.path.basename(name)}",
        )
