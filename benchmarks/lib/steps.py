"""The two trainers of benchmarks/step.py, each as a function from its options to figures.

Same prompts, lengths, rewards and settings for both. Options are those of step.py: folder (of the weights),
device, dtype, prompts, generations, prompt, completion, beta, micro_batch, stop_check_steps, steps.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
from lib.measure import flops, seconds

WORDS = "the a of to in is was for on as with by at from it an be this that which or were are his her".split()
LEARNING_RATE = 1e-6


def prompt_texts(tokenizer: Any, count: int, length: int, seed: int) -> list[str]:
    """Different texts of exactly `length` tokens."""
    rng, texts = random.Random(seed), []
    while len(texts) < count:
        text = ""
        while len(tokenizer(text)["input_ids"]) < length:
            text += f" {rng.choice(WORDS)}" if text else rng.choice(WORDS)
        if len(tokenizer(text)["input_ids"]) == length:  # one word more may be two tokens more
            texts.append(text)
    return texts


def reward_of(ids: list[int]) -> float:
    """Anything that differs within a group and needs no text."""
    return (sum(ids) % 97) / 96


def peak_gb(device: str) -> float:
    """Peak memory, as in `grpo.run.build.peak_memory_gb`, which TRL's environment need not have."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def gemm_rate(dtype: torch.dtype, device: str, rounds: int = 7) -> float:
    """FLOP/s of a square matrix product of random numbers, the best of some rounds."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = seconds({"mm": lambda: torch.mm(a, b)}, device, rounds=rounds)["mm"]
    return 2 * size**3 / min(times)


class Ours:
    """Sampler and learner around one model, and the two halves of a step."""

    def __init__(self, own: argparse.Namespace) -> None:
        import grpo_kernels

        from grpo import config as configuration
        from grpo.learner.learner import Learner
        from grpo.model import weights
        from grpo.run import build
        from grpo.sampler.engine import Sampler

        build.keep_freed_memory()
        dtype = getattr(torch, own.dtype)
        model, tokenizer = weights.load(own.folder, dtype, own.device)
        config = configuration.Config(
            beta=own.beta,
            learning_rate=LEARNING_RATE,
            train_on="attempt",
            temperature=1.0,
            lr_scheduler_type="constant",
            max_completion_length=own.completion,
            warmup_steps=0,
        )
        if own.micro_batch:
            config.max_tokens_per_micro_batch = own.micro_batch
        kernels = grpo_kernels.backend(own.device)
        self.own = own
        self.learner = Learner(
            model,
            config,
            total_steps=own.steps + 1,
            reference=weights.load(own.folder, dtype, own.device)[0] if own.beta else None,
            kernels=kernels,
        )
        never = model.config.vocab_size  # a stop token that cannot come
        rows = max(64, own.prompts * own.generations) if own.device == "cuda" else 64
        self.sampler = Sampler(
            model, stop_token_ids=[never], max_rows=rows, stop_check_steps=own.stop_check_steps
        )
        texts = prompt_texts(tokenizer, own.prompts, own.prompt, seed=0)
        self.prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]

    def rollout(self, step: int) -> list[Any]:
        """Episodes of one step."""
        from grpo.episode import Episode
        from grpo.sampler.engine import Row, Sample

        rows = [
            Row(prompt, [Sample(self.own.completion, key=(step, index, generation))], (index, generation))
            for index, prompt in enumerate(self.prompts)
            for generation in range(self.own.generations)
        ]
        episodes = []
        for finished in self.sampler.run(rows):
            (index, generation), turn = finished.row.tag, finished.turns[0]
            episodes.append(
                Episode(
                    example_id=str(index),
                    group_id=index,
                    generation=generation,
                    prompt_ids=list(finished.row.prefix),
                    completion_ids=turn.ids,
                    roles=["attempt"] * len(turn.ids),
                    logprobs=turn.logprobs,
                    finish_reason="length",
                    reward=reward_of(turn.ids),
                )
            )
        return episodes

    def update(self, episodes: list[Any]) -> None:
        self.learner.step(episodes)


def run_ours(own: argparse.Namespace) -> dict[str, Any]:
    ours = Ours(own)
    times: dict[str, list[float]] = {"rollout": [], "update": []}
    for step in range(own.steps + 1):
        start = time.perf_counter()
        episodes = ours.rollout(step)
        middle = time.perf_counter()
        ours.update(episodes)
        end = time.perf_counter()
        if step:
            times["rollout"].append(middle - start)
            times["update"].append(end - middle)
    peak = peak_gb(own.device)
    ours.sampler.cuda_graphs = False  # the counter does not see what a graph does
    done = {
        "rollout": sum(flops(lambda: ours.rollout(own.steps + 1)).values()),
        "update": sum(flops(lambda: ours.update(episodes)).values()),
    }
    rate = gemm_rate(getattr(torch, own.dtype), own.device)
    return {
        "seconds": [a + b for a, b in zip(times["rollout"], times["update"], strict=True)],
        "parts": times,
        "peak_gb": peak,
        "gemm_gflops": rate / 1e9,
        "flops": done,
        "share_of_gemm": {name: done[name] / statistics.median(times[name]) / rate for name in times},
    }


def profile(own: argparse.Namespace, rows: int = 20) -> str:
    """Where the time of a step goes, by operation, the second of two steps: two of the profiler's tables.

    Under each the share of the wall-clock that is in none of torch's operations: Python's and the profiler's.
    """
    ours = Ours(own)
    ours.update(ours.rollout(0))
    tables = []
    episodes: list[Any] = []
    for name, call in (
        ("rollout", lambda: episodes.extend(ours.rollout(1))),
        ("update", lambda: ours.update(episodes)),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            call()
            wall = time.perf_counter() - start
        averages = profiler.key_averages()
        outside = 1 - sum(event.self_cpu_time_total for event in averages) / 1e6 / wall
        table = averages.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=48)
        tables.append(f"{name}\n{table}outside of operations: {outside:.1%} of {wall:.2f} s\n")
    return "\n".join(tables)


def run_trl(own: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *args: Any, **options: Any) -> None:
            self.marks.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(own.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = prompt_texts(tokenizer, own.prompts, own.prompt, seed=0)
    sequences = own.prompts * own.generations
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        use_cpu=own.device == "cpu",
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": own.dtype},
        per_device_train_batch_size=sequences,
        num_generations=own.generations,
        max_completion_length=own.completion,
        generation_kwargs={"min_new_tokens": own.completion},
        beta=own.beta,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=own.steps + 1,
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_transformers_continuous_batching=own.engine == "trl-continuous",
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=str(own.folder),
        reward_funcs=lambda completion_ids, **_: [reward_of(ids) for ids in completion_ids],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts * (own.steps + 1)}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return {
        "seconds": [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)],
        "peak_gb": peak_gb(own.device),
    }
