"""What happens before torch is imported: waiting threads soon sleep, unless the user wants them to spin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ["train", "grpo.failures", "grpo.evaluate", "grpo.experiments.__main__"]
# Runs the command's file as __main__ up to its import of torch, and says what OpenMP will find.
STOP = """
import os, runpy, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)
sys.meta_path.insert(0, Torch())
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "None 5000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
    ],
)
def test_threads_that_wait_soon_sleep_unless_told_otherwise(command, given, found):
    env = {
        key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **given}
    argv = [sys.executable, "-c", STOP, command]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.stdout.strip() == found, done.stderr
