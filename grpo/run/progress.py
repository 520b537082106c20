"""The progress of a stage: a live line with the time left on a terminal, a plain line now and then elsewhere.

rich draws the live line on standard error; what is printed meanwhile goes above it. A file gets whole lines,
without control characters.

Left out: several live lines at once.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import Any

from rich import progress
from rich.console import Console

PLAIN_EVERY = 30.0  # seconds between plain lines


class Bar:
    """The progress of one stage; a context manager.

    Attributes:
        done: how much of `total` is done.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, f"{unit}s"
        self.done = self.first = done
        self.start = self.shown = time.monotonic()
        self.live = _live() if _on_terminal() else None
        if self.live is not None:
            self.task = self.live.add_task(name, total=total, completed=done, unit=self.unit, note="")
            self.live.start()

    def update(self, done: int, note: str = "") -> None:
        """Sets how much is done. `note` is shown at the end of the live line."""
        self.done = done
        if self.live is not None:
            self.live.update(self.task, completed=done, note=note)
        elif time.monotonic() - self.shown >= PLAIN_EVERY:
            self.shown = time.monotonic()
            print(self._plain(note), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _plain(self, note: str) -> str:
        seconds = self.shown - self.start
        parts = [f"{self.name}: {self.done}/{self.total} {self.unit}", _clock(seconds)]
        if self.done > self.first:
            left = seconds * (self.total - self.done) / (self.done - self.first)
            parts.append(f"{_clock(left)} left")
        return ", ".join([*parts, note] if note else parts)


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _live() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[unit]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left  {task.fields[note]}", markup=False),
        console=Console(stderr=True),
        refresh_per_second=4,
        speed_estimate_period=3600,  # seconds; a step may take minutes
        redirect_stdout=sys.stdout.isatty(),  # a file gets its lines unchanged
    )


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
