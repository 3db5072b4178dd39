"""Which nodes a worker of a role may be started on: those that the operator has set apart for it. Pure.

A node is set apart by Ray's label `tandem.role=prefill|decode`, or, where labels cannot be given, by a custom resource
`tandem-prefill` or `tandem-decode`. A role that has such nodes starts nowhere else; one that has none starts on any
node that is not labelled for the other. It is about starting only: a worker whose role is changed stays where it is.
What GPUs are good for which role is said in `deploy/hardware.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.messages import Role

ROLE_LABEL = "tandem.role"
GPU_LABEL = "ray.io/accelerator-type"  # Ray's own, which it finds out itself: H200, L40S
NVLINK_LABEL = "tandem.nvlink"  # how many of the node's GPUs NVLink connects all with each other
MEMORY_LABEL = "tandem.gpu-memory"  # GiB of each of the node's GPUs
OTHER: dict[Role, Role] = {"prefill": "decode", "decode": "prefill"}
SLIVER = 0.001  # of a custom resource: it says where, and is not used up


@dataclass(frozen=True, slots=True)
class Node:
    """A node as far as placing goes."""

    cpus: float
    label: str = ""  # value of its role label; empty: it has none
    resources: frozenset[str] = frozenset()  # names
    gpus: float = 0.0
    gpu: str = ""  # their type in Ray's words; empty: there are none, or Ray does not know
    gpu_memory: float = 0.0  # bytes of each; 0: the node does not say
    linked: int = 0  # how many NVLink connects with each other; 0: the node does not say, or none

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Node:
        """From an entry of `ray.nodes()`."""
        resources: Mapping[str, float] = entry["Resources"]
        labels: Mapping[str, str] = entry.get("Labels", {})
        return cls(
            resources.get("CPU", 0.0),
            labels.get(ROLE_LABEL, ""),
            frozenset(resources),
            resources.get("GPU", 0.0),
            labels.get(GPU_LABEL, ""),
            _number(labels.get(MEMORY_LABEL, "")) * 2**30,
            _number(labels.get(NVLINK_LABEL, "")),
        )


@dataclass(frozen=True, slots=True)
class Pin:
    """What every bundle of a worker asks of its node, in Ray's words."""

    selector: dict[str, str] = field(default_factory=dict)  # label -> value; "!value" is any other, or none
    resources: dict[str, float] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """For messages: goes behind the word node. Empty: anywhere."""
        labels = [f"labelled {key}={value}".replace("=!", " other than ") for key, value in self.selector.items()]
        return "".join(f" {what}" for what in (*labels, *(f"with the resource {name}" for name in self.resources)))

    def allows(self, node: Node) -> bool:
        wanted = self.selector.get(ROLE_LABEL, "")
        labelled = node.label != wanted[1:] if wanted.startswith("!") else wanted in ("", node.label)
        return labelled and self.resources.keys() <= node.resources


def pinned(role: Role, nodes: Sequence[Node]) -> Pin:
    """`nodes`: all that were ever in the cluster, so that a role stays pinned while its only node is being replaced."""
    if role == "both":
        return Pin()
    labels = {node.label for node in nodes}
    if role in labels:
        return Pin({ROLE_LABEL: role})
    if any(f"tandem-{role}" in node.resources for node in nodes):
        return Pin(resources={f"tandem-{role}": SLIVER})
    return Pin({ROLE_LABEL: f"!{OTHER[role]}"} if OTHER[role] in labels else {})


def _number(text: str) -> int:
    """A label's value; what is no number says nothing."""
    return int(text) if text.isdecimal() else 0
