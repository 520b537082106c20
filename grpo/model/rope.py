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
The sampler and the learner refuse texts that are longer than that up to which the frequencies are constant
(`length_limit`): they rotate a key once, for texts that grow or that have different lengths.

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
    "low_freq_factor",
    "high_freq_factor",
)
_DEPENDS_ON_LENGTH = ("dynamic", "longrope")
MOST = 1e12  # no number of a real config is larger, or smaller than 1 / MOST; neither overflows


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

    @property
    def length_limit(self) -> tuple[int, str]:
        """The most tokens of a text that is sampled or trained, and the config's key for it, in words.

        `longrope` changes all frequencies beyond the pretraining length. Keys in a cache keep the frequencies
        of the length at which they were rotated, and texts packed together share one length. The log-probs
        would not be those of a plain forward pass of the text alone.
        """
        original, maximum = self.original_max_position_embeddings, self.max_position_embeddings
        if self.rope_type == "longrope" and original < maximum:
            return original, f"original_max_position_embeddings, {original}, beyond which its RoPE changes"
        return maximum, f"max_position_embeddings, {maximum}"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int) -> "Rope":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4).

        Raises:
            ValueError: an unknown rope type, a missing parameter, or a value of the wrong type or size.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"rope_parameters must be a dict, got {given!r:.100}")
        if any(isinstance(value, Mapping) for value in given.values()):
            raise ValueError(f"rope_parameters must be one flat dict, got one for each of {sorted(given)}")
        rope_type = given.get("rope_type") or given.get("type") or "default"
        if rope_type == "su":  # the first name of longrope, in early Phi-3 configs
            rope_type = "longrope"
        if not isinstance(rope_type, str) or rope_type not in _REQUIRED:
            raise ValueError(f"rope_type must be one of {', '.join(_REQUIRED)}, got {rope_type!r:.100}")
        missing = [name for name in _REQUIRED[rope_type] if given.get(name) is None]
        if missing:
            raise ValueError(f"rope_type {rope_type!r} needs {', '.join(missing)}, got {dict(given)!r:.200}")

        values = {**config, **{name: value for name, value in given.items() if value is not None}}
        # Phi-3 stores the pretraining length outside the rope parameters; that value has priority.
        original = "original_max_position_embeddings"
        if config.get(original) is not None:
            values[original] = config[original]
        maximum = _integer(values, "max_position_embeddings")
        head_dim = _integer({"head_dim": head_dim}, "head_dim", most=2**16)
        rope = cls(
            rope_type=rope_type,
            theta=float(_number(values, "rope_theta", 10_000.0, least=2)),
            rotary_dim=int(head_dim * _number(values, "partial_rotary_factor", 1.0, most=1)),
            max_position_embeddings=maximum,
            original_max_position_embeddings=_integer(values, original, maximum),
            truncate=True if given.get("truncate") is None else given["truncate"],
            short_factor=_divisors(given, "short_factor"),
            long_factor=_divisors(given, "long_factor"),
            **{name: _number(given, name) for name in _OPTIONAL if given.get(name) is not None},
        )
        rope.check()
        return rope

    def check(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"the rotated part of a head must be even and positive, got {self.rotary_dim}")
        if self.rope_type == "dynamic" and self.rotary_dim == 2:
            raise ValueError("the rotated part of a head must be above 2 with rope_type 'dynamic', got 2")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"truncate must be true or false, got {self.truncate!r:.100}")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            factors = f"{self.high_freq_factor:g} and {self.low_freq_factor:g}"
            raise ValueError(f"high_freq_factor must be above low_freq_factor, got {factors}")
        if self.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(self, name)) != self.rotary_dim // 2:
                    raise ValueError(
                        f"{name} must hold {self.rotary_dim // 2} numbers (half of the rotated dimensions), "
                        f"got {len(getattr(self, name))}"
                    )

    def tables(
        self, position_ids: Tensor, dtype: torch.dtype, *, limited: bool = False
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for each position, computed in float32 and rounded once to `dtype`.

        Args:
            position_ids: (R, T) int64.
            limited: keys of other forward passes, or of several texts, are attended to; see `length_limit`.
        Returns:
            cos, signed_sin: (R, T, 1, r), ready for heads at dimension 2. The first half of `signed_sin` is
            negated, so that `rotate` is `x * cos + roll(x, r/2) * signed_sin`: few passes over x.
        Raises:
            ValueError: `limited`, and at this length the frequencies are not those of shorter texts.
        """
        # Reading the length waits for the device; only `dynamic` and `longrope` need it.
        length = int(position_ids.max()) + 1 if self.depends_on_length else 0
        if limited and length > self.length_limit[0]:
            raise ValueError(f"a text of {length} tokens must fit the model's {self.length_limit[1]}")
        inv_freq, scale = frequencies(self, length, position_ids.device)
        angles = position_ids[..., None, None].float() * inv_freq  # (R, T, 1, r/2)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def _number(
    values: Mapping[str, Any],
    name: str,
    default: float | None = None,
    *,
    least: float = 1 / MOST,
    most: float = MOST,
) -> float:
    """values[name], or `default` if it is missing or None. ValueError unless it is a number in the range."""
    value = default if values.get(name) is None else values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r:.100}")
    return value


def _integer(values: Mapping[str, Any], name: str, default: int | None = None, *, most: float = MOST) -> int:
    value = _number(values, name, default, least=2, most=most)
    if not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return value


def _divisors(given: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = given.get(name) or ()
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} must be a list of numbers, got {values!r:.100}")
    return tuple(_number({name: value}, name) for value in values)


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
