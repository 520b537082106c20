"""Groups for the page: a row of the list, and as JSON the episodes that open below it, token by token.

A log may have millions of groups. The page has evenly spaced ones, as many as fit.

Left out: a group's rank or a choice of good ones; a reader would take them for the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo.episode import ROLES_TRAINED
from grpo.report import tokens
from grpo.report.data import DAMAGED, Place, Run, episodes, mapping, number
from grpo.report.text import script_json, visible, visible_in

MOST_GROUPS = 400  # on a page
MOST_EPISODES = 16  # of a group
LONGEST_REASON = 100  # characters


def groups(runs: Sequence[Run], most_bytes: float) -> list[dict[str, Any]]:
    """Evenly spaced groups of the runs, as many as fit: {row of the list, json of what opens}.

    Args:
        most_bytes: of all JSON together.
    """
    found: list[dict[str, Any]] = []
    for run in runs:
        places = spaced(run.places, MOST_GROUPS // len(runs))
        mine = _groups_of(run, places, 4 * most_bytes)
        while sum(group["bytes"] for group in mine) > most_bytes / len(runs):
            mine = mine[::2] if len(mine) > 1 else []
        if len(mine) < run.groups:
            run.notes.append(f"The page has {len(mine)} of {run.groups} groups, evenly spaced.")
        found += mine
    for index, group in enumerate(found):
        group["key"] = f"group-{index}"
    return found


def spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` evenly spaced items, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _groups_of(run: Run, places: Sequence[Place], enough: float) -> list[dict[str, Any]]:
    """All groups, or the first that have `enough` bytes: memory stays bounded."""
    if not places:
        return []
    train_on = run.settings.get("train_on", "reflection")
    trained = ROLES_TRAINED.get(train_on if isinstance(train_on, str) else "", frozenset({"reflection"}))
    tokenizer = tokens.load_tokenizer(run.folder)
    if tokenizer is None:
        run.notes.append("No tokenizer.json in the run: whole turns are coloured, by their mean log-prob.")
    found = []
    total = 0
    for place, records in episodes(run, places, MOST_EPISODES):
        if total > enough:
            break
        if not records:
            continue
        try:
            group = _group(run, place, records, trained, tokenizer)
        except DAMAGED as error:
            run.notes.append(f"A group of step {place.step} is damaged: {type(error).__name__}: {error}")
            continue
        total += group["bytes"]
        found.append(group)
    return found


def _group(
    run: Run,
    place: Place,
    records: Sequence[dict[str, Any]],
    trained: frozenset[str],
    tokenizer: tokens.Tokenizer | None,
) -> dict[str, Any]:
    shown_episodes = [_episode(record, trained, tokenizer) for record in records]
    rewards = [number(record.get("reward")) for record in records]
    right = sum(episode["right"] for episode in shown_episodes)
    texts = mapping(records[0].get("texts"))
    prompt = str(texts.get("prompt", ""))
    shown_episodes.sort(key=lambda episode: -(episode["advantage"] or 0.0))
    content: dict[str, Any] = {
        "example": str(records[0].get("example_id", "")),
        "prompt": prompt,
        "attempt": str(texts.get("attempt", "")) if "reflection" in texts else "",
        "episodes": shown_episodes,
        "left_out": place.episodes - len(records),
    }
    verdict = "all right" if right == len(records) else "some right" if right else "none right"
    reasons = {
        visible(reason[:LONGEST_REASON]) for episode in shown_episodes for reason in episode["reasons"]
    }
    text = script_json(visible_in(content))
    return {
        "run": run.name,
        "step": place.step,
        "prompt": visible((prompt or content["example"])[:200]),
        "right": right,
        "of": len(records),
        "verdict": verdict,
        "signal": len(set(rewards)) > 1,
        "dots": "".join("●" if episode["right"] else "○" for episode in shown_episodes),
        "reasons": sorted(reasons)[:MOST_EPISODES],
        "sample": _sample(content, records) if verdict == "some right" and content["attempt"] else None,
        "json": text,
        "bytes": len(text.encode()),
    }


def _sample(content: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A reflection that led to a right retry and one that did not, to be read next to each other."""
    sides = {}
    for record in records:
        texts = mapping(record.get("texts"))
        right = (record.get("reasons") or [""])[0] == "ok"
        sides[right] = {
            "right": right,
            "reflection": str(texts.get("reflection", "")),
            "retry": str(texts.get("retry", "")),
            "advantage": f"{number(record.get('advantage')) or 0.0:+.2f}".replace("-", "\u2212"),
        }
    step = records[0].get("step")
    return {**content, "step": step, "sides": [sides[right] for right in (True, False) if right in sides]}


def _episode(
    record: dict[str, Any], trained: frozenset[str], tokenizer: tokens.Tokenizer | None
) -> dict[str, Any]:
    reasons = [str(reason) for reason in record.get("reasons") or []][:MOST_EPISODES]
    texts = mapping(record.get("texts"))
    return {
        "generation": number(record.get("generation")),
        "reward": number(record.get("reward")),
        "advantage": number(record.get("advantage")),
        "right": bool(reasons) and reasons[0] == "ok",
        "reasons": reasons,
        "cut": "length" in (record.get("finish_reason"), record.get("retry_finish_reason")),
        "turns": tokens.turns(record, trained, tokenizer),
        "retries": str(texts.get("retry", "")) if len(reasons) > 1 else "",
    }
