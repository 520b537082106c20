"""A new run takes the warm start and the failures of an earlier run that computed the same.

`start.json` in a run directory records all that `start/` and `failures.jsonl` depend on: the settings read
before RL, the content of model, tokenizer and examples (inputs.py), versions and machine, and the code. Where
two records are equal, so are the results on a CPU, bit for bit.

Left out: reuse of records of the final table, which depend on more settings.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from grpo import config as configuration
from grpo.config import TYPES, Config
from grpo.run import checkpoint, files, inputs

RECORD = "start.json"
# Shape of RECORD (files.misfit)
SHAPE = {"settings": dict, "inputs": dict, "environment": {str: str}, "code": str, "taken_from": (str, None)}
COPIED = ("failures.jsonl", "warm_start.jsonl")
AUTO, NONE = "auto", "none"  # values of the setting start_from, next to a run directory
# Parts of the package grpo that the stages before RL do not use.
OTHER_CODE = ("report", "evaluate", "experiments", "interact.py", "export.py", "reference.py", "advantage.py")
PACKAGES = ("gguf", "jinja2", "math-verify", "reasoning-gym", "safetensors", "tokenizers")


def record(config: Config, content: Mapping[str, Any]) -> dict[str, Any]:
    """What `start/` and `failures.jsonl` of a run depend on; call it once the task is built.

    Args:
        content: of the run's inputs.json (`inputs.sums`).
    """
    return {
        "settings": _settings(config),
        "inputs": {name: content[name] for name in inputs.BEFORE_RL},
        "environment": {**checkpoint.environment(), **{name: _version(name) for name in PACKAGES}},
        "code": _code_sum(),
        "taken_from": None,
    }


def save(folder: Path, record: Mapping[str, Any]) -> None:
    with files.written_whole(folder / RECORD) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def forget_if_changed(folder: Path, now: Mapping[str, Any]) -> None:
    """Deletes the record of a resumed run if it does not describe how the run continues before RL."""
    begun = (folder / "metrics.jsonl").exists()  # RL has begun, so start and failures are complete
    if not begun and (folder / RECORD).exists() and _differences(_stored(folder), now):
        (folder / RECORD).unlink()


def check_named(config: Config, now: Mapping[str, Any]) -> Path | None:
    """The run that `start_from` names; None if it names none.

    Raises:
        ValueError: it has no start, or other settings or inputs. Other versions, or other code, are allowed.
        CheckpointError: its start is damaged.
    """
    if config.start_from in (AUTO, NONE):
        return None
    run = Path(config.start_from)
    if not _has_start(run) or not (run / "config.yaml").is_file():
        raise ValueError(
            "start_from must be auto, none, or a run directory with a finished warm start, got "
            f"{config.start_from!r}"
        )
    checkpoint.check_seal(run / "start")
    if wrong := _differences(_record_of(run, now), now, ("settings", "inputs")):
        raise ValueError(
            f"start_from must be a run with the same warm start and failures; {run} has other settings or "
            f"inputs ({'; '.join(wrong)})"
        )
    return run


def find(config: Config, folder: Path, now: Mapping[str, Any]) -> Path | None:
    """The run whose start the run in `folder` takes: the one that `start_from` names, or the newest equal.

    Raises:
        ValueError, CheckpointError: as `check_named`.
    """
    if config.start_from != AUTO:
        return check_named(config, now)
    records = [path for path in folder.parent.glob(f"*/{RECORD}") if path.parent != folder]
    for path in sorted(records, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            if _has_start(path.parent) and not _differences(_stored(path.parent), now):
                checkpoint.check_seal(path.parent / "start")
                return path.parent
        except (files.RunDirError, OSError):
            continue  # damaged, or deleted meanwhile: not one to take
    return None


def take(run: Path, folder: Path, now: Mapping[str, Any]) -> str:
    """Copies the start and the failures of `run` into `folder`; returns what was done, in one line.

    `start/` comes last: a run has it once all the rest is there.
    """
    for name in COPIED:
        if (run / name).exists():
            with files.written_whole(folder / name) as path:
                shutil.copyfile(run / name, path)
    save(folder, {**now, "taken_from": str(run)})
    with files.written_whole(folder / "start") as path:
        shutil.copytree(run / "start", path, copy_function=link, dirs_exist_ok=True)
    what = "warm start and failures" if (folder / COPIED[0]).exists() else "warm start"
    differences = _differences(_record_of(run, now), now)
    how = f"in spite of other {'; '.join(differences)}" if differences else "which computed the same"
    return f"{what}: taken from {run}, {how}; --start_from none computes them again"


def link(source: str, target: str) -> None:
    """A second name for a file that is never written again, or a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


# --- comparing two records ----------------------------------------------------------------------------------


def _differences(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    parts: tuple[str, ...] = ("settings", "inputs", "environment", "code"),
) -> list[str]:
    """How two records differ: a phrase for each difference."""
    found = []
    for part in parts:
        if part == "code":
            found += [] if then[part] == now[part] else ["code"]
            continue
        for name in dict.fromkeys([*then[part], *now[part]]):
            old, new = then[part].get(name, "not recorded"), now[part].get(name, "not recorded")
            if old != new:
                found.append(f"{name}: {old!r} -> {new!r}" if part != "inputs" else f"another {name}")
    return found


def _stored(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / RECORD, SHAPE)


def _record_of(run: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """Its record, or what is known of a run without one: of version 0.1, or resumed with other code."""
    if (run / RECORD).exists():
        return _stored(run)
    settings = _settings(configuration.load(run / "config.yaml"))
    content = now["inputs"]  # not comparable without inputs.json
    if (run / inputs.INPUTS).exists():
        content = files.read_json(run / inputs.INPUTS, dict)
        content = {name: content.get(name, "not recorded") for name in inputs.BEFORE_RL}
    return {"settings": settings, "inputs": content, "environment": {}, "code": "", "taken_from": None}


def _settings(config: Config) -> dict[str, Any]:
    left_out = set(configuration.AFTER_START)
    if not (config.lora_r and config.warm_start_steps):  # before RL, a fresh adapter changes nothing
        left_out |= {name for name in TYPES if name.startswith("lora_")}
    names = [name for name in TYPES if name not in left_out]
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def _has_start(run: Path) -> bool:
    return (run / "start" / "config.json").is_file()


# --- the code -----------------------------------------------------------------------------------------------


def _code_sum() -> str:
    """sha256 of the code that the stages before RL can use: ours, and all loaded modules of the user."""
    package = Path(__file__).parents[1]
    kernels = importlib.util.find_spec("grpo_kernels")
    ours = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in OTHER_CODE]
    if kernels is not None and kernels.origin is not None:
        ours += Path(kernels.origin).parent.rglob("*.py")
    # Prefixes of names: to compare the parents of paths took a second, for thousands of modules.
    not_theirs = [package, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))]
    folders = tuple(f"{folder}{os.sep}" for folder in not_theirs)
    loaded = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    theirs = [
        Path(name)
        for name in loaded
        if name.endswith(".py") and not name.startswith(folders) and os.path.isfile(name)
    ]
    digest = hashlib.sha256()
    for path in [*sorted(ours), *sorted(theirs)]:
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
