"""Second-try success against wall-clock: our RL, and the same RL in TRL, from the same weights and failures.

    python benchmarks/learning.py runs/demo-001 --trl_python PATH       TRL in an environment of its own
    python benchmarks/learning.py runs/seed1-001 runs/seed2-001 runs/seed3-001 --trl_python PATH
    python benchmarks/learning.py runs/demo-001 --trainers ours         without TRL

Each RUN is a finished run of train.py. Both trainers begin with RUN/start and meet the failures of RUN in the
same order, with its settings and for the same number of steps. In TRL the method is GRPO on the reflections,
with a reward function that samples the retry and judges it (lib/learning_trl.py), and with TRL's own noise.
The clock runs during the steps only: rollout, reward, update. Saved weights are measured afterwards, all by
`python -m grpo.evaluate`, on the same held-out problems with the same noise.

Processes run one after the other; run nothing else at the same time. After a stop the same command continues;
only an unfinished TRL run begins anew. Writes table.md, result.json and, with matplotlib, plot.png to
--output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS))  # which is no package

import evidence  # noqa: E402
from lib.measure import command_line, machine  # noqa: E402

import train  # noqa: E402
from grpo import config as configuration  # noqa: E402
from grpo import failures  # noqa: E402
from grpo.config import Config  # noqa: E402
from grpo.evaluate.comparison import ModelResult, model_figures  # noqa: E402
from grpo.experiments.outcome import ARM_COLUMNS, Column, Outcome, Row, difference  # noqa: E402
from grpo.experiments.study import evaluate, joined  # noqa: E402
from grpo.run import build, checkpoint, files  # noqa: E402
from grpo.tasks import opening  # noqa: E402

QUESTION = "How soon does RL make the second try better, ours and TRL's?"
COLUMNS = {"arm": Column("trainer, step")} | {
    name: ARM_COLUMNS[name] for name in ("seconds", "first_try", "second_try", "gain", "length")
}


@dataclass(frozen=True)
class Curve:
    """What a trainer left: the saved weights by step, and the seconds of RL until then."""

    folders: dict[int, Path]
    seconds: dict[int, float]


def train_ours(run: Path, folder: Path, arguments: argparse.Namespace) -> Curve:
    """RL of train.py; a run that was begun goes on."""
    begun = sorted(folder.glob("ours-*/config.yaml"))
    output: Path | None
    if not begun:
        options = ["--output_dir", str(folder), "--max_steps", str(arguments.max_steps), "--num_eval", "0"]
        options += ["--eval_steps", "0", "--save_steps", str(arguments.save_steps)]
        options += ["--save_total_limit", str(arguments.max_steps)]
        code, output = evidence.continue_run(run, "ours", train.all_stages, *options)
    else:
        output = begun[-1].parent
        done = arguments.max_steps in checkpoint.steps(output)
        code = 0 if done else train.main(["--resume", str(output)])
    if code or output is None:
        raise RuntimeError(f"train.py ended with status {code}")
    times = [line["step_time"] for line in files.read_jsonl(output / "timings.jsonl")]
    saved = (output / "checkpoints").glob("step-*")
    return _curve({checkpoint.step_of(path): path for path in saved}, times)


def train_trl(run: Path, folder: Path, arguments: argparse.Namespace) -> Curve:
    """TRL's trainer in a process of `--trl_python`."""
    output = folder / "trl"
    if not (output / "seconds.json").exists():
        files.delete(output)
        output.mkdir(parents=True)
        config = configuration.load(run / "config.yaml")
        config.max_steps = arguments.max_steps
        job = {
            "root": str(Path(train.__file__).resolve().parent),
            "start": str((run / "start").resolve()),
            "output": str(output.resolve()),
            "save_steps": arguments.save_steps,
            "settings": asdict(config),
            "rows": list(conversations(run, config)),
        }
        job_file = (output / "job.json").resolve()
        job_file.write_text(json.dumps(job), encoding="utf-8")
        command = [str(arguments.trl_python.absolute()), "-m", "lib.learning_trl", str(job_file)]
        subprocess.run(command, cwd=BENCHMARKS, check=True)
    times = json.loads((output / "seconds.json").read_text(encoding="utf-8"))
    folders = {int(path.name.partition("-")[2]): path for path in output.glob("checkpoint-*")}
    return _curve(folders, times)


TRAINERS = {"ours": train_ours, "trl": train_trl}


def _curve(folders: dict[int, Path], times: list[float]) -> Curve:
    elapsed = list(accumulate(times))
    return Curve(dict(sorted(folders.items())), {step: elapsed[step - 1] for step in folders})


def conversations(run: Path, config: Config) -> Iterator[dict[str, Any]]:
    """What is reflected on, step by step as in train.py: messages up to the instruction, and the example."""
    built = build.parts(config, model_source=str(run / "start"))
    task, chat = built.task, built.chat
    pool = failures.load(run / "failures.jsonl")
    for step in range(1, config.max_steps + 1):
        for failure in failures.of_step(pool, step, config.groups_per_step, config.seed):
            begin = opening(task, failure.example, chat)
            if "tools" in begin:
                raise ValueError("the chat template takes tools, which TRL's plain prompts do not pass on")
            messages = [
                *begin["messages"],
                {"role": "assistant", "content": failure.text},
                {"role": "user", "content": task.reflection_instruction},
            ]
            yield {"prompt": messages, "example": json.dumps(asdict(failure.example))}


def measure(
    run: Path, curves: dict[str, Curve], folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The start's result, and (trainer, step) -> result."""
    models = {("start", 0): run / "start"}
    models |= {(name, step): path for name, curve in curves.items() for step, path in curve.folders.items()}
    options = [
        "--config",
        str(run / "config.yaml"),
        "--num_eval",
        str(arguments.num_eval),
        "--controls",
        "blind",
    ]
    results = evaluate(list(models.values()), folder / "evaluation.json", options)
    return dict(zip(models, results, strict=True))


def rows(curves: list[dict[str, Curve]], results: list[dict[Any, ModelResult]]) -> list[Row]:
    """Over all runs: a row for the start and one for each trainer and step, the seconds a mean."""
    before = joined(one["start", 0] for one in results)
    table = []
    for name, step in results[0]:
        after = joined(one[name, step] for one in results)
        times = [curve[name].seconds[step] for curve in curves] if step else [0.0]
        figures = model_figures(after)
        table.append(
            {
                "arm": f"{name}, {step}" if step else name,
                "seconds": sum(times) / len(times),
                "first_try": figures["first_try"],
                "second_try": figures["second_try"],
                "gain": difference(after, before) if step else None,
                "length": figures["reflection_mean_length"],
            }
        )
    return table


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="finished run directories, one per seed")
    add("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="(default: all)")
    add(
        "--trl_python",
        type=Path,
        default=Path(sys.executable),
        help="interpreter that has TRL (default: this)",
    )
    add("--max_steps", type=int, default=0, help="steps of RL; 0: the first run's (default: %(default)s)")
    add("--save_steps", type=int, default=4, help="steps between measured weights (default: %(default)s)")
    add("--num_eval", type=int, default=128, help="held-out problems (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/learning"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.runs:  # `make bench` runs every script; this one takes hours, so it has to be asked
        parser.print_help()
        return 0
    for name, least in (("max_steps", 0), ("save_steps", 1), ("num_eval", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    for run in arguments.runs:
        if not (run / "evaluation.json").is_file():
            parser.error(f"RUN must be a finished run directory, got {run}, which has no evaluation.json")
    arguments.max_steps = (
        arguments.max_steps or configuration.load(arguments.runs[0] / "config.yaml").max_steps
    )
    curves, results = [], []
    for run in arguments.runs:
        folder = arguments.output / run.name
        curves.append({name: TRAINERS[name](run, folder, arguments) for name in arguments.trainers})
        results.append(measure(run, curves[-1], folder, arguments))
    where = machine("cpu")
    notes = [
        f"Runs: {len(arguments.runs)}; seconds are their mean, problems are pooled. {where['device']}, "
        f"threads: {where['threads']}."
    ]
    outcome = Outcome(QUESTION, COLUMNS, rows(curves, results), ("seconds", "second_try"), notes)
    print(outcome.table())
    settings = {name: str(value) for name, value in vars(arguments).items()}
    for path in outcome.write(arguments.output, {**settings, "machine": where}):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
