"""Chat: five families of templates, glue between turns, tokenizers that do not round-trip."""

import pytest
from tiny import CHATML, byte_tokenizer, with_special_tokens
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from grpo.chat import Chat

SMOLLM2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are SmolLM.<|im_end|>\n{% endif %}" + CHATML
)
LLAMA3 = (
    "<|begin_of_text|>{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date_string or strftime_now('%d %b %Y') }}\n\n"
    "{{ system }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
# Strips the reasoning from all answers but the last, as Qwen3's does, and drops surrounding white space.
QWEN3 = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ text.strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_SYSTEM = CHATML.replace("in messages", "in messages if m.role != 'system'")
NO_END_OF_TURN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"

SYSTEM, QUESTION, AGAIN = "Be brief.", "1+1?", "Try again: 2+2?"


def prefixing_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Puts a space before every text, as SentencePiece does."""
    characters = [chr(i) for i in range(33, 127)] + ["▁", "\n", "<unk>"]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return with_special_tokens(tokenizer, template)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def token(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    return ids(tokenizer, name)[0]


# name: (template, stop tokens, prompt, what follows a sampled stop token)
FAMILIES = {
    "smollm2": (
        SMOLLM2,
        ["<|im_end|>"],
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        f"\n<|im_start|>user\n{AGAIN}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        LLAMA3,
        ["<|end_of_text|>", "<|eot_id|>"],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n"
        f"{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"<|start_header_id|>user<|end_header_id|>\n\n{AGAIN}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "phi3": (
        PHI3,
        ["<|endoftext|>", "<|end|>"],
        f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n",
        f"\n<|user|>\n{AGAIN}<|end|>\n<|assistant|>\n",
    ),
    "mistral": (
        MISTRAL,
        ["</s>"],
        f"<s>[INST] {SYSTEM}\n\n{QUESTION} [/INST]",
        f"[INST] {AGAIN} [/INST]",
    ),
    "qwen3": (
        QWEN3,
        ["<|im_end|>", "<|endoftext|>"],
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        f"\n<|im_start|>user\n{AGAIN}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "drops system": (
        DROPS_SYSTEM,
        ["<|im_end|>"],
        f"<|im_start|>user\n{SYSTEM}\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        f"\n<|im_start|>user\n{AGAIN}<|im_end|>\n<|im_start|>assistant\n",
    ),
}
END = {"llama3": "<|eot_id|>", "phi3": "<|end|>", "mistral": "</s>"}
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    template, stops, prompt, glue = FAMILIES[family]
    tokenizer = byte_tokenizer(template=template)
    chat = Chat(tokenizer, [token(tokenizer, stop) for stop in stops])
    end = END.get(family, "<|im_end|>")
    assert tokenizer.decode(chat.prompt(MESSAGES)) == prompt
    assert chat.prompt(MESSAGES) == ids(tokenizer, prompt)
    assert chat.encode_turn("<answer>2</answer>") == ids(tokenizer, f"<answer>2</answer>{end}")
    assert chat.encode_turn("") == [token(tokenizer, end)]
    for stop in stops:  # any stop token closes the turn, also one that is not the template's own
        assert chat.glue([5, token(tokenizer, stop)], "stop", AGAIN) == ids(tokenizer, glue)
    assert chat.glue([5, 6], "length", AGAIN) == ids(tokenizer, end + glue)
    assert chat.glue([5, 6], "length", AGAIN) == ids(tokenizer, end + glue)  # from the cache
    assert set(chat.stop_token_ids) == {token(tokenizer, stop) for stop in stops}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_every_turn_is_a_prefix_of_the_next(family: str, finish_reason: str) -> None:
    # "abc" sampled as a, b, c although the tokenizer would write it as one token; white space and reasoning
    # that the template would strip from history.
    template, stops, _, _ = FAMILIES[family]
    tokenizer = byte_tokenizer([("a", "b"), ("ab", "c")], template)
    chat = Chat(tokenizer, [token(tokenizer, stop) for stop in stops])
    letters = [token(tokenizer, letter) for letter in "abc"]
    assert ids(tokenizer, str(tokenizer.decode(letters))) != letters
    sampled = ids(tokenizer, "<think>hm</think>  ") + letters + ids(tokenizer, " \n")
    if finish_reason == "stop":
        sampled = [*sampled, chat.stop_token_ids[0]]
    first = chat.prompt(MESSAGES)
    second = first + sampled + chat.glue(sampled, finish_reason, AGAIN)
    third = second + sampled + chat.glue(sampled, finish_reason, QUESTION)
    assert second[: len(first) + len(sampled)] == first + sampled
    assert third[: len(second)] == second
    assert chat.decode(sampled) == "<think>hm</think>  abc \n"


def test_a_conversation_equals_its_rendering_where_the_tokenizer_round_trips() -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    chat = Chat(tokenizer, [token(tokenizer, "<|im_end|>")])
    answer = chat.encode_turn("3")
    conversation = [*MESSAGES, {"role": "assistant", "content": "3"}, {"role": "user", "content": AGAIN}]
    assert chat.prompt(MESSAGES) + answer + chat.glue(answer, "stop", AGAIN) == chat.prompt(conversation)


def test_no_spurious_space_after_a_prefixing_tokenizer() -> None:
    tokenizer = prefixing_tokenizer(NO_END_OF_TURN)
    stop = token(tokenizer, "<|endoftext|>")
    chat = Chat(tokenizer, [stop])
    assert tokenizer.convert_ids_to_tokens(chat.glue([7], "length", "hi")) == list("\nuser:▁hi\nassistant:")
    assert tokenizer.convert_ids_to_tokens(chat.encode_turn("yes")) == [*"yes", "<|endoftext|>"]


def test_template_that_ends_no_turn() -> None:
    tokenizer = byte_tokenizer(template=NO_END_OF_TURN)
    stop = token(tokenizer, "<|endoftext|>")
    chat = Chat(tokenizer, [stop])
    glue = ids(tokenizer, f"\nuser: {AGAIN}\nassistant:")
    assert chat.glue([5, stop], "stop", AGAIN) == glue and chat.glue([5], "length", AGAIN) == glue
    assert chat.encode_turn("2") == [*ids(tokenizer, "2"), stop]
    with pytest.raises(ValueError, match="stop_token_ids"):
        Chat(tokenizer, [])


def test_end_of_turn_joins_the_stop_tokens() -> None:
    # A configuration that names only the end-of-text token: without <|eot_id|> no answer would ever end.
    tokenizer = byte_tokenizer(template=LLAMA3)
    chat = Chat(tokenizer, [token(tokenizer, "<|end_of_text|>")])
    assert chat.stop_token_ids == (token(tokenizer, "<|end_of_text|>"), token(tokenizer, "<|eot_id|>"))
    assert chat.encode_turn("2")[-1] == token(tokenizer, "<|eot_id|>")


def test_system_message_is_folded_only_where_it_must_be() -> None:
    chat = Chat(byte_tokenizer(template=MISTRAL), [0])
    assert chat.tokenizer.decode(chat.prompt(MESSAGES[1:])) == f"<s>[INST] {QUESTION} [/INST]"
    with pytest.raises(ValueError, match="user message after the system message"):
        chat.prompt(MESSAGES[:1])


def test_tools_go_to_templates_that_write_them_out() -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]
    takes = byte_tokenizer(template="{% for t in tools or [] %}{{ t.function.name }};{% endfor %}" + CHATML)
    chat = Chat(takes, [token(takes, "<|im_end|>")])
    assert chat.takes_tools
    assert takes.decode(chat.prompt(MESSAGES, tools)) == "add;" + takes.decode(chat.prompt(MESSAGES))
    assert chat.prompt(MESSAGES, []) == chat.prompt(MESSAGES) == chat.prompt(MESSAGES, None)
    # glue between turns never repeats the tools
    assert "add" not in takes.decode(chat.glue([5], "length", AGAIN))
    raising = CHATML + "{% if tools %}{{ raise_exception('no tools') }}{% endif %}"
    for template in (CHATML, MISTRAL, raising):
        tokenizer = byte_tokenizer(template=template)
        chat = Chat(tokenizer, [token(tokenizer, "<|im_end|>")])
        assert not chat.takes_tools
        with pytest.raises(ValueError, match="tools must be None with this chat template"):
            chat.prompt(MESSAGES, tools)


def test_the_template_in_use_has_a_name() -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    stops = [token(tokenizer, stop) for stop in ("<|im_end|>", "<|endoftext|>")]
    own, same = Chat(tokenizer, stops), Chat(tokenizer, stops, chat_template=CHATML)
    other = Chat(tokenizer, stops, chat_template=CHATML + "\n")
    assert own.template_sha256 == same.template_sha256 != other.template_sha256
    assert len(own.template_sha256) == 64


def test_decode() -> None:
    tokenizer = byte_tokenizer(template=PHI3)
    stops = [token(tokenizer, "<|endoftext|>"), ids(tokenizer, "!")[0]]  # a stop token need not be special
    chat = Chat(tokenizer, stops)
    assert chat.decode(ids(tokenizer, " it 's 3 - 2 , so .\n<|user|>!")) == " it 's 3 - 2 , so .\n<|user|>"
    assert chat.decode([]) == ""


def test_pad_token() -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    end = token(tokenizer, "<|im_end|>")
    assert Chat(tokenizer, [end]).pad_token_id == end
    tokenizer.pad_token = "<|endoftext|>"
    assert Chat(tokenizer, [end]).pad_token_id == token(tokenizer, "<|endoftext|>")


def test_errors() -> None:
    tokenizer = byte_tokenizer()
    end = token(tokenizer, "<|im_end|>")
    with pytest.raises(ValueError, match="pass chat_template"):
        Chat(tokenizer, [end])
    with pytest.raises(ValueError, match="must render all messages"):
        Chat(tokenizer, [end], chat_template="{{ messages[-1].content }}")
    chat = Chat(tokenizer, [end], chat_template=CHATML)
    with pytest.raises(ValueError, match='"stop" or "length"'):
        chat.glue([end], "eos", AGAIN)
    for completion in ([], [5]):
        with pytest.raises(ValueError, match="must end with one of"):
            chat.glue(completion, "stop", AGAIN)
