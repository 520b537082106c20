"""Reflect, retry, reward: trains a language model to reflect on its failures (arXiv 2505.24726), with GRPO.

    python train.py                                  the demo: a 135M model on two CPU cores
    python train.py --preset paper                   the paper's settings, for GPUs
    python train.py --task my_package.tasks:MyTask --model_name_or_path FOLDER --KEY VALUE ...
    python train.py --resume [RUN_DIR]               goes on exactly where a run was stopped

This file is where all parts meet, stage by stage:

    warm start -> failures -> (rollout -> learner -> validation -> checkpoint) x max_steps -> evaluation

Each stage leaves its result in the run directory and is skipped when it is already there, which is all that resuming
needs. Left out: several processes (one device trains), and early stopping: the table is about the last step.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from grpo import checkpoint, evaluate, failures, parts, warmstart, weights
from grpo import config as configuration
from grpo.config import Config
from grpo.episode import Episode
from grpo.interrupts import Interrupted, Interrupts
from grpo.learner import Learner, NonFiniteError
from grpo.metrics import Metrics, verdict_metrics
from grpo.rollout import Attempt, attempt_episodes
from grpo.tasks import WarmStartTask

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
WARM_START_BLOCK = 20  # supervised steps between checkpoints of the warm start


def choose_kernels(name: str, device: str) -> ModuleType:
    """The module that computes log-probs, loss and advantages: grpo_kernels, or the PyTorch references themselves."""
    import grpo_kernels

    if name == "triton":
        raise ValueError(
            "kernels must be auto or torch, got 'triton': this version has no Triton kernels yet"
        )
    return grpo_kernels


class Run:
    """One run directory and its stages."""

    def __init__(self, config: Config, folder: Path, interrupts: Interrupts):
        self.config, self.folder, self.interrupts = config, folder, interrupts
        self.start = folder / "start"  # the weights that RL starts from, and the KL's reference
        self.parts = parts.build(config)
        self.kernels = choose_kernels(config.kernels, config.device)
        self.best: dict[str, Any] = {"step": None, "second_try": -1.0}

    # --- before RL -----------------------------------------------------------------------------------------------

    def warm_start(self) -> None:
        """Supervised steps on the task's transcripts, then `start/`. In blocks: a kill costs at most one of them."""
        if self.start.is_dir():
            parts.load_into(self.parts, str(self.start))
            return
        if self.config.warm_start_steps:
            self._supervised_steps()
        partial = self.folder / "start.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        weights.save(self.parts.model, self.parts.tokenizer, partial)
        partial.rename(self.start)
        parts.load_into(
            self.parts, str(self.start)
        )  # what RL starts from is what is stored, rounding included
        shutil.rmtree(self.folder / "warm_start", ignore_errors=True)

    def _supervised_steps(self) -> None:
        config, built, folder = self.config, self.parts, self.folder / "warm_start"
        learner = self._learner(replace(config, beta=0.0))
        task = built.task
        if not isinstance(task, WarmStartTask):
            raise ValueError(f"warm_start_steps must be 0: task {task.name} writes no transcripts")
        # After the examples of RL, which so stay unseen.
        examples = built.task.examples("train", config.warm_start_examples, offset=config.num_examples)
        done = self._restore(learner, folder)
        log = self.folder / "warm_start.jsonl"
        checkpoint.truncate_jsonl(log, done)
        with tqdm(total=config.warm_start_steps, initial=done, desc="warm start", unit="step") as bar:
            for step in range(done, config.warm_start_steps):
                self.interrupts.check()
                rate = warmstart.learning_rate_at(
                    step, config.warm_start_steps, config.warm_start_learning_rate
                )
                batch = warmstart.sequences(
                    task,
                    built.chat,
                    examples,
                    step=step,
                    batch_size=config.warm_start_batch_size,
                    reflections=config.warm_start_reflections,
                    seed=config.seed,
                )
                result = learner.supervised_step(batch, rate)
                append_jsonl(log, {"step": step + 1, **result})
                bar.set_postfix(loss=f"{result['loss']:.3f}")
                bar.update()
                if (step + 1) % WARM_START_BLOCK == 0 and step + 1 < config.warm_start_steps:
                    self._save(learner, folder, keep=1)

    def collect_failures(self) -> list[Attempt]:
        """The dataset of failures, with the weights in `start/`."""
        config, built, path = self.config, self.parts, self.folder / "failures.jsonl"
        examples = built.task.examples("train", config.num_examples)
        with tqdm(total=len(examples), desc="failures", unit="example") as bar:

            def progress(done: int, _: int) -> None:
                bar.update(done - bar.n)
                self.interrupts.check()

            found = failures.build(
                path,
                built.rollout,
                examples,
                attempts_per_example=config.attempts_per_example,
                failures_per_example=config.failures_per_example,
                progress=progress,
            )
        counts = failures.summary(path)
        print(failures.describe(counts))
        failures.check_trainable(counts)
        return found

    # --- RL ------------------------------------------------------------------------------------------------------

    def train(self, pool: list[Attempt]) -> None:
        """`max_steps` times: groups of failures, episodes, one update; now and then validation and a checkpoint."""
        config = self.config
        learner = self._learner(config)
        saved = self._restore(learner, self.folder)
        for log in ("metrics.jsonl", "timings.jsonl", "episodes.jsonl"):
            checkpoint.truncate_jsonl(self.folder / log, saved or -1)  # step 0 is redone too: its validation
        metrics = Metrics(self.folder, config.tensorboard, dtype=config.dtype, max_steps=config.max_steps)
        try:
            if saved == 0 and config.eval_steps:
                metrics.log(0, self._validate(0))
            for step in range(saved + 1, config.max_steps + 1):
                self.interrupts.check()
                self._step(learner, step, self._groups(pool, step), metrics)
                due = config.save_steps and step % config.save_steps == 0
                if due or step in (self.best["step"], config.max_steps):
                    self._save(learner, self.folder, keep=config.save_total_limit)
                    saved = step
        except (Interrupted, NonFiniteError) as reason:
            # A later one of several updates on the same batch may have failed: then only a step's end is worth saving.
            if learner.num_steps > saved and (isinstance(reason, Interrupted) or config.num_iterations == 1):
                self._save(learner, self.folder, keep=config.save_total_limit)
            raise
        finally:
            metrics.close()

    def _groups(self, pool: list[Attempt], step: int) -> list[Attempt]:
        """The failures of one step: the pool in a new order for each pass over it, a function of the step alone."""
        count = self.config.groups_per_step
        chosen = []
        for position in range((step - 1) * count, step * count):
            epoch, index = divmod(position, len(pool))
            order = random.Random(f"failures {self.config.seed} {epoch}").sample(range(len(pool)), len(pool))
            chosen.append(pool[order[index]])
        return chosen

    def _step(self, learner: Learner, step: int, groups: list[Attempt], metrics: Metrics) -> None:
        config, built = self.config, self.parts
        start = time.perf_counter()
        episodes = self._episodes(groups, step)
        sampled, tokens = time.perf_counter(), built.sampler.stats["sampled_tokens"]
        figures = learner.step(episodes)
        built.sampler.load_weights(
            built.model.state_dict()
        )  # the one arrow back; free where both share the tensors
        learned = time.perf_counter()
        for episode in episodes:
            append_jsonl(self.folder / "episodes.jsonl", {"step": step, **vars(episode)})
        figures |= verdict_metrics(reason for episode in episodes for reason in episode.reasons)
        if config.train_on != "attempt":
            pairs = [(groups[episode.group_id].example, episode.texts["reflection"]) for episode in episodes]
            figures["leaks"] = sum(built.task.leaks(*pair) for pair in pairs) / len(pairs)
        if config.eval_steps and step % config.eval_steps == 0:
            figures |= self._validate(step)
        metrics.log(step, figures)
        seconds = {"rollout_time": sampled - start, "update_time": learned - sampled}
        rate = {"sampled_tokens_per_second": tokens / (sampled - start)}
        memory = {"peak_memory_gb": parts.peak_memory_gb(built.device)}
        metrics.timings(step, {"step_time": time.perf_counter() - start, **seconds, **rate, **memory})

    def _episodes(self, groups: list[Attempt], step: int) -> list[Episode]:
        config, rollout = self.config, self.parts.rollout
        if config.train_on == "attempt":
            examples = [failure.example for failure in groups]
            count = config.num_generations
            attempts = rollout.attempts(
                examples, stage="rollout", step=step, count=count, progress=self.interrupts.check
            )
            return attempt_episodes(attempts, count)
        return rollout.reflect_and_retry(
            groups,
            num_generations=config.num_generations,
            stage="rollout",
            step=step,
            retries=config.retries_per_reflection,
            progress=self.interrupts.check,
        )

    def _validate(self, step: int) -> dict[str, float]:
        """First, second and blind try on validation problems, always with the same noise; keeps the best step in mind."""
        config, built = self.config, self.parts
        examples = built.task.examples("validation", config.num_validation)
        with parts.evaluation_sampling(built):
            result = evaluate.measure(built.rollout, examples, controls=["blind"], stage="validation")
        figures = validation_metrics(result)
        if step and figures["validation/second_try"] > self.best["second_try"]:
            self.best = {"step": step, "second_try": figures["validation/second_try"]}
        return figures

    # --- after RL ------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """The four-column table on held-out problems: the untouched model, right before RL, after the last step."""
        config, built = self.config, self.parts
        if not config.num_eval:
            return
        last = checkpoint.latest(self.folder)
        sources = {"untouched": config.model_name_or_path, "vanilla": str(self.start), "trained": str(last)}
        examples = built.task.examples("heldout", config.num_eval)
        results = {}
        for label, source in sources.items():
            parts.load_into(built, source)
            with tqdm(total=len(examples), desc=f"evaluate {label}", unit="problem") as bar:

                def progress(done: int, _: int, bar: tqdm = bar) -> None:
                    bar.update(done - bar.n)
                    self.interrupts.check()

                with parts.evaluation_sampling(built):
                    results[label] = evaluate.measure(
                        built.rollout,
                        examples,
                        controls=evaluate.CONTROLS if label != "untouched" else (),
                        store=self.folder / f"evaluation-{label}.jsonl",
                        identity=label,
                        progress=progress,
                    )
        figures = evaluate.report(results)
        (self.folder / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(evaluate.table(figures))

    # --- state ---------------------------------------------------------------------------------------------------

    def _learner(self, config: Config) -> Learner:
        reference = None
        if config.beta > 0:
            reference, _ = weights.load(str(self.start), dtype=self.parts.dtype, device=self.parts.device)
        return Learner(
            self.parts.model,
            config,
            linear_logprob=self.kernels.linear_logprob,
            grpo_loss=self.kernels.grpo_loss,
            group_advantage=self.kernels.group_advantage,
            total_steps=config.max_steps,
            reference=reference,
        )

    def _save(self, learner: Learner, folder: Path, *, keep: int) -> None:
        tensors, counters = learner.state()
        checkpoint.save(
            folder,
            counters["num_updates"] if folder != self.folder else learner.num_steps,
            write_model=lambda path: weights.save(self.parts.model, self.parts.tokenizer, path),
            tensors=tensors,
            state={"counters": counters, "best": self.best},
            keep=keep,
            best_step=self.best["step"],
        )

    def _restore(self, learner: Learner, folder: Path) -> int:
        """Puts the newest checkpoint of `folder` into the learner; returns its step, 0 where there is none."""
        path = checkpoint.latest(folder)
        if path is None:
            return 0
        for difference in checkpoint.environment_differences(path):
            print(
                f"warning: {difference}: the run goes on, but not bit for bit as it would have",
                file=sys.stderr,
            )
        tensors, state = checkpoint.load(path, check=False)
        learner.load_state(tensors, state["counters"])
        self.best = state["best"]
        return int(path.name.removeprefix("step-"))


def validation_metrics(result: evaluate.ModelResult) -> dict[str, float]:
    """Shares of right answers: of all problems for the tries, of the first try's failures for the retries."""
    failed = max(1, len(result.failures))
    return {
        "validation/first_try": sum(result.first_try) / len(result.records),
        "validation/second_try": sum(result.second_try) / len(result.records),
        "validation/retry": sum(record["retry"]["reason"] == "ok" for record in result.failures) / failed,
        "validation/retry_blind": sum(r["controls"]["blind"]["reason"] == "ok" for r in result.failures)
        / failed,
        "validation/reflection_length": sum(record["reflection"]["tokens"] for record in result.failures)
        / failed,
    }


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def prepare(config: Config) -> Path:
    """The run directory: a new one with its config.yaml, or the one to be continued, with the settings it had."""
    if config.resume is None:
        return checkpoint.new_run_dir(config.output_dir, config.run_name or config.preset)
    folder = Path(config.resume)
    if changed := configuration.differences(configuration.load(folder / "config.yaml"), config):
        raise ValueError(
            f"resume of {folder} with changed settings: {'; '.join(changed)}. Start a new run for these"
        )
    if (folder / "evaluation.json").exists():
        raise ValueError(f"resume: {folder} is finished; python -m grpo.evaluate {folder} measures it again")
    return folder


def main(argv: list[str] | None = None) -> int:
    try:
        config = configuration.parse(sys.argv[1:] if argv is None else argv)
        folder = prepare(config)
        with checkpoint.lock(folder):
            run = Run(config, folder, Interrupts())
            if config.resume is None:
                configuration.to_yaml(config, folder / "config.yaml")  # device and dtype are resolved by now
            print(
                f"{folder}: {config.task} with {config.model_name_or_path}, {config.dtype} on {config.device}"
            )
            run.warm_start()
            run.train(run.collect_failures())
            run.evaluate()
    except Interrupted:
        print(f"stopped; `python train.py --resume {folder}` goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (
        checkpoint.CheckpointError,
        checkpoint.RunLockedError,
        failures.NoSignalError,
        NonFiniteError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        print(f"error: {error}; what was saved before is intact", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
