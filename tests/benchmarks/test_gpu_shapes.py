"""benchmarks/gpu_shapes.py: its schedule is the sampler's, its counts are those of operations spelled out."""

import random
import sys
from collections import Counter
from pathlib import Path

import plain_varlen
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_shapes  # noqa: E402
from lib import launches  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from grpo import config as configuration  # noqa: E402
from grpo.learner.packing import pack_episodes  # noqa: E402
from grpo.model.decoder import Decoder, ModelConfig  # noqa: E402

RATES = launches.Rates(flops=1e12, bandwidth=1e9, smallest=1e-6)
SMALL = ["--groups_per_step", "2", "--num_generations", "2", "--max_rows", "4", "--num_examples", "4"]
SMALL += ["--max_reflection_length", "40", "--max_completion_length", "30", "--num_eval", "2"]


def test_a_small_run_prints_all_tables(capsys):
    assert gpu_shapes.main(["--models", "8B", "--rl_steps", "2", *SMALL]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line and line[0] not in "|"] == [
        "8B, sampler",
        "8B, learner",
        "Seconds of an RL step on an H100, computed, not measured; 8B with LoRA",
        "Before and after RL, 8B, computed",
    ]
    steps = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert steps.count("1") == steps.count("2") == 2 and {"8B", "failures"} <= set(steps)


def test_turns_end_where_they_were_drawn():
    longer = ["--max_reflection_length", "400", "--max_completion_length", "300"]
    config = configuration.parse(["--preset", "paper_countdown", *SMALL, *longer])
    rows = gpu_shapes.Workload(config, seed=1).rl_step()
    sampler = gpu_shapes.ScheduleSampler(config, gpu_shapes.Model("1.5B"))
    windows = sampler.schedule(rows)
    drawn = [item.key[0] for row in rows for item in row.script if isinstance(item, gpu_shapes.Sample)]
    assert sampler.stats["sampled_tokens"] == sum(drawn) and len(set(drawn)) > 4
    assert sampler.stats["decode_steps"] == sum(window.steps for window in windows)
    # Every feed is one row's stretch in one window, every prompt is taken in at least once.
    fed = [row for window in windows for row in window.rows if row.length > 1]
    assert len(fed) >= len(rows) and sum(len(window.prompts) for window in windows) >= 2
    assert sampler.recordings == len({w.attend.shape for w in windows if w.steps > w.eager})
    again = gpu_shapes.ScheduleSampler(config, gpu_shapes.Model("1.5B"))
    assert [w.attend.shape for w in again.schedule(rows)] == [w.attend.shape for w in windows]


@pytest.mark.skipif(not plain_varlen.REAL_FITS, reason="needs PyTorch 2.12 or newer")
def test_varlen_is_one_attention_call_per_layer():
    """In the learner, and in each forward pass of the sampler that takes in fed tokens or new prompts."""
    counts = {}
    for name in ("sdpa", "varlen"):
        config = configuration.parse(["--preset", "paper_countdown", *SMALL, "--attn_implementation", name])
        work, tables = gpu_shapes.Workload(config, seed=0), gpu_shapes.ModelTables(config, "1.5B")
        rows = work.rl_step()
        tables.step(rows, pack_episodes(work.episodes(rows), train_on="reflection", max_tokens=4096))
        counts[name] = tables.sampler[0], tables.learner[0]
    (sampled, learned), (_, plain) = counts["varlen"], counts["sdpa"]
    layers = tables.model.config.num_layers
    assert learned["attention"] == layers * learned["micro-batches"] < plain["attention"]
    assert learned["launches"] < plain["launches"] and learned["plans"] == 0 < plain["plans"]
    assert layers * max(sampled["fed"], sampled["prompts"]) <= sampled["attention"]
    assert sampled["attention"] <= layers * (sampled["fed"] + sampled["prompts"])


@pytest.mark.parametrize("preset, most", [("paper_countdown", 0), ("paper_function_calling", 12)])
def test_few_graphs_are_recorded_after_the_second_step(preset, most):
    """Of function calling, a prompt longer than all before may come later, and with it a new capacity."""
    config = configuration.parse(["--preset", preset])
    work = gpu_shapes.Workload(config, seed=0)
    sampler = gpu_shapes.ScheduleSampler(config, gpu_shapes.Model("1.5B"))
    recorded = []
    for rows in (work.first_tries(config.max_rows), *(work.rl_step() for _ in range(4))):
        before = sampler.recordings
        sampler.schedule(rows)
        recorded.append(sampler.recordings - before)
    assert 5 < recorded[1] < 20 and sum(recorded[3:]) <= most
    assert sampler.forgotten <= 1  # the first RL step needs more memory than the failures


def test_lengths_follow_their_distribution():
    rng = random.Random(0)
    lengths = gpu_shapes.Lengths(median=200, spread=0.5, least=20, most=600)
    drawn = sorted(lengths.draw(rng, limit=500) for _ in range(4000))
    assert drawn[0] >= 20 and drawn[-1] == 500
    assert drawn[2000] == pytest.approx(200, rel=0.05)
    assert drawn[3364] == pytest.approx(200 * 2.71828**0.5, rel=0.05)  # one standard deviation above


def test_operations_are_counted_as_cuda_would_launch_them():
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_hf(gpu_shapes.STAND_IN))
    x = torch.empty(4, 6, device="meta")
    q, k = (torch.empty(2, 3, n, 8, device="meta", dtype=torch.bfloat16) for n in (5, 7))
    mask, index = torch.empty(5, 7, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    assert not x.is_cuda
    with launches.launches(RATES, model, 5) as count:
        assert x.is_cuda and not count.kernels
        product = x @ x.clone().T
        product.view(-1).add_(1.0)
        assert F.rms_norm(x, (6,)).shape == x.shape
        assert F.scaled_dot_product_attention(q, k, k, attn_mask=mask).shape == q.shape
        x[index]
    assert count.kernels == 6 and count.attention == Counter({((2, 3, 5, 8), (2, 3, 7, 8), True): 1})
    # Elements read and written by copy, product, sum and normalisation; of attention; of the two rows read.
    elements = (24 + 24) + (24 + 24 + 16) + (16 + 16) + (24 + 24)
    assert count.bytes == 4 * elements + 2 * (2 * q.numel() + 2 * k.numel()) + 4 * (12 + 12)
    attention = 4 * 2 * 3 * 5 * 7 * 8  # two products
    assert count.flops == 2 * 4 * 4 * 6 + attention
    assert count.seconds == pytest.approx(5 * RATES.smallest + 2304 / RATES.bandwidth)  # attention: bytes


def test_one_layer_counts_as_many():
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_hf(gpu_shapes.STAND_IN))
    ids = torch.zeros(1, 3, dtype=torch.int64, device="meta")
    kernels = {}
    for layers in (1, 1, 2, 5):
        with torch.no_grad(), launches.launches(RATES, model, layers) as count:
            model(ids)
        assert sum(count.attention.values()) == layers
        kernels[layers] = count.kernels
    layer = kernels[2] - kernels[1]
    assert layer > 8 and kernels[5] == kernels[1] + 4 * layer


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rl_steps", "0"], "--rl_steps must be at least 1, got 0"),
        (["--models", "70B"], "invalid choice: '70B'"),
        (["--rl_step", "3"], "rl_step"),
        (["--task", "dataset"], "task must be one of countdown, function_calling"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_shapes.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
