"""benchmarks/evidence.py on a tiny model: each command leaves a run, from the same starting weights."""

import json
import sys
from pathlib import Path

import pytest
import tiny_run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import evidence  # noqa: E402


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """One run per seed, in a folder of their own."""
    root = tmp_path_factory.mktemp("evidence")
    model = tiny_run.save_model(root / "model")
    settings = tiny_run.arguments(model, root / "runs")
    start = settings.index("--run_name")
    del settings[start : start + 2]  # evidence.py names its runs
    assert evidence.main(["seeds", "--seeds", "1", "2", *settings, "--num_eval", "8"]) == 0
    return root / "runs"


def rewards(folder: Path) -> list[float]:
    return [record["reward"] for record in tiny_run.records(folder, "episodes.jsonl.gz")]


def test_seeds_and_table(seeded, capsys):
    runs = [seeded / "seed1-001", seeded / "seed2-001"]
    assert evidence.main(["table", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert "seed1-001" in out and "seed2-001" in out and "mean gain of the second try over 2 runs" in out
    stored = json.loads((seeded / "evidence.json").read_text())
    gains = [one["gain"]["second_try"]["mean"] for one in stored]
    after = [one["after"]["second_try"]["mean"] - one["before"]["second_try"]["mean"] for one in stored]
    assert gains == pytest.approx(after)


@pytest.mark.parametrize("what", ["shuffled", "supervised", "longer"])
def test_controls_start_from_the_weights_of_the_run(seeded, what, capsys):
    source = seeded / "seed1-001"
    assert evidence.main([what, str(source)]) == 0
    assert f"second try of seed1-001-{what}-001 minus that of seed1-001:" in capsys.readouterr().out
    folder = seeded / f"seed1-001-{what}-001"
    weights = "model.safetensors"
    assert (folder / "start" / weights).read_bytes() == (source / "start" / weights).read_bytes()
    assert (folder / "failures.jsonl").read_bytes() == (source / "failures.jsonl").read_bytes()
    assert (folder / "evaluation.json").exists()
    last = max((folder / "checkpoints").glob("step-*"))
    assert (last / weights).read_bytes() != (source / "start" / weights).read_bytes()
    if what == "longer":
        assert len({record["step"] for record in tiny_run.records(folder, "episodes.jsonl.gz")}) == 8
    if what == "shuffled":
        # The first rollout has the same weights and noise: only who gets which reward differs.
        size = 2 * 3
        first, same = rewards(source)[:size], rewards(folder)[:size]
        assert sorted(first) == sorted(same)


def test_longer_runs_of_variants_go_on_where_they_were(seeded, monkeypatch, capsys):
    """Stopped after its first step, a variant continues; one that is finished is not run again."""
    source, argv = seeded / "seed1-001", ["--steps", "2", "--variants", "distill", "refresh"]
    monkeypatch.setattr(evidence, "CURVE", ("--eval_steps", "1", "--num_validation", "4"))
    stages, folders = evidence.train.all_stages, []

    def spy(run):
        folders.append(run.folder.name)
        if len(folders) == 2:
            raise evidence.train.Interrupted
        stages(run)

    monkeypatch.setattr(evidence.train, "all_stages", spy)
    assert evidence.main(["longer", str(source), *argv]) == 130
    assert evidence.main(["longer", str(source), *argv]) == 0
    assert folders == [f"seed1-001-longer-{name}_2-001" for name in ("distill", "refresh", "refresh")]
    settings = [evidence.configuration.load(seeded / name / "config.yaml") for name in folders[1:]]
    assert [config.distill_retries for config in settings] == [0.0, 0.0]
    assert settings[1].refresh_failures == 8 and settings[1].max_steps == 2
    assert [point["step"] for point in evidence.validations(seeded / folders[0])] == [0, 1, 2]
    assert "mean gain of the second try over 2 runs" in capsys.readouterr().out


def test_curve_draws_the_validations_of_a_run_and_of_its_controls(seeded, tmp_path):
    pytest.importorskip("matplotlib")
    runs = [str(seeded / "seed1-001"), str(seeded / "seed2-001")]
    for svg in (tmp_path / "a.svg", tmp_path / "b.svg"):
        assert evidence.main(["curve", *runs, "--svg", str(svg)]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    steps = [line["step"] for line in evidence.validations(seeded / "seed1-001")]
    logged = [line for line in tiny_run.records(seeded / "seed1-001") if "validation/retry" in line]
    assert steps == [line["step"] for line in logged] == [0, 2, 4]
    for point, line in zip(evidence.validations(seeded / "seed1-001"), logged, strict=True):
        wrong = 1 - line["validation/first_try"]
        assert point["second try"] == pytest.approx(1 - wrong * (1 - line["validation/retry"]))
        assert point[evidence.BLIND] == pytest.approx(1 - wrong * (1 - line["validation/retry_blind"]))


def test_without_a_command_it_says_what_it_can_do(capsys):
    assert evidence.main([]) == 0
    assert "equal-compute" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["shuffled"], ["table"], ["longer", "runs/x", "--seed", "3"]])
def test_wrong_arguments(argv):
    with pytest.raises(SystemExit) as stopped:
        evidence.main(argv)
    assert stopped.value.code == 2
