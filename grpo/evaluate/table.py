"""The report of comparison.py as text for a terminal: at most 100 columns, readable without colours.

From top to bottom: the paper's table, what the warm start and the training gave, one line per metric with its
95% interval, reasons of failure, and five problems before and after.

Left out: colours and plots.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from grpo.evaluate.comparison import CONTROLS, STAGES, Figures, before_and_after

LABEL, COLUMN = 28, 24  # characters; three models fit side by side, others go below
MODELS_PER_TABLE = 3
HALF = 48  # characters of each of two columns of text
LONGEST_TEXT = 700  # characters of a model's text that are shown


def table(report: Figures) -> str:
    """The text, without a newline at its end.

    Args:
        report: what `grpo.evaluate.comparison.report` or `.read_report` returns.
    """
    parts = [_headline(report)]
    parts += [_comparison(comparison, report) for comparison in report["comparisons"]]
    names = list(report["models"])
    for start in range(0, len(names), MODELS_PER_TABLE):
        models = {name: report["models"][name] for name in names[start : start + MODELS_PER_TABLE]}
        parts += [_figures(models), _reasons(models)]
    parts.append(_examples(report))
    return "\n\n".join(part for part in parts if part)


# --- the paper's table --------------------------------------------------------------------------------------


def _headline(report: Figures) -> str:
    """Two columns per model: first and second try, in percent."""
    task = report["settings"].get("task", "task")
    title = f"{task}, {report['num_problems']} problems, right answers in percent"
    names = list(report["models"])
    lines = [title]
    if threshold := report["settings"].get("success_threshold"):
        lines.append(f"(right: a score of at least {threshold:g})")
    for start in range(0, len(names), MODELS_PER_TABLE):
        shown = names[start : start + MODELS_PER_TABLE]
        width = max(20, min(COLUMN + 8, 2 + max(len(name) for name in shown)))
        tries = [
            (_percent(report["models"][name]["first_try"]), _percent(report["models"][name]["second_try"]))
            for name in shown
        ]
        lines += [
            "".join(f"{_fit(name, width - 2):>{width}}" for name in shown),
            "".join(f"{'1st try':>{width - 9}}{'2nd try':>9}" for _ in shown),
            "".join(f"{first:>{width - 9}}{second:>9}" for first, second in tries),
        ]
    legend = [
        f"{name}: {STAGES[name]}" + (f", first {count} problems" if (count := _fewer(report, name)) else "")
        for name in names
        if name in STAGES
    ]
    return "\n".join(lines + (["(" + "; ".join(legend) + ")"] if legend else []))


def _fewer(report: Figures, *names: str) -> int:
    """How many problems all of these models were measured on, if fewer than others; else 0."""
    count = min(report["models"][name]["first_try"]["of"] for name in names)
    return count if count < report["num_problems"] else 0


def _comparison(comparison: Figures, report: Figures) -> str:
    """What changed from one model to another, in percentage points."""
    before, after, given_by = (comparison[key] for key in ("before", "after", "given_by"))
    title = f"What {given_by} gave" if given_by else "Difference"
    lines = [f"{title} ({after} minus {before}, percentage points, 95% paired interval)"]
    if count := _fewer(report, before, after):
        lines.append(f"(the first {count} problems only)")
    lines.append(_row("first try", [_points(comparison["first_try"])]))
    lines.append(_row("second try", [_points(comparison["second_try"])]))
    lines.append(_row("retries right", [_points(comparison["retry_success"])]))
    controls = comparison["controls"].items()
    lines += [_row(f"  {name} retry", [_points(change)]) for name, change in controls if change]
    return "\n".join(lines)


# --- one line per metric, one column per model --------------------------------------------------------------


def _figures(models: Mapping[str, Figures]) -> str:
    rows = [("percent [95% interval]", list(models)), *figure_rows(models)]
    return "\n".join(_row(label, cells) for label, cells in rows)


def figure_rows(models: Mapping[str, Figures]) -> list[tuple[str, list[str]]]:
    """(label, a cell per model) of each metric of `models`, which are those of a report."""
    figures = list(models.values())
    rows = [
        ("first try right", [_share(f["first_try"]) for f in figures]),
        ("second try right", [_share(f["second_try"]) for f in figures]),
    ]
    if any("tolerant" in f for f in figures):
        tolerant = [f.get("tolerant", {}) for f in figures]
        rows.append(("first try, tolerant", [_share(shares.get("first_try")) for shares in tolerant]))
        rows.append(("second try, tolerant", [_share(shares.get("second_try")) for shares in tolerant]))
    if any("mean_score" in f for f in figures):
        scores = [f.get("mean_score", {}) for f in figures]
        rows.append(("mean score, first try", [_score(means.get("first_try")) for means in scores]))
        rows.append(("mean score, last try", [_score(means.get("last_try")) for means in scores]))
    rows.append(("gain of the second try", [_points(f["gain_of_second_try"]) for f in figures]))
    rows.append(("retries right", [_share(f["retry_success"]) for f in figures]))
    for name in CONTROLS:
        if any(name in f["controls"] for f in figures):
            control = [f["controls"].get(name, {}) for f in figures]
            rows.append((f"  {name} retry right", [_share(c.get("success")) for c in control]))
            rows.append((f"  retry minus {name}", [_points(c.get("retry_minus_control")) for c in control]))
    truncated = [_plain_percent(f["reflection_truncated"]) for f in figures]
    return [
        *rows,
        ("answer in the reflection", [_share(f["answer_leakage"]) for f in figures]),
        ("reflections cut at the limit", truncated),
        ("mean reflection, tokens", [_number(f["reflection_mean_length"]) for f in figures]),
        ("first tries wrong, problems", [str(f["num_failures"]) for f in figures]),
    ]


def _reasons(models: Mapping[str, Figures]) -> str:
    """Shares of the wrong tries by reason, first try and retry, per model."""
    by_model = {name: model["reasons_of_failure"] for name, model in models.items()}
    total: dict[str, float] = {}
    for by_turn in by_model.values():
        for by_reason in by_turn.values():
            for reason, share in by_reason.items():
                total[reason] = total.get(reason, 0.0) + share
    if not total:
        return ""
    lines = [_row("why wrong, percent of wrong", list(models)), _row("", ["1st try   retry"] * len(models))]
    for reason in sorted(total, key=lambda reason: -total[reason]):
        shares = [
            [_plain_percent(reasons[turn].get(reason, 0.0)) for turn in ("first", "retry")]
            for reasons in by_model.values()
        ]
        lines.append(_row(reason, [f"{first:>7}{retry:>8}" for first, retry in shares]))
    return "\n".join(lines)


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:<{LABEL}}" + "".join(f"{_fit(cell, COLUMN - 1):>{COLUMN}}" for cell in cells)


def _fit(text: str, width: int) -> str:
    """Cuts the beginning: the end of a long name says more, as in runs/demo-001/checkpoints/step-000050."""
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def _percent(share: Mapping[str, Any] | None) -> str:
    return "-" if share is None else _plain_percent(share["mean"])


def _plain_percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(share: Mapping[str, Any] | None) -> str:
    return (
        "-"
        if share is None
        else f"{100 * share['mean']:.1f} [{100 * share['low']:5.1f}, {100 * share['high']:5.1f}]"
    )


def _points(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "-"
    return f"{100 * interval['mean']:+.1f} [{100 * interval['low']:+5.1f}, {100 * interval['high']:+5.1f}]"


# --- examples -----------------------------------------------------------------------------------------------


def _examples(report: Figures) -> str:
    """Problems whose first try failed before training, with both models' conversations side by side."""
    if not report["examples"]:
        return ""
    before, after = before_and_after(list(report["models"]))
    names = [before] if before == after else [before, after]
    title = f"{len(report['examples'])} problems that {before} got wrong at first"
    if before != after:
        title += f", beginning with those that {after} got wrong too"
    sides = [side for side, _ in zip(("before", "after"), names, strict=False)]
    return "\n\n".join([title, *[_example(example, names, sides) for example in report["examples"]]])


def _example(example: Figures, names: Sequence[str], sides: Sequence[str]) -> str:
    width = HALF if len(sides) == 2 else 2 * HALF
    lines = [f"--- {example['id']} ".ljust(2 * HALF + 3, "-"), *_wrapped(_cut(example["prompt"]), 2 * HALF)]
    cells = [[f"[{_fit(name, width - 2)}]"] for name in names]
    lines += _side_by_side(cells, width)
    for turn, label in (("first", "first try"), ("reflection", "reflection"), ("retry", "second try")):
        cells = [_turn(label, example[side][turn], width) for side in sides]
        if any(cells):
            lines += _side_by_side(cells, width)
    return "\n".join(lines)


def _turn(label: str, turn: Mapping[str, Any] | None, width: int) -> list[str]:
    if turn is None:
        return []
    return turn_lines(label, {**turn, "text": _cut(turn["text"])}, width)


def turn_lines(label: str, turn: Mapping[str, Any], width: int) -> list[str]:
    """A turn for a terminal: what it is and whether it is right, then its text, indented.

    Args:
        turn: `text`; if there is a verdict `reason`, otherwise `finish_reason`.
        width: columns.
    """
    verdict = turn.get("reason", "cut at the limit" if turn.get("finish_reason") == "length" else "")
    if turn.get("right", verdict == "ok"):
        verdict = "right"
    score = f", score {turn['score']:.3g}" if "score" in turn else ""
    mark = f" ({verdict}{score})" if verdict else ""
    return [f"{label}{mark}:", *(f"  {line}" for line in _wrapped(turn["text"], width - 2))]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " [...]"


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, without control characters, which could steer the terminal."""
    lines = []
    for line in text.splitlines():
        safe = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in line)
        lines += textwrap.wrap(safe, width) or [""]
    return lines or ["(nothing)"]


def _side_by_side(cells: Sequence[Sequence[str]], width: int) -> list[str]:
    rows = zip_longest(*cells, fillvalue="")
    return [
        " | ".join(f"{cell:<{width}}" for cell in row).rstrip().removesuffix("|").rstrip() for row in rows
    ]
