"""Settings: where they come from, which layer wins, and what is said about the ones that do not fit."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from grpo import config as configuration
from grpo.config import (
    PRESETS,
    TYPES,
    Config,
    TaskOptions,
    check_unedited,
    coerce,
    current_file,
    differences,
    from_yaml,
    is_complete,
    load,
    parse,
    to_yaml,
    tracker_names,
    validate,
)

ROOT = Path(__file__).parent.parent
CASES = Path(__file__).parent / "cases"
# Read by config.py itself: where settings come from, and what training refuses.
READ_BY_CONFIG = {"config", "preset", "resume", "top_p", "top_k"}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# --- layers -----------------------------------------------------------------------------------------------


def test_command_line_wins_over_yaml_over_preset(tmp_path):
    path = write(tmp_path / "c.yaml", "max_steps: 7\nseed: 5\n")
    config = parse(["--config", path, "--seed", "6"])
    assert (config.seed, config.max_steps) == (6, 7)
    assert config.warm_start_steps == from_yaml(PRESETS / "demo.yaml")["warm_start_steps"] > 0
    assert config.preset == "demo" and config.config == path


def test_a_value_equal_to_the_default_still_wins(tmp_path):
    path = write(tmp_path / "c.yaml", "num_generations: 4\nreport: true\n")
    config = parse(["--config", path, "--num_generations", "8", "--report", "false"])
    assert config.num_generations == 8 and config.report is False


def test_yaml_may_choose_the_preset_and_the_command_line_another(tmp_path):
    path = write(tmp_path / "c.yaml", "preset: paper_countdown\n")
    assert parse(["--config", path]).max_steps == 1750
    assert parse(["--config", path, "--preset", "demo"]).preset == "demo"


def test_the_recipe_of_the_demo_belongs_to_its_model(tmp_path):
    other = ["--model_name_or_path", "/models/Qwen2.5-1.5B-Instruct"]
    config = parse(other)
    assert (config.preset, config.warm_start_steps, config.learning_rate) == ("model", 0, 1e-6)
    assert (
        min(config.max_completion_length, config.max_reflection_length) == 512 and not config.overlong_buffer
    )
    in_a_file = write(tmp_path / "c.yaml", "model_name_or_path: /models/x\nmax_steps: 7\n")
    config = parse(["--config", in_a_file])
    assert (config.preset, config.warm_start_steps, config.max_steps) == ("model", 0, 7)
    # Whoever names a preset gets it, and the demo's model has the demo's.
    assert parse([*other, "--preset", "demo"]).warm_start_steps == 200
    with_preset = write(tmp_path / "d.yaml", "preset: demo\nmodel_name_or_path: /models/x\n")
    assert parse(["--config", with_preset]).preset == "demo"
    assert parse(["--model_name_or_path", Config.model_name_or_path]) == parse([])


def test_a_path_may_begin_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "c.yaml", "chat_template: ~/t.jinja\noutput_dir: ~/runs\nrun_name: ~\n")
    config = parse(["--config", "~/c.yaml", "--model_name_or_path", "~/model"])
    assert config.chat_template == f"{tmp_path}/t.jinja" and config.output_dir == f"{tmp_path}/runs"
    assert config.model_name_or_path == f"{tmp_path}/model" and config.run_name is None
    (tmp_path / "runs" / "a-001").mkdir(parents=True)
    to_yaml(config, tmp_path / "runs" / "a-001" / "config.yaml")
    for argv in (["--resume", "--output_dir", "~/runs"], ["--resume", "~/runs/a-001"]):
        assert parse(argv).resume == f"{tmp_path}/runs/a-001"


@pytest.mark.parametrize("preset", ["demo", "model", "paper_countdown", "paper_function_calling"])
def test_task_options_of_presets_fit_the_task(preset):
    from grpo.tasks import get_task

    config = parse(["--preset", preset])
    task = get_task(config.task, config.task_options)
    assert len(task.examples("heldout", 2)) == 2


def test_the_demo_asks_for_no_more_problems_than_there_are():
    from grpo.tasks import get_task

    config = parse([])
    task = get_task(config.task, config.task_options)
    task.examples("train", config.num_examples + config.warm_start_examples)
    task.examples("validation", config.num_validation)
    task.examples("heldout", config.num_eval)
    config = parse(["--preset", "model"])
    task = get_task(config.task, config.task_options)
    task.examples("train", config.num_examples)
    task.examples("heldout", config.num_eval)


def test_task_options_merge_within_a_task_and_not_across_tasks():
    merged = parse(["--task_options", '{"numbers": 4}']).task_options
    assert merged == {**parse([]).task_options, "numbers": 4} and len(merged) > 1
    assert parse(["--task", "function_calling"]).task_options == {}


def test_another_task_does_not_drop_the_options_of_a_file_silently(tmp_path):
    argv = [
        "--config",
        write(tmp_path / "c.yaml", "task_options: {numbers: 4}\n"),
        "--task",
        "function_calling",
    ]
    with pytest.raises(
        ValueError, match=r"task function_calling .*c\.yaml are those of countdown: give --task_opt"
    ):
        parse(argv)
    assert parse([*argv, "--task_options", "max_tools=2"]).task_options == {"max_tools": 2}
    assert parse([*argv, "--task_options", ""]).task_options == {}
    assert parse([*argv[:-1], "countdown"]).task_options["numbers"] == 4


def test_the_config_of_a_run_gives_that_run_again_whatever_its_preset_says(tmp_path):
    """A run of another version of the preset, or one whose task_options were other ones from the start."""
    run = Config(task_options=TaskOptions("numbers=4"), num_generations=4, preset="demo")
    to_yaml(run, tmp_path / "config.yaml")
    again = parse(["--config", str(tmp_path / "config.yaml")])
    assert differences(run, again) == [] and again.task_options == {"numbers": 4}
    # Whoever names a preset too gets the same run; options on the command line still merge.
    again = parse(["--config", str(tmp_path / "config.yaml"), "--preset", "demo", "--task_options", "high=9"])
    assert again.task_options == {"numbers": 4, "high": 9} and again.num_generations == 4


def test_the_config_of_a_run_of_version_0_1_is_complete(tmp_path):
    """A setting that is new since then belongs in ADDED_SETTINGS."""
    settings = from_yaml(CASES / "config-0.1.0.yaml")
    assert is_complete(settings) and not is_complete({"task": "countdown", "task_options": {}})
    without_operators = parse(["--config", str(CASES / "config-0.1.0.yaml")]).task_options
    assert without_operators == settings["task_options"] == {"numbers": 3}


def test_retired_settings_are_read_under_their_old_names(tmp_path, monkeypatch):
    monkeypatch.setitem(configuration.RETIRED_SETTINGS, "num_rollouts", "num_generations")
    assert from_yaml(write(tmp_path / "c.yaml", "num_rollouts: 4\n")) == {"num_generations": 4}


def test_a_file_of_an_older_run_is_found_under_its_old_name(tmp_path):
    old, new = tmp_path / "evaluation-vanilla.jsonl", tmp_path / "evaluation-before_rl.jsonl"
    assert current_file(tmp_path, new.name) == new
    old.write_text("")
    assert current_file(tmp_path, new.name) == old
    new.write_text("")
    assert current_file(tmp_path, new.name) == new
    assert current_file(tmp_path, "metrics.jsonl") == tmp_path / "metrics.jsonl"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("numbers=3,high=10", {"numbers": 3, "high": 10}),
        ("operators=+-*/,low=0.5", {"operators": "+-*/", "low": 0.5}),
        ("numbers=3-4", {"numbers": "3-4"}),
        ('{"numbers": 3, "names": ["a"]}', {"numbers": 3, "names": ["a"]}),
        ("", {}),
    ],
)
def test_task_options_on_the_command_line(text, expected):
    assert TaskOptions(text) == expected


def test_tensorboard_of_version_0_1_is_report_to_now(tmp_path):
    text = (CASES / "config-0.1.0.yaml").read_text()
    assert load(CASES / "config-0.1.0.yaml").report_to == "none"
    run = tmp_path / "runs/x-001"
    run.mkdir(parents=True)
    write(run / "config.yaml", text.replace("tensorboard: false", "tensorboard: true"))
    config = parse(["--resume", str(run)])
    assert config.report_to == "tensorboard" and differences(load(run / "config.yaml"), config) == []


@pytest.mark.parametrize(
    ("yaml", "trackers"),
    [
        ("none", []),
        ("null", []),
        ("[]", []),
        ("wandb", ["wandb"]),
        ("wandb, tensorboard", ["wandb", "tensorboard"]),
        ("[trackio, wandb]", ["trackio", "wandb"]),
    ],
)
def test_report_to_is_a_list_or_names_with_commas(tmp_path, yaml, trackers):
    path = write(tmp_path / "c.yaml", f"report_to: {yaml}\n")
    config = parse(["--config", path])
    assert tracker_names(config.report_to) == trackers
    to_yaml(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml").report_to == config.report_to
    if trackers:
        assert parse(["--report_to", ",".join(trackers)]).report_to == config.report_to


# --- types ------------------------------------------------------------------------------------------------


def test_yaml_values_take_the_type_of_their_field(tmp_path):
    path = write(tmp_path / "c.yaml", "learning_rate: 5e-7\nbeta: 0\nmax_steps: '12'\ndelta: null\n")
    settings = from_yaml(path)
    assert settings == {"learning_rate": 5e-7, "beta": 0.0, "max_steps": 12, "delta": None}
    assert type(settings["learning_rate"]) is type(settings["beta"]) is float


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("num_generations", 4.5, "an integer"),
        ("num_generations", True, "an integer"),
        ("num_generations", "four", "an integer"),
        ("num_generations", None, "an integer"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", True, "a number"),
        ("learning_rate", [1e-5], "a number"),
        ("report", "yes", "true or false"),
        ("report", 1, "true or false"),
        ("report_to", True, "names separated by commas"),
        ("report_to", {"a": 1}, "names separated by commas"),
        ("task", 3, "a string"),
        ("task_options", [1], "a mapping"),
        ("task_options", "numbers", "a mapping"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(name, value, expected):
    with pytest.raises(ValueError) as error:
        coerce(name, value, TYPES[name])
    assert str(error.value) == f"{name} must be {expected}, got {value!r}"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--num_generations", "4.5"], ["num_generations", "int", "'4.5'"]),
        (["--learning_rate", "fast"], ["learning_rate", "float", "'fast'"]),
        (["--learning-rate"], ["learning_rate", "expected one argument"]),
        (["--report", "maybe"], ["report", "maybe"]),
        (["--tensorboard", "true"], ["unknown option --tensorboard; it is now --report_to"]),
        (["--report_to", "wandb,tensorbord"], ["report_to", "wandb,tensorbord", "did you mean tensorboard?"]),
        (["--report_to", "wandb,none"], ["none, or some of", "'wandb,none'"]),
        (["--report_to", "wandb,wandb"], ["each once", "'wandb,wandb'"]),
        (["--task_options", "{"], ["task_options", "'{'"]),
        (["--loss_type", "ppo"], ["loss_type", "dapo", "'ppo'"]),
        (["stray"], ["--KEY VALUE", "'stray'"]),
        (["--learning_rate", "-1e-5"], ["learning_rate must be above 0, got -1e-05"]),
        (["--beta", "-.5"], ["beta must be at least 0, got -0.5"]),
        (["--delta", "-inf"], ["delta must be finite, got -inf"]),
    ],
)
def test_wrong_command_lines_are_one_line_that_names_the_argument(argv, said, capsys):
    with pytest.raises(ValueError) as error:
        parse(argv)
    assert all(part in str(error.value) for part in said) and "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")  # argparse's own usage text stays out


@pytest.mark.parametrize("option", ["--lerning_rate", "--lerning-rate", "--lerning_rate=1"])
def test_unknown_option_names_the_nearest(option):
    with pytest.raises(ValueError, match=r"unknown option --lerning.*did you mean --learning_rate\?"):
        parse([option, "1"])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--per_device_train_batch_size", "4"], "use groups_per_step"),
        (["--use_vllm"], "not here: the trainer samples with its own decoder"),
        (["--dataset-name=trl-lib/x"], "use task dataset with task_options path=FILE"),
        (["--lr", "1e-6"], "use learning_rate"),
        (["--gradient_accumulation_steps", "4"], "use groups_per_step"),
        (["--use_vllm", "true", "--seed", "1", "--lr", "1"], "--use_vllm (not here"),
        (["--use_vllm", "true", "--seed", "1", "--lr", "1"], "--lr (use learning_rate)"),
    ],
)
def test_an_option_of_trl_gets_its_counterpart_and_not_the_nearest_spelling(argv, said, tmp_path):
    with pytest.raises(ValueError) as error:
        parse(argv)
    assert said in str(error.value) and "did you mean" not in str(error.value)
    name = argv[0].lstrip("-").partition("=")[0].replace("-", "_")
    with pytest.raises(ValueError, match=f"c.yaml, line 1: unknown key {name} \\("):
        parse(["--config", write(tmp_path / "c.yaml", f"{name}: 1\n")])


def test_an_abbreviated_option_is_unknown():
    with pytest.raises(ValueError, match=r"did you mean --warm_start_steps\?"):
        parse(["--warm_start_step", "3"])


@pytest.mark.parametrize(
    "text, said",
    [
        ("low=1,low=2", r"task_options: 'low' is given twice \(in 'low=1,low=2'\)"),
        ("low", "task_options: expected name=value, got 'low'"),
        ("{low: 1}", "task_options: must be JSON if it begins with a brace, got '{low: 1}'"),
    ],
)
def test_options_that_cannot_be_read_say_why(text, said):
    with pytest.raises(ValueError, match=said):
        parse(["--task_options", text])


def test_unknown_yaml_key_names_the_file_and_the_nearest(tmp_path):
    path = write(tmp_path / "mine.yaml", "num_generation: 4\n")
    with pytest.raises(
        ValueError, match=r"mine.yaml, line 1: unknown key num_generation; did you mean num_gen"
    ):
        parse(["--config", path])


@pytest.mark.parametrize(
    "text, said",
    [("a: [", "not valid YAML"), ("- 1", "KEY: VALUE"), ("5", "KEY: VALUE"), ("resume: x", "command line")],
)
def test_unusable_yaml_names_the_file(tmp_path, text, said):
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(ValueError, match=said) as error:
        from_yaml(path)
    assert path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("max_steps: 010", "must be an integer, got '010'; write it in decimal, without leading zeros or _"),
        ("max_steps: 1_000", "must be an integer, got '1_000'; write it in decimal"),
        ("max_steps: 0x10", "must be an integer, got '0x10'"),
        ("max_steps: 0o10", "must be an integer, got '0o10'"),
        ("max_steps: 12:30:00", "must be an integer, got '12:30:00'"),
        ("max_steps: 1e5", "must be an integer, got 100000.0"),
        ("max_steps: 2024-01-01", "must be an integer, got '2024-01-01'"),
        ("max_steps: ~", "must be an integer, got None"),
        ("learning_rate: 1_0.5", "must be a number, got '1_0.5'"),
        (f"learning_rate: 1{'0' * 400}", "must be a number, got 1000"),
        ("learning_rate: 1e999", "must be finite, got inf"),
        (f"seed: 1{'0' * 400}", "seed must be at most 9223372036854775807, got a number of"),
        ("threads: 1000000000", "threads must be at most 1024"),
        ("tensorboard: yes", "must be true or false, got 'yes'"),
        ("tensorboard: off", "must be true or false, got 'off'"),
        ("run_name: 5", "must be a string, got 5"),
        ('run_name: "\\ud800"', "run_name must be text without NUL and lone surrogates"),
        ('chat_template: "\\0"', "chat_template must be text without NUL and lone surrogates"),
        ("task_options: {a: 1, b: {c: 2, c: 3}}", "line 2: the key 'c' is given twice, first in line 2"),
        ("task_options: {x: 1e999}", "task_options must be what JSON keeps, got 'x' = inf (Out of range"),
        ("max_rows: 1", "line 2: the key 'max_rows' is given twice, first in line 1"),
        ("<<: {max_steps: 5}", "line 2: the merge key << is not allowed"),
        ("run_name: &name x\ntask: *name", "line 3: the alias *name is not allowed"),
        (
            "run_name: !!python/object/apply:os.getcwd []",
            "line 2: the tag tag:yaml.org,2002:python/object/apply:os",
        ),
        ("max_steps: !!int 010", "line 2: the tag tag:yaml.org,2002:int is not allowed"),
        ("? [a]\n: 1", "line 2: a key must be a plain string"),
        ("max_steps: 5\n\tseed: 1", "line 3 is not valid YAML"),
        ("---\nmax_steps: 5", "line 2: a second document (---) is not allowed"),
        ("task_options: " + "[" * 60, "more than 50 levels"),
        ('"a\\nb": 1', "unknown key 'a\\nb'"),
    ],
)
def test_yaml_that_a_person_and_yaml_1_1_read_differently(tmp_path, text, said):
    path = write(tmp_path / "mine.yaml", "max_rows: 2\n" + text + "\n")
    with pytest.raises(ValueError) as error:
        configuration.parse(["--config", path])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_words_and_dates_are_strings(tmp_path):
    text = "run_name: no\nchat_template: 2024-01-01\ntask: 12:30\n"
    text += "task_options: {on: off, x: .5, y: 1e-7, z: 007}\n"
    settings = from_yaml(write(tmp_path / "mine.yaml", text))
    assert settings == {
        "run_name": "no",
        "chat_template": "2024-01-01",
        "task": "12:30",
        "task_options": {"on": "off", "x": 0.5, "y": 1e-7, "z": "007"},
    }


@pytest.mark.parametrize(
    "content, said",
    [
        ("seed: 1\n".encode("utf-16"), "must be saved as UTF-8"),
        (b"seed: \xe9\n", "must be saved as UTF-8"),
        (b"#" * 300_000, "must have at most 262144 bytes"),
        (b"a: &a [x]\n" + b"b: &b [*a, *a]\n", "line 2: the alias *a is not allowed"),
    ],
)
def test_files_that_are_no_settings(tmp_path, content, said):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        from_yaml(tmp_path / "mine.yaml")


def test_a_folder_is_no_settings_and_windows_line_ends_are_fine(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*: Is a directory"):
        from_yaml(tmp_path)
    (tmp_path / "mine.yaml").write_bytes(b"seed: 1\r\nrun_name: x\r\n")
    assert from_yaml(tmp_path / "mine.yaml") == {"seed": 1, "run_name": "x"}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "a=1,a=2", '{"a": {"b": 1, "b": 2}}', '{"a": NaN}'])
@pytest.mark.parametrize("more", ["", "[" * 100_000])
def test_task_options_that_json_would_change(text, more):
    with pytest.raises(ValueError, match="task_options"):
        parse(["--task_options", text + more])


def test_an_empty_yaml_file_sets_nothing(tmp_path):
    assert from_yaml(write(tmp_path / "c.yaml", "# nothing yet\n")) == {}


def test_missing_files_and_unknown_presets():
    with pytest.raises(ValueError, match="cannot read nowhere.yaml"):
        parse(["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="cannot read : No such file"):
        parse(["--config", ""])
    with pytest.raises(
        ValueError, match=r"preset must be one of .*, got 'paper_countdow'; did you mean paper_countdown\?"
    ):
        parse(["--preset", "paper_countdow"])


# --- ranges and combinations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"delta": float("inf")}, "delta must be finite, got inf"),
        ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
        ({"epsilon": -0.1}, "epsilon must be at least 0, got -0.1"),
        ({"epsilon": 1.0}, "epsilon must be below 1, got 1.0"),
        ({"epsilon_high": -0.1}, "epsilon_high must be above 0, got -0.1"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be below 1, got 1.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, got 0.0"),
        ({"loss_type": "dr-grpo"}, "loss_type must be one of .*, got 'dr-grpo'; did you mean dr_grpo?"),
        ({"top_p": 0.9}, "top_p must be 1.0 and top_k 0 in training, got 0.9 and 0.*ratio"),
        ({"top_k": 50}, "top_p must be 1.0 and top_k 0 in training, got 1.0 and 50.*ratio"),
        (
            {"train_on": "all", "retries_per_reflection": 2},
            "per_reflection must be 1 with train_on=all, got 2",
        ),
        ({"train_on": "retry", "retries_per_reflection": 3}, "must be 1 with train_on=retry, got 3"),
        (
            {"loss_type": "cispo", "epsilon_high": 5.0, "delta": 2.0},
            "delta must be None with loss_type=cispo",
        ),
        ({"loss_type": "cispo"}, "epsilon_high must be given with loss_type=cispo"),
        ({"delta": 1.1}, "delta must be above the upper end of the clip range, 1.2, got 1.1"),
        ({"overlong_buffer": 120}, "overlong_buffer must be below max_reflection_length 120, got 120"),
    ],
)
def test_validate_names_argument_expectation_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(Config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"train_on": "reflection", "retries_per_reflection": 4},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"delta": 2.0, "epsilon_high": 0.28},
        {"eval_temperature": 0.0, "beta": 0.0, "num_eval": 0, "warmup_steps": 10.0},
        {"overlong_buffer": 119},
    ],
)
def test_validate_lets_sensible_settings_pass(changes):
    validate(Config(**changes))


# --- files and resuming -----------------------------------------------------------------------------------


def test_yaml_round_trip_keeps_every_setting(tmp_path):
    odd = {
        "k" * 3000: 1,
        "\x7f": "\ud7ff\x00\u2028",
        "é" * 200: [[-0.0, 1e300, 10**200, "010", "no", "~", ""]],
        "": {},
    }
    options = json.dumps({"operators": "a: #b", "x": 1e-7, "list": [1e-7, None, True], **odd})
    config = parse(["--learning_rate", "5e-7", "--delta", "2", "--task_options", options, "--seed", "7"])
    to_yaml(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert set(from_yaml(tmp_path / "config.yaml")) == set(TYPES) - {"config", "estimate", "resume"}


def test_a_file_of_a_run_knows_whether_it_was_edited(tmp_path):
    path = tmp_path / "c.yaml"
    options = {"a": [1, 2.5, None, True, {"b": "x: y # z"}], "c": "\U0001f600\x7f", "d": 5e-7, "e": "010"}
    to_yaml(Config(task_options=TaskOptions(options), seed=7, run_name="~"), path)
    check_unedited(path)
    written = path.read_text()
    path.write_text(written.replace("seed: 7", "seed:   7  # mine"))
    check_unedited(path)
    path.write_text(written.replace("seed: 7", "seed: 8"))
    with pytest.raises(ValueError, match="c.yaml was edited since the run wrote it"):
        check_unedited(path)
    path.write_text("".join(line for line in open(path) if not line.startswith("#")))  # whoever means it
    check_unedited(path)


def test_other_yaml_readers_see_numbers(tmp_path):
    yaml = pytest.importorskip("yaml")
    to_yaml(Config(learning_rate=5e-7), tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["learning_rate"] == 5e-7


def test_differences_list_what_a_continued_run_may_not_change():
    old = Config()
    new = Config(max_steps=20, learning_rate=1e-6, report_to="tensorboard", output_dir="other", resume="x")
    assert differences(old, new) == ["max_steps: 100 -> 20", "learning_rate: 5e-07 -> 1e-06"]
    assert differences(old, Config()) == []


def start_run(folder: Path, **settings) -> Path:
    folder.mkdir(parents=True)
    to_yaml(Config(**settings), folder / "config.yaml")
    return folder


def test_resume_takes_the_settings_of_the_run(tmp_path):
    run = start_run(tmp_path / "runs/x-001", max_steps=33, preset="paper_countdown")
    config = parse(["--resume", str(run), "--report_to", "tensorboard"])
    assert (config.max_steps, config.preset, config.report_to, config.resume) == (
        33,
        "paper_countdown",
        "tensorboard",
        str(run),
    )
    assert differences(load(run / "config.yaml"), config) == []
    changed = parse(["--resume", str(run), "--max_steps", "34"])
    assert differences(load(run / "config.yaml"), changed) == ["max_steps: 33 -> 34"]


def test_resume_without_a_directory_takes_the_newest_run(tmp_path):
    import os

    for age, name in enumerate(["b-001", "a-002", "c-001"]):
        run = start_run(tmp_path / name, seed=age)
        os.utime(run / "config.yaml", (1000 - age, 1000 - age))
    config = parse(["--output_dir", str(tmp_path), "--resume"])
    assert config.resume == str(tmp_path / "b-001") and config.seed == 0


def test_resume_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no run in .* to continue"):
        parse(["--resume", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="resume must be a run directory with a config.yaml"):
        parse(["--resume", str(tmp_path)])


# --- the options themselves -------------------------------------------------------------------------------


def test_help_lists_every_field_with_the_values_of_the_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--preset", "paper_countdown", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all(f"--{name}" in text for name in TYPES)
    assert "(default: 1750)" in text


def test_every_field_has_a_help():
    assert [field.name for field in fields(Config) if not field.metadata.get("help")] == []


def test_every_field_is_read_somewhere():
    """`config.NAME` (or `self.config.NAME`) in grpo/ or train.py: no option that does nothing."""
    read: set[str] = set(READ_BY_CONFIG)
    for path in [*(ROOT / "grpo").rglob("*.py"), ROOT / "train.py"]:
        if path.name == "config.py":
            continue  # validate() reads nearly everything
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute):
                if "config" in (getattr(node.value, "attr", ""), getattr(node.value, "id", "")):
                    read.add(node.attr)
            elif isinstance(node, ast.Constant) and "getattr(config, " in text:
                read.add(node.value)  # a list of names that are read in a loop
    assert sorted(set(TYPES) - read) == []


def test_characters_beyond_the_basic_plane_survive_the_file(tmp_path):
    config = Config(
        model_name_or_path="/models/\U0001f600", task_options=TaskOptions({"\U0001d54f": "a\U0001f600\u4e2d"})
    )
    to_yaml(config, tmp_path / "config.yaml")
    assert from_yaml(tmp_path / "config.yaml")["model_name_or_path"] == config.model_name_or_path
    assert from_yaml(tmp_path / "config.yaml")["task_options"] == config.task_options
