"""benchmarks/packing.py: tokens counted against a set of all prefixes, on a run of train.py."""

import sys
from collections import defaultdict
from pathlib import Path

import pytest
import tiny_run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import packing  # noqa: E402

from grpo import config  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.finished(tmp_path_factory.mktemp("packing"))


def test_layouts_of_one_step_spelled_out():
    prompt, other = [1, 2, 3], [1, 4]
    completions = [([5, 6, 7], [True] * 3), ([5, 8], [True, True]), ([9], [False])]
    counted = packing.count([(prompt, completions), (other, [([5, 5], [True, False])])], max_tokens=99)
    # Three sequences of up to 3 + 3 tokens; prompts 3 + 2 and completions 3 + 2 + 1; places 1 2 3 5 6 and 4.
    assert counted == {"padded": 18, "prompts once": 11, "prefixes once": 6}


def test_a_run_is_counted(run, capsys):
    assert packing.main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10].strip() for line in lines[1:]] == ["warm start", "RL, 4 step"]
    prefixes = defaultdict(set)
    for record in tiny_run.records(run, "episodes.jsonl.gz"):
        trained = sum(tokens for role, tokens in record["roles"] if role == "reflection")
        ids = tuple(record["prompt_ids"] + record["completion_ids"][: max(0, trained - 1)])
        prefixes[record["step"]] |= {ids[:end] for end in range(1, len(ids) + 1)}
    mean = sum(map(len, prefixes.values())) / len(prefixes)
    assert lines[2].split()[-2] == f"{mean:.0f}"
    steps = list(packing.warm_start_steps(run, config.load(run / "config.yaml")))
    assert (
        len(steps) == tiny_run.SETTINGS["warm_start_steps"] == len(tiny_run.records(run, "warm_start.jsonl"))
    )


def test_what_is_no_run_is_an_error(tmp_path, capsys):
    assert packing.main([str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
