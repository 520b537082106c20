"""Reflect, retry, reward: trains a language model to reflect on its failures (arXiv 2505.24726), with GRPO.

    python train.py                                  the demo: a 135M model on two CPU cores
    python train.py --preset paper_countdown         the paper's settings, for GPUs
    python train.py --task my_package.tasks:MyTask --model_name_or_path FOLDER --KEY VALUE ...
    python train.py --estimate [RANKS[xGB]] ...      the memory that a run would take, such as 8x80GB
    python train.py --resume [RUN_DIR]               continues a stopped run where it stopped
    python train.py --resume RUN_DIR --max_steps N   continues a finished run
    python train.py --resume auto --KEY VALUE ...    continues the unfinished run of this name, else starts it
    torchrun --nproc_per_node 8 train.py ...         the same on 8 GPUs, or on 8 CPU processes

A run has four stages, each a function of this file, in this order:

    warm_start -> collect_failures -> train -> evaluate

Each stage leaves its result in the run directory and is skipped if the result is already there. Resuming
needs nothing else. `train` is the RL loop: sample episodes, update the policy, log, validate, save. The run's
page, report.html, is refreshed meanwhile.

With torchrun, all ranks run this program; rank 0 alone writes files and the console (grpo/distributed.py).
"""

from __future__ import annotations

import contextlib
import errno
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from grpo.run.interrupts import EXIT_INTERRUPTED, Interrupted, Interrupts, set_up_process

if __name__ == "__main__" or Path(sys.argv[0]).name == "reflect-grpo":  # the console script imports this file
    set_up_process()  # before the imports below, which take seconds

import grpo_kernels

from grpo import config as configuration
from grpo import distributed, failures, warmstart
from grpo.config import Config, current_file
from grpo.episode import Episode
from grpo.evaluate.comparison import CONTROLS, report, save
from grpo.evaluate.measure import measure
from grpo.evaluate.table import table
from grpo.learner.learner import Learner, NonFiniteError
from grpo.report import page
from grpo.rollout import Attempt, Progress, attempt_episodes
from grpo.run import build, checkpoint, files, inputs, reuse, state
from grpo.run.diagnostics import nothing_right
from grpo.run.metrics import Metrics, rollout_metrics
from grpo.run.progress import Bar
from grpo.run.state import LOGS, WARM_START_LOG, RunState
from grpo.run.trackers import Trackers
from grpo.sampler.engine import DivergedError
from grpo.tasks import TaskError

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
COMMAND = "reflect-grpo" if Path(sys.argv[0]).name == "reflect-grpo" else "python train.py"
ENDINGS = (Exception, Interrupted, distributed.RankStopped, SystemExit)  # a task may call sys.exit
WARM_START_BLOCK = 50  # supervised steps between checkpoints of the warm start
MEMORY_BLOCK = 8  # supervised steps between returns of unused memory; about as long as one RL step


# --- before RL ----------------------------------------------------------------------------------------------


def warm_start(run: RunState) -> None:
    """Trains on the task's transcripts (supervised), then saves `start/`, the weights that RL starts from.

    `start_from` may take both, and the failures, from an earlier run.
    """
    unfinished = run.folder / "warm_start"
    if not run.has_start() and not distributed.on_main(lambda: take_start(run, unfinished)):
        if run.config.warm_start_steps:
            supervised_steps(run, unfinished)
        run.save_start()
    files.delete(unfinished)
    build.load_into(run.parts, str(run.start))  # the stored weights, rounding included


def take_start(run: RunState, unfinished: Path) -> bool:
    """Takes the start of an earlier run, if there is one to take; False if not."""
    earlier = None if unfinished.exists() else reuse.find(run.config, run.folder, run.start_record)
    if earlier is not None:
        print(reuse.take(earlier, run.folder, run.start_record))
    return earlier is not None


def supervised_steps(run: RunState, folder: Path) -> None:
    """Runs the steps of the warm start; checkpoints go to `folder`."""
    config, parts = run.config, run.parts
    learner = run.learner(replace(config, beta=0.0))
    transcripts = warmstart.by_step(
        parts.task,  # type: ignore[arg-type]  # build.check_run has checked that it writes transcripts
        parts.chat,
        config,
    )
    rate = partial(
        warmstart.learning_rate_at, total=config.warm_start_steps, peak=config.warm_start_learning_rate
    )
    done = saved = run.restore(learner, folder, [WARM_START_LOG])
    try:
        with Bar("warm start", config.warm_start_steps, "step", done) as bar:
            while done < config.warm_start_steps:
                run.check()
                run.finish_saving()
                metrics = learner.supervised_step(transcripts(step=done), rate(done))
                learner.write_weights(parts.model)
                with distributed.agreement():
                    files.append_jsonl(run.folder / WARM_START_LOG, {"step": done + 1, **metrics})
                done += 1
                bar.update(done, f"loss {metrics['loss']:.3f}")
                if done % MEMORY_BLOCK == 0:
                    build.return_unused_memory()
                if done % WARM_START_BLOCK == 0:
                    saved = done  # set first, so that a failed save is not retried below
                    run.save(learner, folder, done)
        run.finish_saving()
    except ENDINGS as error:
        unsaved = done > saved and learner.optimizer.num_updates == done
        save_before_leaving(run, learner if unsaved and distributed.agreed(error) else None, folder, done)
        raise


def collect_failures(run: RunState) -> list[Attempt]:
    """Builds the dataset of failures, `failures.jsonl`, with the weights in `start/`."""
    with Bar("failures", run.config.num_examples, "example") as bar:
        pool = sample_failures(run, step=0, progress=run.progress(bar))
    counts = failures.summary(failures.file_of(run.folder, step=0))
    print(failures.describe(counts))
    failures.check_trainable(counts)
    return pool


def sample_failures(run: RunState, step: int, progress: Progress) -> list[Attempt]:
    """The failures of the policy after `step` steps of RL, unless they are stored already."""
    config, parts, path = run.config, run.parts, failures.file_of(run.folder, step)
    pool = failures.collect(
        path,
        parts.rollout,
        parts.task.examples("train", config.num_examples),
        attempts_per_example=config.attempts_per_example,
        failures_per_example=config.failures_per_example,
        keep_solved=not config.only_failures,
        weights=f"step {step}" if step else "start",
        step=step,
        progress=progress,
    )
    failures.check_ids(path, pool, parts.chat, parts.model.config.vocab_size)
    return pool


def newest_failures(run: RunState, first: Sequence[Attempt], done: int) -> tuple[Sequence[Attempt], int]:
    """The failures to train on after `done` steps, and after which step they were collected.

    With `refresh_failures` above 0, these are the newest ones that are enough for a step; a policy that has
    become good leaves too few. Collects them if they are due.

    Args:
        first: the failures that RL began with.
    """
    config, every = run.config, run.config.refresh_failures
    for step in range(done // every * every, 0, -every) if every else range(0):
        path = failures.file_of(run.folder, step)
        if step < done:
            failures.check_whole(path, config.num_examples)
        pool = sample_failures(run, step, run.check)
        if step == done:
            print(f"step {step}, failures: {failures.describe(failures.summary(path))}")
        if len(pool) >= config.groups_per_step:
            return pool, step
        if step == done:
            print(
                f"warning: {path.name} has {len(pool)} failures, fewer than groups_per_step "
                f"({config.groups_per_step}): training continues on the failures before",
                file=sys.stderr,
            )
    return first, 0


# --- RL -----------------------------------------------------------------------------------------------------


def sample_episodes(run: RunState, groups: Sequence[Attempt], step: int) -> list[Episode]:
    """The episodes of one step: `num_generations` reflections and retries for each failed attempt.

    With `train_on: attempt` they are as many new attempts at its example instead.
    """
    config, rollout, check = run.config, run.parts.rollout, run.check
    if config.train_on == "attempt":
        examples = [failure.example for failure in groups]
        attempts = rollout.attempts(
            examples, count=config.num_generations, stage="rollout", step=step, progress=check
        )
        return attempt_episodes(attempts, config.num_generations, rollout.value)
    return rollout.reflect_and_retry(
        groups,
        num_generations=config.num_generations,
        retries=config.retries_per_reflection,
        stage="rollout",
        step=step,
        progress=check,
    )


Sample = Callable[[RunState, Sequence[Attempt], int], list[Episode]]


def train(run: RunState, pool: Sequence[Attempt], sample: Sample = sample_episodes) -> None:
    """The RL loop: samples and updates `max_steps` times, or stops early; validates and saves when due."""
    config, parts = run.config, run.parts
    learner = run.learner(config)
    done = saved = run.restore(learner, run.folder, LOGS)
    failures.forget_after(run.folder, done)
    newest: tuple[Sequence[Attempt], int] | None = None
    run.second_tries = state.validated(run.folder)
    metrics = Metrics(
        run.folder,
        run.trackers,
        dtype=config.dtype,
        max_steps=config.max_steps,
    )
    live = page.LiveReport(run.folder)
    bar = Bar("training", config.max_steps, "step", done)
    try:
        validate(run, done, metrics)
        for step in range(done + 1, config.max_steps + 1):
            if run.stops_early():
                break
            run.check()
            collecting = time.perf_counter()
            refresh = bool(done and config.refresh_failures and done % config.refresh_failures == 0)
            if newest is None or refresh:
                newest = newest_failures(run, pool, done)
            start, tokens = time.perf_counter(), parts.rollout.sampled_tokens
            groups = failures.of_step(newest[0], step, config.groups_per_step, config.seed, newest[1])
            episodes = sample(run, groups, step)
            with distributed.agreement():
                sampled_metrics = rollout_metrics(
                    episodes,
                    train_on=config.train_on,
                    task=parts.task,
                    groups=groups,
                    success_threshold=config.success_threshold,
                )
            targets = []
            if config.distill_retries:  # right retries, imitated as first answers
                targets = parts.rollout.right_retries(episodes, groups)
                sampled_metrics["distill/num_targets"] = float(sum(len(answers) for _, answers in targets))
            if refresh:
                counts = failures.summary(failures.file_of(run.folder, done))
                sampled_metrics |= failures.refresh_metrics(counts)
            sampled = time.perf_counter()
            # A checkpoint is written during the rollout, from the tensors that the update changes.
            run.finish_saving()
            ready = time.perf_counter()
            # Advantages, loss, backward, optimiser step: grpo/learner/learner.py.
            update_metrics = learner.step(episodes, targets)
            # Copies the new weights to the sampler; free if both share the same tensors.
            learner.write_weights(parts.model)
            parts.sampler.load_weights(parts.model.state_dict())
            learned = time.perf_counter()
            with distributed.agreement():
                # A run that began with a plain file keeps it.
                log = current_file(run.folder, "episodes.jsonl.gz")
                files.append_jsonl(log, *({"step": step, **episode.to_json()} for episode in episodes))
            seconds = {
                "step_time": time.perf_counter() - start,
                "rollout_time": sampled - start,
                "save_time": ready - sampled,  # waiting for the checkpoint of an earlier step
                "update_time": learned - ready,
                "sampled_tokens_per_second": (parts.rollout.sampled_tokens - tokens) / (sampled - start),
                "peak_memory_gb": build.peak_memory_gb(parts.device),
            }
            if refresh:
                seconds["failures_time"] = start - collecting
            with distributed.agreement():
                metrics.log(step, sampled_metrics | update_metrics, seconds["step_time"])
                metrics.timings(step, seconds)
                metrics.completions(step, episodes, groups)
            done = step
            bar.update(done)
            build.return_unused_memory()
            if config.reward == "binary":  # scores can teach although no answer is right
                problem = nothing_right(
                    metrics.warnings.history,
                    episodes_per_step=config.groups_per_step * config.num_generations,
                    limit=config.max_wrong_episodes,
                )
                if problem is not None:
                    with distributed.agreement():
                        raise failures.NoSignalError(problem)
            validate(run, step, metrics)
            due = config.save_steps and step % config.save_steps == 0
            if due or step in (run.best_step(), config.max_steps) or run.stops_early():
                saved = step  # set first, so that a failed save is not retried below
                run.save(learner, run.folder, step)
            if config.report and distributed.is_main() and (problem := live.refresh()):
                print(problem, file=sys.stderr)
        run.finish_saving()
        if run.stops_early() and done < config.max_steps:
            print(
                f"stopped early: no validation/second_try in the last {config.early_stopping_patience} "
                f"validations was above the best before. The last step is {done}; `{COMMAND} --resume "
                f"{run.folder} --early_stopping_patience 0` goes on"
            )
    except ENDINGS as error:
        # Only between steps, and only if the logs include the last one: otherwise no run could continue.
        unsaved = done > saved and learner.num_steps == done and learner.between_steps
        save_before_leaving(run, learner if unsaved and distributed.agreed(error) else None, run.folder, done)
        raise
    finally:
        bar.close()
        metrics.close()


def validate(run: RunState, step: int, metrics: Metrics) -> None:
    """Measures first, second and blind tries on validation problems when due, always with the same noise."""
    config, parts = run.config, run.parts
    if not config.eval_steps or step % config.eval_steps or step in run.second_tries:
        return
    examples = parts.task.examples("validation", config.num_validation)
    with build.evaluation_sampling(parts):
        result = measure(
            parts.rollout,
            examples,
            controls=["blind"],
            stage="validation",
            progress=run.check,
        )
    shares = result.validation_metrics()
    metrics.log(step, shares)
    run.second_tries[step] = shares[state.SECOND_TRY]


def save_before_leaving(run: RunState, learner: Learner | None, folder: Path, step: int) -> None:
    """Saves the finished steps while an exception propagates; a failed save does not hide that exception.

    Args:
        learner: None: the steps are saved or being saved, or cannot be, because other ranks go on.
    """
    try:
        if learner is not None:
            run.save(learner, folder, step)
        run.finish_saving()
    except (NonFiniteError, distributed.LostRankError):
        pass  # the propagating exception reports the same problem, or follows from it
    except (files.RunDirError, distributed.RankError) as error:
        print(f"step {step} was not saved: {error}", file=sys.stderr)


# --- after RL -----------------------------------------------------------------------------------------------


def compared_models(run: RunState) -> dict[str, str]:
    """The models of the final table: label -> where the weights are."""
    models = {"before_rl": str(run.start), "trained": str(state.latest_checkpoint(run.folder))}
    if run.config.warm_start_steps:  # without a warm start, before_rl is the untouched model
        models = {"untouched": run.config.model_name_or_path, **models}
    return models


def evaluate(run: RunState, models: Mapping[str, str] | None = None) -> None:
    """Measures `models` (default: `compared_models`) on held-out problems; prints the four-column table."""
    config, parts = run.config, run.parts
    if not config.num_eval:
        return
    examples = parts.task.examples("heldout", config.num_eval)
    results = {}
    for label, source in (models or compared_models(run)).items():
        build.load_into(parts, source)
        build.return_unused_memory()
        count = config.num_eval_untouched if label == "untouched" else 0
        measured = examples[:count] if count else examples
        with (
            Bar(f"evaluate {label}", len(measured), "problem") as bar,
            build.evaluation_sampling(parts),
        ):
            results[label] = measure(
                parts.rollout,
                measured,
                controls=CONTROLS if label != "untouched" else (),
                store=run.folder / f"evaluation-{label}.jsonl",
                identity=label,
                progress=run.progress(bar),
            )
    comparison = report(results)
    distributed.on_main(lambda: save(comparison, run.folder / "evaluation.json"))
    print(table(comparison))


# --- the command --------------------------------------------------------------------------------------------


def all_stages(run: RunState) -> None:
    """Runs the four stages in order; however they end, they leave a report."""
    try:
        with run.timed("warm start"):
            warm_start(run)
        with run.timed("failures"):
            pool = collect_failures(run)
        with run.timed("training"):
            train(run, pool)
        with run.timed("evaluation"):
            evaluate(run)
    except ENDINGS:
        write_report(run)
        raise
    with run.timed(state.LAST_STAGE):
        distributed.on_main(lambda: checkpoint.drop_optimizer(run.folder))
        write_report(run)
    print(f"checkpoint: {state.latest_checkpoint(run.folder)}")


def write_report(run: RunState) -> None:
    """Writes report.html into the run directory and prints where it is."""
    if run.config.report and distributed.is_main():
        problem = page.LiveReport(run.folder).write()
        print(problem or f"report: {run.folder / page.FILE}", file=sys.stderr if problem else sys.stdout)


def open_run(config: Config, folder: Path, interrupts: Interrupts) -> RunState:
    """Builds the parts that the settings name, checks that they fit together, and stores the settings.

    Raises:
        ValueError, FileNotFoundError: a setting that does not fit the model, the task or the machine, or an
            input that changed since the run started.
    """
    config.device = build.set_up_device(config.device, deterministic=config.deterministic)
    with distributed.agreement():
        kernels = grpo_kernels.backend(config.device, config.kernels)
    build.check_memory(config)
    parts = build.parts(config)
    with distributed.agreement():
        content = inputs.sums(parts, build.check_run(config, parts))
        start_record = reuse.record(config, content)
    distributed.check_equal("inputs", content)
    versions = {**start_record["environment"], "code of grpo": start_record["code"]}
    distributed.check_equal(
        "versions", {name: versions[name] for name in versions if name not in checkpoint.OF_MACHINE}
    )
    distributed.on_main(lambda: open_folder(parts, folder, content, start_record))
    where = f"{config.dtype} on {config.device}, {kernels.NAME} kernels"
    if (ranks := distributed.size()) > 1:
        where += f", {ranks} ranks"
        if ranks > config.groups_per_step:
            print(
                f"warning: {ranks - config.groups_per_step} of {ranks} ranks have no group in a step: raise "
                f"groups_per_step, now {config.groups_per_step}, or use fewer ranks",
                file=sys.stderr,
            )
    if config.preset == configuration.MODEL_PRESET and config.resume is None:
        print(configuration.preset_line(config))
    print(f"{folder}: {config.task} with {config.model_name_or_path}, {where}")
    if config.resume is None:
        print(state.disk_use(config, parts, folder))
    # Before the warm start, so that a login that fails shows at once.
    with distributed.agreement():
        trackers = Trackers(
            folder,
            config if distributed.is_main() else Config(),
            first_step=max(checkpoint.steps(folder), default=-1) + 1,
        )
    return RunState(config, folder, interrupts, parts, kernels, start_record, trackers)  # type: ignore[arg-type]  # kernels is a module


def open_folder(
    parts: build.Parts, folder: Path, content: dict[str, Any], start_record: dict[str, Any]
) -> None:
    """Checks that a run's directory has room and, if it is resumed, the same inputs; fills a new one."""
    config = parts.config
    state.check_disk(config, parts, folder)
    if config.resume is not None:
        inputs.check(folder, content)
        state.record_changes(config, folder)
        reuse.forget_if_changed(folder, start_record)
    else:
        reuse.check_named(config, start_record)
        inputs.save(folder, content)
        reuse.save(folder, start_record)
        with files.written_whole(folder / "config.yaml") as path:
            configuration.to_yaml(config, path)  # device and dtype are resolved by now


@distributed.joined()
def main(argv: list[str] | None = None, stages: Callable[[RunState], None] = all_stages) -> int:
    """Runs the command. A wrong argument ends in one line on stderr, a bug in its traceback.

    Args:
        stages: what to do with the opened run.
    Returns:
        the exit status.
    """
    folder, running = None, False
    try:
        with distributed.agreement():
            config = configuration.parse(sys.argv[1:] if argv is None else argv)
        if config.estimate is not None:
            print(build.estimated(config))
            return EXIT_OK
        with Interrupts() as interrupts, contextlib.ExitStack() as stack:
            folder = state.directory(config)
            distributed.on_main(lambda: stack.enter_context(files.lock(folder)))
            run = open_run(config, folder, interrupts)
            interrupts.defer()
            running = True
            with contextlib.closing(run.trackers), run.saver:
                stages(run)
        return EXIT_OK
    except (Exception, Interrupted, distributed.RankStopped, KeyboardInterrupt) as error:
        status, message = explain(error, folder, running)
        print(message, file=sys.stderr)
        return status
    finally:
        if folder is not None and distributed.is_main():
            files.remove_if_empty(folder)


def explain(error: BaseException, folder: Path | None, running: bool) -> tuple[int, str]:
    """The exit status and the last line for an exception that ended the command; prints a bug's traceback.

    Args:
        running: the run was open: what is raised then is no wrong argument.
    """
    begun = folder is not None and (folder / "config.yaml").exists()
    resume = f"`{COMMAND} --resume {folder}` continues"
    if isinstance(error, (Interrupted, distributed.RankStopped, KeyboardInterrupt)):
        return EXIT_INTERRUPTED, "stopped" + (f"; {resume}" if begun else "")
    if isinstance(error, (NonFiniteError, DivergedError)):
        return EXIT_FAILED, f"error: {error}. {state.saved_weights(folder)}"
    if isinstance(error, distributed.RankError):
        return EXIT_FAILED, f"error: {error}" + (f"; {resume}" if begun else "")
    if isinstance(error, files.MismatchError):
        return EXIT_USAGE, f"error: {error}"
    if isinstance(error, TaskError):
        message = f"error: {error}. {state.saved_weights(folder)}"
        return EXIT_FAILED, message + (f"; once it is fixed, {resume}" if begun else "")
    if isinstance(error, (failures.NoSignalError, files.RunDirError)):
        return EXIT_FAILED, f"error: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EXIT_FAILED, f"error: {error}; what was saved before is intact"
    if isinstance(error, OSError) and error.filename and folder in Path(str(error.filename)).parents:
        return EXIT_FAILED, f"error: {error}"  # a file of the run that cannot be read or written
    if not running and isinstance(error, (ValueError, FileNotFoundError)):
        return EXIT_USAGE, f"error: {error}"
    if not running and isinstance(error, OSError):
        return EXIT_FAILED, f"error: {error}"
    traceback.print_exception(error, file=distributed.errors())  # a bug, ours or in the user's task
    message = f"error: the exception above ended the run. {state.saved_weights(folder)}"
    if _is_out_of_memory(error):
        less = "--max_tokens_per_micro_batch, --max_rows, --cache_gb or --gradient_checkpointing true"
        return EXIT_FAILED, message + (f"; {resume}, with less memory by {less}" if begun else "")
    return EXIT_FAILED, message + (f"; once it is fixed, {resume}" if begun else "")


def _is_out_of_memory(error: BaseException) -> bool:
    """Of the machine or the device: PyTorch raises RuntimeErrors, on a CPU without a type of their own."""
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


if __name__ == "__main__":
    sys.exit(main())
