"""`python -m grpo.interact RUN`: type a problem and watch the model attempt it, reflect and retry.

RUN is a run directory, whose settings then hold (task, chat template, dtype, limits), or any model that
train.py takes, with `--task`. Type a problem, or `next` for one of the task's own. The task judges attempts
at its own problems, and at yours if it can read them (`TypedTask`, such as Countdown); else you judge. A
wrong attempt is followed by a reflection and a retry.

The turns are those of training and evaluation (grpo/rollout.py). Left out: streaming (a turn is shown when it
is done), and problems of several lines.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo.run.interrupts import EXIT_INTERRUPTED, Interrupts, set_up_process

if __name__ == "__main__":
    set_up_process()  # before the imports below, which take seconds

from grpo import config as configuration
from grpo.config import Config
from grpo.evaluate.__main__ import models_of, settings_for
from grpo.evaluate.table import turn_lines
from grpo.rollout import Attempt
from grpo.run import build
from grpo.run.build import Parts
from grpo.run.files import RunDirError
from grpo.run.state import saved_model
from grpo.tasks import SPLITS, Example, Task, TypedTask, Verdict

WIDTH = 96  # columns
LONGEST_FORM = 400  # characters of the problem that shows what problems look like
HELP = "Type a problem. Or: next (a problem of the task), reflect (on the last attempt), quit (also Ctrl-D)."
QUESTION = "The task does not know this problem. Is the answer right? y or n> "
UNKNOWN = "unknown"  # verdict on an answer that nobody can judge

# --- options ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command's own options. Whatever it leaves over is a setting of train.py."""
    command = argparse.ArgumentParser(
        prog="python -m grpo.interact",
        usage="python -m grpo.interact RUN [options below] [--KEY VALUE ...]",
        description="Talk to a model: it attempts the problem that you type, reflects on a wrong attempt "
        "and tries again.",
        epilog="--KEY VALUE is a setting of train.py (see `python train.py --help`), such as --task, --seed "
        "or --max_reflection_length. Settings come from the run's config.yaml, or without a run from the "
        "preset, which is model for any but the demo's model. Exit status: 0 done, 1 failed, 2 wrong "
        "arguments, 130 interrupted.",
        allow_abbrev=False,
    )
    command.add_argument(
        "run",
        metavar="RUN",
        help="run directory; or HF folder, PEFT folder (LoRA), file.gguf, package:NAME/file.gguf or Hub id",
    )
    add = command.add_argument
    add(
        "--checkpoint",
        metavar="WHICH",
        help="of a run directory: best (by validation), newest, start (right before RL) or the number of a "
        "step (default: newest)",
    )
    add("--split", choices=SPLITS, default="heldout", help="where `next` takes problems (default: heldout)")
    add("--index", type=int, metavar="N", help="begin with problem N of the split, counted from 0")
    add("--temperature", type=float, metavar="T", help="sample at T instead of taking the likeliest token")
    return command


def open_model(options: argparse.Namespace, rest: Sequence[str]) -> Parts:
    """Loads the model that RUN names, with the run's settings, else the preset's, and the command line's.

    Raises:
        ValueError, FileNotFoundError: an argument, a setting or a file does not fit.
    """
    folder = Path(options.run)
    run: Path | None = folder
    if (folder / "config.yaml").is_file():
        source = str(saved_model(folder, options.checkpoint or "newest"))
    else:
        if options.checkpoint is not None:
            raise ValueError(
                f"checkpoint must be left out unless RUN is a run directory, got {options.run!r}"
            )
        (model,) = models_of([options.run], "RUN")
        source, run = model.path, model.run
    if options.index is not None and options.index < 0:
        raise ValueError(f"index must be at least 0, got {options.index}")
    temperature = 0.0 if options.temperature is None else options.temperature
    config = settings_for(run, source, [*rest, "--eval_temperature", str(temperature)])
    if run is None and config.preset == configuration.MODEL_PRESET:
        print(configuration.preset_line(config))
    config.train_on = "reflection"  # the turns that follow an attempt here, whatever was trained
    config.warm_start_steps = 0  # nothing is trained
    return build.parts(config, model_source=source)


# --- the conversation ---------------------------------------------------------------------------------------


class Typed:
    """The task's messages around problems that the user types, of which it knows no answer."""

    def __init__(self, task: Task) -> None:
        self.name, self.system = task.name, task.system
        self.reflection_instruction = task.reflection_instruction

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        return []

    def verify(self, example: Example, text: str) -> Verdict:
        return Verdict(UNKNOWN)

    def leaks(self, example: Example, reflection: str) -> bool:
        return False


class Conversation:
    """What was said so far, and the parts that say it.

    Args:
        parts: of the task, for the problems that it knows.
        split: of these problems.
        index: the split's next problem.
    """

    def __init__(self, parts: Parts, split: str, index: int = 0) -> None:
        self.known, self.split, self.index = parts, split, index
        task = Typed(parts.task)
        rollout = build.build_rollout(parts.config, parts.sampler, task, parts.chat)
        self.typed = replace(parts, task=task, rollout=rollout)
        self.last: tuple[Parts, Attempt] | None = None
        self.seen: Counter[str] = Counter()  # how often a turn was sampled: each time with other noise
        self._prompts: dict[str, Example] | None = None

    def next(self) -> None:
        """Attempts the split's next problem, and reflects and retries if the attempt is wrong."""
        try:
            (example,) = self.known.task.examples(self.split, 1, self.index)
        except ValueError as error:  # the task has no more
            print(f"error: {error}")
            return
        show(f"{self.split} {self.index}", example.prompt)
        self.index += 1
        self.attempt(self.known, example)

    def problem(self, text: str) -> None:
        """The same for a problem that the user typed."""
        task = self.known.task
        example = task.typed(text) if isinstance(task, TypedTask) else None
        if example is None:
            example = self._known_prompts().get(_in_one_line(text))
        if example is not None:
            self.attempt(self.known, example)
        else:
            self.attempt(self.typed, Example(f"typed: {text}", text))

    def show_form(self) -> None:
        """Shows what the task's problems look like: other ones are harder for a model that learned these."""
        for example in _up_to(self.known.task, self.split, 1):
            show("problems look like this", example.prompt[:LONGEST_FORM])

    def attempt(self, parts: Parts, example: Example) -> None:
        try:
            build.check_room(parts.config, parts, [example])
        except ValueError as error:  # too long, or with what the tokenizer cannot encode
            print(f"error: {error}")
            return
        with build.evaluation_sampling(parts):
            (attempt,) = parts.rollout.attempts([example], stage="evaluation", step=self._again(example.id))
        self.last = parts, attempt
        right = parts.rollout.is_right(attempt.verdict)
        show("attempt", attempt.text, attempt.turn.finish_reason, attempt.verdict, right)
        if self._wrong_says_user() if parts is self.typed else not right:
            self.reflect()

    def reflect(self) -> None:
        """A reflection on the last attempt, and a retry."""
        if self.last is None:
            print("There is no attempt to reflect on yet.")
            return
        parts, attempt = self.last
        step = self._again(f"{attempt.example.id} reflection")
        with build.evaluation_sampling(parts):
            (episode,) = parts.rollout.reflect_and_retry(
                [attempt], num_generations=1, stage="evaluation", step=step
            )
        show("reflection", episode.texts["reflection"], episode.finish_reason)
        verdict = Verdict(episode.reasons[0], episode.scores[0] if episode.scores else None)
        right = parts.rollout.is_right(verdict)
        show("retry", episode.texts["retry"], episode.retry_finish_reason, verdict, right)

    def _wrong_says_user(self) -> bool:
        while True:
            said = input(QUESTION).strip().lower()
            if said in ("n", "no", "reflect"):
                return True
            if said in ("y", "yes", ""):
                return False

    def _known_prompts(self) -> dict[str, Example]:
        """The task's problems by prompt: as many of each split as a run asks for."""
        if self._prompts is None:
            config, task = self.known.config, self.known.task
            counts = (config.num_examples, config.num_validation, config.num_eval)
            examples = [
                e for split, count in zip(SPLITS, counts, strict=True) for e in _up_to(task, split, count)
            ]
            self._prompts = {_in_one_line(example.prompt): example for example in examples}
        return self._prompts

    def _again(self, name: str) -> int:
        self.seen[name] += 1
        return self.seen[name] - 1


def _in_one_line(text: str) -> str:
    """As it can be typed."""
    return " ".join(text.split())


def _up_to(task: Task, split: str, most: int) -> list[Example]:
    """The first `most` examples of a split, or all if there are fewer: in pieces, the largest first."""
    examples: list[Example] = []
    for size in (1 << power for power in reversed(range(most.bit_length()))):
        with contextlib.suppress(ValueError):  # there are fewer
            if len(examples) + size <= most:
                examples += task.examples(split, size, len(examples))
    return examples


def show(
    label: str, text: str, finish_reason: str = "stop", verdict: Verdict | None = None, right: bool = False
) -> None:
    """Prints one turn."""
    turn: dict[str, Any] = {"text": text, "finish_reason": finish_reason}
    if verdict is not None and verdict.reason != UNKNOWN:
        turn |= verdict.to_json() | {"right": right}
    print("\n".join(turn_lines(label, turn, WIDTH)), flush=True)


def talk(conversation: Conversation) -> None:
    """Reads problems and commands until the input ends (EOFError) or says quit."""
    while (said := input("problem> ").strip()) != "quit":
        if said == "next":
            conversation.next()
        elif said == "reflect":
            conversation.reflect()
        elif said == "help":
            print(HELP)
        elif said:
            conversation.problem(said)


# --- the command --------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status."""
    options, rest = parser().parse_known_args(argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # bytes that are no text, characters that a terminal lacks
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit lines and remember them
    try:
        with Interrupts():
            try:
                parts = open_model(options, rest)
            except (ValueError, FileNotFoundError) as error:  # one raised later is a bug, perhaps in the task
                print(f"error: {error}", file=sys.stderr)
                return 2
            conversation = Conversation(parts, options.split, options.index or 0)
            print(described(options, parts))
            conversation.show_form()
            print(HELP)
            if options.index is not None:
                conversation.next()
            talk(conversation)
    except EOFError:
        print()
    except KeyboardInterrupt:
        print()
        return EXIT_INTERRUPTED
    except (RunDirError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def described(options: argparse.Namespace, parts: Parts) -> str:
    config: Config = parts.config
    sampling = f"temperature {config.eval_temperature:g}" if config.eval_temperature else "greedy"
    return f"{options.run}: {config.task}, {config.dtype} on {config.device}, {sampling}"


if __name__ == "__main__":
    sys.exit(main())
