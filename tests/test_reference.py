"""The step of grpo/reference.py, which the other tests take for the truth."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import tiny
import torch

from grpo.loss import BOUND, grpo_loss
from grpo.reference import completion_logprobs, grpo_step, step_loss


@pytest.fixture(scope="module")
def parts():
    return tiny.build(beta=0.1, max_grad_norm=0.5)


@pytest.fixture(scope="module")
def sampled(parts):
    return tiny.episodes(parts)


def test_log_probs_are_those_of_each_row_alone(parts, sampled):
    prompts, completions = [e.prompt_ids for e in sampled], [e.completion_ids for e in sampled]
    together = completion_logprobs(parts.model, prompts, completions, 0.8)
    for prompt, completion, logprobs in zip(prompts, completions, together, strict=True):
        logits = parts.model.logits(parts.model(torch.tensor([prompt + completion])))[0] / 0.8
        for place, (token, logprob) in enumerate(zip(completion, logprobs.tolist(), strict=True)):
            expected = torch.distributions.Categorical(logits=logits[len(prompt) + place - 1])
            assert logprob == pytest.approx(expected.log_prob(torch.tensor(token)).item(), abs=1e-4)


def test_the_loss_of_two_tokens_by_hand():
    """One token each: ratio 2 with A = 1 is clipped to 1.2; ratio 1 with A = -1 is not, and has KL 1/e."""
    columns = [[math.log(2), -1.0], [0.0, -1.0], [math.log(2), -2.0]]
    new, old, ref = ([torch.tensor([x], dtype=torch.float64) for x in column] for column in columns)
    loss = step_loss(new, old, ref, [[True], [True]], torch.tensor([1.0, -1.0]), beta=0.5)
    assert loss.item() == pytest.approx((-1.2 + 1 + 0.5 / math.e) / 2)


def test_extreme_log_probs_give_the_losses_of_loss_py():
    """The same bounds as in grpo/loss.py: finite gradients at any distance between the three policies."""
    rows = list(itertools.product([0.0, -1.0, -101.0, -1e4], repeat=3))
    for dtype, advantage in itertools.product((torch.float32, torch.float64), (0.0, 1.0, -1.0)):
        new, old, ref = torch.tensor(rows, dtype=dtype).T.contiguous()
        new.requires_grad_()
        A = torch.tensor([advantage], dtype=dtype)
        loss = step_loss([new], [old], [ref], [[True] * len(rows)], A, beta=0.1)
        expected, _ = grpo_loss(new, old, ref, A, torch.zeros(len(rows), dtype=torch.int64), beta=0.1)
        (gradient,), (right,) = (torch.autograd.grad(value, new) for value in (loss, expected))
        assert loss.isfinite() and gradient.isfinite().all()
        torch.testing.assert_close(loss, expected)
        # In the gradient of r k, two terms of r exp(x) cancel; what is left has their rounding, by processor.
        x, log_ratio = (ref - new).detach().clamp(max=BOUND), (new - old).detach().clamp(-BOUND, BOUND)
        cancelling = 0.1 * (log_ratio + x).exp() / len(rows)
        relative, least = (1.3e-6, 1e-5) if dtype == torch.float32 else (1e-7, 1e-7)
        allowed = relative * right.abs() + least + 4 * torch.finfo(dtype).eps * cancelling
        assert ((gradient - right).abs() <= allowed).all()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_step_is_the_learners(parts, sampled, weight):
    """Weights after one update, with KL penalty and clipping, are those of the learner and its fast paths."""
    targets = tiny.targets(parts, sampled)
    pairs = [(prompt, retry) for prompt, retries in targets for retry, _ in retries]
    assert len(pairs) > 1
    ours, reference = copy.deepcopy(parts.model), tiny.other_model(parts)
    tiny_parts = copy.copy(parts)
    tiny_parts.model, tiny_parts.config = ours, replace(parts.config, distill_retries=weight)
    learner = tiny.learner(tiny_parts, reference=reference)
    metrics = learner.step(copy.deepcopy(sampled), targets if weight else ())
    assert metrics["grad_norm"] > parts.config.max_grad_norm

    plain = copy.deepcopy(parts.model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=metrics["learning_rate"], weight_decay=0.0)
    loss = grpo_step(
        plain,
        reference,
        optimizer,
        [e.prompt_ids for e in sampled],
        [e.completion_ids for e in sampled],
        [e.loss_mask("reflection") for e in sampled],
        torch.tensor([e.reward for e in sampled]),
        torch.tensor([e.group_id for e in sampled]),
        temperature=parts.config.temperature,
        beta=parts.config.beta,
        max_grad_norm=parts.config.max_grad_norm,
        targets=pairs,
        distill_retries=weight,
    )
    assert loss == pytest.approx(metrics["loss"], abs=1e-5)
    moved = [(p - q).abs().max() for p, q in zip(ours.parameters(), parts.model.parameters(), strict=True)]
    assert max(moved) > 1e-3
    # AdamW's first step is the gradient's sign: where a gradient is almost 0, rounding decides it.
    for new, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        agrees = (new - expected).abs() < 1e-4
        assert agrees.float().mean() > 0.999
