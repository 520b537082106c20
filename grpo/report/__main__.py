"""`python -m grpo.report RUN [RUN ...]`: writes a page that shows what runs did and what they learned.

The page is one HTML file without network or server. A run directory may be unfinished or damaged: the page
says what is missing. Reading it runs no code of it, so it may come from somebody else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpo.report.page import FILE, write_report
from grpo.run.files import RunDirError


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo.report",
        description="Writes an HTML page about runs: result, curves, examples, groups token by token, "
        "settings. Several runs share one page, with their curves in the same charts. Exit status: 0 done, "
        "1 failed, 2 wrong arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, finished or not")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the page (default: RUN/{FILE}; of several runs {FILE} in the current directory)",
    )
    options = parser.parse_args(argv)
    output = options.output or (Path(FILE) if len(options.runs) > 1 else options.runs[0] / FILE)
    try:
        if output.is_dir():
            raise ValueError(f"output must be a file, got the folder {output}")
        write_report(options.runs, output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunDirError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
