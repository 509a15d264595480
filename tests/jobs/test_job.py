"""A job's life as its owner sees it: states, verbs, speed, progress."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

import pytest

from byre.errors import Busy, ByreError, Cancelled, InvalidArgument
from byre.jobs.job import Control, Job
from byre.jobs.states import State


class Scripted(Job):
    """Runs what the test gives it and notes the hooks that were called."""

    kind = "scripted"

    def __init__(self, script: Callable[[Control], None], **options: bool) -> None:
        super().__init__(**options)
        self.script = script
        self.hooks: list[str] = []
        self.states: list[str] = []
        self.on_change = lambda _job, state: self.states.append(state.value)

    def run(self, control: Control) -> None:
        self.script(control)

    def prepare(self) -> None:
        self.hooks.append("prepare")

    def commit(self) -> None:
        self.hooks.append("commit")

    def abort(self) -> None:
        self.hooks.append("abort")

    def clean(self) -> None:
        self.hooks.append("clean")


def wait_for(job: Job, state: State) -> None:
    deadline = monotonic() + 10
    while job.state is not state:
        assert monotonic() < deadline, f"still {job.state}"
        threading.Event().wait(0.002)


def turn_until_cancelled(control: Control) -> None:
    while True:
        control.advance(1)
        control.wait(0.001)


def test_success_inline() -> None:
    job = Scripted(lambda control: control.advance(10))
    job.execute()
    assert job.hooks == ["prepare", "commit", "clean"]
    assert job.states == ["running", "waiting", "pending", "concluded", "null"]
    assert job.progress().offset == 10


def test_failure_runs_abort_and_reaches_the_caller() -> None:
    def fail(_control: Control) -> None:
        raise ByreError("no luck")

    job = Scripted(fail, auto_dismiss=False)
    with pytest.raises(ByreError, match="no luck"):
        job.execute()
    assert job.hooks == ["abort", "clean"]
    assert job.states == ["running", "aborting", "concluded"]
    job.dismiss()
    assert job.state is State.NULL


def test_pause_and_resume() -> None:
    job = Scripted(turn_until_cancelled)
    job.start()
    wait_for(job, State.RUNNING)
    job.pause()
    wait_for(job, State.PAUSED)
    before = job.progress().offset
    threading.Event().wait(0.02)
    assert job.progress().offset == before
    with pytest.raises(InvalidArgument, match="paused already"):
        job.pause()
    job.resume()
    wait_for(job, State.RUNNING)
    with pytest.raises(InvalidArgument, match="not paused"):
        job.resume()
    job.cancel()
    assert job.join(10)
    assert isinstance(job.error, Cancelled)
    assert "abort" in job.hooks


def test_a_paused_job_can_be_cancelled() -> None:
    job = Scripted(turn_until_cancelled)
    job.start()
    job.pause()
    wait_for(job, State.PAUSED)
    job.cancel()
    assert job.join(10)
    assert isinstance(job.error, Cancelled)


def test_cancel_before_start() -> None:
    job = Scripted(turn_until_cancelled)
    job.cancel()
    assert isinstance(job.error, Cancelled)
    with pytest.raises(InvalidArgument, match="started already"):
        job.start()


def until_complete(control: Control) -> None:
    control.ready()
    while not control.completing:
        control.wait(10)


def test_ready_then_complete() -> None:
    job = Scripted(until_complete)
    with pytest.raises(Busy, match="cannot accept verb 'complete'"):
        job.complete()
    job.start()
    wait_for(job, State.READY)
    job.pause()
    wait_for(job, State.STANDBY)
    job.resume()
    wait_for(job, State.READY)
    job.complete()
    assert job.join(10)
    assert job.error is None
    assert not job.soft_cancelled


def test_soft_cancel_of_a_ready_job_is_no_failure() -> None:
    job = Scripted(until_complete)
    job.start()
    wait_for(job, State.READY)
    job.cancel()
    assert job.join(10)
    assert job.error is None
    assert job.soft_cancelled
    assert "commit" in job.hooks


def test_forced_cancel_of_a_ready_job_fails_it() -> None:
    job = Scripted(until_complete)
    job.start()
    wait_for(job, State.READY)
    job.cancel(force=True)
    assert job.join(10)
    assert isinstance(job.error, Cancelled)


def test_manual_finalize() -> None:
    job = Scripted(lambda _control: None, auto_finalize=False, auto_dismiss=False)
    job.start()
    wait_for(job, State.PENDING)
    assert job.hooks == []
    job.finalize()
    assert job.join(10)
    assert job.state is State.CONCLUDED
    assert job.hooks == ["prepare", "commit", "clean"]


def test_cancel_while_pending() -> None:
    job = Scripted(lambda _control: None, auto_finalize=False)
    job.start()
    wait_for(job, State.PENDING)
    job.cancel()
    assert job.join(10)
    assert job.hooks == ["abort", "clean"]


def test_speed_limits_and_can_be_lifted() -> None:
    control = Control(speed=1 << 20)
    started = monotonic()
    for _ in range(4):
        control.advance(100 << 10)
    assert 0.2 < monotonic() - started < 5
    control.set_speed(0)
    started = monotonic()
    control.advance(1 << 40)
    assert monotonic() - started < 1
    with pytest.raises(InvalidArgument, match="speed is -1"):
        control.set_speed(-1)


def test_speed_counts_what_was_moved() -> None:
    control = Control(speed=1 << 20)
    started = monotonic()
    control.advance(1 << 40, moved=0)
    assert monotonic() - started < 1


def test_a_waiting_limited_job_is_cancelled_at_once() -> None:
    job = Scripted(lambda control: control.advance(1 << 30))
    job.set_speed(1)
    job.start()
    wait_for(job, State.RUNNING)
    job.cancel()
    assert job.join(5)
    assert isinstance(job.error, Cancelled)


def test_a_waiting_limited_job_is_paused_at_once_and_keeps_to_its_speed() -> None:
    moved: list[float] = []

    def script(control: Control) -> None:
        for _ in range(2):
            control.advance(1 << 20)
            moved.append(monotonic())

    job = Scripted(script)
    job.set_speed(1 << 20)
    started = monotonic()
    job.start()
    wait_for(job, State.RUNNING)
    job.pause()
    wait_for(job, State.PAUSED)
    assert monotonic() - started < 0.7
    job.resume()
    assert job.join(10)
    assert moved[-1] - started > 1.7


def test_a_speed_below_zero_is_refused_from_the_start() -> None:
    with pytest.raises(InvalidArgument, match="speed is -1"):
        Job(speed=-1)


def test_progress_has_rate_and_time_left() -> None:
    control = Control(1000)
    control.advance(100)
    threading.Event().wait(0.15)
    control.advance(100)
    threading.Event().wait(0.01)
    found = control.progress()
    assert found.offset == 200
    assert found.percent == 20.0
    assert 0 < found.rate < 1000
    assert found.eta is not None
    assert found.eta > 0
    assert Control().progress().eta is None
