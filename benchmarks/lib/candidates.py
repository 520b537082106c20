"""The implementations that benchmarks/kernels.py compares, ours and others', behind one signature.

A candidate takes a Problem and returns the result of its operation, with a graph for the backward pass:

    logprob   (M,) log-probs of the tokens `ids` under softmax(hidden @ weight.T)
    grpo      () the GRPO loss of these tokens, on-policy, from rewards in groups; no KL

`build` imports what a candidate needs, and reports a package that is not installed. The temperature is 1,
because some candidates have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpo_kernels
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from grpo import logprob as reference
from grpo.advantage import group_advantage
from grpo.loss import grpo_loss

CHUNK = 1024  # rows of the chunked PyTorch version, as in many trainers
GROUP = 8  # completions per group
TOKENS = 128  # per completion, where M is a multiple of it


@dataclass(frozen=True)
class Problem:
    """The inputs of both operations.

    hidden (M, H), weight (V, H), ids (M,); upstream (M,): the gradient with respect to the log-probs;
    rewards and group_ids (B,), sequence_ids (M,): completions with equal numbers of tokens.
    """

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    upstream: Tensor
    rewards: Tensor
    group_ids: Tensor
    sequence_ids: Tensor

    @staticmethod
    def make(m: int, h: int, v: int, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
        """Logits have a standard deviation of 2: an entropy of some nats, like a language model's."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        hidden = normal(m, h).to(dtype).requires_grad_()
        weight = (normal(v, h) * (2 * h**-0.5)).to(dtype).requires_grad_()
        ids = torch.randint(v, (m,), generator=generator, device=device)
        tokens = TOKENS if m % TOKENS == 0 else 1
        count = m // tokens
        index = torch.arange(count, device=device)
        rewards = (torch.rand(count, generator=generator, device=device) < 0.5).float()
        sequence_ids = index.repeat_interleave(tokens)
        return Problem(hidden, weight, ids, normal(m) / m, rewards, index // GROUP, sequence_ids)

    def first(self, rows: int) -> Problem:
        """A problem with the first `rows` tokens and leaves of its own."""
        sequences = int(self.sequence_ids[rows - 1]) + 1
        return Problem(
            self.hidden[:rows].detach().clone().requires_grad_(),
            self.weight.detach().clone().requires_grad_(),
            self.ids[:rows],
            self.upstream[:rows],
            self.rewards[:sequences],
            self.group_ids[:sequences],
            self.sequence_ids[:rows],
        )

    def to(self, dtype: torch.dtype) -> Problem:
        """The same rounded numbers in another dtype."""
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight))
        rewards, upstream = self.rewards.to(dtype), self.upstream.to(dtype)
        return Problem(hidden, weight, self.ids, upstream, rewards, self.group_ids, self.sequence_ids)


Forward = Callable[[Problem], Tensor]


def eager_logprob(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The plain formula. Softmax in float32 (in float64 for float64), as in all candidates."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, -1).gather(-1, ids[:, None])[:, 0]


def chunked_logprob(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The same in blocks of rows, which are recomputed in the backward pass."""
    parts = zip(hidden.split(CHUNK), ids.split(CHUNK), strict=True)
    return torch.cat([checkpoint(eager_logprob, h, weight, i, use_reentrant=False) for h, i in parts])


def loss_of(logprobs: Tensor, p: Problem) -> Tensor:
    advantages = group_advantage(p.rewards, p.group_ids)
    return grpo_loss(logprobs, None, None, advantages, p.sequence_ids, beta=0.0)[0]


# --- builders: one that raises ImportError or RuntimeError marks its candidate as absent --------------------


def _ours(operation: str, device: str) -> Forward:
    if operation == "logprob":
        return lambda p: grpo_kernels.linear_logprob(p.hidden, p.weight, p.ids)[0]
    return lambda p: grpo_kernels.fused_grpo(
        p.hidden, p.weight, p.ids, p.rewards, p.group_ids, p.sequence_ids, beta=0.0
    )[0]


def _from_logprob(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[str, str], Forward]:
    """A builder from a function (hidden, weight, ids) -> logprobs; the loss is grpo/loss.py's."""

    def build_one(operation: str, device: str) -> Forward:
        if operation == "logprob":
            return lambda p: function(p.hidden, p.weight, p.ids)
        return lambda p: loss_of(function(p.hidden, p.weight, p.ids), p)

    return build_one


def _reference(operation: str, device: str) -> Forward:
    if device == "cpu":
        raise RuntimeError("on a CPU it is what `ours` runs")
    return _from_logprob(lambda h, w, i: reference.linear_logprob(h, w, i)[0])(operation, device)


def _compiled(operation: str, device: str) -> Forward:
    return _from_logprob(torch.compile(eager_logprob, dynamic=False))(operation, device)


def _torch_fused(operation: str, device: str) -> Forward:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return _from_logprob(lambda h, w, i: -F.linear_cross_entropy(h, w, i, reduction="none", options=options))(
        operation, device
    )


def _trl(operation: str, device: str) -> Forward:
    from trl.trainer.utils import selective_log_softmax

    return _from_logprob(lambda h, w, i: selective_log_softmax((h @ w.T)[None], i[None])[0])(
        operation, device
    )


def _trl_chunked(operation: str, device: str) -> Forward:
    from trl.kernels import ChunkedLogProbFunction

    width = 32768  # columns, as TRL's trainers call it; rows go by 4096
    return _from_logprob(
        lambda h, w, i: ChunkedLogProbFunction.apply(h, w, None, i, 1.0, width, None, 1.0, ())[0]
    )(operation, device)


def _cce(operation: str, device: str) -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    # Its own kernels need CUDA; elsewhere it offers a compiled version of the plain computation.
    implementation = "cce" if device.startswith("cuda") else "torch_compile"
    return _from_logprob(
        lambda h, w, i: -linear_cross_entropy(h, w, i, reduction="none", impl=implementation)
    )(operation, device)


def _liger(operation: str, device: str) -> Forward:
    if operation == "logprob":
        raise RuntimeError("has no such operation; see grpo")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")

    def forward(p: Problem) -> Tensor:
        completions = len(p.rewards)
        hidden = p.hidden.unflatten(0, (completions, -1))
        ids = p.ids.unflatten(0, (completions, -1))
        advantages = group_advantage(p.rewards, p.group_ids)
        return loss(hidden, p.weight, ids, torch.ones_like(ids), advantages)[0]

    return forward


BUILDERS: dict[str, Callable[[str, str], Forward]] = {
    "ours": _ours,
    "reference": _reference,
    "eager": _from_logprob(eager_logprob),
    "compile": _compiled,
    "chunked": _from_logprob(chunked_logprob),
    "torch": _torch_fused,
    "trl": _trl,
    "trl-chunked": _trl_chunked,
    "cce": _cce,
    "liger": _liger,
}
ABOUT = {
    "ours": "grpo_kernels: Triton on a GPU, grpo/logprob.py on a CPU",
    "reference": "grpo/logprob.py on a GPU",
    "eager": "log_softmax(hidden @ weight.T)",
    "compile": "the same under torch.compile",
    "chunked": f"the same by blocks of {CHUNK} rows, with checkpointing",
    "torch": "torch.nn.functional.linear_cross_entropy, chunked (torch 2.13 and later)",
    "trl": "TRL's selective_log_softmax on hidden @ weight.T",
    "trl-chunked": "TRL's ChunkedLogProbFunction on hidden and weight",
    "cce": "Apple's cut-cross-entropy",
    "liger": "Liger-Kernel's LigerFusedLinearGRPOLoss",
}


def build(names: list[str], operation: str, device: str) -> tuple[dict[str, Forward], dict[str, str]]:
    """The candidates that run here, and why the others do not."""
    candidates, absent = {}, {}
    for name in names:
        try:
            candidates[name] = BUILDERS[name](operation, device)
        except (ImportError, RuntimeError) as error:
            absent[name] = " ".join(str(error).split())
    return candidates, absent


def backward(output: Tensor, p: Problem) -> tuple[Any, ...]:
    """Gradients of hidden and weight, from `upstream` for log-probs, from the loss itself for a loss."""
    upstream = p.upstream.to(output.dtype) if output.ndim else None
    return torch.autograd.grad(output, (p.hidden, p.weight), upstream)
