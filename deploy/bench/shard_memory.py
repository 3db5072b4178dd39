"""How much memory a rank of a sharded worker takes at most, for a model of about 1 GB with random weights.

Every rank is a process of its own that loads its shard and computes a prompt, as in a worker. Its peak is compared with
what it must hold: its share of the weights times 1.15 (one matrix is there twice while it is packed), its KV cache, and
a constant (interpreter, libraries and the buffers of a step), which is stated.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluster.messages import Generation, Sampling
from deploy.bench.report import Figure
from workers.architecture import Architecture, load_architecture, sizes
from workers.model_runner import ModelRunner
from workers.process_links import ProcessLinks, Rendezvous
from workers.runner import Chunk
from workers.safetensors_writer import Planned, write_shards
from workers.sequence import Sequence
from workers.shard import Shard, shards

GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2))
MIB = 2**20
MARGIN = 1.15
CONSTANT = 288 * MIB  # 234 of them before the model is loaded: the interpreter and torch
KV_MEMORY = 64 * MIB  # of a worker
CONTEXT, CHUNK = 1024, 256  # tokens
TIMEOUT_S = 300.0
_open: list[ProcessLinks] = []
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 16_384,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one rank, in bytes."""

    share: int  # of the weights
    kv: int
    before: int  # resident before the model was loaded
    peak: int

    @property
    def allowed(self) -> float:
        return MARGIN * self.share + self.kv + CONSTANT


def measure() -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        total = _write_model(Path(folder))
        for tp, pp in GRIDS:
            worst = max(_ranks(Path(folder), tp, pp), key=lambda memory: memory.peak / memory.allowed)
            name = f"peak memory of a rank, {total / 1e9:.2f} GB in fp32, tp={tp} pp={pp}"
            figures.append(Figure("shards", name, worst.peak / MIB, "MiB", worst.allowed / MIB, lower_is_better=True))
            figures.append(Figure("shards", f"  its share of the weights, tp={tp} pp={pp}", worst.share / MIB, "MiB"))
            figures.append(Figure("shards", f"  before it loads, tp={tp} pp={pp}", worst.before / MIB, "MiB"))
    return figures


def _ranks(directory: Path, tp: int, pp: int) -> list[Memory]:
    """Load and run all ranks of one worker at once, each in a new process."""
    rendezvous = Rendezvous("127.0.0.1")
    with ProcessPoolExecutor(tp * pp, multiprocessing.get_context("spawn")) as pool:
        try:
            work = partial(_rank, directory, tp, pp, rendezvous.address)
            return list(pool.map(work, range(tp * pp), timeout=TIMEOUT_S))
        finally:
            rendezvous.close()


def share(a: Architecture, shard: Shard, itemsize: int) -> int:
    """Bytes of the weights that this shard multiplies with."""
    heads, kv_heads, layers, columns, words = (
        last - first
        for first, last in (shard.heads, shard.kv_heads, shard.layers, shard.intermediate, shard.vocabulary)
    )
    attention = (2 * heads + 2 * kv_heads) * a.head_dim * a.hidden_size
    layer = attention + 3 * a.hidden_size * columns + 2 * a.hidden_size
    ends = shard.first_stage + shard.last_stage
    return itemsize * (layers * layer + ends * words * a.hidden_size)


def _write_model(directory: Path) -> int:
    """Returns the bytes of its weights."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    a = load_architecture(directory)
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    hidden, columns = a.hidden_size, a.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, hidden)}
    for layer in range(a.num_layers):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (q, hidden),
            f"{name}.self_attn.k_proj.weight": (kv, hidden),
            f"{name}.self_attn.v_proj.weight": (kv, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, q),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.mlp.gate_proj.weight": (columns, hidden),
            f"{name}.mlp.up_proj.weight": (columns, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, columns),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (a.vocab_size, hidden)}
    planned = {name: Planned(shape, "F32", partial(_random, shape)) for name, shape in shapes.items()}
    write_shards(directory, planned, lambda _: None)
    return sum(tensor.nbytes for tensor in planned.values())


def _random(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    values = np.random.default_rng(math.prod(shape)).standard_normal(shape, np.float32)
    return values * np.float32(0.02) if len(shape) > 1 else np.ones(shape, np.float32)


def _rank(directory: Path, tp: int, pp: int, rendezvous: str, rank: int) -> Memory:
    """In a process of its own."""
    torch.set_num_threads(1)
    shard = shards(sizes(load_architecture(directory)), tp, pp)[rank]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = _status("VmRSS")
    links = ProcessLinks.join(rendezvous, shard, TIMEOUT_S)
    runner = ModelRunner.load(directory, "float32", 16, KV_MEMORY, CONTEXT, shard=shard, links=links)
    prompt = tuple(range(100, 100 + CONTEXT - 1))
    generation = Generation("memory", prompt, (), Sampling(max_tokens=1, temperature=0.0), b"", 0)
    sequence = Sequence(generation, router_id="", root=b"", deadline=math.inf)
    sequence.block_table = list(range(CONTEXT // 16))
    for first in range(0, len(prompt), CHUNK):
        runner.run([Chunk(sequence, first, min(CHUNK, len(prompt) - first))])
    _open.append(links)  # until the process ends: a stage may not have taken what the one before has sent
    kv = runner.num_blocks * shard.part(runner.layout).block_bytes
    return Memory(share(runner.architecture, shard, 4), kv, before, _status("VmHWM"))


def _status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
