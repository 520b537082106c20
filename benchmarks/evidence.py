"""Does the demo really learn to reflect? Seeds, equal-compute controls, and a run of twice the length.

    python benchmarks/evidence.py seeds --seeds 1 2 3   the demo once per seed, 512 held-out problems each
    python benchmarks/evidence.py shuffled RUN          the RL of RUN again, rewards shuffled
    python benchmarks/evidence.py supervised RUN        the warm start of RUN continued for as long as its RL
    python benchmarks/evidence.py longer RUN            the RL of RUN with twice the steps
    python benchmarks/evidence.py longer RUN --steps 16 32 64 --variants plain kl distill refresh
                                                        a run for each number of steps and each variant
    python benchmarks/evidence.py table RUN...          tries and gains of runs, with paired 95% intervals
    python benchmarks/evidence.py curve RUN...          the second tries of the first RUN by step, as an SVG

Variants of `longer` differ from RUN in one setting: plain in none, kl in a KL penalty of 0.04, distill in
distill_retries 1, refresh in refresh_failures 8. With `--steps` or `--variants`, a run validates 120 problems
every 8 steps, for `curve`. The same command skips what is finished and continues what was stopped.

The three controls begin from the weights in RUN/start and meet the same problems with the same noise as RUN:
nothing differs but what is claimed. `seeds`, `longer` and the controls leave a run directory each; a run of
`seeds` or `longer` that was stopped continues with `python train.py --resume RUN`. `seeds` takes the options
of train.py as well (`--KEY VALUE`). `table` writes evidence.json next to the first run.

`curve` writes second_try.svg, or what `--svg` names. It needs runs with validation (`--eval_steps 2
--num_validation 120`) and matplotlib. The first run's second, first and blind second tries are drawn with 95%
intervals, and of each other run, such as a control, the second tries.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # train.py is next to this folder

import train  # noqa: E402
from grpo import config as configuration  # noqa: E402
from grpo import warmstart  # noqa: E402
from grpo.episode import Episode  # noqa: E402
from grpo.evaluate.comparison import ModelResult, read_report  # noqa: E402
from grpo.evaluate.statistics import wilson_interval  # noqa: E402
from grpo.experiments.outcome import difference  # noqa: E402
from grpo.rollout import Attempt  # noqa: E402
from grpo.run import files  # noqa: E402
from grpo.run.progress import Bar  # noqa: E402
from grpo.run.state import SECOND_TRY, RunState  # noqa: E402
from grpo.tasks import WarmStartTask  # noqa: E402

NUM_EVAL = 512
CURVE = ("--eval_steps", "8", "--num_validation", "120")
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "kl": ("--beta", "0.04"),
    "distill": ("--distill_retries", "1"),
    "refresh": ("--refresh_failures", "8"),
}
BLIND = "second try, retry without the reflection"
Stages = Callable[[RunState], None]


def without_untouched(run: RunState) -> None:
    """A whole run, but for the untouched model in its table: it solves nothing, at length."""
    train.warm_start(run)
    train.train(run, train.collect_failures(run))
    models = train.compared_models(run)
    models.pop("untouched", None)
    train.evaluate(run, models)


def shuffled_rewards(run: RunState) -> None:
    """The same RL, but chance decides who gets which reward: what practice and noise alone give."""

    def sample(run: RunState, groups: Sequence[Attempt], step: int) -> list[Episode]:
        episodes = train.sample_episodes(run, groups, step)
        rewards = [episode.reward for episode in episodes]
        random.Random(f"shuffled rewards {run.config.seed} {step}").shuffle(rewards)
        return [replace(episode, reward=reward) for episode, reward in zip(episodes, rewards, strict=True)]

    train.warm_start(run)
    train.train(run, train.collect_failures(run), sample)
    train.evaluate(run)


def more_supervision(run: RunState, seconds: float) -> None:
    """The warm start, continued for `seconds` at a constant learning rate, in the place of RL."""
    train.warm_start(run)
    config, task = run.config, run.parts.task
    assert isinstance(task, WarmStartTask)
    learner = run.learner(replace(config, beta=0.0))
    batch = warmstart.by_step(task, run.parts.chat, config)
    start, step = time.perf_counter(), 0
    with Bar("supervised", round(seconds), "second") as bar:
        while time.perf_counter() - start < seconds:
            run.interrupts.check()
            unseen = batch(step=1_000_000 + step)  # transcripts that the warm start has not seen
            result = learner.supervised_step(unseen, 0.5 * config.warm_start_learning_rate)
            step += 1
            files.append_jsonl(run.folder / "warm_start.jsonl", {"step": step, **result})
            bar.update(round(time.perf_counter() - start))
    run.save(learner, run.folder, step)
    run.finish_saving()
    train.evaluate(run)


def control(stages: Stages) -> Stages:
    """`stages` in a directory that `train.py --resume` does not take for a run of its own before they end."""

    def hidden(run: RunState) -> None:
        settings = run.folder / "config.yaml"
        settings.rename(run.folder / "control.yaml")
        stages(run)
        (run.folder / "control.yaml").rename(settings)

    return hidden


def continue_run(run: Path, name: str, stages: Stages, *options: str) -> tuple[int, Path | None]:
    """Runs `stages` from RUN/start with the settings of RUN, in a new run directory next to it.

    Returns:
        the exit status, and the directory if it came to that.
    """
    folder: Path | None = None

    def from_run(state: RunState) -> None:
        nonlocal folder
        folder = state.folder
        # The weights before RL are the same, and so would be their answers.
        for file in ("failures.jsonl", "evaluation-before_rl.jsonl"):
            source = configuration.current_file(run, file)
            if source.exists() and not (folder / file).exists():  # not every run was evaluated
                shutil.copy(source, folder / file)
        stages(state)

    argv = ["--config", str(run / "config.yaml"), "--model_name_or_path", str(run / "start")]
    argv += ["--warm_start_steps", "0", "--output_dir", str(run.parent), "--run_name", name, *options]
    return train.main(argv, from_run), folder


def longer(run: Path, steps: int, variant: str) -> tuple[int, Path | None]:
    """The RL of RUN with so many steps and the settings of a variant, unless that is finished."""
    name = f"{run.name}-longer-{variant}_{steps}"
    for folder in sorted(run.parent.glob(f"{name}-[0-9]*")):
        if (folder / "evaluation.json").exists():
            return 0, folder
    options = ("--max_steps", str(steps), *CURVE, *VARIANTS[variant], "--resume", configuration.AUTO)
    return continue_run(run, name, train.all_stages, *options)


def rl_seconds(run: Path) -> float:
    return sum(line["step_time"] for line in files.read_jsonl(run / "timings.jsonl"))


def row(run: Path) -> dict[str, Any]:
    """The figures of one finished run that the table shows: shares, and differences with their intervals."""
    figures = read_report(run / "evaluation.json")
    config = configuration.load(run / "config.yaml")
    before, after = figures["models"]["before_rl"], figures["models"]["trained"]
    gain = next(c for c in figures["comparisons"] if (c["before"], c["after"]) == ("before_rl", "trained"))
    return {
        "run": run.name,
        "seed": config.seed,
        "steps": config.max_steps,
        "problems": figures["num_problems"],
        "before": before,
        "after": after,
        "gain": gain,
    }


def percent(share: dict[str, float]) -> str:
    """A share or a difference with its 95% interval, in percent."""
    return f"{100 * share['mean']:5.1f} [{100 * share['low']:5.1f}, {100 * share['high']:5.1f}]"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per run; then, over the runs, the mean gain of the second try."""
    columns = ["run", "seed", "1st before", "2nd before", "1st after", "2nd after", "gain of 2nd"]
    columns += ["retry - blind", "retry - shuffled", "retry - blanked", "length", "truncated"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for result in rows:
        before, after = result["before"], result["after"]
        cells = [result["run"], str(result["seed"])]
        for figures in (before, after):
            cells += [percent(figures["first_try"]), percent(figures["second_try"])]
        cells.append(percent(result["gain"]["second_try"]))
        for name in ("blind", "shuffled", "blanked"):
            control = after["controls"].get(name)
            cells.append(percent(control["retry_minus_control"]) if control else "-")
        for key, scale, unit in (("reflection_mean_length", 1, ""), ("reflection_truncated", 100, "%")):
            cells.append(f"{scale * before[key]:.0f}{unit} -> {scale * after[key]:.0f}{unit}")
        lines.append("| " + " | ".join(cells) + " |")
    mean = sum(result["gain"]["second_try"]["mean"] for result in rows) / len(rows)
    lines.append(f"\nmean gain of the second try over {len(rows)} runs: {100 * mean:.1f} points")
    return "\n".join(lines)


def against(run: Path, other: Path) -> str:
    """The second try after the RL of `run` minus that after the RL of `other`, on the same problems."""
    after, before = (
        ModelResult(list(files.records(folder / "evaluation-trained.jsonl"))) for folder in (run, other)
    )
    if after.ids != before.ids:
        raise ValueError(f"{run} and {other} were evaluated on different problems")
    return f"second try of {run.name} minus that of {other.name}: {percent(difference(after, before))}"


def validations(run: Path) -> list[dict[str, float]]:
    """The validation lines of a run: its tries by step, with that of a retry without reflection."""
    lines = [line for line in files.read_jsonl(run / "metrics.jsonl") if SECOND_TRY in line]
    if not lines:
        raise ValueError(
            f"{run} must have validated (eval_steps above 0), got no {SECOND_TRY} in its metrics"
        )
    tries = []
    for line in lines:
        first, blind = line["validation/first_try"], line["validation/retry_blind"]
        shares = {"second try": line[SECOND_TRY], "first try": first}
        tries.append({"step": line["step"], **shares, BLIND: first + (1 - first) * blind})
    return tries


def curve(runs: Sequence[Path], svg: Path) -> None:
    """Draws the tries of the first run, and the second tries of the others, by step of RL."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "reflect-grpo"  # the same runs give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    config = configuration.load(runs[0] / "config.yaml")
    lines = {name: (runs[0], name) for name in ("second try", BLIND, "first try")}
    lines |= {f"second try, control: {run.name.split('-')[-2]}": (run, "second try") for run in runs[1:]}
    figure, panel = pyplot.subplots(figsize=(7, 3.4))
    for label, (run, name) in lines.items():
        points = validations(run)
        steps, shares = [point["step"] for point in points], [point[name] for point in points]
        count = configuration.load(run / "config.yaml").num_validation
        intervals = [wilson_interval(round(share * count), count) for share in shares]
        errors = [
            [100 * abs(share - end[side]) for share, end in zip(shares, intervals, strict=True)]
            for side in (1, 2)
        ]
        panel.errorbar(
            steps, [100 * share for share in shares], yerr=errors, marker="o", capsize=2, label=label
        )
    panel.set(xlabel="step of RL", ylabel="problems solved, percent", ylim=(0, 100))
    panel.set_title(
        f"{config.num_validation} validation problems of the demo, seed {config.seed}", fontsize=9
    )
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper left", ncols=2)
    figure.tight_layout()
    with files.written_whole(svg) as path:
        figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/evidence.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="?", choices="seeds shuffled supervised longer table curve".split())
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="finished run directories")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: %(default)s)")
    parser.add_argument("--steps", nargs="+", type=int, help="of longer (default: twice those of RUN)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="of longer (default: plain)")
    parser.add_argument("--svg", type=Path, default=Path("second_try.svg"), help="(default: %(default)s)")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.what is None:  # `make bench` runs every script; this one takes hours, so it has to be asked
        parser.print_help()
        return 0
    if arguments.what == "seeds":
        for seed in arguments.seeds:
            name = ["--run_name", f"seed{seed}", "--seed", str(seed), "--num_eval", str(NUM_EVAL)]
            if code := train.main([*name, *rest], without_untouched):
                return code
        return 0
    if rest or not arguments.runs:
        parser.error(f"{arguments.what} takes run directories and no other options, got {rest or 'none'}")
    if arguments.what == "table":
        rows = [row(run) for run in arguments.runs]
        print(table(rows))
        (arguments.runs[0].parent / "evidence.json").write_text(
            json.dumps(rows, indent=2) + "\n", encoding="utf-8"
        )
        return 0
    if arguments.what == "curve":
        curve(arguments.runs, arguments.svg)
        return 0
    if arguments.what == "longer" and (arguments.steps or arguments.variants):
        for run in arguments.runs:
            rows = []
            twice = 2 * configuration.load(run / "config.yaml").max_steps
            for steps in arguments.steps or [twice]:
                for variant in arguments.variants or ["plain"]:
                    code, folder = longer(run, steps, variant)
                    if code or folder is None:
                        return code or 1
                    rows.append(row(folder))
            print(table(rows))
        return 0
    for run in arguments.runs:
        if arguments.what == "shuffled":
            code, folder = continue_run(run, f"{run.name}-shuffled", control(shuffled_rewards))
        elif arguments.what == "supervised":
            stages = partial(more_supervision, seconds=rl_seconds(run))
            code, folder = continue_run(run, f"{run.name}-supervised", control(stages))
        else:
            steps = str(2 * configuration.load(run / "config.yaml").max_steps)
            name = f"{run.name}-longer"
            code, folder = continue_run(run, name, train.all_stages, "--max_steps", steps)
        if code or folder is None:
            return code or 1
        if (folder / "evaluation.json").exists():
            print(table([row(folder)]), against(folder, run), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
