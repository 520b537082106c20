"""Warm start: a short supervised stage for models below the task's threshold.

If no retry of a model is ever right, every reward is 0 and GRPO learns nothing. The paper's models are
capable enough; a 135M model is not. So the task writes transcripts (`Task.transcript`): an attempt, a
reflection that leaves room to learn, a retry. The loss is the mean negative log-likelihood of the tokens that
are imitated:

- the attempt, if it is right;
- after a wrong attempt, all its reflections, and the first right retry. Further right retries would say the
  same and repeat the task's text. Wrong answers are never imitated;
- with `warm_start_answers`, that retry also as a first answer. The prompt goes through the model anyway
  (packing.py), so this teaches the task itself for the price of the answer.

Left out: general chat data. The stage is short; grpo.evaluate measures its effect.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from grpo.chat import Chat
from grpo.tasks import Example, WarmStartTask, opening
from grpo.tasks.contract import verdict

Completion = tuple[list[int], list[bool]]  # its ids, its loss mask
TrainingSequence = tuple[list[int], list[Completion]]  # prompt, completions: packing.py


def learning_rate_at(step: int, total: int, peak: float, warmup: int = 3) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak. `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def by_step(task: WarmStartTask, chat: Chat, config: Any) -> Callable[..., list[TrainingSequence]]:
    """`sequences` with the settings of a run (`grpo.config.Config`); takes `step`."""
    return partial(
        sequences,
        task,
        chat,
        # Not the examples of RL, though a small task may repeat a problem with its numbers reordered.
        task.examples("train", config.warm_start_examples, offset=config.num_examples),
        batch_size=config.warm_start_batch_size,
        reflections=config.warm_start_reflections,
        answers=config.warm_start_answers,
        seed=config.seed,
    )


def sequences(
    task: WarmStartTask,
    chat: Chat,
    examples: list[Example],
    *,
    step: int,
    batch_size: int,
    reflections: int,
    answers: bool = False,
    seed: int,
) -> list[TrainingSequence]:
    """The transcripts of one step, a function of (seed, step), so a step that is redone gets the same.

    Args:
        examples: each step takes the next `batch_size`, in a cycle.
        step: counts from 0.
        reflections: how many follow a wrong attempt. They share its prompt, which goes through the model once
            (packing.py).
        answers: also imitate a right retry as a first answer.
    Returns:
        pairs (prompt ids, [(completion ids, loss mask)]): one per example, or two with `answers`.
    """
    rng = random.Random(f"warm start {seed} {step}")
    chosen = [examples[(step * batch_size + i) % len(examples)] for i in range(batch_size)]
    batch = []
    for example in chosen:
        batch += _sequences(task, chat, example, reflections, answers, rng)
    return batch


def _sequences(
    task: WarmStartTask, chat: Chat, example: Example, reflections: int, answers: bool, rng: random.Random
) -> list[TrainingSequence]:
    first = task.transcript(example, rng)
    prompt = chat.prompt(**opening(task, example, chat))
    attempt = chat.encode_turn(first.attempt, after=prompt)
    if first.reflection is None:
        return [(prompt, [_imitated(attempt)])]
    transcripts = [first, *(task.transcript(example, rng, first.attempt) for _ in range(reflections - 1))]
    reflect = prompt + attempt + chat.glue(attempt, "stop", task.reflection_instruction)
    completions = [
        _imitated(chat.encode_turn(transcript.reflection or "", after=reflect)) for transcript in transcripts
    ]
    retry: Completion | None = None
    for index, transcript in enumerate(transcripts):
        if transcript.retry is not None and verdict(task, example, transcript.retry).ok:
            again = chat.glue(completions[index][0], "stop", example.prompt)
            retry = _imitated(chat.encode_turn(transcript.retry, after=again))
            completions[index] = _followed(completions[index], again, retry)
            break
    trained = [(reflect, completions)]
    if answers and retry is not None:
        trained.append((prompt, [retry]))
    return trained


def _imitated(ids: list[int]) -> Completion:
    return ids, [True] * len(ids)


def _followed(reflection: Completion, again: list[int], retry: Completion) -> Completion:
    """Reflection and retry; the mask is False on `again`, the user's turn between them."""
    return reflection[0] + again + retry[0], reflection[1] + [False] * len(again) + retry[1]
