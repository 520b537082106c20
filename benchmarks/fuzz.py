"""Which inputs end in a traceback? Changes valid inputs at random and feeds them to each entry point.

    python benchmarks/fuzz.py                            ten seconds for each entry point
    python benchmarks/fuzz.py --seconds 600 config_json  ten minutes for one

An entry point may raise the errors that users see as one line (`EXPECTED`). Any other exception, an input
that takes longer than LIMIT_SECONDS, or more than LIMIT_GB of memory is a finding. hypothesis shrinks each
finding; it is printed, and the exit status is 1. Findings become tests in tests/test_reported_inputs.py.

Left out: coverage guidance, and the network.
"""

from __future__ import annotations

import copy
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from lib.measure import command_line, hide_benchmarks  # noqa: E402

hide_benchmarks()

EXPECTED = (ValueError, OSError)  # files.MismatchError and configuration errors are ValueErrors
LIMIT_SECONDS = 20
LIMIT_GB = 4  # beyond what the process holds at the start
BATCH = 100  # inputs between two looks at the clock


class TooSlow(Exception):
    """One input took longer than LIMIT_SECONDS."""


# --- inputs ----------------------------------------------------------------------------------------------

ODD: list[Any] = [None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**12, 10**400, 0.5, -0.0]
ODD += [float("nan"), float("inf"), "", " ", "0", "010", "null", "\x00", "\ud800", "\ufeff", "a" * 5000]
ODD += ["../../etc/passwd", [], {}, [[]], [None]]


def mutated_bytes(valid: bytes, edits: int = 6) -> st.SearchStrategy[bytes]:
    """`valid` with up to `edits` stretches of at most 16 bytes cut out, overwritten or inserted."""
    place = st.integers(0, len(valid))
    edit = st.tuples(place, st.integers(0, 16), st.binary(max_size=16))

    def apply(chosen: list[tuple[int, int, bytes]]) -> bytes:
        content = bytearray(valid)
        for start, length, new in chosen:
            content[start : start + length] = new
        return bytes(content)

    truncated = place.map(lambda end: valid[:end])
    return st.lists(edit, min_size=1, max_size=edits).map(apply) | truncated


def mutated_json(valid: Any, edits: int = 3) -> st.SearchStrategy[Any]:
    """`valid`, a JSON value, with up to `edits` of its parts deleted or replaced by other values."""
    paths = list(_paths(valid))
    leaf = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)
    value = st.recursive(
        leaf, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8), part)
    )
    edit = st.tuples(st.sampled_from(paths), st.just(_DELETE) | value)

    def apply(chosen: list[tuple[tuple[Any, ...], Any]]) -> Any:
        content = copy.deepcopy(valid)
        for path, new in chosen:
            content = _replaced(content, path, new)
        return content

    return st.lists(edit, min_size=1, max_size=edits).map(apply)


_DELETE = object()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _paths(part, (*path, key))


def _replaced(content: Any, path: tuple[Any, ...], new: Any) -> Any:
    """`content` with the part at `path` replaced; unchanged if an earlier edit removed the path."""
    if not path:
        return None if new is _DELETE else new
    try:
        if len(path) > 1:
            content[path[0]] = _replaced(content[path[0]], path[1:], new)
        elif new is _DELETE:
            del content[path[0]]
        else:
            content[path[0]] = new
    except (KeyError, IndexError, TypeError):
        pass
    return content


# --- entry points ----------------------------------------------------------------------------------------

Target = Callable[[Any], None]
ENTRY_POINTS: dict[str, tuple[Callable[[], st.SearchStrategy[Any]], Target]] = {}


def entry_point(inputs: Callable[[], st.SearchStrategy[Any]]) -> Callable[[Target], Target]:
    """Registers a function of one input under its name; `inputs` makes the strategy for its inputs."""

    def register(target: Target) -> Target:
        ENTRY_POINTS[target.__name__] = inputs, target
        return target

    return register


# --- the search ------------------------------------------------------------------------------------------


def fuzz(name: str, seconds: float, first_seed: int) -> tuple[int, BaseException | None]:
    """Feeds inputs to one entry point until time is up. Returns their number and the first finding."""
    inputs, target = ENTRY_POINTS[name]
    count, begin = 0, time.monotonic()
    strategy = inputs()

    def check(value: Any) -> None:
        nonlocal count
        count += 1
        signal.alarm(LIMIT_SECONDS)
        try:
            target(value)
        except EXPECTED as error:
            assert str(error), "an error without a message"
        finally:
            signal.alarm(0)

    batch = first_seed
    while time.monotonic() - begin < seconds:
        search = settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=False,
        )
        try:
            seed(batch)(search(given(strategy)(check)))()
        except BaseException as error:  # hypothesis raises what the smallest input raised
            if isinstance(error, KeyboardInterrupt):
                raise
            return count, error
        batch += 1
    return count, None


def _too_slow(*_: Any) -> None:
    raise TooSlow(f"more than {LIMIT_SECONDS} s")


def main() -> int:
    parser = command_line(__file__, __doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENTRY_POINTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=10, help="for each entry point")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch of inputs")
    args = parser.parse_args()
    if unknown := set(args.names) - set(ENTRY_POINTS):
        parser.error(
            f"entry points must be among {', '.join(ENTRY_POINTS)}, got {', '.join(sorted(unknown))}"
        )
    signal.signal(signal.SIGALRM, _too_slow)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    limit = held + LIMIT_GB * 2**30 + 16 * 2**30  # address space that libraries reserve without using it
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    found = 0
    for name in args.names or ENTRY_POINTS:
        count, finding = fuzz(name, args.seconds, args.seed)
        print(f"{name}: {count} inputs, {'one finding:' if finding else 'no finding'}", flush=True)
        if finding:
            found += 1
            traceback.print_exception(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
