"""The dataset of failures: what the starting policy gets wrong ("Reflect, Retry, Reward", section 4).

Before training, every example is attempted `attempts_per_example` times with the weights that RL starts from;
each wrong attempt becomes a pair (example, failed attempt) to reflect on. Examples that are solved every time
are dropped, because they have nothing to teach.

The file is JSON lines in fixed blocks of examples. Each block ends in a summary line. As many blocks are
sampled together as it takes to fill the sampler's batch. A build that was killed continues after its last
whole block and gives the same file as an uninterrupted one.

The paper trains on one fixed set. With `refresh_failures: N` the failures are collected again after every N
steps, with the weights of that moment and other noise, into a file of their own: failures-000008.jsonl.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo.run.interrupts import EXIT_INTERRUPTED, Interrupts, set_up_process

if __name__ == "__main__":
    set_up_process()  # before the imports below, which take seconds

from grpo import distributed
from grpo.chat import Chat
from grpo.rollout import Attempt, Progress, Rollout
from grpo.run import files
from grpo.sampler.engine import Turn
from grpo.tasks import Example, TaskError, Verdict

Right = Callable[[Verdict], bool]  # `Rollout.is_right`

# Shapes of the lines (files.misfit)
FAILURE: dict[str, Any] = {
    "example": {"id": str, "prompt": str, "data": dict},
    "generation": int,
    "prompt_ids": [int],
    "attempt_ids": [int],
    "finish_reason": str,
    "text": str,
    "reason": str,
    "?score": float,
}
COUNTS = {"examples": int, "solved": int, "failed": int, "attempts": int, "right": int}
END = {"block": int, "first": str, "last": str, **COUNTS, "reasons": {str: int}, "settings": dict}
BLOCK = 64  # examples

NONE_RIGHT = (
    "\nwarning: no attempt was right. If retries are no better, nothing can be learned: try an easier task "
    "(task_options), a warm start (warm_start_steps), or a larger model."
)


class NoSignalError(RuntimeError):
    """The failures leave nothing to train on: the task is too easy or too hard for the starting policy."""


def collect(
    path: str | os.PathLike[str],
    rollout: Rollout,
    examples: Sequence[Example],
    *,
    attempts_per_example: int = 1,
    failures_per_example: int = 1,
    keep_solved: bool = False,
    weights: str = "",
    step: int = 0,
    progress: Progress | None = None,
) -> list[Attempt]:
    """Samples, verifies and stores the failures of `examples`; continues an unfinished file.

    Args:
        path: JSON lines file to create or continue.
        rollout: the starting policy with its task.
        examples: in a fixed order; a continued build must be given the same ones.
        attempts_per_example: first answers sampled per example (the paper's k).
        failures_per_example: most wrong answers kept per example; the first ones sampled are kept.
        keep_solved: also keep the first answer to examples that were solved every time.
        weights: name of the weights that answer; a file made with others is refused.
        step: after how many steps of RL the weights are those of the policy; each has other noise.
        progress: called with (examples stored, examples in all) whenever blocks are stored. Also called while
            they are sampled, so that the caller can stop the build.
    Raises:
        MismatchError: `path` was built with other examples, settings or weights, or is damaged.
    """
    path = Path(path)
    settings = {
        "weights": weights,
        **rollout.settings,
        "attempts_per_example": attempts_per_example,
        "failures_per_example": failures_per_example,
        **({"keep_solved": True} if keep_solved else {}),
    }
    done = files.keep_whole_blocks(path) * BLOCK
    if done:
        _check_same(path, examples, settings)

    def report_progress(*_: int) -> None:
        if progress:
            progress(min(done, len(examples)), len(examples))

    right = rollout.is_right
    for start, end in rollout.portions(done, len(examples), block=BLOCK, rows_each=attempts_per_example):
        report_progress()
        part = examples[start:end]
        attempts = rollout.attempts(
            part, stage="failures", step=step, count=attempts_per_example, progress=report_progress
        )
        per_example = [
            attempts[i * attempts_per_example : (i + 1) * attempts_per_example] for i in range(len(part))
        ]
        blocks = []
        for first in range(0, len(part), BLOCK):
            block, groups = part[first : first + BLOCK], per_example[first : first + BLOCK]
            kept = [a for group in groups for a in _kept(group, right, failures_per_example, keep_solved)]
            counts = _summary((start + first) // BLOCK, block, groups, right)
            blocks.append(([_to_json(attempt) for attempt in kept], {**counts, "settings": settings}))
        files.append_blocks(path, blocks)
        done = end
    report_progress()
    return load(path)


def load(path: str | os.PathLike[str]) -> list[Attempt]:
    """The failures in a file, finished or not, in the order of their examples."""
    try:
        return [_from_json(line) for line in files.records(Path(path), FAILURE)]
    except files.MismatchError:
        raise
    except ValueError as error:  # of a Verdict
        raise files.MismatchError(f"{path}: {error}") from error


def check_ids(path: Path, pool: Sequence[Attempt], chat: Chat, vocab_size: int) -> None:
    """Raises MismatchError if a failure has ids that the model cannot have seen or sampled."""
    for attempt in pool:
        ids, reason = attempt.turn.ids, attempt.turn.finish_reason
        known = all(0 <= token < vocab_size for token in (*attempt.prompt_ids, *ids))
        closed = reason == "length" or (reason == "stop" and ids and ids[-1] in chat.stop_token_ids)
        if not (known and closed and attempt.prompt_ids):
            raise files.MismatchError(
                f"{path}: the attempt at {attempt.example.id} was not made with this model: delete the file"
            )


def file_of(folder: Path, step: int) -> Path:
    """The failures of a run's policy after `step` steps; 0: those that RL begins with."""
    return folder / (f"failures-{step:06d}.jsonl" if step else "failures.jsonl")


def forget_after(folder: Path, step: int) -> None:
    """Deletes what policies after later steps have left: a resumed run takes these steps again."""
    if distributed.is_main():
        for path in folder.glob("failures-*.jsonl"):
            number = path.stem.removeprefix("failures-")
            if number.isdecimal() and int(number) > step:
                files.delete(path)
    distributed.barrier()


def check_whole(path: Path, num_examples: int) -> None:
    """Raises MismatchError if a collection of a policy that is gone is not there as a whole."""
    blocks = files.keep_whole_blocks(path)
    if blocks < -(-num_examples // BLOCK):
        raise files.MismatchError(
            f"{path} must have the failures of {num_examples} examples, got {blocks} blocks of {BLOCK} "
            "examples, and the policy that failed is gone: restore the file, or start a new run"
        )


def of_step(pool: Sequence[Attempt], step: int, count: int, seed: int, collected: int = 0) -> list[Attempt]:
    """The `count` failures of a step of RL; steps count from 1. Each pass over the pool has a new order.

    A function of its arguments alone, so a step that is redone gets the same failures.

    Args:
        collected: the step after which the pool was collected; the first pass begins with the next one.
    """
    first = (step - 1 - collected) * count
    places = (divmod(position, len(pool)) for position in range(first, first + count))
    return [pool[_order(seed, collected, epoch, len(pool))[index]] for epoch, index in places]


@lru_cache(maxsize=2)  # the steps of an epoch share one; a step in which an epoch ends needs two
def _order(seed: int, collected: int, epoch: int, size: int) -> list[int]:
    name = f"failures {seed} {epoch}" + (f" {collected}" if collected else "")
    return random.Random(name).sample(range(size), size)


def refresh_metrics(counts: dict[str, Any]) -> dict[str, float]:
    """What a collection during RL shows: share of right attempts, and examples with a failure."""
    return {
        "failures/right": counts["right"] / counts["attempts"],
        "failures/num_failed": float(counts["failed"]),
    }


def summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Counts over all blocks: examples tried, solved (every time, hence dropped) and failed; reasons."""
    total: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    reasons: Counter[str] = Counter()
    for line in files.read_jsonl(Path(path), _shape):
        if "block" in line:
            for name in total:
                total[name] += line[name]
            reasons.update(line["reasons"])
    return {**total, "reasons": dict(reasons.most_common())}


def _shape(line: dict[str, Any]) -> dict[str, Any]:
    return END if "block" in line else FAILURE


def describe(counts: dict[str, Any]) -> str:
    """One paragraph for the console."""
    wrong = {reason: n for reason, n in counts["reasons"].items() if reason != "ok"}
    why = ", ".join(f"{reason} {n}" for reason, n in wrong.items()) or "none"
    return (
        f"{counts['examples']} examples, {counts['attempts']} attempts, {counts['right']} of them right; "
        f"{counts['solved']} examples solved every time and dropped, {counts['failed']} with a failure. "
        f"Why wrong: {why}." + ("" if counts["right"] else NONE_RIGHT)
    )


def check_trainable(counts: dict[str, Any]) -> None:
    """Raises `NoSignalError` if no example failed, because then there is nothing to reflect on."""
    if counts["failed"] == 0:
        raise NoSignalError(
            f"no failures found in {counts['examples']} examples: the task is too easy for this model. "
            "Make it harder (task_options), or raise attempts_per_example or num_examples"
        )


def _kept(attempts: list[Attempt], right: Right, most: int, keep_solved: bool) -> list[Attempt]:
    wrong = [attempt for attempt in attempts if not right(attempt.verdict)][:most]
    return wrong or (attempts[:1] if keep_solved else [])


def _summary(
    number: int, block: Sequence[Example], per_example: list[list[Attempt]], right: Right
) -> dict[str, Any]:
    attempts = [attempt for group in per_example for attempt in group]
    solved = sum(all(right(attempt.verdict) for attempt in group) for group in per_example)
    return {
        "block": number,
        "first": block[0].id,
        "last": block[-1].id,
        "examples": len(block),
        "solved": solved,
        "failed": len(block) - solved,
        "attempts": len(attempts),
        "right": sum(right(attempt.verdict) for attempt in attempts),
        # An answer whose score makes it right is "ok" here, whatever its reason.
        "reasons": dict(Counter(_reason(attempt.verdict, right) for attempt in attempts)),
    }


def _reason(verdict: Verdict, right: Right) -> str:
    return "ok" if right(verdict) else verdict.reason


def _to_json(attempt: Attempt) -> dict[str, Any]:
    return {
        "example": asdict(attempt.example),
        "generation": attempt.generation,
        "prompt_ids": attempt.prompt_ids,
        "attempt_ids": attempt.turn.ids,
        "finish_reason": attempt.turn.finish_reason,
        "text": attempt.text,
        **attempt.verdict.to_json(),
    }


def _from_json(line: dict[str, Any]) -> Attempt:
    turn = Turn(line["attempt_ids"], [0.0] * len(line["attempt_ids"]), line["finish_reason"])
    verdict = Verdict(line["reason"], line.get("score"))
    example = Example(**{name: line["example"][name] for name in FAILURE["example"]})
    return Attempt(example, line["prompt_ids"], turn, line["text"], verdict, line["generation"])


def _check_same(path: Path, examples: Sequence[Example], settings: dict[str, Any]) -> None:
    for line in files.read_jsonl(path, _shape):
        if "block" in line:
            before = line["settings"]
            names = dict.fromkeys([*settings, *before])
            changed = [name for name in names if before.get(name) != settings.get(name)]
            if changed:
                came = ", ".join(
                    f"{name}: {before.get(name, 'not recorded')} -> {settings.get(name)}" for name in changed
                )
                raise files.MismatchError(
                    f"{path} was built with other settings ({came}): write a new file, or delete this one"
                )
            block = examples[line["block"] * BLOCK :][:BLOCK]
            built_from = (line["first"], line["last"], line["examples"])
            if not block or (block[0].id, block[-1].id, len(block)) != built_from:
                raise files.MismatchError(
                    f"{path} was built from other examples (its block {line['block']} begins with "
                    f"{line['first']}): write a new file, or use that build's task, seed and num_examples"
                )


@distributed.joined()
def main(argv: list[str] | None = None) -> int:
    """`python -m grpo.failures --output FILE [--KEY VALUE ...]`: the first stage of train.py on its own.

    With torchrun, all ranks sample.
    """
    import argparse

    from grpo import config as configuration
    from grpo.run import build, inputs
    from grpo.run.progress import Bar

    parser = argparse.ArgumentParser(
        prog="python -m grpo.failures",
        description="Samples a model's first answers, verifies them, and stores the wrong ones. Takes every "
        "option of train.py (see `python train.py --help`), such as num_examples, attempts_per_example and "
        "failures_per_example.",
    )
    parser.add_argument("--output", required=True, help="JSON lines file to create or to continue")
    options, rest = parser.parse_known_args(argv)
    try:
        with Interrupts():
            try:
                # No reflection is sampled here: the preset's overlong_buffer must not bound its length.
                with distributed.agreement():
                    config = configuration.parse(["--overlong_buffer", "0", *rest])
                if config.preset == configuration.MODEL_PRESET:
                    print(configuration.preset_line(config))
                parts = build.parts(config)
                only_attempts = replace(
                    config, train_on="attempt", warm_start_steps=0, eval_steps=0, num_eval=0
                )
                with distributed.agreement():
                    build.check_run(only_attempts, parts)
                    examples = parts.task.examples("train", config.num_examples)
                inputs.check_ranks(parts, examples)
            except (
                ValueError,
                FileNotFoundError,
            ) as error:  # one raised later is a bug, perhaps in the task
                print(f"error: {error}", file=sys.stderr)
                return 2
            with Bar("failures", len(examples), "example") as bar:
                collect(
                    options.output,
                    parts.rollout,
                    examples,
                    attempts_per_example=config.attempts_per_example,
                    failures_per_example=config.failures_per_example,
                    keep_solved=not config.only_failures,
                    weights=config.model_name_or_path,
                    progress=lambda done, _: bar.update(done),
                )
    except files.MismatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, TaskError, distributed.RankError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last whole block", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(describe(summary(options.output)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
