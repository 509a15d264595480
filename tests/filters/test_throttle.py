"""Throttling: limits are kept, members take turns, limits change under waiting requests, draining lets go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

import byre
from byre.errors import InvalidArgument, NotFound
from byre.filters.throttle import ThrottleNode
from byre.filters.throttle_group import READ, WRITE, Member, ThrottleGroup
from byre.graph.graph import Graph
from byre.image import Image
from byre.protocols.memory import MemoryNode
from contracts.node import run_threads
from support.images import stack

SIZE = 1 << 20


def throttled(group: ThrottleGroup, graph: Graph | None = None) -> Image:
    graph = graph or Graph()
    node = ThrottleNode(group)
    stack(graph, MemoryNode(bytes(SIZE)), [node])
    return Image(node, graph, read_only=False)


def joined(group: ThrottleGroup) -> Member:
    member = Member()
    group.join(member)
    return member


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def delay(group: ThrottleGroup, direction: int) -> float:
    with group._lock:
        return group._delay(direction)


# -- what counts ----------------------------------------------------------------------------------


def test_reads_and_writes_have_their_own_limits() -> None:
    group = ThrottleGroup("g", {"bps-read": 1000, "iops-write": 10}, clock=Clock())
    member = joined(group)
    group.admit(member, READ, 600)
    assert delay(group, READ) == pytest.approx(0.5)
    assert delay(group, WRITE) == 0
    group.admit(member, WRITE, 1 << 30)
    group.admit(member, WRITE, 1 << 30)
    assert delay(group, WRITE) == pytest.approx(0.1)
    assert delay(group, READ) == pytest.approx(0.5)


def test_a_total_counts_both() -> None:
    group = ThrottleGroup("g", {"bps-total": 1000, "iops-total": 1000}, clock=Clock())
    member = joined(group)
    group.admit(member, READ, 100)
    assert delay(group, WRITE) == 0
    group.admit(member, WRITE, 500)
    assert delay(group, READ) == delay(group, WRITE) == pytest.approx(0.5)


def test_large_requests_count_as_several() -> None:
    group = ThrottleGroup("g", {"iops-total": 10, "iops-size": 4096}, clock=Clock())
    member = joined(group)
    group.admit(member, READ, 6144)  # one and a half
    assert delay(group, READ) == pytest.approx(0.05)
    group.set_limits({"iops-total": 10, "iops-size": 4096})
    group.admit(member, READ, 10)
    assert delay(group, READ) == 0


def test_time_makes_room() -> None:
    clock = Clock()
    group = ThrottleGroup("g", {"bps-total": 1000}, clock=clock)
    group.admit(joined(group), READ, 1100)
    assert delay(group, READ) == pytest.approx(1.0)
    clock.now += 0.25
    assert delay(group, READ) == pytest.approx(0.75)
    clock.now -= 5  # a clock that goes back gives nothing
    assert delay(group, READ) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"iops-total": 1, "iops-read": 1}, "at the same time"),
        ({"bps-total": 1, "bps-write": 1}, "at the same time"),
        ({"iops-size": 4096, "bps-total": 1}, "iops-size"),
        ({"iops-total-max": 5}, "without iops-total"),
        ({"iops-total": 10, "iops-total-max": 5}, "cannot be lower"),
        ({"iops-total": 10, "iops-total-max-length": 5}, "without iops-total-max"),
        ({"iops-total": 10, "iops-total-max": 20, "iops-total-max-length": 0}, "cannot be 0"),
        ({"iops-total": 10, "iops-total-max": 10**9, "iops-total-max-length": 10**9}, "too long"),
        ({"bps-total": 10**15 + 1}, "between 0 and"),
        ({"bps-total": "fast"}, "number"),
        ({"bps": 5}, "no option 'bps'"),
    ],
)
def test_limits_that_make_no_sense(limits: dict[str, object], words: str) -> None:
    group = ThrottleGroup("g", {"bps-read": 7})
    with pytest.raises(InvalidArgument, match=words):
        group.set_limits(limits)
    assert group.limits.given() == {"bps-read": 7}


def test_definitions() -> None:
    for text in (
        "throttle-group,id=g,x-iops-total=100,x-bps-read=2M,x-bps-read-max=4M,x-bps-read-max-length=3",
        "throttle-group,id=g,limits.iops-total=100,limits.bps-read=2M,limits.bps-read-max=4M,limits.bps-read-max-length=3",
        '{"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 100, "bps-read": 2097152, '
        '"bps-read-max": 4194304, "bps-read-max-length": 3}}',
    ):
        group = ThrottleGroup.parse(text)
        expected = {"iops-total": 100, "bps-read": 2 << 20, "bps-read-max": 4 << 20, "bps-read-max-length": 3}
        assert (group.name, group.limits.given()) == ("g", expected)
    for bad in ("throttle-group,x-iops-total=1", "throttle-group,id=g,iops-total=1", "throttle-group,id=g,x-nice=1"):
        with pytest.raises(InvalidArgument):
            ThrottleGroup.parse(bad)


# -- who waits ------------------------------------------------------------------------------------


def test_a_limit_is_kept() -> None:
    with throttled(ThrottleGroup("g", {"iops-total": 400})) as image:
        started = time.monotonic()
        run_threads(lambda index: [image.read(index * 512, 512) for _ in range(20)], 4)
        elapsed = time.monotonic() - started
    assert elapsed >= (80 - 41) / 400  # a tenth of a second is free, and one over


def test_members_take_turns() -> None:
    """One with many threads and one with a single thread get the same share."""
    group = ThrottleGroup("g", {"iops-total": 300})
    graph = Graph()
    many, one = throttled(group, graph), throttled(group, graph)
    counts = [0, 0]
    lock, stop = threading.Lock(), threading.Event()

    def work(index: int) -> None:
        which = 1 if index == 0 else 0
        image = (many, one)[which]
        while not stop.is_set():
            image.read(0, 512)
            with lock:
                counts[which] += 1

    timer = threading.Timer(0.8, stop.set)
    timer.start()
    run_threads(work, 7)
    timer.cancel()
    many.close()
    one.close()
    assert counts[1] > 0.35 * sum(counts), counts


def test_requests_of_a_member_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    group = ThrottleGroup("g", {"bps-total": 1})
    member = joined(group)
    group.admit(member, READ, 1000)
    order: list[str] = []
    monkeypatch.setattr(group, "_count", lambda *_: order.append(threading.current_thread().name))
    threads = []
    for index in range(6):
        thread = threading.Thread(target=group.admit, args=(member, READ, 1), name=str(index), daemon=True)
        thread.start()
        threads.append(thread)
        until(lambda index=index: group.waiting == index + 1)  # type: ignore[misc]
    group.set_limits({"bps-total": 10**6})
    for thread in threads:
        thread.join(10)
    assert order == list("012345")


def test_other_limits_reach_those_who_wait() -> None:
    group = ThrottleGroup("g", {"bps-total": 1})
    with throttled(group) as image:
        image.read(0, 100_000)
        thread = threading.Thread(target=lambda: image.read(0, 10), daemon=True)
        thread.start()
        until(lambda: group.waiting == 1)
        group.set_limits({"bps-total": 10**9})
        thread.join(10)
        assert not thread.is_alive()


def test_draining_lets_go() -> None:
    """Pause, reopen and close do not wait for a limit that would take a day."""
    group = ThrottleGroup("g", {"bps-total": 1})
    image = throttled(group)
    image.read(0, 100_000)
    for change in (lambda: (image.pause(), image.resume()), image.close):
        threads = [threading.Thread(target=lambda: image.write(0, bytes(512)), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: group.waiting == 3)
        change()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert group.waiting == 0
    assert group._members == []


def test_an_interrupted_request_leaves_the_queue() -> None:
    group = ThrottleGroup("g", {"iops-total": 20})
    member = joined(group)
    for _ in range(4):
        group.admit(member, READ, 1)

    def broken_clock() -> float:
        raise KeyboardInterrupt

    clock, group._clock = group._clock, broken_clock
    with pytest.raises(KeyboardInterrupt):
        group.admit(member, READ, 1)
    group._clock = clock
    assert group.waiting == 0
    group.admit(member, READ, 1)


# -- opening --------------------------------------------------------------------------------------


def spec(**more: object) -> dict[str, object]:
    return {"driver": "throttle", "file": {"driver": "null-co", "size": SIZE}, **more}


def test_groups_by_name() -> None:
    graph = Graph()
    graph.throttle_groups["g"] = group = ThrottleGroup("g", {"iops-total": 5})
    with byre.open(spec(**{"throttle-group": "g"}), graph=graph) as image:
        assert isinstance(image.node, ThrottleNode)
        assert image.node.group is group
    with pytest.raises(NotFound, match="Throttle group 'h' does not exist"):
        byre.open(spec(**{"throttle-group": "h"}), graph=graph)
    with pytest.raises(InvalidArgument, match="specify a throttle group"):
        byre.open(spec())
    with pytest.raises(InvalidArgument, match="exclude each other"):
        byre.open(spec(**{"throttle-group": "g", "throttling.iops-total": 5}), graph=graph)


def test_limits_of_the_node() -> None:
    graph = Graph()
    first = byre.open(spec(**{"throttling.group": "own", "throttling.bps-read": 100}), graph=graph)
    with first, byre.open(spec(throttling={"group": "own"}), graph=graph) as other:
        assert other.node.group is first.node.group  # type: ignore[attr-defined]
        assert first.node.group.limits.given() == {"bps-read": 100}  # type: ignore[attr-defined]
        with byre.open(spec(throttling={"group": "own", "iops-total": "7"}), graph=graph):
            assert first.node.group.limits.given() == {"iops-total": 7}  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="cannot be lower"):
        byre.open(spec(**{"throttling.iops-total": 10, "throttling.iops-total-max": 5}))
    assert "own" in graph.throttle_groups


def test_reopening_moves_it_to_another_group() -> None:
    graph = Graph()
    for name in "ab":
        graph.throttle_groups[name] = ThrottleGroup(name)
    with byre.open(spec(**{"throttle-group": "a"}), graph=graph) as image:
        image.reopen(options={"throttle-group": "b"})
        assert image.node.group.name == "b"  # type: ignore[attr-defined]
        assert [len(graph.throttle_groups[name]._members) for name in "ab"] == [0, 1]
        with pytest.raises(NotFound):
            image.reopen(options={"throttle-group": "c"})
        image.read(0, 512)
