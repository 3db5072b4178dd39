"""What a shard received, fetched and was asked for, as messages between the shards of a worker, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from cluster.errors import ProtocolError, StoreError, TandemError, subclasses
from cluster.shard_messages import FetchedBlocks, FetchedRun, Followed, StoredRun
from kvstore.fetcher import Fetched, Path, Source
from kvstore.reader import Received

PATHS: dict[str, Path] = {path: path for path in get_args(Path)}


def followed(received: Received) -> Followed:
    told = error_told(received.error)
    return Followed(received.valid_blocks, received.first_token, received.bytes, received.seconds, *told)


def received(answer: Followed) -> Received:
    error = error_meant(answer.code, answer.message)
    return Received(answer.valid_blocks, answer.first_token, answer.bytes, answer.seconds, error)


def fetched_blocks(fetched: Fetched) -> FetchedBlocks:
    parts = tuple(FetchedRun(stored_run(source), blocks, seconds) for source, blocks, seconds in fetched.parts)
    return FetchedBlocks(fetched.valid_blocks, parts, *error_told(fetched.error))


def fetched(answer: FetchedBlocks) -> Fetched:
    parts = tuple((source_of(run.source), run.blocks, run.seconds) for run in answer.parts)
    return Fetched(answer.valid_blocks, parts, error_meant(answer.code, answer.message))


def stored_run(source: Source) -> StoredRun:
    return StoredRun(source.store, source.epoch, source.start, source.stop, source.path)


def source_of(run: StoredRun) -> Source:
    """Raises ProtocolError."""
    if run.path not in PATHS:
        raise ProtocolError(f"{run.path!r} is no path to a block: {', '.join(PATHS)}")
    return Source(run.store, run.epoch, run.start, run.stop, PATHS[run.path])


def error_told(error: TandemError | None) -> tuple[str, str]:
    return (error.code, error.message) if error is not None else ("", "")


def error_meant(code: str, message: str) -> TandemError | None:
    return subclasses(TandemError).get(code, StoreError)(message) if code else None


def packed(ids: Sequence[int]) -> bytes:
    """Block ids as i32le."""
    return np.asarray(ids, "<i4").tobytes()


def unpacked(data: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(data, "<i4").tolist()
    return ids
