"""Nothing depends on the micro-batch split, a restored run is the same run, a broken update is not taken."""

import copy
import math
import random
from types import SimpleNamespace

import plain_varlen
import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.advantage import group_advantage
from grpo.episode import Episode, episode_metrics
from grpo.learner import tree_attention
from grpo.learner.learner import Learner, NonFiniteError
from grpo.learner.optimizer import MasterAdamW, scheduled_learning_rate
from grpo.learner.packing import pack_episodes
from grpo.learner.tree_attention import tree_attend
from grpo.logprob import linear_logprob
from grpo.loss import grpo_loss
from grpo.model.decoder import Decoder, ModelConfig

VOCAB = 29
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def config(**changes) -> SimpleNamespace:
    values = dict(
        train_on="reflection",
        temperature=0.9,
        max_reflection_length=8,
        max_completion_length=6,
        mask_truncated_completions=False,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        adam_beta1=0.9,
        adam_beta2=0.99,
        max_grad_norm=1e9,
        beta=0.05,
        epsilon=0.2,
        epsilon_high=None,
        delta=None,
        loss_type="dapo",
        importance_sampling_level="token",
        scale_rewards="group",
        use_bias_correction_kl=True,
        num_iterations=1,
        max_tokens_per_micro_batch=10_000,
        gradient_checkpointing=False,
        distill_retries=0.0,
        attn_implementation="auto",
    )
    assert changes.keys() <= values.keys()
    return SimpleNamespace(**{**values, **changes})


def decoder(dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(ModelConfig.from_hf(HF_CONFIG))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # far from uniform, so that every term matters
    return model.to(dtype)


def learner(
    settings: SimpleNamespace | None = None, dtype: torch.dtype = torch.float32, **functions
) -> Learner:
    kernels = {"linear_logprob": linear_logprob, "grpo_loss": grpo_loss, "group_advantage": group_advantage}
    return Learner(
        decoder(dtype),
        settings or config(),
        total_steps=20,
        reference=decoder(dtype, seed=1),
        kernels=SimpleNamespace(**{**kernels, **functions}),
    )


def episodes(seed: int = 0, groups: int = 5, rewards: tuple[float, ...] | None = None) -> list[Episode]:
    """Groups of three with reflection, context and retry tokens; some end at the length limit."""
    rng = random.Random(seed)
    result = []
    for group in range(groups):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 6))]
        for generation in range(3):
            roles = ["reflection"] * rng.randint(2, 7) + ["context"] * 2 + ["retry"] * rng.randint(1, 4)
            result.append(
                Episode(
                    example_id=str(group),
                    group_id=7 * group,
                    generation=generation,
                    prompt_ids=prompt,
                    completion_ids=[rng.randrange(VOCAB) for _ in roles],
                    roles=roles,
                    logprobs=[0.0 if role == "context" else rng.uniform(-4, -2) for role in roles],
                    finish_reason=rng.choice(["stop", "stop", "length"]),
                    reward=rewards[generation] if rewards else rng.choice([0.0, 0.5, 1.0]),
                )
            )
    return result


def max_tokens_for(count: int, batch: list[Episode], train_on: str) -> int:
    return next(
        m for m in range(400, 0, -1) if len(pack_episodes(batch, train_on=train_on, max_tokens=m)) == count
    )


def snapshot(subject: Learner) -> dict[str, Tensor]:
    """All that training changes: masters, moments and the model's own weights."""
    weights = {f"model.{name}": p for name, p in subject.model.named_parameters()}
    return {name: t.detach().clone() for name, t in {**subject.state()[0], **weights}.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


# --- micro-batches

LOSSES = [
    {},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    {"loss_type": "cispo", "epsilon_high": 5.0, "scale_rewards": "batch"},
    {"mask_truncated_completions": True, "train_on": "all"},
    {"num_iterations": 2, "loss_type": "bnpo"},
    {"gradient_checkpointing": True},
]


@pytest.mark.parametrize("changes", LOSSES)
def test_gradients_and_metrics_do_not_depend_on_the_split(changes):
    batch = episodes()
    settings = config(**changes)
    expected = learner(settings, torch.float64)
    metrics = expected.step(batch)
    assert metrics["grad_norm"] > 1e-3
    for count in (2, 7):
        tokens = max_tokens_for(count, batch, settings.train_on)
        split = learner(config(**changes, max_tokens_per_micro_batch=tokens), torch.float64)
        split_metrics = split.step(batch)
        for name, gradient in expected.optimizer.gradients.items():
            torch.testing.assert_close(split.optimizer.gradients[name], gradient, rtol=1e-9, atol=1e-12)
        assert split_metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            # grpo_loss and the sampler's log-probs are float32 in part, whatever the model is.
            assert split_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_bfloat16_gradients_are_summed_in_float32():
    """Summed in bfloat16, seven micro-batches would be off by up to 7 * 2**-9 of the largest partial sum."""
    batch = episodes()
    partial: list[dict[str, Tensor]] = []
    tokens = max_tokens_for(7, batch, "reflection")
    subject = learner(config(max_tokens_per_micro_batch=tokens), torch.bfloat16)
    current: dict[str, Tensor] = {}
    for name, parameter in subject.model.named_parameters():
        # Tensor hooks see the gradient before it is accumulated.
        parameter.register_hook(lambda grad, name=name: partial.append({name: grad.float()}))
    subject.step(batch)
    for part in partial:
        for name, gradient in part.items():
            current[name] = current[name] + gradient if name in current else gradient
    for name, gradient in subject.optimizer.gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, current[name])
        assert subject.optimizer.parameters[name].grad is None


def test_episodes_without_a_signal_are_left_out_exactly():
    """beta = 0: the same gradient as with every episode in the batch, and their tokens in the denominator."""
    batch = episodes(rewards=(0.0, 0.5, 1.0)) + [
        Episode("x", 99, i, [1, 2], [3, 4, 5], ["reflection"] * 3, [-3.0] * 3, "stop", 1.0) for i in range(2)
    ]
    seen = []

    def recording_loss(*args, **options):
        seen.append(options["num_loss_tokens"])
        return grpo_loss(*args, **options)

    subject = learner(config(beta=0.0), torch.float64, grpo_loss=recording_loss)
    model = copy.deepcopy(subject.model)
    subject.step(batch)
    assert seen == [sum(sum(e.loss_mask("reflection")) for e in batch)]
    assert episode_metrics(batch, "reflection")["frac_reward_zero_std"] == pytest.approx(1 / 6)

    everything = pack_episodes(batch, train_on="reflection", max_tokens=10_000)[0]
    attend = tree_attend(everything.trees, model.config.windows)
    hidden = model(everything.input_ids, everything.position_ids, attend=attend)[0]
    logprobs, _ = linear_logprob(
        hidden[everything.select], model.output_weight, everything.ids, temperature=0.9
    )
    advantages = torch.tensor([e.advantage for e in batch])
    logprobs = everything.per_token(logprobs)
    loss, _ = grpo_loss(logprobs, None, None, advantages, everything.sequence_ids, beta=0.0)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(subject.optimizer.gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_a_step_without_any_signal(beta):
    subject = learner(config(beta=beta))
    subject.step(episodes(seed=1))
    batch = episodes(rewards=(1.0, 1.0, 1.0))
    metrics = subject.step(batch)
    rewards = episode_metrics(batch, "reflection")
    assert rewards["frac_reward_zero_std"] == 1.0 and rewards["reward_std"] == 0.0
    assert (metrics["grad_norm"] == 0.0) == (beta == 0.0)
    assert ("entropy" in metrics) == (beta > 0)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_varlen_attention_gives_the_same_update(window, gradient_checkpointing, monkeypatch):
    """With torch's varlen_attn emulated: everything up to that call is what runs on CUDA."""
    for name, value in {"model_type": "mistral", "sliding_window": window}.items():
        monkeypatch.setitem(HF_CONFIG, name, value)
    calls = plain_varlen.install(monkeypatch)
    settings = dict(
        gradient_checkpointing=gradient_checkpointing, num_iterations=2, max_tokens_per_micro_batch=40
    )
    plain, subject = (
        learner(config(attn_implementation=name, **settings), torch.float64) for name in ("sdpa", "varlen")
    )
    transcripts = [([1, 2, 3], [([4, 5, 6], [True] * 3), ([4, 7], [False, True])])]
    for update in (lambda x: x.step(episodes()), lambda x: x.supervised_step(transcripts, 1e-3)):
        expected = update(plain)
        assert not calls
        assert update(subject) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for name, gradient in plain.optimizer.gradients.items():
            torch.testing.assert_close(subject.optimizer.gradients[name], gradient, rtol=1e-6, atol=1e-9)
        assert {before for _, (before, after) in calls} == {-1 if window is None else window - 1}
        calls.clear()


# --- masks


def test_only_tokens_of_trained_roles_matter():
    first, second = learner(), learner()
    poisoned = episodes()
    for episode in poisoned:
        for i, role in enumerate(episode.roles):
            if role != "reflection":  # they come after the reflection, which cannot see them
                episode.completion_ids[i], episode.logprobs[i] = 0, math.nan
    metrics, poisoned_metrics = first.step(episodes()), second.step(poisoned)
    assert metrics == poisoned_metrics
    assert_same(snapshot(second), snapshot(first))


def test_truncated_completions_leave_loss_and_denominator():
    """Their tokens do not matter; they still count as sequences and in their group's mean."""
    settings = config(mask_truncated_completions=True)
    batch = episodes()
    changed = episodes()
    for episode in changed:
        if episode.finish_reason == "length":
            episode.completion_ids = [(i + 1) % VOCAB for i in episode.completion_ids]
    first, second = learner(settings), learner(settings)
    first.step(batch)
    second.step(changed)
    assert 0 < sum(e.finish_reason == "length" for e in batch) < len(batch)
    assert_same(snapshot(second), snapshot(first))


def test_all_completions_truncated():
    batch = episodes()
    for episode in batch:
        episode.finish_reason = "length"
    metrics = learner(config(mask_truncated_completions=True)).step(batch)
    assert metrics["loss"] == metrics["grad_norm"] == 0.0
    assert episode_metrics(batch, "reflection")["completions/clipped_ratio"] == 1.0


# --- log-probs


def test_sampler_difference_is_taken_at_the_temperature():
    subject = learner(config(temperature=0.6))
    batch = episodes()
    for episode in batch:
        ids = torch.tensor([episode.prompt_ids + episode.completion_ids])
        logits = subject.model.logits(subject.model(ids))[0, len(episode.prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits / 0.6, -1)
        chosen = logprobs[range(len(episode.completion_ids)), episode.completion_ids]
        episode.logprobs = [x + 0.25 * (episode is batch[0]) for x in chosen.tolist()]
    metrics = subject.step(batch)
    first, total = (sum(sum(e.loss_mask("reflection")) for e in part) for part in (batch[:1], batch))
    name = "sampling/sampling_logp_difference"
    assert metrics[f"{name}/max"] == pytest.approx(0.25, abs=1e-4)
    assert metrics[f"{name}/mean"] == pytest.approx(0.25 * first / total, abs=1e-5)


@pytest.mark.parametrize("max_tokens", [2048, 40])
def test_the_sampler_difference_of_each_turn_where_several_are_trained(max_tokens):
    parts = tiny.build(train_on="all", max_tokens_per_micro_batch=max_tokens)
    batch = tiny.episodes(parts)
    off = {"reflection": 0.25, "retry": 0.5}
    batch[2].logprobs = [
        x + off.get(role, 0.0) for x, role in zip(batch[2].logprobs, batch[2].roles, strict=True)
    ]
    metrics, _, _ = tiny.update(parts, batch, beta=0.1)
    name = "sampling/sampling_logp_difference"
    counts = {role: sum(e.roles.count(role) for e in batch) for role in off}
    for role, value in off.items():
        assert metrics[f"{name}/{role}/max"] == pytest.approx(value, abs=1e-4)
        expected = value * batch[2].roles.count(role) / counts[role]
        assert metrics[f"{name}/{role}/mean"] == pytest.approx(expected, abs=1e-5)
    both = sum(metrics[f"{name}/{role}/mean"] * count for role, count in counts.items())
    assert metrics[f"{name}/mean"] == pytest.approx(both / sum(counts.values()))
    assert metrics[f"{name}/max"] == metrics[f"{name}/retry/max"]
    one_turn, _, _ = tiny.update(parts, batch, beta=0.1, train_on="reflection")
    assert one_turn[f"{name}/mean"] == pytest.approx(metrics[f"{name}/reflection/mean"], abs=1e-5)
    assert not [key for key in one_turn if "reflection" in key or "retry" in key]


def test_old_log_probs_stay_those_before_the_first_update():
    calls = []

    def recording_loss(logprobs, old, ref, *args, **options):
        calls.append((logprobs.detach().clone(), old, ref))
        return grpo_loss(logprobs, old, ref, *args, **options)

    learner(grpo_loss=recording_loss).step(episodes())
    assert calls[0][1] is None
    calls.clear()
    learner(config(num_iterations=3), grpo_loss=recording_loss).step(episodes())
    assert len(calls) == 3
    for _, old, ref in calls:
        torch.testing.assert_close(old, calls[0][0], rtol=0, atol=1e-6)
        assert torch.equal(ref, calls[0][2]) and not old.requires_grad and not ref.requires_grad
    assert not torch.equal(calls[1][0], calls[0][0])


def test_kl_is_measured_against_the_reference():
    subject = learner()
    subject.reference = copy.deepcopy(subject.model)
    batch = episodes()
    assert subject.step(batch)["kl"] == pytest.approx(0.0, abs=1e-9)
    assert subject.step(batch)["kl"] > 1e-9


def test_steps_raise_the_probability_of_what_was_rewarded():
    subject = learner(config(beta=0.0, learning_rate=1e-2, temperature=1.0))
    batch = [
        Episode("a", 0, i, [1, 2, 3], [4 + i], ["reflection"], [-3.0], "stop", float(i == 2))
        for i in range(4)
    ]

    def probability() -> float:
        return torch.softmax(subject.model.logits(subject.model(torch.tensor([[1, 2, 3]])))[0, -1], -1)[
            6
        ].item()

    before = probability()
    for _ in range(5):
        subject.step(batch)
    assert probability() > 2 * before


def test_advantages_are_set_and_rewards_kept():
    batch = episodes(rewards=(0.0, 1.0, 1.0))
    metrics = learner(config(scale_rewards="none")).step(batch)
    assert [e.advantage for e in batch[:3]] == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    assert [e.reward for e in batch[:3]] == [0.0, 1.0, 1.0]
    metrics |= episode_metrics(batch, "reflection")
    assert metrics["reward"] == pytest.approx(2 / 3) and metrics["reward_std"] == pytest.approx(3**-0.5)
    assert metrics["num_tokens"] == sum(len(e.prompt_ids) + len(e.completion_ids) for e in batch)


# --- exact resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "max_tokens_per_micro_batch": 40}])
def test_a_restored_run_is_the_same_run(dtype, changes):
    whole = learner(config(**changes), dtype)
    reference = [whole.step(episodes(seed)) for seed in range(6)]

    first = learner(config(**changes), dtype)
    for seed in range(3):
        first.step(episodes(seed))
    tensors, counters = first.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())

    second = learner(config(**changes), dtype)
    second.step(episodes(9))  # whatever it was before
    second.load_state(tensors, counters)
    assert [second.step(episodes(seed)) for seed in range(3, 6)] == reference[3:]
    assert_same(snapshot(second), snapshot(whole))


def test_state_before_the_first_step():
    first, second = learner(), learner()
    second.step(episodes())
    second.load_state(*first.state())
    first.step(episodes(3))
    second.step(episodes(3))
    assert_same(snapshot(second), snapshot(first))


def test_a_state_that_does_not_fit_changes_nothing():
    subject = learner()
    subject.step(episodes())
    tensors, counters = subject.state()
    before = snapshot(subject)
    name = next(iter(tensors))
    for broken in (
        {key: value for key, value in tensors.items() if key != name},
        {**tensors, "master.other": tensors[name]},
        {**tensors, name: torch.zeros(3)},
    ):
        with pytest.raises(ValueError, match="master"):
            subject.load_state(broken, counters)
        assert_same(snapshot(subject), before)


# --- updates that fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_broken_update_is_not_taken(kind, dtype):
    """NaN in the second micro-batch: an error that says so, and the run can go on as if nothing had been."""
    broken = False
    calls = 0

    def fragile_loss(logprobs, *args, **options):
        nonlocal calls
        loss, metrics = grpo_loss(logprobs, *args, **options)
        calls += 1
        if broken and calls == 2:
            if kind == "loss":
                return loss * math.nan, metrics
            # The gradient of sqrt at 0 is infinite.
            return loss + (logprobs - logprobs.detach()).abs().sqrt().sum() * 0, metrics
        return loss, metrics

    tokens = max_tokens_for(2, episodes(), "reflection")
    subject = learner(config(max_tokens_per_micro_batch=tokens), dtype, grpo_loss=fragile_loss)
    untroubled = learner(config(max_tokens_per_micro_batch=tokens), dtype)
    subject.step(episodes())
    untroubled.step(episodes())
    before, counters = snapshot(subject), subject.state()[1]
    broken, calls = True, 0
    with pytest.raises(NonFiniteError) as caught:
        subject.step(episodes())
    message = str(caught.value)
    assert "step 2, micro-batch 2 of 2" in message and "learning_rate" in message
    assert kind in message and "first parameter with a non-finite gradient: embed_tokens" in message
    assert_same(snapshot(subject), before)
    assert subject.state()[1] == counters
    broken = False
    assert subject.step(episodes(1)) == untroubled.step(episodes(1))
    assert_same(snapshot(subject), snapshot(untroubled))


def test_the_attention_plan_is_made_once_per_micro_batch(monkeypatch):
    """And not again for old log-probs, the reference, a second update, or recomputed activations."""
    made = []
    real = tree_attention._Plan.of
    monkeypatch.setattr(tree_attention._Plan, "of", lambda *args: made.append(args) or real(*args))
    tokens = max_tokens_for(3, episodes(), "reflection")
    settings = config(num_iterations=2, max_tokens_per_micro_batch=tokens, gradient_checkpointing=True)
    learner(settings).step(episodes())
    windows = len(set(decoder().config.windows))
    assert len(made) == 3 * windows


def test_user_errors():
    with pytest.raises(ValueError, match="reference must be a model when beta > 0"):
        Learner(decoder(), config(), total_steps=1)
    with pytest.raises(ValueError, match="episodes must hold at least one"):
        learner().step([])
    with pytest.raises(ValueError, match="at least one token"):
        learner().supervised_step([([1], [([2], [False])])], 1e-3)


# --- supervised steps and the optimiser

TRANSCRIPTS = [
    ([1, 2, 3], [([4, 5, 6, 7], [True, True, False, True]), ([8, 9], [True, True])]),
    ([3, 1], [([5, 5, 6], [False, True, True])]),
    ([2], [([7, 7], [True, False])]),
]


def test_supervised_loss_is_the_mean_negative_log_likelihood():
    subject = learner(dtype=torch.float64)
    terms = []
    for prompt, branches in TRANSCRIPTS:
        for completion, mask in branches:
            logits = subject.model.logits(subject.model(torch.tensor([prompt + completion])))[
                0, len(prompt) - 1 : -1
            ]
            logprobs = torch.log_softmax(logits, -1)
            terms += [-logprobs[i, token] for i, token in enumerate(completion) if mask[i]]
    expected = torch.stack(terms).mean()
    gradients = torch.autograd.grad(expected, list(subject.model.parameters()))
    metrics = subject.supervised_step(TRANSCRIPTS, 1e-3)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-9)
    assert metrics["num_loss_tokens"] == len(terms)
    for actual, gradient in zip(subject.optimizer.gradients.values(), gradients, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-8, atol=1e-11)

    split = learner(config(max_tokens_per_micro_batch=7), torch.float64)
    split.supervised_step(TRANSCRIPTS, 1e-3)
    for name, gradient in subject.optimizer.gradients.items():
        torch.testing.assert_close(split.optimizer.gradients[name], gradient, rtol=1e-9, atol=1e-12)


TARGETS = [
    ([3, 1, 4], [([1, 5, 9, 2], [True] * 4), ([1, 6], [True] * 2)]),
    ([3, 2], [([7], [True])]),
]


@pytest.mark.parametrize("max_tokens", [10_000, 4])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_distilled_retries_add_their_mean_cross_entropy(loss_type, max_tokens):
    """Against each row alone, in float64. The denominators are those of all targets in any split."""
    settings = config(loss_type=loss_type, distill_retries=0.3, max_tokens_per_micro_batch=max_tokens)
    subject, plain = learner(settings, torch.float64), learner(settings, torch.float64)
    per_token = []  # of each target
    for prompt, answers in TARGETS:
        for ids, _ in answers:
            logits = subject.model.logits(subject.model(torch.tensor([prompt + ids])))[0] / 0.9
            predicting = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
            per_token.append(-predicting[range(len(ids)), ids])
    mean = {
        "dapo": torch.cat(per_token).mean(),
        "grpo": sum(losses.mean() for losses in per_token) / 3,
        "dr_grpo": torch.cat(per_token).sum() / (3 * settings.max_completion_length),
    }[loss_type]
    expected = torch.autograd.grad(mean, list(subject.model.parameters()))

    metrics, without = subject.step(episodes(), TARGETS), plain.step(episodes())
    assert metrics["distill/loss"] == pytest.approx(mean.item(), rel=1e-9)
    assert metrics["loss"] == pytest.approx(without["loss"] + 0.3 * mean.item(), rel=1e-9)
    assert metrics["kl"] == without["kl"] and metrics["entropy"] == without["entropy"]
    gradients = zip(subject.optimizer.gradients.values(), plain.optimizer.gradients.values(), strict=True)
    for (both, rl), gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(both, rl + 0.3 * gradient, rtol=1e-8, atol=1e-11)


def test_distilled_retries_teach_where_no_reward_differs():
    subject = learner(config(beta=0.0, distill_retries=1.0, learning_rate=0.1))
    losses = [subject.step(episodes(rewards=(1.0,) * 3), TARGETS)["distill/loss"] for _ in range(8)]
    assert losses[-1] < losses[0] / 2 and subject.optimizer.num_updates == 8


def test_supervised_steps_learn():
    subject = learner()
    losses = [subject.supervised_step(TRANSCRIPTS, 1e-2)["loss"] for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]


def test_clipping_scales_the_gradient_to_the_limit():
    free, clipped = learner(), learner(config(max_grad_norm=1e-3))
    norm = free.step(episodes())["grad_norm"]
    assert clipped.step(episodes())["grad_norm"] == norm > 1e-3  # the logged norm is the one before clipping
    assert clipped.optimizer.grad_norm().item() == pytest.approx(1e-3, rel=2e-3)


def test_bfloat16_weights_follow_masters_that_move_by_less_than_their_spacing():
    model = decoder(torch.bfloat16)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MasterAdamW(model, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        for gradient in optimizer.gradients.values():
            gradient.fill_(1.0)
        optimizer.step(1e-5)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, optimizer.masters[name].bfloat16())
    name = "layers.0.qkv_proj.weight"
    moved = (optimizer.masters[name] - start[name].float()).mean().item()
    assert moved == pytest.approx(-200 * 1e-5, rel=1e-2)
    assert not torch.equal(dict(model.named_parameters())[name], start[name])


def test_a_second_learner_of_a_bfloat16_model_gets_its_gradients():
    """The warm start has its own learner, on the same model and before that of RL."""
    first = learner(dtype=torch.bfloat16)
    first.supervised_step(TRANSCRIPTS, 1e-3)
    second, alone = learner(dtype=torch.bfloat16), learner(dtype=torch.bfloat16)
    alone.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    alone.optimizer = MasterAdamW(alone.model, betas=(0.9, 0.99), weight_decay=0.01)
    second.model = first.model
    second.optimizer = MasterAdamW(first.model, betas=(0.9, 0.99), weight_decay=0.01)
    metrics = second.step(episodes())
    assert metrics["grad_norm"] > 0 and metrics == alone.step(episodes())
    assert_same(snapshot(second), snapshot(alone))


def test_grad_norm_of_a_large_tensor_is_accurate():
    model = torch.nn.Linear(1000, 3000, bias=False)
    optimizer = MasterAdamW(model, betas=(0.9, 0.99), weight_decay=0.0)
    optimizer.gradients["weight"].fill_(1e-3)
    assert optimizer.grad_norm().item() == pytest.approx(1e-3 * 3e6**0.5, rel=1e-5)


def test_same_update_as_plain_adamw():
    # In float64, or tiny gradients differ in sign, which AdamW makes large.
    model, twin = decoder(torch.float64), decoder(torch.float64)
    optimizer = MasterAdamW(model, betas=(0.9, 0.99), weight_decay=0.1)
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    gains = [p for p in twin.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))
    for step in range(3):
        optimizer.zero_grad()
        for module in (model, twin):
            module(torch.tensor([[1, 2, step]])).pow(3).sum().backward()
        optimizer.step(1e-2)
        plain.step()
        plain.zero_grad()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        # Fused AdamW counts its steps in float32.
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)


def test_schedules():
    def rates(schedule: str, warmup: float, total: int = 8) -> list[float]:
        return [
            scheduled_learning_rate(step, peak=1.0, total_steps=total, warmup_steps=warmup, schedule=schedule)
            for step in range(total + 1)
        ]

    assert rates("constant", 0) == [1.0] * 9
    assert rates("constant", 4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("constant", 0.5) == rates("constant", 4)  # below 1: a ratio
    assert rates("linear", 0) == [1 - i / 8 for i in range(9)]
    assert rates("linear", 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates("cosine", 0)[::4] == pytest.approx([1.0, 0.5, 0.0])
    assert rates("cosine", 4)[4:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(5)])
    assert rates("cosine", 0.03, total=20)[0] == 1.0  # rounded up to one step, at the peak already
    with pytest.raises(ValueError, match="lr_scheduler_type must be one of"):
        rates("polynomial", 0)
    with pytest.raises(ValueError, match="warmup_steps"):
        rates("linear", -1)


# --- deterministic ------------------------------------------------------------------------------------------

# Operators that raise on CUDA under torch.use_deterministic_algorithms: those of its docstring that a trainer
# might use. cumsum is in that list too, but has had a fixed order since 2024 (pytorch/pytorch#136224).
WITHOUT_FIXED_ORDER = {"put", "put_", "histc", "median", "kthvalue", "nll_loss_forward", "cumprod_backward"}


@pytest.mark.parametrize("settings", [{}, {"train_on": "all", "importance_sampling_level": "sequence"}])
def test_every_operation_of_a_step_has_a_fixed_order_on_cuda(settings):
    """Or the setting `deterministic` would end such a run in a RuntimeError."""
    used = set()

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = operation.overloadpacket.__name__
            used.add(name)
            assert name != "bincount" or kwargs.get("weights", args[1] if len(args) > 1 else None) is None
            assert "scatter_reduce" not in name or "prod" not in args
            return operation(*args, **kwargs)

    parts = tiny.build(**settings)
    with Recording():
        tiny.update(parts, tiny.episodes(parts), beta=0.1)
    assert {"mm", "embedding_dense_backward", "cumsum", "_fused_adamw_"} <= used  # all of the step was seen
    assert not used & WITHOUT_FIXED_ORDER
