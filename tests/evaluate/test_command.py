"""What the CHECKPOINT arguments of the evaluation command mean."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from grpo.config import Config, to_yaml
from grpo.evaluate import __main__ as command
from grpo.run import files


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory with start/ and two checkpoints, without the checkpoint module's checksums."""
    folder = tmp_path / "runs" / "demo-001"
    for name in ("start", "checkpoints/step-000008", "checkpoints/step-000016"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / name / "model.safetensors").write_bytes(b"1234")
    to_yaml(Config(seed=7, num_eval=3, warm_start_steps=5, task_options={"high": 5}), folder / "config.yaml")
    monkeypatch.setattr(command.checkpoint, "latest", lambda _: folder / "checkpoints" / "step-000016")
    return folder


def labels(*arguments):
    return [model.label for model in command.models_of([str(argument) for argument in arguments])]


def test_a_run_means_its_three_stages(run):
    untouched, before_rl, trained = command.models_of([str(run)])
    assert (untouched.label, untouched.path) == ("untouched", Config().model_name_or_path)
    assert (before_rl.label, Path(before_rl.path)) == ("before_rl", run / "start")
    assert (trained.label, Path(trained.path).name) == ("trained", "step-000016")


def test_a_run_without_a_warm_start_or_without_a_checkpoint_has_fewer_stages(run, monkeypatch):
    to_yaml(Config(warm_start_steps=0), run / "config.yaml")
    assert labels(run) == ["before_rl", "trained"]
    monkeypatch.setattr(command.checkpoint, "latest", lambda _: None)
    assert labels(run) == ["before_rl"]
    (run / "start" / "config.json").unlink()
    assert labels(run) == ["untouched"]


def test_other_arguments_are_one_model_each(run, tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"")
    assert labels(
        run / "start",
        tmp_path / "small.gguf",
        "package:some_package/Model-1B.gguf",
        "Qwen/Qwen2.5-1.5B-Instruct",
    ) == ["start", "small", "Model-1B", "Qwen/Qwen2.5-1.5B-Instruct"]


def test_labels_are_told_apart_by_run_or_folder(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "best").mkdir(parents=True)
        (tmp_path / name / "best" / "config.json").write_text("{}")
    assert labels(tmp_path / "a" / "best", tmp_path / "b" / "best") == ["a/best", "b/best"]
    assert labels(run / "start", run / "start") == ["demo-001/start", "demo-001/start#2"]
    step = run / "checkpoints" / "step-000008"
    assert labels(run, step) == ["untouched", "before_rl", "trained", "step-000008"]


def test_wrong_paths_get_a_clear_answer(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argument, message in [
        (run.parent / "demo-002", "demo-002' does not exist; .* contains .*demo-001"),
        (run.parent, "got the folder .*runs without either; did you mean .*demo-001"),
        (run / "config.yaml", "a folder or a .gguf file, got the file"),
        ("runs/demo-009", "'runs/demo-009' does not exist"),  # not a Hub id: the folder runs is here
        ("no such thing", "does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            command.models_of([str(argument)])


def options(**given):
    return Namespace(
        **{"num_eval": None, "eval_temperature": None, "greedy": False, "top_p": 1.0, "top_k": 0, **given}
    )


def test_settings_come_from_the_run_then_from_the_command_line(run):
    models = command.models_of([str(run / "checkpoints" / "step-000008")])
    config = command.evaluation_config(models, options(), [])
    assert (config.seed, config.num_eval, config.task_options["high"]) == (7, 3, 5)
    config = command.evaluation_config(models, options(num_eval=2, greedy=True), ["--seed", "9"])
    assert (config.seed, config.num_eval, config.eval_temperature) == (9, 2, 0)
    assert command.evaluation_config(models, options(), ["--preset", "demo"]).seed == Config().seed


def test_the_preset_of_a_model_without_a_run_is_that_of_train(run, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    models = command.models_of([str(tmp_path / "other")])
    config = command.evaluation_config(models, options(), ["--task", "tiny:Toy"])
    assert (config.preset, config.max_completion_length, config.warm_start_steps) == ("model", 512, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("preset model, for models other than the demo's: task tiny:Toy, ")
    demo = command.models_of([Config.model_name_or_path])
    assert command.evaluation_config(demo, options(), []).preset == "demo"
    assert command.evaluation_config(models, options(), ["--preset", "demo"]).preset == "demo"
    assert capsys.readouterr().out == ""


def test_a_bug_in_a_task_is_no_wrong_argument(run, monkeypatch):
    """A task's own ValueError shows its traceback; a file of records that does not fit is one line."""
    parts = SimpleNamespace(
        sampler=SimpleNamespace(temperature=1.0, greedy=False),
        config=Config(),
        rollout=None,
        task=tiny.Toy(),
        chat=SimpleNamespace(takes_tools=False),
    )
    monkeypatch.setattr(command.build, "parts", lambda config, model_source: parts)
    monkeypatch.setattr(command.build, "check_room", lambda *_: None)

    def failing(error):
        def measure(*_, **__):
            raise error

        monkeypatch.setattr(command, "measure", measure)
        return command.main([str(run / "start"), "--top_k", "5"])

    with pytest.raises(RuntimeError, match="measuring start failed") as raised:
        failing(ValueError("verify got None"))
    assert str(raised.value.__cause__) == "verify got None"
    assert failing(files.MismatchError("other problems")) == 2


def test_identity_follows_the_weights_on_disk(run):
    (model,) = command.models_of([str(run / "start")])
    before = model.identity()
    (run / "start" / "model.safetensors").write_bytes(b"12345")
    assert model.identity() != before
    assert command.MeasuredModel("hub", "Qwen/Qwen3-0.6B").identity() == "Qwen/Qwen3-0.6B"
