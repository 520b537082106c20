"""`python -m grpo.export RUN --to FOLDER`: the weights of a run as a model that others can use.

Writes a Hugging Face folder with a model card, or, if the name ends in .gguf, a file for llama.cpp. The
adapter of a LoRA run is merged into the weights; alone, as a PEFT folder, it is the run's checkpoint. The
card says only what the run directory proves: settings, data, results with their intervals, versions. It shows
no paths of this machine.

Left out: uploading. The command prints the line that does it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from grpo.run.interrupts import EXIT_INTERRUPTED, Interrupts, set_up_process

if __name__ == "__main__":
    set_up_process()  # before the imports below, which take seconds

from grpo import config as configuration
from grpo.chat import Chat
from grpo.config import COMMAND_LINE_ONLY, Config
from grpo.evaluate.comparison import STAGES, read_report
from grpo.model import gguf, weights
from grpo.run import build, checkpoint, files
from grpo.run.state import saved_model, validated
from grpo.tasks import get_task, opening

TAG = "reflect-grpo"  # in the card of every export, or the metadata of its GGUF file
EXPORTED = re.compile(r"README\.md|chat_template\.jinja|tokenizer\.model|.*\.json|model.*\.safetensors")
UNKNOWN_LICENCE = "unknown: check the base model's licence"
OF_THIS_MACHINE = (*COMMAND_LINE_ONLY, "output_dir", "run_name", "device", "threads", "report_to")

# --- the command --------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m grpo.export",
        description="Writes the weights of a run as a Hugging Face folder with a model card, or as a GGUF "
        "file. A LoRA run's adapter is merged into the weights. Uploads nothing.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.",
        allow_abbrev=False,
    )
    command.add_argument("run", metavar="RUN", help="run directory")
    add = command.add_argument
    add("--to", required=True, metavar="PATH", help="folder to make, or FILE.gguf (needs the package gguf)")
    add(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="best (by validation), newest, start (right before RL) or the number of a step (default: "
        "%(default)s)",
    )
    add(
        "--dtype",
        choices=sorted(build.DTYPES),
        help="of the weights (default: the run's, which loses nothing)",
    )
    add("--overwrite", action="store_true", help="replace an earlier export")
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status."""
    options = parser().parse_args(argv)
    to = Path(options.to)
    try:
        with Interrupts():
            export(Path(options.run), to, options.checkpoint, options.dtype, overwrite=options.overwrite)
    except (checkpoint.CheckpointError, files.RunDirError, OSError) as error:
        status = 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
        print(f"error: {error}", file=sys.stderr)
        return status
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"wrote {to}\nTo publish it: hf upload USER/{name_of(to)} {shlex.quote(str(to))}")
    return 0


def export(
    run: Path, to: Path, which: str = "newest", dtype: str | None = None, *, overwrite: bool = False
) -> None:
    """Writes a run's weights to `to`: a GGUF file if the name ends in .gguf, otherwise a folder.

    Args:
        which: best, newest, start or the number of a step.
        dtype: a key of `build.DTYPES`; None: the run's.
    Raises:
        ValueError, FileNotFoundError: no run, no such checkpoint, or a target that must not be replaced.
        CheckpointError: the checkpoint is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"RUN must be a run directory (with config.yaml), got {run}")
    config = configuration.load(run / "config.yaml")
    check_target(to, run, overwrite)
    source = saved_model(run, which)
    if dtype is None:
        dtype = config.dtype if config.dtype in build.DTYPES else "float32"
    model, tokenizer = weights.load(source, dtype=build.DTYPES[dtype])
    chat = build.build_chat(config, model, tokenizer)
    licence = base_licence(config.model_name_or_path)
    with files.written_whole(to) as partial:
        if to.suffix == ".gguf":
            gguf.write(
                partial,
                model.config,
                weights.hf_tensors(model),
                tokenizer,
                dtype=build.DTYPES[dtype],
                stop_token_ids=chat.stop_token_ids,
                name=f"{run.resolve().name} {source.name}",
                tags=[TAG],
                license=licence,
            )
        else:
            weights.save(model, tokenizer, partial, build.DTYPES[dtype], stop_ids=chat.stop_token_ids)
            (partial / "README.md").write_text(card(run, source, config, chat, to, licence), encoding="utf-8")


def check_target(to: Path, run: Path, overwrite: bool) -> None:
    """Raises ValueError unless `to` is free, or an earlier export that may be replaced."""
    if to.suffix == ".gguf":
        if to.is_dir():
            raise ValueError(f"to must be a file if it ends in .gguf, got the folder {to}")
        earlier = to.is_file()
        if earlier and overwrite and not is_gguf_export(to):
            raise ValueError(f"to must be a new file or an earlier export, got {to}, which is another file")
    else:
        if to.suffix.lower() == ".gguf":
            raise ValueError(f"to must end in .gguf in lower case for a GGUF file, got {to}")
        if to.exists() and not to.is_dir():
            raise ValueError(f"to must be a folder or end in .gguf, got the file {to}")
        earlier = to.is_dir() and any(to.iterdir())
        if run.resolve().is_relative_to(to.resolve()) or (earlier and not is_export(to)):
            raise ValueError(
                f"to must be a new folder or an earlier export, got {to}, which has something else"
            )
    if earlier and not overwrite:
        raise ValueError(
            f"to must not exist, got {to}: choose another name, or pass --overwrite to replace it"
        )


def is_export(folder: Path) -> bool:
    """Whether an export wrote the folder, and nobody added anything: only then may it be deleted."""
    card = folder / "README.md"
    if not card.is_file() or f"\n- {TAG}\n" not in card.read_text(encoding="utf-8", errors="replace"):
        return False
    return all(file.is_file() and EXPORTED.fullmatch(file.name) for file in folder.iterdir())


def is_gguf_export(file: Path) -> bool:
    """Whether an export wrote the GGUF file."""
    try:
        return TAG in gguf.GGUFFile(file).tags
    except ValueError:  # it is damaged, or of another kind
        return False


def name_of(to: Path) -> str:
    return to.resolve().name.removesuffix(".gguf")


# --- the model card -----------------------------------------------------------------------------------------


def card(run: Path, source: Path, config: Config, chat: Chat, to: Path, licence: str | None) -> str:
    """README.md of the folder: front matter for the Hub, then what a reader needs."""
    base, from_hub = base_model(config.model_name_or_path)
    step = None if source.name == "start" else checkpoint.step_of(source)
    trained = "right before RL" if step is None else f"after step {step} of {config.max_steps}"
    parts = [
        front_matter(config, base if from_hub else None, licence),
        f"# {name_of(to)}",
        f"{base}, trained with GRPO to reflect on its failures and to try again (Reflect, Retry, Reward, "
        f"[arXiv 2505.24726](https://arxiv.org/abs/2505.24726)). Task: {config.task}. These are the weights "
        f"{trained}.\n\nLicence: {licence or UNKNOWN_LICENCE}.",
        f"## Use\n\n{usage(config, chat, to)}",
        f"## Results\n\n{results(run, step)}",
        f"## Training\n\n{training(config, run)}",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(config: Config, base: str | None, licence: str | None) -> str:
    task = re.sub(r"[^a-z0-9]+", "-", config.task.rpartition(":")[2].lower()).strip("-")
    tags = "".join(f"- {tag}\n" for tag in (TAG, "grpo", "reinforcement-learning", task))
    return (
        f"---\nlicense: {licence or 'unknown'}\n"
        + (f"base_model: {base}\n" if base else "")
        + f"library_name: transformers\npipeline_tag: text-generation\ntags:\n{tags}---"
    )


def usage(config: Config, chat: Chat, to: Path) -> str:
    """Three lines of Python that put a problem of the task to the model, and what to say after a failure."""
    try:
        task = get_task(config.task, config.task_options)
        (example,) = task.examples("heldout", 1)
        messages, instruction = opening(task, example, chat)["messages"], task.reflection_instruction
    except Exception:  # the task or its data are not on this machine, or a task of the user's fails
        messages, instruction = [{"role": "user", "content": "..."}], "Reflect on what went wrong."
    return (
        "```python\nfrom transformers import pipeline\n"
        f"messages = {json.dumps(messages, ensure_ascii=False)}\n"
        f'print(pipeline("text-generation", "USER/{name_of(to)}")(messages, max_new_tokens='
        f'{config.max_completion_length})[0]["generated_text"][-1]["content"])\n```\n\n'
        f"After a wrong answer, say *{instruction}*, let the model reflect, and give the problem again."
    )


def results(run: Path, step: int | None) -> str:
    """The table of evaluation.json, and what it says about these weights."""
    second_tries = validated(run)
    validation = ""
    if step in second_tries:
        count = configuration.load(run / "config.yaml").num_validation
        validation = (
            f"On {count} validation problems, second tries are right in {100 * second_tries[step]:.1f}%."
        )
    if not (run / "evaluation.json").is_file():
        return validation or "Not measured."
    report = read_report(run / "evaluation.json")
    this = "before_rl" if step is None else "trained" if step == max(checkpoint.steps(run)) else None
    settings = report["settings"]
    sampling = "greedy" if settings["greedy"] else f"temperature {settings['temperature']:g}"
    lines = [
        f"Right answers in percent, with 95% intervals: {report['num_problems']} held-out problems, "
        f"{sampling}, seed {settings['seed']}, {settings['dtype']}. A second try counts as right if the "
        "first try or the retry after the reflection is right. Retries are shares of the wrong first tries; "
        "blind ones see no reflection.",
        "",
        "| model | 1st try | 2nd try | retries right | blind retries right |",
        "|---|---|---|---|---|",
    ]
    for label, figures in report["models"].items():
        blind = figures["controls"].get("blind", {}).get("success")
        shares = [figures["first_try"], figures["second_try"], figures["retry_success"], blind]
        name = f"{STAGES.get(label, label)}{' (this model)' if label == this else ''}"
        if (count := figures["first_try"]["of"]) < report["num_problems"]:
            name += f" (first {count} problems)"
        lines.append(f"| {name} | {' | '.join(map(percent, shares))} |")
    if this is None:
        lines += ["", f"The table is about the run's last step. These weights are step {step}. {validation}"]
    for change in report["comparisons"]:
        if change["given_by"] == "training":
            lines += ["", f"RL changes the second try by {percent(change['second_try'])} percentage points."]
    return "\n".join(lines).rstrip()


def percent(share: Mapping[str, float] | None) -> str:
    if share is None:
        return "-"
    mean, low, high = (100 * share[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def training(config: Config, run: Path) -> str:
    """How the model was trained: data, steps, versions, and every setting."""
    warm_start = f"{config.warm_start_steps} supervised steps on transcripts of the task, then "
    settings = {
        name: public(getattr(config, name)) for name in configuration.TYPES if name not in OF_THIS_MACHINE
    }
    listed = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items())
    return (
        f"Data: {config.num_examples} problems of the task {config.task} "
        f"{json.dumps(public(config.task_options), ensure_ascii=False)}.\n\n"
        f"{warm_start if config.warm_start_steps else ''}{config.max_steps} GRPO steps of "
        f"{config.groups_per_step} groups of {config.num_generations} completions; trained on: "
        f"{config.train_on}. The reward is 1 if the retry is right, else 0, less any cost of length below."
        "\n\n"
        f"Versions: {versions(run)}.\n\n"
        f"<details><summary>All settings</summary>\n\n```yaml\n{listed}\n```\n\n</details>"
    )


def versions(run: Path) -> str:
    """Of the programs that trained, as the newest checkpoint recorded them."""
    try:
        ours = f"reflect-grpo {metadata.version('reflect-grpo')}"
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        ours = "reflect-grpo (not installed)"
    steps = checkpoint.steps(run)
    if not steps:
        return ours
    state = json.loads((checkpoint.path_of(run, steps[-1]) / checkpoint.STATE).read_text(encoding="utf-8"))
    recorded = state["environment"]
    return ", ".join([ours, *(f"{name} {recorded[name]}" for name in ("torch", "transformers", "python"))])


def public(value: Any) -> Any:
    """A setting without the folders of this machine: of a path only the last part."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, str) and "/" in value and (Path(value).is_absolute() or Path(value).exists()):
        return Path(value).name
    return value


# --- the base model -----------------------------------------------------------------------------------------


def base_model(source: str) -> tuple[str, bool]:
    """Name of the model that training began with, and whether it is an id of the Hub."""
    if weights.HUB_ID.fullmatch(source) and not Path(source).exists():
        return source, True
    return Path(public(source)).name.removesuffix(".gguf"), False


def base_licence(source: str) -> str | None:
    """The licence that the model's files name; None if they name none, or are not on this machine."""
    if base_model(source)[1]:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "README.md")
        return _licence_in(Path(cached)) if isinstance(cached, str) else None
    try:
        path = weights.resolve(source)
        return gguf.GGUFFile(path).licence if path.suffix == ".gguf" else _licence_in(path / "README.md")
    except (ValueError, FileNotFoundError):
        return None


def _licence_in(readme: Path) -> str | None:
    """`license: ...` in the front matter of a model card."""
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    match = re.search(r"^license: *['\"]?([\w.-]+)", front[1], re.MULTILINE) if front else None
    return match[1] if match else None


if __name__ == "__main__":
    sys.exit(main())
