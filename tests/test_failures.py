"""The dataset of failures: what is kept, a build that is killed anywhere, counts, and what is refused."""

import json
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny

from grpo import failures
from grpo.chat import Chat
from grpo.failures import NoSignalError, check_trainable, collect, describe, load, summary
from grpo.rollout import Attempt, Rollout
from grpo.run import files
from grpo.tasks import Example, Verdict
from grpo.tasks.contract import PROBES

EXAMPLES = [Example(f"e{i}", f"Problem {i}", {"i": i}) for i in range(14)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(failures, "BLOCK", 4)


class Scripted:
    """A rollout whose answers are a function of the example. Remembers what it is asked."""

    portions = Rollout.portions

    def __init__(self, right=0.5, die_at=None, max_rows=4, **settings):
        self.right, self.die_at, self.asked, self.settings = right, die_at, [], settings
        self.sampler, self.sizes = SimpleNamespace(max_rows=max_rows), []

    def is_right(self, verdict):
        return verdict.ok

    def attempts(self, examples, *, stage, step, count, progress=None):
        assert step == 0 and stage == "failures"
        self.sizes.append(len(examples))
        self.asked += [example.id for example in examples]
        if self.die_at in self.asked:
            raise KeyboardInterrupt
        return [self.attempt(example, generation) for example in examples for generation in range(count)]

    def attempt(self, example, generation):
        rng = random.Random(f"{example.id} {generation}")
        verdict = Verdict("ok" if rng.random() < self.right else rng.choice(["empty", "wrong"]))
        ids = [rng.randrange(100) for _ in range(3)]
        turn = tiny.Turn(ids, [-1.0] * 3, rng.choice(["stop", "length"]))
        return Attempt(example, [1, 2, example.data["i"]], turn, f"text {ids}", verdict, generation)


def without_logprobs(attempts):
    """An attempt as it is stored: the log-probs of the starting policy are not needed again."""
    blank = [tiny.Turn(a.turn.ids, [0.0] * len(a.turn.ids), a.turn.finish_reason) for a in attempts]
    return [
        Attempt(a.example, a.prompt_ids, turn, a.text, a.verdict, a.generation)
        for a, turn in zip(attempts, blank, strict=True)
    ]


def test_keeps_the_failed_attempts_with_their_ids(tmp_path):
    rollout, calls = Scripted(), []
    path = tmp_path / "new folder" / "failures.jsonl"
    found = collect(path, rollout, EXAMPLES, progress=lambda *args: calls.append(args))
    every = [rollout.attempt(example, 0) for example in EXAMPLES]
    assert found == without_logprobs([a for a in every if not a.verdict.ok]) and 3 < len(found) < 12
    assert load(path) == found
    assert calls == [(0, 14), (4, 14), (8, 14), (12, 14), (14, 14)]
    assert rollout.asked == [example.id for example in EXAMPLES]


def test_failures_of_the_model_are_what_it_saw(tmp_path):
    parts = tiny.build()
    examples = parts.task.examples("train", 6)
    found = collect(
        tmp_path / "f.jsonl", parts.rollout, examples, attempts_per_example=2, failures_per_example=2
    )
    sampled = parts.rollout.attempts(examples, stage="failures", count=2)
    assert found == without_logprobs([a for a in sampled if not a.verdict.ok])
    assert {failure.generation for failure in found} == {0, 1}


def test_scores_below_the_threshold_are_failures_and_are_kept(tmp_path):
    class Graded(tiny.Toy):
        def verify(self, example, text):
            return Verdict("partial", example.data["i"] / 4)

    parts = tiny.build(task=Graded(), success_threshold=0.5)
    found = collect(tmp_path / "f.jsonl", parts.rollout, parts.task.examples("train", 6))
    assert [failure.verdict for failure in found] == [Verdict("partial", 0.0), Verdict("partial", 0.25)]
    assert "4 of them right" in (text := describe(summary(tmp_path / "f.jsonl")))
    assert "Why wrong: partial 2." in text  # not those that are right by their score
    assert load(tmp_path / "f.jsonl") == found
    counts = summary(tmp_path / "f.jsonl")
    assert (counts["solved"], counts["failed"], counts["right"]) == (4, 2, 4)
    other = tiny.build(task=Graded(), success_threshold=0.25)
    with pytest.raises(files.MismatchError, match="success_threshold: 0.5 -> 0.25"):
        collect(tmp_path / "f.jsonl", other.rollout, parts.task.examples("train", 6))


@pytest.mark.parametrize(("attempts", "kept"), [(1, 1), (3, 1), (3, 2), (3, 3)])
def test_attempts_and_failures_per_example(tmp_path, attempts, kept):
    rollout = Scripted(right=0.6)
    options = {"attempts_per_example": attempts, "failures_per_example": kept}
    found = collect(tmp_path / "f.jsonl", rollout, EXAMPLES, **options)
    expected, wrong = [], 0
    for example in EXAMPLES:
        failed = [a for a in (rollout.attempt(example, g) for g in range(attempts)) if not a.verdict.ok]
        expected += failed[:kept]
        wrong += len(failed)
    assert found == without_logprobs(expected)
    counts = summary(tmp_path / "f.jsonl")
    failed_examples = len({a.example.id for a in found})
    assert counts["examples"] == 14 and counts["attempts"] == 14 * attempts
    assert counts["failed"] == failed_examples and counts["solved"] == 14 - failed_examples
    assert counts["right"] == 14 * attempts - wrong == counts["reasons"]["ok"]
    assert sum(counts["reasons"].values()) == 14 * attempts


def test_cut_anywhere_the_build_goes_on_to_the_same_file(tmp_path):
    whole = tmp_path / "whole.jsonl"
    found = collect(whole, Scripted(), EXAMPLES, attempts_per_example=2)
    data = whole.read_bytes()
    lines = data.splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if line.startswith(b'{"block"')]
    assert len(ends) == 4
    position, cuts = 0, []
    for line in lines:  # between lines, inside them, and right before a line's end
        cuts += [position, position + 1, position + len(line) // 2, position + len(line) - 1]
        position += len(line)
    for cut in [*cuts, len(data)]:
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:cut])
        rollout = Scripted()
        assert collect(path, rollout, EXAMPLES, attempts_per_example=2) == found
        assert path.read_bytes() == data
        blocks = sum(len(b"".join(lines[: end + 1])) <= cut for end in ends)
        assert rollout.asked == [example.id for example in EXAMPLES[4 * blocks :]]  # only what was missing


@pytest.mark.parametrize(
    "max_rows, attempts, sizes",
    [
        (1, 1, [4, 4, 4, 2]),  # a block is the least
        (4, 1, [4, 4, 4, 2]),
        (5, 1, [8, 6]),
        (8, 2, [4, 4, 4, 2]),  # two rows each: a block fills the batch
        (12, 2, [8, 6]),
        (256, 1, [14]),
    ],
)
def test_as_many_blocks_as_fill_the_batch_are_sampled_together(tmp_path, max_rows, attempts, sizes):
    """The file is the same for any size of the batch, and any batch continues it."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "f.jsonl"
    found = collect(whole, Scripted(), EXAMPLES, attempts_per_example=attempts)
    rollout, stopped = Scripted(max_rows=max_rows), Scripted(die_at="e7")
    assert collect(path, rollout, EXAMPLES, attempts_per_example=attempts) == found
    assert path.read_bytes() == whole.read_bytes() and rollout.sizes == sizes
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        collect(path, stopped, EXAMPLES, attempts_per_example=attempts)
    rollout = Scripted(max_rows=max_rows)
    assert collect(path, rollout, EXAMPLES, attempts_per_example=attempts) == found
    assert path.read_bytes() == whole.read_bytes()
    # After the stored block, batches end where they would have ended anyway.
    assert [sum(rollout.sizes[:i]) + 4 for i in range(1, len(rollout.sizes) + 1)] == [
        end for end in (sum(sizes[:i]) for i in range(1, len(sizes) + 1)) if end > 4
    ]


def test_killed_while_sampling(tmp_path):
    collect(tmp_path / "whole.jsonl", Scripted(), EXAMPLES)
    path = tmp_path / "f.jsonl"
    for victim in ("e0", "e6", "e13"):
        with pytest.raises(KeyboardInterrupt):
            collect(path, Scripted(die_at=victim), EXAMPLES)
    collect(path, Scripted(), EXAMPLES)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    "others",
    [
        EXAMPLES[::-1],
        EXAMPLES[:7],  # fewer: the second block ends earlier
        EXAMPLES[:4],  # fewer by a whole block
        [*EXAMPLES[:4], Example("other", "p"), *EXAMPLES[5:]],
    ],
)
def test_a_file_of_other_examples_is_refused_and_left_alone(tmp_path, others):
    path = tmp_path / "f.jsonl"
    collect(path, Scripted(), EXAMPLES[:8])
    before, rollout = path.read_bytes(), Scripted()
    with pytest.raises(ValueError, match="built from other examples.*write a new file"):
        collect(path, rollout, others)
    assert path.read_bytes() == before and rollout.asked == []


@pytest.mark.parametrize(
    "changed", [{"temperature": 5.0}, {"weights": "other"}, {"attempts_per_example": 3}], ids=str
)
def test_a_file_of_other_settings_is_refused_and_left_alone(tmp_path, changed):
    """Its figures would be reported as those of the new settings."""
    path = tmp_path / "f.jsonl"
    options = {"weights": "mine", "attempts_per_example": 1}
    collect(path, Scripted(temperature=0.9), EXAMPLES[:8], **options)
    before, rollout = path.read_bytes(), Scripted(temperature=changed.get("temperature", 0.9))
    options |= {name: value for name, value in changed.items() if name in options}
    ((name, value),) = changed.items()
    with pytest.raises(ValueError, match=rf"other settings \({name}: .* -> {value}\): write a new file"):
        collect(path, rollout, EXAMPLES[:8], **options)
    assert path.read_bytes() == before and rollout.asked == []


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("dtype", {"dtype": "bfloat16"}),
        ("task_options", {"task_options": {"numbers": 4}}),
        ("chat_template", {"chat_template": tiny.CHATML + " "}),
    ],
)
def test_failures_of_another_template_dtype_or_other_task_options_are_refused(tmp_path, name, changed):
    path, examples = tmp_path / "f.jsonl", tiny.Toy().examples("train", 4)
    collect(path, tiny.build(task_options={"numbers": 3}).rollout, examples)
    collect(path, tiny.build(task_options={"numbers": 3}).rollout, examples)  # the same again is no mistake
    before = path.read_bytes()
    template = changed.pop("chat_template", None)
    parts = tiny.build(**{"task_options": {"numbers": 3}, **changed})
    if template:
        parts.rollout.chat = Chat(parts.tokenizer, parts.chat.stop_token_ids, template)
    with pytest.raises(files.MismatchError, match=rf"other settings \({name}: .* -> .*\): write a new file"):
        collect(path, parts.rollout, examples)
    assert path.read_bytes() == before


def test_failures_of_version_0_1_are_refused_with_what_they_did_not_record(tmp_path):
    path, examples = tmp_path / "f.jsonl", tiny.Toy().examples("train", 4)
    rollout = tiny.build().rollout
    collect(path, rollout, examples)
    *lines, end = [json.loads(line) for line in path.read_text().splitlines()]
    del end["settings"]["dtype"]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, end]))
    with pytest.raises(
        files.MismatchError, match=r"\(dtype: not recorded -> float32\): .* or delete this one"
    ):
        collect(path, rollout, examples)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "f.jsonl"
    collect(path, Scripted(), EXAMPLES)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[2:]]) + "\n")
    with pytest.raises(files.MismatchError, match="f.jsonl, line 2: not JSON"):
        load(path)


def test_describe_and_no_signal(tmp_path):
    path = tmp_path / "f.jsonl"
    collect(path, Scripted(right=0.4), EXAMPLES)
    counts = summary(path)
    text = describe(counts)
    assert f"14 examples, 14 attempts, {counts['right']} of them right" in text
    assert (
        f"{counts['solved']} examples solved every time and dropped, {counts['failed']} with a failure"
        in text
    )
    assert f"wrong {counts['reasons']['wrong']}" in text and f"empty {counts['reasons']['empty']}" in text
    check_trainable(counts)
    assert "no attempt was right" not in text
    assert "warning: no attempt was right" in describe({**counts, "right": 0})

    assert collect(tmp_path / "easy.jsonl", Scripted(right=1.0), EXAMPLES) == []
    counts = summary(tmp_path / "easy.jsonl")
    assert counts == {
        "examples": 14,
        "solved": 14,
        "failed": 0,
        "attempts": 14,
        "right": 14,
        "reasons": {"ok": 14},
    }
    assert describe(counts).endswith("Why wrong: none.")
    with pytest.raises(NoSignalError, match="no failures found in 14 examples: the task is too easy"):
        check_trainable(counts)


def test_the_file_is_json_lines_with_texts_for_people(tmp_path):
    path = tmp_path / "f.jsonl"
    collect(path, Scripted(right=0.0), EXAMPLES[:2])
    first, second, end = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["example"] == {"id": "e0", "prompt": "Problem 0", "data": {"i": 0}}
    assert second["reason"] in ("empty", "wrong") and second["text"].startswith("text")
    assert (end["first"], end["last"], end["examples"]) == ("e0", "e1", 2)


def test_the_command_reports_wrong_settings(tmp_path, capsys):
    assert failures.main(["--output", str(tmp_path / "f.jsonl"), "--temperature", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: temperature must be above 0")


def test_the_command_with_a_preset_whose_reflections_are_longer(tmp_path, capsys):
    """overlong_buffer of the demo concerns reflections, of which this command samples none."""
    argv = [
        "--output",
        str(tmp_path / "f.jsonl"),
        "--max_reflection_length",
        "24",
        "--model_name_or_path",
        "no",
    ]
    assert failures.main(argv) == 2
    assert "no: no such folder or file" in capsys.readouterr().err


def test_a_bug_in_the_users_task_is_not_reported_as_a_wrong_argument(tmp_path, monkeypatch, capsys):
    parts = tiny.build()
    monkeypatch.setattr("grpo.run.build.parts", lambda config: parts)
    argv = ["--output", str(tmp_path / "f.jsonl"), "--num_examples", "8"]
    unread = "no number"
    monkeypatch.setattr(
        parts.task,
        "verify",
        lambda example, text: Verdict("wrong" if text in PROBES else unread[int(unread)]),
    )
    with pytest.raises(ValueError, match="invalid literal for int"):
        failures.main(argv)
    # One that the probes before the sampling find is one line, with its place.
    monkeypatch.setattr(parts.task, "verify", lambda example, text: int(unread))
    assert failures.main(argv) == 2
    assert "verify raised ValueError: invalid literal" in (line := capsys.readouterr().err)
    assert "test_failures.py, line" in line


def test_a_file_of_other_settings_is_one_line_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("grpo.run.build.parts", lambda config: tiny.build())
    argv = ["--output", str(tmp_path / "f.jsonl"), "--num_examples", "8"]
    assert failures.main(argv) == 0
    assert failures.main([*argv, "--attempts_per_example", "2"]) == 2
    assert "was built with other settings (attempts_per_example: 1 -> 2)" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["grpo.failures", "grpo.evaluate"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_the_commands_quietly(module, number):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", module], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "grpo.run.interrupts" in line:  # its handlers are set next; torch takes a second from here
            break
    for line in process.stderr:
        if " numpy" in line:
            process.send_signal(number)
            break
    rest = process.stderr.read()
    assert process.wait() == 130 and "Traceback" not in rest


def test_each_pass_over_the_pool_has_its_own_order_and_is_shuffled_once(monkeypatch):
    shuffles = []

    class Counted(random.Random):
        def sample(self, *arguments, **options):
            shuffles.append(arguments)
            return super().sample(*arguments, **options)

    monkeypatch.setattr(failures.random, "Random", Counted)
    failures._order.cache_clear()
    pool = [f"failure {i}" for i in range(10)]
    steps = [failures.of_step(pool, step, 4, seed=7) for step in range(1, 11)]
    assert len(shuffles) == 4  # 40 failures, four passes
    orders = [random.Random(f"failures 7 {epoch}").sample(range(10), 10) for epoch in range(4)]
    assert sum(steps, []) == [pool[i] for order in orders for i in order]
    assert failures.of_step(pool, 3, 4, seed=7) == steps[2]  # redone
    assert failures.of_step(pool[:3], 1, 7, seed=7)[:3] != failures.of_step(pool[:3], 1, 7, seed=7)[3:6]


def test_a_new_collection_begins_a_new_order():
    pool = [f"failure {i}" for i in range(10)]
    before = [failures.of_step(pool, step, 4, seed=7) for step in range(1, 11)]
    after = [failures.of_step(pool, step, 4, seed=7, collected=6) for step in range(7, 12)]
    assert all(sorted(sum(steps, [])[:10]) == pool for steps in (before, after))  # each failure once
    assert sum(before, [])[:20] != sum(after, [])
    later = [failures.of_step(pool, step, 4, seed=7, collected=9) for step in range(10, 15)]
    assert later != after


def test_what_later_policies_left_is_forgotten_and_an_earlier_one_must_be_whole(tmp_path):
    for step in (0, 2, 4, 1000000):
        failures.collect(failures.file_of(tmp_path, step), Scripted(), EXAMPLES)
    failures.forget_after(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures-000002.jsonl", "failures.jsonl"]
    path = failures.file_of(tmp_path, 2)
    failures.check_whole(path, len(EXAMPLES))
    failures.forget_after(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["failures.jsonl"]
    failures.collect(path, Scripted(), EXAMPLES)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(files.MismatchError, match="14 examples, got 3 blocks of 4 examples"):
        failures.check_whole(path, len(EXAMPLES))


def test_ctrl_c_in_the_command_keeps_whole_blocks_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(failures, "BLOCK", 4)
    path, calls = tmp_path / "f.jsonl", []

    def interrupted(*arguments, **options):
        calls.append(options)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return Scripted().attempts(*arguments, **options)

    parts = tiny.build()
    monkeypatch.setattr("grpo.run.build.parts", lambda config: parts)
    monkeypatch.setattr(parts.rollout, "attempts", interrupted)
    monkeypatch.setattr(parts.rollout.sampler, "max_rows", 4)
    assert failures.main(["--output", str(path), "--num_examples", "8"]) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert sum("block" in line for line in files.read_jsonl(path)) == 1
