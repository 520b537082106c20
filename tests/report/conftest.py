"""A whole run, and one that was written to attack the reader."""

import shutil
from pathlib import Path

import odd_runs
import pytest
import tiny_run

from grpo.report import curves


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    return tiny_run.finished(tmp_path_factory.mktemp("report"))


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch) -> Path:
    """A copy of the finished run, to be changed. Its curves are not drawn: that takes most of the time."""
    monkeypatch.setattr(curves, "svg", lambda chart, key: f'<svg class="{key}">')
    without_weights = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(finished_run, tmp_path / "tiny-001", ignore=without_weights))


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory) -> Path:
    return odd_runs.hostile(tmp_path_factory.mktemp("hostile"))
