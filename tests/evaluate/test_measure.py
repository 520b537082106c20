"""Measuring a model: a real Rollout over a scripted sampler, resume after a kill, the command itself."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from grpo.evaluate import __main__ as command
from grpo.evaluate.comparison import CONTROLS, report
from grpo.evaluate.measure import measure
from grpo.evaluate.table import table
from grpo.rollout import Rollout
from grpo.run.files import MismatchError
from grpo.sampler.engine import Feed, Finished, Turn
from grpo.tasks import Example, Verdict

STOP = 0
INSTRUCTION = "why wrong?"


class LetterChat:
    """A letter is its code point; the stop token is 0."""

    template_sha256, template_kwargs, end_of_turn = "letters", {}, [STOP]

    def prompt(self, messages):
        return [
            *map(ord, "".join(f"<{m['role']}>{m['content']}" for m in messages)),
            *map(ord, "<assistant>"),
        ]

    def glue(self, completion_ids, finish_reason, user):
        assert (finish_reason == "stop") == (completion_ids[-1:] == [STOP])
        return [STOP] * (finish_reason == "length") + [*map(ord, f"<user>{user}<assistant>")]

    def encode_turn(self, text, after):
        return [*map(ord, text), STOP]

    def decode(self, ids, after):
        return "".join(chr(i) for i in ids if i != STOP)


class HintTask:
    """Right when the answer is "right"; a reflection leaks when it says the word."""

    name, system, reflection_instruction = "hints", None, INSTRUCTION

    def verify(self, example, text):
        return Verdict("ok" if text == "right" else "no_answer" if not text else "wrong_value")

    def leaks(self, example, reflection):
        return "right" in reflection


class ScriptedSampler:
    """Answers by rule: even problems at once, odd ones after a reflection that names *their own* number."""

    temperature, greedy, top_p, top_k, max_rows = 0.9, False, 1.0, 0, 4

    def __init__(self, die_at_run=None, long_reflection=(), max_rows=4):
        self.die_at_run, self.long_reflection, self.max_rows = die_at_run, long_reflection, max_rows
        self.runs, self.contexts = 0, []

    def run(self, rows, *, finished=None, progress=None):
        self.runs += 1
        if self.runs == self.die_at_run:
            raise KeyboardInterrupt
        if progress:
            progress(len(rows), len(rows))
        done = [self.finish(row) for row in rows]
        for index, row in enumerate(done):
            finished(index, row)
        return done

    def finish(self, row):
        context, turns, fed = list(row.prefix), [], []
        for step in row.script:
            if isinstance(step, Feed):
                fed.append(step.ids(turns[-1]) if callable(step.ids) else list(step.ids))
                context += fed[-1]
                continue
            ids = [*map(ord, self.answer("".join(map(chr, context)))), STOP]
            reason = "stop" if len(ids) <= step.limit else "length"
            turns.append(Turn(ids[: step.limit], [-1.0] * min(len(ids), step.limit), reason))
            context += turns[-1].ids
        return Finished(row, turns, fed)

    def answer(self, context):
        self.contexts.append(context)
        *earlier, last = context.removesuffix("<assistant>").split("<user>")
        if last == INSTRUCTION:
            number = earlier[1].partition("<")[0].removeprefix("problem ")
            return f"mind {number}" + " and so on" * 10 * (int(number) in self.long_reflection)
        number = int(last.removeprefix("problem "))
        return "right" if number % 2 == 0 or f"mind {number}" in context else "wrong"


def make_rollout(settings=None, **script):
    settings = {"max_completion_length": 16, "max_reflection_length": 24, "seed": 1, **(settings or {})}
    return Rollout(ScriptedSampler(**script), HintTask(), LetterChat(), **settings)


def make_examples(count):
    return [Example(f"p{i}", f"problem {i}", {}) for i in range(count)]


def test_records_tell_first_try_reflection_retry_and_controls():
    result = measure(make_rollout(), make_examples(6))
    right, failed = result.records[0], result.records[3]
    assert right["first"]["reason"] == "ok" and right["reflection"] is None and right["retry"] is None
    assert failed["first"] == {"text": "wrong", "reason": "wrong_value", "tokens": 6, "finish_reason": "stop"}
    assert failed["reflection"] == {"text": "mind 3", "tokens": 7, "finish_reason": "stop", "leaks": False}
    assert failed["retry"] == {"text": "right", "reason": "ok", "tokens": 6}
    # Only the model's own reflection helps here: nothing, another problem's, and an empty one do not.
    assert {name: one["reason"] for name, one in failed["controls"].items()} == dict.fromkeys(
        CONTROLS, "wrong_value"
    )
    assert result.first_try == [True, False] * 3 and result.second_try == [True] * 6


def test_controls_see_the_contexts_that_they_promise():
    rollout = make_rollout(long_reflection=[3])
    records = measure(rollout, make_examples(4)).records
    assert records[3]["reflection"]["finish_reason"] == "length"
    cut = "mind 3 and so on and so on"[:24]
    asked = "<user>problem 1<assistant>wrong\0<user>"
    seen = [context for context in rollout.sampler.contexts if context.startswith(asked)]
    reflect, again = f"{asked}{INSTRUCTION}<assistant>", "\0<user>problem 1<assistant>"
    assert Counter(seen) == Counter(
        [
            reflect,
            f"{reflect}mind 1{again}",
            f"{asked}problem 1<assistant>",  # blind
            f"{reflect}{again}",  # blanked
            # Problem 3's reflection was cut at its limit: moved to problem 1 it is closed, once.
            f"{reflect}{cut}{again}",
        ]
    )
    own = [context for context in rollout.sampler.contexts if f"{INSTRUCTION}<assistant>{cut}" in context]
    assert own[0].startswith("<user>problem 3") and f"{cut}\0<user>" in own[0]


def test_shuffled_reflections_stay_in_their_block_and_never_with_their_owner():
    rollout = make_rollout()
    measure(rollout, make_examples(12), block=6, controls=["shuffled"])
    given = {}
    for context in rollout.sampler.contexts:
        if "mind" in context:
            owner = int(context.split("<user>")[1].removeprefix("problem ").partition("<")[0])
            given.setdefault(owner, []).append(int(context.partition("mind ")[2].partition("\0")[0]))
    # First the own retry, then the control: 1 -> 3 -> 5 -> 1 in one block, 7 -> 9 -> 11 -> 7 in the next.
    assert given == {1: [1, 3], 3: [3, 5], 5: [5, 1], 7: [7, 9], 9: [9, 11], 11: [11, 7]}


@pytest.mark.parametrize("count", [1, 2])
def test_no_failure_or_a_single_one_leaves_the_shuffled_control_out(count):
    result = measure(make_rollout(), make_examples(count))
    assert [record["controls"].get("shuffled") for record in result.records] == [None] * count
    figures = report({"model": result})
    assert "shuffled" not in figures["models"]["model"]["controls"]
    assert "-" in table(figures)


def test_progress_moves_while_a_block_is_sampled_and_never_runs_ahead():
    calls = []
    measure(make_rollout(), make_examples(10), block=6, progress=lambda *counts: calls.append(counts))
    done = [count for count, _ in calls]
    assert {total for _, total in calls} == {10} and done == sorted(done) and done[-1] == 10
    assert {0, 6, 10} < set(done) and len(calls) > 8
    first_block = done[: done.index(6)]
    assert max(first_block) < 6 and len(set(first_block)) > 2


@pytest.mark.parametrize("die_at_run", range(1, 10))
def test_killed_evaluation_goes_on_and_writes_the_same_file(tmp_path, die_at_run):
    examples, store = make_examples(12), tmp_path / "records" / "model.jsonl"
    whole = tmp_path / "whole.jsonl"
    expected = measure(make_rollout(), examples, block=4, store=whole)
    with pytest.raises(KeyboardInterrupt):
        measure(make_rollout(die_at_run=die_at_run), examples, block=4, store=store)
    if store.exists():
        with open(store, "a", encoding="utf-8") as file:  # a kill in the middle of a write
            file.write('{"id": "p8", "first": {"te')
    again = make_rollout()
    assert measure(again, examples, block=4, store=store) == expected
    assert store.read_bytes() == whole.read_bytes()
    done = (die_at_run - 1) // 3  # a block takes three runs: tries, reflections, shuffled retries
    assert again.sampler.runs == 3 * (3 - done)


@pytest.mark.parametrize("max_rows, runs", [(1, 4), (4, 4), (5, 2), (12, 2), (13, 1)])
def test_blocks_sampled_together_give_the_same_file(tmp_path, max_rows, runs):
    """Each block shuffles its own reflections, and the last one has a single failure."""
    examples = make_examples(14)
    whole, store = tmp_path / "whole.jsonl", tmp_path / "model.jsonl"
    expected = measure(make_rollout(), examples, block=4, store=whole)
    rollout = make_rollout(max_rows=max_rows)
    assert measure(rollout, examples, block=4, store=store) == expected
    assert store.read_bytes() == whole.read_bytes() and rollout.sampler.runs == 3 * runs
    # A store that another batch began is continued.
    ends = [i for i, line in enumerate(store.read_text().splitlines()) if line.startswith('{"block"')]
    lines = store.read_bytes().splitlines(keepends=True)
    for end in ends:
        store.write_bytes(b"".join(lines[: end + 1]))
        assert measure(make_rollout(max_rows=max_rows), examples, block=4, store=store) == expected
        assert store.read_bytes() == whole.read_bytes()


def test_finished_store_is_read_and_nothing_is_sampled(tmp_path):
    store = tmp_path / "model.jsonl"
    expected = measure(make_rollout(), make_examples(5), store=store, identity="a")
    again = make_rollout()
    assert measure(again, make_examples(5), store=store, identity="a") == expected
    assert again.sampler.runs == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": "other weights"}, "made with another identity"),
        ({"controls": ["blind"]}, "made with another controls"),
        ({"examples": make_examples(9)[1:]}, "made for other problems"),
        ({"examples": make_examples(2)}, "made for other problems"),
    ],
)
def test_store_of_another_evaluation_is_refused(tmp_path, change, message):
    arguments = {"examples": make_examples(8), "store": tmp_path / "model.jsonl", "block": 4}
    measure(make_rollout(), **arguments)
    with pytest.raises(ValueError, match=message):
        measure(make_rollout(), **{**arguments, **change})


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("dtype", {"dtype": "bfloat16"}),
        ("task_options", {"task_options": {"numbers": 4}}),
        ("max_completion_length", {"max_completion_length": 15}),
    ],
)
def test_store_of_other_settings_is_refused(tmp_path, name, changed):
    options = {"task_options": {"numbers": (3, 4)}}  # tuples become lists in the file
    store = tmp_path / "model.jsonl"
    measure(make_rollout(options), make_examples(2), store=store)
    measure(make_rollout(options), make_examples(2), store=store)
    before = store.read_bytes()
    with pytest.raises(MismatchError, match=f"made with another {name}: write to a new file, or delete it"):
        measure(make_rollout({**options, **changed}), make_examples(2), store=store)
    assert store.read_bytes() == before


def test_store_of_another_chat_template_is_refused_but_results_are_comparable(tmp_path):
    first, other = make_rollout(), make_rollout()
    other.chat.template_sha256 = "other letters"
    results = {"a": measure(first, make_examples(2), store=tmp_path / "model.jsonl")}
    with pytest.raises(MismatchError, match="made with another chat_template: write to a new file"):
        measure(other, make_examples(2), store=tmp_path / "model.jsonl")
    report({**results, "b": measure(other, make_examples(2))})  # models of other families are no mistake


def test_store_of_version_0_1_is_refused_with_the_names_that_it_lacks(tmp_path):
    store = tmp_path / "model.jsonl"
    measure(make_rollout(), make_examples(2), store=store)
    *records, end = [json.loads(line) for line in store.read_text().splitlines()]
    for name in ("task_options", "chat_template", "dtype"):
        del end["settings"][name]
    store.write_text("".join(json.dumps(line) + "\n" for line in [*records, end]))
    with pytest.raises(MismatchError, match=r"chat_template \(not recorded\), dtype \(not recorded\)"):
        measure(make_rollout(), make_examples(2), store=store)


def test_longer_evaluation_than_a_stored_one_keeps_its_whole_blocks(tmp_path):
    store = tmp_path / "model.jsonl"
    measure(make_rollout(), make_examples(4), store=store, block=4)
    longer = make_rollout()
    assert measure(longer, make_examples(8), store=store, block=4) == measure(
        make_rollout(), make_examples(8), block=4
    )
    assert longer.sampler.runs == 3


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="controls must be among blind, shuffled, blanked, got deaf"):
        measure(make_rollout(), make_examples(1), controls=["deaf"])
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        measure(make_rollout(), make_examples(1), block=0)


# --- the command --------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """Two random Llamas of one architecture, with a tokenizer of single characters."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = [chr(i) for i in range(32, 127)] + ["\n", "<unk>"]
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<system>", "<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        folder = tmp_path_factory.mktemp("models") / f"model-{seed}"
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


COMMON = ["--num_eval", "4", "--dtype", "float32", "--device", "cpu", "--max_completion_length", "6"]
COMMON += ["--max_reflection_length", "8", "--threads", "1"]


def test_command_compares_checkpoints_and_goes_on_from_its_records(tiny_models, tmp_path, capsys):
    output = tmp_path / "out" / "evaluation.json"
    output.parent.mkdir()
    argv = [*tiny_models, *COMMON, "--output", str(output)]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert list(figures["models"]) == ["model-0", "model-1"]
    assert figures["num_problems"] == 4 and len(figures["comparisons"]) == 1
    assert "model-1 minus model-0" in printed and "1st try" in printed
    first = (output.parent / "evaluation-model-0.jsonl").read_bytes()
    assert command.main(argv) == 0
    assert (output.parent / "evaluation-model-0.jsonl").read_bytes() == first
    assert capsys.readouterr().out == printed


def test_same_weights_give_equal_answers_whatever_the_decoding(tiny_models, tmp_path, capsys):
    for decoding in (["--greedy"], ["--eval_temperature", "1.3"], ["--top_p", "0.5", "--top_k", "5"]):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        assert (
            command.main([tiny_models[0], tiny_models[0], *COMMON, *decoding, "--output", str(output)]) == 0
        )
        figures = json.loads(output.read_text())
        assert (
            list(figures["models"]) == ["models0/model-0", "models0/model-0#2"] or len(figures["models"]) == 2
        )
        one, two = figures["models"].values()
        assert one == two
        for example in figures["examples"]:
            assert example["before"] == example["after"]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--greedy", "--eval_temperature", "0.7"], "contradict each other"),
        (["--top_p", "0"], "top_p must be above 0"),
        (["--top_k", "-1"], "top_k must be at least 0, got -1"),
        (["--num_eval", "0"], "num_eval must be at least 1, got 0"),
        (["--num_evals", "3"], "unknown option --num_evals"),
        (["--output", "."], "output must be a file"),
    ],
)
def test_command_explains_wrong_arguments(tiny_models, capsys, extra, message):
    assert command.main([tiny_models[0], *extra]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = "num_eval split eval_temperature greedy top_p top_k controls output KEY".split()
    assert all(f"--{option}" in text for option in options)


def test_interrupt_says_how_to_go_on(tiny_models, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_measure", stop)
    assert command.main([tiny_models[0], "--output", "x.json"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_diverged_weights_are_an_error_and_no_table(tiny_models, monkeypatch, capsys):
    def diverge(*_):
        raise FloatingPointError("the model's logits are NaN")

    monkeypatch.setattr(command, "_measure", diverge)
    assert command.main([tiny_models[0]]) == 1
    assert "logits are NaN" in capsys.readouterr().err


def test_measure_needs_nothing_of_a_task_but_the_protocol():
    rollout = make_rollout()
    rollout.task = SimpleNamespace(
        name="hints",
        system=None,
        reflection_instruction=INSTRUCTION,
        verify=HintTask().verify,
        leaks=HintTask().leaks,
    )
    assert measure(rollout, make_examples(2)).settings["task"] == "hints"


class MildTask(HintTask):
    """Also has a milder judgement: "wrong" will do, except for problem 3."""

    def examples(self, split, count, offset=0):
        return make_examples(offset + count)[offset:]

    def tolerant(self, example, text):
        return Verdict("ok" if text == "right" or example.id != "p3" else "wrong_value")


def test_a_tasks_milder_judgement_is_reported_beside_the_rewards():
    strict, mild = make_rollout(), make_rollout()
    mild.task = MildTask()
    plain, both = measure(strict, make_examples(6)), measure(mild, make_examples(6))
    assert both.first_try == plain.first_try and both.second_try == plain.second_try
    assert [record["first"]["tolerant"] for record in both.records] == ["ok"] * 3 + [
        "wrong_value",
        "ok",
        "ok",
    ]
    assert both.records[3]["retry"]["tolerant"] == "ok"
    figures = report({"model": both})
    tolerant = figures["models"]["model"]["tolerant"]
    assert tolerant["first_try"]["count"] == 5 and tolerant["second_try"]["count"] == 6
    text = table(figures)
    assert "first try, tolerant" in text and "second try, tolerant" in text
    without = report({"model": plain})
    assert "tolerant" not in without["models"]["model"] and "tolerant" not in table(without)
