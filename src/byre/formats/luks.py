"""luks: an encrypted volume as Linux's dm-crypt and cryptsetup have it, version 1; version 2 is read.

The header, eight key slots and their material lie before the payload, or in a file of their own (``header``). The
payload is the disk, sector by sector, encrypted with numbers that count from its beginning. What the header holds and
how a passphrase opens it is in :mod:`byre.crypto.luks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..crypto import luks
from ..crypto.locked import LockedCipher
from ..errors import ByreError, ImageError, InvalidArgument, NotSupported, ReadOnly
from ..graph.node import PERM_ALL, PERM_READ, PERM_RESIZE, PERM_WRITE
from ..io.extent import DATA, Extent
from ..options import Option, OptionSet
from ..units import align_down
from .base import FormatNode, Placement
from .encryption import NodeArea, given_secret, make_volume, spec_of, write_volume

if TYPE_CHECKING:
    from ..crypto.luks_slots import SlotChange
    from ..crypto.secrets import SecretProvider
    from ..graph.child import Child
    from ..graph.creating import CreateRequest
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest
    from ..io.extentmap import ExtentMap
    from ..jobs.job import Control
    from ..options import OptionValues

__all__ = [
    "AMEND_OPTIONS",
    "CREATE_OPTIONS",
    "CREATE_PRINT_ORDER",
    "OPTIONS",
    "LuksNode",
    "check_create",
    "create",
    "measure",
    "open_node",
]

CHILDREN: Final = ("file", "header")

OPTIONS: Final = OptionSet(Option("key-secret", "str", "ID of the secret that provides the keyslot passphrase"))

CREATE_OPTIONS: Final = OptionSet(
    Option("cipher-alg", "str", "Name of encryption cipher algorithm"),
    Option("cipher-mode", "str", "Name of encryption cipher mode"),
    Option("detached-header", "bool", "Create a detached LUKS header"),
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("hash-alg", "str", "Name of encryption hash algorithm"),
    Option("iter-time", "int", "Time to spend in PBKDF in milliseconds"),
    Option("ivgen-alg", "str", "Name of IV generator algorithm"),
    Option("ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
    Option("key-secret", "str", "ID of the secret that provides the keyslot passphrase"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("preallocation", "enum", "Preallocation mode (allowed values: off, falloc, full)", None,
           ("off", "metadata", "falloc", "full")),
    Option("size", "size", "Virtual disk size"),
)  # fmt: skip

AMEND_OPTIONS: Final = OptionSet(
    Option("iter-time", "int", "Time to spend in PBKDF in milliseconds"),
    Option("keyslot", "int", "Select a single keyslot to modify explicitly"),
    Option("new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"),
    Option("old-secret", "str", "Select all keyslots that match this password"),
    Option("state", "str", "Select new state of affected keyslots (active/inactive)"),
)

CREATE_PRINT_ORDER: Final = (
    "size", "key-secret", "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time",
    "detached-header", "nocow", "preallocation", "extent_size_hint",
)  # fmt: skip
"""The order in which "Formatting ..." names the options."""

MAX_SIZE: Final = (1 << 63) - 1


# -- opening --------------------------------------------------------------------------------------


def open_node(request: OpenRequest) -> LuksNode:
    """The node of an existing volume, unlocked unless only its metadata is asked for.

    :raises ImageError: the header breaks its format
    :raises AccessDenied: no secret is named, or it opens no key slot
    """
    file = request.open_child("file")
    header = request.open_child("header", plain=True) if request.has_child("header") else None
    area = NodeArea(header or file)
    flags = request.flags
    try:
        volume = luks.read_volume(area)
        _check_payload(volume, file)
        if file.read_only and not flags.read_only:
            flags = flags._replace(read_only=True)
        if volume.version == 2 and not flags.read_only:
            if not flags.auto_read_only:
                raise NotSupported("LUKS2 volumes can only be read", hint="open it read-only")
            flags = flags._replace(read_only=True)
        node = LuksNode(file, volume, area, request.options, flags, name=request.name)
        if flags.no_io:
            node.use_cipher(LockedCipher(file.filename))
        else:
            secret = given_secret(request, "key-secret")
            key = volume.unlock(area, secret, limit=request.opener.policy.max_iterations)
            node.use_cipher(volume.cipher(key))
    except ByreError as error:
        error.where = error.where or file.filename
        raise
    graph = request.opener.graph
    node.sources = (graph.attach(node, "file", file, "data" if header else "metadata"),)
    if header is not None:
        graph.attach(node, "header", header, "metadata")
        node.detached = True
    return node


def _check_payload(volume: luks.Volume, file: Node) -> None:
    if volume.payload_offset > file.size:
        raise ImageError(
            f"the payload begins at {volume.payload_offset:#x}, behind the end of the file at {file.size:#x}"
        )
    if volume.payload_offset + volume.payload_size > file.size:
        raise ImageError(f"the payload of {volume.payload_size} bytes at {volume.payload_offset:#x} reaches past the "
                         f"end of the file at {file.size:#x}")  # fmt: skip


class LuksNode(FormatNode):
    """An open volume. Guarded by ``lock``: size.

    :ivar volume: the header; holds no key
    :ivar detached: the header has a file of its own
    """

    driver = "luks"

    def __init__(self, file: Node, volume: luks.Volume, area: luks.Area, options: OptionValues, flags: OpenFlags, *,
                 name: str = "") -> None:  # fmt: skip
        super().__init__(name=name, filename=file.filename, read_only=flags.read_only)
        self.file = file
        self.volume = volume
        self.area = area
        self.runtime = options
        self.open_flags = flags
        self.force_share = flags.force_share
        self.detect_zeroes = flags.detect_zeroes
        self.cluster_size = self.zero_unit = volume.sector_size
        self.report = file.debug_event if file.takes_events else None
        self.encrypted = True
        self.detached = False
        self._payload = volume.payload_offset
        self.refresh_size()

    def holders(self) -> tuple[object, ...]:
        return (self.area,)

    def refresh_size(self) -> None:
        self.file.refresh_size()
        # Part of a sector cannot be decrypted.
        whole = self.volume.payload_size or self.file.size - self._payload
        self._size = align_down(max(whole, 0), self.volume.sector_size)

    # -- the format contract ----------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, DATA, self._payload + offset)]

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        from ..io.extentmap import ExtentMap

        return ExtentMap.from_extents(self.lookup(offset, length))

    def reserve(self, offset: int, length: int) -> list[Placement]:
        return [Placement(offset, length, self._payload + offset)]

    # -- abilities --------------------------------------------------------------------------------

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        """As :meth:`Node.resize`, but new space holds no zeroes: what lies there decrypts to anything."""
        if self.read_only:
            raise ReadOnly("cannot resize: the image is open read-only", where=self.filename)
        if size > MAX_SIZE - self._payload:
            raise InvalidArgument(f"a size of {size} bytes is too large", where=self.filename)
        with self.lock:
            self.inflight.wait_all()
            self.file.resize(self._payload + size, preallocation=preallocation, exact=exact)
            self._size = align_down(size, self.volume.sector_size)

    def format_info(self) -> dict[str, object]:
        return self.volume.info(detached=self.detached)

    def change_key_slots(self, change: SlotChange, secret: bytes, *, limit: int | None = None) -> None:
        """Add or erase key slots; see :func:`byre.crypto.luks_slots.change_slots`.

        :raises ReadOnly: the volume is open read-only
        """
        from ..crypto.keys import MAX_ITERATIONS
        from ..crypto.luks_slots import change_slots

        if self.read_only:
            raise ReadOnly("cannot change key slots: the image is open read-only", where=self.filename)
        try:
            self.volume = change_slots(self.area, change, secret, limit=limit or MAX_ITERATIONS)
        except ByreError as error:
            error.where = error.where or self.filename
            raise

    def amend(self, options: OptionValues, control: Control, *, force: bool = False,
              secrets: SecretProvider | None = None) -> None:  # fmt: skip
        """Change key slots as ``AMEND_OPTIONS`` say."""
        from .encryption import slot_change

        self.change_key_slots(*slot_change(options, self.runtime.text("key-secret"), secrets, force=force))

    # -- permissions and reopening ----------------------------------------------------------------

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        if self.force_share:
            return used & PERM_READ, PERM_ALL
        if child.name == "header":
            return PERM_READ | (0 if self.read_only else PERM_WRITE), PERM_ALL & ~(PERM_WRITE | PERM_RESIZE)
        # Apart from its header, a volume is what is in the file: who shares it shares the file.
        return used | PERM_READ, shared

    def reopen_commit(self, token: object) -> None:
        from ..graph.opening import OpenFlags

        assert isinstance(token, OpenFlags)
        with self.lock:
            self.open_flags = token
            self.read_only = token.read_only
            self.detect_zeroes = token.detect_zeroes

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        if options.text("key-secret") != self.runtime.text("key-secret"):
            raise InvalidArgument("key-secret of an open image cannot be changed", where=self.filename)
        if self.volume.version == 2 and not flags.read_only:
            raise NotSupported("LUKS2 volumes can only be read", where=self.filename)
        return flags


# -- creating -------------------------------------------------------------------------------------


def check_create(options: OptionValues) -> None:
    """Refuse what :func:`create` would refuse, before a file is touched."""
    length = luks.header_length(spec_of(options))
    if options.number("size") > MAX_SIZE - length:
        raise InvalidArgument(f"a size of {options.number('size')} bytes is too large")
    if options.flag("detached-header") and options.text("preallocation") not in (None, "off"):
        raise InvalidArgument("a detached header holds no payload that could be preallocated")


def create(request: CreateRequest) -> None:
    """Write a header with one key slot; the payload is not written, so it reads as anything."""
    request.spoil()
    options, file = request.options, request.file
    detached = options.flag("detached-header")
    volume = make_volume(request, detached=detached)
    size = 0 if detached else options.number("size")
    preallocation = options.text("preallocation") or "off"
    file.resize(volume.length + size, preallocation="off" if preallocation == "metadata" else preallocation)
    write_volume(NodeArea(file), volume)


def measure(options: OptionValues, virtual_size: int, _data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes; what is not written yet takes its place all the same."""
    length = luks.header_length(spec_of(options))
    total = length if options.flag("detached-header") else length + virtual_size
    return total, total
