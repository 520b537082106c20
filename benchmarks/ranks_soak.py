"""Kills one of several ranks, again and again, and resumes: is anything lost, and is the end the same?

    python benchmarks/ranks_soak.py                  100 kills, of 2 and 3 ranks, replicate and fsdp
    python benchmarks/ranks_soak.py --kills 20 --sizes 2 --modes fsdp --seed 7

Each round starts a tiny run (tests/tiny_run.py) under torchrun's agent. A random rank kills itself with
SIGKILL at a random moment of a rollout, an update or a save. Then `--resume auto` continues the run with as
many ranks. The table has, by moment: kills, the longest time from a kill until all ranks had ended, saved
steps that were gone afterwards, and how many runs ended with other bytes than an undisturbed one. A moment
that the run does not reach is drawn again.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent  # no package
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "tests")]

from lib.measure import command_line, machine  # noqa: E402
from ranks import Signal, torchrun  # noqa: E402
from tiny_run import Moment, arguments, contents, save_model  # noqa: E402

from grpo.run import checkpoint  # noqa: E402

SETTINGS = {
    "warm_start_steps": 2,
    "num_examples": 8,
    "max_steps": 3,
    "eval_steps": 0,
    "num_eval": 0,
    "max_completion_length": 5,
    "max_reflection_length": 6,
}
# (target, calls of it in a run on any rank, at least): a call is drawn from them.
MOMENTS = {
    "rollout": [("grpo.sampler.engine:Sampler._decode", 30), ("tiny:Toy.verify", 10)],
    "update": [
        ("grpo.learner.learner:Learner._backward", 4),
        ("grpo.learner.optimizer:MasterAdamW.step", 4),
        ("grpo.distributed:gather", 200),
    ],
    "save": [
        ("grpo.run.checkpoint:save", 3),
        ("grpo.model.shards:ShardWriter._blocks", 100),
        ("grpo.run.checkpoint:prune", 3),
    ],
}


@dataclass
class Row:
    kills: int = 0
    seconds: float = 0.0
    lost: int = 0
    different: int = 0


def round_of(
    folder: Path, model: Path, size: int, mode: str, signal: Signal, expected: dict[str, bytes]
) -> tuple[float, int, bool] | None:
    """Seconds until all ranks had ended, steps lost, and whether the end is equal; None: not reached."""
    output, run = folder / "runs", folder / "runs" / "tiny-001"
    argv = [*arguments(model, output, **SETTINGS, parallel=mode), "--resume", "auto"]
    status, _ = torchrun(size, argv, [signal], output=folder / "killed")
    ended = time.time()
    note = Path(signal.note)
    if status == 0 or not note.exists():
        return None
    killed = note.stat().st_mtime
    complete = [
        step
        for step in range(1, SETTINGS["max_steps"] + 1)
        if (path := checkpoint.path_of(run, step) / checkpoint.STATE).exists()
        and path.stat().st_mtime < killed
    ]
    saved = checkpoint.latest(run)  # raises if it is damaged
    lost = max(complete, default=0) - (checkpoint.step_of(saved) if saved else 0)
    status, printed = torchrun(size, argv, output=folder / "resumed")
    if status:
        print(printed)
    # Killed before its settings were stored, a run begins anew in a second directory.
    return ended - killed, max(0, lost), status == 0 and contents(max(output.iterdir())) == expected


def report(rows: dict[str, Row]) -> str:
    lines = [
        "| killed in | kills | seconds until all ranks ended, most | saved steps lost | ends that differ |"
    ]
    lines.append("|" + "---|" * 5)
    lines += [
        f"| {name} | {row.kills} | {row.seconds:.1f} | {row.lost} | {row.different} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--kills", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long; 0: when all are done")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 3], help="ranks (default: 2 3)")
    parser.add_argument("--modes", nargs="+", default=["replicate", "fsdp"], choices=["replicate", "fsdp"])
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments_ = parser.parse_args(argv)
    print(", ".join(f"{key}: {value}" for key, value in machine("cpu").items()), flush=True)
    draw, rows = random.Random(arguments_.seed), {name: Row() for name in MOMENTS}
    cases = [(size, mode) for size in arguments_.sizes for mode in arguments_.modes]
    begun, done = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="ranks-soak-") as temporary:
        root = Path(temporary)
        model = save_model(root / "model")
        undisturbed: dict[tuple[int, str], dict[str, bytes]] = {}
        while done < arguments_.kills and (
            not arguments_.minutes or time.monotonic() - begun < 60 * arguments_.minutes
        ):
            size, mode = case = cases[done % len(cases)]
            if case not in undisturbed:
                output = root / f"{size} {mode}"
                status, printed = torchrun(
                    size,
                    arguments(model, output, **SETTINGS, parallel=mode),
                    output=root / f"{size} {mode} printed",
                )
                assert status == 0, printed
                undisturbed[case] = contents(output / "tiny-001")
            name = list(MOMENTS)[done % len(MOMENTS)]
            target, calls = draw.choice(MOMENTS[name])
            with tempfile.TemporaryDirectory(dir=root) as folder:
                moment = Moment(target, draw.randrange(1, calls + 1))
                signal = Signal(draw.randrange(size), moment, note=str(Path(folder) / "now"))
                result = round_of(Path(folder), model, size, mode, signal, undisturbed[case])
            if result is None:
                continue
            seconds, lost, equal = result
            row = rows[name]
            row.kills += 1
            row.seconds, row.lost = max(row.seconds, seconds), row.lost + lost
            row.different += not equal
            done += 1
            print(
                f"{done}: {size} ranks, {mode}, rank {signal.rank} before call {moment.call} of {target}: "
                f"{seconds:.1f} s, {lost} lost, {'equal' if equal else 'DIFFERENT'}",
                flush=True,
            )
    print(f"\n{report(rows)}")
    return int(any(row.lost or row.different for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
