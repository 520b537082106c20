"""`python -m grpo.evaluate CHECKPOINT...`: measures models on the same problems and prints a comparison.

A run directory means up to three models, as in the table that ends a run: `untouched` (the source),
`before_rl` (start/, right before RL) and `trained` (the last checkpoint). Any other CHECKPOINT is one model.
Models may differ in size and family. Task and decoding are the same for all, so that problems can be paired.
One model is in memory at a time. With --output an interrupted evaluation continues after its last whole
block.

Left out: several models at once.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grpo.run.interrupts import EXIT_INTERRUPTED, Interrupts, set_up_process

if __name__ == "__main__":
    set_up_process()  # before the imports below, which take seconds

from grpo import config as configuration
from grpo import distributed
from grpo.config import Config
from grpo.evaluate.comparison import CONTROLS, ModelResult, report, save
from grpo.evaluate.measure import measure, records_file
from grpo.evaluate.table import table
from grpo.model.weights import HUB_ID, base_of, is_adapter, is_model
from grpo.run import build, checkpoint, files, inputs
from grpo.run.progress import Bar
from grpo.run.state import latest_checkpoint
from grpo.tasks import TaskError
from grpo.tasks.contract import check_task

# --- options ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command's own options. Whatever it leaves over is a setting of train.py."""
    command = argparse.ArgumentParser(
        prog="python -m grpo.evaluate",
        usage="python -m grpo.evaluate CHECKPOINT... [options below] [--KEY VALUE ...]",
        description="Measures models on the same problems and compares each with the first, problem by "
        "problem: first try, second try after a reflection, controls, answer leakage, reasons of failure, "
        "examples.",
        epilog="--KEY VALUE is a setting of train.py (see `python train.py --help`), such as --task, --seed "
        "or --max_reflection_length. A checkpoint inside a run directory takes its settings from the run's "
        "config.yaml, any other from the preset (--preset, --config), which is model unless the first "
        "checkpoint is the demo's model. Name the checkpoints before all options. Exit status: 0 done, "
        "1 failed, 2 wrong arguments, 130 interrupted.",
        allow_abbrev=False,
    )
    command.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="HF folder, PEFT folder (LoRA), file.gguf, package:NAME/file.gguf or Hub id. A run directory "
        "means three models: "
        "untouched (the source), before_rl (start/, right before RL) and trained (the last checkpoint)",
    )
    add = command.add_argument
    default = "(default: the run's or preset's)"
    add("--num_eval", type=int, metavar="N", help=f"problems to measure {default}")
    add("--split", choices=["heldout", "validation"], default="heldout", help="(default: %(default)s)")
    add("--eval_temperature", type=float, metavar="T", help=f"sampling temperature; 0: greedy {default}")
    add("--greedy", action="store_true", help="take the likeliest token; same as --eval_temperature 0")
    add("--top_p", type=float, default=1.0, metavar="P", help="nucleus sampling, 0 < P <= 1 (default: 1)")
    add("--top_k", type=int, default=0, metavar="K", help="sample among the K likeliest; 0: all (default)")
    add(
        "--controls",
        nargs="*",
        choices=CONTROLS,
        default=list(CONTROLS),
        metavar="NAME",
        help=f"retries to compare the real one with, among {', '.join(CONTROLS)} (default: all)",
    )
    add(
        "--output",
        metavar="FILE",
        help="write the report to FILE (JSON) and each model's records next to it (FILE's name, "
        "-MODEL.jsonl); an interrupted evaluation continues from these",
    )
    return command


def settings_for(run: Path | None, model: str, options: Sequence[str]) -> Config:
    """The settings of `run`, or without a run those of the preset for `model`; then the options.

    Raises:
        ValueError: an unknown or unfitting option.
    """
    argv = ["--overlong_buffer", "0"]  # belongs to training: it must not limit the reflections here
    named = {text.partition("=")[0] for text in options}
    if run is None:
        argv += ["--model_name_or_path", model]  # which decides the preset, as for train.py
    elif not named & {"--config", "--preset"}:
        argv += ["--config", str(run / "config.yaml")]
    return configuration.parse([*argv, *options])


def evaluation_config(
    models: Sequence[MeasuredModel], options: argparse.Namespace, rest: Sequence[str]
) -> Config:
    """What to measure with: the first run's config.yaml or the first model's preset, then the command line.

    Args:
        rest: settings of train.py from the command line.
    Raises:
        ValueError: an unknown or unfitting option, or options that contradict each other.
    """
    if options.greedy and options.eval_temperature:
        raise ValueError(
            f"greedy and eval_temperature={options.eval_temperature} contradict each other: give one of them"
        )
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {options.top_p}")
    if options.top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {options.top_k}")
    run = next((model.run for model in models if model.run), None)
    temperature = 0.0 if options.greedy else options.eval_temperature
    more = [
        text
        for name, value in (("num_eval", options.num_eval), ("eval_temperature", temperature))
        if value is not None
        for text in (f"--{name}", str(value))
    ]
    config = settings_for(run, models[0].path, [*rest, *more])
    if config.num_eval < 1:
        raise ValueError(f"num_eval must be at least 1, got {config.num_eval}")
    if run is None and config.preset == configuration.MODEL_PRESET:
        print(configuration.preset_line(config))
    return config


# --- which models -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredModel:
    """A model to measure.

    Args:
        label: its name in the table.
        path: where `grpo.model.weights.load` finds it.
        run: the run directory that it belongs to, if any.
    """

    label: str
    path: str
    run: Path | None = None

    def identity(self) -> str:
        """Path, size and time of each weight file: changes when the weights do, without reading them."""
        path = Path(self.path)
        stored = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        if is_adapter(path) and (base := base_of(path)).is_dir():
            stored += sorted(base.glob("*.safetensors"))
        stats = [(file.name, file.stat()) for file in stored]
        return " ".join([self.path, *(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)])


def models_of(arguments: Sequence[str], name: str = "CHECKPOINT") -> list[MeasuredModel]:
    """The models that the arguments called `name` mean, each under a label of its own.

    Raises:
        ValueError: an argument is none of HF folder, run directory, GGUF file, package file or Hub id.
    """
    models = [model for argument in arguments for model in _models_of_one(argument, name)]
    return _with_distinct_labels(models)


def _models_of_one(argument: str, name: str) -> list[MeasuredModel]:
    path = Path(argument)
    if is_model(path):
        return [MeasuredModel(path.resolve().name, str(path), _run_of(path))]
    if (path / "config.yaml").is_file():
        return _models_of_run(path)
    if path.is_dir():
        names = ("config.yaml", "config.json", "adapter_config.json")
        usable = [file for name in names for file in path.glob(f"*/{name}")]
        inside = sorted(str(file.parent) for file in usable)
        hint = f"; did you mean {' or '.join(inside[:3])}?" if inside else ""
        raise ValueError(
            f"{name} must be an HF folder (with config.json) or a run directory (with config.yaml), "
            f"got the folder {argument} without either{hint}"
        )
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{name} must be a folder or a .gguf file, got the file {argument}")
    if path.is_file() or argument.startswith("package:"):
        return [MeasuredModel(Path(argument).stem, argument)]
    # A Hub id has one slash. If its first part is a folder here, it is a mistyped path instead.
    if HUB_ID.fullmatch(argument) and not Path(argument.split("/")[0]).exists():
        return [MeasuredModel(argument, argument)]
    siblings = sorted(str(entry) for entry in path.parent.glob("[!.]*/"))[:5]
    hint = f"; {path.parent} contains {', '.join(siblings)}" if siblings else ""
    raise ValueError(f"{name} {argument!r} does not exist{hint}")


def _run_of(folder: Path) -> Path | None:
    """The run directory if `folder` is RUN/start or RUN/checkpoints/step-000001."""
    above = folder.resolve().parent
    run = above.parent if above.name == "checkpoints" else above
    return run if (run / "config.yaml").is_file() else None


def _models_of_run(run: Path) -> list[MeasuredModel]:
    """The models that the run has produced so far."""
    config = configuration.load(run / "config.yaml")
    start, last = run / "start", latest_checkpoint(run)
    models = [MeasuredModel("untouched", config.model_name_or_path, run)]
    if (start / "config.json").is_file():
        # Without a warm start the model right before RL is the untouched one: measure it once.
        before_rl = MeasuredModel("before_rl", str(start), run)
        models = [*models, before_rl] if config.warm_start_steps else [before_rl]
    return models + ([MeasuredModel("trained", str(last), run)] if last else [])


def _with_distinct_labels(models: Sequence[MeasuredModel]) -> list[MeasuredModel]:
    """Prefixes a repeated label with its run or parent folder, and numbers a model that is named twice."""
    count = Counter(model.label for model in models)
    seen: Counter[str] = Counter()
    distinct = []
    for model in models:
        label = model.label
        if count[label] > 1:
            label = f"{(model.run or Path(model.path).parent).resolve().name}/{label}"
        seen[label] += 1
        distinct.append(replace(model, label=label if seen[label] == 1 else f"{label}#{seen[label]}"))
    return distinct


# --- the command --------------------------------------------------------------------------------------------


@distributed.joined()
def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status. With torchrun, all ranks measure."""
    options, rest = parser().parse_known_args(argv)
    try:
        with Interrupts():
            with distributed.agreement():
                models = models_of(options.checkpoints)
                config = evaluation_config(models, options, rest)
                if options.output and Path(options.output).is_dir():
                    raise ValueError(f"output must be a file, got the folder {options.output}")
            comparison = report({model.label: _measure(model, config, options) for model in models})
        if options.output:
            distributed.on_main(lambda: save(comparison, Path(options.output)))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (
        checkpoint.CheckpointError,
        files.RunDirError,
        TaskError,
        FloatingPointError,
        OSError,
        distributed.RankError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; the same command continues after the last whole block" if options.output else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(table(comparison))
    return 0


def _measure(model: MeasuredModel, config: Config, options: argparse.Namespace) -> ModelResult:
    """Loads one model, measures it, and lets go of it before the next one is loaded."""
    built = build.parts(config, model_source=model.path)
    built.sampler.top_p, built.sampler.top_k = options.top_p, options.top_k
    with distributed.agreement():
        examples = check_task(built.task, {options.split: {"num_eval": config.num_eval}}, built.chat)
        build.check_room(replace(config, warm_start_steps=0), built, examples)
    inputs.check_ranks(built, examples)
    with (
        build.evaluation_sampling(built),
        Bar(model.label, len(examples), "problem") as bar,
    ):
        try:
            return measure(
                built.rollout,
                examples,
                controls=options.controls,
                store=records_file(Path(options.output), model.label) if options.output else None,
                identity=model.identity(),
                progress=lambda done, _: bar.update(done),
            )
        except files.RunDirError:
            raise
        except ValueError as error:  # no wrong argument but a bug, such as one in a user's task: show where
            raise RuntimeError(f"measuring {model.label} failed") from error


if __name__ == "__main__":
    sys.exit(main())
