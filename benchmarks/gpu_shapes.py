"""The GPU path at real size, counted on a CPU: shapes, CUDA graphs, launches, bytes and a computed step time.

    python benchmarks/gpu_shapes.py
    python benchmarks/gpu_shapes.py --preset paper_function_calling --models 1.5B --rl_steps 10
    python benchmarks/gpu_shapes.py --max_rows 128 --stop_check_steps 4        takes every option of train.py

No model runs. `Sampler.run` lays out its batches, caches and `DecodeGraphs` as in train.py, but a recorded
graph only counts, and each turn ends at a length drawn beforehand (LENGTHS below, seeded). Every forward pass
of the sampler and the learner is then repeated on torch's meta device with the model's real sizes, to count
what it would launch on CUDA (lib/launches.py).

    fed, prompts   forward passes without a graph, because rows take in fed tokens or a prompt is new
    shapes, new    different decode shapes of the step, and how many of them no earlier step had
    recordings     CUDA graphs recorded
    forgotten      how often all graphs were forgotten
    attention      calls of an attention function over all layers; learner: in the policy's forward pass
    launches       kernels that Python launches one by one; a replayed graph is one. Learner: all passes
    GB             read and written by the sampler's kernels, and copied between slots of the caches
    plans          new shapes of attention in the learner: one plan each, where cuDNN computes attention

The table of seconds has the mean step of each model:

    rows           rows of the sampler that fit into `cache_gb`, at most `max_rows`
    replays, eager, recordings, host
                   parts of the rollout: replayed graphs; forward passes without a graph; recording; Python
                   that the GPU waits for, whenever it looks for rows that have stopped
    step           rollout and update
    with plans     the step if cuDNN computed attention; commands turn that off

Seconds are computed from these counts, not measured. A kernel takes the longest of its FLOPs, its bytes and
the smallest kernel's time; what Python launches takes at least the time of its launches. The constants below
say where they come from. Left out: verifiers, packing, writing files, what an adapter adds.
"""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

import torch  # noqa: E402
from lib.launches import Launches, Rates, launches  # noqa: E402
from lib.measure import command_line, markdown  # noqa: E402
from lib.paper_models import PAPER_MODELS  # noqa: E402
from torch import Tensor  # noqa: E402

from grpo import config as configuration  # noqa: E402
from grpo import failures  # noqa: E402
from grpo.config import Config  # noqa: E402
from grpo.episode import Episode  # noqa: E402
from grpo.evaluate import measure as evaluation  # noqa: E402
from grpo.learner.packing import Batch, pack_episodes  # noqa: E402
from grpo.learner.tree_attention import tree_attend  # noqa: E402
from grpo.model.decoder import Decoder, ModelConfig  # noqa: E402
from grpo.rollout import Rollout
from grpo.sampler import batching, cuda_graph, script  # noqa: E402
from grpo.sampler.engine import Feed, Row, Sample, Sampler  # noqa: E402
from grpo.sampler.kv_cache import CachedAttention, RowSpan, SlotCache  # noqa: E402

# --- an H100 ------------------------------------------------------------------------------------------------
#
# "Measured" is in docs/performance.md, On a GPU: a model of SmolLM2-135M's shape.

H100 = Rates(
    flops=720e12,  # measured for a large bfloat16 product; data sheet: 989e12
    bandwidth=0.85 * 3.35e12,  # data sheet; the share is an assumption
    smallest=4e-6,  # fitted, see below
)
# Measured: Python needs 23 to 27 ms to launch a decode step, which has 864 kernels.
LAUNCH = 25e-3 / 864
# Fitted: the host's seconds per window, per row of a window and per sampled token. With these and `smallest`,
# the three rollouts measured (64 and 256 ragged rows, 64 equal ones) are computed as 0.65, 1.21 and 0.59 s;
# measured were 0.66, 1.23 and 0.57.
WINDOW, WINDOW_ROW, TOKEN = 2e-3, 20e-6, 11e-6
# Fitted: the update measured, 0.59 s for some 14,000 launches. It contains those of log-probs and optimiser,
# which are not counted here.
LEARNER_LAUNCH = 43e-6
BACKWARD = 2  # kernels of a backward pass over those of its forward pass, and their times (assumption)
ACCUMULATE, ADAMW = 14, 46  # bytes per trained parameter: of a micro-batch's gradient, of an update
PLAN = 50e-3  # of cuDNN, for each shape (an estimate, not measured)
SETTLED = 2  # RL steps that are left out of the mean times

# --- lengths ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens of a turn or prompt: log-normal, rounded, and kept within [least, most]."""

    median: float
    spread: float  # standard deviation of the logarithm
    least: int
    most: int = 1 << 30

    def draw(self, rng: random.Random, limit: int = 1 << 30) -> int:
        length = round(self.median * math.exp(rng.gauss(0, self.spread)))
        return min(max(length, self.least), self.most, limit)


@dataclass(frozen=True)
class TaskLengths:
    opening: Lengths  # system message and question
    shared: int  # leading tokens of the opening that all problems have in common
    attempt: Lengths
    instruction: int  # the user turn that asks for a reflection
    reflection: Lengths
    again: Lengths  # the user turn that repeats the question
    retry: Lengths
    failing: float  # share of first attempts


# Openings, instructions and questions were counted over 2,000 problems of the preset's training split (829 of
# the Berkeley files) with the demo's tokenizer, which has a token per digit as Qwen's. Sampled turns are
# assumptions, because the paper gives no lengths: a Countdown answer reasons for some hundred words, and an
# eighth of the failed ones reach the limit of 512; a function call is short; a reflection is a paragraph.
LENGTHS = {
    "countdown": TaskLengths(
        opening=Lengths(72.5, 0.03, 68, 76),
        shared=48,
        attempt=Lengths(220, 0.7, 8),
        instruction=41,
        reflection=Lengths(150, 0.5, 16),
        again=Lengths(32.5, 0.06, 28, 36),
        retry=Lengths(200, 0.7, 8),
        failing=0.6,
    ),
    "function_calling": TaskLengths(
        opening=Lengths(250, 0.58, 138, 975),
        shared=58,
        attempt=Lengths(60, 0.6, 8),
        instruction=45,
        reflection=Lengths(110, 0.5, 16),
        again=Lengths(32, 0.94, 18, 264),
        retry=Lengths(60, 0.6, 8),
        failing=0.6,
    ),
}

# --- models -------------------------------------------------------------------------------------------------


MODELS = {
    "1.5B": PAPER_MODELS["Qwen/Qwen2.5-1.5B-Instruct"],
    "3B": PAPER_MODELS["Qwen/Qwen2.5-3B-Instruct"],
    "8B": PAPER_MODELS["meta-llama/Llama-3.1-8B-Instruct"],
}
WITH_LORA = ("8B",)  # all weights of the others are trained


class Model:
    """A model's sizes, and one of its layers on the meta device to count with."""

    def __init__(self, name: str) -> None:
        self.name, self.lora = name, name in WITH_LORA
        self.config = ModelConfig.from_hf(MODELS[name])
        with torch.device("meta"):
            one_layer = ModelConfig.from_hf({**MODELS[name], "num_hidden_layers": 1})
            self.decoder = Decoder(one_layer).to(torch.bfloat16)
        layer = sum(parameter.numel() for parameter in self.decoder.layers.parameters())
        self.num_parameters = self.config.num_layers * layer + self.decoder.output_weight.numel()

    def launches(self) -> Any:
        return launches(H100, self.decoder, self.config.num_layers)


# --- the sampler without its model --------------------------------------------------------------------------

STOP, OTHER = 0, 1  # the stand-in's vocabulary
STAND_IN = {
    **MODELS["1.5B"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 2,
}


class _Cache(SlotCache):
    """A small cache whose tokens count as many bytes as the real model's."""

    def __init__(self, real: ModelConfig) -> None:
        self.real_bytes = SlotCache(real, dtype=torch.bfloat16, device=torch.device("meta")).token_bytes
        self.moved = 0  # bytes
        super().__init__(ModelConfig.from_hf(STAND_IN), dtype=torch.float32, device=torch.device("cpu"))

    @property
    def token_bytes(self) -> int:
        return self.real_bytes

    def move(self, source: int, target: int, length: int) -> None:
        self.moved += 2 * length * self.real_bytes


@dataclass(frozen=True)
class Window:
    """One layout of the sampler, and the forward passes until the next one."""

    attend: CachedAttention
    steps: int
    rows: list[RowSpan]
    prompts: list[tuple[int, int]]
    eager: bool  # the first forward pass has no graph


class _Layout(CachedAttention):
    """Without the biases, which are most of the work and which nothing here reads."""

    def update_biases(self) -> None: ...


class ScheduleSampler(Sampler):
    """`Sampler.run` without a model: turns end where their keys say, and `schedule` returns the windows."""

    def __init__(self, config: Config, model: Model) -> None:
        super().__init__(
            Decoder(ModelConfig.from_hf(STAND_IN)),
            stop_token_ids=[STOP],
            max_rows=config.max_rows,
            cache_gb=config.cache_gb,
            stop_check_steps=config.stop_check_steps,
        )
        self._private, self._prefixes = _Cache(model.config), _Cache(model.config)
        self.recordings = self.forgotten = 0
        self._windows: list[Window] = []
        self._layouts: deque[tuple[Any, ...]] = deque()  # arguments of the CachedAttention made last

    @property
    def moved(self) -> int:
        """Bytes copied between slots so far."""
        return self._private.moved + self._prefixes.moved

    def schedule(self, rows: list[Row]) -> list[Window]:
        self._windows = []
        forget = cuda_graph.DecodeGraphs.forget

        def counted_forget(graphs: cuda_graph.DecodeGraphs) -> None:
            self.forgotten += bool(graphs._recorded)
            forget(graphs)

        with (
            mock.patch.object(batching, "CachedAttention", self._laid_out),
            mock.patch.object(cuda_graph, "record", self._record),
            mock.patch.object(cuda_graph.DecodeGraphs, "forget", counted_forget),
            mock.patch.object(script, "uniforms", _ends),
        ):
            self.run(rows)
        return self._windows

    def _laid_out(self, *arguments: Any) -> CachedAttention:
        self._layouts.append(arguments)
        return _Layout(*arguments)

    def _record(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        self.recordings += 1
        return work

    def _recordable(self) -> bool:
        return self.cuda_graphs

    def _decode(self, input_ids: Tensor, attend: CachedAttention, head: Any, steps: int, noise: Any) -> Any:
        _, _, rows, prompts, *_ = self._layouts.pop()
        self._windows.append(Window(attend, steps, rows, prompts, eager=bool(attend.stretches)))
        return super()._decode(input_ids, attend, head, steps, noise)

    def _step(
        self, input_ids: Tensor, attend: CachedAttention, noise: Any, head: Any = None
    ) -> tuple[Tensor, Tensor]:
        return noise.long(), torch.zeros(len(noise), dtype=torch.float64)


def _ends(key: tuple[int, ...], count: int) -> list[float]:
    """In place of a turn's noise, the tokens to be sampled: STOP as the token number key[0]."""
    return [float(STOP if token + 1 == key[0] else OTHER) for token in range(count)]


# --- what is sampled ----------------------------------------------------------------------------------------


class Workload:
    """Rows whose prompts and turns have drawn lengths."""

    def __init__(self, config: Config, seed: int) -> None:
        if config.task not in LENGTHS:
            raise ValueError(
                f"task must be one of {', '.join(LENGTHS)}, whose lengths are known, got {config.task}"
            )
        self.config, self.lengths = config, LENGTHS[config.task]
        self.rng = random.Random(f"gpu_shapes {config.task} {seed}")

    def ids(self, count: int) -> list[int]:
        return [self.rng.randrange(1 << 30) for _ in range(count)]

    def opening(self) -> list[int]:
        shared = self.lengths.shared
        return [*range(shared), *self.ids(self.lengths.opening.draw(self.rng) - shared)]

    def failure(self) -> tuple[int, ...]:
        """A group's prompt: opening, failed attempt, instruction."""
        attempt = self.lengths.attempt.draw(self.rng, self.config.max_completion_length)
        return (*self.opening(), *self.ids(attempt + self.lengths.instruction))

    def answer(self, lengths: Lengths) -> Sample:
        limit = self.config.max_completion_length
        return Sample(limit, key=(lengths.draw(self.rng, limit),))

    def reflection(self) -> Sample:
        limit = self.config.max_reflection_length
        return Sample(limit, key=(self.lengths.reflection.draw(self.rng, limit),))

    def first_tries(self, problems: int, count: int = 1) -> list[Row]:
        prompts = [tuple(self.opening()) for _ in range(problems)]
        return [Row(prompt, [self.answer(self.lengths.attempt)]) for prompt in prompts for _ in range(count)]

    def second_tries(self, groups: int, generations: int) -> list[Row]:
        rows = []
        for _ in range(groups):
            prompt = self.failure()
            fed = [OTHER] * self.lengths.again.draw(self.rng)
            feed = Feed(lambda _, fed=fed: fed, limit=len(fed))  # type: ignore[misc]
            for _ in range(generations):
                rows.append(Row(prompt, [self.reflection(), feed, self.answer(self.lengths.retry)]))
        return rows

    def controls(self, failed: int) -> list[Row]:
        """Retries after no reflection, after another's and after an empty one (grpo/evaluate/measure.py)."""
        rows = []
        for _ in range(failed):
            prompt, again = self.failure(), self.lengths.again.draw(self.rng)
            other = self.lengths.reflection.draw(self.rng, self.config.max_reflection_length)
            for fed in (again, other + again, again):
                rows.append(Row(prompt, [Feed([OTHER] * fed), self.answer(self.lengths.retry)]))
        return rows

    def rl_step(self) -> list[Row]:
        groups, generations = self.config.groups_per_step, self.config.num_generations
        if self.config.train_on == "attempt":
            return self.first_tries(groups, generations)
        return self.second_tries(groups, generations)

    def episodes(self, rows: list[Row]) -> list[Episode]:
        """What the learner gets. Tokens are random: completions of a group have no beginning in common."""
        turns = ("attempt",) if self.config.train_on == "attempt" else ("reflection", "retry")
        episodes: list[Episode] = []
        groups: dict[tuple[int, ...], int] = {}
        for row in rows:
            group = groups.setdefault(row.prefix, len(groups))
            roles: list[str] = []
            for role, item in zip((turns[0], "context", *turns[1:]), row.script, strict=False):
                length = item.limit if isinstance(item, Feed) else item.key[0]  # type: ignore[index]
                roles += [role] * (length or 0)
            ids, zeros = self.ids(len(roles)), [0.0] * len(roles)
            episodes.append(Episode("", group, 0, list(row.prefix), ids, roles, zeros, "stop", 0.0))
        return episodes


# --- counting -----------------------------------------------------------------------------------------------


@dataclass
class Sampled:
    """Counts of one or more runs of the sampler."""

    forwards: int = 0
    fed: int = 0
    prompts: int = 0
    shapes: set[tuple[Any, ...]] = field(default_factory=set)
    recordings: int = 0
    forgotten: int = 0
    attention: int = 0
    launches: int = 0
    bytes: int = 0
    replaying: float = 0.0  # seconds, as the three below
    eager: float = 0.0
    recording: float = 0.0
    host: float = 0.0  # lays out windows, takes tokens

    @property
    def seconds(self) -> float:
        return self.replaying + self.eager + self.recording + self.host


class SamplerCounter:
    """Runs rows on a `ScheduleSampler` and counts what its windows would launch with the real model."""

    def __init__(self, config: Config, model: Model) -> None:
        self.model, self.sampler = model, ScheduleSampler(config, model)
        self.varlen = config.attn_implementation == "varlen"
        self.real = Sampler(
            model.decoder, stop_token_ids=[STOP]
        )  # on the meta device, for single forward passes
        self.replays: dict[tuple[Any, ...], Launches] = {}
        self.eager: dict[tuple[Any, ...], Launches] = {}

    @torch.inference_mode()
    def run(self, rows: list[Row], total: Sampled | None = None) -> Sampled:
        """Counts a run, on top of `total`."""
        sampler, total = self.sampler, total or Sampled()
        recordings, forgotten, moved = sampler.recordings, sampler.forgotten, sampler.moved
        for window in sampler.schedule(rows):
            total.forwards += window.steps
            total.host += WINDOW + len(window.rows) * WINDOW_ROW
            if window.eager:
                cost = self._eager(window)
                total.fed += any(row.length > 1 for row in window.rows)
                total.prompts += bool(window.prompts)
                total.attention += sum(cost.attention.values())
                total.launches += cost.kernels
                total.bytes += cost.bytes
                total.eager += max(cost.seconds, cost.kernels * LAUNCH)
            if replays := window.steps - window.eager:
                cost = self._replay(window)
                total.shapes.add(window.attend.shape)
                total.launches += replays
                total.bytes += replays * cost.bytes
                total.replaying += replays * cost.seconds
        total.recordings += sampler.recordings - recordings
        total.forgotten += sampler.forgotten - forgotten
        # The first step of a shape runs directly and is then recorded: Python launches its kernels twice.
        kernels = max((cost.kernels for cost in self.replays.values()), default=0)
        launched = 2 * (sampler.recordings - recordings) * kernels
        total.launches += launched
        total.recording += launched * LAUNCH
        total.bytes += sampler.moved - moved
        total.replaying += (sampler.moved - moved) / H100.bandwidth
        total.host += sampler.stats["sampled_tokens"] * TOKEN
        return total

    def _attend(self, window: Window, rows: list[RowSpan], prompts: list[tuple[int, int]]) -> CachedAttention:
        """A layout in the window's sizes on the meta device."""
        caches = self.real._prefixes, self.real._private
        for cache, simulated in zip(caches, (window.attend.prefixes, window.attend.private), strict=True):
            cache.allocate(simulated.slots, simulated.capacity)
        return CachedAttention(*caches, rows, prompts, window.steps - 1, window.attend.fill, self.varlen)

    def _eager(self, window: Window) -> Launches:
        # The launches depend on these numbers alone; bytes are those of the first such window.
        key = window.attend.batch, sum(row.length > 1 for row in window.rows), len(window.prompts)
        if key not in self.eager:
            with self.model.launches() as self.eager[key]:
                attend = self._attend(window, window.rows, window.prompts)
                noise = torch.zeros(attend.batch, dtype=torch.float64, device="meta")
                self.real._step(torch.zeros_like(attend.position_ids), attend, noise)
        return self.eager[key]

    def _replay(self, window: Window) -> Launches:
        shape = window.attend.shape
        if shape not in self.replays:
            rows = [replace(row, start=row.start + row.length - 1, length=1) for row in window.rows]
            attend = self._attend(window, rows, [])
            assert attend.shape == shape, (attend.shape, shape)
            recorded = cuda_graph._Recorded(self.real._step, attend, window.steps, True)
            with self.model.launches() as self.replays[shape]:
                recorded.advance()
        return self.replays[shape]


@dataclass
class Learned:
    """Counts of an update."""

    micro_batches: int = 0
    attention: int = 0
    launches: int = 0
    shapes: set[tuple[Any, ...]] = field(default_factory=set)  # of attention
    seconds: float = 0.0


def learn(config: Config, model: Model, batches: list[Batch]) -> Learned:
    """Counts an update on micro-batches: reference, policy, recomputation, backward pass, optimiser."""
    total = Learned()
    passes = 1 + config.gradient_checkpointing + (config.beta > 0)
    varlen = config.attn_implementation == "varlen"
    for batch in batches:
        forward = _forward(model, batch, varlen)
        launched = forward.kernels * (passes + BACKWARD)
        total.micro_batches += 1
        total.attention += sum(forward.attention.values())
        total.launches += launched
        if not varlen:  # FlashAttention needs no plans
            total.shapes |= set(forward.attention)
        # Products of the log-probs: one forward, three backward (they are recomputed), one of the reference.
        products = 2 * len(batch.ids) * model.decoder.output_weight.numel() * (4 + (config.beta > 0))
        # With LoRA, the backward pass computes no gradients of the layers' weights.
        layers = forward.seconds * (passes + BACKWARD / (2 if model.lora else 1))
        total.seconds += max(layers + products / H100.flops, launched * LEARNER_LAUNCH)
        if not model.lora:
            total.seconds += ACCUMULATE * model.num_parameters / H100.bandwidth
    if not model.lora:
        total.seconds += ADAMW * model.num_parameters / H100.bandwidth
    return total


@torch.no_grad()
def _forward(model: Model, batch: Batch, varlen: bool) -> Launches:
    batch = batch.to("meta")
    with model.launches() as count:
        attend = tree_attend(batch.trees, model.decoder.config.windows, varlen=varlen)
        model.decoder(batch.input_ids, batch.position_ids, attend=attend)
    return count


# --- the report ---------------------------------------------------------------------------------------------

SAMPLER = [
    "forwards",
    "fed",
    "prompts",
    "shapes",
    "new",
    "recordings",
    "forgotten",
    "attention",
    "launches",
    "GB",
]
LEARNER = ["micro-batches", "attention", "launches", "plans"]
TIMES = ["replays", "eager", "recordings", "host", "rollout", "update", "step", "with plans"]


class ModelTables:
    """Counts RL steps with one model: table rows of `sampler` and `learner`, and `times`, in seconds."""

    def __init__(self, config: Config, name: str) -> None:
        self.config, self.model = config, Model(name)
        self.counter = SamplerCounter(config, self.model)
        self.sampler: list[dict[str, Any]] = []
        self.learner: list[dict[str, Any]] = []
        self.times: list[list[float]] = []
        self._known: set[Any] = set()
        self._planned: set[Any] = set()

    def step(self, rows: list[Row], batches: list[Batch]) -> None:
        sampled, learned = self.counter.run(rows), learn(self.config, self.model, batches)
        new, plans = len(sampled.shapes - self._known), len(learned.shapes - self._planned)
        self._known |= sampled.shapes
        self._planned |= learned.shapes
        counts: list[float] = [sampled.forwards, sampled.fed, sampled.prompts, len(sampled.shapes), new]
        counts += [
            sampled.recordings,
            sampled.forgotten,
            sampled.attention,
            sampled.launches,
            sampled.bytes / 1e9,
        ]
        step = {"RL step": len(self.sampler) + 1}
        self.sampler.append(step | dict(zip(SAMPLER, counts, strict=True)))
        counts = [learned.micro_batches, learned.attention, learned.launches, plans]
        self.learner.append(step | dict(zip(LEARNER, counts, strict=True)))
        seconds = sampled.seconds + learned.seconds
        parts = [sampled.replaying, sampled.eager, sampled.recording, sampled.host, sampled.seconds]
        self.times.append([*parts, learned.seconds, seconds, seconds + plans * PLAN])

    def mean_times(self) -> dict[str, Any]:
        """Of the steps after SETTLED."""
        settled = self.times[min(SETTLED, len(self.times) - 1) :]
        means = dict(zip(TIMES, map(fmean, zip(*settled, strict=True)), strict=True))
        return {"model": self.model.name, "rows": self.counter.sampler._private.slots, **means}


def stages(config: Config, counter: SamplerCounter, work: Workload) -> list[dict[str, Any]]:
    """Forward passes and computed minutes of the failures and of an evaluation, from their first blocks."""
    table = []
    for stage, problems, block, tries in (
        ("failures", config.num_examples, failures.BLOCK, config.attempts_per_example),
        ("evaluation of a model", config.num_eval, evaluation.BLOCK, 1),
    ):
        _, together = next(Rollout.portions(counter, 0, problems, block=block, rows_each=tries))
        total = counter.run(work.first_tries(together, tries))
        if stage != "failures":
            failed = max(1, round(work.lengths.failing * together))
            counter.run(work.second_tries(failed, 1), total)
            counter.run(work.controls(failed), total)
        times, seconds = problems / together, total.seconds - total.recording  # recorded in the first blocks
        counts = {"forwards": total.forwards * times, "minutes": seconds * times / 60}
        table.append({"stage": stage, "problems": problems, "sampled together": together, **counts})
    return table


def report(config: Config, models: list[str], steps: int, seed: int) -> str:
    work = Workload(config, seed)
    tables = [ModelTables(config, name) for name in models]
    # As in a run, the failures come before the first RL step, and their caches and graphs are kept.
    around = [stages(config, table.counter, Workload(config, seed)) for table in tables][0]
    for step in range(steps):
        rows = work.rl_step()
        batches = pack_episodes(
            work.episodes(rows), train_on=config.train_on, max_tokens=config.max_tokens_per_micro_batch
        )
        # One step after the first two is enough for the times of the other models.
        for table in tables[: 1 if step > SETTLED else None]:
            table.step(rows, batches)
    first, parts = tables[0], []
    for title, names, counted in (("sampler", SAMPLER, first.sampler), ("learner", LEARNER, first.learner)):
        columns = [("RL step", "{}"), *((name, "{:,.0f}") for name in names)]
        parts += [f"{models[0]}, {title}", markdown(columns, counted)]
    columns = [("model", "{}"), ("rows", "{}"), *((name, "{:.1f}") for name in TIMES)]
    lora = "; 8B with LoRA" if "8B" in models else ""
    parts.append(f"Seconds of an RL step on an H100, computed, not measured{lora}")
    parts.append(markdown(columns, [table.mean_times() for table in tables]))
    columns = [("stage", "{}"), ("problems", "{:,}"), ("sampled together", "{}"), ("forwards", "{:,.0f}")]
    parts.append(f"Before and after RL, {models[0]}, computed")
    parts.append(markdown([*columns, ("minutes", "{:.1f}")], around))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    presets = ["paper_countdown", "paper_function_calling"]
    parser.add_argument("--preset", default=presets[0], choices=presets, help="(default: %(default)s)")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        help="counts are the first one's (default: all)",
    )
    parser.add_argument("--rl_steps", type=int, default=4, help="RL steps simulated (default: %(default)s)")
    parser.add_argument("--lengths_seed", type=int, default=0, help="of the lengths (default: %(default)s)")
    arguments, options = parser.parse_known_args(argv)
    if arguments.rl_steps < 1:
        parser.error(f"--rl_steps must be at least 1, got {arguments.rl_steps}")
    try:
        config = configuration.parse(["--preset", arguments.preset, *options])
        print(report(config, arguments.models, arguments.rl_steps, arguments.lengths_seed))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
