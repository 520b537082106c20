"""Reads and writes GGUF files (llama.cpp's format): tensors, config and tokenizer in Hugging Face's terms.

The file stores (quantised) tensors under llama.cpp's names and everything else as key-value pairs. Three
things differ: the names; the order of the rows of the query and key projections of the `llama` architecture,
which llama.cpp permutes because its RoPE pairs neighbouring dimensions; and the RoPE scaling, which Llama 3.1
and Phi-3 files keep as a tensor of divisors.

A missing key is an error if a default could silently change what the model computes.

Left out: mixture of experts, architectures that decoder.py lacks, and split files. In writing also left out:
quantisation (llama.cpp's `llama-quantize` does it) and SentencePiece tokenizers.
"""

import json
import mmap
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.model.decoder import ModelConfig
from grpo.model.rope import Rope, frequencies

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# For each `tokenizer.ggml.pre`, the pattern that splits a string before byte-pair merges, as in the models'
# tokenizer.json. None: GPT-2's.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PRETOKENIZERS = {"gpt-2": None, "smollm": None, "llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace("{1,3}", "")}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # values of tokenizer.ggml.token_type
_STOP_KEYS = ("eos", "eot", "eom")  # tokenizer.ggml.KEY_token_id: any of them ends a turn
_ROPE_KEYS = ["freq_base", "dimension_count", "scale_linear"]
_ROPE_KEYS += [f"scaling.{key}" for key in ("type", "factor", "attn_factor", "original_context_length")]
_ROPE_KEYS += ["scaling.finetuned"]  # says nothing about the computation

# --- reading ---------------------------------------------------------------------------------------------


class GGUFFile:
    """One open GGUF file. `config` is its HF config dict.

    Raises:
        ValueError: the file is damaged; its architecture, RoPE scaling or tokenizer is not supported; or the
            package `gguf` is not installed.
    """

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ValueError(
                f"{path}: GGUF files need the package gguf: pip install 'reflect-grpo[gguf]'"
            ) from error
        self.path = path
        try:
            check_header(path)
            # Memory-mapped: only the parts that are used are read.
            reader = GGUFReader(path)
        except Exception as error:  # the reader checks little: a short file can raise any NumPy error
            raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self._text("general.architecture")
        if self.architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(
                f"{path}: general.architecture must be one of {known}, got {self.architecture!r}"
            )
        self._check_tokenizer_keys()
        self.config = self._config()
        self.licence: str | None = self._get("general.license", None)

    @property
    def tags(self) -> list[str]:
        """As in a model card; none if the file has something else there."""
        tags = self._get("general.tags", [])
        return tags if isinstance(tags, list) else []

    _MISSING = object()

    def _get(self, key: str, default: Any = _MISSING) -> Any:
        if key in self._fields:
            try:
                return self._fields[key].contents()
            except (ValueError, IndexError) as error:  # bytes that are no UTF-8, or an empty array
                raise ValueError(f"{self.path}: {key} is damaged ({error}); fetch the file again") from error
        if default is GGUFFile._MISSING:
            raise ValueError(f"{self.path} has no {key}; it is not a complete model file")
        return default

    def _text(self, key: str) -> str:
        if not isinstance(value := self._get(key), str):
            raise ValueError(f"{self.path}: {key} must be a string, got {_shorten(value)}")
        return value

    def _of_model(self, key: str, default: Any = _MISSING) -> Any:
        """A number."""
        key = f"{self.architecture}.{key}"
        value = self._get(key, default)
        if value is not default and (not isinstance(value, int | float) or value < 0):
            raise ValueError(f"{self.path}: {key} must be a number from 0, got {_shorten(value)}")
        return value

    def _config(self) -> dict[str, Any]:
        heads, hidden = self._of_model("attention.head_count"), self._of_model("embedding_length")
        head_dim = self._of_model("attention.key_length", hidden // heads if heads else 0)
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"{self.path}: the size of an attention head must be even, got {head_dim}")
        config = {
            "architectures": [_ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": self._of_model("feed_forward_length"),
            "num_hidden_layers": self._of_model("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._of_model("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            # The file stores a float32 such as 9.9999997e-06: recover the decimal it was made from.
            "rms_norm_eps": float(f"{self._of_model('attention.layer_norm_rms_epsilon'):.6g}"),
            "max_position_embeddings": self._of_model("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": self.architecture != "qwen2" and "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._tensors,
            "rope_parameters": self._rope_parameters(head_dim),
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self._stop_token_ids(),
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id", None),
        }
        if self.architecture == "phi3":
            config["sliding_window"] = self._of_model("attention.sliding_window", None) or None
            original = self._of_model("rope.scaling.original_context_length", None)
            config["original_max_position_embeddings"] = original or config["max_position_embeddings"]
        return config

    def _stop_token_ids(self) -> int | list[int] | None:
        """As in an HF config: a list only if there are several."""
        ids = [self._get(f"tokenizer.ggml.{key}_token_id", None) for key in _STOP_KEYS]
        distinct = list(dict.fromkeys(index for index in ids if index is not None))
        return distinct if len(distinct) > 1 else distinct[0] if distinct else None

    def _rope_parameters(self, head_dim: int) -> dict[str, Any]:
        self._check_rope_keys()
        theta = float(self._of_model("rope.freq_base", 10_000.0))
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        partial = self._of_model("rope.dimension_count", head_dim) / head_dim
        if partial != 1:
            rope["partial_rotary_factor"] = partial
        factor = self._of_model("rope.scaling.factor", 0) or self._of_model("rope.scale_linear", 0)
        # llama.cpp's default: a factor without a type is a linear one.
        kind = self._get(f"{self.architecture}.rope.scaling.type", "linear" if factor else "none")
        if "rope_freqs.weight" in self._tensors:
            return rope | self._llama3_scaling(theta, head_dim)
        if "rope_factors_long.weight" in self._tensors:
            for length in ("long", "short"):
                divisors = self._read(f"rope_factors_{length}.weight")
                rope[f"{length}_factor"] = [float(f"{value:.7g}") for value in divisors.tolist()]
            if attention_factor := self._of_model("rope.scaling.attn_factor", None):
                rope["attention_factor"] = attention_factor
            return rope | {"rope_type": "longrope"}
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": factor or self._of_model("rope.scaling.factor")}
            if kind == "yarn":
                original = self._of_model("rope.scaling.original_context_length")
                rope["original_max_position_embeddings"] = original
        elif kind != "none":
            raise ValueError(f"{self.path}: rope.scaling.type {kind!r} is not supported")
        return rope

    def _check_rope_keys(self) -> None:
        prefix = f"{self.architecture}.rope."
        for key in self._fields:
            if key.startswith(prefix) and key.removeprefix(prefix) not in _ROPE_KEYS:
                raise ValueError(f"{self.path}: {key} is not supported; pass the HF folder instead")
        # Files of 2023 lack the key for Llama 1 and 2, where 10,000 is right; they have SentencePiece
        # vocabularies. Elsewhere a converter did not find rope_theta in config.json, and 10,000 is wrong.
        if f"{prefix}freq_base" not in self._fields and self._text("tokenizer.ggml.model") == "gpt2":
            raise ValueError(
                f"{self.path} has no {prefix}freq_base: convert the model again with a newer llama.cpp, "
                "or pass its HF folder"
            )

    def _llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The published parameters of Llama 3.1's scaling, of which the file stores only the divisors."""
        divisors = self._read("rope_freqs.weight")
        scaling = {
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        given = {"max_position_embeddings": self._of_model("context_length")}
        plain = frequencies(Rope.from_hf(given | {"rope_theta": theta}, head_dim), 0)[0]
        rope = Rope.from_hf(given | {"rope_parameters": scaling | {"rope_theta": theta}}, head_dim)
        if divisors.shape != plain.shape or not torch.allclose(
            plain / divisors, frequencies(rope, 0)[0], rtol=1e-3
        ):
            raise ValueError(
                f"{self.path}: rope_freqs.weight is not Llama 3's scaling; pass the HF folder instead"
            )
        return scaling

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise ValueError(f"{self.path} has no tensor {name}; it is not a complete model file")
        # GGUF lists the innermost dimension first.
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """(HF name, shape) of each tensor that `tensors` yields."""
        return [
            (self._hf_name(name), self._shape(name)) for name in self._tensors if name not in _ROPE_TENSORS
        ]

    def _read(self, name: str) -> Tensor:
        """One tensor, dequantised to float32."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ValueError(f"{self.path}: {name} is quantised as {kind}, which gguf cannot read") from error
        return torch.tensor(values, dtype=torch.float32).reshape(self._shape(name))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(HF name, float32 tensor), one at a time; unknown tensors keep llama.cpp's name."""
        for name in self._tensors:
            if name not in _ROPE_TENSORS:
                tensor = self._read(name)
                if self.architecture == "llama" and re.search(r"\.attn_[qk]\.", name):
                    heads = "num_attention_heads" if ".attn_q." in name else "num_key_value_heads"
                    tensor = _unpermute(tensor, self.config[heads])
                yield self._hf_name(name), tensor

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in _TENSORS:
            return name
        part = _TENSORS[match[2]]
        if self.architecture == "phi3" and match[2] == "ffn_up":
            part = "mlp.gate_up_proj"
        return (f"model.layers.{match[1]}." if match[1] else "") + f"{part}.{match[3]}"

    def tokenizer(self) -> Any:
        """The file's tokenizer, with chat template and special tokens, as a transformers tokenizer.

        A damaged tokenizer can raise any exception.
        """
        if self._text("tokenizer.ggml.model") == "gpt2":
            return self._byte_level_tokenizer()
        from transformers import AutoTokenizer

        # SentencePiece vocabularies (Llama 2, Mistral, Phi-3): transformers reads the file and converts them.
        tokenizer = AutoTokenizer.from_pretrained(
            self.path.parent, gguf_file=self.path.name, trust_remote_code=False, local_files_only=True
        )
        tokenizer.chat_template = self._get("tokenizer.chat_template", None)
        return tokenizer

    def _check_tokenizer_keys(self) -> None:
        """Each default of these keys splits strings otherwise than the model was trained with."""
        needed = ["tokens", "token_type"]
        if self._text("tokenizer.ggml.model") == "gpt2":
            needed += ["merges", "pre"]
        for key in needed:
            if f"tokenizer.ggml.{key}" not in self._fields:
                raise ValueError(
                    f"{self.path} has no tokenizer.ggml.{key}, without which strings are split otherwise "
                    "than in training: convert the model again with a newer llama.cpp, or pass its HF folder"
                )
        if "pre" in needed and (pre := self._text("tokenizer.ggml.pre")) not in _PRETOKENIZERS:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.pre must be one of {', '.join(_PRETOKENIZERS)}, "
                f"got {_shorten(pre)}"
            )

    def _byte_level_tokenizer(self) -> Any:
        # Built here: transformers' reader ignores `tokenizer.ggml.pre`, and reads the file a second time.
        from tokenizers import processors
        from transformers import PreTrainedTokenizerFast

        tokens, merges = self._get("tokenizer.ggml.tokens"), self._get("tokenizer.ggml.merges")
        pre = self._get("tokenizer.ggml.pre")
        tokenizer = _byte_level(tokens, merges, self._get("tokenizer.ggml.token_type"), pre)
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {name: self._get(f"tokenizer.ggml.{key}_token_id", None) for name, key in names.items()}
        special = {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}
        if self._get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos_token" in special:
            bos = special["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, ids["bos"])]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            model_max_length=self._of_model("context_length"),
            clean_up_tokenization_spaces=False,
            chat_template=self._get("tokenizer.chat_template", None),
            **special,
        )


def _byte_level(tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], pre: str) -> Any:
    """A tokenizer (of the library tokenizers) from the values of tokenizer.ggml.{tokens, merges, ...}."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    pattern = _PRETOKENIZERS[pre]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _unpermute(tensor: Tensor, num_heads: int) -> Tensor:
    """From llama.cpp's order of a head's rows, x0, x_{D/2}, x1, x_{D/2 + 1}, ..., to x0, x1, x2, ..."""
    return tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def _shorten(value: Any) -> str:
    return f"{value!r:.60}"


# --- the header ------------------------------------------------------------------------------------------
#
# GGUFReader believes the counts in the header: an array that claims 10^12 elements fills the memory. So the
# header is walked once before, with limits far above those of real files.

MAX_ENTRIES = 100_000  # keys, and tensors
MAX_ELEMENTS = 4_000_000  # of all arrays together; vocabularies of 256,000 tokens need a third
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


class _Header:
    """A place in the header of a GGUF file. Reading past the end raises struct.error."""

    def __init__(self, data: Any):
        self.data, self.at, self.order, self.elements = data, 0, "<", 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(self.order + kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return int(value)

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("the header ends early")

    def string(self) -> None:
        self.skip(self.number("Q"))

    def count(self) -> int:
        if (count := self.number("Q")) > MAX_ENTRIES:
            raise ValueError(f"the header claims {count} entries")
        return count

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            kind, length = self.number("I"), self.number("Q")
            self.elements += length
            if self.elements > MAX_ELEMENTS or kind == _ARRAY:
                raise ValueError(f"an array of type {kind} claims {length} elements")
            if kind == _STRING:
                for _ in range(length):
                    self.string()
            else:
                self.skip(length * _SCALAR_BYTES[kind])
        else:
            self.skip(_SCALAR_BYTES[kind])


def check_header(path: Path) -> None:
    """Raises an exception if the header of a GGUF file is cut short or claims absurd sizes."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data)
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        header.skip(4)
        if header.number("I") & 65535 == 0:  # the version, which is small: a file of the other byte order
            header.order = ">"
        tensors, keys = header.count(), header.count()
        for _ in range(keys):
            header.string()
            header.value(header.number("I"))
        for _ in range(tensors):
            header.string()
            if (dimensions := header.number("I")) > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor claims {dimensions} dimensions")
            header.skip(8 * dimensions + 4 + 8)


# --- writing ---------------------------------------------------------------------------------------------

# Tells the pre-tokenizers apart: contractions, digits, white space, scripts, and a letter in two code points.
_PROBE = (
    "Hello,  world!\n\n\tIt's 1234567 of 89 - I'LL (re)do it:\r\n\n  x=3.14;  y_1 'sure' \n na\u00efve "
    "re\u0301sume\u0301 \u6771\u4eac \U0001f642\U0001f642 don't...  \u0661\u0662 \u00bd   "
)
_INSTEAD = "export a folder, and convert it with llama.cpp's convert_hf_to_gguf.py"


def write(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    stop_token_ids: Sequence[int],
    name: str,
    tags: Sequence[str] = (),
    license: str | None = None,
) -> None:
    """Writes a GGUF file that `GGUFFile` and llama.cpp read. Tensors are converted one at a time.

    Args:
        tensors: by HF name, as in layout.py.
        tokenizer: a transformers tokenizer with byte-level BPE, and with the chat template to store.
        dtype: float32 or bfloat16; vectors, such as norms and biases, are always float32.
        stop_token_ids: that end a turn. The file has room for three.
        name: of the model, for people to read.
        tags: as in a model card.
        license: an SPDX id, if it is known.
    Raises:
        ValueError: GGUF, or llama.cpp, has no place for something that the model needs.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    except ImportError as error:
        raise ValueError(
            f"{path}: GGUF files need the package gguf: pip install 'reflect-grpo[gguf]'"
        ) from error
    _check_storable(config)
    architecture = "llama" if config.model_type == "mistral" else config.model_type  # Llama, but for windows
    scaling, divisors = _rope_scaling(config.rope)
    stored = {_gguf_name(hf_name, architecture): tensor for hf_name, tensor in tensors.items()}
    stored |= divisors

    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(name)
    if tags:
        writer.add_tags(tags)
    if license is not None:
        writer.add_license(license)
    half = dtype == torch.bfloat16
    writer.add_file_type(LlamaFileType.MOSTLY_BF16 if half else LlamaFileType.ALL_F32)
    _add_sizes(writer, config, scaling)
    _add_tokenizer(writer, tokenizer, config.vocab_size, stop_token_ids)

    def stored_dtype(tensor: Tensor) -> torch.dtype:
        return dtype if tensor.ndim > 1 else torch.float32

    no_dtype: Any = None  # NumPy's; it has no bfloat16, and gguf does not need it
    kinds = {torch.float32: GGMLQuantizationType.F32, torch.bfloat16: GGMLQuantizationType.BF16}
    for file_name, tensor in stored.items():
        of_file = stored_dtype(tensor)
        size = tensor.numel() * of_file.itemsize
        writer.add_tensor_info(file_name, tensor.shape, no_dtype, size, kinds[of_file])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file_name, tensor in stored.items():  # in the same order
        if architecture == "llama" and (match := re.search(r"\.attn_([qk])\.", file_name)):
            tensor = _permute(tensor, config.num_heads if match[1] == "q" else config.num_kv_heads)
        converted = tensor.detach().to("cpu", stored_dtype(tensor)).contiguous()
        writer.write_tensor_data(converted.view(torch.uint8).numpy())
    writer.close()


def _check_storable(config: ModelConfig) -> None:
    rope = config.rope
    if config.model_type != "phi3" and any(window is not None for window in config.windows):
        raise ValueError(
            f"a GGUF file of a {config.model_type} model has no place for its sliding window, "
            f"{max(window or 0 for window in config.windows)} tokens: export a folder"
        )
    plain = replace(rope, beta_fast=32.0, beta_slow=1.0, truncate=True, mscale=None, mscale_all_dim=None)
    unusual = rope != plain or (rope.rope_type == "yarn" and rope.attention_factor is not None)
    longrope = rope.rope_type == "longrope" and config.model_type != "phi3"
    if rope.rope_type == "dynamic" or unusual or longrope:
        raise ValueError(
            f"a GGUF file of a {config.model_type} model has no place for this RoPE, {rope}: export a folder"
        )


def _rope_scaling(rope: Rope) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keys below `rope.scaling`, and the tensors of divisors by name."""
    original = {"original_context_length": rope.original_max_position_embeddings}
    factor = rope.factor or rope.max_position_embeddings / rope.original_max_position_embeddings
    if rope.rope_type == "linear":
        return {"type": "linear", "factor": factor}, {}
    if rope.rope_type == "yarn":
        return {"type": "yarn", "factor": factor, **original}, {}
    if rope.rope_type == "llama3":
        plain = replace(rope, rope_type="default")
        return {}, {"rope_freqs.weight": frequencies(plain, 0)[0] / frequencies(rope, 0)[0]}
    if rope.rope_type == "longrope":
        divisors = {"long": rope.long_factor, "short": rope.short_factor}
        tensors = {f"rope_factors_{length}.weight": torch.tensor(of) for length, of in divisors.items()}
        return {"attn_factor": frequencies(rope, 0)[1], **original}, tensors
    return {}, {}


def _add_sizes(writer: Any, config: ModelConfig, scaling: Mapping[str, Any]) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.rope.rotary_dim)
    if (window := config.windows[0]) is not None:
        writer.add_sliding_window(window)
    types = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in scaling.items():
        types[type(value)](f"{writer.arch}.rope.scaling.{key}", value)


def _gguf_name(hf_name: str, architecture: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", hf_name)
    assert match is not None, hf_name
    parts = {theirs: ours for ours, theirs in _TENSORS.items()} | {"mlp.gate_up_proj": "ffn_up"}
    return (f"blk.{match[1]}." if match[1] else "") + f"{parts[match[2]]}.{match[3]}"


def _permute(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of `_unpermute`."""
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
    """Vocabulary, special tokens and chat template.

    Raises:
        ValueError: the tokenizer is not byte-level BPE, or none of the known pre-tokenizers gives its ids.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    kind = "SentencePiece" if model.get("byte_fallback") else model["type"]
    if kind != "BPE" or "ByteLevel" not in json.dumps(backend["decoder"]):
        raise ValueError(f"a GGUF file needs a byte-level BPE tokenizer, got {kind}: {_INSTEAD}")
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(names) >= vocab_size:
        raise ValueError(
            f"the tokenizer must have at most {vocab_size} ids, the model's, got {max(names) + 1}"
        )
    # Models have more rows than tokens where that makes products faster.
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    kinds = [_NORMAL if index in names else _UNUSED for index in range(vocab_size)]
    for index, token in tokenizer.added_tokens_decoder.items():
        kinds[index] = _CONTROL if token.special else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:  # an empty list cannot be stored
        raise ValueError(f"a GGUF file needs a tokenizer with merges, got one of single bytes: {_INSTEAD}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_of(tokenizer, tokens, merges, kinds))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)

    eos = tokenizer.eos_token_id
    stops = list(dict.fromkeys([*([eos] if eos in stop_token_ids else []), *stop_token_ids]))
    ids = dict(zip(_STOP_KEYS, stops, strict=False))
    ids |= {
        "bos": tokenizer.bos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for name, index in ids.items():
        if index is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    bos = tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and tokenizer.encode("a")[0] == bos)
    if isinstance(template := tokenizer.chat_template, dict):  # one of several names is "default"
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _pre_of(tokenizer: Any, tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int]) -> str:
    """The `tokenizer.ggml.pre` with which the tokens give the tokenizer's ids, found by trying."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    probe = _PROBE + " ".join(f"{token}x {token} 1" for token in added)
    expected = tokenizer.encode(probe, add_special_tokens=False)
    for pre in _PRETOKENIZERS:
        if _byte_level(tokens, merges, kinds, pre).encode(probe, add_special_tokens=False).ids == expected:
            return pre
    known = ", ".join(_PRETOKENIZERS)
    raise ValueError(f"a GGUF file needs a tokenizer that splits text as one of {known} does: {_INSTEAD}")
