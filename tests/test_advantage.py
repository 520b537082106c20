"""Group advantages against Python's own arithmetic, in any order and with any group ids."""

import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantage import group_advantage


def expected(rewards, group_ids, scale, ddof, eps):
    groups = {}
    for reward, group in zip(rewards, group_ids, strict=True):
        groups.setdefault(group, []).append(reward)

    def std(values):
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - ddof))

    advantages = []
    for reward, group in zip(rewards, group_ids, strict=True):
        members = groups[group]
        centred = 0.0 if len(set(members)) == 1 else reward - statistics.fmean(members)
        scales = {"none": 1.0, "group": std(members) + eps, "batch": std(rewards) + eps}
        advantages.append(centred / scales[scale] if centred else 0.0)
    return advantages


# Few distinct rewards, so that ties and constant groups come up; group ids negative and large.
episodes = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, -2.0]), st.sampled_from([-7, 0, 3, 2**40])),
    min_size=1,
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(episodes, st.sampled_from(["group", "batch", "none"]), st.sampled_from([0, 1]))
def test_equals_plain_python(episodes, scale, ddof):
    rewards, group_ids = map(list, zip(*episodes, strict=True))
    out = group_advantage(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(group_ids), scale=scale, ddof=ddof, eps=1e-4
    )
    torch.testing.assert_close(
        out, torch.tensor(expected(rewards, group_ids, scale, ddof, 1e-4), dtype=torch.float64)
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_alternating_rewards_are_centred_in_any_order(scale):
    rewards, group_ids = [1.0, 0.0] * 6, [5, 5, 5, 5, -1, -1, -1, -1, 9, 9, 9, 9]
    for seed in range(5):
        order = random.Random(seed).sample(range(12), 12)
        r = torch.tensor([rewards[i] for i in order])
        g = torch.tensor([group_ids[i] for i in order])
        out = group_advantage(r, g, scale=scale)
        assert out.dtype == torch.float32
        assert torch.equal(out > 0, r == 1)
        assert torch.equal(out.abs(), out.abs()[0].expand(12))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.5, 0.1, 1 / 3, 1e6 / 3])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(scale, value):
    # Seven times a float32 third: their mean is not exactly the value.
    rewards = torch.tensor([value] * 7 + [0.3, 1.0, 0.0])
    out = group_advantage(rewards, torch.tensor([1] * 7 + [2, 3, 3]), scale=scale, eps=0.0)
    assert torch.equal(out[:8], torch.zeros(8))
    assert (out[8:] != 0).all() and out.isfinite().all()


def test_inputs_are_not_changed_and_empty_is_fine():
    rewards, group_ids = torch.tensor([1.0, 0.0]), torch.tensor([4, 4])
    group_advantage(rewards, group_ids)
    assert rewards.tolist() == [1.0, 0.0] and group_ids.tolist() == [4, 4]
    assert group_advantage(rewards[:0], group_ids[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, "rewards and group_ids"),
        ({"scale": "std"}, "scale must be group, batch or none, got 'std'"),
        ({"ddof": 2}, "ddof must be 0 or 1, got 2"),
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
    ],
)
def test_errors_name_the_argument(changes, message):
    arguments = {"rewards": torch.zeros(2), "group_ids": torch.zeros(2, dtype=torch.int64)} | changes
    with pytest.raises(ValueError, match=message):
        group_advantage(arguments.pop("rewards"), arguments.pop("group_ids"), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_whose_squares_underflow_are_none(dtype):
    """Without eps the deviation is 0 there, and dividing by it would give infinite advantages."""
    rewards = torch.tensor([0.0, torch.finfo(dtype).tiny], dtype=dtype)
    assert group_advantage(rewards, torch.zeros(2, dtype=torch.int64), eps=0.0).tolist() == [0.0, 0.0]
