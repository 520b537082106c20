"""The compiled kernels, without a GPU: no spills, no float64, and products on the matrix units."""

import json
import os
import subprocess
import sys

import pytest
from grpo_kernels import compile_report, config

MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
PRODUCTS = ["forward", "gradient", "hidden", "weight"]
DESCRIPTORS = [f"{name}, TMA" for name in PRODUCTS]
# Every kernel for one target of each vendor; for the newer ones what only they have: tiles by descriptor.
# `python -m grpo_kernels.compile_report` compiles every kernel for every target, which takes minutes.
ALL = ["--dtypes", "bf16", "fp32"]
BY_DESCRIPTOR = ["--dtypes", "bf16", "--kernels", *DESCRIPTORS]
CHOSEN = {"sm_80": ALL, "sm_90": BY_DESCRIPTOR, "sm_100": BY_DESCRIPTOR, "gfx942": ALL}


def run(*arguments):
    """Runs the report in a new process: this one interprets Triton, and a process cannot do both."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "grpo_kernels.compile_report", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("target", CHOSEN)
def test_no_spills_no_float64_and_matrix_units(target, tmp_path):
    """Lesson 5: a Python scalar that the compiler made float64 would show as .f64."""
    path = tmp_path / "report.json"
    done = run("--targets", target, *CHOSEN[target], "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert len(done.stdout.splitlines()) == len(rows) + 1
    for row in rows:
        assert row["spilled"] == 0 and not row["float64"], row
        assert 0 < row["registers"] <= 512 and 0 < row["occupancy"] <= 1, row
        if row["dtype"] == "bf16" and row["kernel"].removesuffix(", TMA") in PRODUCTS:
            assert row["matrix"] == MATRIX[target], row
    kernels = {row["kernel"] for row in rows}
    if CHOSEN[target] is ALL:
        assert kernels >= {*PRODUCTS, "loss, sequence level", "advantage", "combine"}
        assert not kernels & set(DESCRIPTORS)
    else:
        assert kernels == set(DESCRIPTORS)


@pytest.mark.skipif(not config.INTERPRETED, reason="this process does not interpret Triton")
def test_the_interpreter_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_report.main([])
    assert "TRITON_INTERPRET must not be set" in capsys.readouterr().err


def test_an_unknown_target_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_report.main(["--targets", "sm_70"])
    told = capsys.readouterr().err
    assert "sm_70" in told and "sm_90" in told
