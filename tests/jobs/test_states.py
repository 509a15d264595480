"""The tables of states and verbs are complete and agree with each other."""

from __future__ import annotations

import pytest

from byre.errors import Busy, InvalidArgument
from byre.jobs.states import FINISHED, TRANSITIONS, VERBS, State, check_transition, check_verb


def test_every_state_has_a_row_and_is_reachable() -> None:
    assert set(TRANSITIONS) == set(State)
    reached = {State.CREATED}
    while True:
        more = reached.union(*(TRANSITIONS[state] for state in reached))
        if more == reached:
            break
        reached = more
    assert reached == set(State)


def test_every_state_can_end() -> None:
    for state in State:
        seen, todo = set(), [state]
        while todo:
            here = todo.pop()
            if here not in seen:
                seen.add(here)
                todo += TRANSITIONS[here]
        assert State.NULL in seen


def test_a_finished_job_accepts_only_dismissal() -> None:
    for verb, states in VERBS.items():
        assert not states & FINISHED or verb == "dismiss"


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("verb", sorted(VERBS))
def test_verbs_are_refused_by_name(verb: str, state: State) -> None:
    if state in VERBS[verb]:
        check_verb("job0", verb, state)
        return
    with pytest.raises(Busy, match=f"job 'job0' in state '{state.value}' cannot accept verb '{verb}'"):
        check_verb("job0", verb, state)


def test_illegal_transitions_are_refused() -> None:
    check_transition("j", State.CREATED, State.RUNNING)
    with pytest.raises(InvalidArgument, match="cannot go from state 'created' to 'ready'"):
        check_transition("j", State.CREATED, State.READY)
