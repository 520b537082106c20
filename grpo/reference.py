"""One GRPO step in plain PyTorch: read this first. The tests compare the real learner with it, in float64.

For a completion i of a group, with reward r_i and tokens t (GRPO, arXiv 2402.03300, equations 3 and 4):

    advantage  A_i = (r_i - mean of the group) / (std of the group + 1e-4)
    ratio      rho = exp(log-prob under the policy - log-prob under the policy that sampled)
    KL         k   = exp(x) - x - 1  with x = log-prob under the reference - log-prob under the policy
    loss           = sum over all trained tokens of  -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta rho k
                     divided by the number of trained tokens of the whole step (DAPO, arXiv 2503.14476)

`masks` say which tokens are trained. In "Reflect, Retry, Reward" (arXiv 2505.24726) these are the tokens of
the reflection, and the reward is 1 if the retry after it is right. With `distill_retries` above 0, the loss
also has the cross-entropy of right retries as first answers, to the task's prompt alone (arXiv 2602.13949).

Left out, but implemented in grpo/learner/: shared prefixes computed once, log-probs without (T, V) logits,
micro-batches, bfloat16 weights with float32 masters. The other losses are in grpo/loss.py, and so is the
reason why numbers are bounded before exp.

B completions, T tokens of the longest row, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.advantage import group_advantage
from grpo.logprob import plain_logprob
from grpo.loss import BOUND, bounded
from grpo.model.decoder import Decoder


def completion_logprobs(
    model: Decoder, prompts: list[list[int]], completions: list[list[int]], temperature: float
) -> list[Tensor]:
    """Log-probs of each completion's tokens, in nats, from one row per completion padded on the right."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # (B, T)
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    hidden = model(ids, attention_mask=real)  # (B, T, H)
    logprobs = []
    for row, prompt, completion in zip(hidden, prompts, completions, strict=True):
        predicting = row[len(prompt) - 1 : len(prompt) + len(completion) - 1]  # token t is predicted at t - 1
        logprobs.append(plain_logprob(predicting, model.output_weight, torch.tensor(completion), temperature))
    return logprobs


def step_loss(
    logprobs: list[Tensor],
    old_logprobs: list[Tensor],
    ref_logprobs: list[Tensor],
    masks: list[list[bool]],
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    beta: float = 0.001,
) -> Tensor:
    """() loss over all completions. Lists have one entry per completion, entries one value per token."""
    total, count = torch.zeros((), dtype=logprobs[0].dtype), 0
    for new, old, ref, trained, A in zip(
        logprobs, old_logprobs, ref_logprobs, masks, advantages, strict=True
    ):
        mask = torch.tensor(trained)
        ratio = bounded((new - old)[mask], -BOUND, BOUND).exp()
        surrogate = torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
        x = bounded((ref - new)[mask], high=BOUND)
        total = total + (-surrogate + beta * ratio * (x.exp() - x - 1)).sum()
        count += int(mask.sum())
    return total / max(1, count)


def distill_loss(model: Decoder, targets: list[tuple[list[int], list[int]]], temperature: float) -> Tensor:
    """() mean cross-entropy of the tokens of all targets: distinct (task prompt, right retry) pairs."""
    prompts, retries = zip(*targets, strict=True)
    return -torch.cat(completion_logprobs(model, list(prompts), list(retries), temperature)).mean()


def grpo_step(
    model: Decoder,
    reference: Decoder,
    optimizer: torch.optim.Optimizer,
    prompts: list[list[int]],
    completions: list[list[int]],
    masks: list[list[bool]],
    rewards: Tensor,
    group_ids: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.001,
    max_grad_norm: float = 1.0,
    targets: list[tuple[list[int], list[int]]] | None = None,
    distill_retries: float = 0.0,
) -> float:
    """One update of `model` on whole groups; returns the loss. `rewards` and `group_ids` are (B,).

    `targets` are (task prompt, right retry) pairs, which `distill_retries` weighs.
    """
    advantages = group_advantage(rewards, group_ids)
    with torch.no_grad():
        ref_logprobs = completion_logprobs(reference, prompts, completions, temperature)
    logprobs = completion_logprobs(model, prompts, completions, temperature)
    old_logprobs = [values.detach() for values in logprobs]  # the policy has not moved since it sampled
    loss = step_loss(logprobs, old_logprobs, ref_logprobs, masks, advantages, beta=beta)
    if targets:
        loss = loss + distill_retries * distill_loss(model, targets, temperature)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return loss.item()
