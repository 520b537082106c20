"""The state of a run: its directory, settings and parts; makes learners, saves and restores checkpoints.

A checkpoint contains the learner's state and the length of each log. Resuming restores the state and cuts the
logs, so that steps which are redone appear once. Everything else is a function of the settings and the step.

Left out: anything that trains or samples. The stages are in train.py.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from grpo import config as configuration
from grpo import distributed
from grpo.config import TYPES, Config
from grpo.learner import sharded
from grpo.learner.learner import Kernels, Learner
from grpo.learner.optimizer import scheduled_learning_rate
from grpo.model import lora, weights
from grpo.model.shards import ShardWriter
from grpo.run import build, checkpoint, files, metrics
from grpo.run.build import Parts
from grpo.run.interrupts import Interrupts
from grpo.run.progress import Bar
from grpo.run.trackers import Trackers

# The last one takes the place of the one before it in runs that an older version began.
LOGS = ("metrics.jsonl", "timings.jsonl", "episodes.jsonl.gz", "episodes.jsonl")
WARM_START_LOG = "warm_start.jsonl"
STAGES = "stages.jsonl"
LAST_STAGE = "report"
SECOND_TRY = "validation/second_try"  # decides which checkpoint is the best


@dataclass
class RunState:
    """One run directory, locked by this process, and what the stages need.

    Attributes:
        kernels: the module of the functions that the learner uses.
        start_record: what the start of this run depends on (reuse.py).
        trackers: get the metrics of RL.
        second_tries: share of right second tries by validated step.
        saver: writes the checkpoints; inside `with`, which train.main opens.
    """

    config: Config
    folder: Path
    interrupts: Interrupts
    parts: Parts
    kernels: Kernels
    start_record: dict[str, Any]
    trackers: Trackers
    second_tries: dict[int, float] = field(default_factory=dict)
    saver: checkpoint.Saver = field(default_factory=checkpoint.Saver)

    @property
    def start(self) -> Path:
        """The weights that RL starts from, and the reference of the KL penalty."""
        return self.folder / "start"

    def check(self, *_: object) -> None:
        """Raises Interrupted after a signal, on all ranks at the same place (`distributed.agreement`)."""
        with distributed.agreement():
            self.interrupts.check()

    def progress(self, bar: Bar) -> Callable[[int, int], None]:
        """A callback for long stages: moves the bar, and raises Interrupted after a signal."""

        def update(done: int, _: int) -> None:
            bar.update(done)
            self.check()

        return update

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """A context that, if the stage succeeds, adds its seconds and peak memory to stages.jsonl."""
        start = time.perf_counter()
        yield
        line = {"stage": stage, "seconds": time.perf_counter() - start}
        line["peak_memory_gb"] = build.peak_memory_gb(self.parts.device)
        files.append_jsonl(self.folder / STAGES, line)

    def learner(self, config: Config) -> Learner:
        """A new learner, with the reference model if `config` asks for a KL penalty.

        With LoRA, the weights without the adapter are those of `start/`: no second copy is needed.
        """
        parts, model, reference = self.parts, self.parts.model, None
        sharding = distributed.size() > 1 and config.parallel == "fsdp"
        if sharding:
            model = sharded.shard(model, dtype=parts.dtype)
        if config.beta > 0 and config.lora_r:
            reference = model
        elif config.beta > 0:
            reference, _ = weights.load(str(self.start), dtype=parts.dtype, device=parts.device)
            if sharding:
                reference = sharded.shard(reference, dtype=parts.dtype, trained=False)
        return Learner(
            model,
            config,
            total_steps=config.max_steps,
            reference=reference,
            kernels=self.kernels,
        )

    def has_start(self) -> bool:
        """Whether the weights before RL are saved. Raises CheckpointError if they are damaged."""
        return bool(distributed.on_main(self._has_start))

    def _has_start(self) -> bool:
        if not self.start.is_dir():
            return False
        try:
            checkpoint.check_seal(self.start)
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(f"{error}; delete {self.start} to make it again") from error
        return True

    def save_start(self) -> None:
        """Writes `start/`, whole weights also with LoRA: the adapter of a warm start is merged into them."""
        lora.merge(self.parts.model)
        distributed.on_main(self._save_start)

    def _save_start(self) -> None:
        with files.written_whole(self.start) as folder:
            self._write_model(self.parts.tokenizer, folder, writer := ShardWriter())
            checkpoint.seal(folder, writer.sums)

    def _write_model(self, tokenizer: Any, folder: Path, writer: ShardWriter) -> None:
        model, stop_ids = self.parts.model, self.parts.chat.stop_token_ids
        weights.save(model, tokenizer, folder, stop_ids=stop_ids, writer=writer)

    def _write_adapter(self, base: str, tokenizer: Any, folder: Path, writer: ShardWriter) -> None:
        weights.save_adapter(self.parts.model, tokenizer, folder, base, writer)

    @cached_property
    def _tokenizer(self) -> Any:
        """A copy for the thread that saves: a fast tokenizer may refuse to be used by two threads at once."""
        return copy.deepcopy(self.parts.tokenizer)

    def save(self, learner: Learner, folder: Path, step: int) -> None:
        """Begins to save a checkpoint in `folder`: the run's, or the one of its unfinished warm start.

        Returns while a thread writes it. Call `finish_saving` before the weights change.

        Raises:
            NonFiniteError: the weights are NaN or infinite. Earlier checkpoints stay.
            RunDirError: the disk has too little space left. Earlier checkpoints stay.
        """
        self.finish_saving()
        with distributed.agreement():
            learner.check_weights(self.parts.model)
        of_run = folder == self.folder
        tensors, counters = learner.state()
        size = checkpoint_bytes(self.parts)
        size += sum(distributed.gather(sum(tensor.nbytes for tensor in tensors.values())))
        write = self._write_model
        if self.config.lora_r:
            base = str(self.start.resolve()) if of_run else self.config.model_name_or_path
            write = partial(self._write_adapter, base)
        distributed.on_main(lambda: files.require_space(checkpoint.path_of(folder, step), size))
        self.saver.save(
            folder,
            step,
            write_model=partial(write, self._tokenizer),
            tensors=tensors,
            state={"counters": counters, "logs": files.log_sizes(self.folder, [*LOGS, WARM_START_LOG])},
            keep=self.config.save_total_limit if of_run else 1,
            best_step=self.best_step() if of_run else None,
        )

    def finish_saving(self) -> None:
        """Waits for the checkpoint that is being written. Raises RunDirError if it could not be written."""
        self.saver.wait()

    def restore(self, learner: Learner, folder: Path, logs: Sequence[str]) -> int:
        """Loads the newest checkpoint and cuts `logs` back to it. Returns its step, or 0 if there is none.

        Without a checkpoint they are emptied. A log that the checkpoint does not know, because the user has
        unpacked it since, is cut after that step.

        Raises:
            CheckpointError: it is damaged, or of another run.
        """
        step, sizes = 0, dict.fromkeys(logs, 0)
        if (path := latest_checkpoint(folder)) is not None:
            pieces = learner.optimizer.pieces()
            with distributed.agreement():
                for difference in checkpoint.environment_differences(path):
                    print(f"warning: {difference}: the run continues, but not bit for bit", file=sys.stderr)
                tensors, state = checkpoint.load(
                    path, check=False, pieces=lambda name: pieces.get(name.partition(".")[2])
                )
            try:
                learner.load_state(tensors, state["counters"])
                sizes = {log: int(size) for log, size in state["logs"].items() if log in logs}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise checkpoint.CheckpointError(f"{path} does not fit this run ({reason})") from error
            learner.write_weights(self.parts.model)
            step = checkpoint.step_of(path)
        files.cut_logs(self.folder, sizes)
        for log in logs:
            if log not in sizes and log.endswith(".jsonl") and (self.folder / log).exists():
                files.cut_after_step(self.folder / log, step)
        distributed.barrier()  # all ranks read the logs
        return step

    def stops_early(self) -> bool:
        """Whether validation has not risen for `early_stopping_patience` validations."""
        return stops_early(self.second_tries, self.config.early_stopping_patience)

    def best_step(self) -> int | None:
        """The validated step with the most right second tries (the first such step); None without one."""
        return best_step(self.second_tries)


def latest_checkpoint(folder: Path) -> Path | None:
    """`checkpoint.latest`, which rank 0 alone verifies: it reads all files."""
    path = distributed.on_main(lambda: str(checkpoint.latest(folder) or ""))
    return Path(path) if path else None


# --- what a run directory contains ----------------------------------------------------------------------


def best_step(second_tries: Mapping[int, float]) -> int | None:
    """The step after the start with the largest share; the first such step; None without one."""
    shares = {step: share for step, share in second_tries.items() if step > 0}
    return max(shares, key=shares.__getitem__, default=None)


def stops_early(second_tries: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` validations brought no share above the best one before them; 0: never.

    The start counts as a validation. A function of the log alone, so a resumed run stops at the same step.
    """
    shares = [second_tries[step] for step in sorted(second_tries)]
    return bool(patience) and len(shares) > patience and max(shares[-patience:]) <= max(shares[:-patience])


def saved_model(run: Path, which: str = "newest") -> Path:
    """The folder of a run's weights.

    Args:
        which: best (by validation), newest, start (right before RL), or the number of a step.
    Raises:
        ValueError: the run has no such weights; the message lists those that it has.
        CheckpointError: they are damaged.
    """
    if which not in ("best", "newest", "start") and not which.isdecimal():
        raise ValueError(f"checkpoint must be best, newest, start or the number of a step, got {which!r}")
    steps, start = checkpoint.steps(run), run / "start"
    has_start = (start / "config.json").is_file()
    if which == "start" and has_start:
        checkpoint.check_seal(start)
        return start
    named = {"best": best_step(validated(run)), "newest": max(steps, default=None), "start": None}
    step = named[which] if which in named else int(which)
    if step is None or step not in steps:
        there = ", ".join([*(["start"] if has_start else []), *map(str, steps)]) or "none yet"
        hint = "; best needs validations (eval_steps)" if which == "best" and step is None else ""
        raise ValueError(f"checkpoint must be one that {run} has ({there}), got {which}{hint}")
    path = checkpoint.path_of(run, step)
    checkpoint.verify_weights(path)
    return path


def validated(folder: Path) -> dict[int, float]:
    """Share of right second tries by validated step; read from the log, so a resumed run has it too."""
    lines = metrics.history(folder)
    return {line["step"]: line[SECOND_TRY] for line in lines if line.get(SECOND_TRY) is not None}


def directory(config: Config) -> Path:
    """The run's directory: a new one, or the one to resume. Sets `config.resume` to it, or to None.

    Rank 0 makes or chooses it.

    Raises:
        ValueError: the run to resume is finished, or had other settings, or its config.yaml was edited.
    """
    changed = ("resume", "device", "dtype", "attn_implementation")
    folder, values = distributed.on_main(
        lambda: (str(_directory(config)), {name: getattr(config, name) for name in changed})
    )
    vars(config).update(values)
    return Path(folder)


def _directory(config: Config) -> Path:
    auto = config.resume == configuration.AUTO
    if auto:
        config.resume = _newest_unfinished(config)
    if config.resume is None:
        return files.new_run_dir(config.output_dir, config.run_name or config.preset)
    folder = Path(config.resume)
    old = configuration.load(folder / "config.yaml")
    configuration.check_unedited(folder / "config.yaml")
    if config.device == "auto":  # as resolved when the run started
        config.device = old.device
    if config.dtype == "auto":
        config.dtype = old.dtype
    if config.attn_implementation == "auto":
        config.attn_implementation = old.attn_implementation
    free = [*configuration.FREE_ON_RESUME, *configuration.MEMORY_ON_RESUME]
    free += ["max_steps", "early_stopping_patience"]
    if changed := configuration.differences(old, config, free):
        settings = "; ".join(changed)
        raise ValueError(f"resume of {folder} with changed settings: {settings}. Start a new run for these")
    if config.max_steps < (done := max(checkpoint.steps(folder), default=0)):
        raise ValueError(
            f"max_steps must be at least {done}, the newest step of {folder}, got {config.max_steps}"
        )
    longer = (
        _last_step(config, folder) != _last_step(old, folder)
        or config.num_eval > 0
        and config.num_eval != old.num_eval
    )
    if not longer and not auto and _finished(config, folder):
        early = _last_step(old, folder) != old.max_steps
        more = "--early_stopping_patience 0`" if early else f"--max_steps` above {old.max_steps}"
        raise ValueError(
            f"resume: {folder} is finished; `{more} continues it, and python -m grpo.evaluate {folder} "
            "measures it again"
        )
    return folder


def _newest_unfinished(config: Config) -> str | None:
    """The run of this name with the highest number that has not finished all of its stages."""
    name = re.escape(config.run_name or config.preset)
    folders = [path.parent for path in Path(config.output_dir).glob("*/config.yaml")]
    numbers = {
        folder: int(match[1])
        for folder in folders
        if (match := re.fullmatch(rf"{name}-(\d{{3,}})", folder.name))
    }
    for folder in sorted(numbers, key=numbers.__getitem__, reverse=True):
        if not (_finished(configuration.load(folder / "config.yaml"), folder) and _closed(folder)):
            return str(folder)
    return None


def _closed(folder: Path) -> bool:
    """Whether a finished run has also done what comes after its results."""
    lines = (folder / STAGES).read_text().splitlines() if (folder / STAGES).exists() else []
    return bool(lines) and f'"{LAST_STAGE}"' in lines[-1]


def record_changes(config: Config, folder: Path) -> None:
    """Writes the settings that a resumed run changes into its config.yaml, and prints what they may change.

    Evaluation files that the new settings make obsolete get another name first. If the process is killed in
    between, the run is one with its old settings that lacks these files.
    """
    old = configuration.load(folder / "config.yaml")
    if not configuration.differences(old, config, free=configuration.COMMAND_LINE_ONLY):
        return
    if memory := configuration.differences(old, config, set(TYPES) - set(configuration.MEMORY_ON_RESUME)):
        print(
            f"warning: resume with {'; '.join(memory)}: results may differ in their last bits",
            file=sys.stderr,
        )
    if config.max_steps != old.max_steps:
        _print_learning_rates(old, config, max(checkpoint.steps(folder), default=0))
    if _last_step(config, folder) != _last_step(old, folder):
        set_aside(folder, "evaluation.json")
        set_aside(folder, "evaluation-trained.jsonl")
    if config.num_eval != old.num_eval:
        set_aside(folder, "evaluation*")
    started = (folder / "config.yaml").stat()
    with files.written_whole(folder / "config.yaml") as path:
        configuration.to_yaml(config, path)
        # The file's time is when the run started: it names the newest run, and the run of a tracker.
        os.utime(path, ns=(started.st_atime_ns, started.st_mtime_ns))


def _print_learning_rates(old: Config, new: Config, done: int) -> None:
    before, now = (
        scheduled_learning_rate(
            done,
            peak=config.learning_rate,
            total_steps=config.max_steps,
            warmup_steps=config.warmup_steps,
            schedule=config.lr_scheduler_type,
        )
        for config in (old, new)
    )
    print(
        f"max_steps {old.max_steps} -> {new.max_steps}: the schedule is recomputed. Learning rate of step "
        f"{done + 1}: {now:.3g}; with {old.max_steps} steps it was {before:.3g}"
    )


def set_aside(folder: Path, pattern: str) -> None:
    """Renames the evaluation files that match to `step-000016-NAME`, so that no evaluation continues them."""
    step = max(checkpoint.steps(folder), default=0)
    for path in folder.glob(pattern):
        path.rename(folder / f"step-{step:06d}-{path.name}")


# --- disk space ------------------------------------------------------------------------------------------
#
# A checkpoint has the weights and, in `trainer/`, float32 masters and two moments. With LoRA these are the
# adapter's; only `start/` has the whole model. Logs, which take some 3 kB per episode, are left out.


def start_bytes(parts: Parts) -> int:
    """Bytes of the stored weights of the whole model."""
    count = sum(tensor.numel() for tensor in weights.hf_tensors(parts.model).values())
    return count * (parts.model.source.dtype.itemsize if parts.model.source else 4)


def checkpoint_bytes(parts: Parts) -> int:
    """Bytes of the weights in a checkpoint: the whole model or, with LoRA, the adapter."""
    if not parts.config.lora_r:
        return start_bytes(parts)
    return sum(tensor.nbytes for tensor in lora.peft_tensors(parts.model).values())


def _trainer_bytes(parts: Parts) -> int:
    return 12 * sum(p.numel() for p in parts.model.parameters() if p.requires_grad)


def check_disk(config: Config, parts: Parts, folder: Path) -> None:
    """Raises RunDirError if the next checkpoint and, in a new run, `start/` do not fit."""
    done = max(checkpoint.steps(folder), default=0)
    needed = 0 if (folder / "start").is_dir() else start_bytes(parts)
    if done < config.max_steps:
        needed += checkpoint_bytes(parts) + _trainer_bytes(parts)
    if (free := files.free_bytes(folder)) < needed:
        raise files.RunDirError(
            f"the disk is too small: {folder} needs {needed / 1e9:.3g} GB to save its "
            f"{'next' if done else 'first'} checkpoint, {free / 1e9:.3g} GB are free; make room, or choose "
            "another output_dir. For the checkpoints after it, lower save_total_limit or raise save_steps"
        )


def disk_use(config: Config, parts: Parts, folder: Path) -> str:
    """What a new run will take on disk, in one line, and whether that is too much."""
    start, model = start_bytes(parts) / 1e9, checkpoint_bytes(parts) / 1e9
    trainer = _trainer_bytes(parts) / 1e9
    every = 1 if config.eval_steps else config.save_steps or config.max_steps  # each best step is saved
    saves = -(-config.max_steps // every)
    kept = min(config.save_total_limit + bool(config.eval_steps), saves)
    most = start + min(kept + 1, saves) * (model + trainer)  # the oldest goes once the newest is complete
    left = start + kept * model + trainer
    free = files.free_bytes(folder) / 1e9
    too_little = (
        "; that is too little: lower save_total_limit, raise save_steps or choose another output_dir"
        if free < most
        else ""
    )
    return (
        f"disk: {start + model + trainer:.3g} GB for start/ and the first checkpoint, up to {most:.3g} GB "
        f"during the run (one checkpoint more than it keeps), {left:.3g} GB after it; {free:.3g} GB are "
        f"free{too_little}"
    )


def _finished(config: Config, folder: Path) -> bool:
    if config.num_eval:
        return (folder / "evaluation.json").exists()
    last = _last_step(config, folder)
    validation_due = config.eval_steps and last % config.eval_steps == 0
    return last in checkpoint.steps(folder) and (not validation_due or last in validated(folder))


def _last_step(config: Config, folder: Path) -> int:
    """The step at which RL ends, as far as the log tells."""
    patience = config.early_stopping_patience
    if patience and stops_early(shares := validated(folder), patience):
        return max(shares)
    return config.max_steps


def saved_weights(folder: Path | None) -> str:
    """Says where a failed run left weights, for the end of its error message."""
    saved = None
    if folder is None:
        pass
    elif checkpoint.steps(folder):
        saved = folder / "checkpoints"
    elif checkpoint.steps(folder / "warm_start"):
        saved = folder / "warm_start" / "checkpoints"
    elif (folder / "start").is_dir():
        saved = folder / "start"
    if saved is None:
        return "No weights were saved yet"
    return f"A new run can begin with the weights in {saved} (model_name_or_path)"
