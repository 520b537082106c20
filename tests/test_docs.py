"""What README and docs/ name exists: options, settings, defaults, metrics, files, links. Examples run."""

import ast
import doctest
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from grpo import export, interact
from grpo.config import TRL_HINTS, TYPES, Config
from grpo.evaluate import __main__ as evaluate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SOURCES = [ROOT / "train.py", *sorted((ROOT / "grpo").rglob("*.py"))]

OTHER_OPTIONS = {
    "help",
    "no-deps",
    "extra-index-url",
    "check",
    "logdir",
    "project",
}  # argparse's, pip's, ruff's, trackers'
TORCHRUN_OPTIONS = {
    "nproc_per_node",
    "nnodes",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_id",
    "max-restarts",
    "shutdown-timeout",
}
SLURM_OPTIONS = set("job-name nodes ntasks-per-node gpus-per-node cpus-per-task signal requeue".split())
OWN_OPTIONS = {"output"}  # of python -m grpo.failures, whose parser is made inside main
BENCHMARK_OPTIONS, EXPERIMENT_OPTIONS = (
    {
        option
        for path in (ROOT / folder).glob("*.py")
        for option in re.findall(r'"--(\w+)"', path.read_text(encoding="utf-8"))
    }
    for folder in ("benchmarks", "grpo/experiments")
)
# Names of other programs, and names that the pages make up for their examples.
FOREIGN = set(
    "train_dataset per_device_train_batch_size adam_epsilon num_train_epochs eval_strategy logging_steps"
    " eval_reward reward_weights linear_cross_entropy chunked_nll selective_log_softmax torch_compile"
    " my_tasks".split()
)
LOGGED_FILES = {"grpo/model.py"}  # which entries of docs/LOG.md name, and which have moved since
FOREIGN_FILES = {"my.yaml", "my_tasks.py", "spelling.py", "compare.json"}

FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
WORD = re.compile(r"[A-Za-z_]\w*")


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request) -> Path:
    return request.param


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def inline(text: str) -> list[str]:
    """What stands between backticks, code blocks left out."""
    return CODE.findall(FENCE.sub("", text))


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the tables whose header begins with the column `first`."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] == first)
        if inside and cells[0] != first and not cells[0].startswith("---"):
            found.append(cells)
    return found


@cache
def strings() -> frozenset[str]:
    """Every string in the sources, those inside f-strings included."""
    trees = [ast.parse(text_of(path)) for path in SOURCES]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return frozenset(node.value for node in nodes if isinstance(node.value, str))


def is_metric(name: str) -> bool:
    """Whether the sources hold the name, or its beginning: f"{name}/mean" has it in two parts."""
    known = strings()
    return name in known or (name.rpartition("/")[0] in known and "/" + name.rpartition("/")[2] in known)


# --- options and settings ---------------------------------------------------------------------------------


def test_options_exist(page):
    options = set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", text_of(page))) - {"KEY"}
    parsers = [command.parser() for command in (evaluate, export, interact)]
    commands = {
        option.lstrip("-")
        for parser in parsers
        for action in parser._actions
        for option in action.option_strings
    }
    known = set(TYPES) | commands | OWN_OPTIONS | BENCHMARK_OPTIONS | EXPERIMENT_OPTIONS | OTHER_OPTIONS
    assert options <= known | TORCHRUN_OPTIONS | SLURM_OPTIONS


def test_settings_written_with_a_value_exist(page):
    written = {match[1] for code in inline(text_of(page)) if (match := re.match(r"([a-z_]+): \S", code))}
    assert written <= set(TYPES)


def test_yaml_in_code_blocks_holds_settings():
    blocks = re.findall(r"^```yaml\n(.*?)^```", text_of(ROOT / "README.md"), re.MULTILINE | re.DOTALL)
    keys = {line.partition(":")[0] for block in blocks for line in block.splitlines() if line}
    assert keys and keys <= set(TYPES)


def test_commands_in_the_readme_parse():
    from grpo.config import parse

    commands = re.findall(r"^python train\.py ([^#\n]*)", text_of(ROOT / "README.md"), re.MULTILINE)
    commands += re.findall(r"`python train\.py ([^`]*)`", text_of(ROOT / "docs/reading.md"))
    skipped = ("my.yaml", "--resume", "--help")  # need files, or exit
    parsed = [parse(command.split()) for command in commands if not any(text in command for text in skipped)]
    assert len(parsed) > 4


def test_from_trl_lists_each_setting_once_with_its_default():
    text = text_of(ROOT / "docs/from_trl.md")
    defaults = {field.name: getattr(Config(), field.name) for field in fields(Config)}
    settings = [row for row in rows(text, "TRL") if len(row) == 5]
    listed = []
    for _, _, here, default, _ in settings:
        (name,) = CODE.findall(here)
        assert str(defaults[name]) == default, name
        listed.append(name)
    (paragraph,) = re.findall(r"^Only here: (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    listed += CODE.findall(paragraph)
    assert sorted(set(listed)) == sorted(defaults) and len(set(listed)) == len(listed)


def test_from_trl_has_the_hints_for_the_names_of_trl():
    text = text_of(ROOT / "docs/from_trl.md")
    assert {name.strip("`"): hint.replace("`", "") for name, hint in rows(text, "TRL's option")} == {
        name: hint.replace("`", "") for name, hint in TRL_HINTS.items()
    }
    assert not set(TRL_HINTS) & set(TYPES)
    for theirs, _, here, _, _ in (row for row in rows(text, "TRL") if len(row) == 5):
        for name in set(CODE.findall(theirs)) - set(TYPES):  # the main table and the hints say the same
            assert re.search(rf"\b{here.strip('`')}\b", TRL_HINTS[name]), name


def test_from_trl_lists_metrics_that_are_logged():
    names = [row[1].strip("`") for row in rows(text_of(ROOT / "docs/from_trl.md"), "TRL") if len(row) == 3]
    assert len(names) > 20
    assert [name for name in names if not is_metric(name)] == []


# --- names and files --------------------------------------------------------------------------------------


def test_names_in_backticks_exist_in_the_code(page):
    """Names with an underscore are ours, unless listed in FOREIGN or in TRL's column."""
    text = text_of(page)
    if page.name == "from_trl.md":  # the first columns, and the two lists of what is not here, are TRL's
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
        text = re.sub(r"^Not here: .*?\n\n", "\n", text, flags=re.MULTILINE | re.DOTALL)
    code = "\n".join(
        text_of(path) for path in [*SOURCES, *(ROOT / "kernels").rglob("*.py"), ROOT / "Makefile"]
    )
    if page.name == "CONTRIBUTING.md":  # which is about the tests too
        code += "\n".join(text_of(path) for path in (ROOT / "tests").rglob("*.py"))
        code += text_of(ROOT / "tests/imports.json")
    known = set(WORD.findall(code)) | FOREIGN | {path.stem for path in (ROOT / "grpo/presets").iterdir()}
    used = {word for part in inline(text) if "/" not in part for word in WORD.findall(part) if "_" in word}
    assert sorted(used - known) == []


def is_there(name: str) -> bool:
    if "*" in name:
        name = name.replace("*", "before_rl")
    if (ROOT / name).exists() or (ROOT / "grpo" / name).exists() or Path(name).name in FOREIGN_FILES:
        return True
    if name.endswith((".py", ".md")) and name != "table.md":  # which an experiment writes
        return False
    # a run's files are named in the sources, some with a part filled in: evaluation-{label}.jsonl
    last = re.sub(r"-(before_rl|\d+)", "-", name.rstrip("/").rpartition("/")[2])
    return any(last in text or (last.partition("-")[0] + "-" in text and "-" in last) for text in strings())


def test_files_exist(page):
    suffixes = r"\.(?:py|md|yaml|yml|toml|cfg|txt|json|jsonl)"
    named = [part for part in inline(text_of(page)) if re.fullmatch(rf"[\w.*/-]+(?:{suffixes}|/)", part)]
    named = [name for name in named if not name.startswith(("runs/", "/")) and "NAME" not in name]
    moved = LOGGED_FILES if page.name == "LOG.md" else set()
    assert [name for name in named if not is_there(name) and name not in moved] == []


def test_relative_links_resolve(page):
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(file), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, target


def test_the_readme_fits_a_sitting_and_links_every_page():
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 120
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"docs/{path.name}" not in text] == []


def test_examples_run():
    result = doctest.testfile(str(ROOT / "docs/reading.md"), module_relative=False)
    assert result.attempted > 10 and result.failed == 0
