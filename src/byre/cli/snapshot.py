"""``snapshot``: list, take, apply and delete the internal snapshots of an image."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Final

from ..errors import ByreError, InvalidArgument, NotSupported
from . import common
from .info import snapshot_lines, snapshot_rows

if TYPE_CHECKING:
    from ..formats.abilities import HasSnapshots
    from ..image import Image

__all__ = ["HELP", "check_snapshot", "load_snapshot", "run"]

_ACTIONS: Final = ("list", "apply", "create", "delete")

_TABLE: Final = (
    common.Switch("list", "l", "list", "", "list the snapshots; the default"),
    common.Switch("apply", "a", "apply", "SNAPSHOT", "the disk becomes what it was then; changes since are lost"),
    common.Switch("create", "c", "create", "SNAPSHOT", "keep the disk as it is now under this name"),
    common.Switch("delete", "d", "delete", "SNAPSHOT", "delete a snapshot"),
    common.FORMAT,
    common.IMAGE_OPTS,
    common.OBJECT,
    common.FORCE_SHARE,
    common.QUIET,
)

HELP: Final = f"""\
usage: byre snapshot [OPTIONS] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] FILENAME
List, apply, create or delete internal snapshots. SNAPSHOT is an id or a name.

{common.option_help(_TABLE)}"""


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    actions = [(key, value) for key, value in given.ordered if key in _ACTIONS]
    if len(actions) > 1:
        raise common.UsageError("cannot mix '-l', '-a', '-c', '-d'")
    if len(given.positional) != 1:
        raise common.UsageError("expecting one image file name")
    action, name = actions[0] if actions else ("list", "")
    if action == "list":
        _list(given)
        return 0
    if not common.as_peer():
        _change(given, action, name)
        return 0
    try:
        _change(given, action, name)
    except _Failed as failed:
        _report_as_peer(action, name, failed)
        return 1
    return 0


class _Failed(ByreError):
    """An action failed.

    :ivar gone: a snapshot was to be deleted, and is no longer in the table
    """

    gone = False


def _change(given: common.Given, action: str, name: str) -> None:
    with common.open_image(
        given.positional[0], given, format=given.last("format"), read_only=False, backing=False
    ) as image:
        before = _names(image)
        try:
            _carry_out(image, action, name)
        except ByreError as error:
            failed = _Failed(f"could not {action} snapshot {name!r}: {error.message}", where=error.where,
                             hint=error.hint, errno=error.errno)  # fmt: skip
            failed.gone = action == "delete" and _names(image) != before
            raise failed from error


def _names(image: Image) -> list[str]:
    return [snapshot.name for snapshot in getattr(image.node, "snapshots", ())]


def _report_as_peer(action: str, name: str, failed: _Failed) -> None:
    """The peer's very words, which scripts compare."""
    reason = os.strerror(failed.errno)
    if action == "apply":
        reason = f"Failed to load snapshot: {reason}"
    elif action == "delete" and failed.errno == errno.ENOENT:
        reason = "snapshot not found"
    elif failed.gone:
        sys.stderr.write(f"qcow2_free_clusters failed: {reason}\n")
        reason = f"Failed to free the cluster and L1 table: {reason}"
    common.report(f"Could not {action} snapshot '{name}': {reason}")


def _list(given: common.Given) -> None:
    from ..formats.abilities import snapshot_holder

    with common.open_image(given.positional[0], given, format=given.last("format"), backing=False, no_io=True) as image:
        holder = snapshot_holder(image.node)
        rows = snapshot_rows(holder) if holder is not None else []
        if rows:
            sys.stdout.write("".join(f"{line}\n" for line in snapshot_lines(rows)))


def _carry_out(image: Image, action: str, name: str) -> None:
    if action == "create":
        # Without a machine there is no instruction count; the peer records 0 as well.
        image.create_snapshot(name, icount=0)
    elif action == "apply":
        image.apply_snapshot(name)
    else:
        image.delete_snapshot(name)


# -- the option -l of other verbs -----------------------------------------------------------------


def check_snapshot(parameter: str) -> None:
    """Refuse a malformed parameter before anything is opened.

    :raises InvalidArgument: something else than an id and a name is given; scripts know the peer's two lines
    """
    from ..options import parse_keyval

    if not parameter.startswith("snapshot."):
        return
    unknown = [key for key in parse_keyval(parameter) if key not in ("snapshot.id", "snapshot.name")]
    if unknown and common.as_peer():
        common.report(f"Invalid parameter {unknown[0]!r}")
    if unknown:
        raise InvalidArgument(f"Failed in parsing snapshot param {parameter!r}",
                              hint="known are snapshot.id=ID and snapshot.name=NAME")  # fmt: skip


def load_snapshot(image: Image, parameter: str) -> None:
    """Have the read-only ``image`` show a snapshot: ``snapshot.id=ID,snapshot.name=NAME``, or an id or name.

    :raises ByreError: there is none, or the parameter is malformed
    """
    from ..options import parse_keyval

    check_snapshot(parameter)
    try:
        if not parameter.startswith("snapshot."):
            _holder(image).load_snapshot(parameter)
            return
        values = parse_keyval(parameter)
        _holder(image).load_snapshot_exactly(values.get("snapshot.id"), values.get("snapshot.name"))
    except ByreError as error:
        error.message = f"Failed to load snapshot: {error.message}"
        error.where = error.where or image.filename
        raise


def _holder(image: Image) -> HasSnapshots:
    from ..formats.abilities import HasSnapshots

    node = image.node
    if not isinstance(node, HasSnapshots):
        raise NotSupported(f"driver {node.driver!r} does not support temporarily loading internal snapshots")
    return node
