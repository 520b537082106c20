"""What an experiment leaves: a Markdown table, the same values as JSON, and a plot with 95% intervals.

A value is a number, or a mapping with `mean`, `low` and `high` (the ends of its 95% interval).

Left out: what the values mean; docs/experiments.md says that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.evaluate.comparison import Figures, ModelResult, model_figures
from grpo.evaluate.statistics import paired_difference
from grpo.experiments.study import Arm, pooled
from grpo.run import files

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """How a value is shown: heading, factor, digits after the point."""

    heading: str
    scale: float = 1.0
    digits: int = 1


def percent(heading: str) -> Column:
    return Column(heading, 100.0)


@dataclass
class Outcome:
    """Rows of values under `columns`. The first column names the rows; `plotted` names the columns drawn."""

    question: str
    columns: dict[str, Column]
    rows: list[Row]
    plotted: Sequence[str]
    notes: list[str] = field(default_factory=list)
    details: Figures = field(default_factory=dict)  # more values, for the JSON file only

    def table(self) -> str:
        """Markdown."""
        lines = ["| " + " | ".join(column.heading for column in self.columns.values()) + " |"]
        lines.append("|" + "---|" * len(self.columns))
        for row in self.rows:
            cells = [cell(row.get(name), column) for name, column in self.columns.items()]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def write(self, folder: Path, settings: Figures) -> list[Path]:
        """Writes table.md, result.json and, with matplotlib, plot.png; returns their paths."""
        with files.written_whole(folder / "result.json") as path:
            content = {"question": self.question, "settings": settings, "rows": self.rows, **self.details}
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with files.written_whole(folder / "table.md") as path:
            path.write_text(f"{self.question}\n\n{self.table()}\n", encoding="utf-8")
        drawn = [folder / "plot.png"] if self._plot(folder / "plot.png") else []
        return [folder / "table.md", folder / "result.json", *drawn]

    def _plot(self, file: Path) -> bool:
        try:
            import matplotlib
        except ImportError:
            return False
        matplotlib.use("Agg")
        from matplotlib import pyplot

        name = next(iter(self.columns))
        figure, panels = pyplot.subplots(1, len(self.plotted), squeeze=False)
        figure.set_size_inches(2 + 3.4 * len(self.plotted), 1.6 + 0.35 * len(self.rows))
        for panel, key in zip(panels[0], self.plotted, strict=True):
            column = self.columns[key]
            shown = [row for row in self.rows if row.get(key) is not None]
            for place, row in enumerate(shown):
                mean, low, high = (column.scale * end for end in ends(row[key]))
                panel.errorbar(mean, -place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3)
            panel.set_yticks([-place for place in range(len(shown))], [str(row[name]) for row in shown])
            panel.set_xlabel(column.heading + (", percent" if column.scale == 100 else ""))
            panel.grid(axis="x", alpha=0.3)
        figure.suptitle(self.question, fontsize="small")
        figure.tight_layout()
        with files.written_whole(file) as path:
            figure.savefig(path, format="png", dpi=150)
        pyplot.close(figure)
        return True


def ends(value: Any) -> tuple[float, float, float]:
    """mean, low and high; three times the same for a plain number."""
    if isinstance(value, Mapping):
        return value["mean"], value["low"], value["high"]
    return value, value, value


def cell(value: Any, column: Column) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    numbers = [f"{column.scale * end:.{column.digits}f}" for end in ends(value)]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]" if isinstance(value, Mapping) else numbers[0]


def difference(after: ModelResult, before: ModelResult, tries: str = "second_try") -> Figures:
    """Paired difference of `first_try` or `second_try`, with its interval."""
    return paired_difference(getattr(after, tries), getattr(before, tries))._asdict()


# --- rows of arms -------------------------------------------------------------------------------------------

ARM_COLUMNS = {
    "arm": Column("arm"),
    "first_try": percent("1st try"),
    "second_try": percent("2nd try"),
    "first_gain": percent("gain of the 1st try"),
    "gain": percent("gain of the 2nd try"),
    "against": percent("2nd try minus the first row's"),
    "length": Column("reflection, tokens"),
    "truncated": percent("cut"),
    "tokens": Column("sampled tokens", digits=0),
    "seconds": Column("seconds of RL", digits=0),
}


def arm_row(label: str, arms: Sequence[Arm], reference: Sequence[Arm] | None = None) -> Row:
    """One arm over its seeds: before and after RL, and against another arm."""
    before, after = pooled(arms, "before_rl"), pooled(arms)
    figures = model_figures(after)
    return {
        "arm": label,
        "first_try": figures["first_try"],
        "second_try": figures["second_try"],
        "first_gain": difference(after, before, "first_try"),
        "gain": difference(after, before),
        "against": difference(after, pooled(reference)) if reference and reference is not arms else None,
        "length": figures["reflection_mean_length"],
        "truncated": figures["reflection_truncated"],
        "tokens": sum(arm.sampled_tokens() for arm in arms),
        "seconds": sum(arm.seconds() for arm in arms),
        "figures": figures,
    }
