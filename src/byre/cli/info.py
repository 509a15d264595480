"""``info``: what an image is, and with ``--backing-chain`` what lies below it.

Nothing that the image names is opened, unless the chain was asked for; then every name passes the policy.
"""

from __future__ import annotations

import sys

from ..errors import ByreError, ImageError, printable
from ..graph.graph import Graph
from ..graph.opening import CHAIN_LIMIT, Opener, OpenFlags, has_protocol, parse_filename, resolve_backing
from ..typing import TYPE_CHECKING, Final
from . import common
from .output import human_size, ordered, print_json, print_structure

if TYPE_CHECKING:
    from typing import Any

    from ..graph.node import Node
    from ..image import Image

__all__ = ["HELP", "describe", "run", "snapshot_lines", "snapshot_rows"]

_TABLE: Final = (
    common.FORMAT,
    common.IMAGE_OPTS,
    common.OBJECT,
    common.OUTPUT,
    common.Switch("chain", "", "backing-chain", "", "describe the backing files as well"),
    common.FORCE_SHARE,
)

HELP: Final = f"""\
usage: byre info [OPTIONS] FILENAME
Say what an image is.

{common.option_help(_TABLE)}"""

_WITHOUT_CLUSTERS: Final = ("raw", "luks", "bochs", "cloop", "dmg", "parallels")
"""Formats of which the peer shows no cluster size."""
_FILE_DRIVERS: Final = ("file", "host_device", "host_cdrom")

# The peer prints its keys in the order of a hash table; scripts that compare texts rely on it.
_KEYS: Final = (
    "backing-filename-format",
    "children",
    "snapshots",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "actual-size",
    "format-specific",
    "encrypted",
    "full-backing-filename",
    "backing-filename",
    "dirty-flag",
)


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    as_json = common.output_format(given) == "json"
    chain = given.has("chain")
    layers = _chain(given) if chain else [_top(given)]
    if as_json:
        print_json(layers if chain else layers[0])
        return 0
    for index, layer in enumerate(layers):
        if index:
            sys.stdout.write("\n")
        _print_node(layer, 0, "/")
    return 0


# -- looking --------------------------------------------------------------------------------------


def _open_top(given: common.Given) -> Image:
    return common.open_image(given.positional[0], given, format=given.last("format"), backing=False, no_io=True)


def _top(given: common.Given) -> dict[str, object]:
    with _open_top(given) as image:
        return describe(image.node)


def _chain(given: common.Given) -> list[dict[str, object]]:
    """Every layer, opened and closed one after the other."""
    layers: list[dict[str, object]] = []
    seen: set[object] = set()
    image: Image | None = _open_top(given)
    while image is not None:
        with image:
            node = image.node
            identity = _identity(node)
            if identity in seen:
                raise ImageError("the backing chain contains this file twice", where=node.filename)
            if len(layers) == CHAIN_LIMIT:
                raise ImageError(f"the backing chain is longer than {CHAIN_LIMIT} layers", where=given.positional[0])
            seen.add(identity)
            layers.append(describe(node))
            image = _open_backing(node, given)
    return layers


def _identity(node: Node) -> object:
    while "file" in node.children:
        node = node.children["file"].node
    return getattr(node, "identity", None) or node.filename


def _open_backing(overlay: Node, given: common.Given) -> Image | None:
    """The layer that ``overlay`` names, without what that one names; ``None`` at the base."""
    from ..image import Image

    name: str = getattr(overlay, "backing_name", "")
    if not name:
        return None
    path = resolve_backing(overlay.filename, name)
    policy = common.policy(given)
    plain = None if has_protocol(name) else path
    policy.check(name, plain, "backing file", overlay.filename)
    target = {"driver": "file", "filename": path} if plain is not None else parse_filename(path)
    flags = OpenFlags(force_share=given.has("force-share"), no_backing=True, no_io=True)
    graph = Graph()
    opener = Opener(graph, policy)
    try:
        node = opener.open(target, flags, driver_name=getattr(overlay, "backing_format", ""), implicit=True)
    except ByreError as error:
        error.message = f"cannot open backing file {name!r}: {error}"
        error.where, error.hint = overlay.filename, ""
        raise
    try:
        return Image(node, graph, no_io=True)
    except BaseException:
        graph.release(node)
        raise


def describe(node: Node) -> dict[str, object]:
    """What ``info --output json`` says about ``node`` and its children, keys in the peer's order."""
    values: dict[str, object] = {
        "children": [
            {"name": edge.name, "info": describe(edge.node)}
            for edge in reversed(list(node.children.values()))
            if edge.name != "backing"
        ],
        "virtual-size": node.size,
        "filename": _shown_name(node),
        "format": node.driver,
        "snapshots": snapshot_rows(node) or None,
    }
    occupied = node.allocated_size()
    if occupied >= 0:
        values["actual-size"] = occupied
    if node.kind == "format" and node.driver not in _WITHOUT_CLUSTERS:
        values["cluster-size"] = getattr(node, "shown_cluster_size", getattr(node, "cluster_size", None)) or None
    if getattr(node, "cipher", None) is not None or getattr(node, "encrypted", False):
        values["encrypted"] = True
    values["format-specific"] = _format_specific(node)
    values["dirty-flag"] = _dirty_flag(node)
    _add_backing(values, node)
    return ordered(values, _KEYS)


def _shown_name(node: Node) -> str:
    """The file name; or options in JSON where the name alone would open nothing, or something else.

    That is so with filters and the like, and where the id of a key was given.
    """
    runtime = getattr(node, "runtime", None)
    nested = node.driver in ("qcow2", "qcow")
    option = "encrypt.key-secret" if nested else "key-secret"
    if runtime is None or option not in runtime:
        file = node.children.get("file")
        simple = node.kind == "format" and file is not None and file.node.kind == "protocol"
        if not node.children or (simple and not node.options.keys() & {"offset", "size"}):
            return node.filename
        from ..graph.naming import shown_name

        return shown_name(node)
    import json

    edges = [edge for edge in node.children.values() if edge.name != "backing"]
    where = {edge.name: {"driver": edge.node.driver, "filename": edge.node.filename} for edge in edges}
    key, rest = {option: runtime.text(option)}, {"driver": node.driver, **where}
    return f"json:{json.dumps({**key, **rest} if nested else {**rest, **key})}"


def _add_backing(values: dict[str, object], node: Node) -> None:
    name: str = getattr(node, "backing_name", "")
    if not name:
        return
    values["backing-filename"] = name
    try:
        values["full-backing-filename"] = resolve_backing(node.filename, name)
    except ByreError:
        pass  # the overlay lies in no folder; said as such by the caller
    values["backing-filename-format"] = getattr(node, "backing_format", "") or None


def _dirty_flag(node: Node) -> bool | None:
    """Whether the image was not shut down cleanly; ``None`` where the driver has no such notion."""
    while node.driver == "raw" and "file" in node.children:
        node = node.children["file"].node
    if node.driver in _FILE_DRIVERS:
        return False
    dirty = getattr(node, "dirty", None)
    return bool(dirty) if dirty is not None else None


def _format_specific(node: Node) -> dict[str, object] | None:
    if node.driver in _FILE_DRIVERS:
        hint = getattr(node, "extent_size_hint", 0)
        return {"type": "file", "data": {"extent-size-hint": hint} if hint else {}}
    from ..formats.abilities import HasFormatInfo

    if not isinstance(node, HasFormatInfo):
        return None
    data = node.format_info()
    return {"type": node.driver, "data": data} if data else None


def snapshot_rows(node: object) -> list[dict[str, Any]]:
    """The internal snapshots of ``node`` as ``info --output json`` has them."""
    rows: list[dict[str, Any]] = []
    for snapshot in getattr(node, "snapshots", ()):
        row: dict[str, Any] = {
            "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
            "name": _shown(snapshot.name, 255),
            "date-sec": snapshot.date_sec,
            "date-nsec": snapshot.date_nsec,
            "vm-clock-sec": snapshot.vm_clock_nsec // 1_000_000_000,
            "id": _shown(snapshot.id, 127),
            "vm-state-size": snapshot.vm_state_size,
        }
        rows.append(row if snapshot.icount is None else {"icount": snapshot.icount, **row})
    return rows


def _shown(text: str, most: int) -> str:
    """An id or a name no longer than programs make it, and without what follows a NUL: images may lie at length."""
    return text.partition("\0")[0][:most]


# -- printing -------------------------------------------------------------------------------------


def _print_node(info: dict[str, object], depth: int, path: str) -> None:
    """One node as text, then its children, indented."""
    children = info["children"]
    assert isinstance(children, list)
    protocol = depth > 0 and not children
    indent = "    " * depth
    lines = _size_lines(info, protocol)
    if info.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if info.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    lines += _backing_lines(info)
    snapshots = info.get("snapshots")
    if isinstance(snapshots, list):
        lines += snapshot_lines(snapshots)
    sys.stdout.write("".join(f"{indent}{line}\n" for line in lines))
    specific = info.get("format-specific")
    if isinstance(specific, dict) and specific["data"]:
        sys.stdout.write(f"{indent}Format specific information:\n")
        print_structure(specific["data"], depth + 1)
    for child in children:
        sys.stdout.write(f"{indent}Child node '{path}{child['name']}':\n")
        _print_node(child["info"], depth + 1, f"{path}{child['name']}/")


def _size_lines(info: dict[str, object], protocol: bool) -> list[str]:
    size = info["virtual-size"]
    occupied = info.get("actual-size")
    assert isinstance(size, int)
    return [
        f"{'filename' if protocol else 'image'}: {printable(str(info['filename']))}",
        f"{'protocol type' if protocol else 'file format'}: {info['format']}",
        f"{'file length' if protocol else 'virtual size'}: {human_size(size)} ({size} bytes)",
        f"disk size: {human_size(occupied) if isinstance(occupied, int) else 'unavailable'}",
    ]


def _backing_lines(info: dict[str, object]) -> list[str]:
    name = info.get("backing-filename")
    if name is None:
        return []
    full = info.get("full-backing-filename")
    line = f"backing file: {printable(str(name))}"
    if full is None:
        line += " (cannot determine actual path)"
    elif full != name:
        line += f" (actual path: {printable(str(full))})"
    format_name = info.get("backing-filename-format")
    return [line] if format_name is None else [line, f"backing file format: {printable(str(format_name))}"]


def snapshot_lines(snapshots: list[dict[str, Any]]) -> list[str]:
    """The table of internal snapshots, as text."""
    lines = ["Snapshot list:", f"{'ID':<7} {'TAG':<16} {'VM_SIZE':>8} {'DATE':>19} {'VM_CLOCK':>15} {'ICOUNT':>10}"]
    for row in snapshots:
        clock = row["vm-clock-sec"]
        elapsed = f"{clock // 3600:04}:{clock // 60 % 60:02}:{clock % 60:02}.{row['vm-clock-nsec'] // 1_000_000:03}"
        lines.append(
            f"{printable(row['id']):<7} {printable(row['name']):<16} {human_size(row['vm-state-size']):>8} "
            f"{_date(row['date-sec']):>19} {elapsed:>15} {row.get('icount', '--'):>10}"
        )
    return lines


def _date(seconds: int) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
