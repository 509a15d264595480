"""The pipeline: order, bounds, errors, pausing; and no thread is left."""

from __future__ import annotations

import threading
import time

import pytest

from byre.io import workers


@pytest.fixture(autouse=True)
def _no_thread_is_left():  # type: ignore[no-untyped-def]
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_come_in_order(threads: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    got: list[tuple[int, int]] = []
    workers.run(range(60), work, lambda item, result: got.append((item, result)), threads=threads)
    assert got == [(i, i * i) for i in range(60)]


def test_out_of_order_delivers_all() -> None:
    lock, got = threading.Lock(), []

    def deliver(item: int, result: int) -> None:
        with lock:
            got.append(result)

    workers.run(range(100), lambda item: -item, deliver, threads=4, in_order=False)
    assert sorted(got) == [-i for i in range(99, -1, -1)]


def test_no_items() -> None:
    workers.run([], lambda item: item, lambda _item, _result: None)


def test_work_runs_on_several_threads_and_stays_bounded() -> None:
    lock = threading.Lock()
    taken = delivered = most = 0
    names = set()

    def items():  # type: ignore[no-untyped-def]
        nonlocal taken, most
        for i in range(40):
            with lock:
                taken += 1
                most = max(most, taken - delivered)
            yield i

    def work(item: int) -> int:
        names.add(threading.current_thread().name)
        time.sleep(0.002)
        return item

    def deliver(item: int, result: int) -> None:
        nonlocal delivered
        with lock:
            delivered += 1

    workers.run(items(), work, deliver, threads=3, ahead=4)
    assert len(names) > 1
    assert most <= 5


def test_the_earliest_error_wins() -> None:
    delivered: list[int] = []

    def work(item: int) -> int:
        if item == 7:
            time.sleep(0.05)
            raise ValueError("seven")
        if item == 9:
            raise ValueError("nine")
        return item

    with pytest.raises(ValueError, match="seven"):
        workers.run(range(1000), work, lambda item, _result: delivered.append(item), threads=4, ahead=8)
    assert delivered == list(range(7))


def test_an_error_of_deliver_or_the_items_stops_everything() -> None:
    worked: list[int] = []

    def deliver(item: int, result: int) -> None:
        if item == 3:
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        workers.run(range(10**6), lambda item: worked.append(item) or item, deliver, threads=2)  # type: ignore[func-returns-value]
    assert len(worked) < 100

    def broken():  # type: ignore[no-untyped-def]
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.run(broken(), lambda item: item, lambda _item, _result: None, threads=2)


@pytest.mark.parametrize("in_order", [True, False])
def test_the_gate_is_asked_with_nothing_in_flight(in_order: bool) -> None:
    lock = threading.Lock()
    in_flight = asked = 0

    class Gate:
        attention = True

        def abandon(self) -> None:
            pass

        def checkpoint(self) -> None:
            nonlocal asked
            assert in_flight == 0
            asked += 1
            if asked > 5:
                self.attention = False

    def work(item: int) -> int:
        nonlocal in_flight
        with lock:
            in_flight += 1
        time.sleep(0.001)
        return item

    def deliver(item: int, result: int) -> None:
        nonlocal in_flight
        with lock:
            in_flight -= 1

    workers.run(range(50), work, deliver, threads=3, gate=Gate(), in_order=in_order)
    assert asked > 5


def test_default_threads() -> None:
    assert 2 <= workers.default_threads() <= 4
