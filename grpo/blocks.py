"""JSON lines files that grow in whole blocks, so that long work goes on after a kill where its last block
ended.

A block is any number of lines and then one *end line*, `{"block": number, ...}`. All of it is appended in one
write and synced; whatever follows the last end line was left by a kill, and is cut away and redone. Because
work inside a block is deterministic, the file of an interrupted run equals the file of one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def keep_whole(path: Path) -> int:
    """Cuts the file after its last end line; returns the number of blocks kept, 0 when there is no file."""
    if not path.exists():
        return 0
    blocks, end, position = 0, 0, 0
    with open(path, "rb") as file:
        for text in file:
            position += len(text)
            if text.startswith(b'{"block"') and text.endswith(b"\n"):
                blocks, end = blocks + 1, position
    if end < position:
        with open(path, "r+b") as file:
            file.truncate(end)
    return blocks


def append(path: Path, lines: Sequence[dict[str, Any]], end_line: dict[str, Any]) -> None:
    """Appends one block. `end_line` must hold the key `block`, which no other line may begin with."""
    end_line = {"block": end_line["block"], **end_line}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in [*lines, end_line]))
        file.flush()
        os.fsync(file.fileno())


def records(path: Path) -> Iterator[dict[str, Any]]:
    """All lines but the end lines."""
    return (line for line in read(path) if "block" not in line)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """All lines in order, end lines included.

    Raises:
        ValueError: a line is not JSON; the message names file and line.
    """
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                yield json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
