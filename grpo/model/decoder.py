"""One decoder for Llama (SmolLM2 too), Mistral, Qwen2, Qwen3 and Phi-3.

A layer is

    q, k, v  = qkv_proj(norm(x));   x += o_proj(attend(rope(q), rope(k), v))
    gate, up = gate_up_proj(norm(x));   x += down_proj(silu(gate) * up)

and the five families differ only in biases, query/key norms, sliding windows and RoPE, all of which
`ModelConfig` reads from an HF config. The projections are fused, so that a layer has four matrix products and
few small operations between them; `weights.py` fuses them on load and splits them on save.

Attention is a callable, `attend(layer, q, k, v) -> out`. So one decoder serves the sampler with its caches,
the learner with its packed trees, and a plain forward pass (attention.py).

Shapes: R rows, T tokens, H hidden, N query heads, K key/value heads, D head size, V vocabulary, r rotated
dimensions of a head (r = D except in some Phi-3 models).

Left out: dropout (the published configs have none), mixture of experts, KV cache (see sampler/kv_cache.py).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from grpo.model.attention import Attend, causal_attend, check_mask
from grpo.model.rope import Rope, rotate

# --- configuration ---------------------------------------------------------------------------------------

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Most names are transformers'; the others are explained in this file."""

    NEEDED: ClassVar[tuple[str, ...]] = (*_SIZES, "rms_norm_eps")  # keys that a config must have

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # per layer: tokens that a query sees, itself included; None: all
    max_position_embeddings: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """From an HF config dict, of transformers 4 or 5.

        Raises:
            ValueError: a model type, activation or RoPE that this decoder does not support, or a missing key.
        """
        cls.check_type(config)
        model_type = config["model_type"]
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"hidden_act must be 'silu', got {config['hidden_act']!r}")
        missing = [name for name in cls.NEEDED if config.get(name) is None]
        if missing:
            raise ValueError(f"the config of a {model_type} model must have {', '.join(missing)}")
        for name in (*_SIZES, "num_key_value_heads", "head_dim", "sliding_window"):
            if (size := config.get(name)) is not None and (type(size) is not int or size < 1):
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if not 0 < config["rms_norm_eps"] < math.inf:
            raise ValueError(f"rms_norm_eps must be a positive number, got {config['rms_norm_eps']}")

        num_heads = config["num_attention_heads"]
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of {num_kv_heads} key/value heads, got {num_heads}"
            )
        head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
        # Qwen2 and Phi-3 have no attention_bias key: the architecture fixes it.
        attention_bias = model_type in ("llama", "qwen3") and bool(config.get("attention_bias"))
        return cls(
            model_type=model_type,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config["rms_norm_eps"],
            rope=Rope.from_hf(config, head_dim),
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
            qkv_bias=attention_bias or model_type == "qwen2",
            o_bias=attention_bias,
            mlp_bias=model_type == "llama" and bool(config.get("mlp_bias")),
            qk_norm=model_type == "qwen3",
            windows=_windows(config),
            max_position_embeddings=config["max_position_embeddings"],
        )

    @staticmethod
    def check_type(config: Mapping[str, Any]) -> None:
        if config.get("model_type") not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise ValueError(f"model_type must be one of {known}, got {config.get('model_type')!r}")


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's window. Mistral, Phi-3: in every layer; Qwen: by `layer_types` or `max_window_layers`."""
    count, window = config["num_hidden_layers"], config.get("sliding_window")
    if config["model_type"] == "llama":
        return (None,) * count
    if config["model_type"] in ("mistral", "phi3"):
        return (window,) * count
    if not config.get("use_sliding_window"):
        window = None
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.get("max_window_layers", 0)
        return tuple(window if layer >= first else None for layer in range(count))
    if len(layer_types) != count:
        raise ValueError(f"layer_types must have {count} entries (num_hidden_layers), got {len(layer_types)}")
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layer_types may hold full_attention and sliding_attention, got {sorted(unknown)}")
    if "sliding_attention" in layer_types and window is None:
        raise ValueError(
            "layer_types has sliding_attention: use_sliding_window and sliding_window must be set"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


# --- the decoder -----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """`rms_norm` over the last dimension, with its weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Layer(nn.Module):
    """Attention and feed-forward, each on the normalised input and added to it."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        self.config, self.index = config, index
        self.num_rotated = config.num_heads + config.num_kv_heads  # q and k, not v
        qkv_size = (self.num_rotated + config.num_kv_heads) * head_dim
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv_proj = Linear(hidden, qkv_size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.o_proj = Linear(config.num_heads * head_dim, hidden, bias=config.o_bias)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_up_proj = Linear(hidden, 2 * intermediate, bias=config.mlp_bias)
        self.down_proj = Linear(intermediate, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, signed_sin: Tensor, attend: Attend) -> Tensor:
        """x: (R, T, H). cos, signed_sin: (R, T, 1, r), see `Rope.tables`."""
        config = self.config
        qkv = self.qkv_proj(self.input_layernorm(x)).unflatten(-1, (-1, config.head_dim))
        qk, v = qkv.split((self.num_rotated, config.num_kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            # One normalisation for all heads; only the weights differ between q and k.
            q_weight = self.q_norm.weight.expand(config.num_heads, -1)
            k_weight = self.k_norm.weight.expand(config.num_kv_heads, -1)
            qk = rms_norm(qk, torch.cat((q_weight, k_weight)), config.rms_norm_eps)
        # The heads of q and k are adjacent, so one rotation serves both.
        q, k = rotate(qk, cos, signed_sin).split((config.num_heads, config.num_kv_heads), dim=2)
        out = attend(self.index, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class Decoder(nn.Module):
    """Token ids to final hidden states. weights.py sets `source`, metadata needed only to save."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Any = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:  # a module of its own; otherwise see `lm_head`
            self._modules["lm_head"] = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1 and not parameter.is_meta:  # a meta tensor has no numbers to set
                nn.init.normal_(parameter, std=0.02)

    @property
    def output_weight(self) -> Tensor:
        """(V, H) output embedding; the input embedding if the two are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def lm_head(self) -> nn.Linear:
        """The output embedding as a module, as in transformers: `lm_head(hidden)` gives the logits.

        If the embeddings are tied, its weight is the input embedding itself, and the state dict has no
        `lm_head.weight`.
        """
        if not self.config.tie_word_embeddings:
            return self._modules["lm_head"]  # type: ignore[return-value]
        head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False, device="meta")
        head.weight = self.embed_tokens.weight
        return head

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attend: Attend | None = None,
        *,
        gradient_checkpointing: bool = False,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (R, T) int64.
            position_ids: (R, T) or (1, T) int64; default: 0, 1, 2, ... counted over the unmasked tokens.
            attention_mask: bool, True = may be attended. (R, T): padding, on top of the causal mask.
                (R, 1, T, T): which keys each query sees; a layer's sliding window is still applied.
            attend: `attend(layer, q, k, v) -> out` with q, out (R, N, T, D) and k, v (R, K, T, D). q and k
                are rotated, q is not scaled, key/value heads are not repeated. `attend` scales by 1/sqrt(D),
                masks, and honours `config.windows[layer]`. Default: `causal_attend`. With `attend`, a RoPE
                that depends on the length refuses texts beyond `Rope.length_limit`.
            gradient_checkpointing: recompute each layer in the backward pass instead of keeping activations.
        Returns:
            (R, T, H), in the parameters' dtype.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be (R, T), got {tuple(input_ids.shape)}")
        if attend is not None and attention_mask is not None:
            raise ValueError("attention_mask must be None when attend is given: attend decides who sees whom")
        if attention_mask is not None:
            check_mask(attention_mask, input_ids.shape[1])
        if position_ids is None:
            position_ids = _positions(input_ids, attention_mask)
        if position_ids.shape[-1:] != input_ids.shape[-1:] or position_ids.ndim != 2:
            expected, given = tuple(input_ids.shape), tuple(position_ids.shape)
            raise ValueError(f"position_ids must be {expected} like input_ids, or one row, got {given}")
        x = self.embed_tokens(input_ids)
        cos, signed_sin = self.config.rope.tables(position_ids, x.dtype, limited=attend is not None)
        if attend is None:
            attend = causal_attend(self.config.windows, position_ids, attention_mask)
        for layer in self.layers:
            if gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, signed_sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, signed_sin, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V), before any temperature."""
        return F.linear(hidden, self.output_weight)

    def first_non_finite_weight(self) -> str | None:
        """Name of the first parameter with a NaN or an infinity: a large float32 may be inf in 16 bits."""
        return next((name for name, p in self.named_parameters() if not torch.isfinite(p).all()), None)


def _positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is not None and attention_mask.ndim == 2:
        # Counted over the real tokens, so that left padding shifts no position.
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None]


# --- linear layers ---------------------------------------------------------------------------------------
#
# On a CPU, a product with few rows spends its time on reading the weights, and torch reorders them for
# oneDNN's kernels in every call. With weights reordered ("packed") in advance, products of 1 to 8 rows take a
# third to a half of the time and those of 16 rows two thirds; in float32, products of any size gain
# (docs/LOG.md).
#
# A packed weight is a copy, so it is valid only while the weight does not change. The sampler packs at the
# start of a run and drops the copies at its end. The learner does not pack: its weights change at every step.
# The operations used here have no public names; torch.compile emits them too.

TYPICAL_ROWS = 64  # number of rows for which oneDNN chooses the layout, which works for any number


class Linear(nn.Linear):
    """x @ weight.T + bias, computed with the packed weight while there is one; and what the adapter adds."""

    packed: Tensor | None = None
    adapter: nn.Module | None  # a lora.Adapter, in a model that has one

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.register_module("adapter", None)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) if self.packed is None else packed_product(x, self.packed, self.bias)
        return out if self.adapter is None else self.adapter(x, out)


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """A context in which all `Linear` of `model` use packed weights; the weights must not change in it."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    try:
        for layer in layers:
            layer.packed = pack_weight(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.packed = None


def pack_weight(weight: Tensor) -> Tensor | None:
    """A copy of the (out, in) weight for `packed_product`; None if this machine or build has no kernels."""
    if weight.device.type != "cpu" or not _available(weight.dtype):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_ROWS)


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight.T + bias, where `packed` is the packed weight. Not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@cache
def _available(dtype: torch.dtype) -> bool:
    """Whether packing works for `dtype` on this machine, by a small product."""
    x, weight = torch.ones(2, 32, dtype=dtype), torch.eye(32, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        return torch.equal(packed_product(x, packed), x)
    except (AttributeError, RuntimeError):  # no such operation, or not for this dtype on this machine
        return False


# --- normalisation ---------------------------------------------------------------------------------------
#
# Root mean square normalisation, arXiv 1910.07467: y = x / sqrt(mean(x^2) + eps) * weight.
#
# On GPUs this is torch's fused kernel. On a CPU, torch runs a dozen elementwise operations forward and twice
# as many backward, each a pass over memory; the code below needs about half as many (docs/LOG.md). The
# rounding is that of transformers: normalise in float32 (float64 for float64), round to the dtype of x, then
# multiply.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., H), weight (H,) or (heads, H) -> (..., H), in the type of x."""
    if x.device.type != "cpu":
        if weight.ndim == 1:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x, weight.shape[-1:], None, eps) * weight
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return _normalised(x, eps)[0] * weight


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms (..., H) in the type of x, and 1 / rms (..., 1) in float32 or float64."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vecdot(exact, exact).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (exact * inverse).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms and g = dy weight:  dx = (g - n mean(g n)) / rms,  dweight = sum(dy n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normalised, inverse = _normalised(x, eps)
        ctx.save_for_backward(normalised, inverse, weight)
        return normalised * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normalised, inverse, weight = ctx.saved_tensors
        n, dy = normalised.to(inverse.dtype), gradients[0].to(inverse.dtype)
        dweight = None
        if ctx.needs_input_grad[1]:  # not if only an adapter is trained
            dweight = (dy * n).flatten(0, -weight.ndim - 1).sum(0).to(weight.dtype)
        g = dy * weight.to(inverse.dtype)
        mean = torch.linalg.vecdot(g, n).unsqueeze(-1).div_(n.shape[-1])
        dx = g.addcmul_(n, mean, value=-1).mul_(inverse)
        return dx.to(normalised.dtype), dweight, None
