"""The package under test is the installed one (`pip install -e .`): nothing here touches sys.path."""

import atexit
import contextlib
import gc
import io
import os
import re
from pathlib import Path

import pytest

# Small tests on small tensors: more threads only fight each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests read local files only; a name that is looked up on the Hub by mistake fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU the Triton kernels run in Triton's interpreter: to be set before Triton is imported.
if not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

gc.disable()  # until all is imported: nothing of that is garbage


def pytest_collection_finish():
    """Millions of objects were imported to stay: a garbage collection need not look at them each time."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # some extensions report what is not freed at the end


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """Tests, and the processes that they start, leave the user's ~/.cache alone."""
    # Matplotlib would list the system's fonts again, which takes seconds.
    os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache/matplotlib"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def warned():
    """`with warned(pattern):` must print warnings about data, each a whole line, one of which matches."""
    from grpo.tasks import warn

    @contextlib.contextmanager
    def warned(pattern):
        warn.cache_clear()
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            yield
        lines = printed.getvalue().splitlines()
        assert all(line.startswith("warning: ") for line in lines), lines
        assert any(re.search(pattern, line) for line in lines), lines

    return warned
