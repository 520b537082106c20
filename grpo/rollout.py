"""Attempt, reflect, retry, verify: from examples to episodes ("Reflect, Retry, Reward", section 3).

One conversation is

    task prompt | failed attempt | reflection instruction | reflection | task prompt again | retry

Everything up to the instruction is the *prompt* of a group; its G reflections share one prefix cache. Each
row runs a script: sample the reflection, feed the next user turn, sample the retry. So a row that has
finished its reflection retries at once, on its own cache. Sampled ids are never decoded and encoded again.
Text is only for the verifier and for people.

Left out: advantages and gradients (grpo/learner/learner.py), and reward models. The verdict is the reward: 1
or 0 for a success or a failure, or its score.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, groupby
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from grpo import distributed
from grpo.chat import Chat
from grpo.episode import Episode
from grpo.sampler.engine import Feed, Finished, Row, Sample, Sampler, Turn
from grpo.tasks import Example, Task, Verdict, opening
from grpo.tasks.contract import verdict

Progress = Callable[[int, int], None]  # called with (done, in all); may raise to stop the work

# --- noise --------------------------------------------------------------------------------------------------

STAGES = {"failures": 0, "rollout": 1, "validation": 2, "evaluation": 3}
ATTEMPT, REFLECTION, RETRY = 0, 1, 2


class NoiseKey(NamedTuple):
    """Names the sampling noise of one turn. Turns with different keys have independent noise.

    The noise is a function of the key alone (grpo/sampler/sampling.py), so a step that is redone samples the
    same tokens, whatever runs next to it.
    """

    seed: int = 0  # the run's
    stage: int = STAGES["rollout"]
    step: int = 0  # of RL; 0 elsewhere
    example: int = 0  # `Example.key`
    repeat: int = 0  # how often the example, or this failed attempt at it, came earlier in the step
    attempt: int = 0  # which first answer to the example; in later turns the failed one that they follow
    member: int = 0  # which completion of the group
    turn: int = ATTEMPT  # ATTEMPT, REFLECTION or RETRY
    retry: int = 0  # which retry after the reflection


# --- reward -------------------------------------------------------------------------------------------------


def reward(
    values: Sequence[float],
    length: int,
    *,
    limit: int,
    length_cost: float = 0.0,
    overlong_buffer: int = 0,
    soft_overlong_penalty: float = 0.0,
) -> float:
    """Reward of one reflection.

        mean * (1 - length_cost * length / limit) - soft_overlong_penalty * excess

        mean    of the values of the retries after the reflection (`Rollout.value`): the share that are right,
                or with `reward: score` their mean score. The paper's reward is this alone, with one retry: 1
                or 0.
        excess  (length - (limit - overlong_buffer)) / overlong_buffer, kept within [0, 1]: the soft overlong
                punishment of DAPO (arXiv 2503.14476, eq. 13) with the opposite sign. 0 without a buffer.

    The length cost takes from means above 0 only. So giving up early is never better than failing late.

    Args:
        values: of the verdicts of the retries.
        length: tokens of the reflection, its stop token included.
        limit: `max_reflection_length`, in tokens.
        length_cost: share of a success's reward that a reflection of `limit` tokens loses.
        overlong_buffer: last tokens of the limit, over which the overlong penalty rises.
        soft_overlong_penalty: reward that a reflection of `limit` tokens loses.
    """
    mean = sum(values) / len(values)
    excess = 0.0
    if overlong_buffer > 0:
        excess = min(max((length - (limit - overlong_buffer)) / overlong_buffer, 0.0), 1.0)
    kept = 1.0 - length_cost * length / limit if mean > 0 else 1.0
    return mean * kept - soft_overlong_penalty * excess


# --- the turns ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One verified answer to an example, with the ids that the model saw and sampled."""

    example: Example
    prompt_ids: list[int]
    turn: Turn
    text: str
    verdict: Verdict
    generation: int = 0


@dataclass(frozen=True)
class Tag:
    """What a row is for. The sampler returns it with the row's turns."""

    example: Example
    key: NoiseKey  # of the row's first turn
    generation: int = 0  # which answer to the example, or which completion of the group
    group: int = 0  # index of the failure that the row reflects on


Answered = tuple[Finished, str, Verdict]  # a row, the text of its last turn, and the verdict on it


class Rollout:
    """Runs the turns of a task on a sampler.

    Args:
        sampler: has the policy's weights and the decoding settings (temperature, greedy, ...).
        task: prompts and verifier.
        chat: messages to ids and back.
        seed: of the sampling noise.
        max_completion_length: limit of an attempt and of a retry, in tokens, including the stop token.
        max_reflection_length: limit of a reflection, in tokens, including the stop token.
        overlong_buffer, soft_overlong_penalty, length_cost: of the reward; see `reward`.
        score_rewards: the value of a verdict is its score (`reward: score`), not 1 or 0.
        success_threshold: lowest score that is a success.
        task_options: options that the task was built with; only recorded, in `settings`.
        dtype: of the sampler's model; only recorded, in `settings`.
        verifier_workers: answers verified at once; with more than 1, in threads: the task must allow that.
    """

    def __init__(
        self,
        sampler: Sampler,
        task: Task,
        chat: Chat,
        *,
        seed: int = 0,
        max_completion_length: int,
        max_reflection_length: int,
        overlong_buffer: int = 0,
        soft_overlong_penalty: float = 0.0,
        length_cost: float = 0.0,
        score_rewards: bool = False,
        success_threshold: float = 1.0,
        task_options: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        verifier_workers: int = 1,
    ):
        self.sampler, self.task, self.chat = sampler, task, chat
        self.seed = seed
        self.max_completion_length = max_completion_length
        self.max_reflection_length = max_reflection_length
        self.overlong_buffer = overlong_buffer
        self.soft_overlong_penalty = soft_overlong_penalty
        self.length_cost = length_cost
        self.score_rewards = score_rewards
        self.success_threshold = success_threshold
        # As JSON returns them, because they are compared with those in a file.
        self.task_options = json.loads(json.dumps(task_options or {}))
        self.dtype = dtype
        self.verifier_workers = verifier_workers
        self.sampled_tokens = 0  # since this rollout was built

    def is_right(self, verdict: Verdict) -> bool:
        """Whether an answer is a success. Any other is a failure, and worth a reflection."""
        return verdict.score >= self.success_threshold

    def value(self, verdict: Verdict) -> float:
        """What a verdict gives to the reward."""
        return verdict.score if self.score_rewards else float(self.is_right(verdict))

    @property
    def settings(self) -> dict[str, Any]:
        """What a first answer and its verdict depend on, besides weights and example.

        Stored with answers that are kept. A threshold of 1 is left out, because older files have none.
        """
        sampler = self.sampler
        return {
            "task": self.task.name,
            "task_options": self.task_options,
            "chat_template": self.chat.template_sha256,
            # Only if set: records of version 0.1 lack it.
            **({"chat_template_kwargs": kwargs} if (kwargs := self.chat.template_kwargs) else {}),
            "dtype": self.dtype,
            "seed": self.seed,
            "max_completion_length": self.max_completion_length,
            "temperature": sampler.temperature,
            "greedy": sampler.greedy,
            "top_p": sampler.top_p,
            "top_k": sampler.top_k,
            **({"success_threshold": self.success_threshold} if self.success_threshold != 1.0 else {}),
        }

    def portions(self, done: int, total: int, *, block: int, rows_each: int = 1) -> Iterator[tuple[int, int]]:
        """Which problems to sample together: whole blocks of them, enough to fill the samplers' batches.

        Portions end at the same places wherever an earlier run stopped.

        Args:
            done, total: problems.
            block: problems that are stored together.
            rows_each: rows that a problem has in the batch.
        Yields:
            (first, end): problems first, ..., end - 1.
        """
        size = block * math.ceil(self.sampler.max_rows * distributed.size() / (block * rows_each))
        while done < total:
            end = min(total, size * (done // size + 1))
            yield done, end
            done = end

    def _run(self, rows: Sequence[Row], progress: Progress | None) -> list[tuple[Finished, Attempt]]:
        """Runs the rows and verifies the last turn of each as an answer.

        With several ranks, each runs its share; then all have all. Rows with the same prefix share its cache,
        so one rank runs them. What a row samples does not depend on who runs it.
        """
        prompts = [list(neighbours) for _, neighbours in groupby(range(len(rows)), lambda i: rows[i].prefix)]
        hand = distributed.hand([_cost([rows[index] for index in prompt]) for prompt in prompts])
        mine = [index for prompt in hand for index in prompts[prompt]]
        with distributed.agreement():
            answered = self._answer([rows[index] for index in mine], progress)
        if distributed.size() > 1:
            answered = _exchanged(rows, mine, answered)
        self.sampled_tokens += sum(len(turn.ids) for done, _, _ in answered for turn in done.turns)
        return [(done, _attempt(done, text, judged)) for done, text, judged in answered]

    def _answer(self, rows: Sequence[Row], progress: Progress | None) -> list[Answered]:
        """Runs the rows on this rank; verifies those that have ended while others are being sampled."""
        texts: dict[int, str] = {}
        verdicts: dict[int, Callable[[], Verdict]] = {}
        with self._judge() as judge:

            def verify(index: int, done: Finished) -> None:
                after = done.fed[-1] if done.fed else done.row.prefix
                texts[index] = self.chat.decode(done.turns[-1].ids, after=after)
                verdicts[index] = judge(done.row.tag.example, texts[index])

            finished = self.sampler.run(rows, finished=verify, progress=progress)
            return [(done, texts[index], verdicts[index]()) for index, done in enumerate(finished)]

    @contextmanager
    def _judge(self) -> Iterator[Callable[[Example, str], Callable[[], Verdict]]]:
        """A function that verifies an answer, or begins to; it returns a function that gives the verdict."""
        if self.verifier_workers == 1:

            def judge(example: Example, text: str) -> Callable[[], Verdict]:
                judged = verdict(self.task, example, text)
                return lambda: judged

            yield judge
            return
        jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

        def submit(example: Example, text: str) -> Callable[[], Verdict]:
            future: Future[Verdict] = Future()

            def job() -> None:
                try:
                    future.set_result(verdict(self.task, example, text))
                except BaseException as error:
                    future.set_exception(error)

            jobs.put(job)
            return future.result

        def work() -> None:
            while (job := jobs.get()) is not None:
                job()

        # Daemons, which an executor's threads are not: a verifier that hangs must not keep the process from
        # ending.
        for _ in range(self.verifier_workers):
            Thread(target=work, daemon=True).start()
        try:
            yield submit
        finally:
            with suppress(Empty):  # after an exception, some verdicts are still due
                while True:
                    jobs.get_nowait()
            for _ in range(self.verifier_workers):
                jobs.put(None)

    # --- ids of the contexts --------------------------------------------------------------------------------

    def prompt_ids(self, example: Example) -> list[int]:
        """Ids of the task's opening (system message or tools, if any), user message and answer header."""
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
        stage: str = "rollout",
        step: int = 0,
        count: int = 1,
        progress: Progress | None = None,
    ) -> list[Attempt]:
        """`count` first answers to each example, example by example; they share its prompt's cache.

        An example that comes again gets other answers, and its generations continue to count.
        """
        rows = []
        seen: Counter[str] = Counter()
        for example in examples:
            prompt = tuple(self.prompt_ids(example))
            repeat = seen[example.id]
            seen[example.id] += 1
            for attempt in range(count):
                key = self._key(stage, step, example)._replace(repeat=repeat, attempt=attempt)
                tag = Tag(example, key, generation=count * repeat + attempt)
                rows.append(Row(prompt, [Sample(self.max_completion_length, key)], tag))
        return [attempt for _, attempt in self._run(rows, progress)]

    def reflect_and_retry(
        self,
        failures: Sequence[Attempt],
        *,
        num_generations: int,
        stage: str = "rollout",
        step: int = 0,
        retries: int = 1,
        progress: Progress | None = None,
    ) -> list[Episode]:
        """Groups of `num_generations` reflections, each with `retries` retries, group by group.

        The first retry continues on the reflection's cache. Further retries are a second run of the sampler.
        """
        finished = self._run(self._reflect_rows(failures, num_generations, stage, step), progress)
        tries = [[attempt] for _, attempt in finished]
        if retries > 1:
            more = [self._retry_row(done, retry) for done, _ in finished for retry in range(1, retries)]
            for index, (_, attempt) in enumerate(self._run(more, progress)):
                tries[index // (retries - 1)].append(attempt)
        return [
            self._episode(done, failures[done.row.tag.group], retried)
            for (done, _), retried in zip(finished, tries, strict=True)
        ]

    def retry_after(
        self,
        failures: Sequence[Attempt],
        reflections: Sequence[Sequence[int] | None],
        *,
        stage: str = "rollout",
        step: int = 0,
        progress: Progress | None = None,
    ) -> list[Attempt]:
        """One retry per failure after a *given* reflection: the controls of grpo/evaluate/measure.py.

        Neighbours with the same failure share the cache of what precedes the reflection.

        `reflections[i]` are the ids of a closed assistant turn; None leaves out instruction and reflection
        altogether, so that the task prompt follows the failed attempt (the blind retry). The noise is that of
        the real retry, so a control differs from it in its context only.
        """
        rows = self._given_rows(failures, reflections, stage, step)
        return [attempt for _, attempt in self._run(rows, progress)]

    def reflect_and_retry_after(
        self,
        failures: Sequence[Attempt],
        given: Sequence[tuple[Attempt, Sequence[int] | None]],
        *,
        stage: str = "rollout",
        progress: Progress | None = None,
    ) -> tuple[list[Episode], list[Attempt]]:
        """`reflect_and_retry`, one reflection each, and `retry_after` in a single run of the sampler.

        The short retries fill the batch while the last long reflections are sampled.

        Args:
            given: (failure, reflection) pairs for `retry_after`.
        """
        rows = self._reflect_rows(failures, 1, stage, 0)
        rows += self._given_rows(
            [failure for failure, _ in given], [reflection for _, reflection in given], stage, 0
        )
        # Rows with the same prefix become neighbours, so that they share its cache.
        first = {row.prefix: index for index, row in reversed(list(enumerate(rows)))}
        order = sorted(range(len(rows)), key=lambda index: first[rows[index].prefix])
        answered = dict(zip(order, self._run([rows[index] for index in order], progress), strict=True))
        episodes = [
            self._episode(answered[index][0], failure, [answered[index][1]])
            for index, failure in enumerate(failures)
        ]
        return episodes, [answered[index][1] for index in range(len(failures), len(rows))]

    def right_retries(
        self, episodes: Sequence[Episode], failures: Sequence[Attempt]
    ) -> list[tuple[list[int], list[tuple[list[int], list[bool]]]]]:
        """What `distill_retries` imitates: right retries as first answers (after arXiv 2602.13949).

        A first answer sees the task's prompt alone: neither the failed attempt nor the reflection. Siblings
        that give the same answer count once; otherwise an easy problem would count as often as it is solved.
        A retry that was cut at its limit is left out, because it would teach an answer without an end.

        Args:
            episodes: with one retry each (of several retries, the first); their `group_id` are indices of
                `failures`.
        Returns:
            (task's prompt_ids, [(retry's ids with its stop token, all trained), ...]) for each problem with
            a right retry, as for `Learner.step`.
        """
        answers: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for episode in episodes:
            first = Verdict(episode.reasons[0], episode.scores[0] if episode.scores else None)
            if self.is_right(first) and episode.retry_finish_reason == "stop":
                tokens = zip(episode.completion_ids, episode.roles, strict=True)
                retry = tuple(token for token, role in tokens if role == "retry")
                prompt = tuple(failures[episode.group_id].prompt_ids)
                answers.setdefault(prompt, {})[retry] = None
        return [
            (list(prompt), [(list(retry), [True] * len(retry)) for retry in retries])
            for prompt, retries in answers.items()
        ]

    # --- rows and episodes ----------------------------------------------------------------------------------

    def _key(self, stage: str, step: int, example: Example) -> NoiseKey:
        return NoiseKey(self.seed, STAGES[stage], step, example.key)

    def _reflect_rows(
        self, failures: Sequence[Attempt], num_generations: int, stage: str, step: int
    ) -> list[Row]:
        rows = []
        seen: Counter[tuple[str, int]] = Counter()
        for group, failure in enumerate(failures):
            prompt = tuple(self.reflection_prompt_ids(failure))
            # A step may hold two failed attempts at an example or, if the pool is small, one of them twice.
            name = (failure.example.id, failure.generation)
            repeat = seen[name]
            seen[name] += 1
            for member in range(num_generations):
                key = self._key(stage, step, failure.example)._replace(
                    repeat=repeat, attempt=failure.generation, member=member, turn=REFLECTION
                )
                rows.append(self._reflect_row(prompt, Tag(failure.example, key, member, group)))
        return rows

    def _reflect_row(self, prompt: tuple[int, ...], tag: Tag) -> Row:
        example = tag.example
        reflect = Sample(self.max_reflection_length, tag.key)
        # A turn that was cut must be closed too, so nothing longer than this can follow a reflection.
        longest = len(self.chat.glue([], "length", example.prompt))
        again = Feed(lambda turn: self.chat.glue(turn.ids, turn.finish_reason, example.prompt), limit=longest)
        retry = Sample(self.max_completion_length, tag.key._replace(turn=RETRY))
        return Row(prompt, [reflect, again, retry], tag)

    def _given_rows(
        self, failures: Sequence[Attempt], reflections: Sequence[Sequence[int] | None], stage: str, step: int
    ) -> list[Row]:
        """The rows of `retry_after`."""
        rows = []
        for failure, reflection in zip(failures, reflections, strict=True):
            if reflection is None:
                prefix, turn = failure.prompt_ids, failure.turn
                fed = [*turn.ids, *self.chat.glue(turn.ids, turn.finish_reason, failure.example.prompt)]
            else:
                prefix = self.reflection_prompt_ids(failure)
                fed = [*reflection, *self.chat.glue(reflection, "stop", failure.example.prompt)]
            key = self._key(stage, step, failure.example)._replace(attempt=failure.generation, turn=RETRY)
            script: list[Feed | Sample] = [Feed(fed), Sample(self.max_completion_length, key)]
            rows.append(Row(tuple(prefix), script, Tag(failure.example, key)))
        return rows

    def _retry_row(self, done: Finished, retry: int) -> Row:
        """A further retry after the reflection of a finished row."""
        key = done.row.tag.key._replace(turn=RETRY, retry=retry)
        again = Feed([*done.turns[0].ids, *done.fed[0]])
        return Row(done.row.prefix, [again, Sample(self.max_completion_length, key)], done.row.tag)

    def _episode(self, done: Finished, failure: Attempt, tries: Sequence[Attempt]) -> Episode:
        (reflection, retry), fed, tag = done.turns[:2], done.fed[0], done.row.tag
        return Episode(
            example_id=failure.example.id,
            group_id=tag.group,
            generation=tag.generation,
            prompt_ids=list(done.row.prefix),
            completion_ids=[*reflection.ids, *fed, *retry.ids],
            roles=["reflection"] * len(reflection.ids) + ["context"] * len(fed) + ["retry"] * len(retry.ids),
            logprobs=[*reflection.logprobs, *[0.0] * len(fed), *retry.logprobs],
            finish_reason=reflection.finish_reason,
            reward=reward(
                [self.value(attempt.verdict) for attempt in tries],
                len(reflection.ids),
                limit=self.max_reflection_length,
                length_cost=self.length_cost,
                overlong_buffer=self.overlong_buffer,
                soft_overlong_penalty=self.soft_overlong_penalty,
            ),
            retry_finish_reason=retry.finish_reason,
            reasons=[attempt.verdict.reason for attempt in tries],
            scores=graded_scores(tries),
            texts={
                "prompt": failure.example.prompt,
                "attempt": failure.text,
                "reflection": self.chat.decode(reflection.ids, after=done.row.prefix),
                "retry": "\n---\n".join(attempt.text for attempt in tries),
            },
        )


def _cost(rows: Sequence[Row]) -> int:
    """Tokens that rows with one prefix may need, at most: what their group costs a rank."""
    return len(rows[0].prefix) + sum(
        item.limit for row in rows for item in row.script if isinstance(item, Sample)
    )


def _exchanged(rows: Sequence[Row], mine: Sequence[int], answered: Sequence[Answered]) -> list[Answered]:
    """The answers of all ranks, in the order of `rows`.

    Args:
        mine, answered: indices of the rows that this rank ran, and their answers.
    """
    sent = [
        [index, [vars(turn) for turn in done.turns], done.fed, text, judged.to_json()]
        for index, (done, text, judged) in zip(mine, answered, strict=True)
    ]
    received: dict[int, Answered] = {}
    for index, turns, fed, text, judged in chain.from_iterable(distributed.gather(sent)):
        done = Finished(rows[index], [Turn(**turn) for turn in turns], fed)
        received[index] = done, text, Verdict(**judged)
    return [received[index] for index in range(len(rows))]


def _attempt(done: Finished, text: str, judged: Verdict) -> Attempt:
    """The last turn of a row as a verified answer to its example."""
    tag = done.row.tag
    return Attempt(tag.example, list(done.row.prefix), done.turns[-1], text, judged, tag.generation)


def graded_scores(attempts: Sequence[Attempt]) -> list[float]:
    """The scores of the verdicts, or none if their reasons imply them all."""
    graded = any("score" in attempt.verdict.to_json() for attempt in attempts)
    return [attempt.verdict.score for attempt in attempts] if graded else []


def attempt_episodes(
    attempts: Sequence[Attempt],
    num_generations: int,
    value: Callable[[Verdict], float] = lambda verdict: verdict.score,
) -> list[Episode]:
    """Plain GRPO on the first answer (`train_on: attempt`): `num_generations` neighbours are a group.

    `value` gives the reward of a verdict; see `Rollout.value`.
    """
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
            reward=value(attempt.verdict),
            reasons=[attempt.verdict.reason],
            scores=graded_scores([attempt]),
            texts={"prompt": attempt.example.prompt, "attempt": attempt.text},
        )
        for index, attempt in enumerate(attempts)
    ]
