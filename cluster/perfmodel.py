"""How long prefill and fetches will take, fitted online from how long they took.

Both are linear in a few known terms, so a fit is least squares with non-negative coefficients: predictions are never
negative and grow with every argument. The past is forgotten exponentially, one slow measurement (a page fault storm, a
process that was stopped) counts at most `OUTLIER` times what was expected, and until something is measured a prior
speaks that takes fetching to be faster than computing. No clock, no threads, no numpy; not for wall-clock deadlines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

Path = Literal["memory", "disk", "remote"]
FORGET = 0.97  # what a measurement still counts when the next one has come: about 33 are remembered
OUTLIER = 3.0
PRIOR_WEIGHT = 0.1  # measurements that each coefficient of the prior is worth
SWEEPS = 30  # of coordinate descent; the last solution is the start, so few are needed

# ms per step, per token, and per pair of a token and one it attends to: 5,000 tokens a second
PREFILL_PRIOR = (1.0, 0.2, 1e-5)
# ms per fetch and per byte: one copy out of shared memory at 2 GB/s; a disk and a network at 0.5 GB/s
FETCH_PRIOR: dict[Path, tuple[float, float]] = {"memory": (1.0, 5e-7), "disk": (2.0, 2e-6), "remote": (3.0, 2e-6)}


class _Fit:
    """y = sum of coefficient * term, with coefficients >= 0.

    Works on shares: with p = the prior's prediction for the same terms, y / p = sum of theta_i * (prior_i * term_i / p)
    whatever the units are; the shares add up to one, errors are relative, theta = 1 is the prior (ridge towards it).
    Non-negative least squares by coordinate descent on the normal equations, which are at most 3 x 3.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior = prior
        size = len(prior)
        self._theta = [1.0] * size
        self._moments = [[0.0] * size for _ in range(size)]  # sum of share_i * share_j
        self._targets = [0.0] * size  # sum of share_i * y / p

    def predict(self, terms: Sequence[float]) -> float:
        return sum(t * p * x for t, p, x in zip(self._theta, self._prior, terms, strict=True))

    def observe(self, terms: Sequence[float], y: float) -> None:
        scale = sum(p * x for p, x in zip(self._prior, terms, strict=True))
        shares = [p * x / scale for p, x in zip(self._prior, terms, strict=True)]
        target = min(y, OUTLIER * max(self.predict(terms), scale / 100)) / scale
        self.forget()
        for i, share in enumerate(shares):
            self._targets[i] += share * target
            for j, other in enumerate(shares):
                self._moments[i][j] += share * other
        self._solve()

    def forget(self) -> None:
        """Everything measured counts a little less against the prior."""
        self._targets = [FORGET * value for value in self._targets]
        self._moments = [[FORGET * value for value in row] for row in self._moments]

    def fade(self) -> None:
        """A step back towards the prior, without a measurement."""
        self.forget()
        self._solve()

    def _solve(self) -> None:
        theta = self._theta
        for _ in range(SWEEPS):
            for i, row in enumerate(self._moments):
                others = sum(value * theta[j] for j, value in enumerate(row) if j != i)
                theta[i] = max(0.0, (self._targets[i] + PRIOR_WEIGHT - others) / (row[i] + PRIOR_WEIGHT))


class PerfModel:
    """Predictions for one worker. `step_tokens` is how many tokens it computes in a step."""

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._prefill = _Fit(PREFILL_PRIOR)
        self._fetch = {path: _Fit(prior) for path, prior in FETCH_PRIOR.items()}

    def prefill_ms(self, tokens: int, context: int) -> float:
        """Computing `tokens` that come after `context` others, in as many steps as it takes."""
        if tokens <= 0:
            return 0.0
        return self._prefill.predict((-(-tokens // self._step_tokens), tokens, _pairs(tokens, context)))

    def fetch_ms(self, size: int, path: Path) -> float:
        """Bringing that many bytes from one store."""
        return self._fetch[path].predict((1.0, size)) if size > 0 else 0.0

    def observe_step(self, chunks: Iterable[tuple[int, int]], ms: float) -> None:
        """One step took that long for these (tokens, context) chunks. Decodes that run along add their tokens; a step
        of decodes alone says little about prefill (it is bound by memory, not by compute) and is not to be told."""
        tokens = pairs = 0.0
        for take, context in chunks:
            tokens += take
            pairs += _pairs(take, context)
        if tokens:
            self._prefill.observe((1.0, tokens, pairs), ms)

    def observe_fetch(self, size: int, path: Path, ms: float) -> None:
        if size > 0:
            self._fetch[path].observe((1.0, size), ms)

    def passed_over(self, path: Path) -> None:
        """That path was not taken. One that never is would never be measured again: its past weighs a little less."""
        self._fetch[path].fade()


def _pairs(tokens: int, context: int) -> float:
    """(token, token it attends to) pairs."""
    return tokens * (context + tokens / 2)
