"""Checkpoints are complete or absent, damage is found, and a run directory belongs to one process."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo import checkpoint
from grpo.checkpoint import CheckpointError, RunLockedError

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
CRASH_POINTS = ["mkdir", "write_model", "save_file", "_write_state", "_flush", "rename"]


@pytest.mark.parametrize(
    "error", [Crash(), OSError(errno.EIO, "I/O error"), OSError(errno.ENOSPC, "No space left")]
)
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_crash_at_any_write_leaves_the_older_checkpoint(tmp_path, monkeypatch, point, error):
    old = save(tmp_path, 1)

    def fail(*args, **kwargs):
        raise error

    options = {"write_model": fail} if point == "write_model" else {}
    owner = {"mkdir": Path, "rename": os}.get(point, checkpoint)
    if point != "write_model":
        monkeypatch.setattr(owner, point, fail)
    with pytest.raises(Crash if isinstance(error, Crash) else CheckpointError) as caught:
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
    with checkpoint.lock(tmp_path):
        assert entries(tmp_path) == ["step-000001"]


def test_a_kill_while_replacing_or_pruning_never_shows_half_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        checkpoint.prune(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [2]
    checkpoint.remove_leftovers(tmp_path)
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
        with pytest.raises(CheckpointError, match="the disk is full"):
            save(disk, 2, tensors={"big": torch.ones(1_000_000)})
        with pytest.raises(CheckpointError, match="the disk is full"):
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


def test_run_directories_are_numbered_and_never_reused(tmp_path):
    names = [checkpoint.new_run_dir(tmp_path / "runs", "demo").name for _ in range(2)]
    assert names == ["demo-001", "demo-002"]
    (tmp_path / "runs" / "demo-007").mkdir()
    (tmp_path / "runs" / "demo-b-099").mkdir()
    assert checkpoint.new_run_dir(tmp_path / "runs", "demo").name == "demo-008"
    assert checkpoint.new_run_dir(tmp_path / "runs", "demo-b").name == "demo-b-100"
    for name in ("", "a/b", ".."):
        with pytest.raises(ValueError, match="run_name"):
            checkpoint.new_run_dir(tmp_path, name)


def test_run_directories_when_another_process_is_faster(tmp_path, monkeypatch):
    (tmp_path / "demo-001").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: iter(()))  # it was not there yet when we looked
        assert checkpoint.new_run_dir(tmp_path, "demo").name == "demo-002"


def test_run_directory_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="output_dir"):
        checkpoint.new_run_dir(tmp_path / "file", "demo")


def test_newest_run(tmp_path):
    assert checkpoint.newest_run(tmp_path / "missing") is None
    assert checkpoint.newest_run(tmp_path) is None
    first, second = (checkpoint.new_run_dir(tmp_path, name) for name in ("b", "a"))
    (tmp_path / "notes").mkdir()
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    assert checkpoint.newest_run(tmp_path) == second
    os.utime(first, (3, 3))
    assert checkpoint.newest_run(tmp_path) == first


def test_a_second_process_is_told_who_holds_the_lock(tmp_path):
    code = "import sys; from grpo import checkpoint\nwith checkpoint.lock(sys.argv[1]): print('locked')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parents[1]}
    with checkpoint.lock(tmp_path):
        second = subprocess.run(command, **options)
        assert second.returncode != 0 and f"in use by process {os.getpid()}" in second.stderr
        with pytest.raises(RunLockedError):
            with checkpoint.lock(tmp_path):
                pass
    assert subprocess.run(command, **options).stdout == "locked\n"


LINES = [
    '{"block": 9}',
    '{"step": 1, "loss": 0.5}',
    '{"step": 2}',
    '{"note": "x"}',
    '{"step": 3}',
    '{"step": 2, "x": 1}',
]
KEPT = '{"block": 9}\n{"step": 1, "loss": 0.5}\n{"step": 2}\n{"note": "x"}\n{"step": 2, "x": 1}\n'


@pytest.mark.parametrize(
    "torn, dropped", [("", 1), ('{"step": 2, "los', 2), ("\x00\x00", 2), ("\n", 2), ("7", 2)]
)
def test_truncate_jsonl(tmp_path, torn, dropped):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(LINES) + "\n" + torn)
    assert checkpoint.truncate_jsonl(path, 2) == dropped
    assert path.read_text() == KEPT
    assert checkpoint.truncate_jsonl(path, 2) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_jsonl_cut_anywhere_keeps_whole_lines(tmp_path):
    """Wherever a kill cut the file, what stays is a prefix of whole lines."""
    path, text = (
        tmp_path / "log.jsonl",
        "".join(json.dumps({"step": i, "value": "ä" * i}) + "\n" for i in range(6)),
    )
    rng = random.Random(0)
    for cut in rng.sample(range(len(text.encode())), 40):
        path.write_bytes(text.encode()[:cut])
        checkpoint.truncate_jsonl(path, 4)
        kept = path.read_text()
        assert text.startswith(kept) and kept.count("\n") == min(5, text.encode()[: cut + 1].count(b"\n"))


def test_truncate_jsonl_damaged_in_the_middle(tmp_path):
    path = tmp_path / "log.jsonl"
    text = '{"step": 1}\n{"st\n{"step": 2}\n'
    path.write_text(text)
    with pytest.raises(CheckpointError, match="line 2"):
        checkpoint.truncate_jsonl(path, 5)
    assert path.read_text() == text
    assert checkpoint.truncate_jsonl(tmp_path / "missing.jsonl", 1) == 0
