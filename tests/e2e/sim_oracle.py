"""What the tokens of the sim runner must be: an engine of one shard with nothing cached."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from cluster.messages import Generation, Sampling
from workers.engine import Engine
from workers.sequence import Sequence
from workers.sim import SimRunner, sim_layout

BLOCK = 16


@dataclass
class Oracle:
    """Prompt and number of new tokens -> the new tokens. For any thread."""

    vocab_size: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, prompt: list[int], new: int) -> list[int]:
        with self.lock:
            runner = SimRunner(sim_layout(BLOCK), -(-(len(prompt) + new) // BLOCK), self.vocab_size)
            engine = Engine(runner, token_budget=4096, max_sequences=1, max_context=len(prompt) + new)
            generation = Generation("x", tuple(prompt), (), Sampling(max_tokens=new, temperature=0.0), b"", 0)
            sequence = Sequence(generation, "oracle", root=bytes(32), deadline=float("inf"))
            engine.add(sequence)
            while engine.sequences:
                engine.offloaded(engine.step(0.0).offloads)
            return sequence.tokens[len(prompt) :]
