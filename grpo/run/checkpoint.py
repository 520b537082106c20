"""Atomic checkpoints, from which a run continues: bit for bit where sums have a fixed order, as on a CPU.

A checkpoint is a folder `RUN/checkpoints/step-000050/`: a Hugging Face folder (written by the caller's
function), and in it `trainer/` with what only this trainer needs:

    trainer/state.safetensors   float32 master weights and moments; above 5 GB in shards
                                (state-00001-of-00004.safetensors and so on). With several ranks, each
                                writes its share: rank-0000.safetensors and so on
    trainer/state.json          counters, versions of the environment, sha256 of all other files and of itself

A finished run keeps `trainer/` in its newest checkpoint only (`drop_optimizer`).

A folder of that name is always complete (files.py). A thread writes it (`Saver`), with one block of a tensor
in host memory at a time, and hashes what it writes (grpo/model/shards.py). Nothing is pickled.

Each rank's share of a tensor is a stretch of its elements, and the shares follow each other in the order of
the ranks. So a run continues with any number of ranks.

Left out: writing several shards of one rank at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo import distributed
from grpo.model.shards import ShardWriter
from grpo.run.files import MismatchError, RunDirError, flush, read_json, remove, written_whole

STATE = "trainer/state.json"
TENSORS = re.compile(r"trainer/(state|rank-\d{4,})(-\d{5}-of-\d{5})?\.safetensors")
SEAL = "sha256.json"
# Shape of STATE (files.misfit)
PAYLOAD = {
    "step": int,
    "state": dict,
    "environment": {str: str},
    "sha256": {str: str},
    "digest": str,
}
# Keys of `environment` in which the machines of several ranks may differ.
OF_MACHINE = ("machine", "processor", "cpu_capability", "accelerator", "threads")
STEP_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RunDirError):
    """A checkpoint is damaged; the message names the file and what to use instead."""


def save(
    run_dir: str | Path,
    step: int,
    *,
    write_model: Callable[[Path, ShardWriter], object],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 0,
    best_step: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `checkpoints/step-NNNNNN` atomically, then prunes the older ones.

    All ranks write their tensors at once. Rank 0 writes all else, and gives the folder its name.

    Args:
        write_model: writes the Hugging Face files into the folder, and the tensors with the writer.
        tensors: floats, on any devices; the live tensors are only read.
        state: can be written as JSON; `load` returns it unchanged.
        keep: number of checkpoints to keep, 0 for all; `best_step` is always kept.
        check: called before each block of tensors and at the end; an exception in it ends the saving.
    Raises:
        RunDirError: the disk is full or not writable. The new checkpoint is removed, older ones are kept.
    """
    writer, final = ShardWriter(check), path_of(run_dir, step)
    group = distributed.side_group()  # this may be a thread
    with contextlib.ExitStack() as stack:
        partial = Path(distributed.on_main(lambda: str(stack.enter_context(written_whole(final))), group))
        with distributed.agreement(group):
            (partial / "trainer").mkdir(parents=True, exist_ok=True)
            if distributed.is_main():
                write_model(partial, writer)
            name = f"rank-{distributed.rank():04d}" if distributed.size() > 1 else "state"
            writer.write(tensors, partial / "trainer", name)
            for path in writer.sums:  # rank 0 cannot flush what another machine still has to write
                flush(path)
        sums = {str(path): digest for path, digest in writer.sums.items()}
        gathered = chain.from_iterable(part.items() for part in distributed.gather(sums, group))
        with distributed.agreement(group):
            if distributed.is_main():
                _write_state(partial, step, state, {Path(path): digest for path, digest in gathered})
                check()
                stack.close()  # the folder is complete, and gets its name
    if distributed.is_main():
        prune(run_dir, keep, best_step)
    return final


class Saver:
    """Saves checkpoints in a thread, one at a time, while the next step samples.

    The thread reads the live tensors, so no copy of them is needed. Whatever changes them must come after
    `wait`: an update, or the loading of other weights. An exception that leaves the `with` block stops a
    save that is still running, which then leaves no checkpoint.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None
        self._stopped = False
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._stopped = True
            self._thread.shutdown()

    def save(self, run_dir: Path, step: int, *, tensors: Mapping[str, Tensor], **options: Any) -> None:
        """As the function `save`, but returns at once. `wait` raises its errors."""
        self.wait()
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        if device is not None:
            # Copies run next to the kernels of the rollout, after those of the update. All saves share one
            # stream: torch has 32 and then starts again, perhaps with the one that records CUDA graphs.
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._running = self._thread.submit(self._save, run_dir, step, tensors=tensors, **options)

    def wait(self) -> None:
        """Returns once the checkpoint is on the disk, at once if there is none to wait for.

        Raises:
            RunDirError: the disk is full or not writable. The new checkpoint is removed, older ones are kept.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _save(self, run_dir: Path, step: int, **options: Any) -> Path:
        with torch.cuda.stream(self._stream):  # of this thread; None changes nothing
            return save(run_dir, step, check=self._check, **options)

    def _check(self) -> None:
        if self._stopped:
            raise _Stopped


class _Stopped(Exception):
    """The run ends at once and does not wait for its checkpoint."""


Pieces = Callable[[str], tuple[int, int] | None]


def load(
    path: str | Path, *, check: bool = True, pieces: Pieces = lambda name: None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, state) of one checkpoint folder. CheckpointError: a file is missing or damaged.

    Args:
        pieces: which elements of the named tensor, flattened, this rank wants: first, end; they come
            flattened. None: all.
    """
    path = Path(path)
    payload = verify(path) if check else _read_state(path)
    files = [path / name for name in filter(TENSORS.fullmatch, sorted(payload["sha256"]))]
    tensors: dict[str, list[Tensor]] = {}
    begins: Counter[str] = Counter()  # of a tensor's share in the next file that has one
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118  # not a dict
                    share, begin = stored.get_slice(name), begins[name]
                    begins[name] = end = begin + math.prod(share.get_shape())
                    if (piece := pieces(name)) is None:
                        part = stored.get_tensor(name)
                    else:
                        part = _stretch(share, max(piece[0], begin) - begin, min(piece[1], end) - begin)
                    tensors.setdefault(name, []).append(part)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    whole = {
        name: parts[0] if len(parts) == 1 else torch.cat([part.view(-1) for part in parts])
        for name, parts in tensors.items()
    }
    return whole, payload["state"]


def _stretch(share: Any, first: int, end: int) -> Tensor:
    """Elements first, ..., end - 1 of a flattened safetensors slice; reads the rows that have them."""
    rows, *rest = share.get_shape()
    row = math.prod(rest)
    begin = first // row
    read = share[begin : max(begin, min(rows, -(-end // row)))].reshape(-1)
    return read[first - begin * row : max(first, end) - begin * row]


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint; None if there is none.

    Raises:
        CheckpointError: the newest is damaged. To use an older one silently would throw away steps. So the
            message names the file and the newest older checkpoint that is intact, and the user decides.
    """
    folders = [path_of(run_dir, step) for step in reversed(steps(run_dir))]
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
    _compare(path, payload["sha256"], STATE)
    return payload


def verify_weights(path: Path) -> None:
    """As `verify`, also for a checkpoint of a finished run, which may have no `trainer/`."""
    if (path / "trainer").is_dir() or not (path / SEAL).exists():
        verify(path)
    else:
        check_seal(path)


def drop_optimizer(run_dir: str | Path) -> None:
    """Deletes `trainer/` of all checkpoints but the newest: no run will continue from them.

    Most of a checkpoint's size is there. A seal takes the place of its sums.
    """
    for step in steps(run_dir)[:-1]:
        if (trainer := (path := path_of(run_dir, step)) / "trainer").is_dir():
            sums = {
                name: sha for name, sha in verify(path)["sha256"].items() if not name.startswith("trainer/")
            }
            with written_whole(path / SEAL) as partial:
                partial.write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
            remove(trainer)


def seal(folder: Path, known: Mapping[Path, str]) -> None:
    """Writes sha256.json, the sums of all files, into a folder of weights that is not a checkpoint.

    Args:
        known: sums that need not be computed again.
    """
    (folder / SEAL).write_text(json.dumps(_sums(folder, known), indent=1) + "\n", encoding="utf-8")


def check_seal(folder: Path) -> None:
    """Compares a folder with its seal. Raises CheckpointError if a file or the seal is damaged.

    A folder without a seal passes, because users may put weights there themselves.
    """
    if not (folder / SEAL).exists():
        return
    try:
        sums = read_json(folder / SEAL, {str: str})
    except (MismatchError, OSError) as error:
        raise CheckpointError(f"{folder / SEAL} is damaged: {error}") from error
    _compare(folder, sums, SEAL)


def steps(run_dir: str | Path) -> list[int]:
    """Steps of the checkpoints of a run, ascending."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    matches = (STEP_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def path_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step-"))


def prune(run_dir: str | Path, keep: int, best_step: int | None = None) -> list[Path]:
    """Deletes all but the newest `keep` checkpoints (0: deletes none) and `best_step`; returns them."""
    if keep < 0:
        raise ValueError(f"save_total_limit must be at least 0 (0 keeps all), got {keep}")
    surplus = steps(run_dir)[:-keep] if keep else []
    deleted = [path_of(run_dir, step) for step in surplus if step != best_step]
    for folder in deleted:
        remove(folder)
    return deleted


def environment() -> dict[str, str]:
    """What exact resume depends on: versions, machine, thread count."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    ranks = {"ranks": str(distributed.size())} if distributed.size() > 1 else {}
    return {
        **versions,
        **ranks,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
    }


def environment_differences(path: str | Path) -> list[str]:
    """How this environment differs from the checkpoint's: a phrase for each cause of an inexact resume."""
    then, now = _read_state(Path(path))["environment"], environment()
    absent = {"ranks": "1"}  # with one rank, no number is recorded
    pairs = {
        key: [its.get(key, absent.get(key, "not recorded")) for its in (then, now)]
        for key in sorted(then.keys() | now.keys())
    }
    return [f"{key} was {before}, is {after}" for key, (before, after) in pairs.items() if before != after]


# --- helpers ---------------------------------------------------------------------------------------------


def _write_state(folder: Path, step: int, state: Mapping[str, Any], known: Mapping[Path, str]) -> None:
    payload = {
        "step": step,
        "state": dict(state),
        "environment": environment(),
        "sha256": _sums(folder, known),
    }
    payload["digest"] = _digest(payload)
    (folder / STATE).write_text(json.dumps(payload, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        payload = read_json(path, PAYLOAD)
        intact = payload.pop("digest") == _digest(payload)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (MismatchError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content differs from its digest")
    parts = ("state", "environment", "sha256")
    if missing := [name for name in parts if not isinstance(payload.get(name), dict)]:
        raise CheckpointError(f"{path} must hold the objects {', '.join(parts)}; it lacks {missing[0]}")
    return payload


def _digest(payload: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def _sums(folder: Path, known: Mapping[Path, str]) -> dict[str, str]:
    """sha256 of each file by name; those in `known` are not read."""
    # A listing may lack for a while what another machine has written to a shared disk.
    files = {f for f in folder.rglob("*") if f.is_file()} | known.keys()
    names = sorted(f.relative_to(folder).as_posix() for f in files)
    return {name: known.get(folder / name) or _sha256(folder / name) for name in names}


def _compare(folder: Path, sums: Mapping[str, str], stored_in: str) -> None:
    for name, digest in sums.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder / stored_in} must name files in its folder, got {name!r}")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file} is damaged: its sha256 differs from the one in {stored_in}")


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


def processor_model() -> str:
    """The CPU's model name. Libraries choose kernels by the model, and rounding depends on the kernel."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or "unknown"
