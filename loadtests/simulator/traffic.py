"""What a trace asks of a deployment on average, whoever serves it: the numbers that sizes are matched to."""

from __future__ import annotations

from dataclasses import dataclass

from loadtests.simulator.trace import Trace


@dataclass(frozen=True, slots=True)
class Traffic:
    """Averages over the time that the trace takes."""

    uncached_tokens_s: float  # prompt tokens that no cache can save
    output_tokens_s: float
    new_tokens: float  # uncached prompt tokens of a request
    cached_tokens: float  # the others of it
    context: float  # tokens of a sequence half way through its answer
    longest: int  # tokens of the longest request, prompt and output

    @property
    def hit_ratio(self) -> float:
        """The highest that any cache can have."""
        return self.cached_tokens / (self.cached_tokens + self.new_tokens)


def traffic(trace: Trace) -> Traffic:
    """With a cache that forgets nothing; a block can be hit as soon as a request with it has arrived."""
    seen: set[int] = set()
    prompt = cached = output = 0
    context = 0.0
    for r in trace.requests:
        full = r.blocks[: r.prompt_tokens // trace.block_size]
        hits = next((n for n, block in enumerate(full) if block not in seen), len(full))
        cached += min(hits * trace.block_size, r.prompt_tokens - 1)  # the last token is always computed
        prompt += r.prompt_tokens
        output += r.output_tokens
        context += (r.prompt_tokens + r.output_tokens / 2) * r.output_tokens
        seen.update(full, r.output_blocks)
    seconds, count = trace.seconds or 1.0, len(trace.requests)
    return Traffic(
        uncached_tokens_s=(prompt - cached) / seconds,
        output_tokens_s=output / seconds,
        new_tokens=(prompt - cached) / count,
        cached_tokens=cached / count,
        context=context / output,  # a long answer's sequence is there for longer
        longest=max(r.prompt_tokens + r.output_tokens for r in trace.requests),
    )
