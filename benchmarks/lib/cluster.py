"""The time of an RL step on 1 to 1,024 GPUs, computed from FLOPs, bytes and published bandwidths.

Not a measurement: every rate below is a data sheet's or, where it says so, an assumption. Every turn is at
its limit (grpo/run/estimate.py), ranks do equal work except that groups are whole, and nothing waits for a
verifier, a disk or a slow rank. Left out: what Python does between kernels, and writing files.

    rollout   forward passes, one after the other, of the rows of a rank: weights and caches are read once in
              each; products, prompts included; the smallest kernels' time. The slowest of these counts.
    update    FLOPs of the groups of a rank. With fsdp, gathers and reductions overlap it: the slower counts.
    exchange  replicate: gradients (4 P) reduced, weights (w P) gathered; fsdp: weights gathered for the
              sampler. Plus AdamW on a rank's share.
    host      all ranks get all episodes as JSON, and parse them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from grpo.config import Config
from grpo.model.decoder import ModelConfig
from grpo.run import estimate
from grpo.run.estimate import FLOAT32, Lengths

# H100 SXM and DGX H100, by NVIDIA's data sheets
FLOPS = 989e12  # dense bfloat16, per second
MEMORY = 3.35e12  # bytes per second
NVLINK = 450e9  # bytes per second and direction, of a GPU
NETWORK = 50e9  # the same of its network card, 400 Gbit/s
NODE = 8
# Assumptions: shares of these that programs reach; seconds of a hop of a collective.
PRODUCTS, COPIES, HOP = 0.4, 0.8, 5e-6
# Measured on an H100 (docs/performance.md): a decode step has 864 kernels in 30 layers. Each of them takes at
# least so long, also in a CUDA graph (fitted in benchmarks/gpu_shapes.py).
KERNELS, KERNEL = 864 / 30, 4e-6
# Measured on this project's slow CPUs (docs/LOG.md): Python reads JSON at 24 MB/s; an episode of 2,048 ids
# and 1,024 log-probs has 36 kB of it.
JSON_RATE, TOKEN_JSON = 24e6, 36_000 / 3072


@dataclass(frozen=True)
class Seconds:
    """Of one RL step."""

    rollout: float
    update: float
    exchange: float
    host: float
    busy: int  # ranks that have a group

    @property
    def step(self) -> float:
        return self.rollout + self.update + self.exchange + self.host


def step_time(config: Config, model: ModelConfig, ranks: int, *, capacity: float = 80e9) -> Seconds:
    """A step of `config.groups_per_step` groups on `ranks` GPUs."""
    lengths, count = Lengths.of(config), estimate.parameters(model)
    groups = math.ceil(config.groups_per_step / ranks)  # of the busiest rank
    mine = replace(config, groups_per_step=groups)
    work = estimate.step(mine, model)
    parallel = estimate.choose_parallel(config, model, ranks=ranks, capacity=capacity)
    update, exchange = work.update_flops / (FLOPS * PRODUCTS), 28 * count / ranks / (MEMORY * COPIES)
    if ranks > 1:
        exchange += collective(2 * count, ranks)  # of bfloat16 weights
        if parallel == "fsdp":
            tokens, _ = estimate.micro_batch(mine, lengths, 1)
            passes = math.ceil(work.learned / tokens)
            gathered = 2 * collective(2 * count, ranks) + collective(FLOAT32 * count, ranks)
            update = max(update, passes * gathered)
        else:
            exchange += collective(FLOAT32 * count, ranks)
    episodes = config.groups_per_step * config.num_generations if ranks > 1 else 0
    return Seconds(
        rollout=rollout(mine, model, lengths, work),
        update=update,
        exchange=exchange,
        host=episodes * (lengths.conversation + lengths.completion) * TOKEN_JSON / JSON_RATE,
        busy=min(ranks, config.groups_per_step),
    )


def rollout(config: Config, model: ModelConfig, lengths: Lengths, work: estimate.Step) -> float:
    """Seconds of one rank that samples all groups of `config`, as many rows at a time as fit."""
    rows = config.groups_per_step * config.num_generations
    row = estimate.caches(replace(config, max_rows=1), model, lengths)
    together = min(rows, config.max_rows, int(config.cache_gb * 1e9 // row))
    forwards = math.ceil(rows / together) * work.sampled / rows  # a row's question is fed in one
    # A row reads its own tokens, on average half of them; a prompt is read once for its group.
    tokens = together * (lengths.completion + lengths.after) / 2
    tokens += together / config.num_generations * lengths.prompt
    token = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim  # bfloat16 keys and values
    reading = forwards * (2 * estimate.parameters(model) + tokens * token) / (MEMORY * COPIES)
    launching = forwards * model.num_layers * KERNELS * KERNEL
    return max(reading, launching, work.rollout_flops / (FLOPS * PRODUCTS))


def collective(size: float, ranks: int) -> float:
    """Seconds to gather or to reduce-scatter `size` bytes: within the machines, then between them.

    Between machines, each GPU exchanges an eighth of the data over a network card of its own.
    """
    here = min(ranks, NODE)
    seconds = size * (here - 1) / here / (NVLINK * COPIES) + ranks * HOP
    if ranks > NODE:
        nodes = ranks / NODE
        seconds += size / NODE * (nodes - 1) / nodes / (NETWORK * COPIES)
    return seconds
