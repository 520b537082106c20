"""Ctrl-C and SIGTERM without losing work: a signal is noted, and answered at the next point where that is safe.

Rollouts can be left at any moment, since a step that is not finished is redone as a whole; an update of the weights
cannot, so nothing checks inside one. Left out: saving in the middle of a step.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType


class Interrupted(BaseException):
    """SIGINT or SIGTERM came: save what is done and leave."""


class Interrupts:
    """Turns the first SIGINT or SIGTERM into `Interrupted` at the next safe point; a second one stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print("\nstopping: saving what is done (once more to stop at once)", file=sys.stderr, flush=True)

    def check(self, *_: object) -> None:
        """Called between and inside rollouts, never inside an update: raises `Interrupted` after a signal."""
        if self.received is not None:
            raise Interrupted
