"""A whole trainer in miniature: byte tokenizer, random two-layer Llama, toy task, the real parts around them.

The model is random, but its weights are large and the tokens that end a turn are made likely: turns end for
both reasons, answers are right (they hold a digit) and wrong, and every token depends on all before it.
"""

import copy
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from grpo import reference
from grpo.advantage import group_advantage
from grpo.chat import Chat
from grpo.config import Config
from grpo.episode import Episode, episode_metrics
from grpo.learner.learner import Learner
from grpo.logprob import linear_logprob
from grpo.loss import grpo_loss
from grpo.model.decoder import Decoder, ModelConfig
from grpo.rollout import Attempt, attempt_episodes
from grpo.run.build import Parts, build_rollout
from grpo.sampler.engine import Sampler, Turn
from grpo.tasks import Example, Transcript, Verdict

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|begin_of_text|> <|end_of_text|> <|start_header_id|> "
    "<|end_header_id|> <|eot_id|> <|end|> <|user|> <|assistant|> <|system|> <s> </s> [INST] [/INST]"
).split()
STOPS = ("<|im_end|>", "<|endoftext|>")

HF_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
# A learning rate large enough to show; no clipping, so that the gradient buffers hold the plain gradients.
SETTINGS = {
    "task": "tiny:Toy",
    "device": "cpu",
    "dtype": "float32",
    "seed": 3,
    "temperature": 0.8,
    "num_generations": 4,
    "groups_per_step": 3,
    "max_completion_length": 8,
    "max_reflection_length": 10,
    "beta": 0.0,
    "learning_rate": 1e-2,
    "warmup_steps": 0.0,
    "max_steps": 8,
    "max_grad_norm": 1e9,
}


class Toy:
    """An answer is right when it holds a digit."""

    name, system, reflection_instruction = "toy", "Be brief.", "Why was it wrong?"
    format_reasons = frozenset({"empty"})

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        return [Example(f"{split}-{i}", f"Problem {i}?", {"i": i}) for i in range(offset, offset + count)]

    def verify(self, example: Example, text: str) -> Verdict:
        return Verdict("ok" if any(c in "0123456789" for c in text) else "wrong" if text else "empty")

    def leaks(self, example: Example, reflection: str) -> bool:
        return self.verify(example, reflection).ok

    def transcript(self, example: Example, rng: random.Random, attempt: str | None = None) -> Transcript:
        if attempt is None and rng.random() < 0.3:
            return Transcript("It is 7.")
        retry = f"Say {rng.randrange(10)}." if rng.random() < 0.5 else "No idea."
        return Transcript(attempt or f"Hm, {rng.choice('abc')}.", f"Try {rng.choice('xyz')}.", retry)


def byte_tokenizer(
    merges: Sequence[tuple[str, str]] = (), template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the 256 bytes with the given merges, no training."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_special_tokens(tokenizer, template)


def with_special_tokens(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = template
    return fast


def token_id(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    return token


def decoder(vocab_size: int, *, likely: Sequence[int] = (), seed: int = 0, **changes: object) -> Decoder:
    """A random decoder. The tokens `likely` have longer embeddings, so that they win more often."""
    config = {**HF_CONFIG, "vocab_size": vocab_size, **changes}
    model = Decoder(ModelConfig.from_hf(config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    with torch.no_grad():
        model.output_weight[list(likely)] *= 3.0
    return model


def build(
    *,
    model: Decoder | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    stops: Sequence[str] = STOPS,
    likely: Sequence[str] = (),
    task: object = None,
    **settings: object,
) -> Parts:
    """What `grpo.run.build.build` makes, around the tiny model. `settings` are fields of Config."""
    config = Config(**{**SETTINGS, **settings})  # type: ignore[arg-type]
    tokenizer = tokenizer or byte_tokenizer(template=CHATML)
    if model is None:
        frequent = [token_id(tokenizer, text) for text in (*stops, *likely)]
        model = decoder(len(tokenizer), likely=frequent)
    chat = Chat(tokenizer, [token_id(tokenizer, stop) for stop in stops])
    sampler = Sampler(model, stop_token_ids=chat.stop_token_ids, temperature=config.temperature)
    task = task or Toy()
    rollout = build_rollout(config, sampler, task, chat)  # type: ignore[arg-type]
    return Parts(config, "cpu", torch.float32, model, tokenizer, chat, task, sampler, rollout)  # type: ignore[arg-type]


def failures(parts: Parts, count: int) -> list[Attempt]:
    """The first `count` wrong attempts at train examples."""
    attempts = parts.rollout.attempts(parts.task.examples("train", 4 * count), stage="failures")
    return [attempt for attempt in attempts if not attempt.verdict.ok][:count]


def episodes(parts: Parts, pool: Sequence[Attempt] | None = None, step: int = 1) -> list[Episode]:
    """One step's episodes on `pool`, by default on as many failures as a step has groups."""
    config, rollout = parts.config, parts.rollout
    pool = failures(parts, config.groups_per_step) if pool is None else pool
    if config.train_on == "attempt":
        examples = [failure.example for failure in pool]
        attempts = rollout.attempts(examples, stage="rollout", step=step, count=config.num_generations)
        return attempt_episodes(attempts, config.num_generations)
    return rollout.reflect_and_retry(
        pool,
        num_generations=config.num_generations,
        stage="rollout",
        step=step,
        retries=config.retries_per_reflection,
    )


def targets(parts, episodes):
    """What distillation would imitate if every retry of the step were right."""
    right = [replace(episode, reasons=["ok"], retry_finish_reason="stop") for episode in episodes]
    return parts.rollout.right_retries(right, failures(parts, parts.config.groups_per_step))


def learner(parts: Parts, *, reference: Decoder | None = None, **functions: object) -> Learner:
    """A Learner of the parts' model with the PyTorch functions, or with others in their place."""
    chosen = {"linear_logprob": linear_logprob, "grpo_loss": grpo_loss, "group_advantage": group_advantage}
    return Learner(
        parts.model,
        parts.config,
        total_steps=parts.config.max_steps,
        reference=reference,
        kernels=SimpleNamespace(**{**chosen, **functions}),  # type: ignore[arg-type]
    )


def turn(chat: Chat, text: str, finish_reason: str = "stop") -> Turn:
    """A turn as if it had been sampled."""
    ids = chat.encode_turn(text)
    ids = ids if finish_reason == "stop" else ids[:-1]
    return Turn(ids, [-1.0] * len(ids), finish_reason)  # type: ignore[arg-type]


def other_model(parts, dtype=torch.float32):
    """A reference: another random model of the same shape."""
    return decoder(parts.model.config.vocab_size, seed=1).to(dtype)


def update(parts, episodes, *, dtype=torch.float32, functions=None, **settings):
    """One `Learner.step` on copies of model and episodes: metrics, gradients by name, the episodes."""
    parts = replace(
        parts, model=copy.deepcopy(parts.model).to(dtype), config=replace(parts.config, **settings)
    )
    reference = other_model(parts, dtype) if parts.config.beta else None
    subject = learner(parts, reference=reference, **(functions or {}))
    episodes = copy.deepcopy(episodes)
    metrics = subject.step(episodes) | episode_metrics(episodes, parts.config.train_on)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    return metrics, subject.optimizer.gradients, episodes


def token_logprobs(parts, episodes, **settings):
    """The learner's log-probs by completion, seen on their way into the loss."""
    seen = defaultdict(list)

    def spy(logprobs, old, ref, advantages, sequence_ids, **options):
        for sequence, logprob in zip(sequence_ids.tolist(), logprobs.tolist(), strict=True):
            seen[sequence].append(logprob)
        return grpo_loss(logprobs, old, ref, advantages, sequence_ids, **options)

    update(parts, episodes, functions={"grpo_loss": spy}, beta=0.1, **settings)
    return [seen[i] for i in range(len(episodes))]


def padded_logprobs(model, episodes, temperature):
    """Log-probs of all completion tokens by grpo/reference.py: one padded row per episode."""
    prompts, completions = [e.prompt_ids for e in episodes], [e.completion_ids for e in episodes]
    return reference.completion_logprobs(model, prompts, completions, temperature)


def naive(parts, episodes, *, train_on="reflection", beta=0.0, keep=lambda episode: True):
    """Gradients by grpo/reference.py in float64: the dapo loss without any of our machinery."""
    model, temperature = copy.deepcopy(parts.model).double(), parts.config.temperature
    rewards, groups = torch.tensor([e.reward for e in episodes]), torch.tensor([e.group_id for e in episodes])
    advantages = group_advantage(rewards, groups)
    kept = [index for index, episode in enumerate(episodes) if keep(episode)]
    episodes, advantages = [episodes[index] for index in kept], advantages[kept]
    with torch.no_grad():
        ref = padded_logprobs(other_model(parts, torch.float64), episodes, temperature)
    new = padded_logprobs(model, episodes, temperature)
    old, masks = [values.detach() for values in new], [e.loss_mask(train_on) for e in episodes]
    reference.step_loss(new, old, ref, masks, advantages, beta=beta).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(a, b):
    assert_close(a, b, rtol=0, atol=0)
