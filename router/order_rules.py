"""Which orders of operators make sense: each function returns the order or raises InvalidRequest with what would.

Pure: decided by the workers that serve, what is ordered already and the configuration. What an order then brings about
is the plan's (`cluster/ordered.py`), which refuses nothing and waits instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import Config
from cluster.errors import InvalidRequest
from cluster.messages import Role
from cluster.orders import DrainOrder, Orders, RestartOrder, RoleOrder, ScaleOrder, SplitOrder


@dataclass(frozen=True, slots=True)
class Serving:
    """A worker that is connected and registered."""

    id: str
    role: Role
    shards: int


def drain(worker: str, there: Sequence[Serving], orders: Orders) -> DrainOrder:
    _known(worker, there)
    if not [other for other in there if other.id != worker and other.id not in orders.drain]:
        raise InvalidRequest(
            f"{worker} is the last worker; start another one first (`tandem scale`), or stop `tandem serve`",
            param="worker",
        )
    return DrainOrder(worker)


def roles(
    wanted: Mapping[str, Role], there: Sequence[Serving], orders: Orders, config: Config
) -> tuple[RoleOrder, ...]:
    """Of single workers; those that have an order of their own keep it."""
    _disaggregated(config)
    for worker in wanted:
        _known(worker, there)
    after = {worker.id: worker.role for worker in there} | dict(orders.roles) | dict(wanted)
    if missing := {"prefill", "decode"} - set(after.values()):
        raise InvalidRequest(
            f"nobody would be left for {missing.pop()}; give another worker that role as well", param="workers"
        )
    return tuple(RoleOrder(worker, role) for worker, role in wanted.items())


def split(prefill: int, decode: int, there: Sequence[Serving], config: Config) -> SplitOrder:
    _disaggregated(config)
    if min(prefill, decode) < 1:
        raise InvalidRequest("each role needs a worker at least; give numbers from 1", param="prefill")
    if prefill + decode != len(there):
        raise InvalidRequest(
            f"there are {len(there)} workers, not {prefill + decode}; change their number with `tandem scale` first",
            param="prefill",
        )
    return SplitOrder(prefill, decode)


def scale(least: int, most: int, config: Config) -> ScaleOrder:
    floor, budget = config.budget
    if not max(0, min(floor, 1)) <= least <= most or most < 1:
        raise InvalidRequest(
            f"{least}..{most} are no bounds; give MIN..MAX with MIN from {min(floor, 1)} and MAX from 1", param="least"
        )
    if most > budget:
        raise InvalidRequest(
            f"{most} shards are more than this deployment may have, {budget}; start it with --scale MIN..{most}",
            param="most",
        )
    smallest = min(config.prefill_tp * config.prefill_pp, config.decode_tp * config.decode_pp)
    if most < smallest:
        raise InvalidRequest(f"a worker has {smallest} shards; give at least as many", param="most")
    return ScaleOrder(least, most)


def restart(workers: Sequence[str], there: Sequence[Serving], orders: Orders) -> RestartOrder:
    """`workers` empty: all of them."""
    for worker in workers:
        _known(worker, there)
    if orders.restart is not None:
        raise InvalidRequest("a restart is under way; wait for it, or withdraw it with `tandem restart --cancel`")
    if len(there) < 2:
        raise InvalidRequest("the only worker cannot be restarted while it serves; start a second one first")
    chosen = tuple(workers) or tuple(sorted(worker.id for worker in there))
    return RestartOrder(chosen, sum(worker.shards for worker in there))


def _known(worker: str, there: Sequence[Serving]) -> None:
    if worker not in {other.id for other in there}:
        known = ", ".join(sorted(other.id for other in there)) or "none"
        raise InvalidRequest(f"no worker {worker[:100]!r} serves; there are {known}", param="worker")


def _disaggregated(config: Config) -> None:
    if config.prefill == 0:
        raise InvalidRequest("this deployment's workers all have both roles; start it with --prefill 1 or more")
