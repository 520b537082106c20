"""Reflect, retry, reward: trains a language model to reflect on its failures (arXiv 2505.24726), with GRPO.

    python train.py                                  the demo: a 135M model on two CPU cores
    python train.py --preset paper_countdown         the paper's settings, for GPUs
    python train.py --task my_package.tasks:MyTask --model_name_or_path FOLDER --KEY VALUE ...
    python train.py --resume [RUN_DIR]               goes on exactly where a run was stopped

Where all parts meet, stage by stage:

    warm start -> failures -> (rollout -> learner -> validation -> checkpoint) x max_steps -> evaluation

Each stage leaves its result in the run directory and is skipped when it is already there, which is all that
resuming needs. Left out: several processes (one device trains), and early stopping.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from grpo.run.interrupts import EXIT_INTERRUPTED, Interrupted, Interrupts, set_up_process

if __name__ == "__main__":
    set_up_process()  # before the imports below, which take seconds

import grpo_kernels
from tqdm import tqdm

from grpo import config as configuration
from grpo import failures, warmstart
from grpo.config import Config
from grpo.episode import Episode
from grpo.evaluate.comparison import CONTROLS, report
from grpo.evaluate.measure import measure
from grpo.evaluate.table import table
from grpo.learner.learner import Learner, NonFiniteError
from grpo.rollout import Attempt, attempt_episodes
from grpo.run import build, files, state
from grpo.run.diagnostics import nothing_right
from grpo.run.metrics import Metrics, verdict_metrics
from grpo.run.state import LOGS, WARM_START_LOG, AboveBar, Session

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
WARM_START_BLOCK = 50  # supervised steps between checkpoints of the warm start
MEMORY_BLOCK = 8  # supervised steps after which unused memory is returned; an RL step takes as long


class Run(Session):
    """The stages of one run, in their order."""

    # --- before RL ------------------------------------------------------------------------------------------

    def warm_start(self) -> None:
        """Supervised steps on the task's transcripts, then `start/`."""
        unfinished = self.folder / "warm_start"
        if not self.has_start():
            if self.config.warm_start_steps:
                self._supervised_steps(unfinished)
            self.save_start()
        files.delete(unfinished)
        build.load_into(self.parts, str(self.start))  # as it is stored, rounding included

    def _supervised_steps(self, folder: Path) -> None:
        config, built = self.config, self.parts
        learner = self.learner(replace(config, beta=0.0))
        batch = warmstart.by_step(
            built.task,  # type: ignore[arg-type]  # preflight has checked that it writes transcripts
            built.chat,
            config,
        )
        rate = partial(
            warmstart.learning_rate_at, total=config.warm_start_steps, peak=config.warm_start_learning_rate
        )
        saved = done = self.restore(learner, folder, [WARM_START_LOG])
        try:
            with tqdm(total=config.warm_start_steps, initial=done, desc="warm start", unit="step") as bar:
                while done < config.warm_start_steps:
                    self.interrupts.check()
                    result = learner.supervised_step(batch(step=done), rate(done))
                    done += 1
                    files.append_jsonl(self.folder / WARM_START_LOG, {"step": done, **result})
                    bar.set_postfix(loss=f"{result['loss']:.3f}")
                    bar.update()
                    if done % MEMORY_BLOCK == 0:
                        build.return_unused_memory()
                    if done % WARM_START_BLOCK == 0:
                        self.save(learner, folder, done)
                        saved = done
        except (Interrupted, NonFiniteError):
            if done > saved:
                self.save(learner, folder, done)
            raise

    def collect_failures(self) -> list[Attempt]:
        """The dataset of failures, with the weights in `start/`."""
        config, built, path = self.config, self.parts, self.folder / "failures.jsonl"
        examples = built.task.examples("train", config.num_examples)
        with tqdm(total=len(examples), desc="failures", unit="example") as bar:
            found = failures.collect(
                path,
                built.rollout,
                examples,
                attempts_per_example=config.attempts_per_example,
                failures_per_example=config.failures_per_example,
                keep_solved=not config.only_failures,
                weights="start",
                progress=self.progress(bar),
            )
        counts = failures.summary(path)
        print(failures.describe(counts))
        failures.check_trainable(counts)
        return found

    # --- RL -------------------------------------------------------------------------------------------------

    def train(self, pool: list[Attempt]) -> None:
        """`max_steps` times: groups of failures, episodes, an update; validation, checkpoint where due."""
        config = self.config
        learner = self.learner(config)
        saved = self.restore(learner, self.folder, LOGS)
        metrics = Metrics(
            self.folder,
            config.tensorboard,
            dtype=config.dtype,
            max_steps=config.max_steps,
            console=AboveBar(),  # type: ignore[arg-type]  # as far as `print` is concerned it is a file
        )
        numbers = range(saved + 1, config.max_steps + 1)
        steps = tqdm(numbers, desc="training", unit="step", initial=saved, total=config.max_steps)
        try:
            self._validate(saved, metrics)
            for step in steps:
                self.interrupts.check()
                groups = failures.of_step(pool, step, config.groups_per_step, config.seed)
                self._step(learner, step, groups, metrics)
                if (problem := nothing_right(metrics.warnings.history)) is not None:
                    raise failures.NoSignalError(problem)
                self._validate(step, metrics)
                due = config.save_steps and step % config.save_steps == 0
                if due or step in (self.best_step(), config.max_steps):
                    self.save(learner, self.folder, step)
                    saved = step
        except (Interrupted, NonFiniteError, failures.NoSignalError):
            # Of several updates on one batch a later one may have failed: no state that a run can go on from.
            between_steps = learner.optimizer.num_updates == learner.num_steps * config.num_iterations
            if learner.num_steps > saved and between_steps:
                self.save(learner, self.folder, learner.num_steps)
            raise
        finally:
            steps.close()
            metrics.close()

    def _step(self, learner: Learner, step: int, groups: list[Attempt], metrics: Metrics) -> None:
        built = self.parts
        start, tokens = time.perf_counter(), -built.rollout.sampled_tokens
        episodes = self._episodes(groups, step)
        sampled, tokens = time.perf_counter(), tokens + built.rollout.sampled_tokens
        figures = learner.step(episodes)
        # The one arrow back; free where sampler and learner share the tensors.
        built.sampler.load_weights(built.model.state_dict())
        learned = time.perf_counter()
        for episode in episodes:
            files.append_jsonl(self.folder / "episodes.jsonl", {"step": step, **vars(episode)})
        figures |= verdict_metrics(reason for episode in episodes for reason in episode.reasons)
        if self.config.train_on != "attempt":
            pairs = [(groups[episode.group_id].example, episode.texts["reflection"]) for episode in episodes]
            figures["leaks"] = sum(built.task.leaks(*pair) for pair in pairs) / len(pairs)
        metrics.log(step, figures)
        timings = {
            "step_time": time.perf_counter() - start,
            "rollout_time": sampled - start,
            "update_time": learned - sampled,
            "sampled_tokens_per_second": tokens / (sampled - start),
            "peak_memory_gb": build.peak_memory_gb(built.device),
        }
        metrics.timings(step, timings)
        build.return_unused_memory()

    def _episodes(self, groups: list[Attempt], step: int) -> list[Episode]:
        config, rollout = self.config, self.parts.rollout
        options = {"stage": "rollout", "step": step, "progress": self.interrupts.check}
        if config.train_on == "attempt":
            examples = [failure.example for failure in groups]
            attempts = rollout.attempts(examples, count=config.num_generations, **options)  # type: ignore[arg-type]
            return attempt_episodes(attempts, config.num_generations)
        return rollout.reflect_and_retry(
            groups,
            num_generations=config.num_generations,
            retries=config.retries_per_reflection,
            **options,  # type: ignore[arg-type]
        )

    def _validate(self, step: int, metrics: Metrics) -> None:
        """First, second and blind try on validation problems, always with the same noise; once per step."""
        config, built = self.config, self.parts
        if not config.eval_steps or step % config.eval_steps or step in state.validated(self.folder):
            return
        examples = built.task.examples("validation", config.num_validation)
        with build.evaluation_sampling(built):
            result = measure(
                built.rollout,
                examples,
                controls=["blind"],
                stage="validation",
                progress=self.interrupts.check,
            )
        metrics.log(step, result.validation_metrics())

    # --- after RL -------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """The four-column table on held-out problems: the untouched model, right before RL, after it."""
        config, built = self.config, self.parts
        if not config.num_eval:
            return
        examples = built.task.examples("heldout", config.num_eval)
        results = {}
        for label, source in self.compared().items():
            build.load_into(built, source)
            build.return_unused_memory()
            with (
                tqdm(total=len(examples), desc=f"evaluate {label}", unit="problem") as bar,
                build.evaluation_sampling(built),
            ):
                results[label] = measure(
                    built.rollout,
                    examples,
                    controls=CONTROLS if label != "untouched" else (),
                    store=self.folder / f"evaluation-{label}.jsonl",
                    identity=label,
                    progress=self.progress(bar),
                )
        figures = report(results)
        with files.written_whole(self.folder / "evaluation.json") as path:
            path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(table(figures))


def run(config: Config, folder: Path, interrupts: Interrupts, kind: type[Run]) -> None:
    """All stages of `kind`. The settings are stored once the parts that they name could be built."""
    with files.lock(folder):
        kernels = grpo_kernels.backend(build.choose_device(config.device), config.kernels)
        stages = kind(config, folder, interrupts, kernels)
        if config.resume is None:
            with files.written_whole(folder / "config.yaml") as path:
                configuration.to_yaml(config, path)  # device and dtype are resolved by now
        interrupts.defer()
        where = f"{config.dtype} on {config.device}, {kernels.NAME} kernels"
        print(f"{folder}: {config.task} with {config.model_name_or_path}, {where}")
        with stages.timed("warm start"):
            stages.warm_start()
        with stages.timed("failures"):
            pool = stages.collect_failures()
        with stages.timed("training"):
            stages.train(pool)
        with stages.timed("evaluation"):
            stages.evaluate()


def main(
    argv: list[str] | None = None,
    kind: type[Run] = Run,
    prepare: Callable[[Path], None] | None = None,
) -> int:
    """Runs the command; what a user can cause ends in one line on stderr. Returns the exit status.

    `kind` and `prepare`, which is given the run directory before the run, are for the controls of
    benchmarks/evidence.py.
    """
    folder, status = None, EXIT_FAILED
    try:
        with Interrupts() as interrupts:
            config = configuration.parse(sys.argv[1:] if argv is None else argv)
            folder = state.directory(config)
            if prepare is not None:
                prepare(folder)
            run(config, folder, interrupts, kind)
        return EXIT_OK
    except (Interrupted, KeyboardInterrupt):
        begun = folder is not None and (folder / "config.yaml").exists()
        message = "stopped" + (f"; `python train.py --resume {folder}` goes on" if begun else "")
        status = EXIT_INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        message, status = f"error: {error}", EXIT_USAGE
    except (NonFiniteError, FloatingPointError) as error:
        message = f"error: {error}. {state.saved_weights(folder)}"
    except (files.RunDirError, failures.NoSignalError) as error:
        message = f"error: {error}"
    except OSError as error:
        message = f"error: {error}; what was saved before is intact"
    finally:
        if folder is not None:
            files.remove_if_empty(folder)
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
