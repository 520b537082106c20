"""One sampled conversation, as plain lists: what the rollout hands to the learner.

An episode is a prompt, the completion after it, and a role for each completion token. Roles, never token
values, decide which tokens carry gradient; the paper (arXiv 2505.24726) trains the reflection only.

Left out: tensors. packing.py makes them, when all lengths are known.
"""

from __future__ import annotations

import reprlib
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

# train_on -> the roles whose tokens are in the loss. "context", which the program fed in between, never is.
ROLES_TRAINED: dict[str, frozenset[str]] = {
    "reflection": frozenset({"reflection"}),
    "all": frozenset({"reflection", "retry"}),
    "retry": frozenset({"retry"}),
    "attempt": frozenset({"attempt"}),
}


@dataclass
class Episode:
    """A prompt and one sampled completion, with verdicts, reward and, once the learner sets it, advantage.

    `completion_ids`, `roles` and `logprobs` have one entry per completion token. A token that was fed instead
    of sampled has the role "context" and the log-prob 0.0.
    """

    example_id: str
    group_id: int  # episodes of one group share `prompt_ids`, and their rewards are centred together
    generation: int  # which of the group's completions, from 0
    prompt_ids: list[int]
    completion_ids: list[int]
    roles: list[str]  # "reflection" | "context" | "retry" | "attempt"
    logprobs: list[float]  # the sampler's, nats, at the sampling temperature
    finish_reason: str  # of the first sampled turn, reflection or attempt: "stop" | "length"
    reward: float
    advantage: float = 0.0
    retry_finish_reason: str = "stop"
    reasons: list[str] = field(default_factory=list)  # of the verdicts, in order
    scores: list[float] = field(default_factory=list)  # of the verdicts; none if the reasons imply them
    texts: dict[str, str] = field(default_factory=dict)  # decoded turns by role, for people to read

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids must hold at least one token, got none")
        lengths = (len(self.completion_ids), len(self.roles), len(self.logprobs))
        if len(set(lengths)) != 1:
            raise ValueError(f"completion_ids, roles and logprobs must be equally long, got {lengths}")

    def to_json(self) -> dict[str, Any]:
        """All fields, as the run directory stores them: for people and experiments, never for training.

        `roles` has a [role, tokens] pair per turn: [["reflection", 90], ["context", 60], ["retry", 20]].
        Log-probs have 6 significant digits. `scores` is left out if there are none.
        """
        record = {name: value for name, value in vars(self).items() if name != "scores" or value}
        record["roles"] = [[role, len(list(run))] for role, run in groupby(self.roles)]
        record["logprobs"] = [logprob and float(f"{logprob:.6g}") for logprob in self.logprobs]
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Episode:
        """The episode of a stored record, also of one from an older version; other keys are ignored.

        Raises:
            ValueError: its lists do not fit together.
        """
        stored = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        roles = [role for role, tokens in role_runs(record["roles"]) for _ in range(tokens)]
        return cls(**{**stored, "roles": roles})

    def truncated(self, train_on: str) -> bool:
        """Whether a trained turn was cut at its length limit."""
        reasons = {role: self.finish_reason for role in ("reflection", "attempt")}
        reasons["retry"] = self.retry_finish_reason
        return any(reasons[role] == "length" for role in ROLES_TRAINED[train_on])

    def loss_mask(self, train_on: str) -> list[bool]:
        """True for each completion token that carries gradient."""
        if train_on not in ROLES_TRAINED:
            raise ValueError(f"train_on must be one of {', '.join(ROLES_TRAINED)}, got {train_on!r}")
        trained = ROLES_TRAINED[train_on]
        return [role in trained for role in self.roles]


def role_runs(stored: Iterable[Any]) -> list[tuple[str, int]]:
    """(role, number of tokens) of consecutive tokens, from the stored `roles` of an episode.

    Args:
        stored: [role, tokens] pairs as `Episode.to_json` writes them, or one role per token, as before them.
    Raises:
        ValueError: an entry is neither.
    """
    runs = []
    for entry in stored:
        match entry:
            case str(role):
                runs.append((role, 1))
            case [str(role), int(tokens)] if tokens > 0:
                runs.append((role, tokens))
            case _:
                raise ValueError(f"roles must be strings or [role, tokens] pairs, got {reprlib.repr(entry)}")
    return runs


def episode_metrics(episodes: Sequence[Episode], train_on: str) -> dict[str, float]:
    """Rewards and lengths of one step. Lengths count trained tokens; `reward_std` is the mean over groups."""
    groups = defaultdict(list)
    for episode in episodes:
        groups[episode.group_id].append(episode.reward)
    stds = [statistics.stdev(rewards) if len(rewards) > 1 else 0.0 for rewards in groups.values()]
    lengths = [sum(e.loss_mask(train_on)) for e in episodes]
    return {
        "reward": statistics.fmean(e.reward for e in episodes),
        "reward_std": statistics.fmean(stds),
        "frac_reward_zero_std": statistics.fmean(len(set(rewards)) == 1 for rewards in groups.values()),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": statistics.fmean(e.truncated(train_on) for e in episodes),
    }
