"""A task whose verifier is wrong now and then on train examples: what the experiment `robustness` trains on.

    --task grpo.experiments.noisy:Noisy --task_options '{"task": "countdown", "false_positives": 0.1, ...}'

Which answers are misjudged is a function of example and text: the same answer always gets the same verdict,
as with a verifier that has a fault. Validation and held-out examples are judged by the true verifier.
"""

from __future__ import annotations

import hashlib
from typing import Any

from grpo.tasks import Example, Task, Verdict, get_task

FALSE_NEGATIVE = "false_negative"  # reason of a right answer that is called wrong


class Noisy:
    """A task with a fault in its verifier.

    Args:
        task: the task whose verdicts are spoiled; further options are its own.
        false_positives: share of wrong answers to train examples that are called right.
        false_negatives: share of right ones that are called wrong.
    """

    def __init__(
        self,
        task: str = "countdown",
        false_positives: float = 0.0,
        false_negatives: float = 0.0,
        **options: Any,
    ):
        for name, share in (("false_positives", false_positives), ("false_negatives", false_negatives)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {share}")
        self.true: Task = get_task(task, options)
        self.false_positives, self.false_negatives = false_positives, false_negatives
        # Of the same name, so that its records can stand beside the task's own.
        self.name, self.system = self.true.name, self.true.system
        self.reflection_instruction = self.true.reflection_instruction
        self._train: set[str] = set()
        for method in ("opening", "transcript", "tolerant"):  # which only some tasks have
            if hasattr(self.true, method):
                setattr(self, method, getattr(self.true, method))

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        found = self.true.examples(split, count, offset)
        if split == "train":
            self._train.update(example.id for example in found)
        return found

    def verify(self, example: Example, text: str) -> Verdict:
        verdict = self.true.verify(example, text)
        if example.id not in self._train:
            return verdict
        if verdict.ok:
            return Verdict(FALSE_NEGATIVE) if self._draw(example, text) < self.false_negatives else verdict
        return Verdict("ok") if self._draw(example, text) < self.false_positives else verdict

    def leaks(self, example: Example, reflection: str) -> bool:
        return self.true.leaks(example, reflection)

    def _draw(self, example: Example, text: str) -> float:
        """Uniform in [0, 1). Lone surrogates, which a model may write, have no UTF-8."""
        digest = hashlib.sha256(f"{example.id}\n{text}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
