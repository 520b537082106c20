"""What every command does before it imports torch: that takes seconds, and reads the environment once.

OpenMP's threads wait for each other by spinning, for a millisecond and more. Beside another busy process that
is fatal, since the spinning thread takes the core that the one it waits for should have: supervised steps of
some 5 seconds were seen to take 70 (docs/LOG.md). So they spin for microseconds only and then sleep, unless
the user has said otherwise.
"""

import os

from grpo.interrupts import leave_quietly

SPINS = "5000"  # of GNU's OpenMP, which torch brings; its default is 300,000


def prepare() -> None:
    """To be called first in a command's file; has no effect on OpenMP once torch is imported."""
    leave_quietly()  # a Ctrl-C during the imports
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
