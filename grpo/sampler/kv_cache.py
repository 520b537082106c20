"""The sampler's caches of keys and values, and attention over them.

`SlotCache` stores the keys and values. `CachedAttention` is softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017,
eq. 1) for rows that share prompts. A prompt is cached once; each of its rows has a private cache for the
tokens that follow. One forward takes a *ragged* batch, packed flat into T tokens in this order:

    last new token of each row (B) | earlier new tokens of rows that have several | tokens of new prompts

Most forwards have only the first part. It goes through batched matrix products, because
scaled_dot_product_attention with one query per row and grouped heads was ten times slower on a CPU. The other
parts are rarer. They use that function, one stretch of consecutive tokens at a time, or, with `varlen`, one
call for all stretches.

A prompt is cached without its last token. Each row starts with that token as its first private one, so every
row always has a new token whose hidden state predicts the next.

Shapes: B rows, g prompts, m the most rows of a prompt, N query heads, K key/value heads, r = N / K query
heads for each, D head size, P and L the longest cached prompt and private part.

Left out: paging (batching.py moves sequences between slots), quantised caches.
"""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain

import torch
from torch import Tensor

from grpo.model.attention import Spans, attention, upload, varlen_attention
from grpo.model.decoder import ModelConfig

# --- the caches ------------------------------------------------------------------------------------------


class SlotCache:
    """Keys and values of `slots` sequences of up to `capacity` tokens: per layer (slots, K, capacity, D).

    Sequences take and leave slots. Memory is kept from run to run, because faulting in fresh pages costs more
    than filling them. Entries beyond a sequence's length are zero or stale, but finite if the weights were.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        # Queries times keys, (n, l, D) and (n, D, m): float32 where PyTorch can return it.
        float32 = partial(torch.bmm, out_dtype=torch.float32)
        self.score = float32 if unrounded(device, dtype) else torch.bmm
        self.allocations = 0  # counted whenever the memory moves: addresses recorded before are then invalid
        self.release()

    def release(self) -> None:
        """Frees the memory."""
        self.allocations += 1
        self.slots = self.capacity = 0
        self._memory = [[torch.empty(0), torch.empty(0)] for _ in range(self.config.num_layers)]
        self._views = [[torch.empty(0), torch.empty(0)] for _ in range(self.config.num_layers)]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        config = self.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.dtype.itemsize

    @property
    def held_tokens(self) -> int:
        """Number of tokens for which memory is allocated."""
        return self._memory[0][0].numel() // (self.config.num_kv_heads * self.config.head_dim)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (slots, K, capacity, D)."""
        return self._views[layer][0], self._views[layer][1]

    def allocate(self, slots: int, capacity: int, *, keep_slots: int = 0, keep_length: int = 0) -> None:
        """Makes room for `slots` sequences of `capacity` tokens; allocates only if the memory is too small.

        Keeps the first `keep_length` tokens of the first `keep_slots` sequences.
        """
        shape = (slots, self.config.num_kv_heads, capacity, self.config.head_dim)
        size = slots * self.config.num_kv_heads * capacity * self.config.head_dim
        self.allocations += self._memory[0][0].numel() < size
        for memory, views in zip(self._memory, self._views, strict=True):
            for i in range(2):
                kept = views[i][:keep_slots, :, :keep_length].clone() if keep_slots else None
                # The old tensor is freed before the new one is allocated: there are never two full caches.
                views[i] = torch.empty(0)
                if memory[i].numel() < size:
                    memory[i] = torch.empty(0)
                    memory[i] = torch.zeros(size, dtype=self.dtype, device=self.device)
                views[i] = memory[i][:size].view(shape)
                if kept is not None:
                    views[i][:keep_slots, :, :keep_length] = kept
        self.slots, self.capacity = slots, capacity

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of slot `source` to slot `target`."""
        for view in chain.from_iterable(self._views):
            view[target, :, :length] = view[source, :, :length]

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values (T, K, D) at (slots[t], positions[t]), both (T,) int64."""
        for view, new in zip(self._views[layer], (keys, values), strict=True):
            view[slots, :, positions] = new

    def read(self, layer: int, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (T, K, D) that `write` stored at (slots[t], positions[t])."""
        keys, values = self._views[layer]
        return keys[slots, :, positions], values[slots, :, positions]


# --- products --------------------------------------------------------------------------------------------


def unrounded(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch can return products of 16-bit tensors in float32 (`out_dtype`), as it sums them.

    In bfloat16 a number between 16 and 32 is a multiple of 1/8: rounding a logit of that size changes its
    log-prob by 1/32 nat on average.
    """
    return device.type == "cuda" and dtype.itemsize == 2 and torch.version.hip is None


# --- attention over the caches ---------------------------------------------------------------------------

# With `fill`, the lengths up to which caches are read are rounded up so that about this many tokens more are
# read per forward. The fewer the sequences, the coarser the lengths, and the fewer the shapes.
READ_MORE = 32768
# Lengths are multiples of this: slices of 16-bit tensors stay aligned for the fast products.
ALIGNED = 64


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def multiple(number: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step


def read_length(length: int, sequences: int, capacity: int) -> int:
    """Tokens read of each of `sequences` caches, the longest of which has `length`: see READ_MORE."""
    step = max(ALIGNED, READ_MORE // power_of_two(sequences))
    rounded = multiple(length, step)
    return rounded if rounded + step <= capacity else capacity


@dataclass(frozen=True)
class Fill:
    """Sizes to which a batch is padded, so that few shapes occur.

    rows: of the batch.
    group: the most rows that a prompt may have.
    """

    rows: int
    group: int


@dataclass(frozen=True)
class RowSpan:
    """A row's part in one forward: tokens [start, start + length) of its private sequence are new.

    Private token i has position `prefix_length` + i. The row's prompt is in slot `prefix_slot`.
    """

    prefix_slot: int
    prefix_length: int
    start: int
    length: int


PADDING_ROW = RowSpan(0, 0, 0, 1)  # fills up a batch


@dataclass(frozen=True)
class _Stretch:
    """Consecutive tokens [first, first + length) of the flat input that belong to one sequence.

    They see `prefix_length` tokens of prompt `prefix_slot`, then the first `private_length` tokens of row
    `slot`. The stretch is the end of these. A new prompt (slot None) is the prompt that it sees.
    """

    first: int
    length: int
    slot: int | None
    prefix_slot: int
    prefix_length: int
    private_length: int


@dataclass(frozen=True)
class _Together:
    """All stretches of a forward, for one attention call per layer: keys are copied from the caches."""

    spans: Spans
    num_keys: int
    # (cache, slot and position of each key there, its index among the keys), once per cache
    copies: list[tuple[SlotCache, Tensor, Tensor, Tensor]]

    @staticmethod
    def of(stretches: list[_Stretch], prefixes: SlotCache, private: SlotCache) -> "_Together":
        device = private.device
        keys = [stretch.prefix_length + stretch.private_length for stretch in stretches]
        parts = [  # of each stretch, in either cache: slot, number of keys, index of the first among the keys
            (
                (stretch.prefix_slot, stretch.prefix_length, end - count),
                (stretch.slot or 0, stretch.private_length, end - stretch.private_length),
            )
            for stretch, count, end in zip(stretches, keys, accumulate(keys), strict=True)
        ]
        table = upload(parts, device)  # (stretches, 2, 3)
        copies = []
        for index, cache in enumerate((prefixes, private)):
            total = sum(part[index][1] for part in parts)
            slots, counts, first = table[:, index].unbind(1)
            stretch = torch.repeat_interleave(counts, output_size=total)  # of each key; does not wait
            positions = torch.arange(total, device=device) - (counts.cumsum(0) - counts)[stretch]
            if total:
                copies.append((cache, slots[stretch], positions, first[stretch] + positions))
        spans = Spans.of([stretch.length for stretch in stretches], keys, device)
        return _Together(spans, sum(keys), copies)

    def attend(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        """q (tokens of all stretches, N, D) -> the same shape."""
        shape = self.num_keys, self.copies[0][0].config.num_kv_heads, q.shape[-1]
        keys, values = q.new_empty(shape), q.new_empty(shape)
        for cache, slots, positions, indices in self.copies:
            keys[indices], values[indices] = cache.read(layer, slots, positions)
        return varlen_attention(q, keys, values, self.spans, window)


class CachedAttention:
    """The `attend` of one forward: stores new keys and values, then attends to prompts and private caches.

    Args:
        prefixes, private: caches of the prompts, and of the tokens that follow them in each row.
        rows: the rows in slot order, at least one.
        prompts: (slot, number of tokens) of each new prompt.
        lookahead: how many times `advance` will be called.
        fill: pads the batch to these sizes and rounds all others up, so that few shapes occur, as CUDA
            graphs need. The results of padding rows are never read. None: no padding, exact sizes.
        varlen: one attention call per layer for all new tokens but the last of each row, see `Sampler`.
    Attributes:
        position_ids: (1, T) int64, in the order given at the top of this file.
    """

    def __init__(
        self,
        prefixes: SlotCache,
        private: SlotCache,
        rows: list[RowSpan],
        prompts: list[tuple[int, int]],
        lookahead: int = 0,
        fill: Fill | None = None,
        varlen: bool = False,
    ) -> None:
        self.prefixes, self.private, self.config = prefixes, private, private.config
        self.num_rows = self.batch = len(rows)
        self.fill = fill
        if fill is not None:
            rows = rows + [PADDING_ROW] * (fill.rows - self.num_rows)
            self.batch = len(rows)
        # In this dtype, a product copies an operand that has gaps in memory, and a copy that also transposes
        # takes three times as long. Keys are therefore copied beforehand, without transposing.
        self.copy_keys = private.device.type == "cpu" and private.dtype == torch.bfloat16
        slots = list(range(self.batch))
        places = [row.start + row.length - 1 for row in rows]
        positions = [row.prefix_length + place for row, place in zip(rows, places, strict=True)]
        self.stretches: list[_Stretch] = []
        for slot, row in enumerate(rows):
            if row.length > 1:
                last = row.start + row.length - 1  # the last token is in the first part already
                self.stretches.append(
                    _Stretch(len(slots), row.length - 1, slot, row.prefix_slot, row.prefix_length, last)
                )
                slots += [slot] * (row.length - 1)
                places += range(row.start, last)
                positions += range(row.prefix_length + row.start, row.prefix_length + last)
        self.private_tokens = len(slots)
        for slot, length in prompts:
            if length:
                self.stretches.append(_Stretch(len(slots), length, None, slot, length, 0))
                slots += [slot] * length
                places += range(length)
                positions += range(length)
        # One transfer to the device for the three lists that have one entry per token.
        table = upload([slots, places, positions], private.device)
        self.slots, self.places, self.position_ids = table[0], table[1], table[2:]
        self._arrange(rows, lookahead)
        self.update_biases()
        self._together: _Together | None = None
        if varlen and self.stretches:
            self._together = _Together.of(self.stretches, prefixes, private)
        self._masks = {
            (stretch, window): self._mask(stretch, window)
            for stretch in (() if varlen else self.stretches)
            for window in set(self.config.windows)
        }

    def advance(self) -> None:
        """Advances to the next forward, in which every row has one new token and there is no new prompt.

        This needs no host-device synchronisation, and from the second call on no shape changes. So such
        forwards can be queued, or captured in a CUDA graph. The sizes leave room for `lookahead` calls; what
        is not written yet is masked.
        """
        n = self.private_tokens = self.batch
        self.stretches, self._masks, self._together = [], {}, None
        self.slots, self.places, self.position_ids = self.slots[:n], self.places[:n], self.position_ids[:, :n]
        self.advance_counters()
        self.update_biases()

    def advance_counters(self) -> None:
        """Counts one more token for every row. Call `update_biases` next."""
        for counter in (self.places, self.position_ids, self._private_lengths):
            counter += 1

    def update_biases(self) -> None:
        """Recomputes from the counters which keys each row sees."""
        self._biases = {window: self._bias(window) for window in set(self.config.windows)}

    @property
    def state(self) -> list[Tensor]:
        """The tensors in which two forwards of the same `shape` differ, if every row has one new token."""
        lengths = [self._prefix_lengths, self._private_lengths]
        return [self.slots, self.places, self.position_ids, *lengths, self.members, self.place]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes and strides of all tensors in a forward in which every row has one new token."""
        lengths = self.private_length, self.prefix_length, self.private.capacity, self.prefixes.capacity
        return self.batch, *lengths, self.num_groups, len(self.members)

    def _arrange(self, rows: list[RowSpan], lookahead: int) -> None:
        """Lists the rows of each prompt, so that one product multiplies all their queries with its keys."""
        real = rows[: self.num_rows]
        self.prefix_length = max(row.prefix_length for row in rows)
        self.private_length = max(row.start + row.length for row in rows) + lookahead
        lengths = upload([[row.prefix_length, row.start + row.length] for row in rows], self.private.device)
        self._prefix_lengths, self._private_lengths = lengths[:, :, None].unbind(1)  # (B, 1) each
        groups = max(row.prefix_slot for row in rows) + 1
        if self.fill is not None:
            groups = min(power_of_two(max(groups, self.batch)), self.prefixes.slots)
            self.private_length = read_length(self.private_length, self.batch, self.private.capacity)
            self.prefix_length = read_length(self.prefix_length, groups, self.prefixes.capacity)
        members: list[list[int]] = [[] for _ in range(groups)]
        rank = []
        for slot, row in enumerate(real):
            rank.append(len(members[row.prefix_slot]))
            members[row.prefix_slot].append(slot)
        width = max(map(len, members))
        if self.fill is not None:
            width = power_of_two(max(width, min(self.fill.group, self.batch)))
        # Prompts with fewer rows are filled up with row 0, whose result there is never read.
        padded = [ids + [0] * (width - len(ids)) for ids in members]
        place = [row.prefix_slot * width + r for row, r in zip(real, rank, strict=True)]
        place += [0] * (self.batch - self.num_rows)
        self.num_groups = len(members)
        # (g m,): the row at each place of the grouped order; (B,): the place of each row in it.
        self.members = upload(list(chain.from_iterable(padded)), self.private.device)
        self.place = upload(place, self.private.device)

    def _bias(self, window: int | None) -> Tensor:
        """(B, 1, 1, P + L) float32: 0 where the row's last token sees a key, -inf elsewhere."""
        prefix_lengths, private_lengths = self._prefix_lengths, self._private_lengths
        index = torch.arange(max(self.prefix_length, self.private_length), device=self.private.device)
        prefix, private = index[: self.prefix_length], index[: self.private_length]
        seen = [prefix < prefix_lengths, private < private_lengths]
        if window is not None:
            # Distances from the last token: private token i is private_lengths - 1 - i back, and prompt token
            # j is another prefix_lengths - j before the first private one.
            seen[0] &= private_lengths - 1 + prefix_lengths - prefix < window
            seen[1] &= private_lengths - 1 - private < window
        visible = torch.cat(seen, dim=1)
        bias = torch.zeros(visible.shape, device=self.private.device).masked_fill_(~visible, float("-inf"))
        return bias[:, None, None]

    def _mask(self, stretch: _Stretch, window: int | None) -> Tensor | None:
        """(length, keys) bool, True where a token sees a key; None for plain causal attention within it."""
        keys = stretch.prefix_length + stretch.private_length
        if stretch.slot is None and (window is None or stretch.length <= window):
            return None
        key = torch.arange(keys, device=self.private.device)
        distance = key[-stretch.length :, None] - key  # positions are consecutive; the stretch is at the end
        return (distance >= 0) & (distance < (window or keys + 1))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, N, T, D), k and v (1, K, T, D), rotated -> (1, N, T, D)."""
        q, k, v = q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)  # (T, heads, D)
        n = self.private_tokens
        self.private.write(layer, self.slots[:n], self.places[:n], k[:n], v[:n])
        if n < len(k):
            self.prefixes.write(layer, self.slots[n:], self.places[n:], k[n:], v[n:])
        out = [self._attend_rows(layer, q[: self.batch])]
        if self._together is not None:
            window = self.config.windows[layer]
            out.append(self._together.attend(layer, q[self.batch :], window))
        else:
            out += [self._attend_stretch(layer, stretch, q, k, v) for stretch in self.stretches]
        return (torch.cat(out) if self.stretches else out[0]).transpose(0, 1)[None]

    def _attend_rows(self, layer: int, q: Tensor) -> Tensor:
        """One query per row, (B, N, D) -> (B, N, D)."""
        batch, heads, size = q.shape
        q = q.reshape(batch, -1, heads // self.config.num_kv_heads, size)  # (B, K, r, D)
        private_keys, private_values = (
            x[:batch, :, : self.private_length].flatten(0, 1) for x in self.private.layer(layer)
        )
        if self.copy_keys:
            private_keys = private_keys.contiguous()
        scores = self.private.score(q.flatten(0, 1), private_keys.transpose(1, 2))
        scores = scores.view(*q.shape[:3], -1)  # (B, K, r, L)
        if self.prefix_length:
            scores = torch.cat([self._against_prefix(layer, q, values=False), scores], dim=-1)
        bias = self._biases[self.config.windows[layer]]
        # Scaled, masked and normalised in float32, whatever the model's dtype.
        weights = torch.add(bias, scores, alpha=size**-0.5).softmax(dim=-1).to(q.dtype)  # (B, K, r, P + L)
        private_weights = weights[..., self.prefix_length :].flatten(0, 1)
        out = torch.bmm(private_weights, private_values).view(q.shape)
        if self.prefix_length:
            out += self._against_prefix(layer, weights[..., : self.prefix_length], values=True)
        return out.view(batch, heads, size)

    def _against_prefix(self, layer: int, x: Tensor, *, values: bool) -> Tensor:
        """Queries (B, K, r, D) times prompt keys -> (B, K, r, P); or weights (B, K, r, P) times values."""
        batch, kv_heads, repeats, size = x.shape
        keys_or_values = self.prefixes.layer(layer)[1 if values else 0]
        other = keys_or_values[: self.num_groups, :, : self.prefix_length].flatten(0, 1)  # (g K, P, D)
        # All rows of a prompt share one product: (g K, m r, .) @ (g K, ., .). index_select gets flat rows, so
        # that it copies each in one piece.
        x = x.reshape(batch, -1).index_select(0, self.members)
        x = x.view(self.num_groups, -1, kv_heads, repeats, size).transpose(1, 2)  # (g, K, m, r, .)
        x = x.reshape(len(other), -1, size)
        out = torch.bmm(x, other) if values else self.private.score(x, other.transpose(1, 2))
        out = out.view(self.num_groups, kv_heads, -1, repeats, out.shape[-1]).transpose(1, 2)
        out = out.reshape(len(self.members), -1).index_select(0, self.place)
        return out.view(batch, kv_heads, repeats, -1)

    def _attend_stretch(self, layer: int, stretch: _Stretch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Several tokens of one sequence: q (T, N, D) -> (stretch.length, N, D)."""
        tokens = slice(stretch.first, stretch.first + stretch.length)
        if stretch.slot is None:
            keys, values = k[tokens].transpose(0, 1), v[tokens].transpose(0, 1)
        else:
            slot, n, m = stretch.slot, stretch.prefix_length, stretch.private_length
            keys, values = (
                torch.cat([prefix[stretch.prefix_slot, :, :n], private[slot, :, :m]], dim=1)
                for prefix, private in zip(self.prefixes.layer(layer), self.private.layer(layer), strict=True)
            )
        mask = self._masks[stretch, self.config.windows[layer]]
        return attention(q[tokens].transpose(0, 1)[None], keys[None], values[None], mask)[0].transpose(0, 1)
