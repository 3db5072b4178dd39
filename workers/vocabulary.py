"""Sampling when every tensor rank of the last stage has the logits of its part of the vocabulary: the token that
`workers.sampling` would choose from all of them, without bringing them together.

    1. every rank offers its best (value, id) of every row; the best offer is the token, or else the row's largest logit
    2. only for top-k and top-p: the ranks' largest logits decide how low a logit may be; where they cannot, all do
    3. only for rows with a filter: every rank offers its best draw among what the filters leave

Each is one gather, so greedy and unfiltered rows take one. All ranks compute the same from what was gathered. Among
equals the lowest id wins; noise is a function of seed, position and id, hence the same in any part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.sampling import gumbel
from workers.draw import Draw
from workers.links import Links
from workers.sampling import adjust, lowest, mass_above, ranked_floor, sample
from workers.shard import Shard, split

CANDIDATES = 256  # logits per row and rank in step 2: few nuclei are larger, and those cost one more gather
Offer = tuple[float, int]  # value, token id


def sample_slice(logits: Tensor, draws: Sequence[Draw], shard: Shard, vocab_size: int, links: Links) -> list[int]:
    """One token per row, the same on all tensor ranks. logits [R, V]: those of the shard's part of the vocabulary."""
    if shard.tp == 1:
        return sample(logits, draws)
    offers, filtered = _offers(logits.float(), draws, shard.vocabulary[0])
    peaks, tokens = _best(offers, logits.device, links)
    if not filtered:
        return tokens
    floors = {row: lowest(peaks[row], draws[row].sampling) for row in filtered}
    ranked = [row for row in filtered if draws[row].sampling.top_k or draws[row].sampling.top_p < 1.0]
    if ranked:
        search = _FloorSearch(draws, filtered, peaks, shard.tp, vocab_size, links)
        floors |= search.among_candidates({row: floors[row] for row in ranked})
    offers = [_draw(values, floors[row], draws[row], shard.vocabulary[0]) for row, values in filtered.items()]
    for row, token in zip(filtered, _best(offers, logits.device, links)[1], strict=True):
        tokens[row] = token
    return tokens


def _offers(logits: Tensor, draws: Sequence[Draw], first: int) -> tuple[list[Offer], dict[int, Tensor]]:
    """Per row the best here; and, for rows whose token the filters decide, row -> what is compared [V]."""
    best = logits.argmax(-1)
    values, token_ids = logits.gather(-1, best[:, None])[:, 0].tolist(), (best + first).tolist()
    offers: list[Offer] = list(zip(values, token_ids, strict=True))
    filtered = {}
    for row, draw in enumerate(draws):
        s = draw.sampling
        if draw.greedy and not draw.adjusted:
            continue
        compared = adjust(logits[row], draw, first)
        if draw.greedy:
            offers[row] = _largest(compared, first)
            continue
        compared = compared / s.temperature
        if s.top_k or s.top_p < 1.0 or s.min_p > 0:
            filtered[row] = compared
            offers[row] = _largest(compared, first)
        else:
            offers[row] = _draw(compared, -math.inf, draw, first)
    return offers, filtered


def _largest(values: Tensor, first: int) -> Offer:
    index = int(values.argmax())
    return float(values[index]), first + index


def _draw(values: Tensor, floor: float, draw: Draw, first: int) -> Offer:
    """A draw among what reaches the floor, with the noisy value that it won with."""
    token_ids = torch.arange(first, first + len(values), device=values.device)
    if floor > -math.inf:
        kept = values >= floor
        values, token_ids = values[kept], token_ids[kept]
    if not len(values):
        return -math.inf, first
    noisy = values + gumbel(draw.sampling.seed, len(draw.tokens), token_ids)
    index = int(noisy.argmax())
    return float(noisy[index]), int(token_ids[index])


def _best(offers: list[Offer], device: torch.device, links: Links) -> tuple[list[float], list[int]]:
    """Per row the largest value that any rank offers and its id. The lowest rank, hence id, wins among equals."""
    gathered = links.gather(torch.tensor(offers, dtype=torch.float64, device=device)).cpu()  # [tp, R, 2]
    rank = gathered[..., 0].argmax(0)
    values, token_ids = gathered[rank, torch.arange(len(offers))].unbind(-1)
    return values.tolist(), token_ids.long().tolist()


class _FloorSearch:
    """Finds what top-k and top-p leave of rows: the smallest logit that survives."""

    def __init__(
        self,
        draws: Sequence[Draw],
        rows: dict[int, Tensor],  # row -> what is compared here [V]
        peaks: list[float],  # row -> the largest anywhere
        tp: int,
        vocab_size: int,
        links: Links,
    ) -> None:
        self._draws, self._rows, self._peaks, self._links, self._vocab_size = draws, rows, peaks, links, vocab_size
        self._sizes = [last - first for first, last in split(vocab_size, tp)]  # tensor rank -> its part's

    def among_candidates(self, floors: dict[int, float]) -> dict[int, float]:
        """row -> floor so far -> row -> floor. Looks at every rank's largest logits, then, if need be, at all."""
        count = min(CANDIDATES, self._sizes[0])
        offers = torch.stack([self._candidates(row, floor, count) for row, floor in floors.items()])
        found, undecided = {}, {}
        for (row, floor), gathered in zip(floors.items(), self._links.gather(offers).cpu().unbind(1), strict=True):
            mass, candidates = gathered[:, 0].sum(), gathered[:, 1:].float()  # [], [tp, count]
            # nothing is missing above the last candidate of every rank that has more than those
            complete = max(
                (float(last) for last, size in zip(candidates[:, -1], self._sizes, strict=True) if size > count),
                default=-math.inf,
            )
            values = candidates.flatten().sort(descending=True).values
            ranked = self._ranked(row, values[values >= complete], floor, mass)
            if ranked > complete or complete == -math.inf:
                found[row] = ranked
            else:
                undecided[row] = floor, mass
        return found | self._among_all(undecided) if undecided else found

    def _candidates(self, row: int, floor: float, count: int) -> Tensor:  # [1 + count] fp64
        """The mass here, then the largest logits."""
        values, s = self._rows[row], self._draws[row].sampling
        offer = torch.full((1 + count,), -math.inf, dtype=torch.float64, device=values.device)
        offer[0] = 0.0
        if s.top_p < 1.0:
            offer[0] = mass_above(values, torch.tensor(self._peaks[row], dtype=torch.float32), floor)
        largest = values.topk(min(count, len(values))).values
        offer[1 : 1 + len(largest)] = largest
        return offer

    def _among_all(self, undecided: dict[int, tuple[float, Tensor]]) -> dict[int, float]:
        width = self._sizes[0]
        parts = [F.pad(self._rows[row], (0, width - len(self._rows[row])), value=-math.inf) for row in undecided]
        gathered = self._links.gather(torch.stack(parts)).cpu()  # [tp, rows, width]
        return {
            row: self._ranked(row, gathered[:, index].flatten().sort(descending=True).values, floor, mass)
            for index, (row, (floor, mass)) in enumerate(undecided.items())
        }

    def _ranked(self, row: int, values: Tensor, floor: float, mass: Tensor) -> float:
        return ranked_floor(values, floor, mass, self._draws[row].sampling, self._vocab_size)
