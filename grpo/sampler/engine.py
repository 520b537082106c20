"""The sampler: runs many scripts of "sample until stop, feed these tokens, sample until stop" in one batch.

There is no barrier between the phases of an episode. In one forward, some rows sample a reflection, some take
in the tokens that ask for the retry, and some sample the retry. Every row has new tokens: the last one that
it sampled and any tokens fed after it, or, on entering, its prompt's last token. The new tokens of all rows,
and the prompts of new groups, go through the model as one flat sequence. Each row samples from the hidden
state of its last token.

    script.py      rows and their scripts
    batching.py    which rows are in the batch, and in which slots
    kv_cache.py    the caches of keys and values, and attention over them
    sampling.py    noise and the choice of tokens
    cuda_graph.py  decode steps recorded for replay, on CUDA

The rest of the trainer knows only `Sampler.run` and `Sampler.load_weights`. Log-probs are those of the whole
distribution at the sampling temperature, as in the learner.

Left out: speculative decoding, chunked prefill, several devices.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from grpo.model.attention import upload
from grpo.model.decoder import Decoder, pack_weight, packed_product, packed_weights
from grpo.sampler.batching import Batcher
from grpo.sampler.cuda_graph import DecodeGraphs
from grpo.sampler.kv_cache import CachedAttention, SlotCache, unrounded
from grpo.sampler.sampling import choose
from grpo.sampler.script import Feed, Finished, Row, RowState, Sample, Turn

# With fewer rows, the packed output weight is faster, though its product cannot be written into a buffer.
FEW_ROWS = 16

__all__ = ["Feed", "Finished", "Row", "Sample", "Sampler", "Turn"]


class DivergedError(FloatingPointError):
    """The model's logits are NaN or infinite."""


class Sampler:
    """Generates with `model`. Settings are plain attributes that may be changed between runs.

    Args:
        model: the decoder: the learner's, or a copy that `load_weights` keeps up to date.
        stop_token_ids: any of them ends a turn.
        temperature: of the samples and of the log-probs, above 0.
        greedy: take the most likely token; log-probs are still at `temperature`.
        top_p, top_k: restrict the tokens sampled (1.0 and 0: all). For evaluation: log-probs ignore them.
        max_rows: the most rows in one forward.
        cache_gb: bound on the key/value caches, in 10^9 bytes. If it is too small for `max_rows`, fewer run.
        stop_check_steps: the most forwards between two checks for rows that have stopped. The host waits for
            the device and lays out the batch only at a check. Tokens sampled after a stop token are dropped.
            For GPUs; log-probs may differ in their last bits.
        cuda_graphs: on CUDA, record decode steps once per shape and replay them (cuda_graph.py).
        varlen: one attention call per layer for all fed tokens and new prompts of a forward (kv_cache.py); it
            needs what `grpo.model.attention.check_varlen` checks.
    Attributes:
        stats: of the last run: prefill_tokens, fed_tokens, sampled_tokens, decode_steps, seconds.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        stop_token_ids: Sequence[int],
        temperature: float = 1.0,
        greedy: bool = False,
        top_p: float = 1.0,
        top_k: int = 0,
        max_rows: int = 64,
        cache_gb: float = 2.0,
        stop_check_steps: int = 1,
        cuda_graphs: bool = True,
        varlen: bool = False,
    ) -> None:
        self.model = model
        self.stop_token_ids = tuple(stop_token_ids)
        self.temperature, self.greedy, self.top_p, self.top_k = temperature, greedy, top_p, top_k
        self.max_rows, self.cache_gb, self.stop_check_steps = max_rows, cache_gb, stop_check_steps
        self.cuda_graphs, self.varlen = cuda_graphs, varlen
        self.stats: dict[str, float] = {}
        weight = model.output_weight
        self._private = SlotCache(model.config, dtype=weight.dtype, device=weight.device)
        self._prefixes = SlotCache(model.config, dtype=weight.dtype, device=weight.device)
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._graphs: DecodeGraphs | None = None
        self._check_settings()

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[Row],
        *,
        finished: Callable[[int, Finished], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Finished]:
        """Runs every row's script to its end.

        Args:
            rows: any number. They enter in this order, so rows with equal prefixes should be neighbours.
            finished: called once with each row's index and result, as rows end: the caller's work on them is
                done while a GPU computes the next forwards.
            progress: called with (rows done, rows) whenever rows are done.
        Returns:
            one Finished per row, in the order of `rows`.
        Raises:
            ValueError: a setting or script is invalid, or a row exceeds `Rope.length_limit` or `cache_gb`.
            DivergedError: the logits are NaN or infinite.
        """
        start = time.perf_counter()
        self._check_settings()
        stop, limit = frozenset(self.stop_token_ids), self.model.config.rope.length_limit
        states = [RowState(row, i, stop, limit, self.greedy) for i, row in enumerate(rows)]
        self.stats = {}
        if not states:
            return []
        weights = self._prepare_graphs()
        batcher = Batcher(
            states,
            self._private,
            self._prefixes,
            max_rows=self.max_rows,
            cache_bytes=self.cache_gb * 1e9,
            few_shapes=self._graphs is not None,
            varlen=self.varlen,
        )
        results: dict[int, Finished] = {}
        ended: list[RowState] = []
        # The device where pinned memory is reserved and graphs are recorded, whatever the current one is.
        with torch.cuda.device_of(self.model.output_weight), packed_weights(self.model):
            head = pack_weight(self.model.output_weight)
            while (busy := batcher.busy) or ended:
                sampled = None
                if busy:
                    input_ids, attend, active, steps = batcher.next(self.stop_check_steps)
                    if self._graphs is not None:
                        self._graphs.keep_if((weights, self._private.allocations, self._prefixes.allocations))
                    noise = None if self.greedy else [row.noise(steps) for row in active]
                    sampled = self._decode(input_ids, attend, head, steps, noise)
                # A GPU is busy now: the forwards are queued, and nothing has waited for them yet.
                for state in ended:
                    results[state.index] = Finished(state.row, state.turns, state.fed)
                    if finished is not None:
                        finished(state.index, results[state.index])
                if ended and progress is not None:
                    progress(len(results), len(states))
                ended = [] if sampled is None else batcher.take(*self._read(sampled, len(active)))
        self.stats = {**batcher.stats, "seconds": time.perf_counter() - start}
        return [results[index] for index in range(len(states))]

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies the learner's weights into the model. Tensors that both share cost nothing.

        Raises:
            ValueError: names or shapes differ from the model's. Nothing is copied in that case.
        """
        current = self.model.state_dict()
        if current.keys() != state_dict.keys():
            raise ValueError(
                "state_dict must have the model's names; "
                f"missing: {sorted(current.keys() - state_dict.keys())}, "
                f"unknown: {sorted(state_dict.keys() - current.keys())}"
            )
        for name, tensor in current.items():
            shape, new = tuple(tensor.shape), tuple(state_dict[name].shape)
            if shape != new:
                raise ValueError(f"state_dict[{name!r}] must have shape {shape}, got {new}")
        with torch.no_grad():
            for name, tensor in current.items():
                if tensor.data_ptr() != state_dict[name].data_ptr():
                    tensor.copy_(state_dict[name])

    def _decode(
        self,
        input_ids: Tensor,
        attend: CachedAttention,
        head: Tensor | None,
        steps: int,
        noise: list[list[float]] | None,
    ) -> Tensor:
        """Queues `steps` forwards. After the first, each takes in the tokens that the one before it sampled.

        Args:
            head: the packed output weight, if there is one.
            noise: `steps` uniforms per row; None: greedy.
        Returns:
            (2, B, steps) int64: the tokens, and the bits of their float64 log-probs: one transfer has both.
        """
        device = self.model.output_weight.device
        uniforms = None
        if noise is not None:
            noise = noise + [[0.0] * steps] * (attend.batch - attend.num_rows)
            # MPS has no float64, and shares its memory with the CPU.
            uniforms = upload(noise, torch.device("cpu") if device.type == "mps" else device, torch.float64)
        # Forwards without a graph: all, or the first if it takes in prompts or several tokens of a row.
        plain = steps if self._graphs is None else min(1, len(attend.stretches))
        sampled: list[tuple[Tensor, Tensor]] = []
        for step in range(plain):
            now = None if uniforms is None else uniforms[:, step]
            tokens, logprobs = self._step(input_ids, attend, now, head)
            sampled.append((tokens, logprobs))
            if step + 1 < steps:
                input_ids = tokens[None].to(device)
                attend.advance()
        if self._graphs is not None and plain < steps:
            later = None if uniforms is None else uniforms[:, plain:]
            settings = self.temperature, self.top_p, self.top_k
            replayed = self._graphs.run(input_ids, attend, later, steps - plain, settings)
            sampled += zip(*(columns.unbind(1) for columns in replayed), strict=True)
        tokens, logprobs = (torch.stack(columns, dim=1) for columns in zip(*sampled, strict=True))
        return torch.stack([tokens, logprobs.view(torch.int64)])

    def _read(self, sampled: Tensor, num_rows: int) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probs of the rows, queued by `_decode`. The host waits for the device here."""
        host = sampled[:, :num_rows].cpu()
        ids, values = host[0].tolist(), host[1].view(torch.float64).tolist()
        if not all(map(math.isfinite, chain.from_iterable(values))):
            # The caches now contain NaN, which masking would not keep out of later runs: 0 * NaN is NaN.
            self._private.release()
            self._prefixes.release()
            raise DivergedError("the model's logits are NaN or infinite: its weights may have diverged")
        return ids, values

    def _step(
        self, input_ids: Tensor, attend: CachedAttention, noise: Tensor | None, head: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One forward, and a token and its log-prob for each row, (B,) each."""
        hidden = self.model(input_ids, attend.position_ids, attend=attend)[0, : attend.batch]
        logits = self._logits(hidden, head)
        return choose(
            logits.cpu() if logits.device.type == "mps" else logits,
            noise,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )

    def _logits(self, hidden: Tensor, head: Tensor | None) -> Tensor:
        """hidden (B, H) -> (V, B) float32."""
        weight = self.model.output_weight
        if unrounded(weight.device, weight.dtype):
            return torch.mm(weight, hidden.T, out_dtype=torch.float32)
        if weight.device.type != "cpu":
            return torch.mm(weight, hidden.T).float()
        if head is not None and len(hidden) < FEW_ROWS:
            return self._buffer(torch.float32, len(hidden)).copy_(packed_product(hidden, head).T)
        logits = torch.mm(weight, hidden.T, out=self._buffer(weight.dtype, len(hidden)))
        if logits.dtype == torch.float32:
            return logits
        return self._buffer(torch.float32, len(hidden)).copy_(logits)

    def _recordable(self) -> bool:
        """Whether decode steps can be CUDA graphs."""
        # A RoPE that depends on the length waits for the device, which a recording must not.
        depends = self.model.config.rope.depends_on_length
        return self.cuda_graphs and self.model.output_weight.is_cuda and not depends

    def _prepare_graphs(self) -> tuple[int, ...] | None:
        """Keeps or renews `_graphs` for this run; returns the weights' addresses, on which graphs depend."""
        if not self._recordable():
            self._graphs = None
            return None
        if self._graphs is None or self._graphs.width != self.stop_check_steps:
            self._graphs = DecodeGraphs(self._step, self.stop_check_steps)
        return tuple(parameter.data_ptr() for parameter in self.model.parameters())

    def _buffer(self, dtype: torch.dtype, batch: int) -> Tensor:
        """(V, B), in the same memory at every step: fresh pages would cost more than the sampling itself."""
        weight = self.model.output_weight
        size = len(weight) * batch
        if dtype not in self._buffers or self._buffers[dtype].numel() < size:
            self._buffers[dtype] = torch.empty(size, dtype=dtype, device=weight.device)
        return self._buffers[dtype][:size].view(len(weight), batch)

    def _check_settings(self) -> None:
        if not self.stop_token_ids:
            raise ValueError("stop_token_ids must hold at least one token, got none")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 (greedy=True for argmax), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        for name in ("max_rows", "stop_check_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
