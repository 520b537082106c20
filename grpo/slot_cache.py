"""Where the sampler's keys and values lie: slots of one capacity, which sequences take and leave.

Shapes: K key/value heads, D head size.

Left out: paging (schedule.py moves sequences between slots), quantised caches.
"""

from itertools import chain

import torch
from torch import Tensor

from grpo.model import ModelConfig


class SlotCache:
    """Keys and values of `slots` sequences of up to `capacity` tokens: per layer (slots, K, capacity, D).

    Memory is kept from run to run, as faulting in fresh pages costs more than filling them. What lies beyond
    a sequence's length is zero or stale, and finite as long as the model's weights were.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.layout = 0  # changes when tensors move: who remembers addresses must forget them then
        self.release()

    def release(self) -> None:
        """Gives the memory back."""
        self.layout += 1
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
        """Tokens that the memory held now has room for."""
        return self._memory[0][0].numel() // (self.config.num_kv_heads * self.config.head_dim)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (slots, K, capacity, D)."""
        return self._views[layer][0], self._views[layer][1]

    def allocate(self, slots: int, capacity: int, *, keep_slots: int = 0, keep_length: int = 0) -> None:
        """Makes room for `slots` sequences of `capacity` tokens, in the memory held when it is large enough.

        Kept are the first `keep_length` tokens of the first `keep_slots` sequences.
        """
        shape = (slots, self.config.num_kv_heads, capacity, self.config.head_dim)
        size = slots * self.config.num_kv_heads * capacity * self.config.head_dim
        if (slots, capacity) != (self.slots, self.capacity) or self._memory[0][0].numel() < size:
            self.layout += 1
        for memory, views in zip(self._memory, self._views, strict=True):
            for i in range(2):
                kept = views[i][:keep_slots, :, :keep_length].clone() if keep_slots else None
                # The old tensor goes before the new one comes: never two full caches side by side.
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
