"""Replays a trace against any OpenAI-compatible server and says what each request got.

    python -m loadtests.replay --trace FILE --url http://127.0.0.1:8000 [--speed 10] [--block-size 64] [--out JSON]

Prompts are token ids made from the trace's block ids, so that requests share exactly the prefixes that the trace says.
Requests leave at their arrival times whatever the server does (open loop); a later turn of a session leaves when the
turn before has been answered and its think time is over (closed loop), unless `--open` asks for its arrival time.
Nothing is retried: a request that fails is counted as one. What the client itself was late is in the result.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx

from loadtests.simulator.trace import Trace, TraceRequest, load
from loadtests.simulator.transform import faster, limit, resized

FIRST_TOKEN = 100  # past the special tokens that come first
VOCAB = 30_000  # no less than most models have
KEPT_BLOCKS = 4096  # whose tokens are not made again
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times are seconds since the replay's beginning."""

    due_s: float
    sent_s: float
    prompt_tokens: int
    cached_tokens: int = 0
    times_s: tuple[float, ...] = ()  # of its tokens
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Raises IndexError when no token came."""
        return self.times_s[0] - self.sent_s

    @property
    def itls_s(self) -> list[float]:
        """Between its tokens; tokens that came together are 0 apart."""
        return [later - before for before, later in itertools.pairwise(self.times_s)]


def prompt(request: TraceRequest, block_size: int, vocab: int = VOCAB) -> list[int]:
    """Its tokens: those of its blocks, the last one cut."""
    blocks = (_tokens(block, block_size, vocab) for block in request.blocks)
    return list(itertools.chain.from_iterable(blocks))[: request.prompt_tokens]


@lru_cache(KEPT_BLOCKS)
def _tokens(block: int, block_size: int, vocab: int) -> list[int]:
    return random.Random(block).choices(range(FIRST_TOKEN, vocab), k=block_size)


async def replay(trace: Trace, url: str, model: str = "", open_loop: bool = False, vocab: int = VOCAB) -> list[Outcome]:
    """All of the trace's requests, in its order. `model` goes into requests where a server insists on one; `vocab`
    bounds the token ids."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S, limits=unlimited) as client:
        replaying = _Replay(client, trace.block_size, vocab, {"model": model} if model else {})
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(replaying.turns(turns)) for turns in _conversations(trace, open_loop)]
    outcomes = dict(itertools.chain.from_iterable(task.result() for task in tasks))
    return [outcomes[number] for number in range(len(trace.requests))]


Turn = tuple[int, TraceRequest]  # (place in the trace, request)


def _conversations(trace: Trace, open_loop: bool) -> list[list[Turn]]:
    """Requests of which each waits for the answer to the one before it."""
    sessions: dict[int, list[Turn]] = {}
    alone: list[list[Turn]] = []
    for turn in enumerate(trace.requests):
        if turn[1].session < 0 or open_loop:
            alone.append([(turn[0], turn[1]._replace(think_s=None))])
        else:
            sessions.setdefault(turn[1].session, []).append(turn)
    return alone + list(sessions.values())


class _Replay:
    def __init__(self, client: httpx.AsyncClient, block_size: int, vocab: int, common: dict[str, str]) -> None:
        self._client = client
        self._vocab = vocab
        self._block_size = block_size
        self._common = common
        self._start = time.perf_counter()

    async def turns(self, turns: Sequence[Turn]) -> list[tuple[int, Outcome]]:
        outcomes: list[tuple[int, Outcome]] = []
        for number, request in turns:
            due_s = self._now() + request.think_s if outcomes and request.think_s is not None else request.arrival_s
            await asyncio.sleep(max(0.0, due_s - self._now()))
            outcomes.append((number, await self._send(request, due_s)))
        return outcomes

    async def _send(self, request: TraceRequest, due_s: float) -> Outcome:
        body = self._common | {
            "prompt": prompt(request, self._block_size, self._vocab),
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        answer = _Answer()
        sent_s = self._now()
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    answer.error = f"{response.status_code} {(await response.aread())[:200].decode(errors='replace')}"
                else:
                    async for line in response.aiter_lines():
                        answer.take(line, self._now())
        except httpx.HTTPError as error:
            answer.error = answer.error or f"{type(error).__name__}: {error}"
        if not answer.error and len(answer.times_s) != request.output_tokens:
            answer.error = f"{len(answer.times_s)} tokens came where {request.output_tokens} were asked for"
        times_s = tuple(answer.times_s)
        return Outcome(due_s, sent_s, request.prompt_tokens, answer.cached_tokens, times_s, answer.error)

    def _now(self) -> float:
        return time.perf_counter() - self._start


class _Answer:
    """One stream of events as it comes in."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.cached_tokens = 0
        self.error = ""

    def take(self, line: str, now_s: float) -> None:
        if not line.startswith("data: {"):
            return
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            self.error = str(event["error"].get("message", event["error"]))
        for choice in event.get("choices", ()):
            # a server that does not give token ids is taken to send one token an event
            tokens = choice.get("token_ids")
            self.times_s += [now_s] * (len(tokens) if tokens is not None else bool(choice.get("text")))
        if usage := event.get("usage"):
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means and percentiles in milliseconds over requests that ended well. `itl` is over all their tokens,
    `itl_request` over requests' mean ITLs, `late` over how late the client itself sent them."""
    good = [o for o in outcomes if not o.error]
    prompt_tokens = sum(o.prompt_tokens for o in good)
    figures = {
        "requests": float(len(outcomes)),
        "failures": float(len(outcomes) - len(good)),
        "seconds": max((o.times_s[-1] for o in good), default=0.0),
        "hit_ratio": sum(o.cached_tokens for o in good) / prompt_tokens if prompt_tokens else 0.0,
    }
    figures |= _distribution("ttft", [o.ttft_s for o in good])
    figures |= _distribution("itl", list(itertools.chain.from_iterable(o.itls_s for o in good)))
    figures |= _distribution("itl_request", [statistics.mean(o.itls_s) for o in good if len(o.times_s) > 1])
    return figures | _distribution("late", [o.sent_s - o.due_s for o in outcomes])


def _distribution(name: str, seconds: Iterable[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    last = len(ordered) - 1
    figures = {f"{name}_p{part}_ms": 1000 * ordered[round(part / 100 * last)] for part in (50, 90, 99)}
    return {f"{name}_mean_ms": 1000 * sum(ordered) / len(ordered)} | figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay a trace against an OpenAI-compatible server.")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="name to ask for")
    parser.add_argument("--limit", type=int, help="only the first so many requests")
    parser.add_argument("--speed", type=float, default=1.0, help="times the trace's rate")
    parser.add_argument("--block-size", type=int, help="tokens per block of the trace, to make its prompts shorter")
    parser.add_argument("--output-scale", type=float, default=1.0, help="times the outputs' lengths")
    parser.add_argument("--open", action="store_true", help="later turns leave at their arrival times")
    parser.add_argument("--out", type=Path, help="JSON with the figures and every request")
    given = parser.parse_args()
    trace = load(given.trace)
    trace = resized(trace, given.block_size or trace.block_size, given.output_scale)
    trace = faster(limit(trace, given.limit or len(trace.requests)), given.speed)
    outcomes = asyncio.run(replay(trace, given.url, given.model, given.open))
    figures = summary(outcomes)
    if given.out is not None:
        rows = [dataclasses.asdict(outcome) for outcome in outcomes]
        given.out.write_text(json.dumps({"trace": trace.name, "figures": figures, "requests": rows}) + "\n")
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
