"""train.py from the command line to the exit status: ways of training, and what is said about bad input."""

import errno
import json
import math
import re
import shutil
import sys
from pathlib import Path

import plain_varlen
import pytest
import tiny
import torch
from grpo_kernels import torch_backend
from tiny_run import Done, arguments, contents, records, run, save_model

import train
from grpo import config as configuration
from grpo.config import TRACKERS
from grpo.learner.optimizer import MasterAdamW
from grpo.model import weights
from grpo.model.shards import ShardWriter
from grpo.run import checkpoint, files, state
from grpo.run.state import stops_early, validated
from grpo.tasks import Verdict
from grpo.tasks.contract import PROBES

ROOT = Path(__file__).parent.parent
# Two steps of RL and nothing else.
QUICK = {
    "warm_start_steps": 0,
    "eval_steps": 0,
    "num_eval": 0,
    "max_steps": 2,
    "num_examples": 8,
    "beta": 0.0,
    "save_steps": 0,
}


class Easy(tiny.Toy):
    """Every answer is right."""

    def verify(self, example, text):
        return Verdict("ok")


class Impossible(tiny.Toy):
    """No answer is right."""

    def verify(self, example, text):
        return Verdict("wrong_value")


class Short(tiny.Toy):
    """A task with five examples a split, and without transcripts."""

    transcript = None  # type: ignore[assignment]

    def examples(self, split, count, offset=0):
        if offset + count > 5:
            raise ValueError(f"split {split!r} has 5 examples, got {offset + count}")
        return super().examples(split, count, offset)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def quick(model, tmp_path):
    """Runs train.main with QUICK settings and changes to them."""
    return lambda **settings: run(arguments(model, tmp_path / "runs", **{**QUICK, **settings}))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    done = run(arguments(model, tmp_path_factory.mktemp("runs"), **QUICK | {"save_steps": 1, "num_eval": 4}))
    assert done.status == 0, done.err
    return done.folder


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.report", stop)
        settings = QUICK | {"save_steps": 1, "num_eval": 4}
        done = run(arguments(model, tmp_path_factory.mktemp("stopped"), **settings))
    assert done.status == 130, done.err
    return done.folder


@pytest.fixture
def unfinished(stopped, tmp_path):
    """A copy of a run that was stopped right before evaluation.json."""
    return shutil.copytree(stopped, tmp_path / "copy")


def assert_error(done: Done, status: int, *fragments: str) -> None:
    """One line on stderr that begins with "error:" and holds the fragments; no traceback."""
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.status == status, done.err
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    assert [fragment for fragment in fragments if fragment not in lines[0]] == [], lines[0]


def test_the_device_is_set_up_before_anything_uses_it(quick, monkeypatch):
    """Once it is resolved, every part gets the same name; `cpu` stands in for the GPU."""
    events = []

    def set_up(name, *, deterministic):
        events.append((name, deterministic))
        return "cpu"

    def backend(device, name):
        events.append(device)
        raise ValueError("enough")

    monkeypatch.setattr("grpo.run.build.set_up_device", set_up)
    monkeypatch.setattr("grpo_kernels.backend", backend)
    assert_error(quick(device="cuda:1", deterministic=True), 2, "enough")
    assert events == [("cuda:1", True), "cpu"]


# --- every way of training ----------------------------------------------------------------------------------

WAYS = {
    "as it is": {},
    "on reflection and retry": {"train_on": "all"},
    "on the retry": {"train_on": "retry"},
    "on the attempt": {"train_on": "attempt"},
    "two retries per reflection": {"retries_per_reflection": 2},
    "two updates per rollout": {"num_iterations": 2},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sequence level, two-sided clipping": {"importance_sampling_level": "sequence", "delta": 1.5},
    "advantages over the batch": {"scale_rewards": "batch"},
    "advantages not scaled": {"scale_rewards": "none"},
    "distilled retries": {"distill_retries": 0.5, "train_on": "all"},
    "kl penalty": {"beta": 0.1, "use_bias_correction_kl": False},
    "truncated ones masked": {"mask_truncated_completions": True},
    "overlong penalty": {"overlong_buffer": 4},
    "kernels torch": {"kernels": "torch"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "small micro-batches, few rows": {"max_tokens_per_micro_batch": 1, "max_rows": 2},
    "several attempts": {"attempts_per_example": 2, "failures_per_example": 2, "lr_scheduler_type": "linear"},
    "bfloat16, greedy evaluation": {"dtype": "bfloat16", "num_eval": 4, "eval_temperature": 0.0},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS.keys())
def test_every_way_of_training_runs_to_the_end(quick, settings):
    done = quick(**settings)
    assert done.status == 0, done.err
    metrics = [record for record in records(done.folder) if "warning" not in record]
    assert [record["step"] for record in metrics] == [1, 2]
    assert all(value is not None and math.isfinite(value) for record in metrics for value in record.values())
    assert any(record["grad_norm"] > 0 for record in metrics)
    assert checkpoint.steps(done.folder) == [2]
    texts = records(done.folder, "episodes.jsonl.gz")
    assert len(texts) == 2 * 2 * 3 and {episode["step"] for episode in texts} == {1, 2}


def test_a_run_with_varlen_attention_is_the_run_with_sdpa(quick, monkeypatch):
    """But for rounding. With torch's varlen_attn emulated, which a CPU lacks."""
    expected = quick(beta=0.1)
    calls = plain_varlen.install(monkeypatch)
    monkeypatch.setattr("grpo.run.build.check_varlen", lambda *_: None)
    done = quick(beta=0.1, attn_implementation="varlen")
    assert done.status == 0 and calls, done.err
    assert configuration.load(done.folder / "config.yaml").attn_implementation == "varlen"
    assert configuration.load(expected.folder / "config.yaml").attn_implementation == "sdpa"
    episodes, other_episodes = (
        [record["completion_ids"] for record in records(folder, "episodes.jsonl.gz")]
        for folder in (done.folder, expected.folder)
    )
    assert episodes == other_episodes
    for ours, right in zip(records(done.folder), records(expected.folder), strict=True):
        assert ours == pytest.approx(right, rel=1e-3, abs=1e-5)


def test_the_task_of_the_docs_trains(model, tmp_path, monkeypatch):
    """`--task module:Name` with options, from a file outside of the project, warm start included."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL)
    assert code
    (tmp_path / "spelling.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    settings = {**QUICK, "warm_start_steps": 2, "eval_steps": 1, "num_eval": 4, "num_eval_untouched": 3}
    task = {"task": "spelling:Backwards", "task_options": '{"length": 3}'}
    done = run(arguments(model, tmp_path / "runs", **settings, **task))
    sys.modules.pop("spelling")
    assert done.status == 0, done.err
    assert "backwards, 4 problems" in done.out and "as it came, first 3 problems;" in done.out
    assert 'task_options: {"length": 3}' in (done.folder / "config.yaml").read_text()


def test_patience_ends_rl_early_and_the_run_is_finished(model, tmp_path):
    settings = QUICK | {"max_steps": 9, "eval_steps": 1, "num_validation": 2, "early_stopping_patience": 1}
    done = run(arguments(model, tmp_path, **settings))
    assert done.status == 0 and "stopped early" in done.out, done.err
    shares = validated(done.folder)
    last = max(shares)
    stops = [step for step in shares if stops_early({s: shares[s] for s in range(step + 1)}, 1)]
    assert stops == [last] and last < 9 and last in checkpoint.steps(done.folder)
    again = run(["--resume", str(done.folder)])
    assert_error(again, 2, "is finished", "--early_stopping_patience 0` continues it")
    more = run(["--resume", str(done.folder), "--early_stopping_patience", "0", "--max_steps", str(last + 1)])
    assert more.status == 0 and checkpoint.steps(done.folder)[-1] == last + 1, more.err


@pytest.mark.parametrize(
    ("shares", "patience", "expected"),
    [
        ([0.5, 0.5, 0.4], 0, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.6, 0.6], 2, False),
        ([0.5, 0.6, 0.4, 0.6], 2, True),
        ([0.5, 0.6, 0.4, 0.7], 2, False),
    ],
)
def test_patience_counts_validations_without_a_new_best(shares, patience, expected):
    by_step = {4 * number: share for number, share in enumerate(shares)}
    assert stops_early(dict(reversed(by_step.items())), patience) == expected


# --- bad settings -------------------------------------------------------------------------------------------

BAD = {
    "unknown option": ({"learning_rat": 1e-5}, ["unknown option --learning_rat", "mean --learning_rate?"]),
    "wrong type": ({"max_steps": "many"}, ["max_steps", "int", "'many'"]),
    "not one of": ({"train_on": "reflexion"}, ["train_on", "'reflexion'", "choose from", "reflection"]),
    "one generation": ({"num_generations": 1}, ["num_generations must be at least 2, got 1"]),
    "negative temperature": ({"temperature": -1}, ["temperature must be above 0, got -1.0"]),
    "not a number": ({"learning_rate": "nan"}, ["learning_rate must be finite, got nan"]),
    "patience without validation": (
        {"early_stopping_patience": 2, "eval_steps": 0},
        ["eval_steps must be above 0 with early_stopping_patience=2, got 0"],
    ),
    "top-p": ({"top_p": 0.9}, ["top_p must be 1.0", "in training, got 0.9", "biased"]),
    "delta with cispo": ({"loss_type": "cispo", "delta": 2.0}, ["delta must be None with loss_type=cispo"]),
    "nothing to distil": (
        {"distill_retries": 0.5, "train_on": "attempt"},
        ["distill_retries must be 0 with train_on=attempt, got 0.5"],
    ),
    "unknown preset": (
        {"preset": "demos"},
        ["preset must be one of demo, function_calling_demo, ", "got 'demos'; did you mean demo?"],
    ),
    "unknown task": ({"task": "contdown"}, ["task must be one of", "got 'contdown'", "mean countdown?"]),
    "unknown task option": (
        {"task": "countdown", "task_options": "numbres=3"},
        ["task_options of 'countdown' must be among: numbers", "got 'numbres'", "mean numbers?"],
    ),
    "no such module": ({"task": "no_such_module:Task"}, ["no module 'no_such_module' on the import path"]),
    "no such device": ({"device": "cuda:99"}, ["device must be one that this machine has, got 'cuda:99'"]),
    "no such kernels": (
        {"kernels": "triton"},
        ["kernels must be auto or torch on cpu, got 'triton'", "needs CUDA"],
    ),
    "no such attention here": (
        {"attn_implementation": "varlen"},
        ["attn_implementation must be auto or sdpa with device cpu: varlen needs CUDA"],
    ),
    "no such template": (
        {"chat_template": "/none"},
        ["chat_template must be a readable text file, got '/none' (No such file or directory)"],
    ),
    "no such model": ({"model_name_or_path": "/none/here"}, ["/none/here: no such folder or file"]),
    "too few examples": (
        {"task": "test_train:Short", "num_examples": 4, "num_eval": 6},
        ["num_eval=6 must not ask for more than the task has", "'heldout' has 5"],
    ),
    "no transcripts": (
        {"task": "test_train:Short", "num_examples": 2, "warm_start_examples": 4, "warm_start_steps": 1},
        ["warm_start_steps must be 0 with task toy, got 1", "no method `transcript`"],
    ),
    "too long": (
        {"max_reflection_length": 600},
        ["a conversation of up to", "max_position_embeddings, 512", "lower max_reflection_length"],
    ),
    "too long for the cache": ({"cache_gb": 1e-6}, ["cache_gb must be at least", "got 1e-06"]),
    "run name with a slash": ({"run_name": "a/b"}, ["run_name must be a plain directory name, got 'a/b'"]),
}


@pytest.mark.parametrize("settings, fragments", BAD.values(), ids=BAD.keys())
def test_bad_settings_are_named_and_leave_nothing(quick, tmp_path, monkeypatch, settings, fragments):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it Triton serves the CPU
    assert_error(quick(**settings), 2, *fragments)
    runs = tmp_path / "runs"
    assert not runs.exists() or list(runs.iterdir()) == []


@pytest.mark.parametrize(
    "text, fragments",
    [
        ("learning_rat: 1e-5", ["unknown key learning_rat", "mean learning_rate?"]),
        ("max_steps: [1]", ["max_steps must be an integer, got [1]"]),
        ("num_generations: 1", ["num_generations must be at least 2, got 1"]),
        ("a: b: c", ["is not valid YAML"]),
    ],
)
def test_bad_yaml(quick, tmp_path, text, fragments):
    (tmp_path / "c.yaml").write_text(text)
    settings = {name: value for name, value in QUICK.items() if name not in text}
    argv = arguments(tmp_path, tmp_path / "runs", **settings, config=tmp_path / "c.yaml")
    for name in ("num_generations", "max_steps"):  # else the command line would win
        if name in text:
            at = argv.index(f"--{name}")
            del argv[at : at + 2]
    assert_error(run(argv), 2, *fragments)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_before_sampling(tracker, quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if tracker == "tensorboard" else tracker, None)
    assert_error(quick(report_to=tracker), 2, f"report_to {tracker} needs", f"reflect-grpo[{tracker}]")


# --- bad models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, fragments",
    [
        ("model.safetensors", None, ["model.safetensors", "no weights there"]),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{broken}", ["model.safetensors is damaged or cut short"]),
        ("config.json", None, ["config.json"]),
        ("config.json", b"{", ["config.json is damaged"]),
        ("config.json", b'{"model_type": "gpt2"}', ["gpt2", "llama"]),
        ("tokenizer.json", None, ["no tokenizer"]),
        ("tokenizer.json", b"{}", ["the tokenizer cannot be read"]),
        ("chat_template.jinja", None, ["no chat template; pass chat_template"]),
    ],
)
def test_missing_and_damaged_model_files(model, tmp_path, name, content, fragments):
    folder = shutil.copytree(model, tmp_path / "model")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert_error(run(arguments(folder, tmp_path / "runs", **QUICK)), 2, *fragments)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_model_file_that_is_cut_short(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    done = run(arguments(folder, tmp_path / "runs", **QUICK))
    assert_error(done, 2, "model.safetensors is damaged or cut short")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_source_weights_that_are_not_finite(model, tmp_path, value):
    """Refused before the run copies them into start/ and, a step later, recommends that copy."""
    broken, tokenizer = weights.load(model)
    with torch.no_grad():
        broken.layers[1].down_proj.weight[3, 5] = value
    weights.save(broken, tokenizer, tmp_path / "model")
    done = run(arguments(tmp_path / "model", tmp_path / "runs", **QUICK))
    assert_error(done, 2, str(tmp_path / "model"), "must be finite in float32", "layers.1.down_proj.weight")
    assert list((tmp_path / "runs").iterdir()) == []


# --- resuming what cannot be resumed ------------------------------------------------------------------------


def test_resume_of_a_finished_run(finished, quick):
    done = run(["--resume", str(finished)])
    assert_error(done, 2, f"{finished} is finished", f"python -m grpo.evaluate {finished}")
    without_table = quick(num_eval=0).folder
    assert_error(run(["--resume", str(without_table)]), 2, "is finished")


def test_a_finished_run_continues_with_more_steps(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    before = {
        name: (folder / name).read_bytes() for name in ("evaluation.json", "evaluation-before_rl.jsonl")
    }
    done = run(["--resume", str(folder), "--max_steps", "4"])
    assert done.status == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("max_steps 2 -> 4")]
    assert "Learning rate of step 3: " in line and line.endswith("with 2 steps it was 0")
    steps = [record for record in records(folder) if "learning_rate" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert float(line.partition("step 3: ")[2].partition(";")[0]) == pytest.approx(
        steps[2]["learning_rate"], rel=1e-2
    )
    # The longer run has an evaluation of its own; that of the shorter one has another name.
    assert configuration.load(folder / "config.yaml").max_steps == 4
    assert (folder / "step-000002-evaluation.json").read_bytes() == before["evaluation.json"]
    assert (folder / "evaluation-before_rl.jsonl").read_bytes() == before["evaluation-before_rl.jsonl"]
    assert (folder / "evaluation-trained.jsonl").exists() and (folder / "evaluation.json").exists()
    assert_error(
        run(["--resume", str(folder), "--max_steps", "3"]), 2, "max_steps must be at least 4", "got 3"
    )
    assert_error(run(["--resume", str(folder)]), 2, "is finished", "`--max_steps` above 4 continues it")


def test_a_longer_run_that_is_killed_continues_as_the_longer_one(finished, tmp_path, monkeypatch):
    whole, killed = (shutil.copytree(finished, tmp_path / name) for name in ("whole", "killed"))
    assert run(["--resume", str(whole), "--max_steps", "4"]).status == 0

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grpo.run.state.configuration.to_yaml", stop)  # evaluation files are set aside by then
        assert run(["--resume", str(killed), "--max_steps", "4"]).status == 130
    with monkeypatch.context() as patch:
        patch.setattr("train.collect_failures", stop)
        assert run(["--resume", str(killed), "--max_steps", "4"]).status == 130
    assert run(["--resume", str(killed)]).status == 0
    assert contents(killed) == contents(whole)


def test_a_finished_run_keeps_the_optimizer_of_its_newest_checkpoint_only(finished, tmp_path):
    steps = {path.name: (path / "trainer").is_dir() for path in (finished / "checkpoints").iterdir()}
    assert steps == {"step-000001": False, "step-000002": True}
    older = state.saved_model(finished, "1")  # still checked and usable
    assert (older / "sha256.json").exists()
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "checkpoints/step-000001/config.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match=r"config\.json is damaged"):
        state.saved_model(folder, "1")
    shutil.rmtree(folder / "checkpoints/step-000002")
    assert_error(run(["--resume", str(folder), "--max_steps", "4"]), 1, "trainer/state.json is missing")


def test_resume_auto_starts_a_run_then_continues_it_then_starts_the_next(model, tmp_path, monkeypatch):
    """The same command each time, as in a script that a queue restarts."""
    argv = [*arguments(model, tmp_path, **QUICK | {"save_steps": 1, "dtype": "auto"}), "--resume", "auto"]
    monkeypatch.setattr("grpo.run.build.bfloat16_speedup", lambda: 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = arguments(model, tmp_path, **QUICK | {"run_name": "tiny-other"})

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.validate", stop)
        assert train.main(other) == train.main(argv) == 130
    with monkeypatch.context() as patch:  # stopped when all results are there
        patch.setattr("grpo.run.checkpoint.drop_optimizer", stop)
        assert train.main(argv) == 130 and checkpoint.steps(tmp_path / "tiny-001") == [1, 2]
    assert train.main(argv) == 0
    assert sorted(path.name for path in tmp_path.glob("tiny*")) == ["tiny-001", "tiny-other-001"]
    assert checkpoint.steps(tmp_path / "tiny-001") == [1, 2]
    assert train.main(argv) == 0
    assert checkpoint.steps(tmp_path / "tiny-002") == [1, 2]
    assert "resume: null" not in (tmp_path / "tiny-002/config.yaml").read_text()


def test_resume_with_changed_settings_lists_them(unfinished):
    done = run(["--resume", str(unfinished), "--beta", "1", "--seed", "7", "--save_total_limit", "5"])
    assert_error(done, 2, "changed settings: seed: 42 -> 7; beta: 0.0 -> 1.0.", "Start a new run")


def test_resume_of_a_run_whose_settings_were_edited(unfinished):
    """Another rate or length would apply from here on, unnoticed."""
    path = unfinished / "config.yaml"
    written = path.read_text()
    for old, new in [("learning_rate: 0.001", "learning_rate: 0.01"), ("max_steps: 2", "max_steps: 3")]:
        assert f"\n{old}\n" in written
        path.write_text(written.replace(f"\n{old}\n", f"\n{new}\n"))
        done = run(["--resume", str(unfinished)])
        assert_error(done, 2, f"{path} was edited since the run wrote it", f"--config {path}")
    # An editor's line ends and comments change no setting, and what --resume itself changes is no edit.
    path.write_bytes(b"# my note\r\n" + written.replace("\n", "\r\n").encode())
    assert run(["--resume", str(unfinished), "--max_steps", "3"]).status == 0
    assert configuration.load(path).max_steps == 3
    assert "is finished" in run(["--resume", str(unfinished)]).err


def test_after_running_out_of_memory_a_run_continues_with_less(unfinished):
    """As it would with the larger settings, but for the order of sums; config.yaml has the new ones."""
    before = (unfinished / "evaluation-trained.jsonl").read_text()
    changes = {"max_tokens_per_micro_batch": 64, "gradient_checkpointing": True, "max_rows": 2}
    changes |= {"cache_gb": 0.5, "num_eval": 2}
    options = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    shutil.rmtree(unfinished / "checkpoints/step-000002")
    started = (unfinished / "config.yaml").stat().st_mtime_ns
    done = run(["--resume", str(unfinished), *options])
    assert done.status == 0, done.err
    assert (unfinished / "config.yaml").stat().st_mtime_ns == started  # names the newest run, and a tracker's
    assert "max_rows: 64 -> 2" in done.err and "results may differ in their last bits" in done.err
    config = configuration.load(unfinished / "config.yaml")
    assert {name: getattr(config, name) for name in changes} == changes
    assert [record["step"] for record in records(unfinished)] == [1, 2]
    # Records of four problems do not pass for an evaluation on two.
    assert json.loads((unfinished / "evaluation.json").read_text())["num_problems"] == 2
    assert (unfinished / "step-000001-evaluation-trained.jsonl").read_text() == before


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")],
)
def test_running_out_of_memory_names_the_settings_that_need_less(quick, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("train.Learner.step", fail)
    done = quick()
    assert done.status == 1 and "Traceback" in done.err  # it may be a leak, also in the task
    last = done.err.splitlines()[-1]
    assert f"--resume {done.folder}` continues, with less memory by --max_tokens_per_micro_batch" in last


def test_resume_of_something_else(tmp_path, model):
    for folder in (tmp_path, model, tmp_path / "none"):
        assert_error(run(["--resume", str(folder)]), 2, "resume must be a run directory with a config.yaml")
    # Another program's config.yaml, and one that a disk has eaten.
    for text, fragment in (("optimizer: adam\n", "unknown key optimizer"), ("\0\0\0", "is not valid YAML")):
        (tmp_path / "config.yaml").write_text(text)
        assert_error(run(["--resume", str(tmp_path)]), 2, str(tmp_path / "config.yaml"), fragment)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "trainer/state.safetensors", "trainer/state.json"]
)
def test_resume_of_a_run_with_a_damaged_checkpoint(unfinished, name):
    older, newest = (unfinished / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    done = run(["--resume", str(unfinished)])
    assert_error(done, 1, f"{newest / name} is damaged", f"delete {newest} to resume from {older}")
    # As it says:
    shutil.rmtree(newest)
    done = run(["--resume", str(unfinished)])
    assert done.status == 0, done.err
    assert [record["step"] for record in records(unfinished)] == [1, 2]


@pytest.mark.parametrize(
    "name, status, fragments",
    [
        ("metrics.jsonl", 1, ["must have at least", "got 10", "delete it"]),
        ("failures.jsonl", 2, ["failures.jsonl, line 1: not JSON"]),
        ("start/model.safetensors", 1, ["model.safetensors is damaged: its sha256 differs", "delete"]),
        ("start/sha256.json", 1, ["sha256.json is damaged"]),
        ("evaluation-trained.jsonl", 2, ["evaluation-trained.jsonl, line 1: not JSON"]),
    ],
)
def test_resume_of_a_run_with_a_damaged_file(unfinished, name, status, fragments):
    path = unfinished / name
    content = path.read_bytes()
    path.write_bytes(b"{" + content[1:10] if name.startswith(("metrics", "start")) else b"{\n" + content)
    assert_error(run(["--resume", str(unfinished)]), status, *fragments)


@pytest.mark.parametrize("name", ["start/model.safetensors", "start/tokenizer.json"])
def test_resume_of_a_run_whose_start_has_one_bit_changed_or_a_file_less(unfinished, name):
    """Such weights would load, and be the KL's reference and the table's column before RL."""
    path = unfinished / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_error(run(["--resume", str(unfinished)]), 1, f"{path} is damaged", f"delete {path.parent}")
    path.unlink()
    assert_error(run(["--resume", str(unfinished)]), 1, f"{path} is missing", f"delete {path.parent}")


def test_two_processes_on_one_run_directory(unfinished):
    with files.lock(unfinished):
        done = run(["--resume", str(unfinished)])
    assert_error(done, 1, f"{unfinished} is in use by process", "wait for it or stop it")


# --- disk ---------------------------------------------------------------------------------------------------


def test_an_output_directory_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(arguments(model, tmp_path / "file" / "runs", **QUICK))
    assert_error(done, 1, "cannot make a run directory in", "file/runs", "choose another output_dir")


FULL = OSError(errno.ENOSPC, "No space left on device")
TOKENIZER_FULL = Exception("No space left on device (os error 28)")  # as tokenizers raises it


@pytest.mark.parametrize("step", [2, 3])
def test_a_full_disk_leaves_the_older_checkpoint_and_the_run_goes_on_from_it(quick, monkeypatch, step):
    """The error of the thread that writes is raised in the next step or, after the last step, at the end."""
    write, calls = ShardWriter.write, []

    def fill(writer, tensors, folder, stem, **options):
        calls.append(stem)
        if calls.count("state") == step:
            (folder / f"{stem}.safetensors").write_bytes(b"half of it")
            raise FULL
        return write(writer, tensors, folder, stem, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", fill)
        done = quick(save_steps=1, max_steps=3, save_total_limit=1)
    assert_error(done, 1, "the disk is full", "GB are free", "What was saved before is intact", "resume")
    assert [path.name for path in (done.folder / "checkpoints").iterdir()] == [f"step-00000{step - 1}"]
    assert run(["--resume", str(done.folder)]).status == 0
    assert checkpoint.steps(done.folder) == [3]


def test_a_full_disk_while_start_is_written(quick, monkeypatch):
    def fill(*args, **options):
        raise FULL

    monkeypatch.setattr(ShardWriter, "write", fill)
    done = quick()
    assert_error(done, 1, "the disk is full")
    names = sorted(path.name for path in done.folder.iterdir())
    assert names == [".lock", "config.yaml", "inputs.json", "start.json"]


def test_a_full_disk_while_the_tokenizer_of_start_is_written(quick, monkeypatch):
    def fill(*args, **options):
        raise TOKENIZER_FULL

    monkeypatch.setattr("grpo.model.weights._save_tokenizer", fill)
    assert_error(quick(), 1, "the disk is full", "GB are free")


@pytest.mark.parametrize("settings", [{}, {"save_steps": 1}, {"save_steps": 1, "save_total_limit": 1}])
def test_a_run_says_what_it_takes_on_disk(quick, settings, monkeypatch):
    prune, sizes = checkpoint.prune, []

    def measured(run, *args):  # when the new checkpoint is complete and the old ones are still there
        sizes.append(tensor_gb(run))
        return prune(run, *args)

    monkeypatch.setattr(checkpoint, "prune", measured)
    done = quick(**settings, max_steps=3)
    (line,) = [line for line in done.out.splitlines() if line.startswith("disk: ")]
    first, most, left = (float(number) for number in re.findall(r"([\d.e-]+) GB (?:for|during|after)", line))
    assert sizes[0] == pytest.approx(first, rel=0.1)
    assert max(sizes) == pytest.approx(most, rel=0.1)
    assert tensor_gb(done.folder) == pytest.approx(left, rel=0.1) and "too little" not in line


def tensor_gb(run: Path) -> float:
    return sum(path.stat().st_size for path in run.rglob("*.safetensors")) / 1e9


def limit_disk(monkeypatch, runs: Path, gb: float) -> None:
    """A disk of `gb`, on which the tensors of the runs are."""

    def usage(_):
        used = tensor_gb(runs)
        return shutil._ntuple_diskusage(int(1e9 * gb), int(1e9 * used), int(1e9 * (gb - used)))

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_disk_that_is_too_small_is_found_before_the_run(quick, monkeypatch, tmp_path):
    line = quick().out
    first = float(re.search(r"disk: ([\d.e-]+) GB for", line)[1])
    shutil.rmtree(tmp_path / "runs")
    limit_disk(monkeypatch, tmp_path / "runs", 0.97 * first)
    done = quick()
    folder = tmp_path / "runs" / "tiny-001"
    named = ["save_total_limit", "save_steps", "choose another output_dir"]
    assert_error(done, 1, f"{folder} needs {first:.3g} GB", f"{0.97 * first:.3g} GB are free", *named)
    assert list((tmp_path / "runs").iterdir()) == []
    # Enough for the first checkpoint, which is the only one.
    limit_disk(monkeypatch, tmp_path / "runs", 1.03 * first)
    done = quick()
    assert done.status == 0, done.err
    assert "too little" not in done.out and not done.err


def test_a_disk_that_becomes_full_ends_the_run_before_anything_is_written(
    quick, monkeypatch, tmp_path, unfinished
):
    first = float(re.search(r"disk: ([\d.e-]+) GB for", quick().out)[1])
    shutil.rmtree(tmp_path / "runs")
    limit_disk(monkeypatch, tmp_path / "runs", 1.03 * first)
    written, write = [], ShardWriter.write
    monkeypatch.setattr(
        ShardWriter, "write", lambda *args, **options: written.append(args[3]) or write(*args, **options)
    )
    done = quick(save_steps=1)
    assert "that is too little: lower save_total_limit, raise save_steps" in done.out
    assert_error(done, 1, "the disk is full", "step-000002 needs", "What was saved before is intact")
    assert written == ["model", "model", "state"]  # start, and the checkpoint of step 1
    assert checkpoint.latest(done.folder) == checkpoint.path_of(done.folder, 1)
    # Resuming is refused before the step is sampled again, as long as nothing has changed.
    resumed = run(["--resume", str(done.folder)])
    assert_error(resumed, 1, "the disk is too small", "to save its next checkpoint")
    limit_disk(monkeypatch, tmp_path / "runs", 3 * first)
    assert run(["--resume", str(done.folder)]).status == 0
    assert checkpoint.steps(done.folder) == [1, 2]
    # A run that has only its evaluation left needs no space for a checkpoint.
    limit_disk(monkeypatch, unfinished, tensor_gb(unfinished))
    assert run(["--resume", str(unfinished)]).status == 0


def test_a_run_directory_or_an_adapter_without_its_base_is_no_model(finished, quick, tmp_path):
    options = [str(finished / "checkpoints/step-000002"), str(finished / "start")]
    assert_error(quick(model_name_or_path=finished), 2, "it is a run directory", *options)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}')
    error = "is an adapter (LoRA) whose base is missing: Qwen/Qwen3-0.6B is no folder"
    assert_error(quick(model_name_or_path=tmp_path / "lora"), 2, error)


def test_a_full_disk_while_a_log_is_written(quick, monkeypatch):
    def fill(*args, **options):
        raise FULL

    monkeypatch.setattr(files, "append_jsonl", fill)
    assert_error(quick(), 1, "No space left on device", "what was saved before is intact")


# --- exceptions in the middle of a run ----------------------------------------------------------------------


class Faulty(tiny.Toy):
    """`verify` raises what `error` holds at the call `at`, from 1; the probes before a run do not count."""

    error: BaseException | None = None
    at, calls = 0, 0

    def verify(self, example, text):
        Faulty.calls += text not in PROBES
        if Faulty.calls == Faulty.at and Faulty.error is not None:
            raise Faulty.error
        return super().verify(example, text)


@pytest.fixture
def faulty(quick, monkeypatch):
    """A run of three steps; `error` comes in the last, after 8 attempts and 12 verdicts a step."""

    def run_with(error, **settings):
        monkeypatch.setattr(Faulty, "error", error)
        monkeypatch.setattr(Faulty, "at", 8 + 2 * 12 + 3)
        monkeypatch.setattr(Faulty, "calls", 0)
        return quick(task="test_train:Faulty", max_steps=3, **settings)

    return run_with


ERRORS = {
    "wrong value": ValueError("not my format"),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "no memory": MemoryError(),
    "missing file": FileNotFoundError(errno.ENOENT, "No such file", "/gold.json"),
    "key": KeyError("gold"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_an_exception_in_a_step_saves_the_steps_before_and_shows_its_traceback(faulty, error):
    done = faulty(error)
    assert done.status == 1
    assert "Traceback" in done.err and "in verify" in done.err and type(error).__name__ in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: the exception above ended the run") and "--resume" in last
    assert checkpoint.steps(done.folder) == [2]
    assert [record["step"] for record in records(done.folder)] == [1, 2]
    undisturbed = faulty(None)
    assert run(["--resume", str(done.folder)]).status == 0
    assert contents(done.folder) == contents(undisturbed.folder)


class Leaky(tiny.Toy):
    """`leaks` raises in step 3: six reflections a step."""

    calls = 0

    def leaks(self, example, reflection):
        Leaky.calls += reflection not in PROBES
        if Leaky.calls == 2 * 6 + 2 and reflection not in PROBES:
            raise ValueError("no such column")
        return super().leaks(example, reflection)


def test_an_exception_in_leaks_saves_the_steps_before(quick, monkeypatch):
    monkeypatch.setattr(Leaky, "calls", 0)
    done = quick(task="test_train:Leaky", max_steps=3)
    assert done.status == 1 and "in leaks" in done.err
    assert checkpoint.steps(done.folder) == [2] and len(records(done.folder)) == 2
    assert run(["--resume", str(done.folder)]).status == 0


def test_a_floating_point_error_of_the_task_is_a_bug_of_the_task(faulty):
    done = faulty(FloatingPointError("divide by zero"))
    assert "Traceback" in done.err and "--resume" in done.err.splitlines()[-1]
    assert checkpoint.steps(done.folder) == [2]


def test_an_exception_in_an_update_saves_nothing_that_is_half_done(quick, monkeypatch):
    """The optimiser fails in step 2, after some of the weights moved: step 1 is not what they are."""
    real, calls = MasterAdamW._publish, []

    def fail(self):
        calls.append(None)
        real(self)
        if len(calls) == 2:
            raise RuntimeError("device lost")

    monkeypatch.setattr(MasterAdamW, "_publish", fail)
    done = quick()
    assert done.status == 1 and "device lost" in done.err
    assert checkpoint.steps(done.folder) == []


def test_a_full_disk_while_a_step_is_logged_saves_the_step_before(quick, monkeypatch):
    """The update of step 2 was taken, but its lines are not in the logs: the run continues from step 1."""
    real = files.append_jsonl

    def fill(path, *records, **options):
        if path.name == "episodes.jsonl.gz" and records[0]["step"] == 2:
            raise FULL
        real(path, *records, **options)

    monkeypatch.setattr(files, "append_jsonl", fill)
    done = quick(save_steps=1)
    assert_error(done, 1, "No space left on device", "what was saved before is intact")
    assert checkpoint.steps(done.folder) == [1]


def test_an_exception_in_the_warm_start_saves_its_steps(quick, monkeypatch):
    calls = []

    def fail():
        calls.append(None)
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr("grpo.run.build.return_unused_memory", fail)  # after the eighth step
    done = quick(warm_start_steps=10)
    assert done.status == 1 and "cosmic ray" in done.err and calls
    assert checkpoint.steps(done.folder / "warm_start") == [8]


def test_each_step_reads_no_log_again(quick, monkeypatch):
    """Validated steps are remembered: reading metrics.jsonl at every step would be quadratic in a run."""
    reads, read = [], files.read_jsonl
    monkeypatch.setattr(
        files,
        "read_jsonl",
        lambda path, *shape, **options: reads.append(path) or read(path, *shape, **options),
    )
    counts = []
    for steps in (2, 6):
        reads.clear()
        assert quick(max_steps=steps, eval_steps=1, num_validation=4).status == 0
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


# --- numbers that are none, tasks that teach nothing --------------------------------------------------------


def at_call(number, function, change):
    calls = []

    def wrapped(*args, **options):
        calls.append(None)
        result = function(*args, **options)
        return change(result) if len(calls) == number else result

    return wrapped


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_is_not_taken(quick, monkeypatch, what):
    good = quick(save_steps=1).folder / "checkpoints" / "step-000001" / "model.safetensors"
    if what == "loss":
        loss = at_call(2, torch_backend.grpo_loss, lambda result: (result[0] * math.nan, result[1]))
        monkeypatch.setattr(torch_backend, "grpo_loss", loss)
    else:
        monkeypatch.setattr(
            MasterAdamW, "grad_norm", at_call(2, MasterAdamW.grad_norm, lambda norm: norm * math.nan)
        )
    done = quick()
    folder = done.folder / "checkpoints"
    assert_error(done, 1, "step 2, micro-batch 1 of 1", f"{what} is nan", "lower learning_rate", str(folder))
    # The weights of the last good step were saved, though no checkpoint was due.
    assert checkpoint.steps(done.folder) == [1]
    assert (folder / "step-000001" / "model.safetensors").read_bytes() == good.read_bytes()


def test_a_later_update_on_the_same_rollout_that_is_not_finite(quick, monkeypatch):
    """Then the weights are not those of any step's end, and are not saved."""
    loss = at_call(4, torch_backend.grpo_loss, lambda result: (result[0] * math.nan, result[1]))
    monkeypatch.setattr(torch_backend, "grpo_loss", loss)
    done = quick(num_iterations=2)
    assert_error(done, 1, "loss is nan", f"weights in {done.folder / 'start'}")
    assert checkpoint.steps(done.folder) == []


@pytest.mark.parametrize("save_steps", [0, 1])
def test_weights_that_diverged(quick, save_steps):
    """They are not saved, and the advice names weights that are whole."""
    done = quick(learning_rate=1e38, max_steps=3, save_steps=save_steps)
    assert_error(done, 1, "NaN or infinite", f"weights in {done.folder / 'start'}")
    assert checkpoint.steps(done.folder) == []


def test_a_task_that_is_too_easy(quick):
    done = quick(task="test_train:Easy")
    assert_error(done, 1, "no failures found in 8 examples: the task is too easy")


def test_a_task_that_is_too_hard_is_warned_about_and_then_stopped(quick):
    settings = {"eval_steps": 5, "max_steps": 50, "num_validation": 4, "max_wrong_episodes": 30}
    done = quick(task="test_train:Impossible", **settings)
    assert_error(done, 1, "not one of the first 30 answers was right (5 steps): the task is too hard")
    assert checkpoint.steps(done.folder) == [5]
    lines = done.out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert "no attempt was right" in warnings[0] and "no retry of the starting model was right" in warnings[1]
    assert lines.index(warnings[1]) < next(i for i, line in enumerate(lines) if line.split()[:1] == ["1/50"])
    assert any("0% of the groups have a signal" in line for line in warnings)
    kept = [record["warning"] for record in records(done.folder) if "warning" in record]
    assert kept[:2] == ["no_success", "few_signals"]


def test_a_task_that_is_too_hard_is_trained_to_the_end_if_asked(quick):
    """From the start, or after it was stopped."""
    settings = {"task": "test_train:Impossible", "max_steps": 6}
    assert quick(**settings, max_wrong_episodes=0).status == 0
    done = quick(**settings, max_wrong_episodes=6)
    assert_error(done, 1, "max_wrong_episodes 0 continues")
    assert run(["--resume", str(done.folder), "--max_wrong_episodes", "0"]).status == 0
    assert checkpoint.steps(done.folder)[-1] == 6
