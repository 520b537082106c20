"""How our GRPO step grows: seconds and memory against each size, with the other sizes fixed.

    python benchmarks/scaling.py                                    group size, prompt and completion length
    python benchmarks/scaling.py --axes vocabulary model threads --dtype float32
    python benchmarks/scaling.py --axes generations --values 4 8 16 32 64
    python benchmarks/scaling.py --axes ranks          bytes that 1, 2 and 4 ranks exchange, and the formula
    python benchmarks/scaling.py --computed            a step on 8 to 1,024 GPUs, computed (lib/cluster.py)

Every point is a step of benchmarks/step.py in a separate process, with `beta` 0 and random weights. For each
axis the exponent b of seconds ~ size^b is fitted by least squares on the logarithms, over all points and over
the last two. 1 is linear; if both differ, the curve bends. Memory is the peak of the process, with weights
and optimiser, so its exponents show which share of it grows.

Writes scaling.json and scaling.png to --output, except with `--computed` and `--axes ranks`, which print.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

import step  # noqa: E402
import torch  # noqa: E402
from lib import traffic  # noqa: E402
from lib.cluster import step_time  # noqa: E402
from lib.measure import command_line, machine, markdown  # noqa: E402
from lib.paper_models import PAPER_MODELS  # noqa: E402

from grpo import config as configuration  # noqa: E402
from grpo.model import weights  # noqa: E402
from grpo.model.decoder import Decoder, ModelConfig  # noqa: E402

DEFAULTS: dict[str, int] = {"prompts": 4, "generations": 8, "prompt": 128, "completion": 32}
# SmolLM2-135M and 360M and Qwen2.5-0.5B, by their published configs
_LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "135M": {
        **_LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "360M": {
        **_LLAMA,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49152,
    },
    "0.5B": {
        **_LLAMA,
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}
AXES: dict[str, list[Any]] = {
    "generations": [4, 8, 16, 32],
    "prompt": [64, 128, 256, 512],
    "completion": [16, 32, 64, 128],
    "vocabulary": [49152, 151936],
    "model": list(MODELS),
    "threads": [1, 2],
}
PARTS = ("rollout", "update", "memory")


def save_random_model(config: dict[str, Any], tokenizer: Any, folder: Path, dtype: torch.dtype) -> int:
    """Saves random weights as a Hugging Face folder; returns the number of parameters."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig.from_hf(config)).to(dtype)
    model.source = weights.Source(config, {}, dtype)
    weights.save(model, tokenizer, folder, dtype)
    return sum(p.numel() for p in model.parameters())


def point(folder: Path, dtype: str, threads: int, steps: int, sizes: dict[str, int]) -> dict[str, float]:
    """Seconds of rollout and update, medians over the steps, and peak GB for one combination of sizes."""
    command = [sys.executable, step.__file__, "--engine", "ours", "--folder", str(folder), "--dtype", dtype]
    command += ["--device", "cpu", "--beta", "0", "--steps", str(steps), "--threads", str(threads)]
    for name, size in sizes.items():
        command += [f"--{name}", str(size)]
    measured = step.figures_of(command)
    times = {name: statistics.median(seconds) for name, seconds in measured["parts"].items()}
    return {**times, "memory": measured["peak_gb"]}


def exponent(sizes: list[float], values: list[float]) -> float:
    """Least-squares slope between the logarithms; NaN for a single point."""
    if len(sizes) < 2:
        return math.nan
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def fits(sizes: list[float], points: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The exponent of each part, over all points and over the last two."""
    series = {name: [p[name] for p in points] for name in PARTS}
    return {
        name: {"all": exponent(sizes, values), "last": exponent(sizes[-2:], values[-2:])}
        for name, values in series.items()
    }


def report(axis: str, labels: list[Any], points: list[dict[str, float]], fit: dict[str, Any]) -> str:
    lines = [f"| {axis} | rollout s | update s | peak GB |", "|" + "---|" * 4]
    for label, p in zip(labels, points, strict=True):
        lines.append(f"| {label} | {p['rollout']:.2f} | {p['update']:.2f} | {p['memory']:.2f} |")
    for which, text in (("all", "exponent"), ("last", "between the last two")):
        lines.append(f"| {text} | " + " | ".join(f"{fit[name][which]:.2f}" for name in PARTS) + " |")
    return "\n".join(lines)


def plot(file: Path, results: dict[str, Any]) -> str:
    """Draws seconds against size, a logarithmic panel per axis; returns the end of the line to print."""
    try:
        import matplotlib
    except ImportError:
        return " (no plot: matplotlib is not installed)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3.2), squeeze=False)
    for panel, (axis, result) in zip(axes[0], results.items(), strict=True):
        for name in ("rollout", "update"):
            panel.plot(result["sizes"], [p[name] for p in result["points"]], marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return f", {file.name}"


# --- computed -------------------------------------------------------------------------------------------

COMPUTED_MODELS = ("Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
COMPUTED_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
GROUPS_PER_GPU = 4  # of the second table: those of the preset on 8 GPUs


def computed(name: str, *, grow: bool) -> str:
    """A table of step times with `paper_countdown`.

    Args:
        grow: the batch grows with the GPUs; otherwise it stays the preset's.
    """
    preset = ["--preset", "paper_countdown", "--device", "cuda", "--dtype", "bfloat16"]
    config, model = configuration.parse(preset), ModelConfig.from_hf(PAPER_MODELS[name])
    first, rows = 0.0, []
    for ranks in COMPUTED_RANKS:
        groups = GROUPS_PER_GPU * ranks if grow else config.groups_per_step
        times = step_time(replace(config, groups_per_step=groups), model, ranks)
        rate = groups / times.step / ranks
        first = first or rate
        parts = {part: getattr(times, part) for part in ("rollout", "update", "exchange", "host", "step")}
        rows.append(
            {"GPUs": ranks, "groups": groups, "busy": times.busy, **parts, "efficiency": rate / first}
        )
    columns = [("GPUs", "{:,}"), ("groups", "{:,}"), ("busy", "{:,}")]
    columns += [(part, "{:.1f}") for part in ("rollout", "update", "exchange", "host", "step")]
    return markdown([*columns, ("efficiency", "{:.0%}")], rows)


def computed_report() -> str:
    parts = []
    for name in COMPUTED_MODELS:
        for grow, batch in ((False, "the preset's batch"), (True, f"{GROUPS_PER_GPU} groups per GPU")):
            parts.append(f"{name.rpartition('/')[2]}, {batch}, seconds, computed")
            parts.append(computed(name, grow=grow))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--computed", action="store_true", help="print the tables of docs/scale.md and exit")
    parser.add_argument(
        "--axes",
        nargs="+",
        choices=[*AXES, "ranks"],
        default=list(AXES)[:3],
        help="ranks: what ranks exchange, counted on a tiny model, alone (default: %(default)s)",
    )
    parser.add_argument(
        "--values", nargs="+", type=int, help="values of the only axis given, in rising order"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=1, help="counted steps of a point (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
    for name, size in DEFAULTS.items():
        parser.add_argument(
            f"--{name}", type=int, default=size, help="value on the other axes (default: %(default)s)"
        )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.computed:
        print(computed_report())
        return 0
    if arguments.axes == ["ranks"]:
        print(traffic.report(arguments.values or [1, 2, 4]))
        return 0
    if "ranks" in arguments.axes:
        parser.error(f"--axes takes ranks alone, got {' '.join(arguments.axes)}")
    if arguments.values and (
        len(arguments.axes) > 1
        or arguments.axes[0] == "model"
        or arguments.values != sorted(set(arguments.values))
    ):
        parser.error(
            "--values takes rising numbers for one axis other than model, "
            f"got {arguments.values} for {arguments.axes}"
        )
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    where = machine("cpu")
    print(", ".join(f"{key}: {value}" for key, value in where.items()))
    dtype = getattr(torch, arguments.dtype)
    _, tokenizer = weights.load(configuration.Config().model_name_or_path, dtype)
    fixed = {name: getattr(arguments, name) for name in DEFAULTS}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="scaling-") as temporary:
        folders: dict[str, tuple[Path, int]] = {}

        def model(name: str, config: dict[str, Any]) -> tuple[Path, int]:
            if name not in folders:
                folder = Path(temporary) / name
                folders[name] = folder, save_random_model(config, tokenizer, folder, dtype)
            return folders[name]

        for axis in arguments.axes:
            labels, points, sizes = arguments.values or AXES[axis], [], []
            for label in labels:
                name, config, threads, here = "135M", MODELS["135M"], arguments.threads, dict(fixed)
                if axis == "model":
                    name, config = label, MODELS[label]
                elif axis == "vocabulary":
                    name, config = f"vocabulary {label}", {**config, "vocab_size": label}
                elif axis == "threads":
                    threads = label
                else:
                    here[axis] = label
                folder, parameters = model(name, config)
                sizes.append(float(parameters if axis == "model" else label))
                points.append(point(folder, arguments.dtype, threads, arguments.steps, here))
            fit = fits(sizes, points)
            print(f"\n{report(axis, labels, points, fit)}", flush=True)
            results[axis] = {"labels": labels, "sizes": sizes, "points": points, "exponents": fit}
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {"machine": where, "dtype": arguments.dtype, "fixed": fixed, "axes": results}
    (arguments.output / "scaling.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {arguments.output / 'scaling.json'}{plot(arguments.output / 'scaling.png', results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
