"""What went wrong in other trainers, one test each: see the lesson in each test's first line.

All of them run the real chain, rollout -> episodes -> learner, around the tiny model of tiny.py; `naive`
there is the other side of many comparisons: one padded row per completion, whole logits, a loss spelled out,
and autograd.
"""

import copy
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import assert_same, naive, other_model, padded_logprobs, token_logprobs, update
from torch.testing import assert_close

from grpo import config as configuration
from grpo.config import Config
from grpo.episode import Episode
from grpo.learner.packing import pack_episodes
from grpo.logprob import linear_logprob, selected_logprob
from grpo.loss import LOSS_TYPES, grpo_loss
from grpo.run.metrics import Metrics

DIFFERENCE = "sampling/sampling_logp_difference"
LOSSES = {name: {"loss_type": name} for name in LOSS_TYPES}
LOSSES["cispo"]["epsilon_high"] = 5.0


@pytest.fixture(scope="module")
def parts():
    return tiny.build()


@pytest.fixture(scope="module")
def sampled(parts):
    """Three groups of four, with both finish reasons, both rewards, and lengths that differ."""
    episodes = tiny.episodes(parts)
    assert {e.finish_reason for e in episodes} == {"stop", "length"}
    assert len({len(e.prompt_ids) for e in episodes}) > 1
    return episodes


def of_role(episode, role):
    return [i for i, r in enumerate(episode.roles) if r == role]


def test_01_pad_equals_eos():
    """Masks from `token != pad` lose the stop token (TRL #4970): ours come from roles, whatever pad is."""
    results = []
    for pad in ("<|im_end|>", "<|end|>"):
        tokenizer = tiny.byte_tokenizer(template=tiny.CHATML)
        tokenizer.pad_token = pad
        parts = tiny.build(tokenizer=tokenizer)
        assert parts.chat.pad_token_id == tiny.token_id(tokenizer, pad)
        results.append(update(parts, tiny.episodes(parts)))
    (metrics, gradients, episodes), (other_metrics, other_gradients, other_episodes) = results
    assert episodes == other_episodes and metrics == other_metrics
    assert_same(gradients, other_gradients)
    stopped = [e for e in episodes if e.finish_reason == "stop"]
    assert stopped and all(e.completion_ids[of_role(e, "reflection")[-1]] in (256, 258) for e in stopped)


def test_02_several_stop_tokens():
    """Phi-3.5 has several (TRL #7039: clipped_ratio 0.97): each of them ends a turn, and says so."""
    parts = tiny.build(stops=(*tiny.STOPS, "!"))
    stops = set(parts.chat.stop_token_ids)
    attempts = parts.rollout.attempts(parts.task.examples("train", 40), stage="failures", count=2)
    turns = [attempt.turn for attempt in attempts]
    for turn in turns:
        assert not stops & set(turn.ids[:-1])
        assert turn.finish_reason == ("stop" if turn.ids[-1] in stops else "length")
        assert turn.finish_reason == "stop" or len(turn.ids) == 8
    assert len(stops) == 3 and stops < {turn.ids[-1] for turn in turns}
    assert any(len(turn.ids) == 8 and turn.finish_reason == "stop" for turn in turns)  # at the limit itself
    metrics, _, episodes = update(parts, tiny.episodes(parts))
    ended = [e.completion_ids[of_role(e, "reflection")[-1]] in stops for e in episodes]
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 - sum(ended) / len(ended)) and any(ended)


@pytest.mark.parametrize("loss", LOSSES)
def test_03_any_number_of_micro_batches(parts, sampled, loss):
    """A loss averaged per micro-batch depends on the split (TRL #5619): our denominators are the step's."""
    results = {}
    for max_tokens in range(1500, 90, -1):
        count = len(pack_episodes(sampled, train_on="reflection", max_tokens=max_tokens))
        if count in (1, 2, 7) and count not in results:
            settings = {"max_tokens_per_micro_batch": max_tokens, "beta": 0.1, **LOSSES[loss]}
            results[count] = update(parts, sampled, dtype=torch.float64, **settings)[:2]
    metrics, gradients = results.pop(1)
    assert results.keys() == {2, 7} and metrics["grad_norm"] > 0.01
    for other_metrics, other_gradients in results.values():
        assert_close(other_gradients, gradients, rtol=1e-10, atol=1e-12)
        assert other_metrics == pytest.approx(metrics, rel=1e-5)  # the sampler's log-probs are float32


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_04_truncated_completions_leave_the_denominator_too(parts, sampled, beta):
    """Masked completions stayed in the denominator (TRL #6369); with all of them masked it was 0 / 0."""
    settings = {"mask_truncated_completions": True, "beta": beta}
    for loss in LOSSES.values():
        cut = [replace(e, finish_reason="length") for e in sampled]
        metrics, gradients, _ = update(parts, cut, **settings, **loss)
        assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
        assert all(not gradient.any() for gradient in gradients.values())
    gradients = update(parts, sampled, dtype=torch.float64, **settings)[1]
    expected = naive(parts, sampled, beta=beta, keep=lambda e: e.finish_reason == "stop")
    assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def test_05_the_learner_sees_the_sampled_ids(monkeypatch):
    """encode(decode(ids)) is not ids (TRL #5144, verl #3960): what was sampled is never tokenised again."""
    parts = tiny.build(tokenizer=tiny.byte_tokenizer([("a", "b")], tiny.CHATML))
    pool = tiny.failures(parts, 3)
    finished, learned, run = [], [], parts.sampler.run
    monkeypatch.setattr(parts.sampler, "run", lambda *a, **k: finished.extend(run(*a, **k)) or finished)
    episodes = tiny.episodes(parts, pool)
    reflections = [done.turns[0].ids for done in finished]
    assert any(parts.tokenizer.encode(parts.chat.decode(ids)) != ids[:-1] for ids in reflections)

    def spy(*args, **options):
        batches = pack_episodes(*args, **options)
        learned.extend(token for batch in batches for token in batch.ids[batch.pairs].tolist())
        return batches

    monkeypatch.setattr("grpo.learner.learner.pack_episodes", spy)
    update(parts, episodes, beta=0.1)
    assert Counter(learned) == Counter(token for ids in reflections for token in ids)
    for episode, done in zip(episodes, finished, strict=True):
        reflection, retry = (turn.ids for turn in done.turns)
        assert episode.completion_ids == [*reflection, *done.fed[0], *retry]
        attempt = pool[episode.group_id].turn.ids
        assert episode.prompt_ids[len(pool[episode.group_id].prompt_ids) :][: len(attempt)] == attempt


def test_06_a_template_that_rewrites_history():
    """Templates strip the reasoning of earlier turns (verl #6854): our turns continue the one before."""
    merges = [("</think>"[:i], "</think>"[i]) for i in range(1, 8)]
    template = tiny.CHATML.replace("m.content", "m.content.split('</think>')[-1].strip()")
    tokenizer = tiny.byte_tokenizer(merges, template)
    parts = tiny.build(tokenizer=tokenizer, likely=["</think>"], seed=6)
    pool = tiny.failures(parts, 6)
    episodes = tiny.episodes(parts, pool)
    assert any("</think>" in failure.text for failure in pool)
    assert any("</think>" in episode.texts["reflection"] for episode in episodes)
    for failure, episode in zip((pool[e.group_id] for e in episodes), episodes, strict=True):
        before = failure.prompt_ids + failure.turn.ids
        assert episode.prompt_ids[: len(before)] == before
    # The ids of the episode are what the model had before it in both turns: its log-probs say so.
    for episode, logprobs in zip(episodes, padded_logprobs(parts.model, episodes, 0.8), strict=True):
        own = [i for i, role in enumerate(episode.roles) if role != "context"]
        assert_close(torch.tensor(episode.logprobs)[own], logprobs.detach()[own], atol=1e-4, rtol=0)


SEQUENCE = {"beta": 0.1, "num_iterations": 2, "importance_sampling_level": "sequence"}


@pytest.mark.parametrize("path", [{}, {"beta": 0.1}, {"num_iterations": 2}, SEQUENCE], ids=str)
@pytest.mark.parametrize("train_on", ["reflection", "all", "retry", "truncated"])
def test_07_masked_tokens_are_read_on_no_path(parts, sampled, train_on, path):
    """A mask that one of several code paths forgets (TRL #4975): poison what is masked, nothing may move."""
    settings = {"train_on": train_on, **path}
    if train_on == "truncated":
        settings |= {"train_on": "all", "mask_truncated_completions": True}
    poisoned = copy.deepcopy(sampled)
    for episode in poisoned:
        # Spelled out, not asked from the code under test.
        roles = {"reflection": ["reflection"], "retry": ["retry"]}.get(train_on, ["reflection", "retry"])
        cut = train_on == "truncated" and episode.finish_reason == "length"
        trained = [role in roles and not cut for role in episode.roles]
        after = max((i + 1 for i, t in enumerate(trained) if t), default=0)
        episode.logprobs = [x if t else math.nan for x, t in zip(episode.logprobs, trained, strict=True)]
        episode.completion_ids[after:] = [7] * (len(trained) - after)
    metrics, gradients, _ = update(parts, sampled, **settings)
    poisoned_metrics, poisoned_gradients, _ = update(parts, poisoned, **settings)
    assert poisoned_metrics == metrics and metrics["grad_norm"] > 0.01
    assert_same(poisoned_gradients, gradients)


def test_07_masked_rows_of_a_batch_are_never_read(parts, sampled):
    """The same one level down, where a masked token is a row of the batch: NaN and ids that do not exist."""
    results = []
    for poison in (False, True):
        (batch,) = pack_episodes(sampled, train_on="reflection", max_tokens=9999)
        mask = torch.tensor([e.finish_reason != "length" for e in sampled])[batch.sequence_ids]
        assert mask.any() and not mask.all()
        bad = ~mask & poison
        model = copy.deepcopy(parts.model)
        hidden = model(batch.input_ids, batch.position_ids)[0, batch.select[batch.pairs]]
        hidden, ids = hidden.masked_fill(bad[:, None], math.nan), batch.ids[batch.pairs].masked_fill(bad, -1)
        logprobs, entropy = linear_logprob(hidden, model.output_weight, ids, mask=mask, entropy=True)
        old = batch.sampler_logprobs.masked_fill(bad, math.nan)
        logprobs = logprobs.masked_fill(bad, math.nan)
        advantages = torch.arange(len(sampled), dtype=torch.float32)
        loss, metrics = grpo_loss(logprobs, old, old, advantages, batch.sequence_ids, mask=mask, epsilon=0.9)
        (loss + entropy.sum()).backward()
        results.append((loss.item(), metrics, {n: p.grad for n, p in model.named_parameters()}))
    assert results[0][0] == results[1][0]
    assert_same(results[1][1:], results[0][1:])


def test_08_temperature_of_sampler_and_learner():
    """Log-probs at temperature 1 of what was sampled at another (TRL #4159): ours are at the sampler's."""
    parts = tiny.build(temperature=0.6)
    episodes = tiny.episodes(parts)
    assert update(parts, episodes)[0][f"{DIFFERENCE}/max"] < 1e-4
    own = [e.loss_mask("reflection") for e in episodes]
    for temperature, close in ((0.6, True), (1.0, False)):
        pairs = zip(padded_logprobs(parts.model, episodes, temperature), episodes, own, strict=True)
        differences = [(x.detach() - torch.tensor(e.logprobs))[torch.tensor(m)] for x, e, m in pairs]
        assert (torch.cat(differences).abs().mean() < 1e-4) == close
    # Old log-probs and the reference's as well: with the policy as its own reference, ratio 1 and KL 0.
    config = replace(parts.config, beta=0.1, num_iterations=2, learning_rate=1e-12)
    subject = tiny.learner(replace(parts, config=config), reference=copy.deepcopy(parts.model))
    metrics = subject.step(episodes)
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-5) and metrics["kl"] < 1e-9


def test_09_top_p_and_top_k_are_refused_in_training(parts, tmp_path):
    """Tokens of a cut distribution bias the ratio (TRL #6789): no way to configure it; evaluation may."""
    (tmp_path / "cut.yaml").write_text("top_p: 0.95\n")
    for argv in (["--top_p", "0.95"], ["--top_k", "50"], ["--config", str(tmp_path / "cut.yaml")]):
        with pytest.raises(ValueError, match="top_p must be 1.0 and top_k 0 in training.*ratio is biased"):
            configuration.parse(argv)
    sampler = copy.copy(parts.sampler)
    sampler.top_k = 1
    rollout = copy.copy(parts.rollout)
    rollout.sampler = sampler
    first, second = rollout.attempts(parts.task.examples("heldout", 1), stage="evaluation", count=2)
    assert first.turn.ids == second.turn.ids and max(first.turn.logprobs) < 0  # of the whole distribution


def test_10_sampler_and_learner_agree_whatever_the_batch_shape():
    """Other batch shapes gave other log-probs (TRL #6789): the difference is reported, tiny in float32."""
    parts = tiny.build(beta=0.05, max_tokens_per_micro_batch=150)
    parts.sampler.max_rows = 5
    pool, subject = tiny.failures(parts, 3), tiny.learner(parts, reference=other_model(parts))
    for step in (1, 2, 3):
        metrics = subject.step(tiny.episodes(parts, pool, step))
        assert 0 < metrics[f"{DIFFERENCE}/mean"] < 1e-5
        assert metrics[f"{DIFFERENCE}/mean"] <= metrics[f"{DIFFERENCE}/max"] < 1e-4


def test_11_the_sampler_follows_the_weights():
    """A sampler that kept old weights, or prompts cached under them (TRL #5312)."""
    parts = tiny.build()
    learned = replace(parts, model=copy.deepcopy(parts.model))  # as for a sampler with weights of its own
    pool = tiny.failures(parts, 3)
    tiny.learner(learned).step(tiny.episodes(parts, pool))
    stale = tiny.episodes(parts, pool, step=2)
    assert update(learned, stale, beta=0.1)[0][f"{DIFFERENCE}/max"] > 0.1
    parts.sampler.load_weights(learned.model.state_dict())
    fresh = tiny.episodes(parts, pool, step=2)
    assert update(learned, fresh, beta=0.1)[0][f"{DIFFERENCE}/max"] < 1e-4
    tiny.learner(parts).step(fresh)  # and where both share one model
    assert update(parts, tiny.episodes(parts, pool, step=3), beta=0.1)[0][f"{DIFFERENCE}/max"] < 1e-4


def test_12_resume_is_exact():
    """Resumed runs took another way (verl #3457, ms-swift #10050): 2 + 2 steps are 4 steps, bit for bit."""
    settings = {"beta": 0.05, "num_iterations": 2, "weight_decay": 0.01, "warmup_steps": 3}
    pool, reference = tiny.failures(tiny.build(), 3), other_model(tiny.build())

    def start(seed=0):
        parts = tiny.build(**settings)
        parts.model.load_state_dict(tiny.decoder(parts.model.config.vocab_size, seed=seed).state_dict())
        return parts, tiny.learner(parts, reference=reference)

    def run(parts, subject, steps):
        batches = []
        for step in steps:
            episodes = tiny.episodes(parts, pool, step)
            batches.append((subject.step(episodes), episodes))
        return batches

    parts, whole = start()
    expected = run(parts, whole, [1, 2, 3, 4])
    parts, first = start()
    assert run(parts, first, [1, 2]) == expected[:2]
    tensors, counters = first.state()
    tensors, counters = {k: t.clone() for k, t in tensors.items()}, json.loads(json.dumps(counters))
    parts, second = start(seed=5)  # a new process, whatever its weights are at first
    second.load_state(tensors, counters)
    assert run(parts, second, [3, 4]) == expected[2:]
    assert_same(second.state()[0], whole.state()[0])
    assert second.state()[1] == whole.state()[1] and second.learning_rate() == whole.learning_rate()


def test_13_advantages_are_centred_in_their_group(parts, sampled):
    """Groups found by position, or by equal prompts (rllm #605, miles #2378): by id, in any order or size."""
    rewards = [float(i % 2 == 0) for i in range(len(sampled) - 1)]  # one episode is left out
    episodes = [
        replace(e, reward=reward, group_id=5 - 9 * e.group_id)
        for e, reward in zip(sampled, rewards, strict=False)
    ]
    gradients = []
    for seed in range(4):
        shuffled = random.Random(seed).sample(episodes, len(episodes))
        _, gradient, done = update(parts, shuffled, dtype=torch.float64)
        gradients.append(gradient)
        for group in {e.group_id for e in done}:
            advantages = [e.advantage for e in done if e.group_id == group]
            assert sum(advantages) == pytest.approx(0, abs=1e-6)
        assert all((e.advantage > 0) == (e.reward == 1) and e.advantage != 0 for e in done)
        assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-12)

    # Groups as the rollout makes them: two failures of one example are two groups, also with the same ids.
    failure = tiny.failures(parts, 1)[0]
    twice = tiny.episodes(parts, [failure, replace(failure, generation=1), *tiny.failures(parts, 2)[1:]])
    assert [e.group_id for e in twice] == [0] * 4 + [1] * 4 + [2] * 4
    assert [e.completion_ids for e in twice[:4]] != [e.completion_ids for e in twice[4:8]]


def test_14_groups_without_variance(parts, sampled):
    """A constant 0.5 counted as a signal (OpenRLHF #1270): advantage exactly 0, no gradient, and reported."""
    for reward in (0.5, 0.9):  # in float32 the mean of three times 0.9 is not 0.9
        flat = [replace(e, reward=reward) for e in sampled if e.generation < 3]
        metrics, gradients, done = update(parts, flat, scale_rewards="none")
        assert [e.advantage for e in done] == [0.0] * len(done)
        assert metrics["frac_reward_zero_std"] == 1 and metrics["reward_std"] == 0
        assert metrics["grad_norm"] == 0 and all(not gradient.any() for gradient in gradients.values())
        flat[0].reward += 0.25
        metrics, _, done = update(parts, flat)
        assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3) and metrics["grad_norm"] > 0
        assert [e.advantage != 0 for e in done] == [True] * 3 + [False] * 6


def left_padded_logprobs(model, episodes, temperature):
    """As `padded_logprobs`, which pads on the right."""
    rows = [e.prompt_ids + e.completion_ids for e in episodes]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    logprobs = (model.logits(model(ids, attention_mask=mask)) / temperature).log_softmax(-1)
    return [
        row[-1 - len(e.completion_ids) : -1].gather(1, torch.tensor(e.completion_ids)[:, None])[:, 0]
        for row, e in zip(logprobs, episodes, strict=True)
    ]


def test_15_padding_moves_nothing(parts, sampled):
    """Left padding moved the log-probs (TRL #2708): padded left or right, packed, sampled: the same."""
    sides = left_padded_logprobs(parts.model, sampled, 0.8), padded_logprobs(parts.model, sampled, 0.8)
    packed = token_logprobs(parts, sampled)
    for episode, learned, left, right in zip(sampled, packed, *sides, strict=True):
        assert_close(left, right, atol=1e-4, rtol=0)
        own = of_role(episode, "reflection")
        assert_close(torch.tensor(learned), left.detach()[own], atol=1e-4, rtol=0)
        assert_close(torch.tensor(episode.logprobs)[own], left.detach()[own], atol=1e-4, rtol=0)


def test_16_a_loss_of_zero_comes_with_what_explains_it(parts, sampled, tmp_path, capsys):
    """A loss of 0 worries users (TRL #2703): gradient norm and share of dead groups stand by it."""
    metrics, _, _ = update(parts, sampled, loss_type="grpo")  # a mean over centred advantages
    assert abs(metrics["loss"]) < 1e-6 and metrics["grad_norm"] > 0.01
    zero = sum(len({e.reward for e in sampled if e.group_id == g}) == 1 for g in range(3)) / 3
    assert metrics["frac_reward_zero_std"] == pytest.approx(zero)
    log = Metrics(tmp_path, dtype="float32", max_steps=1)
    log.log(1, metrics)
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["grad_norm"] == metrics["grad_norm"]
    assert line["frac_reward_zero_std"] == metrics["frac_reward_zero_std"]
    names, _, values = (text.split() for text in capsys.readouterr().out.splitlines()[:3])
    assert dict(zip(names, values, strict=True))["grad"] == f"{metrics['grad_norm']:.3f}"


@pytest.mark.parametrize("correction", [False, True])
def test_17_which_kl_the_penalty_descends(correction):
    """k3's gradient is not that of KL(policy || ref) (TRL #4967): over a whole vocabulary, each token once.

    The policy is uniform (its output weights are 0), so that the mean over the tokens is the expectation.
    """
    size, prompt = 13, [3, 1, 4]
    model, reference = (tiny.decoder(size, seed=seed, tie_word_embeddings=False).double() for seed in (0, 1))
    torch.nn.init.zeros_(model.lm_head.weight)
    settings = {"beta": 1.0, "loss_type": "grpo", "use_bias_correction_kl": correction, "temperature": 1.0}
    parts = replace(tiny.build(**settings), model=model)
    ends = (["reflection"], [-math.log(size)], "length", 1.0)  # roles, log-probs, finish reason, reward
    episodes = [Episode("x", 0, token, prompt, [token], *ends) for token in range(size)]
    p, q = (m.logits(m(torch.tensor([prompt])))[0, -1].log_softmax(-1) for m in (model, reference))
    kls = (q.exp() * (q - p)).sum(), (p.exp() * (p - q)).sum()  # KL(ref || policy), KL(policy || ref)
    plain, corrected = (torch.autograd.grad(kl, model.lm_head.weight, retain_graph=True)[0] for kl in kls)
    expected, other = (corrected, plain) if correction else (plain, corrected)
    subject = tiny.learner(parts, reference=reference)
    subject.step(episodes)
    got = subject.optimizer.gradients["lm_head.weight"]
    assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (got - other).norm() > 0.1 * got.norm()
    assert Config().use_bias_correction_kl
    assert not configuration.parse(["--preset", "paper_countdown"]).use_bias_correction_kl


def test_18_noise_belongs_to_its_row(parts):
    """One seed for a group made its members equal (verl #6857): ours differ, and depend on nothing else."""
    pool = tiny.failures(parts, 3)
    episodes = tiny.episodes(parts, pool)
    texts = [e.completion_ids for e in episodes]
    for group in range(3):
        assert len({tuple(ids) for ids in texts[4 * group : 4 * group + 4]}) == 4
    assert tiny.episodes(parts, pool) == episodes
    assert [e.completion_ids for e in tiny.episodes(parts, pool[1:2])] == texts[4:8]
    assert [e.completion_ids for e in tiny.episodes(parts, pool[::-1])] == texts[8:] + texts[4:8] + texts[:4]
    pair = replace(parts, config=replace(parts.config, num_generations=2))
    assert [e.completion_ids for e in tiny.episodes(pair, pool)] == [
        ids for i, ids in enumerate(texts) if i % 4 < 2
    ]
    later = tiny.episodes(parts, pool, step=2)
    assert not {tuple(e.completion_ids) for e in later} & {tuple(ids) for ids in texts}


def test_19_completions_do_not_see_each_other(parts, sampled):
    """A prefix mask fell back to plain causal (ART #666): change one completion, the others do not move."""
    before = token_logprobs(parts, sampled)
    changed = copy.deepcopy(sampled)
    changed[0].completion_ids = [(token + 1) % 250 for token in changed[0].completion_ids]
    after = token_logprobs(parts, changed)
    assert after[0] != before[0]
    assert after[1:] == before[1:]


@pytest.mark.parametrize("train_on", ["reflection", "all"])
@pytest.mark.parametrize("max_tokens", [10_000, 200])
def test_20_packed_gradients_equal_padded_ones(parts, sampled, train_on, max_tokens):
    """The prompt's last position has G targets in a shared prefix: every weight's gradient, in float64."""
    settings = {"train_on": train_on, "beta": 0.1, "max_tokens_per_micro_batch": max_tokens}
    gradients = update(parts, sampled, dtype=torch.float64, **settings)[1]
    assert_close(gradients, naive(parts, sampled, train_on=train_on, beta=0.1), rtol=1e-9, atol=1e-12)


def test_21_entropy_with_impossible_tokens(parts, sampled):
    """0 * -inf (TRL #7263): a logit of -inf, or a probability that underflows, leave entropy finite."""
    impossible = sorted(set(range(256)) - {token for e in sampled for token in e.completion_ids})[:100]

    def without(hidden, weight, ids, **options):
        logits = (hidden @ weight.T).index_fill(1, torch.tensor(impossible), -math.inf)
        return selected_logprob(logits, ids, **options)

    metrics, gradients, _ = update(parts, sampled, functions={"linear_logprob": without})
    assert 0 < metrics["entropy"] < math.log(172)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    peaked = replace(parts, model=copy.deepcopy(parts.model))
    peaked.model.norm.weight.data.mul_(1e4)
    metrics, gradients, _ = update(peaked, sampled)
    assert 0 <= metrics["entropy"] < 0.1
    assert all(gradient.isfinite().all() for gradient in gradients.values())
