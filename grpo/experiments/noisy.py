"""A task whose verifier makes mistakes on train examples: the experiment `robustness` trains on it.

    --task grpo.experiments.noisy:Noisy --task_options '{"task": "countdown", "false_positives": 0.1, ...}'

Example and text decide whether an answer is misjudged, so the same answer always gets the same verdict, as
from a verifier with a bug. Validation and held-out examples get the true verdict.
"""

from __future__ import annotations

import hashlib
from typing import Any

from grpo.tasks import Example, Task, Verdict, get_task

FALSE_NEGATIVE = "false_negative"  # reason of a right answer that is called wrong


class Noisy:
    """A task with a faulty verifier.

    Args:
        task: the task whose verdicts are changed; `options` are its options.
        false_positives: share of wrong answers to train examples that are called right.
        false_negatives: share of right answers to train examples that are called wrong.
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
                raise ValueError(f"{name} must be between 0 and 1, got {share}")
        self.true: Task = get_task(task, options)
        self.false_positives, self.false_negatives = false_positives, false_negatives
        # The same name, so that its records can be compared with those of the true task.
        self.name, self.system = self.true.name, self.true.system
        self.reflection_instruction = self.true.reflection_instruction
        self._train: set[str] = set()
        for name in (
            "opening",
            "transcript",
            "tolerant",
            "check",
            "format_reasons",
        ):  # what only some tasks have
            if hasattr(self.true, name):
                setattr(self, name, getattr(self.true, name))

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        examples = self.true.examples(split, count, offset)
        if split == "train":
            self._train.update(example.id for example in examples)
        return examples

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
        """Uniform in [0, 1). `surrogatepass`: a model may write lone surrogates, which have no UTF-8."""
        digest = hashlib.sha256(f"{example.id}\n{text}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64
