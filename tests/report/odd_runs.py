"""Parts of run directories for the tests of the report, and one that was written to attack the reader."""

import json
from pathlib import Path

from grpo.run import files

# Markup, a script, the ends of a JSON block and of a comment, quotes, bidi and control characters, and half
# of a surrogate pair.
ATTACK = (
    "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"
    "<!-- \"quotes\" & 'quotes' {{ 7 * 7 }} ]]> --> \u202egnirts\u2066 \u2028 \x00\x1b[2J \ud800"
)
LONG = ATTACK + 100_000 * "long"
FOLDER = "<img src=x onerror=attack()>'\"&"


def write_lines(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def episode(step: int, group: int, generation: int = 0, **changes: object) -> dict[str, object]:
    """A stored episode of nine tokens."""
    return {
        "step": step,
        "example_id": f"problem-{group}",
        "group_id": group,
        "generation": generation,
        "prompt_ids": [1, 2],
        "completion_ids": list(range(65, 74)),
        "roles": [["reflection", 4], ["context", 2], ["retry", 3]],
        "logprobs": [-0.1, -0.4, -1.2, -4.0, 0.0, 0.0, -0.2, -0.9, -2.0],
        "finish_reason": "stop",
        "reward": float(generation % 2),
        "advantage": generation % 2 - 0.5,
        "retry_finish_reason": "stop",
        "reasons": ["ok" if generation % 2 else "wrong"],
        "texts": {"prompt": f"Problem {group}?", "attempt": "No.", "reflection": "ABCD", "retry": "GHI"},
        **changes,
    }


def hostile(parent: Path) -> Path:
    """A run directory whose every name, text and number is an attack on its reader."""
    folder = parent / FOLDER
    folder.mkdir()
    plain = ATTACK.encode("utf-8", "replace").decode().replace("\u2028", " ").replace("\x1b", " ")
    settings = {
        "task": LONG,
        "model_name_or_path": ATTACK,
        "preset": "--help",
        "train_on": ATTACK,
        "seed": ATTACK,
    }
    settings["num_validation"] = "many"
    (folder / "config.yaml").write_text(
        "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()) + f"{plain}: {plain}\n"
    )
    metrics = {
        "step": 1,
        "reward": 0.5,
        ATTACK: 1.0,
        "kl": 1e300,
        "entropy": "low",
        "completions/mean_length": 1e999,
    }
    write_lines(
        folder / "metrics.jsonl",
        metrics,
        {"step": 1, "validation/second_try": 7.5, "validation/first_try": -3},
        {"step": ATTACK, "warning": ATTACK, "advice": LONG},
        [ATTACK],
        {"step": int("9" * 400), "reward": 1},
    )
    write_lines(folder / "timings.jsonl", {"step": 1, "step_time": 3.0, f"{ATTACK}_time": 1.0})
    write_lines(folder / "stages.jsonl", {"stage": ATTACK, "seconds": "long"}, {"stage": LONG, "seconds": 1})
    write_lines(folder / "failures.jsonl", {"block": 0, "examples": 2, "failed": 1, "reasons": {ATTACK: 2}})
    texts = {"prompt": ATTACK, "attempt": LONG, "reflection": LONG, "retry": ATTACK, ATTACK: ATTACK}
    odd = {"reasons": [ATTACK, 5], "texts": texts, "completion_ids": [ATTACK] * 9, "roles": [ATTACK] * 9}
    files.append_jsonl(
        folder / "episodes.jsonl.gz",
        episode(1, 0, 0, example_id=ATTACK, **odd),
        episode(1, 0, 1, reward="much", advantage=None, texts=texts, roles="reflection", reasons=None),
        episode(1, 1, 0, texts=ATTACK, logprobs=[ATTACK] * 9),
        episode(1, 2, 0, roles=[["reflection", 2**62], ["context", -5], [ATTACK, 9], 5, []]),
        episode(1, 3, 0, roles=[["reflection", 2**62]]),
    )
    turn = {"text": LONG, "reason": ATTACK}
    answers = [
        {"id": i, "prompt": ATTACK, "first": turn, "reflection": turn, "retry": turn} for i in range(9)
    ]
    write_lines(folder / "evaluation-before_rl.jsonl", *answers)
    write_lines(folder / "evaluation-trained.jsonl", *answers)
    evaluation = {
        "num_problems": ATTACK,
        "models": {ATTACK: {"first_try": ATTACK}},
        "comparisons": [{"before": "before_rl", "after": "trained", "second_try": ATTACK}],
        "examples": [{"id": ATTACK, "prompt": ATTACK, "before": {"first": turn}, "after": {}}],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder
