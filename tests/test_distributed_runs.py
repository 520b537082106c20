"""Whole runs with several ranks: the same results, and nothing lost, whichever rank is stopped or fails.

Most ranks are started without an import in each (tests/ranks.py), by us or by torchrun's agent. One test uses
the command torchrun itself.
"""

import errno
import functools
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_run
import torch
from ranks import Signal, together, torchrun
from safetensors.torch import load_file
from tiny_run import Moment, arguments, assert_same, contents, records, save_model
from transformers import AutoModelForCausalLM

from grpo import distributed
from grpo.model.shards import ShardWriter
from grpo.run import checkpoint

ROOT = Path(__file__).parent.parent
RUN = "tiny-001"
MODES = ("replicate", "fsdp")
# Less of everything than in tests/tiny_run.py: each rank repeats it.
SETTINGS = {
    "warm_start_steps": 2,
    "num_examples": 8,
    "max_steps": 3,
    "eval_steps": 3,
    "num_validation": 2,
    "num_eval": 3,
    "max_completion_length": 5,
    "max_reflection_length": 6,
}
SAMPLING = Moment("grpo.sampler.engine:Sampler._decode", call=3, after='{"step": 2')
SAVING = Moment("grpo.run.checkpoint:_sums", after='{"step": 2')  # on rank 0, when all have written


def ran(argv, moment=None, number=signal.SIGTERM, places=()):
    """On each rank: a run, in which the ranks `places` send themselves a signal at a moment."""
    if distributed.rank() in places:
        tiny_run.arm(argv, moment, number)
    return tiny_run.run(argv)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """The directory of a finished run by number of ranks, mode and dtype."""

    @functools.cache
    def folder(size: int, mode: str = "replicate", dtype: str = "float32") -> Path:
        output = tmp_path_factory.mktemp("undisturbed")
        argv = arguments(model, output, **SETTINGS, parallel=mode, dtype=dtype)
        for done in together(size, ran, argv):
            assert done.status == 0, done.err
        return output / RUN

    return folder


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):
    """A copy of the directory of a run that stopped in step 3, by number of ranks and so on, and `places`."""

    @functools.cache
    def folder(size: int, mode: str, dtype: str, places: tuple[int, ...]) -> Path:
        output = tmp_path_factory.mktemp("stopped")
        argv = arguments(model, output, **SETTINGS, parallel=mode, dtype=dtype, save_steps=0)
        for rank, done in enumerate(together(size, ran, argv, SAMPLING, signal.SIGTERM, places)):
            assert done.status == 130, done.err
            ending = f"stopped; `python train.py --resume {output / RUN}` continues\n"
            assert done.err.endswith(ending) if rank == 0 else done.err == ""
        assert checkpoint.steps(output / RUN) == [2]
        return output / RUN

    return folder


def resumed(size: int, folder: Path, **settings: object) -> Sequence[tiny_run.Done]:
    argv = ["--resume", str(folder), *(f"--{name}={value}" for name, value in settings.items())]
    results = together(size, ran, argv)
    for done in results:
        assert done.status == 0, done.err
    return results


# --- the same results, whatever the number of ranks -------------------------------------------------------


def without_rounding(lines: Sequence[dict]) -> list[dict]:
    """Records of episodes or answers without their floats of the model."""
    return [{key: value for key, value in line.items() if key != "logprobs"} for line in lines]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 3])
def test_results_do_not_depend_on_the_number_of_ranks(undisturbed, size, mode):
    """Three ranks are more than the groups of a step."""
    alone, folder = undisturbed(1), undisturbed(size, mode)
    for name in ("failures.jsonl", "episodes.jsonl.gz", *sorted(p.name for p in alone.glob("evaluation-*"))):
        found, expected = (without_rounding(records(run, name)) for run in (folder, alone))
        assert found == expected and len(found) > 2, name
    assert (folder / "evaluation.json").read_bytes() == (alone / "evaluation.json").read_bytes()
    for name in ("metrics.jsonl", "warm_start.jsonl"):
        for found, expected in zip(records(folder, name), records(alone, name), strict=True):
            assert found == pytest.approx(expected, rel=0, abs=1e-5), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}


def test_what_is_compared_is_not_trivial(undisturbed):
    """Rewards differ within a group, and the weights moved."""
    metrics = [line for line in records(undisturbed(1)) if "reward" in line]
    assert sum(line["grad_norm"] > 0.1 for line in metrics) >= 2 and metrics[-1]["kl"] > 0
    before, after = (
        load_file(undisturbed(1) / part / "model.safetensors")
        for part in ("start", "checkpoints/step-000003")
    )
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_transformers_loads_the_checkpoint_of_several_ranks(undisturbed, mode):
    folders = [run / "checkpoints/step-000003" for run in (undisturbed(2, mode), undisturbed(1))]
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-5)
    files = [{path.name for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert {p.name for p in (folders[0] / "trainer").iterdir()} == {
        "state.json", "rank-0000.safetensors", "rank-0001.safetensors"
    }  # fmt: skip


# --- stopped and resumed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, dtype, places",
    [
        ("replicate", "float32", (0, 1)),
        ("fsdp", "float32", (1,)),
        ("replicate", "bfloat16", (0,)),
        ("fsdp", "bfloat16", (0, 1)),
    ],
)
def test_a_stop_on_any_rank_saves_what_all_have_done(tmp_path, undisturbed, stopped, mode, dtype, places):
    """No checkpoint was due before the end. Resumed with as many ranks, the run is byte-equal.

    So are two runs without a stop: this one's steps were computed anew.
    """
    folder = shutil.copytree(stopped(2, mode, dtype, places), tmp_path / RUN)
    for done in resumed(2, folder, save_steps=1):
        assert "warning" not in done.err
    assert_same(folder, contents(undisturbed(2, mode, dtype)))


def restored(folder, mode):
    """On each rank: what a resume prints, and the pieces of masters and moments that the rank has then."""
    found = {}

    def look(run):
        learner = run.learner(run.config)
        found["step"] = run.restore(learner, run.folder, [])
        tensors, found["counters"] = learner.state()
        found["tensors"] = {name: tensor.flatten().tolist() for name, tensor in tensors.items()}

    argv = ["--resume", str(folder), "--parallel", mode]
    return found, tiny_run.run(argv, stages=look).err


@pytest.mark.parametrize(
    "size, mode, new_size, new_mode",
    [
        (2, "replicate", 3, "fsdp"),
        (2, "fsdp", 3, "replicate"),
        (2, "replicate", 2, "fsdp"),
        (2, "fsdp", 1, "replicate"),
        (1, "replicate", 2, "replicate"),
    ],
)
def test_another_number_of_ranks_restores_the_same_state(tmp_path, stopped, size, mode, new_size, new_mode):
    places = (1,) if mode == "fsdp" else (0, 1)
    folder = shutil.copytree(stopped(size, mode, "float32", places), tmp_path / RUN)
    ranks, errors = zip(*together(new_size, restored, folder, new_mode), strict=True)
    assert all("step" in found for found in ranks), errors
    stored, state = checkpoint.load(folder / "checkpoints/step-000002")
    for found in ranks:
        assert found["step"] == 2 and found["counters"] == state["counters"]
        assert found["tensors"].keys() == stored.keys()
    for name, tensor in stored.items():
        whole = [number for found in ranks for number in found["tensors"][name]]
        assert whole == tensor.flatten().tolist(), name
    notice = f"warning: ranks was {size}, is {new_size}: the run continues, but not bit for bit\n"
    assert (notice in errors[0]) == (new_size != size)
    assert (f"parallel: {mode!r} -> {new_mode!r}" in errors[0]) == (new_mode != mode)
    assert not any(errors[1:])


@pytest.mark.parametrize("mode, size", [("replicate", 3), ("fsdp", 1)])
def test_another_number_of_ranks_continues_the_run(tmp_path, undisturbed, stopped, mode, size):
    folder = shutil.copytree(stopped(2, mode, "float32", (1,) if mode == "fsdp" else (0, 1)), tmp_path / RUN)
    resumed(size, folder)
    for found, expected in zip(records(folder), records(undisturbed(1)), strict=True):
        assert found == pytest.approx(expected, rel=0, abs=1e-5)


# --- killed -----------------------------------------------------------------------------------------------


def test_torchrun_restarts_a_run_whose_ranks_are_killed(model, tmp_path, undisturbed):
    """First rank 1 is killed while it samples, then rank 0 while it saves."""
    argv = [*arguments(model, tmp_path / "runs", **SETTINGS, parallel="fsdp"), "--resume", "auto"]
    signals = [Signal(1, SAMPLING), Signal(0, SAVING, restart=1)]
    status, printed = torchrun(2, argv, signals, max_restarts=3, output=tmp_path / "printed")
    assert status == 0, printed
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [RUN]
    assert_same(tmp_path / "runs" / RUN, contents(undisturbed(2, "fsdp")))
    assert printed.count("error: ") == 1 and "Traceback" not in printed  # rank 0 of the first start


def test_the_command_torchrun_restarts_a_run(model, tmp_path):
    """The real one, with one step: an import in each process takes longer than a run."""
    settings = SETTINGS | {"warm_start_steps": 0, "max_steps": 1, "eval_steps": 0, "num_eval": 0}
    argv = [*arguments(model, tmp_path / "runs", **settings), "--resume", "auto"]
    signals = [Signal(1, Moment("grpo.sampler.engine:Sampler._decode", call=3))]
    status, printed = torchrun(2, argv, signals, max_restarts=1, output=tmp_path / "printed", real=True)
    assert status == 0, printed
    assert checkpoint.steps(tmp_path / "runs" / RUN) == [1] and "Traceback" not in printed


KILLS = {
    "sampling": (0, "replicate", SAMPLING),
    "summing gradients": (1, "replicate", Moment("grpo.learner.sharded:ReplicatedAdamW.reduce", call=2)),
    "in a backward pass": (0, "fsdp", Moment("grpo.learner.learner:Learner._backward", call=4)),
    "saving": (1, "replicate", Moment("grpo.model.shards:ShardWriter.write", after='{"step": 2')),
}


@pytest.mark.parametrize("rank, mode, moment", KILLS.values(), ids=KILLS.keys())
def test_killed_and_restarted(model, tmp_path, undisturbed, rank, mode, moment):
    argv = [*arguments(model, tmp_path / "runs", **SETTINGS, parallel=mode), "--resume", "auto"]
    status, printed = torchrun(2, argv, [Signal(rank, moment)], max_restarts=3, output=tmp_path / "printed")
    assert status == 0, printed
    assert_same(tmp_path / "runs" / RUN, contents(undisturbed(2, mode)))


@pytest.mark.parametrize("rank, moment", [(1, SAMPLING), (0, SAVING)])
def test_without_restarts_all_ranks_end_and_torchrun_names_the_one(model, tmp_path, rank, moment):
    argv = arguments(model, tmp_path / "runs", **SETTINGS)
    status, printed = torchrun(2, argv, [Signal(rank, moment)], output=tmp_path / "printed")
    assert status == 1
    assert re.search(rf"rank +: {rank} .*\n *exitcode +: -9", printed), printed
    ours = [line for line in printed.splitlines() if line.startswith("error: ")]
    lost = "error: rank 0 lost contact with another rank"
    assert len(ours) == (rank != 0) and all(line.startswith(lost) for line in ours), printed
    assert checkpoint.latest(tmp_path / "runs" / RUN) is not None  # intact


def test_ctrl_c_saves_what_is_done(model, tmp_path, undisturbed):
    argv = arguments(model, tmp_path / "runs", **SETTINGS, save_steps=0)
    signals = [Signal(0, SAMPLING, signal.SIGINT)]
    status, printed = torchrun(2, argv, signals, output=tmp_path / "printed")
    assert status != 0 and printed.count("stopping: saving what is done") == 1, printed
    assert checkpoint.steps(tmp_path / "runs" / RUN) == [2]
    resumed(2, tmp_path / "runs" / RUN, save_steps=1)
    assert_same(tmp_path / "runs" / RUN, contents(undisturbed(2)))


# --- failures of one rank ---------------------------------------------------------------------------------


def failing(argv, place, kind):
    """On each rank: a run in which the rank `place` fails, at its third step."""
    if distributed.rank() == place and kind == "disk full":

        def write(self, tensors, folder, stem, **options):
            if "step-000003" in str(folder):
                raise OSError(errno.ENOSPC, "No space left on device", str(folder))
            return original(self, tensors, folder, stem, **options)

        original, ShardWriter.write = ShardWriter.write, write
    if distributed.rank() == place and kind == "task":
        tiny_run.at(argv, Moment("tiny:Toy.verify", after='{"step": 2'), fail)
    return tiny_run.run(argv)


def fail():
    raise KeyError("no such example")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", ["disk full", "task"])
def test_a_failure_of_one_rank_ends_all_with_one_message(model, tmp_path, undisturbed, kind, place):
    """What was saved before is intact: the run continues, to the same end."""
    first, second = together(2, failing, arguments(model, tmp_path, **SETTINGS), place, kind)
    assert first.status == second.status == 1 and second.err == ""
    *traceback, message = first.err.splitlines()
    reason = "No space left on device" if kind == "disk full" else "no such example"
    if place:
        assert message.startswith("error: rank 1: ") and reason in message and "continues" in message
    elif kind == "task":
        assert reason in traceback[-1] and message.startswith("error: the exception above ended the run.")
    else:
        assert "the disk is full" in message
    assert not traceback or (place == 0 and kind == "task")  # rank 1's goes to its own standard error
    saved = 2 if kind == "disk full" else checkpoint.steps(tmp_path / RUN)[-1]
    assert checkpoint.latest(tmp_path / RUN).name == f"step-{saved:06d}"
    resumed(2, tmp_path / RUN)
    assert_same(tmp_path / RUN, contents(undisturbed(2)))
