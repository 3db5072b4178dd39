"""Whether the shards that were asked for fit the model and the nodes, and what room Ray is asked for. Pure.

The tensor parallel ranks of one pipeline stage, a tensor group, exchange sums several times per layer: they must be on
one node. Stages pass activations on once a step and may be on different ones. One CPU per thread of every shard, and a
GPU where it computes on one.
Which nodes a worker may be on is said in `deploy/node_roles.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from cluster.config import Config
from cluster.errors import ModelError, StartupError
from cluster.messages import Role
from cluster.pools import Spec
from deploy.node_roles import ROLE_LABEL, Node, pinned
from workers.shard import Sizes, check


def check_model(config: Config, sizes: Sizes) -> None:
    """Raises ModelError, naming the setting and what it may be, when the model cannot be cut as configured."""
    for role, _ in config.roles:
        tp, pp = config.grid(role)
        try:
            check(sizes, tp, pp)
        except ModelError as error:
            setting = _setting(role)
            raise ModelError(f"--{setting}-tp {tp} --{setting}-pp {pp}: {error.message}") from None


def check_nodes(config: Config, nodes: Sequence[Node]) -> None:
    """Raises StartupError when those nodes cannot hold the first workers at once. `config` is resolved; those that
    `scale` allows beyond them may have to wait for nodes.

    What passes may still not fit, as packing goes; the deadline on placement groups is for that.
    """
    nodes = [node for node in nodes if node.cpus]
    if not nodes:
        raise StartupError("no node of the Ray cluster has CPUs for workers; see `ray status`, and start or await one")
    if config.runner == "cuda" and not any("GPU" in node.resources for node in nodes):
        raise StartupError(
            "no node of the Ray cluster has GPUs, which runner cuda needs; see `ray status`, or use torch"
        )
    sharing: dict[tuple[int, ...], list[tuple[Role, int]]] = defaultdict(list)  # same nodes -> roles, workers of each
    for role, count in config.roles:
        pin = pinned(role, nodes)
        takers = tuple(index for index, node in enumerate(nodes) if pin.allows(node))
        if not takers:
            raise StartupError(
                f"no node is for {role} workers: all {len(nodes)} with CPUs are set apart for another role; start one "
                f"with `ray start --labels {ROLE_LABEL}={role}`, or one without that label"
            )
        sharing[takers].append((role, count))
    for takers, roles in sharing.items():
        where = "" if len(takers) == len(nodes) else pinned(roles[0][0], nodes).where
        _check_pool(config, roles, [nodes[index].cpus for index in takers], where)


def _check_pool(config: Config, roles: Sequence[tuple[Role, int]], cpus: Sequence[float], where: str) -> None:
    """Workers of those roles on nodes of so many CPUs. `where` says which nodes these are; empty: all."""
    largest, shards = max(cpus), sum(count * math.prod(config.grid(role)) for role, count in roles)
    groups: list[int] = []  # CPUs of every tensor group
    for role, count in roles:
        tp, pp = config.grid(role)
        size = tp * config.threads
        groups += [size] * (count * pp)
        if size > largest:
            raise StartupError(
                f"{role} workers need {size} CPUs on one node (--{_setting(role)}-tp {tp} x {config.threads} threads) "
                f"and the largest{where} has {largest:g}; {_allowed(role, tp, config.threads, int(largest))}"
            )
    for size in sorted(set(groups), reverse=True):
        wanted, room = sum(group >= size for group in groups), sum(int(each // size) for each in cpus)
        if wanted > room or sum(groups) > sum(cpus):
            raise StartupError(
                f"{shards} shards x {config.threads} threads need {sum(groups)} CPUs, {size} at a time on one "
                f"node, and {len(cpus)} node(s){where} have {sum(cpus):g}; start fewer workers, lower threads, "
                "--prefill-tp, --prefill-pp, --decode-tp or --decode-pp, or add nodes"
            )


def spec(config: Config) -> Spec:
    """What planning has to keep to."""
    least, most = config.budget
    roles: tuple[Role, ...] = ("prefill", "decode", "both")
    return Spec(
        policy=config.autoscaling,
        least=least,
        most=most,
        shards={role: math.prod(config.grid(role)) for role in roles},
        ttft_slo_ms=1000 * config.ttft_slo,
        itl_slo_ms=1000 * config.itl_slo,
        disaggregated=config.prefill > 0,
        max_sequences=config.max_sequences,
    )


def bundles(config: Config, role: Role) -> list[dict[str, float]]:
    """Pipeline stage -> the resources of its tensor group, in Ray's words. A bundle is on one node."""
    tp, pp = config.grid(role)
    gpus = {"GPU": float(tp)} if config.runner == "cuda" else {}
    return [{"CPU": float(tp * config.threads)} | gpus for _ in range(pp)]


def of_shard(config: Config) -> dict[str, float]:
    """What of a bundle is each rank's, in the words of an actor's options."""
    return {"num_cpus": config.threads, "num_gpus": 1 if config.runner == "cuda" else 0}


def _allowed(role: Role, tp: int, threads: int, largest: int) -> str:
    """Which values would do, each with the other as it is."""
    choices = [f"threads {_upto(largest // tp)}"] if largest >= tp else []
    if tp > 1 and largest >= threads:
        choices.append(f"--{_setting(role)}-tp {_upto(largest // threads)}")
    return f"use {' or '.join(choices)}" if choices else f"use --{_setting(role)}-tp 1 and threads 1"


def _upto(most: int) -> str:
    return "1" if most == 1 else f"1 to {most}"


def _setting(role: Role) -> str:
    """Whose settings a worker of that role goes by."""
    return "prefill" if role == "prefill" else "decode"
