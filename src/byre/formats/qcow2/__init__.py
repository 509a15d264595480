"""qcow2, QEMU's copy-on-write format, versions 2 and 3 (docs/interop/qcow2): the driver's entry points.

Options are declared here; what they do is in :mod:`.image` (opening), :mod:`.creation` and :mod:`.measurement`, loaded
when needed.
"""

from __future__ import annotations

from ...options import Option, OptionSet, OptionValues
from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ...graph.creating import CreateRequest
    from ...graph.node import Node
    from ...graph.opening import OpenRequest

__all__ = [
    "AMEND_OPTIONS",
    "CHILDREN",
    "CREATE_OPTIONS",
    "CREATE_PRINT_ORDER",
    "OPTIONS",
    "check_create",
    "create",
    "join_options",
    "measure",
    "open_node",
]

CHILDREN: Final = ("file", "backing", "data-file")

_TEMPLATES: Final = ("none", "constant", "cached", "all")
_TEMPLATE_HELP: Final = (
    "Selects which overlap checks to perform from a range of templates (none, constant, cached, all)"
)

OPTIONS: Final = OptionSet(
    Option("lazy-refcounts", "bool", "Postpone refcount updates"),
    Option("pass-discard-request", "bool", "Pass guest discard requests to the layer below"),
    Option("pass-discard-snapshot", "bool", "Generate discard requests when snapshot related space is freed", True),
    Option("pass-discard-other", "bool", "Generate discard requests when other clusters are freed", False),
    Option("discard-no-unref", "bool", "Do not unreference discarded clusters", False),
    Option("overlap-check", "enum", _TEMPLATE_HELP, None, _TEMPLATES),
    Option("overlap-check.template", "enum", _TEMPLATE_HELP, None, _TEMPLATES),
    Option("overlap-check.main-header", "bool", "Check for unintended writes into the main qcow2 header"),
    Option("overlap-check.active-l1", "bool", "Check for unintended writes into the active L1 table"),
    Option("overlap-check.active-l2", "bool", "Check for unintended writes into an active L2 table"),
    Option("overlap-check.refcount-table", "bool", "Check for unintended writes into the refcount table"),
    Option("overlap-check.refcount-block", "bool", "Check for unintended writes into a refcount block"),
    Option("overlap-check.snapshot-table", "bool", "Check for unintended writes into the snapshot table"),
    Option("overlap-check.inactive-l1", "bool", "Check for unintended writes into an inactive L1 table"),
    Option("overlap-check.inactive-l2", "bool", "Check for unintended writes into an inactive L2 table"),
    Option("overlap-check.bitmap-directory", "bool", "Check for unintended writes into the bitmap directory"),
    Option("cache-size", "size", "Maximum combined metadata (L2 tables and refcount blocks) cache size"),
    Option("l2-cache-size", "size", "Maximum L2 table cache size"),
    Option("l2-cache-entry-size", "size", "Size of each entry in the L2 cache"),
    Option("refcount-cache-size", "size", "Maximum refcount block cache size"),
    Option("cache-clean-interval", "int", "Clean unused cache entries after this time (in seconds)"),
    Option("encrypt.format", "enum", "Encryption format", None, ("aes", "luks")),
    Option("encrypt.key-secret", "str", "ID of secret providing qcow2 AES key or LUKS passphrase"),
)

CREATE_OPTIONS: Final = OptionSet(
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Image format of the base image"),
    Option("cluster_size", "size", "qcow2 cluster size", 65536),
    Option("compat", "enum", "Compatibility level (v2 [0.10] or v3 [1.1])", None, ("0.10", "1.1", "v2", "v3")),
    Option("compression_type", "enum", "Compression method used for image cluster compression", "zlib",
           ("zlib", "zstd")),
    Option("data_file", "str", "File name of an external data file"),
    Option("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    Option("encrypt.cipher-alg", "str", "Name of encryption cipher algorithm"),
    Option("encrypt.cipher-mode", "str", "Name of encryption cipher mode"),
    Option("encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'"),
    Option("encrypt.hash-alg", "str", "Name of encryption hash algorithm"),
    Option("encrypt.iter-time", "int", "Time to spend in PBKDF in milliseconds"),
    Option("encrypt.ivgen-alg", "str", "Name of IV generator algorithm"),
    Option("encrypt.ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
    Option("encrypt.key-secret", "str", "ID of secret providing qcow AES key or LUKS passphrase"),
    Option("encryption", "bool",
           "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"),
    Option("extended_l2", "bool", "Extended L2 tables", False),
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    Option("lazy_refcounts", "bool", "Postpone refcount updates", False),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("preallocation", "enum", "Preallocation mode (allowed values: off, metadata, falloc, full)", None,
           ("off", "metadata", "falloc", "full")),
    Option("refcount_bits", "int", "Width of a reference count entry in bits", 16),
    Option("size", "size", "Virtual disk size"),
)  # fmt: skip

AMEND_OPTIONS: Final = OptionSet(
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Image format of the base image"),
    Option("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Option("data_file", "str", "File name of an external data file"),
    Option("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    Option("encrypt.iter-time", "int", "Time to spend in PBKDF in milliseconds"),
    Option("encrypt.keyslot", "int", "Select a single keyslot to modify explicitly"),
    Option("encrypt.new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"),
    Option("encrypt.old-secret", "str", "Select all keyslots that match this password"),
    Option("encrypt.state", "str", "Select new state of affected keyslots (active/inactive)"),
    Option("lazy_refcounts", "bool", "Postpone refcount updates"),
    Option("refcount_bits", "int", "Width of a reference count entry in bits"),
    Option("size", "size", "Virtual disk size"),
)

CREATE_PRINT_ORDER: Final = (
    "encryption", "encrypt.format", "encrypt.key-secret", "encrypt.cipher-alg", "encrypt.cipher-mode",
    "encrypt.ivgen-alg", "encrypt.ivgen-hash-alg", "encrypt.hash-alg", "encrypt.iter-time", "cluster_size",
    "extended_l2", "preallocation", "compression_type", "size", "compat", "backing_file", "backing_fmt", "data_file",
    "data_file_raw", "lazy_refcounts", "refcount_bits", "nocow", "extent_size_hint",
)  # fmt: skip
"""The order in which "Formatting ..." names the options that are given or have a default."""


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image."""
    from .opening import open_qcow2

    return open_qcow2(request)


def join_options(before: dict[str, object], given: dict[str, object]) -> dict[str, object]:
    """What reopening makes of the options an image has and those that are new."""
    from . import runtime

    return runtime.join_options(before, given)


def check_create(options: OptionValues) -> None:
    """Refuse what :func:`create` would refuse, before a file is touched."""
    from .creation import plan

    plan(options)


def create(request: CreateRequest) -> None:
    """Write an empty image into ``request.file``."""
    from .creation import create_qcow2

    create_qcow2(request)


def measure(options: OptionValues, virtual_size: int, data_bytes: int | None = None) -> tuple[int, int]:
    """(required, fully allocated) file size in bytes; see :func:`.measurement.file_sizes`."""
    from .measurement import file_sizes

    return file_sizes(options, virtual_size, data_bytes)
