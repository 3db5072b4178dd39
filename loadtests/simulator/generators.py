"""Traces that nobody recorded, from a line of text and a seed: `poisson:rate=5,input=1000,output=200,seconds=600`.

One function per kind of traffic; its parameters and their defaults are what the text may set: `help_text` says them.
Rates are per second, lengths in tokens, times in seconds. The same text is always the same trace.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, count, takewhile
from pathlib import Path

from cluster.errors import ConfigError
from loadtests.simulator.conversation import Conversation
from loadtests.simulator.trace import OUTPUT_S, Trace, TraceRequest, load

MOST_REQUESTS = 5_000_000
AGENT_BLOCK = 512


def read(text: str) -> Trace:
    """The trace in the file of that name, or else the one that the text describes. Raises ConfigError."""
    return load(text) if Path(text).is_file() else generate(text)


def generate(text: str) -> Trace:
    """The trace that `kind:key=value,...` describes. Raises ConfigError that names what there is."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"trace {text!r}: no such file, and no such kind of traffic; one of {help_text()}")
    defaults = {p.name: p.default for p in inspect.signature(KINDS[kind]).parameters.values()}
    given: dict[str, float] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in defaults:
            raise ConfigError(f"trace {text!r}: {kind} has no {key!r}; it takes {', '.join(defaults)}")
        given[key] = _value(text, key, value, type(defaults[key]))
    settings = defaults | given
    if settings["rate"] * settings["seconds"] * settings.get("turns", 1) > MOST_REQUESTS:
        raise ConfigError(f"trace {text!r}: that is more than {MOST_REQUESTS:,} requests; lower rate or seconds")
    trace = KINDS[kind](**settings)
    if not trace.requests:
        raise ConfigError(f"trace {text!r}: nothing arrives; raise rate or seconds")
    return trace


def help_text() -> str:
    """Every kind with its parameters and their defaults."""
    return "; ".join(
        f"{kind}:" + ",".join(f"{p.name}={p.default}" for p in inspect.signature(make).parameters.values())
        for kind, make in KINDS.items()
    )


def poisson(
    rate: float = 5.0, seconds: float = 600.0, input: int = 1000, output: int = 200, spread: float = 0.0,
    block: int = 64, seed: int = 0,
) -> Trace:  # fmt: skip
    """Independent arrivals; lengths have that coefficient of variation (0: all are equal) and no prefix in common."""
    rng = random.Random(seed)
    arrivals = _until(seconds, (rng.expovariate(rate) for _ in count()))
    return _unrelated("poisson", rng, arrivals, lambda at: (input, output), spread, block)


def gamma(
    rate: float = 5.0, cv: float = 3.0, seconds: float = 600.0, input: int = 1000, output: int = 200,
    spread: float = 0.0, block: int = 64, seed: int = 0,
) -> Trace:  # fmt: skip
    """Bursts: gamma-distributed gaps with that coefficient of variation; 1 is Poisson."""
    rng = random.Random(seed)
    arrivals = _until(seconds, (rng.gammavariate(1 / cv**2, cv**2 / rate) for _ in count()))
    return _unrelated("gamma", rng, arrivals, lambda at: (input, output), spread, block)


def square(
    rate: float = 5.0, rate2: float = 5.0, period: float = 20.0, seconds: float = 600.0, input: int = 4000,
    output: int = 50, input2: int = 500, output2: int = 400, spread: float = 0.0, block: int = 64, seed: int = 0,
) -> Trace:  # fmt: skip
    """One rate and one mix in the first half of every period, the other ones (`2`) in the second."""
    rng = random.Random(seed)

    def first(at: float) -> bool:
        return at % period < period / 2

    arrivals = _thinned(rng, seconds, max(rate, rate2), lambda at: rate if first(at) else rate2)
    return _unrelated(
        "square", rng, arrivals, lambda at: (input, output) if first(at) else (input2, output2), spread, block
    )


def diurnal(
    rate: float = 5.0, peak: float = 1.8, period: float = 86_400.0, seconds: float = 86_400.0, input: int = 1000,
    output: int = 200, spread: float = 0.0, block: int = 64, seed: int = 0,
) -> Trace:  # fmt: skip
    """A day: the rate is a sine around its mean that reaches `peak` times it (1 to 2), lowest at the beginning."""
    rng = random.Random(seed)
    swing = min(1.0, max(0.0, peak - 1))
    arrivals = _thinned(
        rng, seconds, rate * (1 + swing), lambda at: rate * (1 - swing * math.cos(2 * math.pi * at / period))
    )
    return _unrelated("diurnal", rng, arrivals, lambda at: (input, output), spread, block)


def sessions(
    rate: float = 0.5, turns: float = 4.0, first: int = 400, new: int = 100, output: int = 300, think: float = 30.0,
    system: int = 0, spread: float = 0.0, seconds: float = 600.0, block: int = 64, seed: int = 0,
) -> Trace:  # fmt: skip
    """Conversations, `rate` of which begin per second, with so many turns on average (geometric).

    A turn's prompt is all that was said before and `new` tokens; it comes about `think` seconds after the answer.
    """
    rng, fresh = random.Random(seed), count()
    common = _take(fresh, system // block)
    requests = []
    for session, at in enumerate(_until(seconds, (rng.expovariate(rate) for _ in count()))):
        talk, prompt, answer, arrival_s = Conversation(fresh, block, common), system, 0, at
        for turn in count():
            prompt += answer + _length(rng, new if turn else first, spread)
            answer = _length(rng, output, spread)
            think_s = rng.expovariate(1 / think) if turn else None
            arrival_s += think_s or 0.0
            blocks, output_blocks = talk.turn(prompt, answer)
            requests.append(
                TraceRequest(arrival_s, prompt, answer, blocks, session, turn, "", 0, think_s, output_blocks)
            )
            arrival_s += answer * OUTPUT_S
            if rng.random() >= 1 - 1 / turns:
                break
    return _trace("sessions", block, requests)


def shared(
    rate: float = 5.0, prompts: int = 20, skew: float = 1.0, system: int = 2000, input: int = 2500, output: int = 200,
    spread: float = 0.0, seconds: float = 600.0, block: int = 64, seed: int = 0,
) -> Trace:  # fmt: skip
    """Unrelated requests (`input` tokens in all) behind some system prompts, the k-th of them 1 / k**skew as often."""
    rng, fresh = random.Random(seed), count()
    begins = [_take(fresh, system // block) for _ in range(prompts)]
    weights = list(accumulate(1 / k**skew for k in range(1, prompts + 1)))
    requests = []
    for at in _until(seconds, (rng.expovariate(rate) for _ in count())):
        (begin,) = rng.choices(begins, cum_weights=weights)
        prompt = system + _length(rng, max(1, input - system), spread)
        answer = _length(rng, output, spread)
        blocks, output_blocks = Conversation(fresh, block, begin).turn(prompt, answer)
        requests.append(TraceRequest(at, prompt, answer, blocks, output_blocks=output_blocks))
    return _trace("shared", block, requests)


def agents(rate: float = 6.5, seconds: float = 600.0, seed: int = 0) -> Trace:
    """Tools and agents, after the structure of Mooncake's tool & agent trace: chats that go on and two agents with long
    instructions and short answers. About half of all prompt tokens are hits."""
    rng, fresh = random.Random(seed), count()
    instructions = {"search": _take(fresh, 12), "tool": _take(fresh, 5)}
    hello = _take(fresh, 1)
    talks: list[tuple[Conversation, int]] = []  # with the tokens said so far; the latest last
    requests = []
    for at in _until(seconds, (rng.expovariate(rate) for _ in count())):
        (kind,) = rng.choices(("chat", "search", "tool"), weights=(0.486, 0.361, 0.153))
        if kind == "chat":
            again = talks and rng.random() < 0.42
            talk, said = talks.pop(rng.randrange(len(talks))) if again else (
                Conversation(fresh, AGENT_BLOCK, hello), AGENT_BLOCK
            )  # fmt: skip
            prompt, output = said + _length(rng, 1_500 if again else 10_000, 1.2), _length(rng, 393, 0.8)
            talks = [*talks[-199:], (talk, prompt + output)]
        else:
            begin = instructions[kind]
            talk = Conversation(fresh, AGENT_BLOCK, begin)
            prompt = len(begin) * AGENT_BLOCK + _length(rng, 700, 0.7)
            output = _length(rng, 14 if kind == "search" else 20, 1.5)
        blocks, output_blocks = talk.turn(prompt, output)
        requests.append(TraceRequest(at, prompt, output, blocks, output_blocks=output_blocks))
    return _trace("agents", AGENT_BLOCK, requests)


KINDS: dict[str, Callable[..., Trace]] = {
    make.__name__: make for make in (poisson, gamma, square, diurnal, sessions, shared, agents)
}


# ------------------------------------------------------------------------------------------------ what they are made of
def _unrelated(
    name: str,
    rng: random.Random,
    arrivals: Iterable[float],
    mean: Callable[[float], tuple[int, int]],
    spread: float,
    block: int,
) -> Trace:
    """Requests without a common prefix; `mean` maps arrival -> (prompt tokens, output tokens)."""
    fresh = count()
    requests = []
    for at in arrivals:
        prompt, output = (_length(rng, tokens, spread) for tokens in mean(at))
        blocks, output_blocks = Conversation(fresh, block).turn(prompt, output)
        requests.append(TraceRequest(at, prompt, output, blocks, output_blocks=output_blocks))
    return _trace(name, block, requests)


def _trace(name: str, block: int, requests: list[TraceRequest]) -> Trace:
    return Trace(name, block, tuple(sorted(requests, key=lambda r: r.arrival_s)))


def _until(seconds: float, gaps: Iterator[float]) -> Iterator[float]:
    return takewhile(lambda at: at < seconds, accumulate(gaps))


def _thinned(rng: random.Random, seconds: float, most: float, rate: Callable[[float], float]) -> Iterator[float]:
    """Arrivals of a Poisson process whose rate changes: the fastest one's, kept by chance (Lewis, Shedler 1979)."""
    return (at for at in _until(seconds, (rng.expovariate(most) for _ in count())) if rng.random() * most < rate(at))


def _length(rng: random.Random, mean: int, spread: float) -> int:
    """Gamma-distributed with that coefficient of variation, at least 1."""
    return max(1, round(rng.gammavariate(1 / spread**2, mean * spread**2))) if spread else max(1, mean)


def _take(fresh: Iterator[int], blocks: int) -> tuple[int, ...]:
    return tuple(next(fresh) for _ in range(blocks))


def _value(text: str, key: str, value: str, kind: type) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise ConfigError(f"trace {text!r}: {key} is {value!r}, which is no number") from error
    if not 0 <= number < math.inf or (number == 0 and key not in ("seed", "spread", "system", "skew", "rate2")):
        raise ConfigError(f"trace {text!r}: {key} cannot be {value}")
    return int(number) if kind is int else number
