"""Jobs that take effect together or not at all; jobs found by their ids; what becomes of errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic, sleep

import pytest

from byre.errors import AlreadyExists, ByreError, Cancelled, InvalidArgument, IOFailure, NoSpace, NotFound
from byre.graph.graph import Graph
from byre.jobs.errors_policy import IGNORE, POLICIES, REPORT, RETRY, STOP, decide
from byre.jobs.job import Control, Job
from byre.jobs.registry import JobRegistry
from byre.jobs.states import State
from byre.jobs.transaction import Transaction, start_all


class Scripted(Job):
    """Does what the test says; notes which hooks were called, in one list for all jobs."""

    kind = "scripted"

    def __init__(self, id: str, hooks: list[str], run: Callable[[Control], None] = lambda control: None, *,
                 prepare: Callable[[], None] = lambda: None, **options: bool) -> None:  # fmt: skip
        super().__init__(id=id, auto_dismiss=False, **options)
        self._run, self._prepare, self._hooks = run, prepare, hooks

    def run(self, control: Control) -> None:
        self._run(control)

    def prepare(self) -> None:
        self._hooks.append(f"{self.id} prepare")
        self._prepare()

    def commit(self) -> None:
        self._hooks.append(f"{self.id} commit")

    def abort(self) -> None:
        self._hooks.append(f"{self.id} abort")

    def clean(self) -> None:
        self._hooks.append(f"{self.id} clean")


def until(condition: Callable[[], bool]) -> None:
    end = monotonic() + 10
    while not condition():
        assert monotonic() < end
        sleep(0.002)


def fail(error: ByreError) -> None:
    raise error


def forever(control: Control) -> None:
    while True:
        control.wait(0.01)


def ended(*jobs: Job) -> None:
    for job in jobs:
        assert job.join(10)
        assert job.state is State.CONCLUDED


# -- transactions ---------------------------------------------------------------------------------


def test_all_prepare_before_one_commits() -> None:
    hooks: list[str] = []
    go = threading.Event()
    quick, slow = Scripted("quick", hooks), Scripted("slow", hooks, lambda control: until(go.is_set))
    start_all([quick, slow], grouped=True)
    until(lambda: quick.state is State.WAITING)
    sleep(0.02)
    assert hooks == []
    go.set()
    ended(quick, slow)
    assert {*hooks[:2]} == {"quick prepare", "slow prepare"}
    assert {"quick commit", "slow commit"} < {*hooks[2:]}
    assert quick.error is slow.error is None


@pytest.mark.parametrize("at", ["run", "prepare", "cancel", "cancel while waiting"])
def test_if_one_fails_none_takes_effect(at: str) -> None:
    hooks: list[str] = []
    bad = IOFailure("no luck")
    failing = Scripted(
        "failing", hooks, (lambda control: fail(bad)) if at == "run" else lambda control: None,
        prepare=(lambda: fail(bad)) if at == "prepare" else lambda: None,
    )  # fmt: skip
    if at == "cancel":
        failing = Scripted("failing", hooks, forever)
    waits = forever if at.startswith("cancel") else lambda control: None
    others = [Scripted("one", hooks, waits), Scripted("two", hooks)]
    start_all([others[0], failing, others[1]], grouped=True)
    if at == "cancel":
        failing.cancel()
    elif at == "cancel while waiting":
        until(lambda: failing.state is State.WAITING)
        failing.cancel()
    ended(failing, *others)
    assert not any(hook.endswith("commit") for hook in hooks)
    assert sorted(hook for hook in hooks if hook.endswith("abort")) == ["failing abort", "one abort", "two abort"]
    assert failing.error is bad or (at.startswith("cancel") and isinstance(failing.error, Cancelled))
    for other in others:
        assert isinstance(other.error, Cancelled)


def test_individual_completion_goes_on_without_those_that_failed() -> None:
    hooks: list[str] = []
    bad, good = Scripted("bad", hooks, lambda control: fail(IOFailure("no"))), Scripted("good", hooks)
    start_all([bad, good])
    ended(bad, good)
    assert good.error is None
    assert "good commit" in hooks


def test_finalizing_one_finalizes_all() -> None:
    hooks: list[str] = []
    one, two = Scripted("one", hooks, auto_finalize=False), Scripted("two", hooks)
    start_all([one, two], grouped=True)
    until(lambda: one.state is State.PENDING and two.state is State.PENDING)
    assert hooks == []
    two.finalize()
    ended(one, two)
    assert {"one commit", "two commit"} < {*hooks}


def test_a_job_is_in_one_transaction() -> None:
    job = Scripted("job", [])
    Transaction([job, Scripted("other", [])])
    with pytest.raises(InvalidArgument, match="another transaction"):
        Transaction([job])


def test_cancelled_before_the_start() -> None:
    hooks: list[str] = []
    one, two = Scripted("one", hooks), Scripted("two", hooks)
    Transaction([one, two])
    one.cancel()
    assert one.state is two.state is State.CONCLUDED
    assert sorted(hooks) == ["one abort", "one clean", "two abort", "two clean"]


# -- the registry ---------------------------------------------------------------------------------


def test_ids() -> None:
    graph = Graph()
    jobs = JobRegistry(graph)
    job = Scripted("job0", [])
    jobs.add(job)
    with pytest.raises(AlreadyExists, match="'job0' already in use"):
        jobs.add(Scripted("job0", []))
    assert JobRegistry(graph).find("job0") is job
    assert jobs.all() == [job]
    with pytest.raises(NotFound, match="'job1' not found"):
        jobs.find("job1")
    job.start()
    ended(job)
    assert jobs.find("job0") is job
    job.dismiss()
    assert jobs.all() == []
    jobs.add(Scripted("job0", []))


# -- error policies -------------------------------------------------------------------------------


def test_decisions() -> None:
    full, bad = NoSpace("full"), IOFailure("bad")
    assert [decide(bad, policy) for policy in POLICIES] == [REPORT, IGNORE, STOP, REPORT, REPORT]
    assert [decide(full, policy) for policy in POLICIES] == [REPORT, IGNORE, STOP, STOP, STOP]
    with pytest.raises(InvalidArgument, match="unknown error policy 'halt'"):
        decide(bad, "halt")


def test_without_a_job_nobody_could_resume() -> None:
    bad = IOFailure("bad")
    with pytest.raises(IOFailure):
        Control().on_error(bad, "stop", source=True)
    assert Control().on_error(bad, "ignore", source=True) == IGNORE


def test_several_threads_stop_at_once() -> None:
    """One pause, one resume; each thread tries again."""
    answers: list[str] = []

    def run(control: Control) -> None:
        def work(number: int) -> None:
            answers.append(control.on_error(NoSpace("full") if number else IOFailure("bad"), "stop", source=False))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    states: list[str] = []
    events: list[tuple[str, str]] = []
    for _ in range(20):
        job = Scripted("job", [], run)
        job.on_change = lambda job, state: states.append(state.value)
        job.on_error_event = lambda job, operation, action, error: events.append((operation, action))
        job.start()
        until(lambda job=job: job.state is State.PAUSED and len(events) == 4)  # type: ignore[misc]
        assert job.io_status in ("nospace", "failed")
        while not job.join(0.01):
            if job.state is State.PAUSED:
                job.resume()
        assert job.io_status == "ok"
        assert answers == [RETRY] * 4
        assert states[:2] == ["running", "paused"]
        assert events == [("write", "stop")] * 4
        for seen in (states, events, answers):
            seen.clear()


def test_a_stopped_job_can_be_cancelled() -> None:
    def stopped(control: Control) -> None:
        control.on_error(IOFailure("bad"), "stop", source=True)

    job = Scripted("job", [], stopped)
    job.start()
    until(lambda: job.state is State.PAUSED)
    assert job.io_status == "failed"
    job.cancel()
    ended(job)
    assert isinstance(job.error, Cancelled)


def test_a_last_hook_that_fails_does_not_keep_the_job_from_ending() -> None:
    hooks: list[str] = []
    job = Scripted("job", hooks)
    job.commit = lambda: fail(IOFailure("at the end"))  # type: ignore[method-assign]
    job.start()
    ended(job)
    assert hooks == ["job prepare", "job clean"]
    assert str(job.error) == "at the end"
