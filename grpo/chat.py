"""Conversations as token ids, by the model's chat template. Sampled ids are never tokenised again.

A conversation is a prompt to which pieces are appended: sampled ids, then *glue* (the end of that turn, the
next user message, the header of the next answer). To find the glue, a dummy conversation is rendered with a
marker as its answer; what follows the marker is the glue. So the ids of turn n are always a prefix of those
of turn n + 1, even if the template strips `<think>` or white space from history, or if encode(decode(ids))
differs from ids. Tools go to the template with the prompt, if it takes them.

Only the template writes special tokens. If a message contains the text of one ("What does <|im_end|> mean?"),
it is rendered with a *mark*, a rare character, in its place; then the mark is encoded as that text.

Left out: tool results as messages, and images. Templates run in transformers' sandbox, which has no files and
no Python, but does not bound their time and memory.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

_QUESTION = "DUMMY-QUESTION"
_ANSWER = "DUMMY-ANSWER"
_REASONING = "DUMMY-REASONING"
_TOOL = "dummy_tool"

# Templates print today's date unless they are given one, and runs must be repeatable. Some templates read
# `date_string`; others call `strftime_now`, which this macro replaces. Its line break is not rendered.
_DATE, _DATE_FORMAT = "26 Jul 2024", "%d %b %Y"
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{% set date = namespace(text=format) %}"
    "{% for code, text in date_codes.items() %}{% set date.text = date.text | replace(code, text) %}"
    "{% endfor %}{{ date.text }}{% endmacro %}\n"
)
_DATE_CODES = [f"%{dash}{letter}" for dash in ("", "-") for letter in "aAwdbBmyYHIpMSfzZjUWcxXGuV"]
_RESERVED = {"conversations", "messages", "strftime_now", "raise_exception", "date_codes"}
_RESERVED |= set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)

_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"
_MARKS = range(0xA000, 0xA48D)  # Yi syllables, which no template changes, strips or escapes
_Marks = dict[str, str]  # mark -> text of the special token that it stands for


class Chat:
    """Turns messages into token ids for one tokenizer and chat template.

    Args:
        tokenizer: a transformers tokenizer.
        stop_token_ids: ids that end a turn. The template's end-of-turn token is added if it is missing: some
            checkpoints name only the end-of-text token.
        chat_template: Jinja text; None for the tokenizer's own.
        template_kwargs: JSON values for the template's variables, such as `enable_thinking`.
        vocab_size: number of the model's embeddings; None: no id is refused.
    Attributes:
        end_of_turn: ids that close an answer which was cut at its limit.
    Raises:
        ValueError: no template, a template that cannot render a conversation, no stop token, invalid
            `template_kwargs`, or a token without an embedding. The methods raise it for the last reason too,
            and for messages that the template refuses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        chat_template: str | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if not (chat_template or tokenizer.chat_template):
            raise ValueError(
                "this model's tokenizer has no chat template; pass chat_template, for example the "
                "chat_template.jinja of an instruct model of the same family"
            )
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._template = chat_template
        self.template_kwargs = _checked(template_kwargs or {})
        self._variables = self._date_variables() | self.template_kwargs
        self._special = {
            token.content: (id, token)
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content.strip()
        }
        self._special_ids = {id for id, _ in self._special.values()}
        self._glue: dict[str, list[int]] = {}
        self._has_system_role = self._probe_system_role()

        closing, _, opening = self._tail(_QUESTION)[0].partition(_QUESTION)
        self._answer_header = opening
        self._closing = self._end_of_turn(self._encode(closing, after=_ANSWER), stop_token_ids)
        self.glue([], "length", _QUESTION)  # refuses headers with tokens that have no embedding
        self.stop_token_ids = tuple(dict.fromkeys([*stop_token_ids, *self._closing[-1:]]))
        if not self.stop_token_ids:
            raise ValueError("stop_token_ids must hold at least one id, got none, and the template has none")
        embedded = [id for id in self.stop_token_ids if vocab_size is None or id < vocab_size]
        self.end_of_turn = self._closing or self._checked_ids([*embedded, *self.stop_token_ids][:1])
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = self.stop_token_ids[0] if pad is None else pad
        silent = {*self.stop_token_ids, self.pad_token_id}
        self._silent = {text: id for text, (id, _) in self._special.items() if id in silent}

    def prompt(self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation and of the header of the next answer.

        If the template has no system role, the system message becomes the beginning of the user message.

        Args:
            messages: each with role and content.
            tools: JSON schemas of the functions that the model may call; requires `takes_tools`.
        Raises:
            ValueError: a system message without a user message after it, or tools for a template that would
                drop them.
        """
        if tools is not None and not self.takes_tools:
            raise ValueError("tools must be None with this chat template, which takes none")
        if messages and messages[0]["role"] == "system" and not self._has_system_role:
            if len(messages) < 2 or messages[1]["role"] != "user":
                raise ValueError("messages must have a user message after the system message")
            text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": text}, *messages[2:]]
        text, marks = self._marked(messages, tools)
        return self._encode(text, marks)

    def glue(self, completion_ids: Sequence[int], finish_reason: str, user: str) -> list[int]:
        """Ids to append after a sampled turn so that the model can answer `user`.

        A turn that ends with a stop token is closed already. A turn cut at its limit gets the template's
        whole end of turn.

        Args:
            completion_ids: the sampled ids; not changed.
            finish_reason: "stop" or "length".
            user: the next user message.
        Raises:
            ValueError: another finish_reason, or "stop" without a stop token at the end.
        """
        if finish_reason not in ("stop", "length"):
            raise ValueError(f'finish_reason must be "stop" or "length", got {finish_reason!r}')
        if user not in self._glue:
            tail, marks = self._tail(user)
            self._glue[user] = self._encode(tail, marks, after=_ANSWER)
        glue = self._glue[user]
        if finish_reason == "length":
            return list(glue)
        if not completion_ids or completion_ids[-1] not in self.stop_token_ids:
            raise ValueError(f"completion_ids must end with one of {self.stop_token_ids} after a stop")
        return glue[len(self._closing) :]

    def encode_turn(self, text: str, after: Sequence[int] = ()) -> list[int]:
        """Ids of an answer that was written instead of sampled, with the stop token that ends it.

        Special tokens in `text` are encoded as such, because a task may mean its tags. Only those that would
        end the turn, and the pad token, are encoded as text.

        Args:
            after: ids of the context. If they open a thought and `text` does not end it, it is ended first:
                otherwise the answer would be part of the thought.
        """
        if _END_OF_THOUGHT not in text and self.opened_thought(after):
            text = self._end_of_thought + text
        marks = _marks([name for name in self._silent if name in text], unlike=self._answer_header + text)
        return self._encode(_with_marks(marks)(text), marks, after=self._answer_header) + self.end_of_turn

    def decode(self, ids: Iterable[int], after: Sequence[int] = ()) -> str:
        """Text of sampled ids, exactly, but without stop and pad tokens.

        Args:
            after: ids of the context. A thought that they open belongs to the text: without its beginning, a
                thought that was cut at its limit would look like an answer.
        """
        dropped = {*self.stop_token_ids, *self._silent.values()}
        return self.opened_thought(after) + self._text([token for token in ids if token not in dropped])

    def opened_thought(self, context: Sequence[int]) -> str:
        r"""The thought that the answer header at the end of `context` opens, such as "<think>\n"; else "".

        Read from the ids, because a template may choose the header by the turn or by the system message.
        """
        if not context or _THOUGHT not in self._template_text:
            return ""
        text = self._text(context)
        for thought in self._opened_thoughts:
            if text.endswith(thought):
                return thought
        match = re.search(rf"{_THOUGHT}\s*\Z", text)
        return match[0] if match else ""

    @cached_property
    def template_sha256(self) -> str:
        """Identifies the chat template in use, on which prompts and so answers depend."""
        return hashlib.sha256(self._template_text.encode()).hexdigest()

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template renders the tools that it is given. Other templates ignore them or raise."""
        function = {"name": _TOOL, "description": "", "parameters": {"type": "object", "properties": {}}}
        messages = [{"role": "user", "content": _QUESTION}]
        try:
            return _TOOL in self._render(messages, [{"type": "function", "function": function}])
        except ValueError:  # as in _probe_system_role; the tools are then written into the prompt
            return False

    # --- rendering ------------------------------------------------------------------------------------------

    @property
    def _template_text(self) -> str:
        template = self._template or self.tokenizer.chat_template
        return template if isinstance(template, str) else json.dumps(template, sort_keys=True)

    def _date_variables(self) -> dict[str, Any]:
        """`date_string`, and the date in all formats if the template asks for today's."""
        text = self.template_kwargs.get("date_string", _DATE)
        if "strftime_now" not in self._template_text:
            return {"date_string": text}
        try:
            date = datetime.strptime(text, _DATE_FORMAT)
        except (TypeError, ValueError):
            raise ValueError(
                f"chat_template_kwargs date_string must be a date such as {_DATE!r} for this template, which "
                f"asks for today's date; got {text!r}"
            ) from None
        return {"date_string": text, "date_codes": {code: date.strftime(code) for code in _DATE_CODES}}

    def _render(
        self,
        messages: list[dict[str, str]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        try:
            template = self.tokenizer.get_chat_template(self._template, tools)
            if "date_codes" in self._variables:
                template = _FIXED_DATE + template
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,  # type: ignore[arg-type]
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # Jinja's own classes, and whatever a template raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"chat_template cannot be rendered: {reason}") from error
        assert isinstance(text, str)
        return text

    def _marked(
        self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, _Marks]:
        """The rendering, with a mark for each special token whose text the messages or tools contain."""
        text = self._render(messages, tools)
        found = {
            name
            for part in _strings([[message["content"] for message in messages], tools])
            for name in (self._any_special.findall(part) if self._special else ())
        }
        if not found:
            return text, {}
        marks = _marks(found, unlike=text)
        mark = _with_marks(marks)
        messages = [{**message, "content": mark(message["content"])} for message in messages]
        marked = self._render(messages, _map_strings(tools, mark))
        if _without_marks(marked, marks) != text:
            raise ValueError(
                f"chat_template must only copy {', '.join(sorted(found))} from a message, but it acts on it: "
                "remove it from the task's messages"
            )
        return marked, marks

    def _tail(self, user: str) -> tuple[str, _Marks]:
        """What the template writes after an answer when `user` is the next message, with marks."""
        messages = [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": user},
        ]
        text, marks = self._marked(messages)
        _, marker, tail = text.partition(_ANSWER)
        if not marker or user.strip() not in _without_marks(tail, marks):
            raise ValueError("chat_template must render all messages of a user, assistant, user conversation")
        return tail, marks

    def _probe_system_role(self) -> bool:
        """Whether there is a system role. Templates without one raise, or silently drop the message."""
        messages = [{"role": "system", "content": _ANSWER}, {"role": "user", "content": _QUESTION}]
        try:
            return _ANSWER in self._render(messages)
        except ValueError:  # the system message then joins the user's
            return False

    @cached_property
    def _opened_thoughts(self) -> list[str]:
        """The thoughts that the headers of a first and a later answer open, with any text in them."""
        first = self._render([{"role": "user", "content": _QUESTION}]).rpartition(_QUESTION)[2]
        thoughts = []
        for header in dict.fromkeys([first, self._answer_header]):
            _, opening, thought = header.rpartition(_THOUGHT)
            if opening and _END_OF_THOUGHT not in thought:
                thoughts.append(opening + thought)
        return thoughts

    @cached_property
    def _end_of_thought(self) -> str:
        """How the template writes the end of an answer's thought, or how most do if it hides thoughts."""
        answer = {"role": "assistant", "content": _ANSWER, "reasoning_content": _REASONING}
        question = {"role": "user", "content": _QUESTION}
        text = self._render([question, answer], add_generation_prompt=False)
        between = text.partition(_REASONING)[2].partition(_ANSWER)[0]
        return between if _END_OF_THOUGHT in between else f"\n{_END_OF_THOUGHT}\n\n"

    # --- ids and text ---------------------------------------------------------------------------------------

    def _end_of_turn(self, ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
        """The leading ids that end an answer, of those between it and the next question: up to a stop token.

        Without a known stop token, a special token at the very beginning counts as one.
        """
        for i, token in enumerate(ids):
            if token in stop_token_ids:
                return ids[: i + 1]
        return ids[:1] if ids and ids[0] in self._special_ids else []

    def _encode(self, text: str, marks: _Marks | None = None, *, after: str = "") -> list[int]:
        """Ids of `text` as a continuation of `after`: some tokenizers put a space before the first word.

        Args:
            marks: of the special tokens that `text` contains as text.
        """
        before = self._ids(after, {})
        together = self._ids(after + text, marks or {})
        # If a token spans both, `before` is no prefix of `together`.
        apart = together[: len(before)] != before
        return self._checked_ids(self._ids(text, marks or {}) if apart else together[len(before) :])

    def _ids(self, text: str, marks: _Marks) -> list[int]:
        if not marks:
            return self._plain_ids(text)
        ids: list[int] = []
        pieces = self._any_special.split(text)  # text, special token, text, ..., text
        for index in range(0, len(pieces), 2):
            before, after = (self._special.get("".join(pieces[i : i + 1])) for i in (index - 1, index + 1))
            piece = _without_marks(pieces[index], marks)
            # As the tokenizer does: some special tokens take in the white space next to them.
            piece = piece.lstrip() if index and before and before[1].rstrip else piece
            piece = piece.rstrip() if after and after[1].lstrip else piece
            text_ids = self._text_ids(piece, begins=index == 0)
            if self._special_ids.intersection(text_ids):
                raise ValueError(
                    f"{', '.join(marks.values())} is a special token even in text, for this tokenizer: "
                    "remove it from the task's messages"
                )
            ids += [*text_ids, after[0]] if after else text_ids
        return ids

    def _text_ids(self, text: str, begins: bool) -> list[int]:
        """Ids of text without special tokens: at the beginning, or after a special token."""
        if begins or self._every_text_begins:
            return self._plain_ids(text, split_special_tokens=True)
        anchor = self._plain_ids("\n")  # it takes the space that the tokenizer puts before the first word
        ids = self._plain_ids("\n" + text, split_special_tokens=True)
        whole = ids[: len(anchor)] == anchor
        return ids[len(anchor) :] if whole else self._plain_ids(text, split_special_tokens=True)

    @cached_property
    def _every_text_begins(self) -> bool:
        """Whether text after a special token is encoded as at the beginning (SentencePiece: with a space)."""
        token = next(iter(self._special))
        return self._plain_ids(token + "a")[1:] == self._plain_ids("a")

    def _plain_ids(self, text: str, split_special_tokens: bool = False) -> list[int]:
        # The template has already written all special tokens, even the beginning of text.
        if not text:
            return []
        options = {"split_special_tokens": True} if split_special_tokens else {}
        try:
            # Not verbose: whoever runs the ids checks their number, and says what to do.
            return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False, **options))
        except (UnicodeEncodeError, TypeError) as error:  # half of a surrogate pair
            raise ValueError(f"messages must be valid Unicode text, got {text!r}") from error

    def _checked_ids(self, ids: list[int]) -> list[int]:
        """`ids`, or ValueError for one without an embedding."""
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(
                f"the prompts contain the token {token!r} with id {max(ids)}, but the model has embeddings "
                f"for {self.vocab_size} tokens only, and its tokenizer has {len(self.tokenizer)} tokens: use "
                "the tokenizer and the chat_template that belong to the model"
            )
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @cached_property
    def _any_special(self) -> re.Pattern[str]:
        """Matches the longest special token, in a group, as the tokenizer does."""
        return re.compile(f"({'|'.join(map(re.escape, sorted(self._special, key=len, reverse=True)))})")


# --- helpers ------------------------------------------------------------------------------------------------


def _checked(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for a template. ValueError for a name that we set, and for what JSON cannot hold."""
    if taken := sorted(_RESERVED & {str(name) for name in variables}):
        raise ValueError(f"chat_template_kwargs must not name {', '.join(taken)}: the trainer sets these")
    try:
        copy = json.loads(json.dumps(dict(variables), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        copy = None
    if copy != variables:
        raise ValueError(f"chat_template_kwargs must map names to JSON values, got {dict(variables)!r}")
    return copy


def _marks(names: Iterable[str], unlike: str) -> _Marks:
    """A mark for each special token; no mark is in the text `unlike`."""
    unused = (mark for mark in map(chr, _MARKS) if mark not in unlike)
    return dict(zip(unused, sorted(names), strict=False))


def _with_marks(marks: _Marks) -> Callable[[str], str]:
    """A function that puts the marks in the place of the special tokens, the longest token first."""
    longest_first = sorted(marks.items(), key=lambda pair: -len(pair[1]))

    def replace(text: str) -> str:
        for mark, name in longest_first:
            text = text.replace(name, mark)
        return text

    return replace


def _without_marks(text: str, marks: _Marks) -> str:
    return text.translate({ord(mark): name for mark, name in marks.items()})


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        items = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        for item in items:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], Any]) -> Any:
    """A JSON value with `change` applied to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
