"""Which nodes a role may use, by labels, by custom resources, and by neither."""

import pytest

from cluster.messages import Role
from deploy.node_roles import ROLE_LABEL, Node, Pin, pinned

PREFILL, DECODE, PLAIN = Node(4, "prefill"), Node(4, "decode"), Node(4)
BY_RESOURCE = Node(4, "", frozenset({"CPU", "tandem-decode"}))


@pytest.mark.parametrize(
    ("role", "nodes", "allowed"),
    [
        ("prefill", [PLAIN, PREFILL, DECODE], [PREFILL]),
        ("decode", [PLAIN, PREFILL, DECODE], [DECODE]),
        ("both", [PLAIN, PREFILL, DECODE], [PLAIN, PREFILL, DECODE]),
        ("prefill", [PLAIN], [PLAIN]),
        ("prefill", [PLAIN, DECODE], [PLAIN]),  # what is set apart for the other is not for this one
        ("prefill", [DECODE], []),
        ("decode", [PLAIN, BY_RESOURCE], [BY_RESOURCE]),
        ("prefill", [PLAIN, BY_RESOURCE], [PLAIN, BY_RESOURCE]),  # a resource keeps nobody out
        ("decode", [DECODE, BY_RESOURCE], [DECODE]),  # labels say more than resources
        ("decode", [], []),
    ],
)
def test_where_a_role_may_start(role: Role, nodes: list[Node], allowed: list[Node]) -> None:
    pin = pinned(role, nodes)
    assert [node for node in nodes if pin.allows(node)] == allowed


def test_a_node_is_read_as_ray_tells_of_it() -> None:
    entry = {"Alive": True, "Resources": {"CPU": 3.0, "memory": 1e9}, "Labels": {ROLE_LABEL: "decode", "ray.io/x": "y"}}
    assert Node.of(entry) == Node(3.0, "decode", frozenset({"CPU", "memory"}))
    assert Node.of({"Alive": False, "Resources": {}}) == Node(0.0)


@pytest.mark.parametrize(
    ("pin", "text"),
    [
        (Pin(), ""),
        (Pin({ROLE_LABEL: "decode"}), " labelled tandem.role=decode"),
        (Pin({ROLE_LABEL: "!decode"}), " labelled tandem.role other than decode"),
        (Pin(resources={"tandem-decode": 0.001}), " with the resource tandem-decode"),
    ],
)
def test_what_is_said_of_it(pin: Pin, text: str) -> None:
    assert pin.where == text
