"""The tokens of an episode as pieces of text with log-probs, turn by turn.

The text of a token needs the run's tokenizer. A character may take several tokens; they form one piece, whose
log-prob is their sum. Without a tokenizer each turn is one piece with its mean log-prob.

Left out: the tokenizer classes of transformers. tokenizer.json is data, and loading it runs no code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from grpo.episode import role_runs
from grpo.report.data import is_regular, mapping, number

LARGEST_TOKENIZER = 64 << 20  # bytes
LONGEST_TURN = 2000  # pieces that are shown
ROLES = ("reflection", "context", "retry", "attempt")


def load_tokenizer(run: Path) -> Tokenizer | None:
    """The tokenizer in the run's start or newest checkpoint; None if there is none that can be read."""
    newest_first = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    for path in (folder / "tokenizer.json" for folder in (run / "start", *newest_first)):
        if is_regular(path) and path.stat().st_size <= LARGEST_TOKENIZER:
            try:
                return Tokenizer.from_file(str(path))
            except Exception:  # the library has no class of its own for a damaged file
                continue
    return None


def turns(
    episode: dict[str, Any], trained: frozenset[str], tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """The turns of a completion in order: {role, trained, tokens, pieces, logprobs}.

    Args:
        episode: a stored episode, which may be damaged.
        trained: roles whose tokens are in the loss.
        tokenizer: None: one piece per turn.
    Returns:
        `tokens` is the length of the turn; at most LONGEST_TURN `pieces`, with as many `logprobs` (nats).
    """
    ids, roles, logprobs = (_list(episode.get(name)) for name in ("completion_ids", "roles", "logprobs"))
    try:
        runs = [(role if role in ROLES else "context", tokens) for role, tokens in role_runs(roles)]
    except ValueError:
        runs = []
    if not len(ids) == len(logprobs) == sum(tokens for _, tokens in runs):
        runs = []
    texts = mapping(episode.get("texts"))
    found = []
    end = 0
    for role, turn in groupby(runs, key=itemgetter(0)):
        start, end = end, end + sum(tokens for _, tokens in turn)
        nats = [number(logprob) or 0.0 for logprob in logprobs[start:end]]
        pieces = list(_pieces(tokenizer, ids[start:end], nats)) if tokenizer else []
        if not pieces:
            pieces = [(str(texts.get(role, "(fed by the program)")), sum(nats) / len(nats))]
        found.append(_turn(role, role in trained, end - start, pieces))
    if not found:  # damaged: only the texts are left
        named = [role for role in ROLES if role in texts and (role != "attempt" or "reflection" not in texts)]
        found = [_turn(role, role in trained, 0, [(str(texts[role]), 0.0)]) for role in named]
    return found


def _turn(role: str, trained: bool, tokens: int, pieces: Sequence[tuple[str, float]]) -> dict[str, Any]:
    shown = pieces[:LONGEST_TURN]
    return {
        "role": role,
        "trained": trained,
        "tokens": tokens,
        "pieces": [text for text, _ in shown],
        "logprobs": [round(nats, 2) for _, nats in shown],
        "left_out": len(pieces) - len(shown),
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _pieces(tokenizer: Tokenizer, ids: Sequence[Any], nats: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Pieces of text as the tokens complete them. Yields nothing if an id is not the tokenizer's."""
    size = tokenizer.get_vocab_size()
    if not all(isinstance(token, int) and 0 <= token < size for token in ids):
        return
    stream = DecodeStream(skip_special_tokens=False)
    waiting, total = [], 0.0  # tokens that do not complete a character yet
    for token, logprob in zip(ids, nats, strict=True):
        waiting.append(token)
        total += logprob
        try:
            text = stream.step(tokenizer, token)
        except Exception:  # the library's only class; it refuses some impossible sequences
            stream = DecodeStream(skip_special_tokens=False)
            text = tokenizer.decode(waiting, skip_special_tokens=False)
        if text:
            yield text, total
            waiting, total = [], 0.0
    if waiting:
        yield tokenizer.decode(waiting, skip_special_tokens=False), total
