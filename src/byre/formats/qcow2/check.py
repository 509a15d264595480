"""Consistency check of qcow2 images, and their repair: what ``check`` and ``check -r`` do.

Joins the parts: :mod:`.check_tables` walks every reference an image makes, :mod:`.check_counts` adds them up,
:mod:`.check_compare` compares the sums with the reference counts, :mod:`.check_copied` the COPIED flags with both,
:mod:`.repair` mends. Counts, messages and statistics are those of ``qemu-img check``; at most
``check_findings.MESSAGE_LIMIT`` messages are kept.

Peak memory is about 60 MiB for an image of 1 TiB, about 190 MiB for 64 TiB, and stays below 256 MiB for any. Time grows
with the tables that are allocated, not with the length of the file; a table is read once for each place it lies at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...errors import Cancelled, Corrupt, ImageError, InvalidArgument, IOFailure, ReadOnly
from . import layout, repair, repair_bitmaps
from .check_compare import Comparison
from .check_copied import check_copied
from .check_counts import each_window, with_counters
from .check_findings import MESSAGE_LIMIT, Aborted, Findings
from .check_fit import TableFits
from .check_reader import Subject
from .check_snapshots import SnapshotTable
from .check_tables import Walk

if TYPE_CHECKING:
    from ...jobs.job import Control
    from ..abilities import CheckResult
    from .check_reader import Keys
    from .image import Qcow2Node

__all__ = ["check_image", "repair_dirty"]


class Analysis(NamedTuple):
    """One look at the whole image.

    :ivar walk: ``None`` if the check was aborted
    :ivar width: bytes of the counters it took
    """

    subject: Subject
    findings: Findings
    walk: Walk | None
    width: int

    @property
    def bad_snapshots(self) -> bool:
        """Whether the snapshot table must be written anew."""
        return self.walk is not None and bool(self.walk.snapshots.unfit or self.walk.snapshots.dropped)


def check_image(node: Qcow2Node, control: Control | None, fix: str = "", *, give_up: bool = True) -> CheckResult:
    """Check ``node``'s image, and mend it.

    Nobody else may use the node meanwhile. Its tables are written back first, and dropped after a repair. Where the
    check cannot be finished the result has ``check_errors`` and nothing more is mended.

    :param control: progress in bytes of L2 tables; raises ``Cancelled`` from here
    :param fix: "" only checks; "leaks" lowers counts of clusters that are not referred to; "all" mends what it can
    :param give_up: with "all", snapshots that cannot be read go
    :raises ReadOnly: ``fix`` is given and the node cannot be written
    :raises IOFailure: writing a repair failed; the image is no worse than before
    """
    if fix not in ("", "leaks", "all"):
        raise InvalidArgument(f"unknown repair {fix!r}: expected 'leaks' or 'all'", where=node.filename)
    if fix and node.read_only:
        raise ReadOnly("cannot repair an image that is opened read-only", where=node.filename)
    if not node.read_only:
        node.invalidate()
    if not fix:
        found = _analyse(node, control)
        _check_flags(found, control, mend=False)
        return found.findings.result()
    try:
        _forget_unknown(node)
        findings = _mend(node, control, fix, give_up and fix == "all")
    except Cancelled:
        node.invalidate()
        raise
    except BaseException as error:
        # What is on disk is consistent, what is in memory may not be.
        node.fail_stop(error)
        raise
    node.invalidate()
    return findings.result()


def _forget_unknown(node: Qcow2Node) -> None:
    """Autoclear bits of extensions that this program does not keep up go before anything changes."""
    if node.header.version >= 3:
        from .bitmap_store import set_autoclear

        with node.lock:
            set_autoclear(node, node.header.autoclear_features & layout.AUTOCLEAR_KNOWN)


def repair_dirty(node: Qcow2Node) -> tuple[str, ...]:
    """Rebuild the reference counts of an image that was not closed cleanly (lazy refcounts); what there is to say.

    :raises Corrupt: there is damage that could not be mended
    """
    result = check_image(node, None, "all", give_up=False)
    if result.check_errors or result.corruptions:
        raise Corrupt("the image was not closed cleanly and could not be repaired", where=node.filename,
                      hint='"byre check" says what is wrong')  # fmt: skip
    return result.messages


# -- looking --------------------------------------------------------------------------------------


def _analyse(node: Qcow2Node, control: Control | None, *, fix: str = "", mend_snapshots: bool = False,
             give_up: bool = False, width: int = 0) -> Analysis:  # fmt: skip
    """Look at everything but COPIED flags; with ``fix``, correct counts in place.

    :param give_up: leave out snapshots that cannot be read
    :param width: bytes of a counter, as an earlier analysis found them; 0 tries
    """

    def attempt(width: int) -> Analysis:
        findings = Findings()
        findings.total = -(-node.header.size >> node.header.cluster_bits)
        subject = Subject(node.children["file"].node, node.header, node.extensions, node.filename)
        try:
            snapshots = SnapshotTable(subject, findings, repair=mend_snapshots, give_up=give_up)
            walk = Walk(subject, snapshots, control)
            comparison = Comparison(subject, findings, walk.refcount_blocks(), fix)
            for window in each_window(walk, width, findings):
                comparison.window(window)
                del window
            comparison.finish()
        except Aborted:
            return Analysis(subject, findings, None, width)
        except (IOFailure, ImageError) as error:
            if fix:
                raise
            findings.check_errors += 1
            findings.say(f"ERROR: {error}")
            return Analysis(subject, findings, None, width)
        findings.image_end = (comparison.highest + 1) << subject.cluster_bits
        return Analysis(subject, findings, walk, width)

    # Also where the width is known: tables that overlap the header say something else once that was mended.
    found: Analysis = with_counters(node.header.nb_snapshots, attempt, width)
    return found


def _check_flags(found: Analysis, control: Control | None, *, mend: bool) -> None:
    if found.walk is None or not found.findings.suspect:
        return
    found.subject.forget()
    try:
        check_copied(found.walk, found.findings, control, mend=mend)
    except Aborted:
        pass


# -- mending --------------------------------------------------------------------------------------


def _mend(node: Qcow2Node, control: Control | None, fix: str, give_up: bool) -> Findings:
    everything = fix == "all"
    cut = repair.cut_l1(node) if everything else ""
    found = _analyse(node, control, mend_snapshots=everything, give_up=give_up)
    if cut:
        found.findings.messages.insert(0, cut)
    if found.walk is None:
        found.findings.corruptions_fixed += bool(cut)
        return found.findings
    if _uncertain(found.walk, everything):
        found.findings.say("ERROR an L1 table or the snapshot table runs past the end of the file or into other "
                           "metadata: what is used is not certain, nothing is repaired")  # fmt: skip
        _check_flags(found, control, mend=False)
        return found.findings
    zeroed = int(bool(cut))
    if everything and (found.findings.misaligned or found.findings.nowhere):
        found, more = _zeroed(node, control, found, give_up, int(bool(cut)))
        zeroed += more
    before = found.findings
    if found.walk is None:
        return before
    if everything and (before.rebuild or before.outside or found.bad_snapshots):
        found = _rebuilt(node, control, found)
    elif before.rebuild:
        before.abort("ERROR need to rebuild refcount structures")
        return before
    elif before.leaks or before.corruptions:
        found = _analyse(node, control, fix=fix, width=found.width)
        # What was found is said as well as what was mended.
        found.findings.messages = before.messages + found.findings.messages
        found.findings.left_out += before.left_out
    findings = found.findings
    findings.corruptions_fixed += zeroed
    # Without "all", flags are set right only where the counts are certain.
    certain = not (findings.check_errors or findings.corruptions or findings.leaks)
    _check_flags(found, control, mend=everything or certain)
    if everything and repair_bitmaps.mend_bitmaps(node, found.subject, findings):
        _recount(node, control, found)
    if not findings.check_errors and not findings.corruptions:
        repair.mark_clean(node)
    return findings


def _zeroed(node: Qcow2Node, control: Control | None, found: Analysis, give_up: bool,
            first: int) -> tuple[Analysis, int]:  # fmt: skip
    """Clear entries whose offsets are useless, and look again; how many were cleared.

    :param first: so many of the messages so far are kept: they are about what was mended
    """
    before = found.findings
    assert found.walk is not None
    said = len(before.messages)
    kept = before.messages[:first]
    done = repair.zero_misaligned(found.walk, before) if before.misaligned else 0
    done += repair.zero_nowhere(found.walk, before) if before.nowhere else 0
    again = _analyse(node, control, mend_snapshots=True, give_up=give_up)
    again.findings.messages = kept + before.messages[said:] + again.findings.messages
    return again, done


def _recount(node: Qcow2Node, control: Control | None, found: Analysis) -> None:
    """What is still wrong, after bitmaps were mended."""
    findings, after = found.findings, _analyse(node, control, width=found.width).findings
    findings.corruptions_fixed += max(0, findings.corruptions - after.corruptions)
    findings.corruptions, findings.leaks = after.corruptions, after.leaks
    findings.check_errors += after.check_errors
    findings.image_end = after.image_end


def _uncertain(walk: Walk, everything: bool) -> bool:
    """Whether clusters that nothing seems to refer to may be in use, because an L1 table is not to be believed."""
    fit = TableFits(walk.subject, walk.snapshots.rows).active()
    return fit.lost or (not everything and (fit.overlong or walk.snapshots.misfit()))


def _structure_clusters(walk: Walk) -> Keys:
    """The clusters of the refcount table and its blocks, as many as there may be messages about."""
    header = walk.subject.header
    first = header.refcount_table_offset >> header.cluster_bits
    table = np.arange(first, first + header.refcount_table_clusters, dtype=np.int64)
    return np.unique(np.concatenate((table, walk.refcount_blocks()[1])))[:MESSAGE_LIMIT]


def _rebuilt(node: Qcow2Node, control: Control | None, found: Analysis) -> Analysis:
    """Write refcount structures (and the snapshot table, if it is bad) anew, and look again."""
    before = found.findings
    assert found.walk is not None
    before.say("Rebuilding refcount structure")
    old = _structure_clusters(found.walk)
    node.header = repair.rebuild(found.walk, control, found.width, bad_snapshots=found.bad_snapshots)
    after = _analyse(node, control, width=found.width)
    if after.findings.leaks:
        # Only where damaged tables refer to the header, as if it were a table: it has changed.
        after = _analyse(node, control, fix="leaks", width=found.width)
        after.findings.leaks_fixed = 0
    # As if the old structure had been counted anew before it was let go.
    old = old[old < after.subject.cluster_count]
    for cluster, count in zip(old.tolist(), after.subject.gather(old)[0].tolist(), strict=True):
        before.say(f"Repairing cluster {cluster} refcount={count + 1} reference={count}")
    findings = after.findings
    findings.corruptions_fixed += max(0, before.corruptions - findings.corruptions)
    findings.leaks_fixed += max(0, before.leaks - findings.leaks)
    findings.messages = before.messages + findings.messages
    findings.left_out += before.left_out
    return after
