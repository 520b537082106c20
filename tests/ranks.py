"""Runs a function in several processes, each a rank as if torchrun had started it; or runs torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_run import Moment, arm, at, fork_server

import train
from grpo import distributed

TESTS = Path(__file__).parent


def together(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `function(*args)` on ranks 0, ..., size - 1. With one rank there is no process group.

    The function must be importable, and its result one that pickle knows. A rank that ends without a result
    fails the test; the other ranks then fail in their next exchange.
    """
    context = fork_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, size, port, function, args, sender))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        results = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(60)
            process.kill()
    for rank, (_, trace) in enumerate(results):
        assert trace is None, f"rank {rank} of {size}: {trace}"
    return [result for result, _ in results]


def _rank(rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], sender: Any):
    import traceback

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        distributed.start()
        sender.send((function(*args), None))
    except BaseException as error:
        sender.send((None, "".join(traceback.format_exception(error))))
    distributed.stop()


# --- with torchrun ----------------------------------------------------------------------------------------


class Signal(NamedTuple):
    """A signal that a rank sends itself at a moment. SIGINT goes to torchrun, as a Ctrl-C does."""

    rank: int
    moment: Moment
    number: int = signal.SIGKILL
    restart: int = 0  # only after so many restarts
    note: str = ""  # a file that is written right before


def torchrun(
    size: int,
    argv: list[str],
    signals: Sequence[Signal] = (),
    *,
    max_restarts: int = 0,
    output: Path,
    real: bool = False,
) -> tuple[int, str]:
    """Runs train.py on `size` ranks.

    Args:
        output: a file for what all processes print.
        real: the command torchrun; else its agent, with ranks of the fork server: no import in each.
    Returns:
        (exit status of torchrun, what all processes printed).
    """
    plan = json.dumps([[*s.moment, *s[:1], *s[2:]] for s in signals])
    if real:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(size), "--max-restarts", str(max_restarts), __file__, plan, *argv]
        paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with open(output, "w") as file:
            done = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=300)
        return done.returncode, output.read_text()
    return _agent(size, max_restarts, output, plan, argv)


def _agent(size: int, max_restarts: int, output: Path, plan: str, argv: list[str]) -> tuple[int, str]:
    """What `torchrun --standalone` does, in this process."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    fork_server()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        start_method="forkserver",
    )
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
    handlers = [signal.getsignal(number) for number in numbers]
    status, message = 0, ""
    try:
        elastic_launch(config, _forked)(plan, argv, output, os.getpid())
    except (ChildFailedError, SignalException) as error:
        status, message = 1, f"{error}\n"
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    return status, output.read_text() + message


def _forked(plan: str, argv: list[str], output: Path, agent: int) -> None:
    with open(output, "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    _work(plan, argv, agent)


def _work(plan: str, argv: list[str], agent: int) -> None:
    """One rank. `agent` is the process of torchrun."""
    where = [int(os.environ[name]) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT")]
    for target, call, after, rank, number, restart, note in json.loads(plan):
        if where == [rank, restart]:
            moment = Moment(target, call, after)
            if number == signal.SIGINT:
                at(argv, moment, partial(_interrupt, agent))
            else:
                arm(argv, moment, number)
            if note:  # around the former, so it comes first
                at(argv, moment, Path(note).touch)
    sys.exit(train.main(argv))


def _interrupt(agent: int) -> None:
    """Returns once this rank has answered the SIGINT that torchrun passes on."""
    answered = []
    handler: Any = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *received: answered.append(handler(*received)))
    os.kill(agent, signal.SIGINT)
    while not answered:
        time.sleep(0.01)
    signal.signal(signal.SIGINT, handler)


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2:], os.getppid())
