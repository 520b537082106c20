"""Progress: a live line on a terminal, and whole lines without control characters in a file."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import arguments, save_model

from grpo.run import progress
from grpo.run.progress import Bar

ROOT = Path(__file__).parent.parent.parent
STAGES = (
    "warm start",
    "failures",
    "training",
    "evaluate untouched",
    "evaluate before_rl",
    "evaluate trained",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(model, tmp_path):
    """The command of a whole tiny run, with its environment."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TERM": "xterm", "COLUMNS": "120"}
    argv = [sys.executable, str(ROOT / "train.py"), *arguments(model, tmp_path / "runs")]
    return argv, environment


def on_terminal(argv, environment, stdout=None) -> str:
    """What the command writes to a terminal; its standard output goes to the file `stdout`, if given."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        argv, env=environment, stdin=slave, stdout=stdout or slave, stderr=slave
    ) as process:
        os.close(slave)
        written = b""
        try:
            while piece := os.read(master, 2**16):
                written += piece
        except OSError:  # Linux's end of file
            pass
    os.close(master)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_files_get_whole_lines_without_control_characters(command, tmp_path):
    argv, environment = command
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        done = subprocess.run(argv, env=environment | {"FORCE_COLOR": "1"}, stdout=out, stderr=err)
    out, err = (tmp_path / "out").read_bytes(), (tmp_path / "err").read_bytes()
    assert done.returncode == 0, err
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", out + err)
    assert err == b""  # a run of seconds has no line of progress
    steps = [line for line in out.decode().splitlines() if re.match(r" *\d/4 ", line)]
    assert len(steps) == 4 and len(set(map(len, steps))) == 1
    assert out.decode().splitlines()[-1] == f"checkpoint: {tmp_path}/runs/tiny-001/checkpoints/step-000004"


def test_a_terminal_gets_a_live_line_per_stage_and_the_lines_above_it(command):
    text = on_terminal(*command)
    assert "\x1b[2K" in text  # a line is drawn again
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for stage in STAGES:
        assert re.search(rf"{stage} +\S+ +\d+/\d+ \w+ +\d:\d\d:\d\d +\S+ +left", plain), stage
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain)]
    assert len([line for line in lines if re.fullmatch(r"[1-4]/4( +[-\d.]+){8}", line)]) == 4
    assert text.endswith("\n") and text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is back


def test_a_file_gets_the_steps_while_the_terminal_has_the_live_line(command, tmp_path):
    with open(tmp_path / "out", "wb") as out:
        text = on_terminal(*command, stdout=out)
    steps = re.findall(r"^ *[1-4]/4 ", (tmp_path / "out").read_text(), re.MULTILINE)
    assert len(steps) == 4 and "\x1b" not in (tmp_path / "out").read_text()
    assert "training" in text and "grad_norm" not in text


def test_a_long_stage_without_a_terminal_has_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Bar("training", 100, "step", done=10) as bar:
        for done in range(11, 21):
            now[0] += 12.0
            bar.update(done, "loss 1.5")
    assert capsys.readouterr().err.splitlines() == [
        "training: 13/100 steps, 0:00:36, 0:17:24 left, loss 1.5",
        "training: 16/100 steps, 0:01:12, 0:16:48 left, loss 1.5",
        "training: 19/100 steps, 0:01:48, 0:16:12 left, loss 1.5",
    ]


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_terminal_that_cannot_move_its_cursor_gets_no_live_line(term, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    assert Bar("training", 10, "step").live is None
