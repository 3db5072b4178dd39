"""Which files the weights of a Hugging Face model directory are.

Either model.safetensors or the shards that model.safetensors.index.json names. Other formats (.bin, GGUF) are refused
with what to do. Reads no weights and needs no torch, so that the digest can be had without either.
"""

from __future__ import annotations

import json
from pathlib import Path

from cluster.errors import ModelError


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files, sorted. Raises ModelError when there are none or one that the index names is missing."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise ModelError(
                f"{directory} has neither {single.name} nor {index.name}; Tandem loads safetensors weights"
            )
        return [single]
    try:
        files = sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not a safetensors index ({error!r}); download the model again") from None
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ModelError(f"{directory} lacks {', '.join(missing)}, named in {index.name}; download the model again")
    return files
