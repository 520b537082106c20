"""Measures models on held-out problems: first try, reflection, second try, and what else could explain it.

`measure` is the last stage of train.py, once per model. `python -m grpo.evaluate CHECKPOINT...` compares any
checkpoints. All models answer the same problems with the same sampling noise, so comparisons are paired.
Problems are stored in fixed blocks, some of which are sampled together. An interrupted evaluation continues
after its last whole block.

comparison.py computes the metrics, table.py renders them, __main__.py is the command.

Left out: several samples per problem (pass@k), because the paper's table has one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress, groupby, islice
from pathlib import Path
from typing import Any

from grpo.episode import Episode
from grpo.evaluate.comparison import CONTROLS, ModelResult, ProblemRecord
from grpo.rollout import Attempt, Progress, Rollout
from grpo.run import files
from grpo.tasks import Example, TolerantTask, Verdict
from grpo.tasks.contract import leaks, tolerant_verdict

# Shapes of the lines (files.misfit)
TRY = {"text": str, "reason": str, "?score": float, "?right": bool}
RECORD: dict[str, Any] = {
    "id": str,
    "prompt": str,
    "first": TRY,
    "reflection": (None, {"text": str, "tokens": int, "finish_reason": str, "leaks": bool}),
    "retry": (None, TRY),
    "controls": {str: (None, TRY)},
}
END = {"block": int, "first": str, "last": str, "examples": int, "settings": dict}
BLOCK = 128  # problems; shuffled reflections move inside a block


def measure(
    rollout: Rollout,
    examples: Sequence[Example],
    *,
    controls: Iterable[str] = CONTROLS,
    block: int = BLOCK,
    stage: str = "evaluation",
    store: str | os.PathLike[str] | None = None,
    identity: str = "",
    progress: Progress | None = None,
) -> ModelResult:
    """Lets the model of `rollout` try each example, reflect on its failures and try again.

    One record per example: `id`, `prompt`, `first` {text, reason, tokens, finish_reason}; for failures also
    `reflection` {text, tokens, finish_reason, leaks}, `retry` {text, reason, tokens} (both otherwise None)
    and `controls` {name: {text, reason}} (otherwise empty). For a TolerantTask `first` and `retry` also have
    `tolerant`, the reason of the lenient verdict. After a `reason` comes `score` if the reason does not imply
    it, and `right` if `success_threshold` decides otherwise than the reason.

    Args:
        rollout: policy and task; its sampler's decoding settings are used as they are.
        examples: in a fixed order.
        controls: which of blind, shuffled and blanked are tried on the same failures.
        block: examples that are stored together, and among which the shuffled control moves reflections. As
            many blocks are sampled together as it takes to fill the sampler's batch.
        stage: of the noise: "evaluation", or "validation" during training.
        store: JSON lines file for the records. Blocks that it already has are not sampled again.
        identity: name of the weights; a store made with others is refused.
        progress: called with (examples done, roughly; examples in all) while blocks are sampled, so that the
            caller can stop the evaluation.
    Raises:
        ValueError: an unknown control.
        MismatchError: `store` was made with other examples, settings or weights, or is damaged.
    """
    controls = tuple(controls)
    if unknown := set(controls) - set(CONTROLS):
        raise ValueError(f"controls must be among {', '.join(CONTROLS)}, got {', '.join(sorted(unknown))}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    settings = {**_settings(rollout, controls, block, stage), "identity": identity}
    path = None if store is None else Path(store)
    records = _stored(path, examples, settings) if path else []

    def report_progress(more: float = 0.0) -> None:
        if progress:
            progress(len(records) + int(more), len(examples))

    report_progress()
    for start, end in rollout.portions(len(records), len(examples), block=block):
        parts = [examples[first : min(first + block, end)] for first in range(start, end, block)]
        measured = _measure_blocks(rollout, parts, controls, stage, _phases(report_progress, end - start))
        if path:
            ends = [_end_line(number, part, settings) for number, part in enumerate(parts, start // block)]
            files.append_blocks(path, list(zip(measured, ends, strict=True)))
        records += chain.from_iterable(measured)
        report_progress()
    # Models may have different chat templates and still be compared.
    of_model = ("identity", "chat_template", "chat_template_kwargs")
    return ModelResult(records, {name: value for name, value in settings.items() if name not in of_model})


def records_file(output: Path, label: str) -> Path:
    """The file of the model's records, next to the metrics in `output`."""
    return output.with_name(f"{output.stem}-{re.sub(r'[^A-Za-z0-9._-]+', '_', label)}.jsonl")


# --- blocks that are sampled together -----------------------------------------------------------------------


def _phases(report: Callable[[float], None], size: int) -> list[Progress]:
    """A `progress` for each of the three sampler runs, which reports how many of `size` problems are done.

    The second run takes most of the time: reflections, and controls that need none.
    """

    def phase(begin: float, end: float) -> Progress:
        return lambda done, rows: report(size * (begin + (end - begin) * done / max(1, rows)))

    return [phase(0.0, 0.2), phase(0.2, 0.9), phase(0.9, 0.99)]


def _measure_blocks(
    rollout: Rollout,
    blocks: Sequence[Sequence[Example]],
    controls: Sequence[str],
    stage: str,
    progress: Sequence[Progress],
) -> list[list[ProblemRecord]]:
    """The records of each block; all blocks are sampled together."""
    attempts = rollout.attempts(chain.from_iterable(blocks), stage=stage, progress=progress[0])
    failed = [not rollout.is_right(attempt.verdict) for attempt in attempts]
    failures = list(compress(attempts, failed))
    numbers = compress((number for number, block in enumerate(blocks) for _ in block), failed)
    episodes, verdicts = _second_tries(rollout, controls, failures, list(numbers), stage, progress[1:])
    reflected = iter(zip(episodes, verdicts, strict=True))
    records = (
        _record(rollout, attempt, *(next(reflected) if wrong else (None, {})))
        for attempt, wrong in zip(attempts, failed, strict=True)
    )
    return [list(islice(records, len(block))) for block in blocks]


def _second_tries(
    rollout: Rollout,
    controls: Sequence[str],
    failures: Sequence[Attempt],
    blocks: Sequence[int],
    stage: str,
    progress: Sequence[Progress],
) -> tuple[list[Episode], list[dict[str, Any]]]:
    """Reflections with their retries; and per failure {control: {text, reason}}.

    Blind and blanked retries need no reflection, so they share the sampler run of the reflections. A shuffled
    one is None if its block has only one failure.

    Args:
        blocks: the number of the block that each failure is in, in rising order.
    """
    verdicts: list[dict[str, Any]] = [dict.fromkeys(controls) for _ in failures]
    given: dict[str, list[tuple[Attempt, list[int] | None]]] = {
        "blind": [(failure, None) for failure in failures],
        "blanked": [
            (failure, rollout.chat.encode_turn("", after=rollout.reflection_prompt_ids(failure)))
            for failure in failures
        ],
    }
    at_once = [control for control in controls if control in given]
    episodes, retries = rollout.reflect_and_retry_after(
        failures, [pair for control in at_once for pair in given[control]], stage=stage, progress=progress[0]
    )
    places = [(index, control) for control in at_once for index in range(len(failures))]
    if "shuffled" in controls:
        moved = _shuffled([_closed_reflection(rollout, episode) for episode in episodes], blocks)
        shuffled = [index for index, reflection in enumerate(moved) if reflection is not None]
        retries += rollout.retry_after(
            [failures[index] for index in shuffled],
            [moved[index] for index in shuffled],
            stage=stage,
            progress=progress[1],
        )
        places += [(index, "shuffled") for index in shuffled]
    for (index, control), retry in zip(places, retries, strict=True):
        verdicts[index][control] = {"text": retry.text, **_judged(rollout, retry.verdict)}
    return episodes, verdicts


def _shuffled(reflections: Sequence[list[int]], blocks: Sequence[int]) -> list[list[int] | None]:
    """Gives each failure the reflection of the next one in its block; None if it is the only one there."""
    moved: list[list[int] | None] = []
    for _, group in groupby(range(len(blocks)), key=blocks.__getitem__):
        first, *others = group
        moved += [reflections[index] for index in (*others, first)] if others else [None]
    return moved


def _closed_reflection(rollout: Rollout, episode: Episode) -> list[int]:
    """The sampled ids; a reflection cut at its limit also gets the end of turn that it lacks.

    In the model's own retry the chat's glue closes such a turn. `retry_after` expects closed turns.
    """
    ids = _ids(episode, "reflection")
    return ids if episode.finish_reason == "stop" else [*ids, *rollout.chat.end_of_turn]


def _ids(episode: Episode, role: str) -> list[int]:
    return [token for token, its in zip(episode.completion_ids, episode.roles, strict=True) if its == role]


def _record(
    rollout: Rollout, attempt: Attempt, episode: Episode | None, controls: dict[str, Any]
) -> ProblemRecord:
    example, turn = attempt.example, attempt.turn
    first = {"text": attempt.text, **_judged(rollout, attempt.verdict), "tokens": len(turn.ids)}
    record: ProblemRecord = {
        "id": example.id,
        "prompt": example.prompt,
        "first": {**first, "finish_reason": turn.finish_reason, **_tolerant(rollout, example, attempt.text)},
        "reflection": None,
        "retry": None,
        "controls": controls,
    }
    if episode is not None:
        text = episode.texts["reflection"]
        record["reflection"] = {
            "text": text,
            "tokens": len(_ids(episode, "reflection")),
            "finish_reason": episode.finish_reason,
            "leaks": leaks(rollout.task, example, text),
        }
        verdict = Verdict(episode.reasons[0], episode.scores[0] if episode.scores else None)
        retry = {"text": episode.texts["retry"], **_judged(rollout, verdict)}
        tolerant = _tolerant(rollout, example, retry["text"])
        record["retry"] = {**retry, "tokens": len(_ids(episode, "retry")), **tolerant}
    return record


def _judged(rollout: Rollout, verdict: Verdict) -> dict[str, Any]:
    """The verdict for a record, with `right` where the reason alone would say otherwise."""
    right = rollout.is_right(verdict)
    return verdict.to_json() | ({} if right == verdict.ok else {"right": right})


def _tolerant(rollout: Rollout, example: Example, text: str) -> dict[str, str]:
    """The reason of the lenient verdict, for tasks that have one."""
    task = rollout.task
    if not isinstance(task, TolerantTask):
        return {}
    return {"tolerant": tolerant_verdict(task, example, text).reason}


# --- the stored blocks --------------------------------------------------------------------------------------


def _settings(rollout: Rollout, controls: Sequence[str], block: int, stage: str) -> dict[str, Any]:
    """What the records depend on, besides the weights and the examples."""
    return {
        **rollout.settings,
        "max_reflection_length": rollout.max_reflection_length,
        "stage": stage,
        "block": block,
        "controls": list(controls),
    }


def _end_line(number: int, part: Sequence[Example], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "block": number,
        "first": part[0].id,
        "last": part[-1].id,
        "examples": len(part),
        "settings": settings,
    }


def _stored(path: Path, examples: Sequence[Example], settings: dict[str, Any]) -> list[ProblemRecord]:
    """The records of the whole blocks in `path`, once it is checked that they belong to this evaluation."""
    if not files.keep_whole_blocks(path):
        return []
    lines = list(files.read_jsonl(path, lambda line: END if "block" in line else RECORD))
    ends = [line for line in lines if "block" in line]
    for end in ends:
        if end["settings"] != settings:
            stored = end["settings"]
            changed = [
                name if name in stored else f"{name} (not recorded)"
                for name in dict.fromkeys([*settings, *stored])
                if stored.get(name) != settings.get(name)
            ]
            raise files.MismatchError(
                f"{path} was made with another {', '.join(changed)}: write to a new file, or delete it"
            )
        size = settings["block"]
        part = examples[end["block"] * size :][:size]
        if not part or end != _end_line(end["block"], part, settings):
            raise files.MismatchError(
                f"{path} was made for other problems: write to a new file, or delete it"
            )
    records = [line for line in lines if "block" not in line]
    reflected = [(record["reflection"] is None) == (record["retry"] is None) for record in records]
    if not all(reflected) or [record["id"] for record in records] != [e.id for e in examples[: len(records)]]:
        raise files.MismatchError(f"{path} has records that do not fit each other: delete it")
    return records
