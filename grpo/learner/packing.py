"""Packs a step's completions into micro-batches in which every shared prefix stands once (tree packing).

A micro-batch is one row without padding: the trie of its sequences, parents before children.

    sequences  p0 p1 p2 a0 a1 a2   and   p0 p1 p2 a0 b1 b2     (three prompt tokens, two completions)
    row        p0 p1 p2 | a0 a1 | b1
    position    0  1  2    3  4    4
    predicts         a0   a1 a2   b2
                          b1

What completions begin with in common goes through the model once, and so does what prompts begin with in
common (the system message, the rules). A token sees its ancestors and itself (tree_attention.py). A
completion's last token predicts nothing and is left out, and so is all that follows its last trained token.
Gradients equal those of one padded row per completion.

T tokens of the micro-batch; U pairs of a place and a token to predict there; M trained tokens, of which
several may be the same pair. Left out: sequences split over micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from grpo.episode import Episode
from grpo.learner.tree_attention import Tree, gather


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `M` may be 0: the row then holds a prompt only, and its loss is 0 with gradients 0."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64
    trees: list[Tree]
    select: Tensor  # (U,) int64, places in the row that predict
    ids: Tensor  # (U,) int64, the tokens predicted there
    pairs: Tensor  # (M,) int64, which of the U each trained token is
    sampler_logprobs: Tensor  # (M,) float32, the sampler's (0 for supervised sequences)
    sequence_ids: Tensor  # (M,) int64, into the sequences of the whole optimiser step

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
        train_on: which roles are selected, a key of `episode.ROLES_TRAINED`.
        max_tokens: the most tokens of a micro-batch. A single sequence that is longer makes one of its own.
    """
    groups: dict[tuple[int, ...], list[_Branch]] = {}
    for index, episode in enumerate(episodes):
        branch = _branch(index, episode.completion_ids, episode.loss_mask(train_on), episode.logprobs)
        groups.setdefault(tuple(episode.prompt_ids), []).append(branch)
    return _pack(groups.items(), max_tokens)


def pack_sequences(
    groups: Sequence[tuple[Sequence[int], Sequence[tuple[Sequence[int], Sequence[bool]]]]], *, max_tokens: int
) -> list[Batch]:
    """Packs (prompt_ids, [(completion_ids, loss_mask), ...]) of supervised training, as `pack_episodes` does.

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
        singles = [(prompt, [branch]) for branch in branches if branch.completion_ids]
        for part in _first_fit(singles, max_tokens):
            planted.append((prompt, [branch for _, (branch,) in part]))
    if not planted and prompts:
        # Nothing is trained, yet the caller's loop of forward and backward still finds a micro-batch.
        planted = [(min(prompts, key=len), [])]
    return [_build(forest) for forest in _first_fit(planted, max_tokens)]


class _Trie:
    """Nodes in the order in which they came: the row of a micro-batch."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], int] = {}  # (parent's place, token) -> place; -1 is above the roots
        self.positions: list[int] = []

    def add(self, ids: Sequence[int], parent: int = -1) -> list[int]:
        """The places of `ids`, which follow `parent`; those that are not there yet are appended."""
        places = []
        for token in ids:
            place = self.nodes.setdefault((parent, token), len(self.nodes))
            if place == len(self.positions):
                self.positions.append(self.positions[parent] + 1 if parent >= 0 else 0)
            places.append(place)
            parent = place
        return places

    def plant(self, group: _Group) -> tuple[list[int], list[list[int]]]:
        """Places of the prompt, and of each completion without its last token."""
        prompt = self.add(group[0])
        return prompt, [self.add(branch.completion_ids[:-1], prompt[-1]) for branch in group[1]]

    def match(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` are there."""
        place = -1
        for count, token in enumerate(ids):
            if (place, token) not in self.nodes:
                return count
            place = self.nodes[place, token]
        return len(ids)


def _first_fit(groups: list[_Group], max_tokens: int) -> list[list[_Group]]:
    """Distributes groups over rows, the largest first, each into the first with place for what it adds."""

    def size(group: _Group) -> int:
        trie = _Trie()
        trie.plant(group)
        return len(trie.nodes)

    bins: list[tuple[_Trie, list[_Group]]] = []
    sized = [(size(group), group) for group in groups]
    for needed, group in sorted(sized, key=lambda pair: pair[0], reverse=True):  # stable, hence reproducible
        prompt, branches = group
        # All that another group can have in common with it, unless that is a part of the same one.
        common = [*prompt, *(branches[0].completion_ids[:-1] if len(branches) == 1 else ())]
        room = max_tokens - needed
        fitting = (row for row in bins if len(row[0].nodes) - row[0].match(common) <= room)
        trie, members = next(fitting, (_Trie(), []))
        if not members:
            bins.append((trie, members))
        trie.plant(group)
        members.append(group)
    return [members for _, members in bins]


def _build(forest: list[_Group]) -> Batch:
    trie = _Trie()
    trees: list[Tree] = []
    pairs: dict[tuple[int, int], int] = {}  # (place, token to predict there) -> which of the U
    trained: list[tuple[int, float, int]] = []  # pair, log-prob, sequence
    for group in forest:
        prompt, branches = trie.plant(group)
        inner = {place for branch in branches for place in branch[:-1]}
        leaves = {tuple(branch): None for branch in branches if branch and branch[-1] not in inner}
        trees.append(Tree(tuple(prompt), tuple(sorted(leaves, key=len, reverse=True))))
        for branch, places in zip(group[1], branches, strict=True):
            rows = zip(
                [prompt[-1], *places], branch.completion_ids, branch.loss_mask, branch.logprobs, strict=True
            )
            for place, token, counts, logprob in rows:
                if counts:
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
