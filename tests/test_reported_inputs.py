"""Inputs from public bug reports about trainers, engines and converters, and what happens to them here.

One test per report, named after the input; sections by kind. Inputs that benchmarks/fuzz.py found are in the
last section.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import tiny
import tiny_run
import torch

from grpo.loss import grpo_loss
from grpo.run import checkpoint
from grpo.tasks import Verdict
from grpo.tasks.contract import PROBES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.save_model(tmp_path_factory.mktemp("model"))


# --- 1. checkpoints tell other programs everything the run used --------------------------------------------

# --- 2. no library or default silently replaces something --------------------------------------------------

# --- 3. thinking models ------------------------------------------------------------------------------------

# --- 4. tags, tokens and text ------------------------------------------------------------------------------

# --- 5. state outside the settings -------------------------------------------------------------------------

# --- 6. RoPE that depends on the length --------------------------------------------------------------------

# --- 7. data without a right answer ------------------------------------------------------------------------

# --- 8. contracts with user code ---------------------------------------------------------------------------


class Graded(tiny.Toy):
    """A verifier that returns a score, as reward functions of other trainers do."""

    def verify(self, example, text):
        return 0.5


class Keyed(tiny.Toy):
    """Data with integer keys: JSON, and so a continued run, makes them strings."""

    def examples(self, split, count, offset=0):
        return [replace(e, data={1: e.data["i"]}) for e in super().examples(split, count, offset)]


class Leaving(tiny.Toy):
    """Calls sys.exit(0) in the second step."""

    calls = 0

    def verify(self, example, text):
        Leaving.calls += text not in PROBES
        if Leaving.calls == 8 + 12 + 5:
            sys.exit(0)
        return super().verify(example, text)


def started(model, tmp_path, **settings):
    quick = {"warm_start_steps": 0, "eval_steps": 0, "num_eval": 0, "num_examples": 8, "max_steps": 3}
    settings = {"beta": 0.0, "save_steps": 0, **quick, **settings}
    return tiny_run.run(tiny_run.arguments(model, tmp_path / "runs", **settings))


def test_a_verifier_that_returns_a_score_is_found_before_sampling(model, tmp_path):
    done = started(model, tmp_path, task="test_reported_inputs:Graded")
    assert done.status == 2 and done.err.count("\n") == 1
    assert (
        "task toy: verify must return a Verdict, such as Verdict('ok'), got 0.5 for example 'train-0'"
        in done.err
    )
    with pytest.raises(ValueError, match="reason must be 'ok' or a short code, got 0.5"):
        Verdict(0.5)


def test_data_that_json_changes_is_found_before_sampling(model, tmp_path):
    done = started(model, tmp_path, task="test_reported_inputs:Keyed")
    assert done.status == 2 and done.err.count("\n") == 1
    assert (
        "task toy: examples must give data that JSON keeps, got data with the key 1, of type int" in done.err
    )


def test_a_task_that_leaves_the_process_ends_no_run_with_status_0(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Leaving, "calls", 0)
    done = started(model, tmp_path, task="test_reported_inputs:Leaving")
    assert done.status == 1 and "sys.exit(0) was called" in done.err and "in verify" in done.err
    assert "--resume" in done.err.splitlines()[-1] and checkpoint.steps(done.folder) == [1]


# --- 9. editors and YAML -----------------------------------------------------------------------------------

# --- 10. finite gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "advantage", "delta"),
    [
        ((-1.0, -101.0, -1.0), 1.0, None),
        ((-1.0, -101.0, -1.0), -1.0, 4.0),
        ((-101.0, -101.0, -1.0), 1.0, None),
        ((-101.0, -1.0, -1.0), 1.0, None),
        ((-1.0, -math.inf, -math.inf), -1.0, None),
    ],
    ids=["old far below", "delta", "reference far above", "policy far below", "probability 0"],
)
def test_a_log_ratio_of_100_nats(columns, advantage, delta):
    """exp overflowed (TRL #3015): the loss was finite and its gradient NaN, or the KL was infinite."""
    logprobs, old, ref = (torch.tensor([x]) for x in columns)
    logprobs.requires_grad_()
    advantages, sequence_ids = torch.tensor([advantage]), torch.tensor([0])
    loss, metrics = grpo_loss(logprobs, old, ref, advantages, sequence_ids, delta=delta, beta=0.1)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite()
    assert metrics["ratio/mean"].isfinite() and metrics["kl"].isfinite()


# --- found by benchmarks/fuzz.py ---------------------------------------------------------------------------
