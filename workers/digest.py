"""One digest of a model's files, which is part of every KV block's identity.

Workers share blocks only if their weights are the same bytes. Hashing takes about a second per gigabyte or two, so the
digests of single files are remembered by path, size and modification time. The cache is an optimisation: a missing,
broken or unwritable one costs a hash. No torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.errors import ModelError
from workers.checkpoint import weight_files
from workers.model_cache import cache_root

CHUNK_BYTES = 4 * 2**20
_log = logging.getLogger(__name__)


def weights_digest(directory: Path, cache: Path | None = None) -> bytes:
    """SHA-256 over the names and bytes of config.json and every weight file. Raises ModelError like `weight_files`."""
    files = [directory / "config.json", *weight_files(directory)]
    cache = cache or cache_root() / "digests.json"
    known = _read_cache(cache)
    try:
        keys = [_cache_key(file) for file in files]
        with ThreadPoolExecutor() as pool:  # hashlib releases the lock
            digests = list(
                pool.map(lambda item: known.get(item[0]) or _file_digest(item[1]), zip(keys, files, strict=True))
            )
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from None
    fresh = dict(zip(keys, digests, strict=True))
    if not fresh.items() <= known.items():
        _write_cache(cache, known | fresh)
    total = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        total.update(f"{file.name}\0{digest}\n".encode())
    return total.digest()


def _cache_key(file: Path) -> str:
    status = file.stat()
    return f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read_cache(cache: Path) -> dict[str, str]:
    try:
        known = json.loads(cache.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("ignoring %s (%s); it will be written anew", cache, error)
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(cache: Path, known: dict[str, str]) -> None:
    """Atomic, because several workers of a node may start at once; the last one wins, and a lost entry costs a hash."""
    fresh = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(known))
        fresh.replace(cache)
    except OSError as error:
        _log.warning("cannot remember weight digests in %s (%s); they will be computed at every start", cache, error)
