"""Before any RL: how often does a retry after a reflection succeed, how long are reflections, are they good?

The model before RL attempts train problems until enough have failed, reflects once on each failure and
retries. Blind, shuffled and blanked retries are the controls. `sheet.html` shows 50 of the failures, chosen
by the seed, for a person to read and mark; its button gives the marks as JSON.
"""

from __future__ import annotations

import argparse
import html
import json
import random
from dataclasses import replace
from typing import Any

from grpo.evaluate import measure
from grpo.evaluate.comparison import ModelResult, model_figures
from grpo.experiments.outcome import Column, Outcome, Row, percent
from grpo.experiments.study import Study, joined
from grpo.run import build, files
from grpo.run.progress import Bar

QUESTION = "Before RL: how often does a retry succeed, how long are reflections, are they good?"
DEFAULTS: dict[str, Any] = {}
COLUMNS = {
    "what": Column("retry after"),
    "success": percent("retries right"),
    "failures": Column("failures", digits=0),
    "difference": percent("reflection minus this"),
}
MARKS = (
    "names what was wrong",
    "says something false",
    "helps with this problem only",
    "hands over the answer",
)
EXAMPLES = 50


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--failures",
        type=int,
        default=500,
        metavar="N",
        help="failures to reflect on; the paper's pilot has 500 to 1,000 (default: %(default)s)",
    )


def run(study: Study, options: argparse.Namespace) -> Outcome:
    if options.failures < 1:
        raise ValueError(f"failures must be at least 1, got {options.failures}")
    results = [_measure(study, seed, options.failures) for seed in options.seeds]
    result = joined(results)
    with files.written_whole(study.folder / "sheet.html") as path:
        path.write_text(sheet(result.failures, options.seeds[0]), encoding="utf-8")
    figures = model_figures(result)
    rows: list[Row] = [
        {"what": "a reflection", "success": figures["retry_success"], "failures": figures["num_failures"]}
    ]
    for name, control in figures["controls"].items():
        row = {"what": name, "success": control["success"], "failures": control["success"]["of"]}
        rows.append({**row, "difference": control["retry_minus_control"]})
    cut, length = figures["reflection_truncated"], figures["reflection_mean_length"]
    notes = [f"Reflections: {length:.1f} tokens on average, {cut:.1%} cut at the limit."]
    notes.append("sheet.html: examples to read and mark.")
    return Outcome(QUESTION, COLUMNS, rows, ("success",), notes, {"figures": figures})


def _measure(study: Study, seed: int, wanted: int) -> ModelResult:
    """Measures blocks of problems until enough have failed; blocks on the disk are not computed again."""
    start = study.start(seed)
    built = build.parts(replace(study.config, seed=seed), model_source=str(start / "start"))
    store = study.folder / f"records-seed{seed}.jsonl"
    count = measure.BLOCK * max(1, files.keep_whole_blocks(store))  # done by an earlier command
    with build.evaluation_sampling(built), Bar("failures", wanted, "failure") as bar:
        while True:
            examples = built.task.examples("train", count)
            result = measure.measure(built.rollout, examples, store=store, identity=f"seed {seed}")
            bar.update(min(wanted, len(result.failures)))
            if len(result.failures) >= wanted:
                return result
            count += measure.BLOCK


# --- the sheet ----------------------------------------------------------------------------------------------

STYLE = """body{font:16px/1.5 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}
section{border-top:1px solid #999;padding:1rem 0}pre{white-space:pre-wrap;background:#f4f4f4;padding:.5rem}
label{display:block}textarea{width:100%;height:8rem}"""
SCRIPT = """document.getElementById('give').onclick=()=>{const marks={};
for(const box of document.querySelectorAll('input'))(marks[box.name]??={})[box.value]=box.checked;
document.getElementById('marks').value=JSON.stringify(marks,null,1)}"""


def sheet(failures: list[dict[str, Any]], seed: int) -> str:
    """A self-contained page with EXAMPLES of the failures and boxes to mark each."""
    chosen = random.Random(f"sheet {seed}").sample(failures, min(EXAMPLES, len(failures)))
    sections = "\n".join(_section(number, record) for number, record in enumerate(chosen, 1))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Reflections to mark</title>'
        f"<style>{STYLE}</style><h1>Reflections to mark</h1><p>{len(chosen)} of {len(failures)} failures. "
        "Read each one, tick what is true of it, then copy the marks from the bottom of the page.</p>\n"
        f'{sections}\n<button id="give">Marks as JSON</button><textarea id="marks"></textarea>'
        f"<script>{SCRIPT}</script></html>\n"
    )


def _section(number: int, record: dict[str, Any]) -> str:
    name = html.escape(json.dumps(record["id"]), quote=True)
    parts_shown = [("Problem", record["prompt"], "")]
    parts_shown += [
        (label, record[turn]["text"], record[turn].get("reason", ""))
        for label, turn in (("First try", "first"), ("Reflection", "reflection"), ("Second try", "retry"))
    ]
    texts = "".join(
        f"<h3>{label}{f' ({html.escape(reason)})' if reason else ''}</h3><pre>{html.escape(text)}</pre>"
        for label, text, reason in parts_shown
    )
    boxes = "".join(
        f'<label><input type="checkbox" name="{name}" value="{mark}"> {mark}</label>' for mark in MARKS
    )
    return f"<section><h2>{number}</h2>{texts}{boxes}</section>"
