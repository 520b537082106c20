"""`start_from`: a run that takes the start of an earlier one is the run that computes everything itself."""

import shutil
import types
from dataclasses import replace

import pytest
import tiny_run

from grpo import config as configuration
from grpo.report.data import read_run
from grpo.run import files, inputs, reuse

# Every setting that is read after the failures, with another value than in tiny_run.SETTINGS.
OTHER = {
    "beta": 0.0,
    "delta": 3.0,
    "distill_retries": 0.5,
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "early_stopping_patience": 0,
    "eval_steps": 0,
    "eval_temperature": 0.0,
    "groups_per_step": 3,
    "importance_sampling_level": "sequence",
    "learning_rate": 1e-4,
    "length_cost": 0.5,
    "loss_type": "grpo",
    "lr_scheduler_type": "constant",
    "mask_truncated_completions": True,
    "max_reflection_length": 9,
    "max_steps": 1,
    "max_wrong_episodes": 0,
    "num_eval": 0,
    "num_eval_untouched": 2,
    "num_generations": 2,
    "num_iterations": 2,
    "num_validation": 5,
    "overlong_buffer": 2,
    "report": False,
    "report_to": "none",
    "refresh_failures": 1,
    "retries_per_reflection": 2,
    "reward": "score",
    "run_name": "other",
    "save_steps": 0,
    "save_total_limit": 1,
    "scale_rewards": "none",
    "soft_overlong_penalty": 0.5,
    "start_from": "auto",
    "use_bias_correction_kl": False,
    "verifier_workers": 2,
    "warmup_steps": 0,
}
TAKEN = "warm start and failures: taken from "


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A whole run, and the model that it trained."""
    return tiny_run.finished(tmp_path_factory.mktemp("reuse"))


def run_next_to(first, **settings):
    """A run in the same output_dir; each has a name of its own."""
    done = tiny_run.run(tiny_run.arguments(first.parents[1] / "model", first.parent, **settings))
    return done._replace(folder=max(first.parent.glob(f"{settings['run_name']}-*"), default=None))


def before_rl(folder):
    names = ["failures.jsonl", "warm_start.jsonl", *(f"start/{p.name}" for p in (folder / "start").iterdir())]
    return {name: (folder / name).read_bytes() for name in names}


def test_an_equal_run_takes_the_start_and_computes_the_same(first):
    second = run_next_to(first, start_from="auto", run_name="second")
    assert second.status == 0 and second.folder is not None, second.err
    assert f"{TAKEN}{first}, which computed the same; --start_from none computes them again" in second.out
    assert tiny_run.contents(second.folder) == tiny_run.contents(first)
    assert read_run(second.folder, "second").start_from == str(first)  # for the report
    assert read_run(first, "first").start_from == ""


def test_settings_that_are_read_later_may_differ_and_change_nothing_before(first, tmp_path):
    not_values = {"config", "estimate", "output_dir", "preset", "resume"}
    assert set(OTHER) == configuration.AFTER_START - not_values - {"train_on"}  # the next test has that one
    done = run_next_to(first, **OTHER)
    assert done.status == 0 and TAKEN in done.out, done.err
    alone = tiny_run.run(tiny_run.arguments(first.parents[1] / "model", tmp_path, **OTHER))
    assert alone.status == 0 and TAKEN not in alone.out, alone.err
    assert before_rl(alone.folder) == before_rl(done.folder) == before_rl(first)


def test_train_on_may_differ(first):
    done = run_next_to(
        first, train_on="attempt", start_from=first, max_steps=1, num_eval=0, run_name="attempt"
    )
    assert done.status == 0 and TAKEN in done.out, done.err


def test_any_other_setting_or_input_prevents_reuse(first):
    content = files.read_json(first / "inputs.json", dict)
    config = replace(configuration.load(first / "config.yaml"), start_from="auto")
    record = reuse.record(config, content)
    named = replace(config, start_from=str(first))
    later = first.parent / "later"
    assert reuse.find(config, later, record) is not None and reuse.check_named(named, record) == first
    read = set(configuration.TYPES) - configuration.AFTER_START
    lora = {"lora_r", "lora_alpha", "lora_target_modules"}  # read before RL if a warm start trains an adapter
    assert set(record["settings"]) == read - lora
    assert set(reuse.record(replace(config, lora_r=2), content)["settings"]) == read
    plain = replace(config, lora_r=2, warm_start_steps=0)
    assert set(reuse.record(plain, content)["settings"]) == read - lora
    assert set(record["inputs"]) == set(inputs.BEFORE_RL)
    for part, name in [("settings", name) for name in record["settings"]] + [("inputs", "examples")]:
        other = {**record, part: {**record[part], name: "another"}}
        assert reuse.find(config, later, other) is None, name
        with pytest.raises(ValueError, match=name):
            reuse.check_named(named, other)
    assert reuse.find(replace(config, start_from="none"), later, record) is None


def test_other_code_or_versions_prevent_automatic_reuse_and_are_named_otherwise(first, monkeypatch):
    short = {"max_steps": 1, "num_eval": 0, "eval_steps": 0, "run_name": "code"}
    monkeypatch.setattr(reuse, "_code_sum", lambda: "edited")
    done = run_next_to(first, start_from="auto", **short)
    assert done.status == 0 and "taken from" not in done.out, done.err
    done = run_next_to(first, start_from=first, **short)
    assert f"{TAKEN}{first}, in spite of other code;" in done.out, done.err


def test_an_edit_of_the_task_or_trainer_changes_the_sum_and_an_edit_of_the_report_does_not(tmp_path):
    """On a copy of the package, in the place of the installed one."""
    package = shutil.copytree(reuse.Path(reuse.__file__).parents[1], tmp_path / "grpo")
    module = {"__file__": str(package / "run" / "reuse.py")}
    code_sum = types.FunctionType(reuse._code_sum.__code__, {**vars(reuse), **module})
    before = code_sum()
    (package / "report" / "page.py").write_text("edited")
    assert code_sum() == before
    for name in ("tasks/countdown.py", "model/decoder.py", "warmstart.py"):
        (package / name).write_text("edited")
        assert code_sum() != before
        before = code_sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 43}, "same warm start and failures; {first} has other settings or inputs (seed: 42 -> 43)"),
        ({"start_from": "nowhere"}, "start_from must be auto, none, or a run directory with a finished warm"),
        ({"task_options": "length=3"}, "task_options"),
    ],
    ids=["seed", "missing", "options"],
)
def test_a_named_run_that_does_not_fit_is_refused_before_anything_is_written(first, settings, message):
    before = set(first.parent.iterdir())
    done = run_next_to(first, **{"start_from": first, "run_name": "refused", **settings})
    assert done.status == 2 and message.format(first=first) in done.err, done.err
    assert done.err.count("\n") == 1 and set(first.parent.iterdir()) == before


def test_a_damaged_start_is_refused_by_name_and_passed_over_by_auto(first, tmp_path):
    runs = shutil.copytree(first.parent, tmp_path / "runs")
    for other in runs.iterdir():
        if other.name != first.name:
            shutil.rmtree(other)
    damaged = runs / first.name
    (damaged / "start" / "config.json").write_text("{}")
    model = first.parents[1] / "model"
    short = {"max_steps": 1, "num_eval": 0, "eval_steps": 0}
    done = tiny_run.run(tiny_run.arguments(model, runs, start_from=damaged, **short))
    assert done.status == 1 and "config.json is damaged" in done.err
    done = tiny_run.run(tiny_run.arguments(model, runs, start_from="auto", **short))
    assert done.status == 0 and "taken from" not in done.out, done.err


def test_a_run_killed_while_it_takes_a_start_continues(first):
    argv = tiny_run.arguments(
        first.parents[1] / "model", first.parent, start_from=first, run_name="killed", report=False
    )
    status, _ = tiny_run.run_and_stop(argv, tiny_run.Moment("grpo.run.reuse:shutil.copytree"), 9)
    assert status == -9
    folder = max(first.parent.glob("killed-*"))
    assert not (folder / "start").exists()
    done = tiny_run.run(["--resume", str(folder)])
    assert done.status == 0 and TAKEN in done.out, done.err
    assert tiny_run.contents(folder) == tiny_run.contents(first)


def test_a_start_computed_by_two_versions_is_not_offered(tmp_path):
    """A run that was stopped before RL and resumed with other code has no record any more."""
    record = {"settings": {}, "inputs": {}, "environment": {}, "code": "1", "taken_from": None}
    reuse.save(tmp_path, record)
    reuse.forget_if_changed(tmp_path, record)
    assert (tmp_path / reuse.RECORD).exists()
    (tmp_path / "metrics.jsonl").touch()  # RL has begun: the start was complete before
    reuse.forget_if_changed(tmp_path, {**record, "code": "2"})
    assert (tmp_path / reuse.RECORD).exists()
    (tmp_path / "metrics.jsonl").unlink()
    reuse.forget_if_changed(tmp_path, {**record, "code": "2"})
    assert not (tmp_path / reuse.RECORD).exists()
