"""Runs of train.py that share a start: what the experiments are made of.

A *start* is a run directory with the weights before RL and the dataset of failures; an *arm* is a run from it
with some settings changed. All arms of a seed meet the same failures and the same held-out problems with the
same noise, so they are compared problem by problem. Each arm is a process of its own, `train.py --resume`,
which skips the stages whose results were put into its directory beforehand: so a killed experiment goes on
with the same command, and a crash in one arm says which settings it had.

Left out: arms side by side. On a laptop they would only share the cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo import config as configuration
from grpo.config import Config
from grpo.evaluate.comparison import ModelResult
from grpo.evaluate.measure import records_file
from grpo.run import checkpoint, files
from grpo.run.diagnostics import nothing_right
from grpo.run.metrics import read_jsonl

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
START_FILES = ("warm_start.jsonl", "failures.jsonl")
# What the records of the start depend on, beside its weights. (Were the task another, they would be refused.)
MEASURED_BY = "num_eval eval_temperature max_completion_length max_reflection_length".split()
SAME_RUN = "task task_options device dtype".split()  # and for the records that `--run` left of its own start


class ExperimentError(RuntimeError):
    """An arm failed; its own message stands above on the terminal."""


@dataclass(frozen=True)
class Arm:
    """A finished run. `no_signal`: it was stopped since no retry was right, so it has no evaluation."""

    name: str
    folder: Path
    config: Config

    @property
    def no_signal(self) -> bool:
        return not (self.folder / "evaluation.json").exists()

    def records(self, model: str = "trained") -> list[dict[str, Any]]:
        """What the model (vanilla: before RL) did with each held-out problem."""
        return list(files.records(self.folder / f"evaluation-{model}.jsonl"))

    def checkpoint(self) -> Path:
        """The weights after RL, of an arm that keeps them."""
        found = checkpoint.latest(self.folder)
        assert found is not None
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """A line per step of RL, those of validations and warnings left out."""
        return [line for line in read_jsonl(self.folder / "metrics.jsonl") if "reward" in line]

    def episodes(self) -> Iterator[dict[str, Any]]:
        return files.read_jsonl(self.folder / "episodes.jsonl")

    def seconds(self) -> float:
        """Of RL."""
        return sum(line["step_time"] for line in read_jsonl(self.folder / "timings.jsonl"))

    def sampled_tokens(self) -> int:
        """Of RL: what the policy wrote."""
        return sum(role != "context" for episode in self.episodes() for role in episode["roles"])


def joined(results: Iterable[ModelResult]) -> ModelResult:
    """The records of several seeds one after the other.

    An interval over them treats the seeds' problems as if they were different ones.
    """
    return ModelResult([record for result in results for record in result.records])


def pooled(arms: Sequence[Arm], model: str = "trained") -> ModelResult:
    """The same arm over several seeds."""
    return joined(ModelResult(arm.records(model)) for arm in arms)


class Study:
    """The directory of an experiment and the settings that all of its runs share.

    Args:
        folder: holds one run directory per start and arm.
        config: settings of every run; device and dtype are resolved.
        run: an existing run whose start, failures and seed are used, or None.
    """

    def __init__(self, folder: Path, config: Config, run: Path | None = None):
        self.folder, self.config, self.run = folder, config, run
        self._measured: dict[tuple[Any, ...], Path] = {}
        self._run_config = own = config if run is None else configuration.load(run / "config.yaml")
        same = all(getattr(own, name) == getattr(config, name) for name in SAME_RUN)
        if run is not None and same and (run / "evaluation.json").exists():
            self._measured[_measured_by(run, own.seed, own)] = run

    def start(self, seed: int, name: str = "start", **changes: Any) -> Path:
        """A run directory with `start/` and `failures.jsonl`: `run` if it has these settings, or else made
        with one step of RL.
        """
        if self.run is not None and all(getattr(self._run_config, k) == v for k, v in changes.items()):
            return self.run
        config = replace(
            self.config, seed=seed, max_steps=1, num_eval=0, eval_steps=0, groups_per_step=1, **changes
        )
        folder = self._folder(name, seed)
        if checkpoint.steps(folder) != [1]:
            self._prepare(folder, config, None, ())
            _check(folder, _train(folder))
        return folder

    def arm(
        self,
        name: str,
        seed: int,
        *,
        start: Path | None = None,
        share: Sequence[str] = START_FILES,
        keep: bool = False,
        may_lack_signal: bool = False,
        **changes: Any,
    ) -> Arm:
        """Trains and evaluates, or finds that it was done.

        Args:
            start: what it begins from (default: the start of this seed).
            share: files of the start to take over; without failures.jsonl the arm collects its own.
            keep: keep the weights once they are evaluated; with the demo's model an arm takes some 2 GB.
            may_lack_signal: a run that is stopped since no retry was right is a result too.
            changes: settings that differ from those of the study.
        Raises:
            ExperimentError: the run failed.
        """
        begin = start or self.start(seed)
        folder = self._folder(name, seed)
        config = replace(self.config, seed=seed, **changes)
        config = replace(config, warm_start_steps=0, model_name_or_path=str((folder / "start").absolute()))
        arm = Arm(name, folder, config)
        key = _measured_by(begin, seed, config)
        if not (folder / "evaluation.json").exists():
            self._prepare(folder, config, begin, share)
            if (before := self._measured.get(key)) is not None:
                copy(before / "evaluation-vanilla.jsonl", folder)
            if not (may_lack_signal and _lacks_signal(folder)):
                status = _train(folder)
                if not (may_lack_signal and _lacks_signal(folder)):
                    _check(folder, status)
        if not arm.no_signal:
            self._measured.setdefault(key, folder)
        if not keep:
            files.delete(folder / "checkpoints")
        return arm

    def _folder(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-seed{seed}"

    def _prepare(self, folder: Path, config: Config, start: Path | None, share: Sequence[str]) -> None:
        """The run directory as if the run had been stopped after its first stages; config.yaml comes last."""
        configuration.validate(config)
        written = folder / "config.yaml"
        if written.exists():
            if changed := configuration.differences(configuration.load(written), config):
                raise ValueError(f"{folder} was begun with other settings: {'; '.join(changed)}")
            return
        files.delete(folder)
        folder.mkdir(parents=True)
        if start is not None:
            shutil.copytree(start / "start", folder / "start", copy_function=link)
            for file in share:
                copy(start / file, folder)
        with files.written_whole(written) as path:
            configuration.to_yaml(config, path)


def _measured_by(start: Path, seed: int, config: Config) -> tuple[Any, ...]:
    return (start, seed, *(str(getattr(config, setting)) for setting in MEASURED_BY))


def _train(folder: Path) -> int:
    if not TRAIN.is_file():
        raise ExperimentError(f"{TRAIN} is missing: experiments run train.py, so clone the repository")
    print(f"--- {folder}", flush=True)
    return wait_for([sys.executable, str(TRAIN), "--resume", str(folder)])


def _check(folder: Path, status: int) -> None:
    if status:
        raise ExperimentError(f"{folder} ended with status {status}, its message stands above")


def evaluate(models: Sequence[Path], output: Path, options: Sequence[str]) -> list[ModelResult]:
    """`python -m grpo.evaluate` on the models, whose records stay beside `output`; what each of them did."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        print(f"--- {output}", flush=True)
        command = [
            sys.executable,
            "-m",
            "grpo.evaluate",
            *map(str, models),
            *options,
            "--output",
            str(output),
        ]
        _check(output, wait_for(command))
    labels = json.loads(output.read_text(encoding="utf-8"))["models"]
    return [ModelResult(list(files.records(records_file(output, label)))) for label in labels]


def wait_for(command: Sequence[str]) -> int:
    """Runs a command; a signal is handed on once, so that the command saves its work, and raised again."""
    child = subprocess.Popen(command, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    finally:
        if child.poll() is None:  # a second signal came while it was saving
            child.kill()
            child.wait()


def copy(file: Path, folder: Path) -> None:
    """Copies a file that may be missing."""
    if file.exists():
        shutil.copy(file, folder)


def link(source: str, target: str) -> None:
    """A second name for a file that nobody writes to, or a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _lacks_signal(folder: Path) -> bool:
    return nothing_right(read_jsonl(folder / "metrics.jsonl")) is not None
