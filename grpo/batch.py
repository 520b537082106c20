"""Packs a step's completions into micro-batches in which every shared prompt stands once (tree packing).

A micro-batch is one row without padding, a *forest*. A tree is a prompt, then a branch for each completion:

    tokens     p0 p1 p2 | p2 a0 a1 | p2 b0          the prompt, completion a (a0 a1 a2), completion b (b0 b1)
    positions   0  1  2 |  2  3  4 |  2  3          restart in every branch
    predicts            | a0 a1 a2 | b0 b1

A branch begins with the last prompt token again, so that no position has to predict the first token of
several completions. It sees the prompt *before* that token, and itself, never the other branches. A
completion's last token predicts nothing and is left out. Gradients equal those of one padded row per
completion, at 1/G of the prompt's cost.

T tokens of the micro-batch, M selected tokens, N query heads, K key/value heads, D head size; P the prompt
length of a tree, G its branches, L the longest of them. Left out: sequences split over micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from grpo.episode import Episode
from grpo.sdpa import attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tree:
    """Where one prompt and its branches lie in a packed row: the prompt first, then branch after branch."""

    start: int
    prompt_length: int
    branch_lengths: tuple[int, ...]  # n for n completion tokens: the prompt's last token, then n - 1 of them

    @property
    def branches_length(self) -> int:
        return sum(self.branch_lengths)

    @property
    def end(self) -> int:
        return self.start + self.prompt_length + self.branches_length


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `M` may be 0: the row then holds a prompt only, and its loss is 0 with gradients 0."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64
    trees: list[Tree]
    select: Tensor  # (M,) int64, flat positions in the row that predict the selected tokens
    ids: Tensor  # (M,) int64, the selected tokens
    mask: Tensor  # (M,) bool, True where a token counts
    old_logprobs: Tensor  # (M,) float32, the sampler's (0 for supervised sequences)
    sequence_ids: Tensor  # (M,) int64, into the sequences of the whole optimiser step

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "trees"}
        return replace(self, **moved)


@dataclass(frozen=True)
class _Branch:
    """A completion up to its last trained token: what follows that token cannot reach the loss."""

    sequence_id: int
    completion_ids: Sequence[int]
    loss_mask: Sequence[bool]
    logprobs: Sequence[float]
    counts: bool = True

    def __len__(self) -> int:
        return len(self.completion_ids)


def pack(
    episodes: Sequence[Episode], *, train_on: str, max_tokens: int, mask_truncated: bool = False
) -> list[Batch]:
    """Packs one optimiser step's episodes; `sequence_ids` are their indices in `episodes`.

    Args:
        train_on: which roles are selected, a key of `episode.ROLES_TRAINED`.
        max_tokens: the most tokens of a micro-batch. A single sequence that is longer makes one of its own.
        mask_truncated: completions cut at the length limit stay in the batch with `mask` False.
    """
    groups: dict[tuple[int, ...], list[_Branch]] = {}
    for index, episode in enumerate(episodes):
        counts = not (mask_truncated and episode.truncated(train_on))
        branch = _branch(index, episode.completion_ids, episode.loss_mask(train_on), episode.logprobs, counts)
        groups.setdefault(tuple(episode.prompt_ids), []).append(branch)
    return _pack(groups.items(), max_tokens)


def pack_sequences(
    groups: Sequence[tuple[Sequence[int], Sequence[tuple[Sequence[int], Sequence[bool]]]]], *, max_tokens: int
) -> list[Batch]:
    """Packs (prompt_ids, [(completion_ids, loss_mask), ...]) for supervised training, as `pack` does.

    `sequence_ids` count the completions in the order given.
    """
    branched, count = [], 0
    for prompt_ids, completions in groups:
        branches = []
        for completion_ids, loss_mask in completions:
            branches.append(_branch(count, completion_ids, loss_mask, [0.0] * len(completion_ids)))
            count += 1
        branched.append((tuple(prompt_ids), branches))
    return _pack(branched, max_tokens)


def _branch(
    index: int, ids: Sequence[int], loss_mask: Sequence[bool], logprobs: Sequence[float], counts: bool = True
) -> _Branch:
    if not len(ids) == len(loss_mask) == len(logprobs):
        counts_text = f"{len(loss_mask)} for the {len(ids)} tokens of sequence {index}"
        raise ValueError(f"loss_mask must have one entry per token, got {counts_text}")
    needed = max((i + 1 for i, trained in enumerate(loss_mask) if trained), default=0)
    return _Branch(index, ids[:needed], loss_mask[:needed], logprobs[:needed], counts)


def _pack(groups: Iterable[tuple[tuple[int, ...], list[_Branch]]], max_tokens: int) -> list[Batch]:
    """First fit, longest first; a group too long for a micro-batch is split and its prompt repeated."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    planted: list[tuple[tuple[int, ...], list[_Branch]]] = []
    prompts: list[tuple[int, ...]] = []
    for prompt, branches in groups:
        if not prompt:
            raise ValueError("prompt_ids must hold at least one token, got none")
        prompts.append(prompt)
        # A sequence without trained tokens adds nothing to the loss; it only counts in the denominators.
        kept = [branch for branch in branches if len(branch)]
        planted += [(prompt, part) for part in _first_fit(kept, len, max_tokens - len(prompt))]

    def size(tree: tuple[tuple[int, ...], list[_Branch]]) -> int:
        return len(tree[0]) + sum(map(len, tree[1]))

    if not planted and prompts:
        # Nothing is trained, yet the caller's loop of forward and backward still finds a micro-batch.
        planted = [(min(prompts, key=len), [])]
    return [_build(forest) for forest in _first_fit(planted, size, max_tokens)]


def _first_fit(items: list, size: Callable, room: int) -> list[list]:
    """Distributes items over bins of `room`, the largest first, each into the first bin with place for it."""
    bins: list[list] = []
    free: list[int] = []
    for item in sorted(items, key=size, reverse=True):  # stable, hence reproducible
        index = next((i for i, left in enumerate(free) if size(item) <= left), len(bins))
        if index == len(bins):
            bins.append([])
            free.append(room)
        bins[index].append(item)
        free[index] -= size(item)
    return bins


def _build(forest: list[tuple[tuple[int, ...], list[_Branch]]]) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    trees: list[Tree] = []
    selected: list[tuple[int, int, bool, float, int]] = []  # position, token, counts, log-prob, sequence
    for prompt, branches in forest:
        trees.append(Tree(len(tokens), len(prompt), tuple(map(len, branches))))
        tokens += prompt
        positions += range(len(prompt))
        for branch in branches:
            start = len(tokens)
            tokens += [prompt[-1], *branch.completion_ids[:-1]]
            positions += range(len(prompt) - 1, len(prompt) - 1 + len(branch))
            rows = zip(branch.completion_ids, branch.loss_mask, branch.logprobs, strict=True)
            selected += [
                (start + i, token, branch.counts, logprob, branch.sequence_id)
                for i, (token, trained, logprob) in enumerate(rows)
                if trained
            ]
    columns = list(zip(*selected, strict=True)) or [()] * 5
    return Batch(
        input_ids=torch.tensor([tokens], dtype=torch.int64),
        position_ids=torch.tensor([positions], dtype=torch.int64),
        trees=trees,
        select=torch.tensor(columns[0], dtype=torch.int64),
        ids=torch.tensor(columns[1], dtype=torch.int64),
        mask=torch.tensor(columns[2], dtype=torch.bool),
        old_logprobs=torch.tensor(columns[3], dtype=torch.float32),
        sequence_ids=torch.tensor(columns[4], dtype=torch.int64),
    )


def tree_attend(trees: Sequence[Tree], windows: Sequence[int | None]) -> Attend:
    """Exact attention over a forest, as the decoder's `attend(layer, q, k, v)`.

    Same as scaled dot-product attention under `dense_mask(trees, window=...)`, without its (T, T) scores:
    prompts attend causally; the branches of a tree, padded to (G, L), attend to the prompt and to
    themselves.

    Args:
        windows: per layer, how many positions a query sees (itself included), or None for all of them.
    Returns:
        attend(layer, q (1, N, T, D), k (1, K, T, D), v (1, K, T, D)) -> (1, N, T, D), differentiable.
    """
    # One split and one cat: every single slice would cost a gradient of T tokens, filled with zeros.
    sizes = [n for tree in trees for n in (tree.prompt_length, tree.branches_length)]
    plans: dict[tuple[int | None, torch.device], list[_Plan]] = {}  # made once per micro-batch, not per layer

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[0] != 1 or q.shape[2] != sum(sizes):
            raise ValueError(f"q must hold one packed row of {sum(sizes)} tokens, got shape {tuple(q.shape)}")
        key = (windows[layer], q.device)
        if key not in plans:
            plans[key] = [_Plan.of(tree, *key) for tree in trees]
        parts = list(zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True))
        out = []
        for plan, prompt, branches in zip(plans[key], parts[0::2], parts[1::2], strict=True):
            out.append(attention(prompt[0], prompt[1], prompt[2], plan.prompt_mask))
            if branches[0].shape[2]:
                out.append(_attend_branches(plan, branches, prompt))
        return torch.cat(out, dim=2)

    return attend


@dataclass(frozen=True)
class _Plan:
    """Indices and masks of one tree under one window."""

    pad: Tensor | None  # (G * L,) int64: branch tokens -> padded; None where all branches are equally long
    unpad: Tensor | None  # (sum of lengths,) int64: back
    num_branches: int
    prompt_mask: Tensor | None  # (P, P) bool, only under a window shorter than the prompt
    branch_mask: Tensor  # (L, P - 1 + L) bool, one for all branches: padding comes last, causality hides it

    @staticmethod
    def of(tree: Tree, window: int | None, device: torch.device) -> _Plan:
        lengths, shared = tree.branch_lengths, tree.prompt_length - 1
        longest = max(lengths, default=0)
        pad = unpad = None
        if len(set(lengths)) > 1:
            length = torch.tensor(lengths, device=device)
            step = torch.arange(longest, device=device)
            start = length.cumsum(0) - length
            pad = (start[:, None] + step.minimum(length[:, None] - 1)).flatten()
            unpad = (step < length[:, None]).flatten().nonzero()[:, 0]
        position = torch.arange(shared + longest + 1, device=device)  # the prompt's, then a branch's
        prompt_mask = None
        if window is not None and window < tree.prompt_length:
            prompt_mask = _visible(position[: shared + 1], position[: shared + 1], window)
        branch_mask = _visible(position[shared : shared + longest], position[: shared + longest], window)
        return _Plan(pad, unpad, len(lengths), prompt_mask, branch_mask)


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """(queries, keys) bool from positions: a query sees itself and at most window - 1 positions before."""
    distance = query[:, None] - key
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _attend_branches(plan: _Plan, branches: Sequence[Tensor], prompt: Sequence[Tensor]) -> Tensor:
    """(1, N, sum of lengths, D): every branch attends to the prompt without its last token, and to itself."""
    padded = branches if plan.pad is None else [x.index_select(2, plan.pad) for x in branches]
    q, k, v = (x[0].unflatten(1, (plan.num_branches, -1)).transpose(0, 1) for x in padded)  # (G, heads, L, D)
    shared_k, shared_v = (x[:, :, :-1].expand(plan.num_branches, -1, -1, -1) for x in prompt[1:])
    out = attention(q, torch.cat([shared_k, k], 2), torch.cat([shared_v, v], 2), plan.branch_mask)
    out = out.transpose(0, 1).flatten(1, 2)[None]
    return out if plan.unpad is None else out.index_select(2, plan.unpad)


def dense_mask(trees: Sequence[Tree], *, window: int | None = None) -> Tensor:
    """(T, T) bool, True where a query (row) sees a key: the reference for `tree_attend`, in O(T^2) memory."""
    mask = torch.zeros(trees[-1].end, trees[-1].end, dtype=torch.bool)
    for tree in trees:
        prompt = torch.arange(tree.prompt_length)
        mask[tree.start + prompt[:, None], tree.start + prompt] = _visible(prompt, prompt, window)
        start = tree.start + tree.prompt_length
        for length in tree.branch_lengths:
            own = torch.arange(length)
            positions = tree.prompt_length - 1 + own
            mask[start + own[:, None], tree.start + prompt[:-1]] = _visible(positions, prompt[:-1], window)
            mask[start + own[:, None], start + own] = _visible(positions, positions, window)
            start += length
    return mask
