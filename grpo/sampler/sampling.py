"""The sampler's noise and its choice of tokens.

A token is drawn by inverting the distribution function: with weights e_i = exp((logit_i - max) / temperature)
and a uniform u in [0, 1), the token is the first i whose running sum of weights exceeds u * sum(e). The sum
is taken in two levels, over blocks of 256 tokens and then inside one block, so that no softmax and no running
sum over the whole vocabulary is ever written.

The noise is counter-based (Philox, Salmon et al. 2011): the uniforms of a turn are a function of its key
alone, not of the batch, of the order in which rows are sampled, or of what ran before.

Left out: min-p, repetition penalties, beams. top-p and top-k serve evaluation and take a slow path (a sort).
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 256  # tokens per block: about sqrt(V) balances the two levels for vocabularies of 32k to 256k


def uniforms(key: tuple[int, ...], count: int) -> list[float]:
    """The noise of one turn: `count` uniforms in [0, 1), a function of `key` only.

    Args:
        key: integers of any size, such as `grpo.rollout.NoiseKey`. Different keys, also of different length,
            give independent noise.
    """
    # np.random.SeedSequence joins the 32-bit words of the numbers: for it (2**32 + 5, 2) is (5, 2**33 + 1).
    digest = hashlib.sha256(",".join(str(int(part)) for part in key).encode()).digest()
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.random.Generator(philox).random(count).tolist()


def choose(
    logits: Tensor,
    noise: Tensor | None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draws one token per column; **overwrites `logits`**.

    Same as a categorical draw from `softmax(logits / temperature, 0)`, restricted first to the `top_k` most
    likely tokens and then to the fewest of those that hold `top_p` of their probability.

    Args:
        logits: (V, B) float32. Vocabulary first: the product weight @ hidden.T that makes them is a third
            faster than its transpose on a CPU with 64 rows.
        noise: (B,) float64 in [0, 1), or None for the most likely token.
    Returns:
        tokens (B,) int64 and logprobs (B,) float64, nats, under the whole distribution at `temperature`
        (top-p and top-k left out). A column with NaN or +inf gives a NaN log-prob.
    """
    # Before the weights overwrite the logits, and apart from amax: indices make it ten times slower.
    best = logits.argmax(dim=0) if noise is None else None
    weights = logits.sub_(logits.amax(dim=0)).mul_(1.0 / temperature).exp_()  # (V, B), 1 at the largest logit
    sums = _block_sums(weights)
    total = sums.sum(dim=0)
    if noise is None:
        assert best is not None
        tokens = best
    else:
        kept, kept_sums = weights, sums
        if top_k > 0 or top_p < 1.0:
            kept = torch.where(_nucleus(weights, top_p, top_k), weights, 0.0)
            kept_sums = _block_sums(kept)
        tokens = _invert(kept, kept_sums, noise)
    chosen = weights.gather(0, tokens[None]).squeeze(0).double()
    return tokens, chosen.log() - total.log()


def _block_sums(weights: Tensor) -> Tensor:
    """(V, B) float32 -> (ceil(V / BLOCK), B) float64; the last block holds what is left of V."""
    vocabulary, batch = weights.shape
    whole = vocabulary // BLOCK
    sums = weights[: whole * BLOCK].view(whole, BLOCK, batch).sum(dim=1)
    if vocabulary % BLOCK:
        sums = torch.cat([sums, weights[whole * BLOCK :].sum(dim=0, keepdim=True)])
    return sums.double()


def _invert(weights: Tensor, sums: Tensor, noise: Tensor) -> Tensor:
    """The first token whose running sum of `weights` (V, B) exceeds `noise` * total; (B,) int64."""
    running = sums.cumsum(dim=0)
    target = noise * running[-1]
    block = _first_above(running, target)
    before = (running.gather(0, block[None]) - sums.gather(0, block[None])).squeeze(0)
    columns = block * BLOCK + torch.arange(BLOCK, device=block.device)[:, None]  # (BLOCK, B)
    inside = columns < weights.shape[0]
    values = weights.gather(0, columns.clamp(max=weights.shape[0] - 1)).double() * inside
    return block * BLOCK + _first_above(values.cumsum(dim=0), target - before)


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """Index of the first entry of each column of `running` (n, B) above `target` (B,).

    That entry's own term is positive: where a term is zero the running sum does not rise. Rounding may leave
    `target` at the very end of the sum; then the last term that raised it is taken, which is positive too.
    """
    return torch.minimum((running <= target).sum(dim=0), (running < running[-1]).sum(dim=0))


def _nucleus(weights: Tensor, top_p: float, top_k: int) -> Tensor:
    """(V, B) bool: the tokens that top-k, then top-p, leave in. Equal weights are ranked by token id."""
    order = weights.argsort(dim=0, descending=True, stable=True)
    ranked = weights.gather(0, order).double()
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k > 0:
        keep[top_k:] = False
    ranked = ranked * keep
    if top_p < 1.0:
        # A token stays while those ranked before it hold less than top_p: the one that crosses it is in.
        before = ranked.cumsum(dim=0) - ranked
        keep &= before < top_p * ranked.sum(dim=0)
    return torch.zeros_like(keep).scatter_(0, order, keep)
