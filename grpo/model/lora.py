"""LoRA (arXiv 2106.09685): the model is frozen, and small matrices next to its linear layers are trained.

    y = W x + b + scale B A x        A (rank, in), B (out, rank), scale = lora_alpha / rank

A begins random and B zero, so a fresh adapter changes nothing. The names, the initialisation and the files
are those of PEFT (https://github.com/huggingface/peft). W and the adapter are two products in training and in
sampling: in bfloat16, most small updates would be lost if they were added to W.

The decoder fuses q, k, v and gate, up (layout.py), while an adapter has an A and a B for each of these. So an
`Adapter` has several *parts*: their A lie one below the other and are one product.

    fresh, from_peft -> {HF name of a linear layer: LowRank} -> add (to the model), merged (into its weights)

Left out: dropout, because the learner's log-probs would then not be those of the policy that sampled, which
biases the ratio; adapters of the embeddings; DoRA and other relatives, which `from_peft` refuses.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo.model.decoder import Decoder, Linear, ModelConfig
from grpo.model.layout import Rows, layout

ALL = "all-linear"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's files

# --- the adapter in the model ----------------------------------------------------------------------------


class LowRank(NamedTuple):
    """The adapter of one linear layer of the HF model.

    Args:
        a, b: (rank, in) and (out, rank).
        alpha: scale times rank.
    """

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.a)

    def product(self) -> Tensor:
        """(out, in): what merging adds to the weight. In float32 (float64 for float64)."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        return (self.b.to(dtype) @ self.a.to(dtype)).mul_(self.scale)


class Part(NamedTuple):
    """A linear layer of the HF model, and its rows [start, stop) of the fused layer's output."""

    module: str
    start: int
    stop: int
    rank: int
    alpha: float


class Adapter(nn.Module):
    """Adds scale * B(A(x)) to each part of a linear layer's output.

    The products are `nn.Linear`: the sampler packs the weights of `Linear` on a CPU, which small ones do not
    repay.

    Attributes:
        enabled: whether anything is added (`switched_off`).
    """

    def __init__(self, in_features: int, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts, self.enabled = tuple(parts), True
        self.ranks = [part.rank for part in parts]
        self.lora_A = nn.Linear(in_features, sum(self.ranks), bias=False)
        self.lora_B = nn.ModuleList(
            nn.Linear(part.rank, part.stop - part.start, bias=False) for part in parts
        )

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x (..., in), out (..., out of all parts), which is changed in place and returned."""
        if self.enabled:
            low = self.lora_A(x).split(self.ranks, dim=-1)
            for part, low_part, lora_b in zip(self.parts, low, self.lora_B, strict=True):
                out[..., part.start : part.stop].add_(lora_b(low_part), alpha=part.alpha / part.rank)
        return out

    def low_ranks(self) -> Iterator[tuple[Part, LowRank]]:
        """Each part with its matrices, which are views of the parameters without gradients."""
        rows = self.lora_A.weight.detach().split(self.ranks)
        for part, a, lora_b in zip(self.parts, rows, self.lora_B, strict=True):
            yield part, LowRank(a, lora_b.get_parameter("weight").detach(), part.alpha)


def linear_layers(config: ModelConfig) -> dict[str, Rows]:
    """HF name of each linear layer that can have an adapter -> its rows: model.layers.0.mlp.up_proj."""
    return {
        name.removesuffix(".weight"): rows
        for name, rows in layout(config).items()
        if ".layers." in name and rows.columns is not None
    }


def fresh(
    config: ModelConfig, *, r: int, lora_alpha: float, target_modules: Sequence[str] = (ALL,), seed: int = 0
) -> dict[str, LowRank]:
    """A new adapter, in float32: A uniform in +-1/sqrt(in), as PEFT begins; B zero.

    Args:
        r: the rank.
        target_modules: last parts of HF names, such as q_proj; or all-linear.
        seed: alone determines A.
    Raises:
        ValueError: a name that no linear layer of the model has.
    """
    layers = linear_layers(config)
    known = list(dict.fromkeys(module.rpartition(".")[2] for module in layers))
    if unknown := [name for name in target_modules if name not in (ALL, *known)]:
        raise ValueError(
            f"lora_target_modules must be {ALL}, or some of {', '.join(known)} for a {config.model_type} "
            f"model, got {unknown[0]!r}"
        )
    chosen = known if ALL in target_modules else target_modules
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for module, rows in layers.items():
        if module.rpartition(".")[2] in chosen:
            out_features, in_features = rows.shape
            a = torch.empty(r, in_features)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            adapter[module] = LowRank(a, torch.zeros(out_features, r), lora_alpha)
    return adapter


def add(model: Decoder, adapter: Mapping[str, LowRank]) -> None:
    """Freezes the model and adds the adapter, in the model's dtype; it takes the place of an earlier one."""
    remove(model)
    model.requires_grad_(False)
    grouped: dict[str, list[tuple[Part, LowRank]]] = {}
    for module, rows in linear_layers(model.config).items():
        if (low := adapter.get(module)) is not None:
            part = Part(module, rows.start, rows.stop, len(low.a), low.alpha)
            grouped.setdefault(rows.parameter.removesuffix(".weight"), []).append((part, low))
    for name, members in grouped.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        with torch.device("meta"):  # where an initialisation takes no time and no random numbers
            new = Adapter(weight.shape[1], [part for part, _ in members])
        layer.adapter = new.to(weight.dtype).to_empty(device=weight.device)
        with torch.no_grad():
            for (_, empty), (_, low) in zip(new.low_ranks(), members, strict=True):
                empty.a.copy_(low.a)
                empty.b.copy_(low.b)


def remove(model: Decoder) -> None:
    """Removes the model's adapter, if it has one. The model stays frozen."""
    for layer, _ in _adapters(model):
        layer.adapter = None


def _adapters(model: nn.Module) -> list[tuple[Linear, Adapter]]:
    layers = (module for module in model.modules() if isinstance(module, Linear))
    return [(layer, layer.adapter) for layer in layers if isinstance(layer.adapter, Adapter)]


def adapter_of(model: Decoder) -> dict[str, LowRank]:
    """The model's adapter, by HF name; the matrices are views of its parameters. Empty if it has none."""
    return {part.module: low for _, adapter in _adapters(model) for part, low in adapter.low_ranks()}


def shapes(model: Decoder) -> dict[str, tuple[int, float]]:
    """The rank and alpha of each adapted linear layer: what two adapters must share to be exchanged."""
    return {module: (len(low.a), low.alpha) for module, low in adapter_of(model).items()}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes as if it had no adapter."""
    adapters = [adapter for _, adapter in _adapters(model)]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


@torch.no_grad()
def merge(model: Decoder) -> None:
    """Adds the adapter to the weights, in float32 and rounded once; B is zero afterwards."""
    for layer, adapter in _adapters(model):
        for part, low in adapter.low_ranks():
            if not low.b.any():
                continue  # nothing to add; -0.0 + 0.0 would even change bytes
            rows = layer.weight[part.start : part.stop]
            rows.copy_(rows + low.product())
            low.b.zero_()


def merged(
    tensors: Iterable[tuple[str, Tensor]], adapter: Mapping[str, LowRank]
) -> Iterator[tuple[str, Tensor]]:
    """The (HF name, tensor) pairs of a model with the adapter added, in float32, where it has a part."""
    for name, tensor in tensors:
        low = adapter.get(name.removesuffix(".weight"))
        yield name, tensor if low is None else low.product() + tensor


# --- PEFT's format ---------------------------------------------------------------------------------------

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Keys of adapter_config.json that say nothing about the product, or that are read below. Any other key must
# be null, false or empty.
_KNOWN = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias exclude_modules inference_mode "
    "init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type "
    "peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type "
    "use_rslora".split()
)


def peft_config(model: Decoder, base: str) -> dict[str, Any]:
    """The content of adapter_config.json for an adapter that `fresh` made.

    Args:
        base: where the model without its adapter is.
    """
    adapter = adapter_of(model)
    low = next(iter(adapter.values()))
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(low.alpha) if low.alpha == int(low.alpha) else low.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": len(low.a),
        "target_modules": list(dict.fromkeys(module.rpartition(".")[2] for module in adapter)),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def peft_tensors(model: Decoder) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors: views of the parameters."""
    return {
        f"base_model.model.{module}.lora_{letter}.weight": matrix
        for module, low in adapter_of(model).items()
        for letter, matrix in (("A", low.a), ("B", low.b))
    }


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: ModelConfig, where: str
) -> dict[str, LowRank]:
    """The adapter in a PEFT folder. Which layers it has follows from the names of its tensors.

    Args:
        config, tensors: content of adapter_config.json and of adapter_model.safetensors.
        base: of the model that the adapter is for.
        where: the folder, for error messages.
    Raises:
        ValueError: another kind of adapter than LoRA of linear layers, or one that does not fit the base.
    """
    _check_kind(config, where)
    layers, pairs = linear_layers(base), dict[str, dict[str, Tensor]]()
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[1] not in layers:
            raise ValueError(f"{where} does not fit its base, which has no linear layer for {name}")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    adapter = {}
    for module, pair in pairs.items():
        rank = _of_module(config, "r", module, where)
        out_features, in_features = layers[module].shape
        for letter, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            given = tuple(pair[letter].shape) if letter in pair else "none"
            if given != shape:
                raise ValueError(
                    f"{where} does not fit its base: lora_{letter} of {module} must be {shape}, got {given}"
                )
        alpha = _of_module(config, "lora_alpha", module, where)
        if config.get("use_rslora"):  # scale = alpha / sqrt(rank), arXiv 2312.03732
            alpha *= math.sqrt(rank)
        adapter[module] = LowRank(pair["A"], pair["B"], alpha)
    return adapter


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type must be LORA, got {config.get('peft_type')!r}")
    unsupported = [key for key, value in config.items() if value and key not in _KNOWN]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        unsupported.append("init_lora_weights")  # such as pissa: it changes the base too
    if unsupported:
        key = unsupported[0]
        raise ValueError(
            f"{where}: only plain LoRA of linear layers can be loaded, got {key}={config[key]!r}; merge it "
            "with its base (merge_and_unload of peft), and pass the merged folder"
        )


def _of_module(config: Mapping[str, Any], key: str, module: str, where: str) -> Any:
    """The setting r or lora_alpha of one linear layer: the first pattern that fits its name decides."""
    value: Any = config.get(key)
    name = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", pattern) for pattern in patterns):
        raise ValueError(f"{where}: {name} must map names of modules to numbers, got {patterns!r:.80}")
    for pattern, other in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as in PEFT
            value = other
            break
    right = type(value) is int if key == "r" else type(value) in (int, float)
    if not right or not 0 < value < math.inf:
        raise ValueError(f"{where}: {key} must be a positive number, got {value!r}")
    return value
