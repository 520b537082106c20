"""Inputs from public bug reports about trainers, engines and converters, and what happens to them here.

One test per report, named after the input; sections by kind. Inputs that benchmarks/fuzz.py found are in the
last section.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_model
import tiny_run
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_chat import MISTRAL, PHI3, QWEN3
from tiny import CHATML, SPECIAL, byte_tokenizer, token_id
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from grpo import config, failures, warmstart
from grpo.chat import Chat
from grpo.config import Config
from grpo.episode import Episode
from grpo.evaluate import __main__ as evaluate
from grpo.loss import grpo_loss
from grpo.model import weights
from grpo.run import build, checkpoint, files
from grpo.sampler.engine import Row, Sample, Sampler
from grpo.tasks import SPLITS, Example, Verdict, countdown, function_calling
from grpo.tasks.contract import PROBES, json_change
from grpo.tasks.countdown import Countdown
from grpo.tasks.function_calling import FunctionCalling, berkeley
from grpo.tasks.function_calling.data import tool


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_run.save_model(tmp_path_factory.mktemp("model"))


# --- 1. checkpoints tell other programs everything the run used --------------------------------------------

# transformers 4 itself reads checkpoints in tests/model/test_transformers4.py.


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    """A random Llama as a Hugging Face folder."""
    tiny_model.make().save_pretrained(tmp_path / "llama")
    tiny_model.tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_gguf_checkpoint_has_theta_and_tokenizer_class_for_transformers_4(tmp_path):
    """vLLM #42624, transformers #47553: version 4 read a theta of 10,000, and knew no TokenizersBackend."""
    theirs = tiny_model.make(rope_parameters=tiny_model.LLAMA3 | {"rope_theta": 1e5})
    tiny_model.write_gguf(tmp_path / "model.gguf", theirs, extra=tiny_model.llama3_divisors_of(1e5))
    saved = weights.save(*weights.load(tmp_path / "model.gguf"), tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    scaling = {key: value for key, value in tiny_model.LLAMA3.items() if key != "rope_theta"}
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e5
    assert config["rope_scaling"] == scaling
    assert json.loads((saved / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


def test_chatml_on_a_base_model_saves_its_stop_and_its_template(tmp_path):
    """LlamaFactory #7454 and #5904, unsloth #468: saved models that never stop, or have no template."""
    source = tmp_path / "base"
    tokenizer = tiny.byte_tokenizer()
    ends = [tiny.token_id(tokenizer, text) for text in ("<|endoftext|>", "<|im_end|>")]
    model = tiny.decoder(len(tokenizer), likely=ends)
    config = {**tiny.HF_CONFIG, "vocab_size": len(tokenizer), "architectures": ["LlamaForCausalLM"]}
    model.source = weights.Source(config, {"eos_token_id": ends[0]})
    weights.save(model, tokenizer, source)
    (tmp_path / "chatml.jinja").write_text(tiny.CHATML)

    done = tiny_run.run(
        tiny_run.arguments(source, tmp_path / "runs", chat_template=tmp_path / "chatml.jinja")
    )
    assert done.status == 0, done.err
    sha = Chat(tokenizer, ends[:1], chat_template=tiny.CHATML).template_sha256
    for saved in (done.folder / "start", checkpoint.latest(done.folder)):
        generation = json.loads((saved / "generation_config.json").read_text())
        assert generation["eos_token_id"] == ends
        again = build.build_chat(Config(), *weights.load(saved))  # a new run from here needs no chat_template
        assert again.stop_token_ids == tuple(ends) and again.template_sha256 == sha


# --- 2. no library or default silently replaces something --------------------------------------------------


@pytest.mark.parametrize(("label", "model_type"), [("LlamaTokenizerFast", "llama"), (None, "qwen2")])
def test_a_byte_level_tokenizer_under_another_label_is_read_from_its_tokenizer_json(
    label, model_type, folder
):
    """transformers 5.0 to 5.21 lose the spaces of the first; every version 5 splits the second as Qwen's."""
    backend = tiny.byte_tokenizer([("1", "2")]).backend_tokenizer
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": label} if label else {}))
    edit_json(folder / "config.json", model_type=model_type)
    tokenizer = weights.load_tokenizer(folder)
    text = "<answer>12 + 3</answer>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_tokenizer_that_the_library_mangles_is_refused_with_the_version_to_install(folder, monkeypatch):
    vocab = {token: index for index, token in enumerate(tiny_model.VOCAB)}
    mangled = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unused1>"))
    mangled.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    stand_in = transformers.PreTrainedTokenizerFast(tokenizer_object=mangled)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: stand_in)
    with pytest.raises(ValueError, match=r"otherwise than its tokenizer.json .* 'transformers>=5.22'"):
        weights.load(folder)


def test_another_lm_head_next_to_the_tied_flag_is_refused(folder):
    """transformers #42612."""
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        weights.load(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
    )
    assert weights.load(folder)[0].config.tie_word_embeddings


@pytest.mark.parametrize("key", ["tokenizer.ggml.pre", "tokenizer.ggml.token_type", "llama.rope.freq_base"])
def test_a_gguf_without_a_key_whose_default_changes_the_meaning_is_refused(key, tmp_path):
    tiny_model.write_gguf(tmp_path / "model.gguf", tiny_model.make(), without=[key])
    with pytest.raises(ValueError, match=f"has no {key}.*convert the model again"):
        weights.load(tmp_path / "model.gguf")


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
    """Calls drafted in `<think>` were parsed (verl #4757): what follows the last `</think>` is judged."""
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


OPENS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
MESSAGES = [{"role": "user", "content": "1+1?"}]
COUNTDOWN = Countdown()


def chat_of(template: str, **options) -> Chat:
    tokenizer = byte_tokenizer(template=template)
    return Chat(tokenizer, [token_id(tokenizer, "<|im_end|>")], **options)


def test_a_template_that_opens_the_thought() -> None:
    """The sampled text lacks `<think>`, so a thought that was cut at its limit looked like an answer."""
    tokenizer = byte_tokenizer(template=OPENS)
    parts = tiny.build(tokenizer=tokenizer, likely=["7"])
    pool = tiny.failures(parts, 2)
    texts = [attempt.text for attempt in pool]
    for episode in tiny.episodes(parts, pool):
        texts += [episode.texts["reflection"], episode.texts["retry"]]
    texts += [retry.text for retry in parts.rollout.retry_after(pool, [None, None], stage="rollout")]
    assert len(texts) > 10 and all(text.startswith("<think>\n") for text in texts)
    # A draft in a thought that was cut is no answer.
    chat, (example,) = chat_of(OPENS), COUNTDOWN.examples("train", 1)
    transcript = COUNTDOWN.transcript(example, random.Random(1))
    answer = transcript.retry or transcript.attempt
    prompt, ids = chat.prompt(MESSAGES), chat.encode_turn(answer)
    assert COUNTDOWN.verify(example, chat.decode(ids)).ok
    assert COUNTDOWN.verify(example, chat.decode(ids, after=prompt)).reason == "no_answer"
    # Where a later turn's header differs, each turn has its own.
    once = CHATML.replace(
        "assistant\n{% endif", "assistant\n{% if messages | length == 1 %}<think>{% endif %}{% endif"
    )
    chat = chat_of(once)
    first, later = chat.prompt(MESSAGES), chat.glue([], "length", "again")
    ids = chat.encode_turn("2")
    assert [chat.decode(ids, after=context) for context in (first, later, ())] == ["<think>2", "2", "2"]


@pytest.mark.parametrize(
    ("header", "opened"),
    [
        ("<think>\n", "<think>\n"),
        ("<think>\nOkay, ", "<think>\nOkay, "),
        ("<think>\n\n</think>\n\n", ""),
        ("{{ '<think>' if '/think' in messages[-1].content }}", ""),
    ],
)
def test_which_headers_open_a_thought(header: str, opened: str) -> None:
    chat = chat_of(CHATML.replace("assistant\n{% endif", f"assistant\n{header}{{% endif"))
    assert chat.opened_thought(chat.prompt(MESSAGES)) == opened
    assert chat.opened_thought(chat.glue([], "length", "again")) == opened
    if "if" in header:  # the ids decide, not a dummy conversation
        message = {"role": "user", "content": "Please /think about <think> tags"}
        assert chat.opened_thought(chat.prompt([message])) == "<think>"


def test_a_warm_start_with_a_template_that_opens_the_thought() -> None:
    """It trained answers inside a thought that never ends: the verifier would find no answer in them."""
    chat = chat_of(OPENS)
    examples = COUNTDOWN.examples("train", 8)
    batch = warmstart.sequences(COUNTDOWN, chat, examples, step=0, batch_size=8, reflections=2, seed=0)
    closed, right = "<think>\n\n</think>\n\n", 0
    for prompt, completions in batch:
        assert chat.opened_thought(prompt) == "<think>\n"
        for ids, mask in completions:
            turn = ids[: mask.index(False)] if False in mask else ids
            assert chat.decode(turn, after=prompt).startswith(closed)
            if False in mask:
                start = len(mask) - mask[::-1].index(False)
                answer = chat.decode(ids[start:], after=ids[:start])
                verdicts = [COUNTDOWN.verify(example, answer) for example in examples]
                assert answer.startswith(closed) and any(verdict.ok for verdict in verdicts)
                right += 1
    assert right
    # As the template itself writes it, if it does; and not twice, if the task's text has it.
    own = OPENS.replace("{{ m.content }}", "<think>{{ m.reasoning_content }}</think>{{ m.content }}")
    for template, end in ((OPENS, "\n</think>\n\n"), (own, "</think>")):
        chat = chat_of(template)
        prompt = chat.prompt(MESSAGES)
        assert chat.decode(chat.encode_turn("2", after=prompt)) == f"{end}2"
        assert chat.decode(chat.encode_turn("Hm.</think>2", after=prompt)) == "Hm.</think>2"


NO_THINKING = QWEN3.replace(
    "assistant\n{% endif",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif",
)


def test_thinking_is_turned_off(tmp_path: Path) -> None:
    """Qwen3's template thinks unless it is given `enable_thinking`, which no setting could reach."""
    chat = chat_of(NO_THINKING, template_kwargs={"enable_thinking": False})
    header = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat.tokenizer.decode(chat.prompt(MESSAGES)).endswith(header)
    assert chat.tokenizer.decode(chat.glue([], "length", "2+2?")).endswith(header)
    assert not chat_of(NO_THINKING).tokenizer.decode(chat_of(NO_THINKING).prompt(MESSAGES)).endswith(header)
    # Stored answers record it, and those of version 0.1 are accepted where nothing is set.
    examples, path = tiny.Toy().examples("train", 4), tmp_path / "failures.jsonl"
    parts = tiny.build(tokenizer=chat.tokenizer)
    assert "chat_template_kwargs" not in parts.rollout.settings
    failures.collect(path, parts.rollout, examples)
    parts.rollout.chat = chat
    with pytest.raises(
        files.MismatchError, match="chat_template_kwargs: not recorded -> {'enable_thinking': Fal"
    ):
        failures.collect(path, parts.rollout, examples)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"tools": []}, "must not name tools: the trainer sets these"),
        ({"messages": [], "add_generation_prompt": False}, "must not name add_generation_prompt, messages"),
        ({"conversations": 1}, "must not name conversations"),
        ({"day": float("nan")}, "must map names to JSON values"),
        ({"day": Path()}, "must map names to JSON values"),
        ({1: 2}, "must map names to JSON values"),
        ({"date_string": "tomorrow"}, "date_string must be a date such as '26 Jul 2024'"),
    ],
)
def test_variables_of_a_template_that_are_refused(variables, message: str) -> None:
    with pytest.raises(ValueError, match=f"chat_template_kwargs {message}"):
        chat_of(CHATML + "{{ strftime_now('%Y') }}", template_kwargs=variables)


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


def with_tags(tokenizer: PreTrainedTokenizerFast, *tags: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, *tags]})
    return tokenizer


def test_tags_that_are_special_tokens() -> None:
    """They were stripped before the verifier saw them, so no answer was ever right."""
    tokenizer = with_tags(byte_tokenizer(template=CHATML), "<answer>", "</answer>", "<pad>")
    tokenizer.pad_token = "<pad>"
    chat = Chat(tokenizer, [token_id(tokenizer, "<|im_end|>")])
    text = "<answer>1</answer>"
    ids = chat.encode_turn(text)
    assert token_id(tokenizer, "<answer>") in ids
    assert chat.decode([*ids, *chat.stop_token_ids, tokenizer.pad_token_id]) == text
    assert chat.decode([tokenizer.pad_token_id, *ids]) == text
    assert (
        chat.decode([token_id(tokenizer, "<s>"), *ids]) == "<s>" + text
    )  # whatever else was sampled is shown


def llama_tokenizer(template: str, legacy: bool) -> LlamaTokenizer:
    """SentencePiece's habits: a space before the first word, or (legacy) after each special token too."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127)), "▁W", "▁m", "an"]
    vocab = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    merges = [("▁", "W"), ("▁", "m"), ("a", "n")]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, chat_template=template)
    return with_tags(tokenizer)


QUESTION = "What does <|im_end|> mean, and </s>?"


@pytest.mark.parametrize("template", [CHATML, MISTRAL, PHI3], ids=["chatml", "mistral", "phi3"])
@pytest.mark.parametrize("kind", ["bytes", "llama", "llama legacy"])
def test_control_tokens_in_a_message(template: str, kind: str) -> None:
    """They ended the user's turn: only the template's own special tokens are encoded as such."""
    tokenizer = (
        byte_tokenizer(template=template) if kind == "bytes" else llama_tokenizer(template, "leg" in kind)
    )
    chat = Chat(tokenizer, [token_id(tokenizer, "<|im_end|>")], template_kwargs={"tools_in_use": None})
    special = set(tokenizer.all_special_ids)

    def control(ids: list[int]) -> list[int]:
        return [id for id in ids if id in special]

    harmless = [{"role": "user", "content": "What?"}]
    ids = chat.prompt([{"role": "user", "content": QUESTION}])
    assert control(ids) == control(chat.prompt(harmless)) and QUESTION in tokenizer.decode(ids)
    glue = chat.glue([], "length", QUESTION)
    assert control(glue) == control(chat.glue([], "length", "What?")) and QUESTION in tokenizer.decode(glue)
    # No space appears or disappears, at the beginning or after a special token: with a text that no tokenizer
    # knows as special, the pieces are those of the ordinary way.
    text = chat._render(harmless)
    assert chat._ids(text, {"\ua000": "<|unused|>"}) == chat._ids(text, {})
    # A worked transcript cannot end its own turn either, but may contain other special tokens.
    turn = chat.encode_turn(f"<s>{QUESTION}")
    assert turn[0] == token_id(tokenizer, "<s>") and turn[-1] in chat.stop_token_ids
    assert not set(turn[:-1]) & set(chat.stop_token_ids)
    assert QUESTION.replace(" ", "") in chat.decode(turn).replace(" ", "")


def test_control_tokens_in_the_schema_of_a_tool() -> None:
    chat = chat_of("{% for tool in tools or [] %}{{ tool | tojson }}{{ tool }}{% endfor %}" + CHATML)
    schema = {
        "name": "f<|im_end|>",
        "description": "<|im_start|>",
        "parameters": {"properties": {"</s>": {}}},
    }
    ids = chat.prompt(MESSAGES, [{"type": "function", "function": schema}])
    text = chat.tokenizer.decode(ids)
    assert text.count("f<|im_end|>") == text.count("</s>") == 2
    assert len(set(ids) & {token_id(chat.tokenizer, t) for t in ("<|im_end|>", "</s>")}) == 1
    assert ids.count(token_id(chat.tokenizer, "<|im_end|>")) == 1


def test_a_template_that_acts_on_control_tokens_in_a_message() -> None:
    chat = chat_of(CHATML.replace("m.content", "m.content.split('</s>')[-1]"))
    with pytest.raises(ValueError, match="chat_template must only copy </s> from a message"):
        chat.prompt([{"role": "user", "content": "a</s>b"}])


def test_half_of_a_surrogate_pair_in_a_message() -> None:
    with pytest.raises(ValueError, match="must be valid Unicode text"):
        chat_of(CHATML).prompt([{"role": "user", "content": "\ud800"}])


# --- 5. state outside the settings -------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was stopped before its first checkpoint, with a template and a model of its own."""
    model = tiny_run.save_model(tmp_path / "model")
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    settings = {"chat_template": template, "task": "test_reported_inputs:Changing", "warm_start_steps": 0}
    moment = tiny_run.Moment("grpo.failures:_summary")
    argv = tiny_run.arguments(model, tmp_path / "runs", **settings)
    assert tiny_run.run_and_stop(argv, moment, 9)[0] == -9
    return tmp_path / "runs" / "tiny-001"


class Changing(tiny.Toy):
    """Reads its data from outside, as tasks do."""

    suffix = "?"

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        return [replace(e, prompt=e.prompt + self.suffix) for e in super().examples(split, count, offset)]


def change_template(root: Path) -> None:
    (root / "template.jinja").write_text(CHATML.replace("{{ m.role }}", "{{ m.role | title }}"))


def change_tokenizer(root: Path) -> None:
    path = root / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1]["lstrip"] = True
    path.write_text(json.dumps(content))


def change_model(root: Path) -> None:
    path = root / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_inputs_that_changed_while_a_run_was_stopped(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resume compared the settings only: with an edited template it continued, with other prompts."""
    root, argv = stopped.parent.parent, ["--resume", str(stopped)]
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.parent != stopped}
    changes = {
        "the chat template changed (the run's own is in": change_template,
        "the tokenizer changed": change_tokenizer,
        "the model's files changed (model.safetensors)": change_model,
        "the task's examples or messages changed": lambda _: monkeypatch.setattr(Changing, "suffix", "!"),
    }
    for message, change in changes.items():
        change(root)
        done = tiny_run.run(argv)
        assert done.status == 2 and done.out == "", done
        assert message in done.err and done.err.count("\n") == 1 and "start a new run" in done.err
        for path, content in kept.items():
            path.write_bytes(content)
    monkeypatch.undo()
    (stopped / "inputs.json").write_text("{")
    done = tiny_run.run(argv)
    assert done.status == 2 and "inputs.json is damaged" in done.err
    (stopped / "inputs.json").unlink()  # as version 0.1 leaves it
    done = tiny_run.run(argv)
    assert done.status == 0, done.err


def test_templates_that_print_todays_date() -> None:
    """Their prompts changed at midnight, within a run and between stop and resume."""
    template = (
        "  {% if true %}\n{% endif %}{%- set today = strftime_now('%Y-%m-%d') %}{{ 'Today: ' + today }}"
        "{{ strftime_now('%-d %B %Y (%A), %H:%M') }} {{ strftime_now is defined }}{{ date_string }}" + CHATML
    )
    chat = chat_of(template)
    text = chat.tokenizer.decode(chat.prompt(MESSAGES))
    assert text.startswith("Today: 2024-07-2626 July 2024 (Friday), 00:00 True26 Jul 2024<|im_start|>user")
    chat = chat_of(template, template_kwargs={"date_string": "01 Jan 2025"})
    assert "Today: 2025-01-011 January 2025 (Wednesday)" in chat.tokenizer.decode(chat.prompt(MESSAGES))
    # Nothing else changes, white space at the beginning least of all.
    for plain in (
        "\n{% if true %}\n x{% endif %}",
        "  {% if true %}y\n{% endif %}",
        "\n\n",
        "{%- if 1 %} {% endif %}",
    ):
        rendered = chat_of(plain + CHATML)._render(MESSAGES)
        assert (
            chat_of(plain + CHATML + "{% if false %}{{ strftime_now('') }}{% endif %}")._render(MESSAGES)
            == rendered
        )


# --- 6. RoPE that depends on the length --------------------------------------------------------------------

LONGROPE = {  # as in Phi-3: other frequencies in texts of more than 32 tokens (transformers #33129)
    "rope_parameters": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.7],
        "long_factor": [1.0, 3.0, 9.0, 30.0],
        "original_max_position_embeddings": 32,
    }
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32}
LIMITS = {
    "longrope": (LONGROPE, "original_max_position_embeddings, 32, beyond which its RoPE changes"),
    "dynamic": (DYNAMIC, "max_position_embeddings, 32"),
}


@pytest.mark.parametrize(("rope", "limit"), LIMITS.values(), ids=LIMITS)
def test_a_text_that_outgrows_the_short_factors(rope, limit):
    """Within the limit a row's log-probs are those of a plain forward pass, whatever its neighbours' length;
    a longer row is refused. The cached keys of its beginning had other frequencies than those of its end."""
    model = tiny.decoder(64, likely=[63], **rope)
    short = Row(tuple(range(1, 6)), [Sample(20, (0,))])
    rows = [short, Row(tuple(range(7, 27)), [Sample(12, (1,))])]  # the longest text has 32 tokens
    sampler = Sampler(model, stop_token_ids=[63])
    alone, *together = *sampler.run([short]), *sampler.run(rows)
    assert alone.turns[0].ids == together[0].turns[0].ids
    for row, finished in zip(rows, together, strict=True):
        ids = finished.turns[0].ids
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([[*row.prefix, *ids]])))[0, len(row.prefix) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
        assert finished.turns[0].logprobs == pytest.approx(expected, abs=1e-4)
    rows[1] = Row(rows[1].prefix, [Sample(13, (1,))])
    with pytest.raises(ValueError, match=rf"rows\[1\]: a prompt of 20 tokens .* the model's {limit}"):
        sampler.run(rows)


@pytest.mark.parametrize(("rope", "limit"), LIMITS.values(), ids=LIMITS)
def test_a_micro_batch_of_texts_below_and_above_the_limit(rope, limit):
    """The split into micro-batches moved log-probs by 4 nats, as a short text took its neighbour's length."""
    parts = tiny.build(model=tiny.decoder(64, **rope), train_on="attempt")
    lengths = (5, 20, 28)  # with the completion of 4 tokens: up to 32
    batch = [
        Episode("", i, 0, list(range(1, 1 + n)), [8, i, 9, 9], ["attempt"] * 4, [-4.0] * 4, "stop", 0.0)
        for i, n in enumerate(lengths)
    ]
    whole, split = (tiny.token_logprobs(parts, batch, max_tokens_per_micro_batch=most) for most in (1000, 1))
    for one, other in zip(whole, split, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    batch[2].prompt_ids += [1, 2]  # the last token is only predicted, so 33 go through the model
    with pytest.raises(ValueError, match=f"a text of 33 tokens must fit the model's {limit}"):
        tiny.update(parts, batch, beta=0.1)


@pytest.mark.parametrize("command", ["train", "failures", "evaluate"])
def test_conversations_beyond_the_short_factors_are_refused_before_sampling(command, tmp_path, capsys):
    folder = tiny_run.save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | LONGROPE))
    settings = tiny_run.arguments(folder, tmp_path / "runs")
    if command == "train":
        done = tiny_run.run(settings)
        status, error = done.status, done.err
    else:
        module = {"failures": failures, "evaluate": evaluate}[command]
        first = ["--output", str(tmp_path / "f.jsonl")] if command == "failures" else [str(folder)]
        status, error = module.main([*first, *settings]), capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, error
    assert "a conversation of up to" in error and f"must fit the model's {LIMITS['longrope'][1]}" in error
    assert "lower max_reflection_length or max_completion_length" in error


# --- 7. data without a right answer ------------------------------------------------------------------------


def xlam_file(folder: Path, tools: Any, *answers: Any) -> str:
    """An xLAM file in which each record offers the same tools."""
    path = folder / "xlam.json"
    path.write_text(json.dumps([{"query": "q", "tools": tools, "answers": one} for one in answers]))
    return str(path)


PLAIN = [{"name": "f", "parameters": {"x": {"type": "int"}, "y": {"type": "str", "default": "a"}}}]


@pytest.mark.parametrize("extra", [{"xx": 2}, {"z": None}], ids=["misspelled", "null-filled"])
def test_gold_arguments_that_the_tool_does_not_have(
    tmp_path: Path, extra: dict[str, Any], warned: Any
) -> None:
    bad, good = ([{"name": "f", "arguments": {"x": 1, **more}}] for more in (extra, {}))
    with warned(rf"skipped 1 of 2 .*'f' the unknown argument '{min(extra)}'"):
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


def test_tokens_without_an_embedding(tmp_path: Path) -> None:
    """A template's token that the model lacks ended in an index error inside the first forward."""
    tokenizer = with_tags(byte_tokenizer(template=CHATML), "<extra>")
    extra, stops = token_id(tokenizer, "<extra>"), [token_id(tokenizer, "<|im_end|>")]
    assert extra == len(tokenizer) - 1
    sizes = f"embeddings for {extra} tokens only, and its tokenizer has {extra + 1}"
    message = f"the token '<extra>' with id {extra}, but the model has {sizes}"
    template = CHATML.replace("assistant", "assistant<extra>")
    with pytest.raises(ValueError, match=message):
        Chat(tokenizer, stops, template, vocab_size=extra)
    with pytest.raises(ValueError, match=message):
        Chat(tokenizer, [extra], "{% for m in messages %}{{ m.content }} {% endfor %}", vocab_size=extra)
    with pytest.raises(ValueError, match=message):
        Chat(
            tokenizer, stops, "{% if messages|length == 1 %}<extra>{% endif %}" + CHATML, vocab_size=extra
        ).prompt(MESSAGES)
    # Tokens that are never used are no mistake.
    assert Chat(tokenizer, [extra, *stops], vocab_size=extra).prompt(MESSAGES)
    chat = Chat(tokenizer, stops, vocab_size=extra)
    with pytest.raises(ValueError, match=message):
        chat.encode_turn("A transcript with <extra>.")
    assert chat.prompt([{"role": "user", "content": "<extra>"}])  # as text


def test_tokens_without_an_embedding_are_found_before_sampling() -> None:
    tokenizer = with_tags(byte_tokenizer(template=CHATML), "<extra>")
    parts = tiny.build(tokenizer=tokenizer, model=tiny.decoder(len(tokenizer) - 1), warm_start_steps=2)
    parts.chat.vocab_size = len(tokenizer) - 1
    assert build.check_run(parts.config, parts)
    transcript = parts.task.transcript
    parts.task.transcript = lambda *args: replace(transcript(*args), attempt="<extra>")
    with pytest.raises(ValueError, match="the token '<extra>'"):
        build.check_run(parts.config, parts)


def test_a_config_that_names_a_command_as_its_task_runs_nothing(model, tmp_path):
    """A run directory of another person: its config.yaml decides what is imported and called."""
    settings = {"task": "os:system", "task_options": json.dumps({"command": f"touch {tmp_path}/executed"})}
    done = started(model, tmp_path, **settings)
    assert done.status == 2 and "task 'os:system' must be a class with the methods" in done.err
    assert not (tmp_path / "executed").exists()


def test_the_file_of_a_task_is_printed_before_it_runs(model, tmp_path, monkeypatch):
    (tmp_path / "strange_task.py").write_text("print('it runs')\n")
    monkeypatch.syspath_prepend(tmp_path)
    lines = started(model, tmp_path, task="strange_task:Task").out.splitlines()
    assert lines == [f"task strange_task:Task runs code from {tmp_path}/strange_task.py", "it runs"]


@pytest.mark.parametrize(
    "change",
    [
        {"attempt_ids": [10**6]},
        {"finish_reason": "stop", "attempt_ids": [5]},
        {"prompt_ids": []},
        {"reason": ""},
    ],
)
def test_failures_that_the_model_cannot_have_made(model, tmp_path, change):
    done = started(model, tmp_path, max_steps=1, num_eval=2)
    path = done.folder / "failures.jsonl"
    lines = tiny_run.records(done.folder, path.name)
    lines[0].update(change)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (done.folder / "evaluation.json").unlink()
    done = tiny_run.run(["--resume", str(done.folder)])
    assert done.status == 2 and "failures.jsonl" in done.err and "Traceback" not in done.err
    assert "was not made with this model: delete" in done.err or "reason must be" in done.err


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
    prompts = [tiny_run.records(run.folder, "episodes.jsonl.gz")[0]["prompt_ids"] for run in (plain, done)]
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


@pytest.mark.parametrize(
    "key",
    ["quantization_config", "rope_scaling", "eos_token_id", "bos_token_id", "pad_token_id", "head_dim"]
    + ["attention_bias", "mlp_bias", "tie_word_embeddings", "layer_types", "torch_dtype", "num_labels"],
)
def test_null_in_a_config_means_not_given(key, folder, tmp_path):
    expected, tokenizer = weights.load(folder)
    edit_json(folder / "config.json", **{key: None})
    ours, _ = weights.load(folder)
    assert ours.config == expected.config
    again = transformers.AutoModelForCausalLM.from_pretrained(
        weights.save(ours, tokenizer, tmp_path / "saved")
    )
    tiny_model.assert_same(ours, again)


def test_phi3_with_rope_type_su(tmp_path):
    """The first name of longrope, in the configs of Phi-3 from before July 2024."""
    theirs = tiny_model.make("Phi3", **tiny_model.PHI3)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = {key: config["rope_parameters"][key] for key in ("short_factor", "long_factor")}
    del config["rope_parameters"]
    config |= {"rope_scaling": scaling | {"type": "su"}, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny_model.assert_same(weights.load_model(tmp_path, torch.float32), theirs)


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


def berkeley_files(folder: Path, **arguments: Any) -> Path:
    """The Berkeley files with one example, whose answer accepts these values."""
    (folder / "possible_answer").mkdir()
    function = {"name": "f", "description": "", "parameters": {"type": "dict", "properties": {"x": {}}}}
    entry = {
        "id": "multiple_0",
        "question": [[{"role": "user", "content": "q"}]],
        "function": [function],
        "ground_truth": [{"f": arguments}],
    }
    for part, category in itertools.product((folder, folder / "possible_answer"), berkeley.CATEGORIES):
        text = json.dumps(entry) if category == "multiple" else ""
        (part / f"BFCL_v4_{category}.json").write_text(text)
    return folder


def test_nan_among_the_accepted_values_of_a_berkeley_answer(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(berkeley, "_folder", lambda: berkeley_files(tmp_path, x=[float("nan")]))
    with pytest.raises(ValueError, match="multiple_0.*cannot be read.*nonfinite"):
        FunctionCalling(categories="multiple")


def test_argument_with_an_empty_name_and_no_accepted_value(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(berkeley, "_folder", lambda: berkeley_files(tmp_path, **{"": []}))
    with pytest.raises(ValueError, match="multiple_0: no value is accepted for '', so no answer is right"):
        FunctionCalling(categories="multiple")


def test_a_gguf_file_whose_architecture_is_a_list(tmp_path):
    def change(writer):
        del writer.kv_data[0]["general.architecture"]
        writer.add_array("general.architecture", ["llama"])

    tiny_model.write_gguf(tmp_path / "model.gguf", tiny_model.make(), extra=change)
    with pytest.raises(ValueError, match=r"general.architecture must be a string, got \['llama'\]"):
        weights.load(tmp_path / "model.gguf")


def test_a_character_above_ffff_as_json_escapes_it(tmp_path):
    """PyYAML reads two surrogates, JSON one character: a KeyError, and another value after a resume."""
    (tmp_path / "mine.yaml").write_text(
        '{"task_options": {"\\ud83d\\ude00": "\\ud83d\\ude00", "x": "\\ud800"}}'
    )
    options = config.from_yaml(tmp_path / "mine.yaml")["task_options"]
    assert options == {"\U0001f600": "\U0001f600", "x": "\ud800"}
    change = json_change({"a": ["\ud83d" + "\ude00"]}, "data")  # as a task may write it
    assert change is not None and "data['a'][0]" in change and "a pair of lone surrogates" in change
    assert "with the key" in (json_change({"\ud83d" + "\ude00": 1}, "data") or "")
