"""Strings and numbers of a run as the page shows them.

Left out: HTML escaping, which jinja2 does for the page and text nodes for the groups.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from markupsafe import Markup

from grpo.report.data import mapping, number

LONGEST_TEXT = 5_000  # characters of anything that is shown


def visible(text: str) -> str:
    """Text as a page may show it: cut, with control, bidi and unpaired surrogate characters spelled out.

    Bidi characters would reorder the page's own words around the text. UTF-8 has no unpaired surrogates.
    """
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} [... {len(text) - LONGEST_TEXT:,} more characters]"
    if text.replace("\n", "").isprintable():  # nearly always, and much faster
        return text
    return "".join(c if _shown(c) else f"\\u{ord(c):04x}" for c in text)


def _shown(character: str) -> bool:
    return character in "\n\t\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")


def shown(value: Any) -> str:
    """A setting's value as JSON, strings as they are."""
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def percent(value: Any) -> str:
    return "-" if (share := number(value)) is None else f"{100 * share:.1f}%"


def interval(value: Any) -> str:
    """[low, high] of a share or a difference, in percent or percentage points."""
    low, high = (number(mapping(value).get(end)) for end in ("low", "high"))
    if low is None or high is None:
        return ""
    return f"[{100 * low:.1f}, {100 * high:.1f}]".replace("-", "\u2212")


def points(value: Any) -> str:
    mean = number(mapping(value).get("mean"))
    return "-" if mean is None else f"{100 * mean:+.1f}".replace("-", "\u2212")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def visible_in(value: Any) -> Any:
    """`visible` for every string in it."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [visible_in(item) for item in value]
    return {key: visible_in(item) for key, item in value.items()} if isinstance(value, dict) else value


def script_json(value: Any) -> Markup:
    """JSON that may stand in a <script>: no `</`, `<!--` or line end of JavaScript is left in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
