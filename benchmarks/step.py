"""One full GRPO step, ours against TRL's GRPOTrainer: rollout, reference log-probs, update.

    python benchmarks/step.py                                        4 prompts x 8 completions, bfloat16
    python benchmarks/step.py --dtype float32 --prompts 4 --prompt 349 --completion 64
    python benchmarks/step.py --engines ours trl --trl_python PATH   TRL in an environment of its own
    python benchmarks/step.py --device cuda --stop_check_steps 8 --micro_batch 32768

Weights, prompts, numbers of tokens, dtype, KL penalty and threads are the same. No completion ends early,
rewards depend only on the sampled tokens, and nothing is logged or saved. Each engine is a separate process,
so that its peak memory can be measured: the resident memory of the process, with Python and weights, or on a
GPU what PyTorch allocated there. The first step of each process is not counted. Processes run one after the
other, --rounds times, so a slow minute may hit only one of them: look at the spread.

For our engine torch's counter counts the FLOPs of the matrix products in rollout and update. The table gives
their rate as a share of the rate of a large square product in the same process. Only FLOPs that were computed
count: prompts once per group, and no padding. Writes step.json to --output. `--profile` prints the profiler's
tables of one rollout and one update instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

import torch  # noqa: E402
from lib.measure import command_line, hide_benchmarks, machine  # noqa: E402

ENGINES = {
    "ours": "Sampler and Learner",
    "trl": "GRPOTrainer",
    "trl-continuous": "GRPOTrainer, use_transformers_continuous_batching",
}


def figures_of(command: list[str]) -> dict[str, Any]:
    """What a process started with `--engine` prints last.

    Raises:
        RuntimeError: it failed, or printed nothing; the message contains the command and its error output.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise RuntimeError(f"{' '.join(command)}\n{said}")
    return json.loads(lines[-1])


def measure(
    arguments: argparse.Namespace, argv: list[str], folder: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """engine -> its results over all rounds, and why other engines did not run."""
    results: dict[str, list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    for _ in range(arguments.rounds):
        for engine in arguments.engines:
            if engine in absent:
                continue
            python = (
                sys.executable
                if engine == "ours" or arguments.trl_python is None
                else str(arguments.trl_python)
            )
            command = [python, __file__, *argv, "--engine", engine, "--folder", folder]
            try:
                latest = figures_of(command)
            except RuntimeError as error:  # another trainer's failure is a result
                if engine == "ours":
                    raise
                absent[engine] = str(error).splitlines()[-1]
                continue
            results.setdefault(engine, []).append(latest)
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
    parser = command_line(__file__, __doc__)
    parser.add_argument(
        "--model", default=None, help="folder, Hub id, file.gguf or package:... (default: the demo's)"
    )
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, choices=["cpu", "cuda"], help="(default: %(default)s)")
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
    parser.add_argument("--lora_r", type=int, default=0, help="rank of an adapter of ours; 0: all weights")
    parser.add_argument("--micro_batch", type=int, default=0, help="tokens of ours; 0: the preset's")
    parser.add_argument("--stop_check_steps", type=int, default=1, help="of ours (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=2, help="counted steps of a process (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="processes of each engine (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
    parser.add_argument("--trl_python", type=Path, help="interpreter of an environment that has TRL")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="(default: %(default)s)")
    parser.add_argument(
        "--profile", action="store_true", help="print where our time goes, by operation, and exit"
    )
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # one process's part
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in ("prompts", "prompt", "completion", "stop_check_steps", "steps", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.generations < 2:
        parser.error(f"--generations must be at least 2, got {arguments.generations}")
    if "ours" not in arguments.engines:
        parser.error("--engines must name ours, which the others are compared with")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.engine:  # TRL's environment may lack what is imported below
        from lib.steps import run_ours, run_trl

        hide_benchmarks()
        print(json.dumps(run_ours(arguments) if arguments.engine == "ours" else run_trl(arguments)))
        return 0

    from grpo import config as configuration
    from grpo.model import weights

    where = machine(arguments.device)
    print(", ".join(f"{key}: {value}" for key, value in where.items()))
    model, tokenizer = weights.load(
        arguments.model or configuration.Config().model_name_or_path, getattr(torch, arguments.dtype)
    )
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        weights.save(model, tokenizer, folder, getattr(torch, arguments.dtype))
        del model
        if arguments.profile:
            from lib.steps import profile

            arguments.folder = folder
            print(profile(arguments))
            return 0
        results, absent = measure(arguments, sys.argv[1:] if argv is None else argv, folder)
    print(f"\n{report(results, absent)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {
        name: value for name, value in vars(arguments).items() if isinstance(value, int | float | str)
    }
    content = {"machine": where, "settings": settings, "absent": absent, "engines": results}
    (arguments.output / "step.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {arguments.output / 'step.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
