"""`python -m grpo.experiments NAME`: the questions that the paper leaves open, each as one command.

Every experiment makes runs of train.py from one start (grpo/experiments/study.py) and leaves a table, a plot
and a JSON file in its directory. The defaults are small, one seed and few steps: each experiment takes at
most an hour on two cores.

Left out: several machines, and a search over settings.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from grpo.run.interrupts import EXIT_INTERRUPTED, Interrupts, set_up_process

if __name__ == "__main__":
    set_up_process()  # before the imports below, which take seconds

from grpo import config as configuration
from grpo.experiments.study import ExperimentError, Study
from grpo.run import build, files

NAMES = "verifier pilot ablation length lora transfer threshold first_try robustness retention".split()
# Small defaults of all experiments. Those of one experiment, then the command line, override them.
DEFAULTS = {"eval_steps": 0, "save_steps": 0}
COMMAND_FILE = "experiment.json"  # the options that the directory was begun with


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m grpo.experiments",
        description=__doc__.split("\n\n", 2)[1],
        epilog="--KEY VALUE is a setting of train.py for all runs (see `python train.py --help`), such as "
        "--max_steps or --threads. The same command again continues what was stopped. Longer lists of seeds, "
        "rates and the like extend a finished experiment. "
        "Exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.",
        allow_abbrev=False,
    )
    names = command.add_subparsers(dest="name", metavar="NAME", required=True)
    for name in NAMES:
        module = importlib.import_module(f"grpo.experiments.{name}")
        experiment = names.add_parser(
            name,
            help=module.QUESTION,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        experiment.add_argument(
            "--output", type=Path, metavar="DIR", help=f"directory (default: runs/experiment-{name})"
        )
        experiment.add_argument(
            "--seeds", type=int, nargs="+", metavar="N", help="seeds (default: the seed of the settings)"
        )
        experiment.add_argument(
            "--run",
            type=Path,
            metavar="RUN_DIR",
            help="begin with the settings, the weights before RL and the failures of this run",
        )
        module.add_options(experiment)
    return command


def study_config(
    options: argparse.Namespace, rest: list[str], defaults: dict[str, Any]
) -> configuration.Config:
    """The run's config.yaml or the preset, then the experiment's defaults, then the command line.

    Device and dtype are resolved here, so that all runs have the same.
    """
    argv = [] if options.run is None else ["--config", str(options.run / "config.yaml")]
    argv += [text for name, value in {**DEFAULTS, **defaults}.items() for text in (f"--{name}", str(value))]
    config = configuration.parse([*argv, *rest])
    if config.resume is not None:
        raise ValueError("resume must be left out: the same command continues what it began")
    config.config = None
    config.device = build.set_up_device(config.device, deterministic=config.deterministic)
    config.dtype = build.choose_dtype(config.dtype, config.device)
    return config


def claim_directory(folder: Path, options: argparse.Namespace, rest: list[str]) -> None:
    """Stores the options of this command in `folder`. A list, such as --seeds, may get longer later.

    Raises:
        ValueError: the directory belongs to a command with other options.
    """
    asked: dict[str, Any] = {
        name: value if isinstance(value, list) else str(value)
        for name, value in sorted(vars(options).items())
        if name != "output"
    }
    asked["settings"] = " ".join(rest)
    file = folder / COMMAND_FILE
    if file.exists():
        before = files.read_json(file, {str: (None, str, [(int, float, str)])})
        names = dict.fromkeys([*before, *asked])
        pairs = {name: (before.get(name), asked.get(name)) for name in names}
        if changed := [f"{name}: {a} -> {b}" for name, (a, b) in pairs.items() if not _extends(a, b)]:
            raise ValueError(
                f"output {folder} was begun with other options ({'; '.join(changed)}): choose another"
            )
    with files.written_whole(file) as path:
        path.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")


def _extends(before: Any, now: Any) -> bool:
    """Whether `now` equals `before`, or is a list with all elements of the list `before`."""
    both_lists = isinstance(before, list) and isinstance(now, list)
    return set(before) <= set(now) if both_lists else before == now


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status."""
    options, rest = parser().parse_known_args(argv)
    module = importlib.import_module(f"grpo.experiments.{options.name}")
    folder = options.output or Path("runs") / f"experiment-{options.name}"
    try:
        with Interrupts():
            if options.run is not None and not (options.run / "failures.jsonl").is_file():
                raise ValueError(f"run must be a run directory with failures.jsonl, got {options.run}")
            config = study_config(options, rest, module.DEFAULTS)
            if options.run is not None and options.seeds not in (None, [config.seed]):
                raise ValueError(f"seeds must be the seed of the run, {config.seed}, got {options.seeds}")
            options.seeds = options.seeds or [config.seed]
            claim_directory(folder, options, rest)
            with files.lock(folder):
                outcome = module.run(Study(folder, config, options.run), options)
                written = outcome.write(folder, vars(config))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ExperimentError, files.RunDirError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"\n{outcome.question}\n\n{outcome.table()}\n\nwritten: {', '.join(map(str, written))}")
    if len(written) < 3:
        print("no plot: pip install 'reflect-grpo[experiments]' (matplotlib)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
