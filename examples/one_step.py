"""One GRPO step from the pieces: load, sample, reflect and retry, pack, log-probs, advantages, loss, AdamW.

    python examples/one_step.py [--model FOLDER]

train.py is this in a loop, after a warm start. Here, where no retry may be right, short reflections pay.
"""

import argparse

import torch

from grpo.advantage import group_advantage
from grpo.chat import Chat
from grpo.config import Config
from grpo.learner.packing import pack_episodes
from grpo.learner.tree_attention import tree_attend
from grpo.logprob import linear_logprob
from grpo.loss import grpo_loss
from grpo.model import weights
from grpo.rollout import Rollout
from grpo.sampler.engine import Sampler
from grpo.tasks import get_task

parser = argparse.ArgumentParser(description="One GRPO step from the pieces.")
parser.add_argument("--model", default=Config.model_name_or_path, help="folder, Hub id or GGUF file")

# The model, its chat template, a sampler, and a task that gives problems and judges answers.
model, tokenizer = weights.load(parser.parse_args().model)
chat = Chat(tokenizer, weights.stop_token_ids(model, tokenizer))
sampler = Sampler(model, stop_token_ids=chat.stop_token_ids)
limits = {"max_completion_length": 24, "max_reflection_length": 96}  # in tokens
brevity = {"overlong_buffer": 88, "soft_overlong_penalty": 1.0}  # from the 8th token on, up to 1 at the limit
rollout = Rollout(sampler, get_task("countdown"), chat, **limits, **brevity)

# First answers. The wrong ones are reflected on: a group is G reflections on one failure, a retry after each.
attempts = rollout.attempts(rollout.task.examples("train", 2))
failures = [attempt for attempt in attempts if not attempt.verdict.ok]
episodes = rollout.reflect_and_retry(failures, num_generations=4)
print(f"{len(failures)} of {len(attempts)} attempts are wrong; rewards {[e.reward for e in episodes]}")

# The reward of a reflection, relative to the others of its group.
rewards = torch.tensor([episode.reward for episode in episodes])
advantages = group_advantage(rewards, torch.tensor([episode.group_id for episode in episodes]))

# Rows without padding, in which every shared prompt appears once. Only reflections are trained.
batches = pack_episodes(episodes, train_on="reflection", max_tokens=2048)
count = sum(len(batch.sequence_ids) for batch in batches)  # trained tokens of the whole step

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
for batch in batches:
    attend = tree_attend(batch.trees, model.config.windows)
    hidden = model(batch.input_ids, batch.position_ids, attend=attend)[0]
    logprobs, _ = linear_logprob(hidden[batch.select], model.lm_head.weight, batch.ids)
    logprobs = batch.per_token(logprobs)  # a token that two completions share was computed once
    # None: the policy that sampled is the one that is trained; and no reference model, as beta is 0.
    loss, _ = grpo_loss(logprobs, None, None, advantages, batch.sequence_ids, beta=0.0, num_loss_tokens=count)
    loss.backward()
norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print(f"{count} trained tokens in {len(batches)} rows, gradient norm {norm:.3g}")
