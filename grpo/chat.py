"""Conversations to token ids, through the model's own chat template, never re-tokenising what was sampled.

A conversation is a prompt to which pieces are only appended: sampled ids, then *glue* (the end of that
turn, the next user message, the header of the next answer). The glue is found by difference: a dummy
conversation with a marker as the answer is rendered, and what follows the marker is the glue. So the ids of
turn n are a prefix of those of turn n + 1 whatever the template does to history (strips `<think>`, trims
white space), and a tokenizer with encode(decode(ids)) != ids does no harm. Tools go to the template, where
it takes them, with the prompt alone. Left out: tool results as messages, and images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

_DATE = "26 Jul 2024"  # Llama 3 templates print today unless given a date; no run may change at midnight
_QUESTION = "DUMMY-QUESTION"
_ANSWER = "DUMMY-ANSWER"
_TOOL = "dummy_tool"


class Chat:
    """Turns messages into token ids for one tokenizer and chat template.

    Args:
        tokenizer: a transformers tokenizer.
        stop_token_ids: ids that end a turn. The template's own end-of-turn token is added where missing,
            since there are checkpoints whose configuration names only the end-of-text token.
        chat_template: Jinja text; None for the tokenizer's own.
    Raises:
        ValueError: no template, a template that cannot hold a conversation, or no stop token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        chat_template: str | None = None,
    ) -> None:
        if not (chat_template or tokenizer.chat_template):
            raise ValueError(
                "this model's tokenizer has no chat template; pass chat_template, for example the "
                "chat_template.jinja of an instruct model of the same family"
            )
        self.tokenizer = tokenizer
        self._template = chat_template
        self._glue: dict[str, list[int]] = {}
        self._has_system_role = self._probe_system_role()

        closing, _, opening = self._tail(_QUESTION).partition(_QUESTION)
        self._answer_header = opening
        self._closing = self._end_of_turn(self._encode(closing, after=_ANSWER), stop_token_ids)
        self.stop_token_ids = tuple(dict.fromkeys([*stop_token_ids, *self._closing[-1:]]))
        if not self.stop_token_ids:
            raise ValueError("stop_token_ids must hold at least one id, got none, nor does the template")
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = self.stop_token_ids[0] if pad is None else pad

    def prompt(self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation and of the header of the next answer.

        Where the template knows no system role, the system text becomes the beginning of the user message.

        Args:
            messages: role and content each.
            tools: JSON schemas of the functions that the model may call; only where `takes_tools`.
        Raises:
            ValueError: the first message is a system message and no user message follows it, or tools for a
                template that would drop them.
        """
        if tools is not None and not self.takes_tools:
            raise ValueError("tools must be None with this chat template, which takes none")
        if messages and messages[0]["role"] == "system" and not self._has_system_role:
            if len(messages) < 2 or messages[1]["role"] != "user":
                raise ValueError("messages must have a user message after the system message")
            text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": text}, *messages[2:]]
        return self._encode(self._render(messages, tools))

    def glue(self, completion_ids: Sequence[int], finish_reason: str, user: str) -> list[int]:
        """Ids to append after a sampled turn so that the model may answer `user`.

        A turn that ended with a stop token, any of them, is closed already. One cut at the length limit
        gets the template's whole end of turn.

        Args:
            completion_ids: the sampled ids; they stay as they are.
            finish_reason: "stop" or "length".
            user: the next user message.
        Raises:
            ValueError: another finish_reason, or "stop" without a stop token at the end.
        """
        if finish_reason not in ("stop", "length"):
            raise ValueError(f'finish_reason must be "stop" or "length", got {finish_reason!r}')
        if user not in self._glue:
            self._glue[user] = self._encode(self._tail(user), after=_ANSWER)
        glue = self._glue[user]
        if finish_reason == "length":
            return list(glue)
        if not completion_ids or completion_ids[-1] not in self.stop_token_ids:
            raise ValueError(f"completion_ids must end with one of {self.stop_token_ids} after a stop")
        return glue[len(self._closing) :]

    def encode_turn(self, text: str) -> list[int]:
        """Ids of an answer that was written, not sampled, with the stop token that ends it."""
        closing = self._closing or [self.stop_token_ids[0]]
        return self._encode(text, after=self._answer_header) + closing

    def decode(self, ids: Iterable[int]) -> str:
        """Text of sampled ids, without stop tokens and other special tokens, otherwise to the letter."""
        kept = [token for token in ids if token not in self.stop_token_ids]
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @cached_property
    def template_sha256(self) -> str:
        """Names the chat template in use: prompts, and so answers, depend on it."""
        template = self._template or self.tokenizer.chat_template
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template writes out the tools that it is given. Others ignore them, or raise."""
        function = {"name": _TOOL, "description": "", "parameters": {"type": "object", "properties": {}}}
        messages = [{"role": "user", "content": _QUESTION}]
        try:
            return _TOOL in self._render(messages, [{"type": "function", "function": function}])
        except Exception:  # as in _probe_system_role: the way out is to write the tools as text
            return False

    def _render(self, messages: list[dict[str, str]], tools: list[dict[str, Any]] | None = None) -> str:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,  # type: ignore[arg-type]
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
            date_string=_DATE,
        )
        assert isinstance(text, str)
        return text

    def _tail(self, user: str) -> str:
        """What the template writes after an answer when `user` is the next message."""
        messages = [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": user},
        ]
        _, marker, tail = self._render(messages).partition(_ANSWER)
        if not marker or user.strip() not in tail:
            raise ValueError("chat_template must render all messages of a user, assistant, user conversation")
        return tail

    def _probe_system_role(self) -> bool:
        """Templates without a system role raise an error, or drop the message without a word."""
        messages = [{"role": "system", "content": _ANSWER}, {"role": "user", "content": _QUESTION}]
        try:
            return _ANSWER in self._render(messages)
        except Exception:  # a template may raise anything; whatever it is, folding is the way out
            return False

    def _end_of_turn(self, ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
        """Of the ids between an answer and the next question, those that end the answer: up to a stop
        token.

        With no known stop token there, a special token at the very beginning is taken for one.
        """
        for i, token in enumerate(ids):
            if token in stop_token_ids:
                return ids[: i + 1]
        added = self.tokenizer.added_tokens_decoder
        return ids[:1] if ids and ids[0] in added and added[ids[0]].special else []

    def _encode(self, text: str, after: str = "") -> list[int]:
        """Ids of a text as they come after another one: some tokenizers prefix a space at the start."""
        before = self._ids(after)
        together = self._ids(after + text)
        # Where the two texts merge into one token there is no such difference.
        return together[len(before) :] if together[: len(before)] == before else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        # The template has written the special tokens already, beginning of text included.
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []
