"""Ctrl-C and SIGTERM without losing work: a signal is recorded, and acted upon at the next safe point.

A rollout can stop at any moment, since an unfinished step is redone as a whole. An update of the weights
cannot, so nothing checks for signals inside one. Before there is work to lose, a signal ends the program at
once. Left out: saving in the middle of a step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from grpo import distributed

# --- before torch is imported ----------------------------------------------------------------------------
#
# Every command calls `set_up_process` before it imports torch: the import takes seconds, and OpenMP reads the
# environment only then.
#
# OpenMP threads wait for each other by spinning, for a millisecond or more. If another process is busy too, a
# spinning thread can take the core that the thread it waits for needs: supervised steps of about 5
# seconds took 70 (docs/LOG.md). So the threads here spin for microseconds and then sleep, unless the user has
# set OpenMP's variables.

SPINS = "5000"  # for GNU's OpenMP, which comes with torch; its default is 300,000


def set_up_process() -> None:
    """Prepares signals and OpenMP. Call it first in a command's file, before torch is imported."""
    leave_quietly()  # on a Ctrl-C during the imports
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


# --- signals ---------------------------------------------------------------------------------------------

EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM was received: save the finished steps and leave."""


class Interrupts:
    """Inside `with`, a SIGINT or SIGTERM raises KeyboardInterrupt at once, until `defer` is called.

    After that, the first signal makes `check` raise `Interrupted`, and a second raises KeyboardInterrupt.

    A SystemExit becomes a RuntimeError: a task that calls sys.exit(0) must not make a run look finished.
    """

    def __init__(self) -> None:
        self.received = False
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, SystemExit):
            raise RuntimeError(f"sys.exit({error.code!r}) was called, perhaps by the task") from error

    def defer(self) -> None:
        """Call it as soon as there is work to save."""
        self._deferred = True

    def check(self, *_: object) -> None:
        """Raises `Interrupted` after a signal. Called between and inside rollouts, never inside an update."""
        if self.received:
            raise Interrupted

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received or not self._deferred:
            raise KeyboardInterrupt
        self.received = True
        # Not print: the signal may have interrupted a print, and its buffer cannot be entered twice.
        if distributed.is_main():
            os.write(2, b"\nstopping: saving what is done (repeat the signal to stop at once)\n")


def leave_quietly() -> None:
    """Makes a signal end the process without a traceback, until `Interrupts` takes over."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
