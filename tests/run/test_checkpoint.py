"""Checkpoints are complete or absent, also from a thread; damage is found, the newest and the best stay."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from grpo.model import shards
from grpo.run import checkpoint, files
from grpo.run.checkpoint import CheckpointError, Saver
from grpo.run.files import RunDirError

TENSORS = "trainer/state.safetensors"
STATE = {"learner": {"num_steps": 3}, "learning_rate": 0.1 + 0.2, "rng": [1, 2**60]}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "master.w": torch.randn(7, 5, generator=generator),
        "exp_avg.w": torch.randn(3, generator=generator).bfloat16(),
    }


def write_model(folder: Path, writer: shards.ShardWriter) -> None:
    (folder / "config.json").write_text("{}")
    writer.write({"w": torch.arange(9.0)}, folder, "model")


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


def test_a_large_state_is_in_shards_and_every_file_has_its_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    path = save(tmp_path, 1, tensors={name: torch.full((30,), float(n)) for n, name in enumerate("cab")})
    names = {file.relative_to(path).as_posix() for file in path.rglob("*.*")}
    states = {f"trainer/state-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    assert names == {"config.json", "model.safetensors", checkpoint.STATE, *states}
    sums = json.loads((path / checkpoint.STATE).read_text())["sha256"]
    assert sums == {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names - {checkpoint.STATE}
    }
    loaded, _ = checkpoint.load(path)
    assert {name: tensor[0].item() for name, tensor in loaded.items()} == {"c": 0, "a": 1, "b": 2}
    (path / min(states)).unlink()
    with pytest.raises(CheckpointError, match="state-00001-of-00003.safetensors is missing"):
        checkpoint.latest(tmp_path)


def test_a_checkpoint_of_an_earlier_version_has_one_file_of_any_size(tmp_path, monkeypatch):
    """As versions 0.1 and 0.2 wrote it, with the library's save_file."""
    path = save(tmp_path, 1)
    before = (path / TENSORS).read_bytes()
    save_file(tensors(), path / TENSORS)
    assert (path / TENSORS).read_bytes() == before
    monkeypatch.setattr(shards, "SHARD_BYTES", 10)
    assert checkpoint.load(path)[0].keys() == tensors().keys()


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
CRASH_POINTS = ["mkdir", "write_model", "ShardWriter.write", "_write_state", "flush", "rename"]


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
    if point == "ShardWriter.write":
        monkeypatch.setattr(shards.ShardWriter, "write", fail)
    elif point != "write_model":
        monkeypatch.setattr(owner, point, fail)
    with pytest.raises(Crash if isinstance(error, Crash) else RunDirError) as caught:
        save(tmp_path, 2, **options)
    monkeypatch.undo()
    if getattr(error, "errno", None) == errno.ENOSPC:
        assert "the disk is full" in str(caught.value) and "GB are free" in str(caught.value)
    assert entries(tmp_path) == ["step-000001"]
    assert checkpoint.latest(tmp_path) == old
    assert save(tmp_path, 2) == checkpoint.latest(tmp_path)


@pytest.mark.parametrize("clean_up", [True, False])
def test_a_crash_before_any_block_leaves_the_older_checkpoint(tmp_path, monkeypatch, clean_up):
    """In the middle of a shard and between two; without clean-up as by SIGKILL."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)
    monkeypatch.setattr(shards, "SHARD_BYTES", 200)
    many = {f"w{index}": torch.ones(30) for index in range(4)}
    old, blocks = save(tmp_path, 1), []
    save(tmp_path / "elsewhere", 2, tensors=many, check=lambda: blocks.append(None))
    assert len(blocks) == 10  # a block of the model, two of each tensor, and the end
    for number in range(1, 11):
        blocks.clear()

        def crash(number=number):
            blocks.append(None)
            if len(blocks) == number:
                raise Crash

        with monkeypatch.context() as patch, pytest.raises(Crash):
            if not clean_up:
                patch.setattr(files, "delete", lambda path: None)
            save(tmp_path, 2, tensors=many, check=crash)
        assert checkpoint.latest(tmp_path) == old
        assert (entries(tmp_path) == ["step-000001"]) == clean_up
        files.remove_leftovers(tmp_path)
    assert save(tmp_path, 2, tensors=many) == checkpoint.latest(tmp_path)


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
            save(disk, 2, write_model=lambda folder, _: (folder / "model").write_bytes(bytes(2_000_000)))
        assert entries(disk) == ["step-000001"] and checkpoint.latest(disk) == old
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", TENSORS, checkpoint.STATE])
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


# --- in a thread --------------------------------------------------------------------------------------------


class Gate:
    """A `write_model` that waits until it may continue."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, folder, writer):
        self.reached.set()
        assert self.open.wait(60)
        write_model(folder, writer)


def begin(saver: Saver, run_dir: Path, step: int, **options) -> None:
    saver.save(run_dir, step, **{"write_model": write_model, "tensors": tensors(), "state": STATE, **options})


def test_a_saver_returns_while_the_checkpoint_is_written(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # not what a new thread would take by itself
    try:
        with Saver() as saver:
            saver.wait()  # for nothing
            begin(saver, tmp_path, 1, write_model=(gate := Gate()))
            assert gate.reached.wait(60) and checkpoint.steps(tmp_path) == []
            gate.open.set()
            saver.wait()
            assert checkpoint.latest(tmp_path) == checkpoint.path_of(tmp_path, 1)
            assert checkpoint.environment_differences(checkpoint.path_of(tmp_path, 1)) == []
            begin(saver, tmp_path, 2)
            begin(saver, tmp_path, 3, keep=1)  # waits for 2
        assert checkpoint.steps(tmp_path) == [3]  # leaving `with` waits for 3
        save(tmp_path / "by itself", 3)
        files_of = [
            {f.name: f.read_bytes() for f in (folder / "checkpoints").rglob("*.safetensors")}
            for folder in (tmp_path, tmp_path / "by itself")
        ]
        assert files_of[0] == files_of[1] and len(files_of[0]) == 2
    finally:
        torch.set_num_threads(threads)


def test_an_error_of_the_thread_is_raised_once_by_the_next_wait(tmp_path):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left")

    with Saver() as saver:
        begin(saver, tmp_path, 1)
        begin(saver, tmp_path, 2, write_model=fail)
        with pytest.raises(RunDirError, match="the disk is full: .* GB are free, and .*step-000002 needs"):
            begin(saver, tmp_path, 3)
        saver.wait()
        assert entries(tmp_path) == ["step-000001"]
        begin(saver, tmp_path, 4)
    assert checkpoint.steps(tmp_path) == [1, 4]


def test_an_exception_that_leaves_the_block_stops_the_saving(tmp_path):
    save(tmp_path, 1)
    reached = threading.Event()

    def until_stopped(folder, writer):
        reached.set()
        while not saver._stopped:
            time.sleep(0.001)
        write_model(folder, writer)

    with pytest.raises(KeyboardInterrupt), Saver() as saver:
        begin(saver, tmp_path, 2, write_model=until_stopped)
        assert reached.wait(60)
        raise KeyboardInterrupt
    assert entries(tmp_path) == ["step-000001"]


def test_on_a_gpu_one_stream_copies_after_the_update(tmp_path, monkeypatch):
    """Emulated: which stream waits for which, on which one the thread copies, and in which order."""
    log, streams = [], []

    class Stream:
        def __init__(self, device):
            streams.append(self)
            log.append(f"new on {device}")

        def wait_stream(self, other):
            log.append(f"wait for {other}")

    def use(stream):
        log.append("none" if stream is None else f"use {streams.index(stream)}")
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(checkpoint, "save", lambda *args, **options: log.append("save"))
    there = {"w": SimpleNamespace(is_cuda=True, device="cuda:1")}
    with Saver() as saver:
        for step in (1, 2):
            begin(saver, tmp_path, step, tensors=there)
            saver.wait()
    each = ["wait for the stream of cuda:1", "use 0", "save"]
    assert log == ["new on cuda:1", *each, *each]


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


def test_a_seal_has_what_another_machine_wrote_and_the_listing_lacks_yet(tmp_path):
    (tmp_path / "here.txt").write_text("here")
    checkpoint.seal(tmp_path, {tmp_path / "there.safetensors": "ab12"})
    sums = json.loads((tmp_path / checkpoint.SEAL).read_text())
    assert list(sums) == ["here.txt", "there.safetensors"] and sums["there.safetensors"] == "ab12"
