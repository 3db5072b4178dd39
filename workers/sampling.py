"""The next token, as a pure function of (logits, sampling parameters, the tokens so far).

    penalties and logit_bias -> min_tokens -> temperature -> min-p -> top-k -> top-p -> draw

Each filter is a floor under the logits, so ties live or die together and the result does not depend on any order.
Rows are sampled one at a time, except that greedy rows without adjustments share one argmax: a token never depends on
who else is in the batch. Stop strings are text and belong to the router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.messages import Sampling
from kernels.sampling import gumbel
from workers.draw import Draw

CANDIDATES = 1024  # top-p looks at this many tokens first: sorting a whole vocabulary takes 30 times as long


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:  # [R, V]
    """One token per row."""
    logits = logits.float()  # argmax over bf16 takes four times as long as the cast and an argmax over fp32
    plain = [draw.greedy and not draw.adjusted for draw in draws]
    best = logits.argmax(-1).tolist() if any(plain) else []
    return [best[row] if plain[row] else _sample_row(adjust(logits[row], draw), draw) for row, draw in enumerate(draws)]


def _sample_row(logits: Tensor, draw: Draw) -> int:  # [V]
    if draw.greedy:
        return int(logits.argmax())
    values, token_ids = _keep(logits / draw.sampling.temperature, draw.sampling)
    noise = gumbel(draw.sampling.seed, len(draw.tokens), token_ids)
    return int(token_ids[(values + noise).argmax()])


def adjust(logits: Tensor, draw: Draw, first: int = 0) -> Tensor:  # [N] -> [N]
    """What the draw compares, of the token ids from `first` on: penalties, bias and min_tokens."""
    if not draw.adjusted:
        return logits
    s, size = draw.sampling, logits.shape[0]
    logits = logits.clone()
    if s.repetition_penalty != 1.0:
        seen, _ = _within(draw.tokens, first, size)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    output = draw.tokens[draw.prompt_length :]
    if output and (s.frequency_penalty or s.presence_penalty):
        written, counts = _within(output, first, size)
        logits[written] -= s.frequency_penalty * counts + s.presence_penalty
    # ids that a tokenizer knows and the model has no logit for are legal here: they cannot be drawn anyway
    for token, bias in s.logit_bias:
        if first <= token < first + size:
            logits[token - first] += bias
    if len(output) < s.min_tokens:
        logits[[token - first for token in s.stop_token_ids if first <= token < first + size]] = -math.inf
    return logits


def _within(tokens: Sequence[int], first: int, size: int) -> tuple[Tensor, Tensor]:
    """The different ids in [first, first + size), less `first`, and how often each occurs."""
    found, counts = np.unique(np.asarray(tokens, np.int64) - first, return_counts=True)
    here = (found >= 0) & (found < size)
    return torch.from_numpy(found[here]), torch.from_numpy(counts[here])


def _keep(logits: Tensor, s: Sampling) -> tuple[Tensor, Tensor]:  # [V] -> values [N], token ids [N]
    """What survives min-p, top-k and top-p. Each filters, and takes shares of, what the one before it left."""
    peak = logits.max()
    floor = lowest(float(peak), s)
    vocab_size = logits.shape[0]
    if s.top_k == 0 and s.top_p >= 1.0:
        return _at_least(logits, torch.arange(vocab_size, device=logits.device), floor)
    mass = mass_above(logits, peak, floor) if s.top_p < 1.0 and not 0 < s.top_k < vocab_size else None
    for count in (min(CANDIDATES, vocab_size), vocab_size):
        values, token_ids = logits.topk(count)  # descending
        ranked = ranked_floor(values, floor, mass, s, vocab_size)
        if ranked > float(values[-1]) or count == vocab_size:
            break
    return _at_least(values, token_ids, ranked)


def lowest(peak: float, s: Sampling) -> float:
    """The floor that min-p makes, `peak` being the largest logit."""
    return peak + math.log(s.min_p) if s.min_p > 0 else -math.inf


def ranked_floor(values: Tensor, floor: float, mass: Tensor | None, s: Sampling, vocab_size: int) -> float:
    """`floor`, raised by top-k and top-p; at most values[-1] means that more candidates are needed to tell.

    values [N]: the largest logits, descending. mass: for top-p without top-k, `mass_above` of the whole vocabulary.
    """
    if 0 < s.top_k < vocab_size:
        if s.top_k > len(values):
            return -math.inf
        floor = max(floor, float(values[s.top_k - 1]))
        mass = mass_above(values, values[0], floor)  # they hold all that is left
    if s.top_p >= 1.0:
        return floor
    assert mass is not None
    reached = (values - values[0]).exp_().cumsum(0, dtype=torch.float64) >= s.top_p * mass
    if not reached.any():
        return -math.inf if floor <= float(values[-1]) else floor
    return max(floor, float(values[int(reached.int().argmax())]))


def mass_above(logits: Tensor, peak: Tensor, floor: float) -> Tensor:  # [N], [] -> [] fp64
    """Probability of the logits that reach the floor, in multiples of the peak's."""
    return (logits - peak).exp_().masked_fill_(logits < floor, 0.0).sum(dtype=torch.float64)


def _at_least(values: Tensor, token_ids: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    if floor == -math.inf:
        return values, token_ids
    kept = values >= floor
    return values[kept], token_ids[kept]
