"""kernels.py, roofline.py and others: implementations are measured and right, absent ones are named."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import checkpoint  # noqa: E402
import ranks_soak  # noqa: E402
import roofline  # noqa: E402
import tiles  # noqa: E402
from lib import candidates, measure, traffic  # noqa: E402

import kernels  # noqa: E402

# Those that compile take half a minute each; the benchmark itself runs them.
PEERS = ["ours", "reference", "eager", "chunked", "torch", "trl", "trl-chunked"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    sizes = ["--device", "cpu", "--sizes", "256x16x300", "24x8x40", "--rounds", "2", "--operations"]
    assert kernels.main([*sizes, "logprob", "grpo", "--peers", *PEERS, "--output", str(folder)]) == 0
    return folder, json.loads((folder / "kernels.json").read_text())


def test_every_implementation_is_measured_or_named_as_absent(measured):
    folder, content = measured
    for operation in kernels.OPERATIONS:
        there = {row["peer"] for row in content["rows"] if row["operation"] == operation}
        gone = {name.split("/")[1] for name in content["absent"] if name.startswith(operation)}
        assert there | gone == set(PEERS) and not there & gone
        assert {"ours", "eager", "chunked"} <= there and "reference" in gone
    with open(folder / "kernels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["rows"]) and {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert "threads" in content["machine"]


def test_what_is_timed_is_right(measured):
    """Also for the other libraries: a fast wrong answer would be no comparison."""
    for row in measured[1]["rows"]:
        bound = 1e-4 if row["dtype"] == "float32" else 0.05
        assert row["value_error"] < bound and row["hidden_error"] < bound and row["weight_error"] < bound, row
        assert 0 < row["both_low"] <= row["both_median"] <= row["both_high"]
        assert row["tflops"] == pytest.approx(6e-12 * row["m"] * row["h"] * row["v"] / row["both_median"])
        assert row["times_eager"] > 0 and (row["peer"] != "eager" or row["times_eager"] == 1)


def test_errors_are_measured_and_not_assumed():
    problem = candidates.Problem.make(64, 8, 40, torch.float32, "cpu")
    wrong = kernels.errors(
        "logprob", lambda p: 1.01 * candidates.eager_logprob(p.hidden, p.weight, p.ids), problem
    )
    assert all(value == pytest.approx(0.01, rel=1e-3) for value in wrong.values())


def test_peak_memory_counts_what_is_held_at_once():
    size = 1 << 20

    def call():
        first = torch.zeros(size, dtype=torch.uint8)
        del first
        second, third = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
        return second + third

    assert 3 * size <= measure.peak_bytes(call, "cpu") < 3.1 * size


def test_rounds_take_turns():
    order = []
    times = measure.seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", rounds=3)
    assert order == ["a", "b"] * 4 and [len(one) for one in times.values()] == [3, 3]
    assert measure.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sizes", "12x4"], "a size must be MxHxV"),
        (["--sizes", "0x4x4"], "must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--peers", "ligre"], "invalid choice: 'ligre'"),
        (["--speed", "fast"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        kernels.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_documentation_shows_what_roofline_computes(capsys):
    assert roofline.main([]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "docs/kernels.md").read_text(encoding="utf-8")


def test_roofline_formulas():
    """By hand for one token, a hidden size of 1 and a vocabulary of one chunk."""
    works = {work.name: work for work in roofline.kernels(1, 1, 4096)}
    assert works["forward"].flops == 2 * 4096 and works["forward"].bytes == 2 + 2 * 4096 + 16
    assert works["gradient"].bytes == 2 + 2 * 4096 + 2 * 4096
    assert (
        works["hidden"].bytes == 2 * 4096 + 2 * 4096 + 8 and works["weight"].bytes == 2 * 4096 + 2 + 2 * 4096
    )
    slow = roofline.Gpu("slow", peak=1e-9, bandwidth=1.0)
    assert works["forward"].bound(slow) == "compute" and works["combine"].bound(slow) == "memory"
    assert works["forward"].seconds(slow) == pytest.approx(2 * 4096 / 1e3)


def test_tiles_compare_with_the_present_one(monkeypatch, capsys):
    monkeypatch.setattr(tiles, "ROWS", (8, tiles.logprob.TILE_ROWS))
    monkeypatch.setattr(tiles, "ELEMENTS", (64, tiles.logprob.TILE_ELEMENTS))
    before = tiles.logprob.TILE_ROWS, tiles.logprob.TILE_ELEMENTS
    assert tiles.main(["--size", "24x8x40", "--rounds", "1"]) == 0
    assert (tiles.logprob.TILE_ROWS, tiles.logprob.TILE_ELEMENTS) == before
    out = capsys.readouterr().out
    assert out.count("(present) | 1.00 |") == 2 and out.count("| 8 rows, 64 elements |") == 2


def test_a_save_is_measured(tmp_path, capsys):
    assert checkpoint.main(["--gb", "0.01", "--folder", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.match(r"0.193 GB: save returns after ([\d.]+) s, it is complete after ([\d.]+) s; 0.", line)
    assert found and float(found[1]) < float(found[2])
    assert not list(tmp_path.iterdir())


def test_killed_ranks_lose_nothing(capsys):
    assert ranks_soak.main(["--kills", "1", "--sizes", "2", "--modes", "fsdp"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| rollout \| 1 \| [\d.]+ \| 0 \| 0 \|", out)


@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
def test_bytes_that_ranks_exchange_are_those_of_the_formula(mode):
    for its in traffic.together(2, traffic.measured, mode, "bfloat16", 60):
        assert mode == "replicate" or its["passes"] > 1
        assert its["gathered"] == its["gathered by formula"] > 0
        assert its["summed"] == its["summed by formula"] > 0
