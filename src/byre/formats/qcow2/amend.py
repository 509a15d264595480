"""amend: options of an existing qcow2 image, changed where it lies.

What each option needs is elsewhere: :mod:`.version`, :mod:`.width`, :mod:`.header_update`, :mod:`.resizing`, key slots
in :mod:`.encryption`. Here is what the options mean, what is refused before anything changes, and the order: features
that need version 3 after going up, and going down last of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...errors import InvalidArgument, NotSupported, ReadOnly
from . import header_update, layout, version, width

if TYPE_CHECKING:
    from ...crypto.luks_slots import SlotChange
    from ...crypto.secrets import SecretProvider
    from ...jobs.job import Control
    from ...options import OptionValues
    from .image import Qcow2Node

__all__ = ["amend"]

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


class _Wanted(NamedTuple):
    """What the image is to be; ``None`` for what stays.

    :ivar order: log2 of the width of reference counts
    :ivar data_file: "" to forget the name
    """

    version: int
    order: int
    lazy: bool
    raw: bool
    data_file: str | None
    size: int | None
    slots: SlotChange | None
    key: bytes


def amend(node: Qcow2Node, options: OptionValues, control: Control, *, force: bool = False,
          secrets: SecretProvider | None = None) -> None:  # fmt: skip
    """Change what ``options`` say (``AMEND_OPTIONS``) and nothing else.

    :param force: allow what destroys data: the last key slot
    :raises ByreError: it is not possible; nothing has changed
    :raises Cancelled: in between; the image is intact
    """
    if node.read_only:
        raise ReadOnly("cannot amend: the image is open read-only", where=node.filename)
    try:
        wanted = _understood(node, options, force, secrets)
        _check(node, options, wanted)
    except InvalidArgument as error:
        error.where = error.where or node.filename
        raise
    header = node.header
    if wanted.order != header.refcount_order:
        width.check_width(node, wanted.order)
        control.total += width.steps_of(node)
    if wanted.version < header.version:
        control.total += version.downgrade_steps(node)
    _carry_out(node, wanted, control)


def _carry_out(node: Qcow2Node, wanted: _Wanted, control: Control) -> None:
    if wanted.version > node.header.version:
        version.upgrade(node)
    if wanted.slots is not None:
        node.change_key_slots(wanted.slots, wanted.key)
    if wanted.order != node.header.refcount_order:
        width.change_width(node, wanted.order, control)
    _change_header(node, wanted)
    if wanted.size is not None:
        node.resize(wanted.size)
        node.flush()
    if wanted.version < node.header.version:
        version.downgrade(node, control)


# -- what is wanted -------------------------------------------------------------------------------


def _understood(node: Qcow2Node, options: OptionValues, force: bool, secrets: SecretProvider | None) -> _Wanted:
    header = node.header
    compat = options.text("compat")
    if compat is not None and compat not in _VERSIONS:
        raise InvalidArgument(f"unknown compatibility level {compat!r}: expected 0.10 (v2) or 1.1 (v3)")
    bits = options.optional_number("refcount_bits")
    if bits is not None and (not 1 <= bits <= 64 or bits & (bits - 1)):
        raise InvalidArgument(f"refcount_bits is {bits}, allowed is a power of two from 1 to 64")
    slots, key = _slot_change(node, options, force, secrets)
    return _Wanted(
        version=header.version if compat is None else _VERSIONS[compat],
        order=header.refcount_order if bits is None else bits.bit_length() - 1,
        lazy=options.flag("lazy_refcounts") if "lazy_refcounts" in options else header.lazy_refcounts,
        raw=options.flag("data_file_raw") if "data_file_raw" in options else header.raw_data_file,
        data_file=options.text("data_file"),
        size=options.optional_number("size") or None,
        slots=slots,
        key=key,
    )


def _slot_change(node: Qcow2Node, options: OptionValues, force: bool,
                 secrets: SecretProvider | None) -> tuple[SlotChange | None, bytes]:  # fmt: skip
    """What is to become of key slots, and the passphrase that opens the image now.

    :raises InvalidArgument: the image is not encrypted with LUKS; or the options contradict each other
    """
    if not any(name.startswith("encrypt.") for name in options.given):
        return None, b""
    if not node.header.crypt_method:
        raise InvalidArgument("cannot amend encryption options: the image is not encrypted")
    if node.header.crypt_method != layout.CRYPT_LUKS:
        raise NotSupported("only LUKS encryption options can be amended", where=node.filename)
    from ..encryption import slot_change

    return slot_change(options, node.runtime.text("encrypt.key-secret"), secrets, prefix="encrypt.", force=force)


def _check(node: Qcow2Node, options: OptionValues, wanted: _Wanted) -> None:
    """:raises ByreError: what cannot be; nothing has changed"""
    header = node.header
    bits = 1 << wanted.order
    if wanted.version < 3:
        if wanted.lazy and not (header.version == 3 and "lazy_refcounts" not in options):
            raise InvalidArgument("lazy_refcounts needs version 3", hint="use compat=1.1")
        if header.version < 3 and bits != 16:
            raise InvalidArgument("refcount_bits other than 16 need version 3", hint="use compat=1.1")
        if header.version > 2:
            version.check_downgrade(node, bits)
            version.check_snapshots(node, wanted.size or header.size)
    if wanted.data_file is not None and not header.has_data_file:
        raise InvalidArgument("data_file can be set only for an image that uses an external data file")
    if wanted.raw and not header.raw_data_file:
        raise InvalidArgument("data_file_raw cannot be set on existing images")
    _check_backing(node, options)


def _check_backing(node: Qcow2Node, options: OptionValues) -> None:
    """The backing file may be named, as it is."""
    name, format = options.text("backing_file"), options.text("backing_fmt")
    if name is None and format is None:
        return
    if (name or "") != node.backing_name or (format or "") != _recorded_format(node):
        raise InvalidArgument("cannot amend the backing file", hint='use "byre rebase"')


def _recorded_format(node: Qcow2Node) -> str:
    data = layout.find_extension(node.extensions, layout.EXTENSION_BACKING_FORMAT)
    return (data or b"").decode("utf-8", "surrogateescape")


# -- the header -----------------------------------------------------------------------------------


def _change_header(node: Qcow2Node, wanted: _Wanted) -> None:
    """Feature bits and the data file's name."""
    with node.lock:
        node.check_failure()
        node._before_change()
        node._guarded(node.settle)
        header, extensions = node.header, node.extensions
        fields: dict[str, object] = {}
        if wanted.raw != header.raw_data_file:
            fields["autoclear_features"] = header.autoclear_features & ~layout.AUTOCLEAR_RAW_DATA
        if wanted.lazy != header.lazy_refcounts and header.version >= 3:
            fields["compatible_features"] = header.compatible_features ^ layout.COMPATIBLE_LAZY_REFCOUNTS
        if wanted.data_file is not None:
            name = wanted.data_file.encode("utf-8", "surrogateescape") or None
            extensions = header_update.with_extension(extensions, layout.EXTENSION_DATA_FILE, name)
        if fields or extensions != node.extensions:
            header_update.update(node, fields, extensions)
        node._guarded(node.tune)
