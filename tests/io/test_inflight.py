"""Claims and tickets: who waits for whom, and when freed space may be used again."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre.io.inflight import InFlight


def waits(lock: threading.Lock, wait: Callable[[], object], let_go: Callable[[], None]) -> None:
    """``wait`` (under the lock) does not return before ``let_go`` was called, and does afterwards."""
    entered, done = threading.Event(), threading.Event()

    def run() -> None:
        with lock:
            entered.set()
            wait()
            done.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(5)
    assert not done.wait(0.05)
    with lock:
        let_go()
    assert done.wait(5)
    thread.join(5)


def test_overlapping_claims_wait() -> None:
    lock = threading.Lock()
    inflight = InFlight(lock)
    with lock:
        claim = inflight.claim(10, 20)
        other = inflight.claim(40, 50)
        assert inflight.overlaps(19, 30)
        assert not inflight.overlaps(20, 30)
        assert not inflight.overlaps(0, 10)
        assert inflight.wait_clear(20, 40) is False  # nothing to wait for
        assert inflight.claim_count == 2
    waits(lock, lambda: inflight.wait_clear(15, 16), lambda: inflight.release(claim))
    with lock:
        inflight.release(other)
        assert inflight.wait_clear(0, 100) is False


def test_having_waited_is_reported() -> None:
    lock = threading.Lock()
    inflight = InFlight(lock)
    answers: list[bool] = []
    with lock:
        claim = inflight.claim(0, 10)
    waits(lock, lambda: answers.append(inflight.wait_clear(5, 6)), lambda: inflight.release(claim))
    assert answers == [True]


def test_waiting_for_all_claims() -> None:
    lock = threading.Lock()
    inflight = InFlight(lock)
    with lock:
        claims = [inflight.claim(0, 10), inflight.claim(10, 20)]

    def let_go() -> None:
        for claim in claims:
            inflight.release(claim)

    waits(lock, inflight.wait_all, let_go)


def test_equal_claims_are_counted() -> None:
    inflight = InFlight(threading.Lock())
    with inflight.changed:
        first = inflight.claim(0, 10)
        inflight.claim(0, 10)
        inflight.release(first)
        assert inflight.overlaps(0, 10)


def test_nothing_is_deferred_without_tickets() -> None:
    inflight = InFlight(threading.Lock())
    done: list[str] = []
    inflight.when_clear(lambda: done.append("now"))
    assert done == ["now"]


def test_only_tickets_taken_before_matter() -> None:
    inflight = InFlight(threading.Lock())
    done: list[str] = []
    old = inflight.take()
    inflight.when_clear(lambda: done.append("first"))
    young = inflight.take()
    inflight.when_clear(lambda: done.append("second"))
    inflight.give_back(old)
    assert done == ["first"]
    inflight.give_back(young)
    assert done == ["first", "second"]
    assert inflight.ticket_count == 0


def test_a_ticket_goes_back_once() -> None:
    inflight = InFlight(threading.Lock())
    ticket = inflight.take()
    inflight.give_back(ticket)
    with pytest.raises(KeyError):
        inflight.give_back(ticket)


@given(st.lists(st.tuples(st.sampled_from("tgf"), st.integers(0, 9)), max_size=60))
def test_freed_space_is_never_in_use(steps: list[tuple[str, int]]) -> None:
    """Model: a free waits exactly for the tickets that were out when it was asked for."""
    inflight = InFlight(threading.Lock())
    out: list[int] = []
    waiting: list[tuple[int, set[int]]] = []
    freed: list[int] = []
    for number, (step, choice) in enumerate(steps):
        if step == "t":
            out.append(inflight.take())
        elif step == "g" and out:
            ticket = out.pop(choice % len(out))
            inflight.give_back(ticket)
            for _, needed in waiting:
                needed.discard(ticket)
        elif step == "f":
            waiting.append((number, set(out)))
            inflight.when_clear(lambda number=number: freed.append(number))  # type: ignore[misc]
        assert sorted(freed) == [number for number, needed in waiting if not needed]


def test_wait_idle_waits_for_claims_and_tickets_and_keeps_writers_out() -> None:
    lock = threading.Lock()
    inflight = InFlight(lock)
    order: list[str] = []
    with lock:
        old, ticket = inflight.claim(0, 10), inflight.take()

    def exclusive() -> None:
        with lock:
            claim = inflight.wait_idle()
            order.append("alone")
            assert inflight.claim_count == 1
            assert inflight.ticket_count == 0
            inflight.release(claim)

    def writer() -> None:
        with lock:
            inflight.wait_clear(100, 110)
            order.append("writer")

    first, second = threading.Thread(target=exclusive), threading.Thread(target=writer)
    first.start()
    while True:
        with lock:
            if inflight.claim_count == 2:
                break
    second.start()
    with lock:
        inflight.release(old)
    with lock:
        inflight.give_back(ticket)
    first.join(10)
    second.join(10)
    assert order == ["alone", "writer"]


def test_two_that_want_to_be_alone_take_turns() -> None:
    lock = threading.Lock()
    inflight = InFlight(lock)
    with lock:
        ticket = inflight.take()
    done: list[int] = []

    def exclusive(number: int) -> None:
        with lock:
            claim = inflight.wait_idle()
            done.append(number)
            inflight.release(claim)

    threads = [threading.Thread(target=exclusive, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    with lock:
        inflight.give_back(ticket)
    for thread in threads:
        thread.join(10)
    assert sorted(done) == [0, 1]
