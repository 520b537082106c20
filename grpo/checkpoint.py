"""Run directories, atomic checkpoints and exact resume.

A checkpoint is a folder `RUN/checkpoints/step-000050/`: a Hugging Face folder (written by a callable that is
handed in) with `trainer/` inside it for what only this trainer needs:

    trainer/state.safetensors   float32 master weights and moments
    trainer/state.json          counters, versions of the environment, sha256 of all other files and of itself

It is written under another name, flushed to the disk and renamed: under its own name it is complete or
absent. Nothing is pickled. A run directory is used by one process at a time (`lock`), and its .jsonl logs are
cut back to the checkpoint on resume (`truncate_jsonl`), so that redone steps appear once.

Left out: sharded or asynchronous saving, remote file systems.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "trainer/state.json"
TENSORS = "trainer/state.safetensors"
STEP_NAME = re.compile(r"step-(\d{6,})")
PARTIAL = ".tmp-"  # in the name of everything half-written or half-deleted


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or is damaged; the message names the file and what to use instead."""


class RunLockedError(RuntimeError):
    """Another process works in this run directory."""


# --- checkpoints


def save(
    run_dir: str | Path,
    step: int,
    *,
    write_model: Callable[[Path], object],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 0,
    best_step: int | None = None,
) -> Path:
    """Writes `checkpoints/step-NNNNNN` atomically, then prunes the older ones.

    Args:
        write_model: called with the folder, writes the Hugging Face files into it.
        tensors: any dtypes and devices; the live tensors are only read.
        state: JSON-able; comes back from `load` unchanged.
        keep: number of checkpoints that stay, 0 for all; `best_step` stays in any case.
    Raises:
        CheckpointError: the disk is full or not writable. Nothing half-written stays, older checkpoints do.
    """
    final = _folder(run_dir, step)
    partial = final.with_name(f"{final.name}{PARTIAL}{os.getpid()}")
    try:
        (partial / "trainer").mkdir(parents=True)
        write_model(partial)
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial / TENSORS)
        _write_state(partial, step, state)
        _flush(partial)
        if final.exists():  # a damaged one, or a step done again
            _remove(final)
        os.rename(partial, final)
        _flush_directory(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            needed = sum(t.numel() * t.element_size() for t in tensors.values())
            raise CheckpointError(_write_failure(final, error, needed)) from error
        raise
    prune(run_dir, keep, best_step)
    return final


def load(path: str | Path, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, state) of one checkpoint folder. CheckpointError: a file is missing or damaged."""
    path = Path(path)
    state = verify(path) if check else _read_state(path)
    return load_file(path / TENSORS), state["state"]


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint, None when there is none.

    Raises:
        CheckpointError: the newest is damaged. Going back silently would throw away steps, so the message
            names the file and the newest older checkpoint that is intact, and the user decides.
    """
    folders = [_folder(run_dir, step) for step in reversed(steps(run_dir))]
    if not folders:
        return None
    try:
        verify(folders[0])
    except CheckpointError as error:
        intact = next((folder for folder in folders[1:] if _is_intact(folder)), None)
        advice = f"delete {folders[0]} to resume from {intact}" if intact else "no older checkpoint is intact"
        raise CheckpointError(f"{error}; {advice}") from error
    return folders[0]


def verify(path: str | Path) -> dict[str, Any]:
    """Compares every file of a checkpoint with its sha256; returns the content of trainer/state.json."""
    path = Path(path)
    payload = _read_state(path)
    for name, digest in payload["sha256"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
        if _sha256(path / name) != digest:
            raise CheckpointError(f"{path / name} is damaged: its sha256 differs from the one in {STATE}")
    return payload


def steps(run_dir: str | Path) -> list[int]:
    """Steps of the checkpoints of a run, ascending."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    matches = (STEP_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def prune(run_dir: str | Path, keep: int, best_step: int | None = None) -> list[Path]:
    """Deletes all but the newest `keep` checkpoints (0: deletes none) and `best_step`; returns them."""
    if keep < 0:
        raise ValueError(f"save_total_limit must be at least 0 (0 keeps all), got {keep}")
    surplus = steps(run_dir)[:-keep] if keep else []
    deleted = [_folder(run_dir, step) for step in surplus if step != best_step]
    for folder in deleted:
        _remove(folder)
    return deleted


def remove_leftovers(run_dir: str | Path) -> None:
    """Deletes what an interrupted save, prune or truncation left behind; only for the holder of the lock."""
    for folder in (Path(run_dir), Path(run_dir) / "checkpoints"):
        for entry in folder.glob(f"*{PARTIAL}*"):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def environment() -> dict[str, str]:
    """What exact resume depends on: versions, machine, thread count."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        **versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
    }


def environment_differences(path: str | Path) -> list[str]:
    """What is not as it was when the checkpoint was written, so that resume is inexact: a phrase for each."""
    then, now = _read_state(Path(path))["environment"], environment()
    keys = sorted(then.keys() | now.keys())
    return [
        f"{key} was {then.get(key, 'not recorded')}, is {now.get(key, 'not recorded')}"
        for key in keys
        if then.get(key) != now.get(key)
    ]


# --- run directories


def new_run_dir(output_dir: str | Path, name: str) -> Path:
    """Makes `output_dir/NAME-001`, or the next free number: a run never overwrites another.

    Raises:
        ValueError: `name` is empty or holds a path separator.
        CheckpointError: the directory cannot be made (permission, disk).
    """
    if not name or Path(name).name != name or name in (".", ".."):
        raise ValueError(f"run_name must be a plain directory name, got {name!r}")
    parent = Path(output_dir)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        pattern = re.compile(re.escape(name) + r"-(\d{3,})")
        numbers = [int(m[1]) for m in (pattern.fullmatch(entry.name) for entry in parent.iterdir()) if m]
        number = max(numbers, default=0)
        while True:
            number += 1
            run_dir = parent / f"{name}-{number:03d}"
            with contextlib.suppress(FileExistsError):  # another process was faster: take the next
                run_dir.mkdir()
                return run_dir
    except OSError as error:
        raise CheckpointError(
            f"cannot make a run directory in {parent.absolute()}: {error.strerror}; choose another output_dir"
        ) from error


def newest_run(output_dir: str | Path) -> Path | None:
    """The run directory that was used last, None when there is none."""
    parent = Path(output_dir)
    entries = parent.iterdir() if parent.is_dir() else ()
    runs = [entry for entry in entries if entry.is_dir() and re.fullmatch(r".+-\d{3,}", entry.name)]
    return max(runs, key=lambda run: (run.stat().st_mtime_ns, run.name), default=None)


@contextlib.contextmanager
def lock(run_dir: str | Path) -> Iterator[None]:
    """Holds the run directory for this process and removes leftovers; the lock ends with the process.

    Raises:
        RunLockedError: another process holds it; the message gives its id.
    """
    path = Path(run_dir) / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "(unknown)"
            message = f"{run_dir} is in use by process {holder}; wait for it or stop it"
            raise RunLockedError(message) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        remove_leftovers(run_dir)
        # Closing the file frees the lock; were it deleted, two processes could lock two files of its name.
        yield


def truncate_jsonl(path: str | Path, step: int) -> int:
    """Cuts a log back to a checkpoint, atomically: drops lines of later steps and a torn last line.

    Lines without a step (blocks, warnings before the first step) stay.

    Returns:
        The number of dropped lines; 0 also when the file does not exist.
    Raises:
        CheckpointError: a line before the last is not JSON; the message gives its number.
    """
    path = Path(path)
    if not path.exists():
        return 0
    partial = path.with_name(f"{path.name}{PARTIAL}{os.getpid()}")
    dropped = 0
    with open(path, "rb") as source, open(partial, "wb") as target:
        torn: int | None = None
        for number, line in enumerate(source, start=1):
            if torn is not None:
                partial.unlink()
                raise CheckpointError(f"{path}, line {torn} is no JSON object, and it is not the last line")
            try:
                record = json.loads(line)
                kept = "block" in record or record.get("step", step) <= step
            except (ValueError, AttributeError, TypeError):
                torn, kept = number, False
            if kept:
                target.write(line.rstrip(b"\n") + b"\n")
            else:
                dropped += 1
        target.flush()
        os.fsync(target.fileno())
    os.replace(partial, path)
    _flush_directory(path.parent)
    return dropped


# --- helpers


def _folder(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:06d}"


def _write_state(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    payload = {
        "step": step,
        "state": dict(state),
        "environment": environment(),
        "sha256": {name: _sha256(folder / name) for name in files},
    }
    payload["digest"] = _digest(payload)
    (folder / STATE).write_text(json.dumps(payload, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        intact = payload.pop("digest") == _digest(payload)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content differs from its digest")
    return payload


def _digest(payload: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _is_intact(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def _flush(folder: Path) -> None:
    """Every file and directory below `folder` onto the disk."""
    for directory, _, files in os.walk(folder):
        for name in files:
            with open(Path(directory) / name, "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(directory))


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Renames before deleting: an interruption must not leave half a checkpoint under its own name."""
    doomed = folder.with_name(f"{folder.name}{PARTIAL}removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_failure(final: Path, error: Exception, needed: int) -> str:
    # safetensors reports a full disk in its own exception, with the system's error number in the text.
    full = getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
    if not full:
        return f"cannot write {final}: {error}"
    free = shutil.disk_usage(next(folder for folder in final.parents if folder.exists())).free
    return (
        f"the disk is full: {final} takes {needed / 1e9:.2f} GB and the model's files, "
        f"{free / 1e9:.2f} GB are free. Older checkpoints are intact; make room or lower save_total_limit"
    )


def _processor() -> str:
    """The CPU's model: kernels, and with them rounding, are chosen by it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or "unknown"
