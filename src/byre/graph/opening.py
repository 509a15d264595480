"""Opening: from a name or options to nodes.

Every file that an image names passes one gate, :class:`Policy`; everything else was named by the user.
The backing files below are :mod:`.backing`'s matter.
"""

from __future__ import annotations

import os

from ..catalog import PROBE_SIZE, TAIL_SIZE, Driver, by_prefix, driver, probe
from ..errors import AccessDenied, InvalidArgument
from ..options import Option, OptionSet, OptionValues, convert, parse_json, unflatten
from ..typing import TYPE_CHECKING, NamedTuple, cast
from .node import Node

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    from ..crypto.secrets import SecretProvider
    from .graph import Graph

__all__ = [
    "CHAIN_LIMIT",
    "COMMON_OPTIONS",
    "FLAG_FIELDS",
    "OpenFlags",
    "OpenRequest",
    "Opener",
    "Policy",
    "parse_filename",
]

CHAIN_LIMIT: Final = 200

Spec = "Mapping[str, object] | str"


class OpenFlags(NamedTuple):
    """What a node inherits from the one above, unless its own options say otherwise.

    :ivar direct: bypass the page cache (``cache.direct``)
    :ivar no_flush: ignore flushes (``cache.no-flush``)
    :ivar unmap: pass discards down (``discard=unmap``)
    :ivar detect_zeroes: "off", "on" or "unmap"
    :ivar force_share: take no locks that keep others out; read-only
    :ivar auto_read_only: fall back to read-only where writing is not possible
    :ivar no_backing: leave backing files closed
    :ivar no_io: metadata only: a key may be missing, data files may stay closed
    :ivar check: opened to be checked: damage is no reason to refuse, and nothing is mended on the way
    """

    read_only: bool = True
    direct: bool = False
    no_flush: bool = False
    unmap: bool = True
    detect_zeroes: str = "off"
    force_share: bool = False
    auto_read_only: bool = False
    no_backing: bool = False
    no_io: bool = False
    check: bool = False

    def for_file(self) -> OpenFlags:
        """For data and metadata children."""
        return self._replace(unmap=True, detect_zeroes="off")

    def for_backing(self) -> OpenFlags:
        return self._replace(read_only=True, unmap=False, detect_zeroes="off", auto_read_only=False)


class Policy(NamedTuple):
    """Which files an image may name: the gate of all implicit opens.

    :ivar mode: "allow", "deny", or "below" the given ``folders``
    :ivar allow_references: ``json:`` and protocol names as backing files
    :ivar max_size: largest virtual size accepted, bytes; 0 for the format's own limit
    :ivar max_bitmaps: most dirty bitmaps accepted; 0 for the format's own limit
    :ivar max_iterations: of key derivation, that the header of an encrypted image may ask for
    :ivar named: (image, name): what the user had put into that image a moment ago
    """

    mode: str = "allow"
    folders: tuple[str, ...] = ()
    allow_references: bool = False
    max_size: int = 0
    max_bitmaps: int = 0
    max_iterations: int = 100_000_000
    named: tuple[tuple[str, str], ...] = ()

    @classmethod
    def untrusted(cls, max_size: int = 16 << 40) -> Policy:
        """For images nobody vouches for: nothing they name is opened."""
        return cls("deny", max_size=max_size, max_bitmaps=64)

    def check(self, name: str, path: str | None, what: str, where: str) -> None:
        """:param name: as the image has it
        :param path: the file it resolves to, ``None`` if it is no plain path
        :param what: "backing file", "data file", ...
        :raises AccessDenied: the image may not name this
        """
        by_user = (where, name) in self.named
        if self.mode == "deny" and not by_user:
            raise AccessDenied(f"the image names the {what} {name!r}, which is not opened for an untrusted image",
                               where=where, hint="give it explicitly if you trust it")  # fmt: skip
        if path is None:
            if what != "backing file":
                raise AccessDenied(f"the image names the {what} {name!r}; only plain files are accepted there",
                                   where=where)  # fmt: skip
            if not self.allow_references and not by_user:
                raise AccessDenied(f"the image names the {what} {name!r}, which is not a plain file name",
                                   where=where, hint="use --allow-ref if you trust the image")  # fmt: skip
            return
        if self.mode == "below" and not by_user:
            real = os.path.realpath(path)
            if not any(os.path.commonpath((real, os.path.realpath(f))) == os.path.realpath(f) for f in self.folders):
                raise AccessDenied(f"the image names the {what} {name!r}, which lies outside the allowed folders",
                                   where=where)  # fmt: skip


COMMON_OPTIONS = OptionSet(
    Option("driver", "str", "driver name"),
    Option("node-name", "str", "name of the node"),
    Option("read-only", "bool", "open read-only"),
    Option("auto-read-only", "bool", "open read-only where writing is not possible"),
    Option("force-share", "bool", "share all permissions"),
    Option("discard", "enum", "pass discards down", None, ("ignore", "off", "unmap", "on")),
    Option("detect-zeroes", "enum", "turn writes of zeroes into zero writes", None, ("off", "on", "unmap")),
    Option("cache.direct", "bool", "bypass the page cache"),
    Option("cache.no-flush", "bool", "ignore flushes"),
    Option("cache.writeback", "bool", "do not wait for the disk at every write"),
)


def has_protocol(name: str) -> bool:
    """Whether ``name`` begins with ``word:`` rather than being a path (a slash before the colon makes a path)."""
    head, colon, _ = name.partition(":")
    return bool(colon) and "/" not in head


def parse_filename(name: str) -> dict[str, object]:
    """Options for what a user typed: a path, ``driver:rest``, or ``json:{...}``.

    :raises InvalidArgument: an unknown ``word:`` prefix
    """
    if name.startswith("json:"):
        return parse_json(name[5:])
    if has_protocol(name):
        prefix, _, rest = name.partition(":")
        row = by_prefix(prefix)
        if row is None:
            raise InvalidArgument(f"unknown protocol {prefix!r} in {name!r}",
                                  hint="write ./ before a file name that holds a colon")  # fmt: skip
        if row.name == "file":
            # Shown, and given again, as a path.
            return {"driver": "file", "filename": f"./{rest}" if has_protocol(rest) else rest}
        module = row.load()
        parse_name = getattr(module, "parse_name", None)
        if parse_name is not None:  # the prefix says something, too
            return {"driver": row.name, **parse_name(name)}
        parse = getattr(module, "parse_filename", None)
        parsed: dict[str, object] = parse(rest) if parse else {"filename": rest}
        return {"driver": row.name, **parsed}
    return {"driver": "file", "filename": name}


class OpenRequest:
    """What a driver's ``open_node`` is given.

    :ivar row: the catalog row
    :ivar name: node name, "" to have one generated
    :ivar flags: after the node's own options were applied
    :ivar options: the driver's own options, typed
    :ivar implicit: an image named this file, not the user
    :ivar protocol: what is opened lies below a format, so that names mean bytes, not images
    """

    def __init__(self, opener: Opener, row: Driver, name: str, flags: OpenFlags, options: OptionValues,
                 children: dict[str, object], implicit: bool, file: Node | None,
                 protocol: bool = False) -> None:  # fmt: skip
        self.opener = opener
        self.row = row
        self.name = name
        self.flags = flags
        self.options = options
        self.children = children
        self.implicit = implicit
        self.protocol = protocol
        self._file = file

    def open_child(self, name: str, *, default: object = None, flags: OpenFlags | None = None,
                   plain: bool = False) -> Node:  # fmt: skip
        """The node for child ``name``, as options or a node name given by the user, else ``default``.

        It is not attached yet: the new node calls ``request.opener.graph.attach(node, name, child, role)``.

        :param plain: it holds bytes, not an image: no format is looked for (always so for a format's "file" and
            what lies below it)
        :raises InvalidArgument: the child is required and was not given
        """
        if name == "file" and self._file is not None:
            return self._file
        spec = self.children.get(name, default)
        if spec is None:
            raise InvalidArgument(f"driver {self.row.name!r} needs a child {name!r}")
        plain = plain or self.protocol or (name == "file" and self.row.kind == "format")
        return self.opener.open(spec, flags or self.flags.for_file(), protocol=plain)

    def has_child(self, name: str) -> bool:
        return self.children.get(name) is not None


class Opener:
    """Opens nodes into one graph; if anything fails, all it opened is closed again.

    :ivar secrets: where drivers look for the keys that their options name
    """

    def __init__(self, graph: Graph, policy: Policy, secrets: SecretProvider | None = None) -> None:
        self.graph = graph
        self.policy = policy
        self.secrets = secrets
        self._created: list[Node] = []

    def open_chain(self, spec: object, flags: OpenFlags, *, driver_name: str = "") -> Node:
        """Open ``spec`` and, unless ``flags.no_backing``, its whole backing chain.

        :param spec: a name, a nested dict of options, or the name of an existing node
        :param driver_name: the format to use; "" probes
        :raises ByreError: as the driver says; nothing stays open then
        """
        try:
            top = self.open(spec, flags, driver_name=driver_name)
            if not flags.no_backing:
                from .backing import open_backing_files

                open_backing_files(self, self._created)
                for node in self._created:
                    node.chain_opened()
            return top
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        for node in reversed(self._created):
            for edge in list(node.children.values()):
                self.graph.detach(edge)
        for node in reversed(self._created):
            if self.graph.nodes.get(node.name) is node:
                del self.graph.nodes[node.name]
            node.close()
        self._created.clear()

    # -- one node ---------------------------------------------------------------------------------

    def open(self, spec: object, flags: OpenFlags, *, driver_name: str = "", protocol: bool = False,
             implicit: bool = False) -> Node:  # fmt: skip
        """One node with the children it cannot do without (no backing file).

        A name is an image, whose format is looked for; options that name a driver mean that driver's node.

        :param protocol: ``spec`` names bytes, not an image: do not probe a format over them
        """
        if isinstance(spec, str):
            if spec in self.graph.nodes:
                return self.graph.nodes[spec]
            given = parse_filename(spec)
        elif isinstance(spec, dict):
            given = unflatten(spec)
        else:
            raise InvalidArgument(f"expected a name or options, found {spec!r}")
        by_name = implicit or "driver" not in given or (isinstance(spec, str) and not spec.startswith("json:"))
        filename = given.get("filename")
        if isinstance(filename, str) and isinstance(given.get("file"), dict):
            # A name, and options for the file it names.
            below = cast("dict[str, object]", given["file"])
            given = {key: value for key, value in given.items() if key != "filename"}
            given["file"] = {**parse_filename(filename), **below}
            filename = None
        if "driver" not in given and isinstance(filename, str) and "file" not in given:
            rest = {key: value for key, value in given.items() if key != "filename"}
            given = {**parse_filename(filename), **rest}
        if isinstance(given.get("driver"), str):
            row = driver(str(given["driver"]))
            if isinstance(filename, str) and by_prefix(filename.partition(":")[0]) is row and ":" in filename:
                given = {
                    **{key: value for key, value in given.items() if key != "filename"},
                    **parse_filename(filename),
                }
            if row.kind == "format" and "file" not in given and isinstance(filename, str):
                given = {key: value for key, value in given.items() if key != "filename"}
                given["file"] = filename
            if row.kind != "format" and not protocol and (driver_name or by_name) and driver_name != row.name:
                return self._open_over(given, flags, driver_name, implicit)
            return self._open_row(row, given, flags, implicit, None, protocol)
        if "file" not in given:
            raise InvalidArgument("options must name a driver, a filename or a file")
        own_file = given["file"]
        file = self.open(own_file, self._own_flags(given, flags)[0].for_file(), protocol=True, implicit=implicit)
        return self._open_format(file, given, flags, driver_name)

    def _open_over(self, given: dict[str, object], flags: OpenFlags, driver_name: str, implicit: bool) -> Node:
        """A format node over a protocol (or filter) node given by ``given``.

        Common options and those that the protocol does not know go to the format.
        """
        row = driver(str(given["driver"]))
        below = {"driver", *getattr(row.load(), "CHILDREN", ())}
        below |= {option.name.partition(".")[0] for option in row.load().OPTIONS.options}
        common = {key: given.pop(key) for key in list(given) if key in _FORMAT_KEYS or key not in below}
        own = self._own_flags(common, flags)[0]
        file = self._open_row(row, given, own.for_file(), implicit, None, True)
        return self._open_format(file, common, flags, driver_name)

    def _open_format(self, file: Node, given: dict[str, object], flags: OpenFlags, driver_name: str) -> Node:
        probed = not driver_name
        row = driver(driver_name) if driver_name else self.probe(file)
        if row.kind == "protocol":
            raise InvalidArgument(f"driver {row.name!r} is not an image format", where=file.filename)
        own = {key: value for key, value in given.items() if key not in ("driver", "file", "filename")}
        node = self._open_row(row, own, flags, False, file)
        if probed and row.name == "raw" and hasattr(node, "probed"):
            node.probed = True
        return node

    @staticmethod
    def probe(file: Node) -> Driver:
        """The format of the image in ``file``; its end is looked at only where its beginning says nothing."""
        size = file.size
        head = bytearray(min(PROBE_SIZE, size))
        if head:
            file.read_into(0, memoryview(head))
        found = probe(bytes(head))
        if found.name != "raw" or size < TAIL_SIZE:
            return found
        tail = bytearray(TAIL_SIZE)
        file.read_into(size - TAIL_SIZE, memoryview(tail))
        return probe(bytes(head), bytes(tail))

    def _own_flags(self, given: Mapping[str, object], flags: OpenFlags) -> tuple[OpenFlags, dict[str, object]]:
        """(flags after the common options in ``given``, what remains)."""
        rest = dict(given)
        cache = rest.pop("cache", None)
        if isinstance(cache, dict):
            rest.update({f"cache.{key}": value for key, value in cache.items()})
        changes: dict[str, object] = {}
        for option in COMMON_OPTIONS.options:
            if option.name not in rest:
                continue
            value = convert(option, rest.pop(option.name))
            if option.name in FLAG_FIELDS:
                changes[FLAG_FIELDS[option.name]] = value
            elif option.name == "discard":
                changes["unmap"] = value in ("unmap", "on")
            elif option.name == "node-name":
                rest["node-name"] = value
        changed = flags._replace(**changes)  # type: ignore[arg-type]
        if changed.detect_zeroes == "unmap" and not changed.unmap:
            raise InvalidArgument("detect-zeroes=unmap needs discard=unmap: what may not be discarded is not unmapped")
        return changed, rest

    def _open_row(self, row: Driver, given: dict[str, object], flags: OpenFlags, implicit: bool,
                  file: Node | None, protocol: bool = False) -> Node:  # fmt: skip
        own, rest = self._own_flags(given, flags)
        name = str(rest.pop("node-name", ""))
        module = row.load()
        declared: OptionSet = module.OPTIONS
        children: dict[str, object] = {}
        plain: dict[str, object] = {}
        for key, value in rest.items():
            if isinstance(value, dict) or (key in getattr(module, "CHILDREN", ()) and key not in declared):
                children[key] = value
            else:
                plain[key] = value
        for key in [key for key in children if key not in getattr(module, "CHILDREN", ())]:
            nested = children.pop(key)
            if isinstance(nested, dict):
                from ..options import flatten

                plain.update(flatten({key: nested}))
        options = declared.parse(plain, what=f"driver {row.name!r}")
        request = OpenRequest(self, row, name, own, options, children, implicit, file, protocol)
        node: Node = module.open_node(request)
        node.driver = row.name
        node.options = dict(given)
        if own.detect_zeroes != "off":
            from .zeroes import detect_zeroes

            detect_zeroes(node, own.detect_zeroes)
        if "backing" in rest and hasattr(node, "backing_name"):
            node.backing_override = rest["backing"]  # type: ignore[attr-defined]
        if self.graph.nodes.get(node.name) is not node:
            self._register(node)
        return node

    def _register(self, node: Node) -> None:
        self._created.append(node)  # first, so that a name that is taken leaves nothing open
        self.graph.add(node)

    def adopt(self, node: Node) -> Node:
        """Register a node that a driver made itself, so that it is closed if opening fails."""
        self._register(node)
        return node


FLAG_FIELDS = {
    "read-only": "read_only",
    "auto-read-only": "auto_read_only",
    "force-share": "force_share",
    "detect-zeroes": "detect_zeroes",
    "cache.direct": "direct",
    "cache.no-flush": "no_flush",
}
_FORMAT_KEYS = ("node-name", "detect-zeroes", "backing", "discard", "read-only", "auto-read-only", "force-share",
                "cache", "cache.direct", "cache.no-flush", "cache.writeback")  # fmt: skip


def resolve_backing(overlay: str, name: str) -> str:
    """``name`` relative to the folder of ``overlay``; absolute and ``word:`` names stay as they are.

    :raises InvalidArgument: a relative name in an overlay that lies in no folder
    """
    if has_protocol(name) or os.path.isabs(name):
        return name
    if not overlay:
        raise InvalidArgument(f"relative backing file {name!r} has no folder to start from")
    if overlay.startswith("file:"):
        overlay = str(parse_filename(overlay)["filename"])
    row = by_prefix(overlay.partition(":")[0]) if has_protocol(overlay) else None
    if overlay.startswith("json:") or (row is not None and row.name == "nbd"):  # the names of exports are no paths
        raise InvalidArgument(f"relative backing file {name!r} has no folder to start from", where=overlay)
    if has_protocol(overlay):
        prefix = overlay.rpartition("/")[0]
        if not prefix:
            head, _, _ = overlay.rpartition(":")
            return f"{head}:{name}"
        return f"{prefix}/{name}"
    return os.path.join(os.path.dirname(overlay), name)
