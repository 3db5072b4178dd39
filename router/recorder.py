"""The trace of what this router served, for `tandem simulate`: lengths, times and shared prefixes, never text or
tokens.

One file per router in the folder `trace`, `router-ID.jsonl`. Its first line is {"tandem_trace": 1, "block_size": n};
then one object per request (of one prompt and choice) that was served, to its end or until nobody wanted more:

    arrival_ms      since the router began to record
    prompt_tokens, output_tokens, cached_tokens
    blocks          one number per block of the prompt, the last of which may be partial. Equal numbers, in any router's
                    file, mean equal prefixes; they are cut from hashes under the cluster secret and the tenant's salt
    tenant          a number, the same in any router's file
    priority
    ttft_ms         arrival to first token
    itl_ms          mean time between tokens; 0 for a single one
    prefill, decode ids of the workers it was first placed on; null where nobody prefilled apart

Lines wait in memory, at most LIMIT of them, and are written every second in a thread; what a slow disk has no room for
is dropped and counted in the log.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

LIMIT = 20_000  # lines
WRITE_S = 1.0
ID_BYTES = 6  # of a hash: JSON numbers stay exact, and a million blocks collide with a chance of 1 in 500

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line."""

    arrival_ms: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    tenant: int
    priority: int
    ttft_ms: float
    itl_ms: float
    cached_tokens: int
    prefill: str | None
    decode: str | None


def block_ids(hashes: Sequence[bytes], prompt_tokens: int, block_size: int) -> tuple[int, ...]:
    """Hashes of the full blocks as numbers; a partial last block, which nobody shares, gets one at random."""
    full = prompt_tokens // block_size
    ids = tuple(int.from_bytes(digest[:ID_BYTES]) for digest in hashes[:full])
    return ids if prompt_tokens % block_size == 0 else (*ids, random.getrandbits(8 * ID_BYTES))


class Recorder:
    """One router's file. Nothing that goes wrong with it concerns a request."""

    def __init__(self, folder: str, router_id: str, block_size: int) -> None:
        self.block_size = block_size
        self._started_s = time.monotonic()
        self._path = Path(folder) / f"{router_id}.jsonl"
        self._lines: list[Recorded] = []
        self._dropped = 0
        self._header = orjson.dumps({"tandem_trace": 1, "block_size": block_size}) + b"\n"
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._write_forever(), name="recorder")

    async def close(self) -> None:
        """What was recorded is in the file."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._flush()

    def since_start_ms(self, monotonic_s: float) -> float:
        return max(0.0, 1000 * (monotonic_s - self._started_s))

    def record(self, line: Recorded) -> None:
        """Does not wait."""
        if len(self._lines) < LIMIT:
            self._lines.append(line)
        else:
            self._dropped += 1

    async def _write_forever(self) -> None:
        while True:
            await asyncio.sleep(WRITE_S)
            await asyncio.shield(self._flush())

    async def _flush(self) -> None:
        lines, self._lines = self._lines, []
        dropped, self._dropped = self._dropped, 0
        if dropped:
            log.warning("%s: %d requests are not recorded, the disk is too slow", self._path, dropped)
        try:
            await asyncio.to_thread(self._append, lines)
        except OSError as error:
            log.warning("%s: %d requests are not recorded: %s", self._path, len(lines), error)

    def _append(self, lines: list[Recorded]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if file.tell() == 0:
                file.write(self._header)
            for line in lines:
                file.write(orjson.dumps(line) + b"\n")
