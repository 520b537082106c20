"""Ctrl-C and SIGTERM without losing work: a signal is noted, and answered at the next safe point.

Rollouts can be left at any moment, since a step that is not finished is redone as a whole; an update of the
weights cannot, so nothing checks inside one. Before there is anything to lose, a signal ends the program at
once. Left out: saving in the middle of a step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

# --- before torch is imported ----------------------------------------------------------------------------
#
# What every command does before it imports torch: that takes seconds, and reads the environment once.
#
# OpenMP's threads wait for each other by spinning, for a millisecond and more. Beside another busy process
# that is fatal, since the spinning thread takes the core that the one it waits for should have: supervised
# steps of some 5 seconds were seen to take 70 (docs/LOG.md). So they spin for microseconds only and then
# sleep, unless the user has said otherwise.

SPINS = "5000"  # of GNU's OpenMP, which torch brings; its default is 300,000


def set_up_process() -> None:
    """To be called first in a command's file; has no effect on OpenMP once torch is imported."""
    leave_quietly()  # a Ctrl-C during the imports
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM came: save what is done and leave."""


class Interrupts:
    """Inside `with`, a SIGINT or SIGTERM raises KeyboardInterrupt at once, until `defer` is called.

    From then on the first one makes `check` raise `Interrupted`, and a second one stops at once.
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

    def defer(self) -> None:
        """From here on there is work to save."""
        self._deferred = True

    def check(self, *_: object) -> None:
        """Called between and inside rollouts, never inside an update: raises `Interrupted` after a signal."""
        if self.received:
            raise Interrupted

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received or not self._deferred:
            raise KeyboardInterrupt
        self.received = True
        # Not print: the signal may have come in the middle of one, and a buffer cannot be entered twice.
        os.write(2, b"\nstopping: saving what is done (once more to stop at once)\n")


def leave_quietly() -> None:
    """Until `Interrupts` takes over, while modules are imported: a signal ends the process, no traceback."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
