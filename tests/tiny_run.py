"""Whole runs of train.py on the tiny model of tests/tiny.py: as a call, or as a process that kills itself."""

import gzip
import importlib
import io
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch

import train
from grpo.model import weights
from grpo.run import files

# A run of all stages in about two seconds. What the preset sets is set here too: presets change.
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
    "warm_start_learning_rate": 1e-4,
    "num_examples": 16,
    "groups_per_step": 2,
    "num_generations": 3,
    "max_completion_length": 6,
    "max_reflection_length": 8,
    "temperature": 0.8,
    "learning_rate": 1e-3,
    "warmup_steps": 0.03,
    "beta": 0.001,
    "overlong_buffer": 0,
    "max_tokens_per_micro_batch": 2048,
    "max_steps": 4,
    "eval_steps": 2,
    "num_validation": 6,
    "num_eval": 8,
    "save_steps": 1,
    "save_total_limit": 2,
    "report": False,  # it takes as long as the rest
}
DETERMINED = ("metrics.jsonl", "failures.jsonl", "episodes.jsonl.gz", "warm_start.jsonl", "evaluation.json")


class Done(NamedTuple):
    """How a run ended. `folder` is None where it left none."""

    status: int
    out: str
    err: str
    folder: Path | None


def save_model(folder: Path, merges: Sequence[tuple[str, str]] = ()) -> Path:
    """The tiny model as a Hugging Face folder."""
    tokenizer = tiny.byte_tokenizer(merges, template=tiny.CHATML)
    stops = [tiny.token_id(tokenizer, text) for text in tiny.STOPS]
    model = tiny.decoder(len(tokenizer), likely=stops)
    config = {**tiny.HF_CONFIG, "vocab_size": len(tokenizer), "architectures": ["LlamaForCausalLM"]}
    model.source = weights.Source(config, {"eos_token_id": stops})
    return weights.save(model, tokenizer, folder)


def arguments(model: Path, output_dir: Path, **settings: Any) -> list[str]:
    merged = {**SETTINGS, "model_name_or_path": model, "output_dir": output_dir, **settings}
    return [text for name, value in merged.items() for text in (f"--{name}", str(value))]


def run(argv: list[str], **options: Any) -> Done:
    """train.main in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = train.main(argv, **options)
    return Done(status, out.getvalue(), err.getvalue(), _folder(argv))


def finished(root: Path, merges: Sequence[tuple[str, str]] = ()) -> Path:
    """The directory, under `root`, of a whole run with SETTINGS."""
    done = run(arguments(save_model(root / "model", merges), root / "runs"))
    assert done.status == 0 and done.folder is not None, done.err
    return done.folder


def _folder(argv: list[str]) -> Path | None:
    if "--resume" in argv and "auto" not in argv:
        return Path(argv[argv.index("--resume") + 1])
    parent = Path(argv[argv.index("--output_dir") + 1])
    return max(parent.glob("*"), default=None) if parent.is_dir() else None


def contents(folder: Path) -> dict[str, bytes]:
    """All that the seed determines: logs, `start/`, and the last checkpoint with its optimiser state."""
    last = max((folder / "checkpoints").glob("step-*"))
    files = [path for part in (folder / "start", last) for path in part.rglob("*") if path.is_file()]
    files += [folder / name for name in DETERMINED if (folder / name).exists()]
    files += folder.glob("failures-*.jsonl")
    # state.json holds the size of timings.jsonl, which the machine decides; an adapter, where its base is.
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(bytes(folder.resolve()), b"RUN")
        for path in files
        if path.name != "state.json"
    }


def assert_same(folder: Path, expected: dict[str, bytes]) -> None:
    """The finished run has these `contents`, and no leftovers."""
    found = contents(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    names = {path.name for path in folder.rglob("*")}
    assert not [name for name in names if files.PARTIAL in name] and "warm_start" not in names


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    with gzip.open(folder / name) if name.endswith(".gz") else open(folder / name, "rb") as file:
        return [json.loads(line) for line in file]


# --- a command as a process of its own ---------------------------------------------------------------------


def command(
    what: str | Path, argv: Sequence[str], *, folder: Path, typed: str = "", **environment: str
) -> Done:
    """`python -m MODULE` or `python FILE` in the directory `folder`, without the seconds of its imports."""
    streams = [Path(tempfile.mkstemp(dir=folder, suffix=".txt")[1]) for _ in range(3)]
    streams[0].write_text(typed)
    process = fork_server().Process(target=_command, args=(what, list(argv), folder, streams, environment))
    process.start()
    process.join()
    assert process.exitcode is not None
    _, out, err = (stream.read_text() for stream in streams)
    for stream in streams:
        stream.unlink()
    return Done(process.exitcode, out, err, None)


def _command(
    what: str | Path, argv: list[str], folder: Path, streams: list[Path], environment: dict[str, str]
) -> None:
    os.chdir(folder)
    os.environ |= environment
    for descriptor, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDWR | os.O_APPEND), descriptor)
    sys.stdin = open(0)
    torch.set_num_threads(1)
    sys.argv = [str(what), *argv]
    if isinstance(what, str):
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(what.parent))
        runpy.run_path(str(what), run_name="__main__")


# --- a process that is stopped from inside, at a moment that is the same each time -------------------------


class Moment(NamedTuple):
    """Right before the `call`-th call of `target` ("module:Class.method").

    Calls are counted once the text `after` is in metrics.jsonl: '"step": 2' is there when step 2 is done.
    """

    target: str
    call: int = 1
    after: str = ""


def run_and_stop(argv: list[str], moment: Moment, *numbers: int) -> tuple[int, str]:
    """train.main in another process, which sends itself the signals `numbers` at that moment.

    Returns:
        (exit status, negative for a signal that killed it; what it wrote on stderr before).
    """
    context = fork_server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(argv, moment, numbers, sender))
    process.start()
    sender.close()
    try:
        text = receiver.recv()
    except EOFError:  # it was killed
        text = ""
    process.join()
    assert process.exitcode is not None
    return process.exitcode, text


def fork_server() -> Any:
    """Starts processes without an import in each, and without the state of pytest's process.

    A server imports what a run needs, once, and forks.
    """
    context = multiprocessing.get_context("forkserver")
    # The last two are imported by the first model of a process, and take longer than a tiny run.
    late = ["transformers.models.auto.configuration_auto", "transformers.models.llama.configuration_llama"]
    context.set_forkserver_preload(["train", "tiny_run", "ranks", *late])
    return context


def _child(argv: list[str], moment: Moment, numbers: tuple[int, ...], sender: Any) -> None:
    torch.set_num_threads(1)
    arm(argv, moment, *numbers)
    done = run(argv)
    sender.send(done.err)
    sys.exit(done.status)


def arm(argv: list[str], moment: Moment, *numbers: int) -> None:
    """From now on, this process sends itself the signals `numbers` at that moment of the run `argv`."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.2)  # until the main thread has answered: two at once would count as one

    at(argv, moment, send)


def at(argv: list[str], moment: Moment, act: Callable[[], None]) -> None:
    """From now on, this process calls `act` at that moment of the run `argv`."""
    module, _, path = moment.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, _at(getattr(owner, name), argv, moment, act))


def _at(
    function: Callable[..., Any], argv: list[str], moment: Moment, act: Callable[[], None]
) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        metrics = (_folder(argv) or Path()) / "metrics.jsonl"
        if not moment.after or (metrics.exists() and moment.after in metrics.read_text()):
            calls += 1
            if calls == moment.call:
                act()
        return function(*args, **kwargs)

    return wrapped
