"""Several ranks: exchanges, agreement, and results that do not depend on how many there are.

Each rank is a process of its own, with gloo on the loopback interface (tests/ranks.py).
"""

import copy
import math
import os
import random
from dataclasses import replace
from datetime import timedelta

import pytest
import tiny
import tiny_run
import torch
from ranks import together
from torch.distributed.tensor import DTensor

from grpo import distributed
from grpo.learner import sharded
from grpo.learner.learner import Learner, NonFiniteError
from grpo.model import lora
from grpo.run import checkpoint, inputs
from grpo.run.interrupts import Interrupted

SIZES = (1, 2, 3)
MODES = ("replicate", "fsdp")

# --- exchanges and agreement ------------------------------------------------------------------------------


def exchanged():
    rank = distributed.rank()
    return {
        "gathered": distributed.gather({"rank": rank, "text": "ü" * rank, "number": 0.1 + rank}),
        "odd numbers": distributed.gather([math.inf, -0.0]),
        "from rank 0": distributed.on_main(lambda: ["made by", distributed.rank()]),
        "sum": distributed.add_up(torch.tensor([1.0 + rank, 2.0])).tolist(),
        "dealt": distributed.deal([3, 1, 2, 2, 5]),
    }


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_get_the_same(size):
    first, *others = together(size, exchanged)
    assert all(repr(other) == repr(first) for other in others)
    expected = [{"rank": rank, "text": "ü" * rank, "number": 0.1 + rank} for rank in range(size)]
    assert first["gathered"] == expected and first["from rank 0"] == ["made by", 0]
    assert repr(first["odd numbers"]) == repr([[math.inf, -0.0]] * size)
    assert first["sum"] == [sum(1.0 + rank for rank in range(size)), 2.0 * size]
    assert sorted(index for hand in first["dealt"] for index in hand) == [0, 1, 2, 3, 4]


def test_each_rank_is_dealt_about_the_same_cost(monkeypatch):
    monkeypatch.setattr(distributed, "_size", 3)
    draw = random.Random(0)
    for _ in range(50):
        costs = [draw.randrange(1, 100) for _ in range(draw.randrange(1, 30))]
        hands = distributed.deal(costs)
        sums = [sum(costs[index] for index in hand) for hand in hands]
        assert sorted(index for hand in hands for index in hand) == list(range(len(costs)))
        assert max(sums) - min(sums) <= max(costs)  # moving one item more would not make them closer
    assert distributed.deal([]) == [[], [], []]


ERRORS = {
    "failed": lambda: ValueError("no such answer"),
    "interrupted": Interrupted,
    "exited": lambda: SystemExit(0),
    "nothing": lambda: None,
}


def ended(kind, place):
    """What the ranks raise where the rank `place` raises the error `kind`, and that they can go on."""
    raised, agreed = None, True
    try:
        with distributed.agreement():
            with distributed.agreement():  # an inner one changes nothing
                if distributed.rank() == place and (error := ERRORS[kind]()) is not None:
                    raise error
    except BaseException as caught:
        raised, agreed = f"{type(caught).__name__}: {caught}", distributed.agreed(caught)
    return raised, agreed, distributed.gather(distributed.rank())


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        ("failed", "ValueError: no such answer", "RankError: rank 1: ValueError: no such answer"),
        ("interrupted", "Interrupted: ", "RankStopped: rank 1: Interrupted: "),
        ("exited", "SystemExit: 0", "RankError: rank 1: SystemExit: 0"),
        ("nothing", None, None),
    ],
)
def test_all_ranks_leave_an_agreement_in_the_same_way(kind, own, others):
    results = together(3, ended, kind, 1)
    assert [raised for raised, _, _ in results] == [others, own, others]
    assert all(agreed and gathered == [0, 1, 2] for _, agreed, gathered in results)


def unequal(values):
    try:
        distributed.check_equal("settings", values[distributed.rank()])
    except ValueError as error:
        return str(error)


def test_ranks_with_other_settings_are_refused_on_every_rank():
    settings = [{"max_steps": 3, "seed": 1}, {"max_steps": 3, "seed": 1}, {"max_steps": 4, "seed": 1}]
    expected = "all ranks must have the same settings, but max_steps is 3 on rank 0 and 4 on rank 2"
    assert together(3, unequal, settings) == [expected] * 3
    assert together(3, unequal, settings[:1] * 3) == [None] * 3


def other_examples():
    parts = tiny.build()
    examples = parts.task.examples("train", 2 + distributed.rank() // 2)
    try:
        inputs.check_ranks(parts, examples)
    except ValueError as error:
        return str(error)


def test_ranks_with_other_examples_are_refused_on_every_rank():
    errors = together(3, other_examples)
    assert len(set(errors)) == 1 and "the same examples" in errors[0] and "on rank 2" in errors[0]


@pytest.mark.parametrize("missing", ["RANK", "rank 0"])
def test_a_rank_that_cannot_join_ends_with_one_line(monkeypatch, missing):
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "JOINING", timedelta(seconds=1))
    if missing == "RANK":
        monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit) as exit, distributed.joined():
        raise AssertionError("it joined")
    (line,) = str(exit.value.code).splitlines()
    rank, reason = ("?", "RANK expected") if missing == "RANK" else ("1", "127.0.0.1")
    assert line.startswith(f"error: rank {rank} cannot join the others (") and reason in line


def run_from(folders, argvs):
    """A run with a folder and arguments for each rank: its status, and what it wrote on standard error."""
    os.chdir(folders[distributed.rank()])
    done = tiny_run.run(argvs[distributed.rank()])
    return done.status, done.err


BAD_ON_RANK_1 = {  # folder and arguments of rank 1; status and beginning of the message of rank 0
    "an unknown option": (".", ["--no_such_option", "1"], 1, "error: rank 1: ValueError: "),
    "no such model there": ("runs", [], 1, "error: rank 1: FileNotFoundError: "),
    "another setting": (
        ".",
        ["--seed", "9"],
        2,
        "error: all ranks must have the same settings, but seed",
    ),
}


@pytest.mark.parametrize("case", BAD_ON_RANK_1)
def test_bad_input_on_one_rank_is_one_line_from_rank_0(tmp_path, case):
    folder, more, expected, line = BAD_ON_RANK_1[case]
    runs = tmp_path / "runs"
    runs.mkdir()
    tiny_run.save_model(tmp_path / "model")
    argv = tiny_run.arguments("model", runs)
    (status, err), other = together(2, run_from, [tmp_path, tmp_path / folder], [argv, argv + more])
    assert (status, other) == (expected, (2, "")) and err.startswith(line) and err.count("\n") == 1
    assert not list(runs.iterdir())


def run_that_breaks(argv, place):
    """A run whose second update raises on the rank `place`, where other ranks do not notice."""
    backward = Learner._backward

    def breaking(self, loss):
        if self.num_steps == 1 and distributed.rank() == place:
            raise MemoryError("no memory left")
        return backward(self, loss)

    Learner._backward = breaking
    distributed.time.sleep = lambda seconds: None
    done = tiny_run.run(argv)
    return done.status, done.err


@pytest.mark.parametrize("mode", MODES)
def test_an_error_on_one_rank_in_the_update_ends_all(tmp_path, mode):
    """With replicate all save the step before. With FSDP the others are in the middle of an exchange."""
    settings = {"parallel": mode, "save_steps": 0, "warm_start_steps": 0, "eval_steps": 0, "num_eval": 0}
    argv = tiny_run.arguments(tiny_run.save_model(tmp_path / "model"), tmp_path / "runs", **settings)
    (status, err), broken = together(2, run_that_breaks, argv, 1)
    reason = {
        "replicate": "rank 1: MemoryError: no memory left",
        "fsdp": "rank 0 lost contact with another rank",
    }
    assert status == 1 and broken == (1, "")
    assert err.strip().startswith(f"error: {reason[mode]}") and "--resume" in err
    assert checkpoint.steps(tmp_path / "runs/tiny-001") == ([1] if mode == "replicate" else [])


# --- gradients --------------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "small micro-batches": {"max_tokens_per_micro_batch": 60},
    "a KL penalty": {"beta": 0.1},
    "distilled retries": {"distill_retries": 0.5, "beta": 0.1, "max_tokens_per_micro_batch": 60},
    "distilled retries by sequence": {"distill_retries": 0.5, "loss_type": "grpo", "num_iterations": 2},
    "two updates": {"num_iterations": 2, "learning_rate": 1e-3},
    "all roles": {"train_on": "all", "max_tokens_per_micro_batch": 150},
    "sequence level": {"importance_sampling_level": "sequence"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "truncated ones masked": {"mask_truncated_completions": True},
    "scaled by the batch": {"scale_rewards": "batch"},
    "recomputed layers": {"gradient_checkpointing": True},
    "an untied output": {},
    "an adapter": {},
    "an adapter and a KL penalty": {"beta": 0.1},
    "an adapter and distilled retries": {"distill_retries": 0.5},
    # The cases below change the episodes.
    "groups in any order": {},
    "one group with a signal": {},
    "no signal at all": {},
    "distilled retries only": {"distill_retries": 0.5},
    "one group": {},
}


def changed(case, episodes):
    """The episodes of a case; the same ones serve all cases, whatever the policy."""
    episodes = copy.deepcopy(episodes)
    if case == "groups in any order":
        random.Random(1).shuffle(episodes)
    if case in ("one group with a signal", "no signal at all", "distilled retries only"):
        for episode in episodes:
            episode.reward = float(case[0] == "o" and episode.group_id == 1 and episode.generation == 0)
    return [e for e in episodes if e.group_id == 0] if case == "one group" else episodes


def stepped(mode):
    """Metrics and gradients of one step in float64, for each case."""
    results = {}
    sharding = mode == "fsdp" and distributed.size() > 1
    plain = tiny.build()
    episodes = tiny.episodes(plain)
    targets = tiny.targets(plain, episodes)
    assert len(targets) == 3
    untied = tiny.decoder(plain.model.config.vocab_size, tie_word_embeddings=False)
    for case, settings in CASES.items():
        model = copy.deepcopy(untied if case == "an untied output" else plain.model).double()
        if "adapter" in case:
            add_adapter(model)
        model = sharded.shard(model, dtype=torch.float64) if sharding else model
        config, reference = replace(plain.config, **settings), None
        if config.beta and "adapter" in case:
            reference = model  # without its adapter
        elif config.beta:
            reference = tiny.other_model(plain, torch.float64)
            if sharding:
                reference = sharded.shard(reference, dtype=torch.float64, trained=False)
        subject = tiny.learner(replace(plain, model=model, config=config), reference=reference)
        metrics = subject.step(changed(case, episodes), targets if config.distill_retries else ())
        if sharding and reference is not None:
            assert isinstance(reference.output_weight, DTensor), "the embeddings are still gathered"
        results[case] = metrics, whole_gradients(subject.optimizer)
    return results


def add_adapter(model):
    """An adapter that changes what the model computes."""
    adapter = lora.fresh(model.config, r=3, lora_alpha=6.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    random_b = {name: torch.randn(low.b.shape, generator=generator) * 0.05 for name, low in adapter.items()}
    lora.add(model, {name: low._replace(b=random_b[name]) for name, low in adapter.items()})


def whole_gradients(optimizer):
    """The gradients that the last step used, put together from the pieces of all ranks."""
    if distributed.size() == 1:
        return {name: gradient.flatten().tolist() for name, gradient in optimizer.gradients.items()}
    pieces = {name: master.grad.flatten().tolist() for name, master in optimizer.masters.items()}
    gathered = distributed.gather(pieces)
    return {name: [number for its in gathered for number in its[name]] for name in pieces}


@pytest.fixture(scope="module")
def one_rank():
    return together(1, stepped, "replicate")[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES[1:])
def test_gradients_and_metrics_do_not_depend_on_the_number_of_ranks(one_rank, size, mode):
    """More ranks than groups, and ranks without a signal, are among the cases."""
    first, *others = together(size, stepped, mode)
    assert all(other == first for other in others)
    for case, (metrics, gradients) in first.items():
        expected_metrics, expected = one_rank[case]
        for name, value in expected_metrics.items():
            rounding = 1e-5 if name.startswith("sampling/") else 1e-7  # the sampler computes in float32
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=rounding), (case, name)
        assert metrics.keys() == expected_metrics.keys() and gradients.keys() == expected.keys(), case
        flat = [torch.tensor([x for name in expected for x in its[name]]) for its in (gradients, expected)]
        difference, norm = (flat[0] - flat[1]).norm().item(), flat[1].norm().item()
        assert difference <= 1e-9 * norm, (case, difference, norm)
        assert (norm > 0) == (case != "no signal at all"), case


def stepped_four_weights():
    """One update of a model with four weights."""
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = sharded.adamw(model, betas=(0.9, 0.95), weight_decay=0.1)
    with optimizer.accumulation():
        model(torch.tensor([1.0, -2.0, 3.0, -4.0]) / distributed.size()).backward()
    norm = optimizer.reduce().item()
    optimizer.step(0.1)
    return norm, model.weight.tolist()


def test_a_rank_may_own_no_weight():
    """As with an adapter and hundreds of ranks: here the third rank owns none of the four."""
    (alone,), ranks = together(1, stepped_four_weights), together(3, stepped_four_weights)
    for norm, weights in ranks:
        assert norm == pytest.approx(alone[0]) and weights[0] == pytest.approx(alone[1][0])
    assert alone[1][0] != [1.0] * 4


# --- supervised steps, weights, bfloat16 ------------------------------------------------------------------


def trained(mode, dtype):
    """Weights after a supervised and two RL steps, as the sampler gets them; and the learner's own state."""
    sampled = tiny.build().model.to(dtype)
    parts = tiny.build(model=sampled, learning_rate=1e-3)
    model = sampled
    if mode == "fsdp" and distributed.size() > 1:
        model = sharded.shard(sampled, dtype=dtype)
    subject: Learner = tiny.learner(replace(parts, model=model))
    sequences = [([1 + i, 2, 3], [([4 + i, 5, 6], [True] * 3)]) for i in range(4)]
    episodes = tiny.episodes(parts)  # before the updates, whose rounding may change what is sampled
    losses = [subject.supervised_step(sequences, 1e-3)["loss"]]
    losses += [subject.step(episodes)["loss"] for _ in range(2)]
    subject.write_weights(sampled)
    return losses, {name: p.detach().double().flatten().tolist() for name, p in sampled.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_every_rank_samples_from_the_same_updated_weights(mode, dtype):
    ((alone, expected),) = together(1, trained, mode, dtype)
    first, *others = together(2, trained, mode, dtype)
    assert all(other == first for other in others)
    losses, weights = first
    assert losses == pytest.approx(alone, rel=1e-4 if dtype == torch.float32 else 0.1, abs=1e-4)
    apart = [abs(a - b) for name in expected for a, b in zip(weights[name], expected[name], strict=True)]
    # Three updates of at most 1e-3 each; AdamW's first ones take the sign of the gradient.
    assert sum(apart) / len(apart) < 1e-5 and max(apart) < (1e-3 if dtype == torch.float32 else 1e-2)


def poisoned(mode, place):
    """The error of a step whose loss is NaN on one rank, and whether the weights are still the same."""
    parts = tiny.build()
    model = parts.model
    if mode == "fsdp":
        model = sharded.shard(parts.model, dtype=torch.float32)
    loss = tiny.grpo_loss

    def nan_loss(*args, **options):
        value, metrics = loss(*args, **options)
        return value * (math.nan if distributed.rank() == place else 1.0), metrics

    subject = tiny.learner(replace(parts, model=model), grpo_loss=nan_loss)
    episodes = tiny.episodes(parts)
    masters = {name: master.clone() for name, master in subject.optimizer.masters.items()}
    try:
        subject.step(episodes)
    except NonFiniteError as error:
        same = all(torch.equal(masters[name], m) for name, m in subject.optimizer.masters.items())
        return str(error), same


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_nan_on_one_rank_stops_all_before_the_update(mode):
    for text, same in together(2, poisoned, mode, 1):
        assert same and "micro-batch 1 of" in text and "loss is nan" in text
        if mode == "replicate":  # with FSDP the NaN has reached the other rank's gradients
            assert "rank 1" in text
