"""Which workers serve a request: a pure function from the fleet's table and where its prefix is to a Decision.

    prefill and decode workers   ->  Route(prefill, decode): the KV is handed over;
                                     or Route(None, decode): the prompt goes to who decodes, where that costs less
    no worker of role prefill    ->  Route(None, decode)
    only workers of role prefill ->  Route(None, prefill worker): an engine accepts any job

What a route costs is `router/costs.py`, how one is chosen `router/policies.py`. Nothing is trusted for more than time:
a prefix that is not where it was thought to be is computed.
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

import numpy as np

from cluster.errors import Unavailable
from router.costs import Costs, Terms
from router.policies import POLICIES, Eligible
from router.table import Depths, FleetTable, WorkerView

__all__ = ["Ask", "Decision", "Route", "Terms", "WorkerView", "place"]

Kind = Literal["disaggregated", "append", "aggregated"]
RETRY_S = 2.0  # a worker that was lost comes back, or another in its stead
_RNG = random.Random()


class Ask(NamedTuple):
    """What is to be placed."""

    tokens: int  # prompt and output so far, at least one
    new_tokens: int  # output still expected
    excluded: frozenset[str] = frozenset()  # workers that have failed it already
    explain: bool = True  # the decision says what its route costs, and what the best other one would


class Route(NamedTuple):
    """`prefill` None: the decode worker computes the prompt as well, and no KV moves."""

    prefill: str | None
    decode: str


class Decision(NamedTuple):
    """A route and why: what it costs, and what the best other one would have."""

    route: Route
    chosen: Terms | None  # None: the ask was not to be explained
    runner_up: Terms | None  # may cost a little less, when as good as equal; None: there was no other, or no asking
    candidates: int  # workers that might have served
    policy: str
    uncached_tokens: int  # of the ask, neither on the device nor fetched

    @property
    def kind(self) -> Kind:
        """Append: whoever decodes has the beginning of the prompt on its device and computes the rest. Of a decision
        that is explained."""
        if self.route.prefill is not None:
            return "disaggregated"
        assert self.chosen is not None
        return "append" if self.chosen.device_tokens else "aggregated"


def place(
    table: FleetTable,
    ask: Ask,
    depths: Depths,
    policy: str = "least_time",
    rng: random.Random | None = None,
) -> Decision:
    """The workers for one request; tell the table with `placed`.

    `depths` maps owners' numbers to leading blocks of the prompt, as PrefixMap.lookup gives them; owners beyond its end
    have none. `rng` serves the policies that draw. Raises Unavailable when nobody is left.
    """
    eligible, candidates = _eligible(table, ask.excluded)
    costs = Costs(table, ask.tokens, ask.new_tokens, depths)
    (prefill, decode), runner_up = POLICIES[policy](costs, eligible, rng or _RNG)
    other = runner_up() if runner_up and ask.explain else None
    return Decision(
        Route(None if prefill is None else table.id(prefill), table.id(decode)),
        costs.terms(prefill, decode) if ask.explain else None,
        costs.terms(*other) if other else None,
        candidates,
        policy,
        max(0, ask.tokens - costs.known_tokens(decode if prefill is None else prefill)),
    )


def _eligible(table: FleetTable, excluded: frozenset[str]) -> tuple[Eligible, int]:
    """Who may serve, and how many those are."""
    prefill, decode = table.prefillers, table.decoders
    gone: list[int] = []
    if excluded:
        gone = [row for row in map(table.row, excluded) if row is not None]
        prefill, decode = np.setdiff1d(prefill, gone), np.setdiff1d(decode, gone)
    if not decode.size:
        prefill, decode = decode, prefill
    candidates = len(table) - len(gone)
    if not candidates:
        raise Unavailable("no worker is connected that could serve this; retry, and see /status", retry_after_s=RETRY_S)
    return Eligible(prefill, decode), candidates
