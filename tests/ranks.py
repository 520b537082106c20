"""Runs a function in several processes at once, each a rank as if torchrun had started it."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from grpo import distributed


def together(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `function(*args)` on ranks 0, ..., size - 1. With one rank there is no process group.

    The function must be importable, and its result one that pickle knows. A rank that ends without a result
    fails the test; the other ranks then fail in their next exchange.
    """
    # A server imports these modules once and forks from there: no import per rank.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "tiny", "ranks"])
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
