"""The fused kernels in someone else's training loop: a transformers model, compared with plain PyTorch.

    python examples/kernels_in_your_loop.py [--model FOLDER]

grpo_kernels needs the final hidden states and the output embedding, never the (tokens, vocabulary) logits.
On CUDA and ROCm it runs Triton kernels, elsewhere the PyTorch references: same names, same results.
"""

import argparse
import tempfile

import grpo_kernels
import torch
from transformers import AutoModelForCausalLM

from grpo.config import Config
from grpo.model import weights

parser = argparse.ArgumentParser(description="The fused kernels in a transformers loop.")
parser.add_argument("--model", default=Config.model_name_or_path, help="folder, Hub id or GGUF file")
device = "cuda" if torch.cuda.is_available() else "cpu"

# Any transformers model. Through a folder, because the default model is a GGUF file.
with tempfile.TemporaryDirectory() as folder:
    weights.save(*weights.load(parser.parse_args().model), folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)

# Four completions of two prompts: rows of P prompt and C completion tokens, and a reward for each row.
P, C, vocabulary = 5, 7, model.config.vocab_size
prompts = torch.randint(vocabulary, (2, P)).repeat_interleave(2, 0)
input_ids = torch.cat([prompts, torch.randint(vocabulary, (4, C))], 1).to(device)  # (4, P + C)
rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
group_ids = torch.tensor([0, 0, 1, 1], device=device)
sequence_ids = torch.arange(4, device=device).repeat_interleave(C)  # the row of each completion token

# With the kernels: hidden states in, loss out. The hidden state at t - 1 predicts token t. On-policy the loss
# is 0, because a group's advantages add up to 0; its gradient is not.
hidden = model.model(input_ids).last_hidden_state[:, P - 1 : -1].flatten(0, 1)  # (4 C, H)
ids = input_ids[:, P:].flatten()
loss, metrics = grpo_kernels.fused_grpo(
    hidden, model.lm_head.weight, ids, rewards, group_ids, sequence_ids, beta=0.0
)
loss.backward()
fused = model.get_input_embeddings().weight.grad.clone()

# The same in plain PyTorch, with all logits.
model.zero_grad()
logprobs = model(input_ids).logits[:, P - 1 : -1].log_softmax(-1).gather(-1, ids.view(4, C, 1))[..., 0]
centred = (rewards.view(2, 2) - rewards.view(2, 2).mean(1, keepdim=True)).flatten()
advantages = centred / (rewards.view(2, 2).std(1).repeat_interleave(2) + 1e-4)
ratio = (logprobs - logprobs.detach()).exp()  # 1, with the gradient of the log-prob
plain_loss = -(ratio * advantages[:, None]).sum() / logprobs.numel()
plain_loss.backward()
plain = model.get_input_embeddings().weight.grad

print(f"{grpo_kernels.backend(device).NAME}: loss {loss:.6f}, plain {plain_loss:.6f}")
print(f"largest difference of a gradient: {(fused - plain).abs().max():.2g}, of {plain.abs().max():.2g}")
