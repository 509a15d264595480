"""The fault filter: rules, events, breakpoints, limits, planned failures."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import byre
from byre.errors import InvalidArgument, IOFailure, NoSpace, NotFound
from byre.filters.faults import Device, FaultNode
from byre.graph.creating import create
from byre.graph.graph import Graph
from byre.graph.node import PERM_ALL, PERM_READ, PERM_WRITE, Node
from byre.graph.opening import Opener, OpenFlags, Policy
from byre.protocols.memory import MemoryNode

MIB = 1 << 20


class Recorder(MemoryNode):
    """Memory that remembers the requests that reached it."""

    def __init__(self, size: int) -> None:
        super().__init__(size=size)
        self.seen: list[tuple[str, int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.seen.append(("read", offset, len(buffer)))
        super().read_into(offset, buffer)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.seen.append(("write", offset, len(buffer)))
        super().write_from(offset, buffer, flags)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self.seen.append(("zeroes", offset, length))
        super().write_zeroes(offset, length, flags)

    def discard(self, offset: int, length: int) -> None:
        self.seen.append(("discard", offset, length))
        super().discard(offset, length)


@contextmanager
def opened(**options: object) -> Iterator[FaultNode]:
    graph = Graph()
    opener = Opener(graph, Policy())
    spec = {"driver": "blkdebug", "image": {"driver": "memory", "size": MIB}, **options}
    node = opener.open_chain(spec, OpenFlags(read_only=False))
    assert isinstance(node, FaultNode)
    root = graph.attach_image(node, "test", PERM_READ | PERM_WRITE, PERM_ALL)
    try:
        yield node
    finally:
        graph.detach(root)
        graph.release(node)


def over(child: Node, device: Device | None = None) -> FaultNode:
    graph = Graph()
    node = FaultNode()
    graph.add(child)
    graph.add(node)
    graph.attach(node, "file", child, "filtered")
    node.set_device(device or Device())
    return node


def read(node: Node, offset: int, length: int) -> bytes:
    data = bytearray(length)
    node.read_into(offset, memoryview(data))
    return bytes(data)


def write(node: Node, offset: int, data: bytes) -> None:
    node.write_from(offset, memoryview(data))


# -- rules ----------------------------------------------------------------------------------------


def test_a_rule_for_none_is_active_from_the_start() -> None:
    with opened(**{"inject-error": [{"event": "none", "errno": errno.ENOSPC}]}) as node:
        with pytest.raises(NoSpace, match=r"cannot read 512 bytes at 0x0: No space left .*injected"):
            read(node, 0, 512)
        with pytest.raises(NoSpace):
            write(node, 0, b"x")
        for _ in range(2):
            with pytest.raises(NoSpace):
                node.flush()
        node.block_status(0, 512)  # not among the default kinds


def test_rules_do_not_fail_a_flush_that_nothing_was_written_for(tmp_path: Path) -> None:
    with opened(**{"inject-error": [{"event": "none"}]}) as node:
        node.flush()
    path = tmp_path / "a.qcow2"
    create(str(path), "qcow2", 1 << 20)
    with byre.open(str(path), read_only=False) as image:
        image.write(0, b"x")
    config = tmp_path / "config"
    config.write_text('[inject-error]\nevent = "l2_load"\n')
    with byre.open(f"blkdebug:{config}:{path}", format="qcow2", read_only=False) as image, pytest.raises(IOFailure):
        image.read(0, 512)


def test_dotted_options_with_and_without_number() -> None:
    with opened(**{"inject-error.event": "write_aio"}) as node:
        write(node, 0, b"x")
        node.debug_event("write_aio")
        with pytest.raises(IOFailure):
            write(node, 0, b"x")
    with opened(**{"inject-error.0.event": "none", "inject-error.0.iotype": "flush"}) as node:
        write(node, 0, b"x")
        with pytest.raises(IOFailure, match="cannot flush"):
            node.flush()


def test_sector_and_once() -> None:
    with opened(**{"inject-error": [{"event": "none", "sector": 4, "once": True}]}) as node:
        read(node, 0, 2048)
        with pytest.raises(IOFailure):
            read(node, 2000, 100)
        read(node, 2000, 100)


def test_the_second_write_fails_by_state() -> None:
    rules = {
        "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
        "inject-error": [{"event": "write_aio", "state": 2}],
    }
    with opened(**rules) as node:
        node.debug_event("write_aio")
        write(node, 0, b"first")
        node.debug_event("write_aio")
        with pytest.raises(IOFailure):
            write(node, 0, b"second")


def test_the_earliest_fitting_rule_decides_and_errno_zero_lets_pass() -> None:
    rules = [{"event": "none", "errno": 0, "sector": 0}, {"event": "none", "errno": errno.ENOSPC}]
    with opened(**{"inject-error": rules}) as node:
        read(node, 0, 512)
        with pytest.raises(NoSpace):
            read(node, 512, 512)


def test_rules_stay_active_until_an_event_brings_others() -> None:
    rules = [{"event": "l2_load", "errno": errno.ENOSPC}, {"event": "l2_update", "errno": errno.EIO}]
    with opened(**{"inject-error": rules}) as node:
        node.debug_event("l2_load")
        node.debug_event("cluster_alloc")
        with pytest.raises(NoSpace):
            read(node, 0, 1)
        node.debug_event("l2_update")
        with pytest.raises(IOFailure) as caught:
            read(node, 0, 1)
        assert caught.value.errno == errno.EIO


def test_block_status_can_fail_when_asked_to() -> None:
    with opened(**{"inject-error": [{"event": "none", "iotype": "block-status"}]}) as node:
        read(node, 0, 1)
        with pytest.raises(IOFailure):
            node.block_status(0, 1)
        with pytest.raises(IOFailure):
            node.extents(0, 1)


def test_config_file_and_file_name(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(4096))
    config = tmp_path / "rules.conf"
    config.write_text('# fail\n[inject-error "a"]\nevent = "none"\nsector = "1"\nerrno = "28"\n[set-state]\n'
                      'event = "none"\nnew_state = "3"\n')  # fmt: skip
    with byre.open(f"blkdebug:{config}:{image}", format="raw") as disk:
        assert disk.format == "raw"
        disk.read(0, 512)
        with pytest.raises(NoSpace):
            disk.read(512, 512)
    with byre.open(f"blkdebug::{image}", read_only=False) as disk:
        assert disk.format == "raw"
        disk.write(0, b"through")
    assert image.read_bytes().startswith(b"through")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[inject-error]\nevent = none\n", "expected key = "),
        ('event = "none"\n', "before any section"),
        ("[explode]\n", "unknown section"),
        ("[inject-error]\n", "names no event"),
        ('[inject-error]\nevent = "bang"\n', "unknown event 'bang'"),
        ('[inject-error]\nevent = "none"\nerrno = "x"\n', "errno"),
        ('[set-state]\nevent = "none"\nwhat = "1"\n', "no option 'what'"),
    ],
)
def test_bad_config_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c").write_text(text)
    (tmp_path / "i").write_bytes(bytes(512))
    with pytest.raises(InvalidArgument, match=message):
        byre.open(f"blkdebug:{tmp_path / 'c'}:{tmp_path / 'i'}")


def test_missing_config_file(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(bytes(512))
    with pytest.raises(NotFound, match="cannot read fault rules"):
        byre.open(f"blkdebug:{tmp_path / 'c'}:{tmp_path / 'i'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inject-error": [{"event": "bang"}]}, "unknown event"),
        ({"inject-error": [{"event": "none", "iotype": "bang"}]}, "iotype"),
        ({"inject-error.x.event": "none"}, "expected 'inject-error.N.name'"),
        ({"take-child-perms": ["fly"]}, "expected one of consistent-read"),
        ({"align": 3}, "power of two"),
        ({"align": 512, "max-transfer": 1000}, "multiple of 512"),
        ({"opt-write-zero": 4096, "max-write-zero": 2048}, "multiple of 4096"),
        ({"max-discard": 1 << 31}, "below 2 GiB"),
        ({"bang": 1}, "no option 'bang'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message), opened(**options):
        pass


def test_a_file_name_needs_both_parts() -> None:
    with pytest.raises(InvalidArgument, match="blkdebug:CONFIG:IMAGE"):
        byre.open("blkdebug:x")
    with pytest.raises(InvalidArgument, match="needs a child 'image'"):
        byre.open({"driver": "blkdebug"})


def test_permissions_taken_and_not_shared() -> None:
    with opened(**{"take-child-perms": ["resize"], "unshare-child-perms": ["write"]}) as node:
        edge = node.children["file"]
        assert edge.used & 8
        assert not edge.shared & PERM_WRITE


# -- breakpoints ----------------------------------------------------------------------------------


def test_a_breakpoint_holds_a_request_until_it_is_resumed() -> None:
    node = over(MemoryNode(size=MIB))
    told: list[str] = []
    node.on_suspend = lambda tag: told.append(f"held {tag}")
    node.on_resume = lambda tag: told.append(f"let go {tag}")
    node.set_breakpoint("pwritev", "A")
    writer = threading.Thread(target=write, args=(node, 0, b"late"))
    writer.start()
    assert node.wait_suspended("A", 10)
    assert node.is_suspended("A")
    assert not node.is_suspended("B")
    write(node, 100, b"free")  # the breakpoint is used up
    assert read(node, 0, 4) == bytes(4)
    node.resume("A")
    writer.join(10)
    assert not writer.is_alive()
    assert read(node, 0, 4) == b"late"
    assert told == ["held A", "let go A"]
    with pytest.raises(NotFound):
        node.resume("A")


def test_removing_a_breakpoint_lets_all_its_requests_go() -> None:
    node = over(MemoryNode(size=MIB))
    writers = [threading.Thread(target=write, args=(node, at, b"x")) for at in (0, 1)]
    for index, writer in enumerate(writers):
        node.set_breakpoint("pwritev", "A")
        writer.start()
        for _ in range(1000):
            if len(node._suspended) > index:
                break
            threading.Event().wait(0.01)
    node.set_breakpoint("pwritev", "A")
    node.remove_breakpoint("A")
    for writer in writers:
        writer.join(10)
        assert not writer.is_alive()
    write(node, 5, b"not held")
    with pytest.raises(NotFound):
        node.remove_breakpoint("A")
    with pytest.raises(InvalidArgument, match="unknown event"):
        node.set_breakpoint("bang", "A")


def test_closing_lets_suspended_requests_go() -> None:
    node = over(MemoryNode(size=MIB))
    node.set_breakpoint("pwritev", "A")
    writer = threading.Thread(target=write, args=(node, 0, b"x"))
    writer.start()
    assert node.wait_suspended("A", 10)
    node.close()
    writer.join(10)
    assert not writer.is_alive()


# -- limits ---------------------------------------------------------------------------------------


def test_unaligned_requests_become_aligned_ones() -> None:
    memory = Recorder(MIB)
    node = over(memory, Device(align=4096))
    write(node, 0x100, b"a" * 0x100)
    write(node, 0x1800, b"b" * 0x1000)
    assert read(node, 0, 0x3000) == (bytes(0x100) + b"a" * 0x100 + bytes(0x1600) + b"b" * 0x1000 + bytes(0x800))
    assert all(offset % 4096 == 0 and length % 4096 == 0 for _, offset, length in memory.seen)
    assert node.limits.request_alignment == 4096


def test_the_end_of_an_odd_file_stays() -> None:
    node = over(MemoryNode(b"x" * 1000), Device(align=512))
    write(node, 990, b"yy")
    assert node.size == 1000
    write(node, 1010, b"z")
    assert node.size == 1011
    assert read(node, 0, 1011) == b"x" * 990 + b"yy" + b"x" * 8 + bytes(10) + b"z"


def test_read_modify_write_events_and_exclusion() -> None:
    """Two writers share a block: the second waits while the first is held between reading and writing."""
    node = over(MemoryNode(size=MIB), Device(align=4096))
    node.set_breakpoint("pwritev_rmw_after_tail", "A")
    first = threading.Thread(target=write, args=(node, 0x5000, b"1" * 0x200))
    first.start()
    assert node.wait_suspended("A", 10)
    second = threading.Thread(target=write, args=(node, 0x5200, b"2" * 0x200))
    second.start()
    write(node, 0x8000, b"3" * 0x1000)  # elsewhere: not held up
    second.join(0.1)
    assert second.is_alive()
    node.resume("A")
    first.join(10)
    second.join(10)
    assert read(node, 0x5000, 0x600) == b"1" * 0x200 + b"2" * 0x200 + bytes(0x200)


def test_long_requests_are_split() -> None:
    memory = Recorder(MIB)
    node = over(memory, Device(align=512, max_transfer=2048, max_zero=8192, zero_align=4096, max_discard=16384))
    write(node, 0, b"d" * 5000)
    assert max(length for _, _, length in memory.seen) <= 2048
    memory.seen.clear()
    node.write_zeroes(512, 20000)
    zeroes = [(offset, length) for kind, offset, length in memory.seen if kind == "zeroes"]
    assert zeroes == [(4096, 8192), (12288, 8192)]
    assert read(node, 512, 20000) == bytes(20000)
    assert read(node, 0, 512) == b"d" * 512
    memory.seen.clear()
    node.discard(100, 40000)
    discards = [(offset, length) for kind, offset, length in memory.seen if kind == "discard"]
    assert discards == [(512, 16384), (16896, 16384), (33280, 40100 // 512 * 512 - 33280)]


# -- planned failures -----------------------------------------------------------------------------


def test_the_nth_call_fails_once_or_from_then_on() -> None:
    node = over(MemoryNode(size=MIB))
    node.fail("write", 2)
    write(node, 0, b"1")
    read(node, 0, 1)
    with pytest.raises(IOFailure):
        write(node, 0, b"2")
    write(node, 0, b"3")
    assert node.calls["write"] == 3
    node.fail("change", 1, errno.ENOSPC, sticky=True)
    read(node, 0, 1)
    for _ in range(2):
        with pytest.raises(NoSpace):
            node.flush()
    node.heal()
    node.flush()
    node.fail("resize")
    with pytest.raises(IOFailure, match="cannot resize to 5 bytes"):
        node.resize(5)


def test_a_failed_write_may_have_happened() -> None:
    node = over(MemoryNode(size=MIB))
    node.fail("write", effect="half")
    with pytest.raises(IOFailure):
        write(node, 0, b"h" * 1024)
    assert read(node, 0, 1024) == b"h" * 512 + bytes(512)
    node.fail("any", effect="full")
    with pytest.raises(IOFailure):
        node.writev_from(0, [memoryview(b"f" * 512), memoryview(b"g" * 512)])
    assert read(node, 0, 1024) == b"f" * 512 + b"g" * 512
    with pytest.raises(InvalidArgument):
        node.fail("sometimes")
