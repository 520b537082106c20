"""What a run's parts take on a CPU, counted: the oracle of grpo/run/estimate.py.

A model with random weights, its reference, a learner and a sampler are built; then the sampler runs and the
learner takes steps. Lengths are exact, prompts share nothing, and no turn ends early.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lib.measure import DTYPES, peak_bytes
from torch.distributed._tools.mem_tracker import MemTracker

from grpo.config import Config
from grpo.episode import Episode
from grpo.learner import sharded
from grpo.learner.learner import Learner
from grpo.model.decoder import Decoder, ModelConfig
from grpo.run import estimate
from grpo.sampler.engine import Feed, Row, Sample, Sampler


class Tensors(MemTracker):
    """Bytes of all tensors, without a record per module, which allows only one call of each."""

    def _pre_fw_hook(self, *_: Any) -> None: ...

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    @property
    def peak(self) -> int:
        return self.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


class Case:
    """Settings, a model's sizes and lengths; the parts are built inside what is measured.

    With several ranks each has one process, and calls the same methods (`distributed`).
    """

    def __init__(
        self, config: Config, sizes: dict[str, Any], lengths: estimate.Lengths, ranks: int = 1
    ) -> None:
        self.config, self.lengths, self.ranks = config, lengths, ranks
        self.parallel: estimate.Parallel = "fsdp" if config.parallel == "fsdp" else "replicate"
        self.model = ModelConfig.from_hf(sizes)
        rng = random.Random(0)
        vocabulary = range(self.model.vocab_size)
        self.prompts = [tuple(rng.choices(vocabulary, k=lengths.prompt)) for _ in range(config.max_rows)]
        self.episodes = [
            Episode(
                str(group),
                group,
                member,
                list(self.prompts[group]),
                rng.choices(vocabulary, k=lengths.completion),
                ["reflection"] * lengths.completion,
                [-1.0] * lengths.completion,
                "stop",
                float(member % 2),
            )
            for group in range(config.groups_per_step)
            for member in range(config.num_generations)
        ]

    def decoder(self) -> Decoder:
        with torch.device("meta"):
            model = Decoder(self.model)
        model = model.to(DTYPES[self.config.dtype]).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02, generator=generator)
        return model

    def run(self, work: str) -> Any:
        """Builds the parts, then does what each letter says: u, an update; r, a rollout."""
        model, config = self.decoder(), self.config
        reference = self.decoder() if config.beta > 0 else None
        trained = model
        if self.ranks > 1 and self.parallel == "fsdp":
            trained = sharded.shard(model, dtype=DTYPES[config.dtype])
            if reference is not None:
                reference = sharded.shard(reference, dtype=DTYPES[config.dtype], trained=False)
        learner = Learner(trained, config, total_steps=10, reference=reference)
        never = self.model.vocab_size
        sampler = Sampler(model, stop_token_ids=[never], max_rows=config.max_rows, cache_gb=config.cache_gb)
        for letter in work:
            if letter == "u":
                learner.step(self.episodes)
                learner.write_weights(model)
            else:
                sampler.run([Row(prompt, self.script(i)) for i, prompt in enumerate(self.prompts)])
        return model, learner, sampler

    def script(self, index: int) -> list[Sample | Feed]:
        """The completion, then half of `after` fed and half sampled."""
        fed = self.lengths.after // 2
        script: list[Sample | Feed] = [Sample(self.lengths.completion, key=(index,))]
        if self.lengths.after:
            script += [Feed([0] * fed), Sample(self.lengths.after - fed, key=(index, 1))]
        return script

    def estimates(self) -> dict[str, int]:
        """Bytes of what `WORK` does."""
        memory = estimate.per_rank(
            self.config,
            self.model,
            ranks=self.ranks,
            parallel=self.parallel,
            lengths=self.lengths,
        )
        # The buffers of the sampler's logits stay, but come only with the first rollout. Moments and, with
        # FSDP, gradients come with the first update.
        buffers = estimate.sampler_logits(self.config, self.model)
        later = memory.moments + (memory.gradients if self.parallel == "fsdp" else 0)
        return {
            "rollout": memory.kept - later + memory.rollout.total,
            "update": memory.kept - memory.caches + memory.update.total - buffers,
            "both": memory.total,
        }


WORK = {"rollout": "r", "update": "uu", "both": "urur"}  # two updates: the first one makes the moments


def allocated(case: Case, work: str) -> int:
    """Peak of what PyTorch's allocator gave out, by profiler."""
    return peak_bytes(lambda: case.run(WORK[work]), "cpu")


def tracked(case: Case) -> int:
    """Peak of all tensors in an update. (In a rollout the tracker does not see the packed weights.)"""
    gc.collect()
    with Tensors() as tensors:
        kept = case.run(WORK["update"])
    del kept
    return tensors.peak


def resident(work: Callable[[], Any]) -> int:
    """How much the peak of resident memory grows, in bytes, on Linux. Once per process: it never falls."""
    before = _high_water()
    work()
    return _high_water() - before


def _high_water() -> int:
    """Peak of this program. (That of `resource` begins with the peak of the process that started it.)"""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
