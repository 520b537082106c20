"""Exact attention over a packed row (packing.py), without a (T, T) mask.

A row contains each shared prefix once. Two implementations compute the same:

    sdpa    tree by tree: the prompt attends causally; the branches, in bundles of similar length padded to
            the longest, attend to the prompt and to themselves. Tokens that several branches share are
            computed here once per branch, and only once in the rest of the model. Runs everywhere.
    varlen  one call per layer, on CUDA: the row is cut into runs, each the end of a path from its root, and
            each run attends to its path. Every token is a query once, and there is no padding.

T tokens of the row, N query heads, K key/value heads, D head size; P the prompt length of a tree, G the
branches of a bundle, L the longest of them. Left out: kernels that skip masked blocks (flex attention would
belong here, but has no backward on a CPU).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo.model.attention import Attend, Spans, attention, upload, varlen_attention

# The least length of a bundle's shortest branch over that of its longest. Attention in the demo's steps takes
# a third less than with one bundle per tree.
SIMILAR = 0.75


@dataclass(frozen=True)
class Tree:
    """Where one prompt and its completions lie in the row, as places from 0 to T - 1."""

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]  # prompt to leaf, longest first; they may share places


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index], by `embedding`, whose backward (unlike index_select's) has a fixed order on CUDA too."""
    return F.embedding(index, x.flatten(1)).unflatten(1, x.shape[1:])


def tree_attend(trees: Sequence[Tree], windows: Sequence[int | None], *, varlen: bool = False) -> Attend:
    """Scaled dot-product attention under `dense_mask(trees, window=...)`, as the decoder's `attend`.

    Args:
        windows: per layer, how many positions a query sees (itself included), or None for all of them.
        varlen: the implementation; it needs what `grpo.model.attention.check_varlen` checks.
    Returns:
        attend(layer, q (1, N, T, D), k (1, K, T, D), v (1, K, T, D)) -> (1, N, T, D), differentiable.
    """
    num_tokens = 1 + max(max(path) for tree in trees for path in (tree.prompt, *tree.branches))
    implementation = _varlen_attend(trees, windows) if varlen else _sdpa_attend(trees, windows, num_tokens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[0] != 1 or q.shape[2] != num_tokens:
            raise ValueError(f"q must hold one packed row of {num_tokens} tokens, got shape {tuple(q.shape)}")
        return implementation(layer, q, k, v)

    return attend


# --- varlen ----------------------------------------------------------------------------------------------


def runs(trees: Sequence[Tree]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Cuts the row into runs: consecutive places, each the child of the place before it.

    A prompt and its first branch are one run. Each further branch is a run from where it leaves the others.

    Returns:
        of each run, in the order of the row, its length, and the places it attends to: the path from the root
        to its last place. The run is the end of that path.
    """
    where: dict[int, tuple[tuple[int, ...], int]] = {}  # place -> a path through it, and its index there
    for tree in trees:
        where.update((place, (tree.prompt, index)) for index, place in enumerate(tree.prompt))
        for branch in tree.branches:
            path = tree.prompt + branch
            where.update((place, (path, index)) for index, place in enumerate(branch, len(tree.prompt)))
    bounds = []
    for place in range(len(where)):
        path, index = where[place]
        if index == 0 or path[index - 1] != place - 1:
            bounds.append(place)
    bounds.append(len(where))
    ends = [where[bound - 1] for bound in bounds[1:]]
    lengths = [end - start for start, end in pairwise(bounds)]
    return lengths, [path[: index + 1] for path, index in ends]


def _varlen_attend(trees: Sequence[Tree], windows: Sequence[int | None]) -> Attend:
    plans: dict[torch.device, tuple[Tensor, Spans]] = {}  # made once per micro-batch, not per layer

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device not in plans:
            lengths, paths = runs(trees)
            places = upload(list(chain.from_iterable(paths)), q.device)
            plans[q.device] = places, Spans.of(lengths, list(map(len, paths)), q.device)
        places, spans = plans[q.device]
        # One gather for both, since its backward pass sorts the places.
        keys_and_values = torch.cat([x[0].transpose(0, 1) for x in (k, v)], dim=1)  # (T, 2 K, D)
        keys, values = gather(keys_and_values, places).chunk(2, dim=1)
        out = varlen_attention(q[0].transpose(0, 1), keys, values, spans, windows[layer])  # (T, N, D)
        return out.transpose(0, 1)[None]

    return attend


# --- sdpa ------------------------------------------------------------------------------------------------


def _sdpa_attend(trees: Sequence[Tree], windows: Sequence[int | None], num_tokens: int) -> Attend:
    plans: dict[tuple[int | None, torch.device], _Plan] = {}  # made once per micro-batch, not per layer

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = (windows[layer], q.device)
        if key not in plans:
            plans[key] = _Plan.of(trees, num_tokens, *key)
        plan = plans[key]
        # One gather and one split: each separate slice would cost a zero-filled gradient of T tokens.
        slots = [gather(x[0].transpose(0, 1), plan.tokens).split(plan.sizes) for x in (q, k, v)]
        pieces = zip(*slots, strict=True)  # of q, k and v, each (slots, heads, D): a prompt, its bundles, ...
        out = []
        for prompt_mask, bundles in plan.masks:
            prompt = [x.transpose(0, 1)[None] for x in next(pieces)]  # (1, heads, P, D)
            out.append(attention(prompt[0], prompt[1], prompt[2], prompt_mask)[0].transpose(0, 1))
            out += [_attend_bundle(count, next(pieces), prompt, mask) for count, mask in bundles]
        return gather(torch.cat(out), plan.slots).transpose(0, 1)[None]

    return attend


@dataclass(frozen=True)
class _Plan:
    """Indices and masks for one window. Attention has S slots: a prompt, its bundles, the next prompt, ..."""

    tokens: Tensor  # (S,) int64, the place in the row that each slot reads
    slots: Tensor  # (T,) int64, the slot whose output each place takes
    sizes: list[int]  # slots of each piece
    # For each tree, the prompt's (P, P) mask (None: causal), and G and the (L, P + L) mask of each bundle.
    masks: list[tuple[Tensor | None, list[tuple[int, Tensor]]]]

    @staticmethod
    def of(trees: Sequence[Tree], num_tokens: int, window: int | None, device: torch.device) -> _Plan:
        tokens: list[int] = []
        slots = [-1] * num_tokens
        sizes, masks = [], []

        def read(path: Sequence[int], length: int) -> None:
            for slot, place in enumerate(path, len(tokens)):
                slots[place] = slot
            tokens.extend([*path, *[path[-1]] * (length - len(path))])

        for tree in trees:
            size = len(tree.prompt)
            position = torch.arange(size + max(map(len, tree.branches), default=0), device=device)
            read(tree.prompt, size)
            sizes.append(size)
            narrow = window is not None and window < size
            prompt_mask = _visible(position[:size], position[:size], window) if narrow else None
            bundles = []
            for bundle in _bundles(tree.branches):
                longest = len(bundle[0])
                for branch in bundle:
                    read(branch, longest)
                sizes.append(len(bundle) * longest)
                # Padding comes last, where causality hides it: one mask for all branches.
                positions = position[: size + longest]
                bundles.append((len(bundle), _visible(positions[size:], positions, window)))
            masks.append((prompt_mask, bundles))
        indices = [torch.tensor(x, dtype=torch.int64, device=device) for x in (tokens, slots)]
        return _Plan(indices[0], indices[1], sizes, masks)


def _bundles(branches: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Cuts branches, longest first, where the next one is shorter than SIMILAR of the bundle's first."""
    start = 0
    for end in range(1, len(branches) + 1):
        if end == len(branches) or len(branches[end]) < SIMILAR * len(branches[start]):
            yield branches[start:end]
            start = end


def _attend_bundle(count: int, bundle: Sequence[Tensor], prompt: Sequence[Tensor], mask: Tensor) -> Tensor:
    """(G * L, heads, D) of q, k and v -> (G * L, N, D): each branch attends to the prompt and to itself."""
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in bundle)  # (G, heads, L, D)
    shared_k, shared_v = (x.expand(count, -1, -1, -1) for x in prompt[1:])
    out = attention(q, torch.cat([shared_k, k], 2), torch.cat([shared_v, v], 2), mask)
    return out.transpose(1, 2).flatten(0, 1)


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """(queries, keys) bool from positions: a query sees itself and at most window - 1 positions before."""
    distance = query[:, None] - key
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


# --- the reference ---------------------------------------------------------------------------------------


def dense_mask(trees: Sequence[Tree], *, window: int | None = None) -> Tensor:
    """(T, T) bool, True where a query (row) sees a key: the reference for `tree_attend`, in O(T^2) memory."""
    paths = [torch.tensor(tree.prompt + branch) for tree in trees for branch in tree.branches or ((),)]
    num_tokens = 1 + max(int(path.max()) for path in paths)
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for path in paths:
        position = torch.arange(len(path))
        mask[path[:, None], path] = _visible(position, position, window)
    return mask
