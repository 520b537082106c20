"""Memory estimated by `python train.py --estimate` (grpo/run/estimate.py), next to memory that was counted.

    python benchmarks/estimate.py            a model of the demo's width, on this CPU, with one and two ranks
    python benchmarks/estimate.py --paper    the tables of docs/scale.md: the paper's models on GPUs of 80 GB

    estimate    GB, by the formulas
    allocated   GB, the peak of what PyTorch's allocator gave out (torch.profiler)
    tensors     GB, the peak of all tensors (torch.distributed._tools.mem_tracker), of the update only
    resident    GB, how much the process's peak grew, with the allocator's gaps; in a process without profiler

With two ranks, a figure is that of the rank with the most. Left out: GPUs, where kernels, CUDA graphs and
attention allocate otherwise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent  # no package
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "tests")]

from lib.measure import command_line, machine, markdown  # noqa: E402
from lib.memory import WORK, Case, allocated, resident, tracked  # noqa: E402
from lib.paper_models import PAPER_MODELS  # noqa: E402
from ranks import together  # noqa: E402

from grpo import config as configuration  # noqa: E402
from grpo.config import Config  # noqa: E402
from grpo.model.decoder import ModelConfig  # noqa: E402
from grpo.run import build, estimate  # noqa: E402

# --- counted on a CPU -----------------------------------------------------------------------------------

# SmolLM2-135M with fewer layers and tokens, so that a slow CPU needs few minutes
SIZES = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 16384,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
LENGTHS = estimate.Lengths(prompt=200, completion=60, trained=60, after=20)
GROUP = LENGTHS.prompt + 8 * (LENGTHS.completion - 1)  # tokens of a group's tree
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, checkpointing, beta 0": {"dtype": "bfloat16", "gradient_checkpointing": True, "beta": 0.0},
    "float32, 2 ranks, replicate": {"groups_per_step": 2},
    "float32, 2 ranks, fsdp": {"groups_per_step": 2, "parallel": "fsdp"},
}


def case(name: str) -> Case:
    """A rank has one group."""
    config = Config(
        device="cpu",
        dtype="float32",
        groups_per_step=1,
        max_rows=16,
        max_tokens_per_micro_batch=GROUP,
    )
    config = replace(config, **CASES[name])
    return Case(config, SIZES, LENGTHS, ranks=config.groups_per_step)


def on_ranks(name: str, work: str) -> int:
    """Bytes allocated for the settings `name`, on the rank with the most."""
    subject = case(name)
    return max(together(subject.ranks, allocated, subject, work))


def compare(name: str) -> list[dict[str, Any]]:
    """A row of the table for each kind of work; each measurement of resident memory is a process."""
    subject, rows = case(name), []
    for work, estimated in subject.estimates().items():
        counted = on_ranks(name, work)
        row = {"settings": name, "work": work, "estimate": estimated / 1e9, "allocated": counted / 1e9}
        row["ratio"] = estimated / counted
        if subject.ranks == 1:
            command = [sys.executable, __file__, "--resident", work, "--case", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row["resident"] = json.loads(done.stdout) / 1e9
            if work == "update":
                row["tensors"] = tracked(subject) / 1e9
        rows.append(row)
    return rows


# --- the paper's models ---------------------------------------------------------------------------------

CAPACITY = 80e9
GPUS = {1: "1 GPU", 2: "2 GPUs", 8: "8 GPUs"}
PRESETS = ("paper_countdown", "paper_function_calling")


def paper_table(preset: str) -> str:
    """Memory per GPU, and what to add to the command where it does not fit."""
    config = configuration.parse(["--preset", preset, "--device", "cuda", "--dtype", "bfloat16"])
    rows = []
    for name, sizes in PAPER_MODELS.items():
        model = ModelConfig.from_hf(sizes)
        row = {"model": name.rpartition("/")[2], "billions": estimate.parameters(model) / 1e9}
        rows.append(row | {label: paper_cell(config, model, ranks) for ranks, label in GPUS.items()})
    columns = [("model", "{}"), ("billions", "{:.2f}"), *((label, "{}") for label in GPUS.values())]
    return markdown(columns, rows)


def paper_cell(config: Config, model: ModelConfig, ranks: int) -> str:
    parallel = estimate.choose_parallel(config, model, ranks=ranks, capacity=CAPACITY)
    total = estimate.per_rank(config, model, ranks=ranks, parallel=parallel).total
    mode = f" {parallel}" if ranks > 1 else ""
    cell = f"{total / 1e9:.0f}{mode}"
    if total <= estimate.USABLE * CAPACITY:
        return cell
    found = estimate.changes_that_fit(config, model, ranks=ranks, capacity=CAPACITY)
    # Settings before more GPUs.
    change, less = min(found, key=lambda pair: "ranks" in pair[0])
    return f"{cell}: too much; {less / 1e9:.0f} with `{estimate.options(change)}`"


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--paper", action="store_true", help="print the tables of docs/scale.md and exit")
    parser.add_argument("--case", choices=CASES, help="only these settings (default: all)")
    parser.add_argument("--resident", choices=WORK, help="print the growth of resident memory, in bytes")
    arguments = parser.parse_args(argv)
    names = [arguments.case] if arguments.case else list(CASES)
    if arguments.paper:
        print("\n\n".join(f"`{preset}`, GB per GPU\n\n{paper_table(preset)}" for preset in PRESETS))
        return 0
    if arguments.resident:
        build.keep_freed_memory()  # as in a run
        subject = case(names[0])
        print(resident(lambda: subject.run(WORK[arguments.resident])))
        return 0
    print(", ".join(f"{key}: {value}" for key, value in machine("cpu").items()))
    rows = []
    for name in names:
        rows += compare(name)
        print(f"{name}: done", flush=True)
    columns = [("settings", "{}"), ("work", "{}")]
    columns += [(name, "{:.2f}") for name in ("estimate", "allocated", "tensors", "resident", "ratio")]
    print(markdown(columns, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
