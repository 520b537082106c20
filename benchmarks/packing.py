"""How many tokens the learner computed in a run, and how many it would have computed without sharing.

    python benchmarks/packing.py runs/demo-001

For each step of the warm start and of RL, the tokens of three layouts of the same sequences, each up to its
last trained token:

    padded         one row per sequence; prompts and completions each padded to the step's longest
    prompts once   a prompt once for all of its completions
    prefixes once  as grpo/learner/packing.py packs them

Counted from the run's files, not timed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

from lib.measure import command_line  # noqa: E402

from grpo import config, warmstart  # noqa: E402
from grpo.episode import Episode  # noqa: E402
from grpo.learner.packing import pack_sequences  # noqa: E402
from grpo.model import weights  # noqa: E402
from grpo.run import build, files  # noqa: E402
from grpo.tasks import get_task  # noqa: E402

LAYOUTS = ("padded", "prompts once", "prefixes once")


def count(groups: list[warmstart.TrainingSequence], max_tokens: int) -> dict[str, int]:
    """Tokens of a step by layout."""
    trained = [
        (len(prompt), max(i + 1 for i, counts in enumerate(mask) if counts))
        for prompt, completions in groups
        for _, mask in completions
        if any(mask)
    ]
    longest = [max(lengths) for lengths in zip(*trained, strict=True)]
    return {
        "padded": len(trained) * sum(longest),
        "prompts once": sum(len(prompt) for prompt, _ in groups) + sum(length for _, length in trained),
        "prefixes once": sum(batch.num_tokens for batch in pack_sequences(groups, max_tokens=max_tokens)),
    }


def warm_start_steps(run: Path, settings: config.Config) -> Iterator[list[warmstart.TrainingSequence]]:
    """The run's transcripts, which are a function of its settings."""
    task = get_task(settings.task, settings.task_options)
    chat = build.build_chat(settings, *weights.load(str(run / "start")))
    batch = warmstart.by_step(task, chat, settings)  # type: ignore[arg-type]  # it wrote them then
    for step in range(settings.warm_start_steps):
        yield batch(step=step)


def rl_steps(run: Path, settings: config.Config) -> Iterator[list[warmstart.TrainingSequence]]:
    """Whole groups, including completions without a gradient, which the learner leaves out."""
    stored = files.read_jsonl(config.current_file(run, "episodes.jsonl.gz"))
    for _, lines in groupby(stored, key=lambda line: line["step"]):
        groups: dict[int, warmstart.TrainingSequence] = {}
        for episode in map(Episode.from_json, lines):
            completions = groups.setdefault(episode.group_id, (episode.prompt_ids, []))[1]
            completions.append((episode.completion_ids, episode.loss_mask(settings.train_on)))
        yield list(groups.values())


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    parser.add_argument("run", type=Path, help="a run directory of train.py")
    run = parser.parse_args(argv).run
    try:
        settings = config.load(run / "config.yaml")
        stages = {"warm start": warm_start_steps, "RL": rl_steps}
        if not settings.warm_start_steps:
            del stages["warm start"]
        print(f"{'tokens per step, mean':24}" + "".join(f"{layout:>16}" for layout in LAYOUTS) + "   saved")
        for stage, steps in stages.items():
            counted = [count(groups, settings.max_tokens_per_micro_batch) for groups in steps(run, settings)]
            if not counted:
                raise ValueError(f"{run} has no step of {stage} yet")
            means = [statistics.fmean(step[layout] for step in counted) for layout in LAYOUTS]
            saved = 1 - means[2] / means[1]
            label = f"{stage}, {len(counted)} steps"
            print(f"{label:24}" + "".join(f"{mean:16.0f}" for mean in means) + f"{saved:8.0%}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
