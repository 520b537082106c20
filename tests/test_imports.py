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

# | `grpo/loss.py` | what it does | `torch` |: a path, and what it may import besides the standard library.
ROW = re.compile(r"^\| `((?:grpo|kernels)/[^`]*)` \|.*\| ([^|]*) \|$", re.MULTILINE)
TABLE = {
    path: set(re.findall(r"`([^`]+)`", names))
    for path, names in ROW.findall((ROOT / "docs/design.md").read_text(encoding="utf-8"))
}


def row_of(path: Path) -> str:
    """A file stands for itself, but in a package that has a row, such as grpo/tasks/, for the package."""
    relative = path.relative_to(ROOT).as_posix()
    folder = relative.rpartition("/")[0] + "/"
    return folder if folder in TABLE else relative


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
    row = row_of(path)
    assert row in TABLE, f"{path.relative_to(ROOT)} has no row in the table of docs/design.md"
    own = {Path(row).name} if row.endswith("/") else set()  # files of a package may import each other
    allowed = TABLE[row] | own
    # a row may name one submodule, such as torch.utils.tensorboard, to allow no more than that
    wrong = {module for module in imports(path) if short(module) not in allowed and module not in allowed}
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}, its row allows {sorted(allowed)}"


def test_every_row_names_something_that_exists_and_no_row_comes_twice():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    assert len(ROW.findall(text)) == len(TABLE) > 0
    for path, names in TABLE.items():
        assert (ROOT / path).exists(), path
        own = {
            name for name in names if any((ROOT / "grpo" / file).exists() for file in (f"{name}.py", name))
        }
        others = {name.split(".")[0] for name in names - own}
        assert others <= required(), f"{path}: {sorted(others - required())}"


def test_grpo_package_is_empty_and_never_imports_the_kernels():
    assert (ROOT / "grpo/__init__.py").read_text() == ""
    for path in FILES:
        assert not {module for module in imports(path) if module.split(".")[0] == "grpo_kernels"}, path


def test_kernels_import_only_their_references():
    for path in (ROOT / "kernels/grpo_kernels").rglob("*.py"):
        own = {module for module in imports(path) if module.split(".")[0] != "grpo_kernels"}
        assert {short(module) for module in own} <= TABLE["kernels/grpo_kernels/"], path
    assert not (ROOT / "kernels/__init__.py").exists()  # it would shadow the PyPI package `kernels`


def required() -> set[str]:
    """Packages that setup.cfg asks for, extras included."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    return {re.split(r"[<>=;\s]", line)[0] for text in lists for line in text.split("\n") if line}


def test_every_third_party_import_is_a_requirement():
    used = {module.split(".")[0] for path in [*FILES, ROOT / "train.py"] for module in imports(path)}
    assert used - {"grpo", "grpo_kernels"} <= required()


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
