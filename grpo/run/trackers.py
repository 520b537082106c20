"""Where the metrics of a run also go: TensorBoard files, wandb, trackio (the setting `report_to`).

A tracker gets the numbers of metrics.jsonl and timings.jsonl, and a table with a few completions per step. A
tracker that fails gets nothing more and is one warning line; the run continues.

Left out: uploading checkpoints, and watching gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import io
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo.config import Config, tracker_names
from grpo.episode import Episode
from grpo.rollout import Attempt

PROJECT = "reflect-grpo"
COLUMNS = ("step", "prompt", "attempt", "reflection", "retry", "reward")
ROWS = 4  # of the table, per step
LONGEST_CELL = 2000  # characters

Row = tuple[int, str, str, str, str, float]


class Tracker(Protocol):
    """One tracker, for one run."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def table(self, step: int, rows: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run directory. The table is Markdown on the tab "Text"."""

    def __init__(self, run_dir: Path, config: Config, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A continued run repeats steps: TensorBoard hides those that it already has.
        self.writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def table(self, step: int, rows: Sequence[Row]) -> None:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        self.writer.add_text("completions", text, step)

    def close(self) -> None:
        self.writer.close()


class _WandbApi:
    """What wandb and trackio have in common: trackio copies wandb's interface."""

    run: Any
    new_table: Any  # the package's class Table

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def table(self, step: int, rows: Sequence[Row]) -> None:
        table = self.new_table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self.run.log({"completions": table}, step=step)


class Wandb(_WandbApi):
    """A run of wandb; its files are in `wandb/` of the run directory. WANDB_MODE=offline uploads nothing."""

    def __init__(self, run_dir: Path, config: Config, first_step: int) -> None:
        import wandb

        self.new_table = wandb.Table
        self.run = wandb.init(
            project=PROJECT,
            name=run_dir.name,
            id=run_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            config=dataclasses.asdict(config),
            # console: else wandb records the terminal. login_timeout: seconds; nobody may be there.
            settings=wandb.Settings(console="off", login_timeout=60),
        )

    def close(self) -> None:
        self.run.finish()


class Trackio(_WandbApi):
    """A run of trackio, in its own folder (TRACKIO_DIR); `trackio show --project reflect-grpo` shows it."""

    def __init__(self, run_dir: Path, config: Config, first_step: int) -> None:
        import trackio

        self.new_table = trackio.Table
        with _quiet():
            self.run = trackio.init(
                project=PROJECT,
                name=run_id(run_dir),
                resume="allow",
                config=dataclasses.asdict(config),
                embed=False,  # no dashboard in a notebook
            )

    def close(self) -> None:
        with _quiet():
            self.run.finish()


# The keys are config.TRACKERS, and the names of the extras in setup.cfg.
KINDS: dict[str, Callable[[Path, Config, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
_MODULES = {"tensorboard": "torch.utils.tensorboard"}  # where the module is not the name


class Trackers:
    """The trackers of a run, of which each may fail without harm.

    Args:
        run_dir: the run's directory, with its config.yaml.
        config: `report_to` names the trackers, which show all settings.
        first_step: the first step that the run will log.
    """

    def __init__(self, run_dir: Path, config: Config, first_step: int = 0) -> None:
        self.open: dict[str, Tracker] = {}
        for name in tracker_names(config.report_to):
            with self._harmless(name):
                self.open[name] = KINDS[name](run_dir, config, first_step)

    def log(self, step: int, numbers: Mapping[str, float | None], prefix: str = "") -> None:
        """Sends the numbers under their names; those that are None (NaN, infinity) are left out."""
        finite = {prefix + name: value for name, value in numbers.items() if value is not None}
        for name, tracker in list(self.open.items()):
            with self._harmless(name):
                tracker.log(step, finite)

    def table(self, step: int, rows: Sequence[Row]) -> None:
        for name, tracker in list(self.open.items()):
            with self._harmless(name):
                tracker.table(step, rows)

    def close(self) -> None:
        """Ends the trackers. A second call does nothing."""
        while self.open:
            name, tracker = self.open.popitem()
            with self._harmless(name):
                tracker.close()

    @contextlib.contextmanager
    def _harmless(self, name: str) -> Any:
        try:
            yield
        except Exception as error:  # a tracker may raise anything: network, disk, login, a bug
            self.open.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"warning: {name} failed and gets nothing more ({reason}); the run continues", flush=True)


def check(config: Config) -> None:
    """Raises ValueError if the package of a tracker cannot be imported."""
    for name in tracker_names(config.report_to):
        try:
            importlib.import_module(_MODULES.get(name, name))
        except ImportError as error:
            raise ValueError(
                f"report_to {name} needs its extra: pip install 'reflect-grpo[{name}]' ({error})"
            ) from None


def completion_rows(step: int, episodes: Sequence[Episode], groups: Sequence[Attempt]) -> list[Row]:
    """The rows of a step's table: the first completion of each of the first groups.

    Args:
        groups: the failed attempt of each group; `group_id` of an episode is an index into them.
    """
    first = [episode for episode in episodes if episode.generation == 0][:ROWS]
    rows = []
    for episode in first:
        group, texts = groups[episode.group_id], episode.texts
        attempt = texts.get("attempt", group.text)  # train_on attempt has new ones, and no reflections
        cells = (group.example.prompt, attempt, texts.get("reflection", ""), texts.get("retry", ""))
        prompt, attempt, reflection, retry = (_shortened(cell) for cell in cells)
        rows.append((step, prompt, attempt, reflection, retry, episode.reward))
    return rows


def run_id(run_dir: Path) -> str:
    """The run's name, and a number that another run of this name has not; the same when it is continued."""
    started = (run_dir / "config.yaml").stat().st_mtime_ns  # state.record_changes keeps it
    identity = f"{platform.node()} {run_dir.resolve()} {started}"
    return f"{run_dir.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + " ..."


def _cell(value: Any) -> str:
    """A cell of a Markdown table, in which a model's text stays text."""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;")):
        text = text.replace(character, entity)
    return "<br>".join(text.splitlines())


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """trackio prints colours even into a file."""
    return contextlib.redirect_stdout(io.StringIO())
