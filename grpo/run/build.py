"""Builds what a run needs from its configuration: device, dtype, model, tokenizer, task, sampler, rollout.

Shared by train.py and the commands (`grpo.failures`, `grpo.evaluate`), so that a setting means the same to
all of them. On a CPU `dtype: auto` is measured instead of guessed: similar machines run bfloat16 matrix
products ten times faster than float32 or seven times slower (docs/LOG.md).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from grpo import distributed, warmstart
from grpo.chat import Chat
from grpo.config import Config
from grpo.model import lora, weights
from grpo.model.attention import check_varlen
from grpo.model.decoder import Decoder
from grpo.rollout import Rollout
from grpo.run import estimate, files, trackers
from grpo.run.checkpoint import processor_model
from grpo.sampler.engine import Sampler
from grpo.sampler.kv_cache import SlotCache
from grpo.tasks import Example, Task, WarmStartTask, get_task, looked_in
from grpo.tasks.contract import check_task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Parts:
    """What the stages of a run share. The sampler uses `model` itself: there is one copy of the weights."""

    config: Config
    device: str
    dtype: torch.dtype
    model: Decoder
    tokenizer: Any
    chat: Chat
    task: Task
    sampler: Sampler
    rollout: Rollout


def parts(config: Config, *, model_source: str | None = None) -> Parts:
    """Loads the model (from `model_source`, if given) and builds the parts around it.

    Resolves device, dtype and attn_implementation of `config` in place: config.yaml names what was used.

    Raises:
        ValueError, FileNotFoundError: a setting, a file, or weights that are NaN or infinite; or ranks have
            other settings.
    """
    keep_freed_memory()
    resolve(config)
    return _parts(config, model_source)


@distributed.agreement()
def _parts(config: Config, model_source: str | None) -> Parts:
    task = get_task(config.task, config.task_options)
    dtype = DTYPES[config.dtype]
    source = model_source or config.model_name_or_path
    # A run begins on merged weights. A model that is only measured computes its adapter as it was trained.
    merge = model_source is None
    model, tokenizer = weights.load(source, dtype=dtype, device=config.device, merge=merge)
    _check_finite(model, source)
    if config.lora_r and model_source is None:
        lora.add(model, fresh_adapter(config, model))
    config.attn_implementation = choose_attention(
        config.attn_implementation, config.device, dtype, model.config.head_dim
    )
    chat = build_chat(config, model, tokenizer)
    sampler = Sampler(
        model,
        stop_token_ids=chat.stop_token_ids,
        temperature=config.temperature,
        max_rows=config.max_rows,
        cache_gb=config.cache_gb,
        stop_check_steps=config.stop_check_steps,
        cuda_graphs=config.cuda_graphs,
        varlen=config.attn_implementation == "varlen",
    )
    rollout = build_rollout(config, sampler, task, chat)
    return Parts(config, config.device, dtype, model, tokenizer, chat, task, sampler, rollout)


def fresh_adapter(config: Config, model: Decoder) -> dict[str, lora.LowRank]:
    """A new adapter with the settings of the run."""
    return lora.fresh(
        model.config,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_target_modules.split(","),
        seed=config.seed,
    )


def resolve(config: Config) -> None:
    """Sets up threads and device; resolves device and dtype of `config` in place.

    Raises:
        ValueError: this machine lacks the device, or ranks have other settings.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    config.device = set_up_device(config.device, deterministic=config.deterministic)
    distributed.check_equal("settings", asdict(config))  # what follows must be the same on all ranks
    if config.dtype == "auto":  # ranks must not measure different ones
        config.dtype = distributed.on_main(lambda: choose_dtype("auto", config.device))


def _check_finite(model: Decoder, source: str) -> None:
    """A run would end in its first step, and advise to begin with `start/`, a copy of these weights."""
    if (name := model.first_non_finite_weight()) is not None:
        dtype = str(model.get_parameter(name).dtype).removeprefix("torch.")
        raise ValueError(
            f"{source}: the weights must be finite in {dtype}, but {name} has NaN or infinity; fetch the "
            "model again, or train another one"
        )


def build_rollout(config: Config, sampler: Sampler, task: Task, chat: Chat) -> Rollout:
    return Rollout(
        sampler,
        task,
        chat,
        seed=config.seed,
        max_completion_length=config.max_completion_length,
        max_reflection_length=config.max_reflection_length,
        overlong_buffer=config.overlong_buffer,
        soft_overlong_penalty=config.soft_overlong_penalty,
        length_cost=config.length_cost,
        score_rewards=config.reward == "score",
        success_threshold=config.success_threshold,
        task_options=config.task_options,
        dtype=config.dtype,
        verifier_workers=config.verifier_workers,
    )


def build_chat(config: Config, model: Decoder, tokenizer: Any) -> Chat:
    """Raises ValueError if the template is missing or invalid, or uses tokens without an embedding."""
    template = None
    if config.chat_template is not None:
        try:
            template = Path(config.chat_template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"no UTF-8: {error.reason}"
            where = looked_in(Path(config.chat_template))
            raise ValueError(
                f"chat_template must be a readable text file, got {config.chat_template!r}{where} ({reason})"
            ) from error
        tokenizer.chat_template = template  # so that checkpoints have it
    return Chat(
        tokenizer,
        weights.stop_token_ids(model, tokenizer),
        chat_template=template,
        template_kwargs=config.chat_template_kwargs,
        vocab_size=model.config.vocab_size,
    )


def load_into(parts: Parts, name_or_path: str) -> None:
    """Replaces the weights of `parts.model` by other weights of the same architecture.

    If the model has an adapter, so have the weights: that of a run's checkpoint, else a fresh one, which adds
    nothing.
    """
    mine = lora.shapes(parts.model)
    other, _ = weights.load(name_or_path, dtype=parts.dtype, device=parts.device, merge=not mine)
    if mine and (theirs := lora.shapes(other)) != mine:
        if theirs:  # an adapter of another shape
            other, _ = weights.load(name_or_path, dtype=parts.dtype, device=parts.device)
        lora.add(other, fresh_adapter(parts.config, other))
    parts.sampler.load_weights(other.state_dict())


@contextmanager
def evaluation_sampling(parts: Parts) -> Iterator[None]:
    """A context in which sampling uses `eval_temperature` (0: greedy) instead of the training temperature."""
    sampler, temperature = parts.sampler, parts.config.eval_temperature
    before = sampler.temperature, sampler.greedy
    sampler.temperature, sampler.greedy = temperature or 1.0, temperature == 0
    try:
        yield
    finally:
        sampler.temperature, sampler.greedy = before


@distributed.agreement()
def set_up_device(name: str, *, deterministic: bool = False) -> str:
    """Makes the device that the setting `device` names the current one; sets PyTorch up for it.

    These settings hold for the whole process, so commands make them, and importing a module changes none.
    Comes before anything else that uses a GPU; calling it again changes nothing.

    With several ranks, each has the GPU of its number on its machine.

    Args:
        deterministic: the setting: see `use_deterministic_algorithms`.
    Returns:
        the resolved name (`choose_device`).
    Raises:
        ValueError: this machine lacks the device; or, with several ranks, a GPU is named.
    """
    if deterministic:
        use_deterministic_algorithms()
    if distributed.size() > 1 and name not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device must be auto, cpu or cuda with torchrun, which gives each rank its own GPU, got {name!r}"
        )
    name = choose_device(name)
    if distributed.size() > 1 and name != "cpu":
        number, count = distributed.local_rank(), torch.cuda.device_count()
        if number >= count:
            raise ValueError(
                f"nproc_per_node must be at most {count}, the number of GPUs on this machine, got at least "
                f"{number + 1}; or train with --device cpu"
            )
        torch.cuda.set_device(number)
    device = torch.device(name)
    if device.type == "cuda":
        if device.index is not None:
            # PyTorch's operations run where their tensors are. CUDA graphs, pinned memory and the kernels of
            # other libraries belong to the current device, which is cuda:0 until this line.
            torch.cuda.set_device(device)
        # cuDNN's attention builds a plan for each new shape and keeps it. A plan takes 0.05 to 0.5 s, and a
        # step has hundreds of new shapes. From PyTorch 2.11 on, Hopper and Blackwell send masked attention to
        # cuDNN first. The kernels that now take its place have no plans.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return name


def use_deterministic_algorithms() -> None:
    """Restricts PyTorch to operations that sum in a fixed order; all others raise RuntimeError.

    Raises:
        ValueError: the environment gives cuBLAS workspaces with which the order may change.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first product
    if workspace not in (":4096:8", ":16:8"):
        raise ValueError(
            f"CUBLAS_WORKSPACE_CONFIG must be :4096:8 or :16:8 with deterministic true, got {workspace!r}"
        )
    torch.backends.cudnn.benchmark = False  # it takes whichever convolution is the fastest at the moment
    torch.use_deterministic_algorithms(True)


def choose_device(name: str) -> str:
    """`auto`: CUDA (or ROCm), else Apple's MPS, else the CPU. ValueError if this machine lacks the device."""
    if name != "auto":
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise ValueError(
                f"device must be one that this machine has, got {name!r} (not cpu, cuda or mps; PyTorch "
                "calls ROCm's devices cuda)"
            )
        try:
            device = torch.device(name)
            if device.type == "cuda" and 0 < (count := torch.cuda.device_count()) <= (device.index or 0):
                raise RuntimeError(f"PyTorch sees {count}, the first is cuda:0")
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # each backend raises its own type
            reason = str(error).splitlines()[0]
            raise ValueError(f"device must be one that this machine has, got {name!r} ({reason})") from error
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(name: Literal["auto", "float32", "bfloat16"], device: str) -> Literal["float32", "bfloat16"]:
    """`auto`: bfloat16 on a GPU; on a CPU the dtype whose matrix products are faster here.

    The measurement is made once per processor model, PyTorch version and number of threads, and kept in a
    file. Otherwise a busy machine could change what a seed gives.
    """
    if name != "auto":
        return name
    if device != "cpu":
        return "bfloat16"
    path = _speedup_file()
    machine = f"{processor_model()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    measurements = _read_speedups(path)
    if (speedup := measurements.get(machine)) is None:
        speedup = bfloat16_speedup()
        origin = _keep_speedups(path, {**measurements, machine: speedup})
    else:
        origin = f"measured earlier; kept in {path}"
    # float32 unless bfloat16 is clearly faster: the log-probs of sampler and learner then agree to 1e-5, in
    # bfloat16 only to a few hundredths.
    if speedup > 1.25:
        print(f"dtype: bfloat16, {speedup:.1f} times as fast as float32 here ({origin})")
        return "bfloat16"
    print(f"dtype: float32; bfloat16 is {speedup:.1f} times as fast here ({origin})")
    return "float32"


def choose_attention(
    name: Literal["auto", "sdpa", "varlen"], device: str, dtype: torch.dtype, head_dim: int
) -> Literal["sdpa", "varlen"]:
    """`auto`: sdpa, until varlen has passed its tests on a GPU. ValueError if varlen cannot run here."""
    if name == "varlen":
        check_varlen(device, dtype, head_dim)
        return name
    return "sdpa"


def bfloat16_speedup(seconds: float = 0.5) -> float:
    """Median time of a float32 matrix product, of the size of a decode step, divided by bfloat16's.

    The two take turns, so that a machine that is busy for a moment slows down both.
    """
    pairs = [
        (torch.ones(64, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)) for dtype in DTYPES.values()
    ]
    times: list[list[float]] = [[], []]
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[0]) < 6:
        for (x, w), durations in zip(pairs, times, strict=True):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            durations.append(time.perf_counter() - start)
    float32, bfloat16 = (statistics.median(durations[1:]) for durations in times)  # the first one warms up
    return float32 / bfloat16


def _speedup_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "reflect-grpo" / "bfloat16_speedup.json"


def _read_speedups(path: Path) -> dict[str, float]:
    """Measurements by machine; none if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(machine): float(speedup) for machine, speedup in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep_speedups(path: Path, measurements: dict[str, float]) -> str:
    """Writes the file and returns the outcome in words."""
    try:
        with files.written_whole(path) as partial:
            partial.write_text(json.dumps(measurements, indent=1) + "\n", encoding="utf-8")
    except (OSError, files.RunDirError):
        return f"measured; {path} cannot be written"
    return f"measured; kept in {path}"


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory; otherwise each step faults its activations in again.

    mallopt: no mmap for large blocks (M_MMAP_MAX = -4), never trim the heap (M_TRIM_THRESHOLD = -1). A no-op
    without glibc.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def return_unused_memory() -> None:
    """Returns the free memory of glibc's heap to the system. For the time between steps.

    Micro-batches of many lengths leave holes in the heap, which grows for hundreds of steps. Returning the
    holes costs a few hundredths of a step, because the next step faults memory in again (docs/LOG.md).
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None


def peak_memory_gb(device: str) -> float:
    """Most memory that a rank has held so far, in GB: the process on a CPU, PyTorch's allocator on a GPU."""
    if device.startswith("cuda"):
        own = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(distributed.gather(own)) / 1e9


def device_memory(device: str, processes: int = 1) -> float:
    """Bytes that a process can have on the device; a machine's memory is divided among its processes."""
    kind = device.partition(":")[0]
    if kind == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:  # of a container
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or "max": no bound
        pass
    return total / processes


# --- estimates -------------------------------------------------------------------------------------------


def estimated(config: Config) -> str:
    """What `--estimate` prints. Only the model's config.json is read; no GPU is needed if a size is named."""
    ranks, capacity = estimate.target(str(config.estimate))
    ranks = ranks or distributed.size()
    if capacity is not None and config.device == "auto":
        config.device = "cuda"
    if capacity is None or config.dtype == "auto" and config.device == "cpu":
        resolve(config)
    if config.dtype == "auto":
        config.dtype = "bfloat16"
    model = weights.architecture(config.model_name_or_path)
    return estimate.report(
        config, model, ranks=ranks, capacity=capacity or device_memory(config.device, ranks)
    )


def check_memory(config: Config) -> None:
    """Resolves `parallel` of a run with several ranks in place, before anything is loaded.

    Raises:
        ValueError: the run cannot fit; the message names settings that would.
    """
    resolve(config)

    def choose() -> list[Any]:
        model, ranks = weights.architecture(config.model_name_or_path), distributed.size()
        capacity = device_memory(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        parallel = estimate.choose_parallel(config, model, ranks=ranks, capacity=capacity)
        estimate.check(config, model, ranks=ranks, parallel=parallel, capacity=capacity)
        return [parallel, estimate.per_rank(config, model, ranks=ranks).total / 1e9, capacity / 1e9]

    parallel, replicated, capacity = distributed.on_main(choose)
    if distributed.size() > 1 and config.parallel == "auto":
        print(f"parallel: {parallel}; replicate would need {replicated:.3g} of {capacity:.3g} GB per rank")
        config.parallel = parallel


# --- checks before a run ---------------------------------------------------------------------------------
#
# config.py checks settings alone. `check_run` checks them against the task and the model before the first
# token is sampled: what the task's methods return, enough examples in each split, transcripts for the warm
# start, prompts that template and model take, room for the longest conversation. Left out: disk and memory,
# which other programs use too.


def check_run(config: Config, parts: Parts) -> list[Example]:
    """Checks a run before it starts, and returns all examples that it will ask for.

    Raises:
        ValueError: naming the setting that does not fit.
    """
    trackers.check(config)
    if config.warm_start_steps and not isinstance(parts.task, WarmStartTask):
        raise ValueError(
            f"warm_start_steps must be 0 with task {parts.task.name}, got {config.warm_start_steps}: the "
            "task writes no transcripts to start from (it has no method `transcript`)"
        )
    examples = _examples(config, parts)
    check_room(config, parts, examples)
    return examples


def _examples(config: Config, parts: Parts) -> list[Example]:
    """All examples that the run will ask for, after the task has been checked on them."""
    train = {"num_examples": config.num_examples}
    if config.warm_start_steps:
        train["warm_start_examples"] = config.warm_start_examples
    needs = {
        "train": train,
        "validation": {"num_validation": config.num_validation} if config.eval_steps else {},
        "heldout": {"num_eval": config.num_eval} if config.num_eval else {},
    }
    return check_task(parts.task, needs, parts.chat, transcripts=config.warm_start_steps > 0)


def _longest(config: Config, parts: Parts, examples: list[Example]) -> Example:
    """The example with the most tokens, once all that the run will encode has been encoded.

    Raises:
        ValueError: a message that the chat template refuses, or a token without an embedding.
    """
    chat, rollout = parts.chat, parts.rollout
    lengths = []
    for example in examples:
        lengths.append(len(rollout.prompt_ids(example)) + len(chat.glue([], "length", example.prompt)))
    surplus = max(parts.tokenizer.get_vocab().values()) >= parts.model.config.vocab_size
    if config.warm_start_steps and surplus:  # rare, so transcripts need not be made twice otherwise
        transcripts = warmstart.by_step(parts.task, chat, config)  # type: ignore[arg-type]  # checked above
        for step in range(config.warm_start_steps):
            transcripts(step=step)
    return examples[lengths.index(max(lengths))]


def check_room(config: Config, parts: Parts, examples: list[Example]) -> None:
    """Checks the longest conversation, every turn at its limit, against the model's RoPE and the cache.

    Raises:
        ValueError: it does not fit, or one of the examples cannot be encoded (`_longest`).
    """
    rollout, model, example = parts.rollout, parts.model.config, _longest(config, parts, examples)
    answer, reflection = config.max_completion_length, config.max_reflection_length
    total = len(rollout.prompt_ids(example)) + answer
    if config.train_on != "attempt" or config.eval_steps or config.num_eval:
        asked = len(parts.chat.glue([], "length", parts.task.reflection_instruction))
        total += asked + reflection + len(parts.chat.glue([], "length", example.prompt)) + answer
    sizes = f"a conversation of up to {total} tokens (answers up to {answer}, reflection up to {reflection})"
    most, setting = model.rope.length_limit
    if total > most:
        raise ValueError(
            f"{sizes} must fit the model's {setting}: lower "
            "max_reflection_length or max_completion_length, or use shorter prompts"
        )
    per_token = SlotCache(model, dtype=parts.dtype, device=torch.device("cpu")).token_bytes
    if total * per_token > config.cache_gb * 1e9:
        raise ValueError(
            f"cache_gb must be at least {total * per_token / 1e9:.3g} for {sizes}, got {config.cache_gb:g}"
        )
