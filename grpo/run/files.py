"""Run directories: numbered, never reused, locked by one process at a time, without half-written files.

A file or folder that must be complete or absent is written under another name, flushed to the disk and
renamed (`written_whole`). Logs grow by appending. On resume they are cut back to their size at the last
checkpoint, so that steps which are redone appear once. A log whose name ends in `.gz` is compressed: each
append is a gzip member of its own, so the file is valid wherever it is cut between two appends.

With several ranks (grpo/distributed.py), only rank 0 writes and cuts logs: `append_jsonl`, `append_blocks`,
`keep_whole_blocks`, `cut_logs`, `cut_after_step` and `delete` change nothing on the others.

Left out: remote file systems, which may lack locks and atomic renames.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import re
import reprlib
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from grpo import distributed

PARTIAL = ".tmp-"  # in the name of everything half-written or half-deleted
LOCK = ".lock"
GZIP_MEMBER = b"\x1f\x8b\x08"  # how it begins
LOG_COMPRESSION = 4  # zlib's level: half the time of its default, 6, for 7% more bytes (docs/LOG.md)
DAMAGED_GZIP = (gzip.BadGzipFile, zlib.error)  # what reading damage raises


class RunDirError(RuntimeError):
    """A run directory, or a file in it, cannot be made, written or read."""


class RunLockedError(RunDirError):
    """Another process uses this run directory."""


class MismatchError(RunDirError, ValueError):
    """A stored file was made with other settings or inputs, or is damaged, so it cannot be continued."""


# --- JSON lines ------------------------------------------------------------------------------------------


def read_jsonl(
    path: str | Path, shape: Callable[[dict[str, Any]], Any] | None = None, *, missing_ok: bool = False
) -> Iterator[dict[str, Any]]:
    """The lines of a JSON lines file, compressed or not (`open_log`), in order and one at a time.

    Args:
        shape: gives the shape (`misfit`) that a line must have.
        missing_ok: yield nothing if the file does not exist.
    Raises:
        MismatchError: a line is no JSON object or has another shape; the message names file and line. Or a
            gzip file is damaged. If a kill left its last member unfinished, the whole lines of it are read.
    """
    if missing_ok and not Path(path).exists():
        return
    with open_log(path) as file:
        try:
            for number, content in enumerate(file, 1):
                line = _parsed(content, f"{path}, line {number}")
                if (fault := misfit(line, dict)) or (fault := misfit(line, shape(line) if shape else dict)):
                    raise MismatchError(f"{path}, line {number}: {fault}")
                yield line
        except EOFError:  # a kill left the last gzip member unfinished
            return
        except DAMAGED_GZIP as error:
            raise MismatchError(f"{path} is damaged: {error}") from error


def open_log(path: str | Path) -> BufferedIOBase:
    """Opens a log to read its text; a file whose name ends in `.gz` is decompressed.

    If a gzip file ends inside a member, reading raises EOFError after the last whole line. Damage raises one
    of DAMAGED_GZIP.
    """
    return gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb")


def read_json(path: Path, shape: Any) -> Any:
    """The content of a JSON file. MismatchError: it is not JSON, or has another shape (`misfit`)."""
    content = _parsed(path.read_bytes(), str(path))
    if fault := misfit(content, shape):
        raise MismatchError(f"{path}: {fault}")
    return content


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # also of numbers with too many digits
        raise MismatchError(f"{where}: not JSON ({error})") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def misfit(value: Any, shape: Any, name: str = "") -> str | None:
    """How a JSON value differs from a shape, in words; None if it fits.

    A shape is a type, `None`, `[shape]` for a list, `{key: shape}` for an object with at least these keys, or
    a tuple of shapes, one of which must fit. A key "?name" may be missing. The key `str` stands for all other
    keys. Numbers have 64 bits.
    """
    if isinstance(shape, tuple):
        faults = [misfit(value, other, name) for other in shape]
        return None if None in faults else faults[-1]
    kind = type(shape) if isinstance(shape, dict | list | None) else shape
    right = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    if kind is int:
        right = right and abs(value) < 2**63
    if kind is float:
        right = type(value) in (int, float) and abs(value) <= sys.float_info.max
    if not right:
        return f"{name.lstrip('.') or 'the content'} must be {_KINDS[kind]}, got {reprlib.repr(value)}"
    if isinstance(shape, list):
        pairs = [(f"{name}[{index}]", item, shape[0]) for index, item in enumerate(value)]
    elif isinstance(shape, dict):
        named = {key.lstrip("?"): part for key, part in shape.items() if key is not str}
        if missing := [key for key in named if key in shape and key not in value]:
            return f"{name.lstrip('.') or 'the content'} lacks {missing[0]!r}"
        pairs = [(f"{name}.{key}", value[key], part) for key, part in named.items() if key in value]
        others = [key for key in value if key not in named] if str in shape else []
        pairs += [(f"{name}.{key}", value[key], shape[str]) for key in others]
    else:
        return None
    return next(filter(None, (misfit(item, part, where) for where, item, part in pairs)), None)


_KINDS: dict[Any, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def append_jsonl(path: Path, *records: Mapping[str, Any], sync: bool = False) -> None:
    """Appends one line per record, in a single write; to a `.gz` file as one gzip member.

    Opens the file for each call, so that a kill loses no line of an earlier call. Equal records give equal
    bytes: a member contains neither a time nor a name.

    Args:
        sync: return when the lines are on the disk.
    Raises:
        ValueError: a record contains NaN or infinity, which JSON cannot represent.
    """
    if not distributed.is_main():
        return
    content = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        # 16: with gzip's header and checksum.
        compressor = zlib.compressobj(LOG_COMPRESSION, wbits=16 + zlib.MAX_WBITS)
        content = compressor.compress(content) + compressor.flush()
    with open(path, "ab") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


# --- JSON lines in whole blocks --------------------------------------------------------------------------
#
# Files that grow in whole blocks, so that long work continues after a kill where its last block ended.
#
# A block is any number of lines and then one *end line*, `{"block": number, ...}`. Blocks are appended in one
# write and synced. What follows the last end line was left by a kill; it is cut off and redone. Work inside a
# block is deterministic on a CPU, so an interrupted run gives the same file there as an uninterrupted one.


def keep_whole_blocks(path: Path) -> int:
    """Cuts the file after its last end line. Returns the number of blocks kept; 0 if there is no file."""
    blocks, end, position = 0, 0, 0
    if path.exists():
        with open(path, "rb") as file:
            for text in file:
                position += len(text)
                if text.startswith(b'{"block"') and text.endswith(b"\n"):
                    blocks, end = blocks + 1, position
    if end < position and distributed.is_main():
        with open(path, "r+b") as file:
            file.truncate(end)
    distributed.barrier()
    return blocks


def append_blocks(path: Path, blocks: Sequence[tuple[Sequence[dict[str, Any]], dict[str, Any]]]) -> None:
    """Appends blocks, (lines, end line) each. End lines have the key `block`, and no other line has it."""
    records = [record for lines, end in blocks for record in (*lines, {"block": end["block"], **end})]
    with distributed.agreement():  # afterwards, all ranks can read them
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(path, *records, sync=True)


def records(path: Path, shape: Any = dict) -> Iterator[dict[str, Any]]:
    """All lines but the end lines; each must have the shape (`misfit`)."""
    lines = read_jsonl(path, lambda line: dict if "block" in line else shape)
    return (line for line in lines if "block" not in line)


# --- directories -----------------------------------------------------------------------------------------


def new_run_dir(output_dir: str | Path, name: str) -> Path:
    """Makes `output_dir/NAME-001`, or the next free number: a run never overwrites another.

    Raises:
        ValueError: `name` is empty or contains a path separator.
        RunDirError: the directory cannot be made (permission, disk).
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
            with contextlib.suppress(FileExistsError):  # another process was faster
                run_dir.mkdir()
                return run_dir
    except OSError as error:
        raise RunDirError(
            f"cannot make a run directory in {parent.absolute()}: {error.strerror}; choose another output_dir"
        ) from error


def remove_if_empty(run_dir: str | Path) -> None:
    """Removes a run directory that contains nothing but, possibly, its lock."""
    with contextlib.suppress(OSError):
        if os.listdir(run_dir) == [LOCK]:
            os.unlink(Path(run_dir) / LOCK)
        os.rmdir(run_dir)


@contextlib.contextmanager
def lock(run_dir: str | Path) -> Iterator[None]:
    """Locks the run directory for this process and removes leftovers. The lock ends with the process.

    Raises:
        RunLockedError: another process has the lock; the message gives its id.
    """
    with open(Path(run_dir) / LOCK, "a+") as file:
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
        # Closing the file frees the lock. If it were deleted, two processes could lock two files of its name.
        yield


def remove_leftovers(run_dir: str | Path) -> None:
    """Deletes what an interrupted write or removal left behind. Requires the lock."""
    for entry in sorted(Path(run_dir).rglob(f"*{PARTIAL}*")):
        delete(entry)


# --- whole files and folders -----------------------------------------------------------------------------


@contextlib.contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """A path to write a file or a folder to. It becomes `final` when it is on the disk; an error removes it.

    Raises:
        RunDirError: the disk is full or not writable. The old `final` is still there.
    """
    partial = final.with_name(f"{final.name}{PARTIAL}{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        if final.is_dir():  # a rename replaces a file, not a folder
            remove(final)
        os.rename(partial, final)
        flush_directory(final.parent)
    except BaseException as error:
        written = sum(path.stat().st_size for path in partial.rglob("*")) if partial.is_dir() else 0
        delete(partial)
        if isinstance(error, OSError) or _is_full(error):
            raise RunDirError(_write_failure(final, error, written)) from error
        raise


def remove(folder: Path) -> None:
    """Deletes a folder. Renames it first, so that an interruption leaves no half folder under its name."""
    doomed = folder.with_name(f"{folder.name}{PARTIAL}removed")
    delete(doomed)
    os.rename(folder, doomed)
    delete(doomed)


def delete(path: Path) -> None:
    """Deletes a file or a folder, if it exists."""
    if not distributed.is_main():
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flushes a file, or all files and directories of a folder, to the disk."""
    for directory, _, names in os.walk(path):
        for name in names:
            flush(Path(directory) / name)
        flush_directory(Path(directory))
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_full(error: BaseException) -> bool:
    """Rust libraries have the system's error number in the text; that of tokenizers is an Exception."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {n})" in str(error) for n in numbers)


def _write_failure(final: Path, error: BaseException, written: int) -> str:
    if not _is_full(error):
        return f"cannot write {final}: {error}"
    return _disk_full(final, f"more than the {written / 1e9:.3g} GB already written")


def require_space(final: Path, needed: int) -> None:
    """Raises RunDirError if fewer than the `needed` bytes are free for `final`."""
    if free_bytes(final) < needed:
        raise RunDirError(_disk_full(final, f"{needed / 1e9:.3g} GB"))


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a path that need not exist yet."""
    there = next(filter(Path.exists, (path, *path.absolute().parents)))
    return shutil.disk_usage(there).free


def _disk_full(final: Path, needs: str) -> str:
    free = f"{free_bytes(final) / 1e9:.3g} GB are free"
    return (
        f"the disk is full: {free}, and {final} needs {needs}. What was saved before is intact; make room, "
        "or delete an older checkpoint and lower save_total_limit, and resume"
    )


# --- logs ------------------------------------------------------------------------------------------------


def log_sizes(run_dir: Path, names: Sequence[str]) -> dict[str, int]:
    """Flushes the logs and returns the bytes of each: for a checkpoint, and later for `cut_logs`."""
    paths = [run_dir / name for name in names if (run_dir / name).exists()]
    for path in paths:
        flush(path)
    return {path.name: path.stat().st_size for path in paths}


def cut_logs(run_dir: Path, sizes: Mapping[str, int]) -> None:
    """Cuts logs back to their size at a checkpoint. A missing log starts empty.

    Raises:
        RunDirError: a log is shorter than it was, or a compressed one has other members.
    """
    if not distributed.is_main():
        return
    for name, size in sizes.items():
        path = run_dir / name
        present = path.stat().st_size if path.exists() else size
        changed = "it was changed since; delete it to continue without its first part"
        if present < size:
            raise RunDirError(
                f"{path} must have at least the {size} bytes that it had at the checkpoint, got {present}: "
                f"{changed}"
            )
        if present > size:
            if path.suffix == ".gz" and not _member_begins(path, size):
                raise RunDirError(f"{path} must have a gzip member that begins at byte {size}: {changed}")
            os.truncate(path, size)


def cut_after_step(path: Path, step: int) -> None:
    """Cuts a log that no checkpoint knows, such as one that the user unpacked, after the lines of `step`.

    Raises:
        MismatchError: a line has no step.
    """
    if not distributed.is_main():
        return
    kept = 0
    with open(path, "rb") as file:
        for number, content in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not content.endswith(b"\n"):
                break  # left by a kill
            line = _parsed(content, where)
            if fault := misfit(line, {"step": int}):
                raise MismatchError(f"{where}: {fault}")
            if line["step"] > step:
                break
            kept += len(content)
    os.truncate(path, kept)


def _member_begins(path: Path, offset: int) -> bool:
    with open(path, "rb") as file:
        file.seek(offset)
        return GZIP_MEMBER.startswith(file.read(len(GZIP_MEMBER)))  # a kill may have left fewer bytes
