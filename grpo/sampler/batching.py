"""Decides which rows share the next forward, and in which slots their keys and values are stored.

Rows wait in order, enter as soon as a slot is free and leave when their script ends (continuous batching:
Orca, OSDI 2022). Slots are kept dense, so that the caches of the rows in the batch are a view. When a row
leaves, a waiting row takes its slot; if none waits, the last row is moved there with its cache. The slots of
prompts are kept dense in the same way. A prompt stays while rows in the batch or next in line use it. For
rows that come later, it is run again.

When a Feed is longer than expected, the private caches get longer and, if `cache_gb` requires it, fewer.
Rows that lose their slot wait at the front of the queue. When they re-enter, all of their tokens go through
the model again.

Left out: priorities, reordering to save padding, sharing between prompts that are equal only in part.
"""

from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from typing import TypeVar

from torch import Tensor

from grpo.model.attention import upload
from grpo.sampler.kv_cache import (
    ALIGNED,
    CachedAttention,
    Fill,
    RowSpan,
    SlotCache,
    multiple,
    power_of_two,
)
from grpo.sampler.script import RowState

# With `few_shapes`, capacities of caches are multiples of this while memory lasts.
ROOM = 256
# A forward with this many new tokens admits no further row. This bounds the memory of activations.
NEW_TOKENS = 4096

Entry = TypeVar("Entry")


class CachedPrompt:
    """A prompt in the cache, without its last token, and how many rows of the batch use it."""

    def __init__(self, prefix: tuple[int, ...], slot: int) -> None:
        self.prefix, self.slot = prefix, slot
        self.length = len(prefix) - 1
        self.users = 0
        self.cached = False


def plan(
    prefixes: list[tuple[int, ...]], need: int, length: int, max_rows: int, budget: int
) -> tuple[int, int]:
    """The most row slots that fit in `budget` tokens, and their prompt slots; zeros if no row fits.

    Prompts get twice the slots that neighbouring rows need at a time, because groups leave stragglers.

    Args:
        prefixes: of all rows, in order.
        need: tokens for the private part of a row.
        length: tokens for a prompt.
    """
    for slots in range(min(max_rows, len(prefixes)), 0, -1):
        prompts = min(2 * _most_distinct(prefixes, slots), slots, len(set(prefixes)))
        if slots * need + prompts * length <= budget:
            return slots, prompts
    return 0, 0


def capacity_for(length: int, slots: int, cache: SlotCache, *, tight: bool) -> int:
    """A capacity for `slots` sequences of `length` tokens such that few capacities occur from run to run.

    It is the present one if that takes no more memory, else one with room for somewhat longer sequences.

    Args:
        tight: memory decides how many rows fit, so there is hardly any room.
    """
    present = cache.capacity
    if tight:
        fits = present <= multiple(length + length // 16, ALIGNED)
    else:
        fits = slots * present <= cache.held_tokens
    if length <= present and fits:
        return present
    return multiple(length, ALIGNED) if tight else multiple(length + length // 8, ROOM)


def _most_distinct(prefixes: list[tuple[int, ...]], width: int) -> int:
    """The largest number of different prefixes in any `width` neighbours."""
    inside = Counter(prefixes[:width])
    most = len(inside)
    for leaving, entering in zip(prefixes, prefixes[width:], strict=False):
        inside[entering] += 1
        inside[leaving] -= 1
        if not inside[leaving]:
            del inside[leaving]
        most = max(most, len(inside))
    return most


class Batcher:
    """The batch of one `Sampler.run`: `next()` lays out a forward, `take()` hands its tokens to the rows.

    With `few_shapes`, batches are filled up: see `fill` of CachedAttention. `varlen` is passed on to it.
    """

    def __init__(
        self,
        states: list[RowState],
        private: SlotCache,
        prefixes: SlotCache,
        *,
        max_rows: int,
        cache_bytes: float,
        few_shapes: bool = False,
        varlen: bool = False,
    ) -> None:
        self.private, self.prefixes = private, prefixes
        self.few_shapes, self.varlen = few_shapes, varlen
        self.token_bytes = private.token_bytes
        self.budget = int(cache_bytes // self.token_bytes)
        slots, need, prompts, length = self._sizes(states, max_rows)
        if max(private.held_tokens, slots * need) + max(prefixes.held_tokens, prompts * length) > self.budget:
            private.release()
            prefixes.release()
        private.allocate(slots, need)
        prefixes.allocate(prompts, length)
        self.group = max(Counter(state.row.prefix for state in states).values())  # the most rows of a prompt
        self.waiting = deque(states)
        self.rows: list[RowState | None] = []
        self.groups: list[CachedPrompt | None] = []
        self.group_of: dict[RowState, CachedPrompt] = {}
        self.stats = {"prefill_tokens": 0, "fed_tokens": 0, "sampled_tokens": 0, "decode_steps": 0}

    def _sizes(self, states: list[RowState], max_rows: int) -> tuple[int, int, int, int]:
        """Slots and capacity of the private caches, then of the prompts'.

        Raises:
            ValueError: not even one row fits.
        """
        prefixes = [state.row.prefix for state in states]
        needs = max(state.need() for state in states), max(map(len, prefixes)) - 1
        most = plan(prefixes, 0, 0, max_rows, self.budget)  # the slots if memory were no bound
        for tight in (False, True) if self.few_shapes else (True,):
            need, length = needs
            if self.few_shapes:
                pairs = zip(needs, most, (self.private, self.prefixes), strict=True)
                need, length = (capacity_for(*pair, tight=tight) for pair in pairs)
            slots, prompts = plan(prefixes, need, length, max_rows, self.budget)
            if slots == most[0]:
                break
        if not slots:
            raise ValueError(
                f"cache_gb must be at least {(need + length) * self.token_bytes / 1e9:.3g} for one row of "
                f"{need + length} tokens, got {self.budget * self.token_bytes / 1e9:.3g}"
            )
        return slots, need, prompts, length

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.group_of)

    def next(self, most_steps: int = 1) -> tuple[Tensor, CachedAttention, list[RowState], int]:
        """Lays out the next forward, and how many more may follow it before `take`.

        Returns:
            input_ids: (1, T); the last token of each row comes first.
            attend: the forward's attention.
            rows: the rows in the batch, in the order of their slots.
            steps: the number of forwards until `take`, at most `most_steps`. All but the first take in only
                the tokens that the one before sampled.
        """
        self._grow()
        self._admit()
        _close_holes(self.rows, lambda row, source, target: self.private.move(source, target, row.cached))
        _close_holes(self.groups, self._move_group)
        rows = [row for row in self.rows if row is not None]
        fill = None
        if self.few_shapes:
            fill = Fill(min(power_of_two(len(rows)), self.private.slots), self.group)
        spans: list[RowSpan] = []
        prompts: list[tuple[int, int]] = []
        last: list[int] = []
        earlier: list[int] = []
        prompt_ids: list[int] = []
        for row in rows:
            prompt = self.group_of[row]
            spans.append(RowSpan(prompt.slot, prompt.length, row.cached, len(row.ids) - row.cached))
            last.append(row.ids[-1])
            earlier += row.ids[row.cached : -1]
        for group in self.groups:
            if group is not None and not group.cached:
                prompts.append((group.slot, group.length))
                prompt_ids += group.prefix[:-1]
                group.cached = True
        self.stats["prefill_tokens"] += len(prompt_ids)
        self.stats["fed_tokens"] += len(earlier)
        steps = min(most_steps, *(row.left for row in rows)) if most_steps > 1 else 1
        self.stats["decode_steps"] += steps
        if fill is not None:
            last += [0] * (fill.rows - len(last))
        input_ids = upload([last + earlier + prompt_ids], self.private.device)
        attend = CachedAttention(self.prefixes, self.private, spans, prompts, steps - 1, fill, self.varlen)
        return input_ids, attend, rows, steps

    def take(self, tokens: list[list[int]], logprobs: list[list[float]]) -> list[RowState]:
        """Hands every row its tokens, up to the one that ends its turn. Rows whose script has ended leave.

        Args:
            tokens, logprobs: for each row, one per forward since `next`.
        Returns:
            the rows that left.
        """
        left = []
        for slot, (ids, values) in enumerate(zip(tokens, logprobs, strict=True)):
            row = self.rows[slot]
            assert row is not None
            ended = row.take(ids, values)  # drops tokens sampled after the end of the turn
            row.cached = len(row.ids) - 1  # the last token has not been through the model
            if ended:
                self.stats["sampled_tokens"] += len(row.turns[-1].ids)
                if not row.begin():
                    left.append(self._leave(slot))
        return left

    def _leave(self, slot: int) -> RowState:
        row = self.rows[slot]
        assert row is not None
        self.rows[slot] = None
        self.group_of.pop(row).users -= 1
        return row

    def _admit(self) -> None:
        """Fills free slots with waiting rows, in order, while prompts fit and the forward stays bounded."""
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        free += range(len(self.rows), self.private.slots)
        upcoming = {row.row.prefix for row in islice(self.waiting, len(free))}
        for group in self.groups:
            if group is not None and not group.users and group.prefix not in upcoming:
                self.groups[group.slot] = None
        tokens = 0
        for slot in free:
            # The batch is never empty, so a row that does not fit now will fit once others have left.
            if not self.waiting or tokens >= NEW_TOKENS:
                break
            row = self.waiting[0]
            group = self._group(row.row.prefix)
            if group is None:
                break
            self.waiting.popleft()
            if row.turn is None:
                row.begin()
            tokens += len(row.ids) + (0 if group.cached or group.users else group.length)
            group.users += 1
            self.group_of[row] = group
            self.rows += [None] * (slot + 1 - len(self.rows))
            self.rows[slot] = row

    def _group(self, prefix: tuple[int, ...]) -> CachedPrompt | None:
        """The cache entry of the prompt, a new one if it has none; None while no slot is free."""
        for group in self.groups:
            if group is not None and group.prefix == prefix:
                return group
        if len(self.groups) < self.prefixes.slots:
            self.groups.append(None)
        for slot, group in enumerate(self.groups):
            if group is None or not group.users:
                self.groups[slot] = new = CachedPrompt(prefix, slot)
                return new
        return None

    def _move_group(self, group: CachedPrompt, source: int, target: int) -> None:
        if group.cached:
            self.prefixes.move(source, target, group.length)
        group.slot = target

    def _grow(self) -> None:
        """Lengthens the private caches if a Feed needs it; rows that lose their slot wait at the front."""
        rows = [row for row in self.rows if row is not None]
        need = max((row.need() for row in rows), default=0)
        if need <= self.private.capacity:
            return
        room = self.budget - self.prefixes.held_tokens
        if need > room:
            raise ValueError(
                f"cache_gb must be at least {(self.budget - room + need) * self.token_bytes / 1e9:.3g} for a "
                f"row of {need} tokens besides the prompts, got {self.budget * self.token_bytes / 1e9:.3g}"
            )
        capacity = need + need // 8  # a margin: the next row's Feed may be a little longer
        if self.few_shapes:
            capacity, room = multiple(capacity, ALIGNED), max(need, room - room % ALIGNED)
        capacity = min(capacity, room)
        slots = min(self.private.slots, room // capacity)
        for slot in reversed(range(slots, len(self.rows))):
            if self.rows[slot] is not None:
                row = self._leave(slot)
                row.cached = 0
                self.waiting.appendleft(row)
        del self.rows[slots:]
        longest = max((row.cached for row in self.rows if row is not None), default=0)
        self.private.allocate(slots, capacity, keep_slots=len(self.rows), keep_length=longest)


def _close_holes(entries: list[Entry | None], move: Callable[[Entry, int, int], None]) -> None:
    """Puts the last entries into the holes before them; `move(entry, source, target)` moves their cache."""
    while None in entries:
        entry = entries.pop()
        if entry is not None:
            hole = entries.index(None)
            entries[hole] = entry
            move(entry, len(entries), hole)
