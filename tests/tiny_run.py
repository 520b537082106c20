"""Whole runs of train.py on the tiny model of tests/tiny.py: as a call, as a forked process that kills itself."""

import io
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch

ROOT = Path(__file__).parent.parent
# A run of all stages in about a second: two supervised steps, 16 examples, four RL steps, 8 problems a table.
SETTINGS = {
    "task": "tiny:Toy",
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "run_name": "tiny",
    "warm_start_steps": 3,
    "warm_start_examples": 8,
    "warm_start_batch_size": 2,
    "warm_start_reflections": 2,
    "num_examples": 16,
    "groups_per_step": 2,
    "num_generations": 3,
    "max_completion_length": 6,
    "max_reflection_length": 8,
    "temperature": 0.8,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "eval_steps": 2,
    "num_validation": 6,
    "num_eval": 8,
    "save_steps": 1,
    "save_total_limit": 2,
}
DETERMINED = ("metrics.jsonl", "failures.jsonl", "episodes.jsonl", "warm_start.jsonl", "evaluation.json")


class Done(NamedTuple):
    """How a run ended. `folder` is None where it left none."""

    status: int
    out: str
    err: str
    folder: Path | None


def save_model(folder: Path, *, template: str | None = tiny.CHATML, dtype: torch.dtype = torch.float32) -> Path:
    """The tiny model as a Hugging Face folder."""
    from grpo import weights

    tokenizer = tiny.byte_tokenizer(template=template)
    stops = [tiny.token_id(tokenizer, text) for text in tiny.STOPS]
    model = tiny.decoder(len(tokenizer), likely=stops)
    config = {**tiny.HF_CONFIG, "vocab_size": len(tokenizer), "architectures": ["LlamaForCausalLM"]}
    model.source = weights.Source(config, {"eos_token_id": stops}, dtype)
    return weights.save(model, tokenizer, folder)


def arguments(model: Path, output_dir: Path, **settings: Any) -> list[str]:
    merged = {**SETTINGS, "model_name_or_path": model, "output_dir": output_dir, **settings}
    return [text for name, value in merged.items() for text in (f"--{name}", str(value))]


def run(argv: list[str]) -> Done:
    """train.main in this process."""
    import train

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = train.main(argv)
    return Done(status, out.getvalue(), err.getvalue(), _folder(argv))


def _folder(argv: list[str]) -> Path | None:
    if "--resume" in argv:
        return Path(argv[argv.index("--resume") + 1])
    parent = Path(argv[argv.index("--output_dir") + 1])
    return max(parent.glob("*"), default=None) if parent.is_dir() else None


def contents(folder: Path) -> dict[str, bytes]:
    """All that the seed determines: the logs, the start, and the last checkpoint with its optimiser state."""
    files = [folder / name for name in DETERMINED]
    last = max((folder / "checkpoints").glob("step-*"))
    files += [path for part in (folder / "start", last) for path in part.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.exists()}


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- a process that is killed from inside, at a moment that is the same each time --------------------------


def run_and_die(argv: list[str], target: str, call: int, number: int = signal.SIGKILL) -> tuple[int, str]:
    """train.main in another process, which sends itself a signal at the `call`-th call of `target`.

    Args:
        target: "package.module:Class.method" or "package.module:function"; the signal comes before the call.
    Returns:
        (exit status, negative for a signal; what it wrote on stderr).
    """
    # A server that imports train once and forks from there: no import per run, and nothing of pytest's own state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "tiny"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(argv, target, call, number, sender))
    process.start()
    sender.close()
    process.join()
    try:
        text = receiver.recv()
    except EOFError:  # it was killed
        text = ""
    assert process.exitcode is not None
    return process.exitcode, text


def _child(argv: list[str], target: str, call: int, number: int, sender: Any) -> None:
    import importlib

    os.chdir(ROOT)
    torch.set_num_threads(1)
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, _signal_at(getattr(owner, name), call, number))
    done = run(argv)
    sender.send(done.err)
    sys.exit(done.status)


def _signal_at(function: Callable[..., Any], call: int, number: int) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return wrapped
