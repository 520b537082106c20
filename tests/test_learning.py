"""benchmarks/learning.py on a tiny model: ours from the same start, the job for TRL, and the table."""

import json
import sys
from pathlib import Path

import pytest
import tiny_run
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import learning  # noqa: E402
from lib import learning_trl  # noqa: E402

from grpo import config, failures  # noqa: E402
from grpo.tasks import Verdict  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.finished(tmp_path_factory.mktemp("learning"))


def test_ours_is_trained_from_the_start_of_the_run_and_measured(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the process that evaluates
    argv = [str(run), "--trainers", "ours", "--max_steps", "4", "--save_steps", "2"]
    argv += ["--num_eval", "8", "--output", str(tmp_path)]
    assert learning.main(argv) == 0
    table = capsys.readouterr().out.split("failures")[-1]
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["start", "ours, 2", "ours, 4"]
    (ours,) = (tmp_path / run.name).glob("ours-*")
    # The settings of the run, its start and its failures: so the same steps as the run's own.
    rewards = [
        [one["reward"] for one in tiny_run.records(folder, "episodes.jsonl.gz")] for folder in (run, ours)
    ]
    assert rewards[0] == rewards[1] and rewards[0]
    times = [line["step_time"] for line in tiny_run.records(ours, "timings.jsonl")]
    assert [row["seconds"] for row in rows] == pytest.approx([0, sum(times[:2]), sum(times)])
    # The same command again has nothing left to do, and says the same.
    assert learning.main(argv) == 0
    again = capsys.readouterr().out
    assert "| ours, 4 |" in again and again in table
    assert len(list((tmp_path / run.name).glob("ours-*"))) == 1


def test_trl_meets_the_failures_of_the_run_in_its_order(run):
    settings = config.load(run / "config.yaml")
    rows = list(learning.conversations(run, settings))
    episodes = tiny_run.records(run, "episodes.jsonl.gz")
    met = [one["example_id"] for one in episodes if one["generation"] == 0]
    assert [json.loads(row["example"])["id"] for row in rows] == met
    attempts = {one.example.id: one.text for one in failures.load(run / "failures.jsonl")}
    for row in rows:
        *begin, attempt, instruction = row["prompt"]
        assert attempt == {"role": "assistant", "content": attempts[json.loads(row["example"])["id"]]}
        assert begin[-1]["role"] == instruction["role"] == "user"


def test_settings_shared_with_trl_are_settings():
    assert set(learning_trl.SHARED) <= set(vars(config.Config()))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["runs/none"], "RUN must be a finished run directory, got runs/none"),
        (["--save_steps", "0", "x"], "--save_steps must be at least 1, got 0"),
        (["--max_steps", "-1", "x"], "--max_steps must be at least 0, got -1"),
        (["--trainers", "verl", "x"], "invalid choice: 'verl'"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        learning.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_run_it_says_how_to_use_it(capsys):
    assert learning.main([]) == 0
    assert "RUN" in capsys.readouterr().out


def test_trl_learns_from_the_same_weights(run, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    argv = [str(run), "--trainers", "trl", "--max_steps", "2", "--save_steps", "1"]
    assert learning.main([*argv, "--num_eval", "8", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["start", "trl, 1", "trl, 2"]
    assert 0 < rows[1]["seconds"] < rows[2]["seconds"]


def test_retries_in_trl_follow_the_whole_conversation_and_are_judged(run):
    tokenizer = learning_trl.load_tokenizer(run / "start")
    seen = []

    class Model:
        """Answers the first problem right and the second one wrong."""

        def eval(self):
            pass

        train = eval

        def generate(self, input_ids, attention_mask, **_):
            seen.extend(
                tokenizer.decode(ids[mask.bool()])
                for ids, mask in zip(input_ids, attention_mask, strict=True)
            )
            assert attention_mask[:, -1].all() and not attention_mask.all()
            answers = [tokenizer(text)["input_ids"] for text in ("right", "wrong")]
            return torch.cat([input_ids, torch.tensor(answers)], dim=1)

    class Task:
        def verify(self, example, text):
            return Verdict("ok" if text == "right" else "wrong")

    settings = {"dtype": "float32", "max_completion_length": 5, "temperature": 1.0}
    reward = learning_trl.retry_reward({"settings": settings}, Task(), tokenizer, Model)
    prompts = [[{"role": "user", "content": text}] for text in ("Problem?", "A much longer problem?")]
    completions = [[{"role": "assistant", "content": text}] for text in ("Hm.", "Well, well.")]
    examples = [json.dumps({"id": str(i), "prompt": f"Again {i}?", "data": {}}) for i in range(2)]
    assert reward(prompts, completions, examples) == [1.0, 0.0]
    for text, parts in zip(
        seen, (("Problem?", "Hm.", "Again 0?"), ("A much", "Well, well.", "Again 1?")), strict=True
    ):
        places = [text.index(part) for part in parts]
        assert places == sorted(places) and text.endswith("assistant\n")
