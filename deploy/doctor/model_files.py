"""Facts about the model that is to be served: whether its files are there, whole and of a kind that can be served.

Reads headers and metadata, no weights; converts and downloads nothing. The rules about formats are `workers/`'s and
`deploy/models.py`'s; what they raise is the fact.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import gguf
from safetensors import SafetensorError, safe_open

from cluster.errors import StartupError
from deploy.models import DEMO_FILE, DEMO_NAME, HUB_ID, installed_demo
from workers.architecture import load_architecture
from workers.checkpoint import weight_files


@dataclass(frozen=True, slots=True)
class ModelFiles:
    name: str
    error: str = ""  # why it cannot be served, and what to do
    bytes: int = 0  # of its weights, as they are on disk
    remote: bool = False  # it is fetched when it is first served


def model_files(model: str, weights: bool) -> ModelFiles:
    """`weights`: whether they are needed."""
    path = Path(model).expanduser() if model else installed_demo()
    if path is None:
        return ModelFiles(f"{DEMO_NAME} ({DEMO_FILE})", remote=True)
    name = model or DEMO_NAME
    try:
        if path.is_file():
            return ModelFiles(name, _gguf_error(path), path.stat().st_size)
        if path.is_dir():
            files = _directory(path, weights)
            return ModelFiles(name, next(filter(None, map(_safetensors_error, files)), ""), _size(files))
    except StartupError as error:
        return ModelFiles(name, error.message)
    if HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return ModelFiles(name, remote=True)
    return ModelFiles(name, f"there is no {path}; give a GGUF file, a Hugging Face directory or a hub id")


def _directory(path: Path, weights: bool) -> list[Path]:
    """Its weight files. Raises ModelError."""
    load_architecture(path)
    if not os.access(path / "tokenizer.json", os.R_OK):
        raise StartupError(f"{path} has no tokenizer.json that can be read; download the model again")
    return weight_files(path) if weights else []


def _gguf_error(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                return f"{path} is not a GGUF file; give a .gguf file or a Hugging Face directory"
        gguf.GGUFReader(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); correct its permissions"
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # whatever its parser trips over
        return f"{path} is damaged or incomplete ({str(error)[:80]}); download it again"
    return ""


def _safetensors_error(path: Path) -> str:
    """The header says how many bytes must follow."""
    try:
        with safe_open(path, framework="numpy"):
            return ""
    except (SafetensorError, OSError) as error:
        return f"{path} cannot be read or is incomplete ({str(error)[:120]}); download it again"


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())
