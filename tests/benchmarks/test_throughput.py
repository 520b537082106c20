"""benchmarks/rollout.py, step.py, scaling.py: all engines sample the same work, and the figures agree."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import tiny_run
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import operations  # noqa: E402
import rollout  # noqa: E402
import scaling  # noqa: E402
import step  # noqa: E402
from lib import rollouts, steps  # noqa: E402

from grpo.model import weights  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    argv = ["--model", str(model), "--device", "cpu", "--dtypes", "float32", "--scripts", "plain", "reflect"]
    argv += ["--rows", "10", "--prompts", "12", "--new", "8", "--rounds", "2", "--output", str(folder)]
    assert rollout.main(argv) == 0
    return json.loads((folder / "rollout.json").read_text())


def test_every_engine_is_measured_or_named_as_absent(measured):
    assert {row["workload"].split(",")[0] for row in measured["rows"]} == {"plain", "reflect"}
    for script in ("plain", "reflect"):
        there = {row["engine"] for row in measured["rows"] if row["workload"].startswith(script)}
        gone = {name.partition(" ")[0] for name in measured["absent"]}
        assert {"ours", "generate", "linear"} <= there
        assert there | gone >= set(rollouts.BUILDERS)


def test_figures_of_a_rollout_agree_with_each_other(measured):
    for row in measured["rows"]:
        assert 0 < row["low"] <= row["seconds"] <= row["high"] and row["times_ours"] > 0
        if row["engine"] == "ours":
            assert row["times_ours"] == 1 and 0 < row["ceiling"] < 1 and row["read"] > 0
    plain = next(r for r in measured["rows"] if r["engine"] == "ours" and r["workload"].startswith("plain"))
    work = rollout.workload("plain", 10, 12, 8, vocab_size=272)
    assert plain["passes"] == max(map(sum, work.turns))  # no step more than the longest row has tokens
    assert plain["tokens"] == work.num_sampled + 2 * 11  # and the two prompts, once
    assert plain["tokens_per_second"] == pytest.approx(work.num_sampled / plain["seconds"])


def test_a_workload_is_the_same_for_all_and_shares_prompts():
    work, again = (rollout.workload("reflect", 20, 12, 16, vocab_size=50) for _ in range(2))
    assert work == again and work.num_rows == 20
    assert len(set(work.prompts)) == 3 and work.prompts[0] == work.prompts[7] != work.prompts[8]
    for turns, feeds in zip(work.turns, work.feeds, strict=True):
        assert len(turns) == 3 and len(feeds) == 2
        assert 12 <= turns[0] <= 24 and 4 <= turns[1] <= 16 and 12 <= turns[2] <= 24
    assert len({turns[1] for turns in work.turns}) > 5  # ragged


@pytest.mark.parametrize("name", ["ours", "generate", "continuous"])
def test_engines_sample_what_was_asked_for(name, model, tmp_path):
    loaded, tokenizer = weights.load(model)
    engines, absent, folder = rollouts.build([name], loaded, tokenizer, torch.float32, "cpu", 6)
    if name in absent:
        pytest.skip(absent[name])
    with folder:
        work = rollout.workload("reflect", 10, 12, 8, vocab_size=loaded.config.vocab_size)
        assert engines[name](work) == work.num_sampled


def test_an_engine_that_fails_or_cheats_is_not_in_the_table(model):
    loaded, _ = weights.load(model)
    work = rollout.workload("plain", 4, 12, 8, vocab_size=50)

    def broken(_):
        raise RuntimeError("out of luck")

    engines = {"generate": broken, "vllm": lambda w: w.num_sampled - 1}
    rows, failed = rollout.measure(work, engines, loaded, "cpu", 1, 1e9)
    assert rows == [] and "out of luck" in failed["generate"] and "sampled" in failed["vllm"]


def test_a_step_of_ours_is_timed_in_its_parts(model, capsys):
    argv = ["--engine", "ours", "--folder", str(model), "--dtype", "float32", "--prompts", "2"]
    argv += ["--generations", "4", "--prompt", "10", "--completion", "6", "--steps", "2"]
    assert step.main(argv) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert len(found["seconds"]) == 2 and found["peak_gb"] > 0
    for name in ("rollout", "update"):
        assert len(found["parts"][name]) == 2 and found["flops"][name] > 0
        assert 0 < found["share_of_gemm"][name] < 1
    assert found["seconds"] == pytest.approx(
        [a + b for a, b in zip(found["parts"]["rollout"], found["parts"]["update"], strict=True)]
    )


def test_the_profile_names_the_operations(model, capsys):
    argv = ["--model", str(model), "--dtype", "float32", "--prompts", "1", "--generations", "2"]
    assert step.main([*argv, "--prompt", "10", "--completion", "4", "--beta", "0", "--profile"]) == 0
    rollouts, updates = capsys.readouterr().out.split("\nupdate\n")
    # Two rows: all of the rollout's products are packed ones, where this build of torch can pack.
    assert "mkldnn::_linear_pointwise" in rollouts or "aten::mm" in rollouts
    assert rollouts.count("outside of operations: ") == updates.count("outside of operations: ") == 1
    assert "aten::bmm" in rollouts and "Backward" in updates and "Backward" not in rollouts


def test_an_engine_without_its_package_is_absent(monkeypatch, model):
    arguments = argparse.Namespace(engines=["ours", "trl"], rounds=1, trl_python=Path("/nowhere/python"))

    def run(command, **options):
        if command[0] == "/nowhere/python":
            return argparse.Namespace(
                returncode=1, stdout="", stderr="...\nModuleNotFoundError: No module named 'trl'"
            )
        figures = {"seconds": [1.0, 3.0], "peak_gb": 2.0, "parts": {}, "flops": {}}
        return argparse.Namespace(returncode=0, stdout=f"noise\n{json.dumps(figures)}\n", stderr="")

    monkeypatch.setattr(step.subprocess, "run", run)
    results, absent = step.measure(arguments, [], "folder")
    assert results["ours"]["median"] == 2 and absent == {"trl": "ModuleNotFoundError: No module named 'trl'"}
    assert "absent: trl (GRPOTrainer): ModuleNotFoundError" in step.report(results, absent)


def test_prompts_have_exactly_their_length(model):
    tokenizer = weights.load(model)[1]
    texts = steps.prompt_texts(tokenizer, 3, 17, seed=0)
    assert len(set(texts)) == 3
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [17] * 3


def test_exponents():
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert scaling.exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    points = [{"rollout": s, "update": s * s, "memory": 2.0} for s in sizes]
    points[-1]["rollout"] = 16.0
    fit = scaling.fits(sizes, points)
    assert fit["update"] == pytest.approx({"all": 2, "last": 2}) and fit["memory"]["all"] == pytest.approx(0)
    assert fit["rollout"]["last"] == pytest.approx(2) and 1 < fit["rollout"]["all"] < 2
    assert math.isnan(scaling.exponent([1.0], [1.0]))


def test_a_random_model_of_any_size_can_be_loaded(model, tmp_path):
    tokenizer = weights.load(model)[1]
    config = {**scaling.MODELS["135M"], "hidden_size": 18, "intermediate_size": 24, "num_hidden_layers": 2}
    config["vocab_size"] = 300
    count = scaling.save_random_model(config, tokenizer, tmp_path / "m", torch.bfloat16)
    loaded, _ = weights.load(tmp_path / "m", torch.bfloat16)
    assert sum(p.numel() for p in loaded.parameters()) == count


@pytest.mark.parametrize(
    "script, argv, message",
    [
        (rollout, ["--rows", "0"], "--rows must be at least 1, got [0]"),
        (rollout, ["--peers", "vlm"], "invalid choice: 'vlm'"),
        (step, ["--generations", "1"], "--generations must be at least 2, got 1"),
        (step, ["--engines", "trl"], "--engines must name ours"),
        (scaling, ["--axes", "model", "--values", "1", "2"], "--values takes rising numbers for one axis"),
        (scaling, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (operations, ["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(script, argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_operations_are_compared_with_torchs(monkeypatch, capsys):
    monkeypatch.setattr(operations, "WEIGHT", (64, 32))
    monkeypatch.setattr(operations, "TOKENS", 16)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # needs a C++ compiler
    names = list(operations.OPERATIONS)
    assert operations.main(["--rounds", "1", "--threads", "1", "--operations", *names]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert [line.split("|")[1].strip() for line in lines] == [n for n in names for _ in range(2)]
    assert err.count("compiled in") == 2
    assert all(float(line.split("|")[-2]) > 0 for line in lines)
