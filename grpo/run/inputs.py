"""What a run reads besides its settings: chat template, tokenizer, examples and the model's files.

The settings only point to these. A run stores their sums in `inputs.json` before its first step, and a
resumed run compares them: with another template, say, it would continue with other prompts, unnoticed.

Left out: the code of the task and of the trainer, which may be repaired between stop and resume; and whole
weights, because hashing gigabytes takes longer than loading them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from grpo import distributed
from grpo.model import weights
from grpo.run import files
from grpo.run.build import Parts
from grpo.tasks import Example, opening

INPUTS = "inputs.json"
BEFORE_RL = ("chat_template", "tokenizer", "examples", "model")  # read before RL begins
HEAD = 2**20  # bytes of a file of weights that are hashed: its table of tensors, and the first of them
MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("model.safetensors.index.json", "*.safetensors"),
)


def sums(parts: Parts, examples: Sequence[Example]) -> dict[str, Any]:
    """The content of `inputs.json`.

    Args:
        examples: all that the run will ask for: train, then validation if it validates, then held-out.
    Raises:
        ValueError: an example that JSON cannot hold.
    """
    config = parts.config
    validated = len(examples) - config.num_eval
    trained = validated - (config.num_validation if config.eval_steps else 0)
    return {
        "chat_template": parts.chat.template_sha256,
        # The libraries' versions, because another one may write the same tokenizer differently.
        "tokenizer": {"versions": _versions(), "sha256": _sum_of_tokenizer(parts.tokenizer)},
        "examples": _sum_of_examples(parts, examples[:trained], parts.task.reflection_instruction),
        "validation": _sum_of_examples(parts, examples[trained:validated]),
        # Apart, with their number: a resumed run may have another `num_eval`.
        "heldout": {"count": config.num_eval, "sha256": _sum_of_examples(parts, examples[validated:])},
        "model": _sums_of_model(weights.resolve(config.model_name_or_path)),
    }


def check_ranks(parts: Parts, examples: Sequence[Example]) -> None:
    """Raises ValueError if ranks have other examples: their answers could not be put together."""
    if distributed.size() > 1:
        distributed.check_equal("examples", {"their sha256": _sum_of_examples(parts, examples)})


def save(folder: Path, content: dict[str, Any]) -> None:
    with files.written_whole(folder / INPUTS) as path:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check(folder: Path, now: dict[str, Any]) -> None:
    """Compares the inputs of a resumed run. A run of version 0.1 has no `inputs.json` and passes.

    Raises:
        MismatchError: an input changed, or `inputs.json` is damaged.
    """
    path = folder / INPUTS
    if not path.exists():
        return
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        if {name: type(value) for name, value in then.items()} != {name: type(now[name]) for name in now}:
            raise ValueError(f"expected {', '.join(now)}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise files.MismatchError(
            f"{path} is damaged ({error}); delete it to resume without checking that the inputs are the same"
        ) from error
    if then["tokenizer"].get("versions") != now["tokenizer"]["versions"]:
        then = {**then, "tokenizer": now["tokenizer"]}  # not comparable; `restore` warns of another version
    if then["heldout"].get("count") != now["heldout"]["count"]:
        then = {**then, "heldout": now["heldout"]}  # not comparable; the stored evaluation names its examples
    if changed := [name for name in now if then[name] != now[name]]:
        what = "; ".join(_describe(name, folder, then[name], now[name]) for name in changed)
        raise files.MismatchError(
            f"resume of {folder} with other inputs than it started with: {what}. Restore what changed, or "
            "start a new run"
        )


def _describe(name: str, folder: Path, then: Any, now: Any) -> str:
    if name == "model":
        changed = [file for file in sorted({**then, **now}) if then.get(file) != now.get(file)]
        return f"the model's files changed ({', '.join(changed)})"
    if name == "chat_template":
        copy = next(iter(sorted(folder.glob("**/chat_template.jinja"))), None)
        return "the chat template changed" + (f" (the run's own is in {copy})" if copy else "")
    names = {
        "tokenizer": "tokenizer",
        "examples": "task's examples or messages",
        "validation": "validation examples",
        "heldout": "held-out examples",
    }
    return f"the {names[name]} changed"


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("tokenizers", "transformers")}


def _sum_of_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _sha256(json.dumps([state, special]).encode())


def _sum_of_examples(parts: Parts, examples: Sequence[Example], message: str = "") -> str:
    """Of `message`, and of ids, data and all messages, in the order of the run."""
    digest = hashlib.sha256(json.dumps(message).encode())
    for example in examples:
        try:
            digest.update(json.dumps([asdict(example), opening(parts.task, example, parts.chat)]).encode())
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"task {parts.task.name} must write examples that JSON can hold; {example.id} has {error}"
            ) from error
    return digest.hexdigest()


def _sums_of_model(path: Path) -> dict[str, Any]:
    """Per file: its size and the sum of its beginning. Of small files, such as config.json, this is all.

    The files of an adapter follow those of its base.
    """
    if weights.is_adapter(path):
        return _sums_of_files(weights.base_of(path)) | _sums_of_files(path)
    return _sums_of_files(path)


def _sums_of_files(path: Path) -> dict[str, Any]:
    found = [path] if path.is_file() else [file for name in MODEL_FILES for file in sorted(path.glob(name))]
    result = {}
    for file in found:
        with open(file, "rb") as stream:
            result[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(stream.read(HEAD))}
    return result


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
