"""The two trainers of benchmarks/step.py, each as a function from arguments to measurements.

Prompts, lengths, rewards and settings are the same for both. Arguments are those of step.py: folder (of the
weights), device, dtype, prompts, generations, prompt, completion, beta, lora_r, micro_batch,
stop_check_steps, steps.
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
    """`count` different texts of exactly `length` tokens."""
    rng, texts = random.Random(seed), []
    while len(texts) < count:
        text = ""
        while len(tokenizer(text)["input_ids"]) < length:
            text += f" {rng.choice(WORDS)}" if text else rng.choice(WORDS)
        if len(tokenizer(text)["input_ids"]) == length:  # a word may be two tokens
            texts.append(text)
    return texts


def reward_of(ids: list[int]) -> float:
    """Some reward that differs within a group and needs no text."""
    return (sum(ids) % 97) / 96


def peak_gb(device: str) -> float:
    """The same as `grpo.run.build.peak_memory_gb`, which TRL's environment may lack."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def gemm_rate(dtype: torch.dtype, device: str, rounds: int = 7) -> float:
    """FLOP/s of a square matrix product of random numbers, the best of `rounds`."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = seconds({"mm": lambda: torch.mm(a, b)}, device, rounds=rounds)["mm"]
    return 2 * size**3 / min(times)


class Ours:
    """A sampler and a learner that share a model, and the two halves of a step."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import grpo_kernels

        from grpo import config as configuration
        from grpo.learner.learner import Learner
        from grpo.model import lora, weights
        from grpo.run import build
        from grpo.sampler.engine import Sampler

        build.keep_freed_memory()
        dtype = getattr(torch, arguments.dtype)
        model, tokenizer = weights.load(arguments.folder, dtype, arguments.device)
        config = configuration.Config(
            beta=arguments.beta,
            learning_rate=LEARNING_RATE,
            train_on="attempt",
            temperature=1.0,
            lr_scheduler_type="constant",
            max_completion_length=arguments.completion,
            warmup_steps=0,
        )
        if arguments.micro_batch:
            config.max_tokens_per_micro_batch = arguments.micro_batch
        reference = None
        if arguments.lora_r:
            lora.add(model, lora.fresh(model.config, r=arguments.lora_r, lora_alpha=config.lora_alpha))
            reference = model
        elif arguments.beta:
            reference, _ = weights.load(arguments.folder, dtype, arguments.device)
        kernels = grpo_kernels.backend(arguments.device)
        self.arguments = arguments
        self.learner = Learner(
            model,
            config,
            total_steps=arguments.steps + 1,
            reference=reference,
            kernels=kernels,
        )
        never = model.config.vocab_size  # a stop token that cannot be sampled
        rows = max(64, arguments.prompts * arguments.generations) if arguments.device == "cuda" else 64
        self.sampler = Sampler(
            model, stop_token_ids=[never], max_rows=rows, stop_check_steps=arguments.stop_check_steps
        )
        texts = prompt_texts(tokenizer, arguments.prompts, arguments.prompt, seed=0)
        self.prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]

    def rollout(self, step: int) -> list[Any]:
        """Episodes of one step."""
        from grpo.episode import Episode
        from grpo.sampler.engine import Row, Sample

        rows = [
            Row(
                prompt,
                [Sample(self.arguments.completion, key=(step, index, generation))],
                (index, generation),
            )
            for index, prompt in enumerate(self.prompts)
            for generation in range(self.arguments.generations)
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


def run_ours(arguments: argparse.Namespace) -> dict[str, Any]:
    ours = Ours(arguments)
    times: dict[str, list[float]] = {"rollout": [], "update": []}
    for step in range(arguments.steps + 1):
        start = time.perf_counter()
        episodes = ours.rollout(step)
        middle = time.perf_counter()
        ours.update(episodes)
        end = time.perf_counter()
        if step:
            times["rollout"].append(middle - start)
            times["update"].append(end - middle)
    peak = peak_gb(arguments.device)
    ours.sampler.cuda_graphs = False  # the counter does not see operations inside a graph
    done = {
        "rollout": sum(flops(lambda: ours.rollout(arguments.steps + 1)).values()),
        "update": sum(flops(lambda: ours.update(episodes)).values()),
    }
    rate = gemm_rate(getattr(torch, arguments.dtype), arguments.device)
    return {
        "seconds": [a + b for a, b in zip(times["rollout"], times["update"], strict=True)],
        "parts": times,
        "peak_gb": peak,
        "gemm_gflops": rate / 1e9,
        "flops": done,
        "share_of_gemm": {name: done[name] / statistics.median(times[name]) / rate for name in times},
    }


def profile(arguments: argparse.Namespace, rows: int = 20) -> str:
    """Where the time goes, by operation: the profiler's tables for rollout and update of a second step.

    Below each is the share of the wall-clock outside torch's operations: Python and the profiler itself.
    """
    ours = Ours(arguments)
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


def run_trl(arguments: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *args: Any, **options: Any) -> None:
            self.marks.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = prompt_texts(tokenizer, arguments.prompts, arguments.prompt, seed=0)
    sequences = arguments.prompts * arguments.generations
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        use_cpu=arguments.device == "cpu",
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": arguments.dtype},
        per_device_train_batch_size=sequences,
        num_generations=arguments.generations,
        max_completion_length=arguments.completion,
        generation_kwargs={"min_new_tokens": arguments.completion},
        beta=arguments.beta,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=arguments.steps + 1,
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_transformers_continuous_batching=arguments.engine == "trl-continuous",
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=str(arguments.folder),
        reward_funcs=lambda completion_ids, **_: [reward_of(ids) for ids in completion_ids],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts * (arguments.steps + 1)}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return {
        "seconds": [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)],
        "peak_gb": peak_gb(arguments.device),
    }
