"""The curves of one or several runs: what is drawn, and the drawing as SVG by matplotlib.

A drawing contains no text of a run: titles, legends and names are HTML around it. Its colours are CSS
variables, so that it follows the page's light or dark scheme.

Left out: moving averages, which hide the steps that went wrong.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.evaluate.statistics import wilson_interval
from grpo.report.data import Point, Run

MAIN, OTHER = 1, 2  # colours of a single run: what a chart is about, and what it is compared with


@dataclass(frozen=True)
class Line:
    """One curve: (x, y), and the ends of an interval or range around y."""

    label: str
    colour: int
    xs: list[float]
    ys: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines with the same unit. `form` formats a value for a reader; `stacked` fills between the lines."""

    title: str
    about: str
    lines: list[Line]
    form: str = "{:.3g}"
    percent: bool = False
    stacked: bool = False

    def change(self, line: Line) -> str:
        first, last = (self.form.format(100 * y if self.percent else y) for y in (line.ys[0], line.ys[-1]))
        return f"{first} → {last}" if len(line.ys) > 1 else first


VALIDATION = "Right after one reflection. Validation problems, with 95% intervals."
RETRIES = "Right retries after failed first tries: with a reflection, and blind."


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts for which at least one run has values."""
    percent: dict[str, Any] = {"form": "{:.1f}%", "percent": True}
    made = [
        _chart(runs, "Second try", VALIDATION,
               [("second try", _validated("second_try")), ("first try", _validated("first_try"))], **percent),
        _chart(runs, "Retries", RETRIES,
               [("with a reflection", _validated("retry")), ("blind", _validated("retry_blind"))], **percent),
        _chart(runs, "Reward", "Mean over the completions of a step.", [("reward", _step("reward"))]),
        _chart(runs, "Groups with a signal", "Groups whose rewards differ, so that they teach something.",
               [("groups with a signal", _signal)], **percent),
        _chart(runs, "Length", "Trained tokens per completion: mean, shortest to longest.",
               [("mean length", _length)], form="{:.0f}"),
        _chart(runs, "Truncated", "Completions that reached their length limit.",
               [("truncated", _step("completions/clipped_ratio"))], **percent),
        _chart(runs, "KL", "Nats per token, from the policy before RL.", [("KL", _step("kl"))]),
        _chart(runs, "First tries of train problems", "Right ones, when the failures are collected again.",
               [("right", _step("failures/right"))], **percent),
        _chart(runs, "Distilled retries", "Cross-entropy of right retries as first answers, nats per token.",
               [("cross-entropy", _step("distill/loss"))]),
        _chart(runs, "Entropy", "Nats per token of the policy.", [("entropy", _step("entropy"))]),
        _seconds(runs),
        _chart(runs, "Warm start", "Loss per supervised step.", [("loss", _warm_start)]),
    ]  # fmt: skip
    return [chart for chart in made if chart.lines]


def _chart(
    runs: Sequence[Run],
    title: str,
    about: str,
    curves: Sequence[tuple[str, Callable[[Run], list[tuple[float, ...]]]]],
    *,
    form: str = "{:.3g}",
    percent: bool = False,
) -> Chart:
    """One line per curve of a run. Several runs have a colour each, and no bands, which would overlap."""
    lines = []
    for place, run in enumerate(runs):
        for order, (label, curve) in enumerate(curves):
            if not (rows := curve(run)):
                continue
            xs, ys, low, high = ([row[i] for row in rows] for i in range(4))
            several = len(runs) > 1
            if several or low == high:
                low, high = [], []
            name = f"{run.name}: {label}" if several and len(curves) > 1 else run.name if several else label
            colour = place + 1 if several else (MAIN, OTHER)[order]
            lines.append(Line(name, colour, xs, ys, low, high, dashed=order > 0))
    return Chart(title, about, lines, form, percent)


# --- (x, y, low, high) of a run ---------------------------------------------------------------------------

Rows = list[tuple[float, ...]]


def _step(name: str) -> Callable[[Run], Rows]:
    return lambda run: [(p["step"], p[name], p[name], p[name]) for p in run.steps if name in p]


def _signal(run: Run) -> Rows:
    shares = [(p["step"], 1 - p["frac_reward_zero_std"]) for p in run.steps if "frac_reward_zero_std" in p]
    return [(step, share, share, share) for step, share in shares]


def _length(run: Run) -> Rows:
    mean, low, high = (f"completions/{name}_length" for name in ("mean", "min", "max"))
    return [(p["step"], p[mean], p.get(low, p[mean]), p.get(high, p[mean])) for p in run.steps if mean in p]


def _warm_start(run: Run) -> Rows:
    return [(p["step"], p["loss"], p["loss"], p["loss"]) for p in run.warm_start if "loss" in p]


def _validated(name: str) -> Callable[[Run], Rows]:
    """Shares with Wilson's interval. Retries have as many problems as first tries failed."""

    def rows(run: Run) -> Rows:
        found: Rows = []
        for point in run.validations:
            share = point.get(f"validation/{name}")
            if share is not None:
                found.append((point["step"], share, *validation_interval(run, point, name)))
        return found

    return rows


def validation_interval(run: Run, point: Point, name: str) -> tuple[float, float]:
    """The 95% interval of a validated share; the share twice if the number of problems is unknown."""
    share = point[f"validation/{name}"]
    count = run.count("num_validation")
    if name.startswith("retry"):
        count -= round(count * point.get("validation/first_try", 1.0))
    if count < 1 or not 0 <= share <= 1:
        return share, share
    interval = wilson_interval(round(share * count), count)
    return interval.low, interval.high


def _seconds(runs: Sequence[Run]) -> Chart:
    """Seconds of a step: its parts on top of each other for one run, the total for several."""
    about = "Seconds of an RL step, by part." if len(runs) == 1 else "Seconds of an RL step."
    total = "step_time"
    if len(runs) > 1:
        return _chart(runs, "Seconds per step", about, [("seconds", _timed(total))], form="{:.1f} s")
    points = [point for point in runs[0].parts if total in point]
    names = sorted({name for p in points for name in p if name.endswith("_time") and name != total})[:6]
    xs = [point["step"] for point in points]
    lines, below = [], [0.0] * len(points)
    for colour, name in enumerate(names, 1):
        heights = [point.get(name, 0.0) for point in points]
        high = [a + b for a, b in zip(below, heights, strict=True)]
        lines.append(Line(name.removesuffix("_time"), colour, xs, heights, below, high))
        below = high
    rest = [max(point[total] - y, 0.0) for point, y in zip(points, below, strict=True)]
    if points:
        top = [a + b for a, b in zip(below, rest, strict=True)]
        lines.append(Line("other", len(names) + 1, xs, rest, below, top))
    return Chart("Seconds per step", about, lines, "{:.1f} s", stacked=True)


def _timed(name: str) -> Callable[[Run], Rows]:
    return lambda run: [(p["step"], p[name], p[name], p[name]) for p in run.parts if name in p]


# --- drawing --------------------------------------------------------------------------------------------

COLOURS = 6  # of the page; further lines begin again, with other dashes
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)))
# Colours that matplotlib writes, and what the page makes of them.
TEXT, GRID = "#010101", "#020202"
_VARIABLES = {TEXT: "var(--muted)", GRID: "var(--line)"}
_VARIABLES |= {f"#0300{colour:02d}": f"var(--series-{colour})" for colour in range(1, COLOURS + 1)}


def available() -> bool:
    """Whether matplotlib, which draws, is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def svg(chart: Chart, key: str) -> str:
    """The chart as an <svg> element. `key` makes its ids differ from those of the page's other drawings."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.size": 8.5,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.4, 2.2))
        axes = figure.subplots()
        figure.subplots_adjust(left=0.11, right=0.985, top=0.96, bottom=0.115)
        _draw(axes, chart)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _for_page(text.getvalue(), key)


def _draw(axes: Any, chart: Chart) -> None:
    scale = 100 if chart.percent else 1
    for line in chart.lines:
        colour = f"#0300{(line.colour - 1) % COLOURS + 1:02d}"
        style = DASHES[(line.colour - 1) // COLOURS % 2 + line.dashed]
        low, high = ([scale * y for y in ys] for ys in (line.low, line.high))
        few = len(line.xs) <= 24
        if chart.stacked:
            axes.fill_between(line.xs, low, high, color=colour, alpha=0.45, linewidth=0)
            axes.plot(line.xs, high, color=colour, linewidth=1.2, marker="o" if len(line.xs) == 1 else "")
            continue
        if low:
            axes.fill_between(line.xs, low, high, color=colour, alpha=0.13, linewidth=0)
            if len(line.xs) == 1:
                axes.vlines(line.xs, low, high, color=colour, linewidth=1.5)
        axes.plot(
            line.xs, [scale * y for y in line.ys], color=colour, linewidth=1.6, linestyle=style,
            marker="o" if few else "", markersize=3,
        )  # fmt: skip
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02, y=0.08)
    steps = {x for line in chart.lines for x in line.xs}
    if len(steps) == 1:
        axes.set_xlim(min(steps) - 1, max(steps) + 1)
    if chart.percent:
        axes.set_ylim(-2, 102)
        axes.set_yticks([0, 25, 50, 75, 100])
    elif min((y for line in chart.lines for y in (line.low or line.ys)), default=0) >= 0:
        axes.set_ylim(bottom=0)


def _for_page(text: str, key: str) -> str:
    """matplotlib's file as an element of the page: own ids, the page's colours, font and width."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{key}-", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for written, variable in _VARIABLES.items():
        text = text.replace(written, variable)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view, "matplotlib writes a viewBox"
    return re.sub(r"^<svg[^>]*>", f'<svg {view[0]} aria-hidden="true">', text, count=1)
