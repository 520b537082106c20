"""inputs.json: which changes are reported, and damaged files. Whole runs: test_reported_inputs.py."""

import copy
import json

import pytest
import tiny
import tiny_run

from grpo.config import Config
from grpo.run import files, inputs

NOW = {
    "chat_template": "0" * 64,
    "tokenizer": {"versions": {"tokenizers": "1", "transformers": "5"}, "sha256": "1" * 64},
    "examples": "2" * 64,
    "heldout": {"count": 2, "sha256": "4" * 64},
    "model": {"config.json": {"bytes": 7, "sha256": "3" * 64}, "model.safetensors": {"bytes": 9}},
}


def check(folder, **changes):
    inputs.save(folder, {**copy.deepcopy(NOW), **changes})
    inputs.check(folder, NOW)


def test_what_is_reported(tmp_path):
    inputs.check(tmp_path, NOW)  # version 0.1
    check(tmp_path)
    with pytest.raises(files.MismatchError, match=r"\(config.json, old.safetensors\).*or start a new run"):
        check(tmp_path, model={**NOW["model"], "config.json": {}, "old.safetensors": {}})
    with pytest.raises(
        files.MismatchError, match="template changed; the tokenizer changed; the task's examples"
    ):
        other = {**NOW["tokenizer"], "sha256": ""}
        check(tmp_path, chat_template="", tokenizer=other, examples="")
    with pytest.raises(files.MismatchError, match="the held-out examples changed"):
        check(tmp_path, heldout={"count": 2, "sha256": ""})
    check(tmp_path, heldout={"count": 4, "sha256": ""})  # a resumed run may have another num_eval
    # Another library may serialise the same tokenizer differently; resume warns of its version.
    check(tmp_path, tokenizer={"versions": {}, "sha256": ""})
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "chat_template.jinja").write_text("")
    with pytest.raises(files.MismatchError, match="the run's own is in .*start/chat_template.jinja"):
        check(tmp_path, chat_template="")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"model": 1}'])
def test_a_damaged_file(tmp_path, content):
    (tmp_path / "inputs.json").write_bytes(content)
    with pytest.raises(files.MismatchError, match="inputs.json is damaged .*; delete it to resume without"):
        inputs.check(tmp_path, NOW)
    with pytest.raises(files.MismatchError, match="damaged"):
        check(tmp_path, model=[])


def test_sums_depend_on_their_inputs_only(tmp_path):
    folder = tiny_run.save_model(tmp_path / "model")
    parts = tiny.build()
    parts.config = Config(model_name_or_path=str(folder), num_eval=1)
    examples = parts.task.examples("train", 3)
    first = inputs.sums(parts, examples)
    assert json.loads(json.dumps(first)) == first == inputs.sums(parts, list(examples))
    assert sorted(first["model"]) == ["config.json", "generation_config.json", "model.safetensors"]
    # What the settings or the environment say is compared elsewhere.
    parts.config.seed += 1
    parts.tokenizer.encode("<s>", split_special_tokens=True)
    assert inputs.sums(parts, examples) == first
    changes = {
        "examples": lambda: setattr(parts.task, "reflection_instruction", "Why?"),
        "tokenizer": lambda: parts.tokenizer.add_tokens(["more"]),
        "model": lambda: (folder / "config.json").write_text("{}"),
    }
    for name, change in changes.items():
        before = inputs.sums(parts, examples)
        change()
        after = inputs.sums(parts, examples)
        assert [key for key in after if after[key] != before[key]] == [name]
