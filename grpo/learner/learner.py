"""One GRPO update: episodes in, new weights and metrics out. `Learner.step` is the formula in order.

GRPO (arXiv 2402.03300, equation 3) as "Reflect, Retry, Reward" (arXiv 2505.24726) uses it: rewards are
centred in their group, and the clipped surrogate with the KL penalty is summed over the trained tokens of all
groups. The formulas are in advantage.py, loss.py and logprob.py; grpo/reference.py is the same step on padded
rows, in plain PyTorch.

    advantages -> packing -> old and reference log-probs
               -> for each micro-batch: log-probs, loss, backward -> clip, AdamW

The denominators are counted over the whole step before the first backward, so neither the gradient nor a
metric depends on how the step is cut into micro-batches, or on how many ranks share it. With several ranks,
each has all episodes, and computes the gradients of its share of the groups; then gradients and metrics are
summed (sharded.py).

Left out: gradient scaling for float16, replay of older episodes.

B completions of the step. In a micro-batch: T tokens, H hidden size, M trained tokens, U pairs of a place and
the token to predict there (packing.py).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo import distributed
from grpo.advantage import group_advantage
from grpo.episode import ROLES_TRAINED, Episode
from grpo.learner import sharded
from grpo.learner.optimizer import scheduled_learning_rate
from grpo.learner.packing import Batch, pack_episodes, pack_sequences
from grpo.learner.tree_attention import tree_attend
from grpo.logprob import linear_logprob
from grpo.loss import distill_loss, grpo_loss
from grpo.model.attention import Attend
from grpo.model.decoder import Decoder
from grpo.model.lora import switched_off

ADVICE = "try a lower learning_rate, dtype float32, or a larger beta"
SUPERVISED_ADVICE = "try a lower warm_start_learning_rate, or dtype float32"


class Kernels(Protocol):
    """Replacements for the mathematics: any object with these functions, such as a module of grpo_kernels."""

    @staticmethod
    def group_advantage(rewards: Tensor, group_ids: Tensor, **options: Any) -> Tensor:
        """As grpo.advantage.group_advantage."""

    @staticmethod
    def linear_logprob(
        hidden: Tensor, weight: Tensor, ids: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As grpo.logprob.linear_logprob."""

    @staticmethod
    def grpo_loss(
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        advantages: Tensor,
        sequence_ids: Tensor,
        **options: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As grpo.loss.grpo_loss."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight is NaN or infinite; the message says which, and what was done."""


class Learner:
    """Owns the optimiser of `model` and turns episodes into updates.

    Args:
        model: the policy; its parameters are changed in place (see optimizer.py for bfloat16).
        config: any object with the fields of `grpo.config.Config` that are read here.
        total_steps: calls of `step` in the whole run; the schedule ends there.
        reference: the frozen starting policy, on the same device; required when config.beta > 0. It may be
            `model` itself, if it has an adapter (LoRA), which is then switched off for the reference.
        kernels: replacements for the three functions below; None: plain PyTorch.
    Attributes:
        num_steps: calls of `step` so far, the clock of the learning-rate schedule.
        num_tokens: prompt and completion tokens of all episodes so far.
    """

    # The mathematics. Attributes, so that `kernels` can replace them.
    group_advantage = staticmethod(group_advantage)
    linear_logprob = staticmethod(linear_logprob)
    grpo_loss = staticmethod(grpo_loss)

    def __init__(
        self,
        model: Decoder,
        config: Any,
        *,
        total_steps: int,
        reference: Decoder | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        if config.beta > 0 and reference is None:
            raise ValueError(f"reference must be a model when beta > 0, got None with beta={config.beta}")
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self.model, self.config, self.reference = model, config, reference
        if kernels is not None:
            self.group_advantage = kernels.group_advantage
            self.linear_logprob, self.grpo_loss = kernels.linear_logprob, kernels.grpo_loss
        self.total_steps = total_steps
        self.num_steps = self.num_tokens = 0
        self.optimizer = sharded.adamw(
            model, betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.weight_decay
        )
        self.device = next(iter(self.optimizer.parameters.values())).device

    @property
    def between_steps(self) -> bool:
        """Whether weights and moments are those at the end of a step, where a run can continue."""
        return self.optimizer.num_updates == self.num_steps * self.config.num_iterations

    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return scheduled_learning_rate(
            self.num_steps,
            peak=self.config.learning_rate,
            total_steps=self.total_steps,
            warmup_steps=self.config.warmup_steps,
            schedule=self.config.lr_scheduler_type,
        )

    def step(self, episodes: Sequence[Episode], targets: Sequence[Any] = ()) -> dict[str, float]:
        """One step (`num_iterations` updates) on whole groups; sets each episode's `advantage`.

        Args:
            targets: supervised sequences, as for `supervised_step`, whose cross-entropy is added to the loss
                with the weight `distill_retries` (`Rollout.right_retries`). It has denominators of its own.
        Returns:
            Metrics of the update under TRL's names, each a mean over the step. The metrics of the loss,
            `entropy` and `sampling/*` cover the tokens that went through the model; they are absent if none
            did. `episode_metrics` (grpo/episode.py) has the rewards and lengths. With targets also
            `distill/loss`, in nats and without its weight.
        Raises:
            ValueError: an episode is longer than the model's RoPE allows (`Rope.length_limit`).
            NonFiniteError: the update was not taken. With num_iterations > 1, earlier updates of this step
                may have been.
        """
        if not episodes:
            raise ValueError("episodes must hold at least one episode, got none")
        config, device = self.config, self.device

        # Advantages: rewards, centred in their group.
        rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float32, device=device)  # (B,)
        group_ids = torch.tensor([e.group_id for e in episodes], dtype=torch.int64, device=device)  # (B,)
        all_advantages = self.group_advantage(rewards, group_ids, scale=config.scale_rewards)  # (B,)
        for episode, advantage in zip(episodes, all_advantages.tolist(), strict=True):
            episode.advantage = advantage

        # Packing: only the completions that can move the weights. The denominators count all completions.
        kept, num_loss_tokens = with_gradient(episodes, config)
        trained = ROLES_TRAINED[config.train_on]
        num_trained = Counter(role for e in kept for role in e.roles if role in trained)
        kept = dealt(kept)  # this rank's
        packed = pack_episodes(kept, train_on=config.train_on, max_tokens=config.max_tokens_per_micro_batch)
        idle = self._idle_passes(len(packed), episodes[0].prompt_ids[0])
        batches = [batch.to(device) for batch in (*packed, *idle)]
        attends = [self._attend(batch) for batch in batches]
        advantages = torch.tensor([e.advantage for e in kept], dtype=torch.float32, device=device)
        roles = [trained_roles(batch, kept, config.train_on) for batch in packed]
        distilled, distilled_idle = self._supervised_batches(targets) if targets else ([], [])

        # Old log-probs: with a single update, the policy is still the one that sampled, which None means.
        old: list[Tensor | None] = [None] * len(batches)
        if config.num_iterations > 1:
            with self._same_end():
                old = [self._frozen(self.model, *pair) for pair in zip(batches, attends, strict=True)]
        ref: list[Tensor | None] = [None] * len(batches)
        if config.beta > 0 and self.reference is not None:
            # With LoRA the reference is the policy's model.
            with self._same_end(), switched_off(self.reference):
                ref = [self._frozen(self.reference, *pair) for pair in zip(batches, attends, strict=True)]
            sharded.release(self.reference)

        learning_rate = self.learning_rate()
        updates: list[dict[str, float]] = []
        for iteration in range(config.num_iterations):
            self.optimizer.zero_grad()
            backwards: list[tuple[Tensor, Tensor]] = []
            totals: dict[str, Tensor] = {}
            # Without the idle passes, which come last.
            rows = zip(batches, attends, roles, old, ref, strict=False)
            with self._same_end():
                for batch, attend, batch_roles, old_logprobs, ref_logprobs in rows:
                    first = iteration == 0  # after one update, the policy is no longer the one that sampled
                    logprobs, entropy = self._logprobs(
                        self.model, batch, attend, temperature=config.temperature, entropy=first
                    )
                    loss, metrics = self.grpo_loss(
                        logprobs,
                        old_logprobs,
                        ref_logprobs,
                        advantages,
                        batch.sequence_ids,
                        num_loss_tokens=num_loss_tokens,
                        num_sequences=len(episodes),
                        max_completion_length=trained_token_limit(config),
                        **loss_options(config),
                    )
                    backwards.append(self._backward(loss))
                    if first:
                        metrics |= sampling_metrics(batch, logprobs, entropy, batch_roles, num_trained)
                    add_up(totals, metrics)
                for batch in distilled:
                    loss = self._distill_loss(batch, targets)
                    backwards.append(self._backward(config.distill_retries * loss))
                    add_up(totals, {"distill/loss": loss})
            self._run_idle([*batches[len(packed) :], *distilled_idle])
            update = self.apply_gradients(
                backwards, learning_rate, where=f"step {self.num_steps + 1}", advice=ADVICE
            )
            updates.append(update | over_ranks({name: value.item() for name, value in totals.items()}))

        self.num_steps += 1
        self.num_tokens += sum(len(e.prompt_ids) + len(e.completion_ids) for e in episodes)
        names = sorted({name for update in updates for name in update})
        return {
            **{name: statistics.fmean(u[name] for u in updates if name in u) for name in names},
            "learning_rate": learning_rate,
            "num_tokens": float(self.num_tokens),
        }

    def supervised_step(self, sequences: Sequence[Any], learning_rate: float) -> dict[str, float]:
        """One update on the mean negative log-likelihood of the tokens marked in the loss masks (warm start).

        Args:
            sequences: (prompt_ids, [(completion_ids, loss_mask), ...]) each, as for `packing.pack_sequences`.
        Returns:
            loss (nats per token), grad_norm, learning_rate, num_loss_tokens.
        Raises:
            ValueError: no token is marked, or a sequence is longer than the model's RoPE allows.
            NonFiniteError: the update was not taken.
        """
        count, _ = supervised_counts(sequences)
        if count == 0:
            raise ValueError("sequences must hold at least one token with loss_mask True, got none")
        self.optimizer.zero_grad()
        backwards = []
        packed, idle = self._supervised_batches(sequences)
        with self._same_end():
            for batch in packed:
                logprobs, _ = self._logprobs(self.model, batch, self._attend(batch), temperature=1.0)
                backwards.append(self._backward(-logprobs.sum() / count))
        self._run_idle(idle)
        where = f"supervised step {self.optimizer.num_updates + 1}"
        update = self.apply_gradients(backwards, learning_rate, where=where, advice=SUPERVISED_ADVICE)
        return {**update, "learning_rate": learning_rate, "num_loss_tokens": float(count)}

    def apply_gradients(
        self, backwards: Sequence[tuple[Tensor, Tensor]], learning_rate: float, *, where: str, advice: str
    ) -> dict[str, float]:
        """Clips the accumulated gradients and takes one AdamW step.

        Args:
            backwards: for each micro-batch, its loss and the gradient norm after its backward.
            where, advice: for the error message: the step, and what to try.
        Returns:
            loss (the sum over micro-batches and ranks) and grad_norm (of the sum, before clipping).
        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite, on any rank; the update was not taken.
        """
        losses, norms = [loss.item() for loss, _ in backwards], [norm.item() for _, norm in backwards]
        grad_norm = norms[-1] if norms else 0.0
        problem = self._non_finite(losses, norms)
        if distributed.size() > 1:
            gathered = distributed.gather([problem, losses])
            # A loss explains more than gradients, which with FSDP have the NaN of every rank.
            found = [
                (all(map(math.isfinite, its)), f"rank {rank}, {text}")
                for rank, (text, its) in enumerate(gathered)
                if text is not None
            ]
            problem = min(found)[1] if found else None
            if problem is None and not math.isfinite(grad_norm := self.optimizer.reduce().item()):
                problem = f"the norm of the gradients' sum over all ranks is {grad_norm}"
            losses = [loss for _, its in gathered for loss in its]
        if problem is not None:
            with distributed.agreement():  # all ranks know of it
                raise NonFiniteError(f"{where}, {problem}. The update was not taken; {advice}")
        limit = self.config.max_grad_norm
        # The step is taken even if no episode had a signal: the moments decay as in any other step.
        self.optimizer.step(learning_rate, scale=limit / (grad_norm + 1e-6) if grad_norm > limit else 1.0)
        return {"loss": sum(losses), "grad_norm": grad_norm}

    def check_weights(self, model: Decoder) -> None:
        """Raises NonFiniteError if an update has made NaN or infinite weights, which must not be saved.

        Args:
            model: has the weights (`write_weights`).
        """
        if (name := model.first_non_finite_weight()) is not None:
            raise NonFiniteError(
                f"the last update made NaN or infinite weights, the first of them in {name}. They were not "
                f"saved; {ADVICE}"
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(tensors, counters) to continue the run exactly. The tensors are live: write them before a step."""
        counters = {
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "num_updates": self.optimizer.num_updates,
        }
        return self.optimizer.state(), counters

    def load_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Restores `state()` and the model's weights. ValueError: a tensor is missing or does not fit."""
        self.optimizer.load_state(tensors, counters["num_updates"])
        self.num_steps, self.num_tokens = counters["num_steps"], counters["num_tokens"]

    def write_weights(self, model: Decoder) -> None:
        """Copies the weights into `model`, unless it is the learner's own."""
        if model is not self.model:
            sharded.copy_weights(self.model, into=model)

    def _same_end(self) -> AbstractContextManager[None]:
        """For passes of this rank's batches: if one fails, all ranks raise, before the update.

        With FSDP passes exchange weights, so the ranks cannot agree around them.
        """
        return nullcontext() if self.optimizer.equal_micro_batches else distributed.agreement()

    def _idle_passes(self, count: int, token: int) -> list[Batch]:
        """What this rank runs besides its `count` micro-batches, if all ranks must run equally many."""
        if not self.optimizer.equal_micro_batches:
            return []
        missing = max(distributed.gather(count)) - count
        (batch,) = pack_sequences([([token], [([token], [True])])], max_tokens=1)
        return [batch.to(self.device)] * missing

    def _run_idle(self, batches: Sequence[Batch]) -> None:
        """Passes with a loss of 0: the exchanges of a pass need all ranks."""
        for batch in batches:
            logprobs, _ = self._logprobs(self.model, batch, self._attend(batch), temperature=1.0)
            self._backward(0.0 * logprobs.sum())

    def _supervised_batches(self, sequences: Sequence[Any]) -> tuple[list[Batch], list[Batch]]:
        """This rank's micro-batches of supervised sequences, and its idle ones."""
        lengths = [sequence_length(*sequence) for sequence in sequences]
        mine = [sequences[index] for index in distributed.hand(lengths)]
        packed = pack_sequences(mine, max_tokens=self.config.max_tokens_per_micro_batch)
        idle = self._idle_passes(len(packed), sequences[0][0][0])
        return [batch.to(self.device) for batch in packed], idle

    def _distill_loss(self, batch: Batch, targets: Sequence[Any]) -> Tensor:
        """() of a micro-batch of `targets`, at the temperature at which the policy answers in training."""
        config, (num_tokens, num_sequences) = self.config, supervised_counts(targets)
        logprobs, _ = self._logprobs(self.model, batch, self._attend(batch), temperature=config.temperature)
        return distill_loss(
            logprobs,
            batch.sequence_ids,
            loss_type=config.loss_type,
            num_loss_tokens=num_tokens,
            num_sequences=num_sequences,
            max_completion_length=config.max_completion_length,
        )

    def _attend(self, batch: Batch) -> Attend:
        varlen = self.config.attn_implementation == "varlen"
        return tree_attend(batch.trees, self.model.config.windows, varlen=varlen)

    @distributed.exchange()  # with FSDP, ranks gather the weights
    def _logprobs(
        self, model: Decoder, batch: Batch, attend: Attend, *, temperature: float, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(M,) log-probs of the trained tokens and, with `entropy`, (M,) entropies, in nats."""
        hidden = model(
            batch.input_ids,
            batch.position_ids,
            attend=attend,
            gradient_checkpointing=self.config.gradient_checkpointing and torch.is_grad_enabled(),
        )  # (1, T, H)
        # Only the places that predict a trained token are multiplied with the output embedding.
        logprobs, entropies = self.linear_logprob(
            hidden[0][batch.select], model.output_weight, batch.ids, temperature=temperature, entropy=entropy
        )  # (U,)
        return batch.per_token(logprobs), None if entropies is None else batch.per_token(entropies)

    @torch.no_grad()
    def _frozen(self, model: Decoder, batch: Batch, attend: Attend) -> Tensor:
        """(M,) log-probs under the old policy or the reference."""
        return self._logprobs(model, batch, attend, temperature=self.config.temperature)[0]

    def _backward(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Accumulates a micro-batch's gradients. Returns its loss and the norm of the gradients so far."""
        with self.optimizer.accumulation():
            loss.backward()
        return loss.detach(), self.optimizer.grad_norm()

    def _non_finite(self, losses: list[float], norms: list[float]) -> str | None:
        """Describes the first micro-batch with a non-finite loss or gradient; None if all are finite."""
        for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if math.isfinite(loss) and math.isfinite(norm):
                continue
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
            parameter = self.optimizer.first_non_finite()
            where = f"; first parameter with a non-finite gradient: {parameter}" if parameter else ""
            return f"micro-batch {index + 1} of {len(losses)}: {what}{where}"
        return None


def with_gradient(episodes: Sequence[Episode], config: Any) -> tuple[list[Episode], int]:
    """The episodes that can move the weights, and the number of loss tokens of *all* episodes.

    Without a KL penalty, an advantage of exactly 0 makes every term and gradient of the completion exactly 0,
    so the model need not see it. Its tokens still count in the denominator; otherwise a step with few signals
    would weigh more. With `mask_truncated_completions`, truncated episodes count nowhere.
    """
    kept, num_loss_tokens = [], 0
    for episode in episodes:
        if config.mask_truncated_completions and episode.truncated(config.train_on):
            continue
        length = sum(episode.loss_mask(config.train_on))
        num_loss_tokens += length
        if length and (config.beta > 0 or episode.advantage != 0):
            kept.append(episode)
    return kept, num_loss_tokens


def dealt(episodes: Sequence[Episode]) -> list[Episode]:
    """This rank's episodes, in their order: whole groups, because a group shares its prompt."""
    costs: dict[int, int] = {}
    for e in episodes:
        costs.setdefault(e.group_id, len(e.prompt_ids))
        costs[e.group_id] += len(e.completion_ids)
    groups = list(costs)
    mine = {groups[index] for index in distributed.hand(list(costs.values()))}
    return [episode for episode in episodes if episode.group_id in mine]


def sequence_length(prompt: Sequence[int], completions: Sequence[tuple[Sequence[int], Any]]) -> int:
    """Tokens of a supervised sequence."""
    return len(prompt) + sum(len(ids) for ids, _ in completions)


def supervised_counts(sequences: Sequence[Any]) -> tuple[int, int]:
    """Trained tokens and completions of supervised sequences: the denominators of their losses."""
    masks = [mask for _, completions in sequences for _, mask in completions]
    return sum(map(sum, masks)), len(masks)


def over_ranks(totals: Mapping[str, float]) -> dict[str, float]:
    """The metrics of all ranks together: sums, and for `.../max` the largest."""
    if distributed.size() == 1:
        return dict(totals)
    gathered = distributed.gather(dict(totals))
    names = dict.fromkeys(chain.from_iterable(gathered))
    return {
        name: (max if name.endswith("/max") else sum)(its[name] for its in gathered if name in its)
        for name in names
    }


def trained_roles(batch: Batch, episodes: Sequence[Episode], train_on: str) -> list[str]:
    """The role of each of the M trained tokens: those of a sequence follow each other, in their order."""
    sequences = dict.fromkeys(batch.sequence_ids.tolist())
    return [role for i in sequences for role in episodes[i].roles if role in ROLES_TRAINED[train_on]]


@torch.no_grad()
def sampling_metrics(
    batch: Batch, logprobs: Tensor, entropy: Tensor | None, roles: Sequence[str], num_trained: Counter[str]
) -> dict[str, Tensor]:
    """How far the sampler's log-probs are from the learner's (nats), and the mean entropy.

    The difference is given for all trained tokens and, if the step trains several roles, for each of them.

    Args:
        roles: of the M trained tokens (`trained_roles`).
        num_trained: trained tokens of the whole step, by role.
    """
    difference = (batch.sampler_logprobs - logprobs).abs()
    name, total = "sampling/sampling_logp_difference", max(1, num_trained.total())
    metrics = {f"{name}/mean": difference.sum() / total, f"{name}/max": difference.max()}
    for role, count in num_trained.items() if len(num_trained) > 1 else ():
        in_role = torch.tensor([r == role for r in roles]).to(difference.device)
        there = torch.where(in_role, difference, 0.0)
        metrics |= {f"{name}/{role}/mean": there.sum() / count, f"{name}/{role}/max": there.max()}
    if entropy is not None:
        metrics["entropy"] = entropy.sum() / total
    return metrics


def add_up(totals: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
    """Adds a micro-batch's metrics to the step's; a `.../max` metric keeps the larger value."""
    for name, value in metrics.items():
        combine = torch.maximum if name.endswith("/max") else torch.add
        totals[name] = combine(totals[name], value.detach()) if name in totals else value.detach()


def loss_options(config: Any) -> dict[str, Any]:
    """The configuration fields that are keywords of `grpo_loss` under the same name."""
    names = ("epsilon", "epsilon_high", "delta", "beta", "loss_type", "importance_sampling_level")
    return {name: getattr(config, name) for name in (*names, "use_bias_correction_kl")}


def trained_token_limit(config: Any) -> int:
    """The most trained tokens that a completion can have: dr_grpo's constant denominator."""
    reflection, answer = config.max_reflection_length, config.max_completion_length
    return {"reflection": reflection, "all": reflection + answer}.get(config.train_on, answer)
