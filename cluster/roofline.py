"""What a model's steps take on a GPU before anybody measured them: an analytic prior for `cluster/perfmodel.py`.

Every operation of a layer takes what its arithmetic or its bytes take, whichever is longer (Williams et al.,
"Roofline", CACM 2009), rounded where the two meet, with the efficiencies that good kernels reach. The constants were
fitted to published step times of vLLM and TensorRT-LLM on H100; errors of 5-25 % are usual, and what a worker measures
replaces all of it. It knows dense transformers with grouped-query attention, and no CPU: there the general prior stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.messages import Rates
from cluster.perfmodel import PRIOR

LAUNCH_S = 3.5e-6  # of a matrix product
PREFILL_ATTENTION_S, DECODE_ATTENTION_S, ELEMENTWISE_S = 14e-6, 13e-6, 6.4e-6  # fixed costs per layer
STEP_S, SEQUENCE_S = 0.6e-3, 3.4e-6  # the engine's own time
PREFILL_ATTENTION, DECODE_ATTENTION = 0.55, 0.88  # parts of peak arithmetic, of memory bandwidth
KV_READ = 0.8  # part of memory bandwidth at which prefill reads its context
ELEMENTWISE = 13  # times that norms, activations and rotations move an activation
HOP_S = 10e-6  # from one pipeline stage to the next
MEMORY_USED, RESERVE_BYTES = 0.9, 2e9  # of a GPU's memory for weights and KV; activations and graphs
DISK_BYTES_S, NETWORK, FETCH_MS = 6e9, 0.87, (0.5, 1.0, 3.0)  # a drive pair; part of a NIC's rate; memory, disk, remote

# tp -> (seconds, bytes per second) of an all-reduce: of one that a kernel does by itself, of NCCL's, on an H100
REDUCE = {
    2: ((8.4e-6, 47.5e9), (20e-6, 250e9)),
    4: ((9.8e-6, 35.6e9), (25e-6, 195e9)),
    8: ((11.7e-6, 35.6e9), (30e-6, 180e9)),
}
REDUCE_NVLINK = 450e9
ITEM_BYTES = {"bfloat16": 2, "fp8": 1}  # of weights and what they are multiplied with
# bytes of an element -> (part of peak arithmetic, of memory bandwidth); fp8's includes quantizing the inputs
EFFICIENCY = {2: (0.88, 0.79), 1: (0.54, 0.84)}


@dataclass(frozen=True, slots=True)
class ModelShape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    kv_bytes: int = 2  # of an element of KV: bfloat16 also where the weights are not

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp) + 2 * self.vocab * self.hidden

    @property
    def kv_token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes


@dataclass(frozen=True, slots=True)
class Gpu:
    """Dense peaks; bytes and operations per second."""

    flops: dict[int, float]  # bytes of an element -> operations
    memory: float
    capacity: float  # bytes
    nvlink: float  # per direction
    network: float
    pcie: float  # what copies reach
    efficiency: float = 1.0  # of its memory against an H100's


MODELS = {
    "Llama-3-8B": ModelShape(32, 4096, 32, 8, 128, 14_336, 128_256),
    "Llama-3-70B": ModelShape(80, 8192, 64, 8, 128, 28_672, 128_256),
    "Qwen3-32B": ModelShape(64, 5120, 64, 8, 128, 25_600, 151_936),
}
# data sheets, by the names that drivers have; only the H100 and H200 were held against published step times
GPUS = {
    "A10G": Gpu({2: 70e12, 1: 70e12}, 0.6e12, 24e9, 25e9, 12.5e9, 25e9),  # no NVLink: sums go over PCIe
    "A100": Gpu({2: 312e12, 1: 312e12}, 2.04e12, 80e9, 300e9, 25e9, 25e9),  # no fp8 arithmetic: unpacked to bfloat16
    "B200": Gpu({2: 2250e12, 1: 4500e12}, 8e12, 180e9, 900e9, 50e9, 52e9),
    "H100": Gpu({2: 989e12, 1: 1979e12}, 3.35e12, 80e9, 450e9, 50e9, 52e9),
    "H20": Gpu({2: 148e12, 1: 296e12}, 4.0e12, 96e9, 450e9, 50e9, 52e9),
    "H200": Gpu({2: 989e12, 1: 1979e12}, 4.8e12, 141e9, 450e9, 50e9, 52e9, 0.96),
    "L4": Gpu({2: 121e12, 1: 242e12}, 0.3e12, 24e9, 25e9, 12.5e9, 25e9),
    "L40S": Gpu({2: 362e12, 1: 733e12}, 0.864e12, 48e9, 25e9, 12.5e9, 25e9),
}


def prior(model: ModelShape, gpu: str, tp: int, pp: int, dtype: str, step_tokens: int) -> Rates:
    """Coefficients through a few steps of the full model. `gpu` is any device name that has one of GPUS as a word, as
    drivers give it; of others, of CPUs and of other dtypes nothing is known but PRIOR. A step has passed all stages."""
    known = find(gpu)
    if known is None or dtype not in ITEM_BYTES:
        return replace(PRIOR, step_tokens=step_tokens)

    def prefill(tokens: int, context: int) -> float:
        return step_ms(model, known, tp, pp, dtype, [(tokens, context)])

    def decode(batch: int, kv_tokens: int) -> float:
        return step_ms(model, known, tp, pp, dtype, [], batch, kv_tokens)

    full, part, far, batch = step_tokens, max(1, step_tokens // 4), 8 * 1024, 64
    pair = (prefill(full, far) - prefill(full, 0)) / (full * far)
    token = (prefill(full, 0) - prefill(part, 0) - pair * (full**2 - part**2) / 2) / (full - part)
    sequence = (decode(batch, 0) - decode(1, 0)) / (batch - 1)
    bytes_s = (known.pcie * tp, DISK_BYTES_S, NETWORK * known.network * tp)  # every rank has its own links
    memory, disk, remote = zip(FETCH_MS, (1e3 / rate for rate in bytes_s), strict=True)
    return Rates(
        prefill=(max(0.0, prefill(full, 0) - token * full - pair * full**2 / 2), token, pair),
        decode=(decode(1, 0) - sequence, sequence, (decode(batch, far) - decode(batch, 0)) / far),
        memory=memory,
        disk=disk,
        remote=remote,
        step_tokens=step_tokens,
    )


def step_ms(
    model: ModelShape,
    gpu: Gpu,
    tp: int,
    pp: int,
    dtype: str,
    chunks: Sequence[tuple[int, int]],  # (tokens, context) of prefill
    batch: int = 0,  # sequences that decode beside them
    kv_tokens: int = 0,  # their context in all
) -> float:
    """One step from the first stage to the last."""
    size = ITEM_BYTES[dtype]
    tokens = sum(take for take, _ in chunks) + batch
    sequences = len(chunks) + batch
    layer = _matrices_s(model, gpu, tp, size, tokens) + _attention_s(model, gpu, tp, chunks, batch, kv_tokens)
    layer += ELEMENTWISE_S + ELEMENTWISE * 2 * model.hidden * tokens / gpu.memory * (0.5 + 0.5 / tp)
    layer += 2 * _reduce_s(gpu, tp, 2 * tokens * model.hidden)
    head = _product_s(gpu, 2, sequences, model.vocab / tp, model.hidden)
    hops = (pp - 1) * (HOP_S + 2 * tokens * model.hidden / gpu.nvlink)
    return 1e3 * (model.layers * layer + head + hops + STEP_S + SEQUENCE_S * sequences)


def kv_tokens(model: ModelShape, gpu: Gpu, tp: int, pp: int, dtype: str) -> int:
    """How many tokens' KV fits beside the weights; zero or less: the model does not fit."""
    gpus = tp * pp
    free = (MEMORY_USED * gpu.capacity - RESERVE_BYTES) * gpus - model.parameters * ITEM_BYTES[dtype]
    return int(free // model.kv_token_bytes)


def find(device: str) -> Gpu | None:
    """By the name alone, as a word: an L4 is no L40S."""
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", device)), None)


def _matrices_s(model: ModelShape, gpu: Gpu, tp: int, size: int, tokens: int) -> float:
    """The four products of a layer: QKV, attention's output, gate and up, down."""
    attention = model.heads * model.head_dim / tp
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim / tp
    return sum(
        _product_s(gpu, size, tokens, columns, rows)
        for columns, rows in (
            (qkv, model.hidden),
            (model.hidden, attention),
            (2 * model.mlp / tp, model.hidden),
            (model.hidden, model.mlp / tp),
        )
    )


def _product_s(gpu: Gpu, size: int, m: float, columns: float, rows: float) -> float:
    """[m, rows] x [rows, columns], weights and inputs of `size` bytes, outputs of two."""
    compute, memory = EFFICIENCY[size]
    moved = size * columns * rows + 2 * m * columns + size * m * rows
    return (
        _smooth(2 * m * columns * rows / (compute * gpu.flops[size]), moved / (memory * gpu.efficiency * gpu.memory))
        + LAUNCH_S
    )


def _attention_s(
    model: ModelShape, gpu: Gpu, tp: int, chunks: Sequence[tuple[int, int]], batch: int, kv_tokens: int
) -> float:
    token_bytes = 2 * model.kv_heads / tp * model.head_dim * model.kv_bytes
    seconds = 0.0
    if chunks:
        pairs = sum(take * (context + take / 2) for take, context in chunks)
        read = sum(take + context for take, context in chunks) * token_bytes
        compute = 4 * model.heads / tp * model.head_dim * pairs / (PREFILL_ATTENTION * gpu.flops[2])
        seconds += max(compute, read / (KV_READ * gpu.memory)) + PREFILL_ATTENTION_S
    if batch:
        seconds += kv_tokens * token_bytes / (DECODE_ATTENTION * gpu.memory) + DECODE_ATTENTION_S
    return seconds


def _reduce_s(gpu: Gpu, tp: int, size_bytes: float) -> float:
    if tp == 1:
        return 0.0
    ways = REDUCE[min((known for known in REDUCE if known >= tp), default=max(REDUCE))]
    return min(seconds + size_bytes / (rate * gpu.nvlink / REDUCE_NVLINK) for seconds, rate in ways)


def _smooth(x: float, y: float) -> float:
    """max(x, y), rounded where they are close."""
    most = max(x, y)
    return float(most * ((x / most) ** 4 + (y / most) ** 4) ** 0.25)
