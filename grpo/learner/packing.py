"""Packs a step's completions into micro-batches in which every shared prefix appears once (tree packing).

A micro-batch is one row without padding: the trie of its sequences, parents before children.

    sequences  p0 p1 p2 a0 a1 a2   and   p0 p1 p2 a0 b1 b2     (three prompt tokens, two completions)
    row        p0 p1 p2 | a0 a1 | b1
    position    0  1  2    3  4    4
    predicts         a0   a1 a2   b2
                          b1

Completions that begin alike share those tokens, and so do prompts (the system message, the rules): shared
tokens go through the model once. A token sees its ancestors and itself (tree_attention.py). A completion is
cut after its last trained token, since later tokens cannot reach the loss. That last token is only predicted,
so the row does not contain it. Gradients equal those of one padded row per completion.

T tokens of the micro-batch; U pairs of a place in the row and a token to predict there; M trained tokens,
several of which may share a pair. Left out: sequences split over micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from os.path import commonprefix  # of any lists

import torch
from torch import Tensor

from grpo.episode import Episode
from grpo.learner.tree_attention import Tree, gather


@dataclass(frozen=True)
class Batch:
    """One micro-batch. M may be 0: then the row is a prompt only, and its loss and gradients are 0."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64
    trees: list[Tree]
    select: Tensor  # (U,) int64, places in the row that predict
    ids: Tensor  # (U,) int64, the tokens predicted there
    pairs: Tensor  # (M,) int64, the index of each trained token's pair, in [0, U)
    sampler_logprobs: Tensor  # (M,) float32, the sampler's (0 for supervised sequences)
    sequence_ids: Tensor  # (M,) int64, the index of its sequence in the whole optimiser step

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def per_token(self, values: Tensor) -> Tensor:
        """(U,) values of the pairs -> (M,) of the trained tokens."""
        return gather(values[:, None], self.pairs)[:, 0]

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


_Group = tuple[tuple[int, ...], list[_Branch]]  # prompt, completions


def pack_episodes(episodes: Sequence[Episode], *, train_on: str, max_tokens: int) -> list[Batch]:
    """Packs one optimiser step's episodes; `sequence_ids` are their indices in `episodes`.

    Args:
        train_on: which roles are trained, a key of `episode.ROLES_TRAINED`.
        max_tokens: the most tokens of a micro-batch. A longer sequence gets a micro-batch to itself.
    """
    groups: dict[tuple[int, ...], list[_Branch]] = {}
    for index, episode in enumerate(episodes):
        branch = _branch(index, episode.completion_ids, episode.loss_mask(train_on), episode.logprobs)
        groups.setdefault(tuple(episode.prompt_ids), []).append(branch)
    return _pack(groups.items(), max_tokens)


def pack_sequences(
    groups: Sequence[tuple[Sequence[int], Sequence[tuple[Sequence[int], Sequence[bool]]]]], *, max_tokens: int
) -> list[Batch]:
    """Packs supervised data, (prompt_ids, [(completion_ids, loss_mask), ...]), as `pack_episodes` does.

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


def _branch(index: int, ids: Sequence[int], loss_mask: Sequence[bool], logprobs: Sequence[float]) -> _Branch:
    if not len(ids) == len(loss_mask) == len(logprobs):
        counts_text = f"{len(loss_mask)} for the {len(ids)} tokens of sequence {index}"
        raise ValueError(f"loss_mask must have one entry per token, got {counts_text}")
    needed = max((i + 1 for i, trained in enumerate(loss_mask) if trained), default=0)
    return _Branch(index, ids[:needed], loss_mask[:needed], logprobs[:needed])


def _pack(groups: Iterable[_Group], max_tokens: int) -> list[Batch]:
    """First fit, longest first; a group too long for a micro-batch is split and its prompt repeated."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    planted: list[_Group] = []
    prompts: list[tuple[int, ...]] = []
    for prompt, branches in groups:
        if not prompt:
            raise ValueError("prompt_ids must hold at least one token, got none")
        prompts.append(prompt)
        # A sequence without trained tokens adds nothing to the loss; it only counts in the denominators.
        trained = [branch for branch in branches if branch.completion_ids]
        trained.sort(key=lambda branch: len(branch.completion_ids), reverse=True)  # stable
        if _size((prompt, trained)) <= max_tokens:  # nearly always: then nothing needs to be tried out
            parts = [trained] if trained else []
        else:
            rows = _first_fit([(prompt, [branch]) for branch in trained], max_tokens)
            parts = [[branch for _, (branch,) in row.groups] for row in rows]
        planted += [(prompt, part) for part in parts]
    if not planted and prompts:
        # Nothing is trained. The shortest prompt makes a micro-batch for the caller's forward and backward.
        planted = [(min(prompts, key=len), [])]
    return [_build(row) for row in _first_fit(planted, max_tokens)]


def _size(group: _Group) -> int:
    """The nodes of a group's trie, counted without building it."""
    prompt, branches = group
    paths = sorted(list(branch.completion_ids[:-1]) for branch in branches)
    # In sorted order, what a path shares with any path before it, it shares with its neighbour.
    shared = sum(len(commonprefix(neighbours)) for neighbours in pairwise(paths))
    return len(prompt) + sum(map(len, paths)) - shared


class _Trie:
    """A trie of token ids. Its nodes, in the order of insertion, are the row of a micro-batch."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], int] = {}  # (parent's place, or -1 at a root; token) -> place
        self.positions: list[int] = []

    def add(self, ids: Sequence[int], parent: int = -1) -> list[int]:
        """The places of `ids`, which follow `parent`; missing nodes are appended."""
        nodes, positions, places = self.nodes, self.positions, []
        first = positions[parent] + 1 if parent >= 0 else 0
        for position, token in enumerate(ids, first):
            place = nodes.setdefault((parent, token), len(nodes))
            if place == len(positions):
                positions.append(position)
            places.append(place)
            parent = place
        return places

    def plant(self, group: _Group) -> tuple[list[int], list[list[int]]]:
        """Places of the prompt, and of each completion without its last token."""
        prompt = self.add(group[0])
        return prompt, [self.add(branch.completion_ids[:-1], prompt[-1]) for branch in group[1]]

    def match(self, ids: Sequence[int]) -> int:
        """How many of the leading `ids` are in the trie."""
        place = -1
        for count, token in enumerate(ids):
            if (place, token) not in self.nodes:
                return count
            place = self.nodes[place, token]
        return len(ids)


@dataclass
class _Row:
    """What goes into a micro-batch: groups, and the places of each in the trie (`_Trie.plant`)."""

    trie: _Trie = field(default_factory=_Trie)
    groups: list[_Group] = field(default_factory=list)
    places: list[tuple[list[int], list[list[int]]]] = field(default_factory=list)


def _first_fit(groups: list[_Group], max_tokens: int) -> list[_Row]:
    """Distributes groups over rows, the largest first, each to the first row with room for its new nodes."""

    rows: list[_Row] = []
    sized = [(_size(group), group) for group in groups]
    for needed, group in sorted(sized, key=lambda pair: pair[0], reverse=True):  # stable, hence reproducible
        prompt, branches = group
        # The ids that a row may contain already. If the row has another part of the same split group, it may
        # contain more; then the room is underestimated.
        common = [*prompt, *(branches[0].completion_ids[:-1] if len(branches) == 1 else ())]
        room = max_tokens - needed
        fitting = (row for row in rows if len(row.trie.nodes) - row.trie.match(common) <= room)
        if (row := next(fitting, None)) is None:
            rows.append(row := _Row())
        row.groups.append(group)
        row.places.append(row.trie.plant(group))
    return rows


def _build(row: _Row) -> Batch:
    trie = row.trie
    trees: list[Tree] = []
    pairs: dict[tuple[int, int], int] = {}  # (place, token to predict there) -> index in [0, U)
    trained: list[tuple[int, float, int]] = []  # pair, log-prob, sequence
    for group, (prompt, branches) in zip(row.groups, row.places, strict=True):
        inner = {place for branch in branches for place in branch[:-1]}
        leaves = {tuple(branch): None for branch in branches if branch and branch[-1] not in inner}
        trees.append(Tree(tuple(prompt), tuple(sorted(leaves, key=len, reverse=True))))
        for branch, places in zip(group[1], branches, strict=True):
            tokens = zip(
                [prompt[-1], *places], branch.completion_ids, branch.loss_mask, branch.logprobs, strict=True
            )
            for place, token, is_trained, logprob in tokens:
                if is_trained:
                    pair = pairs.setdefault((place, token), len(pairs))
                    trained.append((pair, logprob, branch.sequence_id))
    places_and_ids = torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2)
    columns = list(zip(*trained, strict=True)) or [()] * 3
    return Batch(
        input_ids=torch.tensor([[token for _, token in trie.nodes]], dtype=torch.int64),
        position_ids=torch.tensor([trie.positions], dtype=torch.int64),
        trees=trees,
        select=places_and_ids[:, 0].contiguous(),
        ids=places_and_ids[:, 1].contiguous(),
        pairs=torch.tensor(columns[0], dtype=torch.int64),
        sampler_logprobs=torch.tensor(columns[1], dtype=torch.float32),
        sequence_ids=torch.tensor(columns[2], dtype=torch.int64),
    )
