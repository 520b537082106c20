"""A size on the command line: MxHxV, which is selected tokens, hidden size, vocabulary."""

import argparse


def size_of(text: str) -> tuple[int, int, int]:
    try:
        m, h, v = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a size must be MxHxV, such as 2048x576x49152, got {text!r}"
        ) from None
    if min(m, h, v) < 1:
        raise argparse.ArgumentTypeError(f"M, H and V must be at least 1, got {text!r}")
    return m, h, v
