"""Attempt, reflect, retry, verify: from examples to episodes ("Reflect, Retry, Reward", section 3).

One conversation is

    task prompt | failed attempt | reflection instruction | reflection | task prompt again | retry

Everything up to the instruction is the *prompt* of a group: its G reflections share one prefix cache. Each
row then runs a script (sample the reflection, feed the next user turn, sample the retry), so a row that has
finished reflecting retries at once, on the cache that it already holds. Sampled ids are never decoded and
encoded again: text exists only for the verifier and for people.

Left out on purpose: any notion of advantage or gradient (grpo/learner/learner.py) and any reward model: the
verdict is the reward.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.chat import Chat
from grpo.episode import Episode
from grpo.sampler.engine import Feed, Finished, Row, Sample, Sampler, Turn
from grpo.tasks import Example, Task, Verdict, opening

# The stage is part of the key of the sampling noise, so that no two stages of a run share a random number.
STAGES = {"failures": 0, "rollout": 1, "validation": 2, "evaluation": 3}
ATTEMPT, REFLECTION, RETRY = 0, 1, 2  # the turn, likewise


@dataclass(frozen=True)
class Attempt:
    """One verified answer to an example, with the ids that the model really saw and sampled."""

    example: Example
    prompt_ids: list[int]
    turn: Turn
    text: str
    verdict: Verdict
    generation: int = 0


Progress = Callable[[int, int], None]


class Rollout:
    """Runs the turns of a task on a sampler.

    Args:
        sampler: holds the policy's weights and its decoding settings (temperature, greedy, ...).
        task: prompts and verifier.
        chat: messages to ids and back.
        seed: first part of the key of every random number.
        max_completion_length: limit of an attempt and of a retry, in tokens, its stop token included.
        max_reflection_length: limit of a reflection, likewise.
        overlong_buffer: tokens before the reflection's limit over which the soft overlong penalty rises (0:
            no penalty).
        soft_overlong_penalty: what a reflection that fills its limit loses of its reward.
        length_cost: the share of a *success's* reward that a reflection as long as its limit loses. Where no
            retry is right there is nothing to lose, so giving up early is never better than failing late.
        task_options: what the task was built with.
        dtype: of the sampler's model. Both are only recorded, in `settings`.
    """

    def __init__(
        self,
        sampler: Sampler,
        task: Task,
        chat: Chat,
        *,
        seed: int,
        max_completion_length: int,
        max_reflection_length: int,
        overlong_buffer: int = 0,
        soft_overlong_penalty: float = 0.0,
        length_cost: float = 0.0,
        task_options: Mapping[str, Any] | None = None,
        dtype: str = "float32",
    ):
        self.sampler, self.task, self.chat = sampler, task, chat
        self.seed = seed
        self.max_completion_length = max_completion_length
        self.max_reflection_length = max_reflection_length
        self.overlong_buffer = overlong_buffer
        self.soft_overlong_penalty = soft_overlong_penalty
        self.length_cost = length_cost
        # As JSON gives them back, since they are compared with what a file holds.
        self.task_options = json.loads(json.dumps(task_options or {}))
        self.dtype = dtype
        self.sampled_tokens = 0  # so far

    @property
    def settings(self) -> dict[str, Any]:
        """What a first answer depends on, besides weights and example; stored with answers that are kept."""
        sampler = self.sampler
        return {
            "task": self.task.name,
            "task_options": self.task_options,
            "chat_template": self.chat.template_sha256,
            "dtype": self.dtype,
            "seed": self.seed,
            "max_completion_length": self.max_completion_length,
            "temperature": sampler.temperature,
            "greedy": sampler.greedy,
            "top_p": sampler.top_p,
            "top_k": sampler.top_k,
        }

    def _run(self, rows: Sequence[Row], progress: Progress | None) -> list[Finished]:
        finished = self.sampler.run(rows, progress=progress)
        self.sampled_tokens += sum(len(turn.ids) for done in finished for turn in done.turns)
        return finished

    # --- ids of the contexts --------------------------------------------------------------------------------

    def prompt_ids(self, example: Example) -> list[int]:
        """Ids of what the task opens with (system message or tools, if any), user message, answer header."""
        return self.chat.prompt(**opening(self.task, example, self.chat))

    def reflection_prompt_ids(self, failure: Attempt) -> list[int]:
        """Ids up to the point where the reflection begins: prompt, failed attempt, instruction."""
        return self._after(failure.prompt_ids, failure.turn, self.task.reflection_instruction)

    def _after(self, context: Sequence[int], turn: Turn, user: str) -> list[int]:
        return [*context, *turn.ids, *self.chat.glue(turn.ids, turn.finish_reason, user)]

    # --- the three turns ------------------------------------------------------------------------------------

    def attempts(
        self,
        examples: Iterable[Example],
        *,
        stage: str,
        step: int = 0,
        count: int = 1,
        progress: Progress | None = None,
    ) -> list[Attempt]:
        """`count` first answers to each example, example by example; they share its prompt's cache.

        An example that comes again gets other answers: its generations go on counting.
        """
        rows = []
        seen: Counter[str] = Counter()
        for example in examples:
            prompt = tuple(self.prompt_ids(example))
            first = count * seen[example.id]
            seen[example.id] += 1
            for generation in range(first, first + count):
                key = self._key(stage, step, example, generation, ATTEMPT)
                rows.append(Row(prompt, [Sample(self.max_completion_length, key)], tag=(example, generation)))
        return [self._verified(done, *done.row.tag) for done in self._run(rows, progress)]

    def reflect_and_retry(
        self,
        failures: Sequence[Attempt],
        *,
        num_generations: int,
        stage: str,
        step: int = 0,
        retries: int = 1,
        progress: Progress | None = None,
    ) -> list[Episode]:
        """Groups of `num_generations` reflections, each with `retries` retries, group by group.

        The reward of an episode is the share of its retries that verify, times (1 - length_cost * length /
        limit), less the soft overlong penalty.
        The first retry goes on from the reflection's own cache; further ones are a second run.
        """
        rows = []
        seen: Counter[tuple[str, int]] = Counter()
        for group, failure in enumerate(failures):
            prompt = tuple(self.reflection_prompt_ids(failure))
            # A step may hold two failed attempts of an example or, where the pool is small, one of them
            # twice: both tell the noise of one group from that of another.
            name = (failure.example.id, failure.generation)
            base = (1009 * seen[name] + failure.generation) * 1_000_003
            seen[name] += 1
            for member in range(num_generations):
                rows.append(self._reflect_row(failure, prompt, (group, member, base + member), stage, step))
        finished = self._run(rows, progress)
        verdicts = [[self._retry_of(done, failures)] for done in finished]
        if retries > 1:
            more = [
                self._retry_row(done, failures, stage, step, retry)
                for done in finished
                for retry in range(1, retries)
            ]
            for index, done in enumerate(self._run(more, progress)):
                verdicts[index // (retries - 1)].append(self._retry_of(done, failures))
        return [self._episode(done, failures, tries) for done, tries in zip(finished, verdicts, strict=True)]

    def retry_after(
        self,
        failures: Sequence[Attempt],
        reflections: Sequence[Sequence[int] | None],
        *,
        stage: str,
        step: int = 0,
        progress: Progress | None = None,
    ) -> list[Attempt]:
        """One retry per failure after a *given* reflection: the controls of grpo/evaluate/measure.py.

        Neighbours with the same failure share the cache of what precedes the reflection.

        `reflections[i]` are the ids of a closed assistant turn; None leaves out instruction and reflection
        altogether, so that the task prompt follows the failed attempt (the blind retry). The noise is that of
        the real retry, so that a control differs from it in nothing but its context.
        """
        rows = []
        for failure, reflection in zip(failures, reflections, strict=True):
            if reflection is None:
                prefix, turn = failure.prompt_ids, failure.turn
                fed = [*turn.ids, *self.chat.glue(turn.ids, turn.finish_reason, failure.example.prompt)]
            else:
                prefix = self.reflection_prompt_ids(failure)
                fed = [*reflection, *self.chat.glue(reflection, "stop", failure.example.prompt)]
            key = self._key(stage, step, failure.example, 0, RETRY)
            script: list[Feed | Sample] = [Feed(fed), Sample(self.max_completion_length, key)]
            rows.append(Row(tuple(prefix), script, tag=(failure.example, 0)))
        return [self._verified(done, *done.row.tag) for done in self._run(rows, progress)]

    # --- rows and episodes ----------------------------------------------------------------------------------

    def _key(
        self, stage: str, step: int, example: Example, generation: int, turn: int, retry: int = 0
    ) -> tuple[int, ...]:
        return (self.seed, STAGES[stage], step, example.key, generation, turn, retry)

    def _reflect_row(
        self, failure: Attempt, prompt: tuple[int, ...], tag: tuple[int, int, int], stage: str, step: int
    ) -> Row:
        """tag: group, member, and the generation that names the noise."""
        example, generation = failure.example, tag[2]
        reflect = Sample(self.max_reflection_length, self._key(stage, step, example, generation, REFLECTION))
        # Nothing is longer than what follows a turn that was cut: it has to be closed as well.
        longest = len(self.chat.glue([], "length", example.prompt))
        again = Feed(lambda turn: self.chat.glue(turn.ids, turn.finish_reason, example.prompt), limit=longest)
        retry = Sample(self.max_completion_length, self._key(stage, step, example, generation, RETRY))
        return Row(prompt, [reflect, again, retry], tag=tag)

    def _retry_row(
        self, done: Finished, failures: Sequence[Attempt], stage: str, step: int, retry: int
    ) -> Row:
        group, _, generation = done.row.tag
        key = self._key(stage, step, failures[group].example, generation, RETRY, retry)
        again = Feed([*done.turns[0].ids, *done.fed[0]])
        return Row(done.row.prefix, [again, Sample(self.max_completion_length, key)], tag=done.row.tag)

    def _verified(self, done: Finished, example: Example, generation: int) -> Attempt:
        turn = done.turns[-1]
        text = self.chat.decode(turn.ids)
        return Attempt(
            example, list(done.row.prefix), turn, text, self.task.verify(example, text), generation
        )

    def _retry_of(self, done: Finished, failures: Sequence[Attempt]) -> Attempt:
        group, member, _ = done.row.tag
        return self._verified(done, failures[group].example, member)

    def _episode(self, done: Finished, failures: Sequence[Attempt], tries: list[Attempt]) -> Episode:
        group, member, _ = done.row.tag
        failure, (reflection, retry), fed = failures[group], done.turns[:2], done.fed[0]
        success = sum(attempt.verdict.ok for attempt in tries) / len(tries)
        kept = 1.0 - self.length_cost * len(reflection.ids) / self.max_reflection_length
        return Episode(
            example_id=failure.example.id,
            group_id=group,
            generation=member,
            prompt_ids=list(done.row.prefix),
            completion_ids=[*reflection.ids, *fed, *retry.ids],
            roles=["reflection"] * len(reflection.ids) + ["context"] * len(fed) + ["retry"] * len(retry.ids),
            logprobs=[*reflection.logprobs, *[0.0] * len(fed), *retry.logprobs],
            finish_reason=reflection.finish_reason,
            reward=kept * success - self.overlong_cost(len(reflection.ids)),
            retry_finish_reason=retry.finish_reason,
            reasons=[attempt.verdict.reason for attempt in tries],
            texts={
                "prompt": failure.example.prompt,
                "attempt": failure.text,
                "reflection": self.chat.decode(reflection.ids),
                "retry": "\n---\n".join(attempt.text for attempt in tries),
            },
        )

    def overlong_cost(self, length: int) -> float:
        """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13), scaled by `soft_overlong_penalty`.

        0 up to `max_reflection_length - overlong_buffer` tokens, then rising linearly to the whole penalty at
        the limit.
        """
        if self.overlong_buffer <= 0:
            return 0.0
        excess = length - (self.max_reflection_length - self.overlong_buffer)
        return self.soft_overlong_penalty * min(max(excess / self.overlong_buffer, 0.0), 1.0)


def attempt_episodes(attempts: Sequence[Attempt], num_generations: int) -> list[Episode]:
    """Plain GRPO on the first answer (`train_on: attempt`): `num_generations` neighbours are a group."""
    return [
        Episode(
            example_id=attempt.example.id,
            group_id=index // num_generations,
            generation=index % num_generations,
            prompt_ids=attempt.prompt_ids,
            completion_ids=list(attempt.turn.ids),
            roles=["attempt"] * len(attempt.turn.ids),
            logprobs=list(attempt.turn.logprobs),
            finish_reason=attempt.turn.finish_reason,
            reward=float(attempt.verdict.ok),
            reasons=[attempt.verdict.reason],
            texts={"prompt": attempt.example.prompt, "attempt": attempt.text},
        )
        for index, attempt in enumerate(attempts)
    ]
