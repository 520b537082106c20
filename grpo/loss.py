"""The GRPO loss: clipped surrogate plus KL penalty, over the selected tokens of a micro-batch.

For a token of a completion with advantage A, log-prob l under the policy, o under the policy that sampled
it and f under the reference:

    ratio        r = exp(l - o)                                   importance_sampling_level "token"
                 r = exp(mean of l - o over the completion)       "sequence" (GSPO, arXiv 2507.18071)
    surrogate    -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
                 -stopgrad(min(r, epsilon_high)) A l              loss_type "cispo" (arXiv 2506.13585)
    KL           k = exp(x) - x - 1 with x = f - l  (k3), times r with use_bias_correction_kl
    token loss   surrogate + beta k

On-policy, r k has the expected gradient of KL(policy || reference); k alone has that of
KL(reference || policy). `loss_type` says how token losses are added up:

    grpo           mean over completions of the mean over their tokens           arXiv 2402.03300
    dapo, cispo    sum / tokens of the optimiser step                            arXiv 2503.14476
    bnpo           the same as dapo here
    dr_grpo        sum / (completions * max_completion_length)                   arXiv 2503.20783

The denominators are counted over the whole optimiser step. So the losses of its micro-batches have the same
sum however the step is split, as long as a completion's tokens stay together. `distill_loss`, the supervised
term, is added up in the same way, over its own tokens. Left out: entropy bonus, value loss.

Numbers are clamped before exp, so that the loss, its gradient and the metrics are finite for all log-probs
from -inf to 0:

    l, o, f    to at least LOWEST; a token of probability 0 has log-prob -inf
    l - o      to [-BOUND, BOUND]; at sequence level the mean
    x          to at most BOUND

Beyond a bound the value stays constant, but the gradient is the one at the bound (`bounded`). The gradient of
k is then 1 - exp(x), and that of r k is -x r, with clamped x and r. Both have the sign of -x: they pull the
policy back to the reference from any distance. An ordinary clamp, with gradient 0, would let a distant policy
go. It would even push it away: where k has no gradient, that of r k is r k > 0. The lower bound of l - o
keeps r k at about 1 where r alone would underflow.

M tokens, B completions of the optimiser step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# nats: a token is 3e6 times as likely under one model as under the other. The gradient -x r of r k is
# computed as r k - r (exp(x) - 1). In float32, exp(15) is exact to 1/4, so the sign of this difference is
# right; exp(20) is exact only to 32. Products and squares of such exponentials are far from overflow.
BOUND = 15.0
LOWEST = -1e4  # nats: its exp is 0 in every dtype, and unlike -inf it can be multiplied by 0
LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo")
LEVELS = ("token", "sequence")


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    *,
    mask: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.001,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = True,
    num_loss_tokens: int | None = None,
    num_sequences: int | None = None,
    max_completion_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch, and its metrics.

    Args:
        logprobs, old_logprobs, ref_logprobs: (M,) float32, nats. `old_logprobs` None: logprobs.detach();
            `ref_logprobs` None: no reference.
        advantages: (B,) float32.
        sequence_ids: (M,) int64, the index into `advantages` of each token's completion.
        mask: (M,) bool; tokens where it is False are ignored, even if their entries are NaN.
        epsilon, epsilon_high: the clip range; `epsilon_high` None: epsilon. With cispo, `epsilon_high` is the
            bound itself.
        delta: upper bound of the unclipped ratio, which limits the loss when A < 0; None: no bound.
        num_loss_tokens, num_sequences: of the whole step, over all ranks. None: `mask.sum()` and B.
        max_completion_length: tokens, for dr_grpo.
    Returns:
        () loss, and detached metrics, each a sum over tokens / num_loss_tokens: `kl` (given a reference),
        `ratio/mean`, `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean`.
    Raises:
        ValueError: arguments that do not fit together; the message names them.
    """
    check_tensors(logprobs, old_logprobs, ref_logprobs, sequence_ids, mask)
    check_options(
        loss_type, importance_sampling_level, epsilon, delta, max_completion_length, beta, ref_logprobs
    )
    high = epsilon if epsilon_high is None else epsilon_high
    old, ref = (logprobs if other is None else other for other in (old_logprobs, ref_logprobs))
    if mask is not None:  # selected, not multiplied by 0: so a masked NaN reaches no loss or gradient
        logprobs, old, ref, sequence_ids = (x[mask] for x in (logprobs, old, ref, sequence_ids))
    logprobs, old, ref = (bounded(x, low=LOWEST) for x in (logprobs, old, ref))
    A = advantages[sequence_ids]  # (M,)
    length = sequence_ids.bincount(minlength=len(advantages))[sequence_ids]  # (M,)

    log_ratio = logprobs - old.detach()
    if importance_sampling_level == "sequence":
        sums = log_ratio.new_zeros(len(advantages)).index_add(0, sequence_ids, log_ratio)
        log_ratio = sums[sequence_ids] / length
    ratio = bounded(log_ratio, -BOUND, BOUND).exp()

    if loss_type == "cispo":
        token_loss = -ratio.detach().clamp(max=high) * A * logprobs
        low_clipped, high_clipped = ratio < 0, ratio > high  # there is no lower bound
    else:
        free = ratio if delta is None else ratio.clamp(max=delta)
        token_loss = -torch.minimum(free * A, ratio.clamp(1 - epsilon, 1 + high) * A)
        low_clipped, high_clipped = (ratio < 1 - epsilon) & (A < 0), (ratio > 1 + high) & (A > 0)
    kl = _k3(bounded(ref.detach() - logprobs, high=BOUND)) * (ratio if use_bias_correction_kl else 1)
    if beta != 0:
        token_loss = token_loss + beta * kl

    num_loss_tokens = max(1, len(logprobs) if num_loss_tokens is None else num_loss_tokens)
    num_sequences = max(1, len(advantages) if num_sequences is None else num_sequences)
    loss = _added_up(token_loss, length, loss_type, num_loss_tokens, num_sequences, max_completion_length)
    per_token = {
        "ratio/mean": ratio,
        "clip_ratio/low_mean": low_clipped,
        "clip_ratio/high_mean": high_clipped,
        "clip_ratio/region_mean": low_clipped | high_clipped,
    }
    if ref_logprobs is not None:
        per_token["kl"] = kl
    return loss, {name: values.detach().sum() / num_loss_tokens for name, values in per_token.items()}


def distill_loss(
    logprobs: Tensor,
    sequence_ids: Tensor,
    *,
    loss_type: str,
    num_loss_tokens: int,
    num_sequences: int,
    max_completion_length: int,
) -> Tensor:
    """() cross-entropy of a micro-batch of distilled retries, in nats, added up as `loss_type` says.

    Args:
        logprobs: (M,) float32, nats.
        sequence_ids: (M,) int64, the retry of each token. A retry's tokens are all here.
        num_loss_tokens, num_sequences: of the distilled retries of the whole step, over all ranks.
        max_completion_length: the most tokens of a retry, for dr_grpo.
    """
    token_loss = -bounded(logprobs, low=LOWEST)
    length = sequence_ids.bincount()[sequence_ids]  # (M,)
    return _added_up(token_loss, length, loss_type, num_loss_tokens, num_sequences, max_completion_length)


def _added_up(
    token_loss: Tensor, length: Tensor, loss_type: str, tokens: int, sequences: int, limit: int | None
) -> Tensor:
    """() sum over the tokens of a micro-batch; `length` (M,) has the number of tokens of each one's sequence.

    The other arguments are the denominators of the step: its tokens, its sequences, and their longest length.
    """
    if loss_type == "grpo":
        return (token_loss / length).sum() / sequences
    if loss_type == "dr_grpo":
        return token_loss.sum() / (sequences * (limit or 1))
    return token_loss.sum() / tokens


def bounded(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """`x.clamp(low, high)`, NaN included, but its gradient is 1 everywhere, also beyond the bounds."""
    return _Bounded.apply(x, low, high)


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _k3(x: Tensor) -> Tensor:
    """exp(x) - x - 1. Near 0, where cancellation would leave only rounding error, by its series."""
    series = x.square() * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120)))
    return torch.where(x.abs() < 0.03, series, x.expm1() - x)


def check_tensors(
    logprobs: Tensor, old: Tensor | None, ref: Tensor | None, sequence_ids: Tensor, mask: Tensor | None
) -> None:
    if logprobs.ndim != 1:
        raise ValueError(f"logprobs must be (M,), got {tuple(logprobs.shape)}")
    others = {"old_logprobs": old, "ref_logprobs": ref, "sequence_ids": sequence_ids, "mask": mask}
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} must be {tuple(logprobs.shape)}, as logprobs, got {tuple(tensor.shape)}"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")


def check_options(
    loss_type: str,
    level: str,
    epsilon: float,
    delta: float | None,
    max_length: int | None,
    beta: float,
    ref: Tensor | None,
) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level must be one of {', '.join(LEVELS)}, got {level!r}")
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon must be in [0, 1), got {epsilon}")
    if delta is not None and loss_type == "cispo":
        raise ValueError(f"delta must be None with loss_type cispo, whose bound is epsilon_high, got {delta}")
    if delta is not None and not delta > 0:
        raise ValueError(f"delta must be positive or None, got {delta}")
    if loss_type == "dr_grpo" and (max_length is None or max_length < 1):
        raise ValueError(f"max_completion_length must be at least 1 with loss_type dr_grpo, got {max_length}")
    if beta != 0 and ref is None:
        raise ValueError(f"ref_logprobs must be given when beta is not 0, got None with beta {beta}")
