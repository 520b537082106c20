"""reasoning-gym as tasks: disjoint splits, scores, answers that must not be run, and two steps."""

import itertools

import pytest
import tiny

pytest.importorskip("reasoning_gym")

from grpo.tasks import SPLITS, contract, get_task
from grpo.tasks.reasoning_gym import main, names

STEPPED = ["spell_backward", "gcd", "chain_sum", "count_bits", "polynomial_multiplication"]


def task(name, **options):
    return get_task("reasoning_gym", {"name": name, **options})


@pytest.mark.parametrize("name", [*STEPPED, "coin_flip"])
def test_splits_share_no_question_and_are_the_same_each_time(name):
    made = task(name)
    splits = {split: made.examples(split, 12) for split in SPLITS}  # some tasks take seconds for more
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {e.prompt for e in splits[one]} & {e.prompt for e in splits[other]}
    assert all(len({e.id for e in part}) == 12 for part in splits.values())
    again = task(name)  # whatever the order of the requests
    assert [again.examples("train", 4, 8), again.examples("heldout", 12)] == [
        splits["train"][8:],
        splits["heldout"],
    ]
    other = task(name, seed=1).examples("heldout", 12)
    assert [e.id for e in other] != [e.id for e in splits["heldout"]]
    assert not {e.prompt for e in other} & {e.prompt for e in splits["train"]}


@pytest.mark.parametrize("name", STEPPED)
def test_right_answers_score_one_and_others_less(name):
    made = task(name)
    for example in made.examples("train", 3):
        right = example.data["answer"]
        assert made.verify(example, f"So <answer>{right}</answer>").ok and made.leaks(
            example, f"It is {right}"
        )
        for text, reason in [
            ("<answer>zz</answer>", "wrong_value"),
            (right, "no_answer"),
            ("<answer> </answer>", "empty"),
            (f"<answer>{'1' * 20_000}</answer>", "too_long"),
            (f"<think><answer>{right}</answer>", "no_answer"),
        ]:
            verdict = made.verify(example, text)
            assert verdict.reason == reason and verdict.score < 1


def test_a_score_may_lie_between():
    made = task("spell_backward")
    (example,) = made.examples("train", 1)
    word = example.data["answer"]
    assert 0 < made.verify(example, f"<answer>{word[:-1]}z</answer>").score < 1


@pytest.mark.parametrize("name", ["n_queens", "binary_matrix", "string_insertion", "spiral_matrix"])
def test_answers_are_not_run_as_python(name, tmp_path):
    made = task(name)
    (example,) = made.examples("train", 1)
    code = f"[open({str(tmp_path / 'written')!r}, 'w').write('x')]"
    assert not made.verify(example, f"<answer>{code}</answer>").ok
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    "name",
    ["simple_integration", "polynomial_multiplication", "puzzle24", "countdown", "intermediate_integration"],
)
def test_formulas_are_not_run_as_python(name, tmp_path):
    made = task(name)
    (example,) = made.examples("train", 1)
    assert made.verify(example, f"<answer>{example.data['answer']}</answer>").score > 0.5
    code = f"open({str(tmp_path / 'written')!r}, 'w').write('x')"
    for text in (code, "x.__class__", "__import__('os')", "().__class__"):
        assert not made.verify(example, f"<answer>{text}</answer>").ok
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("name", STEPPED)
def test_two_steps(name):
    model = tiny.decoder(len(tiny.byte_tokenizer()), likely=(256, 258), max_position_embeddings=2048)
    parts = tiny.build(task=task(name), model=model, groups_per_step=2, num_generations=2, reward="score")
    contract.check_task(parts.task, {"train": {"num_examples": 8}}, parts.chat)
    pool = tiny.failures(parts, 2)
    learner = tiny.learner(parts)
    for step in (1, 2):
        learner.step(tiny.episodes(parts, pool, step=step))
    assert learner.num_steps == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name must be a generator of reasoning-gym, got ''"),
        ({"name": "gdc"}, "got 'gdc'; did you mean gcd"),
        ({"name": "gcd", "min_number": 2}, "got 'min_number'; did you mean min_numbers"),
        ({"name": "gcd", "min_numbers": 9, "max_numbers": 2}, "max_numbers must be >= min_numbers"),
        ({"name": "gcd", "min_numbers": "x"}, "cannot be built"),
        ({"name": "gcd", "seed": 85}, "seed must be from 0 to 84, got 85"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        get_task("reasoning_gym", options)


def test_a_small_generator_says_how_many_questions_it_has():
    with pytest.raises(ValueError, match=r"split 'train' has \d\d examples, .* coin_flip finds no more"):
        task("coin_flip").examples("train", 10_000)


def test_the_command_lists_generators_and_shows_one(capsys):
    assert main([]) == 0
    assert set(names()) <= set(capsys.readouterr().out.split()) and len(names()) > 90
    assert main(["gcd"]) == 0
    shown = capsys.readouterr().out
    assert "min_numbers = 2" in shown and "question:" in shown and "name=gcd" in shown
    assert main(["gdc"]) == 2 and "did you mean gcd" in capsys.readouterr().err
