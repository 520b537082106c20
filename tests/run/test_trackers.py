"""Trackers: what each gets, in the words of its package; and a run that one of them cannot harm."""

import io
import json
import sqlite3
import struct
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from tiny_run import arguments, command, contents, run, save_model

from grpo.config import TRACKERS, Config, to_yaml
from grpo.episode import Episode
from grpo.run import trackers
from grpo.run.metrics import Metrics
from grpo.run.trackers import COLUMNS, KINDS, ROWS, Trackers, completion_rows, run_id

QUICK = {
    "warm_start_steps": 0,
    "eval_steps": 0,
    "num_eval": 0,
    "max_steps": 2,
    "num_examples": 8,
    "beta": 0.0,
}


class Calls(list):
    """What a stand-in was called with, in order; `broken` names the calls that raise."""

    broken: tuple[str, ...] = ()

    def add(self, name, *values):
        if name in self.broken:
            raise ConnectionError(f"{name}:\nno route to host")
        self.append((name, *values))


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the three packages, with the calls that they get."""
    calls = Calls()

    class Writer:
        def __init__(self, folder, purge_step):
            calls.add("init", Path(folder).name, purge_step)

        def add_scalar(self, name, value, step):
            calls.add("log", {name: value}, step)

        def add_text(self, name, text, step):
            calls.add("table", text, step)

        def close(self):
            calls.add("close")

    def table(columns, data):
        assert columns == list(COLUMNS)
        return ("table", data)

    def init(**settings):
        calls.add("init", settings)
        return SimpleNamespace(log=log, finish=lambda: calls.add("close"))

    def log(values, step):
        (name, value), *_ = values.items()
        calls.add(*(("table", value[1], step) if name == "completions" else ("log", values, step)))

    settings = lambda **values: values  # noqa: E731
    fakes = {
        "torch.utils.tensorboard": {"SummaryWriter": Writer},
        "wandb": {"Table": table, "init": init, "Settings": settings},
        "trackio": {"Table": table, "init": init},
    }
    for name, content in fakes.items():
        module = type(sys)(name)
        vars(module).update(content, __spec__=ModuleSpec(name, None))  # transformers looks for wandb
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture
def opened(tmp_path, calls):
    """Makes Metrics with trackers."""

    def make(*names, first_step=0):
        config = Config(report_to=",".join(names))
        if not (tmp_path / "config.yaml").exists():
            to_yaml(config, tmp_path / "config.yaml")
        return Metrics(tmp_path, Trackers(tmp_path, config, first_step), console=io.StringIO())

    return make


@pytest.fixture(scope="module")
def step():
    parts = tiny.build()
    pool = tiny.failures(parts, 6)
    return tiny.episodes(parts, pool), pool


# --- what they get ------------------------------------------------------------------------------------------


def test_the_names_of_config_are_those_of_the_trackers():
    assert tuple(KINDS) == TRACKERS


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_every_number_and_the_table(name, opened, calls, step):
    metrics = opened(name)
    metrics.log(1, {"kl": float("nan"), "loss": 0.5})
    metrics.timings(1, {"step_time": 2.0})
    metrics.completions(1, *step)
    metrics.close()
    (begin, *_), *sent, table, end = calls
    assert (begin, end) == ("init", ("close",))
    assert sent == [("log", {"loss": 0.5}, 1), ("log", {"timings/step_time": 2.0}, 1)]
    assert table[0] == "table" and table[2] == 1
    rows = completion_rows(1, *step)
    if name == "tensorboard":
        assert len(table[1].splitlines()) == 2 + len(rows)
    else:
        assert table[1] == [list(row) for row in rows]


def test_the_rows_are_first_completions_of_different_groups(step):
    episodes, pool = step
    rows = completion_rows(7, episodes, pool)
    assert len(rows) == ROWS < len(pool)
    for row, group in zip(rows, pool, strict=False):
        episode = next(e for e in episodes if pool[e.group_id] is group)
        texts = episode.texts
        assert row == (
            7,
            group.example.prompt,
            group.text,
            texts["reflection"],
            texts["retry"],
            episode.reward,
        )


def test_rows_of_grpo_without_reflections_have_the_new_attempt():
    attempt = Episode("a", 0, 0, [1], [2], ["attempt"], [0.0], "stop", 1.0, texts={"attempt": "x" * 5000})
    failure = SimpleNamespace(example=SimpleNamespace(prompt="p"), text="old")
    (row,) = completion_rows(1, [attempt], [failure])
    assert row[2].startswith("xxx") and len(row[2]) < 2100 and row[3:] == ("", "", 1.0)


def test_a_cell_of_a_markdown_table_stays_one_cell():
    cell = trackers._cell("a|b\n<script>&")
    assert cell == "a&#124;b<br>&lt;script>&amp;"


def test_a_continued_run_is_the_same_run(opened, calls):
    for first_step in (0, 5):
        metrics = opened(*TRACKERS, first_step=first_step)
        metrics.log(4, {"loss": 0.5})
        metrics.close()
    begins = [call for call in calls if call[0] == "init"]
    assert begins[1:3] == begins[4:6]  # wandb and trackio: id, name, settings
    assert [call[2] for call in (begins[0], begins[3])] == [0, 5]  # TensorBoard hides repeated steps


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "x-001").mkdir(parents=True)
        (tmp_path / parent / "x-001/config.yaml").touch()
    ids = {run_id(tmp_path / parent / "x-001") for parent in ("a", "b")}
    assert len(ids) == 2 and all(identity.startswith("x-001-") for identity in ids)


# --- what they cannot do ------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["init", "log", "table", "close"])
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_fails_is_one_warning_line(name, moment, opened, calls, step, capsys):
    calls.broken = (moment,)
    metrics = opened(name)
    for number in (1, 2):
        metrics.log(number, {"loss": 0.5})
        metrics.completions(number, *step)
    metrics.close()
    reason = f"ConnectionError: {moment}: no route to host"
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"warning: {name} failed and gets nothing more ({reason}); the run continues"]
    assert len((metrics.run_dir / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_others_go_on_when_one_fails(opened, calls, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    metrics = opened(*TRACKERS)
    metrics.log(1, {"loss": 0.5})
    assert capsys.readouterr().out.count("warning") == 1
    assert [call[0] for call in calls] == ["init", "init", "log", "log"]


def test_a_run_computes_the_same_with_trackers_that_fail(tmp_path, calls):
    model = save_model(tmp_path / "model")
    alone = run(arguments(model, tmp_path / "alone", **QUICK))
    calls.broken = ("table",)
    tracked = run(arguments(model, tmp_path / "tracked", **QUICK, report_to="trackio,tensorboard"))
    assert alone.status == tracked.status == 0, tracked.err
    assert tracked.out.count("gets nothing more") == 2
    assert contents(alone.folder) == contents(tracked.folder)


def test_trackers_start_before_the_warm_start_and_end_with_the_run(tmp_path, calls, monkeypatch):
    """A login that fails shows in the first seconds, not after the warm start and the failures."""

    def warm_start(_):
        calls.add("warm start")
        raise FloatingPointError("it failed")

    monkeypatch.setattr("train.warm_start", warm_start)
    model = save_model(tmp_path / "model")
    done = run(arguments(model, tmp_path / "runs", report_to=",".join(TRACKERS)))
    assert done.status == 1
    assert [call[0] for call in calls] == ["init"] * 3 + ["warm start"] + ["close"] * 3


# --- the packages themselves, offline -----------------------------------------------------------------------


def numbers_of_tensorboard(folder: Path, _: Path) -> tuple[dict[str, float], str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    numbers = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    return numbers, events.Tensors("completions/text_summary")[-1].tensor_proto.string_val[0].decode()


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format; wandb puts 7 bytes before them.

    A record is one piece, or several in the blocks of 32 KiB: checksum (4 bytes), length (2), type (1), data.
    """
    position, parts = 7, b""
    while position < len(content):
        if 2**15 - position % 2**15 < 7:  # too short for a header: filled with zeros
            position += 2**15 - position % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def numbers_of_wandb(folder: Path, _: Path) -> tuple[dict[str, float], str]:
    from wandb.proto import wandb_internal_pb2

    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    numbers = {}
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        for item in record.history.item:
            numbers[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    table = max((folder / "wandb").glob("offline-run-*/files/media/table/*.json"))
    return numbers, table.read_text()


def numbers_of_trackio(_: Path, home: Path) -> tuple[dict[str, float], str]:
    with sqlite3.connect(home / "reflect-grpo.db") as database:
        rows = database.execute("select metrics from metrics order by id").fetchall()
    numbers = {name: value for (text,) in rows for name, value in json.loads(text).items()}
    return numbers, json.dumps(numbers.get("completions"))


@pytest.mark.parametrize("name", TRACKERS)
def test_what_the_package_wrote_is_what_the_run_logged(name, tmp_path):
    pytest.importorskip(name)
    model, home = save_model(tmp_path / "model"), tmp_path / "trackio"
    argv = arguments(model, tmp_path / "runs", **QUICK, report_to=name)
    done = command("train", argv, folder=tmp_path, WANDB_MODE="offline", TRACKIO_DIR=str(home))
    assert done.status == 0 and "gets nothing more" not in done.out, done.err + done.out
    (folder,) = (tmp_path / "runs").iterdir()
    numbers, table = globals()[f"numbers_of_{name}"](folder, home)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and len(last) > 15
    for metric, value in last.items():
        if metric != "step" and value is not None:
            assert numbers[metric] == pytest.approx(value, rel=1e-6), metric
    assert numbers["timings/step_time"] > 0
    assert all(column in table for column in COLUMNS)
