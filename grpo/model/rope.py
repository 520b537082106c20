"""Rotary position embedding, in every variant that the configs of the supported models name.

RoPE (arXiv 2104.09864) rotates the pair (x_i, x_{i + r/2}) of a head by the angle `position * inv_freq_i`,
with inv_freq_i = theta ** (-2 i / r) and r <= D the rotated part of the head. The variants lower these
frequencies so that a model can read sequences longer than those it was pretrained on:

    linear    all divided by one factor                                  arXiv 2306.15595
    dynamic   theta grows with the length beyond the pretraining length  (NTK-aware scaling)
    yarn      high frequencies kept, low ones divided, a ramp between    arXiv 2309.00071
    longrope  one divisor per frequency; a second set for long input     arXiv 2402.13753, Phi-3
    llama3    as yarn, the ramp given in wavelengths                     Llama 3.1

`dynamic` and `longrope` depend on the length, which is, as in transformers, the largest position of the
forward pass plus one. Unlike transformers' `dynamic`, ours remembers nothing from earlier forward passes.

Left out: multimodal and per-layer-type RoPE. Formulas follow transformers' `modeling_rope_utils.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL = (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
)
_DEPENDS_ON_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Rope:
    """RoPE parameters of one model; hashable, because they are a key of the cache of `frequencies`."""

    rope_type: str
    theta: float
    rotary_dim: int  # r, even: how many of the head's D dimensions are rotated
    max_position_embeddings: int
    original_max_position_embeddings: int  # the pretraining length, in tokens
    factor: float = 0.0  # what frequencies are divided by; 0: max / original max_position_embeddings
    attention_factor: float | None = None  # multiplies cos and sin (yarn, longrope); None: from `factor`
    beta_fast: float = 32.0  # yarn: rotations over the pretraining length above which a frequency is kept ...
    beta_slow: float = 1.0  # ... and below which it is divided by the full factor
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: the ramp's ends are rounded to whole dimensions
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0

    @property
    def depends_on_length(self) -> bool:
        return self.rope_type in _DEPENDS_ON_LENGTH

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int) -> "Rope":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4).

        Raises:
            ValueError: an unknown rope type, a missing parameter, or factors of the wrong length.
        """
        given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        if any(isinstance(value, Mapping) for value in given.values()):
            raise ValueError(f"rope_parameters must be one flat dict, got one for each of {sorted(given)}")
        rope_type = given.get("rope_type") or given.get("type") or "default"
        if rope_type == "su":  # the first name of longrope, in early Phi-3 configs
            rope_type = "longrope"
        if rope_type not in _REQUIRED:
            raise ValueError(f"rope_type must be one of {', '.join(_REQUIRED)}, got {rope_type!r}")
        missing = [name for name in _REQUIRED[rope_type] if given.get(name) is None]
        if missing:
            raise ValueError(f"rope_type {rope_type!r} needs {', '.join(missing)}, got {given}")

        partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        maximum = config["max_position_embeddings"]
        # Phi-3 stores the pretraining length outside the rope parameters; that value has priority.
        original = "original_max_position_embeddings"
        rope = cls(
            rope_type=rope_type,
            theta=float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            rotary_dim=int(head_dim * partial),
            max_position_embeddings=maximum,
            original_max_position_embeddings=config.get(original) or given.get(original) or maximum,
            short_factor=tuple(given.get("short_factor") or ()),
            long_factor=tuple(given.get("long_factor") or ()),
            **{name: given[name] for name in _OPTIONAL if given.get(name) is not None},
        )
        rope.check()
        return rope

    def check(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"the rotated part of a head must be even and positive, got {self.rotary_dim}")
        if self.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(self, name)) != self.rotary_dim // 2:
                    raise ValueError(
                        f"{name} must hold {self.rotary_dim // 2} numbers (half of the rotated dimensions), "
                        f"got {len(getattr(self, name))}"
                    )

    def tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for each position, computed in float32 and rounded once to `dtype`.

        Args:
            position_ids: (R, T) int64.
        Returns:
            cos, signed_sin: (R, T, 1, r), ready for heads at dimension 2. The first half of `signed_sin` is
            negated, so that `rotate` is `x * cos + roll(x, r/2) * signed_sin`: few passes over x.
        """
        # Reading the length waits for the device; only `dynamic` and `longrope` need it.
        length = int(position_ids.max()) + 1 if self.depends_on_length else 0
        inv_freq, scale = frequencies(self, length, position_ids.device)
        angles = position_ids[..., None, None].float() * inv_freq  # (R, T, 1, r/2)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotates the first r dimensions of each head of x (R, T, heads, D); the others stay unchanged."""
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        rotated, rest = x.split((rotary_dim, x.shape[-1] - rotary_dim), dim=-1)
        return torch.cat((rotate(rotated, cos, signed_sin), rest), dim=-1)
    return torch.addcmul(x * cos, x.roll(rotary_dim // 2, dims=-1), signed_sin)


@lru_cache(maxsize=32)
def frequencies(rope: Rope, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
    """Inverse frequencies for a sequence of `length` tokens.

    Returns:
        inv_freq: (r/2,) float32, radians per position.
        scale: the factor of cos and sin.
    """
    # Always computed on the CPU, so that the frequencies are the same bits on every device.
    base = rope.theta
    if rope.rope_type == "dynamic":
        stretch = max(length, rope.max_position_embeddings) / rope.max_position_embeddings
        base *= (rope.factor * stretch - (rope.factor - 1)) ** (rope.rotary_dim / (rope.rotary_dim - 2))
    inv_freq = 1.0 / base ** (torch.arange(0, rope.rotary_dim, 2).float() / rope.rotary_dim)
    scale = 1.0
    if rope.rope_type == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.rope_type == "yarn":
        inv_freq, scale = _yarn(rope, inv_freq)
    elif rope.rope_type == "longrope":
        inv_freq, scale = _longrope(rope, inv_freq, length)
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    return inv_freq.to(device), scale


def _yarn(rope: Rope, inv_freq: Tensor) -> tuple[Tensor, float]:
    """YaRN, arXiv 2309.00071: section 3.2 for the ramp, 3.4 for the attention factor."""
    factor = rope.factor or rope.max_position_embeddings / rope.original_max_position_embeddings

    def dimension_of(rotations: float) -> float:
        """The dimension that rotates `rotations` times over the pretraining length."""
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    divided = ((torch.arange(len(inv_freq)).float() - low) / (high - low)).clamp(0, 1)
    inv_freq = inv_freq / factor * divided + inv_freq * (1 - divided)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inv_freq, temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return inv_freq, temperature(1.0)


def _longrope(rope: Rope, inv_freq: Tensor, length: int) -> tuple[Tensor, float]:
    """LongRoPE, arXiv 2402.13753, as Phi-3 uses it."""
    original = rope.original_max_position_embeddings
    divisors = rope.long_factor if length > original else rope.short_factor
    scale = rope.attention_factor
    if scale is None:
        factor = rope.factor or rope.max_position_embeddings / original
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return inv_freq / torch.tensor(divisors), scale


def _llama3(rope: Rope, inv_freq: Tensor) -> Tensor:
    """Keeps frequencies that rotate often over the pretraining length, divides others, ramps between."""
    turns = rope.original_max_position_embeddings * inv_freq / (2 * math.pi)  # over the pretraining length
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * inv_freq / rope.factor + kept * inv_freq
