"""What some places need beyond a converted image: an archive around it, or a file without holes.

Google Compute Engine imports disk.raw in a tar file of the GNU kind, compressed with gzip.
"""

from __future__ import annotations

import os
import tarfile
from typing import TYPE_CHECKING, Final, cast

from ..errors import from_oserror
from ..profiles import Finding

if TYPE_CHECKING:
    from typing import IO

    from ..jobs.job import Control
    from ..profiles import Profile

__all__ = ["fill_holes", "lint_archive", "pack"]

_MEMBER: Final = "disk.raw"
_STEP: Final = 4 << 20
_LEVEL: Final = 2


def fill_holes(name: str) -> None:
    """Allocate all of the file ``name``.

    :raises ByreError: there is no space
    """
    try:
        with open(name, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.stat(name).st_size)
            os.fsync(file.fileno())
    except OSError as error:
        raise from_oserror(error, "cannot allocate all of the file", name) from None


def pack(raw: str, archive: str, control: Control) -> None:
    """Put the file ``raw`` into ``archive``.

    :raises ByreError: reading or writing fails, or it was cancelled; the archive is removed then
    """
    from isal import igzip

    try:
        length = os.stat(raw).st_size
        control.total = length
        with open(raw, "rb") as source, open(archive, "wb") as target:
            try:
                with igzip.open(target, "wb", compresslevel=_LEVEL) as packed:  # type: ignore[no-untyped-call]
                    _write_member(source, cast("IO[bytes]", packed), length, control)
                target.flush()
                os.fsync(target.fileno())
            except BaseException:
                os.unlink(archive)
                raise
    except OSError as error:
        raise from_oserror(error, "cannot write the archive", archive) from None


def _write_member(source: IO[bytes], packed: IO[bytes], length: int, control: Control) -> None:
    info = tarfile.TarInfo(_MEMBER)
    info.size, info.mode = length, 0o644
    packed.write(info.tobuf(tarfile.GNU_FORMAT))
    buffer = bytearray(_STEP)
    left = length
    while left:
        count = source.readinto(memoryview(buffer)[: min(left, _STEP)])  # type: ignore[attr-defined]
        packed.write(memoryview(buffer)[:count])
        left -= count
        control.advance(count)
    packed.write(bytes(-length % 512 + 1024))


def lint_archive(name: str, place: Profile) -> list[Finding]:
    """What the place would say of an archive: its first header is read."""
    import gzip
    import zlib

    convert = f"byre convert --for {place.name}"
    try:
        with gzip.open(name) as packed:
            head = packed.read(512)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise from_oserror(error, "cannot open", name) from None
        return [Finding(True, "the file is not compressed with gzip", convert)]
    try:
        info = tarfile.TarInfo.frombuf(head, "utf-8", "replace")
    except tarfile.HeaderError:
        return [Finding(True, "there is no tar archive in the file", convert)]
    findings = []
    if info.name != _MEMBER or not info.isreg():
        findings.append(Finding(True, f"the archive begins with {info.name!r}; it must hold {_MEMBER}", convert))
    if info.size % place.alignment or not info.size:
        findings.append(
            Finding(True, f"the disk has {info.size} bytes, which is no multiple of {place.alignment}", convert)
        )
    return findings
