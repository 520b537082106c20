"""Decode steps as CUDA graphs: the kernel launches of a step are recorded once and replayed as one launch.

A small model's decode step is hundreds of kernels of a few microseconds each, and Python needs longer to
launch one than the GPU to run it. A graph replays the same kernels on the same addresses. So everything in
which two steps differ is in tensors that are filled before a replay: the tokens, positions and lengths, which
the step itself then advances, and the noise.

There is one graph for each shape. Batches are filled up and lengths rounded so that few shapes occur: hardly
any is new after the first RL step (benchmarks/gpu_shapes.py). Graphs are recorded as they are needed, and the
last ones used are kept from run to run. They are forgotten when the memory of caches or weights has moved.

Left out: steps that take in prompts or fed tokens, whose shapes are all different.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grpo.sampler.kv_cache import CachedAttention

MOST_GRAPHS = 64  # each keeps some megabytes
# Bytes. A recording allocates less: float32 logits of 256 rows and 150,000 tokens are 0.16 GB.
ENOUGH_FREE = 2e9

# (input_ids (1, B), attend, noise (B,) or None) -> tokens and log-probs, (B,) each
Step = Callable[[Tensor, CachedAttention, Tensor | None], tuple[Tensor, Tensor]]


def record(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Records the kernels that `work` launches, without running them. Returns the function that runs them.

    `torch.cuda.graph` does the same and also empties the allocator's cache each time, after which learner and
    sampler would ask the driver for their memory again. It does so because a recording has a pool of its own
    and cannot use cached memory. Here the cache is emptied only if little memory is free.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    if torch.cuda.mem_get_info()[0] < ENOUGH_FREE:
        torch.cuda.empty_cache()
    with torch.cuda.stream(_side_stream(torch.cuda.current_device())):
        # thread_local: by default a recording fails if another thread, which saves, copies from the GPU.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph.replay


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Graphs that share a pool are recorded on one stream; the default one cannot record."""
    return torch.cuda.Stream(device)


class DecodeGraphs:
    """Runs decode steps: the first of each shape directly, all later ones by its graph.

    Args:
        step: one decode step. It must not wait for the device, nor keep memory that it allocates.
        width: the most steps in one `run`.
    """

    def __init__(self, step: Step, width: int) -> None:
        self.step, self.width = step, width
        self._recorded: dict[Any, _Recorded] = {}
        self._pool: Any = None
        self._valid_for: Any = None

    def run(
        self, input_ids: Tensor, attend: CachedAttention, noise: Tensor | None, steps: int, settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Runs `steps` decode steps from `input_ids` (1, B); every row of `attend` has one new token.

        Args:
            noise: (B, steps) float64, or None.
            settings: a graph is replayed only for the settings that it was recorded with.
        Returns:
            tokens (B, steps) int64 and log-probs (B, steps) float64; overwritten by the next call.
        """
        key = attend.shape, noise is None, settings
        recorded = self._recorded.pop(key, None) or _Recorded(
            self.step, attend, self.width, noise is not None
        )
        if len(self._recorded) >= MOST_GRAPHS:
            del self._recorded[next(iter(self._recorded))]
        self._recorded[key] = recorded  # the most recently used one is the last
        recorded.load(input_ids, attend, noise)
        for _ in range(steps):
            if recorded.replay is not None:
                recorded.replay()
                continue
            recorded.advance()  # run directly first: a recording needs kernels and libraries warmed up
            self._pool = self._pool or (torch.cuda.graph_pool_handle() if input_ids.is_cuda else None)
            recorded.replay = record(recorded.advance, self._pool)
        return recorded.tokens[:, :steps], recorded.logprobs[:, :steps]

    def keep_if(self, valid_for: Any) -> None:
        """Forgets all graphs if `valid_for`, which names what they depend on, has changed since last time."""
        if valid_for != self._valid_for:
            self.forget()
            self._valid_for = valid_for

    def forget(self) -> None:
        self._recorded.clear()
        self._pool = None


class _Recorded:
    """The tensors that a graph reads and writes, and the graph once there is one."""

    def __init__(self, step: Step, attend: CachedAttention, width: int, noisy: bool) -> None:
        self.step, self.attend = step, attend
        self.replay: Callable[[], None] | None = None
        batch, device = attend.batch, attend.private.device
        self.input_ids = torch.zeros(1, batch, dtype=torch.int64, device=device)
        self.noise = torch.zeros(batch, width, dtype=torch.float64, device=device) if noisy else None
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch, width, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(batch, width, dtype=torch.float64, device=device)

    def load(self, input_ids: Tensor, attend: CachedAttention, noise: Tensor | None) -> None:
        self.input_ids.copy_(input_ids)
        self.column.zero_()
        if self.noise is not None and noise is not None:
            self.noise[:, : noise.shape[1]].copy_(noise)
        if attend is not self.attend:
            for mine, new in zip(self.attend.state, attend.state, strict=True):
                mine.copy_(new)

    def advance(self) -> None:
        """Runs one step, then sets tokens, counters and column for the next."""
        self.attend.update_biases()
        noise = None if self.noise is None else self.noise.index_select(1, self.column)[:, 0]
        tokens, logprobs = self.step(self.input_ids, self.attend, noise)
        self.tokens.index_copy_(1, self.column, tokens[:, None])
        self.logprobs.index_copy_(1, self.column, logprobs[:, None])
        self.input_ids.copy_(tokens[None])
        self.attend.advance_counters()
        self.column += 1
