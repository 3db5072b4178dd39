"""How long prefill, decode steps and fetches will take, fitted online from how long they took.

All are linear in a few known terms: `Rates` holds the coefficients and travels, the functions here apply them, and a
worker's `PerfModel` fits them. A fit is least squares with non-negative coefficients: predictions are never negative
and grow with every argument. The past is forgotten exponentially, a slow measurement (a page fault storm, a process
that was stopped) is ignored unless more like it follow, and what traffic does not tell apart stays in the proportions
of a prior. No clock, no threads, no numpy; not for wall-clock deadlines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from cluster.messages import Rates

Path = Literal["memory", "disk", "remote"]
PATHS: tuple[Path, ...] = ("memory", "disk", "remote")
FORGET = 0.97  # what a measured fetch still counts when the next has come: about 33 are remembered
FORGET_PREFILL = 0.985
FORGET_DECODE = 0.99  # there are many more of these steps, most of them alike
PRIOR_WEIGHT = 0.01  # measurements that each coefficient of the prior is worth: about (error of one)^2
OUTLIER = 3.0  # times the prediction: what a slow measurement counts as at most
STALL = 10.0  # times the prediction: what is no measurement ...
CONVINCING = 3  # ... unless it is the third in a row
LEAST_REST = 0.1  # of a step with prefill, however much its decodes were thought to add
SWEEPS = 30  # of coordinate descent at most; the last solution is the start, so few are needed
SETTLED = 1e-4  # relative change of a coefficient that ends them

# What is taken for true before anything is measured, of a machine that nothing is known about: 5,000 prompt tokens a
# second; decode steps of 8 ms and more; one copy out of shared memory at 2 GB/s, a disk and a network at 0.5 GB/s, so
# that fetching looks faster than computing
PRIOR = Rates(
    prefill=(1.0, 0.2, 1e-5),
    decode=(8.0, 0.1, 1e-4),
    memory=(1.0, 5e-7),
    disk=(2.0, 2e-6),
    remote=(3.0, 2e-6),
    step_tokens=512,
)


def prefill_ms(rates: Rates, tokens: int, context: int) -> float:
    """Computing `tokens` that come after `context` others, alone and in as many steps as it takes."""
    if tokens <= 0:
        return 0.0
    step, token, pair = rates.prefill
    return step * -(-tokens // rates.step_tokens) + token * tokens + pair * _pairs(tokens, context)


def decode_ms(rates: Rates, batch: int, kv_tokens: int) -> float:
    """One step of `batch` decoding sequences that have `kv_tokens` of context in all, with no prefill beside them."""
    if batch <= 0:
        return 0.0
    step, sequence, token = rates.decode
    return step + sequence * batch + token * kv_tokens


def fetch_ms(rates: Rates, size_bytes: int, path: Path) -> float:
    """Bringing that many bytes from one store."""
    if size_bytes <= 0:
        return 0.0
    fetch, byte = _coefficients(rates, path)
    return fetch + byte * size_bytes


class PerfModel:
    """Of one worker. `step_tokens` is how many tokens it computes in a step at most."""

    def __init__(self, step_tokens: int, prior: Rates | None = None) -> None:
        prior = prior or PRIOR
        self._step_tokens = step_tokens
        self._prefill = _Fit(prior.prefill, FORGET_PREFILL)
        self._decode = _Fit(prior.decode, FORGET_DECODE)
        self._fetch = {path: _Fit(_coefficients(prior, path), FORGET) for path in PATHS}

    def prefill_ms(self, tokens: int, context: int) -> float:
        """As the function of that name."""
        if tokens <= 0:
            return 0.0
        return self._prefill.predict((-(-tokens // self._step_tokens), tokens, _pairs(tokens, context)))

    def fetch_ms(self, size: int, path: Path) -> float:
        """As the function of that name."""
        return self._fetch[path].predict((1.0, size)) if size > 0 else 0.0

    def observe_step(self, chunks: Iterable[tuple[int, int]], ms: float) -> None:
        """One step took that long for these (tokens, context) chunks; a chunk of one token is a decode.

        Decodes alone are bound by memory and have a fit of their own. Of a step of both, what its decodes are known to
        add is taken off. The rest is prefill, and the less of the step it is, the less it says.
        """
        tokens = batch = kv_tokens = 0
        pairs = 0.0
        for take, context in chunks:
            if take == 1:
                batch, kv_tokens = batch + 1, kv_tokens + context
            else:
                tokens, pairs = tokens + take, pairs + _pairs(take, context)
        if tokens and ms > 0:
            along = self._decode.predict((0.0, batch, kv_tokens))
            rest = max(ms - along, LEAST_REST * ms)
            self._prefill.observe((1.0, tokens, pairs), rest, (rest / ms) ** 2)
        elif batch:
            self._decode.observe((1.0, batch, kv_tokens), ms)

    def observe_fetch(self, size: int, path: Path, ms: float) -> None:
        if size > 0:
            self._fetch[path].observe((1.0, size), ms)

    def passed_over(self, path: Path) -> None:
        """That path was not taken. One that never is would never be measured again: its past weighs a little less."""
        self._fetch[path].fade()

    def rates(self) -> Rates:
        """What was learnt so far, with its errors; how long the worker took to start is not known here."""
        weight = sum(fit.weight for fit in self._fetch.values())
        fetch_error = sum(fit.error * fit.weight for fit in self._fetch.values()) / weight if weight else 0.0
        (memory, disk, remote) = (self._fetch[path].coefficients() for path in PATHS)
        return Rates(
            prefill=_three(self._prefill.coefficients()),
            decode=_three(self._decode.coefficients()),
            memory=_two(memory),
            disk=_two(disk),
            remote=_two(remote),
            step_tokens=self._step_tokens,
            prefill_error=self._prefill.error,
            decode_error=self._decode.error,
            fetch_error=fetch_error,
        )


class _Fit:
    """y = sum of coefficient * term, with coefficients >= 0.

    Works on shares: with p = the prior's prediction for the same terms, y / p = sum of theta_i * (prior_i * term_i / p)
    whatever the units are; the shares add up to one and errors are relative. Ridge regression draws every theta towards
    the mean of y / p: a machine that is twice as slow as the prior in what was seen is taken to be so in everything.
    Non-negative least squares by coordinate descent on the normal equations, which are at most 3 x 3.
    """

    def __init__(self, prior: Sequence[float], forget: float) -> None:
        self._prior = [max(value, 1e-12) for value in prior]  # a share of nothing could never be learnt
        size = len(self._prior)
        self._forget = forget
        self._theta = [1.0] * size
        self._moments = [[0.0] * size for _ in range(size)]  # sum of share_i * share_j
        self._targets = [0.0] * size  # sum of share_i * y / p
        self._ratios = 0.0  # sum of y / p
        self._errors = 0.0  # sum of relative errors
        self._stalls = 0  # in a row
        self.weight = 0.0  # measurements that are remembered

    @property
    def error(self) -> float:
        """Mean of |predicted - measured| / measured lately, each before it was learnt from; stalls aside."""
        return self._errors / self.weight if self.weight else 0.0

    def coefficients(self) -> tuple[float, ...]:
        return tuple(t * p for t, p in zip(self._theta, self._prior, strict=True))

    def predict(self, terms: Sequence[float]) -> float:
        return sum(t * p * x for t, p, x in zip(self._theta, self._prior, terms, strict=True))

    def observe(self, terms: Sequence[float], y: float, certainty: float = 1.0) -> None:
        """`certainty`: how much of a measurement this is. A difference has the noise of what it was taken from."""
        scale = sum(p * x for p, x in zip(self._prior, terms, strict=True))
        shares = [p * x / scale for p, x in zip(self._prior, terms, strict=True)]
        predicted = max(self.predict(terms), scale / 100)
        self._stalls = self._stalls + 1 if y > STALL * predicted else 0
        if self.weight and 0 < self._stalls < CONVINCING:
            return
        target = min(y, OUTLIER * predicted) / scale
        self._age(self._forget**certainty)
        self.weight += certainty
        self._errors += certainty * (min(1.0, abs(predicted - y) / y) if y > 0 else 1.0)
        self._ratios += certainty * target
        for i, share in enumerate(shares):
            self._targets[i] += certainty * share * target
            for j, other in enumerate(shares):
                self._moments[i][j] += certainty * share * other
        self._solve()

    def fade(self) -> None:
        """A step back towards the prior, without a measurement."""
        self._age(self._forget)
        self._solve()

    def _age(self, factor: float) -> None:
        """Everything measured counts a little less against the prior."""
        self.weight *= factor
        self._errors *= factor
        self._ratios *= factor
        self._targets = [factor * value for value in self._targets]
        self._moments = [[factor * value for value in row] for row in self._moments]

    def _solve(self) -> None:
        theta = self._theta
        centre = (self._ratios + PRIOR_WEIGHT) / (self.weight + PRIOR_WEIGHT)
        for _ in range(SWEEPS):
            change = 0.0
            for i, row in enumerate(self._moments):
                others = sum(value * theta[j] for j, value in enumerate(row) if j != i)
                solved = max(0.0, (self._targets[i] + PRIOR_WEIGHT * centre - others) / (row[i] + PRIOR_WEIGHT))
                change = max(change, abs(solved - theta[i]) / (solved + theta[i] + 1e-12))
                theta[i] = solved
            if change < SETTLED:
                return


def _pairs(tokens: int, context: int) -> float:
    """(token, token it attends to) pairs."""
    return tokens * (context + tokens / 2)


def _coefficients(rates: Rates, path: Path) -> tuple[float, float]:
    match path:
        case "memory":
            return rates.memory
        case "disk":
            return rates.disk
        case "remote":
            return rates.remote


def _two(values: tuple[float, ...]) -> tuple[float, float]:
    first, second = values
    return first, second


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third
