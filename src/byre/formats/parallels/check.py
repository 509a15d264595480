"""Checking Parallels images, and mending them: in use, where the data begin, entries, the end of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ...units import SECTOR, align_up
from ..abilities import CheckResult
from .layout import IN_USE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .image import ParallelsNode

__all__ = ["check_parallels", "finds_damage"]

_MESSAGES: Final = 1000
_PIECE: Final = 1 << 20


def finds_damage(node: ParallelsNode) -> bool:
    """Whether an entry points outside the file, or two to the same cluster."""
    if any(_outside(node, hosts).any() for _, hosts in node.map.windows()):
        return True
    entries = np.sort(np.frombuffer(node.map.entries, np.uint32))
    return bool(((entries[1:] == entries[:-1]) & (entries[1:] != 0)).any())


def _outside(node: ParallelsNode, hosts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of offsets as :meth:`FlatMap.windows` gives them."""
    least, most = node.map.space.base, node.file.size - node.cluster_size
    outside: NDArray[np.bool_] = (hosts >= 0) & ((hosts < least) | (hosts > most))
    return outside


def check_parallels(node: ParallelsNode, fix: str) -> CheckResult:
    """What is wrong; with ``fix`` "leaks" the file is cut behind its last cluster, with "all" everything is mended."""
    with node.lock:
        node.check_failure()
        if not node.read_only:
            node.write_back()
        checking = _Check(node, fix)
        node.guarded(checking.run)
        return checking.result()


class _Check:
    """One look at an image. ``end``: behind the last cluster in use, bytes."""

    def __init__(self, node: ParallelsNode, fix: str) -> None:
        self.node = node
        self.fix = fix
        self.mend = fix == "all"
        self.corruptions = self.fixed = self.leaks = self.leaks_fixed = 0
        self.end = 0
        self.messages: list[str] = []

    def bad(self, text: str) -> None:
        self.count(1)
        self.say(self.mend, text)

    def count(self, number: int) -> None:
        if self.mend:
            self.fixed += number
        else:
            self.corruptions += number

    def say(self, mended: bool, text: str) -> None:
        if len(self.messages) < _MESSAGES:
            self.messages.append(f"{'Repairing' if mended else 'ERROR'} {text}")

    def run(self) -> None:
        node = self.node
        if node._writing and node.file.size > node.map.space.end:
            # Clusters freed a moment ago, which closing would cut off.
            node.file.resize(node.map.space.end, exact=False)
        unclean = node.header.in_use == IN_USE and not node._writing
        if unclean:
            self.bad("image was not closed correctly")
        if not node.data_offset_right:
            self.bad("data_off field has incorrect value")
            if self.mend:
                node.write_header(node.header._replace(data_sector=node.map.space.base // SECTOR))
                node.data_offset_right = True
        self._entries_outside()
        self._duplicates()
        if self.fixed:
            node._write_back()
        self._leaks()
        if self.mend and (self.fixed or unclean) and not self.corruptions:
            # Also where nothing else was wrong: the header is to say that the image was closed.
            node.write_header(node.header._replace(in_use=IN_USE))
            node.settle()

    def _all_bad(self, indexes: NDArray[np.intp] | NDArray[np.uint32], text: str) -> None:
        """As :meth:`bad` for each of many entries."""
        self.count(len(indexes))
        for index in indexes[:_MESSAGES].tolist():
            self.say(self.mend, text.format(index))

    def _entries_outside(self) -> None:
        node = self.node
        self.end = node.map.space.base
        for first, hosts in node.map.windows():
            outside = _outside(node, hosts)
            if outside.any():
                lost = np.flatnonzero(outside) + first
                self._all_bad(lost, "cluster {} is outside image")
                if self.mend:
                    node.map.drop(lost)
                hosts = hosts[~outside]
            self.end = max(self.end, int(hosts.max(initial=-1)) + node.cluster_size)
        self.end = max(self.end, self._end_of_extension())
        if self.fix:
            # Nothing behind it may be cut off.
            node.map.space.end = max(node.map.space.end, self.end)

    def _end_of_extension(self) -> int:
        """Behind the last cluster of the format extension, 0 without one: it is no leak."""
        if not self.node.header.extension_sector:
            return 0
        from .extension import read_extension

        node, base = self.node, self.node.map.space.base
        sectors = [node.header.extension_sector]
        for stored in read_extension(node):
            # What lies nowhere is no reason to keep space.
            sectors += [entry for entry in stored.table if 1 < entry < node.file.size // SECTOR]
        return base + align_up(max(sectors) * SECTOR + node.cluster_size - base, node.cluster_size)

    def _duplicates(self) -> None:
        again = self._repeats()
        self._all_bad(again, "duplicate offset in BAT entry {}")
        if self.mend:
            for index in again.tolist():
                self._part(index, self.node.map.code.host(self.node.map.entries[index]))

    def _repeats(self) -> NDArray[np.uint32]:
        """Indexes of the entries whose cluster an earlier one has as well; those outside the file do not count."""
        entries = np.frombuffer(self.node.map.entries, np.uint32).copy()
        for first, hosts in self.node.map.windows():
            entries[first : first + len(hosts)][_outside(self.node, hosts)] = 0
        # In place where it can be: a table of 32 MiB is allowed.
        order = np.argsort(entries, kind="stable").astype(np.uint32)
        entries = entries[order]
        again: NDArray[np.uint32] = order[1:][(entries[1:] == entries[:-1]) & (entries[1:] != 0)]
        again.sort()
        return again

    def _part(self, index: int, host: int) -> None:
        """A cluster of its own for an entry that shares one, with the same content."""
        node, found = self.node, self.node.map
        to, _, _ = found.space.append(1)
        for at in range(0, node.cluster_size, _PIECE):
            piece = memoryview(bytearray(min(_PIECE, node.cluster_size - at)))
            node.file.read_into(host + at, piece)
            node.file.write_from(to + at, piece)
        found.entries[index] = found.code.entry(to)
        found.mark(index, 1)
        self.end = max(self.end, to + node.cluster_size)

    def _leaks(self) -> None:
        node = self.node
        size = node.file.size
        if size <= self.end:
            return
        count = -(-(size - self.end) // node.cluster_size)
        self.say(bool(self.fix), f"space leaked at the end of the image {size - self.end}")
        if not self.fix or self.corruptions:
            self.leaks += count
            return
        node.file.resize(self.end, exact=False)
        node.map.space.end = self.end
        self.leaks_fixed += count

    def result(self) -> CheckResult:
        node = self.node
        allocated = fragmented = 0
        last = -1
        for _, hosts in node.map.windows():
            allocated += int(((hosts >= 0) & ~_outside(node, hosts)).sum())
            # Runs end at an entry that has no cluster as well.
            before = np.append(last, hosts[:-1])
            fragmented += int(((before >= 0) & (hosts >= 0) & (before + node.cluster_size != hosts)).sum())
            last = int(hosts[-1])
        return CheckResult(
            corruptions=self.corruptions, leaks=self.leaks, corruptions_fixed=self.fixed, leaks_fixed=self.leaks_fixed,
            image_end_offset=self.end, total_clusters=node.header.entries, allocated_clusters=allocated,
            fragmented_clusters=fragmented, messages=tuple(self.messages),
        )  # fmt: skip
