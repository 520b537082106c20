"""tests/imports.json: which package may import what. Read with `ast`, nothing is imported."""

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RULES = json.loads((ROOT / "tests/imports.json").read_text(encoding="utf-8"))
LEVEL = {unit: depth for depth, units in enumerate(RULES["levels"]) for unit in units}  # 0 is the top
FILES = [ROOT / "train.py", *sorted((ROOT / "grpo").rglob("*.py"))]
KERNELS = sorted((ROOT / "kernels/grpo_kernels").rglob("*.py"))


def module_of(path: Path) -> str:
    """grpo/run/build.py -> grpo.run.build; a package's __init__.py is the package."""
    folder = ROOT / "kernels" if path in KERNELS else ROOT
    return ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in [*FILES, *KERNELS]}


def unit_of(module: str) -> str:
    """What a level or a list of packages names: train, grpo.run, grpo.loss; torch, triton."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "grpo" else parts[0]


def imports(path: Path) -> set[str]:
    """Modules that a file imports, but no standard ones; `from grpo.run import build` is grpo.run.build."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & MODULES) or {node.module}
    return {module for module in found if module.split(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_lower_levels_and_the_packages_of_its_unit(path):
    module = module_of(path)
    if module == "grpo":
        return
    unit = unit_of(module)
    for imported in sorted(imports(path)):
        other = unit_of(imported)
        if other == unit:
            continue
        if other in LEVEL:
            below = LEVEL[other] > LEVEL[unit] or other in RULES["same_level"].get(unit, [])
            assert below, f"{module} imports {imported}, which is not on a lower level"
        else:
            allowed = RULES["third_party"].get(unit, [])
            assert other in allowed, f"{module} imports {imported}; {unit} may import {allowed}"


def test_the_rules_name_what_exists_and_each_import_that_they_allow_is_made():
    assert set(LEVEL) == {unit_of(module) for module in MODULES if module != "grpo"} - {"grpo_kernels"}
    used: dict[str, set[str]] = {}
    for path in [*FILES, *KERNELS]:
        used.setdefault(unit_of(module_of(path)), set()).update(map(unit_of, imports(path)))
    for unit, packages in RULES["third_party"].items():
        assert set(packages) <= used[unit], f"{unit} imports no {sorted(set(packages) - used[unit])}"


def test_packages_have_empty_init_files():
    for package in RULES["empty"]:
        assert (ROOT / package.replace(".", "/") / "__init__.py").read_text() == "", package


def test_only_train_imports_the_kernels_and_they_only_their_references():
    for path in FILES:
        if path.name != "train.py":
            assert "grpo_kernels" not in {unit_of(module) for module in imports(path)}, path
    for path in KERNELS:
        others = {unit_of(module) for module in imports(path)} - {"grpo_kernels"}
        assert others <= set(RULES["third_party"]["grpo_kernels"]), path
    assert not (ROOT / "kernels/__init__.py").exists()  # it would shadow the PyPI package `kernels`


def test_signals_are_set_up_without_torch():
    """Commands import grpo.run.interrupts first: it sets what torch reads when it is imported."""
    code = "import sys, grpo.run.interrupts; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def required() -> set[str]:
    """Packages that setup.cfg asks for, extras included."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    return {re.split(r"[<>=;\s]", line)[0] for text in lists for line in text.split("\n") if line}


def test_every_third_party_import_is_a_requirement():
    used = {module.split(".")[0] for path in [*FILES, *KERNELS] for module in imports(path)}
    used = used - {"grpo", "grpo_kernels", "yaml"} | {"pyyaml"}  # the one whose module has another name
    assert used <= required()


def test_no_cycles():
    graph = {module_of(path): imports(path) & MODULES for path in [*FILES, *KERNELS]}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for target in graph[module] - {module}:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


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
