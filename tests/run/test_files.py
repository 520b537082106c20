"""Run directories are numbered and locked, files in them are whole or absent, logs can be cut back."""

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.run.files import (
    MismatchError,
    RunDirError,
    RunLockedError,
    append_jsonl,
    cut_logs,
    lock,
    log_sizes,
    misfit,
    new_run_dir,
    read_json,
    read_jsonl,
    remove_if_empty,
    written_whole,
)


def test_run_directories_are_numbered_and_never_reused(tmp_path):
    names = [new_run_dir(tmp_path / "runs", "demo").name for _ in range(2)]
    assert names == ["demo-001", "demo-002"]
    (tmp_path / "runs" / "demo-007").mkdir()
    (tmp_path / "runs" / "demo-b-099").mkdir()
    assert new_run_dir(tmp_path / "runs", "demo").name == "demo-008"
    assert new_run_dir(tmp_path / "runs", "demo-b").name == "demo-b-100"
    for name in ("", "a/b", ".."):
        with pytest.raises(ValueError, match="run_name"):
            new_run_dir(tmp_path, name)


def test_run_directories_when_another_process_is_faster(tmp_path, monkeypatch):
    (tmp_path / "demo-001").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: iter(()))  # it was not there yet when we looked
        assert new_run_dir(tmp_path, "demo").name == "demo-002"


def test_run_directory_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="output_dir"):
        new_run_dir(tmp_path / "file", "demo")


def test_a_second_process_is_told_who_holds_the_lock(tmp_path):
    code = "import sys; from grpo.run import files\nwith files.lock(sys.argv[1]): print('locked')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parents[2]}
    with lock(tmp_path):
        second = subprocess.run(command, **options)
        assert second.returncode != 0 and f"in use by process {os.getpid()}" in second.stderr
        with pytest.raises(RunLockedError):
            with lock(tmp_path):
                pass
    assert subprocess.run(command, **options).stdout == "locked\n"


def test_only_an_empty_directory_is_taken_back(tmp_path):
    for name in ("empty", "locked", "begun"):
        (tmp_path / name).mkdir()
    with lock(tmp_path / "locked"), lock(tmp_path / "begun"):
        (tmp_path / "begun" / "config.yaml").write_text("")
    for name in ("empty", "locked", "begun", "missing"):
        remove_if_empty(tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "begun").iterdir()) == [".lock", "config.yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_leftovers_are_removed_by_the_next_holder(tmp_path):
    for name in ("start.tmp-1/trainer", "warm_start/checkpoints/step-000020.tmp-removed", "start/trainer"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "config.yaml.tmp-12").write_text("")
    (tmp_path / "config.yaml").write_text("")
    with lock(tmp_path):
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {".lock", "config.yaml", "start", "start/trainer", "warm_start", "warm_start/checkpoints"}


# --- whole files and folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_written_whole_replaces_only_at_the_end(tmp_path, folder):
    final = tmp_path / "deep" / "final"
    for text in ("first", "second"):
        with written_whole(final) as partial:
            if folder:
                partial.mkdir()
            (partial / "file" if folder else partial).write_text(text)
            assert final.exists() == (text == "second")  # the old one stays until the new one is whole
        assert (final / "file" if folder else final).read_text() == text
    assert [path.name for path in final.parent.iterdir()] == ["final"]


@pytest.mark.parametrize(
    "error, expected, message",
    [
        (KeyError("x"), KeyError, "x"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            OSError(errno.EACCES, "Permission denied"),
            RunDirError,
            "cannot write .*final: .*Permission denied",
        ),
        (
            OSError(errno.ENOSPC, "No space left"),
            RunDirError,
            "the disk is full: .* GB are free, and .*final",
        ),
        (Exception("No space left on device (os error 28)"), RunDirError, "the disk is full"),
    ],
)
def test_written_whole_leaves_nothing_half_written(tmp_path, error, expected, message):
    (tmp_path / "final").write_text("old")
    with pytest.raises(expected, match=message):
        with written_whole(tmp_path / "final") as partial:
            partial.mkdir()
            (partial / "half").write_text("ha")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final").read_text() == "old"


# --- JSON lines ---------------------------------------------------------------------------------------------


def test_json_lines_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(FileNotFoundError):
        list(read_jsonl(path))
    assert list(read_jsonl(path, missing_ok=True)) == []
    append_jsonl(path, {"a": 0.1 + 0.2}, {"text": "ä\u2028"}, sync=True)
    append_jsonl(path, {"a": 1})
    assert list(read_jsonl(path)) == [{"a": 0.1 + 0.2}, {"text": "ä\u2028"}, {"a": 1}]
    with pytest.raises(ValueError):
        append_jsonl(path, {"a": 2}, {"a": float("nan")})
    assert len(list(read_jsonl(path))) == 3  # nothing is written of a call that fails
    path.write_text('{"a": 1}\n{"a"')
    with pytest.raises(MismatchError, match="a.jsonl, line 2: not JSON"):
        list(read_jsonl(path))


# --- compressed JSON lines ----------------------------------------------------------------------------------

FIRST, SECOND = ({"step": 1, "ids": list(range(300))}, {"step": 1}), ({"step": 2, "text": "ä\u2028"},)


def packed(path: Path) -> tuple[bytes, bytes]:
    """Writes two members; returns each."""
    append_jsonl(path, *FIRST)
    first = path.read_bytes()
    append_jsonl(path, *SECOND)
    return first, path.read_bytes()[len(first) :]


def test_each_append_to_a_gz_file_is_a_whole_gzip_file_in_one_write(tmp_path, monkeypatch):
    first, second = packed(tmp_path / "a.jsonl.gz")
    texts = ["".join(json.dumps(record) + "\n" for record in part).encode() for part in (FIRST, SECOND)]
    assert [gzip.decompress(member) for member in (first, second)] == texts
    assert len(first) < len(texts[0]) / 2
    assert list(read_jsonl(tmp_path / "a.jsonl.gz")) == [*FIRST, *SECOND]
    with pytest.raises(ValueError):
        append_jsonl(tmp_path / "a.jsonl.gz", {"a": 2}, {"a": float("nan")})
    # Neither a time nor the name of the file: later, elsewhere, the same bytes.
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert packed(tmp_path / "b.jsonl.gz") == (first, second)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == first + second


def test_a_kill_in_a_write_costs_only_the_lines_that_are_not_whole(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    first, second = packed(path)
    append_jsonl(path, *[{"step": 3, "noise": os.urandom(99).hex()} for _ in range(99)])
    whole, before = path.read_bytes(), len(first + second)
    counts = set()
    for end in [*range(before + 2, before + 40), *range(before + 40, len(whole), 500)]:
        path.write_bytes(whole[:end])
        lines = list(read_jsonl(path))
        assert lines[:3] == [*FIRST, *SECOND] and {line["step"] for line in lines[3:]} <= {3}
        counts.add(len(lines))
        cut_logs(tmp_path, {path.name: before})
        assert path.read_bytes() == first + second
    assert min(counts) == 3 and max(counts) > 80


@pytest.mark.parametrize("at", [0, 1, 2, 12, -5])
def test_damage_in_a_gz_file_is_named_after_the_lines_before_it(tmp_path, at):
    """In the header, in the compressed data, in the checksum."""
    path = tmp_path / "a.jsonl.gz"
    first, second = packed(path)
    damaged = bytearray(second)
    damaged[at] ^= 0xFF
    path.write_bytes(first + damaged + second)
    lines = read_jsonl(path)
    with pytest.raises(MismatchError, match=r"a.jsonl.gz(, line 3)?(: not JSON| is damaged: )"):
        for expected in (*FIRST, *SECOND, None):
            assert next(lines) == expected


def test_a_gz_log_is_cut_between_members_only(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    first, second = packed(path)
    path.write_bytes(gzip.compress(b"".join(os.urandom(99) for _ in range(99))))  # packed again by the user
    with pytest.raises(
        RunDirError, match=f"a.jsonl.gz must have a gzip member that begins at byte {len(first)}"
    ):
        cut_logs(tmp_path, {path.name: len(first)})
    path.write_bytes(first + second)
    cut_logs(tmp_path, {path.name: len(first)})
    append_jsonl(path, *SECOND)
    assert path.read_bytes() == first + second
    cut_logs(tmp_path, {path.name: 0})
    assert path.read_bytes() == b"" and list(read_jsonl(path)) == []


# --- logs ---------------------------------------------------------------------------------------------------


def test_logs_are_cut_back_to_what_they_were(tmp_path):
    names = ["a.jsonl", "b.jsonl", "c.jsonl"]
    append_jsonl(tmp_path / "a.jsonl", {"step": 1, "text": "ä"})
    append_jsonl(tmp_path / "b.jsonl", {"step": 1})
    sizes, before = log_sizes(tmp_path, names), (tmp_path / "a.jsonl").read_bytes()
    assert sizes == {"a.jsonl": len(before), "b.jsonl": 12}
    append_jsonl(tmp_path / "a.jsonl", {"step": 2})
    (tmp_path / "c.jsonl").write_text('{"step": 2, "torn')
    cut_logs(tmp_path, {name: sizes.get(name, 0) for name in names})
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert (tmp_path / "b.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "c.jsonl").read_bytes() == b""


def test_a_log_that_became_shorter_is_named_and_one_that_is_gone_starts_anew(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    cut_logs(tmp_path, {"a.jsonl": 3, "gone.jsonl": 99})
    with pytest.raises(RunDirError, match="a.jsonl must have at least the 4 bytes .* got 3"):
        cut_logs(tmp_path, {"a.jsonl": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# --- lines that were changed ------------------------------------------------------------------------------

LINE = {
    "id": str,
    "tokens": int,
    "share": (None, float),
    "calls": [{"name": str}],
    "counts": {str: int},
    "?score": float,
}
WHOLE = {
    "id": "a",
    "tokens": 3,
    "share": 0.5,
    "calls": [{"name": "f", "x": 1}],
    "counts": {"ok": 1},
    "more": [],
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"share": None}, None),
        ({"share": 1}, None),
        ({"calls": []}, None),
        ({"score": 0.5}, None),
        ({"score": "high"}, "score must be a number, got 'high'"),
        ({"id": 5}, "id must be a string, got 5"),
        ({"tokens": True}, "tokens must be an integer, got True"),
        ({"tokens": 3.0}, "tokens must be an integer, got 3.0"),
        ({"tokens": 2**63}, "tokens must be an integer, got 9223372036854775808"),
        ({"share": "x"}, "share must be a number, got 'x'"),
        ({"share": 10**400}, "share must be a number, got 1000"),
        ({"share": float("inf")}, "share must be a number, got inf"),
        ({"calls": {"name": "f"}}, "calls must be a list, got {'name': 'f'}"),
        ({"calls": [{"name": "f"}, {}]}, "calls[1] lacks 'name'"),
        ({"counts": {"ok": "1"}}, "counts.ok must be an integer, got '1'"),
    ],
)
def test_a_value_of_another_shape_is_named(change, fault):
    said = misfit({**WHOLE, **change}, LINE)
    assert (said is None and fault is None) or said.startswith(fault)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"5", "the content must be an object, got 5"),
        (b"[1]", "the content must be an object"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "not JSON .NaN is no JSON number"),
        (b'{"a": "\xff"}', "not JSON .'utf-8' codec"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a": 1}', "the content lacks 'id'"),
    ],
)
def test_a_damaged_line_is_named_with_its_number(tmp_path, content, fault):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"id": "x"}\n' + content + b"\n")
    with pytest.raises(MismatchError, match=f"log.jsonl, line 2: {fault}"):
        list(read_jsonl(path, lambda _: {"id": str}))
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(MismatchError, match=f"file.json: {fault}"):
        read_json(tmp_path / "file.json", {"id": str})
