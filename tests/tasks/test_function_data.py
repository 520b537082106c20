"""Task function_calling: files good and bad, splits that share no tool, prompts with tools and without."""

import csv
import inspect
import itertools
import json
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, STOPS, build, byte_tokenizer, decoder, token_id

from grpo.chat import Chat
from grpo.tasks import SPLITS, Example, OpeningTask, WarmStartTask, get_task, opening
from grpo.tasks.function_calling import DEFAULT_CATEGORIES, FunctionCalling, xlam
from grpo.tasks.function_calling.berkeley import CATEGORIES
from grpo.tasks.function_calling.data import SMALL_HELDOUT_SHARE, defaults_of, hashed_place, tool

QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}# Tools\n<tools>"
    "{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\\n' }}</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if not (tools and loop.first and m.role == 'system') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def record(number: int, *names: str, **changes: Any) -> dict[str, Any]:
    """One xLAM record, as published: tools and answers are JSON in strings."""
    names = names or (f"tool_{number}",)
    tools = [
        {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {
                "x": {"description": "A number.", "type": "int"},
                "y": {"type": "str, optional", "default": "a"},
            },
        }
        for name in names
    ]
    answers = [{"name": names[0], "arguments": {"x": number}}]
    plain = {
        "id": number,
        "query": f"Question {number}?",
        "tools": json.dumps(tools),
        "answers": json.dumps(answers),
    }
    return {**plain, **changes}


def lines(path: Path, records: Iterable[Any]) -> str:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")
    return str(path)


def everything(task: FunctionCalling) -> dict[str, list[Example]]:
    return {split: task.examples(split, task._splits.size(split)) for split in SPLITS}


def tool_names(examples: Iterable[Example]) -> set[str]:
    return {one["function"]["name"] for example in examples for one in example.data["tools"]}


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bfcl_eval", None)


@pytest.fixture(scope="module")
def berkeley(warned: Any) -> FunctionCalling:
    pytest.importorskip("bfcl_eval", reason="the package bfcl-eval is not installed")
    with warned("skipped 2 of 3475 records: live_simple_106-63-0: no value is accepted"):
        return FunctionCalling(categories="all")


# --- xLAM files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", ["lines", "array", "indented array", "lists in place of strings", "with a BOM"]
)
def test_layouts_of_the_published_file(tmp_path: Path, layout: str) -> None:
    records = [record(i, query=f"Wie heißt {i}? 🙂") for i in range(40)]
    if layout == "lists in place of strings":
        records = [
            {**one, "tools": json.loads(one["tools"]), "answers": json.loads(one["answers"])}
            for one in records
        ]
    path = tmp_path / "data.json"
    if "array" in layout:
        path.write_text(
            json.dumps(records, indent=2 if "indented" in layout else None, ensure_ascii=False),
            encoding="utf-8",
        )
    else:
        lines(path, records)
    if layout == "with a BOM":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    task = get_task("function_calling", {"data_path": str(path)})
    assert isinstance(task, FunctionCalling) and task.skipped.count == 0
    found = {example.id: example for example in itertools.chain(*everything(task).values())}
    assert set(found) == {f"xlam:{i}" for i in range(40)}
    example = found["xlam:7"]
    assert example.prompt == "Wie heißt 7? 🙂"
    assert example.data["gold"] == [{"name": "tool_7", "arguments": {"x": 7}}]
    assert example.data["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "tool_7",
                "description": "Does tool_7.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "x": {"description": "A number.", "type": "integer"},
                        "y": {"type": "string", "default": "a"},
                    },
                    "required": ["x"],
                },
            },
        }
    ]
    assert json.loads(json.dumps(example.data)) == example.data
    assert task.verify(example, '[{"name": "tool_7", "arguments": {"x": 7}}]').ok
    assert (
        task.verify(example, '[{"name": "tool_7", "arguments": {"x": 7, "y": "a"}}]').reason == "wrong_keys"
    )
    assert task.tolerant(example, '[{"name": "tool_7", "arguments": {"x": 7, "y": "a"}}]').ok


BAD = {
    "no JSON": '{"query": ',
    "not an object": "[1, 2]",
    "a number": "7",
    "lacks answers": json.dumps({"id": 1, "query": "q", "tools": "[]"}),
    "query must be": json.dumps(record(1, query="  ")),
    "tools is no JSON": json.dumps(record(1, tools="[{")),
    "tools must be a list": json.dumps(record(1, tools="{}")),
    "objects with a name": json.dumps(record(1, tools='[{"description": "x"}]')),
    "parameters of 'f'": json.dumps(record(1, tools='[{"name": "f", "parameters": {"x": 1}}]')),
    "answers must be a list": json.dumps(record(1, answers="null")),
    "name and arguments": json.dumps(record(1, answers='["f"]')),
    "arguments of 'tool_1'": json.dumps(record(1, answers='[{"name": "tool_1", "arguments": "x"}]')),
    "not among the tools": json.dumps(record(1, answers='[{"name": "g", "arguments": {}}]')),
    "'tool_1' the unknown argument 'X'": json.dumps(
        record(1, answers='[{"name": "tool_1", "arguments": {"x": 1, "X": 1}}]')
    ),
    "finds its own answers too_long": json.dumps(
        record(1, answers=json.dumps([{"name": "tool_1", "arguments": {"y": "a" * 8000}}]))
    ),
    "NaN or infinity": json.dumps(record(1, answers='[{"name": "tool_1", "arguments": {"x": NaN}}]')),
    "a key twice": '{"query": "a", "query": "b"}',
    "id must be": json.dumps(record(1, id=[1])),
    "repeats the id 0": json.dumps(record(0)),
    "surrogate pair": json.dumps(record(1, query="\ud800")),
    "nested": json.dumps(record(1))
    .replace("Question 1?", "Question 1?")
    .replace('"id": 1', '"id": ' + "[" * 700 + "]" * 700),
}


@pytest.mark.parametrize("why", BAD)
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_bad_record_is_counted_and_named(tmp_path: Path, why: str, layout: str, warned: Any) -> None:
    good = [json.dumps(record(i)) for i in (0, 2, 3)]
    path = tmp_path / "data.json"
    texts = [good[0], BAD[why], *good[1:]]
    path.write_text("\n".join(texts) if layout == "lines" else f"[{','.join(texts)}]", encoding="utf-8")
    if layout == "array" and why == "no JSON":
        # Where a broken record ends cannot be known, so neither can what follows.
        with pytest.raises(ValueError, match=r"record 2 \(line 1\) is no JSON, is truncated"):
            FunctionCalling(data_path=str(path))
        return
    where = "line 2" if layout == "lines" else r"record 2 \(line 1\)"
    expected = {
        "not an object": "must be an object, got a list",
        "a number": "must be an object, got a number",
        "nested": "is no JSON",
    }
    with warned(rf"data\.json: skipped 1 of 4 records: {where}: .*{expected.get(why, why)}"):
        task = FunctionCalling(data_path=str(path))
    assert task.skipped.count == 1
    assert sum(map(len, everything(task).values())) == 3


def only(tmp_path: Path, tools: list[Any], answers: list[Any], **changes: Any) -> Example:
    """The example of a file with one record."""
    task = FunctionCalling(
        data_path=lines(tmp_path / "data.jsonl", [record(1, tools=tools, answers=answers, **changes)])
    )
    (example,) = itertools.chain(*everything(task).values())
    answer = json.dumps(example.data["gold"])
    assert task.verify(example, answer).ok and task.tolerant(example, answer).ok
    return example


X = {"x": {"type": "int"}}
SCHEMA = {"type": "object", "properties": X, "required": ["x"]}


@pytest.mark.parametrize(
    ("tools", "arguments"),
    [
        # A required argument is left out: descriptions often name a default.
        ([{"name": "f", "parameters": X}], {}),
        ([{"name": "f", "parameters": SCHEMA}], {}),
        ([{"name": "f", "parameters": X}], {"x": None}),  # null is a value here
        ([{"name": "f", "parameters": {"x": {"type": "str", "enum": ["a"]}}}], {"x": "b"}),
        # equal to the default
        ([{"name": "f", "parameters": {"x": {"type": "int", "default": 1}}}], {"x": 1}),
        ([{"name": "f", "parameters": {**SCHEMA, "additionalProperties": True}}], {"x": 1, "y": 2}),
        ([{"name": "f", "parameters": {"y": {}}}, {"name": "f", "parameters": X}], {"x": 1}),  # listed twice
        ([{"name": "f", "parameters": X}, {"name": "f", "parameters": {"y": {}}}], {"x": 1}),
        ([{"name": "f", "parameters": {"type": "object"}}], {}),
        ([{"name": "f", "parameters": {"type": "object", "properties": None}}], {}),
        ([{"name": "f"}], {}),
    ],
)
def test_gold_that_has_a_right_answer_is_kept(
    tmp_path: Path, tools: list[Any], arguments: dict[str, Any]
) -> None:
    answers = [{"name": "f", "arguments": arguments}]
    assert only(tmp_path, tools, answers, id=None).data["gold"] == answers


def test_arguments_must_all_fit_one_of_two_tools_of_a_name(tmp_path: Path) -> None:
    tools = [{"name": "f", "parameters": {"y": {}}}, {"name": "f", "parameters": X}]
    with pytest.raises(ValueError, match="unknown argument 'y'"):
        only(tmp_path, tools, [{"name": "f", "arguments": {"x": 1, "y": 1}}])


def test_nulls_inside_values_and_schemas_of_columns(tmp_path: Path) -> None:
    place = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": None}, "zip": None},
        "required": None,
    }
    tools = [
        {
            "name": "f",
            "parameters": {"type": "object", "properties": {"at": place, "z": None}, "required": ["at"]},
        }
    ]
    example = only(
        tmp_path, tools, [{"name": "f", "arguments": {"at": {"city": "Ulm", "zip": None}, "z": None}}]
    )
    assert example.data["gold"] == [{"name": "f", "arguments": {"at": {"city": "Ulm"}}}]
    (schema,) = example.data["tools"]
    assert schema["function"]["parameters"] == {
        "type": "object",
        "properties": {"at": {"type": "object", "properties": {"city": {"type": "string"}}}},
        "required": ["at"],
    }


def test_the_end_of_a_thought_in_an_argument(tmp_path: Path) -> None:
    gold = [{"name": "f", "arguments": {"x": "a</think>b"}}]
    records = [record(i, tools=[{"name": "f", "parameters": X}], answers=gold) for i in range(20)]
    task = FunctionCalling(data_path=lines(tmp_path / "data.jsonl", records))
    (example,) = task.examples("train", 1)
    for seed in range(20):
        transcript = task.transcript(example, random.Random(seed))
        if transcript.retry is None:
            assert r"<\/think>" in transcript.attempt and task.verify(example, transcript.attempt).ok
        else:
            assert not task.verify(example, transcript.attempt).ok
            assert task.transcript(example, random.Random(seed), transcript.attempt).reflection


def test_many_bad_records_are_all_counted_and_the_first_named(tmp_path: Path, warned: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(["{", json.dumps(record(1)), *["\x80"] * 9]), encoding="latin-1")
    with warned("skipped 10 of 11 records: line 1: .*; line 6: is not UTF-8; and 5 more"):
        FunctionCalling(data_path=str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got the empty file"),
        (b" \n\n ", "got the empty file"),
        (b"[]", "no usable record: none at all"),
        (b"{", "no usable record: line 1: the record is no JSON"),
        (b'{"data": []}', "no usable record: line 1: lacks query, tools, answers"),
        (b"not JSON\nat all\n", "no usable record: line 1: .*; line 2: "),
        (b"[1, 2", "must go on with ',' in line 1, got the end of the file: it is truncated"),
        (b"[1, ", r"record 2 \(line 1\) is no JSON, is truncated"),
        (b'[1, {"query": "a', r"record 2 \(line 1\) is no JSON, is truncated"),
        (b"[1 2]", "must go on with ',' in line 1, got '2'"),
        (b"[1]\n[2]", "more follows the end of the array, in line 2"),
        (b'["\xff"]', "is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FunctionCalling(data_path=str(path))


def test_truncated_files_of_the_published_layouts(tmp_path: Path, warned: Any) -> None:
    records = [record(i) for i in range(30)]
    whole = json.dumps(records).encode()
    path = tmp_path / "data.json"
    for cut in range(len(whole) - 300, len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="truncated"):
            FunctionCalling(data_path=str(path))
    path.write_bytes(b"\n".join(json.dumps(one).encode() for one in records)[:-30])
    with warned("skipped 1 of 30 records: line 30: the record is no JSON"):
        FunctionCalling(data_path=str(path))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_records_are_found_wherever_the_window_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(xlam, "CHUNK", chunk)
    path = tmp_path / "data.json"
    records = [record(i, query=f"ä🙂 {i}") for i in range(8)]
    path.write_text(
        f" \n[ {' , '.join(json.dumps(one, ensure_ascii=False) for one in records)} ]\n", encoding="utf-8"
    )
    task = FunctionCalling(data_path=str(path))
    assert {e.prompt for part in everything(task).values() for e in part} == {f"ä🙂 {i}" for i in range(8)}


def test_a_number_is_not_cut_by_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xlam, "CHUNK", 1)
    path = tmp_path / "data.json"
    path.write_text("[123, 456]")
    with pytest.raises(ValueError, match=r"record 1 \(line 1\): must be an object, got a number; record 2 "):
        FunctionCalling(data_path=str(path))


def test_a_record_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: Any) -> None:
    monkeypatch.setattr(xlam, "CHUNK", 100)
    monkeypatch.setattr(xlam, "MAX_RECORD", 1000)
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps(record(0)) + "\n" + json.dumps(record(1, query="x" * 5000)) + "\n" + json.dumps(record(2))
    )
    with warned("skipped 1 of 3 records: line 2: is longer than 1000"):
        task = FunctionCalling(data_path=str(path))
    assert sum(map(len, everything(task).values())) == 2
    path.write_text(f"[{json.dumps(record(1, query='x' * 50_000))}]")
    with pytest.raises(ValueError, match="longer than 1000"):
        FunctionCalling(data_path=str(path))


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_memory_stays_flat(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "data.json"
    filler = "x" * 20_000
    with path.open("w", encoding="utf-8") as file:
        file.write("[" if layout == "array" else "")
        for i in range(1500):
            end = "\n" if layout == "lines" else ",\n" if i < 1499 else "]"
            file.write(json.dumps(record(i, f"tool_{i % 50}", query=filler)) + end)
    assert path.stat().st_size > 30e6
    tracemalloc.start()
    task = FunctionCalling(data_path=str(path))
    examples = task.examples("train", 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(examples) == 20
    assert peak < 8e6  # a window, and twenty examples of 20 kB


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    task = FunctionCalling(data_path=lines(path, [record(i) for i in range(20)]))
    path.write_text(" " * 10_000)
    with pytest.raises(ValueError, match="has changed since"):
        task.examples("train", 1)


@pytest.mark.parametrize(
    ("given", "kind", "required"),
    [
        ({"type": "str"}, "string", True),
        ({"type": "str, optional"}, "string", False),
        ({"type": "List[List[str]], optional, default: []"}, "array", False),
        ({"type": "int, default is 5"}, "integer", False),
        ({"type": "int (optional)"}, "integer", False),
        ({"type": "float = 0.5"}, "number", True),  # whether 0.5 is a default is not said
        ({"type": "Optional[str]"}, "string", False),
        ({"type": "Optional[Dict[str, int]], default: None"}, "object", False),
        ({"type": "Tuple[int, int]"}, "array", True),
        ({"type": "Union[str, int], optional"}, "Union[str, int]", False),
        ({"type": "Literal['a', 'b']"}, "Literal['a', 'b']", True),
        ({"type": "Dict[str, Union[int, float]]"}, "object", True),
        ({"type": "(int, str)"}, "(int, str)", True),
        ({"type": ""}, "", True),
        ({"type": "bool", "optional": True}, "boolean", False),
        ({"type": "bool", "required": True, "default": True}, "boolean", True),
        ({"type": ["string", "null"]}, ["string", "null"], True),
        ({"type": "Any"}, None, True),
    ],
)
def test_type_strings(given: dict[str, Any], kind: Any, required: bool) -> None:
    parameters = tool("f", "", {"x": given})["function"]["parameters"]
    assert parameters["properties"]["x"].get("type") == kind
    assert parameters["required"] == (["x"] if required else [])


def test_required_flags_and_lists_together() -> None:
    properties = {
        "a": {"type": "string", "required": True},
        "b": {"type": "string", "required": False},
        "c": {"type": "object", "properties": {"d": {"required": True}}, "required": True},
        "e": {"type": "string"},
    }
    for listed, expected in ((["e", "b"], ["e", "a", "c"]), (None, ["a", "c"])):
        schema = {"type": "object", "properties": properties, **({"required": listed} if listed else {})}
        made = tool("f", "", schema)["function"]["parameters"]
        assert made["required"] == expected
        assert made["properties"]["c"] == {"type": "object", "properties": {"d": {}}, "required": ["d"]}


def test_types_and_schemas() -> None:
    flat = {
        "properties": {"type": "Dict[str, Any]", "description": "An argument of this name."},
        "type": {"type": "List[str], optional"},
        "n": {"type": "float"},
        "other": {"type": "Callable"},
    }
    assert tool("f", "", flat)["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "properties": {"type": "object", "description": "An argument of this name."},
            "type": {"type": "array"},
            "n": {"type": "number"},
            "other": {"type": "Callable"},
        },
        "required": ["properties", "n", "other"],
    }
    nested = {
        "type": "dict",
        "properties": {
            "a": {
                "type": "array",
                "items": {"type": "dict", "properties": {"b": {"type": "float", "default": 1.5}}},
            },
            "c": {"type": "any", "default": None},
        },
        "required": ["a"],
    }
    made = tool("g", "", nested)
    assert made["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "a": {
                "type": "array",
                "items": {"type": "object", "properties": {"b": {"type": "number", "default": 1.5}}},
            },
            "c": {"default": None},
        },
        "required": ["a"],
    }
    assert defaults_of([made]) == {"g": {"c": None}}


# --- splits -------------------------------------------------------------------------------------------------


def test_splits_share_no_tool(tmp_path: Path) -> None:
    # chains: record i offers tools i and i + 1 of its family, so that a whole family hangs together
    records = [record(i, f"t{i // 5}_{i % 5}", f"t{i // 5}_{i % 5 + 1}") for i in range(1000)]
    task = FunctionCalling(data_path=lines(tmp_path / "data.jsonl", records))
    parts = everything(task)
    names = {split: tool_names(part) for split, part in parts.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not names[one] & names[other]
        assert not {e.id for e in parts[one]} & {e.id for e in parts[other]}
    assert sum(map(len, parts.values())) == 1000
    assert len(parts["heldout"]) == pytest.approx(1000 * SMALL_HELDOUT_SHARE, abs=120)
    assert 40 <= len(parts["validation"]) <= 160
    families = {split: {name.split("_")[0] for name in part} for split, part in names.items()}
    assert not families["train"] & families["heldout"]


def test_order_and_splits_are_the_same_every_time(tmp_path: Path) -> None:
    records = [record(i) for i in range(300)]
    path = lines(tmp_path / "data.jsonl", records)
    first, again = FunctionCalling(data_path=path), FunctionCalling(data_path=path)
    train = first.examples("train", 60)
    assert again.examples("train", 20, offset=40) == train[40:]
    assert [e.id for e in train] != sorted(e.id for e in train)
    other = FunctionCalling(data_path=path, seed=1)
    assert other.examples("train", 60) != train
    # neither the seed, nor the order of the file, nor what is left out changes a split
    shuffled = FunctionCalling(data_path=lines(tmp_path / "other.jsonl", records[::-1]))
    for split in SPLITS:
        ids = {e.id for e in everything(first)[split]}
        assert ids == {e.id for e in everything(other)[split]} == {e.id for e in everything(shuffled)[split]}
    few = FunctionCalling(data_path=path, max_characters=len(json.dumps(train[0].data["tools"])) + 12)
    assert 0 < few._splits.size("heldout") < first._splits.size("heldout")
    assert {e.id for e in everything(few)["heldout"]} <= {e.id for e in everything(first)["heldout"]}
    code = "import sys; from grpo.tasks import get_task; task = get_task('function_calling', {'data_path': "
    code += f"{path!r}}}); print(*[e.id for e in task.examples('train', 60)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [e.id for e in train]  # another process, with another hash seed


@pytest.mark.parametrize("place", ["train", "heldout"])
def test_what_hangs_together_too_much_is_trained_on(tmp_path: Path, place: str) -> None:
    # whatever the hash says of the tool that everything shares
    held = place == "heldout"
    common = next(f"!{i}" for i in range(99) if (hashed_place(f"!{i}") < SMALL_HELDOUT_SHARE) == held)
    large = [record(i, common, f"t{i}") for i in range(400)]
    small = [record(i) for i in range(400, 1000)]
    parts = everything(FunctionCalling(data_path=lines(tmp_path / "data.jsonl", [*large, *small])))
    assert common in tool_names(parts["train"])
    assert len(parts["train"]) > 650 and len(parts["heldout"]) > 150
    only = everything(FunctionCalling(data_path=lines(tmp_path / "one.jsonl", large)))
    assert len(only["train"]) == 400


def test_a_component_of_everything_is_cut_by_tools(tmp_path: Path, warned: Any) -> None:
    # A ring of 300 tools, each record offers two neighbours: one component.
    records = [record(i, f"t{i % 300}", f"t{(i + 1) % 300}") for i in range(3000)]
    with warned(r"left out (\d+) of 3000 records, which offer tools of several splits"):
        task = FunctionCalling(data_path=lines(tmp_path / "data.jsonl", records))
    parts = everything(task)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not tool_names(parts[one]) & tool_names(parts[other])
    sizes = {split: len(part) for split, part in parts.items()}
    assert sum(sizes.values()) == 3000 - task._splits.left_out
    assert sizes["train"] > 500 and sizes["heldout"] > 300 and sizes["validation"] >= 10
    # Beside it, components of their own keep all their records.
    more = [*records, *(record(i) for i in range(3000, 3300))]
    with warned(f"left out {task._splits.left_out} of 3300"):
        both = everything(FunctionCalling(data_path=lines(tmp_path / "more.jsonl", more)))
    assert sum(map(len, both.values())) == 3300 - task._splits.left_out


def test_records_that_are_not_used_still_tie_their_tools(tmp_path: Path) -> None:
    pair = [record(i, f"a{i}") for i in range(100)] + [record(100 + i, f"b{i}") for i in range(100)]
    ties = [record(200 + i, f"a{i}", f"b{i}") for i in range(100)]
    tied = FunctionCalling(data_path=lines(tmp_path / "tied.jsonl", [*pair, *ties]), max_tools=1)
    for part in everything(tied).values():
        assert {name[1:] for name in tool_names(part) if name[0] == "a"} == {
            name[1:] for name in tool_names(part) if name[0] == "b"
        }
    assert sum(map(len, everything(tied).values())) == 200


def test_too_many_examples_asked_for(tmp_path: Path) -> None:
    task = FunctionCalling(data_path=lines(tmp_path / "data.jsonl", [record(i) for i in range(50)]))
    size = task._splits.size("train")
    assert len(task.examples("train", size)) == size and task.examples("train", 0, offset=size) == []
    with pytest.raises(ValueError, match=rf"'train' has {size} examples, but offset 1 plus count {size}"):
        task.examples("train", size, offset=1)
    with pytest.raises(ValueError, match="split must be one of"):
        task.examples("test", 1)
    with pytest.raises(ValueError, match="at least 0"):
        task.examples("train", -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_path": "/no/such/file"}, "data_path must be an xLAM file"),
        ({"data_path": "."}, "data_path must be an xLAM file"),
        ({"data_path": "x", "categories": "live"}, "categories must be left out with data_path"),
        ({"categories": "simple"}, "categories must be among all, live, simple_python.*got 'simple'"),
        ({"categories": ""}, "categories must be among"),
        ({"categories": []}, "categories must be among"),
        ({"categories": [3]}, "categories must be among"),
        ({"max_tools": 0}, "max_tools must be at least 1"),
        ({"max_characters": 0}, "max_characters must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task("function_calling", options)


def test_without_the_package_the_error_names_the_command(no_package: None) -> None:
    with pytest.raises(ValueError, match="pip install --no-deps bfcl-eval, or task_options data_path=FILE"):
        get_task("function_calling")


# --- the Berkeley files -------------------------------------------------------------------------------------


def test_every_berkeley_example_is_there_and_no_tool_is_in_two_splits(berkeley: FunctionCalling) -> None:
    parts = everything(berkeley)
    # 3,475 lines; for two of them the files accept no value of some argument
    assert berkeley.skipped.count == 2 and sum(map(len, parts.values())) == 3473
    for one, other in itertools.combinations(SPLITS, 2):
        assert not tool_names(parts[one]) & tool_names(parts[other])
    found = {example.id.rpartition("_")[0] for part in parts.values() for example in part}
    assert found == set(CATEGORIES)
    assert all("irrelevance" in e.id for part in parts.values() for e in part if not e.data["gold"])
    assert all(len(part) > 100 for part in parts.values())


def test_roles_take_turns(berkeley: FunctionCalling) -> None:
    for example in itertools.chain(*everything(berkeley).values()):
        roles = [message["role"] for message in example.data["history"]] + ["user"]
        assert all(one != other for one, other in itertools.pairwise(roles)), example.id


def test_the_choice_of_categories_moves_no_example(
    berkeley: FunctionCalling, capsys: pytest.CaptureFixture[str]
) -> None:
    split_of = {example.id: split for split, part in everything(berkeley).items() for example in part}
    chosen = FunctionCalling(categories="simple_python+irrelevance")
    parts = everything(chosen)
    assert {e.id.rpartition("_")[0] for e in parts["train"]} == {"simple_python", "irrelevance"}
    assert sum(map(len, parts.values())) == 640
    assert all(split_of[e.id] == split for split, part in parts.items() for e in part)
    assert {e.id.rpartition("_")[0] for e in FunctionCalling().examples("train", 600)} == set(CATEGORIES[:5])
    FunctionCalling(categories="multiple+live_multiple")
    assert capsys.readouterr().err == ""  # what is skipped in other categories is not this choice's matter
    few = FunctionCalling(categories=["multiple"], max_tools=2, max_characters=1500)
    assert all(len(e.data["tools"]) <= 2 for part in everything(few).values() for e in part)


@pytest.mark.parametrize(
    "damage", ["no file", "no JSON", "no answer", "a name", "values", "arguments", "NaN", "surrogate"]
)
def test_files_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    folder = tmp_path / "bfcl_eval/data"
    (folder / "possible_answer").mkdir(parents=True)
    (tmp_path / "bfcl_eval/__init__.py").write_text("raise RuntimeError('the package is never imported')")
    function = {"name": "f", "description": "", "parameters": {"type": "dict", "properties": {}}}
    for category in CATEGORIES:
        question = [[{"role": "user", "content": "Well?"}]]
        line = json.dumps({"id": f"{category}_0", "question": question, "function": [function]})
        answer = json.dumps({"id": f"{category}_0", "ground_truth": [{"f": {}}]})
        (folder / f"BFCL_v4_{category}.json").write_text(line + "\n")
        (folder / "possible_answer" / f"BFCL_v4_{category}.json").write_text(answer)
    monkeypatch.delitem(sys.modules, "bfcl_eval", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert sum(map(len, everything(FunctionCalling(categories="all")).values())) == 10
    broken = folder / "possible_answer/BFCL_v4_multiple.json"
    if damage == "no file":
        broken.unlink()
    else:
        truths = {
            "a name": {"f": {}, "g": 1},
            "values": {"f": {"x": 1}},
            "arguments": {"f": None},
            "NaN": {"f": {"x": [float("nan")]}},
            "surrogate": {"f": {"x": ["\ud800"]}},
        }
        other = json.dumps({"id": "multiple_0", "ground_truth": [truths.get(damage)]})
        broken.write_text({"no answer": "", "no JSON": "{"}.get(damage, other))
    with pytest.raises(
        ValueError, match="BFCL_v4_multiple|no answer to multiple_0|multiple_0.* cannot be read"
    ):
        FunctionCalling()


def answer_of(example: Example) -> str:
    """The first accepted values, written as JSON."""

    def concrete(one: Any) -> Any:
        if isinstance(one, dict):
            return {key: concrete(values[0]) for key, values in first(one).items()}
        return [concrete(item) for item in one] if isinstance(one, list) else one

    def first(arguments: dict[str, Any]) -> dict[str, list[Any]]:
        kept = {}
        for key, values in arguments.items():
            others = [value for value in values if value != ""] if isinstance(values, list) else [values]
            if others:
                kept[key] = others
        return kept

    calls = [
        {
            "name": one["name"],
            "arguments": {key: concrete(v[0]) for key, v in first(one["arguments"]).items()},
        }
        for one in example.data["gold"]
    ]
    return json.dumps(calls)


def test_berkeley_answers_are_right_and_leak(berkeley: FunctionCalling) -> None:
    for example in itertools.chain(*everything(berkeley).values()):
        answer = answer_of(example)
        assert berkeley.verify(example, answer).ok, example.id
        assert berkeley.tolerant(example, answer).ok
        if example.data["gold"]:
            assert berkeley.leaks(example, f"It should have been {answer}, I think.") or len(answer) > 6000
            assert not berkeley.verify(example, "No tool fits.").ok and not berkeley.leaks(
                example, "No tool fits."
            )
        else:
            assert berkeley.verify(example, "No tool fits.").ok and not berkeley.leaks(
                example, "No tool fits."
            )
        assert example.prompt and json.loads(json.dumps(example.data)) == example.data


def test_berkeley_schemas_hold_json_schema_types_only(berkeley: FunctionCalling) -> None:
    kinds: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            kinds.update([node["type"]] if isinstance(node.get("type"), str) else [])
            for key, value in node.items():
                if key in ("properties", "items") or (
                    isinstance(value, dict) and key not in ("default", "enum")
                ):
                    walk(value)

    for part in everything(berkeley).values():
        for example in part:
            for one in example.data["tools"]:
                assert one["type"] == "function"
                walk({"parameters": one["function"]["parameters"]})
    assert kinds <= {"object", "array", "string", "integer", "number", "boolean"}


COLUMNS = ["answers", "both accept", "both reject", "only bfcl accepts", "only ours accepts", "bfcl raises"]


def as_in_the_script(kind: str) -> str:
    names = {
        "text with a full stop at the end": "text with a full stop",
        "texts of a list in another case": "list items in another case",
        '"" given for an optional argument': "empty text for a value (optional)",
    }
    return names.get(kind, kind)


def test_the_agreement_with_the_leaderboards_checker(tmp_path: Path) -> None:
    pytest.importorskip("bfcl_eval", reason="the package bfcl-eval is not installed")
    script = Path(__file__).parents[2] / "benchmarks/verifier_agreement.py"
    done = subprocess.run(
        [sys.executable, str(script), "--output", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "first accepted values" in done.stdout
    listed = json.loads((tmp_path / "agreement.json").read_text(encoding="utf-8"))
    # Every kind of disagreement, each explained in docs/verifiers.md, and its figures.
    with (tmp_path / "agreement.csv").open(encoding="utf-8") as file:
        counted = {row["kind"]: row for row in csv.DictReader(file)}
    differ = ("only bfcl accepts", "only ours accepts")
    page = (Path(__file__).parents[2] / "docs/verifiers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|`]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    written = {
        as_in_the_script(row[0]): tuple(int(cell.replace(",", "")) for cell in row[1:]) for row in rows
    }
    assert written == {
        kind: tuple(int(row[column]) for column in ("answers", *differ))
        for kind, row in counted.items()
        if any(int(row[column]) for column in differ)
    }
    totals = {column: sum(int(row[column]) for row in counted.values()) for column in COLUMNS}
    assert (
        f"Of {totals['answers']:,} answers both accept {totals['both accept']:,} and reject "
        f"{totals['both reject']:,}. They disagree about {sum(totals[column] for column in differ):,}, in"
        in page
    )
    assert f"In the other {len(counted) - len(rows)} kinds" in page
    stricter = [one for one in listed if one["column"] == "only ours accepts"]
    kinds = {one["kind"] for one in stricter}
    assert kinds == {
        "first accepted values",
        "optional arguments left out",
        "calls in reverse order",
        "integer as a float (3.0)",
        "whole float as an integer",
        "empty text for a value (optional)",
    }
    lenient = {one["kind"] for one in listed if one["column"] == "only bfcl accepts"}
    assert lenient == {
        "text in another case",
        "text without its blanks",
        "text with a full stop",
        "text with a blank at the end",
        "list items in another case",
        "list without its last item",
    }
    assert not [one for one in listed if one["column"] == "bfcl raises"]


# --- prompts ------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> FunctionCalling:
    return FunctionCalling(
        data_path=lines(tmp_path / "data.jsonl", [record(i, f"a{i}", f"b{i}") for i in range(60)])
    )


def chat_with(template: str) -> Chat:
    tokenizer = byte_tokenizer(template=template)
    return Chat(tokenizer, [token_id(tokenizer, "<|im_end|>")])


def test_tools_go_through_the_models_template(task: FunctionCalling) -> None:
    parts = build(task=task, tokenizer=byte_tokenizer(template=QWEN_TOOLS))
    (example,) = task.examples("train", 1)
    text = parts.tokenizer.decode(parts.rollout.prompt_ids(example))
    schemas = "".join(f"\n{json.dumps(one)}" for one in example.data["tools"])
    assert text == (
        f"<|im_start|>system\n# Tools\n<tools>{schemas}\n</tools><|im_end|>\n"
        f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert isinstance(task, OpeningTask) and isinstance(task, WarmStartTask)
    # The retry asks the question again, without the tools: they still stand at the beginning.
    again = parts.tokenizer.decode(parts.chat.glue([], "length", example.prompt))
    assert again == f"<|im_end|>\n<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_without_tools_gets_them_as_text(task: FunctionCalling) -> None:
    parts = build(task=task, tokenizer=byte_tokenizer(template=CHATML))
    (example,) = task.examples("train", 1)
    text = parts.tokenizer.decode(parts.rollout.prompt_ids(example))
    functions = json.dumps([one["function"] for one in example.data["tools"]])
    assert text.startswith("<|im_start|>system\nYou can call the functions below.")
    assert '{"name": ..., "arguments": {...}}' in text and "{{" not in text
    assert text.endswith(
        f"{functions}<|im_end|>\n<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_earlier_messages_come_first(task: FunctionCalling) -> None:
    history = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hi!"},
    ]
    tools = task.examples("train", 1)[0].data["tools"]
    example = Example("x", "And now?", {"tools": tools, "gold": [], "history": history})
    plain, with_tools = (opening(task, example, chat_with(template)) for template in (CHATML, QWEN_TOOLS))
    assert with_tools == {"messages": [*history, {"role": "user", "content": "And now?"}], "tools": tools}
    roles = [message["role"] for message in plain["messages"]]
    assert roles == ["system", "user", "assistant", "user"] and "tools" not in plain
    assert plain["messages"][0]["content"].startswith("Be kind.\n\nYou can call")


def test_a_whole_step_on_function_calling(task: FunctionCalling) -> None:
    # random model: nothing is right, but every stage takes the task as it takes Countdown
    tokenizer = byte_tokenizer(template=QWEN_TOOLS)
    ends = [token_id(tokenizer, stop) for stop in STOPS]
    model = decoder(len(tokenizer), likely=ends, max_position_embeddings=4096)
    parts = build(task=task, tokenizer=tokenizer, model=model)
    attempts = parts.rollout.attempts(task.examples("train", 2), stage="failures")
    episodes = parts.rollout.reflect_and_retry(attempts, num_generations=2, stage="rollout")
    assert len(episodes) == 4 and all(episode.reward == 0.0 for episode in episodes)
    assert {reason for episode in episodes for reason in episode.reasons} <= {"empty", "no_call", "parse"}


def test_leaks(task: FunctionCalling) -> None:
    (example,) = task.examples("train", 1)
    (gold,) = example.data["gold"]
    right, wrong = json.dumps(gold), json.dumps({**gold, "arguments": {"x": -1}})
    for text in (right, f"I wrote {wrong}, but it is {right}.", f"<tool_call>{right}</tool_call>"):
        assert task.leaks(example, text), text
    # In a thought of the reflection too: the retry's context has it.
    for text in (f"<think>{right}</think>Hm.", f"Is it {right}?</think>Hm.", f"<think>{right}"):
        assert task.leaks(example, text), text
    for text in ("", wrong, "Call it with the right number.", right[:-1]):
        assert not task.leaks(example, text), text


def test_the_instruction_is_the_papers() -> None:
    assert FunctionCalling.reflection_instruction == (
        "You tried performing the task, but failed in generating the correct tool call. Reflect on what went "
        "wrong and write a short explanation that will help you do better next time."
    )


# --- the docs -----------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"


def test_the_options_in_the_docs_are_those_of_the_class() -> None:
    page = (DOCS / "tasks.md").read_text(encoding="utf-8")
    part = page[page.index("`--task function_calling`") : page.index("## Function calling, generated")]
    names = re.findall(r"`(\w+)`", " ".join(re.findall(r"^- ((?:`\w+`(?: and )?)+) \(", part, re.MULTILINE)))
    assert names == list(inspect.signature(FunctionCalling).parameters)
    default = re.search(r"`categories` \(`\"(.*?)\"`\)", part)
    assert default and default[1] == DEFAULT_CATEGORIES


def test_the_sizes_in_the_docs(berkeley: FunctionCalling, warned: Any) -> None:
    page = (DOCS / "tasks.md").read_text(encoding="utf-8")
    with warned("skipped 2"):
        tasks = {
            "the default five": FunctionCalling(),
            "live": FunctionCalling(categories="live"),
            "all": berkeley,
        }
    for name, task in tasks.items():
        sizes = " | ".join(f"{task._splits.size(split):,}" for split in SPLITS)
        assert f"| {name} | {sizes} |" in page
