"""The report of a run: what it shows, what it says is missing, and that nothing in a run is trusted."""

import gzip
import html.parser
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import tiny
import tiny_run
from odd_runs import ATTACK, FOLDER, LONG, episode, write_lines
from tokenizers import Tokenizer

from grpo.report import curves, data, groups, page, tokens
from grpo.report.__main__ import main
from grpo.report.text import interval, points
from grpo.run import files


def report(folder: Path) -> str:
    page.write_report([folder], folder / page.FILE)
    return (folder / page.FILE).read_text(encoding="utf-8")


def unpack(run: Path) -> None:
    """The episodes as a plain file, as older versions wrote them."""
    packed = run / "episodes.jsonl.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, scripts and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text):
        self.text += text


def words(text: str) -> str:
    return " ".join(Elements(text).text.split())


# --- what a page shows ------------------------------------------------------------------------------------


def test_the_page_of_a_run_shows_the_stored_result_curves_groups_and_settings(finished_run):
    text = report(finished_run)
    shown = words(text)
    comparison = json.loads((finished_run / "evaluation.json").read_text())["comparisons"][1]
    assert (comparison["before"], comparison["after"]) == ("before_rl", "trained")
    change = comparison["second_try"]
    assert f"{points(change)} points {interval(change)}" in shown
    for title in (
        "Second try",
        "Retries",
        "Reward",
        "Length",
        "Truncated",
        "KL",
        "Entropy",
        "Groups with a signal",
    ):
        assert f"<h3>{title}</h3>" in text
    assert text.count("<svg") == 10 and "Seconds per step" in shown and "Warm start" in shown
    assert text.count('class="group"') == 8 and "Nothing: every group" in shown
    assert "num_generations" in shown and re.search(r"3 changed.*8 ", shown)
    assert "4 of 4 steps" in shown and "11 of 16 examples failed" in shown
    assert len(text) < 300_000


def test_a_page_is_one_file_without_network_and_its_policy_allows_its_script_only(finished_run):
    text = report(finished_run)
    tags = Elements(text).tags
    policy = next(attrs["content"] for tag, attrs in tags if "Content-Security-Policy" in attrs.values())
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy
    assert not [attrs for _, attrs in tags if {"src", "srcset", "action"} & set(attrs)]
    assert all(attrs["href"].startswith("#") for tag, attrs in tags if "href" in attrs)
    assert "http" not in re.sub(r"http-equiv", "", text.split("<main>")[0]) and "@import" not in text


def test_a_page_is_the_same_each_time_and_measures_nothing(finished_run):
    assert report(finished_run) == report(finished_run)


def test_warnings_come_with_their_advice(run):
    files.append_jsonl(run / "metrics.jsonl", {"step": 4, "warning": "large_kl", "advice": "Check beta."})
    assert "large_kl (step 4): Check beta." in words(report(run))


def test_several_runs_share_charts_and_show_different_settings(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", "episodes.jsonl.gz", "timings.jsonl"):
        (other / name).write_bytes((run / name).read_bytes())
    config = (run / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("learning_rate: 0.001", "learning_rate: 0.5"))
    monkeypatch.chdir(tmp_path)
    assert main([str(run), str(other)]) == 0
    text = (tmp_path / "report.html").read_text()
    different = text.split("Different between the runs")[1].split("Different from the preset")[0]
    assert re.findall(r'<th scope="row">(\w+)</th>', different) == ["learning_rate"]
    assert text.count("<svg") == 10 and text.count('class="group"') == 16
    chart = text.split("<h3>Reward</h3>")[1].split("</figure>")[0]
    assert "tiny-001" in chart and "other" in chart and 'class="swatch series-2"' in chart


def test_runs_of_one_name_are_told_apart_by_the_folders_above():
    folders = [Path("/a/b/demo-001"), Path("/a/c/demo-001"), Path("/a/c/demo-002")]
    assert page.distinct_names(folders) == ["b/demo-001", "c/demo-001", "c/demo-002"]
    assert page.distinct_names(folders[1:]) == ["demo-001", "demo-002"]


def test_tokens_of_one_character_are_one_piece_and_each_turn_says_whether_it_is_trained():
    fast = tiny.byte_tokenizer()
    ids = fast.encode("é 5", add_special_tokens=False)
    record = {
        "completion_ids": [*ids, ids[0]],
        "roles": ["reflection"] * 3 + ["context", "retry"],
        "logprobs": [-1.0, -0.5, -0.25, 0.0, -3.0],
    }
    first, fed, retry = tokens.turns(record, frozenset({"reflection"}), fast.backend_tokenizer)
    assert (first["pieces"], first["logprobs"]) == (["é", " "], [-1.5, -0.25])
    assert (first["trained"], fed["trained"], retry["trained"]) == (True, False, False)
    assert fed["pieces"] == ["5"] and retry["pieces"] == ["\ufffd"]  # a turn that ends inside a character


def test_without_a_tokenizer_whole_turns_are_coloured():
    turns = tokens.turns(episode(1, 0), frozenset({"reflection"}), None)
    assert [(turn["role"], turn["pieces"]) for turn in turns[::2]] == [
        ("reflection", ["ABCD"]),
        ("retry", ["GHI"]),
    ]
    assert turns[0]["logprobs"] == [round(-5.7 / 4, 2)]


def test_a_damaged_tokenizer_or_ids_that_are_not_its_own_fall_back_to_whole_turns(run):
    for path in run.rglob("tokenizer.json"):
        path.write_text('{"model": 5')
    assert tokens.load_tokenizer(run) is None
    assert "No tokenizer.json in the run" in words(report(run))
    fast: Tokenizer = tiny.byte_tokenizer().backend_tokenizer
    for odd in (10**9, -1, 2**70, "5", None):
        record = episode(1, 0, completion_ids=[odd] * 9)
        assert tokens.turns(record, frozenset(), fast)[0]["pieces"] == ["ABCD"]


# --- runs in every state ----------------------------------------------------------------------------------

STATES = {
    "empty": (["config.yaml"], ["No RL step yet", "metrics.jsonl does not exist yet"]),
    "warm start": (
        ["config.yaml", "warm_start.jsonl"],
        ["No RL step yet", "3 of 3 steps", "Loss per supervised"],
    ),
    "failures": (["config.yaml", "failures.jsonl"], ["No RL step yet", "11 of 16 examples failed"]),
    "training": (
        ["config.yaml", "metrics.jsonl", "episodes.jsonl.gz", "timings.jsonl"],
        [
            "Not evaluated yet. In validation the second try went from",
            "step 4",
            "evaluation.json does not exist yet",
        ],
    ),
    "without settings": (
        ["metrics.jsonl"],
        ["config.yaml does not exist", "An unknown number of validation"],
    ),
    "evaluating": (
        ["config.yaml", "metrics.jsonl", "evaluation-before_rl.jsonl"],
        ["Not evaluated yet", "Examples on held-out problems, before and after RL, come with the evaluation"],
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_each_stage_has_a_page_that_says_what_is_missing(run, state):
    kept, expected = STATES[state]
    for path in run.iterdir():
        if path.is_file() and path.name not in kept:
            path.unlink()
    shown = words(report(run))
    assert [text for text in expected if text not in shown] == []


def test_a_run_without_validation_is_judged_by_its_reward(run):
    lines = [line for line in tiny_run.records(run) if "reward" in line]
    write_lines(run / "metrics.jsonl", *lines)
    (run / "evaluation.json").unlink()
    assert re.search(r"Not evaluated yet. Reward 0\.\d{3} at step 1, 0\.\d{3} at step 4", words(report(run)))


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "timings.jsonl", "episodes.jsonl", "failures.jsonl", "stages.jsonl"]
)
def test_damaged_and_half_written_lines_are_left_out_and_counted(run, name):
    if name == "episodes.jsonl":
        unpack(run)
    whole = (run / name).read_bytes()
    (run / name).write_bytes(b"\xff\xfe{]\n[1]\n" + whole + whole[: len(whole) // 3].rstrip(b"\n"))
    shown = words(report(run))
    assert re.search(rf"{name}: [1-9] lines? (is|are) half-written", shown)
    assert "4 of 4 steps" in shown


def test_groups_before_a_kill_or_damage_in_the_compressed_episodes_are_shown(run):
    path = run / "episodes.jsonl.gz"
    whole = path.read_bytes()
    third_step, last_step = [found.start() for found in re.finditer(re.escape(whole[:10]), whole)][2:]
    path.write_bytes(whole[: last_step + 300])  # a kill in the write of step 4
    text = report(run)
    assert sorted(re.findall(r'data-step="(\d)"', text))[:6] == ["1", "1", "2", "2", "3", "3"]
    assert "episodes.jsonl.gz: 1 line is half-written" in words(text)
    path.write_bytes(whole[: third_step + 12] + b"\xff\xff\xff\xff" + whole[third_step + 16 :])
    text = report(run)
    assert sorted(re.findall(r'data-step="(\d)"', text)) == ["1", "1", "2", "2"]
    assert "episodes.jsonl.gz is damaged after 4 groups" in words(text)


def test_the_page_is_the_same_with_the_plain_episodes_of_older_versions(run):
    compressed = report(run)
    lines = tiny_run.records(run, "episodes.jsonl.gz")
    for line in lines:
        line["roles"] = [role for role, tokens in line["roles"] for _ in range(tokens)]
    (run / "episodes.jsonl.gz").unlink()
    write_lines(run / "episodes.jsonl", *lines)
    os.utime(run / "episodes.jsonl", (0, 0))  # the page shows when the newest file was written
    assert report(run) == compressed and compressed.count('class="group"') == 8


@pytest.mark.parametrize(
    "text", ["", "[]", "5", '{"models": 5}', "\x00", '{"models": {}, "comparisons": [{}]}', "[" * 10**5]
)
def test_a_damaged_evaluation_is_noted(run, text):
    (run / "evaluation.json").write_text(text)
    shown = words(report(run))
    assert "Not evaluated yet. In validation" in shown
    assert "evaluation.json could not be read" in shown or "table" in shown


def test_the_files_and_labels_of_version_0_1_are_read(run):
    (run / "evaluation-before_rl.jsonl").rename(run / "evaluation-vanilla.jsonl")
    text = (run / "evaluation.json").read_text().replace("before_rl", "vanilla")
    (run / "evaluation.json").write_text(text)
    text = report(run)
    assert ">before_rl<br>" in text and "newly right" in words(text) and "vanilla" not in text


def test_without_the_stored_answers_the_examples_are_those_of_the_table(run):
    for path in run.glob("evaluation-*.jsonl"):
        path.unlink()
    assert "Before RL First try" in words(report(run))
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["examples"] = [
        5,
        {},
        {"before": 5, "prompt": []},
        {"before": {"first": []}, "after": {"retry": {}}},
    ]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "What the model wrote" in words(report(run))


def test_a_pipe_or_a_folder_in_place_of_a_log_is_not_waited_for(run):
    for name in ("metrics.jsonl", "episodes.jsonl.gz", "evaluation.json", "config.yaml"):
        (run / name).unlink()
    os.mkfifo(run / "metrics.jsonl")
    os.mkfifo(run / "evaluation.json")
    os.mkfifo(run / "config.yaml")
    (run / "episodes.jsonl.gz").mkdir()
    assert "No RL step yet" in words(report(run))


# --- what a run may contain -------------------------------------------------------------------------------


def test_nothing_in_a_run_becomes_markup_or_reorders_the_page(hostile_run):
    text = report(hostile_run)
    parsed = Elements(text)
    scripts = [attrs for tag, attrs in parsed.tags if tag == "script"]
    assert [attrs for attrs in scripts if attrs.get("type") != "application/json"] == [{}]  # ours alone
    assert "img" not in {tag for tag, _ in parsed.tags}
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert not set("\u202e\u2066\x00\x1b") & set(text) and "49" not in ATTACK and "{{ 7 * 7 }}" in text
    shown = words(text)
    assert "\\u202egnirts" in shown and FOLDER in shown and "more characters]" in shown
    assert LONG[: len(ATTACK) + 6_000] not in text and len(text) < 2_000_000


def test_reading_a_run_imports_neither_its_task_nor_torch(run, tmp_path):
    (tmp_path / "evil.py").write_text("open('imported', 'w')\n")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace('"tiny:Toy"', '"evil:Task"'))
    code = f"import sys, grpo.report.__main__ as r; r.main([{str(run)!r}]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists() and "evil:Task" in (run / "report.html").read_text()


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, 12_345])
def test_thinned_keeps_evenly_spaced_items_and_the_ends(count):
    log = data.Thinned[tuple[int]](8)
    for i in range(count):
        log.add((i,))
    kept = [i for (i,) in log.items()]
    assert len(kept) <= 9 and log.count == count
    assert (kept[:1], kept[-1:]) == (([0], [count - 1]) if count else ([], []))
    assert len(set(b - a for a, b in zip(kept[:-1], kept[1:-1], strict=False))) <= 1


@pytest.mark.parametrize("name", ["episodes.jsonl.gz", "episodes.jsonl"])
def test_a_long_log_is_read_in_bounded_memory_and_its_groups_are_evenly_spaced(run, monkeypatch, name):
    monkeypatch.setattr(data, "GROUPS_INDEXED", 256)
    monkeypatch.setattr(groups, "MOST_GROUPS", 40)
    (run / "episodes.jsonl.gz").unlink()
    for step in range(1, 1001):
        texts = {
            "prompt": f"Problem of step {step}?",
            "attempt": 20_000 * "x",
            "reflection": "a",
            "retry": "b",
        }
        files.append_jsonl(run / name, episode(step, 0, texts=texts))
    tracemalloc.start()
    found = data.read_run(run, "run")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3e6
    assert found.groups == 1000 and len(found.places) <= data.GROUPS_INDEXED + 1
    text = report(run)
    steps = [int(step) for step in re.findall(r'data-step="(\d+)"', text)]
    assert len(steps) == groups.MOST_GROUPS and (steps[0], steps[-1]) == (1, 1000)
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 32
    assert "The page has 40 of 1000 groups, evenly spaced." in words(text)


def test_compressed_episodes_are_never_read_backwards(run, monkeypatch):
    """Python would decompress the file from its beginning again, for each group."""
    rewinds = []
    monkeypatch.setattr("gzip._GzipReader._rewind", lambda reader: rewinds.append(reader))
    (run / "episodes.jsonl.gz").unlink()
    texts = {"attempt": 200_000 * "x"}  # so that a group is longer than Python's buffer
    for step in range(1, 9):
        files.append_jsonl(run / "episodes.jsonl.gz", *(episode(step, 0, i, texts=texts) for i in range(3)))
    assert report(run).count('class="group"') == 8 and not rewinds


def test_a_page_stays_below_its_limit_and_says_what_it_leaves_out(run):
    texts = {"prompt": "?", "attempt": "!", "reflection": 5_000 * "<", "retry": 5_000 * "<"}
    records = [episode(step, 0, i, texts=texts, roles=[]) for step in range(1, 41) for i in range(20)]
    (run / "episodes.jsonl.gz").unlink()
    files.append_jsonl(run / "episodes.jsonl.gz", *records)
    text = report(run)
    assert len(text.encode()) < page.PAGE_BYTES
    assert "The page has" in words(text) and '"left_out":4' in text
    assert len(re.findall('class="group"', text)) < 40


def test_a_page_that_cannot_be_small_enough_is_refused_in_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr(page, "PAGE_BYTES", 10_000)
    assert main([str(run)]) == 2
    assert re.fullmatch(r"error: .* at most 10000 bytes, got \d+: name fewer runs\n", capsys.readouterr().err)


def test_one_endless_line_is_skipped(run, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 1000)
    lines = [
        b'{"step": 1, "x": "' + 5000 * b"x" + b'"}\n',
        b'{"step": 2}\n',
        1000 * b"y",
        b"\n",
        b'{"step": 3}\n',
        b"{",
    ]
    path = run / "log.jsonl"
    path.write_bytes(b"".join(lines))
    with open(path, "rb") as file:
        found = [(offset, line and data.record_of(line)) for offset, line in data.whole_lines(file)]
    starts = [0, len(lines[0]), len(lines[0] + lines[1])]
    assert found[1] == (starts[1], {"step": 2}) and found[0] == (0, None) and found[2] == (starts[2], None)
    assert [line for _, line in found][3:] == [{"step": 3}, None]


# --- the command, and the run that writes its own report --------------------------------------------------


def test_a_path_that_is_no_run_gives_one_line(tmp_path, capsys, run):
    for argv in ([str(tmp_path / "none")], [str(tmp_path)], [str(run), "--output", str(tmp_path)]):
        assert main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main([str(run), "--output", str(tmp_path / "deep/page.html")]) == 0
    assert (tmp_path / "deep/page.html").exists()
    (tmp_path / "file").touch()
    assert main([str(run), "--output", str(tmp_path / "file/page.html")]) == 1


def test_without_matplotlib_the_page_has_no_curves_and_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not curves.available()
    text = report(run)
    assert "reflect-grpo[report]" in words(text) and "<svg" not in text and 'class="group"' in text


def test_a_run_refreshes_its_report_and_names_it_at_its_end(tmp_path):
    model = tiny_run.save_model(tmp_path / "model")
    done = tiny_run.run(tiny_run.arguments(model, tmp_path / "runs", report=True, max_steps=2, num_eval=2))
    assert done.status == 0 and done.folder is not None, done.err
    assert done.out.splitlines()[-2:] == [
        f"report: {done.folder / 'report.html'}",
        f"checkpoint: {done.folder / 'checkpoints' / 'step-000002'}",
    ]
    assert "2 of 2 steps" in words((done.folder / "report.html").read_text())


def test_a_report_that_fails_costs_the_run_a_warning_only(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no page today")

    monkeypatch.setattr(page, "render", fail)
    model = tiny_run.save_model(tmp_path / "model")
    done = tiny_run.run(tiny_run.arguments(model, tmp_path / "runs", report=True, max_steps=1, num_eval=0))
    assert done.status == 0
    assert "warning: report.html was not written: RuntimeError: no page today" in done.err


def test_a_run_that_fails_leaves_a_report(tmp_path):
    model = tiny_run.save_model(tmp_path / "model")
    settings = {"report": True, "task": "tiny:Toy", "num_examples": 1, "warm_start_steps": 1}
    done = tiny_run.run(tiny_run.arguments(model, tmp_path / "runs", **settings, groups_per_step=1))
    assert done.folder is not None and (done.folder / "report.html").exists()


def test_a_live_report_takes_its_share_of_the_time(run, monkeypatch):
    clock = [100.0]
    written = []

    def write(*_):
        written.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr(page, "write_report", write)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    live = page.LiveReport(run)
    for _ in range(1000):
        live.refresh()
        clock[0] += 1.0
    assert len(written) <= 1 + 1000 * page.SHARE and len(written) > 15
