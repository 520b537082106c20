"""Conversations as token ids, by the model's chat template. Sampled ids are never tokenised again.

A conversation is a prompt to which pieces are appended: sampled ids, then *glue* (the end of that turn, the
next user message, the header of the next answer). To find the glue, a dummy conversation is rendered with a
marker as its answer; what follows the marker is the glue. So the ids of turn n are always a prefix of those
of turn n + 1, even if the template strips `<think>` or white space from history, or if encode(decode(ids))
differs from ids. Tools go to the template with the prompt, if it takes them.

Left out: tool results as messages, and images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

_DATE = "26 Jul 2024"  # Llama 3 templates print today's date unless given one; runs must be repeatable
_QUESTION = "DUMMY-QUESTION"
_ANSWER = "DUMMY-ANSWER"
_TOOL = "dummy_tool"


class Chat:
    """Turns messages into token ids for one tokenizer and chat template.

    Args:
        tokenizer: a transformers tokenizer.
        stop_token_ids: ids that end a turn. The template's end-of-turn token is added if it is missing: some
            checkpoints name only the end-of-text token.
        chat_template: Jinja text; None for the tokenizer's own.
    Raises:
        ValueError: no template, a template that cannot render a conversation, or no stop token.
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
            raise ValueError("stop_token_ids must hold at least one id, got none, and the template has none")
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = self.stop_token_ids[0] if pad is None else pad

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
        return self._encode(self._render(messages, tools))

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
            self._glue[user] = self._encode(self._tail(user), after=_ANSWER)
        glue = self._glue[user]
        if finish_reason == "length":
            return list(glue)
        if not completion_ids or completion_ids[-1] not in self.stop_token_ids:
            raise ValueError(f"completion_ids must end with one of {self.stop_token_ids} after a stop")
        return glue[len(self._closing) :]

    def encode_turn(self, text: str) -> list[int]:
        """Ids of an answer that was written instead of sampled, with the stop token that ends it."""
        closing = self._closing or [self.stop_token_ids[0]]
        return self._encode(text, after=self._answer_header) + closing

    def decode(self, ids: Iterable[int]) -> str:
        """Text of sampled ids, exactly, but without stop tokens and other special tokens."""
        kept = [token for token in ids if token not in self.stop_token_ids]
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @cached_property
    def template_sha256(self) -> str:
        """Identifies the chat template in use, on which prompts and so answers depend."""
        template = self._template or self.tokenizer.chat_template
        text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template renders the tools that it is given. Other templates ignore them or raise."""
        function = {"name": _TOOL, "description": "", "parameters": {"type": "object", "properties": {}}}
        messages = [{"role": "user", "content": _QUESTION}]
        try:
            return _TOOL in self._render(messages, [{"type": "function", "function": function}])
        except Exception:  # as in _probe_system_role; the tools are then written into the prompt
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
        """Whether there is a system role. Templates without one raise, or silently drop the message."""
        messages = [{"role": "system", "content": _ANSWER}, {"role": "user", "content": _QUESTION}]
        try:
            return _ANSWER in self._render(messages)
        except Exception:  # a template may raise anything; the system message then joins the user's
            return False

    def _end_of_turn(self, ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
        """The leading ids that end an answer, of those between it and the next question: up to a stop token.

        Without a known stop token, a special token at the very beginning counts as one.
        """
        for i, token in enumerate(ids):
            if token in stop_token_ids:
                return ids[: i + 1]
        added = self.tokenizer.added_tokens_decoder
        return ids[:1] if ids and ids[0] in added and added[ids[0]].special else []

    def _encode(self, text: str, after: str = "") -> list[int]:
        """Ids of `text` as a continuation of `after`: some tokenizers put a space before the first word."""
        before = self._ids(after)
        together = self._ids(after + text)
        # If a token spans both, `before` is no prefix of `together`.
        return together[len(before) :] if together[: len(before)] == before else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        # The template has already written all special tokens, even the beginning of text.
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []
