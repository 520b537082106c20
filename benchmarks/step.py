"""One full GRPO step, ours against TRL's GRPOTrainer: rollout, reference log-probs, update.

    python benchmarks/step.py                                        4 prompts x 8 completions, bfloat16
    python benchmarks/step.py --dtype float32 --prompts 4 --prompt 349 --completion 64
    python benchmarks/step.py --engines ours trl --trl_python PATH   TRL in an environment of its own

Same weights, prompts, numbers of tokens, dtype, KL penalty and threads. No completion ends early, rewards
depend on the sampled tokens only, and nothing is logged or saved. Each engine is a process of its own, so
that its peak memory is its own: the resident memory of the process, Python and weights included. The first
step of each is not counted. Processes run one after the other, --rounds times over, so a slow minute can hit
one of them; look at the spread.

For ours the matrix products' FLOPs are counted by torch's counter, for rollout and update, and given as share
of the rate of a large square product measured in the same process. A counted FLOP is one that was done: the
prompts once per group, and no padding. Writes step.json to --output.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

ENGINES = {
    "ours": "Sampler and Learner",
    "trl": "GRPOTrainer",
    "trl-continuous": "GRPOTrainer, use_transformers_continuous_batching",
}
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


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def gemm_rate(dtype: Any, size: int = 2048, rounds: int = 7) -> float:
    """FLOP/s of a square matrix product, the best of some rounds."""
    import torch

    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def run_ours(own: argparse.Namespace) -> dict[str, Any]:
    import grpo_kernels
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from grpo import config as configuration
    from grpo import parts, weights
    from grpo.episode import Episode
    from grpo.learner import Learner
    from grpo.sampler import Row, Sample, Sampler

    parts.keep_freed_memory()
    dtype = getattr(torch, own.dtype)
    model, tokenizer = weights.load(own.folder, dtype)
    reference = weights.load(own.folder, dtype)[0] if own.beta else None
    config = configuration.Config(
        beta=own.beta,
        learning_rate=LEARNING_RATE,
        train_on="attempt",
        temperature=1.0,
        lr_scheduler_type="constant",
    )
    config.max_completion_length, config.warmup_steps = own.completion, 0
    if own.micro_batch:
        config.max_tokens_per_micro_batch = own.micro_batch
    kernels = grpo_kernels.backend("cpu")
    learner = Learner(
        model,
        config,
        linear_logprob=kernels.linear_logprob,
        grpo_loss=kernels.grpo_loss,
        group_advantage=kernels.group_advantage,
        total_steps=own.steps + 1,
        reference=reference,
    )
    sampler = Sampler(model, stop_token_ids=[model.config.vocab_size])  # one that cannot come
    prompts = [
        tuple(tokenizer(t)["input_ids"]) for t in prompt_texts(tokenizer, own.prompts, own.prompt, seed=0)
    ]

    def rollout(step: int) -> list[Episode]:
        rows = [
            Row(p, [Sample(own.completion, key=(step, i, g))], (i, g))
            for i, p in enumerate(prompts)
            for g in range(own.generations)
        ]
        episodes = []
        for finished in sampler.run(rows):
            (index, generation), turn = finished.row.tag, finished.turns[0]
            roles = ["attempt"] * len(turn.ids)
            prompt, reward = list(finished.row.prefix), reward_of(turn.ids)
            episodes.append(
                Episode(
                    str(index), index, generation, prompt, turn.ids, roles, turn.logprobs, "length", reward
                )
            )
        return episodes

    times: dict[str, list[float]] = {"rollout": [], "update": []}
    for step in range(own.steps + 1):
        start = time.perf_counter()
        episodes = rollout(step)
        middle = time.perf_counter()
        learner.step(episodes)
        end = time.perf_counter()
        if step:
            times["rollout"].append(middle - start)
            times["update"].append(end - middle)
    peak = peak_gb()
    flops = {}
    # Torch's counter leaves out the in-place product.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        episodes = rollout(own.steps + 1)
    flops["rollout"] = counter.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        learner.step(episodes)
    flops["update"] = counter.get_total_flops()
    rate = gemm_rate(dtype)
    shares = {name: flops[name] / statistics.median(times[name]) / rate for name in times}
    seconds = [a + b for a, b in zip(times["rollout"], times["update"], strict=True)]
    return {"seconds": seconds, "parts": times, "peak_gb": peak, "gemm_gflops": rate / 1e9} | {
        "flops": flops,
        "share_of_gemm": shares,
    }


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
        use_cpu=True,
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
        "peak_gb": peak_gb(),
    }


def run_engine(own: argparse.Namespace) -> int:
    import torch

    if own.threads:
        torch.set_num_threads(own.threads)
    result = run_ours(own) if own.engine == "ours" else run_trl(own)
    print(json.dumps(result))
    return 0


def measure(own: argparse.Namespace, argv: list[str], folder: str) -> tuple[dict[str, Any], dict[str, str]]:
    """engine -> its figures over all rounds, and for those that did not run why."""
    results: dict[str, list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    for _ in range(own.rounds):
        for engine in own.engines:
            if engine in absent:
                continue
            python = sys.executable if engine == "ours" or own.trl_python is None else str(own.trl_python)
            command = [python, __file__, *argv, "--engine", engine, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.strip().splitlines()
            if done.returncode or not lines:
                if engine == "ours":
                    raise RuntimeError(done.stderr)
                absent[engine] = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                continue
            results.setdefault(engine, []).append(json.loads(lines[-1]))
            latest = results[engine][-1]
            print(
                f"{engine}: {statistics.median(latest['seconds']):.2f} s a step, {latest['peak_gb']:.2f} GB",
                flush=True,
            )
    summary = {}
    for engine, rounds in results.items():
        seconds = [s for r in rounds for s in r["seconds"]]
        summary[engine] = {
            **rounds[-1],
            "seconds": seconds,
            "median": statistics.median(seconds),
            "peak_gb": max(r["peak_gb"] for r in rounds),
        }
    return summary, absent


def report(results: dict[str, Any], absent: dict[str, str]) -> str:
    lines = [
        "| engine | seconds a step | least | most | times ours | peak GB | times ours |",
        "|" + "---|" * 7,
    ]
    ours = results["ours"]
    for engine, figures in results.items():
        cells = [engine, f"{figures['median']:.2f}", f"{min(figures['seconds']):.2f}"]
        cells += [f"{max(figures['seconds']):.2f}", f"{figures['median'] / ours['median']:.2f}"]
        cells += [f"{figures['peak_gb']:.2f}", f"{figures['peak_gb'] / ours['peak_gb']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, flops in ours["flops"].items():
        seconds = statistics.median(ours["parts"][name])
        lines.append(
            f"ours, {name}: {seconds:.2f} s, {flops / 1e12:.2f} TFLOP, "
            f"{ours['share_of_gemm'][name]:.0%} of the {ours['gemm_gflops']:.0f} GFLOP/s of a large product"
        )
    lines += [f"absent: {name} ({ENGINES[name]}): {why}" for name, why in absent.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", default=None, help="folder, Hub id, file.gguf or package:... (default: the demo's)"
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="(default: all)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="(default: %(default)s)"
    )
    parser.add_argument("--prompts", type=int, default=4, help="prompts in a step (default: %(default)s)")
    parser.add_argument(
        "--generations", type=int, default=8, help="completions of each (default: %(default)s)"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument(
        "--completion", type=int, default=64, help="tokens of a completion (default: %(default)s)"
    )
    parser.add_argument("--beta", type=float, default=0.001, help="KL penalty (default: %(default)s)")
    parser.add_argument("--micro_batch", type=int, default=0, help="tokens of ours; 0: the preset's")
    parser.add_argument(
        "--steps", type=int, default=2, help="counted steps of a process (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="processes of each engine (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
    parser.add_argument("--trl_python", type=Path, help="interpreter of an environment that has TRL")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="(default: %(default)s)")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # one process's part
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    own = parser.parse_args(argv)
    for name in ("prompts", "prompt", "completion", "steps", "rounds"):
        if getattr(own, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(own, name)}")
    if own.generations < 2:
        parser.error(f"--generations must be at least 2, got {own.generations}")
    if "ours" not in own.engines:
        parser.error("--engines must name ours, which the others are compared with")
    if own.engine:
        return run_engine(own)

    import torch
    from _measure import machine

    from grpo import config as configuration
    from grpo import weights

    if own.threads:
        torch.set_num_threads(own.threads)
    where = machine("cpu")
    print(", ".join(f"{key}: {value}" for key, value in where.items()))
    model, tokenizer = weights.load(
        own.model or configuration.Config().model_name_or_path, getattr(torch, own.dtype)
    )
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        weights.save(model, tokenizer, folder, getattr(torch, own.dtype))
        del model
        results, absent = measure(own, sys.argv[1:] if argv is None else argv, folder)
    print(f"\n{report(results, absent)}")
    own.output.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(own).items() if isinstance(value, int | float | str)}
    content = {"machine": where, "settings": settings, "absent": absent, "engines": results}
    (own.output / "step.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {own.output / 'step.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
