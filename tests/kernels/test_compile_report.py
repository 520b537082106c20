"""The compiled kernels, without a GPU: no spills, no float64, and products on the matrix units."""

import json
import os
import subprocess
import sys

import pytest

TARGETS = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
PRODUCTS = {"forward", "gradient", "hidden", "weight"}


def run(*arguments, **environment):
    """Runs the report in a new process: this one interprets Triton, and a process cannot do both."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "grpo_kernels.compile_report", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module", params=TARGETS)
def rows(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.json"
    done = run("--targets", request.param, "--dtypes", "bf16", "fp32", "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert len(done.stdout.splitlines()) == len(rows) + 1
    return rows


def test_no_spills_no_float64_and_matrix_units(rows):
    """Lesson 5: a Python scalar that the compiler made float64 would show as .f64."""
    assert {row["kernel"] for row in rows} >= PRODUCTS | {"loss, sequence level", "advantage", "combine"}
    descriptors = {row["kernel"] for row in rows if row["kernel"].endswith(", TMA")}
    assert len(descriptors) == (4 if rows[0]["target"] in ("sm_90", "sm_100") else 0)
    for row in rows:
        assert row["spilled"] == 0 and not row["float64"], row
        assert 0 < row["registers"] <= 512 and 0 < row["occupancy"] <= 1, row
        if row["dtype"] == "bf16" and row["kernel"].removesuffix(", TMA") in PRODUCTS:
            assert row["matrix"] == TARGETS[row["target"]], row


def test_the_interpreter_is_refused():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET must not be set" in done.stderr


def test_an_unknown_target_is_named():
    done = run("--targets", "sm_70")
    assert done.returncode == 2 and "sm_70" in done.stderr and "sm_90" in done.stderr
