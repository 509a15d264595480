"""A long row of bits in pages that exist only where bits differ: the storage of a dirty bitmap.

Bit ``n`` is bit ``n % 8`` of byte ``n // 8``, as qcow2 stores it. A page of which no bit is set, or all are, takes no
memory; 128 MiB are the most that a disk of 64 TiB with a bit for each 64 KiB can take. No lock: the owner has one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PAGE_BITS", "PAGE_BYTES", "Bits", "runs_of"]

PAGE_BYTES: Final = 8192
PAGE_BITS: Final = PAGE_BYTES * 8
_SHIFT: Final = 16
_ONES: Final = b"\xff" * PAGE_BYTES
_ZEROES: Final = bytes(PAGE_BYTES)


class Bits:
    """``length`` bits, all clear at first.

    :ivar count: how many are set
    """

    __slots__ = ("_full", "_pages", "count", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.count = 0
        self._pages: dict[int, bytearray] = {}
        #: Pages of which every bit is set; the bits of the last page behind ``length`` do not matter here.
        self._full: set[int] = set()

    # -- single bits and ranges -------------------------------------------------------------------

    def get(self, bit: int) -> bool:
        page, at = bit >> _SHIFT, bit & (PAGE_BITS - 1)
        data = self._pages.get(page)
        if data is None:
            return page in self._full
        return bool(data[at >> 3] >> (at & 7) & 1)

    def set_one(self, bit: int) -> bool:
        """Set one bit, if it is one of these; whether that changed it. Quicker than :meth:`set`."""
        data = self._pages.get(bit >> _SHIFT)
        if data is None:
            return self.set(bit, bit + 1)
        at, mask = bit >> 3 & PAGE_BYTES - 1, 1 << (bit & 7)
        if data[at] & mask or bit >= self.length:
            return False
        data[at] |= mask
        self.count += 1
        return True

    def set(self, first: int, end: int) -> bool:
        """Set bits ``[first, end)``; whether that changed any."""
        before = self.count
        for page, low, high in self._parts(first, end):
            if page not in self._full:
                self._set_in_page(page, low, high)
        return self.count != before

    def clear(self, first: int, end: int) -> bool:
        """Clear bits ``[first, end)``; whether that changed any."""
        before = self.count
        for page, low, high in self._parts(first, end):
            if page in self._pages or page in self._full:
                self._clear_in_page(page, low, high)
        return self.count != before

    def clear_all(self) -> bool:
        """Clear everything; whether that changed any."""
        before, self.count = self.count, 0
        self._pages.clear()
        self._full.clear()
        return bool(before)

    def _parts(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(page, low, high) of the range, cut at pages and at the length."""
        end = min(end, self.length)
        while first < end:
            page, low = first >> _SHIFT, first & (PAGE_BITS - 1)
            high = min(PAGE_BITS, low + end - first)
            yield page, low, high
            first += high - low

    def _size_of(self, page: int) -> int:
        return min(PAGE_BITS, self.length - (page << _SHIFT))

    def _set_in_page(self, page: int, low: int, high: int) -> None:
        data = self._pages.get(page)
        if data is None:
            if high - low == self._size_of(page):
                self._full.add(page)
                self.count += high - low
                return
            data = self._pages[page] = bytearray(PAGE_BYTES)
        if high - low == 1:
            mask = 1 << (low & 7)
            if not data[low >> 3] & mask:
                data[low >> 3] |= mask
                self.count += 1
            return
        self.count += high - low - _ones(data, low, high)
        if high - low == self._size_of(page):
            del self._pages[page]
            self._full.add(page)
        else:
            _fill(data, low, high)

    def _clear_in_page(self, page: int, low: int, high: int) -> None:
        whole = high - low == self._size_of(page)
        if page in self._full:
            self.count -= high - low
            self._full.discard(page)
            if whole:
                return
            data = self._pages[page] = bytearray(PAGE_BYTES)
            _fill(data, 0, self._size_of(page))
        else:
            data = self._pages[page]
            self.count -= _ones(data, low, high)
        if whole:
            del self._pages[page]
            return
        first, last = low >> 3, high >> 3
        if first == last:
            data[first] &= ~(((1 << (high - low)) - 1) << (low & 7)) & 0xFF
            return
        if low & 7:
            data[first] &= (1 << (low & 7)) - 1
            first += 1
        data[first:last] = _ZEROES[: last - first]
        if high & 7:
            data[last] &= ~((1 << (high & 7)) - 1) & 0xFF

    def resize(self, length: int) -> None:
        """Change the length; new bits are clear."""
        if length < self.length:
            self.clear(length, self.length)
            last = length >> _SHIFT
            for pages in (self._pages, self._full):
                for page in [page for page in pages if page << _SHIFT >= length]:
                    pages.pop(page) if isinstance(pages, dict) else pages.discard(page)
            if last in self._pages:
                self._settle(last, length)
        elif length & (PAGE_BITS - 1) or self.length & (PAGE_BITS - 1):
            # A full page is full up to the old length only.
            last = self.length >> _SHIFT
            if last in self._full:
                self._full.discard(last)
                data = self._pages[last] = bytearray(PAGE_BYTES)
                _fill(data, 0, self._size_of(last))
        self.length = length

    def _settle(self, page: int, length: int) -> None:
        """A page that lost its end may be empty or full now."""
        size = min(PAGE_BITS, length - (page << _SHIFT))
        found = _ones(self._pages[page], 0, size)
        if found in (0, size):
            del self._pages[page]
            if found:
                self._full.add(page)

    # -- looking for bits -------------------------------------------------------------------------

    def next(self, bit: int, end: int, wanted: bool = True) -> int:
        """The first bit from ``bit`` that is set (or not, as ``wanted``), ``end`` if there is none before it."""
        end = min(end, self.length)
        while bit < end:
            page = bit >> _SHIFT
            data = self._pages.get(page)
            if data is None:
                if (page in self._full) == wanted:
                    return bit
                if wanted:
                    page = self._next_page(page)
                    if page < 0:
                        return end
                    bit = page << _SHIFT
                else:
                    bit = (page + 1) << _SHIFT
                continue
            found = _find(data, bit & (PAGE_BITS - 1), wanted)
            if found < PAGE_BITS:
                return min((page << _SHIFT) + found, end)
            bit = (page + 1) << _SHIFT
        return end

    def _next_page(self, page: int) -> int:
        """The first page behind ``page`` that may hold a set bit, -1 if there is none."""
        if len(self._pages) + len(self._full) > 64:
            for near in range(page + 1, page + 65):
                if near in self._pages or near in self._full:
                    return near
        later = [each for pages in (self._pages, self._full) for each in pages if each > page]
        return min(later, default=-1)

    def runs(self, first: int, end: int, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """(starts, ends, position): runs of set bits from ``first`` on, about ``limit``, and how far was looked.

        A run may go on at ``position``.
        """
        import numpy as np

        end = min(end, self.length)
        starts: list[NDArray[np.int64]] = []
        ends: list[NDArray[np.int64]] = []
        found = 0
        while first < end and found < limit:
            first = self.next(first, end)
            if first >= end:
                break
            page = first >> _SHIFT
            base = page << _SHIFT
            stop = min(base + PAGE_BITS, end)
            if page in self._full:
                low, high = np.array([first], np.int64), np.array([min(stop, self.length)], np.int64)
            else:
                low, high = runs_of(self._pages[page])
                low, high = np.maximum(low + base, first), np.minimum(high + base, stop)
                kept = low < high
                low, high = low[kept], high[kept]
            starts.append(low)
            ends.append(high)
            found += len(low)
            first = stop
        if not starts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), end
        return (*_joined(np.concatenate(starts), np.concatenate(ends)), first)

    # -- bytes ------------------------------------------------------------------------------------

    def dump(self, position: int, length: int) -> bytes:
        """Bytes ``[position, position + length)`` of the row; zeroes behind its end."""
        parts = []
        while length > 0:
            page, at = divmod(position, PAGE_BYTES)
            step = min(length, PAGE_BYTES - at)
            parts.append(self._page_bytes(page)[at : at + step])
            position += step
            length -= step
        return bytes(b"".join(parts))

    def _page_bytes(self, page: int) -> bytes | bytearray:
        if page not in self._full:
            return self._pages.get(page, _ZEROES)
        size = self._size_of(page)
        if size == PAGE_BITS:
            return _ONES
        data = bytearray(PAGE_BYTES)
        _fill(data, 0, size)
        return data

    def join(self, position: int, data: bytes | bytearray | memoryview) -> bool:
        """Set the bits that are set in ``data``, which begins at byte ``position``; whether that changed any."""
        before = self.count
        view = memoryview(data)[: max(0, -(-self.length // 8) - position)]
        while len(view):
            page, at = divmod(position, PAGE_BYTES)
            step = min(len(view), PAGE_BYTES - at)
            self._join_page(page, at, bytes(view[:step]))
            view = view[step:]
            position += step
        return self.count != before

    def _join_page(self, page: int, at: int, part: bytes) -> None:
        if page in self._full or not part.strip(b"\0"):
            return
        size = self._size_of(page)
        mine = self._pages.get(page)
        before = int.from_bytes(mine, "little") if mine is not None else 0
        more = int.from_bytes(part, "little")
        whole = before | (more << 8 * at if at else more)
        if size < PAGE_BITS:
            whole &= (1 << size) - 1
        found = whole.bit_count()
        self.count += found - before.bit_count()
        if found == size:
            self._pages.pop(page, None)
            self._full.add(page)
        elif found:
            self._pages[page] = bytearray(whole.to_bytes(PAGE_BYTES, "little"))

    # -- other rows -------------------------------------------------------------------------------

    def pages(self) -> list[int]:
        """Pages in which a bit is set, ascending (some may hold none)."""
        return sorted({*self._pages, *self._full})

    def page(self, number: int) -> tuple[bool, bytes]:
        """(every bit is set, bytes) of a page."""
        return number in self._full, bytes(self._page_bytes(number))

    def copy(self) -> Bits:
        made = Bits(self.length)
        made.count = self.count
        made._pages = {page: data[:] for page, data in self._pages.items()}
        made._full = set(self._full)
        return made


def _ones(data: bytearray, low: int, high: int) -> int:
    """Set bits among ``[low, high)``."""
    first, last = low >> 3, (high + 7) >> 3
    value = int.from_bytes(memoryview(data)[first:last], "little") >> (low & 7)
    return (value & ((1 << (high - low)) - 1)).bit_count()


def _fill(data: bytearray, low: int, high: int) -> None:
    """Set bits ``[low, high)``."""
    first, last = low >> 3, high >> 3
    if first == last:
        data[first] |= ((1 << (high - low)) - 1) << (low & 7)
        return
    if low & 7:
        data[first] |= 0xFF << (low & 7) & 0xFF
        first += 1
    data[first:last] = _ONES[: last - first]
    if high & 7:
        data[last] |= (1 << (high & 7)) - 1


def _find(data: bytearray, low: int, wanted: bool) -> int:
    """The first bit from ``low`` that is set (or not); ``PAGE_BITS`` if there is none."""
    at = low >> 3
    value = data[at] if wanted else data[at] ^ 0xFF
    value &= 0xFF << (low & 7) & 0xFF
    if not value:
        rest = bytes(memoryview(data)[at + 1 :])
        dull = len(rest) - len(rest.lstrip(b"\0" if wanted else b"\xff"))
        at += 1 + dull
        if at >= PAGE_BYTES:
            return PAGE_BITS
        value = data[at] if wanted else data[at] ^ 0xFF
    return at * 8 + (value & -value).bit_length() - 1


def runs_of(data: bytes | bytearray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, ends) of the runs of set bits in a page's bytes."""
    import numpy as np

    row = np.frombuffer(data, np.uint8)
    used = np.flatnonzero(row)
    if len(used) < len(row) // 8:
        if not len(used):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        index, bit = np.nonzero(np.unpackbits(row[used], bitorder="little").reshape(-1, 8))
        places = used[index] * 8 + bit
        border = np.flatnonzero(np.diff(places) != 1)
        starts = places[np.concatenate(([0], border + 1))]
        return starts, places[np.concatenate((border, [len(places) - 1]))] + 1
    flags = np.zeros(len(row) * 8 + 2, np.int8)
    flags[1:-1] = np.unpackbits(row, bitorder="little")
    edges = np.flatnonzero(np.diff(flags)).astype(np.int64)
    return edges[::2], edges[1::2]


def _joined(starts: NDArray[Any], ends: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Runs that touch become one."""
    import numpy as np

    border = starts[1:] != ends[:-1]
    keep = np.concatenate(([True], border))
    last = np.concatenate((border, [True]))
    return starts[keep], ends[last]
