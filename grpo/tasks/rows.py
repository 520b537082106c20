"""Rows of a table with named columns, from JSON lines, JSON, CSV, Parquet, or a Hugging Face dataset.

A row that cannot be read is counted and named by its line; the others are used. Values are what JSON can
store: anything else, such as a date, becomes text. Left out: compressed files, and files larger than memory.
"""

from __future__ import annotations

import codecs
import csv
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.tasks import SPLITS, looked_in, nearest, user_path
from grpo.tasks.function_calling.data import Skipped
from grpo.tasks.function_calling.json_calls import Unreadable, read_json

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
OTHER_NAMES = {"test": "heldout", "valid": "validation", "val": "validation", "dev": "validation"}
_WHY = {
    "parse": "is not JSON",
    "dup_key": "has a key twice in one object",
    "nonfinite": "contains NaN or infinity",
}


@dataclass(frozen=True)
class Row:
    """`where` names it for the user: `problems.jsonl line 3`."""

    where: str
    values: dict[str, Any]


class Malformed(ValueError):
    """A row that cannot be used."""


def require(column: str, rows: list[Row], what: str) -> None:
    """Raises ValueError if no row has the column. Names the nearest one, and lists all."""
    if not any(column in row.values for row in rows):
        known = list(dict.fromkeys(name for row in rows for name in row.values))
        hint = nearest(column, known)
        raise ValueError(f"{what} must be a column of the data ({', '.join(known)}), got {column!r}{hint}")


def value_of(row: Row, column: str) -> Any:
    """Raises Malformed if the row lacks the column."""
    if column not in row.values:
        raise Malformed(f"lacks {column}")
    return row.values[column]


# --- splits -------------------------------------------------------------------------------------------------


def read_splits(
    path: str | None, subset: str | None, named: dict[str, str], skipped: Skipped
) -> dict[str, list[Row]]:
    """The rows of each split: train, and validation and heldout if the source has them.

    Args:
        path: a file; a folder with a file for each split, or saved by `datasets`; a Hugging Face id; or None
            if `named` has it all.
        subset: of a Hugging Face dataset.
        named: split -> file, or name of a split of the Hugging Face dataset.
    Raises:
        ValueError: there is nothing to read, or an extra is not installed.
    """
    path = None if path is None else str(user_path(path))
    if path is None or Path(path).is_file():
        files = {split: user_path(file) for split, file in named.items()}
        if path is not None and "train" in named:
            raise ValueError(f"path and train must not both name a file, got {path!r} and {named['train']!r}")
        if path is not None:
            files = {"train": Path(path), **files}
        if "train" not in files:
            raise ValueError("path or train must name the data, got neither")
        return {split: read_file(file, skipped) for split, file in files.items()}
    folder = Path(path)
    if folder.is_dir() and not _saved_by_datasets(folder):
        if found := _files_of_splits(folder, named):
            return {
                split: [row for file in files for row in read_file(file, skipped)]
                for split, files in found.items()
            }
        if not any(folder.rglob("*.parquet")):
            inside = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
            raise ValueError(
                f"path must be a folder with a file for each split, such as train.jsonl and heldout.jsonl, "
                f"got {path!r} with {inside}; name the files with train=FILE,heldout=FILE"
            )
    elif not folder.is_dir() and not _may_be_an_id(folder):
        near = nearest(folder.name, [file.name for file in folder.parent.glob("*")])
        raise ValueError(
            f"path must be a file, a folder or a Hugging Face dataset, got {path!r}, which is not there"
            f"{looked_in(folder)}{near}"
        )
    return _hugging_face(path, subset, named)


def _may_be_an_id(path: Path) -> bool:
    """Whether it may be `owner/name` on the Hub. If `owner` is a folder here, it is a mistyped path."""
    return len(path.parts) == 2 and path.suffix not in SUFFIXES and not path.parent.is_dir()


def _files_of_splits(folder: Path, named: dict[str, str]) -> dict[str, list[Path]]:
    """Split -> its files: `train.jsonl`, or shards such as `data/train-00000-of-00002.parquet`."""
    if named:
        return {split: [folder / file] for split, file in named.items()}
    files = sorted(file for file in [*folder.glob("*"), *folder.glob("data/*")] if file.suffix in SUFFIXES)
    found: dict[str, list[Path]] = {}
    for file in files:
        if (split := _split_of(file.stem.partition("-")[0])) is not None:
            found.setdefault(split, []).append(file)
    if not found and len(files) == 1:
        return {"train": files}
    return found if "train" in found else {}


def _split_of(name: str) -> str | None:
    name = OTHER_NAMES.get(name, name)
    return name if name in SPLITS else None


# --- files --------------------------------------------------------------------------------------------------


def read_file(path: Path, skipped: Skipped) -> list[Row]:
    """The rows of a file. Raises ValueError if it cannot be read, or has no rows."""
    if not path.is_file():
        near = nearest(path.name, [file.name for file in path.parent.glob("*")])
        raise ValueError(f"there is no file {str(path)!r}{looked_in(path)}{near}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a data file must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
    before = skipped.count
    readers = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".json": _json}
    try:
        rows = list(readers.get(path.suffix, _json_lines)(path, skipped))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got byte {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows and skipped.count == before:
        raise ValueError(f"{path} has no rows")
    return rows


def _json_lines(path: Path, skipped: Skipped) -> Iterator[Row]:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if content.lstrip()[:1] == b"[":
        yield from _json(path, skipped)
        return
    # Lines end in a line feed only: a JSON string may contain the other characters that end lines.
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            yield _object(read_json(line.decode()), where)
        except (Malformed, Unreadable, UnicodeDecodeError) as error:
            skipped.add(where, _why(error))


def _why(error: Exception) -> str:
    if isinstance(error, Unreadable):
        return _WHY[error.reason]
    return "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise Malformed("must be an object with a value for each column")
    return Row(where, value)


def _json(path: Path, skipped: Skipped) -> Iterator[Row]:
    """An array of objects, an object that contains one, or JSON lines under another name."""
    try:
        value = read_json(path.read_text(encoding="utf-8-sig"))
    except Unreadable as error:
        first = path.read_bytes().removeprefix(codecs.BOM_UTF8).strip().partition(b"\n")[0]
        if first.startswith(b"{") and first.rstrip().endswith(b"}"):
            yield from _json_lines(path, skipped)
            return
        raise ValueError(f"{path} {_WHY[error.reason]}") from None
    if isinstance(value, dict):
        only = next(iter(value.values())) if len(value) == 1 else None
        value = only if isinstance(only, list) else [value]
    if not isinstance(value, list):
        raise ValueError(f"{path} must be an array of objects")
    for number, entry in enumerate(value, 1):
        where = f"{path.name} row {number}"
        try:
            yield _object(entry, where)
        except Malformed as error:
            skipped.add(where, str(error))


def _csv(path: Path, skipped: Skipped) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header) or not all(name.strip() for name in header):
                raise ValueError(f"{path} must begin with a line of different column names, got {header}")
            if other := next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None):
                raise ValueError(
                    f"{path} must have {reader.dialect.delimiter!r} between its columns, but its first line "
                    f"has {other!r}: {header[0]!r:.100}"
                )
            while True:
                start = reader.line_num + 1
                fields = next(reader, None)
                if fields is None:
                    return
                if not fields:
                    continue  # an empty line
                where = f"{path.name} line {start}"
                if len(fields) != len(header):
                    skipped.add(where, f"must have {len(header)} fields, got {len(fields)}")
                    continue
                yield Row(where, dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num} is not CSV: {error}") from None


def _parquet(path: Path, skipped: Skipped) -> Iterator[Row]:
    _need("pyarrow", "parquet", path)
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {' '.join(str(error).split())}") from None
    for number, row in enumerate(values, 1):
        yield Row(f"{path.name} row {number}", plain(row))


def plain(value: Any) -> Any:
    """The value as JSON can store it: NaN becomes None, and any other type text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def text_of(value: Any) -> str:
    """A value inside a prompt. A list of strings becomes lettered lines: choices."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and 0 < len(value) <= 26 and all(isinstance(item, str) for item in value):
        return "\n".join(f"{chr(ord('A') + place)}. {item}" for place, item in enumerate(value))
    return "" if value is None else json.dumps(value, ensure_ascii=False)


# --- Hugging Face -------------------------------------------------------------------------------------------


def _saved_by_datasets(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _hugging_face(path: str, subset: str | None, named: dict[str, str]) -> dict[str, list[Row]]:
    _need("datasets", "datasets", path)
    import datasets

    try:
        if _saved_by_datasets(Path(path)):
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, subset)
    except Exception as error:  # of this library, its file formats and its downloads
        raise ValueError(f"path {path!r} cannot be loaded: {' '.join(str(error).split())}") from None
    tables = dict(loaded.items()) if isinstance(loaded, dict) else {"train": loaded}
    for split, name in named.items():
        if name not in tables:
            hint = nearest(name, tables)
            raise ValueError(f"{split} must be a split of {path} ({', '.join(tables)}), got {name!r}{hint}")
    if not named:
        known = [(_split_of(name), name) for name in tables]
        named = {split: name for split, name in known if split is not None}
        if "train" not in named and len(tables) == 1:
            named = {"train": next(iter(tables))}
    if "train" not in named:
        raise ValueError(f"train must name one of the splits of {path}: {', '.join(tables)}")
    return {
        split: [
            Row(f"{path} {name} row {number}", plain(dict(row))) for number, row in enumerate(tables[name], 1)
        ]
        for split, name in named.items()
    }


def _need(package: str, extra: str, path: object) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{path} needs the extra {extra}: pip install 'reflect-grpo[{extra}]'")
