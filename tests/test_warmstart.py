"""Warm start: which tokens are imitated, contexts as in the rollout, batches that a redone step repeats."""

import random

import pytest
import tiny

from grpo import warmstart
from grpo.rollout import Attempt
from grpo.tasks import Transcript, Verdict
from grpo.tasks.countdown import Countdown

RIGHT, WRONG = "It is 7.", "Hm, a."


@pytest.fixture(scope="module")
def parts():
    return tiny.build()


def batch(parts, *, task=None, examples=7, **changes):
    task = task or parts.task
    settings = {"step": 0, "batch_size": 24, "reflections": 3, "seed": 5, **changes}
    return warmstart.sequences(task, parts.chat, task.examples("train", examples), **settings)


def imitated(parts, completion, mask):
    """The runs of trained tokens, as text, the stop token spelled out."""
    runs, previous = [], False
    for token, trained in zip(completion, mask, strict=True):
        if trained:
            runs = [*runs[:-1], [*runs[-1], token]] if previous else [*runs, [token]]
        previous = trained
    return [parts.tokenizer.decode(run) for run in runs]


def test_only_what_is_worth_imitating_is_trained(parts):
    kinds = set()
    for prompt, completions in batch(parts):
        context = parts.tokenizer.decode(prompt)
        if len(completions) == 1:  # a right attempt, and nothing after it
            assert imitated(parts, *completions[0]) == [RIGHT + "<|im_end|>"] and all(completions[0][1])
            assert context.endswith("?<|im_end|>\n<|im_start|>assistant\n")
            kinds.add("attempt")
            continue
        # The wrong attempt is in the prompt, which has no loss mask at all.
        assert "Hm, " in context and context.endswith("Why was it wrong?<|im_end|>\n<|im_start|>assistant\n")
        for completion, mask in completions:
            reflection, *retry = imitated(parts, completion, mask)
            assert reflection.startswith("Try ") and reflection.endswith(".<|im_end|>")
            text = parts.tokenizer.decode(completion)
            if retry:  # a right one, after the user's turn
                assert retry[0].startswith("Say ") and retry[0].endswith(".<|im_end|>") and len(retry) == 1
                assert mask.count(False) == len(completion) - sum(mask) > 0
            else:  # a wrong one is not even in the sequence
                assert text == reflection and all(mask)
            assert "No idea" not in text
            kinds.add(bool(retry))
    assert kinds == {"attempt", True, False}


def test_contexts_are_those_of_the_rollout(parts):
    """What the model is taught after is, id by id, what it sees when it samples."""
    examples, found = parts.task.examples("train", 7), 0
    for index, (prompt, completions) in enumerate(batch(parts)):
        example = examples[index % 7]
        first = parts.rollout.prompt_ids(example)
        if len(completions) == 1:
            assert prompt == first
            continue
        text = parts.tokenizer.decode(prompt[len(first) :]).partition("<|im_end|>")[0]
        turn = tiny.turn(parts.chat, text)
        failure = Attempt(example, first, turn, text, Verdict("wrong"))
        assert prompt == parts.rollout.reflection_prompt_ids(failure)
        for completion, mask in completions:
            if not all(mask):
                start = mask.index(False)
                glue = parts.chat.glue(completion[:start], "stop", example.prompt)
                assert completion[start : start + len(glue)] == glue and all(mask[start + len(glue) :])
                found += 1
    assert found


def test_reflections_share_the_prompt_of_one_attempt(parts):
    for reflections in (1, 4):
        sizes = {len(completions) for _, completions in batch(parts, reflections=reflections)}
        assert sizes == {1, reflections}
    _, completions = max(batch(parts, reflections=4), key=lambda pair: len(pair[1]))
    assert len({tuple(ids) for ids, _ in completions}) > 1


def test_of_the_reflections_on_one_attempt_the_first_that_helps_brings_its_retry(parts, monkeypatch):
    retries = iter(["Say 9.", "Say 7.", "Say 7.", None] * 2)
    monkeypatch.setattr(parts.task, "transcript", lambda *_: Transcript(WRONG, "Try 7.", next(retries)))
    monkeypatch.setattr(parts.task, "verify", lambda _, text: Verdict("ok" if "7" in text else "wrong"))
    for answers in (False, True):
        (_, completions), *others = batch(parts, batch_size=1, reflections=4, answers=answers)
        texts = [imitated(parts, *completion) for completion in completions]
        reflection, retry = "Try 7.<|im_end|>", "Say 7.<|im_end|>"
        assert texts == [[reflection], [reflection, retry], [reflection], [reflection]]
        assert [imitated(parts, *completions[0]) for _, completions in others] == [[retry]] * answers


def test_a_right_retry_is_a_first_answer_too_where_that_is_asked_for(parts):
    without, found = batch(parts), batch(parts, answers=True)
    added = [pair for pair in found if pair not in without]
    assert [pair for pair in found if pair in without] == without  # the others are as they were
    right = [
        (prompt, completions)
        for prompt, completions in without
        if len(completions) > 1 and any(not all(mask) for _, mask in completions)
    ]
    assert 0 < len(right) == len(added) < len(without)
    for (prompt, completions), (first, [(answer, mask)]) in zip(right, added, strict=True):
        retry = next(imitated(parts, *one)[1] for one in completions if not all(one[1]))
        assert all(mask) and parts.tokenizer.decode(answer) == retry
        assert prompt[: len(first)] == first  # so the learner computes it once for both
        assert parts.tokenizer.decode(first).endswith("?<|im_end|>\n<|im_start|>assistant\n")


def test_a_function_of_seed_and_step(parts):
    random.seed(1)
    first = batch(parts)
    random.seed(2)
    assert batch(parts) == first
    assert batch(parts, seed=6) != first != batch(parts, step=1)
    # Steps walk through the examples, round and round.
    questions = [
        parts.tokenizer.decode(prompt)
        for step in (0, 1)
        for prompt, _ in batch(parts, step=step, batch_size=5)
    ]
    assert [f"Problem {i % 7}?" in text for i, text in enumerate(questions)] == [True] * 10


def test_countdown_transcripts_teach_right_answers_only(parts):
    task = Countdown()
    examples, retries = task.examples("train", 30), 0
    for index, (_, completions) in enumerate(batch(parts, task=task, batch_size=30, examples=30)):
        for completion, mask in completions:
            texts = imitated(parts, completion, mask)
            answers = [text for text in texts if "<answer>" in text]
            assert all(task.verify(examples[index], text).ok for text in answers)
            retries += len(answers)
            assert (len(texts) == 1) == all(mask)
    assert retries > 10


def test_learning_rate_rises_and_falls_to_a_tenth():
    rates = [warmstart.learning_rate_at(step, 40, 1e-3) for step in range(40)]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))
    assert 1e-4 < rates[-1] < 1.1e-4
    assert warmstart.learning_rate_at(0, 1, 1e-3) > 0


def test_the_learner_learns_from_it():
    parts = tiny.build()
    subject = tiny.learner(parts)
    losses = [
        subject.supervised_step(batch(parts, batch_size=6, step=step), 1e-2)["loss"] for step in range(6)
    ]
    assert losses[-1] < 0.7 * losses[0]
