"""Runs of train.py that share a start: what experiments are made of.

A *start* is a run directory with the weights before RL and the dataset of failures. An *arm* is a run from it
with some settings changed. All arms of a seed meet the same failures and the same held-out problems with the
same noise, so they are compared problem by problem. Each arm is a process of its own, `python -m train
--resume`, which skips the stages whose results are already in its directory. So the same command continues a
killed experiment, and a crash in one arm says which settings it had.

Left out: arms that run at the same time. On a laptop they would only share the cores.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo import config as configuration
from grpo.config import Config, current_file
from grpo.episode import role_runs
from grpo.evaluate.comparison import ModelResult
from grpo.evaluate.measure import RECORD, records_file
from grpo.run import checkpoint, files, reuse
from grpo.run.diagnostics import nothing_right
from grpo.run.metrics import history

TRAIN = Path(__file__).resolve().parents[2] / "train.py"  # next to grpo/, in a checkout and in a wheel
START_FILES = ("warm_start.jsonl", "failures.jsonl")
BEFORE_RL = "evaluation-before_rl.jsonl"
# Settings that the records of the model before RL depend on, besides seed and weights.
MEASURED_BY = (
    "task task_options chat_template device dtype num_eval eval_temperature max_completion_length "
    "max_reflection_length"
).split()


class ExperimentError(RuntimeError):
    """A run failed; its own message is above on the terminal."""


@dataclass(frozen=True)
class Arm:
    """A finished run. With `no_signal` it was stopped because no retry was right, and has no evaluation."""

    name: str
    folder: Path
    config: Config

    @property
    def no_signal(self) -> bool:
        return not (self.folder / "evaluation.json").exists()

    def records(self, model: str = "trained") -> list[dict[str, Any]]:
        """What the model (`before_rl` or `trained`) did with each held-out problem."""
        return list(files.records(current_file(self.folder, f"evaluation-{model}.jsonl"), RECORD))

    def checkpoint(self) -> Path:
        """The weights after RL, if the arm keeps them."""
        last = checkpoint.latest(self.folder)
        assert last is not None
        return last

    def metrics(self) -> list[dict[str, Any]]:
        """A line per step of RL, without those of validations and warnings."""
        return [line for line in history(self.folder) if "reward" in line]

    def episodes(self, shape: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The stored episodes; `shape` (files.misfit) has what the caller reads of them."""
        return files.read_jsonl(current_file(self.folder, "episodes.jsonl.gz"), lambda _: shape)

    def seconds(self) -> float:
        """Seconds of RL."""
        return sum(
            line["step_time"]
            for line in files.read_jsonl(
                self.folder / "timings.jsonl", lambda _: {"step_time": float}, missing_ok=True
            )
        )

    def sampled_tokens(self) -> int:
        """Tokens that the policy sampled during RL."""
        return sum(
            tokens
            for episode in self.episodes({"roles": list})
            for role, tokens in role_runs(episode["roles"])
            if role != "context"
        )


def joined(results: Iterable[ModelResult]) -> ModelResult:
    """The records of several seeds in one result.

    An interval over them treats the seeds' problems as if they were different ones.
    """
    return ModelResult([record for result in results for record in result.records])


def pooled(arms: Sequence[Arm], model: str = "trained") -> ModelResult:
    """The records of the same arm over several seeds."""
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
        self._run_config = config if run is None else configuration.load(run / "config.yaml")
        # What records of the model before RL depend on, and the run directory that has them.
        self._measured: dict[tuple[Any, ...], Path] = {}
        if run is not None and _has_records(run):
            self._measured[_measured_by(run, self._run_config.seed, self._run_config)] = run

    def start(self, seed: int, name: str = "start", **changes: Any) -> Path:
        """A run directory with `start/` and `failures.jsonl`.

        It is `run` if that has these settings. Otherwise it is made, with one step of RL.
        """
        if self.run is not None and all(getattr(self._run_config, k) == v for k, v in changes.items()):
            return self.run
        config = replace(
            self.config, seed=seed, max_steps=1, num_eval=0, eval_steps=0, groups_per_step=1, **changes
        )
        folder = self._folder(name, seed)
        if checkpoint.steps(folder) != [1]:
            self._prepare(folder, config, None, ())
            _check(folder, start_train(folder))
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
        """Trains and evaluates, unless that is already done.

        Args:
            start: what the arm begins from (default: the start of this seed).
            share: files of the start to copy; without failures.jsonl the arm collects its own.
            keep: keep the weights after the evaluation; an arm of the demo's model takes some 2 GB.
            may_lack_signal: accept a run that was stopped because no retry was right.
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
            if key in self._measured:
                copy(self._measured[key] / BEFORE_RL, folder)
            if not (may_lack_signal and _lacks_signal(folder)):
                status = start_train(folder)
                if not (may_lack_signal and _lacks_signal(folder)):
                    _check(folder, status)
        if _has_records(folder):
            self._measured.setdefault(key, folder)
        if not keep:
            files.delete(folder / "checkpoints")
        return arm

    def _folder(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-seed{seed}"

    def _prepare(self, folder: Path, config: Config, start: Path | None, share: Sequence[str]) -> None:
        """Makes the directory of a run that was stopped after its first stages; config.yaml comes last."""
        configuration.validate(config)
        written = folder / "config.yaml"
        if written.exists():
            if changed := configuration.differences(configuration.load(written), config):
                raise ValueError(f"{folder} was begun with other settings: {'; '.join(changed)}")
            return
        files.delete(folder)
        folder.mkdir(parents=True)
        if start is not None:
            shutil.copytree(start / "start", folder / "start", copy_function=reuse.link)
            for file in share:
                copy(start / file, folder)
        with files.written_whole(written) as path:
            configuration.to_yaml(config, path)


def _measured_by(start: Path, seed: int, config: Config) -> tuple[Any, ...]:
    return (start, seed, *(str(getattr(config, setting)) for setting in MEASURED_BY))


def _has_records(run: Path) -> bool:
    """Whether the run has all records of the model before RL, and not version 0.1's, which lack settings."""
    return (run / "evaluation.json").exists() and (run / BEFORE_RL).exists()


def _lacks_signal(folder: Path) -> bool:
    if not (folder / "config.yaml").exists():
        return False
    config = configuration.load(folder / "config.yaml")
    problem = nothing_right(
        history(folder),
        episodes_per_step=config.groups_per_step * config.num_generations,
        limit=config.max_wrong_episodes,
    )
    return problem is not None


# --- processes ----------------------------------------------------------------------------------------------


def start_train(folder: Path) -> int:
    """Continues the run in `folder` with `python -m train`; returns its exit status.

    Raises:
        ExperimentError: Python would run another train.py, such as one in the working directory.
    """
    spec = importlib.util.find_spec("train")
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != TRAIN:
        where = None if spec is None else spec.origin
        raise ExperimentError(
            f"the module train must be {TRAIN}, got {where}: run the command in another directory"
        )
    print(f"--- {folder}", flush=True)
    return wait_for([sys.executable, "-m", "train", "--resume", str(folder)])


def evaluate(models: Sequence[Path], output: Path, options: Sequence[str]) -> list[ModelResult]:
    """What each model did, from `python -m grpo.evaluate`, which leaves the records next to `output`."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        print(f"--- {output}", flush=True)
        command = [sys.executable, "-m", "grpo.evaluate", *map(str, models), *options]
        _check(output, wait_for([*command, "--output", str(output)]))
    labels = files.read_json(output, {"models": dict})["models"]
    return [ModelResult(list(files.records(records_file(output, label), RECORD))) for label in labels]


def _check(output: Path, status: int) -> None:
    if status:
        raise ExperimentError(f"{output} ended with status {status}; its message is above")


def wait_for(command: Sequence[str]) -> int:
    """Runs a command. A signal is passed on once, so that the command saves its work, and then raised."""
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
    """Copies a file, if it is there."""
    if file.exists():
        shutil.copy(file, folder)
