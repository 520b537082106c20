"""The options of `python -m grpo.evaluate`: which weights under which name, and with which settings.

A run directory stands for three models, as in the table that ends a run: the source as it came (`untouched`),
`start/` (`vanilla`, right before RL) and the last checkpoint (`trained`). Anything else is one model. The
models may be of any size and family. Left out: another task or decoding per model: nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo.run.interrupts import EXIT_INTERRUPTED, Interrupts, set_up_process

if __name__ == "__main__":
    set_up_process()  # before the imports below, which take seconds

from tqdm import tqdm

from grpo import config as configuration
from grpo.config import Config
from grpo.evaluate.comparison import CONTROLS, ModelResult, report
from grpo.evaluate.measure import measure, records_file
from grpo.evaluate.table import table
from grpo.model.weights import HUB_ID
from grpo.run import build, checkpoint, files


@dataclass(frozen=True)
class Source:
    """One model to measure: its name in the table, the path for `weights.load`, and the run it comes from."""

    label: str
    path: str
    run: Path | None = None

    def identity(self) -> str:
        """Changes when the weights on disk do, without reading them: path, size and time of each file."""
        path = Path(self.path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        stats = [(file.name, file.stat()) for file in files]
        return " ".join([self.path, *(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)])


def parser() -> argparse.ArgumentParser:
    """Options of the command itself; the settings of train.py are what it leaves over."""
    command = argparse.ArgumentParser(
        prog="python -m grpo.evaluate",
        usage="python -m grpo.evaluate CHECKPOINT... [options below] [--KEY VALUE ...]",
        description="Measures models on the same problems and compares the others with the first, paired "
        "problem by problem: first try, second try after a reflection, controls, answer leakage, reasons of "
        "failure, examples.",
        epilog="--KEY VALUE is a setting of train.py (see `python train.py --help`), like --task, --seed, "
        "--max_reflection_length. A checkpoint inside a run directory takes its settings from the run's "
        "config.yaml, others from the preset (--preset, --config). Name the checkpoints before all options. "
        "Exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.",
        allow_abbrev=False,
    )
    command.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="HF folder, file.gguf, package:NAME/file.gguf or Hub id. A run directory stands for three "
        "models: untouched (the source), vanilla (start/, right before RL) and trained (the last checkpoint)",
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
        help="write all figures to FILE (JSON), and each model's records beside it (FILE's name, "
        "-MODEL.jsonl), from which an interrupted evaluation goes on",
    )
    return command


def resolve(arguments: Sequence[str]) -> list[Source]:
    """The models that the arguments name, each label once.

    Raises:
        ValueError: an argument is none of HF folder, run directory, GGUF file, package file or Hub id.
    """
    return _distinct([source for argument in arguments for source in _expand(argument)])


def settings(sources: Sequence[Source], own: argparse.Namespace, rest: Sequence[str]) -> Config:
    """What to measure with: the first run's config.yaml or the preset, then what the command line says.

    Raises:
        ValueError: an unknown or unfitting option, or options that contradict each other.
    """
    argv = list(rest)
    run = next((source.run for source in sources if source.run), None)
    named = {text.partition("=")[0] for text in argv}
    if run is not None and not named & {"--config", "--preset"}:
        argv = ["--config", str(run / "config.yaml"), *argv]
    argv = ["--overlong_buffer", "0", *argv]  # of training: it must not bound the reflections measured here
    if own.greedy and own.eval_temperature:
        raise ValueError(
            f"greedy and eval_temperature={own.eval_temperature} contradict each other: give one of them"
        )
    if not 0 < own.top_p <= 1:
        raise ValueError(f"top_p must lie above 0 and at most at 1, got {own.top_p}")
    if own.top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {own.top_k}")
    for name, value in (
        ("num_eval", own.num_eval),
        ("eval_temperature", 0.0 if own.greedy else own.eval_temperature),
    ):
        if value is not None:
            argv += [f"--{name}", str(value)]
    config = configuration.parse(argv)
    if config.num_eval < 1:
        raise ValueError(f"num_eval must be at least 1, got {config.num_eval}")
    return config


def _expand(argument: str) -> list[Source]:
    path = Path(argument)
    if (path / "config.json").is_file():
        return [Source(path.resolve().name, str(path), _run_of(path))]
    if (path / "config.yaml").is_file():
        return _models_of_run(path)
    if path.is_dir():
        inside = sorted(
            str(found.parent) for found in [*path.glob("*/config.yaml"), *path.glob("*/config.json")]
        )
        hint = f"; did you mean {' or '.join(inside[:3])}?" if inside else ""
        raise ValueError(
            "CHECKPOINT must be an HF folder (with config.json) or a run directory (with config.yaml), "
            f"got the folder {argument} without either{hint}"
        )
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"CHECKPOINT must be a folder or a .gguf file, got the file {argument}")
    if path.is_file() or argument.startswith("package:"):
        return [Source(Path(argument).stem, argument)]
    # A Hub id has one slash and its first part is no folder here: else it is a path with a slip in it.
    if HUB_ID.fullmatch(argument) and not Path(argument.split("/")[0]).exists():
        return [Source(argument, argument)]
    parent = path.parent
    near = sorted(str(entry) for entry in parent.glob("[!.]*/"))[:5]
    hint = f"; in {parent} there are: {', '.join(near)}" if near else ""
    raise ValueError(f"CHECKPOINT {argument!r} does not exist{hint}")


def _run_of(folder: Path) -> Path | None:
    """The run directory of RUN/start or RUN/checkpoints/step-000001, if it is one of these."""
    above = folder.resolve().parent
    run = above.parent if above.name == "checkpoints" else above
    return run if (run / "config.yaml").is_file() else None


def _models_of_run(run: Path) -> list[Source]:
    """The stages of a run, as far as it has come."""
    config = configuration.load(run / "config.yaml")
    start, last = run / "start", checkpoint.latest(run)
    sources = [Source("untouched", config.model_name_or_path, run)]
    if (start / "config.json").is_file():
        # Without a warm start the model right before RL is the untouched one: no need to measure it twice.
        vanilla = Source("vanilla", str(start), run)
        sources = [*sources, vanilla] if config.warm_start_steps else [vanilla]
    return sources + ([Source("trained", str(last), run)] if last else [])


def _distinct(sources: Sequence[Source]) -> list[Source]:
    """Where a label repeats, the run or the folder above comes before it; a model named twice is numbered."""
    count = Counter(source.label for source in sources)
    seen: Counter[str] = Counter()
    distinct = []
    for source in sources:
        label = source.label
        if count[label] > 1:
            label = f"{(source.run or Path(source.path).parent).resolve().name}/{label}"
        seen[label] += 1
        distinct.append(replace(source, label=label if seen[label] == 1 else f"{label}#{seen[label]}"))
    return distinct


# --- the command --------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """`python -m grpo.evaluate CHECKPOINT... [--KEY VALUE ...]`."""
    own, rest = parser().parse_known_args(argv)
    try:
        with Interrupts():
            found = resolve(own.checkpoints)
            config = settings(found, own, rest)
            if own.output and Path(own.output).is_dir():
                raise ValueError(f"output must be a file, got the folder {own.output}")
            results = {source.label: _measure_source(source, config, own) for source in found}
        figures = report(results)
        if own.output:
            with files.written_whole(Path(own.output)) as path:
                path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (checkpoint.CheckpointError, files.RunDirError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; the same command goes on after the last whole block" if own.output else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(table(figures))
    return 0


def _measure_source(source: Any, config: Any, own: argparse.Namespace) -> ModelResult:
    """Loads one model and measures it. The next is loaded when this one is gone: one model in memory."""
    built = build.parts(config, model_source=source.path)
    built.sampler.top_p, built.sampler.top_k = own.top_p, own.top_k
    store = None
    if own.output:
        store = records_file(Path(own.output), source.label)
    examples = built.task.examples(own.split, config.num_eval)
    with (
        build.evaluation_sampling(built),
        tqdm(total=len(examples), desc=source.label, unit="problem") as bar,
    ):
        return measure(
            built.rollout,
            examples,
            controls=own.controls,
            store=store,
            identity=source.identity(),
            progress=lambda done, _: bar.update(done - bar.n),
        )


if __name__ == "__main__":
    sys.exit(main())
