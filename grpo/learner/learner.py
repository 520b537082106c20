"""One GRPO update: episodes in, new weights and metrics out.

GRPO (arXiv 2402.03300, equation 3) as "Reflect, Retry, Reward" (arXiv 2505.24726) uses it: rewards are
centred in their group, and the clipped surrogate with the KL penalty is summed over the trained tokens of all
groups. The formulas are in advantage.py, loss.py and logprob.py; this file is the order around them:

    advantages -> micro-batches -> old and reference log-probs -> backward per micro-batch -> clip -> AdamW

The denominators are counted over the whole step before the first backward, so neither the gradient nor a
metric depends on how the step is cut into micro-batches. The functions for log-probs, loss and advantages are
handed in: the PyTorch references or the Triton kernels.

Left out: gradient scaling for float16, more than one device, replay of older episodes. Shapes: B completions
of the step, M trained tokens of a micro-batch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.episode import Episode, episode_metrics
from grpo.learner.optimizer import MasterAdamW, scheduled_learning_rate
from grpo.learner.packing import Batch, pack, pack_sequences
from grpo.learner.tree_attention import tree_attend
from grpo.model.decoder import Decoder

LossFunction = Callable[[int, Batch], tuple[Tensor, dict[str, Tensor]]]
ADVICE = "try a lower learning_rate, dtype float32, or a larger beta"
SUPERVISED_ADVICE = "try a lower warm_start_learning_rate, or dtype float32"


class NonFiniteError(RuntimeError):
    """Loss or gradient is NaN or infinite. The update was not taken: weights and moments are as before."""


class Learner:
    """Owns the optimiser of `model` and turns episodes into updates.

    Args:
        model: the policy; its parameters are changed in place (see optimizer.py for bfloat16).
        config: any object with the fields of `grpo.config.Config` that are read here.
        linear_logprob, grpo_loss, group_advantage: see logprob.py, loss.py, advantage.py.
        total_steps: calls of `step` in the whole run; the schedule ends there.
        reference: the frozen starting policy, on the same device; required when config.beta > 0.
    """

    def __init__(
        self,
        model: Decoder,
        config: Any,
        *,
        linear_logprob: Callable[..., tuple[Tensor, Tensor | None]],
        grpo_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        group_advantage: Callable[..., Tensor],
        total_steps: int,
        reference: Decoder | None = None,
    ) -> None:
        if config.beta > 0 and reference is None:
            raise ValueError(f"reference must be a model when beta > 0, got None with beta={config.beta}")
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self.model, self.config, self.reference = model, config, reference
        self.linear_logprob, self.grpo_loss, self.group_advantage = linear_logprob, grpo_loss, group_advantage
        self.total_steps = total_steps
        self.num_steps = 0  # calls of step() so far: the schedule's clock
        self.num_tokens = 0  # prompt and completion tokens of all episodes so far
        self.optimizer = MasterAdamW(
            model, betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.weight_decay
        )
        self.device = next(iter(self.optimizer.parameters.values())).device

    def learning_rate(self) -> float:
        """Of the next step."""
        return scheduled_learning_rate(
            self.num_steps,
            peak=self.config.learning_rate,
            total_steps=self.total_steps,
            warmup_steps=self.config.warmup_steps,
            schedule=self.config.lr_scheduler_type,
        )

    def step(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """One step (`num_iterations` updates) on whole groups; sets each episode's `advantage`.

        Returns:
            Metrics by TRL's names, means over the step. Those of the loss, `entropy` and `sampling/*` are
            over the tokens that went through the model, and absent when none did.
        Raises:
            NonFiniteError: the update was not taken; with num_iterations > 1 earlier ones of this step may
                have been.
        """
        if not episodes:
            raise ValueError("episodes must hold at least one episode, got none")
        config = self.config
        rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float32)  # (B,)
        group_ids = torch.tensor([e.group_id for e in episodes], dtype=torch.int64)  # (B,)
        advantages = self.group_advantage(
            rewards.to(self.device), group_ids.to(self.device), scale=config.scale_rewards
        )
        for episode, advantage in zip(episodes, advantages.tolist(), strict=True):
            episode.advantage = advantage

        kept, num_loss_tokens = self._with_gradient(episodes)
        learning_rate = self.learning_rate()
        metrics = self._updates(
            kept, num_loss_tokens=num_loss_tokens, num_sequences=len(episodes), learning_rate=learning_rate
        )
        self.num_steps += 1
        self.num_tokens += sum(len(e.prompt_ids) + len(e.completion_ids) for e in episodes)
        return {
            **metrics,
            **episode_metrics(episodes, config.train_on),
            "learning_rate": learning_rate,
            "num_tokens": float(self.num_tokens),
        }

    def supervised_step(self, sequences: Sequence[Any], learning_rate: float) -> dict[str, float]:
        """One update on the mean negative log-likelihood of the tokens marked in the loss masks (warm start).

        Args:
            sequences: (prompt_ids, [(completion_ids, loss_mask), ...]) each, as for `batch.pack_sequences`.
        Returns:
            loss (nats per token), grad_norm, learning_rate, num_loss_tokens.
        """
        count = sum(sum(mask) for _, branches in sequences for _, mask in branches)
        if count == 0:
            raise ValueError("sequences must hold at least one token with loss_mask True, got none")

        def loss_function(index: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, _ = self._logprobs(self.model, batch, temperature=1.0)
            return -logprobs.sum() / count, {}

        packed = pack_sequences(list(sequences), max_tokens=self.config.max_tokens_per_micro_batch)
        batches = [batch.to(self.device) for batch in packed]
        where, advice = f"supervised step {self.optimizer.num_updates + 1}", SUPERVISED_ADVICE
        metrics = self._update(batches, loss_function, learning_rate, where=where, advice=advice)
        return {**metrics, "learning_rate": learning_rate, "num_loss_tokens": float(count)}

    def check_weights(self) -> None:
        """Raises NonFiniteError when an update has made NaN or infinite weights, which must not be saved."""
        if (name := self.optimizer.first_non_finite_weight()) is not None:
            raise NonFiniteError(
                f"the last update made weights that are NaN or infinite, first of them {name}; they were not "
                f"saved: {ADVICE}"
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(tensors, counters) that continue the run exactly. The tensors are live: write them at once."""
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

    def _with_gradient(self, episodes: Sequence[Episode]) -> tuple[list[Episode], int]:
        """The episodes that can move the weights, and the loss tokens of *all* of them: the denominator.

        Without a KL penalty an advantage of exactly 0 makes every term and gradient of the completion exactly
        0, so the model need not see it. Its tokens still count, or a step with few signals would weigh more.
        """
        kept, num_loss_tokens = [], 0
        for episode in episodes:
            if self.config.mask_truncated_completions and episode.truncated(self.config.train_on):
                continue
            length = sum(episode.loss_mask(self.config.train_on))
            num_loss_tokens += length
            if length and (self.config.beta > 0 or episode.advantage != 0):
                kept.append(episode)
        return kept, num_loss_tokens

    def _updates(
        self, episodes: list[Episode], *, num_loss_tokens: int, num_sequences: int, learning_rate: float
    ) -> dict[str, float]:
        """`num_iterations` updates on the same episodes; the metrics are means over the updates."""
        config = self.config
        advantages = torch.tensor([e.advantage for e in episodes], dtype=torch.float32, device=self.device)
        packed = pack(episodes, train_on=config.train_on, max_tokens=config.max_tokens_per_micro_batch)
        batches = [batch.to(self.device) for batch in packed]
        num_trained = max(1, sum(len(batch.sequence_ids) for batch in batches))
        # With a single update the policy is still the one that sampled: old = logprobs.detach(), by None.
        old = [self._frozen_logprobs(self.model, b) for b in batches] if config.num_iterations > 1 else None
        reference = self.reference if config.beta > 0 else None
        ref = [self._frozen_logprobs(reference, b) for b in batches] if reference is not None else None
        results: list[dict[str, float]] = []

        def loss_function(index: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            first = not results  # later updates have moved away from the policy that sampled
            logprobs, entropy = self._logprobs(
                self.model, batch, temperature=config.temperature, entropy=first
            )
            loss, metrics = self.grpo_loss(
                logprobs,
                old[index] if old is not None else None,
                ref[index] if ref is not None else None,
                advantages,
                batch.sequence_ids,
                num_loss_tokens=num_loss_tokens,
                num_sequences=num_sequences,
                max_completion_length=trained_token_limit(config),
                **loss_options(config),
            )
            if first:
                metrics = {**metrics, **self._sampling_metrics(batch, logprobs, entropy, num_trained)}
            return loss, metrics

        for _ in range(config.num_iterations):
            where = f"step {self.num_steps + 1}"
            results.append(self._update(batches, loss_function, learning_rate, where=where, advice=ADVICE))
        keys = {key for result in results for key in result}
        return {key: statistics.fmean(r[key] for r in results if key in r) for key in sorted(keys)}

    def _update(
        self,
        batches: list[Batch],
        loss_function: LossFunction,
        learning_rate: float,
        *,
        where: str,
        advice: str,
    ) -> dict[str, float]:
        """Backward over the micro-batches, clip, one AdamW step. Metrics add up, except `.../max`.

        `where` and `advice` are for the error when a loss or gradient is not finite.
        """
        self.optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        losses, norms = [], []
        for index, batch in enumerate(batches):
            loss, metrics = loss_function(index, batch)
            with self.optimizer.accumulation():
                loss.backward()
            losses.append(loss.detach())
            norms.append(self.optimizer.grad_norm())  # a cheap pass that tells which micro-batch broke
            for key, value in metrics.items():
                combine = torch.maximum if key.endswith("/max") else torch.add
                totals[key] = combine(totals[key], value.detach()) if key in totals else value.detach()
        loss_values, norm_values = [x.item() for x in losses], [x.item() for x in norms]
        if (problem := self._non_finite(loss_values, norm_values)) is not None:
            raise NonFiniteError(f"{where}, {problem}. The update was not taken; {advice}")
        grad_norm = norm_values[-1] if norm_values else 0.0
        limit = self.config.max_grad_norm
        clipped = grad_norm > limit
        # Taken also when no episode had a signal: the moments decay as they do in any other step.
        self.optimizer.step(learning_rate, scale=limit / (grad_norm + 1e-6) if clipped else 1.0)
        return {"loss": sum(loss_values), "grad_norm": grad_norm} | {k: v.item() for k, v in totals.items()}

    def _non_finite(self, losses: list[float], norms: list[float]) -> str | None:
        """Which micro-batch broke, and what of it; None when all is finite."""
        for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if math.isfinite(loss) and math.isfinite(norm):
                continue
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
            parameter = self.optimizer.first_non_finite()
            where = f"; first parameter with a non-finite gradient: {parameter}" if parameter else ""
            return f"micro-batch {index + 1} of {len(losses)}: {what}{where}"
        return None

    def _logprobs(
        self, model: Decoder, batch: Batch, *, temperature: float, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(M,) log-probs of the trained tokens and, on demand, (M,) entropies."""
        logprobs, entropies = model.logprobs(
            batch.input_ids,
            batch.position_ids,
            batch.select,
            batch.ids,
            linear_logprob=self.linear_logprob,
            attend=tree_attend(batch.trees, model.config.windows),
            temperature=temperature,
            entropy=entropy,
            gradient_checkpointing=self.config.gradient_checkpointing and torch.is_grad_enabled(),
        )
        return batch.per_token(logprobs), None if entropies is None else batch.per_token(entropies)

    @torch.no_grad()
    def _frozen_logprobs(self, model: Decoder, batch: Batch) -> Tensor:
        return self._logprobs(model, batch, temperature=self.config.temperature)[0]

    @staticmethod
    @torch.no_grad()
    def _sampling_metrics(
        batch: Batch, logprobs: Tensor, entropy: Tensor | None, num_trained: int
    ) -> dict[str, Tensor]:
        """How far the sampler's log-probs are from the learner's (nats), and the mean entropy."""
        difference = (batch.old_logprobs - logprobs).abs()
        name = "sampling/sampling_logp_difference"
        metrics = {f"{name}/mean": difference.sum() / num_trained, f"{name}/max": difference.max()}
        if entropy is not None:
            metrics["entropy"] = entropy.sum() / num_trained
        return metrics


def loss_options(config: Any) -> dict[str, Any]:
    """The configuration fields that are keywords of `grpo_loss` under the same name."""
    names = ("epsilon", "epsilon_high", "delta", "beta", "loss_type", "importance_sampling_level")
    return {name: getattr(config, name) for name in (*names, "use_bias_correction_kl")}


def trained_token_limit(config: Any) -> int:
    """Longest number of trained tokens a completion can have: dr_grpo's constant denominator."""
    reflection, answer = config.max_reflection_length, config.max_completion_length
    return {"reflection": reflection, "all": reflection + answer}.get(config.train_on, answer)
