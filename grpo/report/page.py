"""Writes the report: one HTML file that shows what runs learned, by how much, and what the model wrote.

data.py reads the run directories; result.py, curves.py and groups.py (with tokens.py) prepare the parts;
page.html.jinja is the page.
Everything in it that a model or a user wrote is escaped, control characters are spelled out, and the page's
Content-Security-Policy allows its own script only. Groups are JSON in the page, which page.js shows when they
are opened, so that a page of many megabytes opens at once.

Left out: a server, and charts that react to the mouse.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from grpo.config import Config
from grpo.evaluate.comparison import STAGES
from grpo.evaluate.table import figure_rows
from grpo.report import curves
from grpo.report.data import DAMAGED, NAMES, Run, number, read_run
from grpo.report.groups import groups
from grpo.report.result import result
from grpo.report.text import duration, percent, shown, visible

PAGE_BYTES = 20_000_000  # most of a page
GROUP_BYTES = 14_000_000  # most of it for groups
MOST_RUNS = 12
SHARE = 0.02  # of a run's time that its report may take
FILE = "report.html"
HERE = Path(__file__).parent


def write_report(folders: Sequence[Path], output: Path) -> list[str]:
    """Reads the runs and writes their page, whole or not at all.

    Returns:
        what the page lacks, as it says itself.
    Raises:
        ValueError: a folder is no run directory, or there are too many.
        RunDirError: the page cannot be written.
    """
    from grpo.run import files

    folders = list({folder.resolve(): folder for folder in folders}.values())  # each run once
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"RUN must be 1 to {MOST_RUNS} run directories, got {len(folders)}")
    names = distinct_names(folders)
    for group_bytes in (GROUP_BYTES, GROUP_BYTES // 4, 0):
        runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
        text = render(runs, group_bytes)
        if len(text.encode()) <= PAGE_BYTES:
            break
    else:
        raise ValueError(
            f"the page must have at most {PAGE_BYTES} bytes, got {len(text.encode())}: name fewer runs"
        )
    with files.written_whole(output) as path:
        path.write_text(text, encoding="utf-8")
    return [note for run in runs for note in run.notes]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as make them differ."""
    paths = [folder.resolve() for folder in folders]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


class LiveReport:
    """The report of a run while it trains. It never takes more than SHARE of the time, nor ends the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.due = 0.0  # time.monotonic() from which a new page is worth its time

    def refresh(self) -> str:
        """Writes the page if it is due. Returns a line for the console if that failed, else ""."""
        if (start := time.monotonic()) < self.due:
            return ""
        problem = self.write()
        self.due = time.monotonic() + (time.monotonic() - start) / SHARE
        return problem

    def write(self) -> str:
        """Writes the page now. Returns a line for the console if that failed, else ""."""
        try:
            write_report([self.folder], self.folder / FILE)
        except Exception as error:  # whatever it is, the run is worth more than its report
            return f"warning: {FILE} was not written: {type(error).__name__}: {error}"
        return ""


# --- tables ----------------------------------------------------------------------------------------------


def stage_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """(stage, how far it is, seconds, memory) in the order of a run."""
    seconds = {stage: (taken, memory) for stage, taken, memory in run.stages}
    done = int(run.warm_start[-1]["step"]) if run.warm_start else 0
    warm = f"{done} of {run.count('warm_start_steps') or '?'} steps"
    source = f", from {run.start_from}" if run.start_from else ""
    counts = run.failures
    failed = f"{counts['failed']} of {counts['examples']} examples failed{source}" if counts else "-"
    progress = {
        "warm start": warm + source if run.settings.get("warm_start_steps") != 0 else "none",
        "failures": failed,
        "training": f"{run.num_steps} of {run.count('max_steps') or '?'} steps",
        "evaluation": "done" if run.evaluation else "-",
    }
    rows = []
    for stage in [*progress, *(name for name in seconds if name not in progress)]:
        taken, memory = seconds.get(stage, (None, None))
        rows.append(
            (
                stage,
                progress.get(stage, ""),
                "-" if taken is None else duration(taken),
                "-" if memory is None else f"{memory:.1f} GB",
            )
        )
    return rows


def final_table(run: Run) -> dict[str, Any] | None:
    """The table that ended the run: {models, rows, reasons}."""
    if run.evaluation is None:
        return None
    try:
        models = run.evaluation["models"]
        reasons: Counter[str] = Counter()
        for model in models.values():
            for turn in ("first", "retry"):
                reasons.update(
                    {name: number(x) or 0 for name, x in model["reasons_of_failure"][turn].items()}
                )
        return {
            "models": [(label, STAGES.get(label, "")) for label in models],
            "rows": [(label.strip(), cells) for label, cells in figure_rows(models)][:NAMES],
            "reasons": [
                (
                    name,
                    [
                        tuple(
                            percent(model["reasons_of_failure"][turn].get(name, 0))
                            for turn in ("first", "retry")
                        )
                        for model in models.values()
                    ],
                )
                for name, _ in reasons.most_common(NAMES)
            ],
        }
    except DAMAGED as error:
        run.notes.append(f"The final table cannot be shown: {type(error).__name__}: {error}")
        return None


def setting_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each setting: {name, help, values (one per run), preset, changed (from it), differs (between runs)}."""
    helps = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(Config)}
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    rows = []
    for name in names:
        values = [shown(run.settings[name]) if name in run.settings else "-" for run in runs]
        presets = [shown(run.preset[name]) if name in run.preset else "" for run in runs]
        changed = [
            name in run.preset and name in run.settings and run.settings[name] != run.preset[name]
            and run.preset[name] != "auto"
            for run in runs
        ]  # fmt: skip
        rows.append(
            {
                "name": name,
                "help": helps.get(name, ""),
                "values": values,
                "preset": presets[0] if len(set(presets)) == 1 else "",
                "changed": changed,
                "differs": len(set(values)) > 1,
            }
        )
    return rows


def metric_rows(run: Run) -> list[tuple[str, ...]]:
    """(name, first, last, least, most) of every metric of metrics.jsonl and timings.jsonl."""
    values: dict[str, list[float]] = {}
    for point in [*run.steps, *run.validations, *run.parts]:
        for name, value in point.items():
            if name != "step" and (name in values or len(values) < NAMES):
                values.setdefault(name, []).append(value)
    return [
        (name, *(f"{x:.4g}" for x in (ys[0], ys[-1], min(ys), max(ys))))
        for name, ys in sorted(values.items())
    ]


def render(runs: Sequence[Run], group_bytes: int = GROUP_BYTES) -> str:
    """The page of these runs. Adds to their notes what it leaves out."""
    with_curves = curves.available()
    drawn = curves.charts(runs) if with_curves else []
    shown_groups = groups(runs, group_bytes)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template("page.html.jinja").render(
        runs=[{"data": run, "result": result(run), "table": final_table(run), "stages": stage_rows(run),
               "metrics": metric_rows(run)} for run in runs],
        settings=setting_rows(runs),
        charts=[(chart, Markup(curves.svg(chart, f"chart-{i}"))) for i, chart in enumerate(drawn)],
        with_curves=with_curves,
        groups=shown_groups,
        reasons=sorted({reason for group in shown_groups for reason in group["reasons"]})[:NAMES],
        steps=sorted({group["step"] for group in shown_groups}),
        colours=curves.COLOURS,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
    )  # fmt: skip


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _finalize(value: Any) -> Any:
    """Of every expression of the template: strings are made visible, and then escaped by jinja2."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
