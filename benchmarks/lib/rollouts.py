"""Workloads of benchmarks/rollout.py, and the engines that run them, behind one signature.

A workload is a list of rows. A row is a prompt, the number of tokens to sample in each of its turns, and the
tokens fed between turns. All engines sample at temperature 1 from the whole distribution, return log-probs if
they can, and stop a row after exactly its number of tokens. These numbers are drawn beforehand ("ragged
stops"), so that every engine samples the same number of tokens in rows of the same lengths.

An engine is a function `run(workload) -> sampled tokens`. `build` imports what it needs, and reports a
package that is not installed.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.model import weights
from grpo.model.decoder import Decoder, pack_weight, packed_product, packed_weights
from grpo.sampler.engine import FEW_ROWS, Feed, Row, Sample, Sampler

# Tokens. The default of 256 is longer than most prompts here, which would then not be shared.
TRANSFORMERS_PAGE = 32


@dataclass(frozen=True)
class Workload:
    """Row i has prompts[i], turns[i] and feeds[i]: one more turn than feeds. Neighbours share prompts."""

    name: str
    prompts: list[tuple[int, ...]]
    turns: list[tuple[int, ...]]
    feeds: list[tuple[tuple[int, ...], ...]]

    @property
    def num_rows(self) -> int:
        return len(self.prompts)

    @property
    def num_sampled(self) -> int:
        return sum(map(sum, self.turns))

    def feed(self, contexts: list[list[int]], turn: int) -> None:
        """Appends to each row's context the tokens fed before the turn."""
        for context, feeds in zip(contexts, self.feeds, strict=True):
            context += feeds[turn - 1] if turn else ()

    @staticmethod
    def make(
        name: str,
        *,
        rows: int,
        prompt: int,
        turns: tuple[tuple[int, int], ...],
        feeds: tuple[int, ...],
        share: int,
        vocab_size: int,
        seed: int = 0,
    ) -> Workload:
        """Random tokens. Turns have lengths uniform in (least, most); `share` rows have the same prompt."""
        rng = random.Random(f"{seed} {name} {rows} {prompt}")

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(vocab_size) for _ in range(count))

        prompts = [tokens(prompt) for _ in range((rows + share - 1) // share)]
        return Workload(
            name,
            [prompts[row // share] for row in range(rows)],
            [tuple(rng.randint(*bounds) for bounds in turns) for _ in range(rows)],
            [tuple(map(tokens, feeds)) for _ in range(rows)],
        )


Engine = Callable[[Workload], int]


@dataclass(frozen=True)
class Setting:
    """The same weights for all engines: in `model`, and as a Hugging Face folder."""

    model: Decoder
    folder: Path
    dtype: torch.dtype
    device: str
    max_rows: int
    stop_check_steps: int = 1


def ours(setting: Setting) -> Engine:
    # A stop token that cannot be sampled: the workload says when a row ends.
    never = setting.model.config.vocab_size
    sampler = Sampler(
        setting.model,
        stop_token_ids=[never],
        max_rows=setting.max_rows,
        stop_check_steps=setting.stop_check_steps,
    )

    def run(workload: Workload) -> int:
        rows = []
        for index in range(workload.num_rows):
            script: list[Sample | Feed] = []
            for turn, limit in enumerate(workload.turns[index]):
                script += [Feed(list(workload.feeds[index][turn - 1]))] if turn else []
                script.append(Sample(limit, key=(0, index, turn)))
            rows.append(Row(workload.prompts[index], script))
        return sum(len(turn.ids) for row in sampler.run(rows) for turn in row.turns)

    return run


def transformers_generate(setting: Setting) -> Engine:
    """`generate` on all rows at once, turn by turn. Finished rows stay in its batch."""
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = _transformers_model(setting, AutoModelForCausalLM)

    class AfterLengths(StoppingCriteria):
        def __init__(self, first: int, limits: Tensor) -> None:
            self.first, self.limits = first, limits

        def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
            return input_ids.shape[1] - self.first >= self.limits

    def run(workload: Workload) -> int:
        contexts = [list(prompt) for prompt in workload.prompts]
        total = 0
        for turn in range(len(workload.turns[0])):
            workload.feed(contexts, turn)
            longest = max(map(len, contexts))
            ids = torch.tensor([[0] * (longest - len(c)) + c for c in contexts])
            mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in contexts])
            limits = torch.tensor([lengths[turn] for lengths in workload.turns])
            out = model.generate(
                input_ids=ids.to(setting.device),
                attention_mask=mask.to(setting.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=int(limits.max()),
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([AfterLengths(longest, limits.to(setting.device))]),
            )
            for index, row in enumerate(out[:, longest:].tolist()):
                contexts[index] += row[: workload.turns[index][turn]]
                total += workload.turns[index][turn]
        return total

    return run


def transformers_continuous(setting: Setting) -> Engine:
    """Its continuous batching. A row's next turn is a new request as soon as the previous turn is done."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = _transformers_model(setting, AutoModelForCausalLM)

    def run(workload: Workload) -> int:
        longest = max(
            len(p) + sum(t) + sum(map(len, f))
            for p, t, f in zip(workload.prompts, workload.turns, workload.feeds, strict=True)
        )
        blocks = workload.num_rows * (longest // TRANSFORMERS_PAGE + 2)
        batching = ContinuousBatchingConfig(
            page_size=TRANSFORMERS_PAGE,
            num_blocks=blocks,
            max_batch_tokens=4096,
            max_requests_per_batch=workload.num_rows,
        )
        generation = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1)
        total, left = 0, workload.num_rows
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching, block=True, timeout=5
        ) as manager:

            def ask(index: int, turn: int, context: list[int]) -> None:
                manager.add_request(
                    context,
                    request_id=f"{index} {turn}",
                    max_new_tokens=workload.turns[index][turn],
                    eos_token_id=-1,
                )

            for index, prompt in enumerate(workload.prompts):
                ask(index, 0, list(prompt))
            while left:
                result = manager.get_result(timeout=1)
                if result is None or not result.is_finished():
                    if result is None and not manager.is_running():
                        raise RuntimeError("its generation thread ended early")
                    continue
                if result.error is not None:
                    raise RuntimeError(str(result.error))
                index, turn = map(int, result.request_id.split())
                total += len(result.generated_tokens)
                if turn + 1 == len(workload.turns[index]):
                    left -= 1
                    continue
                context = [*result.prompt_ids, *result.generated_tokens, *workload.feeds[index][turn]]
                ask(index, turn + 1, context)
        return total

    return run


def _transformers_model(setting: Setting, auto: Any) -> Any:
    return auto.from_pretrained(setting.folder, dtype=setting.dtype).to(setting.device).eval()


def vllm(setting: Setting) -> Engine:
    """vLLM with prefix caching, turn by turn."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(setting.folder),
        dtype=str(setting.dtype).removeprefix("torch."),
        enable_prefix_caching=True,
        max_num_seqs=setting.max_rows,
        max_model_len=min(2048, setting.model.config.max_position_embeddings),
    )

    def run(workload: Workload) -> int:
        contexts = [list(prompt) for prompt in workload.prompts]
        total = 0
        for turn in range(len(workload.turns[0])):
            workload.feed(contexts, turn)
            limits = [lengths[turn] for lengths in workload.turns]
            parameters = [
                SamplingParams(temperature=1.0, max_tokens=n, min_tokens=n, ignore_eos=True, logprobs=0)
                for n in limits
            ]
            prompts = [{"prompt_token_ids": c} for c in contexts]
            for index, out in enumerate(engine.generate(prompts, parameters, use_tqdm=False)):
                contexts[index] += list(out.outputs[0].token_ids)
                total += len(out.outputs[0].token_ids)
        return total

    return run


BUILDERS: dict[str, Callable[[Setting], Engine]] = {
    "ours": ours,
    "generate": transformers_generate,
    "continuous": transformers_continuous,
    "vllm": vllm,
}
ABOUT = {
    "ours": "grpo/sampler/engine.py",
    "generate": "transformers' generate",
    "continuous": "transformers' continuous batching",
    "vllm": "vLLM (on a CPU its CPU build)",
}


def build(
    names: list[str],
    model: Decoder,
    tokenizer: Any,
    dtype: torch.dtype,
    device: str,
    max_rows: int,
    stop_check_steps: int = 1,
) -> tuple[dict[str, Engine], dict[str, str], tempfile.TemporaryDirectory]:
    """The engines that run here, why the others do not, and the folder of their weights, to be removed."""
    folder = tempfile.TemporaryDirectory(prefix="rollout-")
    weights.save(model, tokenizer, folder.name, dtype)
    setting = Setting(model, Path(folder.name), dtype, device, max_rows, stop_check_steps)
    engines, absent = {}, {}
    for name in names:
        try:
            engines[name] = BUILDERS[name](setting)
        except (ImportError, RuntimeError, ValueError) as error:
            absent[name] = " ".join(str(error).split())
    return engines, absent, folder


class LinearLayers:
    """Replays only the matrix products of a run of our sampler: a lower bound on its time.

    `record()` notes the number of tokens of every forward pass. For each pass `replay()` computes the four
    products of every layer, with packed weights like the sampler, and the output embedding's for the rows.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.tokens: list[int] = []
        self.layers = [
            linear
            for layer in model.layers
            for linear in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
        ]

    def record(self, run: Callable[[], Any]) -> Any:
        self.tokens = []
        handle = self.model.register_forward_pre_hook(lambda _, args: self.tokens.append(args[0].shape[1]))
        try:
            return run()
        finally:
            handle.remove()

    @torch.inference_mode()
    def replay(self, max_rows: int) -> None:
        weight = self.model.output_weight
        with packed_weights(self.model):
            self._replay(weight, pack_weight(weight), max_rows)

    def _replay(self, weight: Tensor, head: Tensor | None, max_rows: int) -> None:
        for count in self.tokens:
            inputs = {
                size: torch.ones(1, count, size, dtype=weight.dtype, device=weight.device)
                for size in {linear.in_features for linear in self.layers}
            }
            for linear in self.layers:
                linear(inputs[linear.in_features])
            rows = inputs[weight.shape[1]][0, :max_rows]
            if head is not None and len(rows) < FEW_ROWS:
                packed_product(rows, head)
            else:
                torch.mm(weight, rows.T)
