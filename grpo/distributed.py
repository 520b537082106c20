"""Several processes that train one model: their ranks, what they agree on, and what they exchange.

`torchrun --nproc_per_node 8 train.py ...` starts eight processes. All run the same program and hold the same
settings, failures, episodes and metrics. They share two kinds of work, and exchange the results at once:

    sampling   each rank samples and verifies some of the rows (`deal`), then all have all (`gather`)
    updating   each rank runs some of the groups backward, then the gradients are summed (grpo/learner)

Rank 0 alone writes the console and the run directory, but for the ranks' shares of a checkpoint. With one
process there is no process group, and nothing here communicates.

An exception on one rank must not leave the others waiting for it. So work that may raise runs in
`agreement()`, at whose end either all ranks go on or all raise. If a rank is killed, torchrun ends the
others. With gloo they notice first: their next exchange fails.

Left out: pipeline, tensor and context parallelism, and ranks that join or leave during a run (torchrun
restarts all).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # imported by programs that need no torch: it takes seconds
    import torch.distributed as dist
    from torch import Tensor

JOINING = timedelta(minutes=10)  # until all ranks have started
PATIENCE = timedelta(hours=12)  # of an exchange: ranks may wait for one whose answers take long to verify


class RankError(RuntimeError):
    """Another rank cannot go on; the message names it."""


class RankStopped(BaseException):
    """Another rank was told to stop, by a signal: save the finished steps and leave, as that rank does."""


class LostRankError(RankError):
    """An exchange failed: another rank has ended, or the network has."""


# --- ranks --------------------------------------------------------------------------------------------------


_rank, _size = 0, 1
_side_group: dist.ProcessGroup | None = None
_lost = False  # an exchange has failed


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun started; at the end leaves them. Also a decorator for commands.

    Meanwhile rank 0 alone speaks, for all: the others write nothing to standard output and standard error.
    Without torchrun, or with one process, changes nothing. A rank that cannot join exits with one line.
    """
    try:
        start()
    except (RuntimeError, ValueError) as error:  # no connection; a variable of torchrun that is missing
        sys.exit(f"error: rank {os.environ.get('RANK', '?')} cannot join the others ({_in_words(error)})")
    if _rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    try:
        yield
    finally:
        if _lost:
            # torchrun ends this process once it has seen that another one has ended. If this one ended
            # first, torchrun would name it as the cause.
            time.sleep(10)
        stop()


def start() -> None:
    """Joins the processes that torchrun started. Raises RuntimeError or ValueError if it cannot."""
    global _rank, _size, _side_group
    if _size > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with exchange():
        store, rank, size = _common_store()
        store.set_timeout(PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        _side_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    _rank, _size = rank, size


def _common_store() -> tuple[dist.Store, int, int]:
    """torchrun's store with a prefix of this start; this process's rank, and the number of ranks.

    torchrun keeps one store over its restarts (torch 2.13), with the addresses of the ranks before in it. A
    rank that reads one too early tries to reach a process that has ended, and fails.
    """
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=JOINING))
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("first", own)
        others = [store.get(f"{own} {other}").decode() for other in range(1, size)]
        store.set(f"{own} all", " ".join(others))
        return PrefixStore(own, store), rank, size
    while True:
        first = store.get("first").decode()  # perhaps of an earlier start, whose list has not this rank
        store.set(f"{first} {rank}", own)
        if store.check([f"{first} all"]) and own in store.get(f"{first} all").decode():
            return PrefixStore(first, store), rank, size
        time.sleep(0.05)


def stop() -> None:
    """Leaves the other processes, without waiting for them."""
    global _rank, _size, _side_group
    if _size == 1 or _lost:
        return
    import torch
    import torch.distributed as dist

    # With NCCL, leaving may wait for an exchange that another rank will not join any more. The process ends
    # anyway.
    if not torch.cuda.is_available():
        dist.destroy_process_group()
        _rank, _size, _side_group = 0, 1, None


def size() -> int:
    """Number of ranks."""
    return _size


def rank() -> int:
    return _rank


def local_rank() -> int:
    """Number of this process on its machine, and of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if _size > 1 else 0


def is_main() -> bool:
    """Whether this rank writes files and the console."""
    return _rank == 0


def errors() -> TextIO:
    """Where the traceback of a bug goes, on any rank."""
    return sys.stderr if is_main() else sys.__stderr__ or sys.stderr


def side_group() -> dist.ProcessGroup | None:
    """A second group of all ranks, for a thread whose exchanges run next to those of the main thread."""
    return _side_group


# --- exchanges ----------------------------------------------------------------------------------------------
#
# Values travel as JSON, so nothing is unpickled and floats arrive exactly.


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, in the order of the ranks, on every rank.

    Args:
        value: can be written as JSON; NaN and infinity can.
        group: default: all ranks, from the main thread.
    Raises:
        LostRankError: a rank has ended.
    """
    if _size == 1:
        return [value]
    import torch
    import torch.distributed as dist

    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with exchange():
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(_size)]
        dist.all_gather(lengths, torch.tensor([len(content)]), group=group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(content)] = content
        buffers = [torch.empty_like(padded) for _ in range(_size)]
        dist.all_gather(buffers, padded, group=group)
    return [
        json.loads(buffer[: int(length)].numpy().tobytes())
        for buffer, length in zip(buffers, lengths, strict=True)
    ]


def barrier() -> None:
    """Returns once all ranks are here; what rank 0 wrote before is then there to read."""
    gather(None)


def on_main(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """The result of `work`, which only rank 0 does. It can be written as JSON; all ranks get it.

    Raises:
        what `work` raises, on rank 0; RankError on the others.
    """
    with agreement(group):
        result = work() if is_main() else None
    return result if _size == 1 else gather(result, group)[0]


def check_equal(what: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError if a rank has other values than rank 0; the message names the first that differs.

    Args:
        what: for the message, in the plural: "settings".
    """
    first, *others = gather(dict(values))
    for number, theirs in enumerate(others, 1):
        for name in dict.fromkeys([*first, *theirs]):
            if first.get(name) != theirs.get(name):
                raise ValueError(
                    f"all ranks must have the same {what}, but {name} is {first.get(name)!r} on rank 0 and "
                    f"{theirs.get(name)!r} on rank {number}"
                )


def deal(costs: Sequence[float]) -> list[list[int]]:
    """Deals items to the ranks so that the sums of their costs are close; equal arguments give equal hands.

    The dearest item first, each to the rank with the least so far.

    Returns:
        per rank, the indices of its items in rising order. With fewer items than ranks, some have none.
    """
    hands: list[list[int]] = [[] for _ in range(_size)]
    sums = [0.0] * _size
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        least = sums.index(min(sums))
        hands[least].append(index)
        sums[least] += costs[index]
    return [sorted(hand) for hand in hands]


def hand(costs: Sequence[float]) -> list[int]:
    """Which of the items with these costs this rank is dealt."""
    return deal(costs)[_rank]


def add_up(tensor: Tensor) -> Tensor:
    """Replaces the tensor by its sum over all ranks, in place, and returns it."""
    if _size > 1:
        import torch.distributed as dist

        with exchange():
            dist.all_reduce(tensor)
    return tensor


@contextmanager
def exchange() -> Iterator[None]:
    """Turns the errors of a broken connection into LostRankError. Also a decorator."""
    global _lost
    try:
        yield
    except RuntimeError as error:
        if not any(library in str(error) for library in ("gloo", "NCCL", "TCPStore")):
            raise  # too little memory, for example
        _lost = True
        reason = _in_words(error).partition(". This is typically")[0]  # what follows is torch's advice
        raise LostRankError(f"rank {_rank} lost contact with another rank ({reason})") from error


# --- agreement ----------------------------------------------------------------------------------------------

_inside = threading.local()  # its attribute `agreement`: this thread is in one


@contextmanager
def agreement(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A context that all ranks leave in the same way. If the body raises on one of them, all raise.

    A rank whose body succeeded raises RankError, or RankStopped if the other rank was told to stop. Ranks do
    not exchange anything inside; an agreement inside another one changes nothing. As a decorator, it makes
    the whole function such a context.
    """
    if _size == 1 or getattr(_inside, "agreement", False):
        yield
        return
    error: BaseException | None = None
    _inside.agreement = True
    try:
        yield
    except (LostRankError, KeyboardInterrupt):  # the others cannot be asked, or will not be waited for
        raise
    except BaseException as caught:
        error = caught
    finally:
        _inside.agreement = False
    failed = isinstance(error, (Exception, SystemExit))  # a task may call sys.exit
    outcomes = gather(None if error is None else [failed, _in_words(error)], group)
    for number, outcome in enumerate(outcomes):
        if error is None and outcome is not None:
            failed, words = outcome
            error = (RankError if failed else RankStopped)(f"rank {number}: {words}")
    if error is not None:
        vars(error)["agreed"] = True
        raise error


def agreed(error: BaseException) -> bool:
    """Whether all ranks have raised where this rank raised `error`: at the end of an agreement.

    After any other error the ranks are at different places of the program, and must not exchange anything.
    """
    return _size == 1 or "agreed" in vars(error)


def _in_words(error: BaseException) -> str:
    """The type and the first line of the message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
