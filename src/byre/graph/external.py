"""External snapshots: overlays put on top of images in use, for several disks at once: all or none.

What an image held so far stays in its file, which becomes a read-only backing file; what is written from now on goes
to the overlay. The guest is held back only while edges move.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from ..errors import Busy, ByreError, InvalidArgument, NotSupported
from . import blockers
from .creating import companions, create
from .live import Rewiring, node_at, settled, supports_backing
from .opening import Opener, OpenFlags, Policy, has_protocol, resolve_backing
from .relinking import flush_ahead
from .reopening import set_read_only

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..crypto.secrets import SecretProvider
    from ..image import Image
    from .graph import Graph
    from .node import Node

__all__ = ["NewOverlay", "append", "snapshot"]


class NewOverlay(NamedTuple):
    """One disk of a snapshot, as ``blockdev-snapshot-sync`` has it.

    :ivar node: the active layer
    :ivar filename: of the overlay
    :ivar format: its driver
    :ivar mode: "absolute-paths": it is created, naming the old layer by its absolute path; "existing": it is
        there, made for this, and its header is left alone
    :ivar node_name: of the overlay's node; "" to have one generated
    :ivar options: creation options such as ``cluster_size``; of those of an overlay that exists, the names of secrets
    """

    node: Node | Image
    filename: str
    format: str = "qcow2"
    mode: str = "absolute-paths"
    node_name: str = ""
    options: Mapping[str, object] = {}  # nobody changes it


def append(graph: Graph, pairs: Sequence[tuple[Node | Image, Node]], *, stay: Sequence[Image] = ()) -> None:
    """Put each overlay on top of its node: whoever used the node uses the overlay, whose backing file the node is.

    What was written before is durable when this returns, and the nodes are read-only.

    :param pairs: (active layer, overlay): an open node without a backing file that nobody uses
    :param stay: Images that keep using the old layer directly
    :raises Busy: the operation is blocked, or the overlay is in use
    :raises NotSupported: the overlay's format has no backing files
    :raises ByreError: nothing has changed
    """
    disks, overlays = [disk for disk, _ in pairs], [overlay for _, overlay in pairs]
    roots = [image._root for image in stay]
    flush_ahead(map(node_at, disks))
    with settled(graph, [*disks, *overlays]) as nodes:
        chosen = list(zip(nodes, overlays, strict=False))
        for node, overlay in chosen:
            _check(graph, node, overlay)
        if len(set(nodes)) < len(nodes):
            raise InvalidArgument("a node is named twice in one snapshot")
        for node, _ in chosen:
            if not node.read_only:
                node.flush()
        with Rewiring(graph) as change:
            for node, overlay in chosen:
                for edge in list(node.parents):
                    if edge not in roots:
                        change.move(edge, overlay)
                change.add(overlay, "backing", node, "backing")
        for node, _ in chosen:
            _protect(graph, node)


def _check(graph: Graph, node: Node, overlay: Node) -> None:
    blockers.check(graph, node, "external-snapshot")
    if overlay.parents:
        raise Busy(f"the overlay {overlay.name!r} is already in use", where=overlay.filename)
    if "backing" in overlay.children:
        raise InvalidArgument(f"the overlay {overlay.name!r} already has a backing image", where=overlay.filename)
    if not supports_backing(overlay):
        raise NotSupported(f"the overlay {overlay.name!r} does not support backing images", where=overlay.filename)
    if overlay.size < node.size:
        raise InvalidArgument(f"the overlay is smaller ({overlay.size} bytes) than the image ({node.size} bytes)",
                              where=overlay.filename)  # fmt: skip


def _protect(graph: Graph, node: Node) -> None:
    """Nobody writes to the old layer any more; that its file stays open for writing would not be an error."""
    if node.read_only:
        return
    try:
        set_read_only(graph, node, True)
    except ByreError as error:
        graph.warnings.append(f"the backing file stays writable: {error}")


def snapshot(graph: Graph, overlays: Sequence[NewOverlay], *, policy: Policy | None = None,
             secrets: SecretProvider | None = None) -> list[Node]:  # fmt: skip
    """Create (or open) an overlay for each disk and :func:`append` them all.

    :param secrets: keys by the ids that options such as ``encrypt.key-secret`` name
    :returns: the overlays, which are the active layers now
    :raises ByreError: nothing has changed, and no file made here is left
    """
    while True:
        found = _attempt(graph, overlays, policy or Policy(), secrets)
        if found is not None:
            return found


def _attempt(graph: Graph, overlays: Sequence[NewOverlay], policy: Policy,
             secrets: SecretProvider | None) -> list[Node] | None:  # fmt: skip
    """The overlays; ``None`` if a disk has got another active layer while overlays of the last one were made."""
    made: list[str] = []
    nodes: list[Node] = []
    disks = [wanted.node for wanted in overlays]
    below = list(map(node_at, disks))
    done = False
    try:
        for wanted, node in zip(overlays, below, strict=True):
            blockers.check(graph, node, "external-snapshot")
            if wanted.mode == "absolute-paths":
                _create(wanted, node, made, policy, secrets)
            elif wanted.mode != "existing":
                raise InvalidArgument(f"unknown mode {wanted.mode!r}: expected absolute-paths or existing")
            nodes.append(_open(graph, wanted, node, policy, secrets))
        flush_ahead(below)
        with settled(graph, disks) as now:
            # The headers of the overlays name what was there when they were made.
            if now == below:
                append(graph, list(zip(disks, nodes, strict=True)))
                done = True
    except ByreError:
        if list(map(node_at, disks)) == below:
            raise
        # What stood in the way was another snapshot of the same disk: its layer is a backing file by now.
    finally:
        if not done:
            for node in nodes:
                graph.release(node)
            for path in made:
                os.unlink(path)
    return nodes if done else None


def _create(wanted: NewOverlay, node: Node, made: list[str], policy: Policy, secrets: SecretProvider | None) -> None:
    below = node.filename if has_protocol(node.filename) else os.path.abspath(node.filename)
    options = {**wanted.options, "backing_file": below, "backing_fmt": _format(node), "size": node.size}
    beside = companions(wanted.format, wanted.filename, options)
    paths = [wanted.filename, *(resolve_backing(wanted.filename, name) for name in beside)]
    new = [path for path in paths if not os.path.exists(path)]
    create(wanted.filename, wanted.format, options=options, check_backing=False, policy=policy, secrets=secrets)
    made += new


def _open(graph: Graph, wanted: NewOverlay, node: Node, policy: Policy, secrets: SecretProvider | None) -> Node:
    given: dict[str, object] = {"driver": wanted.format, "file": {"driver": "file", "filename": wanted.filename},
                                "backing": None}  # fmt: skip
    given |= {key: value for key, value in wanted.options.items() if key.endswith("key-secret")}
    if wanted.node_name:
        given["node-name"] = wanted.node_name
    # What the caller puts into the overlay is his word.
    if wanted.options.get("data_file"):
        policy = policy._replace(named=(*policy.named, (wanted.filename, str(wanted.options["data_file"]))))
    flags: OpenFlags = getattr(node, "open_flags", OpenFlags())
    opener = Opener(graph, policy, secrets)
    return opener.open_chain(given, flags._replace(read_only=False, no_backing=True))


def _format(node: Node) -> str:
    from .chain import skip_filters

    return skip_filters(node).driver
