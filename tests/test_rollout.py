"""Rollouts on the tiny model: the ids of every context, rewards, loss masks, and the noise of each row."""

import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny

from grpo.episode import Episode
from grpo.learner.packing import pack_episodes
from grpo.rollout import REFLECTION, RETRY, STAGES, NoiseKey, attempt_episodes, reward
from grpo.sampler.engine import Feed, Sample
from grpo.sampler.sampling import uniforms
from grpo.tasks import TaskError, Verdict

SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


def user(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def parts():
    return tiny.build()


@pytest.fixture(scope="module")
def pool(parts):
    failures = tiny.failures(parts, 4)
    assert {failure.turn.finish_reason for failure in failures} == {"stop", "length"}
    return failures


@pytest.fixture(scope="module")
def sampled(parts, pool):
    episodes = tiny.episodes(parts, pool)
    assert {episode.finish_reason for episode in episodes} == {"stop", "length"}
    return episodes


@pytest.fixture
def rows(parts, monkeypatch):
    """Everything that the sampler is given and gives back while the test runs, one list per call."""
    seen, run = [], parts.sampler.run

    def spy(rows, **options):
        seen.append(run(rows, **options))
        return seen[-1]

    monkeypatch.setattr(parts.sampler, "run", spy)
    return seen


def ids(parts, text):
    return parts.tokenizer.encode(text, add_special_tokens=False)


def reflection_of(episode):
    return [t for t, role in zip(episode.completion_ids, episode.roles, strict=True) if role == "reflection"]


def test_the_conversation_is_glued_from_its_ids(parts, pool, sampled):
    for episode in sampled:
        failure = pool[episode.group_id]
        question = failure.example.prompt
        assert failure.prompt_ids == ids(parts, SYSTEM + user(question))
        # A stop token of either kind closes a turn; the end-of-turn token closes one that was cut.
        closing = {"stop": "\n", "length": "<|im_end|>\n"}
        instruction = closing[failure.turn.finish_reason] + user("Why was it wrong?")
        assert episode.prompt_ids == failure.prompt_ids + failure.turn.ids + ids(parts, instruction)
        reflection = reflection_of(episode)
        between = ids(parts, closing[episode.finish_reason] + user(question))
        retry = episode.completion_ids[len(reflection) + len(between) :]
        assert episode.completion_ids == reflection + between + retry
        counts = (len(reflection), len(between), len(retry))
        assert episode.roles == ["reflection"] * counts[0] + ["context"] * counts[1] + ["retry"] * counts[2]
        assert episode.logprobs[counts[0] : counts[0] + counts[1]] == [0.0] * counts[1]
        sampled_logprobs = episode.logprobs[: counts[0]] + episode.logprobs[counts[0] + counts[1] :]
        assert max(sampled_logprobs) < 0


def test_texts_are_those_of_the_ids(parts, pool, sampled):
    for episode in sampled:
        failure = pool[episode.group_id]
        assert episode.example_id == failure.example.id
        assert episode.texts["prompt"] == failure.example.prompt and episode.texts["attempt"] == failure.text
        assert episode.texts["reflection"] == parts.chat.decode(reflection_of(episode))
        retry = [t for t, r in zip(episode.completion_ids, episode.roles, strict=True) if r == "retry"]
        assert episode.texts["retry"] == parts.chat.decode(retry)
        assert episode.reasons == [parts.task.verify(failure.example, episode.texts["retry"]).reason]


def test_a_cut_reflection_is_closed_outside_the_loss(parts, sampled):
    cut = [episode for episode in sampled if episode.finish_reason == "length"]
    for episode in cut:
        length = len(reflection_of(episode))
        assert length == parts.config.max_reflection_length
        assert episode.completion_ids[length] == ids(parts, "<|im_end|>")[0]
        for train_on in ("reflection", "all", "retry"):
            assert not episode.loss_mask(train_on)[length]


def test_a_group_shares_its_prompt(parts, pool, rows):
    tiny.episodes(parts, pool)
    (finished,) = rows
    prefixes = [done.row.prefix for done in finished]
    assert [prefixes[i] == prefixes[i - 1] for i in range(1, 16)] == [i % 4 != 0 for i in range(1, 16)]
    # Prompts are run once for their four rows, but for their last token (grpo/sampler/kv_cache.py).
    assert parts.sampler.stats["prefill_tokens"] == sum(len(p) - 1 for p in prefixes[::4])


def test_the_reward_is_the_share_of_right_retries(parts, pool, sampled, rows):
    thrice = replace(parts, config=replace(parts.config, retries_per_reflection=3))
    episodes = tiny.episodes(thrice, pool)
    for episode, single in zip(episodes, sampled, strict=True):
        tries = episode.texts["retry"].split("\n---\n")
        example = pool[episode.group_id].example
        assert episode.reasons == [parts.task.verify(example, text).reason for text in tries]
        assert len(tries) == 3 and episode.reward == pytest.approx(episode.reasons.count("ok") / 3)
        # The first retry, which is the one that can be trained on, is as if it were alone.
        assert episode.completion_ids == single.completion_ids and tries[0] == single.texts["retry"]
    assert len({episode.reward for episode in episodes}) > 2
    first, more = rows
    assert len(more) == 2 * len(first)
    for i, done in enumerate(more):  # further retries follow the same reflection, each with its own noise
        before = first[i // 2]
        assert done.row.prefix == before.row.prefix and done.fed == [before.turns[0].ids + before.fed[0]]
    texts = [[tuple(before.turns[1].ids)] for before in first]
    for i, done in enumerate(more):
        texts[i // 2].append(tuple(done.turns[0].ids))
    assert sum(len(set(group)) == 3 for group in texts) > len(texts) / 2


def test_right_retries_become_answers_to_the_prompt_alone(parts, pool):
    """Each distinct answer of a problem once, with its end; of wrong and cut retries nothing."""
    text, cut, graded = "No 7.", "It is 8, I th", "Almost"
    rows = [
        (0, text, "ok", "stop"),
        (0, text, "ok", "stop"),
        (0, "9", "ok", "stop"),
        (1, "7", "wrong", "stop"),
    ]
    rows += [(2, cut, "ok", "length"), (3, text, "ok", "stop"), (3, graded, "near", "stop")]
    episodes = []
    for number, (group, retry, reason, finish) in enumerate(rows):
        turn = tiny.turn(parts.chat, retry, finish).ids
        roles = ["reflection"] * 2 + ["context"] + ["retry"] * len(turn)
        episode = Episode("x", group, number, [1], [5, 6, 7, *turn], roles, [0.0] * len(roles), "stop", 0.0)
        episode.retry_finish_reason, episode.reasons = finish, [reason]
        episode.scores = [0.5] if retry == graded else []
        episodes.append(episode)

    def answers(*texts):
        turns = [ids(parts, f"{text}<|im_end|>") for text in texts]
        return [(turn, [True] * len(turn)) for turn in turns]

    expected = [(pool[0].prompt_ids, answers(text, "9")), (pool[3].prompt_ids, answers(text))]
    assert parts.rollout.right_retries(episodes, pool) == expected
    assert ids(parts, SYSTEM + user(pool[0].example.prompt)) == expected[0][0]
    again = [pool[0]] * 4  # two failures of one problem are one problem
    assert parts.rollout.right_retries(episodes, again) == [(pool[0].prompt_ids, answers(text, "9"))]
    lenient = tiny.build(success_threshold=0.5).rollout.right_retries(episodes, pool)
    assert lenient[1] == (pool[3].prompt_ids, answers(text, graded))


def test_reward_without_costs_is_the_share_of_right_retries():
    assert reward([True], 10, limit=10) == 1.0 and reward([False], 1, limit=10) == 0.0
    assert reward([True, False, False, True], 10, limit=10) == 0.5


def test_soft_overlong_penalty():
    def cost(length, buffer=4):
        return reward([True], length, limit=10, overlong_buffer=buffer, soft_overlong_penalty=0.5) - 1

    assert [cost(length) for length in (1, 6, 7, 8, 10)] == [0.0, 0.0, -0.125, -0.25, -0.5]
    assert cost(10, buffer=0) == 0  # no buffer: off


def test_length_costs_successes_only():
    lengths = (1, 5, 10)
    assert [reward([True], n, limit=10, length_cost=0.5) for n in lengths] == [0.95, 0.75, 0.5]
    assert [reward([True, False], n, limit=10, length_cost=0.5) for n in lengths] == [0.475, 0.375, 0.25]
    assert {reward([False], n, limit=10, length_cost=0.5) for n in lengths} == {0}


def test_costs_of_a_mean_score():
    assert reward([0.5, 0.25], 5, limit=10) == 0.375
    assert reward([2.0], 5, limit=10, length_cost=0.5) == 1.5
    assert reward([-1.0], 5, limit=10, length_cost=0.5) == -1.0  # a longer reflection must not lose less


class Graded(tiny.Toy):
    """The share of digits."""

    def verify(self, example, text):
        share = sum(c in "0123456789" for c in text) / max(len(text), 1)
        return Verdict("ok" if share == 1 else "wrong", share)


@pytest.mark.parametrize("settings", [{}, {"reward": "score"}, {"success_threshold": 0.2}])
def test_a_graded_verdict_gives_its_score_or_success(settings):
    parts = tiny.build(task=Graded(), retries_per_reflection=2, **settings)
    threshold = settings.get("success_threshold", 1.0)
    attempts = parts.rollout.attempts(parts.task.examples("train", 12), stage="failures")
    values = [parts.rollout.value(attempt.verdict) for attempt in attempts]
    if settings.get("reward") == "score":
        assert values == [attempt.verdict.score for attempt in attempts] and 0 < sum(values) < 12
    else:
        assert values == [float(attempt.verdict.score >= threshold) for attempt in attempts]
    assert [e.reward for e in attempt_episodes(attempts, 4, parts.rollout.value)] == values
    failures = [attempt for attempt in attempts if not parts.rollout.is_right(attempt.verdict)]
    episodes = tiny.episodes(parts, failures[:3])
    assert any(episode.scores for episode in episodes)
    for episode in episodes:
        scores = episode.scores or [Verdict(reason).score for reason in episode.reasons]
        given = scores if settings.get("reward") == "score" else [score >= threshold for score in scores]
        assert episode.reward == sum(given) / 2 and len(scores) == 2
        assert ("scores" in episode.to_json()) == bool(episode.scores)
    assert ("success_threshold" in parts.rollout.settings) == (threshold != 1.0)


def test_episodes_have_the_reward_of_the_settings(pool):
    settings = {"overlong_buffer": 4, "soft_overlong_penalty": 0.5, "length_cost": 0.25}
    episodes = tiny.episodes(tiny.build(**settings), pool)
    rewards = [reward([e.reasons == ["ok"]], len(reflection_of(e)), limit=10, **settings) for e in episodes]
    assert [episode.reward for episode in episodes] == rewards and len(set(rewards)) > 4


@pytest.mark.parametrize(
    ("train_on", "roles"),
    [("reflection", {"reflection"}), ("all", {"reflection", "retry"}), ("retry", {"retry"})],
)
def test_train_on_decides_what_is_in_the_loss(sampled, train_on, roles):
    (batch,) = pack_episodes(sampled, train_on=train_on, max_tokens=10_000)
    for i, episode in enumerate(sampled):
        pairs = zip(episode.completion_ids, episode.roles, strict=True)
        assert batch.ids[batch.pairs[batch.sequence_ids == i]].tolist() == [
            t for t, role in pairs if role in roles
        ]
        assert sum(episode.loss_mask("attempt")) == 0


def test_train_on_attempt(parts):
    attempts = replace(parts, config=replace(parts.config, train_on="attempt"))
    pool = tiny.failures(parts, 2)
    episodes = tiny.episodes(attempts, pool)
    assert [episode.group_id for episode in episodes] == [0] * 4 + [1] * 4
    assert [episode.generation for episode in episodes] == [0, 1, 2, 3] * 2
    for episode in episodes:
        failure = pool[episode.group_id]
        assert episode.example_id == failure.example.id and episode.prompt_ids == failure.prompt_ids
        assert all(episode.loss_mask("attempt")) and not any(episode.loss_mask("all"))
        assert episode.reward == (episode.reasons == ["ok"])
        assert len(episode.completion_ids) <= 8 and max(episode.logprobs) < 0
    assert len({tuple(episode.completion_ids) for episode in episodes}) == 8


def test_every_turn_has_noise_of_its_own(parts, pool, rows):
    """No two turns share a key, not even those of two failures of an example, or of one that comes twice."""
    rollout, examples = parts.rollout, [failure.example for failure in pool]
    twin = replace(pool[0], generation=1)  # a second failure of one example, in the same step

    def everything():
        for stage in STAGES:
            rollout.attempts([*examples, examples[0]], stage=stage, count=2)
        for stage, step in (("rollout", 1), ("rollout", 2), ("evaluation", 1)):
            failures = [*pool, twin, pool[0], twin]
            rollout.reflect_and_retry(failures, num_generations=3, stage=stage, step=step, retries=3)
        keys = [item.key for call in rows for d in call for item in d.row.script if isinstance(item, Sample)]
        rows.clear()
        return keys

    keys = everything()
    assert len(keys) == 4 * 5 * 2 + 3 * 7 * 3 * 4 and len(set(keys)) == len(keys)
    assert len({tuple(uniforms(key, 2)) for key in keys}) == len(keys)
    assert everything() == keys
    assert all(key.seed == parts.config.seed for key in keys)


def test_a_noise_key_says_what_its_turn_is(parts, pool, rows):
    twin = replace(pool[0], generation=2)
    parts.rollout.reflect_and_retry(
        [pool[0], twin, pool[0]], num_generations=2, stage="rollout", step=5, retries=2
    )
    first, more = rows
    base = NoiseKey(parts.config.seed, STAGES["rollout"], step=5, example=pool[0].example.key)
    groups = [{"repeat": 0, "attempt": 0}, {"repeat": 0, "attempt": 2}, {"repeat": 1, "attempt": 0}]
    expected = [base._replace(member=member, **group) for group in groups for member in range(2)]
    for key, done, further in zip(expected, first, more, strict=True):
        reflect, _, retry = done.row.script
        assert reflect.key == key._replace(turn=REFLECTION) and retry.key == key._replace(turn=RETRY)
        assert further.row.script[1].key == key._replace(turn=RETRY, retry=1)


def test_two_failed_attempts_at_one_example_get_other_reflections(parts, pool):
    twin = replace(pool[0], generation=1)
    groups = tiny.episodes(parts, [pool[0], twin])
    size = parts.config.num_generations
    mine, twins = ([tuple(e.completion_ids) for e in part] for part in (groups[:size], groups[size:]))
    assert not set(mine) & set(twins)


def test_a_control_has_the_noise_of_the_real_retry_of_any_attempt(parts, pool, rows):
    """An example that comes twice in an evaluation has two first answers, with noise of their own."""
    failures = [pool[0], replace(pool[0], generation=1)]
    parts.rollout.reflect_and_retry(failures, num_generations=1, stage="evaluation")
    parts.rollout.retry_after([*failures, *failures], [None] * 4, stage="evaluation")
    real, controls = rows
    keys = [done.row.script[2].key for done in real]
    assert [done.row.script[1].key for done in controls] == keys * 2 and len(set(keys)) == 2


def test_controls_sampled_next_to_the_reflections_get_the_same_answers(parts, pool, rows):
    closed = parts.chat.encode_turn("Mind the digit.")
    given = [(failure, reflection) for reflection in (None, closed) for failure in reversed(pool)]

    def tokens(episodes, retries):  # log-probs depend on the batch in their last bits
        return [(e.completion_ids, e.reward) for e in episodes], [(r.turn.ids, r.verdict) for r in retries]

    apart = tokens(
        parts.rollout.reflect_and_retry(pool, num_generations=1, stage="evaluation"),
        parts.rollout.retry_after(*zip(*given, strict=True), stage="evaluation"),
    )
    rows.clear()
    assert tokens(*parts.rollout.reflect_and_retry_after(pool, given, stage="evaluation")) == apart
    assert tokens(*parts.rollout.reflect_and_retry_after(pool, [], stage="evaluation")) == (apart[0], [])
    together, _ = rows
    # A prefix is computed once only if its rows are neighbours: each reflection's, and each blind retry's.
    changes = sum(a.row.prefix != b.row.prefix for a, b in pairwise(together))
    assert len(together) == 3 * len(pool) and changes == 2 * len(pool) - 1


def test_the_stage_of_training_is_the_default(parts, pool):
    assert NoiseKey() == NoiseKey(0, STAGES["rollout"], 0, 0)
    examples = [failure.example for failure in pool]
    assert parts.rollout.attempts(examples) == parts.rollout.attempts(examples, stage="rollout")
    plain, named = (
        parts.rollout.reflect_and_retry(pool, num_generations=2, **stage)
        for stage in ({}, {"stage": "rollout"})
    )
    assert plain == named


def test_a_control_differs_from_the_real_retry_in_its_context_only(parts, pool, rows):
    real = [tiny.episodes(parts, [failure])[0] for failure in pool]
    rows.clear()
    closed = [parts.chat.encode_turn("Mind the digit.") for _ in pool]
    # The reflection itself given back: the same retry, token by token.
    own = [reflection_of(e) + (ids(parts, "<|im_end|>") if e.finish_reason == "length" else []) for e in real]
    retries = parts.rollout.retry_after(pool, own, stage="rollout", step=1)
    for retry, episode in zip(retries, real, strict=True):
        assert retry.text == episode.texts["retry"] and [retry.verdict.reason] == episode.reasons
    parts.rollout.retry_after(pool, closed, stage="rollout", step=1)
    parts.rollout.retry_after(pool, [None] * 4, stage="rollout", step=1)
    given, other, blind = rows

    def context(done):
        return [*done.row.prefix, *done.row.script[0].ids]

    for failure, a, b, c in zip(pool, given, other, blind, strict=True):
        assert a.row.script[1].key == b.row.script[1].key == c.row.script[1].key
        again = ids(parts, "\n" + user(failure.example.prompt))
        assert context(b) == parts.rollout.reflection_prompt_ids(failure) + closed[0] + again
        end = [] if failure.turn.finish_reason == "stop" else ids(parts, "<|im_end|>")
        assert context(c) == failure.prompt_ids + failure.turn.ids + end + again


def test_an_exception_of_the_task_arrives_as_it_is(monkeypatch):
    parts = tiny.build()
    pool = tiny.failures(parts, 1)
    error = ValueError("a bug in verify")

    def verify(example, text):
        raise error

    monkeypatch.setattr(parts.task, "verify", verify)
    for call in (
        lambda: parts.rollout.attempts([pool[0].example], stage="rollout"),
        lambda: parts.rollout.reflect_and_retry(pool, num_generations=2, stage="rollout"),
        lambda: parts.rollout.retry_after(pool, [None], stage="rollout"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert caught.value is error


def test_a_task_without_a_system_message():
    task = tiny.Toy()
    task.system = None
    parts = tiny.build(task=task)
    (example,) = task.examples("train", 1)
    assert parts.rollout.prompt_ids(example) == ids(parts, user("Problem 0?"))


def test_sampled_tokens_counts_every_turn_and_every_further_retry(parts, pool, rows):
    before = parts.rollout.sampled_tokens
    parts.rollout.reflect_and_retry(pool, num_generations=2, stage="rollout", step=1, retries=3)
    first, more = rows
    turns = [turn for done in [*first, *more] for turn in done.turns]
    assert len(turns) == 4 * 2 * (2 + 2)
    assert parts.rollout.sampled_tokens - before == sum(len(turn.ids) for turn in turns)


def test_a_failure_that_comes_twice_in_a_step_gets_other_reflections(parts, pool):
    """A pool smaller than the step: equal groups would count the same completions double."""
    first, second = pool[:2]
    episodes = tiny.episodes(parts, [first, second, first])
    once = tiny.episodes(parts, [first, second])
    size = parts.config.num_generations
    assert [e.completion_ids for e in episodes[: 2 * size]] == [e.completion_ids for e in once]
    again = [e.completion_ids for e in episodes[2 * size :]]
    assert not {tuple(ids) for ids in again} & {tuple(e.completion_ids) for e in once[:size]}
    assert [e.generation for e in episodes[2 * size :]] == list(range(size))


def test_an_example_that_comes_twice_gets_other_answers(parts):
    (example,) = parts.task.examples("train", 1)
    attempts = parts.rollout.attempts([example, example], stage="rollout", count=4)
    assert [a.generation for a in attempts] == list(range(8))
    once = parts.rollout.attempts([example], stage="rollout", count=4)
    assert [a.turn.ids for a in attempts[:4]] == [a.turn.ids for a in once]
    assert len({tuple(a.turn.ids) for a in attempts}) == 8
    groups = attempt_episodes(attempts, 4)
    assert [(e.group_id, e.generation) for e in groups] == [(i // 4, i % 4) for i in range(8)]


def test_the_sampler_is_told_how_long_the_next_user_turn_can_be(parts, pool, rows):
    """Exactly: caches then never have to grow, and preflight can tell whether a conversation fits."""
    tiny.episodes(parts, pool)
    fed = [len(ids) for done in rows[0] for ids in done.fed]
    limits = [item.limit for done in rows[0] for item in done.row.script if isinstance(item, Feed)]
    assert all(n <= limit for n, limit in zip(fed, limits, strict=True)) and set(fed) & set(limits)


def test_several_verifiers_give_the_same_episodes_and_run_at_once(parts, pool, sampled, monkeypatch):
    rollout, judge = parts.rollout, parts.task.verify
    monkeypatch.setattr(rollout, "verifier_workers", 2)
    both = threading.Barrier(2)  # passes only if two are waiting

    def verify(example, text):
        both.wait(timeout=60)
        return judge(example, text)

    assert len(sampled) % 2 == 0
    monkeypatch.setattr(parts.task, "verify", verify)
    assert tiny.episodes(parts, pool) == sampled


def test_an_error_in_a_verifier_thread_ends_the_rollout(parts, pool, monkeypatch):
    def verify(example, text):
        raise TaskError("no verdict")

    monkeypatch.setattr(parts.rollout, "verifier_workers", 2)
    monkeypatch.setattr(parts.task, "verify", verify)
    with pytest.raises(TaskError, match="no verdict"):
        tiny.episodes(parts, pool)


def test_a_verifier_that_hangs_does_not_keep_the_process_from_ending(parts, pool, monkeypatch):
    """The threads of an executor would be waited for when the process ends, even after a second Ctrl-C."""
    verifying, release, threads = threading.Event(), threading.Event(), []

    def verify(example, text):
        threads.append(threading.current_thread())
        verifying.set()
        release.wait(60)
        return Verdict("ok")

    def stop(done, total):
        assert verifying.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(parts.rollout, "verifier_workers", 2)
    monkeypatch.setattr(parts.task, "verify", verify)
    with pytest.raises(KeyboardInterrupt):
        parts.rollout.reflect_and_retry(pool, num_generations=3, progress=stop)
    assert all(thread.daemon and thread.is_alive() for thread in threads)
    release.set()
    for thread in threads:  # they end once they can
        thread.join(60)
        assert not thread.is_alive()
