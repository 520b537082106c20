"""Linear layers whose weights can be packed for a while, as oneDNN's kernels on a CPU read them.

A product with few rows is bound by reading the weights, and torch reorders them for every product. Reordered
beforehand, products of 1 to 8 rows take a third to a half of the time and those of 16 rows two thirds; in
float32 all of them gain (docs/LOG.md). A packed weight is a copy, so it is right only as long as the weight
stays as it is: the sampler packs at the start of a run and drops the copies at its end.

Left out: packing in the learner, whose weights change with every step, and epilogues fused into the product.
The operations are those that torch.compile emits, which have no public name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

TYPICAL_ROWS = 64  # oneDNN chooses the layout for so many; it serves any number


class Linear(nn.Linear):
    """x @ weight.T + bias; with the packed weight while there is one."""

    packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return super().forward(x)
        return packed_product(x, self.packed, self.bias)


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Packs the weights of all `Linear` in `model` for as long as this is entered; they must not change."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    try:
        for layer in layers:
            layer.packed = pack(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def pack(weight: Tensor) -> Tensor | None:
    """A copy of (out, in) for `packed_product`; None where this machine or this build has no such kernels."""
    if weight.device.type != "cpu" or not _available(weight.dtype):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_ROWS)


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight.T + bias, for the weight that was packed. Without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@cache
def _available(dtype: torch.dtype) -> bool:
    """Whether a small product comes out right."""
    x, weight = torch.ones(2, 32, dtype=dtype), torch.eye(32, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        return torch.equal(packed_product(x, packed), x)
    except (AttributeError, RuntimeError):  # no such operation, or none for this type on this machine
        return False
