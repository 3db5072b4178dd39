"""What users ask: a generator per scenario, pure and determined by a seed, without clock, network or Locust.

A user sends what its generator yields and gives it the answer's text back, which later turns of a conversation contain.
Lengths are words (about as many tokens) and are multiplied by `length`, so that the same traffic fits a small model.
Closed loop: a user waits for its answer, so a slow server slows its own load. What arrives whatever the server does is
loadtests/open_loop.py's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass

from loadtests.client import CHAT, COMPLETIONS, Ask
from loadtests.prompts import code, text

Asks = Generator[Ask, str, None]

TENANTS = 4  # system prompts in use; the k-th is 1 / k as frequent
DOCUMENTS = 20  # in the library that questions are asked about; likewise
FILES = 8  # that are being edited
THINK_S = 2.0  # mean of the time between an answer and the next turn
LEAVING = 0.05  # share of a soak's users who go away in the middle


@dataclass(frozen=True, slots=True)
class Population:
    """What all users of a run have in common."""

    seed: int
    length: float  # times every length

    def words(self, rng: random.Random, least: int, most: int) -> int:
        return max(1, round(rng.randint(least, most) * self.length))

    def system(self, tenant: int) -> str:
        return text(f"{self.seed}/system/{tenant}", max(1, round(600 * self.length)))

    def document(self, number: int) -> str:
        return text(f"{self.seed}/document/{number}", max(1, round(800 * self.length)))

    def file(self, number: int) -> str:
        return code(f"{self.seed}/file/{number}", max(1, round(60 * self.length)))


def chat(population: Population, rng: random.Random) -> Asks:
    """Short questions behind one of a few long system prompts: the prefix is cached after its first use."""
    while True:
        system = population.system(_popular(rng, TENANTS))
        question = text(str(rng.random()), population.words(rng, 20, 80))
        yield _chat([("system", system), ("user", question)], population.words(rng, 32, 128), rng.expovariate(2.0))


def turns(population: Population, rng: random.Random) -> Asks:
    """Conversations of four to eight turns: each prompt is all that was said before and a new question."""
    while True:
        said = [("system", text(f"{population.seed}/assistant", population.words(rng, 100, 100)))]
        for turn in range(rng.randint(4, 8)):
            said.append(("user", text(str(rng.random()), population.words(rng, 10, 60))))
            think_s = rng.expovariate(1 / THINK_S) if turn else 0.0
            said.append(("assistant", (yield _chat(said, population.words(rng, 32, 96), think_s))))


def rag(population: Population, rng: random.Random) -> Asks:
    """A question about four documents, answered in a few words: long prompts, bound by prefill. The popular documents
    come first, so prompts begin alike more often than they are alike."""
    while True:
        chosen = sorted({_popular(rng, DOCUMENTS) for _ in range(4)})
        context = "\n\n".join(population.document(number) for number in chosen)
        question = text(str(rng.random()), population.words(rng, 10, 30))
        yield _chat([("user", f"{context}\n\n{question}")], population.words(rng, 16, 48), rng.expovariate(1.0))


def completion(population: Population, rng: random.Random) -> Asks:
    """An editor that asks for the next lines of a file that grows: a prompt is the one before and a little more."""
    while True:
        written = population.file(_popular(rng, FILES))
        for _ in range(rng.randint(3, 10)):
            written += code(str(rng.random()), 2)
            new = population.words(rng, 16, 64)
            body = {"prompt": written, "max_tokens": new, "temperature": 0}
            yield Ask(COMPLETIONS, body, rng.expovariate(2.0))


def soak(population: Population, rng: random.Random) -> Asks:
    """All of the above in turn, for as long as it takes; one user in twenty goes away in the middle of an answer."""
    kinds = [make(population, random.Random(rng.random())) for make in (chat, turns, rag, completion)]
    answers: list[str | None] = [None] * len(kinds)
    while True:
        kind = rng.randrange(len(kinds))
        ask = _next(kinds[kind], answers[kind])
        leaves = rng.random() < LEAVING
        answers[kind] = yield Ask(ask.path, ask.body, ask.think_s, rng.randint(1, 8) if leaves else 0)


SCENARIOS: dict[str, Callable[[Population, random.Random], Asks]] = {
    "chat": chat,
    "turns": turns,
    "rag": rag,
    "code": completion,
    "soak": soak,
}


def asks(name: str, population: Population, user: int) -> Asks:
    """All that the user of that number asks."""
    return SCENARIOS[name](population, random.Random(f"{population.seed}/{name}/{user}"))


def _next(kind: Asks, answer: str | None) -> Ask:
    """A generator's first `send` must be None."""
    return next(kind) if answer is None else kind.send(answer)


def _chat(said: list[tuple[str, str]], new: int, think_s: float) -> Ask:
    messages = [{"role": role, "content": content} for role, content in said]
    return Ask(CHAT, {"messages": messages, "max_tokens": new, "temperature": 0}, think_s)


def _popular(rng: random.Random, among: int) -> int:
    """A number below `among`; the k-th is 1 / k as frequent as the first."""
    weights = list(itertools.accumulate(1 / k for k in range(1, among + 1)))
    return rng.choices(range(among), cum_weights=weights)[0]
