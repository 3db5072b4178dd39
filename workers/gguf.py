"""A GGUF file, converted once into a Hugging Face model directory that every loader understands.

    model.gguf ─► ~/.cache/tandem/<sha256 of the file>-<converter version>/   config, weights, tokenizer

Tensors are dequantized and written one at a time, so memory holds one tensor, not the model. The directory appears by
a rename when it is complete: a killed conversion leaves nothing that looks like a model, and processes that convert
the same file at once wait for one of them. Serves only the directory; nothing here computes with the weights.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from cluster.errors import ModelError
from workers.gguf_config import model_config, token_ids
from workers.gguf_tensors import check_complete, plan
from workers.gguf_tokenizer import Metadata, build_tokenizer, end_token_ids, tokenizer_config
from workers.model_cache import cache_root
from workers.safetensors_writer import write_shards

CONVERTER_VERSION = 1  # raise when the same GGUF file would convert to something else
LOCK_S = 1800.0  # another process converting a large model from a slow disk
LOCK_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class _Source:
    """An open GGUF file."""

    metadata: Metadata
    tensors: dict[str, Any]  # GGUF name -> gguf.ReaderTensor


def convert(path: Path, progress: Callable[[float], None]) -> Path:
    """The directory for this file, made now unless it is there already. `progress` gets the fraction done, 0 to 1.

    Raises ModelError when the file is not a GGUF file, is damaged or holds a model that is not supported.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file; give a .gguf file or a Hugging Face directory")
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        target = cache_root() / f"{digest}-{CONVERTER_VERSION}"
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(target.with_suffix(".lock")):
                if not target.is_dir():  # else another process made it while this one waited
                    _build(path, target, progress)
    except OSError as error:
        raise ModelError(
            f"cannot convert {path}: {error} (the cache is in {cache_root()}; XDG_CACHE_HOME moves it)"
        ) from None
    progress(1.0)
    return target


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel releases it when its holder dies."""
    deadline = time.monotonic() + LOCK_S
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ModelError(
                        f"another process has held {lock} for {LOCK_S:.0f} s; stop it and try again"
                    ) from None
                time.sleep(LOCK_POLL_S)
        yield


def _build(path: Path, target: Path, progress: Callable[[float], None]) -> None:
    """Only under the lock, so a half-made directory found here belongs to a process that died."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_model(_open(path), partial, progress)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(target)


def _open(path: Path) -> _Source:
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # whatever its parser trips over
        raise ModelError(f"{path} is damaged or incomplete ({error}); download it again") from None
    if metadata.get("split.count", 0) > 1:
        raise ModelError(f"{path} is one part of a split model; join the parts with llama-gguf-split --merge")
    return _Source(metadata, {tensor.name: tensor for tensor in reader.tensors})


def _write_model(source: _Source, directory: Path, progress: Callable[[float], None]) -> None:
    metadata, tensors = source.metadata, source.tensors
    try:
        config = model_config(metadata, tensors)
    except KeyError as error:
        raise ModelError(f"the GGUF file lacks {error}; download it again") from None
    planned = plan(tensors, config, permuted=metadata["general.architecture"] == "llama")
    check_complete(set(planned), config)
    ends = end_token_ids(metadata)
    generation = token_ids(metadata, ends)
    build_tokenizer(metadata).save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(metadata, config["max_position_embeddings"]))
    _write_json(directory / "config.json", config | generation | {"eos_token_id": ends[0] if ends else None})
    _write_json(directory / "generation_config.json", generation)
    if template := metadata.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template)
    write_shards(directory, planned, progress)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
