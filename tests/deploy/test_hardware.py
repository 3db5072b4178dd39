"""Which GPUs each role gets on machines as they are rented, and what is said when there are none that would do."""

import pytest

from cluster.config import Config
from cluster.errors import StartupError
from deploy.hardware import Needs, Place, choose, described
from deploy.node_roles import GPU_LABEL, MEMORY_LABEL, NVLINK_LABEL, Node
from deploy.placement import bundles

GIB = 2**30
H200 = Node(192, gpus=8, gpu="H200", gpu_memory=140 * GIB, linked=8)  # switches connect all of them
H100 = Node(192, gpus=8, gpu="H100", gpu_memory=79 * GIB, linked=8)
A100_40, A100_80 = (Node(64, gpus=8, gpu="A100", gpu_memory=gib * GIB, linked=8) for gib in (39, 79))
H100_PCIE = Node(64, gpus=4, gpu="H100", gpu_memory=79 * GIB, linked=1)
H100_PAIRS = Node(64, gpus=4, gpu="H100", gpu_memory=79 * GIB, linked=2)  # bridges connect two and two
L40S = Node(64, gpus=4, gpu="L40S", gpu_memory=44 * GIB, linked=1)
UNKNOWN = Node(64, gpus=4)  # neither Ray nor the node says what they are
CPUS = Node(64)
# in bfloat16, with 8,192 tokens of context
LLAMA_8B = Needs(weights=16_060_000_000, kv_token=131_072, kv_heads=8, context=8192)
LLAMA_8B_LONG = Needs(weights=16_060_000_000, kv_token=131_072, kv_heads=8, context=131_072)
LLAMA_70B = Needs(weights=141_200_000_000, kv_token=327_680, kv_heads=8, context=8192)


def at(node: Node, role: str) -> Node:
    """The same, set apart for a role."""
    return Node(node.cpus, role, node.resources, node.gpus, node.gpu, node.gpu_memory, node.linked)


@pytest.mark.parametrize(
    ("settings", "needs", "nodes", "prefill", "decode"),
    [
        # one kind of node leaves nothing to choose, and nothing is asked of labels
        ({}, LLAMA_8B, [H200], Place(), Place()),
        ({"prefill_tp": 4, "decode_tp": 4}, LLAMA_70B, [H200], Place(), Place()),
        ({"prefill": 2, "decode": 2}, LLAMA_8B, [L40S], Place(), Place()),
        ({}, LLAMA_8B, [CPUS, H200], Place(), Place()),
        ({}, LLAMA_8B, [UNKNOWN], Place(), Place()),  # nothing known against it
        # prefill where there is more arithmetic per byte of bandwidth, decode where there is less
        ({}, LLAMA_8B, [H200, L40S], Place(("L40S",)), Place(("H200",))),
        ({}, LLAMA_8B, [L40S, H200], Place(("L40S",)), Place(("H200",))),
        ({}, LLAMA_8B, [H200, H100], Place(("H100",)), Place(("H200",))),
        ({}, LLAMA_8B, [UNKNOWN, H200], Place(("H200",)), Place(("H200",))),
        # a role that does not fit its favourite takes of the next, too; later workers go wherever they fit
        ({"prefill": 5}, LLAMA_8B, [H200, L40S], Place(), Place(("H200",))),
        ({"prefill": 9, "decode": 3}, LLAMA_8B, [H200, L40S], Place(), Place(("H200",))),
        # what the model does not fit is out, for later workers as well
        ({"prefill_tp": 2, "decode_tp": 2}, LLAMA_70B, [H200, L40S], *[Place(("H200",), ("H200",))] * 2),
        # nodes set apart by their operator: their role takes what is there, and the other stays away
        ({}, LLAMA_8B, [at(H200, "prefill"), at(L40S, "decode")], Place(), Place()),
        ({}, LLAMA_8B, [at(H200, "prefill"), L40S, H100], Place(), Place(("H100",))),
        # tensor ranks where NVLink connects as many, if there are enough of those
        ({"prefill_tp": 4, "decode_tp": 4}, LLAMA_8B, [H100, H100_PCIE], *[Place(links=("8",))] * 2),
        ({"prefill_tp": 2, "decode_tp": 2}, LLAMA_8B, [H100_PAIRS, H100_PCIE], *[Place(links=("2",))] * 2),
        ({"prefill_tp": 2, "decode": 3}, LLAMA_8B, [H100_PAIRS, H100_PCIE], Place(links=("2",)), Place()),
        ({"prefill_tp": 4, "decode_tp": 4}, LLAMA_8B, [H100_PAIRS, H100_PCIE], Place(), Place()),  # none connects 4
        ({"prefill_tp": 4, "decode_tp": 4}, LLAMA_8B, [H100], Place(), Place()),  # all do
        # NVLink goes before the favourite: sums over PCIe cost more than bandwidth gives
        ({"prefill_tp": 4, "decode_tp": 4}, LLAMA_8B, [H200, L40S], Place(("H200",)), Place(("H200",))),
        # stages need not share a node
        ({"prefill_pp": 4, "decode_pp": 4}, LLAMA_70B, [L40S, L40S], Place(), Place()),
    ],
)  # fmt: skip
def test_where_roles_go(
    settings: dict[str, int], needs: Needs, nodes: list[Node], prefill: Place, decode: Place
) -> None:
    chosen = choose(Config(**settings), needs, nodes)
    assert chosen == {"prefill": prefill, "decode": decode}


def test_a_type_of_two_sizes_is_told_apart_by_memory() -> None:
    config = Config(prefill=0, decode_tp=4)
    assert choose(config, LLAMA_70B, [A100_40, A100_80]) == {"both": Place(memories=("79",))}
    assert choose(config, LLAMA_8B, [A100_40, A100_80]) == {"both": Place()}


def test_workers_that_do_both_take_what_is_good_for_decode() -> None:
    assert choose(Config(prefill=0, decode=2), LLAMA_8B, [L40S, H200]) == {"both": Place(("H200",))}


def test_on_cpus_nothing_is_chosen() -> None:
    assert choose(Config(), None, [H200]) == {}


@pytest.mark.parametrize(
    ("settings", "needs", "nodes", "message"),
    [
        ({}, LLAMA_70B, [H200],
            r"prefill workers of 1 x 1 shards need 145.9 GB on each GPU \(weights 141.2, KV of one request of 8192 "
            r"tokens 2.7, the rest for kernels\), of which 90% are used at most; nodes: 1 node with 8 x H200 \(150 GB, "
            r"NVLink of 8\); use --prefill-tp 2 or --prefill-pp 2 or nodes with B200$"),
        ({"prefill_tp": 2, "decode_tp": 2}, LLAMA_70B, [L40S, L40S],
            r"2 nodes with 4 x L40S \(47 GB\); use --prefill-tp 4 or --prefill-pp 2 or nodes with B200 or H20 or H"),
        ({"prefill": 0, "decode_tp": 4}, LLAMA_70B, [Node(8, gpus=2, gpu="L4")],
            r"both workers of 4 x 1 shards .* 1 node with 2 x L4 \(24 GB\); use nodes with A100 or "),
        ({}, LLAMA_8B_LONG, [Node(8, gpus=1, gpu="L4")], "use --prefill-pp 2 or --max-context 27008 or nodes"),
        ({}, LLAMA_70B, [at(H200, "decode"), at(L40S, "prefill")],
            "nodes labelled tandem.role=prefill: 1 node with 4 x L40S"),
        ({}, LLAMA_8B, [CPUS], "prefill workers compute on GPUs .* and no node has any; use --runner torch, or add"),
        ({}, LLAMA_8B, [at(CPUS, "prefill"), at(H200, "decode")], "no node labelled tandem.role=prefill has any"),
        ({"prefill_tp": 8}, LLAMA_8B, [L40S],
            r"prefill workers need 8 GPUs on one node \(--prefill-tp 8\); nodes whose GPUs are large enough: 1 node "
            r"with 4 x L40S \(47 GB\); use --prefill-tp 4, or add nodes with 8 GPUs"),
        ({"prefill": 4}, LLAMA_8B, [L40S],
            r"1 decode worker\(s\) need 1 GPUs, 1 at a time on one node, and 0 fit; .*, 4 of these GPUs for other "
            "workers; start fewer"),
        ({"prefill": 0, "decode": 3, "decode_tp": 3}, LLAMA_8B, [L40S, L40S],
            r"3 both worker\(s\) need 9 GPUs, 3 at a time on one node, and 2 fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed(settings: dict[str, int], needs: Needs, nodes: list[Node], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        choose(Config(**settings), needs, nodes)


def test_what_is_suggested_would_do() -> None:
    for settings in ({"prefill_tp": 2, "decode_tp": 2}, {"prefill_pp": 2, "decode_pp": 2}):
        assert choose(Config(**settings), LLAMA_70B, [H200])


def test_what_ray_is_asked() -> None:
    config = Config(runner="cuda", prefill_tp=4, prefill_pp=2, threads=3)
    assert bundles(config, "prefill") == [{"CPU": 12.0, "GPU": 4.0}] * 2
    assert Place().selector(first=True) == {}
    place = Place(("L40S",), ("H200", "L40S"), ("8",), ("44", "140"))
    same = {NVLINK_LABEL: "8", MEMORY_LABEL: "in(44,140)"}
    assert place.selector(first=True) == {GPU_LABEL: "L40S", **same}
    assert place.selector(first=False) == {GPU_LABEL: "in(H200,L40S)", **same}


def test_ray_understands_what_it_is_asked() -> None:
    from ray._private.label_utils import validate_label_selector

    selector = Place(("L40S",), ("H200", "L40S"), ("4", "8")).selector(first=False)
    assert validate_label_selector(selector) is None


def test_nodes_in_words() -> None:
    assert described([H200, H200, L40S, UNKNOWN]) == (
        "2 nodes with 8 x H200 (150 GB, NVLink of 8), 1 node with 4 x L40S (47 GB), "
        "1 node with 4 x GPUs of unknown type (memory unknown)"
    )
