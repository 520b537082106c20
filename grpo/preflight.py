"""What would go wrong late is said early: checks of a whole run, made before its first token is sampled.

Settings by themselves are checked in config.py. Here they meet the task and the model: enough examples in
each split, transcripts for the warm start, room for the longest conversation. Left out: the size of the disk
and of the memory, which are not this program's alone.
"""

from __future__ import annotations

import importlib.util

from grpo.config import Config
from grpo.parts import Parts
from grpo.tasks import Example, WarmStartTask, opening

LONGEST = 32  # prompts with the most characters; the one with the most tokens is looked for among them


def check(config: Config, parts: Parts) -> None:
    """Raises ValueError naming the setting that does not fit."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard must be false, or its extra installed: pip install 'reflect-grpo[tensorboard]'"
        )
    if config.warm_start_steps and not isinstance(parts.task, WarmStartTask):
        raise ValueError(
            f"warm_start_steps must be 0 with task {parts.task.name}, got {config.warm_start_steps}: the "
            "task writes no transcripts to start from (it has no method `transcript`)"
        )
    examples = _examples(config, parts)
    longest = sorted(examples, key=lambda example: _characters(parts, example))[-LONGEST:]
    _check_room(config, parts, max(longest, key=lambda example: len(parts.rollout.prompt_ids(example))))


def _examples(config: Config, parts: Parts) -> list[Example]:
    """All examples that the run will ask for."""
    train = {"num_examples": config.num_examples}
    if config.warm_start_steps:
        train["warm_start_examples"] = config.warm_start_examples
    needs = {
        "train": train,
        "validation": {"num_validation": config.num_validation} if config.eval_steps else {},
        "heldout": {"num_eval": config.num_eval} if config.num_eval else {},
    }
    examples = []
    for split, need in needs.items():
        try:
            examples += parts.task.examples(split, sum(need.values())) if need else []
        except ValueError as error:
            settings = " and ".join(f"{name}={count}" for name, count in need.items())
            raise ValueError(f"{settings} must not ask for more than the task has: {error}") from error
    return examples


def _characters(parts: Parts, example: Example) -> int:
    """Roughly, the length of the prompt. Tools and earlier turns are most of it where there are any."""
    return sum(len(str(part)) for part in opening(parts.task, example, parts.chat).values())


def _check_room(config: Config, parts: Parts, example: Example) -> None:
    """The conversation about `example`, with every turn at its limit, against positions and cache."""
    rollout, model = parts.rollout, parts.model.config
    answer, reflection = config.max_completion_length, config.max_reflection_length
    total = len(rollout.prompt_ids(example)) + answer
    if config.train_on != "attempt" or config.eval_steps or config.num_eval:
        asked = len(parts.chat.glue([], "length", parts.task.reflection_instruction))
        total += asked + reflection + len(parts.chat.glue([], "length", example.prompt)) + answer
    sizes = f"a conversation of up to {total} tokens (answers up to {answer}, reflection up to {reflection})"
    if total > model.max_position_embeddings:
        raise ValueError(
            f"{sizes} must fit the model's max_position_embeddings, {model.max_position_embeddings}: lower "
            "max_reflection_length or max_completion_length, or choose a task with shorter prompts"
        )
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * parts.dtype.itemsize
    if total * per_token > config.cache_gb * 1e9:
        raise ValueError(
            f"cache_gb must be at least {total * per_token / 1e9:.3g} for {sizes}, got {config.cache_gb:g}"
        )
