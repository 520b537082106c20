"""Data without code: formats, splits, messages, bad rows, and whole tiny runs with verifier or function."""

import csv
import json
from pathlib import Path

import pytest
import tiny_run

from grpo.run.metrics import Metrics
from grpo.tasks import SPLITS, get_task
from grpo.tasks.rows import plain

ROWS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(100)]


def dataset(**options):
    return get_task("dataset", {"prompt": "question", "verifier": "number", **options})


def write(path, rows=ROWS):
    """The rows in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def every(task):
    return {split: task.examples(split, len(task._splits[split])) for split in SPLITS}


# --- formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    splits = every(dataset(path=write(tmp_path / f"problems.{suffix}")))
    expected = every(dataset(path=write(tmp_path / "problems.jsonl")))
    for split in SPLITS:
        assert [(e.id, e.prompt, e.data["gold"]) for e in splits[split]] == [
            (e.id, e.prompt, e.data["gold"]) for e in expected[split]
        ]
    assert sum(map(len, splits.values())) == 100 and min(map(len, splits.values())) > 2


def test_a_dataset_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    train, test = (datasets.Dataset.from_list(part) for part in (ROWS[:70], ROWS[70:]))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    splits = every(dataset(path=str(tmp_path / "saved")))
    assert len(splits["heldout"]) == 30 and len(splits["train"]) + len(splits["validation"]) == 70
    train.save_to_disk(tmp_path / "one")
    assert sum(map(len, every(dataset(path=str(tmp_path / "one"))).values())) == 70
    with pytest.raises(
        ValueError, match="heldout must be a split of .*train, test.*got 'tset'; did you mean"
    ):
        dataset(path=str(tmp_path / "saved"), heldout="tset", train="train")


def test_json_lines_under_another_name_and_json_inside_an_object(tmp_path):
    lines = Path(write(tmp_path / "a.jsonl")).read_text()
    (tmp_path / "b.json").write_text(lines)
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "d.jsonl").write_text("\ufeff" + json.dumps(ROWS))
    for name in "b.json c.json d.jsonl".split():
        assert sum(map(len, every(dataset(path=str(tmp_path / name))).values())) == 100


def test_values_that_json_lacks_become_text_or_null():
    import datetime

    assert plain({"a": datetime.date(2025, 1, 2), 1: (float("nan"), b"x")}) == {
        "a": "2025-01-02",
        "1": [None, "x"],
    }


# --- splits -------------------------------------------------------------------------------------------------


def test_a_hash_of_the_prompt_decides_the_split(tmp_path):
    splits = every(dataset(path=write(tmp_path / "a.jsonl")))
    again = every(dataset(path=write(tmp_path / "b.jsonl", ROWS[::-1] + [{"question": "?", "answer": "1"}])))
    other = every(dataset(path=str(tmp_path / "a.jsonl"), seed=1))
    for split in SPLITS:
        ids = {example.id for example in splits[split]}
        assert ids <= {example.id for example in again[split]}
        assert ids == {example.id for example in other[split]}
    assert [e.id for e in splits["train"]] != [e.id for e in other["train"]]
    larger = every(dataset(path=str(tmp_path / "a.jsonl"), heldout_share=0.5))
    assert {e.id for e in splits["heldout"]} < {e.id for e in larger["heldout"]}


@pytest.mark.parametrize("names", [("train", "validation", "heldout"), ("train", "dev", "test")])
def test_a_file_for_each_split(tmp_path, names):
    for name, part in zip(names, (ROWS[:50], ROWS[50:70], ROWS[70:]), strict=True):
        write(tmp_path / f"{name}.jsonl", part)
    splits = every(dataset(path=str(tmp_path)))
    assert [len(splits[split]) for split in SPLITS] == [50, 20, 30]
    files = {split: str(tmp_path / f"{name}.jsonl") for split, name in zip(SPLITS, names, strict=True)}
    assert every(dataset(**files)) == splits


def test_shards_and_splits_that_are_not_there(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.jsonl", ROWS[:30])
    write(tmp_path / "data/train-00001-of-00002.jsonl", ROWS[30:60])
    write(tmp_path / "data/test-00000-of-00001.jsonl", ROWS[60:])
    splits = every(dataset(path=str(tmp_path)))
    assert len(splits["heldout"]) == 40 and len(splits["validation"]) > 0
    assert len(splits["train"]) + len(splits["validation"]) == 60


def test_a_prompt_in_two_splits_is_refused_or_dropped(tmp_path, warned):
    write(tmp_path / "train.jsonl", ROWS[:60])
    write(tmp_path / "heldout.jsonl", ROWS[55:])
    with pytest.raises(
        ValueError, match=r"5 are in two: train.jsonl line 56 \(train\) and heldout.jsonl line"
    ):
        dataset(path=str(tmp_path))
    with warned("dropped 5 prompts"):
        splits = every(dataset(path=str(tmp_path), drop_duplicates=True))
    assert len(splits["heldout"]) == 45 and len(splits["train"]) + len(splits["validation"]) == 55


def test_too_few_examples(tmp_path):
    task = dataset(path=write(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"split 'heldout' has \d+ examples \(all: train \d+, .*count 90"):
        task.examples("heldout", 90)


# --- prompts ------------------------------------------------------------------------------------------------


def test_a_template_takes_columns_and_no_code(tmp_path):
    rows = [{"q": f"Which? {i}", "choices": ["red", "blue"], "answer": i % 2, "n": i} for i in range(40)]
    path = write(tmp_path / "a.jsonl", rows)
    task = get_task(
        "dataset",
        {"path": path, "template": "{q}\n{choices}\n{{{n}}}", "verifier": "choice", "system": "Hm."},
    )
    example = next(e for e in task.examples("train", 5) if e.data["gold"] == 1)
    assert example.prompt.partition("\n")[2].startswith("A. red\nB. blue\n{")
    assert task.verify(example, "B").ok and task.leaks(example, "It is B.")
    messages, tools = task.opening(example, True)
    assert [m["role"] for m in messages] == ["system", "user"] and tools is None
    for template in ("{q.__class__}", "{q!r}", "{q:>99}", "{}", "{q", "no column", "{0}"):
        with pytest.raises(ValueError, match="template"):
            get_task("dataset", {"path": path, "template": template, "verifier": "choice"})


def test_a_column_of_messages(tmp_path, warned):
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}
    parts = {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]}
    rows = [{"prompt": [system, {**user, "content": f"What is {i}?"}], "answer": str(i)} for i in range(30)]
    bad = [
        {"prompt": [user, {"role": "assistant", "content": "x"}], "answer": "1"},
        {"prompt": [{"role": "tool", "content": "x"}], "answer": "1"},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"},
        {"prompt": [], "answer": "1"},
        {"prompt": 5, "answer": "1"},
        {"prompt": " ", "answer": "1"},
    ]
    path = write(tmp_path / "a.jsonl", [*rows, {"prompt": [parts], "answer": "2"}, *bad])
    with warned(r"skipped 6 of 37 rows: a.jsonl line 32: prompt must end in"):
        task = get_task("dataset", {"path": path, "system": "Other."})
    examples = [example for part in every(task).values() for example in part]
    (joined,) = [example for example in examples if example.prompt == "What now?"]
    assert task.opening(joined, False)[0][0] == {"role": "system", "content": "Other."}
    other = next(example for example in examples if example is not joined)
    assert task.opening(other, False)[0] == [system, {"role": "user", "content": other.prompt}]


# --- bad data -----------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_counted_and_named_by_line(tmp_path, warned, capsys):
    path = Path(write(tmp_path / "a.jsonl"))
    bad = [b"{", b'{"question": "x"}', b"[]", b'{"question": "y", "answer": "none"}', b"\xff"]
    bad += [b'{"question": "What is 3 + 1?", "answer": 5}', b'{"question": 3, "answer": 5}']
    bad += [b'{"question": "\\ud800", "answer": 5}', b'{"question": "z", "answer": NaN}']
    path.write_bytes(path.read_bytes() + b"\n" + b"\n".join(bad))
    with warned("^warning: skipped 9 of 109 rows: a.jsonl line 102: is not JSON; a.jsonl line 104: must be"):
        task = dataset(path=str(path))
    dataset(path=str(path))  # as for the next model of a comparison
    assert capsys.readouterr().err == ""  # says it once
    assert sum(map(len, every(task).values())) == 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl", b"{\n", "have no usable row: a.jsonl line 1: is not JSON"),
        (
            "a.jsonl",
            b'{"question": "x", "answer": "?"}',
            "no usable row: .* answer must contain a number, got",
        ),
        (
            "a.jsonl",
            b'{"qestion": "x", "answer": "1"}',
            "(qestion, answer), got 'question'; did you mean qes",
        ),
        (
            "a.jsonl",
            b'{"question": "x", "anwser": "1"}',
            "answer must be a column of the data (question, anws",
        ),
        ("a.json", b"{", "a.json is not JSON"),
        ("a.json", b"5", "a.json must be an array of objects"),
        ("a.csv", b"question,question\n", "different column names"),
        (
            "a.csv",
            b"question;answer\nx;1,5\n",
            "a.csv must have ',' between its columns, but its first line has ';'",
        ),
        (
            "a.tsv",
            b"question|answer\nx|1\n",
            "must have '\\t' between its columns, but its first line has '|'",
        ),
        ("a.csv", b'question,answer\n"x,1\n', "a.csv line 2 is not CSV"),
        ("a.csv", b"question,answer\nx\n", "no usable row: a.csv line 2: must have 2 fields, got 1"),
        ("a.csv", b"question,answer\n\xff,1\n", "must be UTF-8, got byte 0xff"),
        ("a.parquet", b"PAR1", "a.parquet is not a Parquet file"),
        ("a.txt", b"x", "a data file must end in .jsonl, "),
    ],
)
def test_data_that_cannot_be_used(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        dataset(path=str(tmp_path / name))
    assert message.replace(".*", "") in str(caught.value) or all(
        part in str(caught.value) for part in message.split(".*")
    )


def test_paths_and_options_that_do_not_fit(tmp_path):
    path = write(tmp_path / "problems.jsonl")
    for options, message in [
        ({}, "path or train must name the data, got neither"),
        ({"path": str(tmp_path / "problem.jsonl")}, "must be a file, .*did you mean problems.jsonl"),
        ({"path": str(tmp_path / "no")}, "must be a file, a folder or a Hugging Face dataset"),
        ({"path": path, "train": path}, "must not both name a file"),
        ({"train": str(tmp_path / "x.jsonl")}, "there is no file"),
        ({"path": path, "heldout_share": 1.5}, "heldout_share and validation_share"),
        ({"path": path, "timeout": 0.0}, "timeout must be above 0"),
        ({"path": path, "verifier": 5}, "verifier must be a name"),
        ({"path": path, "verifier": "exakt"}, "did you mean exact"),
        ({"path": path, "weights": "a"}, "weights must be numbers"),
        ({"path": path, "verifer": "exact"}, "did you mean verifier"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataset(**options)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="a file for each split"):
        dataset(path=str(tmp_path / "folder"))


def test_relative_paths_and_the_home_directory(tmp_path, monkeypatch):
    """A run that is resumed elsewhere says where it looked."""
    (tmp_path / "rewards.py").write_text(REWARD)
    write(tmp_path / "problems.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for options in ({"path": "problems.jsonl"}, {"train": "problems.jsonl"}):
        with pytest.raises(ValueError, match=rf"'problems.jsonl'.* in {tmp_path}/elsewhere"):
            dataset(**options)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert every(dataset(path="~/problems.jsonl")) == every(dataset(train="~/problems.jsonl"))
    assert dataset(path="~/problems.jsonl", verifier="function:~/rewards.py:digits")


# --- whole runs ---------------------------------------------------------------------------------------------

SHORT = {"task": "dataset", "warm_start_steps": 0, "max_steps": 2, "eval_steps": 1, "num_examples": 30}
REWARD = '''
import json
import pathlib

def digits(completions, answer, **kwargs):
    """A share of digits. Raises if a file says so."""
    if pathlib.Path(__file__).with_name("broken").exists():
        raise RuntimeError("no service")
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]

def broken(completions, answer, **kwargs):
    return [1.0, 2.0]
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)
    return write(tmp_path / "problems.jsonl")


def run(model, tmp_path, options, **settings):
    settings = {**SHORT, "task_options": json.dumps(options), **settings}
    return tiny_run.run(tiny_run.arguments(model, tmp_path / "runs", **settings))


@pytest.mark.parametrize("train_on", ["reflection", "attempt"])
def test_a_graded_run_learns_from_scores(model, tmp_path, data, train_on):
    options = {"path": data, "prompt": "question", "verifier": f"function:{tmp_path}/rewards.py:digits"}
    settings = {"reward": "score", "success_threshold": 0.6, "train_on": train_on}
    done = run(model, tmp_path, options, **settings)
    assert done.status == 0, done.err
    episodes = tiny_run.records(done.folder, "episodes.jsonl.gz")
    assert all(episode["reward"] == episode["scores"][0] for episode in episodes if episode.get("scores"))
    assert any(0 < episode["reward"] < 1 for episode in episodes)
    failures = tiny_run.records(done.folder, "failures.jsonl")
    assert all(line.get("score", 0) < 0.6 for line in failures if "block" not in line)
    assert any(0 < line.get("score", 0) for line in failures if "block" not in line)
    assert failures[-1]["settings"]["success_threshold"] == 0.6
    steps = [line for line in tiny_run.records(done.folder) if "reward" in line]
    assert all(line["reward"] == pytest.approx(line["verdicts/score"]) for line in steps)
    assert "(right: a score of at least 0.6)" in done.out and "mean score, last try" in done.out


def test_a_function_that_fails_is_found_before_sampling(model, tmp_path, data):
    options = {"path": data, "prompt": "question", "verifier": f"function:{tmp_path}/rewards.py:broken"}
    done = run(model, tmp_path, options)
    assert done.status == 2 and done.folder is None
    assert "must return one number per completion, got 2 for 1, for problems.jsonl line" in done.err


def test_a_function_that_fails_later_ends_the_run_in_one_line_after_a_save(
    model, tmp_path, data, monkeypatch
):
    options = {"path": data, "prompt": "question", "verifier": f"function:{tmp_path}/rewards.py:digits"}
    settings = {"success_threshold": 0.6, "save_steps": 0, "eval_steps": 0, "max_steps": 3}
    whole = run(model, tmp_path / "whole", options, **settings)
    broken = tmp_path / "broken"  # the file appears when the first step is logged
    logged = Metrics.timings
    monkeypatch.setattr(Metrics, "timings", lambda *args: (logged(*args), broken.touch()))
    done = run(model, tmp_path, options, **settings)
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("error: ") and "Traceback" not in done.err
    assert "rewards.py:digits raised RuntimeError: no service (rewards.py, line 8), for problems" in done.err
    assert f"--resume {done.folder}" in done.err
    broken.unlink()
    monkeypatch.undo()
    again = tiny_run.run(["--resume", str(done.folder)])
    assert again.status == 0, again.err
    assert tiny_run.records(done.folder) == tiny_run.records(whole.folder)


def test_a_math_run_and_its_binary_files_have_no_scores(model, tmp_path, data):
    done = run(model, tmp_path, {"path": data, "prompt": "question", "verifier": "number"})
    assert done.status == 0, done.err
    assert "scores" not in tiny_run.records(done.folder, "episodes.jsonl.gz")[0]
    assert "verdicts/score" not in tiny_run.records(done.folder)[-1]
    assert "score" not in done.out
