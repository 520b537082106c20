"""Where the memory of a run goes: bytes per rank, and the tokens and FLOPs of a step.

    python train.py --preset paper_countdown --estimate 8x80GB

Computed from config.json and the settings; nothing is loaded. With P parameters, N ranks, and w bytes per
number of the compute dtype (bfloat16: 2), a rank keeps for the whole run, in bytes:

    parallel    weights  masters                 moments  gradients                          reference
    replicate   w P      4 P / N, or 0 if w = 4  8 P / N  4 P, and 4 P / N more if N > 1     w P
    fsdp        w P      4 P / N                 8 P / N  4 P / N                            w P / N

`weights` are the sampler's; with `replicate` the learner computes with the same tensors. Masters, moments and
gradients are float32. With beta 0 there is no reference. With LoRA, masters, moments and gradients are those
of the adapter's parameters, the reference is the base with the adapter off, and `fsdp` has w P / N more
weights: the learner's share of the base.

The sampler's caches stay too. What the rollout and the update need on top is freed in between, so a rank
takes the larger of the two (`Memory`). Each formula below names the tensors that it counts. Those that grow
with neither the model nor the batch are left out, as is what Python, CUDA and the allocator's gaps take:
USABLE leaves room for them. benchmarks/estimate.py compares all this with what PyTorch allocates.

Shapes are those of docs/design.md: H hidden, V vocabulary, N heads, K key/value heads, D head size, T tokens
of a micro-batch, M trained tokens of it; I is the intermediate size.

Left out: evaluation of other weights (`load_into` loads them next to the present ones when no optimiser
exists), GGUF files that are dequantised, and the few numbers per token of an adapter's inner dimension.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from grpo.config import HERE, Config
from grpo.logprob import TILE_ELEMENTS, TILE_ROWS
from grpo.model import lora
from grpo.model.decoder import ModelConfig
from grpo.sampler.batching import NEW_TOKENS, ROOM
from grpo.sampler.kv_cache import multiple

Parallel = Literal["replicate", "fsdp"]

# Assumed, because no text is loaded: a question, an instruction, or a question repeated before a retry. The
# tasks of the presets have 30 to 300 tokens there, a few function-calling problems up to 1,000.
QUESTION = 256
# Share of a device that tensors may take. The rest is for CUDA's context and libraries (about 1 GB), NCCL's
# buffers and gaps between tensors. An assumption.
USABLE = 0.9
CHUNK = 4096  # columns that grpo_kernels has gradients of at a time
FLOAT32 = 4


# --- the model ----------------------------------------------------------------------------------------------


def layer_parameters(model: ModelConfig) -> int:
    hidden, heads = model.hidden_size, model.num_heads * model.head_dim
    qkv = heads + 2 * model.num_kv_heads * model.head_dim
    count = hidden * qkv + heads * hidden + 3 * hidden * model.intermediate_size + 2 * hidden
    count += qkv * model.qkv_bias + hidden * model.o_bias + 2 * model.head_dim * model.qk_norm
    return count + (2 * model.intermediate_size + hidden) * model.mlp_bias


def root_parameters(model: ModelConfig) -> int:
    """Outside the layers: embeddings, one or two (V, H) matrices, and the last norm."""
    embeddings = 1 if model.tie_word_embeddings else 2
    return embeddings * model.vocab_size * model.hidden_size + model.hidden_size


def parameters(model: ModelConfig) -> int:
    return model.num_layers * layer_parameters(model) + root_parameters(model)


def trained_parameters(config: Config, model: ModelConfig) -> int:
    """All, or those of the adapter: r (in + out) for each linear layer that has one."""
    if not config.lora_r:
        return parameters(model)
    modules = config.lora_target_modules.split(",")
    return sum(
        config.lora_r * sum(rows.shape)
        for name, rows in lora.linear_layers(model).items()
        if lora.ALL in modules or name.rpartition(".")[2] in modules
    )


# --- lengths ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest conversation of a run.

    prompt: what a group shares: the question and, for a reflection, a failed attempt and an instruction.
    completion: what the learner has of each member of the group; `trained` of it have a log-prob. The last
        token is only predicted: it does not go through the model.
    after: what the sampler feeds and samples after that: the question again, and the retry.
    """

    prompt: int
    completion: int
    trained: int
    after: int

    @classmethod
    def of(cls, config: Config, question: int = QUESTION) -> Lengths:
        """Every turn at its limit. `question`: tokens of whatever is not sampled."""
        answer, reflection = config.max_completion_length, config.max_reflection_length
        if config.train_on == "attempt":
            return cls(question, answer, answer, 0)
        prompt, retry = question + answer, question + answer
        if config.train_on == "reflection":
            return cls(prompt, reflection, reflection, retry)
        trained = reflection + answer if config.train_on == "all" else answer
        return cls(prompt, reflection + retry, trained, 0)

    @property
    def conversation(self) -> int:
        return self.prompt + self.completion + self.after


# --- memory -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Working:
    """Bytes that one half of a step needs on top of what is kept."""

    copies: int  # of weights: packed for a CPU's sampler; gathered from other ranks by FSDP, and gradients
    activations: int
    logits: int  # of the sampled rows; tiles and gradients of the output embedding in the learner

    @property
    def total(self) -> int:
        return self.copies + self.activations + self.logits


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. The first six are kept from step to step."""

    weights: int
    masters: int
    moments: int
    gradients: int
    reference: int
    caches: int
    rollout: Working
    update: Working

    KEPT = ("weights", "masters", "moments", "gradients", "reference", "caches")

    @property
    def kept(self) -> int:
        return sum(getattr(self, name) for name in self.KEPT)

    @property
    def total(self) -> int:
        return self.kept + max(self.rollout.total, self.update.total)


def per_rank(
    config: Config,
    model: ModelConfig,
    *,
    ranks: int = 1,
    parallel: Parallel = "replicate",
    lengths: Lengths | None = None,
) -> Memory:
    """What each of `ranks` processes takes with these settings, whose device and dtype are resolved.

    Raises:
        ValueError: `ranks` is not positive.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    lengths = lengths or Lengths.of(config)
    width, count, trained = _width(config), parameters(model), trained_parameters(config, model)
    sharded = parallel == "fsdp"
    weights = width * count
    if config.lora_r:  # besides the adapter, with fsdp, the learner's base in shares
        weights += width * trained + (width * count // ranks if sharded else 0)
    masters = FLOAT32 * trained // ranks if sharded or width < FLOAT32 else 0
    gradients = FLOAT32 * trained // ranks if sharded or ranks > 1 else 0
    gradients += 0 if sharded else FLOAT32 * trained
    reference = width * count // (ranks if sharded else 1) if config.beta > 0 and not config.lora_r else 0
    return Memory(
        weights=weights,
        masters=masters,
        moments=2 * FLOAT32 * trained // ranks,
        gradients=gradients,
        reference=reference,
        caches=caches(config, model, lengths),
        rollout=_rollout(config, model, lengths),
        update=_update(config, model, lengths, ranks, sharded),
    )


def _width(config: Config) -> int:
    """Bytes of a number of the compute dtype."""
    assert config.dtype in ("float32", "bfloat16"), config.dtype
    return 4 if config.dtype == "float32" else 2


def _on_cpu(config: Config) -> bool:
    return config.device.startswith("cpu")


def caches(config: Config, model: ModelConfig, lengths: Lengths) -> int:
    """Keys and values of `max_rows` conversations with prompts of their own, as in an evaluation.

    Groups share their prompts, so that RL steps need less. With CUDA graphs, lengths are rounded up.
    """
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * _width(config)
    sizes = [lengths.prompt, 1 + lengths.completion + lengths.after]
    if config.device.startswith("cuda") and config.cuda_graphs:
        sizes = [multiple(size + size // 8, ROOM) for size in sizes]
    return min(int(config.cache_gb * 1e9), config.max_rows * sum(sizes) * token)


def _rollout(config: Config, model: ModelConfig, lengths: Lengths) -> Working:
    rows, width, on_cpu = config.max_rows, _width(config), _on_cpu(config)
    # Forward passes take in new prompts until they have NEW_TOKENS.
    tokens = rows + min(rows * lengths.prompt, NEW_TOKENS + lengths.prompt)
    activations = tokens * _forward(config, model)
    # Attention of the rows: scores, with their mask and softmax in float32.
    scores = 3 * FLOAT32 * rows * model.num_heads * lengths.conversation
    # Keys copied in one piece (kv_cache.py), the longest part of each row.
    if on_cpu and width < FLOAT32:
        private = 1 + lengths.completion + lengths.after
        scores += width * rows * private * model.num_kv_heads * model.head_dim
    packed = 0
    if on_cpu:  # all matrices but the input embedding
        head = model.vocab_size * model.hidden_size
        packed = width * (model.num_layers * layer_parameters(model) + head)
    return Working(packed, max(activations, scores), sampler_logits(config, model))


def _forward(config: Config, model: ModelConfig) -> int:
    """Bytes per token of a forward pass without gradients, in the MLP of a layer."""
    width, heads = _width(config), (model.num_heads + model.num_kv_heads) * model.head_dim
    # x before and after attention; q, k and v as projected, q and k rotated, the output; cos and sin.
    numbers = 2 * model.hidden_size + 3 * heads + 2 * model.head_dim
    if _on_cpu(config) and width < FLOAT32:
        # The norm's output, gate and up, and their sums in float32: oneDNN's, without bfloat16 instructions.
        return width * (numbers + model.hidden_size + (2 + 4) * model.intermediate_size)
    return width * (numbers + 4 * model.intermediate_size)  # gate and up, silu(gate), its product with up


def sampler_logits(config: Config, model: ModelConfig) -> int:
    """(V, rows) float32; the product too, if it is rounded, and once more in the memory of CUDA graphs."""
    numbers = model.vocab_size * config.max_rows
    if _on_cpu(config):
        return numbers * (FLOAT32 + (_width(config) if _width(config) < FLOAT32 else 0))
    return numbers * FLOAT32 * (2 if config.device.startswith("cuda") and config.cuda_graphs else 1)


def _update(config: Config, model: ModelConfig, lengths: Lengths, ranks: int, sharded: bool) -> Working:
    """The most expensive moment: the log-probs' backward pass, the last layer's or, with FSDP, its end."""
    width, hidden = _width(config), model.hidden_size
    tokens, trained = micro_batch(config, lengths, ranks)
    embedding = model.vocab_size * hidden
    layer = _saved_by_layer(config, model, lengths) * tokens
    # The input of each layer if the rest is computed again, else all that its backward pass reads.
    layers = model.num_layers * (width * hidden * tokens if config.gradient_checkpointing else layer)
    # Embeddings of the tokens, their cos and sin, the last norm and its output, and the selected part of it.
    ends = width * (tokens * (3 * hidden + 2 * model.head_dim) + trained * hidden)
    # In a layer's backward pass: gradients of x and, in the MLP, more than was freed before; of one matrix.
    inside = width * tokens * (hidden + 2 * model.intermediate_size)
    inside += 0 if config.lora_r else width * 2 * model.intermediate_size * hidden
    inside += layer if config.gradient_checkpointing else 0
    kept = sampler_logits(config, model) if config.cuda_graphs or _on_cpu(config) else 0
    # The gradient of the output embedding waits for that of the input: if tied, and with FSDP.
    waiting = width * embedding if (model.tie_word_embeddings or sharded) and not config.lora_r else 0
    gathered = reduced = ending = 0
    if sharded:
        one, root = layer_parameters(model), root_parameters(model)
        gathered = width * (2 * one + root)  # a layer ahead; the embeddings between forward and backward
        if not config.lora_r:  # gradients, and their copy in float32 that is summed over the ranks
            reduced, ending = (width + FLOAT32) * one, (2 * width + FLOAT32) * root
    moments = [
        Working(gathered, layers + ends, kept + _head(config, model, tokens, trained)),
        Working(gathered + reduced, layers + ends + inside, kept + waiting),
        Working(ending, 0, kept),
    ]
    return max(moments, key=lambda working: working.total)


def micro_batch(config: Config, lengths: Lengths, ranks: int) -> tuple[int, int]:
    """Most tokens of a micro-batch, and how many of them are trained."""
    groups = -(-config.groups_per_step // ranks)
    group = lengths.prompt + config.num_generations * (lengths.completion - 1)
    longest = lengths.prompt + lengths.completion - 1  # gets a micro-batch to itself
    tokens = max(longest, min(config.max_tokens_per_micro_batch, groups * group))
    trained = tokens * config.num_generations * lengths.trained // group
    if config.distill_retries:  # micro-batches of their own
        distilled = micro_batch(*_distilled(config), ranks)
        return max(tokens, distilled[0]), max(trained, distilled[1])
    return tokens, trained


def _distilled(config: Config) -> tuple[Config, Lengths]:
    """A run whose updates are those on distilled retries, if all are right and no two are the same."""
    attempts = replace(config, train_on="attempt", distill_retries=0.0, beta=0.0)
    return attempts, Lengths.of(attempts)


def _saved_by_layer(config: Config, model: ModelConfig, lengths: Lengths) -> int:
    """Bytes per token that a layer keeps for its backward pass."""
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    # Attention has copies of a prompt's keys for each completion: how many keys there are per token.
    members = min(
        config.num_generations,
        max(1, (config.max_tokens_per_micro_batch - lengths.prompt) // lengths.completion),
    )
    tokens = lengths.prompt + members * lengths.completion
    keys = members * (lengths.prompt + lengths.completion) / tokens
    prompt = lengths.prompt / tokens
    if config.attn_implementation == "varlen":  # q and k rotated; keys and values; the output
        attention = 2 * heads + kv_heads + 2 * kv_heads * keys
    elif config.device.startswith("cuda"):  # keys and values repeated for all query heads
        attention = 3 * heads + 2 * heads * (keys + prompt)
    else:  # q, the output in two orders; keys and values as they were, and with the prompt's copies
        attention = 3 * heads + 2 * kv_heads * (keys + 1)
    if model.qk_norm:
        attention += heads + kv_heads
    # Both norms and their outputs; gate and up, silu(gate), its product with up.
    return int(_width(config) * (4 * model.hidden_size + attention + 4 * model.intermediate_size))


def _head(config: Config, model: ModelConfig, tokens: int, trained: int) -> int:
    """Backward pass of the log-probs (grpo/logprob.py, or grpo_kernels), `trained` rows of `tokens`."""
    width, hidden = _width(config), model.hidden_size
    embedding = 0 if config.lora_r else model.vocab_size * hidden  # its gradient
    rows = width * hidden * (tokens + trained)  # gradients of the hidden states, all and selected
    if config.kernels == "triton" or (config.kernels == "auto" and config.device.startswith("cuda")):
        # Also a compacted copy and a float32 sum of the selected rows, and a chunk of d(logits).
        return rows + width * embedding + trained * ((width + FLOAT32) * hidden + width * CHUNK)
    block = min(trained, TILE_ROWS)
    tiles = min(TILE_ELEMENTS, block * model.vocab_size) * (
        2 * FLOAT32 + 2 * (width if width < FLOAT32 else 0)
    )
    # Several blocks of rows are added up in float32, and rounded at the end.
    summed = FLOAT32 if trained > TILE_ROWS and width < FLOAT32 else 0
    return rows + tiles + FLOAT32 * block * hidden + (width + summed) * embedding


# --- a step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Work of one RL step on all ranks, with every turn at its limit."""

    sampled: int  # tokens
    learned: int  # tokens that go through the learner, shared prompts once per group
    rollout_flops: float
    update_flops: float


def step(config: Config, model: ModelConfig, lengths: Lengths | None = None) -> Step:
    """Multiplications and additions of the matrix products, attention included."""
    lengths = lengths or Lengths.of(config)
    groups, generations = config.groups_per_step, config.num_generations
    prompt, completion, after = lengths.prompt, lengths.completion, lengths.after
    matrices = 2 * model.num_layers * layer_parameters(model)  # FLOPs per token; norms and biases are few
    head = 2 * model.vocab_size * model.hidden_size
    attention = 4 * model.num_layers * model.num_heads * model.head_dim  # per token and key that it sees

    def forward(tail: int) -> float:
        """Of a group: the prompt once, then `tail` tokens of each member."""
        tokens = prompt + generations * tail
        keys = prompt * prompt / 2 + generations * tail * (prompt + tail / 2)
        return matrices * tokens + attention * keys

    per_row = config.max_completion_length
    if config.train_on != "attempt":
        per_row += config.max_reflection_length
    rollout = forward(completion + after) + head * generations * per_row
    # An update: forward, twice as much backward (once, if weights are frozen), forward again to recompute.
    passes = 3 - (config.lora_r > 0) + config.gradient_checkpointing
    frozen = (config.beta > 0) + (config.num_iterations > 1)  # reference; the policy before the step
    passes = passes * config.num_iterations + frozen
    # The log-probs' backward pass computes the logits again.
    heads = (4 - (config.lora_r > 0)) * config.num_iterations + frozen
    update = passes * forward(completion - 1) + heads * head * generations * lengths.trained
    learned, update_flops = groups * (prompt + generations * (completion - 1)), groups * update
    if config.distill_retries:
        distilled = step(_distilled(config)[0], model)
        learned, update_flops = learned + distilled.learned, update_flops + distilled.update_flops
    return Step(
        sampled=groups * generations * per_row,
        learned=learned,
        rollout_flops=groups * rollout,
        update_flops=update_flops,
    )


# --- does it fit? -------------------------------------------------------------------------------------------


def choose_parallel(config: Config, model: ModelConfig, *, ranks: int, capacity: float) -> Parallel:
    """What the setting `parallel` means: `auto` is replicate if that fits.

    Args:
        capacity: bytes of a rank's device.
    """
    if config.parallel != "auto":
        return config.parallel
    replicated = per_rank(config, model, ranks=ranks)
    return "replicate" if ranks == 1 or replicated.total <= USABLE * capacity else "fsdp"


def check(config: Config, model: ModelConfig, *, ranks: int, parallel: Parallel, capacity: float) -> None:
    """Raises ValueError if a run cannot fit its devices; the message names settings that would.

    Between USABLE and all of the capacity the run may or may not fit: it starts.
    """
    total = per_rank(config, model, ranks=ranks, parallel=parallel).total
    if total > capacity:
        each = f" on each of {ranks} ranks" if ranks > 1 else ""
        raise ValueError(
            f"{config.model_name_or_path} needs {_gb(total)} GB of memory{each} with these settings, and "
            f"{config.device} has {_gb(capacity)} GB; --estimate shows what takes it; "
            f"{advice(config, model, ranks=ranks, capacity=capacity)}"
        )


Change = dict[str, Any]  # settings, and `ranks`


def advice(config: Config, model: ModelConfig, *, ranks: int, capacity: float) -> str:
    """Settings that would fit, in words."""
    if not (found := changes_that_fit(config, model, ranks=ranks, capacity=capacity)):
        return "no setting would make it fit"
    return "it would fit with " + ", or ".join(f"{options(c)} ({_gb(total)} GB)" for c, total in found)


def changes_that_fit(
    config: Config, model: ModelConfig, *, ranks: int, capacity: float
) -> list[tuple[Change, int]]:
    """Settings that would fit, and the bytes of a rank: one of each kind.

    Each is enough alone. If none is, all that only save memory are taken together, with others if needed.
    """

    def total(change: Change) -> int:
        changed = replace(config, **{name: value for name, value in change.items() if name != "ranks"})
        count = change.get("ranks", ranks)
        parallel = choose_parallel(changed, model, ranks=count, capacity=capacity)
        return per_rank(changed, model, ranks=count, parallel=parallel).total

    def fitting(kinds: list[list[Change]], together: Change) -> list[tuple[Change, int]]:
        found: list[tuple[Change, int]] = []
        for kind in kinds:
            sized = ((together | change, total(together | change)) for change in kind)
            found += islice((pair for pair in sized if pair[1] <= USABLE * capacity), 1)
        return found

    small, large = _smaller(config, model), _larger(config, ranks)
    together = {name: value for kind in small for name, value in kind[-1].items()}
    return fitting([*small, *large], {}) or fitting([[{}]], together) or fitting(large, together)


def _smaller(config: Config, model: ModelConfig) -> list[list[Change]]:
    """Settings that need less memory and compute the same: of each kind, the mildest first."""
    lengths = Lengths.of(config)
    tokens = [config.max_tokens_per_micro_batch >> n for n in range(1, 8)]
    row = caches(replace(config, max_rows=1), model, lengths)  # fewer than 8 rows would be very slow
    kinds: list[list[Change]] = [
        [] if config.gradient_checkpointing else [{"gradient_checkpointing": True}],
        [{"max_tokens_per_micro_batch": n} for n in tokens if n >= lengths.prompt + lengths.completion],
        [{"cache_gb": gb} for n in range(1, 8) if (gb := config.cache_gb / 2**n) * 1e9 >= 8 * row],
    ]
    return [kind for kind in kinds if kind]


def _larger(config: Config, ranks: int) -> list[list[Change]]:
    """Other ways to train."""
    sharded: list[Change] = [{"parallel": "fsdp"}] if ranks > 1 and config.parallel == "replicate" else []
    # Ranks on CPUs may share one machine's memory.
    more: list[Change] = [{"ranks": 1 << n} for n in range(1, 11) if 1 << n > ranks]
    return [sharded, [] if _on_cpu(config) else more, [] if config.lora_r else [{"lora_r": 32}]]


def options(change: Change) -> str:
    """As on the command line; the number of ranks is torchrun's."""
    words = [f"{change['ranks']} ranks"] if "ranks" in change else []
    for name, value in change.items():
        if name != "ranks":
            words.append(
                f"--{name} {'true' if value is True else value if isinstance(value, str) else f'{value:g}'}"
            )
    return " ".join(words)


# --- the command --------------------------------------------------------------------------------------------


def target(text: str) -> tuple[int | None, float | None]:
    """Ranks and bytes of a rank's device that `--estimate` asks for; None: those of this process.

    Raises:
        ValueError: it is not RANKS or RANKSxGB.
    """
    if text == HERE:
        return None, None
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x(\d+(?:\.\d+)?)(?:GB)?)?", text, re.IGNORECASE)
    if match is None or (match[2] and not float(match[2])):
        raise ValueError(f"estimate must be RANKS or RANKSxGB, such as 8 or 8x80GB, got {text!r}")
    return int(match[1]), float(match[2]) * 1e9 if match[2] else None


def report(config: Config, model: ModelConfig, *, ranks: int, capacity: float) -> str:
    """What `--estimate` prints."""
    parallel = choose_parallel(config, model, ranks=ranks, capacity=capacity)
    memory, work = per_rank(config, model, ranks=ranks, parallel=parallel), step(config, model)
    total, trained = parameters(model), trained_parameters(config, model)
    adapter = f", {_millions(trained)} of them trained (LoRA)" if config.lora_r else ""
    how = "1 rank" if ranks == 1 else f"{ranks} ranks, {parallel}"
    lines = [
        f"{config.model_name_or_path}: {_millions(total)} parameters{adapter}; {config.dtype} on "
        f"{config.device}, {how}",
        "",
        f"{'GB per rank':<14}{'rollout':>9}{'update':>9}",
    ]
    rows = [(name, *[getattr(memory, name)] * 2) for name in Memory.KEPT]
    for name in ("copies", "activations", "logits"):
        rows.append((name, getattr(memory.rollout, name), getattr(memory.update, name)))
    rows.append(("total", *(memory.kept + half.total for half in (memory.rollout, memory.update))))
    lines += [f"{name:<14}{rollout / 1e9:>9.2f}{update / 1e9:>9.2f}" for name, rollout, update in rows]
    lines += [
        "",
        f"RL step, every turn at its limit, questions of {QUESTION} tokens: {work.sampled:,} tokens sampled, "
        f"{work.learned:,} through the learner; {work.rollout_flops / 1e15:.3g} PFLOP in the rollout, "
        f"{work.update_flops / 1e15:.3g} in the update",
        verdict(config, model, memory.total, ranks=ranks, capacity=capacity),
    ]
    return "\n".join(lines)


def verdict(config: Config, model: ModelConfig, total: int, *, ranks: int, capacity: float) -> str:
    of = f"{_gb(total)} of {_gb(capacity)} GB on {config.device}"
    if total <= USABLE * capacity:
        return f"fits: {of}"
    words = "does not fit" if total > capacity else "may not fit"
    return f"{words}: {of}; {advice(config, model, ranks=ranks, capacity=capacity)}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"
