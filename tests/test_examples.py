"""Every script in examples/ runs on a tiny model, as a process of its own, and stays short."""

import json
import re
from pathlib import Path

import pytest
import tiny_run

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_run.save_model(tmp_path_factory.mktemp("model"))
    config = json.loads((folder / "config.json").read_text())
    longer = {**config, "max_position_embeddings": 2048}  # a byte is a token here, and Countdown has rules
    (folder / "config.json").write_text(json.dumps(longer))
    return folder


def output(script, model, cwd, *options):
    done = tiny_run.command(ROOT / "examples" / script, ["--model", str(model), *options], folder=cwd)
    assert done.status == 0, done.err
    return done.out


def test_one_step(model, tmp_path):
    out = output("one_step.py", model, tmp_path)
    assert "2 of 2 attempts are wrong" in out
    assert float(re.search(r"gradient norm (\S+)", out)[1]) > 0


def test_own_task(model, tmp_path):
    out = output("own_task.py", model, tmp_path, "--dtype", "float32", "--device", "cpu", "--max_steps", "1")
    assert "sorting with" in out and "1st try" in out
    assert len(tiny_run.records(tmp_path / "runs/sorting-001")) == 1


def test_own_reward(model, tmp_path):
    small = "--dtype float32 --device cpu --max_steps 1 --num_examples 4 --num_eval 0 --report false"
    out = output("own_reward.py", model, tmp_path, *small.split())
    assert "verdicts/score" in out
    (metrics,) = tiny_run.records(tmp_path / "runs/word_counts-001")
    episodes = tiny_run.records(tmp_path / "runs/word_counts-001", "episodes.jsonl.gz")
    rows = {row["prompt"]: row["words"] for row in tiny_run.records(tmp_path, "word_counts.jsonl")}
    for episode in episodes:
        words, length = rows[episode["texts"]["prompt"]], len(episode["texts"]["retry"].split())
        assert episode["reward"] == pytest.approx(max(0.0, 1 - abs(length - words) / words))
    rewards = [episode["reward"] for episode in episodes]
    assert len(rewards) == 4 and any(0 < reward < 1 for reward in rewards)
    assert metrics["verdicts/score"] == pytest.approx(sum(rewards) / 4)


def test_kernels_in_your_loop(model, tmp_path):
    out = output("kernels_in_your_loop.py", model, tmp_path)
    difference, largest = map(float, re.search(r"gradient: (\S+), of (\S+)", out).groups())
    assert difference < 1e-5 * largest


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_fits_a_screen_and_is_tested(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert '"--model", default=Config.model_name_or_path' in text
    assert f'"{script.name}"' in Path(__file__).read_text(encoding="utf-8")
