"""Inputs from public bug reports about trainers, engines and converters, and what happens to them here.

One test per report, named after the input; sections by kind. Inputs that benchmarks/fuzz.py found are in the
last section.
"""

from __future__ import annotations

import codecs
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch

from grpo import config
from grpo.loss import grpo_loss
from grpo.run import checkpoint
from grpo.tasks import SPLITS, Verdict, countdown, function_calling
from grpo.tasks.contract import PROBES
from grpo.tasks.function_calling import FunctionCalling
from grpo.tasks.function_calling.data import tool


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.save_model(tmp_path_factory.mktemp("model"))


# --- 1. checkpoints tell other programs everything the run used --------------------------------------------

# --- 2. no library or default silently replaces something --------------------------------------------------

# --- 3. thinking models ------------------------------------------------------------------------------------

CALL = '{"name": "f", "arguments": {"x": 1}}'
TAGGED = f"<tool_call>{CALL}</tool_call>"


@pytest.mark.parametrize("opened", ["<think>", ""], ids=["by the text", "by the prompt"])
@pytest.mark.parametrize(
    "thought",
    [f"I write {TAGGED}.", "I need a <tool_call> tag.", f"Draft: ```json\n{CALL}\n```", "", "x" * 9000],
)
@pytest.mark.parametrize("answer", [TAGGED, CALL, f"```json\n{CALL}\n```"])
def test_calls_drafted_in_a_thought(opened: str, thought: str, answer: str) -> None:
    text = f"{opened}\n{thought}\n</think>\n\n{answer}"
    assert function_calling.verify(text, [json.loads(CALL)]).ok
    assert function_calling.verify(text, []).reason == "wrong_count"
    assert function_calling.verify(f"{opened}{thought}{answer}</think>No tool fits.", []).ok


def test_countdown_answer_drafted_in_a_thought() -> None:
    for text in ("<think><answer>3+5</answer></think>", "<answer>3+5</answer> fits.</think>"):
        assert countdown.verify(text, [3, 5], 8).reason == "no_answer"
        assert countdown.verify(f"{text}\n<answer>5 + 3</answer>", [3, 5], 8).ok
        assert countdown.verify(f"{text}<answer>5-3</answer>", [3, 5], 8).reason == "wrong_value"


def test_thought_without_an_end() -> None:
    for text in ("<think>" + TAGGED, f"<think>a</think><think>{TAGGED}", "<think>" + "x" * 9000, "<think>"):
        for gold in ([json.loads(CALL)], []):
            assert function_calling.verify(text, gold).reason == "no_call", text
    assert countdown.verify("<think><answer>3+5</answer>", [3, 5], 8).reason == "no_answer"


# --- 4. tags, tokens and text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "string", ["</tool_call>", "<tool_call>", f"see {TAGGED}", "```", "```json\n[]\n```"]
)
@pytest.mark.parametrize("python_syntax", [False, True])
def test_tags_and_fences_inside_strings(string: str, python_syntax: bool) -> None:
    gold = [{"name": "f", "arguments": {"x": string}}]
    texts = [json.dumps(gold), *([f"[f(x={string!r})]"] if python_syntax else [])]
    for text in texts:
        for written in (
            text,
            f"<tool_call>\n{text}\n</tool_call>",
            f"Well: <tool_call>{text}</tool_call> Done.",
            f"```json\n{text}\n```",
            f"Well: ```json {text}``` Done.",
        ):
            assert function_calling.verify(written, gold, python_syntax).ok, written
        assert function_calling.verify(f"<tool_call>{text}", gold, python_syntax).reason == "parse"


# --- 5. state outside the settings -------------------------------------------------------------------------

# --- 6. RoPE that depends on the length --------------------------------------------------------------------

# --- 7. data without a right answer ------------------------------------------------------------------------


def xlam_file(folder: Path, tools: Any, *answers: Any) -> str:
    """An xLAM file in which each record offers the same tools."""
    path = folder / "xlam.json"
    path.write_text(json.dumps([{"query": "q", "tools": tools, "answers": one} for one in answers]))
    return str(path)


PLAIN = [{"name": "f", "parameters": {"x": {"type": "int"}, "y": {"type": "str", "default": "a"}}}]


@pytest.mark.parametrize("extra", [{"xx": 2}, {"z": None}], ids=["misspelled", "null-filled"])
def test_gold_arguments_that_the_tool_does_not_have(tmp_path: Path, extra: dict[str, Any]) -> None:
    bad, good = ([{"name": "f", "arguments": {"x": 1, **more}}] for more in (extra, {}))
    with pytest.warns(UserWarning, match=rf"skipped 1 of 2 .*'f' the unknown argument '{min(extra)}'"):
        task = FunctionCalling(data_path=xlam_file(tmp_path, PLAIN, bad, good))
    assert task.skipped.count == 1


def test_columns_filled_with_null(tmp_path: Path) -> None:
    # What pyarrow writes for a column of structs: each tool has all parameters, null where there is none.
    x, y = ({"type": "int", "default": None}, {"type": "str", "default": "a"})
    tools = [
        {"name": "f", "description": None, "parameters": {"x": x, "y": y, "z": None}},
        {"name": "g", "description": "G.", "parameters": {"x": None, "y": None, "z": x}},
    ]
    answers = [{"name": "f", "arguments": {"x": 1, "y": None, "z": None}}]
    task = FunctionCalling(data_path=xlam_file(tmp_path, tools, answers))
    (example,) = [e for split in SPLITS for e in task.examples(split, task.size(split))]
    assert example.data["gold"] == [{"name": "f", "arguments": {"x": 1}}]
    first, second = (one["function"] for one in example.data["tools"])
    assert first["description"] == "" and first["parameters"]["required"] == ["x"]
    assert first["parameters"]["properties"] == {
        "x": {"type": "integer"},
        "y": {"type": "string", "default": "a"},
    }
    assert second["parameters"]["properties"] == {"z": {"type": "integer"}}


@pytest.mark.parametrize("kind", ["Union[str, int]", "Callable[[float], float]"])
def test_type_strings_with_commas_in_brackets(kind: str) -> None:
    for suffix in ("", ", optional", ", default: [1, 2]"):
        parameters = tool("f", "", {"x": {"type": kind + suffix}})["function"]["parameters"]
        assert parameters["properties"]["x"]["type"] == kind
        assert parameters["required"] == ([] if suffix else ["x"])


def test_required_false_at_an_argument() -> None:
    arguments = {"x": {"type": "int"}, "y": {"type": "int", "required": False}}
    for given in (arguments, {"type": "object", "properties": arguments, "required": ["x", "y"]}):
        parameters = tool("f", "", given)["function"]["parameters"]
        assert parameters["required"] == ["x"] and parameters["properties"]["y"] == {"type": "integer"}


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


def test_a_byte_order_mark_in_the_settings_the_template_and_the_model(model, tmp_path):
    """As some editors write at the beginning of a file. The template's first token was another one."""
    marked = shutil.copytree(model, tmp_path / "model")
    name = "generation_config.json"  # transformers itself refuses one in the files that it reads
    (marked / name).write_bytes(codecs.BOM_UTF8 + (marked / name).read_bytes())
    (tmp_path / "chat.jinja").write_bytes(codecs.BOM_UTF8 + tiny.CHATML.encode())
    (tmp_path / "mine.yaml").write_bytes(codecs.BOM_UTF8 + f"chat_template: {tmp_path}/chat.jinja".encode())
    plain, done = (
        started(folder, tmp_path / folder.name, max_steps=1, **more)
        for folder, more in ((model, {}), (marked, {"config": tmp_path / "mine.yaml"}))
    )
    assert (plain.status, done.status) == (0, 0), done.err
    prompts = [tiny_run.records(run.folder, "episodes.jsonl")[0]["prompt_ids"] for run in (plain, done)]
    assert prompts[0] == prompts[1]


def test_a_key_that_is_given_twice_in_yaml(tmp_path):
    """The second one won without a word."""
    path = tmp_path / "mine.yaml"
    for text, key in (("seed: 1\nmax_steps: 5\nseed: 2\n", "seed"), ("task_options:\n  a: 1\n  a: 2\n", "a")):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=f"mine.yaml, line 3: the key '{key}' is given twice, first in line "
        ):
            config.from_yaml(path)


def test_a_number_with_a_leading_zero_is_no_octal_number(tmp_path):
    """010 was 8."""
    (tmp_path / "mine.yaml").write_text("seed: 1\nmax_steps: 010\n")
    with pytest.raises(ValueError, match="mine.yaml, line 2: max_steps must be an integer, got '010'; write"):
        config.from_yaml(tmp_path / "mine.yaml")


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
