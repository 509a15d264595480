"""Many direct reads at once from one thread: the kernel's asynchronous I/O (io_submit), where the system has it.

For files opened with O_DIRECT only; others would make ``submit`` wait. See io_submit(2) and ``linux/aio_abi.h``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KernelAio"]

_CALLS: Final = {
    # machine: io_setup, io_destroy, io_submit, io_getevents
    "x86_64": (206, 207, 209, 208),
    "aarch64": (0, 1, 2, 4),
    "riscv64": (0, 1, 2, 4),
}
_IOCB: Final = struct.Struct("@QIIHhIQQqQII")
_EVENT: Final = struct.Struct("@QQqq")
_READ: Final = 0


class KernelAio:
    """A queue of up to ``depth`` reads. One thread may submit while another waits for those that have ended.

    :raises OSError: (constructor) the system does not allow it
    """

    def __init__(self, depth: int) -> None:
        numbers = _CALLS.get(platform.machine())
        if numbers is None or struct.calcsize("P") != 8:
            raise OSError(errno.ENOSYS, "the numbers of the system calls are not known for this machine")
        setup, self._destroy, self._submit, self._get = numbers
        # Other threads run during a call; and each instance has its own function object, whose types it sets.
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._depth = depth
        self._context = ctypes.c_ulong(0)
        if self._call(setup, ctypes.c_uint(depth), ctypes.byref(self._context)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._blocks = ctypes.create_string_buffer(_IOCB.size * depth)
        self._pointers = (ctypes.c_void_p * depth)()
        for number in range(depth):
            self._pointers[number] = ctypes.addressof(self._blocks) + number * _IOCB.size
        self._events = ctypes.create_string_buffer(_EVENT.size * depth)
        self._patience = ctypes.create_string_buffer(16)

    def submit(self, reads: Sequence[tuple[int, int, int, int, int]]) -> int:
        """Begin reads, not more than ``depth`` with those that are under way.

        :param reads: (token, descriptor, offset, memory address, length), aligned as the file needs
        :returns: how many have begun, in their order; the others must be done in another way
        """
        for number, (token, fd, offset, address, length) in enumerate(reads):
            _IOCB.pack_into(self._blocks, number * _IOCB.size, token, 0, 0, _READ, 0, fd, address, length, offset,
                            0, 0, 0)  # fmt: skip
        # The kernel copies what the pointers lead to before the call returns.
        begun: int = self._call(self._submit, self._context, ctypes.c_long(len(reads)), self._pointers)
        return max(begun, 0)

    def ended(self, seconds: float) -> list[tuple[int, int]]:
        """Wait until reads have ended: (token, bytes read or negative errno) of each; none if it took too long."""
        struct.pack_into("@qq", self._patience, 0, int(seconds), int(seconds % 1 * 1e9))
        count = self._call(self._get, self._context, ctypes.c_long(1), ctypes.c_long(self._depth), self._events,
                           self._patience)  # fmt: skip
        return [
            (token, result)
            for token, _, result, _ in (
                _EVENT.unpack_from(self._events, number * _EVENT.size) for number in range(max(count, 0))
            )
        ]

    def close(self) -> None:
        """Let go; the kernel waits for what is under way, whose memory it writes to. Once."""
        self._call(self._destroy, self._context)
