"""Writes the report: one HTML file that shows what runs learned, by how much, and what the model wrote.

data.py reads the run directories, tokens.py and curves.py prepare two parts, page.html.jinja is the page.
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
import json
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from grpo.config import Config
from grpo.episode import ROLES_TRAINED
from grpo.evaluate.comparison import STAGES
from grpo.evaluate.table import figure_rows
from grpo.report import curves, tokens
from grpo.report.data import DAMAGED, NAMES, Place, Point, Run, episodes, mapping, number, read_run

PAGE_BYTES = 20_000_000  # most of a page, which the limits below keep
GROUP_BYTES = 14_000_000  # most of it for groups
MOST_GROUPS = 400  # on a page
MOST_EPISODES = 16  # of a group
MOST_RUNS = 12
LONGEST_TEXT = 5_000  # characters of anything that is shown
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
    names = [folder.resolve().name for folder in folders]
    distinct = len(set(names)) == len(names)
    runs = [read_run(f, name if distinct else str(f)) for f, name in zip(folders, names, strict=True)]
    text = render(runs)
    with files.written_whole(output) as path:
        path.write_text(text, encoding="utf-8")
    return [note for run in runs for note in run.notes]


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


# --- text -----------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Text as a page may show it: cut, with control, bidi and unpaired surrogate characters spelled out.

    Bidi characters would reorder the page's own words around the text. UTF-8 has no unpaired surrogates.
    """
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} [... {len(text) - LONGEST_TEXT:,} more characters]"
    if text.replace("\n", "").isprintable():  # nearly always, and much faster
        return text
    return "".join(c if _shown(c) else f"\\u{ord(c):04x}" for c in text)


def _shown(character: str) -> bool:
    return character in "\n\t\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")


def shown(value: Any) -> str:
    """A setting's value as JSON, strings as they are."""
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def percent(value: Any) -> str:
    return "-" if (share := number(value)) is None else f"{100 * share:.1f}%"


def interval(value: Any) -> str:
    """[low, high] of a share or a difference, in percent or percentage points."""
    low, high = (number(mapping(value).get(end)) for end in ("low", "high"))
    if low is None or high is None:
        return ""
    return f"[{100 * low:.1f}, {100 * high:.1f}]".replace("-", "\u2212")


def points(value: Any) -> str:
    mean = number(mapping(value).get("mean"))
    return "-" if mean is None else f"{100 * mean:+.1f}".replace("-", "\u2212")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- the result -----------------------------------------------------------------------------------------


def result(run: Run) -> dict[str, Any]:
    """Did it learn, by how much, with which interval: {verdict, sentence, change, columns, rows, detail}."""
    try:
        if (measured := _measured(run)) is not None:
            return measured
    except DAMAGED as error:
        run.notes.append(f"evaluation.json is not as expected: {type(error).__name__}: {error}")
    return _so_far(run)


def _measured(run: Run) -> dict[str, Any] | None:
    """By the evaluation on held-out problems; None if it has no model before and after RL."""
    report = run.evaluation or {}
    wanted = {"before": "before_rl", "after": "trained"}
    comparison = next((c for c in report.get("comparisons", ()) if wanted.items() <= c.items()), None)
    if comparison is None:
        return None
    before, after = (report["models"][label] for label in wanted.values())
    change = comparison["second_try"]
    low, high = number(change["low"]), number(change["high"])
    if low is None or high is None:
        return None
    verdict = "up" if low > 0 else "down" if high < 0 else "unclear"
    words = {
        "up": "It learned: RL raised the second try by",
        "down": "It got worse: RL lowered the second try by",
        "unclear": "No clear change: RL moved the second try by",
    }
    labels = {
        "first_try": "First try",
        "second_try": "Second try",
        "retry_success": "Retry after a reflection",
    }
    rows = [(label, before[name], after[name], comparison[name]) for name, label in labels.items()]
    for name, difference in comparison["controls"].items():
        control = [model["controls"].get(name, {}).get("success") for model in (before, after)]
        if difference is not None or any(control):
            rows.append((f"{name.capitalize()} retry (control)", *control, difference))
    return {
        "verdict": verdict,
        "sentence": words[verdict],
        "change": f"{points(change)} points {interval(change)}",
        "detail": f"{report['num_problems']} held-out problems, before and after RL. Brackets are 95% "
        "intervals over the problems; other seeds vary too. A second try is right if the first try or the "
        "retry is.",
        "rows": [
            (label, *(_share(side) for side in sides), (points(diff), interval(diff)))
            for label, *sides, diff in rows[:NAMES]
        ],
        "columns": ("before RL", "after RL", "points"),
    }


def _share(share: Any) -> tuple[str, str]:
    return (percent(share["mean"]), interval(share)) if isinstance(share, dict) else ("-", "")


def _so_far(run: Run) -> dict[str, Any]:
    """By the validations, or by the reward, of a run that was not evaluated."""
    validated = [point for point in run.validations if "validation/second_try" in point]
    base = {"verdict": "none", "change": "", "rows": [], "detail": "", "columns": ()}
    if not validated:
        return {**base, "sentence": _by_reward(run)}
    first, last = validated[0], validated[-1]
    labels = {
        "first_try": "First try",
        "second_try": "Second try",
        "retry": "Retry after a reflection",
        "retry_blind": "Blind retry (control)",
    }
    rows = []
    for name, label in labels.items():
        if all(f"validation/{name}" in point for point in (first, last)):
            ends = [_validated(run, point, name) for point in (first, last)]
            difference = last[f"validation/{name}"] - first[f"validation/{name}"]
            rows.append((label, *ends, (points({"mean": difference}), "")))
    old, new = (percent(point["validation/second_try"]) for point in (first, last))
    change = f"In validation the second try went from {old} to {new}"
    return {
        **base,
        "sentence": "Not evaluated yet. "
        + (change if first is not last else f"Validated once: second try {old}"),
        "rows": rows,
        "columns": (f"step {int(first['step'])}", f"step {int(last['step'])}", "points"),
        "detail": f"{run.count('num_validation') or 'An unknown number of'} validation problems. Brackets "
        "are 95% intervals of the shares; the difference has none until the evaluation.",
    }


def _validated(run: Run, point: Point, name: str) -> tuple[str, str]:
    low, high = curves.validation_interval(run, point, name)
    shown_interval = interval({"low": low, "high": high}) if low != high else ""
    return percent(point[f"validation/{name}"]), shown_interval


def _by_reward(run: Run) -> str:
    if not run.steps:
        return "No RL step yet"
    first, last = (
        f"{point['reward']:.3f} at step {int(point['step'])}" for point in (run.steps[0], run.steps[-1])
    )
    return f"Not evaluated yet. Reward {first}, {last}"


def stage_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """(stage, how far it is, seconds, memory) in the order of a run."""
    seconds = {stage: (taken, memory) for stage, taken, memory in run.stages}
    done = int(run.warm_start[-1]["step"]) if run.warm_start else 0
    warm = f"{done} of {run.count('warm_start_steps') or '?'} steps"
    counts = run.failures
    failed = f"{counts['failed']} of {counts['examples']} examples failed" if counts else "-"
    progress = {
        "warm start": warm if run.settings.get("warm_start_steps") != 0 else "none",
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


# --- settings and metrics -------------------------------------------------------------------------------


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


# --- groups ---------------------------------------------------------------------------------------------


def groups(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Evenly spaced groups of the runs, as many as fit: {row of the list, json of what opens}."""
    found: list[dict[str, Any]] = []
    for run in runs:
        places = spaced(run.places, MOST_GROUPS // len(runs))
        mine = _groups_of(run, places)
        while sum(len(group["json"]) for group in mine) > GROUP_BYTES // len(runs):
            mine = mine[::2] if len(mine) > 1 else []
        if len(mine) < run.groups:
            run.notes.append(f"The page has {len(mine)} of {run.groups} groups, evenly spaced.")
        found += mine
    for index, group in enumerate(found):
        group["key"] = f"group-{index}"
    return found


def spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` evenly spaced items, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _groups_of(run: Run, places: Sequence[Place]) -> list[dict[str, Any]]:
    train_on = run.settings.get("train_on", "reflection")
    trained = ROLES_TRAINED.get(train_on if isinstance(train_on, str) else "", frozenset({"reflection"}))
    tokenizer = tokens.load_tokenizer(run.folder) if places else None
    if places and tokenizer is None:
        run.notes.append("No tokenizer.json in the run: whole turns are coloured, by their mean log-prob.")
    found = []
    total = 0
    for place in places:
        if total > 4 * GROUP_BYTES:  # enough to choose from
            break
        try:
            group = _group(run, place, trained, tokenizer)
        except DAMAGED as error:
            run.notes.append(f"A group of step {place.step} is damaged: {type(error).__name__}: {error}")
            continue
        if group is not None:
            total += len(group["json"])
            found.append(group)
    return found


def _group(
    run: Run, place: Place, trained: frozenset[str], tokenizer: tokens.Tokenizer | None
) -> dict[str, Any] | None:
    records = episodes(run, place, MOST_EPISODES)
    if not records:
        return None
    shown_episodes = [_episode(record, trained, tokenizer) for record in records]
    rewards = [number(record.get("reward")) for record in records]
    right = sum(episode["right"] for episode in shown_episodes)
    texts = mapping(records[0].get("texts"))
    prompt = str(texts.get("prompt", ""))
    shown_episodes.sort(key=lambda episode: -(episode["advantage"] or 0.0))
    content: dict[str, Any] = {
        "example": str(records[0].get("example_id", "")),
        "prompt": prompt,
        "attempt": str(texts.get("attempt", "")) if "reflection" in texts else "",
        "episodes": shown_episodes,
        "left_out": place.episodes - len(records),
    }
    verdict = "all right" if right == len(records) else "some right" if right else "none right"
    reasons = {visible(reason) for episode in shown_episodes for reason in episode["reasons"]}
    return {
        "run": run.name,
        "step": place.step,
        "prompt": visible((prompt or content["example"])[:200]),
        "right": right,
        "of": len(records),
        "verdict": verdict,
        "signal": len(set(rewards)) > 1,
        "dots": "".join("●" if episode["right"] else "○" for episode in shown_episodes),
        "reasons": sorted(reasons),
        "json": script_json(_visible_in(content)),
    }


def _episode(
    record: dict[str, Any], trained: frozenset[str], tokenizer: tokens.Tokenizer | None
) -> dict[str, Any]:
    reasons = [str(reason) for reason in record.get("reasons") or []][:MOST_EPISODES]
    texts = mapping(record.get("texts"))
    return {
        "generation": number(record.get("generation")),
        "reward": number(record.get("reward")),
        "advantage": number(record.get("advantage")),
        "right": bool(reasons) and reasons[0] == "ok",
        "reasons": reasons,
        "cut": "length" in (record.get("finish_reason"), record.get("retry_finish_reason")),
        "turns": tokens.turns(record, trained, tokenizer),
        "retries": str(texts.get("retry", "")) if len(reasons) > 1 else "",
    }


def _visible_in(value: Any) -> Any:
    """`visible` for every string in it."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [_visible_in(item) for item in value]
    return {key: _visible_in(item) for key, item in value.items()} if isinstance(value, dict) else value


def script_json(value: Any) -> Markup:
    """JSON that may stand in a <script>: no `</`, `<!--` or line end of JavaScript is left in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


# --- the page -------------------------------------------------------------------------------------------


def render(runs: Sequence[Run]) -> str:
    """The page of these runs. Adds to their notes what it leaves out."""
    with_curves = curves.available()
    drawn = curves.charts(runs) if with_curves else []
    shown_groups = groups(runs)
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
