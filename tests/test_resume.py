"""A run that is killed or stopped anywhere and then continued equals an undisturbed one, byte for byte."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import Moment, arguments, assert_same, contents, records, run, run_and_stop, save_model

import train
from grpo import config as configuration
from grpo import failures
from grpo.rollout import Rollout
from grpo.run import checkpoint, files
from grpo.run.checkpoint import Saver
from grpo.tasks import Verdict

ROOT = Path(__file__).parent.parent
RUN = "tiny-001"
SAMPLING, UPDATE = "grpo.sampler.engine:Sampler._decode", "grpo.learner.optimizer:MasterAdamW._publish"
BLOCKS = "grpo.model.shards:ShardWriter._blocks"  # called for each tensor
STEP_2 = '{"step": 2, "clip'  # the line of its update; that of its validation comes after it

KILLS = {
    "during the warm start": Moment("grpo.learner.learner:Learner.supervised_step", call=3),
    "while start is written": Moment(BLOCKS, call=5),
    "before start gets its name": Moment("os:rename", call=4),  # after inputs.json, start.json, config.yaml
    "while failures are sampled": Moment("grpo.failures:_summary"),
    "in the first validation": Moment("grpo.evaluate.measure:_second_tries"),
    "in the first rollout": Moment(SAMPLING, call=10, after='"step": 0'),
    "in a rollout": Moment(SAMPLING, call=10, after='{"step": 2, "validation'),
    "in an update": Moment(UPDATE, after='{"step": 1'),
    "between an update and its log": Moment("grpo.run.metrics:Metrics.log", after='{"step": 2, "validation'),
    "between the lines of one step": Moment("grpo.run.metrics:Metrics.timings", after=STEP_2),
    "in a validation": Moment(SAMPLING, call=5, after=STEP_2),
    "before a checkpoint": Moment("grpo.run.checkpoint:save", after='{"step": 3'),
    "in a shard of a checkpoint": Moment(BLOCKS, call=30, after='{"step": 3'),
    "in a checkpoint": Moment("grpo.run.checkpoint:_write_state", after='{"step": 3'),
    "after a checkpoint, before pruning": Moment("grpo.run.checkpoint:prune", after='{"step": 3'),
    "while pruning": Moment("grpo.run.files:delete", call=2, after='{"step": 3'),  # half removed
    "in the evaluation": Moment(SAMPLING, call=25, after='{"step": 4, "validation'),
    "between models of the evaluation": Moment("grpo.run.build:load_into", call=3),
    "before evaluation.json": Moment("train:report"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed_run(model, tmp_path_factory):
    done = run(arguments(model, tmp_path_factory.mktemp("undisturbed")))
    assert done.status == 0, done.err
    return done.folder


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run):
    return contents(undisturbed_run)


def resume(folder: Path) -> None:
    done = run(["--resume", str(folder)])
    assert done.status == 0, done.err
    assert "warning" not in done.err  # threads, versions and machine are the same


def test_what_is_compared_is_not_trivial(undisturbed):
    """All stages left something, rewards differ, the weights moved."""
    metrics = [json.loads(line) for line in undisturbed["metrics.jsonl"].splitlines()]
    updates = [record for record in metrics if "reward" in record]
    assert [record["step"] for record in updates] == [1, 2, 3, 4]
    assert sum(record["grad_norm"] > 0.1 for record in updates) >= 2 and updates[-1]["kl"] > 0
    assert [record["step"] for record in metrics if "validation/retry" in record] == [0, 2, 4]
    assert len(undisturbed["warm_start.jsonl"].splitlines()) == 3
    assert undisturbed["episodes.jsonl.gz"].count(files.GZIP_MEMBER) == 4  # one write per step
    names = ["start/model.safetensors", "checkpoints/step-000004/model.safetensors"]
    assert len({undisturbed[name] for name in names}) == 2
    assert "checkpoints/step-000004/trainer/state.safetensors" in undisturbed
    assert json.loads(undisturbed["evaluation.json"])["num_problems"] == 8


def test_two_runs_are_equal_also_from_the_shell(model, tmp_path, undisturbed):
    """Its own process, another hash seed and directory, and `deterministic`: on a CPU it changes nothing."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    settings = arguments(model, tmp_path / "runs", deterministic=True)
    command = [sys.executable, str(ROOT / "train.py"), *settings]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "runs" / RUN, undisturbed)
    assert configuration.load(tmp_path / "runs" / RUN / "config.yaml").deterministic


@pytest.mark.parametrize("moment", KILLS.values(), ids=KILLS.keys())
def test_killed_and_resumed(model, tmp_path, undisturbed, moment):
    status, _ = run_and_stop(arguments(model, tmp_path), moment, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert not (tmp_path / RUN / "evaluation.json").exists()
    resume(tmp_path / RUN)
    assert_same(tmp_path / RUN, undisturbed)


def test_killed_again_and_again(model, tmp_path, undisturbed):
    argv = arguments(model, tmp_path)
    for name in ("during the warm start", "in a rollout", "in a checkpoint", "in the evaluation"):
        assert run_and_stop(argv, KILLS[name], signal.SIGKILL)[0] == -signal.SIGKILL
        argv = ["--resume", str(tmp_path / RUN)]
    resume(tmp_path / RUN)
    assert_same(tmp_path / RUN, undisturbed)


def test_killed_and_resumed_in_bfloat16_with_several_updates_per_rollout(model, tmp_path):
    """Where the float32 masters are not the model's own weights, and a step has two updates on two losses."""
    settings = {"dtype": "bfloat16", "num_iterations": 2, "save_steps": 2, "distill_retries": 0.5}
    settings |= {"warm_start_steps": 0, "num_eval": 0}
    undisturbed = run(arguments(model, tmp_path / "a", **settings))
    assert undisturbed.status == 0, undisturbed.err
    assert "distill/loss" in (undisturbed.folder / "metrics.jsonl").read_text()
    moment = Moment(UPDATE, call=2, after='{"step": 2, "validation')
    assert run_and_stop(arguments(model, tmp_path / "b", **settings), moment, signal.SIGKILL)[0] < 0
    resume(tmp_path / "b" / RUN)
    assert_same(tmp_path / "b" / RUN, contents(undisturbed.folder))


REFRESHED = {"refresh_failures": 1, "max_steps": 3, "warm_start_steps": 0, "eval_steps": 0, "num_eval": 0}


@pytest.fixture(scope="module")
def refreshed(model, tmp_path_factory):
    """A run that collects its failures after each step."""
    done = run(arguments(model, tmp_path_factory.mktemp("refreshed"), **REFRESHED))
    assert done.status == 0, done.err
    return done.folder


def test_each_collection_of_failures_has_other_attempts_and_is_trained_on(refreshed):
    pools = [failures.load(failures.file_of(refreshed, step)) for step in range(3)]
    assert not failures.file_of(refreshed, 3).exists()  # no step follows
    assert len({str([attempt.turn.ids for attempt in pool]) for pool in pools}) == 3
    for step, pool in enumerate(pools, 1):
        ids = {str(attempt.prompt_ids + attempt.turn.ids)[:-1] for attempt in pool}
        prompts = [e["prompt_ids"] for e in records(refreshed, "episodes.jsonl.gz") if e["step"] == step]
        assert all(any(str(prompt).startswith(start) for start in ids) for prompt in prompts)
    right = [line.get("failures/right") for line in records(refreshed)]
    counts = [failures.summary(failures.file_of(refreshed, step)) for step in (1, 2)]
    assert right == [None, *(its["right"] / its["attempts"] for its in counts)]


# The checkpoint of the step before exists, or that of one step earlier, after which the step is taken again.
@pytest.mark.parametrize("save_steps", [1, 2])
def test_killed_while_failures_are_collected_again(model, tmp_path, refreshed, save_steps):
    argv = arguments(model, tmp_path, **REFRESHED, save_steps=save_steps)
    moment = Moment("grpo.failures:_summary", after='"step": 1' if save_steps == 2 else '"step": 2')
    assert run_and_stop(argv, moment, signal.SIGKILL)[0] == -signal.SIGKILL
    resume(tmp_path / RUN)
    assert_same(tmp_path / RUN, contents(refreshed))


def test_killed_in_a_step_on_failures_that_were_collected_again(model, tmp_path, refreshed):
    """The stored file is read again, and what a later policy has left is not."""
    argv = arguments(model, tmp_path, **REFRESHED)
    moment = Moment(UPDATE, after='"step": 2')
    assert run_and_stop(argv, moment, signal.SIGKILL)[0] == -signal.SIGKILL
    failures.file_of(tmp_path / RUN, 3).write_text("of a step that will be taken again")
    resume(tmp_path / RUN)
    assert_same(tmp_path / RUN, contents(refreshed))


def test_too_few_new_failures_leave_the_failures_before_in_use(model, tmp_path, monkeypatch):
    """After step 2 no attempt fails."""
    attempts = Rollout.attempts

    def solved(self, examples, *, stage="rollout", step=0, **options):
        made = attempts(self, examples, stage=stage, step=step, **options)
        solves = stage == "failures" and step == 2
        return [replace(a, verdict=Verdict("ok")) if solves else a for a in made]

    monkeypatch.setattr(Rollout, "attempts", solved)
    done = run(arguments(model, tmp_path, **REFRESHED))
    assert done.status == 0 and "failures-000002.jsonl has 0 failures, fewer than groups_per_step" in done.err
    used = {e["texts"]["attempt"] for e in records(done.folder, "episodes.jsonl.gz") if e["step"] == 3}
    assert used <= {attempt.text for attempt in failures.load(failures.file_of(done.folder, 1))}
    assert records(done.folder)[-1]["failures/right"] == 1.0


# --- episodes that are not compressed -----------------------------------------------------------------------


def test_a_run_that_began_with_plain_episodes_continues_them(model, tmp_path, undisturbed):
    """As older versions wrote them. What is redone after a kill appears once there too."""
    folder = tmp_path / RUN
    run_and_stop(arguments(model, tmp_path), KILLS["in the first rollout"], signal.SIGKILL)
    (folder / "episodes.jsonl").touch()
    run_and_stop(["--resume", str(folder)], KILLS["before a checkpoint"], signal.SIGKILL)
    assert [record["step"] for record in records(folder, "episodes.jsonl")][-1] == 3
    resume(folder)
    plain = (folder / "episodes.jsonl").read_bytes()
    assert plain == gzip.decompress(undisturbed["episodes.jsonl.gz"])
    assert not (folder / "episodes.jsonl.gz").exists()


def test_resuming_loses_no_episode_of_a_file_that_the_user_unpacked(model, tmp_path, undisturbed):
    folder = tmp_path / RUN
    run_and_stop(arguments(model, tmp_path), KILLS["in a rollout"], signal.SIGKILL)
    packed = folder / "episodes.jsonl.gz"
    (folder / "episodes.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    resume(folder)
    plain = (folder / "episodes.jsonl").read_bytes()
    assert plain == gzip.decompress(undisturbed["episodes.jsonl.gz"])


# --- stopped by a signal that can be answered ---------------------------------------------------------------

STOPS = {
    "during the warm start": (
        Moment("grpo.learner.learner:Learner.supervised_step", call=2),
        "warm_start/checkpoints/step-000002",
    ),
    "while failures are sampled": (KILLS["while failures are sampled"], "start/model.safetensors"),
    "in a rollout": (Moment(SAMPLING, call=3, after='{"step": 3'), "checkpoints/step-000003"),
    "in an update": (Moment(UPDATE, after='{"step": 2'), "checkpoints/step-000003"),
    "in a validation": (Moment(SAMPLING, call=3, after=STEP_2), "checkpoints/step-000002"),
    "in the evaluation": (KILLS["in the evaluation"], "checkpoints/step-000004"),
}


# SIGINT everywhere; SIGTERM takes the same way, so one place is enough.
@pytest.mark.parametrize(
    "name, number", [*((name, signal.SIGINT) for name in STOPS), ("in a rollout", signal.SIGTERM)]
)
def test_stopped_after_saving_what_was_done(model, tmp_path, undisturbed, name, number):
    moment, saved = STOPS[name]
    # No checkpoint is due before the end: only the stop itself can have saved these steps.
    status, err = run_and_stop(arguments(model, tmp_path, save_steps=0), moment, number)
    folder = tmp_path / RUN
    assert status == 130
    assert f"stopped; `python train.py --resume {folder}` continues" in err and "Traceback" not in err
    assert (folder / saved).exists()
    resume(folder)
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("place", ["in an update", "in a checkpoint"])
def test_a_second_signal_stops_at_once(model, tmp_path, undisturbed, place):
    status, err = run_and_stop(arguments(model, tmp_path), KILLS[place], signal.SIGINT, signal.SIGINT)
    assert status == 130 and "continues" in err and "Traceback" not in err
    done = 1 if place == "in an update" else 2
    assert max(checkpoint.steps(tmp_path / RUN)) == done  # not what was being done
    resume(tmp_path / RUN)
    assert_same(tmp_path / RUN, undisturbed)


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(model, tmp_path, undisturbed):
    moment = Moment("grpo.run.checkpoint:_write_state", after='{"step": 2')
    status, err = run_and_stop(arguments(model, tmp_path), moment, signal.SIGTERM)
    assert status == 130 and "continues" in err and "not saved" not in err
    assert max(checkpoint.steps(tmp_path / RUN)) >= 2  # 3 if the rollout had no check left
    resume(tmp_path / RUN)
    assert_same(tmp_path / RUN, undisturbed)


def test_stopped_while_the_parts_are_built(model, tmp_path):
    """Nothing was begun: the directory is taken back, and there is nothing to resume."""
    status, err = run_and_stop(arguments(model, tmp_path), Moment("grpo.model.weights:build"), signal.SIGTERM)
    assert (status, err.strip()) == (130, "stopped")
    assert list(tmp_path.iterdir()) == []


def test_stopped_while_modules_are_imported(tmp_path):
    """The first slow import is replaced by one that gets the signal."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / "train.py")], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"")


def test_signal_handlers_are_given_back(model, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run(arguments(model, tmp_path, warm_start_steps=-1)).status == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- written during the next rollout ------------------------------------------------------------------------


def test_a_checkpoint_holds_its_step_however_late_it_is_written(
    model, tmp_path, monkeypatch, undisturbed_run
):
    """Each save begins when the next rollout is over and the run waits for it, or when there is no other."""
    waiting, rollouts = threading.Event(), []
    save, wait, sample = checkpoint.save, Saver.wait, train.sample_episodes

    def late(run_dir, *args, **options):
        if run_dir.name == RUN:  # not of the warm start
            assert waiting.wait(60)
        return save(run_dir, *args, **options)

    def note(saver):
        waiting.set()
        wait(saver)
        waiting.clear()

    def note_rollout(state, groups, step):
        rollouts.append((step, checkpoint.steps(state.folder)))
        return sample(state, groups, step)

    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(Saver, "wait", note)
    monkeypatch.setattr(train.train, "__defaults__", (note_rollout,))
    done = run(arguments(model, tmp_path))
    assert done.status == 0, done.err
    # In each rollout, the checkpoint of the step before was not there yet.
    assert rollouts == [(1, []), (2, []), (3, [1]), (4, [1, 2])]
    assert_same(done.folder, contents(undisturbed_run))
    # The last checkpoint cannot be that of a later step, but the one before it can.
    before_last = [folder / "checkpoints/step-000003" for folder in (done.folder, undisturbed_run)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in before_last}) == 1


# --- which checkpoints stay ---------------------------------------------------------------------------------


def test_the_newest_checkpoints_and_the_best_one_stay(model, tmp_path):
    settings = {"max_steps": 6, "eval_steps": 1, "save_total_limit": 1, "num_eval": 0, "learning_rate": 1e-2}
    done = run(arguments(model, tmp_path, **settings))
    assert done.status == 0, done.err
    name = "validation/second_try"
    shares = {record["step"]: record[name] for record in records(done.folder) if name in record}
    assert len(shares) == 7
    best = max(range(1, 7), key=shares.__getitem__)
    assert best < 6  # else this shows nothing: choose another seed
    assert checkpoint.steps(done.folder) == [best, 6]
