"""Tokens per second of the sampler, of other engines, and of the linear layers alone, on the same weights.

    python benchmarks/rollout.py                                          64 rows, prompts of 128 tokens
    python benchmarks/rollout.py --rows 16 64 128 --prompts 64 128 384 1024 --new 32 128 256
    python benchmarks/rollout.py --scripts plain reflect --dtypes bfloat16 --peers ours generate

Workloads: `plain` samples one turn per row. `reflect` is the script of an episode: an attempt, fed tokens, a
reflection, fed tokens, a retry. 8 rows share a prompt. Rows end at lengths drawn beforehand, the same for all
engines, uniform from a quarter of --new to --new; tokens after a row's end do not count. Engines take turns
in each round; results are medians over the rounds.

`ceiling` is the share of our time that the linear layers alone take when replayed with the tokens of every
forward pass. `read` is the share that reading all weights once per forward pass takes at the memory bandwidth
measured here. Both are left out on a GPU, where Python would dominate the replay. Packages that are not
installed are listed as absent.

Writes rollout.json and rollout.csv to --output.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

import torch  # noqa: E402
from lib.measure import DTYPES, command_line, machine, markdown, ratio, seconds, summary, write_rows  # noqa: E402
from lib.rollouts import ABOUT, BUILDERS, Engine, LinearLayers, Workload, build  # noqa: E402

from grpo import config as configuration  # noqa: E402
from grpo.model import weights  # noqa: E402
from grpo.model.decoder import Decoder  # noqa: E402

SHARE = 8  # rows per prompt: num_generations of the demo
FED = 32  # tokens between two turns of `reflect`: a chat template's, and the request for a retry
ANSWER = 24  # most tokens of an answer
COLUMNS = [
    ("engine", "{}"),
    ("seconds", "{:.2f}"),
    ("low", "{:.2f}"),
    ("high", "{:.2f}"),
    ("tokens_per_second", "{:.0f}"),
    ("times_ours", "{:.2f}"),
    ("ceiling", "{:.0%}"),
    ("read", "{:.0%}"),
]


def workload(script: str, rows: int, prompt: int, new: int, vocab_size: int) -> Workload:
    long = (max(1, new // 4), new)
    answer = (ANSWER // 2, ANSWER)
    turns, feeds = ((long,), ()) if script == "plain" else ((answer, long, answer), (FED, FED))
    name = f"{script}, {rows} rows, prompt {prompt}, up to {new} new"
    return Workload.make(
        name, rows=rows, prompt=prompt, turns=turns, feeds=feeds, share=SHARE, vocab_size=vocab_size
    )


def bandwidth(device: str, megabytes: int = 512) -> float:
    """Bytes per second read from memory, measured by a sum over more data than the caches hold."""
    data = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    times = seconds({"read": lambda: data.sum()}, device, rounds=5)["read"]
    return data.nbytes / min(times)


def measure(
    work: Workload,
    engines: dict[str, Engine],
    model: Decoder,
    device: str,
    rounds: int,
    bytes_per_second: float,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each engine, and why other engines failed."""
    failed: dict[str, str] = {}
    linear = LinearLayers(model)
    calls = {}
    for name, run in engines.items():
        try:
            recorded = name == "ours" and device == "cpu"  # the layers inside a CUDA graph cannot be recorded
            sampled = linear.record(lambda r=run: r(work)) if recorded else run(work)
        except Exception as error:  # another engine's failure is a result, not the end of the benchmark
            if name == "ours":
                raise
            failed[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if sampled != work.num_sampled:
            failed[name] = f"sampled {sampled} tokens where {work.num_sampled} were asked for"
            continue
        calls[name] = lambda r=run: r(work)
    if linear.tokens:
        calls["linear"] = lambda: linear.replay(work.num_rows)
    times = seconds(calls, device, rounds=rounds)
    rows = []
    for name in calls:
        time = summary(times[name])
        row = {"workload": work.name, "engine": name, "seconds": time["median"], "low": time["low"]}
        row |= {"high": time["high"], "tokens_per_second": work.num_sampled / time["median"]}
        if "ours" in times:
            row["times_ours"] = ratio(times[name], times["ours"])
        if name == "ours" and linear.tokens:
            passes = len(linear.tokens)
            read = passes * sum(p.nbytes for p in model.parameters()) / bytes_per_second
            row |= {"ceiling": ratio(times["linear"], times["ours"]), "read": read / time["median"]}
            row |= {"passes": passes, "tokens": sum(linear.tokens)}
        rows.append(row)
    return rows, failed


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    demo = configuration.Config().model_name_or_path
    parser.add_argument(
        "--model", default=demo, help="folder, Hub id, file.gguf or package:... (default: %(default)s)"
    )
    parser.add_argument("--device", default=there, choices=["cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    parser.add_argument("--scripts", nargs="+", choices=["plain", "reflect"], default=["plain"])
    parser.add_argument("--rows", nargs="+", type=int, default=[64], help="(default: %(default)s)")
    parser.add_argument("--prompts", nargs="+", type=int, default=[128], help="tokens (default: %(default)s)")
    parser.add_argument(
        "--new", nargs="+", type=int, default=[64], help="most per turn (default: %(default)s)"
    )
    parser.add_argument("--stop_check_steps", type=int, default=1, help="of ours (default: %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=BUILDERS, default=list(BUILDERS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("rows", "prompts", "new", "rounds", "stop_check_steps"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = machine(arguments.device)
    speed = bandwidth(arguments.device)
    where["read_gb_per_second"] = round(speed / 1e9, 1)
    print(", ".join(f"{key}: {value}" for key, value in where.items()))
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for dtype in arguments.dtypes:
        model, tokenizer = weights.load(arguments.model, DTYPES[dtype], arguments.device)
        engines, why_not, folder = build(
            arguments.peers,
            model,
            tokenizer,
            DTYPES[dtype],
            arguments.device,
            max(arguments.rows),
            arguments.stop_check_steps,
        )
        absent |= why_not
        with folder:
            for script, count, prompt, new in (
                (s, r, p, n)
                for s in arguments.scripts
                for r in arguments.rows
                for p in arguments.prompts
                for n in arguments.new
            ):
                work = workload(script, count, prompt, new, model.config.vocab_size)
                measured, failed = measure(work, engines, model, arguments.device, arguments.rounds, speed)
                absent |= {f"{name} ({work.name}, {dtype})": why for name, why in failed.items()}
                print(
                    f"\n{work.name}, {dtype}: {work.num_sampled} tokens\n\n{markdown(COLUMNS, measured)}",
                    flush=True,
                )
                rows += [{"dtype": dtype, **row} for row in measured]
    print()
    for name, why in absent.items():
        about = ABOUT[name.partition(" ")[0]]
        print(f"absent: {name}: {about}: {why}")
    print(write_rows(arguments.output, "rollout", where, rows, absent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
