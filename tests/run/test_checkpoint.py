"""Checkpoints are complete or absent, damage is found, the newest and the best stay."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from grpo.run import checkpoint, files
from grpo.run.checkpoint import CheckpointError
from grpo.run.files import RunDirError

STATE = {"learner": {"num_steps": 3}, "learning_rate": 0.1 + 0.2, "rng": [1, 2**60]}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "master.w": torch.randn(7, 5, generator=generator),
        "exp_avg.w": torch.randn(3, generator=generator).bfloat16(),
    }


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def save(run_dir: Path, step: int, **options) -> Path:
    options = {"write_model": write_model, "tensors": tensors(), "state": STATE, **options}
    return checkpoint.save(run_dir, step, **options)


def entries(run_dir: Path) -> list[str]:
    return sorted(entry.name for entry in (run_dir / "checkpoints").iterdir())


def test_round_trip_is_exact(tmp_path):
    path = save(tmp_path, 50)
    assert path == tmp_path / "checkpoints" / "step-000050" == checkpoint.latest(tmp_path)
    loaded, state = checkpoint.load(path)
    assert state == STATE
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    # vLLM loads every *.safetensors beside config.json, so the trainer's must not lie there.
    assert [f.name for f in path.glob("*.safetensors")] == ["model.safetensors"]
    assert checkpoint.environment_differences(path) == []


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 1, state={"second": True})
    assert checkpoint.load(path)[1] == {"second": True}
    assert entries(tmp_path) == ["step-000001"]


def test_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.steps(tmp_path) == []


class Crash(BaseException):
    """Stands for a kill: no handler of the program may swallow it."""


# Every place where save() touches the disk, in order; each must leave the old checkpoint as the latest.
CRASH_POINTS = ["mkdir", "write_model", "save_file", "_write_state", "flush", "rename"]


@pytest.mark.parametrize(
    "error", [Crash(), OSError(errno.EIO, "I/O error"), OSError(errno.ENOSPC, "No space left")]
)
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_crash_at_any_write_leaves_the_older_checkpoint(tmp_path, monkeypatch, point, error):
    old = save(tmp_path, 1)

    def fail(*args, **kwargs):
        raise error

    options = {"write_model": fail} if point == "write_model" else {}
    owner = {"mkdir": Path, "rename": os, "flush": files}.get(point, checkpoint)
    if point != "write_model":
        monkeypatch.setattr(owner, point, fail)
    with pytest.raises(Crash if isinstance(error, Crash) else RunDirError) as caught:
        save(tmp_path, 2, **options)
    monkeypatch.undo()
    if getattr(error, "errno", None) == errno.ENOSPC:
        assert "the disk is full" in str(caught.value) and "GB are free" in str(caught.value)
    assert entries(tmp_path) == ["step-000001"]
    assert checkpoint.latest(tmp_path) == old
    assert save(tmp_path, 2) == checkpoint.latest(tmp_path)


def test_a_kill_without_clean_up_leaves_no_checkpoint_and_is_swept_up(tmp_path, monkeypatch):
    """As by SIGKILL: not even the clean-up of save() runs."""
    old = save(tmp_path, 1)

    def crash(*args):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Crash):
            save(tmp_path, 2)
    assert len(entries(tmp_path)) == 2
    assert checkpoint.latest(tmp_path) == old
    with files.lock(tmp_path):
        assert entries(tmp_path) == ["step-000001"]


def test_a_kill_while_replacing_or_pruning_never_shows_half_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        checkpoint.prune(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [2]
    files.remove_leftovers(tmp_path)
    assert entries(tmp_path) == ["step-000002"]


def test_a_really_full_disk(tmp_path):
    """A tmpfs of one MB, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        old = save(disk, 1)
        with pytest.raises(RunDirError, match="the disk is full"):
            save(disk, 2, tensors={"big": torch.ones(1_000_000)})
        with pytest.raises(RunDirError, match="the disk is full"):
            save(disk, 2, write_model=lambda folder: (folder / "model").write_bytes(bytes(2_000_000)))
        assert entries(disk) == ["step-000001"] and checkpoint.latest(disk) == old
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_the_older_checkpoint_named(tmp_path, name, damage):
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    if (name, damage) == (checkpoint.STATE, "truncate"):
        return  # the last byte is only the final newline
    with pytest.raises(CheckpointError) as caught:
        checkpoint.latest(tmp_path)
    assert name in str(caught.value) and str(older) in str(caught.value)
    with pytest.raises(CheckpointError):
        checkpoint.load(newest)
    checkpoint.load(older)


def test_damage_without_an_older_one(tmp_path):
    (save(tmp_path, 1) / "config.json").write_text("{ }")
    with pytest.raises(CheckpointError, match="no older checkpoint is intact"):
        checkpoint.latest(tmp_path)


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    assert checkpoint.prune(tmp_path, 0) == []
    checkpoint.prune(tmp_path, 2, best_step=5)
    assert checkpoint.steps(tmp_path) == [5, 15, 20]
    save(tmp_path, 25, keep=1, best_step=20)
    assert checkpoint.steps(tmp_path) == [20, 25]
    with pytest.raises(ValueError, match="save_total_limit must be at least 0"):
        checkpoint.prune(tmp_path, -1)


def test_environment_differences_are_named(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "environment", lambda: {"torch": "0.0", "new": "x"})
    differences = checkpoint.environment_differences(path)
    assert "torch was " in " ".join(differences) and "new was not recorded, is x" in differences


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "trainer/../../secret"])
def test_sums_name_no_file_outside_their_folder(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    (folder := tmp_path / "start").mkdir()
    (folder / checkpoint.SEAL).write_text(json.dumps({name: "0" * 64}))
    with pytest.raises(CheckpointError, match="must name files in its folder, got"):
        checkpoint.check_seal(folder)


@pytest.mark.parametrize("content", ["[[1, 2]]", "5", '{"a": 1}', "[" * 100_000])
def test_a_seal_of_another_form_is_damaged(tmp_path, content):
    (tmp_path / checkpoint.SEAL).write_text(content)
    with pytest.raises(CheckpointError, match="sha256.json is damaged"):
        checkpoint.check_seal(tmp_path)
