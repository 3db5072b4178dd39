"""Which GPUs each role's workers start on: by memory, by what the role is bound by, by NVLink. Pure.

    what nodes say (labels, GPUs) + what a shard needs ─► `choose` ─► role -> `Place` ─► Ray's placement groups

- A shard's part of the weights and one longest request's KV have to fit its GPU.
- Of several types of GPU, prefill gets those with the most arithmetic per byte of bandwidth and decode those with the
  least, as prompts are bound by arithmetic and tokens by memory (Patel et al., "Splitwise", ISCA 2024).
- Tensor ranks go to nodes whose NVLink connects as many GPUs as there are ranks, if there are enough of those.

Labels that set nodes apart for a role (`deploy/node_roles.py`) go before all of that. Which GPUs of a node a worker
gets is Ray's choice. Later workers go wherever they fit: nodes that are yet to come are not known here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.config import Config
from cluster.errors import StartupError
from cluster.messages import Role
from cluster.roofline import GPUS, MEMORY_USED, RESERVE_BYTES, find
from deploy.node_roles import GPU_LABEL, MEMORY_LABEL, NVLINK_LABEL, Node, Pin, pinned

GB = 1e9
MOST_STAGES = 64  # that are suggested


@dataclass(frozen=True, slots=True)
class Needs:
    """Of a model on GPUs. Sizes are bytes."""

    weights: int
    kv_token: int  # of a token's KV in all layers and KV heads
    kv_heads: int
    context: int  # tokens of the longest request

    def shard(self, tp: int, pp: int) -> float:
        """What a GPU needs at least; about, as nothing has to divide evenly."""
        return self.weights / (tp * pp) + self.request(tp, pp) + RESERVE_BYTES

    def request(self, tp: int, pp: int) -> float:
        """Of it the KV of one longest request. Ranks beyond the KV heads hold copies."""
        return self.kv_token * self.context / (min(tp, self.kv_heads) * pp)

    def fits(self, memory: float, tp: int, pp: int) -> bool:
        """On GPUs of that many bytes; 0: it is not known how many, and they are tried."""
        return not memory or self.shard(tp, pp) <= MEMORY_USED * memory


@dataclass(frozen=True, slots=True)
class Place:
    """What a role's workers ask for besides CPUs: one GPU for each shard, and these values of labels; empty: any."""

    types: tuple[str, ...] = ()  # of GPUs, for the first workers
    fitting: tuple[str, ...] = ()  # for later ones
    links: tuple[str, ...] = ()
    memories: tuple[str, ...] = ()

    def selector(self, first: bool) -> dict[str, str]:
        """In Ray's words."""
        types = self.types if first else self.fitting
        wanted = {GPU_LABEL: types, NVLINK_LABEL: self.links, MEMORY_LABEL: self.memories}
        return {label: _any_of(values) for label, values in wanted.items() if values}


def choose(config: Config, needs: Needs | None, nodes: Sequence[Node]) -> dict[Role, Place]:
    """Roles -> which GPUs. `nodes`: those that are alive. `needs`: None where workers compute on CPUs; no role is told.

    Raises StartupError, which says what there is, what the model needs and what would do, when the first workers cannot
    be placed.
    """
    if needs is None:
        return {}
    free = [int(node.gpus) for node in nodes]  # by index: what earlier roles have left of them
    chosen: dict[Role, Place] = {}
    for role, count in config.roles:
        pin = pinned(role, nodes)
        own = [index for index, node in enumerate(nodes) if node.gpus >= 1 and pin.allows(node)]
        if not own:
            raise StartupError(
                f'{role} workers compute on GPUs (runner = "cuda") and no node{pin.where} has any; use --runner torch, '
                "or add nodes with GPUs"
            )
        chosen[role] = _choose(config, role, count, needs, nodes, own, free, pin)
    return chosen


def _choose(
    config: Config,
    role: Role,
    count: int,
    needs: Needs,
    nodes: Sequence[Node],
    own: list[int],
    free: list[int],
    pin: Pin,
) -> Place:
    """Takes what it chooses from `free`."""
    tp, pp = config.grid(role)
    there = [nodes[index] for index in own]
    large = [index for index in own if needs.fits(memory(nodes[index]), tp, pp)]
    if not large:
        raise StartupError(_too_small(role, tp, pp, needs, there, pin))
    if max(nodes[index].gpus for index in large) < tp:
        raise StartupError(_too_few(role, tp, needs, [nodes[index] for index in large], pin))
    fitting = _in_order(role, {nodes[index].gpu for index in large})
    linked = [index for index in large if tp > 1 and nodes[index].linked >= tp]
    present = [node.gpu for node in there]
    for among in (linked, large):
        for most in range(1, len(fitting) + 1):
            takers = [index for name in fitting[:most] for index in among if nodes[index].gpu == name]
            if sum(free[index] // tp for index in takers) >= count * pp:
                _take(takers, free, tp, count * pp)
                types = [name for name in fitting if name in {nodes[index].gpu for index in takers}]
                links = _links(nodes, takers, large, tp) if among is linked else ()
                memories = _memories(there, [nodes[index] for index in large])
                return Place(_narrowed(types, present), _narrowed(fitting, present), links, memories)
    raise StartupError(_no_room(role, count, tp, pp, nodes, large, free, pin))


def memory(node: Node) -> float:
    """Bytes of each of its GPUs: as the node says, else as its type has; 0: neither is known."""
    known = find(node.gpu)
    return node.gpu_memory or (known.capacity if known else 0.0)


def _in_order(role: Role, types: Iterable[str]) -> list[str]:
    """The role's favourite first. What is not known comes last, whoever asks."""

    def rank(name: str) -> tuple[bool, float, str]:
        gpu = find(name)
        intensity = gpu.flops[2] / gpu.memory if gpu else 0.0
        return gpu is None, -intensity if role == "prefill" else intensity, name

    return sorted(types, key=rank)


def _take(takers: Sequence[int], free: list[int], tp: int, groups: int) -> None:
    for index in takers:
        given = min(groups, free[index] // tp)
        free[index] -= given * tp
        groups -= given


def _links(nodes: Sequence[Node], takers: Sequence[int], large: Sequence[int], tp: int) -> tuple[str, ...]:
    """The label's values that are good enough; none where every node that might be taken has such a value."""
    names = {nodes[index].gpu for index in takers}
    if all(nodes[index].linked >= tp for index in large if nodes[index].gpu in names):
        return ()
    return tuple(map(str, sorted({nodes[index].linked for index in takers})))


def _memories(there: Sequence[Node], large: Sequence[Node]) -> tuple[str, ...]:
    """The label's values that are good enough; none where types tell who is large enough, as an A100 alone does not."""
    names = {node.gpu for node in large}
    if not any(node.gpu in names and node not in large for node in there):
        return ()
    return tuple(map(str, sorted({int(node.gpu_memory // 2**30) for node in large if node.gpu_memory})))


def _narrowed(types: Sequence[str], there: Iterable[str]) -> tuple[str, ...]:
    """None where it would not narrow anything: a node group of an autoscaler need not carry the label then."""
    return () if set(types) >= set(there) or "" in types else tuple(types)


def _any_of(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"in({','.join(values)})"


# ------------------------------------------------------------------------------------------------------------ messages
def described(nodes: Sequence[Node]) -> str:
    """As `2 nodes with 8 x H200 (141 GB, NVLink of 8), 1 node with 4 x L40S (48 GB)`."""
    counted = Counter((node.gpu, int(node.gpus), memory(node), node.linked) for node in nodes)
    return ", ".join(
        f"{count} node{'s' if count > 1 else ''} with {gpus} x {name or 'GPUs of unknown type'} "
        f"({f'{size / GB:.0f} GB' if size else 'memory unknown'}{f', NVLink of {linked}' if linked > 1 else ''})"
        for (name, gpus, size, linked), count in counted.items()
    )


def _too_small(role: Role, tp: int, pp: int, needs: Needs, there: Sequence[Node], pin: Pin) -> str:
    setting = "prefill" if role == "prefill" else "decode"
    most = max(int(node.gpus) for node in there)
    ways = [
        f"--{setting}-tp {more}"
        for more in range(tp + 1, most + 1)
        if any(node.gpus >= more and needs.fits(memory(node), more, pp) for node in there)
    ][:1]
    ways += [
        f"--{setting}-pp {more}"
        for more in range(pp + 1, MOST_STAGES + 1)
        if any(node.gpus >= tp and needs.fits(memory(node), tp, more) for node in there)
    ][:1]
    room = MEMORY_USED * max(map(memory, there)) - RESERVE_BYTES - needs.weights / (tp * pp)
    tokens = int(room * min(tp, needs.kv_heads) * pp // needs.kv_token)
    ways += [f"--max-context {tokens}"] if tokens >= 1 else []
    sufficient = [name for name, gpu in GPUS.items() if needs.fits(gpu.capacity, tp, pp)]
    ways += [f"nodes with {' or '.join(sufficient)}"] if sufficient else []
    return (
        f"{role} workers of {tp} x {pp} shards need {needs.shard(tp, pp) / GB:.1f} GB on each GPU (weights "
        f"{needs.weights / (tp * pp) / GB:.1f}, KV of one request of {needs.context} tokens "
        f"{needs.request(tp, pp) / GB:.1f}, the rest for kernels), of which {MEMORY_USED:.0%} are used at most; "
        f"nodes{pin.where}: {described(there)}; use {' or '.join(ways) or 'a smaller model'}"
    )


def _too_few(role: Role, tp: int, needs: Needs, large: Sequence[Node], pin: Pin) -> str:
    setting = "prefill" if role == "prefill" else "decode"
    most = max(int(node.gpus) for node in large)
    smaller = [fewer for fewer in range(most, 0, -1) if any(needs.fits(memory(node), fewer, 1) for node in large)][:1]
    stages = math.ceil(tp / most)
    way = f"--{setting}-tp {smaller[0]}" if smaller else f"--{setting}-tp {most} --{setting}-pp {stages}"
    return (
        f"{role} workers need {tp} GPUs on one node (--{setting}-tp {tp}); nodes{pin.where} whose GPUs are large "
        f"enough: {described(large)}; use {way}, or add nodes with {tp} GPUs"
    )


def _no_room(
    role: Role, count: int, tp: int, pp: int, nodes: Sequence[Node], large: Sequence[int], free: Sequence[int], pin: Pin
) -> str:
    room = sum(free[index] // tp for index in large) // pp
    taken = sum(int(nodes[index].gpus) - free[index] for index in large)
    return (
        f"{count} {role} worker(s) need {count * tp * pp} GPUs, {tp} at a time on one node, and {room} fit; nodes"
        f"{pin.where} whose GPUs are large enough: {described([nodes[index] for index in large])}"
        f"{f', {taken} of these GPUs for other workers' if taken else ''}; start fewer workers or add nodes"
    )
