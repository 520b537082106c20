"""What the sampler is given and gives back, and where a row stands in between.

A row is a prompt and a script: sample until stop, feed these tokens, sample until stop, ... An episode with a
reflection is Sample, Feed, Sample; a plain completion is one Sample.

Noise is keyed by the caller and drawn once per turn, one uniform per token, so that a row's randomness is its
own, whatever runs next to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo.sampler.sampling import uniforms

# What a Feed whose tokens are not known yet is taken to need, in tokens; the caches grow when it needs more.
UNKNOWN_FEED = 64


@dataclass
class Turn:
    """What one Sample gave: token ids (a stop token included), their log-probs in nats, and why it ended."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Sample:
    """Sample until a stop token, at most `limit` tokens.

    key: names the turn's noise: integers, such as `grpo.rollout.NoiseKey`. None: the numbers of the row and
        of the turn, so rows differ from each other, and a second run of the same rows gives the same.
    """

    limit: int
    key: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Feed:
    """Append these tokens: a list, or a function of the last sampled turn that gives at most `limit` of them.

    The caches grow when a function gives more, at some cost; without a limit UNKNOWN_FEED is taken for one.
    """

    ids: list[int] | Callable[[Turn], list[int]]
    limit: int | None = None


@dataclass(frozen=True)
class Row:
    """A prompt, what to do after it, and anything the caller wants back.

    Rows with equal `prefix` share its cache.
    """

    prefix: tuple[int, ...]
    script: Sequence[Sample | Feed]
    tag: Any = None


@dataclass(frozen=True)
class Finished:
    """A row, its sampled turns and its fed tokens, each in script order."""

    row: Row
    turns: list[Turn]
    fed: list[list[int]]


@dataclass(eq=False)
class RowState:
    """Where a row stands.

    Attributes:
        ids: its private tokens; the prompt's last token is the first of them (see kv_cache.py).
        cached: how many of `ids` lie in the cache. The others go into the next forward.
        turn: the turn being sampled, None between turns.
    """

    row: Row
    index: int  # in the run
    stop_token_ids: frozenset[int]
    length_limit: tuple[int, str]  # of tokens, see `Rope.length_limit`
    greedy: bool
    ids: list[int] = field(default_factory=list)
    cached: int = 0
    turn: Turn | None = None
    turns: list[Turn] = field(default_factory=list)
    fed: list[list[int]] = field(default_factory=list)
    _at: int = 0  # the script's next item
    _limit: int = 0
    _noise: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        script = self.row.script
        first = next((i for i, item in enumerate(script) if isinstance(item, Sample)), None)
        if not self.row.prefix:
            raise ValueError(f"rows[{self.index}]: prefix must hold at least one token, got none")
        if first is None:
            raise ValueError(f"rows[{self.index}]: script must hold a Sample, got {script}")
        if any(isinstance(item, Feed) and callable(item.ids) for item in script[:first]):
            raise ValueError(
                f"rows[{self.index}]: script has a Feed that takes a turn, before its first Sample"
            )
        for item in script:
            if isinstance(item, Sample) and item.limit < 1:
                raise ValueError(f"rows[{self.index}]: limit must be at least 1, got {item.limit}")
        self.ids = [self.row.prefix[-1]]
        self._check_positions()

    def need(self, unknown: int = UNKNOWN_FEED) -> int:
        """Private tokens when the script ends, if every turn takes its limit and unknown Feeds `unknown`."""
        total = len(self.ids)
        if self.turn is not None:
            total += self.left
        for item in self.row.script[self._at :]:
            if isinstance(item, Sample):
                total += item.limit
            else:
                total += (item.limit or unknown) if callable(item.ids) else len(item.ids)
        return total

    def begin(self) -> bool:
        """Goes on to the next Sample through the Feeds before it; False at the end of the script."""
        while self._at < len(self.row.script):
            item = self.row.script[self._at]
            self._at += 1
            if isinstance(item, Sample):
                self.turn, self._limit = Turn([], [], "length"), item.limit
                key = (self.index, len(self.turns)) if item.key is None else item.key
                self._noise = [] if self.greedy else uniforms(key, item.limit)
                return True
            ids = list(item.ids(self.turns[-1]) if callable(item.ids) else item.ids)
            self.fed.append(ids)
            self.ids += ids
            self._check_positions()
        return False

    @property
    def left(self) -> int:
        """Tokens that the turn may still take."""
        assert self.turn is not None
        return self._limit - len(self.turn.ids)

    def noise(self, count: int) -> list[float]:
        """The uniforms of the next tokens, `count` of them at most `left`."""
        assert self.turn is not None
        first = len(self.turn.ids)
        return self._noise[first : first + count]

    def take(self, tokens: list[int], logprobs: list[float]) -> bool:
        """Adds sampled tokens, at most `left`, up to one that ends the turn; True if one does."""
        assert self.turn is not None
        turn, stop_token_ids, count = self.turn, self.stop_token_ids, 0
        for token in tokens:
            count += 1
            if token in stop_token_ids:
                turn.finish_reason = "stop"
                break
        taken = tokens[:count]
        self.ids += taken
        turn.ids += taken
        turn.logprobs += logprobs[:count]
        if turn.finish_reason != "stop" and len(turn.ids) < self._limit:
            return False
        self.turns.append(turn)
        self.turn = None
        return True

    def _check_positions(self) -> None:
        prompt, rest = len(self.row.prefix), self.need(unknown=0) - 1
        most, setting = self.length_limit
        if prompt + rest > most:
            raise ValueError(
                f"rows[{self.index}]: a prompt of {prompt} tokens and up to {rest} sampled and fed after it "
                f"are more than the model's {setting}"
            )
