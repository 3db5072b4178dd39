"""Recorded requests: what arrived when, how long it was, and which prefixes it shared; never any text or token.

Reads four formats and tells them apart by their content, compressed or not: Mooncake's and our own JSON lines, Azure's
CSV of times and lengths, and CSV of session lengths (ShareGPT's). What a format does not say is drawn from a fixed
seed, so that the same file is always the same trace. A file that is wrong is a ConfigError that names line and cause.
Changing a trace (rate, copies, lengths) is transform.py's; inventing one is generators.py's.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import ConfigError
from loadtests.simulator.conversation import Conversation

UNSAID_BLOCK = 64  # tokens a block where the file does not say: small against the prompts of chats
SEED = 0  # of what a format leaves open
MOONCAKE_BLOCK = 512
MOONCAKE_TICK_MS = 3_000  # conversation trace: timestamps are floored to ticks that fall three seconds apart
THINK_S = 30.0  # mean of the exponential time between an answer and the next turn, where a session has no times
SESSIONS_S = 1.0  # sessions that begin per second there
OUTPUT_S = 0.03  # an output token, for the order in which turns arrive when nobody waits for answers
MANY = 16  # equal timestamps that are no coincidence


class TraceRequest(NamedTuple):
    """One request. Block ids are chained: equal ids mean that the whole prefixes up to there are equal.

    `blocks` covers the prompt, ceil(prompt_tokens / block_size) of them, the last of which may be partial.
    `output_blocks` names the blocks that prompt and output fill together beyond those that the prompt fills alone (a
    next turn's prompt begins with them); empty where nobody knows. With `think_s` the request is a later turn that
    arrives that long after its session's turn before has ended; `arrival_s` then only says when it would come in an
    open loop.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    session: int = -1
    turn: int = 0
    tenant: str = ""
    priority: int = 0
    think_s: float | None = None
    output_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival; the first arrives at or after 0."""

    name: str
    block_size: int  # tokens
    requests: tuple[TraceRequest, ...]

    @property
    def seconds(self) -> float:
        """From the trace's beginning to its last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.requests) / self.seconds if self.seconds else 0.0


def load(path: str | Path) -> Trace:
    """Read a trace, whichever of the formats it is in. Raises ConfigError."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"trace {path} is empty")
    block_size, read = _format(path, lines)
    requests = sorted(read(path, lines, block_size), key=lambda r: r.arrival_s)
    if not requests:
        raise ConfigError(f"trace {path} holds no request")
    return Trace(path.name.split(".")[0], block_size, tuple(requests))


Lines = list[tuple[int, str]]  # (line number in the file, line)
Reader = Callable[[Path, Lines, int], Iterator[TraceRequest]]


def _format(path: Path, lines: Lines) -> tuple[int, Reader]:
    """(tokens a block, who reads the lines)."""
    number, first = lines[0]
    if first.lstrip().startswith("{"):
        header = _object(path, number, first)
        if "tandem_trace" in header:
            return _whole(path, number, header, "block_size", 1), _own
        if "hash_ids" in header:
            return MOONCAKE_BLOCK, _mooncake
    columns = {name.strip() for name in first.split(",")}
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return UNSAID_BLOCK, _azure
    if {"session", "turn", "input_total", "cached_prefix_tokens", "output_tokens"} <= columns:
        return UNSAID_BLOCK, _sessions
    raise _wrong(path, number, "this is none of Mooncake's, Azure's, session lengths' and our own trace formats")


def _mooncake(path: Path, lines: Lines, block_size: int) -> Iterator[TraceRequest]:
    """kvcache-ai/Mooncake, FAST25-release/traces: {"timestamp" ms, "input_length", "output_length", "hash_ids"}."""
    rows = [(number, _object(path, number, line)) for number, line in lines]
    stamps = [_number(path, number, row, "timestamp") for number, row in rows]
    # where many requests share a timestamp it is a tick's: within it they are spread evenly, or bursts are invented
    tick_ms = MOONCAKE_TICK_MS if len(stamps) > MANY * len(set(stamps)) // 2 else 0
    rng = random.Random(SEED)
    for (number, row), stamp in zip(rows, stamps, strict=True):
        arrival_s = (stamp + rng.uniform(0, tick_ms)) / 1000
        prompt, output = (_whole(path, number, row, key, 0) for key in ("input_length", "output_length"))
        yield _request(path, number, block_size, arrival_s, prompt, output, _ids(path, number, row, "hash_ids"))


def _own(path: Path, lines: Lines, block_size: int) -> Iterator[TraceRequest]:
    """What a router with `trace` set writes: a header line, then one object per finished request."""
    for number, line in lines[1:]:
        row = _object(path, number, line)
        if "tandem_trace" in row:  # files of several routers were put one after the other
            if row.get("block_size") != block_size:
                raise _wrong(path, number, f"its blocks have another size than the {block_size} tokens of those before")
            continue
        arrival_s = _number(path, number, row, "arrival_ms") / 1000
        prompt, output = (_whole(path, number, row, key, 0) for key in ("prompt_tokens", "output_tokens"))
        blocks = _ids(path, number, row, "blocks")
        tenant, priority = str(row.get("tenant", "")), int(_number(path, number, {"priority": 0} | row, "priority"))
        yield _request(path, number, block_size, arrival_s, prompt, output, blocks, tenant, priority)


def _azure(path: Path, lines: Lines, block_size: int) -> Iterator[TraceRequest]:
    """Azure/AzurePublicDataset: TIMESTAMP, ContextTokens, GeneratedTokens. No prefixes: no two blocks are equal."""
    start: datetime | None = None
    used = 0
    for number, row in _rows(path, lines):
        try:
            stamp = datetime.fromisoformat(row["TIMESTAMP"])
        except ValueError as error:
            raise _wrong(path, number, f"TIMESTAMP: {error}") from error
        start = start or stamp
        prompt, output = (_whole(path, number, row, key, 0) for key in ("ContextTokens", "GeneratedTokens"))
        blocks = tuple(range(used, used := used + -(-max(1, prompt) // block_size)))
        yield _request(path, number, block_size, (stamp - start).total_seconds(), prompt, output, blocks)


def _sessions(path: Path, lines: Lines, block_size: int) -> Iterator[TraceRequest]:
    """Lengths of conversations without times: sessions begin at random, and each turn waits for the answer before it.

    A turn's prompt begins with `cached_prefix_tokens` of what its session has said so far.
    """
    rng = random.Random(SEED)
    began = arrival_s = 0.0
    session, fresh = -1, count()
    talk = Conversation(fresh, block_size)
    for number, row in _rows(path, lines):
        prompt, output = (max(1, _whole(path, number, row, key, 0)) for key in ("input_total", "output_tokens"))
        think_s = None
        if (of := _whole(path, number, row, "session", 0)) != session:
            session, talk = of, Conversation(fresh, block_size)
            arrival_s = began = began + rng.expovariate(SESSIONS_S)
        else:
            think_s = rng.expovariate(1 / THINK_S)
            arrival_s += think_s
        blocks, output_blocks = talk.turn(prompt, output, _whole(path, number, row, "cached_prefix_tokens", 0))
        turn = _whole(path, number, row, "turn", 1) - 1
        yield TraceRequest(arrival_s, prompt, output, blocks, session, turn, "", 0, think_s, output_blocks)
        arrival_s += output * OUTPUT_S


def _request(
    path: Path,
    number: int,
    block_size: int,
    arrival_s: float,
    prompt: int,
    output: int,
    blocks: tuple[int, ...],
    tenant: str = "",
    priority: int = 0,
) -> TraceRequest:
    """Lengths of 0 (an empty answer) become 1, which is the least that a request computes."""
    prompt, output = max(1, prompt), max(1, output)
    if arrival_s < 0:
        raise _wrong(path, number, f"it arrives {-arrival_s:.3f} s before the trace begins")
    if len(blocks) != -(-prompt // block_size):
        needed = -(-prompt // block_size)
        raise _wrong(path, number, f"{prompt} tokens are {needed} blocks of {block_size}, but it names {len(blocks)}")
    return TraceRequest(arrival_s, prompt, output, blocks, tenant=tenant, priority=priority)


# ------------------------------------------------------------------------------------------------- fields of a line
def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _wrong(path, number, f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise _wrong(path, number, "not a JSON object")
    return row


def _rows(path: Path, lines: Lines) -> Iterator[tuple[int, dict[str, str]]]:
    """The CSV's rows by the names of its columns, without the header."""
    names = [name.strip() for name in next(csv.reader([lines[0][1]]))]
    for number, line in lines[1:]:
        values = next(csv.reader([line]))
        if len(values) != len(names):
            raise _wrong(path, number, f"{len(values)} fields where the header names {len(names)}")
        yield number, dict(zip(names, (value.strip() for value in values), strict=True))


def _number(path: Path, number: int, row: dict[str, Any], key: str) -> float:
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong(path, number, f"{key} is missing or not a number") from error
    if not abs(value) < float("inf"):
        raise _wrong(path, number, f"{key} is {value}")
    return value


def _whole(path: Path, number: int, row: dict[str, Any], key: str, least: int) -> int:
    value = _number(path, number, row, key)
    if value != int(value) or value < least:
        raise _wrong(path, number, f"{key} is {row[key]}, which is no whole number of {least} or more")
    return int(value)


def _ids(path: Path, number: int, row: dict[str, Any], key: str) -> tuple[int, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise _wrong(path, number, f"{key} is no list of whole numbers of 0 or more")
    return tuple(values)


def _wrong(path: Path, number: int, cause: str) -> ConfigError:
    return ConfigError(f"trace {path}, line {number}: {cause}")
