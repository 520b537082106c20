"""A task of your own, trained for two steps: sort letters.

    python examples/own_task.py [--model FOLDER] [--KEY VALUE ...]

A task gives examples and judges answers; it knows nothing of tokens. docs/tasks.md has the whole contract.
Every setting of train.py may follow, such as --max_steps 200 for a longer run.
"""

import argparse
import random
import sys

import train
from grpo.config import Config
from grpo.tasks import Example, Verdict, register


@register("sorting")  # from now on `--task sorting` means this class
class Sorting:
    name = "sorting"
    system = "Sort the letters. Answer with the sorted letters only."
    reflection_instruction = "That was wrong. Say in one sentence what to do better."

    def __init__(self, length: int = 3) -> None:  # an option: --task_options length=4
        self.length = length

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        """The same problems in the same order every time; the first letter keeps the splits apart."""
        first = {"train": "abcdefghijklmnop", "validation": "qrst", "heldout": "uvwxyz"}[split]
        rng, words = random.Random(split), dict.fromkeys(())  # a dictionary drops repetitions
        while len(words) < offset + count:
            rest = rng.choices("abcdefghijklmnopqrstuvwxyz", k=self.length - 1)
            words[rng.choice(first) + "".join(rest)] = None
        return [Example(id=word, prompt=" ".join(word), data={"word": word}) for word in list(words)[offset:]]

    def verify(self, example: Example, text: str) -> Verdict:
        """Never raises. The reasons are counted in the log."""
        answer = text.replace(" ", "").strip()
        return Verdict("ok" if answer == "".join(sorted(example.data["word"])) else "wrong_order")

    def leaks(self, example: Example, reflection: str) -> bool:
        """Whether a reflection already contains the answer; only reported."""
        return "".join(sorted(example.data["word"])) in reflection


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains on a task of your own.", allow_abbrev=False)
    parser.add_argument("--model", default=Config.model_name_or_path, help="folder, Hub id or GGUF file")
    options, rest = parser.parse_known_args()
    small = "--warm_start_steps 0 --max_steps 2 --num_examples 16 --groups_per_step 2 --num_generations 2"
    small += " --eval_steps 0 --num_eval 8 --max_completion_length 12 --overlong_buffer 0"
    argv = ["--task", "sorting", "--model_name_or_path", options.model, "--run_name", "sorting"]
    sys.exit(train.main([*argv, *small.split(), "--max_reflection_length", "24", *rest]))
