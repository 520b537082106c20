"""Counts what a forward pass would launch on CUDA, on a machine without a GPU.

Tensors are on torch's meta device: they have shapes and no memory, so a model of any size fits. `launches`
takes the branches that the code takes on CUDA (`is_cuda` is True) and counts every operation that computes or
moves elements as one kernel. Views and allocations launch nothing. `scaled_dot_product_attention` and
`rms_norm` count as one kernel each, although the meta device would take them apart. A model of one layer
stands for a model of many.

Left out: operations that are several kernels (a product split along its inner dimension), and the backward
pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo.model.decoder import Decoder

# Operations that read only the rows an index names, not their whole first argument, or write only those.
LOOKUPS = ("embedding", "index_select", "index", "gather")
STORES = ("index_put_", "index_copy_")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


@dataclass(frozen=True)
class Rates:
    """What a kernel's time is computed from: FLOP/s, bytes per second, seconds of the smallest kernel."""

    flops: float
    bandwidth: float
    smallest: float


@dataclass
class Launches:
    """What was launched. `seconds` sums, over kernels, the longest of their times for FLOPs and bytes."""

    rates: Rates
    kernels: int = 0
    bytes: int = 0  # read and written
    flops: int = 0  # of matrix products and attention
    seconds: float = 0.0
    attention: Counter[tuple[Any, ...]] = field(
        default_factory=Counter
    )  # calls by shape: queries, keys, masked
    times: int = 1  # how many equal operations it represents

    def add(self, num_bytes: int, flops: int = 0) -> None:
        rates, times = self.rates, self.times
        self.kernels += times
        self.bytes += times * num_bytes
        self.flops += times * flops
        self.seconds += times * max(flops / rates.flops, num_bytes / rates.bandwidth, rates.smallest)

    def add_attention(self, tensors: list[Tensor], flops: int, masked: bool) -> None:
        self.attention[tuple(tensors[0].shape), tuple(tensors[1].shape), masked] += self.times
        self.add(_bytes(tensors), flops)


@contextmanager
def launches(rates: Rates, model: Decoder, num_layers: int) -> Iterator[Launches]:
    """Counts the operations on meta tensors in this context as if they were on CUDA.

    Args:
        model: has one layer, which counts as `num_layers`.
    """
    count = Launches(rates)

    def layer(times: int) -> Any:
        return lambda *_: setattr(count, "times", times)

    hooks = [
        model.layers[0].register_forward_pre_hook(layer(num_layers)),
        model.layers[0].register_forward_hook(layer(1)),
    ]
    try:
        with _CudaBranches(count), _Operations(count):
            yield count
    finally:
        for hook in hooks:
            hook.remove()


class _CudaBranches(TorchFunctionMode):
    def __init__(self, count: Launches) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is torch.Tensor.is_cuda:
            return True
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            mask = kwargs.get("attn_mask")
            self.count.add_attention(
                [q, k, v, out], 4 * q.numel() * k.shape[-2], masked=mask is not None
            )  # q k^T and p v: 2 FLOPs for each query, key and element of a head
            return out
        if func is F.rms_norm:
            out = torch.empty_like(args[0])
            self.count.add(_bytes([args[0], out]))
            return out
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, count: Launches) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = [r.alias_info for r in func._schema.returns if r.alias_info and not r.alias_info.is_write]
        if views or name.startswith(("empty", "new_empty")) or name in ("_unsafe_view", "detach"):
            return result
        inputs = [x for x in tree_leaves([args, kwargs or {}]) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if "attn" in name or "attention" in name:  # varlen_attn
            q, k, _, starts = inputs[:4]
            mean_keys = k.shape[0] // max(1, starts.shape[0] - 1)
            self.count.add_attention([*inputs[:3], outputs[0]], 4 * q.numel() * mean_keys, masked=False)
        elif name in LOOKUPS:
            self.count.add(2 * _bytes(outputs))
        elif name in STORES:
            self.count.add(2 * _bytes(inputs[-1:]))
        else:
            flops = 2 * outputs[0].numel() * inputs[-1].shape[-2] if name in PRODUCTS else 0
            self.count.add(_bytes(inputs) + _bytes(outputs), flops)
        return result


def _bytes(tensors: list[Tensor]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in tensors)
