"""What of an episode is stored, and that it is read back from this form and from that of older versions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.episode import Episode, role_runs

TURNS = st.lists(
    st.tuples(st.sampled_from(["reflection", "context", "retry"]), st.integers(1, 9)), min_size=1
)
LOGPROBS = st.floats(-1e4, 0.0, width=32)


def episode(roles: list[str], logprobs: list[float]) -> Episode:
    return Episode(
        example_id="train-0",
        group_id=1,
        generation=2,
        prompt_ids=[5, 6],
        completion_ids=list(range(len(roles))),
        roles=roles,
        logprobs=logprobs,
        finish_reason="stop",
        reward=0.5,
        advantage=0.1 + 0.2,
        reasons=["wrong"],
        texts={"reflection": "ä"},
    )


@given(TURNS, st.data())
def test_a_stored_episode_is_read_back_but_for_the_digits_of_its_logprobs(turns, data):
    roles = [role for role, tokens in turns for _ in range(tokens)]
    logprobs = data.draw(st.lists(LOGPROBS, min_size=len(roles), max_size=len(roles)))
    kept = episode(roles, logprobs)
    stored = json.loads(json.dumps({"step": 3, **kept.to_json()}))
    back = Episode.from_json(stored)
    assert vars(back) == {**vars(kept), "logprobs": back.logprobs}
    assert back.logprobs == pytest.approx(logprobs, rel=5e-6, abs=1e-300)
    # One entry per change of role; the plain form of older versions gives the same episode.
    assert len(stored["roles"]) == 1 + sum(a != b for a, b in zip(roles, roles[1:], strict=False))
    assert Episode.from_json({**stored, "roles": roles}).roles == roles
    assert kept.roles == roles and kept.logprobs == logprobs  # what the learner sees is untouched


def test_logprobs_have_six_significant_digits_whatever_their_size():
    written = episode(["retry"] * 4, [-12.3456789, -0.000123456789, -9876.54321, 0.0]).to_json()["logprobs"]
    assert json.dumps(written) == "[-12.3457, -0.000123457, -9876.54, 0.0]"


@pytest.mark.parametrize(
    "entry", [5, None, [], ["retry"], ["retry", 0], ["retry", -1], ["retry", 1.5], [3, 3]]
)
def test_roles_that_are_neither_form_are_named(entry):
    with pytest.raises(ValueError, match=r"roles must be strings or \[role, tokens\] pairs, got"):
        role_runs([["reflection", 2], entry])
