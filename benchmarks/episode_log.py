"""How large are stored episodes, and how long does it take to write those of a step and to find their groups?

    python benchmarks/episode_log.py
    python benchmarks/episode_log.py --groups 8 --rounds 9

Compares `episodes.jsonl.gz` with its text before compression, and with the form of earlier versions: one role
per token, all digits of the log-probs, no compression, one write per episode.

`paper` has episodes of the paper's sizes: prompts of 500 tokens (the task 300, the failed attempt and the
instruction 100 each), reflections of 256, the task again, retries of 100. The texts are stretches of docs/ at
random places, so the members of a group have less in common than real reflections. Log-probs are drawn at
random. `tiny` is a step of the tests' model. Times are seconds of the processor, which a busy machine hardly
changes.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

from lib.measure import command_line, hide_benchmarks, markdown  # noqa: E402

hide_benchmarks()
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

import tiny  # noqa: E402
import torch  # noqa: E402

from grpo.config import Config  # noqa: E402
from grpo.episode import Episode  # noqa: E402
from grpo.model import weights  # noqa: E402
from grpo.report.data import whole_lines  # noqa: E402
from grpo.run.files import append_jsonl, open_log  # noqa: E402

TASK, ATTEMPT, INSTRUCTION, REFLECTION, RETRY = 300, 100, 100, 256, 100  # tokens
GENERATIONS = 8
STEPS = 1750  # of the paper's longest runs
MEAN_LOGPROB = -0.5  # nats
EARLIER = "earlier versions"
FORMS = {EARLIER: "episodes.jsonl", "before compression": "episodes.jsonl", "now": "episodes.jsonl.gz"}
COLUMNS = [
    ("episodes", "{}"),
    ("form", "{}"),
    ("bytes each", "{:,.0f}"),
    (f"GB in {STEPS:,} steps", "{:.2f}"),
    ("write a step, s", "{:.3f}"),
    ("find its groups, s", "{:.3f}"),
]


def paper(tokenizer: Any, groups: int, seed: int = 0) -> list[Episode]:
    """Synthetic episodes of one step."""
    rng = random.Random(seed)
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    corpus = tokenizer.encode(pages, add_special_tokens=False)
    instruction = corpus[:INSTRUCTION]  # the same for all

    def stretch(length: int) -> list[int]:
        start = rng.randrange(len(corpus) - length)
        return corpus[start : start + length]

    def nats(length: int) -> list[float]:
        return torch.tensor([-rng.expovariate(-1 / MEAN_LOGPROB) for _ in range(length)]).tolist()

    episodes = []
    for group in range(groups):
        task, attempt = stretch(TASK), stretch(ATTEMPT)
        for generation in range(GENERATIONS):
            reflection, retry = stretch(REFLECTION), stretch(RETRY)
            turns = {"prompt": task, "attempt": attempt, "reflection": reflection, "retry": retry}
            episodes.append(
                Episode(
                    example_id=f"train-{rng.randrange(20_000)}",
                    group_id=group,
                    generation=generation,
                    prompt_ids=[*task, *attempt, *instruction],
                    completion_ids=[*reflection, *task, *retry],
                    roles=["reflection"] * REFLECTION + ["context"] * TASK + ["retry"] * RETRY,
                    logprobs=[*nats(REFLECTION), *[0.0] * TASK, *nats(RETRY)],
                    finish_reason="stop",
                    reward=float(rng.random() < 0.5),
                    advantage=rng.gauss(0, 1),
                    reasons=["wrong_value"],
                    texts={name: tokenizer.decode(ids) for name, ids in turns.items()},
                )
            )
    return episodes


def write(path: Path, episodes: list[Episode], form: str) -> None:
    """Writes a step as train.py does, or did."""
    if form == EARLIER:
        for episode in episodes:
            append_jsonl(path, {"step": 1, **vars(episode)})
    else:
        append_jsonl(path, *({"step": 1, **episode.to_json()} for episode in episodes))


def measure(name: str, episodes: list[Episode], rounds: int) -> list[dict[str, Any]]:
    """A row for each form. Times are medians."""
    rows = []
    for form, file_name in FORMS.items():
        sizes, writing, finding = set(), [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, file_name)
                start = time.process_time()
                write(path, episodes, form)
                written = time.process_time()
                with open_log(path) as file:
                    assert sum(1 for _ in whole_lines(file)) == len(episodes)
                finding.append(time.process_time() - written)
                writing.append(written - start)
                sizes.add(path.stat().st_size)
        (size,) = sizes  # the same in each round
        total = size * STEPS / 1e9
        times = statistics.median(writing), statistics.median(finding)
        cells = f"{name}, {len(episodes)}", form, size / len(episodes), total, *times
        rows.append(dict(zip((column for column, _ in COLUMNS), cells, strict=True)))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    demo = Config().model_name_or_path
    parser.add_argument("--model", default=demo, help="whose tokenizer is used (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=32, help="of `paper` in a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        _, tokenizer = weights.load(arguments.model, dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = tiny.build()
    workloads = {"paper": paper(tokenizer, arguments.groups), "tiny": tiny.episodes(parts)}
    rows = [row for name, episodes in workloads.items() for row in measure(name, episodes, arguments.rounds)]
    print(markdown(COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
