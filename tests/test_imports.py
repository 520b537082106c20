"""The table of docs/design.md: which file may import what. Read with `ast`, nothing is imported."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 320

# Row of the table -> what it may import besides the standard library; a row's name stands for its files.
TABLE = {
    "config": {"transformers"},
    "tasks": set(),
    "chat": {"transformers"},
    "model": {"torch"},
    "weights": {"torch", "model", "transformers", "safetensors", "gguf"},
    "sampler": {"torch", "numpy", "model"},
    "episode": set(),
    "failures": {"sampler", "tasks", "chat"},
    "rollout": {"sampler", "tasks", "chat", "episode"},
    "batch": {"torch", "episode"},
    "logprob": {"torch"},
    "advantage": {"torch"},
    "loss": {"torch"},
    "learner": {"torch", "model", "batch", "advantage", "episode"},
    "warmstart": {"torch", "tasks", "chat", "batch"},
    "checkpoint": {"torch", "numpy", "safetensors"},
    "evaluate": {"rollout", "weights", "config", "tasks"},
    "metrics": set(),
}
# Rows that the table has no line for: `parts` builds what a command needs, the others are small tools.
TABLE |= {
    "parts": {"torch", "config", "weights", "tasks", "chat", "model", "sampler", "rollout"},
    "blocks": set(),
    "interrupts": set(),
}
# Files that were split off another one: they share its row, and may import each other.
SPLIT = {
    "fields": "config",
    "attention": "model",
    "rope": "model",
    "gguf_file": "weights",
    "locate": "weights",
    "kv_cache": "sampler",
    "sampling": "sampler",
    "schedule": "sampler",
    "script": "sampler",
    "optimizer": "learner",
    "comparison": "evaluate",
    "sources": "evaluate",
    "statistics": "evaluate",
    "table": "evaluate",
}
# More than the row allows, each with its reason.
EXCEPTIONS = {
    "metrics": {"torch.utils.tensorboard"},  # inside a function, only when TensorBoard is asked for
    "gguf_file": {"tokenizers", "rope"},  # the tokenizer is in the GGUF file too; RoPE's order of q and k
    "locate": {"huggingface_hub"},  # downloads
    "failures": {"blocks", "config", "parts", "rollout", "tqdm"},  # python -m grpo.failures
    "evaluate": {"blocks", "checkpoint", "episode", "parts", "tqdm"},  # python -m grpo.evaluate
    "sources": {"checkpoint"},
    "statistics": {"numpy"},
}


def name_of(path: Path) -> str:
    """grpo/loss.py -> loss; every file of grpo/tasks/ -> tasks."""
    inside = path.relative_to(ROOT / "grpo")
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path: Path) -> set[str]:
    """Modules that a file imports, standard library left out; `from grpo import loss` counts as grpo.loss."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"grpo.{alias.name}" for alias in node.names} if module == "grpo" else {module}
    return {module for module in found if module.split(".")[0] not in sys.stdlib_module_names}


def short(module: str) -> str:
    """grpo.tasks.countdown -> tasks; torch.nn.functional -> torch."""
    parts = module.split(".")
    return parts[1] if parts[0] == "grpo" else parts[0]


FILES = sorted(path for path in (ROOT / "grpo").rglob("*.py") if path != ROOT / "grpo/__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_what_the_table_allows(path):
    name = name_of(path)
    row = SPLIT.get(name, name)
    assert row in TABLE, f"{path.relative_to(ROOT)} has no row in the table"
    family = {row} | {part for part, whole in SPLIT.items() if whole == row}
    exceptions = EXCEPTIONS.get(name, set())
    allowed = TABLE[row] | family | exceptions
    # an exception may name one submodule, to allow no more than that
    wrong = {module for module in imports(path) if short(module) not in allowed and module not in exceptions}
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}, its row allows {sorted(allowed)}"


def test_split_and_exceptions_name_files_that_exist():
    names = {name_of(path) for path in FILES}
    assert set(SPLIT) <= names and set(EXCEPTIONS) <= names


def test_grpo_package_is_empty_and_never_imports_the_kernels():
    assert (ROOT / "grpo/__init__.py").read_text() == ""
    for path in FILES:
        assert not {module for module in imports(path) if module.split(".")[0] == "grpo_kernels"}, path


def test_kernels_import_only_their_references():
    for path in (ROOT / "kernels/grpo_kernels").rglob("*.py"):
        own = {module for module in imports(path) if module.split(".")[0] != "grpo_kernels"}
        assert {short(module) for module in own} <= {"torch", "triton", "logprob", "advantage", "loss"}, path
    assert not (ROOT / "kernels/__init__.py").exists()  # it would shadow the PyPI package `kernels`


def test_every_third_party_import_is_a_requirement():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    required = {re.split(r"[<>=;\s]", line)[0] for text in lists for line in text.split("\n") if line}
    used = {module.split(".")[0] for path in [*FILES, ROOT / "train.py"] for module in imports(path)}
    assert used - {"grpo", "grpo_kernels"} <= required


def test_no_cycles():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        module = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        graph[module] = {name for name in imports(path) if name.startswith("grpo.")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_an_installed_package_named_kernels_is_not_shadowed(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("WHERE = 'installed'\n")
    code = "import kernels, grpo_kernels; print(kernels.WHERE, grpo_kernels.grpo_loss.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],  # with -c the working directory is first on the path
        cwd=ROOT, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["installed", "grpo_loss"], done.stderr
