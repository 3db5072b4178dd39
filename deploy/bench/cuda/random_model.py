"""A decoder of Llama 3 8B's shape with random weights on the GPU, behind the engine's own code, and steps for it."""

from __future__ import annotations

import functools
import random

import numpy as np
import torch
from torch import Tensor

from cluster.messages import Generation, Sampling
from kernels.linear import Linear
from workers.architecture import Architecture, Rope, layout, sizes
from workers.cache import KvCache
from workers.device_batch import BlockTables, DeviceBatch, fields, fill, plan
from workers.links import NoLinks
from workers.model import Decoder
from workers.rope import rope_table
from workers.runner import Chunk
from workers.sequence import Sequence
from workers.shard import whole
from workers.weights import LayerWeights, Weights

BLOCK_SIZE = 16
MAX_CONTEXT = 8192
LLAMA = Architecture(
    family="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_epsilon=1e-5,
    rope=Rope("default", 500_000.0),
    max_context=MAX_CONTEXT,
    windows=(0,) * 32,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied=False,
    eos_token_ids=(),
)


def weights(a: Architecture) -> Weights:
    heads = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.empty(outputs, inputs, dtype=torch.bfloat16, device="cuda").normal_(0.0, inputs**-0.5)

    def norm() -> Tensor:
        return torch.ones(a.hidden_size, dtype=torch.bfloat16, device="cuda")

    layers = [
        LayerWeights(
            attention_norm=norm(),
            qkv=Linear(matrix(heads, a.hidden_size)),
            qk_norm=None,
            output=Linear(matrix(a.hidden_size, a.num_heads * a.head_dim)),
            mlp_norm=norm(),
            gate_up=Linear(matrix(2 * a.intermediate_size, a.hidden_size)),
            down=Linear(matrix(a.hidden_size, a.intermediate_size)),
        )
        for _ in range(a.num_layers)
    ]
    return Weights(
        embedding=matrix(a.vocab_size, a.hidden_size),
        layers=tuple(layers),
        norm=norm(),
        logits=Linear(matrix(a.vocab_size, a.hidden_size)),
    )


def read_bytes(a: Architecture) -> int:
    """Of a decode step: every matrix but the embedding, of which it reads a row per sequence."""
    attention = (2 * a.num_heads + 2 * a.num_kv_heads) * a.head_dim * a.hidden_size
    layers = a.num_layers * (attention + 3 * a.hidden_size * a.intermediate_size)
    return 2 * (layers + a.vocab_size * a.hidden_size)


@functools.cache
def decoder(a: Architecture) -> tuple[Decoder, Weights, Tensor]:
    """With its weights and rotary table; one per process, 16 GB."""
    made = weights(a)
    table = rope_table(a.rope, a.head_dim, MAX_CONTEXT, torch.bfloat16).to("cuda")
    return Decoder(a, whole(sizes(a)), made, table, NoLinks()), made, table


def step(a: Architecture, batch: int, context: int) -> tuple[DeviceBatch, KvCache]:
    """A decode step of `batch` sequences, each the last of `context` tokens, over random keys and values."""
    each = -(-context // BLOCK_SIZE)
    cache = KvCache(layout(a, "bfloat16", BLOCK_SIZE), batch * each, torch.device("cuda"))
    cache.blocks.normal_()
    order = np.random.default_rng(0).permutation(batch * each).tolist()
    chunks = []
    for index in range(batch):
        prompt = tuple(random.choices(range(a.vocab_size), k=context))
        sequence = Sequence(Generation(str(index), prompt, (), Sampling(), b"", 0), "", b"", 0.0)
        sequence.block_table = order[index * each : (index + 1) * each]
        chunks.append(Chunk(sequence, context - 1, 1))
    planned = plan(chunks, BlockTables(), BLOCK_SIZE, a.num_heads // a.num_kv_heads, {})
    words = np.zeros(fields(planned.shape)[1], np.int32)
    fill(words, planned.shape, planned, BLOCK_SIZE)
    device = torch.tensor(words.tolist(), dtype=torch.int32, device="cuda")
    return DeviceBatch.over(device, planned.shape), cache
