"""Function calling."""

from __future__ import annotations

from typing import Any

from grpo.tasks import Verdict
from grpo.tasks.call_json import Call, Unreadable
from grpo.tasks.calls import find_calls, holds_prose_only
from grpo.tasks.matching import Defaults, compare


def verify(text: str, gold: list[Call], python_syntax: bool = False, accepted: bool = False) -> Verdict:
    return _judge(text, gold, python_syntax, accepted, {})


def _judge(text: str, gold: list[Call], python_syntax: bool, accepted: bool, defaults: Defaults) -> Verdict:
    try:
        calls = find_calls(text, python_syntax)
    except Unreadable as fault:
        nothing = fault.reason in ("empty", "no_call") or (
            fault.reason != "too_long" and holds_prose_only(text, python_syntax)
        )
        return Verdict("ok" if not gold and nothing else fault.reason)
    return Verdict(compare(calls, gold, accepted, defaults))
