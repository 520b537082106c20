"""The same RL in TRL, as far as TRL can express it: GRPO on reflections, rewarded by the verdict on a retry.

benchmarks/learning.py starts it in TRL's environment, where this project need not be installed:

    cd benchmarks; python -m lib.learning_trl JOB.json

The job contains the settings and, for each step, the conversations to reflect on, and names the weights. TRL
samples the reflections and makes the updates. A reward function samples a retry after each reflection with
transformers' `generate`, and our verifier judges it. The cost of a reflection's length is TRL's own reward
function. The results are `checkpoint-N` folders and seconds.json: the seconds of each step without saving.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.measure import hide_benchmarks

SHARED = (  # settings with the same name and meaning in both trainers
    "learning_rate lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 max_grad_norm max_steps "
    "seed beta epsilon epsilon_high delta loss_type importance_sampling_level scale_rewards num_iterations "
    "use_bias_correction_kl num_generations temperature mask_truncated_completions"
).split()


def load_tokenizer(folder: str | Path) -> Any:
    """Pads on the left, because retries continue prompts; apply_chat_template has no argument for it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def retry_reward(
    job: dict[str, Any], task: Any, tokenizer: Any, model_of: Callable[[], Any]
) -> Callable[..., Any]:
    """A TRL reward function: 1.0 where the retry after the reflection verifies, else 0.0."""
    import torch

    from grpo.tasks import Example

    settings = job["settings"]

    def retry_succeeds(
        prompts: list[Any], completions: list[Any], example: list[str], **_: Any
    ) -> list[float]:
        examples = [Example(**json.loads(text)) for text in example]
        conversations = [
            [*prompt, *completion, {"role": "user", "content": problem.prompt}]
            for prompt, completion, problem in zip(prompts, completions, examples, strict=True)
        ]
        inputs = tokenizer.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        model = model_of()
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=settings["dtype"] == "bfloat16"):
            ids = model.generate(
                **inputs,
                max_new_tokens=settings["max_completion_length"],
                do_sample=True,
                temperature=settings["temperature"],
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
            )
        model.train()
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [float(task.verify(problem, text).ok) for problem, text in zip(examples, texts, strict=True)]

    return retry_succeeds


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    hide_benchmarks()
    sys.path.insert(0, job["root"])
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.rewards import get_soft_overlong_punishment

    from grpo.tasks import get_task

    class Clock(TrainerCallback):
        """Seconds from a step's beginning to its end, without saving."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **options: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    settings, output = job["settings"], Path(job["output"])
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    task = get_task(settings["task"], settings["task_options"])
    tokenizer = load_tokenizer(job["start"])
    rewards: list[Any] = [retry_reward(job, task, tokenizer, lambda: trainer.model)]
    weights = [1.0]
    if settings["overlong_buffer"]:
        rewards.append(
            get_soft_overlong_punishment(settings["max_reflection_length"], settings["overlong_buffer"])
        )
        weights.append(settings["soft_overlong_penalty"])
    groups = settings["groups_per_step"]
    config = GRPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=settings["dtype"] == "bfloat16",  # weights stay float32, like our master weights
        gradient_checkpointing=False,
        per_device_train_batch_size=settings["num_generations"],
        gradient_accumulation_steps=groups,
        max_completion_length=settings["max_reflection_length"],
        reward_weights=weights,
        shuffle_dataset=False,
        save_steps=job["save_steps"],
        save_only_model=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        **{name: settings[name] for name in SHARED if settings[name] is not None},
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=job["start"],
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    (output / "seconds.json").write_text(json.dumps(clock.seconds), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
