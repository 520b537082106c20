"""Log-probability and entropy of selected tokens from hidden states, in tiles: the (M, V) logits never exist.

With logits z = h W^T / temperature (softcapped before that), their maximum m, d_j = z_j - m, and

    s = sum_j exp(d_j)      p_j = exp(d_j) / s      c = sum_j p_j d_j

the selected token t and the whole distribution give, in nats,

    logprob = d_t - log s            d logprob / d z_j = [j = t] - p_j
    entropy = log s - c              d entropy / d z_j = -p_j (d_j - c)

The forward pass keeps only m, s and c of each row. The backward pass recomputes the logits: one more matrix
product, for a fraction of the memory. A tile has many rows and few vocabulary columns, so that W
and dW, the largest matrices, are touched once per block of rows. Left out: kernels (grpo_kernels has them),
second derivatives.

M rows, H hidden, V vocabulary. Arithmetic on logits is float32, or float64 where the inputs are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Measured by benchmarks/tiles.py (docs/LOG.md): fewer rows or elements are 5 to 30% slower. A tile is 4 MiB
# of float32; one of four times that size does not stay in the cache from one pass to the next.
TILE_ROWS = 2048
TILE_ELEMENTS = 1 << 20
NEGLIGIBLE = -1e4  # exp of it is 0 in every dtype, and unlike -inf it can be multiplied by 0


def plain_logprob(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """(M,) log-probs of `ids`, as `linear_logprob` computes them, but with the (M, V) logits in memory."""
    logits = hidden @ weight.T / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, ids[:, None])[:, 0]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each selected token, and the entropy of the distribution it was selected from.

    Same as `log_softmax(hidden @ weight.T / temperature, -1).gather(-1, ids[:, None])` without the logits.

    Args:
        hidden: (M, H) final hidden states.
        weight: (V, H) output embedding, same dtype.
        ids: (M,) int64, in [0, V).
        mask: (M,) bool; rows where it is False return 0 and receive no gradient, even if they contain NaN.
        softcap: logits become softcap * tanh(logits / softcap), before the division by temperature.
    Returns:
        (M,) float32 log-probs and, if asked for, (M,) float32 entropies; both differentiable, once.
    Raises:
        ValueError: shapes, dtypes or values do not fit; the message shows the value received.
    """
    check_product(hidden, weight)
    rows = _counted_rows(ids, mask, hidden.shape[0], weight.shape[0], temperature, softcap)
    return _Logprob.apply(hidden, weight, rows, ids, temperature, softcap, entropy)


def selected_logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `linear_logprob`, from (M, V) logits, which may contain -inf. Allocates only their gradient anew."""
    if logits.ndim != 2:
        raise ValueError(f"logits must be (M, V), got {tuple(logits.shape)}")
    rows = _counted_rows(ids, mask, logits.shape[0], logits.shape[1], temperature, softcap)
    return _Logprob.apply(logits, None, rows, ids, temperature, softcap, entropy)


class _Logprob(torch.autograd.Function):
    """x is hidden (M, H) with weight (V, H), or logits (M, V) with weight None. Reads only `rows` of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, rows: Tensor, ids: Tensor, *options: Any) -> Any:
        temperature, softcap, entropy = options
        dtype = torch.promote_types(x.dtype, torch.float32)
        logprob, entropies, peak, total, center = x.new_zeros(5, len(x), dtype=dtype)
        for r in _row_blocks(rows, x, weight):
            block, label = x[r], ids[r, None]
            m, s, sc, label_z = torch.zeros(4, len(r), 1, dtype=dtype, device=x.device)  # sc: s times c
            m += torch.finfo(dtype).min  # not -inf: where a whole tile is -inf, -inf - -inf would be NaN
            for columns, z, spare in _tiles(block, weight, temperature, softcap):
                local, inside = _locate(label, columns)
                label_z = torch.where(inside, z.gather(1, local), label_z)
                risen = torch.maximum(m, z.amax(1, keepdim=True))
                shift, m = (m - risen).clamp_min_(NEGLIGIBLE), risen
                sc = (sc + shift * s) * shift.exp()
                d = z.sub_(m)
                if entropy:
                    e = torch.exp(d.clamp_min_(NEGLIGIBLE), out=spare)
                    sc += d.mul_(e).sum(1, keepdim=True)
                else:
                    e = d.exp_()
                s = s * shift.exp() + e.sum(1, keepdim=True)
            peak[r], total[r], center[r] = m[:, 0], s[:, 0], (sc / s)[:, 0]
            logprob[r] = (label_z - m - s.log())[:, 0]
            entropies[r] = (s.log() - sc / s)[:, 0]
        ctx.save_for_backward(x, weight, rows, ids, peak, total, center)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return logprob, entropies if entropy else None

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # only under create_graph, where the result would silently be a constant
            raise RuntimeError("linear_logprob and selected_logprob are differentiable once, not twice")
        x, weight, rows, ids, peak, total, center = ctx.saved_tensors
        temperature, softcap, _ = ctx.options
        g, g_entropy = (torch.zeros_like(peak) if g is None else g for g in (grad_logprob, grad_entropy))
        rows = rows[(g[rows] != 0) | (g_entropy[rows] != 0)]  # skips groups without a signal
        blocks = _row_blocks(rows, x, weight)
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            # Blocks of rows are added up in float32. A single block is one product, rounded once anyway.
            sum_dtype = weight.dtype if len(blocks) == 1 else peak.dtype
            grad_weight = torch.zeros_like(weight, dtype=sum_dtype)
        for r in blocks:
            block, label, m, s, c = x[r], ids[r, None], peak[r, None], total[r, None], center[r, None]
            up, up_entropy = g[r, None] / temperature, g_entropy[r, None] / temperature
            # -up p - up_entropy p (d - c) equals exp(d) (intercept + slope d): no tile is divided by s
            slope = -up_entropy / s
            intercept = -up / s - slope * c
            grad_block = torch.zeros_like(block, dtype=peak.dtype)
            for columns, z, spare in _tiles(block, weight, temperature, softcap):
                local, inside = _locate(label, columns)
                slack = 1 - (z * (temperature / softcap)).square_() if softcap is not None else None  # tanh'
                d = z.sub_(m)
                grad = torch.exp(d, out=spare)
                if grad_entropy is None:
                    grad.mul_(intercept)
                else:
                    grad.mul_(d.clamp_min_(NEGLIGIBLE).mul_(slope).add_(intercept))
                grad.scatter_add_(1, local, torch.where(inside, up, 0.0))
                if slack is not None:
                    grad.mul_(slack)
                if weight is None:
                    grad_block = grad
                    continue
                grad = grad.to(weight.dtype)  # only after [j = t] - p: rounding p first would lose digits
                if grad_x is not None:
                    _add_product(grad_block, grad, weight[columns])
                if grad_weight is not None:
                    _add_product(grad_weight[columns], grad.T, block)
            if grad_x is not None:
                grad_x[r] = grad_block.to(x.dtype)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 5


def _row_blocks(rows: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    size = TILE_ROWS if weight is not None else max(1, TILE_ELEMENTS // x.shape[1])
    return rows.split(size) if len(rows) else ()  # split returns one empty block for no rows


def _tiles(
    block: Tensor, weight: Tensor | None, temperature: float, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (columns, z (rows, columns), spare like z); both may be overwritten, and are reused."""
    dtype = torch.promote_types(block.dtype, torch.float32)
    scale = 1 / temperature if softcap is None else 1 / softcap
    size = block.shape[1] if weight is None else weight.shape[0]
    width = size if weight is None else max(1, TILE_ELEMENTS // max(1, len(block)))
    buffer, spare = torch.empty(2, len(block) * min(width, size), dtype=dtype, device=block.device)
    for start in range(0, size, width):
        columns = slice(start, min(start + width, size))
        shape = (len(block), columns.stop - start)
        z, other = (b[: shape[0] * shape[1]].view(shape) for b in (buffer, spare))
        if weight is None:
            z.copy_(block).mul_(scale)  # in float32: torch.mul would round to the inputs' type first
        elif block.dtype == dtype:
            torch.addmm(z, block, weight[columns].T, beta=0, alpha=scale, out=z)
        else:
            z.copy_(block @ weight[columns].T).mul_(scale)
        if softcap is not None:
            z.tanh_().mul_(softcap / temperature)
        yield columns, z, other


def _locate(label: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(rows, 1) each: the label's column in this tile, or 0; and whether it lies in this tile."""
    inside = (label >= columns.start) & (label < columns.stop)
    return torch.where(inside, label - columns.start, 0), inside


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32 and a, b may be bfloat16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _counted_rows(
    ids: Tensor, mask: Tensor | None, m: int, v: int, temperature: float, softcap: float | None
) -> Tensor:
    """Checks the arguments that both functions share; returns the indices of the rows in the mask."""
    check_rows(ids, mask, m, temperature, softcap)
    rows = torch.arange(m, device=ids.device) if mask is None else mask.nonzero()[:, 0]
    check_range(ids[rows], v)
    return rows


# --- checks of the arguments, which the kernels call too ----------------------------------------------------


def check_product(hidden: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless the shapes and dtypes of the two factors fit."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden must be (M, H) and weight (V, H), got {shapes}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have the same dtype, got {hidden.dtype} and {weight.dtype}")


def check_rows(
    ids: Tensor,
    mask: Tensor | None,
    m: int,
    temperature: float,
    softcap: float | None,
    id_dtypes: tuple[torch.dtype, ...] = (torch.int64,),
) -> None:
    """Raises ValueError unless the arguments fit m rows. Reads no tensor's values: no synchronisation."""
    if ids.shape != (m,) or ids.dtype not in id_dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in id_dtypes)
        raise ValueError(f"ids must be ({m},) {names}, got {tuple(ids.shape)} {ids.dtype}")
    if mask is not None and (mask.shape != (m,) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be ({m},) bool, got {tuple(mask.shape)} {mask.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


def check_range(counted: Tensor, v: int) -> None:
    """Raises ValueError if an id of an unmasked row is outside [0, v). Waits for the device."""
    if ((counted < 0) | (counted >= v)).any():
        received = f"{counted.min()} to {counted.max()}"
        raise ValueError(f"ids must be in [0, {v}) where mask is True, got {received}")
