"""What the report shows of a run directory, read from its files whatever their state.

A run may be running, killed, damaged, of an older version, or written by somebody else. So nothing here
trusts a file: a line that cannot be read becomes a note on the page, and a value of another type is left out.
Logs are read one line at a time. What is kept of them is bounded (`Thinned`), so memory does not grow with a
log. Episodes stay in their file. It is compressed, so it is read forwards: once to find the groups, and once
to fetch those that the page shows.

Left out: the task and the model. Nothing is imported, unpickled or measured.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from io import BufferedIOBase
from itertools import zip_longest
from pathlib import Path
from typing import Any, Generic, TypeVar

from grpo import config as configuration
from grpo.config import current_file
from grpo.evaluate.comparison import read_report
from grpo.run.files import DAMAGED_GZIP, open_log

EPISODES = "episodes.jsonl.gz"
LOGS = ("warm_start.jsonl", "failures.jsonl", "metrics.jsonl", "timings.jsonl", EPISODES)
FILES = ("config.yaml", *LOGS, "stages.jsonl", "evaluation.json")  # any of them makes a run directory
LONGEST_LINE = 16 << 20  # bytes; a longer line of a log, or a longer file read as a whole, is skipped
POINTS = 1000  # most points of a curve
GROUPS_INDEXED = 4096  # most groups whose place is kept
NAMES = 200  # most metrics, settings, reasons, warnings
EXAMPLES_PER_OUTCOME = 4
MODELS = ("untouched", "before_rl", "trained")  # whose answers a run stores, in order of time
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)

Item = TypeVar("Item")
Point = dict[str, float]  # "step", and the metrics logged then


class Thinned(Generic[Item]):
    """Evenly spaced items of a stream of any length: the first, then every n-th, and the last."""

    def __init__(self, most: int) -> None:
        self.most, self.stride, self.count = most, 1, 0
        self._kept: list[Item] = []
        self._last: Item | None = None

    def add(self, item: Item) -> None:
        if self.count % self.stride == 0:
            if len(self._kept) == self.most:
                self._kept, self.stride = self._kept[::2], 2 * self.stride
            if self.count % self.stride == 0:
                self._kept.append(item)
        self._last = item
        self.count += 1

    def items(self) -> list[Item]:
        if self._last is None or self._kept[-1] is self._last:
            return list(self._kept)
        return [*self._kept, self._last]


@dataclass
class Place:
    """Where the episodes of a group are in their log."""

    step: int
    group: int
    offset: int  # of its first line, in bytes of the decompressed log
    episodes: int = 1


@dataclass(frozen=True)
class Warning:
    step: int | None
    name: str
    advice: str


@dataclass
class Run:
    """One run directory. What it lacks is empty or None, and `notes` says so.

    Attributes:
        preset: the settings of the run's preset; empty if it is unknown.
        steps, validations: lines of metrics.jsonl with a reward, and the others.
        parts: lines of timings.jsonl.
        places: of groups of episodes, at most GROUPS_INDEXED + 1 of `groups`.
        start_from: the run that warm start and failures were taken from; empty if they were computed.
        stages: [stage, seconds, peak memory in GB].
        evaluation: the content of evaluation.json; `stored_examples` are its examples.
        outcomes: problems by second try "wrong, right" and so on, before and after RL.
        examples: by outcome, problems with what the models before and after RL wrote.
    """

    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    preset: dict[str, Any] = field(default_factory=dict)
    steps: list[Point] = field(default_factory=list)
    num_steps: int = 0
    validations: list[Point] = field(default_factory=list)
    warnings: list[Warning] = field(default_factory=list)
    parts: list[Point] = field(default_factory=list)
    warm_start: list[Point] = field(default_factory=list)
    start_from: str = ""
    failures: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    stages: list[tuple[str, float, float | None]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    groups: int = 0
    evaluation: dict[str, Any] | None = None
    stored_examples: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    last_written: str = ""
    notes: list[str] = field(default_factory=list)

    def count(self, setting: str) -> int:
        """A setting that is a count; 0 if it is missing or something else."""
        value = self.settings.get(setting)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def read_run(folder: Path, name: str) -> Run:
    """Reads all but the episodes, of which it finds the places.

    Raises:
        ValueError: `folder` is no run directory.
    """
    if not folder.is_dir() or not any(current_file(folder, file).exists() for file in FILES):
        raise ValueError(f"RUN must be a run directory (with config.yaml and logs), got {str(folder)!r}")
    run = Run(folder, name)
    parts: list[tuple[str, Callable[[Run], None]]] = [
        ("config.yaml", _read_settings),
        ("warm_start.jsonl", _read_warm_start),
        ("start.json", _read_start),
        ("failures.jsonl", _read_failures),
        ("metrics.jsonl", _read_metrics),
        ("timings.jsonl", _read_timings),
        ("stages.jsonl", _read_stages),
        (EPISODES, _find_groups),
        ("evaluation.json", _read_evaluation),
        ("evaluation-trained.jsonl", _compare_answers),
    ]
    for file, read in parts:
        try:
            read(run)
        except (OSError, *DAMAGED) as error:
            run.notes.append(f"{file} could not be read: {type(error).__name__}: {error}")
    written = [path.stat().st_mtime for log in FILES if (path := current_file(folder, log)).is_file()]
    run.last_written = datetime.fromtimestamp(max(written, default=0)).strftime("%Y-%m-%d %H:%M")
    return run


# --- files ----------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A finite float, or None: JSON written by others has Infinity, strings and integers of any length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def is_regular(path: Path) -> bool:
    """Whether a file can be read to its end: a pipe or a device may have none."""
    return path.exists() and stat.S_ISREG(path.stat().st_mode)


def whole_lines(file: BufferedIOBase) -> Iterator[tuple[int, bytes | None]]:
    """(offset, bytes) of each line of a log; None for a line above LONGEST_LINE, which is skipped.

    A last line without its newline is being written, or was cut by a kill; it is left out too.
    """
    offset = file.tell()
    try:
        while line := file.readline(LONGEST_LINE):
            if line.endswith(b"\n"):
                yield offset, line
            elif len(line) < LONGEST_LINE:
                yield offset, None
            else:
                length = len(line)
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    length += len(rest)
                yield offset, None
                offset += length + len(rest) - len(line)
            offset += len(line)
    except EOFError:  # a gzip member that is unfinished for the same reasons
        yield offset, None


def record_of(line: bytes | None) -> dict[str, Any] | None:
    """The JSON object in a line, or None."""
    try:
        record = json.loads(line or b"")
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def records(run: Run, name: str, *, wanted: bool = False) -> Iterator[dict[str, Any]]:
    """The readable lines of a log. Notes on the run what is missing.

    Args:
        wanted: note it if the log does not exist.
    """
    path = current_file(run.folder, name)
    if not is_regular(path):
        if wanted:
            run.notes.append(f"{name} does not exist yet.")
        return
    bad = 0
    with open_log(path) as file:
        for _, line in whole_lines(file):
            record = record_of(line)
            if record is None:
                bad += 1
            else:
                yield record
    _note_damage(run, name, bad)


def _note_damage(run: Run, name: str, bad: int) -> None:
    if bad:
        lines = "1 line is" if bad == 1 else f"{bad} lines are"
        run.notes.append(f"{name}: {lines} half-written, damaged or too long, and left out.")


def small_text(path: Path) -> str:
    """A file that is read as a whole. Raises ValueError if it is too long or no file."""
    if not is_regular(path):
        raise ValueError("it is not a regular file")
    if path.stat().st_size > LONGEST_LINE:
        raise ValueError(f"it has more than {LONGEST_LINE} bytes")
    return path.read_text(encoding="utf-8", errors="replace")


def _point(record: dict[str, Any]) -> Point:
    """Its numbers, except those too large to draw."""
    pairs = ((name, number(value)) for name, value in list(record.items())[:NAMES])
    return {name: value for name, value in pairs if value is not None and abs(value) < 1e15}


# --- settings -------------------------------------------------------------------------------------------


def _read_settings(run: Run) -> None:
    """config.yaml has a line `name: JSON` per setting; what is no JSON is shown as it is."""
    path = run.folder / "config.yaml"
    if not path.exists():
        run.notes.append("config.yaml does not exist: the page shows no settings.")
        return
    for line in small_text(path).splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() and not name.startswith(("#", " ")) and len(run.settings) < NAMES:
            name = configuration.RETIRED_SETTINGS.get(name, name)
            try:
                run.settings[name] = json.loads(value)
            except (ValueError, RecursionError):
                run.settings[name] = value.strip()
    preset = run.settings.get("preset")
    if preset in [path.stem for path in configuration.PRESETS.glob("*.yaml")]:
        run.preset = vars(configuration.parse(["--preset", preset]))


# --- logs of numbers ------------------------------------------------------------------------------------


def _read_metrics(run: Run) -> None:
    steps, validations = Thinned[Point](POINTS), Thinned[Point](POINTS)
    for record in records(run, "metrics.jsonl", wanted=True):
        if "warning" in record:
            if len(run.warnings) < NAMES:
                step = number(record.get("step"))
                advice = Warning(
                    None if step is None else int(step), str(record["warning"]), str(record.get("advice", ""))
                )
                run.warnings.append(advice)
        elif "step" in (point := _point(record)):
            (steps if "reward" in point else validations).add(point)
            if "reward" in point:
                run.num_steps = max(run.num_steps, int(point["step"]))
    run.steps, run.validations = steps.items(), validations.items()
    for kind, log in (("steps", steps), ("validations", validations)):
        if log.count > len(log.items()):
            run.notes.append(f"The curves show every {log.stride}th of {log.count} {kind}.")


def _read_timings(run: Run) -> None:
    run.parts = _thinned_log(run, "timings.jsonl")


def _read_warm_start(run: Run) -> None:
    run.warm_start = _thinned_log(run, "warm_start.jsonl")


def _read_start(run: Run) -> None:
    if (path := run.folder / "start.json").exists():  # grpo/run/reuse.py
        source = mapping(json.loads(small_text(path))).get("taken_from")
        run.start_from = source if isinstance(source, str) else ""


def _thinned_log(run: Run, name: str) -> list[Point]:
    log = Thinned[Point](POINTS)
    for record in records(run, name):
        if "step" in (point := _point(record)):
            log.add(point)
    return log.items()


def _read_stages(run: Run) -> None:
    """A resumed stage has several lines, which are added."""
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    for record in records(run, "stages.jsonl"):
        stage = str(record.get("stage", "?"))
        if stage in seconds or len(seconds) < NAMES:
            seconds[stage] = seconds.get(stage, 0.0) + (number(record.get("seconds")) or 0.0)
            memory[stage] = max(memory.get(stage, 0.0), number(record.get("peak_memory_gb")) or 0.0)
    run.stages = [(stage, seconds[stage], memory[stage] or None) for stage in seconds]


def _read_failures(run: Run) -> None:
    """Adds up the end lines of the blocks; see grpo/failures.py."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for record in records(run, "failures.jsonl"):
        if "block" in record:
            for name in ("examples", "solved", "failed", "attempts", "right"):
                counts[name] += int(number(record.get(name)) or 0)
            for reason, times in dict(record.get("reasons") or {}).items():
                if reason in reasons or len(reasons) < NAMES:
                    reasons[reason] += int(number(times) or 0)
    run.failures, run.reasons = dict(counts), dict(reasons.most_common())


# --- episodes -------------------------------------------------------------------------------------------

# How train.py begins the line of an episode: reading only this finds a group in a tenth of the time.
_HEAD = re.compile(rb'\{"step": (\d{1,18}), "example_id": "(?:[^"\\]|\\.)*", "group_id": (\d{1,18}),')


def _find_groups(run: Run) -> None:
    """The places of evenly spaced groups. A group is a stretch of lines with its step and number."""
    path = current_file(run.folder, EPISODES)
    if not is_regular(path):
        run.notes.append(f"{EPISODES} does not exist yet: the page shows no groups.")
        return
    groups = Thinned[Place](GROUPS_INDEXED)
    last: Place | None = None
    bad = 0
    try:
        with open_log(path) as file:
            for offset, line in whole_lines(file):
                key = _group_of(line)
                if key is None:
                    bad += 1
                elif last is not None and key == (last.step, last.group):
                    last.episodes += 1
                else:
                    groups.add(last := Place(*key, offset))
    except DAMAGED_GZIP as error:
        run.notes.append(
            f"{path.name} is damaged after {groups.count} groups ({error}); the rest is left out."
        )
    run.places, run.groups = groups.items(), groups.count
    _note_damage(run, path.name, bad)


def _group_of(line: bytes | None) -> tuple[int, int] | None:
    if line is not None and (head := _HEAD.match(line)):
        return int(head[1]), int(head[2])
    record = record_of(line) or {}
    step, group = number(record.get("step")), number(record.get("group_id"))
    return None if step is None or group is None else (int(step), int(group))


def episodes(run: Run, places: Iterable[Place], most: int) -> Iterator[tuple[Place, list[dict[str, Any]]]]:
    """(place, the first `most` readable episodes of its group) for each place.

    Args:
        places: in ascending order: to go back in a gzip file, Python decompresses it from its beginning.
    """
    with open_log(current_file(run.folder, EPISODES)) as file:
        for place in places:
            yield place, _episodes_at(place, file, most)


def _episodes_at(place: Place, file: BufferedIOBase, most: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    lines = 0
    try:
        file.seek(place.offset)
        for _, line in whole_lines(file):
            key = _group_of(line)
            if key == (place.step, place.group):
                lines += 1
                if (record := record_of(line)) is not None:
                    found.append(record)
            # The count ends the group before the first line of the next one, which lies at the next place.
            if key not in (None, (place.step, place.group)) or lines == place.episodes or len(found) == most:
                break
    except (EOFError, *DAMAGED_GZIP):
        pass  # _find_groups has noted it
    return found


# --- the evaluation -------------------------------------------------------------------------------------


def _read_evaluation(run: Run) -> None:
    path = run.folder / "evaluation.json"
    if not path.exists():
        run.notes.append("evaluation.json does not exist yet: no model was measured on held-out problems.")
        return
    small_text(path)  # refuses what `read_report` should not read
    report = read_report(path)
    report["models"] = dict(list(report["models"].items())[:12])
    report["comparisons"] = list(report["comparisons"])[:12]
    run.evaluation = report
    run.stored_examples = [
        {
            "prompt": example.get("prompt"),
            **{side: mapping(example.get(side)) for side in ("before", "after")},
        }
        for example in map(mapping, list(report.get("examples") or [])[:EXAMPLES_PER_OUTCOME])
    ]


def _compare_answers(run: Run) -> None:
    """Outcomes and examples from the stored answers, which have the same problems in the same order."""
    stored = [label for label in MODELS if is_regular(current_file(run.folder, f"evaluation-{label}.jsonl"))]
    before = "before_rl" if "before_rl" in stored else "untouched"
    if before not in stored or "trained" not in stored:
        return
    streams = [_answers(run, label) for label in (before, "trained")]
    outcomes: Counter[str] = Counter()
    for old, new in zip_longest(*streams):
        if old is None or new is None or old.get("id") != new.get("id"):
            run.notes.append("The evaluation is unfinished: only problems that both models answered count.")
            break
        outcome = f"{_second_try(old)}, {_second_try(new)}"
        outcomes[outcome] += 1
        shown = run.examples.setdefault(outcome, [])
        # A right first try has no reflection to read.
        if len(shown) < EXAMPLES_PER_OUTCOME and isinstance(old.get("retry"), dict):
            shown.append({"id": old.get("id"), "prompt": old.get("prompt"), "before": old, "after": new})
    run.outcomes = dict(outcomes)


def _answers(run: Run, label: str) -> Iterator[dict[str, Any]]:
    return (line for line in records(run, f"evaluation-{label}.jsonl") if "block" not in line)


def _second_try(record: dict[str, Any]) -> str:
    tries = (record.get("first"), record.get("retry"))
    return (
        "right" if any(isinstance(turn, dict) and turn.get("reason") == "ok" for turn in tries) else "wrong"
    )
