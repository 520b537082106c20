"""Your data and your reward function, trained for two steps: sentences with a given number of words.

    python examples/own_reward.py [--model FOLDER] [--KEY VALUE ...]

The data are one JSON object per line, here written by this script; the function has TRL's signature. A score
of 1 is right, and with `reward: score` an answer that is nearly right earns more than one that is far off.
docs/tasks.md lists the other formats and verifiers. Every setting of train.py may follow.
"""

import argparse
import json
import sys
from pathlib import Path

PROBLEMS = Path("word_counts.jsonl")  # in the current directory; put your own lines there and start again
TOPICS = "rain bread music winter bridges maps tea horses clouds trains salt birds".split()


def word_count(completions: list[str], words: list[int], **columns: list) -> list[float]:
    """1 for the wanted number of words, less for each word too few or too many, and at least 0.

    Args:
        completions: the answers.
        words: the column `words`, one value per answer; each column of the file is such an argument.
    """
    lengths = [len(completion.split()) for completion in completions]
    return [max(0.0, 1 - abs(length - n) / n) for length, n in zip(lengths, words, strict=True)]


def write_problems() -> None:
    rows = [
        {"prompt": f"Write one sentence about {topic}. Use exactly {words} words.", "words": words}
        for topic in TOPICS
        for words in range(4, 12)
    ]
    PROBLEMS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":  # the function runs in a process of its own, which imports this file without torch
    import train
    from grpo.config import Config

    parser = argparse.ArgumentParser(description="Trains with your own reward function.", allow_abbrev=False)
    parser.add_argument("--model", default=Config.model_name_or_path, help="folder, Hub id or GGUF file")
    options, rest = parser.parse_known_args()
    if not PROBLEMS.exists():
        write_problems()
    data = json.dumps({"path": str(PROBLEMS), "verifier": f"function:{Path(__file__).resolve()}:word_count"})
    small = "--warm_start_steps 0 --max_steps 2 --num_examples 16 --groups_per_step 2 --num_generations 2"
    small += " --eval_steps 0 --num_eval 8 --max_completion_length 24 --overlong_buffer 0 --reward score"
    argv = ["--task", "dataset", "--task_options", data, "--model_name_or_path", options.model]
    argv += ["--run_name", "word_counts", *small.split(), "--max_reflection_length", "24", *rest]
    status = train.main(argv)
    if status == 0:
        print("episodes.jsonl.gz has the `scores` of each retry; metrics.jsonl their mean, verdicts/score")
    sys.exit(status)
