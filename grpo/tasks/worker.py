"""A judge in a process of its own, with a time limit for each answer.

What judges an answer may take for ever (a formula to simplify, a regular expression that backtracks), need
all memory, or crash. In its own process it can do none of this to a run: past the limit the process is
killed, and the next answer gets a new one. Code that sets alarms, such as math-verify's, has a main thread
there too.

The two processes exchange JSON lines; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import weakref
from pathlib import Path
from typing import Any

from grpo.tasks import TaskError

LOADING = 300.0  # seconds that the judge may take to be built: imports of large libraries
GRACE = 5  # seconds after the limit at which a worker whose parent was killed ends itself

# What the process runs. The path is the parent's, so that both import the same files. It is set before
# anything is imported from files: Python begins with the current directory, where a json.py may be.
_START = "import sys; sys.path[:] = sys.argv[1:]; from grpo.tasks.worker import serve; serve()"


class WorkerError(Exception):
    """The judge gave no result. `kind`: "time_limit", "crash", or "raised" (the message says what)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """Builds a judge in another process and calls it. Threads may call it at once: each gets its own process.

    Args:
        factory: `package.module:name` of the function that builds the judge. The judge is a function of one
            JSON value, and returns one.
        settings: keyword arguments of the factory, as JSON has them.
        seconds: limit of one call.
        memory: limit of the process's address space, in GB; None: no limit.
    """

    def __init__(
        self, factory: str, settings: dict[str, Any], *, seconds: float, memory: float | None = None
    ) -> None:
        self.seconds = seconds
        self._start = {"factory": factory, "settings": settings, "memory": memory}
        self._idle: list[_Process] = []  # `append` and `pop` are atomic

    def __call__(self, value: Any, seconds: float | None = None) -> Any:
        """The judge's result, within `seconds` instead of the usual limit. Raises WorkerError."""
        process = self._free()
        seconds = self.seconds if seconds is None else seconds
        try:
            return process.exchange({"seconds": seconds, "value": value}, seconds)
        finally:
            if process.running:
                self._idle.append(process)

    def open(self) -> None:
        """Starts a process and builds the judge in it, if there is none. Raises WorkerError."""
        self._idle.append(self._free())

    def close(self) -> None:
        """Ends the processes. A later call starts a new one."""
        while self._idle:
            self._idle.pop().close()

    def _free(self) -> _Process:
        try:
            return self._idle.pop()
        except IndexError:
            return _Process(self._start)


class _Process:
    """One process of a Worker, from its start to its end."""

    def __init__(self, start: dict[str, Any]) -> None:
        self._rest = b""  # what was read after the last whole line
        self.running = True
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the parent, which may want another verdict first
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sets then have the same order in every process
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self.exchange(start, LOADING)
        except WorkerError:
            self.close()
            raise

    def close(self) -> None:
        self.running = False
        self._end()

    def exchange(self, value: Any, seconds: float) -> Any:
        """Sends a request and returns the answer. Raises WorkerError; without an answer, the process ends."""
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()
            answer = self._line(process, seconds)
        except OSError:  # a broken pipe: it ended before
            answer = b""
        except BaseException:  # such as a second Ctrl-C: what it answers later belongs to no question
            self.close()
            raise
        if answer is None:
            self.close()
            raise WorkerError("time_limit", f"took longer than {seconds:g} seconds")
        if not answer:
            status = process.wait()
            self.close()
            raise WorkerError("crash", f"ended its process (status {status})")
        result = json.loads(answer)
        if "raised" in result:
            raise WorkerError("raised", result["raised"])
        return result["value"]

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line of the process; b"" if it has ended, None if the time is up."""
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                return b""
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


# --- in the process -----------------------------------------------------------------------------------------


def serve() -> None:
    """Reads a line, judges it, writes a line; until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the judge prints goes to stderr
    start = json.loads(sys.stdin.readline())
    if start["memory"] is not None:
        with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (int(start["memory"] * 1e9),) * 2)
    module, _, name = start["factory"].partition(":")
    try:
        judge = getattr(importlib.import_module(module), name)(**start["settings"])
        answer: dict[str, Any] = {"value": None}
    except Exception as error:
        judge, answer = None, _raised(error, ValueError)
    print(json.dumps(answer), file=answers, flush=True)
    while judge is not None and (line := sys.stdin.readline()):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        request = json.loads(line)
        signal.alarm(int(request["seconds"]) + GRACE)  # ends this process, if nobody is left to do so
        try:
            answer = {"value": judge(request["value"])}
        except Exception as error:
            answer = _raised(error)
        signal.alarm(0)
        print(json.dumps(answer), file=answers, flush=True)


def _raised(error: Exception, *for_the_user: type[Exception]) -> dict[str, str]:
    if isinstance(error, (TaskError, *for_the_user)):
        return {"raised": " ".join(str(error).split())}
    return {"raised": described(error)}


def described(error: Exception) -> str:
    """An exception of the user's code in one line: `raised KeyError: 'x' (rewards.py, line 3)`.

    Its traceback goes to stderr.
    """
    traceback.print_exception(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})"
