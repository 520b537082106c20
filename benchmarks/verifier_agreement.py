"""Does our function-calling verifier agree with the Berkeley leaderboard's checker on the leaderboard's data?

    python benchmarks/verifier_agreement.py                 the table, and an example of each disagreement
    python benchmarks/verifier_agreement.py --output DIR    the same, and all of them in DIR, as CSV and JSON

Both judge every answer in the files, and the same answers with one change each: another case, a number as a
string, an argument less, and so on. docs/verifiers.md says who is right where they differ. It runs in seconds
and needs the package bfcl-eval without its requirements. The checker looks up in a table whether a model
cannot write dots in names. Importing that table would load every provider's client, so a table that always
says no replaces it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo.experiments.answers import Calls, Truth, changed_answers, right_answers
from grpo.run.files import read_jsonl
from grpo.tasks.function_calling import verify
from grpo.tasks.function_calling.berkeley import CATEGORIES, INSTALL

Checker = Callable[[list[dict[str, Any]], Calls, Truth, str], bool | None]

COLUMNS = ("answers", "both accept", "both reject", "only bfcl accepts", "only ours accepts", "bfcl raises")


def load_checker() -> Checker:
    """bfcl-eval's checker: (functions, calls, truth, category) -> right or not, None where it raises."""

    class NoDotsReplaced(dict[str, Any]):
        def __missing__(self, model: str) -> Any:
            return types.SimpleNamespace(underscore_to_dot=False)

    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = NoDotsReplaced()  # type: ignore[attr-defined]
    sys.modules.setdefault(table.__name__, table)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(functions: list[dict[str, Any]], calls: Calls, truth: Truth, category: str) -> bool | None:
        output = [{name: args} for name, args in calls]
        try:
            return bool(ast_checker(functions, output, truth, Language.PYTHON, category, "any")["valid"])
        except Exception:  # an answer that it raises on is a result, whatever the class
            return None

    return check


# --- the comparison -----------------------------------------------------------------------------------------


def entries(folder: Path) -> Iterator[tuple[str, dict[str, Any], Truth]]:
    """(category, entry, truth) of every example with an answer."""
    for category in CATEGORIES:
        answers = folder / "possible_answer" / f"BFCL_v4_{category}.json"
        if answers.exists():
            truths = {line["id"]: line["ground_truth"] for line in read_jsonl(answers)}
            for entry in read_jsonl(folder / f"BFCL_v4_{category}.json"):
                yield category, entry, truths[entry["id"]]


def compare(check: Checker, folder: Path) -> tuple[dict[str, Counter[str]], dict[tuple[str, str], list[Any]]]:
    """Counts by kind of answer, and disagreements by (kind, column)."""
    counts: dict[str, Counter[str]] = {}
    disagreements: dict[tuple[str, str], list[Any]] = {}
    for category, entry, truth in entries(folder):
        gold = [{"name": name, "arguments": args} for call in truth for name, args in call.items()]
        for kinds in (right_answers(truth), changed_answers(truth)):
            for kind, calls in kinds:
                text = json.dumps(
                    [{"name": name, "arguments": args} for name, args in calls], ensure_ascii=False
                )
                reason = verify(text, gold, accepted=True).reason
                column = column_of(check(entry["function"], calls, truth, category), reason == "ok")
                row = counts.setdefault(kind, Counter())
                row.update(["answers", column])
                if not column.startswith("both"):
                    example = {"id": entry["id"], "answer": text, "ours": reason, "accepted": gold}
                    disagreements.setdefault((kind, column), []).append(example)
    return counts, disagreements


def column_of(theirs: bool | None, ours: bool) -> str:
    if theirs is None:
        return "bfcl raises"
    if theirs == ours:
        return "both accept" if ours else "both reject"
    return "only ours accepts" if ours else "only bfcl accepts"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for agreement.csv and agreement.json")
    parser.add_argument("--examples", type=int, default=1, help="examples printed of each disagreement")
    arguments = parser.parse_args(argv)
    try:
        check = load_checker()
    except ModuleNotFoundError as error:
        print(f"skipped: no module {error.name}; {INSTALL}", file=sys.stderr)
        return 0
    import bfcl_eval

    counts, disagreements = compare(check, Path(bfcl_eval.__path__[0]) / "data")
    print(f"{'kind of answer':34}" + "".join(f"{column:>19}" for column in COLUMNS))
    for kind, row in counts.items():
        print(f"{kind:34}" + "".join(f"{row[column]:19}" for column in COLUMNS))
    for (kind, column), examples in disagreements.items():
        for example in examples[: arguments.examples]:
            print(
                f"\n{column}: {kind}\n  {example['id']}, ours: {example['ours']}\n  {example['answer'][:300]}"
            )
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with (arguments.output / "agreement.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["kind", *COLUMNS])
            writer.writerows([kind, *(row[column] for column in COLUMNS)] for kind, row in counts.items())
        listed = [
            {"kind": kind, "column": column, **example}
            for (kind, column), examples in disagreements.items()
            for example in examples
        ]
        (arguments.output / "agreement.json").write_text(
            json.dumps(listed, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
